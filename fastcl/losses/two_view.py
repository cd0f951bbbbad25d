"""What the two-view losses share: checks, ranks, and the call of the primitive."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import distributed
from ..ops.chunked import compute_dtype
from ..ops.similarity import TwoViewLoss
from . import checks

Coefficients = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]


def two_view_loss(
    name: str,
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    coefficients: Coefficients,
    *,
    normalize: bool,
    reduction: str,
    group,
    grad_reduction: str,
    exchange: str,
) -> Tensor:
    """The loss of ops.similarity.TwoViewLoss with (lse_coef, rest_coef) = coefficients(1 / temperature)."""

    # What all ranks must pass alike.
    settings = {"normalize": normalize, "reduction": reduction, "grad_reduction": grad_reduction}

    def check():
        checks.options(name, **settings, exchange=exchange)
        checks.pair(name, z1, z2)
        checks.positive(name, "temperature", temperature, z1.device)
        return z1, temperature

    process_group = distributed.resolve_group(name, group)
    if process_group is None:
        check()
        if z1.shape[0] == 0:
            raise ValueError(f"{name}: z1 and z2 must have at least one row, got shape {list(z1.shape)}")
        ranks, total = None, 2 * z1.shape[0]
    else:
        ranks = distributed.agree(name, process_group, check, settings)
        total = sum(ranks.counts)

    dtype = compute_dtype(z1.dtype)
    bound = -1.0
    if isinstance(temperature, Tensor):
        scale = temperature.reshape(()).to(z1.device, dtype).reciprocal()
        # Where the value could not be checked without waiting for the device, a bad one gives NaN.
        scale = torch.where((scale > 0) & scale.isfinite(), scale, torch.nan)
    else:
        scale = torch.full((), 1 / temperature, dtype=dtype, device=z1.device)
        if normalize:
            bound = 1 / temperature
    lse_coef, rest_coef = coefficients(scale)
    loss = TwoViewLoss.apply(
        z1, z2, scale, lse_coef, rest_coef, bound, normalize, reduction != "none", ranks, name
    )
    return loss / total if reduction == "mean" else loss
