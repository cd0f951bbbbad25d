"""Two views against all rows of the batch: the autograd.Function under every two-view contrastive loss.

    loss_i = weight * log sum_{k != i} exp(s <z_i, z_k>) - pull * <z_i, z_p(i)>
           = weight * log(1 + exp(x_i)) - (pull - weight * s) * <z_i, z_p(i)>
    x_i = log sum_{k != i, p(i)} exp(s <z_i, z_k>) - s <z_i, z_p(i)>

over the M = 2N rows i, p(i) the partner, z the stacked (normalised) views. NT-Xent is weight = 1, pull = s;
other weightings of alignment and distribution are other numbers, never another kernel.

The kernels leave the positive out of the sum. Were it in, the loss of a well-trained pair would be the difference
of two nearly equal numbers, and its gradient 1 - p with p rounded to 16 bits; so both are exact to the last digits.

The gradient of row i needs the log-sum-exp of every row, and no gradient of another rank's rows: over ranks the
forward gathers rows, the backward gathers one number a row.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .. import ops
from ..distributed import Ranks, blocks, columns_of
from .double_backward import refuse_double_backward
from .joining import add_up, join_lse


class TwoViewLoss(torch.autograd.Function):
    """(x1, x2, scale) -> (sum of loss_i over all ranks / divisor, or without one this rank's loss_i [2n]; an anchor).

    Without `pull` it is weight * s. Without `positive_counts` the loss is weight * x_i: the positive is in no sum.
    Never materialised: anything of M x M. Saved for backward: z [2n, D], rows that were gathered, and a few vectors.
    The anchor [0] stands for the loss where that is saved: the caller may change the loss in place.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x1: Tensor,  # [n, D]
        x2: Tensor,  # [n, D]
        scale: Tensor,  # []
        weight: float,
        pull: float | None,
        positive_counts: bool,
        bound: float,
        normalize: bool,
        divisor: int | None,
        ranks: Ranks | None,
        name: str,
    ) -> tuple[Tensor, Tensor]:
        z, rnorm, pos = ops.normalize_pair(x1, x2, normalize)
        columns = None if ranks is None else columns_of(ranks, z)
        first = 0 if ranks is None else ranks.first_row
        (lse,) = join_lse(
            ops.lse_forward(z, block.rows, scale, bound, first - block.first, x1.shape[0])
            for block in blocks(ranks, columns)
        )
        # The sum over ranks is one of float64, rounded once.
        summed = ranks is not None and divisor is not None
        dtype = torch.float64 if summed else scale.dtype
        loss, lse, share = ops.pair_loss(pos, lse, scale, weight, pull, positive_counts, divisor, dtype)
        if summed:
            loss = ranks.sum(loss).to(scale.dtype)
        anchor = loss.new_empty(0)
        ctx.bound, ctx.divisor, ctx.ranks, ctx.name = bound, divisor, ranks, name
        ctx.dtype, ctx.weights = x1.dtype, (weight, pull)
        ctx.save_for_backward(z, columns, rnorm, pos, lse, share, scale, anchor)
        return loss, anchor

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor):
        with torch.no_grad():
            grads = _two_view_backward(ctx, grad)
        return *refuse_double_backward(ctx.name, ctx.saved_tensors[-1], (grad,), *grads), *[None] * 8


def largest(*grads: Tensor) -> Tensor:
    """The largest size of any entry, to divide by: 1 where there is none but 0."""
    peaks = [grad.abs().amax() if grad.numel() else grad.new_zeros(()) for grad in grads]
    peak = functools.reduce(torch.maximum, peaks)
    return torch.where(peak == 0, torch.ones_like(peak), peak)


def upstream_weights(grad: Tensor, reduce: bool, ranks: Ranks | None):
    """(grad, w, w_columns): the upstream gradient as a number times row weights in [-1, 1], None for all ones.
    Without ranks the columns are the rows, and have no weights of their own.

    The number stays outside the kernels and in fp32: 1 / M inside a 16-bit weight would flush to zero.
    """
    if reduce:
        return (grad if ranks is None else grad * ranks.grad_factor), None, None
    w_columns = grad if ranks is None else ranks.gather_rows(grad)
    peak = largest(w_columns)
    return peak, grad / peak, None if ranks is None else w_columns / peak


def shared_weights(grads: list[Tensor], ranks: Ranks | None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(peak, of this rank, of all ranks): upstream gradients [n] as a number times weights in [-1, 1]. One exchange."""
    mine = torch.stack(grads, 1)
    every = mine if ranks is None else ranks.gather_rows(mine)
    peak = largest(every)
    return peak, *[list((x / peak).T.contiguous().unbind(0)) for x in (mine, every)]


def _two_view_backward(ctx: FunctionCtx, grad: Tensor):
    z, columns, rnorm, pos, lse, share, scale, _ = ctx.saved_tensors
    ranks: Ranks | None = ctx.ranks
    grad, w, w_columns = upstream_weights(grad, ctx.divisor is not None, ranks)
    # float32 over the wire: half a unit in its last place is what ranks may differ by.
    lse_columns = None if ranks is None else ranks.gather_rows(lse.to(scale.dtype))
    first = 0 if ranks is None else ranks.first_row
    (grad_lse,) = add_up(
        ops.lse_backward(
            z, block.rows, scale, ctx.bound, first - block.first, z.shape[0] // 2,
            lse, block.of(lse_columns), w, block.of(w_columns),
        )
        for block in blocks(ranks, columns)
    )  # fmt: skip
    divisor = 1 if ctx.divisor is None else ctx.divisor
    dx1, dx2, slope = ops.pair_backward(
        z, rnorm, grad_lse, pos, share, scale, grad, w, *ctx.weights, divisor, ctx.dtype
    )  # fmt: skip
    return dx1, dx2, slope.sum().to(scale.dtype) if ctx.needs_input_grad[2] else None
