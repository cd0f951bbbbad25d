"""The log-sum-exp over chosen columns, with repetition: hard negatives from a queue.

    lse_i = log sum_k exp(s <a_i, b_{c(i, k)}>) = log sum_j n_ij exp(s <a_i, b_j>),      n_ij how often row i chose
    column j

in plain torch, a chunk of rows at a time: no column is copied (at 256 rows and 65,536 choices of 128 features the
copies would take 8.6 GB), and counts are integers, whose sum is the same in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .chunked import row_chunks
from .double_backward import refuse_double_backward


def _weighted(a: Tensor, b: Tensor, scale: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(S, with -inf for columns that are not chosen, their counts) of a chunk of rows."""
    counts = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.int32, device=a.device)
    ones = torch.ones((), dtype=torch.int32, device=a.device).expand(chosen.shape)
    counts.scatter_add_(1, chosen.long(), ones)
    if a.is_cuda and a.dtype != scale.dtype:
        # Rows of 16 bits, products of 32: rounded, each would err by a thousandth.
        S = torch.mm(a, b.T, out_dtype=scale.dtype)
    else:
        S = a.to(scale.dtype) @ b.T.to(scale.dtype)
    S.mul_(scale)
    return S.masked_fill_(counts == 0, -torch.inf), counts


class SampledLogSumExp(torch.autograd.Function):
    """(a [n, D], scale; b [K, D], chosen [n, m] of 0 .. K - 1) -> float64 lse_i [n]. Columns get no gradient."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, a: Tensor, scale: Tensor, b: Tensor, chosen: Tensor, dtype: torch.dtype, name: str
    ) -> Tensor:
        a, b = a.to(dtype), b.to(dtype)
        lse = a.new_empty(a.shape[0], dtype=torch.float64)
        with torch.autocast(a.device.type, enabled=False):
            for start, stop in row_chunks(a.shape[0], b.shape[0]):
                S, counts = _weighted(a[start:stop], b, scale, chosen[start:stop])
                peak = S.amax(1)
                shift = torch.where(peak.isfinite(), peak, 0.0)
                lse[start:stop] = S.sub_(shift[:, None]).exp_().mul_(counts).sum(1).double().log_() + shift
        ctx.name = name
        out = lse.clone()
        ctx.save_for_backward(a, scale, b, chosen, lse, out)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor):
        a, scale, b, chosen, lse, out = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            da = a.new_empty(a.shape, dtype=scale.dtype)
            for start, stop in row_chunks(a.shape[0], b.shape[0]):
                S, counts = _weighted(a[start:stop], b, scale, chosen[start:stop])
                weights = S.sub_(lse[start:stop, None]).exp_().mul_(counts)
                da[start:stop] = weights @ b.to(scale.dtype)
            d_scale = (grad * (a.to(scale.dtype) * da).sum(1)).sum().to(scale.dtype)
            da.mul_((grad * scale).to(scale.dtype)[:, None])
        return *refuse_double_backward(ctx.name, out, (grad,), da, d_scale), None, None, None, None
