"""What features keep of a picture: the picture that has the same features (P2, Fig. 2).

    python examples/experiments/feature_inversion.py

A U-Net of random weights that makes a picture of fixed noise prefers pictures that look natural ("Deep Image Prior",
Ulyanov et al. 2018). It is trained until its picture has the features of a given one: those of an encoder that was
trained without a head, those before and those behind the MLP head of another one. The closer the two pictures, the more
of the picture is in the features. At desk size the pictures are digits in any colour on ground of any colour.
"""

import itertools
import sys
from pathlib import Path

if not __package__:  # run by its path: the folder of `simclr` and `experiments` in the place of this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experiments import coloured, figures, training
from experiments.study import Study

NOISE = 0.1  # the noise is uniform from 0 to this
FEATURES = {  # of the encoder, or of its head
    "before an MLP head": dict(head_layers=2),
    "without a head": dict(head_layers=0),
    "behind the MLP head": dict(head_layers=2),
    "untrained": dict(head_layers=2),
}
BEHIND, UNTRAINED = "behind the MLP head", "untrained"
INVERSION = {  # pictures that are inverted, and how
    "desk": dict(pictures=8, updates=300, channels=16, depth=3, lr=0.01),
    "paper": dict(pictures=16, updates=3000, channels=64, depth=5, lr=0.01),
}
TRAIN = {  # behind the head there are as many numbers as before it
    "desk": dict(training.MOCO["desk"], steps=800, crop=[0.2, 1.0], head_out=64),
    "paper": dict(training.MOCO["paper"], head_out=2048),
}
SHOWN, SHOWN_SIDE = 5, 64  # pictures of the figure, and pixels of them at most


def cases(scale):
    return [dict(features=name, data="imagenet" if scale == "paper" else "digits", inversion=INVERSION[scale],
                 train=TRAIN[scale] | settings)
            for name, settings in FEATURES.items()]


class UNet(nn.Module):
    """Noise [1, channels, side, side] to a picture [1, out, side, side] in 0..1, with a skip connection a level."""

    def __init__(self, channels, out, depth):
        super().__init__()
        self.down = nn.ModuleList(_block(channels, channels, stride=2) for _ in range(depth))
        self.up = nn.ModuleList(_block(2 * channels, channels) for _ in range(depth))
        self.last = nn.Conv2d(channels, out, 1)

    def forward(self, noise):
        levels = [noise]
        for block in self.down:
            levels.append(block(levels[-1]))
        rows = levels.pop()
        for block in self.up:
            beside = levels.pop()
            rows = block(torch.cat([F.interpolate(rows, beside.shape[2:], mode="bilinear"), beside], dim=1))
        return self.last(rows).sigmoid()


def _block(before, after, stride=1):
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.LeakyReLU(0.1))


def invert(features, picture, unit, updates, channels, depth, lr):
    """A picture [C, side, side] with the features of `picture`, and the squared distance of the two, by `unit`.

    `features` maps [1, C, side, side] to [1, D]; `unit` is a squared distance there that counts as one. The learning
    rate falls to 0 along half a cosine. Draws are those of the global generator.
    """
    target = features(picture[None]).detach()
    network = UNet(channels, len(picture), depth).to(picture.device)
    noise = NOISE * torch.rand(1, channels, *picture.shape[1:], device=picture.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        made = network(noise)
        distance = (features(made) - target).square().sum() / unit
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
        schedule.step()
    return made[0].detach(), distance.item()


def measure(case, seed, place):
    if case["data"] == "digits":
        settings = training.chosen(case)
        source = coloured.source(strength=settings.strength, crop=settings.crop, seed=seed)
    else:
        source = training.folder_source(case, place)
    begin = training.untrained if case["features"] == UNTRAINED else training.train
    trainer = begin(case, seed, place, source)
    network = trainer.method.network.eval().requires_grad_(False)
    features = network if case["features"] == BEHIND else network.encoder
    options = dict(case["inversion"])
    count = options.pop("pictures")
    index = torch.randperm(len(source.test), generator=torch.Generator().manual_seed(seed)).tolist()
    read = (source.test.read(i) for i in index)
    read = (source.plain(picture) for picture in read if picture is not None)
    originals = torch.stack(list(itertools.islice(read, count))).to(place.device)
    # How far apart pictures are, on average, makes the distances in different features comparable.
    unit = features(originals).var(0).sum().clamp_min(1e-12)
    torch.manual_seed(seed)
    found = [invert(features, picture, unit, **options) for picture in originals]
    pairs = [(original.cpu(), made.cpu()) for original, (made, _) in zip(originals, found)]
    scores = [(correlation(*pair), psnr(*pair)) for pair in pairs]
    result = dict(
        correlation=float(np.mean([score for score, _ in scores])),
        psnr=float(np.mean([score for _, score in scores])),
        distance=float(np.mean([distance for _, distance in found])),
    )
    if seed == 0:  # those of the figure
        result["originals"], result["made"] = ([_bytes(picture) for picture in part[:SHOWN]] for part in zip(*pairs))
    return result


def correlation(a, b):
    """Of the pixels of two pictures, over all channels: -1 to 1; 0 where one of them is flat."""
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return F.cosine_similarity(a, b, dim=0).item()


def psnr(a, b):
    """In decibels, of pictures in 0..1."""
    return -10 * (a - b).square().mean().clamp_min(1e-10).log10().item()


def _bytes(picture):
    """[h][w][3] of whole numbers up to 255."""
    if picture.shape[1] > SHOWN_SIDE:
        picture = F.interpolate(picture[None], (SHOWN_SIDE, SHOWN_SIDE), mode="bilinear", antialias=True)[0]
    return (255 * picture).round().clamp(0, 255).int().permute(1, 2, 0).tolist()


def table(results):
    rows = [[name, results.cell("correlation", ".2f", 1, features=name), results.cell("psnr", ".1f", 1, features=name),
             results.cell("distance", ".1e", 1, features=name)] for name in FEATURES]
    return ["features", "correlation with the original", "PSNR [dB]", "distance of the features"], *rows


def figure(results):
    rows = []
    for name in FEATURES:
        for found in [found for found in results.results(features=name) if "made" in found][:1]:
            rows += [] if rows else [("original", _arrays(found["originals"]))]
            rows.append((name.replace(" an MLP", "\nan MLP").replace(" the MLP", "\nthe MLP"), _arrays(found["made"])))
    return figures.pictures(rows or [("", [])], [""] * (len(rows[0][1]) if rows else 1))


def _arrays(pictures):
    return [np.array(picture, dtype=np.uint8) for picture in pictures]


STUDY = Study(
    name="feature_inversion",
    title="Before its head, a network keeps more of the picture",
    source="P2, Fig. 2",
    published="Pictures made of the features before an MLP head keep most of colour, shape, place and direction of the "
    "original; those made of features of a model without head, or behind the head, only what tells pictures apart. "
    "(MoCo v2 with a ResNet-50 on ImageNet; shown by examples, without numbers.)",
    cases=cases,
    measure=measure,
    table=table,
    figure=figure,
    verdict="partly: behind the head",
    found="Behind the head less is left than before it, a correlation of 0.34 against 0.41, as published; but without "
    "a head it is not less than before one, 0.47. What comes back are colours, of the ground above all: from 64 "
    "pooled numbers no picture is recognised, from whichever features, where P2 inverts 2048.",
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
