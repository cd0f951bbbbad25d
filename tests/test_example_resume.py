"""The SimCLR trainer's checkpoints: a run in two parts is the run in one, to the bit; other settings are refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from test_examples import ENVIRONMENT, EXAMPLES, events, one_thread  # noqa: F401  (the fixture applies here too)

from simclr import cli

# Random directions of the loss: the state of the generator counts as well. Epochs of 22 steps are cut within one.
RUN = ["digits", "--steps", "30", "--batch", "64", "--log-every", "5", "--workers", "0", "--device", "cpu",
       "--no-probe", "--loss", "swd-normal"]


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def steps(folder):
    return [(event["step"], event["loss"]) for event in events(folder, "step")]


def equal_runs(first, second):
    assert steps(first) == steps(second) and len(steps(first)) == 6
    assert all(torch.equal(x, y) for x, y in zip(weights(first).values(), weights(second).values(), strict=True))


def test_one_process(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main([*RUN, "--out", str(whole)]) == 0
    assert cli.main([*RUN, "--out", str(parts), "--checkpoint-every", "13", "--resume"]) == 0
    (parts / "model.pt").unlink()
    # From step 26, the last checkpoint, with another number of workers.
    assert cli.main([*RUN, "--out", str(parts), "--workers", "1", "--resume"]) == 0
    equal_runs(whole, parts)
    assert len(events(parts, "settings")) == 1


def test_two_processes(tmp_path):
    def run(folder, *arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
                   str(EXAMPLES / "simclr_imagenet.py"), *RUN, "--out", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole)
    run(parts, "--checkpoint-every", "18")
    (parts / "model.pt").unlink()
    run(parts, "--resume")
    equal_runs(whole, parts)


def test_refused_in_one_line(tmp_path, capsys):
    short = [*RUN, "--steps", "2", "--out", str(tmp_path)]
    assert cli.main([*short, "--checkpoint-every", "1"]) == 0
    capsys.readouterr()
    path = tmp_path / "checkpoint.pt"
    for arguments, expected in ((["--seed", "4"], "--seed must be that of"), (["--lr", "0.5"], "--lr must be that of")):
        assert cli.main([*short, "--resume", *arguments]) == 2
        assert expected in capsys.readouterr().err
    contents = path.read_bytes()
    for damaged in (contents[: len(contents) // 2], b"", b"no checkpoint", contents[:-200] + bytes(200)):
        path.write_bytes(damaged)
        assert cli.main([*short, "--resume"]) == 2
        message = capsys.readouterr().err
        assert f"{path}: expected a checkpoint of this trainer, got " in message and message.count("\n") == 1


@pytest.mark.parametrize("value", ["-1", "many"])
def test_checkpoint_every_is_a_number_of_steps(value, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*RUN, "--checkpoint-every", value])
    assert caught.value.code == 2 and "--checkpoint-every" in capsys.readouterr().err
