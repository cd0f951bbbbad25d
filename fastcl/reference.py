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


def masked_similarity(
    a: Tensor, b: Tensor, scale: Tensor | float, offset: int, pair: int = 0, *,
    ids_a: Tensor | None = None, ids_b: Tensor | None = None, same: str = "keep", bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """scale * a @ b.T + bias of the column, with -inf for the pairs that are left out.

    Row i leaves out itself, column i + offset (none for an offset of C or more), and with pair > 0 its partner, column
    partner(i) + offset: i + pair in the first `pair` rows, i - pair in the others. Pairs of equal ids are left out with
    same="drop", all others with "only".
    """
    row = torch.arange(a.shape[0], device=a.device)[:, None]
    column = torch.arange(b.shape[0], device=a.device)[None, :]
    left_out = column == row + offset
    if pair:
        left_out |= column == torch.where(row < pair, row + pair, row - pair) + offset
    if same in ("drop", "only"):
        left_out |= (ids_a[:, None] == ids_b[None, :]) == (same == "drop")
    S = scale * a @ b.T
    return (S if bias is None else S + bias).masked_fill(left_out, float("-inf"))


def same_id(S: Tensor, ids_a: Tensor, ids_b: Tensor) -> Tensor:
    """The pairs of equal ids that are not left out of S."""
    return (ids_a[:, None] == ids_b[None, :]) & (S != -torch.inf)


def similarity_lse(a: Tensor, b: Tensor, scale: Tensor | float, offset: int, pair: int = 0, **masks) -> Tensor:
    """lse_i = log sum over the allowed j of exp(S_ij)."""
    return masked_similarity(a, b, scale, offset, pair, **masks).logsumexp(1)


def similarity_lse_backward(
    a: Tensor, b: Tensor, scale: Tensor | float, offset: int,
    lse_a: Tensor, lse_b: Tensor | None, w_a: Tensor | None = None, w_b: Tensor | None = None, pair: int = 0, *,
    pull_a: Tensor | None = None, pull_b: Tensor | None = None, **masks,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(W @ b, W.T @ a) of the weights W_ij = w_a_i exp(S_ij - lse_a_i) + w_b_j exp(S_ij - lse_b_j), masked as in the
    forward, less pull_a_i + pull_b_j where the ids are the same."""
    S = masked_similarity(a, b, scale, offset, pair, **masks)
    # An empty row has lse = -inf and takes no part.
    weights = torch.exp(S - lse_a.masked_fill(lse_a == -torch.inf, torch.inf)[:, None])
    if w_a is not None:
        weights = weights * w_a[:, None]
    if lse_b is not None:
        other = torch.exp(S - lse_b.masked_fill(lse_b == -torch.inf, torch.inf)[None, :])
        weights = weights + (other if w_b is None else other * w_b[None, :])
    if pull_a is not None:
        pull = pull_a[:, None] + (0 if pull_b is None else pull_b[None, :])
        weights = weights - torch.where(same_id(S, masks["ids_a"], masks["ids_b"]), pull, 0.0)
    return weights @ b, weights.T @ a


def positive_sums(
    a: Tensor, b: Tensor, ids_a: Tensor, ids_b: Tensor, offset: int
) -> tuple[Tensor, Tensor]:
    """(sum of <a_i, b_j>, number) of the columns j that have the id of row i, itself left out."""
    equal = same_id(masked_similarity(a, b, 1.0, offset), ids_a, ids_b)
    return torch.where(equal, a @ b.T, 0.0).sum(1), equal.sum(1)


def pair_softplus(
    a: Tensor, b: Tensor, scale: Tensor | float, beta: Tensor, sign: float, offset: int, **masks
) -> Tensor:
    """sum over the allowed j of softplus(sign * S_ij + beta_i)."""
    S = masked_similarity(a, b, scale, offset, **masks)
    x = torch.where(S == -torch.inf, S, sign * S + beta[:, None])
    return torch.logaddexp(x, torch.zeros_like(x)).sum(1)


def similarity_stats(a: Tensor, b: Tensor, scale: Tensor | float, offset: int, pair: int = 0):
    """(log-sum-exp, largest, mean under the softmax) of the allowed S_ij of each row; the mean of none is 0."""
    S = masked_similarity(a, b, scale, offset, pair)
    p = S.softmax(1).nan_to_num(0.0)
    return S.logsumexp(1), S.amax(1), (p * S.masked_fill(S == -torch.inf, 0.0)).sum(1)


def normalize_rows(x: Tensor, unit: bool) -> Tensor:
    return normalize(x) if unit else x


def stack_views(z1: Tensor, z2: Tensor, unit: bool = True) -> Tensor:
    """The M = 2N rows of both views, view 1 first, unit-normalised unless told otherwise."""
    return normalize_rows(torch.cat([z1, z2]), unit)


def positives(z: Tensor) -> Tensor:
    """<z_i, z_p(i)> for all M rows."""
    return (z * z.roll(z.shape[0] // 2, 0)).sum(1)


def pair_loss(
    pos: Tensor, lse: Tensor, scale: Tensor | float, weight: float, pull: float | None, positive_counts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of the M rows its loss weight * L_i - pull * <z_i, z_p(i)>, L_i and the share of its negatives, from
    the log-sum-exp of the negatives and the N positives. Without `pull` it is weight * scale; without
    `positive_counts` L_i is that of the negatives. A row without negatives has loss 0."""
    pos = torch.cat([pos, pos])
    x = lse - scale * pos
    rest = 0.0 if pull is None else pull - weight * scale
    if positive_counts:
        # log(exp(lse) + exp(scale * pos)) - scale * pos, without its difference of two nearly equal numbers.
        value = cross_entropy_rows(lse, scale * pos)
        return weight * value - rest * pos, scale * pos + value, x.sigmoid()
    value = torch.where(x == -torch.inf, 0.0, x)
    return weight * value - rest * pos, lse, (x != -torch.inf).to(x.dtype)


def pair_backward(
    z: Tensor, grad_lse: Tensor, pos: Tensor, share: Tensor, scale: float, grad: float, w: Tensor, weight: float,
    pull: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dz, the part of each row in d scale) of grad * sum_i w_i loss_i, before the normalisation. scale * grad_lse is
    the gradient of sum_i w_i L_i by way of the negatives, in which each product stands twice."""
    n = len(pos)
    pos, own = torch.cat([pos, pos]), -share if pull is None else 1 - share
    pulls = grad * w * (weight * scale * share + (0.0 if pull is None else pull - weight * scale))
    dz = grad * weight * scale * grad_lse - (pulls + pulls.roll(n))[:, None] * z.roll(n, 0)
    return dz, grad * weight * (0.5 * (z * grad_lse).sum(1) + w * own * pos)


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


def cross_entropy_rows(negatives: Tensor, positive: Tensor) -> Tensor:
    """log(e^positive + e^negatives) - positive of each row, `negatives` a log-sum-exp; 0 where that is -inf."""
    x = negatives - positive
    return torch.logaddexp(x, torch.zeros_like(x))


def info_nce(
    query: Tensor, keys: Tensor, negatives: Tensor | None = None, temperature: Tensor | float = 0.07, *,
    in_batch: bool | None = None, ids: Tensor | None = None, log_q: Tensor | None = None,
    negative_indices: Tensor | None = None, normalize: bool = True, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """InfoNCE (P2 Eq. 1): the cross entropy of the key against the other keys of the batch, a queue, or both."""
    q, k = normalize_rows(query, normalize), normalize_rows(keys, normalize)
    scale, bias = 1 / temperature, torch.zeros_like(q[:, 0]) if log_q is None else -log_q
    logits, positive = [], scale * (q * k).sum(1)
    if in_batch or (in_batch is None and negatives is None):
        masks = {} if ids is None else {"ids_a": ids, "ids_b": ids, "same": "drop"}
        logits.append(masked_similarity(q, k, scale, 0, bias=bias, **masks))
        positive = positive + bias
    if negatives is not None:
        S = scale * q @ normalize_rows(negatives, normalize).T
        logits.append(S if negative_indices is None else S.gather(1, negative_indices.long()))
    return reduce_rows(cross_entropy_rows(torch.cat(logits, 1).logsumexp(1), positive), reduction)


def clip(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, *, normalize: bool = False, reduction: str = "mean"
) -> Tensor:
    """CLIP (Radford et al. 2021): the cross entropy of each image's text and of each text's image."""
    x, y = normalize_rows(image, normalize), normalize_rows(text, normalize)
    S = logit_scale * x @ y.T
    rows = torch.cat([S.logsumexp(1), S.logsumexp(0)]) - S.diagonal().repeat(2)
    return reduce_rows(rows, reduction)


def siglip(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float, *,
    normalize: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """SigLIP (Zhai et al. 2023): a logistic loss for every pair, summed over an image's texts."""
    x, y = normalize_rows(image, normalize), normalize_rows(text, normalize)
    logits = logit_scale * x @ y.T + logit_bias
    signs = 1 - 2 * torch.eye(len(x), dtype=logits.dtype, device=x.device)
    return reduce_rows(torch.logaddexp(signs * logits, torch.zeros_like(logits)).sum(1), reduction)


def supcon(
    features: Tensor, labels: Tensor, temperature: Tensor | float = 0.1, *, form: str = "out",
    normalize: bool = True, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """SupCon (Khosla et al. 2020, Eq. 2, 3) of rows [M, D] with labels [M]; the mean is over rows with a positive."""
    z = normalize_rows(features, normalize)
    S = masked_similarity(z, z, 1 / temperature, 0)
    equal = same_id(S, labels, labels)
    count = equal.sum(1)
    if form == "in":
        log_share = S.masked_fill(~equal, -torch.inf).logsumexp(1) - count.to(S).log()
    else:
        log_share = torch.where(equal, S, 0.0).sum(1) / count
    has = count > 0
    rows = torch.zeros_like(z[:, 0])
    rows[has] = (S[has].logsumexp(1) - log_share[has]).to(rows.dtype)
    return rows.sum() / has.sum().clamp(min=1) if reduction == "mean" else reduce_rows(rows, reduction)


def nt_xent_views(
    views: list[Tensor], temperature: Tensor | float = 0.1, *, normalize: bool = True, reduction: str = "mean"
) -> Tensor:
    """NT-Xent of V views: the mean, over the other views of an image, of the cross entropy against all other rows."""
    image = torch.arange(len(views[0]), device=views[0].device).repeat(len(views))
    return supcon(torch.cat(list(views)), image, temperature, normalize=normalize, reduction=reduction)


def dcl(
    z1: Tensor, z2: Tensor, temperature: Tensor | float = 0.1, *, normalize: bool = True, reduction: str = "mean"
) -> Tensor:
    """DCL (Yeh et al. 2022): NT-Xent without the positive in the denominator; 0 where there is no negative."""
    z = stack_views(z1, z2, normalize)
    negatives = similarity_lse(z, z, 1 / temperature, 0, len(z1))
    rows = negatives.masked_fill(negatives == -torch.inf, 0.0) - positives(z) / temperature
    return reduce_rows(torch.where(negatives == -torch.inf, 0.0, rows), reduction)


def instance_discrimination(
    query: Tensor, indices: Tensor, bank: Tensor, temperature: Tensor | float = 0.07, *,
    noise: Tensor | None = None, log_z: Tensor | float | None = None, normalize: bool = True, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Instance discrimination (Wu et al. 2018): the softmax over all rows of a bank, or its noise-contrastive estimate
    from the bank's rows `noise` [m]."""
    S = normalize_rows(query, normalize) @ bank.T / temperature
    positive = S.gather(1, indices[:, None])[:, 0]
    if noise is None:
        return reduce_rows(S.logsumexp(1) - positive, reduction)
    n, m = len(bank), len(noise)
    if log_z is None:
        log_z = S[:, noise].detach().logsumexp((0, 1)) + math.log(n / (len(query) * m))
    x, own = (y - log_z + math.log(n / m) for y in (S[:, noise], positive))
    rows = torch.logaddexp(-own, torch.zeros_like(own)) + torch.logaddexp(x, torch.zeros_like(x)).sum(1)
    return reduce_rows(rows, reduction)


def contrastive_stats(z1: Tensor, z2: Tensor, temperature: float = 0.1, *, normalize: bool = True):
    """(top-1, positive and negative similarity, entropy, alignment, uniformity) of two views."""
    z = stack_views(z1, z2, normalize)
    m = len(z)
    S, pos = masked_similarity(z, z, 1 / temperature, 0), positives(z)
    negative = masked_similarity(z, z, 1.0, 0, len(z1))
    P = S.softmax(1)
    entropy = -torch.where(P > 0, P * P.clamp_min(1e-300).log(), 0.0).sum(1).mean()
    top1 = (pos > negative.amax(1)).double().mean()
    apart = torch.where(negative == -torch.inf, 0.0, negative).sum() / (m * (m - 2))
    return top1, pos.mean(), apart, entropy, alignment(z1, z2, normalize=normalize), uniformity(z, normalize=False)
