"""What the tests of the trainer share: its packages, pictures on disk, short runs."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

MISSING = [
    name
    for name in ("torchvision", "timm", "sklearn", "matplotlib", "tqdm", "PIL", "safetensors")
    if importlib.util.find_spec(name) is None
]
if MISSING:
    pytest.skip(f"the examples need {', '.join(MISSING)}", allow_module_level=True)

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}  # the working tree's library, installed or not
sys.path.insert(0, str(EXAMPLES))

from simclr import torchvision_compat  # noqa: E402, F401  timm and torchvision can be imported from here on

SHORT = ["--steps", "4", "--batch", "16", "--log-every", "2", "--workers", "0", "--device", "cpu"]


def picture_folder(root, classes=("cat", "dog"), each=12, side=32, kind="png"):
    """An ImageFolder tree of noisy pictures, each class with a colour of its own."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(each):
            pixels = rng.integers(0, 120, (side, side, 3))
            pixels[..., number % 3] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.{kind}")
    return root


@pytest.fixture(autouse=True)
def one_thread():
    """Runs set the number of threads and cuDNN's mode for their process: the same for all tests of a file that imports
    this, and put back."""
    threads, deterministic = torch.get_num_threads(), torch.backends.cudnn.deterministic
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = deterministic


def events(folder, name):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == name]
