"""Rows on their own: normalisation, and the log-sum-exp of every row against all rows of the batch.

    lse_i = log sum_{k != i} exp(s <z_i, J z_k>),      i over this rank's rows, k over the rows of all ranks

with J the identity or, in the sum over all rows, the exchange of the last two features: rows (z, u, 1) then give
<z_i, z_k> + u_i + u_k, a term of its own for every row and column.

The backward is that of NT-Xent without the positives. The log-sum-exp over all pairs, `total`, is even cheaper:
every weight is exp(S_ik - total), so that ranks exchange one number in all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .. import ops
from ..distributed import Ranks
from .chunked import compute_dtype, unit_rows
from .double_backward import refuse_double_backward
from .similarity import upstream_weights


class UnitRows(torch.autograd.Function):
    """x / max(||x||, 1e-12), in float32 (float64 for float64). Rows shorter than that get no gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, name: str) -> Tensor:
        z, rnorm = unit_rows(x)
        ctx.save_for_backward(z, rnorm)
        ctx.dtype, ctx.name = x.dtype, name
        return z

    @staticmethod
    def backward(ctx: FunctionCtx, dz: Tensor):
        z, rnorm = ctx.saved_tensors
        with torch.no_grad():
            along = (z * dz).sum(1, keepdim=True)
            dx = dz.addcmul(z, along, value=-1).mul_(rnorm[:, None]).to(ctx.dtype)
        return *refuse_double_backward(ctx.name, z, dx), None


def loss_rows(name: str, z: Tensor, unit: bool) -> Tensor:
    """The rows that a loss is calculated from, in its dtype: normalised, or as they are."""
    return UnitRows.apply(z, name) if unit else z.to(compute_dtype(z.dtype))


def _exchanged(z: Tensor) -> Tensor:
    """J z: the last two features in each other's place."""
    return torch.cat([z[:, :-2], z[:, -1:], z[:, -2:-1]], 1)


class RowLogSumExp(torch.autograd.Function):
    """(z [n, D], scale) -> float64 lse_i [n], or log sum_i exp(lse_i) over the rows of all ranks.

    Saved for backward: z in the dtype of the products, the gathered rows (many ranks), and one number a row.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        z: Tensor,  # [n, D]
        scale: Tensor,  # []
        dtype: torch.dtype,
        bound: float,
        exchange: bool,
        total: bool,
        ranks: Ranks | None,
        name: str,
    ) -> Tensor:
        z = z.to(dtype)
        columns = z if ranks is None else ranks.gather_rows(z)
        # Without other columns the kernels use the symmetry.
        columns = _exchanged(columns) if exchange else None if ranks is None else columns
        offset = 0 if ranks is None else ranks.first_row
        lse = ops.lse_forward(z, columns, scale, bound, offset, 0)
        ctx.bound, ctx.offset, ctx.total, ctx.ranks, ctx.name = bound, offset, total, ranks, name
        if total:
            lse = lse.logsumexp(0)
            if ranks is not None:
                lse = ranks.gather_number(lse).logsumexp(0)
        out = lse.clone()
        ctx.save_for_backward(z, columns, scale, lse, out)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor):
        with torch.no_grad():
            grads = _row_lse_backward(ctx, grad)
        return *refuse_double_backward(ctx.name, ctx.saved_tensors[-1], *grads), None, None, None, None, None, None


def _row_lse_backward(ctx: FunctionCtx, grad: Tensor):
    z, columns, scale, lse, _ = ctx.saved_tensors
    ranks: Ranks | None = ctx.ranks
    grad, w, w_columns = upstream_weights(grad, ctx.total, ranks)
    count = z.shape[0] if columns is None else columns.shape[0]
    if ctx.total:
        lse_rows, lse_columns = lse.expand(z.shape[0]).contiguous(), lse.expand(count).contiguous()
    else:
        lse_rows = lse_columns = lse
        if ranks is not None:
            lse_columns = ranks.gather_vector(lse.to(scale.dtype))
    if columns is None:
        lse_columns = w_columns = None
    weights = [None if x is None else x.to(scale.dtype) for x in (w, w_columns)]
    found = ops.lse_backward(z, columns, scale, ctx.bound, ctx.offset, 0, lse_rows, lse_columns, *weights)
    dz = (grad * scale).to(found.dtype) * found
    d_scale = None
    if ctx.needs_input_grad[1]:
        # Each S_ik stands in row i and in row k of what was found, hence the half.
        d_scale = (0.5 * grad * (z.to(found.dtype) * found).sum()).to(scale.dtype)
    return dz, d_scale
