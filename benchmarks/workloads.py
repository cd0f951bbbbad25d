"""What is compared, by name: the inputs of a size, and each side as a function of them.

A size is m rows by d features or, where rows are projected already, d directions. Every side of one workload does
the same work: loss and gradients, or the loss or the sort alone where the name or the docstring says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import accuracy, eager, timing
from benchmarks.timing import gradient_of, value_of
from fastcl import (
    clip_loss, contrastive_stats, dcl_loss, decoupled_nt_xent, info_nce, instance_discrimination_loss, nt_xent,
    nt_xent_views, ops, segmented_sort, siglip_loss, supcon_loss, swd_loss, uniformity_loss,
)  # fmt: skip
from fastcl.integrations.pytorch_metric_learning import NTXentLoss

# Peers may be missing.
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


def _labels(x: Tensor) -> Tensor:
    """Eight rows of every label."""
    return torch.arange(len(x), device=x.device) % max(1, len(x) // 8)


def logit_scale(x: Tensor) -> float:
    """CLIP's first, for rows as long as these."""
    return 1 / 0.07 / x.shape[1]


def _queue(loss: Callable[..., Tensor]) -> Callable[..., object]:
    """A loss of queries, keys and negatives, without gradient for the latter."""
    return gradient_of(lambda q, k, n: loss(*(F.normalize(x, dim=1) for x in (q, k)), n, temperature=1.0))


def queue_of(queries: int) -> Workload:
    """InfoNCE of so many queries, whatever the length m of the queue."""
    return Workload(
        lambda m, d: [(queries, d), (queries, d), (m, d)],
        {
            "fastcl": _queue(lambda *rows, temperature: info_nce(*rows, temperature, normalize=False)),
            "eager": _queue(eager.queue_info_nce),
        },
    )


def _twins(x: Tensor) -> Tensor:
    """Two rows of every label."""
    return torch.arange(len(x), device=x.device) // 2


def _metric_learning(x: Tensor) -> Tensor:
    from pytorch_metric_learning.losses import NTXentLoss as Theirs

    return Theirs()(x, _twins(x))


METRIC_LEARNING = (
    {"pytorch-metric-learning": gradient_of(_metric_learning)}
    if importlib.util.find_spec("pytorch_metric_learning")
    else {}
)
# Of a queue or a bank.
QUERIES = 256
# SigLIP's first.
LOGIT_BIAS = -10.0
# What is compared with rows of another kind.
PAIRS = {
    "clip_loss": Workload(
        lambda m, d: [(m, d)] * 2,
        {
            "fastcl": gradient_of(lambda x, y: clip_loss(x, y, logit_scale(x))),
            "eager": gradient_of(lambda x, y: eager.clip(x, y, logit_scale(x))),
        },
        grads=2,
    ),
    "siglip_loss": Workload(
        lambda m, d: [(m, d)] * 2,
        {
            "fastcl": gradient_of(lambda x, y: siglip_loss(x, y, logit_scale(x), LOGIT_BIAS)),
            "eager": gradient_of(lambda x, y: eager.siglip(x, y, logit_scale(x), LOGIT_BIAS)),
        },
        grads=2,
    ),
    "info_nce, queue": queue_of(QUERIES),
    "supcon_loss": Workload(
        lambda m, d: [(m, d)],
        {
            "fastcl": gradient_of(lambda x: supcon_loss(x, _labels(x))),
            "eager": gradient_of(lambda x: eager.supcon(x, _labels(x))),
        },
    ),
    # A term for every positive of a row: the peer builds a tensor of rows x positives x negatives.
    "metric learning NTXentLoss": Workload(
        lambda m, d: [(m, d)],
        {"fastcl": gradient_of(lambda x: NTXentLoss()(x, _twins(x)))} | METRIC_LEARNING,
    ),
}

# Those whose memory alone is measured.
OTHERS = {
    "dcl_loss": Workload(views, {"fastcl": gradient_of(dcl_loss)}, grads=2),
    "nt_xent_views": Workload(
        lambda m, d: [(m // 4, d)] * 4, {"fastcl": gradient_of(lambda *views: nt_xent_views(views))}, grads=4
    ),
    "info_nce": Workload(views, {"fastcl": gradient_of(info_nce)}, grads=2),
    "instance_discrimination_loss": Workload(
        lambda m, d: [(QUERIES, d), (m, d)],
        {"fastcl": gradient_of(lambda q, bank: instance_discrimination_loss(q, torch.arange(len(q)), bank))},
    ),
    "decoupled_nt_xent": Workload(views, {"fastcl": gradient_of(decoupled_nt_xent)}, grads=2),
    "uniformity_loss": Workload(lambda m, d: [(m, d)], {"fastcl": gradient_of(uniformity_loss)}),
    "contrastive_stats": Workload(views, {"fastcl": contrastive_stats}),
}

WORKLOADS = PAIRS | OTHERS | {
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
