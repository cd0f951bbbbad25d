"""Sums of softplus over pairs: SigLIP, noise-contrastive estimation, one term for every positive of a row.

    f_i = sum_j softplus(sign * s <a_i, b_j> + beta_i),      i over this rank's rows, j over the columns of all ranks

No term depends on a normalisation, so in one process forward and gradients of both operands come from one visit of
each tile: 3 units of work in all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .. import ops
from ..distributed import Block, Ranks, blocks, columns_of
from .double_backward import refuse_double_backward
from .joining import add_up
from .similarity import shared_weights


class PairSoftplus(torch.autograd.Function):
    """(a [n, D], b [m, D], scale, beta [n]) -> float64 f_i [n], or their sum over this rank's rows. In one process b
    may be None, for a itself.

    `diagonal`: row i leaves out column i, its own (always without b). With ids, pairs of the same id only.
    Saved for backward: the operands in the dtype of the products, columns that were gathered, two numbers a row;
    for the sum in one process the gradients instead.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        a: Tensor,  # [n, D]
        b: Tensor | None,  # [m, D]
        scale: Tensor,  # []
        beta: Tensor,  # [n]
        ids_a: Tensor | None,  # [n] int64
        ids_b: Tensor | None,  # [m] int64
        sign: float,
        diagonal: bool,
        reduce: bool,
        dtype: torch.dtype,
        ranks: Ranks | None,
        name: str,
    ) -> Tensor:
        a = a.to(dtype)
        ctx.symmetric = b is None
        ids_b = ids_a if b is None else ids_b
        b = a if b is None else b.to(dtype)
        beta = beta.contiguous()
        if ranks is not None:
            columns, ids_columns = columns_of(ranks, b), None if ids_b is None else ranks.gather_rows(ids_b)
        else:
            # Without other columns the kernels use the symmetry.
            columns, ids_columns = (None, None) if ctx.symmetric else (b, ids_b)
        ctx.first = 0 if ranks is None else ranks.first_row
        ctx.sign, ctx.reduce, ctx.same = sign, reduce, "keep" if ids_a is None else "only"
        ctx.diagonal, ctx.ranks, ctx.name = diagonal or ctx.symmetric, ranks, name
        found: list[Tensor] = []
        if reduce and ranks is None and not ctx.symmetric and ctx.needs_input_grad[1]:
            offset = _offset(ctx, Block(columns, 0))
            sums, slopes, *found = ops.softplus_both(
                a, columns, scale, beta, sign, offset, ids_a=ids_a, ids_b=ids_columns, same=ctx.same
            )
        else:
            sums, slopes = add_up(
                ops.softplus_forward(
                    a, block.rows, scale, beta, sign, _offset(ctx, block),
                    ids_a=ids_a, ids_b=block.of(ids_columns), same=ctx.same,
                )
                for block in blocks(ranks, columns)
            )  # fmt: skip
        out = sums.sum() if reduce else sums.clone()
        ctx.save_for_backward(a, b, columns, scale, beta, ids_a, ids_b, ids_columns, slopes, out, *found)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor):
        with torch.no_grad():
            grads = _softplus_backward(ctx, grad)
        return *refuse_double_backward(ctx.name, ctx.saved_tensors[9], (grad,), *grads), *[None] * 8


def _softplus_backward(ctx: FunctionCtx, grad: Tensor):
    a, b, columns, scale, beta, ids_a, ids_b, ids_columns, slopes, _, *found = ctx.saved_tensors
    ranks: Ranks | None = ctx.ranks
    if ctx.reduce:
        peak, w, every_w = grad, None, None
    else:
        peak, (w,), (every_w,) = shared_weights([grad], ranks)
        w, every_w = w.to(scale.dtype), every_w.to(scale.dtype)
    every_beta = None if ranks is None else ranks.gather_rows(beta)
    wants_b = ctx.needs_input_grad[1] and not ctx.symmetric
    if not found and ranks is None and wants_b:
        _, _, *found = ops.softplus_both(
            a, columns, scale, beta, ctx.sign, _offset(ctx, Block(columns, 0)), w,
            ids_a=ids_a, ids_b=ids_columns, same=ctx.same,
        )  # fmt: skip
    elif not found:
        found = _one_side(ctx, a, columns, (beta, None, w, None), (ids_a, ids_columns))
        if wants_b:
            ids_rows = None if ids_a is None else ranks.gather_rows(ids_a)
            found += _one_side(ctx, b, columns_of(ranks, a), (None, every_beta, None, every_w), (ids_b, ids_rows))
    factor = (peak * ctx.sign * scale).to(found[0].dtype)
    d_scale = d_beta = None
    if ctx.needs_input_grad[2]:
        # Of the same rows each pair stands in two of them.
        share = 0.5 if ctx.symmetric else 1.0
        d_scale = (peak * ctx.sign * share * (a.to(found[0].dtype) * found[0]).sum()).to(scale.dtype)
    if ctx.needs_input_grad[3]:
        d_beta = (peak * (slopes if w is None else w * slopes)).to(beta.dtype)
    return factor * found[0], factor * found[1] if wants_b else None, d_scale, d_beta


def _one_side(ctx: FunctionCtx, rows: Tensor, columns: Tensor | None, sides: tuple, ids: tuple) -> list[Tensor]:
    """The gradient of the rows from beta and weights of (the rows, all columns)."""
    scale, (beta_a, beta_b, w_a, w_b) = ctx.saved_tensors[3], sides
    return add_up(
        [
            ops.softplus_backward(
                rows, block.rows, scale, ctx.sign, _offset(ctx, block),
                beta_a, block.of(beta_b), w_a, block.of(w_b), ids_a=ids[0], ids_b=block.of(ids[1]), same=ctx.same,
            )
        ]
        for block in blocks(ctx.ranks, columns)
    )  # fmt: skip


def _offset(ctx: FunctionCtx, block: Block) -> int:
    """Of the column that row 0 leaves out. One behind the last leaves none out."""
    return ctx.first - block.first if ctx.diagonal else block.rows.shape[0]
