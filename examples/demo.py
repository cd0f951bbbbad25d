"""SimCLR on handwritten digits in about a minute on two cores, with a check that it learnt something.

Each of scikit-learn's 1,797 digits lies at a random place of a dark canvas. The encoder never sees a label; a
linear classifier on its frozen features then has to tell the digits apart, and has to fail on the same encoder
before training.
"""

import argparse
import sys
from pathlib import Path

from simclr import cli

RECIPE = ("--arch", "convnet", "--steps", "1000", "--batch", "128", "--lr", "2e-3", "--temperature", "0.2",
          "--warmup", "0.05", "--eval-every", "200")
TRAINED_AT_LEAST, UNTRAINED_AT_MOST, MEAN_AT_LEAST = 0.70, 0.35, 0.75  # the mean is over several seeds


def run(seed, out):
    outcome = cli.run(cli.parse(["digits", *RECIPE, "--seed", str(seed), "--out", str(out)], "demo.py"))
    print(f"seed {seed}, {outcome['seconds']:.0f} s: ", end="")
    cli.print_outcome(outcome)
    return outcome["probes"][-1]["linear"], outcome["probes"][0]["linear"]


def table(seeds, scores):
    """Linear probes of several seeds, (trained, untrained) each, and their means, as markdown."""
    means = [sum(column) / len(scores) for column in zip(*scores)]
    rows = [*zip(seeds, scores), ("mean", means)]
    lines = [f"| {seed} | {trained:.1%} | {untrained:.1%} |" for seed, (trained, untrained) in rows]
    return "\n".join(["| seed | linear probe, trained | untrained |", "| --- | --- | --- |", *lines]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    settings = parser.parse_args()
    several = len(settings.seeds) > 1
    scores = [run(seed, settings.out / f"seed{seed}" if several else settings.out) for seed in settings.seeds]
    mean = sum(trained for trained, _ in scores) / len(scores)
    failures = [f"linear probe {trained:.1%}, expected at least {TRAINED_AT_LEAST:.0%}"
                for trained, _ in scores if trained < TRAINED_AT_LEAST]
    failures += [f"untrained linear probe {untrained:.1%}, expected at most {UNTRAINED_AT_MOST:.0%}"
                 for _, untrained in scores if untrained > UNTRAINED_AT_MOST]
    if several:
        print(f"mean of {len(scores)} seeds: linear probe {mean:.1%}")
        (settings.out / "seeds.md").write_text(table(settings.seeds, scores))
        if mean < MEAN_AT_LEAST:
            failures.append(f"mean {mean:.1%}, expected at least {MEAN_AT_LEAST:.0%}")
    for failure in failures:
        print(f"demo failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
