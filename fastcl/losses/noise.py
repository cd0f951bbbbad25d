"""Noise-contrastive estimation: is a row of the bank the query's own, or noise?

    loss_i = softplus(-x_i) + sum_{m noise rows} softplus(x_j),      x_j = s <v, f_j> - log Z + log(n / m)

Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018, section 3.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..ops.softplus import PairSoftplus
from .batch import Batch, softplus


def noise_rows(
    name: str, rows: tuple[Tensor, torch.dtype], noise: Tensor, positive: Tensor, scale: Tensor, instances: int,
    log_z: Tensor,
) -> Tensor:  # fmt: skip
    """The loss of each query; `rows` are the queries and the dtype of their products, `positive` their own
    s <v, f_i>."""
    beta = math.log(instances / len(noise)) - log_z.to(scale.dtype)
    negative = PairSoftplus.apply(
        rows[0], noise, scale, beta.expand(len(rows[0])), None, None, 1.0, False, False, rows[1], None, name
    )
    return softplus(-(positive + beta.double())) + negative


def log_normaliser(
    rows: tuple[Tensor, torch.dtype], noise: Tensor, scale: Tensor, instances: int, batch: Batch
) -> Tensor:
    """The logarithm of Z = n mean exp(s <v, f_j>) over the queries of all ranks and the noise."""
    with torch.no_grad():
        q, b = (x.to(rows[1]) for x in (rows[0], noise))
        lse = ops.lse_forward(q, b, scale, ops.ANY_ROWS, len(b), 0)[0].logsumexp(0)
        if batch.ranks is not None:
            lse = batch.ranks.logsumexp(lse)
        return lse + math.log(instances) - math.log(batch.total * len(noise))
