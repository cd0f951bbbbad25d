"""The parts of a report that show pictures and what the network makes of them."""

from collections import Counter

import torch.nn.functional as F

from . import maps, plots, probe
from .batches import drawing_from
from .page import image, legend_entry, section, tag, thumbnail

VIEWED, QUERIES, NEIGHBOURS = 10, 10, 9  # pictures on the sheets


def spread(length, count):
    """Up to `count` indices, each from the middle of an equal part of 0..length-1."""
    count = min(count, length)
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def views(source, seed):
    """Pictures of the training split as they are, and two random views of each below."""
    columns = []
    for index in spread(len(source.train), VIEWED):
        picture = source.train.read(index)
        if picture is not None:
            with drawing_from(seed + index):
                pictures = source.plain(picture), source.views(picture), source.views(picture)
            columns.append((source.classes[source.train.labels[index]], pictures))
    if not columns:
        return None
    cells = [tag("span", ""), *(tag("figure", _caption(name)) for name, _ in columns)]
    for line, label in enumerate(("picture", "view 1", "view 2")):
        cells += [tag("span", label), *(thumbnail(pictures[line], f"{label} of {name}") for name, pictures in columns)]
    note = "Pictures of the training split, and two random views of each, which is all that the network sees of them."
    return section("Augmented views", tag("p", note), _sheet(cells, 52, len(columns)))


def _sheet(cells, *first_and_count):
    columns = "grid-template-columns: {}px repeat({}, minmax(56px, 96px))".format(*first_and_count)
    return tag("div", tag("div", *cells, class_="sheet", style=columns), class_="scroll")


def _caption(name, note=""):
    """Above a picture. A name that is cut off there is whole in its tooltip."""
    return tag("figcaption", tag("b", name), tag("small", note), title=name)


def neighbours(source, features):
    """Test pictures, and the training pictures with the most similar features."""
    order = features.test_labels.cpu().argsort(stable=True)  # class by class: evenly spread, queries are of many
    queries = order[spread(len(order), QUERIES)].to(features.test.device)
    cosines, nearest = probe.nearest(features.test[queries], features.train, NEIGHBOURS)
    cells = []
    for query, row, found in zip(features.test_index[queries.cpu()].tolist(), cosines.tolist(), nearest.cpu()):
        label, name, picture = _shown(source, source.test, query)
        cells.append(tag("figure", _caption(name), thumbnail(picture, f"test picture of {name}"), class_="query"))
        for cosine, index in zip(row, features.train_index[found].tolist()):
            other, name, picture = _shown(source, source.train, index)
            kind = "right" if other == label else "wrong"
            alt = f"{name}, cosine {cosine:.2f}, {'the same' if kind == 'right' else 'another'} class"
            cells.append(tag("figure", _caption(name, f"{cosine:.2f}"), thumbnail(picture, alt), class_=kind))
    note = ("A test picture (left) and the training pictures with the most similar features, with class and cosine. A "
            "solid green frame marks the same class, a dashed red one another.")
    return section("Nearest neighbours", tag("p", note), _sheet(cells, 114, cosines.shape[1]))


def _shown(source, pictures, index):
    """Label, class and plain picture (None where it can be read no more)."""
    picture, label = pictures.read(index), int(pictures.labels[index])
    return label, source.classes[label], None if picture is None else source.plain(picture)


def class_map(source, features):
    """Test pictures on a map of their features, coloured by class as far as there are colours."""
    chosen, places = maps.flat_map(features.test)
    if chosen is None:
        return None
    labels = features.test_labels.cpu()[chosen].tolist()
    frequent = [label for label, _ in Counter(labels).most_common(len(plots.CLASSES))]
    colours = dict(zip(sorted(frequent), plots.CLASSES))
    grey_first = sorted(range(len(labels)), key=lambda i: labels[i] in colours)
    png = plots.scatter(places[grey_first], [colours.get(labels[i], plots.OTHERS) for i in grey_first])
    entries = [legend_entry(colour, source.classes[label]) for label, colour in colours.items()]
    rest = len(set(labels)) - len(colours)
    if rest:
        entries.append(legend_entry(plots.OTHERS, f"{rest:,} more class{'es' if rest > 1 else ''}"))
    note = (f"{len(labels):,} test pictures by t-SNE of their normalised features. Neighbours on the map are "
            "neighbours among the features; distances between groups mean little."
            + (f" The {len(colours)} classes with most pictures here have colours." if rest else ""))
    alt = f"Map of {len(labels):,} test pictures in {len(set(labels)):,} classes"
    return section("Map of the features", tag("p", note),
                   tag("div", image(png, alt), tag("p", *entries, class_="legend"), class_="map"))


def projections(rows, prior):
    """Histograms of the projections along random directions, beside what the prior would give."""
    rows = rows.detach().float().cpu()
    if rows.shape[1] < 2 or not rows.isfinite().all():
        return None
    on_sphere = prior == "hypersphere"
    columns = maps.along_directions(F.normalize(rows, dim=1) if on_sphere else rows)
    reach, t, density = maps.prior_density(prior, rows.shape[1])
    limit = min(max(reach, columns.abs().max().item()), 1.0 if on_sphere else 3 * reach)
    png = plots.histograms(list(columns.T.numpy()), limit, (t.numpy(), density.numpy()))
    where = {"hypersphere": "uniform on the unit sphere", "normal": "normal", "hypercube": "uniform in (-1, 1)"}[prior]
    note = (f"Outputs of the projection head{', at length 1,' if on_sphere else ''} for {len(rows):,} test pictures "
            f"along {columns.shape[1]} random directions at right angles to each other. The line is the density that "
            f"rows {where} in {rows.shape[1]:,} dimensions would have.")
    alt = f"Histograms along {columns.shape[1]} directions beside the density of rows that are {where}"
    return section("Projections along random directions", tag("p", note), tag("figure", image(png, alt)))
