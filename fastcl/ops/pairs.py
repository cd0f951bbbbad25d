"""Rows against columns that are other rows: the log-sum-exp of InfoNCE, CLIP and memory banks.

    lse_i = log sum_j exp(S_ij),   S_ij = s <a_i, b_j> + bias_j

j over the columns of all ranks, or over columns that every rank holds (a queue, a bank: they get no gradient). With
`both` the columns' log-sum-exp over the rows of all ranks comes out of the same products.

Both operands get their gradient from W_ij = w_i exp(S_ij - lse_i) + w_j exp(S_ij - lse_j): W b and W^T a. In one
process each product is formed once, 4 units of work forward and backward. Over ranks each rank forms the rows of W
for its a and the columns for its b, from gathered rows and two numbers a row; gradients stay where they are needed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .. import ops
from ..distributed import Ranks
from .double_backward import refuse_double_backward
from .similarity import shared_weights


class PairLogSumExp(torch.autograd.Function):
    """(a [n, D], b [m, D], scale) -> float64 lse_i [n], with `both` also lse_j [m].

    `diagonal`: row i leaves out column i, its own. ids, bias: of this rank's rows and columns. Saved for backward:
    the operands in the dtype of the products, gathered columns (many ranks), and a few numbers a row.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        a: Tensor,  # [n, D]
        b: Tensor,  # [m, D]
        scale: Tensor,  # []
        ids_a: Tensor | None,  # [n] int64
        ids_b: Tensor | None,  # [m] int64; None: ids_a
        bias: Tensor | None,  # [m]
        both: bool,
        diagonal: bool,
        dtype: torch.dtype,
        bound: float,
        ranks: Ranks | None,
        name: str,
    ) -> Tensor | tuple[Tensor, Tensor]:
        a, b = a.to(dtype), b.to(dtype)
        ids_b = ids_a if ids_b is None else ids_b
        columns, ids_columns, biases = (
            x if x is None or ranks is None else ranks.gather_rows(x) for x in (b, ids_b, bias)
        )
        ctx.first = 0 if ranks is None else ranks.first_row
        # An offset behind the last column leaves none out.
        ctx.offset = ctx.first if diagonal else columns.shape[0]
        ctx.same = "keep" if ids_a is None else "drop"
        found = ops.lse_forward(
            a, columns, scale, bound, ctx.offset, 0,
            ids_a=ids_a, ids_b=ids_columns, same=ctx.same, bias=biases, columns=both,
        )  # fmt: skip
        if both and ranks is not None:
            found[1] = ranks.logsumexp(found[1])[ctx.first : ctx.first + b.shape[0]]
        ctx.both, ctx.diagonal, ctx.bound, ctx.ranks, ctx.name = both, diagonal, bound, ranks, name
        found = [lse.clone() for lse in found]
        ctx.save_for_backward(a, b, columns, scale, ids_a, ids_b, ids_columns, bias, biases, *found)
        return tuple(found) if both else found[0]

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor):
        with torch.no_grad():
            found = _pair_backward(ctx, list(grads))
        return *refuse_double_backward(ctx.name, ctx.saved_tensors[9], grads, *found), *[None] * 9


def _pair_backward(ctx: FunctionCtx, grads: list[Tensor]):
    a, b, columns, scale, ids_a, ids_b, ids_columns, bias, biases, *lse = ctx.saved_tensors
    ranks: Ranks | None = ctx.ranks
    wants_b = ctx.needs_input_grad[1]
    if ranks is None and len(grads) == 1:
        peak, (w_rows,), _ = shared_weights(grads, None)
        w, every_w, every_lse = [w_rows, None], [w_rows, None], [lse[0], None]
    elif ranks is None:
        peak = torch.stack([grad.abs().amax() if grad.numel() else grad.new_zeros(()) for grad in grads]).amax()
        peak = torch.where(peak == 0, torch.ones_like(peak), peak)
        w = every_w = [grad / peak for grad in grads]
        every_lse = lse
    else:
        peak, w, every_w = shared_weights(grads, ranks)
        every_lse = list(ranks.gather_rows(torch.stack(lse, 1).to(scale.dtype)).T.contiguous().unbind(0))
        # One direction has no weights of the columns.
        w, every_w, every_lse = (x + [None] if len(x) == 1 else x for x in (w, every_w, every_lse))
    w, every_w = ([None if x is None else x.to(scale.dtype) for x in v] for v in (w, every_w))
    masks = {"ids_a": ids_a, "ids_b": ids_columns, "same": ctx.same, "bias": biases}
    fused = wants_b and ranks is None
    found = ops.lse_backward(
        a, columns, scale, ctx.bound, ctx.offset, 0, lse[0], every_lse[1], w[0], every_w[1], **masks, columns=fused
    )
    factor = (peak * scale).to(found[0].dtype)
    d_scale = None
    if ctx.needs_input_grad[2]:
        d_scale = (peak * (a.to(found[0].dtype) * found[0]).sum()).to(scale.dtype)
    db = None
    if fused:
        db = factor * found[1]
    elif wants_b:
        db = factor * _columns_over_ranks(ctx, w, every_w, lse, every_lse)
    return factor * found[0], db, d_scale


def _columns_over_ranks(ctx: FunctionCtx, w: list, every_w: list, lse: list[Tensor], every_lse: list) -> Tensor:
    """W^T a for this rank's columns, with the rows of all ranks."""
    a, b, _, scale, ids_a, ids_b, _, bias, *_ = ctx.saved_tensors
    rows = ctx.ranks.gather_rows(a)
    ids_rows = None if ids_a is None else ctx.ranks.gather_rows(ids_a)
    if bias is not None:
        # The kernels' bias belongs to columns: here one more product than needed is formed, W b.
        offset = -ctx.first if ctx.diagonal else b.shape[0]
        return ops.lse_backward(
            rows, b, scale, ctx.bound, offset, 0, every_lse[0], None, every_w[0], None,
            ids_a=ids_rows, ids_b=ids_b, same=ctx.same, bias=bias, columns=True,
        )[1]  # fmt: skip
    # Rows and columns in each other's place; an lse of -inf takes no part.
    own = lse[1] if ctx.both else lse[0].new_full((b.shape[0],), -torch.inf)
    (found,) = ops.lse_backward(
        b, rows, scale, ctx.bound, ctx.first if ctx.diagonal else rows.shape[0], 0, own, every_lse[0], w[1], every_w[0],
        ids_a=ids_b, ids_b=ids_rows, same=ctx.same,
    )  # fmt: skip
    return found
