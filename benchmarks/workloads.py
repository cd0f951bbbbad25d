"""What is compared, by name: the inputs of a size, and each side as a function of them.

A size is m rows by d features or, where rows are projected already, d directions. Every side of one workload does
the same work: loss and gradients, or the loss or the sort alone where the name or the docstring says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import accuracy, eager, timing
from benchmarks.timing import gradient_of, value_of
from fastcl import nt_xent, ops, segmented_sort, swd_loss

# POT is the one side that may be missing.
POT = {"POT": gradient_of(eager.pot)} if importlib.util.find_spec("ot") else {}


@dataclass(frozen=True)
class Workload:
    """Shapes of the inputs at (m, d), the sides, and how many of the inputs, from the first on, require grad."""

    shapes: Callable[[int, int], list[tuple[int, ...]]]
    sides: dict[str, Callable[..., object]]
    grads: int = 1

    def inputs(self, m: int, d: int, dtype: torch.dtype, device: torch.device, sets: int = 1) -> list[tuple]:
        return timing.random_sets(self.shapes(m, d), dtype, device, sets, self.grads)


def views(m: int, d: int) -> list[tuple[int, ...]]:
    return [(m // 2, d)] * 2


def projections(m: int, d: int) -> list[tuple[int, ...]]:
    """Of the data and of the prior: orthonormal projections of many features are close to normal, as these are."""
    return [(d, m)] * 2


def _wasserstein_1d(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient [P, N], the latter without the factor 1 / P: the matrix product that follows applies it."""
    cost, grad = ops.wasserstein_1d(x.detach(), y, False)
    return cost.mean(), grad


def _given(z: Tensor, samples: Tensor, directions: Tensor) -> Tensor:
    return swd_loss(z, prior_samples=samples, projections=directions)


WORKLOADS = {
    "nt_xent": Workload(views, {"fastcl": gradient_of(nt_xent), "eager": gradient_of(eager.nt_xent)}, grads=2),
    "nt_xent forward": Workload(views, {"fastcl": value_of(nt_xent), "eager": value_of(eager.nt_xent)}),
    "wasserstein_1d": Workload(projections, {"fastcl": _wasserstein_1d, "eager": gradient_of(eager.wasserstein_1d)}),
    "swd_loss": Workload(
        lambda m, d: [(m, d)], {"fastcl": gradient_of(swd_loss), "eager": gradient_of(eager.swd_loss)}
    ),
    # Samples and directions are inputs, so that all sides calculate the same number.
    "swd_loss, given draws": Workload(
        lambda m, d: [(m, d), (m, d), (d, d)],
        {"fastcl": gradient_of(_given), "eager": gradient_of(eager.swd)} | POT,
    ),
    # Values and indices, forward alone.
    "segmented_sort": Workload(
        lambda m, d: [(d, m)],
        {
            "fastcl": value_of(segmented_sort),
            "torch.sort stable": value_of(lambda x: torch.sort(x, dim=1, stable=True)),
            "torch.sort": value_of(lambda x: torch.sort(x, dim=1)),
        },
    ),
}  # fmt: skip


def errors(kind: str, n: int, p: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Of each side against float64, for float32 inputs; nothing for a sort, which has no rounding."""
    if kind == "segmented_sort":
        return {}
    work = WORKLOADS["wasserstein_1d" if kind == "wasserstein_1d" else "swd_loss, given draws"]
    inputs = work.inputs(n, p, torch.float32, device)[0]
    got = {name: work.sides[name](*inputs) for name in WORKLOADS[kind].sides}
    if kind != "wasserstein_1d":
        truth = accuracy.exact_swd(*inputs)
        return {name: accuracy.relative(*found, *truth) for name, found in got.items()}
    loss, grad = accuracy.exact_wasserstein_1d(*inputs)
    keep = accuracy.distinct(inputs[0])
    factors = dict.fromkeys(got, 1) | {"fastcl": 1 / p}
    # Transposed: a row of the data is a column here.
    return {
        name: accuracy.relative(value, (factors[name] * found * keep).T, loss, (grad * keep).T)
        for name, (value, found) in got.items()
    }
