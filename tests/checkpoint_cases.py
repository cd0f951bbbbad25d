"""What the trainer's checkpoints are tested with: small modules that have states, and files of them."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

MISSING = [name for name in ("torchvision", "timm", "safetensors") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"the examples need {', '.join(MISSING)}", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from simclr.checkpoint import Checkpoints

CPU = torch.device("cpu")
SETTINGS = {"lr": 0.1, "seed": 3, "out": "a", "workers": 1}


def parts(width=3):
    """A module and its optimizer after two steps, so that both have states."""
    torch.manual_seed(1)
    network = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    for _ in range(2):
        network(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return {"network": network, "optimizer": optimizer}


def checkpoints(folder, keep=3, rank=0, world=1, **changed):
    return Checkpoints(folder, argparse.Namespace(**(SETTINGS | changed)), keep, rank, world)


def saved(folder, *steps, **options):
    """A folder with checkpoints of these steps; the file of the last one."""
    ours, modules = checkpoints(folder, **options), parts()
    for step in steps:
        ours.save(step, modules, [{"event": "step", "step": step, "loss": 0.1 * step}])
    return ours.newest


def names(folder):
    return sorted(path.name for path in folder.iterdir())
