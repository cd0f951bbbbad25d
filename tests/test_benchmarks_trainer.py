"""The benchmark of the trainer: both sides train alike, and its table says what was measured."""

from __future__ import annotations

import pytest
import torch
from trainer_cases import one_thread  # noqa: F401

from benchmarks import trainer

CASE = ("convnet", 32, 8, 2, "fp32")


def test_both_sides_take_the_same_first_step():
    found = trainer.measure(CASE, torch.device("cpu"), seconds=0.01)
    first = found["first_loss"]
    assert first["fastcl"] == pytest.approx(first["eager"], rel=1e-5)  # the same rows, through another formula
    for parts in found["ms"].values():
        assert parts["step"]["rounds"] >= 3 and all(parts[name]["median"] > 0 for name in trainer.PARTS)


def test_table():
    found = {"cases": [trainer.measure(CASE, torch.device("cpu"), seconds=0.01)],
             "largest": {"fastcl": trainer.LARGEST, "eager": 65536}}
    head, _, row, _, text = trainer.markdown(found).splitlines()
    assert head.count("|") == row.count("|") and row.startswith("| convnet | 32 px | 8 | 2 | fp32 |")
    assert "262,144 or more with ours, 65,536 with the eager loss" in text


def test_the_largest_batch_is_the_last_that_fits(monkeypatch):
    limits = {"fastcl": 16384, "eager": 5000}
    monkeypatch.setattr(trainer, "fits", lambda side, batch, device: batch <= limits[side])
    assert trainer.largest(torch.device("cpu")) == {"fastcl": 16384, "eager": 4096}
