"""The way from a case to a trained encoder and its probes: the trainer of `simclr`, on any pictures.

`supervised` trains the same encoder on the labels, with the same views; `untrained` is the encoder as it begins.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from experiments import datasets
from simclr import cli, data, methods, model, probe, settings

DESK = dict(arch="convnet", width=8, batch=128, steps=500, lr=2e-3, warmup=0.05, augment="device", workers=0)
DIGIT, CANVAS = 14, 32  # pixels, of `pictures` at a desk
UNTRAINED, SUPERVISED = "untrained", "supervised"  # what a case's "method" may be, beside those of the trainer
# MoCo v2 on digits, and on ImageNet as P2 has it, whose 8 GPUs keep their batch norms apart: as many parts of a batch.
MOCO = {
    "desk": dict(DESK, method="moco-v2", queue=1024, momentum=0.99),
    "paper": dict(arch="resnet50", method="moco-v2", batch=256, epochs=100, optimizer="sgd", lr=0.03, warmup=0,
                  queue=65536, momentum=0.999, bn_splits=8, strength=0.5, crop=[0.2, 1.0]),
}


def arguments(train):
    """The trainer's command line for a dict of its settings: True is a switch, a list its values."""
    for name, value in train.items():
        yield f"--{name.replace('_', '-')}"
        if value is not True:
            yield from map(str, value if isinstance(value, (list, tuple)) else [value])


def chosen(case, pictures="pictures", *more):
    """The trainer's settings of a case, read from the command line that it stands for, and `more` of it."""
    return settings.parse([str(pictures), *arguments(case["train"]), *more], "trainer")


def folder_source(case, place, name=None, image_size=None):
    """The pictures of the folder for `name`, else for `case["data"]`, with the views that its settings ask for."""
    found = chosen(case, place.pictures(name or case["data"]))
    return data.open_data(found.data, image_size or found.image_size, found.strength, found.blur, found.crop)


def pictures(case, place, seed=0):
    """What to learn from, by `case["data"]`: digits somewhere on canvases that `seed` draws, or those of a folder."""
    if case["data"] == "digits":
        return datasets.canvas_source(datasets.load_digits(), [DIGIT], CANVAS, crop=chosen(case).crop, seed=seed)
    return folder_source(case, place)


def splits_of_a_rank(splits, world):
    """The trainer's `--bn-splits`, parts of a rank's share, for `splits` parts of a batch.

    Two of them or more: with one the norms of all ranks are joined, and what one says of a key is no secret.
    """
    return splits if splits == 1 else max(2, splits // world)


def prepare(case, seed, place, source, build=methods.build):
    """The trainer before its first step, or where its last checkpoint was; `build` makes its method.

    Of a case it needs "train", the settings of the trainer by their names on its command line.
    """
    found = chosen(case, "pictures", "--seed", str(seed), "--no-probe", "--quiet", "--resume",
                   "--checkpoint-every", "2000", "--out", str(place.folder))
    found.bn_splits = splits_of_a_rank(found.bn_splits, place.world)
    return cli.prepare(found, source, place.device, place.rank, place.world, build)


def train(case, seed, place, source, build=methods.build):
    """The trainer after its last step."""
    trainer = prepare(case, seed, place, source, build)
    trainer.run()
    trainer.log.close()
    return trainer


def untrained(case, seed, place, source, build=methods.build):
    """The trainer before its first step, for probes."""
    trainer = prepare(case, seed, place, source, build)
    trainer.log.close()
    return trainer


def by_method(case, seed, place, source, build=methods.build):
    """The trainer of `case["method"]` after its last step, or before its first one where that is "untrained".

    What is supervised or a VAE is built here, every other method by `build`.
    """
    method = case["method"]
    if method == UNTRAINED:
        return untrained(case, seed, place, source)
    return train(case, seed, place, source, {SUPERVISED: supervised, "VAE": vae}.get(method, build))


def features(trainer, train, test):
    """`probe.Features` of the trainer's encoder, frozen; of two splits of any pictures that its `plain` takes."""
    parts = [part for pictures in (train, test) for part in trainer.rows_of(pictures)]
    return probe.Features(*parts) if trainer.rank == 0 else None


def linear(trainer, train=None, test=None):
    """Accuracy of the linear probe, 0 to 1: of the source's splits, or of others. On ranks above 0 nothing."""
    found = features(trainer, train or trainer.source.train, test or trainer.source.test)
    return probe.linear_probe(found).top1 if trainer.rank == 0 else None


class Supervised(methods.Method):
    """Cross-entropy of a linear classifier on the encoder, on one view of each picture.

    `known` are labels [n], or shares [n, classes] that sum to 1 where several classes are in a picture.
    """

    views = 1

    def __init__(self, network, known):
        super().__init__(network)
        self.register_buffer("known", known, persistent=False)

    def targets(self, views, index):
        return self.known[index]

    def loss(self, rows, targets):
        return F.cross_entropy(rows[0].float(), targets)

    def top1(self, rows, targets):
        """Share of pictures for which a class in them is named."""
        named = rows[0].argmax(1)
        hits = named == targets if targets.ndim == 1 else targets.gather(1, named[:, None]) > 0
        return hits.float().mean()


def supervised(settings, source, dtype=None):
    """`build` for supervised training. `source.train.shares` [n, classes] are its targets, else its labels are."""
    encoder = model.build_encoder(settings.arch, source.channels, source.image_size, settings.width)
    head = nn.Linear(encoder.num_features, len(source.classes))
    known = getattr(source.train, "shares", source.train.labels)
    return Supervised(methods.Network(encoder, head, dtype=dtype), known)


class Autoencoder(nn.Module):
    """Encoder, two linear maps to mean and log-variance of `dim` latent numbers, and a decoder from a sample of them.

    Its rows are the reconstruction's logits, the means and the log-variances, side by side.
    """

    def __init__(self, encoder, shape, dim, width, dtype=None):
        super().__init__()
        self.encoder, self.shape, self.dtype = encoder, shape, dtype
        self.head = nn.Linear(encoder.num_features, 2 * dim)
        channels, side = shape[0], -(-shape[1] // 8)
        self.start = nn.Sequential(nn.Linear(dim, 8 * width * side * side), nn.Unflatten(1, (8 * width, side, side)))
        steps = [[nn.BatchNorm2d(before), nn.ReLU(inplace=True), nn.Upsample(scale_factor=2),
                  nn.Conv2d(before, after, 3, padding=1)]
                 for before, after in itertools.pairwise((8 * width, 4 * width, 2 * width, channels))]
        self.decoder = nn.Sequential(*itertools.chain(*steps))

    def forward(self, pictures):
        with methods.Network.autocast(self, pictures.device.type):
            mean, log_variance = self.head(self.encoder(pictures)).chunk(2, dim=1)
            sample = mean + torch.randn_like(mean) * (log_variance / 2).exp()
            logits = self.decoder(self.start(sample))[..., : self.shape[1], : self.shape[2]]
            return torch.cat([logits.flatten(1), mean, log_variance], dim=1)


class VAE(methods.Method):
    """A variational autoencoder (Kingma & Welling 2013) of pictures in 0..1, of which it sees one view."""

    views = 1

    def __init__(self, network, dim):
        super().__init__(network)
        self.dim = dim

    def targets(self, views, index):
        return views[0].flatten(1)

    def loss(self, rows, targets):
        """The bound on -log p of a picture: Bernoulli reconstruction, in nats, and divergence from the normal prior."""
        logits, mean, log_variance = rows[0].float().split([targets.shape[1], self.dim, self.dim], dim=1)
        reconstruction = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return (reconstruction + divergence).mean()

    def top1(self, rows, targets):
        """Share of the entries that are reconstructed on their side of one half: there is nothing to compare with."""
        return (rows[0][:, : targets.shape[1]] > 0).eq(targets > 0.5).float().mean()


def vae(settings, source, dtype=None):
    """`build` for a variational autoencoder with as many latent numbers as `settings.head_out`."""
    encoder = model.build_encoder(settings.arch, source.channels, source.image_size, settings.width)
    shape = (source.channels, source.image_size, source.image_size)
    return VAE(Autoencoder(encoder, shape, settings.head_out, settings.width, dtype), settings.head_out)
