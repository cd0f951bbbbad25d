"""Checkpoints of the trainer: damaged and foreign files are refused before anything is unpickled, the newest and the
best stay, and states come back to the bit."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import random
import zipfile

import pytest
import torch
from checkpoint_cases import CPU, checkpoints, names, parts, saved

from simclr import checkpoint
from simclr.checkpoint import HEADER, read
from simclr.errors import UsageError


def flip(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def refused(path, expected=""):
    with pytest.raises(UsageError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: expected ") and ", got " in message and "\n" not in message, message
    assert expected in message, message


@pytest.fixture
def no_unpickling(monkeypatch):
    def reached(*_, **__):
        pytest.fail("a file was unpickled")

    monkeypatch.setattr(torch, "load", reached)


# What is read


def test_contents_come_back(tmp_path):
    modules = parts()
    ours = checkpoints(tmp_path)
    records = [{"event": "step", "step": 7, "loss": math.pi}, {"event": "probe", "linear": math.nan}]
    ours.save(7, modules, records)
    assert ours.newest == tmp_path / "step-00000007.ckpt"
    contents = read(ours.newest)
    assert (contents["step"], contents["score"], contents["settings"]) == (7, None, {"lr": 0.1, "seed": 3})
    assert json.dumps(contents["records"]) == json.dumps(records)
    for name, value in modules["network"].state_dict().items():
        assert torch.equal(contents["modules"]["network"][name], value)


def test_every_bit_of_the_header_counts(tmp_path, no_unpickling):
    path = saved(tmp_path, 1)
    content = path.read_bytes()
    for bit in range(8 * HEADER.size):
        path.write_bytes(flip(content, bit))
        refused(path)


def test_damaged_files_are_refused_and_not_unpickled(tmp_path, no_unpickling):
    path = saved(tmp_path, 1)
    content, draw = path.read_bytes(), random.Random(0)
    damaged = [flip(content, draw.randrange(8 * HEADER.size, 8 * len(content))) for _ in range(100)]
    damaged += [content[: draw.randrange(len(content))] for _ in range(50)]
    damaged += [content + draw.randbytes(draw.randrange(1, 2000)) for _ in range(49)] + [content + b"\0"]
    assert len(set(damaged)) > 190
    for changed in damaged:
        path.write_bytes(changed)
        refused(path)


class Malicious:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_foreign_files_are_refused_and_not_unpickled(tmp_path, no_unpickling):
    path, made = tmp_path / "step-00000001.ckpt", tmp_path / "made"
    pickled, archive = pickle.dumps(Malicious(made)), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickled)
    of_torch = io.BytesIO()
    torch.save({"step": 1}, of_torch)
    for content in (pickled, archive.getvalue(), of_torch.getvalue(), b"no checkpoint", bytes(100)):
        path.write_bytes(content)
        refused(path, f"got {content[: len(checkpoint.MAGIC)]!r}")
    path.write_bytes(b"")
    refused(path, "got an empty file")
    refused(tmp_path, "got Is a directory")
    refused(tmp_path / "nothing", "got No such file or directory")
    assert not made.exists()


@pytest.mark.parametrize("what", ["pickle", "tensors alone", "facts that are no JSON"])
def test_a_whole_file_of_something_else_is_refused(what, tmp_path):
    made, buffer = tmp_path / "made", io.BytesIO()
    contents = {"pickle": Malicious(made), "tensors alone": {"modules": {}},
                "facts that are no JSON": {"facts": "step 3", "modules": {}, "random": []}}  # fmt: skip
    torch.save(contents[what], buffer)
    payload = buffer.getvalue()
    path = tmp_path / "a.ckpt"
    path.write_bytes(HEADER.pack(checkpoint.MAGIC, len(payload), hashlib.sha256(payload).digest()) + payload)
    refused(path, "a checkpoint of this trainer")
    assert not made.exists()


# What is kept


def test_the_newest_are_kept(tmp_path):
    saved(tmp_path, 5, 10, 15, 20, keep=2)
    assert names(tmp_path) == ["step-00000015.ckpt", "step-00000020.ckpt"]
    saved(tmp_path, 12, keep=2)  # taken up again from an earlier one: those after it stay
    assert names(tmp_path) == [f"step-000000{step}.ckpt" for step in (12, 15, 20)]
    with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
        checkpoints(tmp_path, keep=0)


def test_the_best_is_kept_and_its_score_too(tmp_path):
    ours, modules = checkpoints(tmp_path, keep=1), parts()
    for step, score in ((1, 0.5), (2, 0.7), (3, 0.6), (4, math.nan)):
        ours.save(step, modules, [])
        ours.save_best(step, score)
    assert names(tmp_path) == ["best.ckpt", "step-00000004.ckpt"]

    def best():
        contents = read(tmp_path / "best.ckpt")
        return contents["step"], contents["score"]

    assert best() == (2, 0.7)
    resumed = checkpoints(tmp_path, keep=1)
    assert resumed.load("auto", modules, CPU)[0] == 4
    for step, score, expected in ((5, 0.65, (2, 0.7)), (6, 0.75, (6, 0.75))):
        resumed.save(step, modules, [])
        resumed.save_best(step, score)
        assert best() == expected


def test_a_damaged_best_is_named_and_replaced(tmp_path, capsys):
    path, modules = saved(tmp_path, 1), parts()
    best = tmp_path / "best.ckpt"
    best.write_bytes(b"x")
    ours = checkpoints(tmp_path)
    ours.load(str(path), modules, CPU)
    assert str(best) in capsys.readouterr().err
    ours.save_best(1, 0.1)
    assert read(best)["score"] == 0.1
    best.write_bytes(path.read_bytes())  # a copy that somebody made
    assert ours.load("auto", modules, CPU)[0] == 1 and ours.best == -math.inf


def test_leftovers_of_killed_runs_are_removed(tmp_path):
    for begin in (lambda: saved(tmp_path, 1), lambda: checkpoints(tmp_path).load("auto", parts(), CPU)):
        (tmp_path / "step-00000009.ckpt.tmp").write_bytes(b"half")
        (tmp_path / "mine.tmp").write_bytes(b"not ours")
        begin()
        assert names(tmp_path) == ["mine.tmp", "step-00000001.ckpt"]


# What is loaded


def test_states_and_random_numbers_come_back(tmp_path):
    modules, ours = parts(), checkpoints(tmp_path)
    records = [{"event": "step", "step": 4, "loss": 1 / 3}]
    torch.manual_seed(11)
    torch.rand(3)
    ours.save(4, modules, records)
    expected = torch.rand(5)
    others, resumed = parts(), checkpoints(tmp_path, out="b", workers=7)
    for value in others["network"].state_dict().values():
        value.zero_()
    others["optimizer"].param_groups[0]["lr"] = 9.0
    assert resumed.load("auto", others, CPU) == (4, records)
    assert resumed.newest == ours.newest
    assert torch.equal(torch.rand(5), expected)
    for one, two in zip(modules["network"].state_dict().values(), others["network"].state_dict().values(), strict=True):
        assert torch.equal(one, two)
    first, second = (found["optimizer"].state_dict() for found in (modules, others))
    assert first["param_groups"] == second["param_groups"]
    for index, state in first["state"].items():
        assert all(torch.equal(value, second["state"][index][name]) for name, value in state.items())


@pytest.mark.gpu(reason="the GPU's own generator")
def test_random_numbers_of_the_gpu_come_back(tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    network = torch.nn.Linear(3, 3).to(device)
    ours = checkpoints(tmp_path)
    ours.save(1, {"network": network}, [])
    expected, weight = torch.rand(5, device=device), network.weight.detach().clone()
    torch.nn.init.zeros_(network.weight)
    ours.load("auto", {"network": network}, device)
    assert torch.equal(torch.rand(5, device=device), expected) and torch.equal(network.weight, weight)
    assert read(ours.newest)["modules"]["network"]["weight"].device == CPU


def test_nothing_to_load(tmp_path):
    for which in ("auto", None):
        ours = checkpoints(tmp_path / "nothing")
        assert ours.load(which, parts(), CPU) == (0, []) and ours.newest is None


def test_auto_falls_back_and_says_so(tmp_path, capsys):
    newest = saved(tmp_path, 99_999_999, 100_000_000)  # by number, and not by name
    assert checkpoints(tmp_path).load("auto", parts(), CPU)[0] == 100_000_000 and not capsys.readouterr().err
    newest.write_bytes(newest.read_bytes()[:-1])
    (tmp_path / "step-mine.ckpt").write_bytes(b"not ours")
    ours = checkpoints(tmp_path)
    assert ours.load("auto", parts(), CPU)[0] == 99_999_999 and ours.newest == tmp_path / "step-99999999.ckpt"
    message = capsys.readouterr().err
    assert message.startswith(f"{newest}: expected ") and message.count("\n") == 1, message
    with pytest.raises(UsageError, match="as its header says"):
        checkpoints(tmp_path).load(str(newest), parts(), CPU)
    ours.newest.write_bytes(b"")
    with pytest.raises(UsageError, match="expected a checkpoint that is whole, got 2 damaged"):
        checkpoints(tmp_path).load("auto", parts(), CPU)


def test_a_run_from_its_start_leaves_others_alone(tmp_path):
    saved(tmp_path, 3, 6)
    with pytest.raises(UsageError, match="expected no checkpoints .* got step-00000006.ckpt"):
        checkpoints(tmp_path).load(None, parts(), CPU)


@pytest.mark.parametrize("changed, message", [
    (dict(lr=0.2), "--lr: expected 0.1, as in {path}, got 0.2"),
    (dict(lr=0.2, seed=4), "--lr: expected 0.1, as in {path}, got 0.2"),
    (dict(weight_decay=1.0), "--weight-decay: expected None, as in {path}, got 1.0"),
    (dict(world=2), "--resume: expected 1 processes, as in {path}, got 2"),
], ids=["a value", "two values", "a new setting", "processes"])  # fmt: skip
def test_another_run_is_refused(changed, message, tmp_path):
    path = saved(tmp_path, 1)
    ours = checkpoints(tmp_path, **changed)
    ours._by_first_rank = lambda work: work()  # no process group
    for which in ("auto", path):
        with pytest.raises(UsageError) as caught:
            ours.load(which, parts(), CPU)
        assert str(caught.value) == message.format(path=path)


def test_the_best_of_another_run_is_refused(tmp_path):
    ours = checkpoints(tmp_path, seed=4)
    ours.save(1, parts(), [])
    ours.save_best(1, 0.5)
    path = saved(tmp_path / "other", 1)
    with pytest.raises(UsageError, match="--seed: expected 4, as in .*best.ckpt, got 3"):
        checkpoints(tmp_path).load(path, parts(), CPU)


def test_states_that_do_not_fit_are_refused(tmp_path):
    path, wider = saved(tmp_path, 1), parts(width=5)
    network = {"network": wider["network"]}
    optimizer = {"optimizer": torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])}
    for modules, message in ((network, "network, got .*size mismatch"), (optimizer, "optimizer, got ValueError"),
                             ({"queue": torch.nn.Linear(1, 1)}, "queue, got KeyError")):  # fmt: skip
        with pytest.raises(UsageError, match=f"expected the state of this run's {message}") as caught:
            checkpoints(tmp_path).load("auto", modules, CPU)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
