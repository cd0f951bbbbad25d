"""The batch may be small where the learning rate goes with its root (P1, Table 2).

    python examples/experiments/batch_size.py

NT-Xent sees every picture equally often, in few large batches or in many small ones. The optimiser is LARS, with a
learning rate of 0.2 times the root of the batch, as P1 has it for small pictures.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder of `simclr` and `experiments` in the place of this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments import figures, training
from experiments.study import Study
from simclr import batches

UNTRAINED = 0  # in the place of a batch
BATCHES = {"desk": [32, 64, 128, 256, 512], "paper": [512, 1024, 2048]}
HEADS = {"desk": [2, 3], "paper": [2, 3, 4]}
EPOCHS = {"desk": [20, 60], "paper": [100, 200, 400, 800]}
PICTURES = 1438  # training digits
TRAIN = {
    "desk": dict(training.DESK, optimizer="lars", lr=0.2, lr_scaling="sqrt"),
    "paper": dict(arch="resnet50", optimizer="lars", lr=0.075, lr_scaling="sqrt", head_out=128),
}


def cases(scale):
    name, least = "imagenet" if scale == "paper" else "digits", min(BATCHES[scale])
    begin = dict(TRAIN[scale], batch=least, steps=1)
    return [dict(batch=UNTRAINED, head=0, epochs=0, data=name, train=begin),
            *(dict(batch=batch, head=head, epochs=epochs, data=name,
                   train=dict(TRAIN[scale], batch=batch, head_layers=head, **_length(scale, epochs, batch)))
              for head in HEADS[scale] for epochs in EPOCHS[scale] for batch in BATCHES[scale])]


def _length(scale, epochs, batch):
    """At desk in steps, of which a reduced run takes fewer; as published with ten epochs of warm-up."""
    if scale == "desk":
        return dict(steps=batches.steps_of(epochs, PICTURES, batch))
    return dict(epochs=epochs, warmup=10 / epochs)


def measure(case, seed, place):
    begin = training.train if case["batch"] else training.untrained
    return dict(linear=training.linear(begin(case, seed, place, training.pictures(case, place))))


def groups(results):
    """(head, epochs) of the trained ones."""
    return [(head, epochs) for head in results.factor("head") for epochs in results.factor("epochs") if head and epochs]


def trained(results):
    return [batch for batch in results.factor("batch") if batch]


def table(results):
    rows = [[f"{head} layers, {epochs} epochs",
             *(results.cell("linear", batch=batch, head=head, epochs=epochs) for batch in trained(results))]
            for head, epochs in groups(results)]
    rows.append(["untrained", *(results.cell("linear", batch=UNTRAINED) for _ in trained(results))])
    return ["head and training", *(f"batch {batch}" for batch in trained(results))], *rows


def figure(results):
    panels, before = [], results.spread("linear", 100.0, batch=UNTRAINED)
    for head in dict.fromkeys(head for head, _ in groups(results)):
        series = [(f"{epochs} epochs",
                   results.points("linear", "batch", trained(results), head=head, epochs=epochs))
                  for epochs in results.factor("epochs") if epochs]
        panels.append((f"head of {head} layers", series, [("untrained", before.mean)] if before else []))
    return figures.curves(panels or [("", [], [])], "batch", "linear probe [%]", limits=None, log_base=2)


STUDY = Study(
    name="batch_size",
    title="The size of the batch matters little",
    source="P1, Table 2",
    published="""NT-Xent on ImageNet, ResNet-50, LARS at 0.075 times the root of the batch; linear probe in per cent.

| head | batch | 100 epochs | 200 | 400 | 800 |
| --- | --- | --- | --- | --- | --- |
| 2 layers | 512 | 65.4 | 67.3 | 68.7 | 69.3 |
| | 1024 | 65.6 | 67.6 | 68.8 | 69.8 |
| | 2048 | 65.3 | 67.6 | 69.0 | 70.1 |
| 3 layers | 512 | 66.6 | 68.4 | 70.0 | 71.0 |
| | 1024 | 66.8 | 68.9 | 70.1 | 70.9 |
| | 2048 | 66.8 | 69.1 | 70.4 | 71.3 |
| 4 layers | 512 | 66.8 | 68.8 | 70.0 | 70.7 |
| | 1024 | 67.0 | 69.0 | 70.4 | 70.9 |
| | 2048 | 67.0 | 69.3 | 70.4 | 71.3 |
""",
    verdict="yes, up to a batch of 256",
    found="From 32 to 256 pictures nothing changes that the three seeds could tell: with a head of two layers and 60 "
    "epochs 52.3, 53.1, 49.8 and 53.1. With 512 the probe is the lowest in every row, 47.3 in this one: an epoch has "
    "two or three such steps. The longer training counts for more, 39.8 to 52.3 at a batch of 32. A third layer costs "
    "something instead of adding to it.",
    cases=cases,
    measure=measure,
    table=table,
    figure=figure,
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
