"""The figures of a report. Every function draws one and returns it as the bytes of a PNG file.

Nothing that is written in a figure comes from the data: names of classes, which may be long, in any script or full of
mathematics to matplotlib's eye, are left to the page around it.
"""

import io
import itertools

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

INK, SOFT, GRID = "#1c2530", "#5c6773", "#e3e7eb"
TRAINED, UNTRAINED, SECOND = "#1f5fa8", "#9a9a9a", "#d1751f"
LINES = (TRAINED, SECOND, "#2e9e4f", "#c8372d", "#7b4fa3", "#2aa5b5")  # of one figure, each told from the others
# Of classes: ten strong ones, then ten pale ones; OTHERS is for all that come after.
CLASSES = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#3b3b98",
           "#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#9edae5", "#dbdb8d", "#a5a5d8")
OTHERS = "#d4d8dc"
DPI = 180
MARKED = 25  # up to so many points a line shows each of them: one point alone would be no line


def png(figure):
    """Its bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def panel(axes, xlabel, ylabel):
    """The look that all axes share."""
    axes.set_xlabel(xlabel, color=SOFT, fontsize=9)
    axes.set_ylabel(ylabel, color=SOFT, fontsize=9)
    axes.tick_params(colors=SOFT, labelsize=9, length=0)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def lines(ylabel, series, levels=(), limits=None, size=(5.6, 3.0)):
    """Values over the training steps. `series`: (label or None, [(step, value)...], colour) of a line each;
    `levels`: (label, value, colour) of a dashed line each."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    panel(axes, "training step", ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    for label, points, colour in series:
        marker = "o" if len(points) <= MARKED else None
        axes.plot(*zip(*points), color=colour, lw=1.5, marker=marker, ms=4, label=label)
    for label, value, colour in levels:
        axes.axhline(value, color=colour, ls=(0, (4, 3)), lw=1.2, label=label)
    if limits:
        axes.set_ylim(*limits)
    if axes.get_legend_handles_labels()[0]:  # above the axes, where it hides nothing
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    return png(figure)


def comparison(path, runs):
    """Write a PNG file. `runs`: (title, probes) of each run, which is a line. Step 0 is untrained."""
    series = []
    for (title, probes), colour in zip(runs, itertools.cycle(LINES)):
        points = [(record["step"], 100 * record["linear"]) for record in probes]
        series.append((f"{title}: {points[-1][1]:.1f}%", points, colour))
    path.write_bytes(lines("linear probe of the frozen features [%]", series, limits=(0, 100), size=(7.5, 5.0)))


def scatter(points, colours):
    """A map: `points` [n, 2], and the colour of each. Its axes mean nothing, only which points are close."""
    width, height = points.max(0) - points.min(0)
    figure = Figure(figsize=(6.6, 6.6 * min(max(height / width, 0.5), 1.0)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0, h_pad=0)
    axes = figure.subplots()
    axes.scatter(points[:, 0], points[:, 1], c=colours, s=17, alpha=0.85, linewidths=0)
    axes.set_aspect("equal", "datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(GRID)
    return png(figure)


def histograms(columns, limit, curve):
    """A histogram of each of `columns` over -limit..limit with the line `curve`, (t, density), all on the same axes."""
    figure = Figure(figsize=(11.2, 2.5), layout="constrained")
    panels = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    highest = 0
    for number, (axes, column) in enumerate(zip(panels, columns), 1):
        panel(axes, f"direction {number}", "density" if number == 1 else "")
        heights, _, _ = axes.hist(column, bins=40, range=(-limit, limit), density=True, color=TRAINED, alpha=0.45)
        axes.plot(*curve, color=SECOND, lw=1.6)
        highest = max(highest, heights.max())
    panels[0].set_xlim(-limit, limit)
    # Of points on a circle the density has no bound.
    panels[0].set_ylim(0, 1.08 * max(highest, min(curve[1].max(), 2 * highest)))
    return png(figure)
