"""What a two-view batch looks like to its loss: numbers to watch while training, without the similarity matrix."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .losses import checks
from .losses.alignment import of_zero_rows
from .losses.batch import open_batch, product_bound, scale_of
from .ops.rows import product_rows


class ContrastiveStats(NamedTuple):
    """What `contrastive_stats` returns: means over the rows of all ranks, float64 tensors [] on the device of the rows.

    Example:
        >>> import torch
        >>> from fastcl import contrastive_stats
        >>> contrastive_stats(torch.eye(4), torch.eye(4)).positive_similarity.item()
        1.0
    """

    top1: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor
    entropy: Tensor
    alignment: Tensor
    uniformity: Tensor


@torch.no_grad()
def contrastive_stats(
    z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.1, *, normalize: bool = True, group=None
) -> ContrastiveStats:
    """Statistics of two views under NT-Xent's softmax, exact, without the matrix and without gradient. One visit
    of each tile gives all but the uniformity, which takes a second one.

    With M = 2N rows z, p(i) the other view of row i and P_ik the softmax of <z_i, z_k> / temperature over k != i:

        top1                 share of rows whose positive is their nearest row (not one that ties, up to rounding)
        positive_similarity  mean_i <z_i, z_p(i)>
        negative_similarity  mean <z_i, z_k> over k != i, p(i)
        entropy              mean_i - sum_k P_ik log P_ik, in nats: log(M - 1) for rows that tell nothing apart
        alignment            mean_i ||z_i - z_p(i)||^2 (Wang & Isola, 2020)
        uniformity           log mean_{i != k} exp(-2 ||z_i - z_k||^2) (the same)

    Args:
        z1, z2: embeddings [N, D] of the two views. float16, bfloat16, float32 or float64; any strides.
        temperature: positive number, or one-element floating tensor.
        normalize, group: as in `nt_xent`: over ranks the statistics of all rows, the same on every rank. Uniformity is
            NaN without normalisation.

    Returns:
        ContrastiveStats. With one pair alone there are no negatives: top1 is 1 and negative_similarity NaN.

    Raises:
        TypeError, ValueError: as in `nt_xent`.

    Example:
        >>> import torch
        >>> from fastcl import contrastive_stats
        >>> z = torch.eye(4)
        >>> contrastive_stats(z, z).top1.item()
        1.0
    """
    name = "contrastive_stats"

    def check():
        checks.flag(name, "normalize", normalize)
        checks.pair(name, z1, z2)
        checks.positive(name, "temperature", temperature, z1.device)
        return z1, temperature

    batch = open_batch(
        name, group, check, {"normalize": normalize, "grad_reduction": "mean"}, argument="z1 and z2", views=2
    )
    ranks, total = batch
    n = len(z1)
    z, dtype = product_rows(name, torch.cat([z1, z2]), normalize)
    scale = scale_of(temperature, z1).double()
    rows = z.to(dtype)
    columns = None if ranks is None else ranks.gather_rows(rows)
    offset = 0 if ranks is None else ranks.first_row
    positive = (z[:n] * z[n:]).sum(1).double().repeat(2)
    # The positive is left out of the tiles and put back in full precision.
    lse, nearest, mean = ops.similarity_stats(rows, columns, scale.to(z.dtype), offset, n)
    every = torch.logaddexp(lse, scale * positive)
    share = torch.sigmoid(lse - scale * positive)
    expected = share * mean + (1 - share) * scale * positive
    # A collapsed batch is all ties, which roundings must not decide: those of D products of rows so long.
    length = torch.linalg.vector_norm(z, dim=1).double()
    rounding = math.sqrt(z.shape[1]) * torch.finfo(z.dtype).eps * (length[:n] * length[n:]).repeat(2)
    sums = [
        (scale * (positive - rounding) > nearest).double().sum(), positive.sum(),
        (every - expected).sum(), (z[:n] - z[n:]).double().square().sum() * 2,
    ]  # fmt: skip
    # All similarities add up to the square of the sum of the rows.
    whole = z.double().sum(0)
    own = z.double().square().sum() + positive.sum()
    apart = _exponentials(rows, columns, offset, normalize)
    if ranks is not None:
        sums = [ranks.sum(x) for x in sums]
        whole, own = ranks.sum(whole), ranks.sum(own)
        apart = ranks.logsumexp(apart)
    apart = torch.logaddexp(apart, of_zero_rows(z, 2.0, batch))
    top1, close, entropy, alignment = (x / total for x in sums)
    negative = (whole.square().sum() - own) / (total * (total - 2)) if total > 2 else torch.full_like(own, math.nan)
    return ContrastiveStats(
        top1, close, negative, entropy, alignment, apart - math.log(total * (total - 1)) if total > 1 else apart
    )


def _exponentials(rows: Tensor, columns: Tensor | None, offset: int, normalize: bool) -> Tensor:
    """log sum_{i, k != i} exp(-2 ||z_i - z_k||^2) over this rank's rows, of unit length."""
    if not normalize:
        return torch.full((), math.nan, dtype=torch.float64, device=rows.device)
    scale = torch.full((), 4.0, dtype=ops.chunked.compute_dtype(rows.dtype), device=rows.device)
    return ops.lse_forward(rows, columns, scale, product_bound(0.25, True), offset, 0)[0].logsumexp(0) - 4
