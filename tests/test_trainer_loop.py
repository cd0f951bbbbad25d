"""The training loop: its split backward, chunks, precision, the clock, and the ways in which a run can end early."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from trainer_cases import ENVIRONMENT, EXAMPLES, SHORT, events, one_thread, picture_folder  # noqa: F401

from simclr import checkpoint, cli, clock, train
from simclr.errors import RunError

DIGITS = ["digits", *SHORT, "--no-probe", "--width", "4"]


def prepared(tmp_path, *arguments):
    """A trainer before its first step, and that step's batch."""
    from simclr import data

    settings = cli.parse([*DIGITS, "--out", str(tmp_path), *arguments], "test")
    source = data.open_data("digits")
    trainer = cli.prepare(settings, source, torch.device("cpu"))
    trainer.method.train()
    return trainer, next(iter(trainer._batches()))


def small_scale(trainer):
    """From its usual start of 65,536 the scaler goes down first, a step that is left out at a time."""
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=trainer.scaler.is_enabled())


def gradients(trainer):
    return [p.grad for p in trainer.method.network.parameters()]


@pytest.mark.parametrize("method", ["simclr", "byol", "moco-v2", "instdisc"])
def test_the_split_backward_is_the_plain_one_to_the_bit(method, tmp_path):
    trainer, batch = prepared(tmp_path, "--method", method)
    targets = trainer.method.targets(batch.views, batch.index)
    views = trainer.method.online(batch.views)
    bank = {name: value.clone() for name, value in trainer.method.state_dict().items()}
    rows = trainer.method.network(torch.cat(views)).chunk(len(views))
    loss = trainer.method.loss(rows, targets)
    loss.backward()
    expected = gradients(trainer)
    trainer.optimizer.zero_grad()
    trainer.method.load_state_dict(bank)
    found, _ = trainer._backward(views, targets)
    assert torch.equal(found, loss.detach())
    assert all(torch.equal(a, b) for a, b in zip(gradients(trainer), expected, strict=True))


@pytest.mark.parametrize("method", ["simclr", "moco-v2", "byol"])
def test_chunks_are_one_batch(method, tmp_path):
    """A network without batch norm: 1e-5 of the largest gradient, for convolutions that sum in another order."""
    found = []
    for chunks in ("1", "4"):
        trainer, batch = prepared(tmp_path, "--method", method, "--norm", "group", "--grad-cache-chunks", chunks)
        torch.manual_seed(3)  # the order of MoCo's keys
        targets = trainer.method.targets(batch.views, batch.index)
        loss, _ = trainer._backward(trainer.method.online(batch.views), targets)
        found.append((loss, gradients(trainer)))
    (whole, expected), (parts, grads) = found
    assert abs(whole - parts) < 1e-5 * abs(whole)
    for a, b in zip(expected, grads, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(a.abs().max(), max(g.abs().max() for g in expected))


def test_batch_norm_sees_the_chunk(tmp_path):
    """What the test above would miss if chunks were not taken at all."""
    losses = []
    for chunks in ("1", "4"):
        trainer, batch = prepared(tmp_path, "--grad-cache-chunks", chunks)
        losses.append(trainer._backward(batch.views, None)[0])
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_precision_is_that_of_the_network_alone(precision, dtype, tmp_path):
    trainer, batch = prepared(tmp_path, "--precision", precision)
    assert trainer.scaler.is_enabled() == (precision == "fp16")
    small_scale(trainer)
    seen = []
    trainer.method.network.encoder[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    before = [p.clone() for p in trainer.method.network.parameters()]
    loss, _, _ = trainer._step(1, batch)
    assert seen == [dtype] and loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.dtype == torch.float32 for p in trainer.method.network.parameters())
    assert any((p != q).any() for p, q in zip(trainer.method.network.parameters(), before))


def test_fp16_takes_the_gradients_of_fp32(tmp_path):
    """The scale of the loss goes in and comes out: a step of SGD is the same to the roundings of fp16, 2^-11 each."""
    moved = []
    for precision in ("fp32", "fp16"):
        trainer, batch = prepared(tmp_path, "--precision", precision, "--optimizer", "sgd", "--warmup", "0")
        small_scale(trainer)
        weight = trainer.method.network.head[0].weight
        before = weight.detach().clone()
        trainer._step(1, batch)
        moved.append(weight.detach() - before)
    assert (moved[0] - moved[1]).norm() < 0.02 * moved[0].norm()


def test_clock_tells_the_parts_apart():
    watch = clock.StepClock(torch.device("cpu"))
    for part, seconds in (("a", 0.02), ("b", 0.05), (None, 0.03), ("a", 0.02)):
        time.sleep(seconds)
        watch.lap(part)
    read = watch.read()
    assert set(read) == {"a", "b"} and 0.04 <= read["a"] < 0.2 and 0.05 <= read["b"] < 0.2
    assert watch.read() == {}


def test_log_has_the_parts_of_a_step(tmp_path):
    assert cli.main([*DIGITS, "--out", str(tmp_path)]) == 0
    for record in events(tmp_path, "step"):
        parts = [record[f"{part}_s"] for part in ("data", "encoder", "loss", "optimizer")]
        assert all(part > 0 for part in parts)
        assert 16 / sum(parts) == pytest.approx(record["images_per_s"], rel=0.02)  # rounded there
        assert record["memory_mib"] > 10


def test_nan_names_its_step_and_the_last_checkpoint(tmp_path, capfd, monkeypatch):
    real, calls = train.Trainer._backward, []

    def broken(self, views, targets):
        calls.append(None)
        loss, rows = real(self, views, targets)
        return (loss * math.nan if len(calls) >= 3 else loss), rows

    monkeypatch.setattr(train.Trainer, "_backward", broken)
    run = ["digits", *SHORT, "--no-probe", "--width", "4", "--out", str(tmp_path), "--log-every", "4"]
    assert cli.main([*run, "--checkpoint-every", "2"]) == 1
    message = capfd.readouterr().err.splitlines()[-1]
    assert "step 3: the loss is nan" in message and "last checkpoint: " in message
    newest = message.rpartition("last checkpoint: ")[2].removesuffix(" (--resume)")
    assert checkpoint.read(newest)["step"] == 2
    calls.clear()
    assert cli.main([*run, "--out", str(tmp_path / "other")]) == 1
    assert "there is no checkpoint" in capfd.readouterr().err


def start(tmp_path, *arguments):
    """A run of its own that has begun to train, and would take minutes."""
    command = [sys.executable, str(EXAMPLES / "simclr_imagenet.py"), "digits", "--no-probe", "--width", "4", "--batch",
               "32", "--steps", "100000", "--log-every", "1", "--out", str(tmp_path), "--device", "cpu", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
                               start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "log.jsonl").exists() and events_so_far(tmp_path):
            return process
        time.sleep(0.1)
    process.kill()
    raise AssertionError(process.communicate()[1])


def events_so_far(folder):
    return [line for line in (folder / "log.jsonl").read_text().splitlines() if '"step"' in line[:20]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint(number, tmp_path):
    process = start(tmp_path, "--workers", "1")
    os.killpg(process.pid, number)  # as a terminal and torchrun send it: to the reading processes too
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number, message
    last = message.splitlines()[-1]
    assert "stopped after step " in last and "--resume" in last and "Traceback" not in message
    (path,) = (tmp_path / "checkpoints").glob("step-*.ckpt")
    contents = checkpoint.read(path)
    assert f"step {contents['step']};" in last and contents["records"][-1]["step"] == contents["step"]


DYING = """
import os, signal, sys
from simclr import batches, cli

here, real = os.getpid(), batches.RandomViews.__getitem__

def killed(self, key):
    if key[0] == 1 and os.getpid() != here:  # in the second epoch, the reader and not the run
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, key)

batches.RandomViews.__getitem__ = killed
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_worker_that_dies_is_one_line(tmp_path):
    run = ["digits", *SHORT, "--no-probe", "--width", "4", "--out", str(tmp_path), "--steps", "1000", "--workers", "1"]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(EXAMPLES)])}
    done = subprocess.run([sys.executable, "-c", DYING, *run], capture_output=True, text=True, env=environment)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "a process that reads pictures died" in last and "there is no checkpoint" in last


def test_a_full_disk_is_one_line(tmp_path, capfd):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    assert cli.main([*DIGITS, "--out", str(tmp_path)]) == 1
    message = capfd.readouterr().err.splitlines()[-1]
    assert "No space left on device" in message


@pytest.mark.parametrize("kind", [RuntimeError, ConnectionResetError])
def test_a_mistake_in_a_worker_is_not_taken_for_its_death(kind, tmp_path):
    trainer, _ = prepared(tmp_path, "--workers", "1")

    def mistaken(picture):
        raise kind("a mistake")

    trainer.source.views = mistaken
    with pytest.raises(kind, match="a mistake"):
        trainer.run()


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_tensors_that_a_dead_worker_left_are_its_death_too(error, tmp_path, monkeypatch):
    trainer, _ = prepared(tmp_path)

    def lost():
        raise error
        yield

    monkeypatch.setattr(trainer, "_batches", lost)
    handler = signal.getsignal(signal.SIGCHLD)  # which the end of a run takes away
    try:
        with pytest.raises(RunError, match="after step 0: a process that reads pictures died"):
            trainer.run()
    finally:
        signal.signal(signal.SIGCHLD, handler)


def test_a_ruined_network_is_not_kept(tmp_path):
    """By the last update: the loss before it was sound."""
    trainer, _ = prepared(tmp_path)
    with torch.no_grad():
        trainer.method.network.head[0].weight[0, 0] = math.inf
    with pytest.raises(RunError, match="step 7: weights became infinite or NaN.*there is no checkpoint"):
        trainer._save(7)
    assert not list((tmp_path / "checkpoints").glob("*.ckpt"))


def test_ctrl_c_before_the_first_step(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(train.Trainer, "probe", lambda self, step: os.kill(os.getpid(), signal.SIGINT))
    assert cli.main([*DIGITS, "--out", str(tmp_path)]) == 130
    assert "stopped after step 0; there is no checkpoint" in capfd.readouterr().err


def test_seconds_add_up_over_the_parts_of_a_run(tmp_path):
    run = [*DIGITS, "--out", str(tmp_path)]
    assert cli.main(run) == 0
    (first,) = events(tmp_path, "end")
    assert cli.main([*run, "--resume"]) == 0
    assert events(tmp_path, "end")[-1]["seconds"] > events(tmp_path, "checkpoint")[-1]["seconds"] > 0.5 * first["seconds"]


def test_workers_prepare_no_more_than_fits(monkeypatch):
    from simclr import batches, data

    source = data.open_data("digits")
    size = 16 * 2 * 48 * 48 * 4  # bytes of a batch
    for ahead, expected in ((size * 100, batches.PREFETCH), (size * 4, 2), (1, 1)):
        monkeypatch.setattr(batches, "AHEAD", ahead)
        keys = batches.EpochBatches(len(source.train), 16, 4, 0)
        assert batches.train_loader(source, keys, 0, workers=2).prefetch_factor == expected


def test_run_error_is_no_usage_error():
    assert (RunError.code, cli.UsageError.code) == (1, 2)
