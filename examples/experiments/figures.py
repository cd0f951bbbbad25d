"""The figures of experiments, in the style of the trainer's report: functions that return a PNG file's bytes.

A point is (x, Spread): its mean is drawn, and a bar from the lowest to the highest seed.
"""

import io

from matplotlib.figure import Figure
from PIL import Image

from simclr.plots import CLASSES, GRID, INK, LINES, SOFT, panel, png

COLOURS = (*LINES, "#8c6d31", "#5c6773", "#e377c2")
MARKS = "osD^vP*Xh"


def curves(panels, xlabel, ylabel, limits=(0, 100), log_base=None, size=(4.4, 3.2), shared=True):
    """A panel for each of `panels`: (title, [(label, points)...], levels), `levels` a list of (label, value), or of
    (label, [(x, value)...]) for one that is not the same everywhere.

    The same label has the same colour in all panels; the legend, above them, has it once. All panels have the same
    vertical axis, or each its own where it is not `shared`.
    """
    figure = Figure(figsize=(size[0] * len(panels), size[1] + 0.4), layout="constrained")
    axes_of = figure.subplots(1, len(panels), sharey=shared, squeeze=False)[0]
    styles, shown = {}, {}
    for axes, (title, series, levels) in zip(axes_of, panels):
        panel(axes, xlabel, ylabel if axes is axes_of[0] else "")
        axes.set_title(title, color=INK, fontsize=10)
        for label, points in series:
            number = len(styles)
            colour, mark = styles.setdefault(label, (COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]))
            if points:
                shown[label] = _with_bars(axes, points, colour, mark)
        for label, value in levels:
            dashed = dict(color=SOFT, ls=(0, (4, 3)), lw=1.2)
            if isinstance(value, list):
                shown[label], = axes.plot(*zip(*value) if value else ([], []), **dashed)
            else:
                shown[label] = axes.axhline(value, **dashed)
        ticks = list(dict.fromkeys(x for _, points in series for x, _ in points))
        if log_base:
            axes.set_xscale("symlog" if 0 in ticks else "log", base=log_base)
        if ticks and len(ticks) <= 10:
            axes.set_xticks(ticks, [f"{x:g}" if isinstance(x, (int, float)) else x for x in ticks])
            axes.minorticks_off()
        if limits:
            axes.set_ylim(*limits)
    if shown:
        figure.legend(shown.values(), shown, loc="outside upper left", ncols=min(len(shown), 2 + 2 * len(panels)),
                      frameon=False, fontsize=9, labelcolor=INK)
    return png(figure)


def _with_bars(axes, points, colour, mark):
    places = [x for x, _ in points]
    means = [spread.mean for _, spread in points]
    below = [spread.mean - min(spread.values) for _, spread in points]
    above = [max(spread.values) - spread.mean for _, spread in points]
    return axes.errorbar(places, means, (below, above), color=colour, marker=mark, ms=4, lw=1.5, elinewidth=1.0,
                         capsize=2)


def bars(groups, series, ylabel, levels=(), size=(7.5, 3.6)):
    """For each of `groups` a bar of every series: (label, [Spread or None...]); `levels` as in `curves`."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    panel(axes, "", ylabel)
    width, shown = 0.8 / max(1, len(series)), {}
    for number, (label, spreads) in enumerate(series):
        found = [(place + (number + 0.5) * width - 0.4, spread) for place, spread in enumerate(spreads) if spread]
        colour = COLOURS[number % len(COLOURS)]
        for place, spread in found:
            shown[label] = axes.bar(place, spread.mean, 0.92 * width, color=colour, alpha=0.85)
            axes.vlines(place, min(spread.values), max(spread.values), color=INK, lw=1.2)
            axes.annotate(f"{spread.mean:.1f}", (place, max(spread.values)), (0, 2), textcoords="offset points",
                          ha="center", fontsize=8, color=INK)
    for (label, value), dashes in zip(levels, ((0, (4, 3)), (0, (1, 2)), (0, (6, 2, 1, 2)))):
        shown[label] = axes.axhline(value, color=SOFT, ls=dashes, lw=1.2)
    axes.set_xticks(range(len(groups)), groups)
    if shown:
        figure.legend(shown.values(), shown, loc="outside upper left", ncols=4, frameon=False, fontsize=9,
                      labelcolor=INK)
    return png(figure)


def heatmap_and_histograms(cells, panels, edges, curve, size=(11.2, 4.0)):
    """A heat map beside histograms in two columns, all on the same axes.

    `cells` is (values, rows, columns, xlabel, ylabel): `values[row][column]` as colours, and as text in their cells;
    None where there is none.

    A panel is (title, counts): of each of its columns what falls between the `edges`, one outline a column. `curve` is
    the density [(x, y)...] that they are to follow.
    """
    figure = Figure(figsize=size, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.2))
    _cells(left.subplots(), *cells)
    axes_of = right.subplots(-(-max(len(panels), 1) // 2), 2, sharex=True, sharey=True, squeeze=False).flat
    for axes, (title, columns) in zip(axes_of, panels):
        panel(axes, "", "")
        axes.set_title(title, color=INK, fontsize=9)
        for counts, colour in zip(columns, COLOURS):
            total = sum(counts)
            heights = [count / total / (high - low) for count, low, high in zip(counts, edges, edges[1:])]
            axes.stairs(heights, edges, color=colour, lw=1.2)
        axes.plot(*zip(*curve), color=INK, ls=(0, (4, 3)), lw=1.2)
    return png(figure)


def _cells(axes, values, rows, columns, xlabel, ylabel, form="{:.0f}"):
    known = [value for row in values for value in row if value is not None] or [0.0]
    lowest, highest = min(known), max(known)
    axes.imshow([[float("nan") if value is None else value for value in row] for row in values], cmap="Blues",
                vmin=lowest - 0.2 * (highest - lowest), vmax=highest, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is not None:
                dark = value > (lowest + 2 * highest) / 3
                colour = "white" if dark else INK
                axes.text(x, y, form.format(value), ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(columns)), [f"{x:g}" for x in columns])
    axes.set_yticks(range(len(rows)), [f"{y:g}" for y in rows])
    axes.set_xlabel(xlabel, color=SOFT, fontsize=9)
    axes.set_ylabel(ylabel, color=SOFT, fontsize=9)
    axes.tick_params(colors=SOFT, labelsize=9, length=0)
    axes.spines[:].set_color(GRID)


def scatters(panels, size=2.8):
    """A map beside the other: (title, points, classes) of each, the same class in the same colour."""
    figure = Figure(figsize=(size * len(panels), size + 0.3), layout="constrained")
    for axes, (title, points, classes) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        axes.scatter(*zip(*points), c=[CLASSES[label % len(CLASSES)] for label in classes], s=9, linewidths=0)
        axes.set_title(title, color=INK, fontsize=10)
        axes.set_aspect("equal", "datalim")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(GRID)
    return png(figure)


def stacked(*files):
    """PNG files one below the other as one."""
    sheets = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    found = io.BytesIO()
    whole.save(found, format="png")
    return found.getvalue()


def pictures(rows, titles, size=1.3):
    """A sheet: `rows` of (label, pictures), each an array [h, w] or [h, w, 3], or None; `titles` above the columns."""
    figure = Figure(figsize=(size * len(titles) + 1.0, size * len(rows) + 0.3), layout="constrained")
    grid = figure.subplots(len(rows), len(titles), squeeze=False)
    for number, (axes_of, (label, shown)) in enumerate(zip(grid, rows)):
        for axes, title, picture in zip(axes_of, titles, shown):
            if picture is not None:
                axes.imshow(picture, cmap="gray" if picture.ndim == 2 else None, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if number == 0:
                axes.set_title(title, color=INK, fontsize=9)
        axes_of[0].set_ylabel(label, color=INK, fontsize=9)
    return png(figure)
