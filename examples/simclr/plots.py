"""The pictures of a report. Every function draws one PNG file."""

import itertools
import math

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

TRAINED, UNTRAINED, SECOND = "#1f5fa8", "#9a9a9a", "#d1751f"
RIGHT, WRONG = "#2e9e4f", "#c8372d"
LINES = (TRAINED, SECOND, RIGHT, WRONG, "#7b4fa3", "#2aa5b5")  # of one picture, each told from the others
DPI = 110


def _panel(axes, title, ylabel):
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("training step")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _columns(records, *names):
    return [[record[name] for record in records] for name in names]


def _save(figure, path):
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def curves(path, steps, probes, loss_title, others=None):
    """Loss, contrastive top-1 and (where there are probes) accuracy of the frozen features, over the steps.

    `others`: for NT-Xent, how many rows a row is compared with; draws its loss for rows that are all alike.
    """
    figure, panels = plt.subplots(1, 3 if probes else 2, figsize=(13.5 if probes else 9, 3.9), layout="constrained")
    step, loss, top1 = _columns(steps, "step", "loss", "top1")
    _panel(panels[0], "Training loss", loss_title)
    panels[0].plot(step, loss, color=TRAINED, lw=1.3)
    if others:
        alike = math.log(others)
        panels[0].axhline(alike, color=UNTRAINED, ls="--", lw=1, label=f"all rows alike: ln {others} = {alike:.2f}")
        panels[0].legend(frameon=False, fontsize=9)
    _panel(panels[1], "Contrastive top-1: the partner is the nearest row", "share of rows [%]")
    panels[1].plot(step, [100 * value for value in top1], color=TRAINED, lw=1.3)
    panels[1].set_ylim(0, 100)
    if probes:
        _probe_panel(panels[2], probes)
    _save(figure, path)


def _probe_panel(axes, probes):
    step, linear, knn = _columns(probes, "step", "linear", "knn")
    _panel(axes, "Frozen features on the test split", "accuracy [%]")
    for name, values, color in (("linear probe", linear, TRAINED), ("kNN probe", knn, SECOND)):
        values = [100 * value for value in values]
        axes.plot(step, values, color=color, marker="o", ms=4, lw=1.6, label=f"{name}: {values[-1]:.1f}%")
        axes.axhline(values[0], color=color, ls=":", lw=1.2, label=f"untrained: {values[0]:.1f}%")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, fontsize=9, loc="lower right", ncols=2)


def loss_comparison(path, runs):
    """`runs`: (title, probes) of one run a loss; linear probe over the steps, a line a loss. Step 0 is untrained."""
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    _panel(axes, "Linear probe of the frozen features, one line a loss", "accuracy [%]")
    for (title, probes), color in zip(runs, itertools.cycle(LINES)):
        step, linear = _columns(probes, "step", "linear")
        values = [100 * value for value in linear]
        axes.plot(step, values, color=color, marker="o", ms=4, lw=1.6, label=f"{title}: {values[-1]:.1f}%")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    _save(figure, path)


def _show(axes, picture):
    """A float picture [C, H, W] in 0..1, grey or RGB, without axes."""
    if picture.shape[0] == 1:
        axes.imshow(picture[0].numpy(), cmap="gray", vmin=0, vmax=1)
    else:
        axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
    axes.set_xticks([])
    axes.set_yticks([])


def view_sheet(path, rows):
    """`rows`: one (name, picture, view 1, view 2) per picture, side by side as columns of the sheet."""
    size = (1.35 * len(rows) + 0.6, 4.6)
    figure, grid = plt.subplots(3, len(rows), figsize=size, squeeze=False, layout="constrained")
    for column, (name, *pictures) in enumerate(rows):
        for line, picture in enumerate(pictures):
            _show(grid[line][column], picture)
        grid[0][column].set_title(name, fontsize=9)
    for line, label in enumerate(("picture", "view 1", "view 2")):
        grid[line][0].set_ylabel(label, fontsize=10)
    _save(figure, path)


def neighbour_sheet(path, rows):
    """`rows`: ((label, picture), [(label, cosine, picture), ...]) per query; frames tell right from wrong classes."""
    width = 1 + len(rows[0][1])
    size = (1.35 * width + 0.3, 1.62 * len(rows) + 0.3)
    figure, grid = plt.subplots(len(rows), width, figsize=size, squeeze=False, layout="constrained")
    for line, ((label, picture), neighbours) in enumerate(rows):
        _show(grid[line][0], picture)
        grid[line][0].set_title(label, fontsize=9, fontweight="bold")
        for axes, (found, cosine, neighbour) in zip(grid[line][1:], neighbours):
            _show(axes, neighbour)
            axes.set_title(f"{found} ({cosine:.2f})", fontsize=9)
            for spine in axes.spines.values():
                spine.set(color=RIGHT if found == label else WRONG, linewidth=2.5)
    _save(figure, path)
