"""An encoder trained on whole pictures has local features that group their parts (P1, Fig. 3 and 4).

    python examples/experiments/local_features.py

K-means puts every location of the encoder's feature maps, of unit length, into one of k clusters, over several pictures
together; raw pixels of the same patches are clustered for comparison. At a desk one of the two sets of pictures are the
photographs from which the encoder has learned. One number says how well that fits what is known:
the adjusted mutual information of a location's cluster with the class of the digit that it lies on, the tile of the
photograph, or the class of the picture. By chance it is 0.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder of `simclr` and `experiments` in the place of this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

from experiments import clusters, datasets, figures, training
from experiments.study import Study

from torchvision.transforms import v2

METHODS = ["SimCLR", "supervised", "untrained", "pixels"]
LAYERS = (2, 3, 4)  # stages of the encoder, of 4
CLUSTERS, SHOWN = (4, 8, 16, 32), 16
COLUMNS = [(2, SHOWN), (3, SHOWN), (4, SHOWN), *((3, count) for count in CLUSTERS if count != SHOWN)]
PICTURES = {
    "digits": dict(canvas=64, size=16, number=8, length=4096, count=32),
    "photographs": dict(side=32, high=128, wide=192),
    "imagenet": dict(side=224, larger=448, count=10),
}
TRAIN = {
    "digits": dict(training.DESK, steps=300),
    "photographs": dict(training.DESK, steps=400),
    "imagenet": dict(arch="resnet50", batch=1024, epochs=100, optimizer="lars", head_layers=2),
}
SCALES = {"desk": ["digits", "photographs"], "paper": ["imagenet"]}


def cases(scale):
    return [dict(pictures=name, method=method, **PICTURES[name], train=TRAIN[name])
            for name in SCALES[scale] for method in METHODS]


def canvases(case, seed, place):
    """(source to train on, pictures [n, C, H, W] to cluster, what is known of each pixel [n, H, W], -1 for nothing)."""
    sizes, count = [case["size"]] * case["number"], case["count"]
    source = datasets.canvas_source(datasets.load_digits(place.pictures("digits")), sizes, case["canvas"], "grid",
                                    length=case["length"], crop=training.chosen(case).crop, seed=seed)
    known = torch.full((count, case["canvas"], case["canvas"]), -1)
    for one, corners, contents in zip(known, source.test.corners.tolist(), source.test.contents.tolist()):
        for (top, left), label in zip(corners, contents):
            one[top : top + case["size"], left : left + case["size"]] = label
    return source, torch.stack([source.plain(source.test.read(i)) for i in range(count)]), known


def photographs(case, seed, place):
    from sklearn.datasets import load_sample_images

    high, wide = case["high"], case["wide"]
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    rows, columns = datasets.PHOTO_TILES
    tiles = (torch.arange(high) * rows // high * columns)[:, None] + torch.arange(wide) * columns // wide
    known = torch.stack([tiles + number * (int(tiles.max()) + 1) for number in range(len(photos))])
    return datasets.photo_source(case["side"]), v2.functional.resize(photos, [high, wide]).float() / 255, known


def imagenet(case, seed, place):
    """Pictures from all over the classes, twice as wide as those to train on."""
    source, larger = training.folder_source(case, place, "imagenet", case["side"]), case["larger"]
    square = v2.Compose([v2.PILToTensor(), v2.Resize(larger, antialias=True), v2.CenterCrop(larger)])
    chosen = torch.linspace(0, len(source.test) - 1, case["count"]).long().tolist()
    read = [(source.test.read(index), source.test.labels[index]) for index in chosen]
    read = [(square(picture).float() / 255, label) for picture, label in read if picture is not None]
    known = torch.stack([label for _, label in read])[:, None, None].expand(-1, larger, larger)
    return source, torch.stack([picture for picture, _ in read]), known


SOURCES = {"digits": canvases, "photographs": photographs, "imagenet": imagenet}


def measure(case, seed, place):
    source, pictures, known = SOURCES[case["pictures"]](case, seed, place)
    pixels = case["method"] == "pixels"  # of which any encoder's feature maps say how they are cut into patches
    trainer = training.by_method(dict(case, method=training.UNTRAINED) if pixels else case, seed, place, source)
    if trainer.rank:
        return None
    result, pictures = {}, pictures.to(trainer.device)
    for layer, maps in clusters.feature_maps(trainer.method.network.encoder, pictures, LAYERS).items():
        # Pixels as they are: their length is the brightness.
        maps = clusters.patches(pictures, maps) if pixels else F.normalize(maps.float(), dim=1)
        for count in CLUSTERS:
            found = clusters.clustered(maps, count, seed)
            result[f"agreement, layer {layer}, k {count}"] = clusters.agreement(found, known)
            if (layer, count) in COLUMNS:
                result[f"map, layer {layer}, k {count}"] = found[0].tolist()
    half = F.avg_pool2d(pictures[:1].mean(1, keepdim=True), pictures.shape[2] // 64)
    return result | dict(picture=(255 * half[0, 0]).round().int().tolist())


def table(results):
    rows = [[f"{pictures}, {method}", *(results.cell(f"agreement, layer {layer}, k {count}", pictures=pictures,
                                                     method=method) for layer, count in COLUMNS)]
            for pictures in results.factor("pictures") for method in METHODS]
    return ["agreement x 100", *(f"layer {layer}, k = {count}" for layer, count in COLUMNS)], *rows


def figure(results):
    rows = []
    for pictures in results.factor("pictures") or PICTURES:
        for method in METHODS:
            found = results.results(pictures=pictures, method=method)[:1]
            shown = [np.array(found[0]["picture"]) if found else None]
            shown += [_coloured(found[0][f"map, layer {layer}, k {count}"], count) if found else None
                      for layer, count in COLUMNS]
            rows.append((f"{pictures},\n{method}", shown))
    return figures.pictures(rows, ["picture", *(f"layer {layer}, k = {count}" for layer, count in COLUMNS)])


def _coloured(clusters, count):
    """[h, w, 3]"""
    return matplotlib.colormaps["nipy_spectral"](np.array(clusters) / count)[..., :3]


STUDY = Study(
    name="local_features",
    title="Global training, local features",
    source="P1, Fig. 3 and 4",
    published="A ResNet-50 trained on ImageNet, its feature maps of pictures of 448 pixels clustered: with more "
    "clusters, regions follow the parts of the object, after SimCLR as after supervised training, but not with raw "
    "pixels; earlier layers show edges, later ones objects and their parts. (Pictures; there are no numbers.)",
    cases=cases,
    measure=measure,
    table=table,
    figure=figure,
    verdict="no: raw pixels are as good or better",
    found="On the photographs the groups of SimCLR's features fit the tiles better than those of the untrained "
    "encoder, in the fourth layer 34.5 against 25.6, and less well than those of supervised training, 43.3; the "
    "pagoda is apart from sky and trees. But raw pixels, which P1 found to be worse, do as well there and better "
    "in the layers before, 38.7 against 32.8 in the third: sky, wood and petals differ in colour already. On the "
    "canvases, where the cells of the fourth layer are those of the grid, raw pixels tell the "
    "digits apart, 75.0, and supervised features do, 51.8, but SimCLR's, at 1.9, less than random ones: after "
    "300 steps they say little about digits.",
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
