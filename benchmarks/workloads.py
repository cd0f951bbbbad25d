"""What is compared, by name: the inputs of a size, and each side as a function of them.

A size is m rows by d features or, where rows are projected already, d directions. Every side of one workload does
the same work: loss and gradients, or the loss or the sort alone where the name or the docstring says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import accuracy, eager, peers, timing
from benchmarks.peers import IN_BATCH_TEMPERATURE, LOGIT_BIAS, TEMPERATURE, labels_of_eight, logit_scale
from benchmarks.timing import gradient_of, value_of
from fastcl import (
    clip_loss, contrastive_stats, dcl_loss, decoupled_nt_xent, info_nce, instance_discrimination_loss, nt_xent,
    nt_xent_views, ops, segmented_sort, siglip_loss, supcon_loss, swd_loss, uniformity_loss,
)  # fmt: skip

Call = Callable[..., object]
Loss = Callable[..., Tensor]
# Of a queue or a bank.
QUERIES = 256


@dataclass(frozen=True)
class Workload:
    """Shapes of the inputs at (m, d), the sides, and how many of the inputs, from the first on, require grad.

    `plain` is the loss in plain PyTorch, for torch.compile and for float64. `products` is how many products of all
    similarities the loss and its gradients take at least without keeping the matrix, by device; `similarities` their
    number at m rows.
    """

    shapes: Callable[[int, int], list[tuple[int, ...]]]
    sides: dict[str, Call]
    grads: int = 1
    plain: Loss | None = None
    products: dict[str, float] | None = None
    similarities: Callable[[int], int] = lambda m: m * m

    def inputs(self, m: int, d: int, dtype: torch.dtype, device: torch.device, sets: int = 1) -> list[tuple]:
        return timing.random_sets(self.shapes(m, d), dtype, device, sets, self.grads)

    def flop(self, m: int, d: int, device_type: str) -> float | None:
        """Of the products, or None for what has none."""
        return self.products and self.products[device_type] * 2 * self.similarities(m) * d

    def least_bytes(self, m: int, d: int, itemsize: int) -> int:
        """Inputs read once, gradients written once."""
        shapes = self.shapes(m, d)
        return sum(rows * columns for rows, columns in shapes + shapes[: self.grads]) * itemsize


def _losses(kind: str, shapes: Callable, ours: Loss, plain: Loss | None = None, grads: int = 1, **counts) -> Workload:
    """Of ours, plain PyTorch and every library that has this loss and runs here, with their gradients."""
    sides = {"fastcl": ours} | ({"eager": plain} if plain else {}) | peers.losses_for(kind)
    return Workload(shapes, {name: gradient_of(loss) for name, loss in sides.items()}, grads, plain, **counts)


def _products(cpu: float, cuda: float) -> dict[str, float]:
    return {"cpu": cpu, "cuda": cuda}


def views(m: int, d: int) -> list[tuple[int, ...]]:
    return [(m // 2, d)] * 2


def _pairs(m: int, d: int) -> list[tuple[int, ...]]:
    return [(m, d)] * 2


def _rows(m: int, d: int) -> list[tuple[int, ...]]:
    return [(m, d)]


def _projections(m: int, d: int) -> list[tuple[int, ...]]:
    """Of the data and of the prior: orthonormal projections of many features are close to normal, as these are."""
    return [(d, m)] * 2


def _wasserstein_1d(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient [P, N], the latter without the factor 1 / P: the matrix product that follows applies it."""
    cost, grad = ops.wasserstein_1d(x.detach(), y, False)
    return cost.mean(), grad


def _given(z: Tensor, samples: Tensor, directions: Tensor) -> Tensor:
    return swd_loss(z, prior_samples=samples, projections=directions)


def _of_queue(loss: Loss) -> Loss:
    """A loss of queries, keys and negatives of unit length."""
    return lambda q, k, n: loss(*(F.normalize(x, dim=1) for x in (q, k)), n, temperature=1.0)


def queue_of(queries: int) -> Workload:
    """InfoNCE of so many queries, whatever the length m of the queue; no gradient for the latter."""
    return _losses(
        "info_nce, queue",
        lambda m, d: [(queries, d), (queries, d), (m, d)],
        _of_queue(lambda *rows, temperature: info_nce(*rows, temperature, normalize=False)),
        _of_queue(eager.queue_info_nce),
        products=_products(3.0, 3.0),
        similarities=lambda m: queries * m,
    )


# What compares rows, with all its sides. NT-Xent's backward uses each tile for both blocks of rows on a CPU: two
# products where the row-owned pass of the GPU has two and a half.
LOSSES = {
    "nt_xent": _losses("nt_xent", views, nt_xent, eager.nt_xent, 2, products=_products(2.0, 2.5)),
    "dcl_loss": _losses(
        "dcl_loss", views, functools.partial(dcl_loss, temperature=TEMPERATURE), eager.dcl, 2,
        products=_products(2.0, 2.5),
    ),
    "supcon_loss": _losses(
        "supcon_loss", _rows, lambda x: supcon_loss(x, labels_of_eight(x)),
        lambda x: eager.supcon(x, labels_of_eight(x)), products=_products(2.0, 3.0),
    ),
    "clip_loss": _losses(
        "clip_loss", _pairs, lambda x, y: clip_loss(x, y, logit_scale(x)),
        lambda x, y: eager.clip(x, y, logit_scale(x)), 2, products=_products(4.0, 4.0),
    ),
    "siglip_loss": _losses(
        "siglip_loss", _pairs, lambda x, y: siglip_loss(x, y, logit_scale(x), LOGIT_BIAS),
        lambda x, y: eager.siglip(x, y, logit_scale(x), LOGIT_BIAS), 2, products=_products(3.0, 3.0),
    ),
    "info_nce": _losses(
        "info_nce", views, functools.partial(info_nce, temperature=IN_BATCH_TEMPERATURE),
        lambda q, k: eager.info_nce(q, k, IN_BATCH_TEMPERATURE), 2,
        products=_products(4.0, 4.0), similarities=lambda m: (m // 2) ** 2,
    ),
    "info_nce, queue": queue_of(QUERIES),
}  # fmt: skip

# What sorts.
SORTS = {
    "wasserstein_1d": Workload(
        _projections,
        {"fastcl": _wasserstein_1d, "eager": gradient_of(eager.wasserstein_1d)},
        plain=eager.wasserstein_1d,
    ),
    "swd_loss": _losses("swd_loss", _rows, swd_loss, eager.swd_loss),
    # Samples and directions are inputs, so that all sides calculate the same number.
    "swd_loss, given draws": _losses("swd_loss, given draws", lambda m, d: [(m, d), (m, d), (d, d)], _given, eager.swd),
    # Values and indices, forward alone: about the bytes of a gradient, indices being int32.
    "segmented_sort": Workload(
        lambda m, d: [(d, m)],
        {
            "fastcl": value_of(segmented_sort),
            "torch.sort stable": value_of(lambda x: torch.sort(x, dim=1, stable=True)),
            "torch.sort": value_of(lambda x: torch.sort(x, dim=1)),
        },
    ),
}

# Those whose memory alone is measured.
OTHERS = {
    "nt_xent_views": _losses(
        "nt_xent_views", lambda m, d: [(m // 4, d)] * 4, lambda *views: nt_xent_views(views), grads=4
    ),
    "instance_discrimination_loss": _losses(
        "instance_discrimination_loss", lambda m, d: [(QUERIES, d), (m, d)],
        lambda q, bank: instance_discrimination_loss(q, torch.arange(len(q)), bank),
    ),
    "decoupled_nt_xent": _losses("decoupled_nt_xent", views, decoupled_nt_xent, grads=2),
    "uniformity_loss": _losses("uniformity_loss", _rows, uniformity_loss),
    "contrastive_stats": Workload(views, {"fastcl": contrastive_stats}),
}  # fmt: skip

WORKLOADS = LOSSES | SORTS | OTHERS


def call_of(kind: str, side: str) -> Call:
    """A side of a workload; "compiled" is plain PyTorch through torch.compile, made for one size."""
    work = WORKLOADS[kind]
    return gradient_of(eager.compiled(work.plain)) if side == "compiled" else work.sides[side]


def exact(kind: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """(loss, gradients) of a workload in float64 on the already rounded inputs, by plain PyTorch.

    With the matrix of similarities: 8 bytes for each of them, several times.
    """
    if kind in ("wasserstein_1d", "swd_loss, given draws"):
        return (accuracy.exact_wasserstein_1d if kind == "wasserstein_1d" else accuracy.exact_swd)(*inputs)
    return gradient_of(WORKLOADS[kind].plain)(*(x.detach().double().requires_grad_(x.requires_grad) for x in inputs))


def has_errors(kind: str) -> bool:
    """Not sorts, which have no rounding, nor what draws anew."""
    return kind in LOSSES or kind in ("wasserstein_1d", "swd_loss, given draws")


def errors(kind: str, calls: dict[str, Call], inputs: tuple[Tensor, ...]) -> dict[str, dict[str, float]]:
    """{side: its errors against float64} of the loss and of all gradients together."""
    loss, *grads = exact(kind, inputs)
    found = {name: call(*inputs) for name, call in calls.items()}
    if kind != "wasserstein_1d":
        return {
            name: accuracy.relative(value, torch.cat(got), loss, torch.cat(grads))
            for name, (value, *got) in found.items()
        }
    # Among equals any order is right, and torch.sort takes one of its own.
    keep, directions = accuracy.distinct(inputs[0]), inputs[0].shape[0]
    # Transposed: a row of the data is a column here.
    return {
        name: accuracy.relative(
            value, (got * (1 / directions if name == "fastcl" else 1) * keep).T, loss, (grads[0] * keep).T
        )
        for name, (value, got) in found.items()
    }
