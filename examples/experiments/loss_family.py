"""With a deep head and long training it matters little which contrastive loss it is (P1, Fig. 1, Tables A.1 to A.3).

    python examples/experiments/loss_family.py

Five losses of one family, alignment and a distribution term, train the same encoder: under heads of several depths, and
for several lengths, each with a learning rate that falls to 0 at its end. What counts is the last row of the table, how
far the best of the losses is from the worst.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder of `simclr` and `experiments` in the place of this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments import figures, training
from experiments.results import MISSING, Spread
from experiments.study import Study

LOSSES = {
    "NT-Xent": dict(loss="nt_xent"),
    "decoupled NT-Xent": dict(loss="decoupled"),
    "SWD to the normal": dict(loss="swd-normal"),
    "SWD to the hypercube": dict(loss="swd-hypercube"),
    "SWD to the hypersphere": dict(loss="swd-hypersphere"),
}
UNTRAINED = "untrained"
STEPS, HEADS = [250, 1000], [1, 2, 3]  # at desk
EPOCHS = [100, 200, 400, 800]
# LARS at lr * root of the batch, and ten epochs of warm-up.
CIFAR10 = dict(arch="resnet50", batch=128, optimizer="lars", lr=0.2, head_out=64, strength=0.5)
IMAGENET = dict(arch="resnet50", batch=1024, optimizer="lars", lr=0.075, head_out=128)
PAPER = [("cifar10", 2, CIFAR10), ("imagenet", 2, IMAGENET), ("imagenet", 3, IMAGENET)]


def cases(scale):
    """First the untrained encoder of each data set, then every loss under every head for every length."""
    if scale == "desk":
        train = training.DESK
        return [_case(UNTRAINED, "digits", 0, 0, dict(train, steps=1)),
                *(_case(loss, "digits", head, steps, dict(train, **options, steps=steps))
                  for head in HEADS for steps in STEPS for loss, options in LOSSES.items())]
    return [*(_case(UNTRAINED, name, 0, 0, dict(train, epochs=1)) for name, head, train in PAPER if head == 2),
            *(_case(loss, name, head, epochs, dict(train, **options, **_weight(loss, train), epochs=epochs,
                                                   warmup=10 / epochs))
              for name, head, train in PAPER for epochs in EPOCHS for loss, options in LOSSES.items())]


def _case(loss, name, head, length, train):
    return dict(loss=loss, data=name, head=head, length=length, train=train | (dict(head_layers=head) if head else {}))


def _weight(loss, train):
    """P1's 0.1 beside a mean over the entries of a projection, for the sum over them that the trainer's loss has."""
    return dict(loss_weight=round(0.1 * train["head_out"], 1)) if loss == "decoupled NT-Xent" else {}


def measure(case, seed, place):
    begin = training.untrained if case["loss"] == UNTRAINED else training.train
    return dict(linear=training.linear(begin(case, seed, place, training.pictures(case, place))))


def settings(results):
    """(title, factors) of every group of runs in which only the loss differs."""
    found = dict.fromkeys((case["data"], case["head"], case["length"])
                          for case in (record["case"] for record in results.records) if case["head"])
    kinds = {name: "steps" if name == "digits" else "epochs" for name, _, _ in found}
    return [(f"{name}, {head} layer{'s'[: head > 1]}, {length} {kinds[name]}",
             dict(data=name, head=head, length=length)) for name, head, length in found]


def gap(results, factors):
    """The best loss less the worst, in points, seed by seed; None before all are there."""
    found = [results.spread("linear", 100.0, loss=loss, **factors) for loss in LOSSES]
    if not all(found) or len({len(spread.values) for spread in found}) > 1:
        return None
    return Spread(tuple(max(seed) - min(seed) for seed in zip(*(spread.values for spread in found))))


def table(results):
    groups = settings(results)
    rows = [[loss, *(results.cell("linear", loss=loss, **factors) for _, factors in groups)] for loss in LOSSES]
    gaps = [gap(results, factors) for _, factors in groups]
    before = [results.cell("linear", loss=UNTRAINED, data=factors["data"]) for _, factors in groups]
    return (["loss", *(title for title, _ in groups)], *rows, [UNTRAINED, *before],
            ["best less worst", *(MISSING if value is None else format(value, ".1f") for value in gaps)])


def figure(results):
    groups, panels = settings(results), []
    for name, head in dict.fromkeys((factors["data"], factors["head"]) for _, factors in groups):
        lengths = [factors["length"] for _, factors in groups if (factors["data"], factors["head"]) == (name, head)]
        series = [(loss, results.points("linear", "length", lengths, loss=loss, data=name, head=head))
                  for loss in LOSSES]
        before = results.spread("linear", 100.0, loss=UNTRAINED, data=name)
        levels = [(UNTRAINED, before.mean)] if before else []
        panels.append((f"{name}, head of {head} layer{'s'[: head > 1]}", series, levels))
    unit = "steps" if results.factor("data") == ["digits"] else "epochs"
    return figures.curves(panels or [("", [], [])], f"length of training [{unit}]", "linear probe [%]", limits=None,
                          log_base=2)


STUDY = Study(
    name="loss_family",
    title="With a deep head the losses differ little",
    source="P1, Fig. 1 and Tables A.1 to A.3",
    published="""Linear probe in per cent of a ResNet-50, CIFAR-10 with batches of 128, ImageNet with 1024. From 100 to
800 epochs, what lies between the best and the worst of the losses falls from 2.7 to 0.6 points on CIFAR-10; on ImageNet
a third layer of the head takes it from 1.8 to 0.5 at 100 epochs and from 1.2 to 0.5 at 800.

| | CIFAR-10, 2 layers: 100 epochs | 800 | ImageNet, 2 layers: 100 | 800 | ImageNet, 3 layers: 100 | 800 |
| --- | --- | --- | --- | --- | --- | --- |
| NT-Xent | 87.4 | 93.9 | 65.6 | 69.8 | 66.8 | 70.9 |
| decoupled NT-Xent | 87.8 | 94.0 | 66.0 | 70.1 | 66.6 | 70.8 |
| SWD to the normal | 86.3 | 93.8 | 65.0 | 69.3 | 66.6 | 71.1 |
| SWD to the hypercube | 85.1 | 93.4 | 64.2 | 68.9 | 66.3 | 71.3 |
| SWD to the hypersphere | 87.0 | 93.8 | 65.8 | 69.6 | 66.6 | 70.8 |
""",
    cases=cases,
    measure=measure,
    table=table,
    figure=figure,
    verdict="hardly: the order of the losses does",
    found="After 1000 steps the order of the losses is that of P1's first hundred epochs of CIFAR-10: the decoupled "
    "loss before NT-Xent, then SWD to the hypersphere, to the normal and to the hypercube. After 250 steps a deeper "
    "head seems to bring them closer, 15.6 points, 13.2 and 9.1, by as much as seeds differ; after 1000 it hardly "
    "does, 21.4 to 19.6. A training four times as long does not bring them closer but apart: a desk's training ends "
    "where the published one has hardly begun, and no loss was tuned, where P1 tunes every one. And here a head of "
    "one layer is best for every loss at 1000 steps.",
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
