"""examples/evaluate.py: the scores of a checkpoint and of an exported encoder, and one line for whatever is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from trainer_cases import ENVIRONMENT, EXAMPLES, one_thread, picture_folder  # noqa: F401  (a fixture, applied here)

import evaluate
from simclr import checkpoint, data, model, probe

BUILT = dict(arch="convnet", width=4, channels=3, image_size=16, norm="batch")
COMMON = ["--workers", "0", "--device", "cpu"]


class Method(torch.nn.Module):
    """What a training method keeps: the network, and an average of it that is not to be taken for it."""

    def __init__(self, encoder):
        super().__init__()
        self.network = torch.nn.ModuleDict(dict(encoder=encoder, head=torch.nn.Linear(4, 2)))
        self.average = torch.nn.ModuleDict(dict(network=torch.nn.ModuleDict(dict(
            encoder=model.build_encoder("convnet", 3, 16, 4)))))


def trained(norm="batch"):
    encoder = model.build_encoder("convnet", 3, 16, 4)
    encoder = model.group_norm(encoder) if norm == "group" else encoder
    encoder(torch.rand(8, 3, 16, 16))  # running statistics of its own
    return encoder.eval()


def checkpoint_of(folder, encoder, **settings):
    checkpoints = checkpoint.Checkpoints(folder, SimpleNamespace(**{**BUILT, **settings}), keep=1)
    checkpoints.save(7, {"method": Method(encoder)}, [])
    return checkpoints.newest


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes whose pictures nothing but their colour tells apart."""
    return picture_folder(tmp_path_factory.mktemp("pictures") / "data", ("cat", "cow", "dog"), each=20, side=16)


def features_of(encoder, folder):
    """In one batch and in the memory format of the script: to the bit what it gets."""
    encoder.to(memory_format=torch.channels_last)
    source, parts = data.open_data(str(folder), 16), []
    for split in (source.train, source.test):
        shown = torch.stack([source.plain(split.read(i)) for i in range(len(split))])
        rows = encoder(shown.to(memory_format=torch.channels_last)).detach()
        parts += [rows, split.labels, torch.arange(len(split))]
    return probe.Features(*parts)


def scores_of(folder, *arguments):
    path = folder / "scores.json"
    assert evaluate.main([*map(str, arguments), *COMMON, "--json", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_scores_of_a_checkpoint(norm, tmp_path, pictures, capsys):
    encoder = trained(norm)
    path = checkpoint_of(tmp_path / "run", encoder, norm=norm)
    found = scores_of(tmp_path, path, pictures, "--solver", "both", "--k", "5")
    features = features_of(encoder, pictures)
    expected = {"linear, lbfgs": probe.linear_probe(features), "linear, sgd": probe.linear_probe(features, "sgd"),
                "kNN, k = 5": probe.knn_probe(features, 5)}
    assert (found["train"], found["test"], found["unreadable"]) == (48, 12, 0)
    assert (found["checkpoint"], found["data"]) == (str(path), str(pictures))
    assert found["probes"] == {name: vars(scores) for name, scores in expected.items()}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| probe         |  top-1 |  top-5 |" and len({len(line) for line in lines}) == 1
    assert lines[2] == f"| linear, lbfgs | {found['probes']['linear, lbfgs']['top1']:>6.1%} | 100.0% |"
    assert [line[2:15].strip() for line in lines[2:]] == list(expected)


def test_an_exported_encoder_scores_the_same(tmp_path, pictures):
    encoder = trained()
    checkpoint.export_encoder(tmp_path / "encoder.safetensors", encoder, BUILT)
    exported = scores_of(tmp_path, tmp_path / "encoder.safetensors", pictures)["probes"]
    saved = scores_of(tmp_path, checkpoint_of(tmp_path, encoder), pictures)["probes"]
    assert exported == saved and list(saved) == ["linear, lbfgs", "kNN, k = 20"]


def test_pictures_that_cannot_be_read_are_counted(tmp_path, capsys):
    folder = picture_folder(tmp_path / "data", each=20, side=16)
    for name in ("3", "5"):
        (folder / "cat" / f"{name}.png").write_bytes(b"no picture")
    assert scores_of(tmp_path, checkpoint_of(tmp_path, trained()), folder)["unreadable"] == 2
    assert "left out what could not be read: 2 of the pictures" in capsys.readouterr().err


def _missing(folder):
    return folder / "none.ckpt"


def _foreign(folder):
    path = folder / "foreign.ckpt"
    torch.save({"weight": torch.ones(3)}, path)
    return path


def _foreign_encoder(folder):
    path = folder / "foreign.safetensors"
    path.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    return path


def _damaged(folder):
    path = checkpoint_of(folder, trained())
    contents = bytearray(path.read_bytes())
    contents[-100] ^= 1
    path.write_bytes(contents)
    return path


def _not_finite(folder):
    encoder = trained()
    with torch.no_grad():
        encoder[0].weight.fill_(float("nan"))
    return checkpoint_of(folder, encoder)


@pytest.mark.parametrize("make, expected", [
    (_missing, "none.ckpt: expected a checkpoint"),
    (lambda folder: folder / "none.safetensors", "none.safetensors: expected an encoder"),
    (_foreign, "foreign.ckpt: expected a checkpoint"),
    (_foreign_encoder, "foreign.safetensors: expected an encoder"),
    (_damaged, ".ckpt: expected contents with SHA-256"),
    (_not_finite, "expected an encoder with finite features"),
    (lambda folder: checkpoint_of(folder, trained(), width=8), "expected the weights of a convnet, got others"),
])
def test_files_that_are_no_encoder_are_one_line(make, expected, tmp_path, pictures, capfd):
    assert evaluate.main([str(make(tmp_path)), str(pictures), *COMMON]) == 2
    message = capfd.readouterr().err
    assert message.startswith("evaluate.py: ") and message.count("\n") == 1
    assert expected in message and "got" in message, message


def _one_class(folder):
    return picture_folder(folder / "one", ("cat",), each=8, side=16)


@pytest.mark.parametrize("make, expected", [
    (lambda folder: folder / "nothing", "got nothing at that path"),
    (lambda folder: "digits", "digits"),
    (_one_class, "expected at least two classes in the training split, got 1"),
])
def test_data_that_do_not_fit_are_one_line(make, expected, tmp_path, capfd):
    assert evaluate.main([str(checkpoint_of(tmp_path, trained())), str(make(tmp_path)), *COMMON]) == 2
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and expected in message and "got" in message, message


def test_digits_are_grey(tmp_path, capfd):
    """A colour encoder of the digits' size."""
    assert evaluate.main([str(checkpoint_of(tmp_path, trained(), image_size=48)), "digits", *COMMON]) == 2
    message = capfd.readouterr().err
    assert "digits: expected pictures of 3 channels, as " in message and message.endswith("was trained on, got 1\n")


@pytest.mark.parametrize("arguments, expected", [
    (["--solver", "adam"], "lbfgs"),
    (["--k", "0"], "--k"),
    (["--batch", "many"], "--batch"),
    (["--workers", "-1"], "--workers"),
    (["--device", "tpu"], "--device: expected"),
    (["--json", "/nowhere/at/all.json"], "--json: expected a file in a folder that is there"),
])
def test_bad_arguments_are_one_line(arguments, expected, tmp_path, capfd):
    assert evaluate.main([str(tmp_path / "none.ckpt"), "digits", *arguments]) == 2
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and expected in message, message


def test_a_file_that_cannot_be_written_is_one_line(tmp_path, pictures, capfd):
    path = checkpoint_of(tmp_path, trained())
    assert evaluate.main([str(path), str(pictures), *COMMON, "--json", str(tmp_path)]) == 2
    message = capfd.readouterr().err
    assert f"{tmp_path}: expected a file that can be written" in message and message.count("\n") == 1


def test_script_fails_without_traceback(tmp_path):
    command = [sys.executable, str(EXAMPLES / "evaluate.py"), str(tmp_path / "none.ckpt"), "digits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
