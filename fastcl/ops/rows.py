"""Rows on their own: normalisation, and the log-sum-exp of every row against all rows of the batch.

    lse_i = log sum_{k != i} exp(s <z_i, J z_k>),      i over this rank's rows, k over the rows of all ranks

with J the identity or, in the sum over all rows, the exchange of the last two features: rows (z, u, 1) then give
<z_i, z_k> + u_i + u_k, a term of its own for every row and column. With ids k runs over rows of another id, over rows
of the same id, or over all of them with the products of the same id summed up apart.

The backward is that of NT-Xent without the positives. The log-sum-exp over all pairs, `total`, is even cheaper:
every weight is exp(S_ik - total), so that ranks exchange one number in all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .. import ops
from ..distributed import Ranks, blocks, columns_of
from .chunked import compute_dtype
from .double_backward import refuse_double_backward
from .joining import add_up, join_lse
from .similarity import shared_weights, upstream_weights


class UnitRows(torch.autograd.Function):
    """x / max(||x||, 1e-12), in float32 (float64 for float64). Rows shorter than that get no gradient.

    With a dtype, rounded to it: what is multiplied elsewhere in that dtype.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
        z, rnorm = ops.unit_rows(x, dtype)
        ctx.save_for_backward(z, rnorm)
        ctx.dtype, ctx.name = x.dtype, name
        return z

    @staticmethod
    def backward(ctx: FunctionCtx, dz: Tensor):
        z, rnorm = ctx.saved_tensors
        with torch.no_grad():
            dx = ops.unit_rows_backward(z, rnorm, dz, ctx.dtype)
        return *refuse_double_backward(ctx.name, z, (dz,), dx), None, None


def loss_rows(name: str, z: Tensor, unit: bool) -> Tensor:
    """The rows that a loss is calculated from, in its dtype: normalised, or as they are."""
    return UnitRows.apply(z, None, name) if unit else z.to(compute_dtype(z.dtype))


def product_rows(name: str, z: Tensor, unit: bool) -> tuple[Tensor, torch.dtype]:
    """The same with exactly the values that tiles are multiplied from, and the dtype of those products: a positive
    calculated outside the tiles then fits the log-sum-exp from within."""
    dtype = ops.product_dtype(z, unit)
    return (UnitRows.apply(z, dtype, name) if unit else z.to(compute_dtype(z.dtype))), dtype


def _swapped(z: Tensor) -> Tensor:
    """J z: the last two features in each other's place."""
    return torch.cat([z[:, :-2], z[:, -1:], z[:, -2:-1]], 1)


class RowLogSumExp(torch.autograd.Function):
    """(z [n, D], scale, ids [n]) -> float64 lse_i [n], or log sum_i exp(lse_i) over the rows of all ranks.

    With same="sum" also, of the other rows of the same id, the sum of <z_i, z_k> [n] and their number [n].
    Saved for backward: z in the dtype of the products, rows that were gathered, and a few numbers a row.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        z: Tensor,  # [n, D]
        scale: Tensor,  # []
        ids: Tensor | None,  # [n] int64
        same: str,
        dtype: torch.dtype,
        bound: float,
        swap: bool,
        total: bool,
        ranks: Ranks | None,
        name: str,
    ) -> Tensor | tuple[Tensor, ...]:
        z = z.to(dtype)
        # Without other columns the kernels use the symmetry.
        columns = None if ranks is None and not swap else columns_of(ranks, _swapped(z) if swap else z)
        ids_columns = None if ids is None or ranks is None else ranks.gather_rows(ids)
        first = 0 if ranks is None else ranks.first_row
        lse, *positives = join_lse(
            ops.lse_forward(
                z, block.rows, scale, bound, first - block.first, 0,
                ids_a=ids, ids_b=block.of(ids_columns), same=same,
            )
            for block in blocks(ranks, columns)
        )  # fmt: skip
        ctx.bound, ctx.first, ctx.total, ctx.ranks = bound, first, total, ranks
        ctx.same, ctx.name = same, name
        if total:
            lse = lse.logsumexp(0)
            if ranks is not None:
                lse = ranks.gather_number(lse).logsumexp(0)
        out = lse.clone()
        ctx.save_for_backward(z, columns, scale, ids, ids_columns, lse, *positives[:1], out)
        if not positives:
            return out
        sums, counts = positives
        ctx.mark_non_differentiable(counts)
        return out, sums.clone(), counts

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, grad_sums: Tensor | None = None, _=None):
        with torch.no_grad():
            grads = _row_lse_backward(ctx, grad, grad_sums)
        return *refuse_double_backward(ctx.name, ctx.saved_tensors[-1], (grad, grad_sums), *grads), *[None] * 8


def _row_lse_backward(ctx: FunctionCtx, grad: Tensor, grad_sums: Tensor | None):
    z, columns, scale, ids, ids_columns, lse, *positives, _ = ctx.saved_tensors
    ranks: Ranks | None = ctx.ranks
    if grad_sums is None:
        grad, w, w_columns = upstream_weights(grad, ctx.total, ranks)
        weights = [None if x is None else x.to(scale.dtype) for x in (w, w_columns)]
        pulls = [None, None]
    else:
        # dL/dz = s W z with W of the log-sum-exp; the sums' part of it is their gradient / s.
        grad, rows, others = shared_weights([grad, -grad_sums / scale], ranks)
        weights, pulls = [[rows[k].to(scale.dtype), others[k].to(scale.dtype)] for k in range(2)]
    if ctx.total:
        count = z.shape[0] if ranks is None else sum(ranks.counts)
        lse_rows, lse_columns = (lse.expand(n).contiguous() for n in (z.shape[0], count))
    else:
        lse_rows = lse_columns = lse
        if ranks is not None:
            lse_columns = ranks.gather_rows(lse.to(scale.dtype))
    if columns is None:
        lse_columns = weights[1] = pulls[1] = None
    (found,) = add_up(
        ops.lse_backward(
            z, block.rows, scale, ctx.bound, ctx.first - block.first, 0,
            lse_rows, block.of(lse_columns), weights[0], block.of(weights[1]),
            ids_a=ids, ids_b=block.of(ids_columns), same=ctx.same, pull_a=pulls[0], pull_b=block.of(pulls[1]),
        )
        for block in blocks(ranks, columns)
    )  # fmt: skip
    dz = (grad * scale).to(found.dtype) * found
    d_scale = None
    if ctx.needs_input_grad[1]:
        # Each S_ik stands in row i and in row k of what was found, hence the half.
        d_scale = 0.5 * (z.to(found.dtype) * found).sum().double()
        if pulls[0] is not None:
            d_scale = d_scale + (pulls[0] * positives[0]).sum()
        d_scale = (grad * d_scale).to(scale.dtype)
    return dz, d_scale
