"""Whole runs of the trainer from its command line, good ones and bad ones."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_cases import ENVIRONMENT, EXAMPLES, SHORT, events, one_thread, picture_folder  # noqa: F401

from PIL import Image
from simclr import checkpoint, cli, methods


def check_outputs(folder, probed=True):
    report = (folder / "report.html").read_text()
    assert report.count("data:image/png;base64,") + report.count("<svg") >= (4 if probed else 2)
    losses = [record["loss"] for record in events(folder, "step")]
    assert losses and all(math.isfinite(loss) for loss in losses)
    assert events(folder, "probe") and events(folder, "probe")[0]["step"] == 0 or not probed
    assert checkpoint.load_encoder(folder / "encoder.safetensors")
    return losses


def test_run_on_digits_is_complete_and_reproducible(tmp_path, capsys):
    losses = []
    for name, extra in (("a", []), ("b", ["--workers", "1"]), ("c", ["--seed", "1"])):
        assert cli.main(["digits", "--out", str(tmp_path / name), *SHORT, "--eval-every", "2", *extra]) == 0
        losses.append(check_outputs(tmp_path / name))
    assert losses[0] == losses[1], "the number of workers changed the run"
    assert losses[0] != losses[2], "the seed has no effect"
    assert [record["step"] for record in events(tmp_path / "a", "probe")] == [0, 2, 4]
    record = events(tmp_path / "a", "probe")[-1]
    assert record["linear"] <= record["linear_top5"] <= 1 and record["knn"] <= record["knn_top5"] <= 1
    assert "report: " in capsys.readouterr().out


def last(folder):
    """The states at the end of a short run."""
    return checkpoint.read(folder / "checkpoints" / "step-00000004.ckpt")["modules"]


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_method_in_two_parts_is_the_run_in_one(method, tmp_path):
    """Queue, bank and moving average are in the checkpoint."""
    run = ["digits", *SHORT, "--no-probe", "--width", "4", "--method", method, "--log-every", "1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main([*run, "--out", str(whole)]) == 0
    assert cli.main([*run, "--out", str(parts), "--checkpoint-every", "2"]) == 0
    assert cli.main([*run, "--out", str(parts), "--resume", str(parts / "checkpoints" / "step-00000002.ckpt")]) == 0
    assert check_outputs(whole, probed=False) == check_outputs(parts, probed=False)
    states = [last(folder)["method"] for folder in (whole, parts)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():  # instdisc's normaliser is NaN where it is not estimated
        torch.testing.assert_close(value, states[1][key], rtol=0, atol=0, equal_nan=True)


def test_a_finished_run_has_nothing_left_to_do(tmp_path, capsys):
    run = ["digits", *SHORT, "--width", "4", "--out", str(tmp_path), "--resume"]
    assert cli.main(run) == 0
    before = last(tmp_path)["method"]
    assert cli.main(run) == 0
    after = last(tmp_path)["method"]
    assert len(events(tmp_path, "step")) == 2
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_run_on_a_folder_names_what_it_could_not_read(tmp_path):
    folder = picture_folder(tmp_path / "data", each=14)
    for path in (folder / "cat").glob("*.png"):
        if path.stem in ("3", "5"):
            path.write_bytes(path.read_bytes()[:200])
    out = tmp_path / "out"
    arguments = ["--arch", "resnet18", "--precision", "bf16", "--head-layers", "2", "--image-size", "16"]
    assert cli.main([str(folder), "--out", str(out), *SHORT, *arguments]) == 0
    check_outputs(out)
    unreadable = {Path(name).name for record in events(out, "unreadable") for name in record["pictures"]}
    assert unreadable == {"3.png", "5.png"}
    settings = events(out, "settings")[0]
    assert (settings["optimizer"], settings["lr_scaling"]) == ("lars", "sqrt")
    assert len(settings["groups"]) == 2 and "weight decay 0, steps not scaled" in settings["groups"][1]


def test_run_without_labels(tmp_path):
    folder = picture_folder(tmp_path / "data", ("all",), each=24)
    assert cli.main([str(folder), "--out", str(tmp_path), "--arch", "convnet", "--no-probe", *SHORT]) == 0
    check_outputs(tmp_path, probed=False)


def test_tensorboard_has_what_the_log_has(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    assert cli.main(["digits", *SHORT, "--width", "4", "--out", str(tmp_path), "--tensorboard"]) == 0
    (path,) = (tmp_path / "tensorboard").iterdir()
    found = {(value.tag, event.step): value.tensor.float_val[0]
             for event in EventFileLoader(str(path)).Load() for value in event.summary.value}
    for kind, names in (("step", ("loss", "lr", "loss_s")), ("probe", ("linear", "knn_top5"))):
        for record in events(tmp_path, kind):
            for name in names:
                assert found[f"{kind}/{name}", record["step"]] == pytest.approx(record[name])


def test_tensorboard_that_is_missing_is_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert cli.main(["digits", *SHORT, "--no-probe", "--out", str(tmp_path), "--tensorboard"]) == 2
    assert "--tensorboard: expected the package tensorboard" in capfd.readouterr().err.splitlines()[-1]


def test_views_made_on_the_device(tmp_path):
    pytest.importorskip("kornia")
    run = ["digits", *SHORT, "--no-probe", "--width", "4", "--log-every", "1", "--augment", "device"]
    assert cli.main([*run, "--out", str(tmp_path / "a"), "--checkpoint-every", "2"]) == 0
    assert cli.main([*run, "--out", str(tmp_path / "b"), "--resume",
                     str(tmp_path / "a" / "checkpoints" / "step-00000002.ckpt")]) == 0
    losses = [check_outputs(tmp_path / name, probed=False) for name in "ab"]
    assert losses[0] == losses[1] and len(set(losses[0])) == 4


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
               str(EXAMPLES / "simclr_imagenet.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_two_processes(tmp_path):
    done = torchrun("digits", "--out", str(tmp_path), *SHORT)
    check_outputs(tmp_path)
    assert events(tmp_path, "end")[0]["processes"] == 2
    assert done.stdout.count("report: ") == 1
    # Each process read a share of the pictures, with the statistics of batch norm that the checkpoint has.
    shown = events(tmp_path, "probe")[-1]
    evaluate = [sys.executable, str(EXAMPLES / "evaluate.py"), str(tmp_path / "checkpoints" / "best.ckpt"), "digits",
                "--workers", "0", "--device", "cpu", "--json", str(tmp_path / "scores.json")]
    subprocess.run(evaluate, check=True, capture_output=True, timeout=300, env=ENVIRONMENT)
    found = json.loads((tmp_path / "scores.json").read_text())["probes"]
    scores = [probe["top1"] for probe in found.values()]
    assert scores == pytest.approx([shown["linear"], shown["knn"]], abs=1e-6)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Without batch norm nothing tells them apart but the order of sums: to 1e-5, over four steps."""
    run = ["digits", *SHORT, "--no-probe", "--width", "4", "--norm", "group", "--optimizer", "sgd", "--log-every", "1"]
    torchrun(*run, "--out", str(tmp_path / "two"))
    assert cli.main([*run, "--out", str(tmp_path / "one")]) == 0
    one, two = (check_outputs(tmp_path / name, probed=False) for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.slow
def test_a_compiled_network_trains(tmp_path):
    run = ["digits", *SHORT, "--no-probe", "--width", "4", "--norm", "group"]
    assert cli.main([*run, "--out", str(tmp_path / "compiled"), "--compile"]) == 0
    assert cli.main([*run, "--out", str(tmp_path / "eager")]) == 0
    compiled, eager = (check_outputs(tmp_path / name, probed=False) for name in ("compiled", "eager"))
    assert compiled == pytest.approx(eager, rel=1e-3)  # convolutions in another order, over four steps of Adam


def _unreadable(root):
    (root / "cat").mkdir(parents=True)
    (root / "cat" / "one.png").write_bytes(b"no picture")


def _flat(root):
    root.mkdir()
    Image.new("RGB", (8, 8)).save(root / "one.png")


def _different_classes(root):
    picture_folder(root / "train", ("cat", "dog"))
    picture_folder(root / "val", ("cat", "cow"))


BAD_DATA = {
    "missing": (lambda root: None, "nothing at that path"),
    "file": (lambda root: root.write_text("x"), "a file"),
    "empty": (lambda root: root.mkdir(), "one sub-folder"),
    "no pictures": (lambda root: (root / "cat").mkdir(parents=True), "no picture"),
    "pictures without class folders": (_flat, "one sub-folder"),
    "unreadable": (_unreadable, "can be read"),
    "fewer than the batch": (lambda root: picture_folder(root, each=5), "--batch 16"),
    "one class": (lambda root: picture_folder(root, ("cat",), each=40), "two classes"),
    "splits that differ": (_different_classes, "same classes"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line(case, tmp_path, capfd):
    make, expected = BAD_DATA[case]
    make(tmp_path / "data")
    code = cli.main([str(tmp_path / "data"), "--out", str(tmp_path / "out"), *SHORT])
    message = capfd.readouterr().err
    assert code == 2 and message.count("\n") == 1 and expected in message and "got" in message, message


@pytest.mark.parametrize("arguments, expected", [
    (["--batch", "0"], "int of at least 1"),
    (["--batch", "many"], "--batch"),
    (["--lr", "nan"], "float of at least 1e-30"),
    (["--lr", "inf"], "float of at least 1e-30"),
    (["--warmup", "2"], "at most 1"),
    (["--seed", "-1"], "--seed"),
    (["--checkpoint-every", "-1"], "--checkpoint-every"),
    (["--optimizer", "adam"], "adamw"),
    (["--method", "moco"], "moco-v2"),
    (["--head-layers", "9"], "--head-layers"),
    (["--precision", "int8"], "bf16"),
    (["--method", "byol", "--temperature", "1"], "--temperature: expected --loss nt_xent"),
    (["--method", "byol", "--loss", "nt_xent"], "--loss: expected --method simclr, got --method byol"),
    (["--queue", "64"], "--queue: expected --method moco-v2, got --loss nt_xent"),
    (["--norm", "group", "--bn-splits", "2"], "--bn-splits"),
    (["--bank-momentum", "1"], "--bank-momentum"),
    (["--crop", "0.5", "0.2"], "--crop: expected MIN above 0 and up to MAX, got 0.5 and 0.2"),
    (["--crop", "0", "1"], "--crop"),
    (["--hard-negatives", "8"], "--hard-negatives: expected --method moco-v2"),
    (["--unknown"], "--unknown"),
])
def test_bad_settings_are_one_line(arguments, expected, capfd):
    assert cli.main(["digits", *arguments]) == 2
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and expected in message, message


@pytest.mark.parametrize("arguments, expected", [
    (["--arch", "vgg"], "--arch"),
    (["--device", "tpu"], "--device"),
    (["--device", "meta"], "--device"),
    (["--batch", "16", "--grad-cache-chunks", "9"], "--grad-cache-chunks"),
    (["--batch", "16", "--grad-cache-chunks", "2", "--bn-splits", "5"], "--bn-splits"),
    (["--batch", "1"], "at least 2"),
    (["--batch", "2000"], "--batch 2000"),
    (["--method", "moco-v2", "--queue", "100"], "--queue"),
    (["--image-size", "32"], "--image-size"),
    (["--resume", "nowhere.ckpt"], "nowhere.ckpt"),
])
def test_settings_that_do_not_fit_are_one_line(arguments, expected, tmp_path, capfd):
    assert cli.main(["digits", "--out", str(tmp_path / "out"), "--workers", "0", *arguments]) == 2
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and expected in message and "got" in message, message


def test_script_fails_without_traceback(tmp_path):
    script = [sys.executable, str(EXAMPLES / "simclr_imagenet.py")]
    for arguments in ([], [str(tmp_path / "nothing")]):
        done = subprocess.run([*script, *arguments], capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
