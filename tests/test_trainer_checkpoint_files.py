"""Checkpoints of the trainer on the disk: replaced whole, also where the disk is full or the process is killed; ranks
that agree about them; and encoders that are exported."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import CPU, checkpoints, names, parts, saved
from ranks import run_world

from simclr import checkpoint, model
from simclr.checkpoint import read
from simclr.errors import RunError, UsageError

FORK = multiprocessing.get_context("fork")  # the libraries are loaded already


# What is written


def test_files_are_on_the_disk_before_they_take_their_place(tmp_path, monkeypatch):
    path, happened = saved(tmp_path, 1), []
    before = path.read_bytes()

    def fsync(number):
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{number}") else "file"
        happened.append(f"fsync {kind}")
        assert (path.read_bytes() == before) == (kind == "file")

    replace = os.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *names: [happened.append("replace"), replace(*names)])
    checkpoints(tmp_path).save(1, parts(), [{"event": "another"}])
    assert happened == ["fsync file", "replace", "fsync folder"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk(number, tmp_path, monkeypatch):
    path = saved(tmp_path, 1)

    def full(_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=rf"step-00000002.ckpt: expected .* got {os.strerror(number)}$"):
            saved(tmp_path, 2)
    assert names(tmp_path) == [path.name] and read(path)["step"] == 1


def test_folders_that_cannot_be_synchronised(tmp_path, monkeypatch):
    fsync = os.fsync

    def of_files(code):
        def function(number):
            if os.path.isdir(f"/proc/self/fd/{number}"):
                raise OSError(code, os.strerror(code))
            fsync(number)

        return function

    monkeypatch.setattr(os, "fsync", of_files(errno.EINVAL))
    try:
        path = saved(tmp_path, 1)
    except RunError as error:
        pytest.fail(f"a file system that cannot do it is no reason to stop: {error}")
    assert read(path)["step"] == 1
    monkeypatch.setattr(os, "fsync", of_files(errno.EIO))
    with pytest.raises(RunError, match=os.strerror(errno.EIO)):
        saved(tmp_path, 2)


def test_old_files_that_cannot_be_removed(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    (tmp_path / "step-00000002.ckpt.tmp").mkdir()
    with pytest.raises(RunError, match="step-00000002.ckpt.tmp: expected a file that can be changed, got "):
        saved(tmp_path, 2)


def _past_the_limit(ours, modules, report):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        ours.save(2, modules, [])
    except RunError as error:
        report.send(str(error))


def test_a_file_past_the_limit_of_its_size(tmp_path):
    path = saved(tmp_path, 1)
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_past_the_limit, args=(checkpoints(tmp_path), parts(), send))
    process.start()
    assert receive.poll(20) and os.strerror(errno.EFBIG) in receive.recv()
    process.join(20)
    assert process.exitcode == 0 and names(tmp_path) == [path.name] and read(path)["step"] == 1


def _save_on_and_on(ours, modules, first):
    for step in range(first, first + 10_000):
        ours.save(step, modules, [])
        ours.save_best(step, step)


def test_killed_at_any_moment_whole_files_are_there(tmp_path):
    draw, step = random.Random(0), 0
    modules = {"network": torch.nn.Linear(1000, 1000)}
    for _ in range(10):
        process = FORK.Process(target=_save_on_and_on, args=(checkpoints(tmp_path, keep=2), modules, step + 1))
        process.start()
        deadline = time.monotonic() + 20
        while not (tmp_path / f"step-{step + 3:08d}.ckpt").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = [read(path)["step"] for path in sorted(tmp_path.glob("*.ckpt"))]
        assert len(found) in (3, 4) and max(found) >= step + 3, found  # the best, and a third one not yet removed
        step = max(found)
        ours = checkpoints(tmp_path)
        assert ours.load("auto", modules, CPU)[0] == step
        assert ours.best in (step, step - 1)


# Ranks


@contextlib.contextmanager
def shared_folder():
    """The same new folder on all ranks."""
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        yield Path(folder[0])
        dist.barrier()


def save_and_load(rank, world):
    with shared_folder() as folder:
        ours, modules = checkpoints(folder, rank=rank, world=world), parts()
        torch.manual_seed(rank)
        for step in (1, 2):
            ours.save(step, modules, [{"step": step}])
        ours.save_best(2, 0.5 if rank == 0 else None)
        assert ours.newest == folder / "step-00000002.ckpt" and len(read(ours.newest)["random"]) == world
        expected = torch.rand(3)
        again = checkpoints(folder, rank=rank, world=world)
        assert again.load("auto", modules, CPU) == (2, [{"step": 2}])
        assert torch.equal(torch.rand(3), expected)
        if rank == 0:
            ours.newest.write_bytes(b"damaged")
        assert again.load("auto", modules, CPU) == (1, [{"step": 1}])
        assert again.newest == folder / "step-00000001.ckpt"


def failures_reach_all(rank, world):
    def full(_):
        raise OSError(errno.ENOSPC, "full")

    with shared_folder() as folder:
        ours, modules = checkpoints(folder, rank=rank, world=world), parts()
        ours.save(1, modules, [])
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr(os, "fsync", full)
            for attempt in (lambda: ours.save(2, modules, []), lambda: ours.save_best(1, 0.5)):
                with pytest.raises(RunError, match="expected to write .* got full"):
                    attempt()
        with pytest.raises(TypeError if rank == 0 else RunError, match="not JSON serializable"):
            ours.save(2, modules, [object()])
        assert names(folder) == ["step-00000001.ckpt"]
        with pytest.raises(UsageError, match="--lr: expected 0.1"):
            checkpoints(folder, rank=rank, world=world, lr=0.2).load("auto", modules, CPU)
        with pytest.raises(UsageError, match="nothing: expected a checkpoint, got No such file"):
            ours.load(str(folder / "nothing"), modules, CPU)


CASES = {function.__name__: (2, function) for function in (save_and_load, failures_reach_all)}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch is built without gloo")
    return run_world(__name__, 2, list(CASES), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_ranks(name, outcomes):
    problems = outcomes[name]
    assert not any(problems), "\n".join(f"rank {rank}:\n{problem}" for rank, problem in enumerate(problems) if problem)


# Encoders


def exported(folder, arch, size, **changed):
    encoder = model.build_encoder(arch, 1, size, width=8).eval()
    path = folder / "encoder.safetensors"
    facts = dict(arch=arch, channels=1, image_size=size, width=8, method="simclr", step=400) | changed
    checkpoint.export_encoder(path, encoder.to(memory_format=torch.channels_last), facts)
    return path, encoder


def equal_encoders(first, second):
    for one, two in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert one[0] == two[0] and torch.equal(one[1], two[1])
    pictures = torch.rand(2, 1, 48, 48)
    torch.testing.assert_close(first(pictures), second(pictures))  # sums in another order: their memory formats differ


@pytest.mark.parametrize("arch, size", [("convnet", 48), ("resnet18", 32)])
def test_an_exported_encoder_is_the_same(arch, size, tmp_path):
    from safetensors import safe_open

    path, encoder = exported(tmp_path, arch, size)
    assert names(tmp_path) == [path.name]
    equal_encoders(checkpoint.load_encoder(path), encoder)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["method"] == "simclr" and file.metadata()["step"] == "400"


def test_timm_loads_an_exported_encoder(tmp_path):
    import timm

    path, encoder = exported(tmp_path, "resnet18", 224)
    theirs = timm.create_model("resnet18", num_classes=0, in_chans=1, checkpoint_path=str(path)).eval()
    equal_encoders(theirs, encoder)


def test_what_is_no_exported_encoder_is_refused(tmp_path):
    from safetensors.torch import save_file

    path, _ = exported(tmp_path, "convnet", 48)
    bad = {"text": lambda: path.write_bytes(b"no encoder"), "nothing": path.unlink,
           "no facts": lambda: save_file({"weight": torch.zeros(2)}, path),
           "another width": lambda: exported(tmp_path, "convnet", 48, width=16)}  # fmt: skip
    for make in bad.values():
        make()
        with pytest.raises(UsageError, match="expected an encoder that this trainer exported, got ") as caught:
            checkpoint.load_encoder(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
