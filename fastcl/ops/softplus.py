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
from ..distributed import Ranks
from .double_backward import refuse_double_backward
from .similarity import shared_weights


class PairSoftplus(torch.autograd.Function):
    """(a [n, D], b [m, D] or None for a itself, scale, beta [n]) -> float64 f_i [n], or their sum over this rank's
    rows.

    `diagonal`: row i leaves out column i, its own (always without b). With ids, pairs of the same id only.
    Saved for backward: the operands in the dtype of the products, gathered columns (many ranks), two numbers a row;
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
            columns, ids_columns = (x if x is None else ranks.gather_rows(x) for x in (b, ids_b))
        else:
            # Without other columns the kernels use the symmetry.
            columns, ids_columns = (None, None) if ctx.symmetric else (b, ids_b)
        ctx.first = 0 if ranks is None else ranks.first_row
        offset = ctx.first if diagonal or ctx.symmetric else columns.shape[0]
        masks = {"ids_a": ids_a, "ids_b": ids_columns, "same": "keep" if ids_a is None else "only"}
        ctx.sign, ctx.offset, ctx.same, ctx.reduce = sign, offset, masks["same"], reduce
        ctx.diagonal, ctx.ranks, ctx.name = diagonal, ranks, name
        found: list[Tensor] = []
        if reduce and ranks is None and not ctx.symmetric and ctx.needs_input_grad[1]:
            sums, slopes, *found = ops.softplus_both(a, columns, scale, beta, sign, offset, **masks)
        else:
            sums, slopes = ops.softplus_forward(a, columns, scale, beta, sign, offset, **masks)
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
    masks = {"ids_a": ids_a, "ids_b": ids_columns, "same": ctx.same}
    every_beta = None if ranks is None else ranks.gather_vector(beta)
    wants_b = ctx.needs_input_grad[1] and not ctx.symmetric
    if not found and ranks is None and wants_b:
        _, _, *found = ops.softplus_both(a, columns, scale, beta, ctx.sign, ctx.offset, w, **masks)
    elif not found:
        # Of the same rows the columns' weights belong to the gradient as well.
        sides = (beta, every_beta, w, every_w) if ctx.symmetric and ranks is not None else (beta, None, w, None)
        found = [ops.softplus_backward(a, columns, scale, ctx.sign, ctx.offset, *sides, **masks)]
        if wants_b:
            ids_rows = None if ids_a is None else ranks.gather_rows(ids_a)
            swapped = {"ids_a": ids_b, "ids_b": ids_rows, "same": ctx.same}
            rows = ranks.gather_rows(a)
            offset = ctx.first if ctx.diagonal else rows.shape[0]
            found.append(
                ops.softplus_backward(b, rows, scale, ctx.sign, offset, None, every_beta, None, every_w, **swapped)
            )
    factor = (peak * ctx.sign * scale).to(found[0].dtype)
    d_scale = d_beta = None
    if ctx.needs_input_grad[2]:
        # Of the same rows each pair stands in two of them.
        share = 0.5 if ctx.symmetric else 1.0
        d_scale = (peak * ctx.sign * share * (a.to(found[0].dtype) * found[0]).sum()).to(scale.dtype)
    if ctx.needs_input_grad[3]:
        d_beta = (peak * (slopes if w is None else w * slopes)).to(beta.dtype)
    return factor * found[0], factor * found[1] if wants_b else None, d_scale, d_beta
