"""The original libraries that fastcl.integrations takes the place of, and the comparison with them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from error_rule import check, relative

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.peers import LOSSES, installed  # noqa: F401  the tests' too
from benchmarks.peers import losses_of as original


def require(name: str) -> ModuleType:
    """The losses for a test module, which is skipped where the library is not installed."""
    if not installed(name):
        pytest.skip(f"{name} is not installed", allow_module_level=True)
    return original(name)


def run(loss: Callable[..., Tensor], leaves: tuple[Tensor, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """[value, gradient of each leaf], the leaves in this dtype."""
    leaves = tuple(x.detach().to(dtype, copy=True).requires_grad_() for x in leaves)
    value = loss(*leaves)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))]


def agree(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *leaves: Tensor, tolerance: float = 1e-10
) -> None:
    """Value and gradients are the original's in float64. What is 0 may be a few last places of 1 there."""
    for place, (got, expected) in enumerate(zip(run(ours, leaves), run(theirs, leaves), strict=True)):
        what = "value" if place == 0 else f"gradient {place}"
        assert got.dtype == torch.float64 and got.shape == expected.shape, what
        close = relative(got, expected) <= tolerance or (got - expected).abs().max() <= 1e-15
        assert close, f"{what}: {got} is not the original's {expected}"


def hold(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    *leaves: Tensor,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Value and gradients keep the error rule, with the original in the same dtype as what eager PyTorch gets."""
    leaves = tuple(x.to(dtype).double() for x in leaves)
    results = zip(run(ours, leaves, dtype), run(exact, leaves), run(theirs, leaves, dtype), strict=True)
    for place, (got, expected, eager) in enumerate(results):
        check("value" if place == 0 else f"gradient {place}", got, expected, eager, dtype)


def learned(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    *leaves: Tensor,
) -> None:
    """Where each row has found its partner the loss is tiny. The original's, a difference of large numbers, is 0 in
    float32; ours is not. A logit of 100 is a multiple of 8e-6, hence the tolerance for what is exponential in it."""
    leaves = tuple(x.float().double() for x in leaves)
    expected = run(exact, leaves)
    assert 0 < expected[0] < 1e-10 and run(theirs, leaves, torch.float32)[0] <= 0
    for got, wanted in zip(run(ours, leaves, torch.float32), expected, strict=True):
        assert relative(got, wanted) <= 1e-4


def cold(ours: Callable[..., Tensor], exact: Callable[..., Tensor], *leaves: Tensor) -> None:
    """At a temperature of 1e-3: a logit of 1,000 is a multiple of 6e-5 in float32, and what is exponential in a
    difference of two of them is off by a few of those."""
    leaves = tuple(x.float().double() for x in leaves)
    for got, wanted in zip(run(ours, leaves, torch.float32), run(exact, leaves), strict=True):
        assert relative(got, wanted) <= 3e-4


def same_arguments(
    ours: type, theirs: type, *, defaults: dict[str, object] | None = None, left_out: tuple = ()
) -> None:
    """The constructor and the call take the arguments of the original, in its order, with its defaults (or these)."""
    for method in ("__init__", "forward"):
        mine, original_ = (inspect.signature(getattr(kind, method)).parameters for kind in (ours, theirs))
        expected = [name for name in original_ if name not in left_out]
        assert list(mine) == expected, method
        for name in expected:
            default = (defaults or {}).get(name, original_[name].default)
            if default is not inspect.Parameter.empty:
                assert mine[name].default == default, f"{method}: {name}"
