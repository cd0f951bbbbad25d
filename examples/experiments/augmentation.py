"""How strong augmentation may be, for a contrastive loss and for labels (P2, Table 2 and Fig. 3).

    python examples/experiments/augmentation.py

MoCo v2 and supervised training with the same views, of which either the crops become smaller or the colours change
more. At desk size the pictures are cut from 48 tiles of two photographs, which are the classes. Both are measured
alike, by a linear probe of the features on whole pictures. Training and test pictures are cut from the same tiles, so
they are more alike than ImageNet's. The outputs of the classifier that was trained with the weakest jitter are shown as
a map, of the same test pictures under three augmentations, with the purity of the neighbourhoods in them: the share of
a picture's ten nearest ones, by the cosine, that are of its class.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder of `simclr` and `experiments` in the place of this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from experiments import datasets, figures, training
from experiments.study import Study
from simclr import augment, batches, probe

MOCO, SUPERVISED, UNTRAINED = "MoCo v2", training.SUPERVISED, training.UNTRAINED
CROPS = {"20-100%": [0.2, 1.0], "20-50%": [0.2, 0.5], "2-10%": [0.02, 0.1]}  # shares of the area
JITTERS = {"1/8": 0.125, "1/4": 0.25, "1/2": 0.5, "1": 1.0}
CROP, JITTER = "20-100%", "1/2"  # where the other one varies
WEAKEST = "1/8"  # jitter in the training of the network whose map is shown
SIDE, TILES = 32, (4, 6)  # pixels; of each photograph
TRAIN = {
    MOCO: {"desk": dict(training.MOCO["desk"], steps=600), "paper": training.MOCO["paper"]},
    SUPERVISED: {
        "desk": dict(training.DESK, steps=600),
        "paper": dict(arch="resnet50", batch=256, epochs=100, optimizer="sgd", lr=0.1, warmup=0),
    },
}
# Crop and strength of the map's pictures; P2 does not say which its weak and strong ones are.
MAPS = {"none": None, "weak": ((0.5, 1.0), 0.125), "strong": ((0.2, 1.0), 1.0)}
CLASSES, EACH, NEAREST = 10, {"photographs": 20, "imagenet": 64}, 10  # of the map's pictures


def cases(scale):
    views = [(crop, JITTER) for crop in CROPS] + [(CROP, jitter) for jitter in JITTERS if jitter != JITTER]
    found = [_case(method, crop, jitter, scale) for method in TRAIN for crop, jitter in views]
    return [*found, _case(MOCO, CROP, JITTER, scale) | dict(method=UNTRAINED)]


def _case(method, crop, jitter, scale):
    train = dict(TRAIN[method][scale], crop=CROPS[crop], strength=JITTERS[jitter])
    name = "imagenet" if scale == "paper" else "photographs"
    return dict(method=method, crop=crop, jitter=jitter, data=name, train=train)


def measure(case, seed, place):
    if case["data"] == "photographs":
        settings = training.chosen(case)
        source = datasets.photo_source(SIDE, settings.strength, settings.crop, TILES)
    else:
        source = training.folder_source(case, place)
    trainer = training.by_method(case, seed, place, source)
    found = dict(linear=training.linear(trainer))
    if trainer.rank == 0 and (case["method"], case["crop"], case["jitter"]) == (SUPERVISED, CROP, WEAKEST):
        found |= maps(trainer, EACH[case["data"]], seed)
    return found


def maps(trainer, each, seed):
    """Of test pictures of ten classes: their classes, and under every augmentation purity and map."""
    source, labels = trainer.source, trainer.source.test.labels
    shown = torch.randperm(len(source.classes), generator=torch.Generator().manual_seed(seed))[:CLASSES]
    index = torch.cat([(labels == label).nonzero().flatten()[:each] for label in shown]).tolist()
    found = {}
    for name, recipe in MAPS.items():
        views = source.plain
        if recipe:
            crop, strength = recipe
            views = augment.photo_views(source.image_size, strength, source.image_size > augment.SMALL, crop)
        pictures = batches.RandomViews(source.test, views, seed, count=1)
        rows, read = _outputs(trainer, [pictures[0, i] for i in index])
        found |= {f"purity_{name}": purity(rows, labels[read]), f"map_{name}": _map(rows)}
    return found | dict(classes=torch.searchsorted(shown.sort().values, labels[read]).tolist())


@torch.no_grad()
def _outputs(trainer, samples):
    """Of the classifier, for the samples that could be read; and the indices of these."""
    batch, network = batches.collate(samples), trainer.method.network.eval()
    parts = batch.views[0].split(trainer.settings.batch)
    return torch.cat([network(part.to(trainer.device)).float().cpu() for part in parts]), batch.index


def purity(rows, labels):
    """Share of the ten nearest other rows, by the cosine, that have a row's label."""
    _, nearest = probe.nearest(rows, rows, len(rows))
    others = nearest[nearest != torch.arange(len(rows))[:, None]].view(len(rows), -1)[:, :NEAREST]
    return (labels[others] == labels[:, None]).float().mean().item()


def _map(rows):
    """t-SNE, centred and within -1 to 1."""
    from sklearn.manifold import TSNE

    points = TSNE(perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=0).fit_transform(rows.numpy())
    points = points - points.mean(0)
    return [[round(float(x), 3) for x in point] for point in points / abs(points).max()]


def table(results):
    views = [(crop, JITTER) for crop in CROPS] + [(CROP, jitter) for jitter in JITTERS]
    rows = [[method, *(results.cell("linear", method=method, crop=crop, jitter=jitter) for crop, jitter in views)]
            for method in TRAIN]
    untrained = results.cell("linear", method=UNTRAINED)
    baseline = dict(method=SUPERVISED, crop=CROP, jitter=WEAKEST)
    purities = ", ".join(f"{name} {results.cell(f'purity_{name}', **baseline)}" for name in MAPS)
    return (["", *(f"crops {crop}" for crop in CROPS), *(f"jitter {jitter}" for jitter in JITTERS)], *rows,
            [UNTRAINED, *(untrained for _ in views)],
            [f"purity of supervised outputs, pictures augmented: {purities}", *("" for _ in views)])


def figure(results):
    untrained = results.spread("linear", 100, method=UNTRAINED)
    levels = [(UNTRAINED, untrained.mean)] if untrained else []
    panels = [(title, [(method, results.points("linear", factor, values, method=method, **fixed)) for method in TRAIN],
               levels)
              for title, factor, values, fixed in (("smaller crops", "crop", CROPS, dict(jitter=JITTER)),
                                                   ("stronger jitter", "jitter", JITTERS, dict(crop=CROP)))]
    above = figures.curves(panels, "", "linear probe [%]", size=(4.2, 3.0))
    shown = results.results(method=SUPERVISED, crop=CROP, jitter=WEAKEST)[:1]
    titles = {"none": "no augmentation", "weak": "weak", "strong": "strong"}
    below = [figures.scatters([(titles[name], found[f"map_{name}"], found["classes"]) for name in MAPS])
             for found in shown]
    return figures.stacked(above, *below)


STUDY = Study(
    name="augmentation",
    title="Strong augmentation suits contrastive training more than supervised training",
    source="P2, Table 2 and Fig. 3",
    published="ImageNet, ResNet-50, 100 epochs, in per cent:\n\n"
    "| | baseline | crops 20-100% | crops 20-50% | crops 2-10% | jitter 1/8 | 1/4 | 1/2 | 1 |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    "| MoCo v2 | 64.4 | = baseline | 63.7 | 47.1 | 63.1 | 63.9 | 64.2 | 64.3 |\n"
    "| supervised | 75.5 | = baseline | 74.8 | 52.0 | 75.8 | 75.7 | 75.6 | 74.6 |\n\n"
    "On a map of supervised features ten classes of ImageNet are apart without augmentation and with a weak one, and "
    "one cloud with a strong one.",
    verdict="no; on the map it does",
    found="The map is as published: of the pictures as they are 89.2 in a hundred neighbours share a class, under a "
    "weak augmentation 75.7, under a strong one 28.2, and the classes are one cloud, to a network that was trained "
    "with the weakest jitter. The probes say the opposite of what was published: there MoCo v2 gains from jitter, "
    "here it loses by it, 87.7 to 77.1, and no less than supervised training, 93.1 to 84.3. Colours are much of what "
    "tells the tiles of two photographs apart. Small crops cost both little, 83.2 to 80.3 and 88.6 to 86.2: of a "
    "texture even a tenth is the texture.",
    cases=cases,
    measure=measure,
    table=table,
    figure=figure,
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
