"""Sliced Wasserstein distance of a batch to a prior: distribution matching for any prior one can draw from.

With rows z [M, d], samples r [K, d] of the prior and orthonormal directions w_1 .. w_P:

    L = 1/P sum_p W2(<w_p, z>, <w_p, r>)^2
    W2(x, y)^2 = integral over q in (0, 1) of (X(q) - Y(q))^2,   = 1/M sum_r (x_(r) - y_(r))^2 for K = M

X and Y the quantile functions, x_(r) the r-th smallest. Source: P1, "Intriguing Properties of Contrastive Losses",
Algorithm 1, with M rows (both views together), P = d and a draw of its own in every step. For K != M the coupling is
exact too: steps of different width, not interpolation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.rows import loss_rows
from ..ops.sorting import SlicedWasserstein
from . import checks, draws
from .batch import Batch, needs_grad, open_batch, shape_of
from .module import LossModule


def swd_loss(
    z: Tensor, prior: str = "hypersphere", *,
    prior_samples: Tensor | None = None,
    projections: Tensor | None = None,
    num_projections: int | None = None,
    generator: torch.Generator | None = None,
    normalize: bool | None = None, reduction: str = "mean", group=None,
    grad_reduction: str = "mean", exchange: str = "gather",
) -> Tensor:  # fmt: skip
    """Squared sliced Wasserstein distance between the rows of a batch and a prior distribution.

    L = mean_p integral over q of (X_p(q) - Y_p(q))^2, X_p and Y_p the quantile functions of the rows and of samples of
    the prior, both projected on direction p (P1 Algorithm 1). With as many samples as rows that is the mean squared
    difference of the sorted projections. Sort, loss and gradient of the projections are one pass; ties keep the order
    of the rows. With one seed the result repeats to the bit.

    Args:
        z: rows [N, D], for two views `torch.cat([z1, z2])`. float16, bfloat16, float32 or float64; any strides.
        prior: "hypersphere" (uniform on the unit sphere), "hypercube" (uniform in (-1, 1)^D) or "normal" (standard
            normal). As many samples are drawn as there are rows.
        prior_samples: samples [K, D] to use instead of a named prior, any K; over ranks the same on every rank.
        projections: directions [P, D] to use instead of drawn ones, taken as they are; over ranks the same on every
            rank.
        num_projections: how many orthonormal directions to draw, default D; beyond D in independent blocks of D.
        generator: where random numbers come from, on the device of z; default: PyTorch's own. Over ranks that of the
            first rank decides for all, which takes GPUs of one model. torch.compile(fullgraph=True) takes no generator.
        normalize: divide rows by max(length, 1e-12) first. Default: for the hypersphere, not for the others and not
            for prior_samples.
        reduction: "mean" over the rows of all ranks, "sum", or "none" for this rank's rows: N times the mean over the
            projections of each row's part.
        group, grad_reduction: as in `nt_xent`. Over ranks L is that of the rows of all ranks together.
        exchange: either way ranks exchange projections, each sorts its share of them.

    Returns:
        The loss, float32 (float64 for float64 input): a scalar, or [n] for reduction "none". NaN in the data sorts
        last and gives a NaN loss; infinity gives infinity or NaN.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; over ranks the same on every rank.
        RuntimeError: on differentiating twice.

    Samples and projections get no gradient. Values come from float32 products, which follow
    `torch.set_float32_matmul_precision`.

    Example:
        >>> import torch
        >>> from fastcl import swd_loss
        >>> z = torch.randn(256, 128, requires_grad=True)
        >>> loss = swd_loss(z, "hypersphere")
        >>> loss.backward()
        >>> z.grad.shape
        torch.Size([256, 128])
    """
    name = "swd_loss"
    shared = {"normalize": normalize, "reduction": reduction, "grad_reduction": grad_reduction, "exchange": exchange}
    draw = Draw(prior, prior_samples, projections, num_projections, generator, normalize)

    def check():
        checks.options(name, **shared, by_prior=True)
        checks.rows(name, "z", z)
        draw.check(name, z)
        return z, 1.0

    own = draw.settings() | {"requires_grad": needs_grad(z)}
    batch = open_batch(name, group, check, shared | own, argument="z", seed=draw.seed)
    rows = sliced_wasserstein(name, z, draw, reduction != "none", batch)
    # A copy: the caller may change it in place, and the backward keeps the original.
    return rows / batch.total if reduction == "mean" else rows.clone()


class Draw(NamedTuple):
    """What a batch is compared with: samples and directions, given or to be drawn."""

    prior: str
    prior_samples: Tensor | None
    projections: Tensor | None
    num_projections: int | None
    generator: torch.Generator | None
    normalize: bool | None

    @property
    def unit(self) -> bool:
        """Whether rows are normalised."""
        if self.normalize is None:
            return self.prior_samples is None and self.prior == "hypersphere"
        return self.normalize

    def check(self, name: str, z: Tensor) -> None:
        draws.check_prior(name, self.prior)
        checks.sortable(name, "z", z.shape[0])
        if self.prior_samples is not None:
            checks.matrix_like(name, "prior_samples", self.prior_samples, z)
            checks.sortable(name, "prior_samples", self.prior_samples.shape[0])
        if self.projections is not None:
            checks.matrix_like(name, "projections", self.projections, z)
        if self.num_projections is not None:
            checks.count(name, "num_projections", self.num_projections)
            if self.projections is not None:
                raise ValueError(
                    f"{name}: num_projections must be None where projections are given, got {self.num_projections}"
                )
        checks.random_generator(name, self.generator, z.device)

    def settings(self) -> dict[str, object]:
        """What all ranks must pass alike, as far as that can be told without looking at the data."""
        tensors = ("prior", "prior_samples", "projections")
        return {key: shape_of(getattr(self, key)) for key in tensors} | {"num_projections": self.num_projections}

    def seed(self) -> int:
        """A number from the generator, to draw the same on all ranks."""
        return draws.seed(self.generator)

    def samples_and_directions(self, z: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """[K, d] and [P, d], in the dtype of z and without gradient."""
        d, generator = z.shape[1], self.generator
        samples, directions = self.prior_samples, self.projections
        if batch.ranks is not None:
            generator = torch.Generator(z.device).manual_seed(batch.ranks.seed)
        if directions is None:
            directions = draws.orthogonal_projections(self.num_projections or d, d, z, generator)
        if samples is None:
            samples = draws.prior_samples(self.prior, batch.total, d, z, generator)
        return samples.detach().to(z.dtype), directions.detach().to(z.dtype)


def sliced_wasserstein(name: str, z: Tensor, draw: Draw, reduce: bool, batch: Batch) -> Tensor:
    """The sum of the loss rows over all ranks, or this rank's rows."""
    checks.sortable(name, "z", batch.total)
    rows = loss_rows(name, z, draw.unit)
    samples, directions = draw.samples_and_directions(rows.detach(), batch)
    return SlicedWasserstein.apply(rows, samples, directions, reduce, batch.ranks, name)


class SWDLoss(LossModule):
    """`swd_loss` as a module: see there for the arguments.

    Samples and projections are drawn in every call, or are buffers where they are given. A generator is a part of the
    module's state that neither copies nor pickles; leave it out where the module has to.

    Example:
        >>> import torch
        >>> from fastcl import SWDLoss
        >>> criterion = SWDLoss("normal")
        >>> loss = criterion(torch.randn(8, 16))
        >>> criterion
        SWDLoss(prior='normal')
    """

    def __init__(
        self,
        prior: str = "hypersphere",
        *,
        prior_samples: Tensor | None = None,
        projections: Tensor | None = None,
        num_projections: int | None = None,
        generator: torch.Generator | None = None,
        normalize: bool | None = None,
        reduction: str = "mean",
        group=None,
        grad_reduction: str = "mean",
        exchange: str = "gather",
    ):
        super().__init__(
            swd_loss, num_projections=num_projections, generator=generator,
            normalize=normalize, reduction=reduction, group=group, grad_reduction=grad_reduction, exchange=exchange,
        )  # fmt: skip
        draws.check_prior("SWDLoss", prior)
        if num_projections is not None:
            checks.count("SWDLoss", "num_projections", num_projections)
        checks.random_generator("SWDLoss", generator, None)
        self.prior = prior
        for argument, given in (("prior_samples", prior_samples), ("projections", projections)):
            if given is not None:
                checks.rows("SWDLoss", argument, given)
            self.register_buffer(argument, given)

    def forward(self, z: Tensor) -> Tensor:
        given = {"prior_samples": self.prior_samples, "projections": self.projections}
        return swd_loss(z, self.prior, **given, **self.settings)

    def extra_repr(self) -> str:
        shown = [f"prior={self.prior!r}"]
        shown += [f"{name}={list(x.shape)}" for name, x in self.named_buffers()]
        return ", ".join([*shown, *self.changed_settings()])
