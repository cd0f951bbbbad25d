"""All ops in plain torch, a chunk of rows at a time: no full matrix, any device, any floating dtype.

The fallback where no kernel serves: CPU tensors without the compiled extension, CUDA tensors without Triton
or without the CUDA kernels of the sorts, and float64 on CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of the largest temporary: large enough for fast matrix products, small beside any batch.
CHUNK_ELEMENTS = 4 * 2**20
EPS = 1e-12


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x / max(||x||, EPS), 1 / ||x|| or 0 for rows shorter than EPS), in the dtype that losses calculate in."""
    z = x.to(compute_dtype(x.dtype))
    peak = torch.linalg.vector_norm(z, torch.inf, dim=1, keepdim=True)
    peak = torch.where(peak == 0, 1.0, peak)
    # Scaled by the largest entry, so that squares neither overflow nor vanish.
    z = z / peak
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True) * peak
    return z.mul_(peak / norm.clamp_min(EPS)), torch.where(norm < EPS, 0.0, 1 / norm)[:, 0]


def normalize_pair(x1: Tensor, x2: Tensor, normalize: bool):
    z = torch.cat([x1, x2]).to(compute_dtype(x1.dtype))
    rnorm = z.new_empty(0)
    if normalize:
        z, rnorm = unit_rows(z)
    n = x1.shape[0]
    return z, rnorm, (z[:n] * z[n:]).sum(1)


def _row_chunks(rows: int, cols: int):
    step = max(1, CHUNK_ELEMENTS // max(cols, 1))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _similarity(a: Tensor, b: Tensor, scale: Tensor, start: int, stop: int, offset: int, pair: int) -> Tensor:
    """scale * a[start:stop] @ b.T, with -inf where a row meets itself or its partner."""
    S = (a[start:stop] @ b.T).mul_(scale)
    _mask_diagonal(S, start + offset)
    if pair:
        middle = min(max(pair - start, 0), stop - start)
        _mask_diagonal(S[:middle], start + offset + pair)
        _mask_diagonal(S[middle:], start + middle + offset - pair)
    return S


def _mask_diagonal(S: Tensor, first: int) -> None:
    """S[i, first + i] = -inf for every such column that exists."""
    count = min(S.shape[0], S.shape[1] - first)
    if count > 0:
        S[:count, first : first + count].fill_diagonal_(float("-inf"))


def lse_forward(a: Tensor, b: Tensor | None, scale: Tensor, bound: float, offset: int, pair: int) -> Tensor:
    a = a.to(compute_dtype(a.dtype))
    b = a if b is None else b.to(a.dtype)
    lse = a.new_empty(a.shape[0], dtype=torch.float64)
    with torch.autocast(a.device.type, enabled=False):
        for start, stop in _row_chunks(a.shape[0], b.shape[0]):
            S = _similarity(a, b, scale, start, stop, offset, pair)
            # logsumexp by hand: its result would be rounded to the type of S.
            peak = S.amax(1) if S.shape[1] else S.new_full((stop - start,), -torch.inf)
            shift = torch.where(peak.isfinite(), peak, 0.0)
            sums = S.sub_(shift[:, None]).exp_().sum(1)
            lse[start:stop] = sums.double().log_() + shift
    return lse


def _row_weight(lse: Tensor, w: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(k, u) with u * exp(S - k) = w * exp(S - lse), and k exact in dtype: lse loses nothing to rounding."""
    k = lse.floor()
    u = (k - lse).exp()
    # An empty row has lse = -inf and takes no part.
    u = torch.where(lse == -torch.inf, 0.0, u if w is None else u * w).to(dtype)
    return torch.where(lse == -torch.inf, torch.inf, k).to(dtype), u


def lse_backward(
    a: Tensor, b: Tensor | None, scale: Tensor, bound: float, offset: int, pair: int,
    lse_a: Tensor, lse_b: Tensor | None, w_a: Tensor | None, w_b: Tensor | None,
) -> Tensor:  # fmt: skip
    a = a.to(compute_dtype(a.dtype))
    if b is None:
        b, lse_b, w_b = a, lse_a, w_a
    b = b.to(a.dtype)
    k_a, u_a = _row_weight(lse_a, w_a, a.dtype)
    k_b, u_b = (None, None) if lse_b is None else _row_weight(lse_b, w_b, a.dtype)
    grad = torch.empty_like(a)
    with torch.autocast(a.device.type, enabled=False):
        for start, stop in _row_chunks(a.shape[0], b.shape[0]):
            S = _similarity(a, b, scale, start, stop, offset, pair)
            weights = (S - k_a[start:stop, None]).exp_().mul_(u_a[start:stop, None])
            if k_b is not None:
                weights += S.sub_(k_b[None, :]).exp_().mul_(u_b[None, :])
            grad[start:stop] = weights @ b
    return grad


def pair_backward(z: Tensor, rnorm: Tensor, grad_lse: Tensor, lse_coef: Tensor, pull: Tensor, dtype: torch.dtype):
    n = z.shape[0] // 2
    dz = lse_coef * grad_lse - (pull + pull.roll(n))[:, None] * z.roll(n, 0)
    if rnorm.numel():
        dz = (dz - z * (z * dz).sum(1, keepdim=True)) * rnorm[:, None]
    dx = dz.to(dtype)
    # Two results must not share memory.
    return dx[:n].clone(), dx[n:].clone(), (z * grad_lse).sum(1)


def segmented_sort(x: Tensor, descending: bool) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(x, dim=1, descending=descending, stable=True)
    return values.contiguous(), indices.int().contiguous()


def wasserstein_1d(x: Tensor, y: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """Cell r of x, [r K, (r + 1) K) in units of 1 / (M K), meets the cells (r K) // M + 0, 1, ... of y, at most
    K // M + 2 of them: their overlaps are the weights of one small sum a row, in the same order on every run."""
    (p, m), k = x.shape, y.shape[1]
    reach = 1 if k == m else k // m + 2
    row = torch.arange(m, device=x.device)[:, None] * k
    column = row // m + torch.arange(reach, device=x.device)
    overlap = torch.minimum(row + k, (column + 1) * m) - torch.maximum(row, column * m)
    column, weight = column.clamp(max=k - 1), overlap.clamp(min=0).to(x.dtype) / (m * k)
    grad = x.new_empty(x.shape)
    cost = x.new_empty(x.shape) if per_row else x.new_empty(p, dtype=torch.float64)
    step = max(1, CHUNK_ELEMENTS // (m * reach))
    for start in range(0, p, step):
        rows = slice(start, start + step)
        ordered, place = torch.sort(x[rows], dim=1, stable=True)
        other = torch.sort(y[rows], dim=1).values[:, column]
        # An infinite distance over an overlap of no width is 0, not NaN.
        distance = torch.where(weight > 0, ordered[:, :, None] - other, 0.0)
        slope = distance * weight
        grad[rows].scatter_(1, place, 2 * slope.sum(2))
        share = (slope * distance).sum(2)
        if per_row:
            cost[rows].scatter_(1, place, share)
        else:
            # In pieces too short to be split over threads, whose number would show in the last digits.
            pieces = [piece.sum(1, dtype=torch.float64) for piece in share.split(2**14, 1)]
            cost[rows] = torch.stack(pieces).sum(0)
    return cost, grad
