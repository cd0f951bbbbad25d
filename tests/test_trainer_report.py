"""The report of the trainer of examples/: one file that shows what there is, escapes names, and draws no number."""

from __future__ import annotations

import base64
import io
import math
import random
import re
import shlex
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from trainer_cases import one_thread  # noqa: F401  (the fixture applies here too)

from simclr import cli, data, maps, page, plots, probe, report, sheets

NAMES = ["<b>&", 'say "x"', "$\\frac", "猫", "e", "f"]
ALWAYS = ["Augmented views", "Settings", "Go on from here"]
LOGGED = ["Training"]
PROBED = ["Frozen features", "Nearest neighbours", "Map of the features", "Projections along random directions"]


class Pictures:
    """Noise in memory, of which those in `missing` cannot be read."""

    def __init__(self, count, classes, size=12, missing=()):
        self.labels = torch.arange(count) % classes
        self.noise = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
        self.missing = missing

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        return None if index in self.missing else self.noise[index]


def source_of(classes=6, **more):
    def views(picture):
        return picture / 255 * torch.rand(3, 1, 1)

    train, test = Pictures(60, classes, **more), Pictures(36, classes)
    return data.Source(train, test, (NAMES + [f"c{i}" for i in range(60)])[:classes], 3, 12, views, lambda x: x / 255)


def features_of(source, spread=1.0):
    """Rows near the axis of their class."""
    def rows(pictures):
        axes = torch.nn.functional.one_hot(pictures.labels, len(source.classes)).float()
        return axes + 0.05 * spread * torch.randn(axes.shape), pictures.labels, torch.arange(len(pictures))

    return probe.Features(*rows(source.train), *rows(source.test))


def settings_of(**more):
    given = dict(data="/data/pets", out="o", loss="nt_xent", batch=16, steps=40, arch="convnet", seed=3)
    return SimpleNamespace(**{**given, **more})


def step(number):
    times = dict(images_per_s=1200.0 + number, data_s=0.010, encoder_s=0.070, loss_s=0.015, optimizer_s=0.005)
    return dict(event="step", step=number, loss=3.5 - number / 40, top1=number / 80, lr=0.1, memory_mib=2000 + number,
                **times)


def probed(number, top1):
    return dict(event="probe", step=number, linear=top1, linear_top5=top1 + 0.1, knn=top1 / 2, knn_top5=top1 / 2 + 0.1)


RECORDS = [dict(event="settings"), probed(0, 0.25), step(10), step(20), probed(20, 0.5), step(40), probed(40, 0.75),
           dict(event="end")]
FACTS = dict(seconds=75.04, device="a <device>", processes=1, parameters=97392, torch="2.0")


class Page(HTMLParser):
    """What a browser would find."""

    def __init__(self, text):
        super().__init__()
        self.raw, self.tags, self.texts = text, [], []
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))

    def handle_data(self, text):
        self.texts.append(text)

    def of(self, name):
        return [attributes for found, attributes in self.tags if found == name]

    def pictures(self):
        for attributes in self.of("img"):
            kind, _, text = attributes["src"].partition(",")
            assert kind == "data:image/png;base64"
            yield Image.open(io.BytesIO(base64.b64decode(text, validate=True)))

    @property
    def text(self):
        return "|".join(self.texts)


def write(folder, records=RECORDS, features=True, source=None, settings=None, objective="NT-Xent (temperature 0.2)",
          **facts):
    source = source or source_of()
    found = (features_of(source), torch.randn(len(source.test), 16)) if features else ()
    facts = {**FACTS, **facts}
    path = report.write_report(folder, settings or settings_of(), source, records, facts, objective, *found)
    assert path == folder / "report.html" and sorted(folder.glob("*.png")) == []
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def undrawn(monkeypatch):
    """For what is written: drawing takes most of a report's time."""
    monkeypatch.setattr(plots, "png", lambda figure: b"")
    monkeypatch.setattr(maps, "flat_map", lambda rows: (torch.arange(len(rows)), rows[:, :2].numpy()))


def section_titles(page_):
    return [text for text in page_.texts if text in ALWAYS + LOGGED + PROBED]


# The page


def test_everything_is_in_one_file(tmp_path):
    found = write(tmp_path)
    for word in ("http:", "https:", "//", "<script", "<link", "url(", "@import"):
        assert word not in found.raw.replace("data:image/png;base64,", "").split("</style>")[0], word
    assert not {"script", "link", "iframe", "object", "base"} & {name for name, _ in found.tags}
    assert all(attributes["src"].startswith("data:image/png;base64,") for attributes in found.of("img"))
    assert not [attributes for _, attributes in found.tags if "href" in attributes or "srcset" in attributes]
    assert {"http-equiv": "Content-Security-Policy", "content": page.POLICY} in found.of("meta")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_every_picture_decodes_shows_something_and_has_words(tmp_path):
    found = write(tmp_path)
    pictures = list(found.pictures())
    # Five plots, a map and histograms; ten pictures and two views of each; ten with nine neighbours each.
    assert len(pictures) == 5 + 1 + 1 + 30 + 10 * 10
    for picture in pictures:
        picture.load()
        low, high = picture.convert("L").getextrema()
        assert high - low > 20
    assert all(len(attributes["alt"]) > 5 for attributes in found.of("img"))


def test_sections_follow_what_there_is(tmp_path, undrawn):
    assert sorted(section_titles(write(tmp_path))) == sorted(ALWAYS + LOGGED + PROBED)
    without = [record for record in RECORDS if record["event"] != "probe"]
    assert sorted(section_titles(write(tmp_path, without, features=False))) == sorted(ALWAYS + LOGGED)
    assert sorted(section_titles(write(tmp_path, [], features=False))) == sorted(ALWAYS)


def test_names_are_text(tmp_path):
    """Of classes, which are folders' names, and of whatever else the run was called with."""
    unread = [dict(event="unreadable", step=3, pictures=["a/<i>.png", "b\udcff.png"])]
    found = write(tmp_path, RECORDS + unread, settings=settings_of(data="/data/<u>&"), objective="<s> (1 < 2)")
    for name in (*NAMES[:3], "<s> on <u>&", "a/<i>.png", "b\\udcff.png", "a <device>"):
        assert any(name in text for text in found.texts), name
    assert not re.search("<b>&(?!lt;)", found.raw) and not {"u", "s"} & {name for name, _ in found.tags}
    assert any("of <b>&" in attributes["alt"] for attributes in found.of("img"))
    assert any(attributes.get("title") == 'say "x"' for attributes in found.of("figcaption"))


# What it says


def test_summary(tmp_path, undrawn):
    found = write(tmp_path)
    for text in ("NT-Xent on pets", "60 training and 36 test pictures of 6 classes, 3 × 12 × 12.",
                 "NT-Xent (temperature 0.2); convnet with 97,392 parameters.",
                 "40 steps of 16 pictures in 75 s on a <device>, 2,040 MiB of memory.",
                 "75.0%|untrained 25.0%", "37.5%|untrained 12.5%", "Contrastive top-1|50.0%|chance 3.23%",
                 "Loss|2.5|3.25 at step 10", "Images a second|1,220|", "Linear probe|75.0%|25.0%|85.0%|35.0%",
                 "kNN probe|37.5%|12.5%|47.5%|22.5%", "seconds|75.0|"):
        assert text in found.text, text
    assert "on a <device>, 4 processes" in write(tmp_path, processes=4).text


@pytest.mark.parametrize("seconds, text", [(61.4, "61 s"), (900, "15 min"), (12000, "3 h 20 min"), (3599, "1 h 0 min")])
def test_duration(seconds, text):
    assert report.duration(seconds) == text


@pytest.mark.parametrize("more, chance", [
    ({}, 1 / 31),
    (dict(method="byol", loss=None), 1 / 31),
    (dict(method="moco-v2", loss=None, queue=128), 1 / 129),
    (dict(method="instdisc", loss=None, queue=None), 1 / 60),
])
def test_chance_is_that_of_the_method(more, chance, tmp_path, undrawn):
    assert f"chance {chance:.2%}" in write(tmp_path, features=False, settings=settings_of(**more)).text


def test_time_of_a_step_is_split(tmp_path, undrawn):
    text = write(tmp_path, features=False).text
    assert "Time of a step: 100 ms" in text
    for part in ("data|10 ms, 10.0%", "encoder|70 ms, 70.0%", "loss|15 ms, 15.0%", "optimizer|5 ms, 5.0%"):
        assert part in text
    slow = [dict(step(1), encoder_s=1.23456, data_s=0.001234)]
    assert "encoder|1,235 ms" in write(tmp_path, slow, features=False).text
    assert "data|1.23 ms" in write(tmp_path, slow, features=False).text
    widths = [a["style"] for a in write(tmp_path, features=False).of("i") if "width" in a.get("style", "")]
    assert [float(style.split("%")[0].split(":")[1]) for style in widths] == [10, 70, 15, 5]


def test_logs_that_lack_something(tmp_path, undrawn):
    """A single step, or none of what newer logs have."""
    old = [dict(event="step", step=1, loss=2.0), dict(event="probe", step=0, linear=0.5, knn=0.25)]
    found = write(tmp_path, old)
    assert "Loss" in found.text and "Contrastive" not in found.text and "Time of a step" not in found.text
    assert "Linear probe|–|50.0%|–|–" in found.text  # nothing was measured after the first step
    lone = [probed(40, 0.5), step(1)]  # taken up again without what came before
    assert "Linear probe|50.0%|–|60.0%|–" in write(tmp_path, lone).text
    zero = dict(step(1), lr=0.0, images_per_s=None, data_s=0, encoder_s=0, loss_s=0, optimizer_s=0)
    assert "Throughput" not in write(tmp_path, [zero]).text


def test_top5_of_few_classes_says_nothing(tmp_path, undrawn):
    assert "top-5" in write(tmp_path).text and "top-5" not in write(tmp_path, source=source_of(5)).text


def test_pictures_that_could_not_be_read(tmp_path, undrawn):
    names = [f"{i:02}.png" for i in range(13)]
    records = [dict(event="unreadable", step=i, pictures=names[: 3 + 5 * i]) for i in range(3)]
    found = write(tmp_path, [*RECORDS, *records], features=False)
    assert "13 pictures could not be read" in found.text and "and 3 more, all named in log.jsonl" in found.text
    assert "09.png" in found.text and "10.png" not in found.text
    assert "1 picture could not" in write(tmp_path, [dict(records[0], pictures=["x"])], features=False).text
    assert "could not be read" not in write(tmp_path, features=False).text


def test_commands_are_the_run_again(tmp_path, undrawn):
    given = ["digits", "--lr", "0.5", "--steps", "7", "--loss", "swd-normal", "--no-probe", "--out", "a b"]
    settings = cli.parse(given, "test")
    settings.blur = False
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/step-00000010.ckpt", "checkpoints/step-00000020.ckpt", "encoder.safetensors"):
        (tmp_path / name).touch()
    settings.image_size = 48
    source = source_of()
    texts = write(tmp_path, features=False, source=source, settings=settings).texts
    command, evaluate = (shlex.split(text) for text in texts if text.startswith("python "))
    assert command[1] == "examples/simclr_imagenet.py" and "--no-blur" in command and command[-1] == "--resume"
    again = vars(cli.parse([word for word in command[2:] if word != "--no-blur"], "test"))
    assert {**again, "blur": False, "resume": None} == {**vars(settings), "resume": None}
    assert evaluate[1:] == ["examples/evaluate.py", str(tmp_path / "checkpoints/step-00000020.ckpt"), "digits"]
    (tmp_path / "checkpoints/best.ckpt").touch()
    assert "best.ckpt digits" in write(tmp_path, features=False, settings=settings).text
    several = write(tmp_path, features=False, settings=settings, processes=2).text
    assert "torchrun --nproc-per-node 2 examples/simclr_imagenet.py digits" in several


def test_a_report_draws_no_random_number(tmp_path):
    source = source_of()
    features, rows = features_of(source), torch.randn(36, 16)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    pages = [report.write_report(tmp_path, settings_of(), source, RECORDS, FACTS, "x", features, rows).read_text()]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    torch.rand(5)
    pages.append(report.write_report(tmp_path, settings_of(), source, RECORDS, FACTS, "x", features, rows).read_text())
    assert pages[0] == pages[1]


# Sheets


def test_frames_of_neighbours_tell_classes(tmp_path):
    source = source_of(3)
    features = features_of(source, spread=0.1)
    features.train_labels = features.train_labels.clone()
    found = Page(sheets.neighbours(source, features))
    assert [a["class"] for a in found.of("figure")] == (["query"] + ["right"] * 9) * 10
    queries = [a["alt"] for a in found.of("img")][::10]
    assert queries == ["test picture of <b>&"] * 3 + ['test picture of say "x"'] * 4 + ["test picture of $\\frac"] * 3
    assert "<b>&, cosine 1.00, the same class" in [a["alt"] for a in found.of("img")]
    source.train.labels = (source.train.labels + 1) % 3
    assert [a["class"] for a in Page(sheets.neighbours(source, features)).of("figure")][1] == "wrong"


def test_pictures_that_can_be_read_no_more():
    source = source_of(2, missing=range(60))
    found = Page(sheets.neighbours(source, features_of(source)))
    assert len(found.of("img")) == 10 and [a["class"] for a in found.of("div")].count("gone") == 90
    assert sheets.views(source, 0) is None


def test_large_and_grey_pictures_become_thumbnails():
    for picture, mode, size in ((torch.rand(3, 300, 150), "RGB", (48, 96)), (torch.rand(1, 20, 30), "L", (30, 20))):
        shown = next(Page(page.thumbnail(picture, "x")).pictures())
        assert (shown.mode, shown.size) == (mode, size)
    exact = torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8)
    shown = next(Page(page.thumbnail(exact / 255, "x")).pictures())
    assert torch.equal(torch.from_numpy(np.array(shown)).permute(2, 0, 1), exact)


@pytest.mark.parametrize("classes, coloured, rest", [(6, 6, None), (20, 20, None), (21, 20, "1 more class"),
                                                     (36, 20, "16 more classes")])
def test_map_has_colours_for_twenty_classes(classes, coloured, rest, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "scatter", lambda points, colours: drawn.append((points, colours)) or b"")
    monkeypatch.setattr(maps, "flat_map", lambda rows: (torch.arange(len(rows)), rows[:, :2].numpy()))
    source = source_of(classes)
    features = features_of(source)
    found = Page(sheets.class_map(source, features))
    points, colours = drawn[0]
    grey = colours.count(plots.OTHERS)
    assert len(set(colours) - {plots.OTHERS}) == coloured and bool(grey) == bool(rest)
    assert plots.OTHERS not in colours[grey:], "grey points would hide coloured ones"
    assert torch.equal(torch.from_numpy(points).sort(0).values, features.test[:, :2].sort(0).values)
    assert (rest in found.texts) if rest else ("more class" not in found.text)
    assert ("The 20 classes with most pictures" in found.text) == bool(rest)


# Maps


def test_flat_map_keeps_groups_together():
    rows = torch.eye(3).repeat_interleave(20, 0) + 0.02 * torch.randn(60, 3)
    chosen, places = maps.flat_map(rows)
    assert torch.equal(chosen, torch.arange(60)) and places.shape == (60, 2)
    distance = torch.cdist(*[torch.from_numpy(places)] * 2).fill_diagonal_(math.inf)
    assert (distance.argmin(1) // 20 == torch.arange(60) // 20).all()


def test_flat_map_of_many_rows_takes_some(monkeypatch):
    monkeypatch.setattr(maps, "MOST", 15)
    chosen, places = maps.flat_map(torch.randn(200, 4))
    assert len(chosen.unique()) == len(places) == 15 and torch.equal(chosen, chosen.sort().values) and chosen.max() > 14


@pytest.mark.parametrize("rows", [torch.ones(40, 8), torch.ones(40, 8) * torch.arange(1, 41)[:, None],
                                  torch.full((40, 8), math.nan), torch.randn(4, 8), torch.randn(40, 1)])
def test_flat_map_of_nothing_to_lay_out(rows):
    assert maps.flat_map(rows) == (None, None)


def test_directions_are_orthogonal_and_unit():
    basis = maps.along_directions(torch.eye(32))
    torch.testing.assert_close(basis.T @ basis, torch.eye(5), rtol=0, atol=1e-6)
    assert maps.along_directions(torch.randn(7, 3)).shape == (7, 3)
    assert torch.equal(basis, maps.along_directions(torch.eye(32)))


@pytest.mark.parametrize("prior, width, expected", [
    ("hypersphere", 2, lambda t: 1 / (math.pi * (1 - t * t).sqrt())),
    ("hypersphere", 3, lambda t: torch.full_like(t, 0.5)),
    ("hypersphere", 5, lambda t: 0.75 * (1 - t * t)),
    ("normal", 64, lambda t: (-t * t / 2).exp() / math.sqrt(2 * math.pi)),
    ("hypercube", 64, lambda t: (-1.5 * t * t).exp() * math.sqrt(1.5 / math.pi)),
])
def test_density_of_a_prior(prior, width, expected):
    reach, t, density = maps.prior_density(prior, width)
    torch.testing.assert_close(density, expected(t))
    assert t.min() >= -reach and t.max() <= reach


@pytest.mark.parametrize("prior", ["hypersphere", "normal", "hypercube"])
def test_density_is_that_of_draws(prior):
    normal = torch.randn(40000, 128)
    rows = {"hypersphere": torch.nn.functional.normalize(normal, dim=1), "normal": normal,
            "hypercube": 2 * torch.rand(40000, 128) - 1}[prior]
    _, t, density = maps.prior_density(prior, 128)
    step_ = t[1] - t[0]
    assert (density.sum() * step_).item() == pytest.approx(1, abs=1e-4)  # 4.5 standard deviations hold all but 7e-6
    # The variance of 200,000 draws is known to sqrt(2 / 200,000) = 0.3%.
    spread = maps.along_directions(rows).square().mean().item()
    assert spread == pytest.approx((density * t * t).sum().item() * step_.item(), rel=0.02)


def test_projections_beside_the_prior_of_the_loss(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "histograms", lambda *given: drawn.append(given) or b"")
    rows = 3 * torch.randn(50, 32)
    assert "uniform on the unit sphere in 32" in sheets.projections(rows, "hypersphere")
    assert "normal in 32" in sheets.projections(rows, "normal")
    (on_sphere, limit, _), (as_they_are, wide, _) = drawn
    torch.testing.assert_close(torch.tensor(np.stack(as_they_are, 1)), maps.along_directions(rows))
    torch.testing.assert_close(torch.tensor(np.stack(on_sphere, 1)),
                               maps.along_directions(torch.nn.functional.normalize(rows, dim=1)))
    assert limit <= 1 and wide >= max(abs(column).max() for column in as_they_are)
    assert sheets.projections(rows * math.nan, "normal") is None and sheets.projections(rows[:, :1], "normal") is None
    found = write(tmp_path, source=source_of(2), settings=settings_of(loss="swd-hypercube"))
    assert "uniform in (-1, 1)" in found.text
