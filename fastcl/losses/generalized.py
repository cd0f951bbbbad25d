"""Generalised contrastive loss: alignment of the views plus the distance of all rows to a prior.

With M = 2N rows h (both views), h1 and h2 the views, d their width:

    L = loss_scale * [ 1/(2 N d) sum (h1 - h2)^2 + weight * distribution ]

    distribution "swd": the squared sliced Wasserstein distance to a prior (`swd_loss`)
    distribution "lse": 1/M sum_i log sum_k exp(<h_i, h_k> / temperature) - log d, over all k, self included

Source: P1, "Intriguing Properties of Contrastive Losses", Eq. 2 and Algorithm 1, in the form published with it. The
"lse" form differs from Eq. 4, which is `decoupled_nt_xent`: self is in the sum, and the alignment is a mean over
entries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..ops.rows import RowLogSumExp, loss_rows
from . import checks, draws
from .alignment import distances
from .batch import Batch, needs_grad, open_batch, product_bound, reduce_rows, scale_of
from .module import LossModule
from .swd import Draw, sliced_wasserstein

DISTRIBUTIONS = ("swd", "lse")


def generalized_contrastive_loss(
    z1: Tensor, z2: Tensor, *,
    prior: str = "hypersphere",
    distribution: str = "swd",
    weight: float = 5.0,
    temperature: float | Tensor = 1.0,
    loss_scale: float = 1.0,
    generator: torch.Generator | None = None,
    normalize: bool | None = None, reduction: str = "mean", group=None,
    grad_reduction: str = "mean", exchange: str = "gather",
) -> Tensor:  # fmt: skip
    """Generalised contrastive loss of two views: alignment plus distribution matching, without an N x N matrix.

    L = loss_scale * (mean over entries of (z1 - z2)^2 / 2 + weight * distribution), with the distribution term of P1
    Eq. 2 as published: "swd" is `swd_loss` of both views together against the prior, one draw a call (P1 Algorithm 1);
    "lse" is mean_i log sum_k exp(<z_i, z_k> / temperature) - log D over all rows k, self included.

    Args:
        z1, z2: embeddings [N, D] of the two views, row i of both from the same image. float16, bfloat16, float32
            or float64; any strides.
        prior: "hypersphere", "hypercube" or "normal", as in `swd_loss`; only "hypersphere" goes with "lse".
        distribution: "swd" or "lse".
        weight: of the distribution term, a number that is positive or 0. P1 uses 5 with "swd".
        temperature: of "lse": positive number, or one-element floating tensor (which may require grad).
        loss_scale: positive number. P1 found 1000 helpful where rows are normalised: entries of unit rows, and with
            them mean squares over entries, are small.
        generator: where the numbers for "swd" come from, as in `swd_loss`.
        normalize: divide rows by max(length, 1e-12) first. Default: for the hypersphere, not for the other priors.
        reduction, group, grad_reduction, exchange: as in `nt_xent`.

    Returns:
        The loss, float32 (float64 for float64 input): a scalar, or [2n] for reduction "none". NaN in the data gives a
        NaN loss.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; over ranks the same on every rank.
        RuntimeError: on differentiating twice.

    Example:
        >>> import torch
        >>> from fastcl import generalized_contrastive_loss
        >>> z1 = torch.randn(256, 128, requires_grad=True)
        >>> z2 = torch.randn(256, 128, requires_grad=True)
        >>> loss = generalized_contrastive_loss(z1, z2, prior="hypersphere", weight=5.0, loss_scale=1000.0)
        >>> loss.backward()
        >>> z1.grad.shape
        torch.Size([256, 128])
    """
    name = "generalized_contrastive_loss"
    shared = {"normalize": normalize, "reduction": reduction, "grad_reduction": grad_reduction, "exchange": exchange}
    own = {"distribution": distribution, "weight": weight, "loss_scale": loss_scale}
    draw = Draw(prior, None, None, None, generator, normalize)

    def check():
        checks.options(name, **shared, by_prior=True)
        checks.pair(name, z1, z2)
        checks.positive(name, "temperature", temperature, z1.device)
        draw.check(name, z1)
        _check_own(name, prior, **own)
        return z1, temperature

    wanted = {"requires_grad": needs_grad(z1, z2, temperature)}
    batch = open_batch(
        name, group, check, shared | draw.settings() | own | wanted, argument="z1 and z2", views=2,
        seed=draw.seed if distribution == "swd" else lambda: 0,
    )  # fmt: skip
    rows = distances(name, z1, z2, draw.unit) / (2 * z1.shape[1])
    aligned = reduce_rows(rows, reduction, batch)
    z = torch.cat([z1, z2])
    if distribution == "swd":
        spread = sliced_wasserstein(name, z, draw, reduction != "none", batch)
        spread = spread / batch.total if reduction == "mean" else spread
    else:
        spread = reduce_rows(_lse_rows(name, z, temperature, draw.unit, batch), reduction, batch)
    return loss_scale * (aligned + weight * spread)


def _check_own(name: str, prior: str, distribution: object, weight: object, loss_scale: object) -> None:
    checks.one_of(name, "distribution", distribution, DISTRIBUTIONS)
    if distribution == "lse" and prior != "hypersphere":
        raise ValueError(f'{name}: prior must be "hypersphere" with distribution "lse", got {prior!r}')
    checks.number(name, "weight", weight, zero=True)
    checks.number(name, "loss_scale", loss_scale)


def _lse_rows(name: str, z: Tensor, temperature: float | Tensor, unit: bool, batch: Batch) -> Tensor:
    """log sum_k exp(<z_i, z_k> / temperature) - log D of this rank's rows."""
    rows = loss_rows(name, z, unit)
    scale, bound = scale_of(temperature, z), product_bound(temperature, unit)
    others = RowLogSumExp.apply(
        rows, scale, None, "keep", ops.product_dtype(z, unit), bound, False, False, batch.ranks, name
    )
    return (torch.logaddexp(others, scale * rows.square().sum(1).double()) - math.log(z.shape[1])).to(rows.dtype)


class GeneralizedContrastiveLoss(LossModule):
    """`generalized_contrastive_loss` as a module: see there for the arguments.

    A generator is a part of the module's state that neither copies nor pickles; leave it out where the module has to.

    Example:
        >>> import torch
        >>> from fastcl import GeneralizedContrastiveLoss
        >>> criterion = GeneralizedContrastiveLoss(prior="normal")
        >>> loss = criterion(torch.randn(8, 16), torch.randn(8, 16))
        >>> criterion
        GeneralizedContrastiveLoss(prior='normal')
    """

    def __init__(
        self,
        *,
        prior: str = "hypersphere",
        distribution: str = "swd",
        weight: float = 5.0,
        temperature: float = 1.0,
        loss_scale: float = 1.0,
        generator: torch.Generator | None = None,
        normalize: bool | None = None,
        reduction: str = "mean",
        group=None,
        grad_reduction: str = "mean",
        exchange: str = "gather",
    ):
        name = "GeneralizedContrastiveLoss"
        super().__init__(
            generalized_contrastive_loss, prior=prior, distribution=distribution, weight=weight,
            temperature=checks.constant(name, "temperature", temperature), loss_scale=loss_scale, generator=generator,
            normalize=normalize, reduction=reduction, group=group, grad_reduction=grad_reduction, exchange=exchange,
        )  # fmt: skip
        draws.check_prior(name, prior)
        _check_own(name, prior, distribution, weight, loss_scale)
        checks.random_generator(name, generator, None)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return generalized_contrastive_loss(z1, z2, **self.settings)
