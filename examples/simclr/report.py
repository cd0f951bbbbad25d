"""`report.md` and its pictures, from a finished trainer."""

from . import data, losses, plots, probe

VIEWED, QUERIES, NEIGHBOURS = 10, 6, 7  # pictures on the sheets


def write_report(folder, trainer, facts):
    """Write report.md, curves.png, views.png and (with probes) neighbours.png; returns the path of report.md."""
    probes = trainer.log.of("probe")
    settings = trainer.settings
    others = 2 * settings.batch - 1 if settings.loss == "nt_xent" else None
    plots.curves(folder / "curves.png", trainer.log.of("step"), probes, losses.LOSSES[settings.loss].title, others)
    plots.view_sheet(folder / "views.png", view_rows(trainer))
    if probes:
        plots.neighbour_sheet(folder / "neighbours.png", neighbour_rows(trainer))
    path = folder / "report.md"
    path.write_text("\n".join(_text(trainer, probes, facts)) + "\n", encoding="utf-8")
    return path


def _text(trainer, probes, facts):
    source, settings = trainer.source, trainer.settings
    yield f"# SimCLR on {settings.data}\n"
    yield (f"{len(source.train):,} training and {len(source.test):,} test pictures of {len(source.classes)} classes, "
           f"{source.channels} x {source.image_size} x {source.image_size}; {settings.steps:,} steps of "
           f"{settings.batch} pictures, {facts['seconds']:.0f} s on {facts['device']}.\n")
    yield f"Loss: {losses.LOSSES[settings.loss].title} ({losses.describe(settings)}).\n"
    unreadable = {name for record in trainer.log.of("unreadable") for name in record["pictures"]}
    if unreadable:
        yield f"{len(unreadable)} pictures could not be read and were left out; `log.jsonl` names them.\n"
    if probes:
        yield from _probe_table(probes[0], probes[-1], len(source.test))
    yield "## Training\n"
    yield "![Loss, contrastive top-1 and probe accuracy over the steps](curves.png)\n"
    yield "## Augmented views\n"
    yield "![Pictures and two random views of each](views.png)\n"
    if probes:
        yield "## Nearest neighbours\n"
        yield ("A test picture (left) and the training pictures with the most similar features, with their class and "
               "cosine; a green frame marks the same class.\n")
        yield "![Nearest neighbours of test pictures](neighbours.png)\n"
    yield "## Settings\n"
    yield "| setting | value |\n|---|---|"
    for name, value in {**vars(settings), **facts}.items():
        if value is not None:  # a setting that the loss does not have
            yield f"| {name} | {round(value, 1) if name == 'seconds' else value} |"
    yield "\nEvery logged step and probe is in `log.jsonl`, the weights are in `model.pt`."


def _probe_table(untrained, trained, pictures):
    yield "## Frozen features\n"
    yield "| probe | trained | untrained |\n|---|---:|---:|"
    for name, key in (("linear (logistic regression)", "linear"), ("kNN (20 neighbours)", "knn")):
        yield f"| {name} | {trained[key]:.1%} | {untrained[key]:.1%} |"
    yield (f"\nAccuracy on the {pictures:,} test pictures, encoder in eval mode, features before the projection head. "
           "Untrained is the same encoder before its first step.\n")


def view_rows(trainer):
    """The first pictures of the training split that can be read, as they are and in two views."""
    source, rows = trainer.source, []
    views = data.TwoViews(source.train, source.views, trainer.settings.seed)
    for index in _spread(len(source.train), VIEWED):
        picture = source.train.read(index)
        if picture is not None:
            name = source.classes[source.train.labels[index]]
            rows.append((name, source.plain(picture), *views[0, index]))
    return rows


def neighbour_rows(trainer):
    """((class, picture), [(class, cosine, picture), ...]): test pictures of a few classes, with their neighbours."""
    source, features = trainer.source, trainer.features()
    queries = [(features.test_labels == label).nonzero()[0].item() for label in features.test_labels.unique()[:QUERIES]]
    cosine, nearest = probe.nearest(features.test[queries], features.train, NEIGHBOURS)

    def shown(pictures, index):
        return source.classes[pictures.labels[index]], source.plain(pictures.read(index))

    rows = []
    for query, cosines, found in zip(features.test_index[queries].tolist(), cosine.tolist(), nearest.cpu()):
        neighbours = [shown(source.train, index) for index in features.train_index[found].tolist()]
        scored = [(name, c, picture) for (name, picture), c in zip(neighbours, cosines)]
        rows.append((shown(source.test, query), scored))
    return rows


def _spread(length, count):
    """Up to `count` indices evenly over 0..length-1."""
    count = min(count, length)
    return [i * length // count for i in range(count)]
