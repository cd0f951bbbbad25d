"""The SimCLR trainer is stopped and taken up again: a run in parts is the run in one to the bit, however they ended."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import kill_check
import pytest
import torch
from trainer_cases import ENVIRONMENT, EXAMPLES, events, one_thread  # noqa: F401

from simclr import checkpoint, cli

# Random directions of the loss: the state of the generator counts as well. Epochs of 22 steps are cut within one.
RUN = ["digits", "--steps", "30", "--batch", "64", "--log-every", "5", "--workers", "0", "--device", "cpu",
       "--no-probe", "--loss", "swd-normal"]  # fmt: skip


def finished(folder):
    return folder / "checkpoints" / "step-00000030.ckpt"


def weights(folder):
    return checkpoint.read(finished(folder))["modules"]["method"]


def steps(folder):
    return [(event["step"], event["loss"]) for event in events(folder, "step")]


def equal_runs(first, second):
    assert steps(first) == steps(second) and len(steps(first)) == 6
    assert all(torch.equal(x, y) for x, y in zip(weights(first).values(), weights(second).values(), strict=True))


def test_one_process(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main([*RUN, "--out", str(whole)]) == 0
    assert cli.main([*RUN, "--out", str(parts), "--checkpoint-every", "13", "--resume"]) == 0
    finished(parts).unlink()
    # From step 26, the last checkpoint, with another number of workers.
    assert cli.main([*RUN, "--out", str(parts), "--workers", "1", "--resume"]) == 0
    equal_runs(whole, parts)
    assert len(events(parts, "settings")) == 1
    # From a checkpoint of one folder into another.
    first = parts / "checkpoints" / "step-00000013.ckpt"
    assert cli.main([*RUN, "--out", str(tmp_path / "other"), "--resume", str(first)]) == 0
    equal_runs(whole, tmp_path / "other")


def test_two_processes(tmp_path):
    def run(folder, *arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
                   str(EXAMPLES / "simclr_imagenet.py"), *RUN, "--out", str(folder), *arguments]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole)
    run(parts, "--checkpoint-every", "18")
    finished(parts).unlink()
    run(parts, "--resume", "auto")
    equal_runs(whole, parts)


@pytest.mark.slow
def test_killed_and_taken_up_again(tmp_path, capsys):
    assert kill_check.check(tmp_path, steps=40, kills=2, seed=0) == []
    assert capsys.readouterr().out.count("kill ") == 2


def test_refused_in_one_line(tmp_path, capsys):
    short = [*RUN, "--steps", "2", "--out", str(tmp_path)]
    assert cli.main([*short, "--checkpoint-every", "1"]) == 0
    capsys.readouterr()
    saved = sorted((tmp_path / "checkpoints").iterdir())
    for arguments, expected in ((["--resume", "auto", "--seed", "4"], f"--seed: expected 0, as in {saved[-1]}, got 4"),
                                (["--resume", str(saved[0]), "--lr", "0.5"], f"--lr: expected 0.002, as in {saved[0]}"),
                                (["--resume", str(tmp_path)], f"{tmp_path}: expected a checkpoint"),
                                ([], "expected no checkpoints where a run begins anew")):  # fmt: skip
        assert cli.main([*short, *arguments]) == 2
        message = capsys.readouterr().err
        assert expected in message and message.count("\n") == 1, message
    for path in saved:
        path.write_bytes(path.read_bytes()[:-200] + bytes(200))
    assert cli.main([*short, "--resume"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(str(path) in line for path, line in zip(reversed(saved), lines, strict=False))
    assert "expected a checkpoint that is whole, got 2 damaged" in lines[-1]


def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main([*RUN, "--out", str(tmp_path), "--checkpoint-every", "1"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("got No space left on device")


@pytest.mark.parametrize("value", ["-1", "many"])
def test_checkpoint_every_is_a_number_of_steps(value, capsys):
    assert cli.main([*RUN, "--checkpoint-every", value]) == 2
    assert "--checkpoint-every" in capsys.readouterr().err
