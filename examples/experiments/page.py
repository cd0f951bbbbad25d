"""The page of all experiments: what was published beside what came out, from the results alone."""

from .results import markdown
from .study import kept

HEAD = """# What two papers found, at a desk

Experiments on the trainer's parts, each a short file of [examples/experiments](../examples/experiments). P1 is
"Intriguing Properties of Contrastive Losses" (Chen, Luo & Li 2021), P2 "Towards Good Practices in Self-supervised
Representation Learning" (2020). The papers trained ResNets on CIFAR-10 and ImageNet, on accelerators, for days; a desk
has two cores, scikit-learn's 1,797 digits and its two sample photographs, and a convolutional network of 24,504
weights. So what can be compared is a trend, not a figure. Pictures, sizes and lengths were chosen by a few short trial
runs, so that something is learned in minutes; then every experiment was run once, and is shown as it came out.

    make experiments                                    # what is left to run; finished runs are kept
    make experiments OUT=my-results                     # all of it anew, on this machine
    make experiments SMOKE=1                            # whether everything runs
    python examples/experiments/rand_bit.py --out mine  # one of them
    python examples/experiments/rand_bit.py --scale paper --data mnist=path/to/mnist   # at the published size

`--scale paper` takes folders of pictures, `mnist=`, `cifar10=` or `imagenet=`, each with train/ and val/ and in these a
folder for each class; it was never run at that size here. Probes are logistic regression on standardised features, by
L-BFGS, where the papers' is SGD. Accuracies are per cent of test pictures; after ± is half the distance from the
lowest to the highest seed. Minutes are those of the runs, {machine}, with other work beside them.
"""


def text(studies, options):
    """Markdown of all experiments with results in the folder `options.out`, which the page names as it is here."""
    found = [(each, *kept(each, options)) for each in studies]
    found = [(each, results, len(left)) for each, results, left in found if results.records]
    jobs = sorted({record["jobs"] for _, results, _ in found for record in results.records})
    machine = f"{' or '.join(map(str, jobs))} at a time"
    return "\n".join([HEAD.format(machine=machine), _summary(found), *(_section(*each, options.out) for each in found)])


def _summary(found):
    rows = [[f"[{each.name}](#{_anchor(each)})", each.title, each.source, each.verdict, _minutes(results)]
            for each, results, _ in found]
    return markdown(["experiment", "finding", "source", "shows at a desk", "minutes"], *rows)


def _anchor(each):
    letters = "".join(letter for letter in each.title.lower() if letter.isalnum() or letter in " -_")
    return letters.replace(" ", "-")


def _minutes(results):
    return f"{results.seconds / 60:.0f}" if results.seconds >= 60 else "under 1"


def _section(each, results, left, out):
    folder, count = out / each.name, len(results.records)
    runs = f"{count} of {count + left} runs" if left else f"{count} runs"
    seeds = f"{results.seeds} seeds" if results.seeds > 1 else "one seed"
    return f"""## {each.title}

`python examples/experiments/{each.name}.py`: {runs}, {seeds}, {_minutes(results)} min.

**Published** ({each.source}). {each.published}

**Here.** {each.found}

<!-- {folder.as_posix()}/table.md -->

{markdown(*each.table(results))}
<!-- end -->

![{each.title}](../{folder.as_posix()}/figure.png)
"""
