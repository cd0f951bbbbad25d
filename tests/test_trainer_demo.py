"""The demo: what it compares, what it writes, when it fails."""

from __future__ import annotations

import json

import pytest
from trainer_cases import one_thread  # noqa: F401

import demo
from PIL import Image
from simclr import cli, plots
from simclr.losses import LOSSES
from simclr.methods import METHODS
from simclr.settings import objective, parse


def outcome(arguments, trained, untrained=0.3, seconds=61.4):
    """What a run of these settings would give."""
    title, text = objective(parse(["digits", *arguments], "test"))
    probes = [dict(step=0, linear=untrained, knn=0.5), dict(step=1000, linear=trained, knn=0.875)]
    return dict(name=arguments[1], title=title, settings=text, probes=probes, seconds=seconds, report="report.html")


def test_table_of_runs():
    runs = [outcome(("--loss", "nt_xent"), 0.811), outcome(("--loss", "swd-normal"), 0.7)]
    lines = demo.side_by_side("losses", runs).splitlines()
    assert lines[0].startswith("| loss | settings | linear probe, trained |")
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 8
    assert lines[2] == "| nt_xent | temperature 0.2 | 81.1% | 30.0% | 87.5% | 50.0% | 61 |"
    assert lines[3].startswith("| swd-normal | prior normal, weight 5 | 70.0% |") and len(lines) == 4


def test_seed_table_ends_with_the_mean():
    lines = demo.seed_table([3, 8], [(0.8, 0.3), (0.6, 0.4)]).splitlines()
    assert lines[:2] == ["| seed | linear probe, trained | untrained |", "| --- | --- | --- |"]
    assert lines[2:] == ["| 3 | 80.0% | 30.0% |", "| 8 | 60.0% | 40.0% |", "| mean | 70.0% | 35.0% |"]


def test_picture_of_the_runs(tmp_path):
    runs = [(loss.title, outcome(("--loss", name), 0.7)["probes"]) for name, loss in LOSSES.items()]
    plots.comparison(tmp_path / "losses.png", runs)
    with Image.open(tmp_path / "losses.png") as picture:
        assert picture.width > 400 and picture.height > 300


@pytest.mark.parametrize("kind, option, names, trained, failed", [
    ("losses", "loss", ["swd-normal", "decoupled"], {"swd-normal": 0.6, "decoupled": 0.7}, []),
    ("losses", "loss", ["swd-normal", "decoupled"], {"swd-normal": 0.6, "decoupled": 0.5},
     ["decoupled: linear probe 50.0%"]),
    ("losses", "loss", [], dict.fromkeys(LOSSES, 0.8), []),
    ("methods", "method", ["moco-v2", "byol"], {"moco-v2": 0.44, "byol": 0.46}, ["moco-v2: 14.0 points"]),
    ("methods", "method", [], dict.fromkeys(METHODS, 0.8), []),
])
def test_demo_compares(kind, option, names, trained, failed, tmp_path, monkeypatch, capfd):
    def run(settings):
        name = getattr(settings, option)
        return outcome((f"--{option}", name), trained[name])

    monkeypatch.setattr(cli, "run", run)
    code = demo.main(["--out", str(tmp_path), f"--{kind}", *names])
    messages = [line for line in capfd.readouterr().err.splitlines() if line.startswith("demo failed: ")]
    assert code == bool(failed) and len(messages) == len(failed)
    assert all(text in message for text, message in zip(failed, messages))
    rows = (tmp_path / f"{kind}.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(names or trained)
    assert (tmp_path / f"{kind}.png").exists()


@pytest.mark.parametrize("data, kept", [("digits", False), ("/data/imagenet", True)])
def test_demo_starts_anew_where_it_ran_before_alone(data, kept, tmp_path, monkeypatch):
    left = tmp_path / "checkpoints" / "step-00000001.ckpt"
    left.parent.mkdir()
    left.write_bytes(b"a checkpoint")
    settings = dict(event="settings", data=data, steps=1000, eval_every=200)
    (tmp_path / "log.jsonl").write_text(json.dumps(settings) + "\n{}\n")
    monkeypatch.setattr(cli, "run", lambda settings: outcome(("--loss", "nt_xent"), 0.8))
    assert demo.main(["--out", str(tmp_path)]) == 0 and left.exists() == kept


def test_demo_ends_in_one_line(tmp_path, capfd):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--out", str(tmp_path / "out")])
    assert stopped.value.code == 2 and capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--losses", "--seeds", "0", "1"], ["--losses", "--methods"]])
def test_demo_compares_one_thing_at_a_time(arguments, capfd):
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code == 2 and "expected one seed and no other comparison" in capfd.readouterr().err
