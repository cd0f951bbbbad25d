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
from ..distributed import Block, Ranks, blocks, columns_of
from .double_backward import refuse_double_backward
from .joining import add_up, join_lse
from .similarity import largest, shared_weights


class PairLogSumExp(torch.autograd.Function):
    """(a [n, D], b [m, D], scale) -> float64 lse_i [n], with `both` also lse_j [m].

    `diagonal`: row i leaves out column i, its own. ids, bias: of this rank's rows and columns. Saved for backward:
    the operands in the dtype of the products, columns that were gathered, and a few numbers a row.
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
        columns = columns_of(ranks, b)
        ids_columns, biases = (x if x is None or ranks is None else ranks.gather_rows(x) for x in (ids_b, bias))
        ctx.first = 0 if ranks is None else ranks.first_row
        ctx.diagonal, ctx.same = diagonal, "keep" if ids_a is None else "drop"
        ends = []

        def visited():
            for block in blocks(ranks, columns):
                found, *end = ops.lse_forward(
                    a, block.rows, scale, bound, _offset(ctx, block), 0,
                    ids_a=ids_a, ids_b=block.of(ids_columns), same=ctx.same, bias=block.of(biases), columns=both,
                )  # fmt: skip
                ends.extend((block.first, x) for x in end)
                yield [found]

        found = join_lse(visited())
        if both:
            ends = torch.cat([x for _, x in sorted(ends, key=lambda end: end[0])])
            if ranks is not None:
                ends = ranks.logsumexp(ends)[ctx.first : ctx.first + b.shape[0]]
            found.append(ends)
        ctx.both, ctx.bound, ctx.ranks, ctx.name = both, bound, ranks, name
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
        peak = largest(*grads)
        w = every_w = [grad / peak for grad in grads]
        every_lse = lse
    else:
        peak, w, every_w = shared_weights(grads, ranks)
        every_lse = list(ranks.gather_rows(torch.stack(lse, 1).to(scale.dtype)).T.contiguous().unbind(0))
        # One direction has no weights of the columns.
        w, every_w, every_lse = (x + [None] if len(x) == 1 else x for x in (w, every_w, every_lse))
    w, every_w = ([None if x is None else x.to(scale.dtype) for x in v] for v in (w, every_w))
    fused = wants_b and ranks is None
    found = add_up(
        ops.lse_backward(
            a, block.rows, scale, ctx.bound, _offset(ctx, block), 0,
            lse[0], block.of(every_lse[1]), w[0], block.of(every_w[1]),
            ids_a=ids_a, ids_b=block.of(ids_columns), same=ctx.same, bias=block.of(biases), columns=fused,
        )
        for block in blocks(ranks, columns)
    )  # fmt: skip
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


def _offset(ctx: FunctionCtx, block: Block) -> int:
    """Of the column that row 0 leaves out. One behind the last leaves none out."""
    return ctx.first - block.first if ctx.diagonal else block.rows.shape[0]


def _columns_over_ranks(ctx: FunctionCtx, w: list, every_w: list, lse: list[Tensor], every_lse: list) -> Tensor:
    """W^T a for this rank's columns, with the rows of all ranks."""
    a, b, _, scale, ids_a, ids_b, _, bias, *_ = ctx.saved_tensors
    ids_rows = None if ids_a is None else ctx.ranks.gather_rows(ids_a)
    # Rows and columns in each other's place; an lse of -inf takes no part.
    own = lse[1] if ctx.both else lse[0].new_full((b.shape[0],), -torch.inf)

    def visited(block: Block) -> list[Tensor]:
        ids = block.of(ids_rows)
        if bias is not None:
            # The kernels' bias belongs to columns: here one more product than needed is formed, W b.
            offset = block.first - ctx.first if ctx.diagonal else b.shape[0]
            return ops.lse_backward(
                block.rows, b, scale, ctx.bound, offset, 0, block.of(every_lse[0]), None, block.of(every_w[0]), None,
                ids_a=ids, ids_b=ids_b, same=ctx.same, bias=bias, columns=True,
            )[1:]  # fmt: skip
        return ops.lse_backward(
            b, block.rows, scale, ctx.bound, _offset(ctx, block), 0,
            own, block.of(every_lse[0]), w[1], block.of(every_w[0]), ids_a=ids_b, ids_b=ids, same=ctx.same,
        )  # fmt: skip

    (found,) = add_up(visited(block) for block in blocks(ctx.ranks, columns_of(ctx.ranks, a)))
    return found
