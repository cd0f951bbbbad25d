"""The specification: every loss and every kernel in plain PyTorch, building the full similarity matrix.

Slow and memory-hungry on purpose. It runs in any floating dtype, differentiates by autograd, and is what the
tests hold the kernels against in float64. Notation: N pairs, M = 2N rows z (view 1 first), s = 1 / temperature,
S = s * z @ z.T, p(i) = (i + N) mod M the partner of row i.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12


def normalize(x: Tensor) -> Tensor:
    """x / max(||x||, 1e-12) row by row. A row shorter than that is a constant: it gets no gradient."""
    # Scaled by the largest entry, so that squares neither overflow nor vanish.
    peak = x.detach().abs().amax(1, keepdim=True)
    peak = torch.where(peak == 0, torch.ones_like(peak), peak)
    norm = torch.linalg.vector_norm(x / peak, dim=1, keepdim=True) * peak
    short = norm < EPS
    return torch.where(short, x.detach() / EPS, x / torch.where(short, torch.ones_like(norm), norm))


def similarity_lse(a: Tensor, b: Tensor, scale: Tensor | float, offset: int, pair: int = 0) -> Tensor:
    """lse_i = log sum over the allowed j of exp(scale * <a_i, b_j>)."""
    return masked_similarity(a, b, scale, offset, pair).logsumexp(1)


def masked_similarity(a: Tensor, b: Tensor, scale: Tensor | float, offset: int, pair: int = 0) -> Tensor:
    """scale * a @ b.T with -inf where row i meets itself, column i + offset, and with pair > 0 also its partner,
    column partner(i) + offset: i + pair in the first `pair` rows, i - pair in the others."""
    row = torch.arange(a.shape[0], device=a.device)[:, None]
    column = torch.arange(b.shape[0], device=a.device)[None, :]
    left_out = column == row + offset
    if pair:
        left_out |= column == torch.where(row < pair, row + pair, row - pair) + offset
    return (scale * a @ b.T).masked_fill(left_out, float("-inf"))


def similarity_lse_backward(
    a: Tensor, b: Tensor, scale: Tensor | float, offset: int,
    lse_a: Tensor, lse_b: Tensor | None, w_a: Tensor | None = None, w_b: Tensor | None = None, pair: int = 0,
) -> Tensor:  # fmt: skip
    """G_i = sum_j (w_a_i exp(S_ij - lse_a_i) + w_b_j exp(S_ij - lse_b_j)) b_j, masked as in the forward."""
    S = masked_similarity(a, b, scale, offset, pair)
    # An empty row has lse = -inf and takes no part.
    weights = torch.exp(S - lse_a.masked_fill(lse_a == -torch.inf, torch.inf)[:, None])
    if w_a is not None:
        weights = weights * w_a[:, None]
    if lse_b is not None:
        other = torch.exp(S - lse_b.masked_fill(lse_b == -torch.inf, torch.inf)[None, :])
        weights = weights + (other if w_b is None else other * w_b[None, :])
    return weights @ b


def stack_views(z1: Tensor, z2: Tensor, normalize_rows: bool = True) -> Tensor:
    """The M = 2N rows of both views, view 1 first, unit-normalised unless told otherwise."""
    rows = torch.cat([z1, z2])
    return normalize(rows) if normalize_rows else rows


def positives(z: Tensor) -> Tensor:
    """<z_i, z_p(i)> for all M rows."""
    return (z * z.roll(z.shape[0] // 2, 0)).sum(1)


def reduce_rows(rows: Tensor, reduction: str) -> Tensor:
    return {"mean": rows.mean, "sum": rows.sum, "none": rows.clone}[reduction]()


def nt_xent(
    z1: Tensor, z2: Tensor, temperature: Tensor | float = 0.1, *, normalize: bool = True, reduction: str = "mean"
) -> Tensor:
    """NT-Xent (P1 Eq. 1): mean_i [log sum_{k != i} exp(S_ik) - S_i,p(i)], the positive in the denominator."""
    z = stack_views(z1, z2, normalize)
    scale = 1 / temperature
    rows = similarity_lse(z, z, scale, 0) - scale * positives(z)
    return reduce_rows(rows, reduction)
