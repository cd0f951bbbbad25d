"""All experiments, one after another, and the page of what they found.

    python examples/experiments/all.py                              # what is left of them
    python examples/experiments/all.py --smoke                      # whether they run
    python examples/experiments/all.py --page docs/experiments.md   # with the page

The options are those of a single experiment.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

if not __package__:  # run by its path: the folder of `simclr` and `experiments` in the place of this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments import page, study

NAMES = ("loss_family", "batch_size", "temperature_vs_weight", "multi_digits", "local_features", "digit_on_image",
         "dominant_object", "rand_bit", "saturation", "projection_head", "augmentation", "negatives",
         "feature_inversion")


def studies(names=NAMES):
    return [importlib.import_module(f"experiments.{name}").STUDY for name in names]


def main(arguments=None):
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--page", type=Path, help="write what came out as Markdown")
    chosen, rest = own.parse_known_args(arguments)
    code = study.main(studies(), rest, "all.py")
    if code == 0 and chosen.page and int(os.environ.get("RANK", 0)) == 0:
        chosen.page.write_text(page.text(studies(), study.parse(rest, "all.py")), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
