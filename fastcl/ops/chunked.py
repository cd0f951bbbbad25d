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


def unit_rows(x: Tensor, rounded: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(x / max(||x||, EPS), 1 / ||x|| or 0 for rows shorter than EPS), in the dtype that losses calculate in."""
    z = x.to(compute_dtype(x.dtype))
    peak = torch.linalg.vector_norm(z, torch.inf, dim=1, keepdim=True)
    peak = torch.where(peak == 0, 1.0, peak)
    # Scaled by the largest entry, so that squares neither overflow nor vanish, nor the length itself overflows.
    z = z / peak
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    short = norm * peak < EPS
    z.mul_(torch.where(short, peak / EPS, 1 / norm))
    return (z if rounded is None else z.to(rounded).to(z.dtype)), torch.where(short, 0.0, 1 / norm / peak)[:, 0]


def unit_rows_backward(z: Tensor, rnorm: Tensor, dz: Tensor, dtype: torch.dtype) -> Tensor:
    along = (z * dz).sum(1, keepdim=True)
    return dz.addcmul(z, along, value=-1).mul_(rnorm[:, None]).to(dtype)


def normalize_pair(x1: Tensor, x2: Tensor, normalize: bool):
    z = torch.cat([x1, x2]).to(compute_dtype(x1.dtype))
    rnorm = z.new_empty(0)
    if normalize:
        z, rnorm = unit_rows(z)
    n = x1.shape[0]
    return z, rnorm, (z[:n] * z[n:]).sum(1)


def row_chunks(rows: int, cols: int):
    step = max(1, CHUNK_ELEMENTS // max(cols, 1))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _similarity(
    a: Tensor, b: Tensor, scale: Tensor, start: int, stop: int, offset: int, pair: int = 0, bias: Tensor | None = None
) -> Tensor:
    """scale * a[start:stop] @ b.T + bias, with -inf where a row meets itself or its partner."""
    S = (a[start:stop] @ b.T).mul_(scale)
    if bias is not None:
        S += bias
    _mask_diagonal(S, start + offset)
    if pair:
        middle = min(max(pair - start, 0), stop - start)
        _mask_diagonal(S[:middle], start + offset + pair)
        _mask_diagonal(S[middle:], start + middle + offset - pair)
    return S


def _mask_diagonal(S: Tensor, first: int) -> None:
    """S[i, first + i] = -inf for every such column that exists."""
    S = S[max(-first, 0) :, max(first, 0) :]
    if S.numel():
        S[: S.shape[1], : S.shape[0]].fill_diagonal_(-torch.inf)


def _same_ids(S: Tensor, ids_a: Tensor, ids_b: Tensor, start: int, stop: int, same: str) -> Tensor:
    """Where row and column have the same id and are allowed; leaves pairs out of S as `same` says."""
    equal = ids_a[start:stop, None] == ids_b[None, :]
    if same == "drop":
        S.masked_fill_(equal, -torch.inf)
    elif same == "only":
        S.masked_fill_(~equal, -torch.inf)
    return equal.logical_and_(S != -torch.inf)


def _columns(a: Tensor, b: Tensor | None, ids_a: Tensor | None, ids_b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, ids of b) in the dtype of the calculation; without b the columns are the rows."""
    a = a.to(compute_dtype(a.dtype))
    return (a, a, ids_a) if b is None else (a, b.to(a.dtype), ids_b)


def _shift(peak: Tensor) -> Tensor:
    return torch.where(peak.isfinite(), peak, 0.0)


class _ColumnSums:
    """Log-sum-exp of every column, a chunk of rows after the other, relative to a running maximum."""

    def __init__(self, like: Tensor, columns: int):
        self.peak = like.new_full((columns,), -torch.inf)
        self.sums = like.new_zeros(columns, dtype=torch.float64)

    def add(self, S: Tensor) -> None:
        if S.shape[0]:
            peak = torch.maximum(self.peak, S.amax(0))
            self.sums *= (_shift(self.peak) - _shift(peak)).double().exp()
            self.sums += (S - _shift(peak)).exp().sum(0)
            self.peak = peak

    def finish(self) -> Tensor:
        return self.sums.log() + _shift(self.peak)


def lse_forward(
    a: Tensor, b: Tensor | None, scale: Tensor, bound: float, offset: int, pair: int, *,
    ids_a: Tensor | None = None, ids_b: Tensor | None = None, same: str = "keep", bias: Tensor | None = None,
    columns: bool = False,
) -> list[Tensor]:  # fmt: skip
    a, b, ids_b = _columns(a, b, ids_a, ids_b)
    lse = a.new_empty(a.shape[0], dtype=torch.float64)
    positives, counts = torch.zeros_like(lse), torch.zeros_like(lse, dtype=torch.int64)
    column_sums = _ColumnSums(a, b.shape[0]) if columns else None
    with torch.autocast(a.device.type, enabled=False):
        for start, stop in row_chunks(a.shape[0], b.shape[0]):
            S = _similarity(a, b, scale, start, stop, offset, pair, bias)
            if same != "keep":
                equal = _same_ids(S, ids_a, ids_b, start, stop, same)
            if same == "sum":
                products = torch.where(equal, S if bias is None else S - bias, 0.0)
                positives[start:stop] = products.sum(1, dtype=torch.float64) / scale
                counts[start:stop] = equal.sum(1)
            if columns:
                column_sums.add(S)
            # logsumexp by hand: its result would be rounded to the type of S.
            shift = _shift(S.amax(1) if S.shape[1] else S.new_full((stop - start,), -torch.inf))
            sums = S.sub_(shift[:, None]).exp_().sum(1)
            lse[start:stop] = sums.double().log_() + shift
    if same == "sum":
        return [lse, positives, counts]
    return [lse, column_sums.finish()] if columns else [lse]


def _row_weight(lse: Tensor, w: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(k, u) with u * exp(S - k) = w * exp(S - lse), and k exact in dtype: lse loses nothing to rounding."""
    k = lse.floor()
    u = (k - lse).exp()
    # An empty row has lse = -inf and takes no part.
    u = torch.where(lse == -torch.inf, 0.0, u if w is None else u * w).to(dtype)
    return torch.where(lse == -torch.inf, torch.inf, k).to(dtype), u


def lse_backward(
    a: Tensor, b: Tensor | None, scale: Tensor, bound: float, offset: int, pair: int,
    lse_a: Tensor, lse_b: Tensor | None, w_a: Tensor | None, w_b: Tensor | None, *,
    ids_a: Tensor | None = None, ids_b: Tensor | None = None, same: str = "keep", bias: Tensor | None = None,
    pull_a: Tensor | None = None, pull_b: Tensor | None = None, columns: bool = False,
) -> list[Tensor]:  # fmt: skip
    if b is None:
        lse_b, w_b, pull_b = lse_a, w_a, pull_a
    a, b, ids_b = _columns(a, b, ids_a, ids_b)
    k_a, u_a = _row_weight(lse_a, w_a, a.dtype)
    k_b, u_b = (None, None) if lse_b is None else _row_weight(lse_b, w_b, a.dtype)
    grad, grad_columns = torch.empty_like(a), torch.zeros_like(b) if columns else None
    with torch.autocast(a.device.type, enabled=False):
        for start, stop in row_chunks(a.shape[0], b.shape[0]):
            S = _similarity(a, b, scale, start, stop, offset, pair, bias)
            equal = None if same == "keep" else _same_ids(S, ids_a, ids_b, start, stop, same)
            weights = (S - k_a[start:stop, None]).exp_().mul_(u_a[start:stop, None])
            if k_b is not None:
                weights += S.sub_(k_b[None, :]).exp_().mul_(u_b[None, :])
            if pull_a is not None:
                pull = pull_a[start:stop, None] if pull_b is None else pull_a[start:stop, None] + pull_b[None, :]
                weights -= torch.where(equal, pull, 0.0)
            grad[start:stop] = weights @ b
            if columns:
                grad_columns.addmm_(weights.T, a[start:stop])
    return [grad, grad_columns] if columns else [grad]


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact at both ends."""
    return x.clamp(min=0).add_(x.abs().neg_().exp_().log1p_())


def _softplus_chunks(
    a: Tensor, b: Tensor, scale: Tensor, sign: float, offset: int, ids_a: Tensor | None, ids_b: Tensor | None, same: str
):  # fmt: skip
    """(start, stop, sign * S, with -inf for the pairs that are left out)."""
    with torch.autocast(a.device.type, enabled=False):
        for start, stop in row_chunks(a.shape[0], b.shape[0]):
            S = _similarity(a, b, scale, start, stop, offset)
            if same != "keep":
                _same_ids(S, ids_a, ids_b, start, stop, same)
            yield start, stop, S if sign > 0 else torch.where(S == -torch.inf, S, -S)


def softplus_forward(
    a: Tensor, b: Tensor | None, scale: Tensor, beta: Tensor, sign: float, offset: int, *,
    ids_a: Tensor | None = None, ids_b: Tensor | None = None, same: str = "keep",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    a, b, ids_b = _columns(a, b, ids_a, ids_b)
    sums, slopes = (a.new_empty(a.shape[0], dtype=torch.float64) for _ in range(2))
    for start, stop, S in _softplus_chunks(a, b, scale, sign, offset, ids_a, ids_b, same):
        S += beta[start:stop, None]
        sums[start:stop] = _softplus(S).sum(1, dtype=torch.float64)
        slopes[start:stop] = S.sigmoid_().sum(1, dtype=torch.float64)
    return sums, slopes


def softplus_backward(
    a: Tensor, b: Tensor | None, scale: Tensor, sign: float, offset: int,
    beta_a: Tensor | None, beta_b: Tensor | None, w_a: Tensor | None, w_b: Tensor | None, *,
    ids_a: Tensor | None = None, ids_b: Tensor | None = None, same: str = "keep",
) -> Tensor:  # fmt: skip
    if b is None:
        beta_b, w_b = beta_a, w_a
    a, b, ids_b = _columns(a, b, ids_a, ids_b)
    grad = torch.empty_like(a)
    for start, stop, S in _softplus_chunks(a, b, scale, sign, offset, ids_a, ids_b, same):
        weights = torch.zeros_like(S)
        if beta_a is not None:
            slope = (S + beta_a[start:stop, None]).sigmoid_()
            weights += slope if w_a is None else slope * w_a[start:stop, None]
        if beta_b is not None:
            slope = S.add_(beta_b).sigmoid_()
            weights += slope if w_b is None else slope * w_b
        grad[start:stop] = weights @ b
    return grad


def softplus_both(
    a: Tensor, b: Tensor, scale: Tensor, beta: Tensor, sign: float, offset: int, w: Tensor | None = None, *,
    ids_a: Tensor | None = None, ids_b: Tensor | None = None, same: str = "keep",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    a, b, ids_b = _columns(a, b, ids_a, ids_b)
    sums, slopes = (a.new_empty(a.shape[0], dtype=torch.float64) for _ in range(2))
    grad_a, grad_b = torch.empty_like(a), torch.zeros_like(b)
    for start, stop, S in _softplus_chunks(a, b, scale, sign, offset, ids_a, ids_b, same):
        S += beta[start:stop, None]
        sums[start:stop] = _softplus(S).sum(1, dtype=torch.float64)
        weights = S.sigmoid_()
        slopes[start:stop] = weights.sum(1, dtype=torch.float64)
        if w is not None:
            weights *= w[start:stop, None]
        grad_a[start:stop] = weights @ b
        grad_b.addmm_(weights.T, a[start:stop])
    return sums, slopes, grad_a, grad_b


def similarity_stats(a: Tensor, b: Tensor | None, scale: Tensor, offset: int, pair: int):
    a, b, _ = _columns(a, b, None, None)
    lse, best, mean = (a.new_empty(a.shape[0], dtype=torch.float64) for _ in range(3))
    with torch.autocast(a.device.type, enabled=False):
        for start, stop in row_chunks(a.shape[0], b.shape[0]):
            S = _similarity(a, b, scale, start, stop, offset, pair)
            peak = S.amax(1) if S.shape[1] else S.new_full((stop - start,), -torch.inf)
            e = (S - _shift(peak)[:, None]).exp_()
            sums = e.sum(1, dtype=torch.float64)
            best[start:stop], lse[start:stop] = peak, sums.log() + _shift(peak)
            weighted = (e * torch.where(S == -torch.inf, 0.0, S)).sum(1, dtype=torch.float64)
            mean[start:stop] = torch.where(sums == 0, 0.0, weighted / sums)
    return lse, best, mean


def _rest(scale: Tensor, weight: float, pull: float | None) -> Tensor | float:
    """What the log-sum-exp leaves of the positive. In float64: it is 0 where the loss is a multiple of NT-Xent."""
    return 0.0 if pull is None else pull - weight * scale.double()


def pair_loss(
    pos: Tensor, lse: Tensor, scale: Tensor, weight: float, pull: float | None, positive_counts: bool,
    divisor: int | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # One number a row: float64 is free, and nothing rounds what the kernels computed.
    pos = torch.cat([pos, pos]).double()
    x = lse - scale * pos
    # One pair alone has no negatives: x = -inf, loss 0 and gradient 0, to the bit.
    if positive_counts:
        rows, share = _softplus(x), x.sigmoid()
        whole = scale * pos + rows
    else:
        alone = x == -torch.inf
        rows, whole, share = x.masked_fill(alone, 0.0), lse.clone(), alone.logical_not().double()
    loss = weight * rows - _rest(scale, weight, pull) * pos
    return (loss if divisor is None else loss.sum() / divisor).to(dtype), whole, share


def pair_backward(
    z: Tensor, rnorm: Tensor, grad_lse: Tensor, pos: Tensor, share: Tensor, scale: Tensor, grad: Tensor,
    w: Tensor | None, weight: float, pull: float | None, divisor: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n = z.shape[0] // 2
    grad = grad.double() / divisor
    upstream = grad if w is None else grad * w
    pulls = (upstream * (weight * scale * share + _rest(scale, weight, pull))).to(z.dtype)
    dz = (grad * weight * scale).to(z.dtype) * grad_lse - (pulls + pulls.roll(n))[:, None] * z.roll(n, 0)
    if rnorm.numel():
        dz = (dz - z * (z * dz).sum(1, keepdim=True)) * rnorm[:, None]
    dx = dz.to(dtype)
    # Each product stands in row i and in row k of grad_lse, hence the half. The positive: - (1 - p) where the scale
    # pulls it too, p of the log-sum-exp alone.
    own = -share if pull is None else 1 - share
    slope = weight * (0.5 * grad * (z * grad_lse).sum(1) + upstream * own * torch.cat([pos, pos]))
    # Two results must not share memory.
    return dx[:n].clone(), dx[n:].clone(), slope


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
