"""The page of all experiments: what was published beside what came out, from the results alone."""

import re

from .results import markdown
from .study import kept

INTRODUCTION = """# What two papers found, {where}

Experiments on the trainer's parts, each a short file of [examples/experiments](../examples/experiments). P1 is
"Intriguing Properties of Contrastive Losses" (Chen, Luo & Li 2021), P2 "Towards Good Practices in Self-supervised
Representation Learning" (2020).{desk}

    make experiments                                    # what is left to run; finished runs are kept
    make experiments OUT=my-results                     # all of it anew, on this machine
    make experiments SMOKE=1                            # whether everything runs
    python examples/experiments/rand_bit.py --out mine  # one of them
    python examples/experiments/rand_bit.py --scale paper --data mnist=path/to/mnist   # at the published size

`--scale paper` takes folders of pictures, `mnist=`, `cifar10=` or `imagenet=`, each with train/ and val/ and in these a
folder for each class. Probes are logistic regression on standardised features, by L-BFGS, where the papers' is SGD.
Accuracies are per cent of test pictures; after ± is half the distance from the lowest to the highest seed. Seeds differ
in weights and views and in pictures that are drawn; loss_family, batch_size and what is cut from photographs have the
same pictures for all of them. Minutes are those of the runs, {jobs} at a time, whatever else the machine did.
"""

DESK = """ The papers trained ResNets on CIFAR-10 and ImageNet, on accelerators, for days; a desk
has two cores, scikit-learn's 1,797 digits and its two sample photographs, and a convolutional network of 24,504
weights. So what can be compared is a trend, not a figure. Pictures, sizes and lengths were chosen by a few short trial
runs, so that something is learned in minutes; then every experiment was run once, and is shown as it came out. The
published sizes were never run here."""


def text(studies, options):
    """Markdown of all experiments with results in the folder `options.out`, which the page names as it is here."""
    sections, summary, jobs, desk = [], [], set(), options.scale == "desk"
    for each in studies:
        results, left = kept(each, options)
        if results.records:
            table = markdown(*each.table(results))
            own = discussed(each, table, options)
            sections.append(_section(each, results, len(left), table, own, options))
            summary.append([f"[{each.name}](#{_anchor(each)})", each.title, each.source,
                            each.verdict if own else "not discussed", _minutes(results)])
            jobs |= {str(record["jobs"]) for record in results.records}
    head = INTRODUCTION.format(
        where="at a desk" if desk else "at the published sizes", desk=DESK if desk else "",
        jobs=" or ".join(sorted(jobs)))
    titles = ["experiment", "finding", "source", "shows here", "minutes"]
    return "\n".join([head, markdown(titles, *summary), *sections])


def discussed(each, table, options):
    """Whether what is said of an experiment is said of this table: of a desk's, with every figure that is named."""
    named, shown = (set(re.findall(r"\d+\.\d+", part)) for part in (each.found, re.sub(r"± \S+", "", table)))
    return options.scale == "desk" and named <= shown


def _anchor(each):
    letters = "".join(letter for letter in each.title.lower() if letter.isalnum() or letter in " -_")
    return letters.replace(" ", "-")


def _minutes(results):
    return f"{results.seconds / 60:.0f}" if results.seconds >= 60 else "under 1"


def _section(each, results, left, table, own, options):
    """Of one experiment with its `table`; what is said of it where that is its `own`."""
    folder, count = options.out / each.name, len(results.records)
    runs = f"{count} of {count + left} runs" if left else f"{count} runs"
    seeds = f"{results.seeds} seeds" if results.seeds > 1 else "one seed"
    scale = "" if options.scale == "desk" else f" --scale {options.scale}"
    here = f"\n**Here.** {each.found}\n" if own else ""
    return f"""## {each.title}

`python examples/experiments/{each.name}.py{scale}`: {runs}, {seeds}, {_minutes(results)} min.

**Published** ({each.source}). {each.published}
{here}
<!-- {folder.as_posix()}/table.md -->

{table}
<!-- end -->

![{each.title}](../{folder.as_posix()}/figure.png)
"""
