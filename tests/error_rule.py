"""The error rule that every loss, log-sum-exp and gradient is held to, and what it is computed from.

Against float64 on the already rounded inputs:

    error <= 2 * (error of eager PyTorch in the same dtype) + a        a = 1e-6 fp32, 1e-4 fp16, 1e-3 bf16

relative in the norm, and for gradients also for the worst row, relative to the largest row norm. Twice eager:
a kernel that reorders sums cannot be asked to beat eager, and must not be much worse. `a` is about eight units
in the last place of fp32, and a tenth (fp16) or a quarter (bf16) of one of the 16-bit types: it keeps the rule
meaningful where eager happens to be exact.
"""

from __future__ import annotations

import torch

FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    """||got - exact|| / ||exact||, or the absolute error where exact is 0. NaN stays NaN and fails every bound."""
    error = torch.linalg.vector_norm(got.double() - exact.double())
    norm = torch.linalg.vector_norm(exact.double())
    return (error / norm if norm > 0 else error).item()


def worst_row(got: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest row error relative to the largest row norm."""
    error = torch.linalg.vector_norm(got.double() - exact.double(), dim=1).amax()
    norm = torch.linalg.vector_norm(exact.double(), dim=1).amax()
    return (error / norm if norm > 0 else error).item()


def check(
    what: str, got: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, dtype: torch.dtype, floor: float = 0.0
) -> None:
    """Hold `got` to the rule; `eager` is what plain PyTorch gets in `dtype`, `exact` the float64 result.

    A caller that raises the floor says why.
    """
    assert got.shape == exact.shape, f"{what}: shape {list(got.shape)}, expected {list(exact.shape)}"
    measures = [("error", relative)] + ([("worst row", worst_row)] if got.ndim == 2 else [])
    for label, measure in measures:
        ours, theirs = measure(got, exact), measure(eager, exact)
        # Eager overflows where we must not: then only the floor is left of its error.
        bound = 2 * (theirs if theirs < float("inf") else 0.0) + max(FLOOR[dtype], floor)
        assert ours <= bound, f"{what}: {label} {ours:.2e} above {bound:.2e} (eager {theirs:.2e}, {dtype})"
