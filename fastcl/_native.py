"""Loads the C++ extension `_C` if it belongs to the torch that is running.

A library built against another torch may crash the interpreter instead of raising, so the record
that the build wrote beside it is read first.
"""

import importlib
import json
from pathlib import Path

import torch

_RECORD = Path(__file__).with_name("_C_build.json")


def _load():
    """The extension module or None, and why."""
    try:
        built_for = json.loads(_RECORD.read_text(encoding="utf-8"))["torch"]
    except FileNotFoundError:
        return None, "C++ extension not built (no compiler at installation?)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"C++ extension not used: unreadable build record {_RECORD.name} ({error!r})"
    if built_for != torch.__version__:
        versions = f"built for torch {built_for}, running {torch.__version__}"
        return None, f"C++ extension not used: {versions}; reinstall with --no-build-isolation"
    try:
        module = importlib.import_module(f"{__package__}._C")
    except ImportError as error:
        return None, f"C++ extension not used: {str(error).splitlines()[0]}"
    return module, f"C++ extension in use ({module.build_info()['simd']})"


_module, REASON = _load()
LOADED: bool = _module is not None


def build_info() -> dict:
    """Compiler, torch version, C++ standard, instruction set and CUDA of `_C`; empty if it is not in use."""
    return _module.build_info() if _module is not None else {}


# Whether the extension has the kernels of csrc/cuda, which are called through `module`.
CUDA: bool = build_info().get("cuda", False)
# Whether bf16 rows are multiplied as they are on the CPU, with sums in fp32: else they are widened first.
BF16: bool = build_info().get("bf16", False)
module = _module
