"""Sorted projections: the autograd.Functions of the segmented sort and of the sliced Wasserstein distance.

    loss_i = M / P sum_p integral over cell r of (X_p(q) - Y_p(q))^2 dq,      r the rank of row i in projection p

with X_p, Y_p the quantile functions of the projected rows and of the projected prior samples, steps of width 1 / M
and 1 / K, and cell r = [r / M, (r + 1) / M). The mean over the M rows is the loss. The order of the rows is locally
constant, so the gradient of the projections is that of the squares, and comes with the loss from one pass.

Over ranks the projections change hands, not the rows: each rank sorts all rows' values of its share of the
projections, and the gradients of these travel back.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .. import ops
from ..distributed import Ranks
from .double_backward import refuse_double_backward


class SegmentedSort(torch.autograd.Function):
    """x [S, N] -> sorted values [S, N] and int32 indices [S, N]; the gradient goes back to where values came from."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, descending: bool):
        values, indices = ops.segmented_sort(x, descending)
        ctx.save_for_backward(indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, _):
        (indices,) = ctx.saved_tensors
        return torch.zeros_like(grad).scatter(1, indices.long(), grad), None


class SlicedWasserstein(torch.autograd.Function):
    """rows z [n, d], prior samples [K, d], projections [P, d] -> sum of loss_i over all ranks, or this rank's [n].

    No gradient to samples and projections. Saved for backward: the gradient of the projected rows [P, n].
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        z: Tensor,  # [n, d]
        samples: Tensor,  # [K, d]
        projections: Tensor,  # [P, d]
        reduce: bool,
        ranks: Ranks | None,
        name: str,
    ) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            x = projections @ z.T
            count = x.shape[0]
            mine = projections
            if ranks is not None:
                x = ranks.columns_to_rows(x)
                mine = projections[ranks.share(count)]
            cost, grad = ops.wasserstein_1d(x, mine @ samples.T, not reduce)
        ctx.reduce, ctx.ranks, ctx.name = reduce, ranks, name
        # Of a row: M times the mean over the projections.
        ctx.factor = x.shape[1] / count
        rows = ctx.factor * cost.sum(0)
        if ranks is not None:
            rows = ranks.sum(rows)
            if not reduce:
                rows = rows[ranks.first_row : ranks.first_row + z.shape[0]]
        rows = rows.to(z.dtype)
        ctx.save_for_backward(grad, projections, rows)
        return rows

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor):
        grad, projections, rows = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            weight = ctx.factor * grad_loss
            if ctx.ranks is not None:
                grad = ctx.ranks.rows_to_columns(grad, projections.shape[0])
                if ctx.reduce:
                    weight = weight * ctx.ranks.grad_factor
            dz = grad.T @ (weight * projections) if ctx.reduce else (grad.T @ projections).mul_(weight[:, None])
        (dz,) = refuse_double_backward(ctx.name, rows, (grad_loss,), dz)
        return dz, None, None, None, None, None
