"""The specification: every loss and every kernel in plain PyTorch, building every matrix in full.

Slow and memory-hungry on purpose. It runs in any floating dtype, differentiates by autograd, and is what the
tests hold the kernels against in float64. Notation: N pairs, M = 2N rows z (view 1 first), s = 1 / temperature,
S = s * z @ z.T, p(i) = (i + N) mod M the partner of row i.
"""

from __future__ import annotations

import math

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


def normalize_rows(x: Tensor, unit: bool) -> Tensor:
    return normalize(x) if unit else x


def stack_views(z1: Tensor, z2: Tensor, unit: bool = True) -> Tensor:
    """The M = 2N rows of both views, view 1 first, unit-normalised unless told otherwise."""
    return normalize_rows(torch.cat([z1, z2]), unit)


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


def decoupled_nt_xent(
    z1: Tensor, z2: Tensor, temperature: Tensor | float = 1.0, *, weight: float = 0.1,
    normalize: bool = True, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Decoupled NT-Xent (P1 Eq. 4): mean_i [weight * log sum_{k != i} exp(S_ik) - <z_i, z_p(i)>]."""
    z = stack_views(z1, z2, normalize)
    rows = weight * similarity_lse(z, z, 1 / temperature, 0) - positives(z)
    return reduce_rows(rows, reduction)


def alignment(z1: Tensor, z2: Tensor, *, normalize: bool = True, reduction: str = "mean") -> Tensor:
    """Alignment (Wang & Isola 2020): mean_i ||z_i - z_p(i)||^2 over the rows of both views."""
    z = stack_views(z1, z2, normalize)
    return reduce_rows((z - z.roll(len(z1), 0)).square().sum(1), reduction)


def uniformity(z: Tensor, t: float = 2.0, *, normalize: bool = True) -> Tensor:
    """Uniformity (Wang & Isola 2020): log mean_{i != j} exp(-t ||z_i - z_j||^2)."""
    z = normalize_rows(z, normalize)
    square = (z[:, None] - z[None, :]).square().sum(2)
    apart = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    return (-t * square[apart]).logsumexp(0) - math.log(len(z) * (len(z) - 1))


def sort(x: Tensor, descending: bool = False) -> tuple[Tensor, Tensor]:
    """Stable sort of the last dimension: NaN is the largest, -0 equals +0. Values and int32 indices."""
    values, indices = torch.sort(x, dim=-1, descending=descending, stable=True)
    return values, indices.int()


def wasserstein_1d(x: Tensor, y: Tensor) -> Tensor:
    """[P, M]: the share of each x_pi in the squared 2-Wasserstein distance of x_p [M] and y_p [K], row by row.

    The quantile functions of both samples are steps, of width 1/M and 1/K. Between two neighbouring jumps of either
    both are constant, so the integral of (X(q) - Y(q))^2 is a finite sum. Positions are integers, in units of 1/(M K).
    """
    m, k = x.shape[1], y.shape[1]
    ordered, rank_to_row = torch.sort(x, dim=1, stable=True)
    jumps = torch.cat([torch.arange(m + 1) * k, torch.arange(k) * m]).unique().to(x.device)
    start, width = jumps[:-1], jumps.diff().to(x.dtype) / (m * k)
    steps = width * (ordered[:, start // k] - torch.sort(y, dim=1).values[:, start // m]).square()
    terms = torch.zeros_like(ordered).index_add(1, start // k, steps)
    return torch.zeros_like(terms).scatter(1, rank_to_row, terms)


def swd(
    z: Tensor, prior_samples: Tensor, projections: Tensor, *, normalize: bool = False, reduction: str = "mean"
) -> Tensor:
    """Sliced Wasserstein distance (P1 Algorithm 1) of the rows of z [M, d] and prior_samples [K, d].

    mean over the projections [P, d] of the squared distance of the two projected samples; row i's part is
    M times the mean of its shares, so that the mean over rows is the loss.
    """
    z = normalize_rows(z, normalize)
    shares = wasserstein_1d(projections @ z.T, projections @ prior_samples.T)
    return reduce_rows(len(z) * shares.mean(0), reduction)


def published_alignment(z1: Tensor, z2: Tensor, *, normalize: bool = True, reduction: str = "mean") -> Tensor:
    """Alignment as published with P1: half the mean of (z1 - z2)^2 over the N d entries."""
    return alignment(z1, z2, normalize=normalize, reduction=reduction) / (2 * z1.shape[1])


def published_lse(z: Tensor, temperature: Tensor | float = 1.0, *, normalize: bool = True, reduction: str = "mean"):
    """Distribution term as published with P1: mean_i log sum_k exp(S_ik) - log d, over all k, self included."""
    z = normalize_rows(z, normalize)
    return reduce_rows((z @ z.T / temperature).logsumexp(1) - math.log(z.shape[1]), reduction)


def generalized_contrastive_loss(
    z1: Tensor, z2: Tensor, prior_samples: Tensor | None = None, projections: Tensor | None = None, *,
    weight: float = 5.0, temperature: Tensor | float = 1.0, loss_scale: float = 1.0, normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """loss_scale * (published alignment + weight * distribution), P1 Eq. 2: SWD to the samples, or LSE without any."""
    z = torch.cat([z1, z2])
    options = {"normalize": normalize, "reduction": reduction}
    if prior_samples is None:
        distribution = published_lse(z, temperature, **options)
    else:
        distribution = swd(z, prior_samples, projections, **options)
    return loss_scale * (published_alignment(z1, z2, **options) + weight * distribution)
