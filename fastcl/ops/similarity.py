"""Two views against all rows of the batch: the autograd.Function under every two-view contrastive loss.

    loss_i = lse_coef * log sum_{k != i} exp(s <z_i, z_k>) - pos_coef * <z_i, z_p(i)>
           = lse_coef * log(1 + exp(x_i)) - (pos_coef - lse_coef * s) * <z_i, z_p(i)>
    x_i = log sum_{k != i, p(i)} exp(s <z_i, z_k>) - s <z_i, z_p(i)>

over the M = 2N rows i, p(i) the partner, z the stacked (normalised) views. NT-Xent is lse_coef = 1, pos_coef = s;
other weightings of alignment and distribution are other coefficients, never another kernel.

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
    """(x1, x2, scale, lse_coef, pos_coef) -> sum of loss_i over all ranks, or this rank's loss_i [2n].

    Both coefficients are None for NT-Xent. Without `positive_counts` the loss is x_i: the positive is in no sum. Never
    materialised: anything of M x M. Saved for backward: z [2n, D], rows that were gathered, and a few vectors.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x1: Tensor,  # [n, D]
        x2: Tensor,  # [n, D]
        scale: Tensor,  # []
        lse_coef: Tensor | None,  # []
        pos_coef: Tensor | None,  # []
        positive_counts: bool,
        bound: float,
        normalize: bool,
        reduce: bool,
        ranks: Ranks | None,
        name: str,
    ) -> Tensor:
        z, rnorm, pos = ops.normalize_pair(x1, x2, normalize)
        columns = None if ranks is None else columns_of(ranks, z)
        # One number a row: float64 is free, and nothing below rounds what the kernels computed.
        pos = torch.cat([pos, pos]).double()
        first = 0 if ranks is None else ranks.first_row
        (lse,) = join_lse(
            ops.lse_forward(z, block.rows, scale, bound, first - block.first, x1.shape[0])
            for block in blocks(ranks, columns)
        )
        # One pair alone has no negatives: x = -inf, loss 0 and gradient 0, to the bit.
        x = lse - scale * pos
        rows = softplus(x) if positive_counts else torch.where(x == -torch.inf, 0.0, x)
        if lse_coef is not None:
            rows = lse_coef * rows - _rest(scale, lse_coef, pos_coef) * pos
        ctx.bound, ctx.reduce, ctx.ranks, ctx.name = bound, reduce, ranks, name
        ctx.dtype, ctx.positive_counts = x1.dtype, positive_counts
        loss = rows
        if reduce:
            loss = rows.sum()
            loss = loss if ranks is None else ranks.sum(loss)
        loss = loss.to(scale.dtype)
        ctx.save_for_backward(z, columns, rnorm, pos, x, scale, lse_coef, pos_coef, loss)
        return loss

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor):
        with torch.no_grad():
            grads = _two_view_backward(ctx, grad)
        return *refuse_double_backward(ctx.name, ctx.saved_tensors[-1], (grad,), *grads), *[None] * 6


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact at both ends (torch's cuts off at 20, which float64 can see).

    Of x = log-sum-exp of the negatives - positive it is the cross entropy of the positive against all of them: no
    difference of two nearly equal numbers, and 0 with zero gradient where there is no negative.
    """
    return torch.logaddexp(x, torch.zeros_like(x))


def _rest(scale: Tensor, lse_coef: Tensor, pos_coef: Tensor) -> Tensor:
    """What log(1 + exp(x)) leaves of the positive. In float64: it is 0 where the loss is a multiple of NT-Xent."""
    return pos_coef.double() - lse_coef.double() * scale


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
    z, columns, rnorm, pos, x, scale, lse_coef, pos_coef, _ = ctx.saved_tensors
    ranks: Ranks | None = ctx.ranks
    grad, w, w_columns = upstream_weights(grad, ctx.reduce, ranks)
    # The log-sum-exp that divides the row's weights, and of the positive: 1 - p, as the share of the negatives.
    if ctx.positive_counts:
        lse, share = scale * pos + softplus(x), torch.sigmoid(x)
    else:
        lse, share = scale * pos + x, (x != -torch.inf).to(x.dtype)
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
    lse_grad = grad if lse_coef is None else grad * lse_coef
    pull_grad = lse_grad * scale
    share = share if w is None else w * share
    pull = pull_grad * share
    if lse_coef is not None:
        pull = pull + grad * _rest(scale, lse_coef, pos_coef) * (1.0 if w is None else w)
    dx1, dx2, rowdot = ops.pair_backward(z, rnorm, grad_lse, pull_grad, pull.to(scale.dtype), ctx.dtype)
    d_scale = d_lse = d_pos = None
    dtype = scale.dtype
    if ctx.needs_input_grad[2]:
        # Each S_ik stands in row i and in row k of grad_lse, hence the half.
        # The positive: - (1 - p) of NT-Xent, p of the log-sum-exp alone.
        of_pos = -share if lse_coef is None else torch.sigmoid(-x) * (1.0 if w is None else w)
        d_scale = (lse_grad * (0.5 * rowdot + of_pos * pos).sum()).to(dtype)
    if ctx.needs_input_grad[3]:
        d_lse = (grad * (lse if w is None else w * lse).sum()).to(dtype)
    if ctx.needs_input_grad[4]:
        d_pos = (-grad * (pos if w is None else w * pos).sum()).to(dtype)
    return dx1, dx2, d_scale, d_lse, d_pos
