"""Alignment and uniformity: the two properties that contrastive losses balance.

With unit rows z, p(i) the other view of row i:

    alignment  = mean_i ||z_i - z_p(i)||^2                           over the M = 2N rows of both views
    uniformity = log mean_{i != j} exp(-t ||z_i - z_j||^2)           over all ordered pairs of rows

Source: Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
Hypersphere" (2020), which P1 generalises. Uniformity is the log-sum-exp primitive with s = 2t: for unit rows
-t ||z_i - z_j||^2 = 2t <z_i, z_j> - 2t.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..ops.rows import RowLogSumExp, loss_rows
from . import checks
from .batch import Batch, needs_grad, open_batch, reduce_rows
from .module import LossModule


def distances(name: str, z1: Tensor, z2: Tensor, normalize: bool) -> Tensor:
    """||z_i - z_p(i)||^2 [2n], view 1 first. From the difference: 2 - 2 <z_i, z_p(i)> has no digits for close views."""
    z1, z2 = (loss_rows(name, z, normalize) for z in (z1, z2))
    square = (z1 - z2).square().sum(1)
    return torch.cat([square, square])


def alignment_loss(
    z1: Tensor, z2: Tensor, *,
    normalize: bool = True, reduction: str = "mean", group=None,
    grad_reduction: str = "mean", exchange: str = "gather",
) -> Tensor:  # fmt: skip
    """Alignment loss of two views: the mean squared distance of each pair.

    L = mean_i ||z_i - z_p(i)||^2 over the 2N rows of both views, p(i) the other view of row i (Wang & Isola 2020,
    alpha = 2). Use it with `uniformity_loss`: alone it is 0 for rows that are all the same.

    Args:
        z1, z2: embeddings [N, D] of the two views, row i of both from the same image. float16, bfloat16, float32
            or float64; any strides.
        normalize, reduction, group, grad_reduction, exchange: as in `nt_xent`. With reduction "none" both rows of a
            pair carry its distance.

    Returns:
        The loss, float32 (float64 for float64 input): a scalar, or [2n] for reduction "none". NaN in the data gives a
        NaN loss.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; over ranks the same on every rank.
        RuntimeError: on differentiating twice, where rows are normalised.

    Example:
        >>> import torch
        >>> from fastcl import alignment_loss
        >>> z1, z2 = torch.randn(2, 256, 128)
        >>> alignment_loss(z1, z1).item()
        0.0
        >>> loss = alignment_loss(z1, z2)
    """
    name = "alignment_loss"
    shared = {"normalize": normalize, "reduction": reduction, "grad_reduction": grad_reduction, "exchange": exchange}

    def check():
        checks.options(name, **shared)
        checks.pair(name, z1, z2)
        return z1, 1.0

    batch = open_batch(name, group, check, shared, argument="z1 and z2", views=2)
    return reduce_rows(distances(name, z1, z2, normalize), reduction, batch)


def uniformity_loss(
    z: Tensor, t: float = 2.0, *,
    normalize: bool = True, reduction: str = "mean", group=None,
    grad_reduction: str = "mean", exchange: str = "gather",
) -> Tensor:  # fmt: skip
    """Uniformity loss: how evenly rows cover the unit sphere, without the N x N distance matrix.

    L = log mean_{i != j} exp(-t ||z_i - z_j||^2) over all ordered pairs of the N rows (Wang & Isola 2020). Lower is
    more even; 0 means that all rows are the same. Memory is O(N D). Results repeat to the bit.

    Args:
        z: rows [N, D], at least two over all ranks. float16, bfloat16, float32 or float64; any strides. For the
            uniformity of two views take the mean of both losses, as the source does, or stack them.
        t: positive number, the inverse width of the kernel.
        normalize: divide rows by max(length, 1e-12) first. Rows shorter than that get no gradient.
        reduction: "mean" only: the loss is the logarithm of one mean over all pairs and has no value of each row.
        group, grad_reduction, exchange: as in `nt_xent`.

    Returns:
        The loss, a float32 scalar (float64 for float64 input). NaN in the data gives a NaN loss.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; over ranks the same on every rank.
        RuntimeError: on differentiating twice.

    Example:
        >>> import torch
        >>> from fastcl import uniformity_loss
        >>> z = torch.randn(256, 128, requires_grad=True)
        >>> loss = uniformity_loss(z)
        >>> loss.backward()
        >>> z.grad.shape
        torch.Size([256, 128])
    """
    name = "uniformity_loss"
    shared = {"normalize": normalize, "reduction": reduction, "grad_reduction": grad_reduction, "exchange": exchange}

    def check():
        checks.options(name, **shared)
        _mean_only(name, reduction)
        checks.rows(name, "z", z)
        checks.number(name, "t", t)
        return z, 1.0

    batch = open_batch(name, group, check, {**shared, "t": t, "requires_grad": needs_grad(z)}, argument="z", least=2)
    pairs = math.log(batch.total) + math.log(batch.total - 1)
    rows = loss_rows(name, z, normalize)
    rows = rows if normalize else _with_lengths(rows, batch)
    # Lengths have no bound: their products stay in the type that the loss is calculated in.
    dtype = ops.product_dtype(z, unit=True) if normalize else rows.dtype
    scale = torch.full((), 2 * t, dtype=rows.dtype, device=z.device)
    bound = 2 * t if normalize else ops.ANY_ROWS
    total = RowLogSumExp.apply(rows, scale, None, "keep", dtype, bound, not normalize, True, batch.ranks, name)
    if normalize:
        total = torch.logaddexp(total - 2 * t, of_zero_rows(rows.detach(), t, batch))
    return (total - pairs).to(rows.dtype)


def of_zero_rows(z: Tensor, t: float, batch: Batch) -> Tensor:
    """log of what the pairs with rows of length 0 miss where all rows count as unit rows: t ||z_i - z_j||^2 is t with
    one such row and 0 with two, not 2t. Without any it is -inf."""
    zeros = (z.square().sum(1) < 0.5).sum().double()
    if batch.ranks is not None:
        zeros = batch.ranks.sum(zeros)
    with_one, with_two = 2 * zeros * (batch.total - zeros), zeros * (zeros - 1)
    return (with_one * (math.exp(-t) - math.exp(-2 * t)) - with_two * math.expm1(-2 * t)).log()


def _mean_only(name: str, reduction: str) -> None:
    if reduction != "mean":
        raise ValueError(f'{name}: reduction must be "mean", since the loss is one logarithm, got {reduction!r}')


def _with_lengths(z: Tensor, batch: Batch) -> Tensor:
    """(z, -||z||^2 / 2, 1): with the last two exchanged on one side, products are -||z_i - z_j||^2 / 2.

    Distances do not change with the origin; rounding errors do, and are smallest about the mean.
    """
    middle = z.detach().sum(0)
    if batch.ranks is not None:
        middle = batch.ranks.sum(middle)
    z = z - middle / batch.total
    half = -0.5 * z.square().sum(1, keepdim=True)
    return torch.cat([z, half, torch.ones_like(half)], 1)


class AlignmentLoss(LossModule):
    """`alignment_loss` as a module: see there for the arguments.

    Example:
        >>> import torch
        >>> from fastcl import AlignmentLoss
        >>> criterion = AlignmentLoss()
        >>> loss = criterion(torch.randn(8, 16), torch.randn(8, 16))
    """

    def __init__(
        self,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        group=None,
        grad_reduction: str = "mean",
        exchange: str = "gather",
    ):
        super().__init__(
            alignment_loss,
            normalize=normalize, reduction=reduction, group=group, grad_reduction=grad_reduction, exchange=exchange,
        )  # fmt: skip

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return alignment_loss(z1, z2, **self.settings)


class UniformityLoss(LossModule):
    """`uniformity_loss` as a module: see there for the arguments.

    Example:
        >>> import torch
        >>> from fastcl import UniformityLoss
        >>> criterion = UniformityLoss(t=2.0)
        >>> loss = criterion(torch.randn(8, 16))
        >>> criterion
        UniformityLoss(t=2)
    """

    def __init__(
        self,
        t: float = 2.0,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        group=None,
        grad_reduction: str = "mean",
        exchange: str = "gather",
    ):
        super().__init__(
            uniformity_loss,
            normalize=normalize, reduction=reduction, group=group, grad_reduction=grad_reduction, exchange=exchange,
        )  # fmt: skip
        checks.number("UniformityLoss", "t", t)
        _mean_only("UniformityLoss", reduction)
        self.t = t

    def forward(self, z: Tensor) -> Tensor:
        return uniformity_loss(z, self.t, **self.settings)

    def extra_repr(self) -> str:
        return ", ".join([f"t={self.t:.4g}", *self.changed_settings()])
