"""`report.html`: what a run did and what came of it, in one file that needs no other and no network."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from . import losses, plots, probe, sheets
from .page import figure, page, section, split_bar, table, tag, tile

NAMED = 10  # pictures that could not be read, by name
PHASES = (("data", "data_s", "#9a9a9a"), ("encoder", "encoder_s", plots.TRAINED), ("loss", "loss_s", plots.SECOND),
          ("optimizer", "optimizer_s", "#2e9e4f"))
PROBES = (("linear", "Linear probe", plots.TRAINED), ("knn", "kNN probe", plots.SECOND))
NEGATED = ("blur",)  # switches with a --no-... of their own, which are None where neither was said


@dataclass
class Run:
    """What a report is written from. A log may lack fields, or whole kinds of records: sections without data are
    left out."""

    folder: Path
    settings: object  # the command line's
    source: object  # data.Source
    records: list  # of the log
    facts: dict  # what is known after the run: seconds, device, processes, parameters, torch
    objective: str  # a title, and what it is called with in brackets
    features: probe.Features | None  # of the encoder as it is now
    projections: object  # [m, d] or None: the test pictures behind encoder and head

    def of(self, event):
        return [record for record in self.records if record["event"] == event]

    def points(self, event, key, scale=1):
        """(step, value) of the records that have a value."""
        found = [(record["step"], record.get(key)) for record in self.of(event)]
        return [(step, scale * value) for step, value in found if value is not None]

    def probed(self, key):
        """(value before the first step, last value), either of them None where it was not measured."""
        points = self.points("probe", key)
        before = points[0][1] if points and points[0][0] == 0 else None
        return before, points[-1][1] if points and points[-1][0] > 0 else None

    @property
    def title(self):
        return self.objective.partition(" (")[0]

    @property
    def alternatives(self):
        """Among how many rows the contrastive top-1 looks for the one that belongs to a row."""
        method = getattr(self.settings, "method", "simclr")
        if method == "moco-v2":
            return 1 + self.settings.queue
        # Both views of the batch but for the row itself, or the whole memory bank.
        return len(self.source.train) if method == "instdisc" else 2 * self.settings.batch - 1

    @property
    def prior(self):
        """What the loss would have projections follow: but for two of them, a sphere without a preferred side."""
        loss = losses.LOSSES.get(getattr(self.settings, "loss", None))
        return loss.fixed.get("prior", "hypersphere") if loss else "hypersphere"


def write_report(folder, settings, source, records, facts, objective, features=None, projections=None):
    """Write report.html from what a finished run knows, and return its path."""
    run = Run(Path(folder), settings, source, records, facts, objective, features, projections)
    title = f"{run.title} on {Path(settings.data).name or settings.data}"
    parts = [_header(run, title), _tiles(run), _frozen(run), _training(run), sheets.views(source, settings.seed)]
    if features is not None:
        parts += [sheets.neighbours(source, features), sheets.class_map(source, features)]
    if projections is not None:
        parts.append(sheets.projections(projections, run.prior))
    parts += [_settings(run), _unreadable(run), _commands(run)]
    path = run.folder / "report.html"
    # Names of files may hold bytes that are no text.
    path.write_text(page(title, *(part for part in parts if part)), encoding="utf-8", errors="backslashreplace")
    return path


def _header(run, title):
    source, settings, facts = run.source, run.settings, run.facts
    memory = [value for _, value in run.points("step", "memory_mib")]
    return tag(
        "header", tag("h1", title),
        tag("p", f"{len(source.train):,} training and {len(source.test):,} test pictures of {len(source.classes):,} "
                 f"classes, {source.channels} × {source.image_size} × {source.image_size}."),
        tag("p", f"{run.objective}; {settings.arch} with {facts['parameters']:,} parameters."),
        tag("p", f"{settings.steps:,} steps of {settings.batch:,} pictures in {duration(facts['seconds'])} on "
                 f"{facts['device']}" + _several(facts.get("processes", 1), ", {:,} processes")
                 + (f", {max(memory):,.0f} MiB of memory" if memory else "") + "."))


def _several(count, text):
    return text.format(count) if count > 1 else ""


def duration(seconds):
    """`61 s`, `12 min` or `3 h 20 min`."""
    minutes = round(seconds / 60)
    if minutes < 10:
        return f"{seconds:,.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def _tiles(run):
    """The few numbers that say how the run went."""
    tiles = []
    for key, name, _ in PROBES:
        before, after = run.probed(key)
        if after is not None:
            note = "test pictures" if before is None else f"untrained {before:.1%}"
            tiles.append(tile(name, f"{after:.1%}", note))
    loss, top1, rate = (run.points("step", key) for key in ("loss", "top1", "images_per_s"))
    if top1:
        tiles.append(tile("Contrastive top-1", f"{top1[-1][1]:.1%}", f"chance {1 / run.alternatives:.2%}"))
    if loss:
        tiles.append(tile("Loss", f"{loss[-1][1]:.4g}", f"{loss[0][1]:.4g} at step {loss[0][0]:,}"))
    if rate:
        tiles.append(tile("Images a second", f"{median(value for _, value in rate):,.0f}", "median of the log"))
    return tag("div", *tiles, class_="tiles")


def _frozen(run):
    """Both probes before and after, in numbers and over the steps."""
    rows, series, levels = [], [], []
    many = len(run.source.classes) > 5  # of five classes or fewer every class is among the first five
    for key, name, colour in PROBES:
        points = run.points("probe", key, 100)
        if points:
            pairs = [run.probed(key), *([run.probed(f"{key}_top5")] if many else [])]
            rows.append((name, *("–" if value is None else f"{value:.1%}" for pair in pairs for value in pair[::-1])))
            series.append((name, points, colour))
            if points[0][0] == 0:
                levels.append((f"untrained {points[0][1]:.1f}%", points[0][1], colour))
    if not rows:
        return None
    head = ["", "top-1", "untrained", *(["top-5", "untrained"] if many else [])]
    plot = plots.lines("test pictures [%]", series, levels, limits=(0, 100))
    note = ("A linear classifier, and a vote of the 20 nearest training pictures, on the encoder's features before the "
            f"projection head. Accuracy on the {len(run.source.test):,} test pictures; untrained is the same encoder "
            "before its first step.")
    shown = figure(plot, _told("Accuracy of the probes in percent", series), "Top-1 over the steps")
    words = tag("div", tag("p", note), table(head, rows))
    return section("Frozen features", tag("div", words, shown, class_="plots"))


def _told(what, series):
    """Words for who cannot see the lines."""
    ends = [f"{label + ' ' if label else ''}{points[0][1]:.4g} at step {points[0][0]:,}, {points[-1][1]:.4g} at step "
            f"{points[-1][0]:,}" for label, points, _ in series]
    return f"{what} over the training steps: {'; '.join(ends)}"


def _training(run):
    """What the log has of every step."""
    chance = ((f"chance {1 / run.alternatives:.2%}", 100 / run.alternatives, plots.UNTRAINED),)
    alike = ()
    if getattr(run.settings, "loss", None) == "nt_xent":
        level = math.log(run.alternatives)
        alike = ((f"all rows alike: ln {run.alternatives:,} = {level:.2f}", level, plots.UNTRAINED),)
    drawn = []
    for key, title, unit, scale, levels, top in (
        ("loss", "Loss", run.title, 1, alike, None),
        ("top1", "Contrastive top-1", "rows nearest to their own [%]", 100, chance, 100),
        ("lr", "Learning rate", "learning rate", 1, (), 0),
        ("images_per_s", "Throughput", "images a second", 1, (), 0),
    ):
        points = run.points("step", key, scale)
        if points:
            series = [(None, points, plots.TRAINED)]
            limits = None if top is None else (0, top or 1.1 * max(value for _, value in points) or 1)
            drawn.append(figure(plots.lines(unit, series, levels, limits), _told(title, series), title))
    return section("Training", tag("div", *drawn, class_="plots"), _step_time(run) or "") if drawn else None


def _step_time(run):
    """Where the time of a step goes."""
    found = []
    for name, key, colour in PHASES:
        values = [value for _, value in run.points("step", key)]
        if values:
            found.append((name, median(values), colour))
    total = sum(seconds for _, seconds, _ in found)
    if not total:
        return None
    parts = [(name, seconds / total, f"{_milliseconds(seconds)}, {seconds / total:.1%}", colour)
             for name, seconds, colour in found]
    title = tag("figcaption", tag("b", f"Time of a step: {_milliseconds(total)}"),
                tag("span", "Median of each part over the log."))
    return tag("figure", title, split_bar(parts), class_="wide")


def _milliseconds(seconds):
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _settings(run):
    items = []
    for name, value in {**vars(run.settings), **run.facts}.items():
        if value is not None:  # a setting that the objective does not have
            value = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
            value = round(value, 1) if name == "seconds" else value
            items.append(tag("div", tag("dt", name.replace("_", " ")), tag("dd", value)))
    return section("Settings", tag("dl", *items))


def _unreadable(run):
    names = list(dict.fromkeys(name for record in run.of("unreadable") for name in record["pictures"]))
    if not names:
        return None
    listed = [tag("li", name) for name in names[:NAMED]]
    if len(names) > NAMED:
        listed.append(tag("li", f"and {len(names) - NAMED:,} more, all named in log.jsonl"))
    title = f"{len(names):,} picture{'s' if len(names) > 1 else ''} could not be read"
    return section(title, tag("p", "Left out of batches and probes."), tag("ul", *listed))


def _commands(run):
    settings, processes = run.settings, run.facts.get("processes", 1)
    start = ["torchrun", "--nproc-per-node", str(processes)] if processes > 1 else ["python"]
    words = [*start, "examples/simclr_imagenet.py", str(settings.data)]
    for name, value in vars(settings).items():
        option = name.replace("_", "-")
        if value is False and name in NEGATED:
            words.append(f"--no-{option}")
        elif name not in ("data", "resume", "channels") and value is not None and value is not False:
            words += [f"--{option}", *([] if value is True else [str(value)])]
    parts = [tag("p", "This run again; where its folder has a checkpoint, on from there."),
             tag("pre", shlex.join([*words, "--resume"]))]
    kept = [path for name in ("best.ckpt", "step-*.ckpt", "*.safetensors")
            for path in sorted(run.folder.rglob(name), reverse=True)]
    if kept:
        parts += [tag("p", "The probes alone, of these or of other pictures."),
                  tag("pre", shlex.join(["python", "examples/evaluate.py", str(kept[0]), str(settings.data)]))]
    return section("Go on from here", *parts)
