"""SimCLR on handwritten digits in about a minute on two cores, with a check that it learnt something.

Each of scikit-learn's 1,797 digits lies at a random place of a dark canvas. The encoder never sees a label; a
linear classifier on its frozen features then has to tell the digits apart, and has to fail on the same encoder
before training. `--losses` does it once a loss and sets the losses side by side, `--methods` once a method.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from simclr import cli, plots
from simclr.losses import LOSSES
from simclr.methods import METHODS
from simclr.settings import objective, parse

RECIPE = ("--arch", "convnet", "--steps", "1000", "--batch", "128", "--lr", "2e-3", "--warmup", "0.05",
          "--eval-every", "200")
TRAINED_AT_LEAST, UNTRAINED_AT_MOST, MEAN_AT_LEAST = 0.70, 0.35, 0.75  # the mean is over several seeds
ANY_LOSS_AT_LEAST = 0.55  # the recipe was made for NT-Xent
ANY_METHOD_GAINS = 0.15  # over the untrained encoder
KINDS = {"losses": "loss", "methods": "method"}
# What a run of a few epochs needs instead of the settings for hundreds.
METHOD_RECIPES = {"simclr": (), "moco-v2": ("--momentum", "0.99"), "instdisc": (), "byol": ()}


def run(seed, out, name="nt_xent", arguments=()):
    """One training; what came out, and the text of its settings."""
    with cli.one_line("demo.py"):
        settings = parse(["digits", *RECIPE, *arguments, "--seed", str(seed), "--out", str(out)], "demo.py")
        _clear(out, settings)
        outcome = cli.run(settings)
    print(f"{name}, seed {seed}, {outcome['seconds']:.0f} s: ", end="")
    cli.print_outcome(outcome)
    title, text = objective(settings)
    return dict(outcome, name=name, title=title, settings=text)


def _clear(out, settings):
    """Remove the checkpoints of the same demo before; those of any other run stay, and the run is refused."""
    log = out / "log.jsonl"
    before = json.loads(log.read_text().partition("\n")[0] or "{}") if log.exists() else {}
    if all(before.get(name) == getattr(settings, name) for name in ("data", "steps", "eval_every")):
        shutil.rmtree(out / "checkpoints", ignore_errors=True)


def scores(outcome, probe="linear"):
    """(trained, untrained) accuracy of a run."""
    return outcome["probes"][-1][probe], outcome["probes"][0][probe]


def markdown(*rows):
    """A table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join(["---"] * len(rows[0])) + " |", *lines[1:]]) + "\n"


def seed_table(seeds, found):
    """Linear probes of several seeds, (trained, untrained) each, and their means."""
    means = [sum(column) / len(found) for column in zip(*found)]
    rows = [(str(seed), f"{trained:.1%}", f"{untrained:.1%}") for seed, (trained, untrained) in
            [*zip(seeds, found), ("mean", means)]]
    return markdown(("seed", "linear probe, trained", "untrained"), *rows)


def side_by_side(kind, outcomes):
    """A table with a line a run; `kind` is what they differ by, in the plural."""
    head = (KINDS[kind], "settings", "linear probe, trained", "untrained", "kNN, trained", "untrained", "seconds")
    rows = [(o["name"], o["settings"], *[f"{share:.1%}" for share in (*scores(o), *scores(o, "knn"))],
             f"{o['seconds']:.0f}") for o in outcomes]
    return markdown(head, *rows)


def too_low(outcome, least):
    """Complaints about one run."""
    trained, untrained = scores(outcome)
    if trained < least:
        yield f"{outcome['name']}: linear probe {trained:.1%}, expected at least {least:.0%}"
    if untrained > UNTRAINED_AT_MOST:
        yield f"untrained linear probe {untrained:.1%}, expected at most {UNTRAINED_AT_MOST:.0%}"


def compare_seeds(seeds, out):
    several = len(seeds) > 1
    outcomes = [run(seed, out / f"seed{seed}" if several else out) for seed in seeds]
    failures = [failure for outcome in outcomes for failure in too_low(outcome, TRAINED_AT_LEAST)]
    if several:
        found = [scores(outcome) for outcome in outcomes]
        mean = sum(trained for trained, _ in found) / len(found)
        print(f"mean of {len(found)} seeds: linear probe {mean:.1%}")
        (out / "seeds.md").write_text(seed_table(seeds, found))
        if mean < MEAN_AT_LEAST:
            failures.append(f"mean {mean:.1%}, expected at least {MEAN_AT_LEAST:.0%}")
    return failures


def compare(kind, runs, seed, out):
    """`runs` are {name: arguments}; writes <kind>.md and <kind>.png, returns the outcomes."""
    outcomes = [run(seed, out / name, name, arguments) for name, arguments in runs.items()]
    (out / f"{kind}.md").write_text(side_by_side(kind, outcomes))
    plots.comparison(out / f"{kind}.png", [(o["title"], o["probes"]) for o in outcomes])
    print(f"side by side: {out / kind}.md")
    return outcomes


def compare_losses(names, seed, out):
    outcomes = compare("losses", {name: ("--loss", name) for name in names}, seed, out)
    return [failure for outcome in outcomes for failure in too_low(outcome, ANY_LOSS_AT_LEAST)]


def compare_methods(names, seed, out):
    outcomes = compare("methods", {name: ("--method", name, *METHOD_RECIPES[name]) for name in names}, seed, out)
    gains = {o["name"]: scores(o)[0] - scores(o)[1] for o in outcomes}
    return [f"{name}: {100 * gain:.1f} points over the untrained encoder, expected at least "
            f"{100 * ANY_METHOD_GAINS:.0f}"
            for name, gain in gains.items() if gain < ANY_METHOD_GAINS]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--losses", nargs="*", choices=tuple(LOSSES), help="compare these (all by default)")
    parser.add_argument("--methods", nargs="*", choices=tuple(METHODS), help="compare these (all by default)")
    settings = parser.parse_args(arguments)
    chosen = [name for name in ("losses", "methods") if getattr(settings, name) is not None]
    if not chosen:
        failures = compare_seeds(settings.seeds, settings.out)
    elif len(chosen) == 1 and len(settings.seeds) == 1:
        if chosen == ["losses"]:
            failures = compare_losses(settings.losses or list(LOSSES), *settings.seeds, settings.out)
        else:
            failures = compare_methods(settings.methods or list(METHODS), *settings.seeds, settings.out)
    else:
        parser.error(f"argument --{chosen[0]}: expected one seed and no other comparison, got {len(settings.seeds)} "
                     "seeds")
    for failure in failures:
        print(f"demo failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
