"""The larger of two digits suppresses the smaller one (P1, Table 4).

    python examples/experiments/dominant_object.py

Two digits lie on every canvas. The first has one size in all runs, the second is as large at first, and grows. Linear
probes of the frozen encoder ask for a single digit on the canvas, of either size: contrastive training, which may tell
canvases apart by the large digit alone, is compared with training on the classes of both.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder of `simclr` and `experiments` in the place of this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments import datasets, figures, training
from experiments.study import Study

# Pixels. P1's small digit takes longer to be learnt than a desk has: there it has a larger share of the canvas.
GEOMETRY = {
    "desk": dict(data="digits", canvas=36, first=12, seconds=[12, 16, 20, 24, 28], length=4096),
    "paper": dict(data="mnist", canvas=112, first=20, seconds=[20, 30, 40, 50, 60, 70, 80], length=None),
}
METHODS = {
    "supervised": {},
    "SimCLR, temperature 0.1": dict(temperature=0.1),
    "SimCLR, temperature 0.5": dict(temperature=0.5),
    "untrained": {},
}
TRAIN = {
    "desk": dict(training.DESK, steps=600),
    "paper": dict(arch="resnet18", batch=1024, epochs=100, optimizer="lars", lr=0.2, head_layers=2, augment="device"),
}
DIGITS = {"first": "1st digit", "second": "2nd digit"}


def cases(scale):
    geometry = dict(GEOMETRY[scale])
    return [dict(method=name, second=second, **geometry, train=TRAIN[scale] | settings)
            for second in geometry.pop("seconds") for name, settings in METHODS.items()]


def measure(case, seed, place):
    digits = datasets.load_digits(place.pictures(case["data"]))
    source = datasets.canvas_source(digits, [case["first"], case["second"]], case["canvas"], length=case["length"],
                                    crop=training.chosen(case).crop, seed=seed)
    trainer = training.by_method(case, seed, place, source)
    sizes = list(dict.fromkeys([case["first"], case["second"]]))
    found = {size: training.linear(trainer, *datasets.single_digits(digits, size, case["canvas"], seed))
             for size in sizes}
    return {name: found[case[name]] for name in DIGITS}


def table(results):
    seconds = results.factor("second")
    rows = [[f"{method}: {title}", *(results.cell(name, method=method, second=second) for second in seconds)]
            for method in METHODS for name, title in DIGITS.items()]
    return ["size of the 2nd digit", *map(str, seconds)], *rows


def figure(results):
    seconds = results.factor("second")
    panels = [(f"probe of the {title}",
               [(method, results.points(name, "second", seconds, method=method)) for method in METHODS], [])
              for name, title in DIGITS.items()]
    return figures.curves(panels, "size of the 2nd digit [pixels]", "linear probe of a single digit [%]")


STUDY = Study(
    name="dominant_object",
    title="A large object suppresses a small one",
    source="P1, Table 4",
    published="""MNIST, first digit 20 pixels wide on a canvas of 112, linear probe in %. The text at hand does not give
the two temperatures of SimCLR.

| size of the 2nd digit | 20 | 30 | 40 | 50 | 60 | 70 | 80 |
| --- | --- | --- | --- | --- | --- | --- | --- |
| supervised: 1st digit | 99.1 | 99.2 | 99.2 | 99.2 | 99.1 | 99.1 | 99.0 |
| supervised: 2nd digit | 99.1 | 99.5 | 99.5 | 99.6 | 99.5 | 99.5 | 99.6 |
| SimCLR, one temperature: 1st digit | 97.8 | 97.6 | 96.2 | 96.5 | 88.5 | 74.5 | 39.9 |
| SimCLR, one temperature: 2nd digit | 97.8 | 97.9 | 97.8 | 98.3 | 98.2 | 97.7 | 98.2 |
| SimCLR, another temperature: 1st digit | 98.7 | 98.8 | 98.3 | 87.5 | 24.9 | 19.8 | 20.3 |
| SimCLR, another temperature: 2nd digit | 98.7 | 99.2 | 99.2 | 99.0 | 99.1 | 98.9 | 99.4 |
| untrained: 1st digit | 16.5 | 16.7 | 16.6 | 16.6 | 16.6 | 16.9 | 16.5 |
| untrained: 2nd digit | 16.5 | 19.1 | 21.9 | 24.1 | 26.5 | 28.1 | 29.0 |
""",
    cases=cases,
    measure=measure,
    table=table,
    figure=figure,
    verdict="no: the larger digit wins, but in supervised training more",
    found="SimCLR's features tell the larger digit better and better, from 38.4 to 89.7 at temperature 0.1, and the "
    "smaller one hardly worse, from 38.4 to 31.9. Supervised training loses more of it, from 80.6 to 47.3: a digit of "
    "28 pixels hides much of a canvas of 36, so what falls is also what can be seen at all. In P1 little is lost "
    "before the second digit has twice and a half the size of the first, and here the largest has 28 / 12 of it; on "
    "small canvases and in 600 steps, a first digit smaller than these would not have been learned to begin with.",
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
