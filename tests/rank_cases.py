"""What ranks are tested with: every loss beside nt_xent as a case with its specification, and arguments on which ranks
disagree."""

from __future__ import annotations

import functools

import torch

from fastcl import (
    alignment_loss,
    decoupled_nt_xent,
    generalized_contrastive_loss,
    reference,
    swd_loss,
    uniformity_loss,
)
from fastcl.losses import draws
from test_distributed import WIDTH


def given(count, seed=3):
    """Prior samples or directions that every process knows, [count, WIDTH]."""
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seed_of(generator):
    """What a call over ranks takes from the generator of rank 0."""
    return int(torch.randint(2**63 - 1, (), generator=generator))


def drawn(prior, rows, seed, dtype, count=WIDTH, directions=None):
    """(samples, directions) that a call draws from a generator with this seed; directions that are given are not."""
    generator = torch.Generator().manual_seed(seed)
    like = torch.empty(0, dtype=dtype)
    if directions is None:
        directions = draws.orthogonal_projections(count, WIDTH, like, generator).double()
    return draws.prior_samples(prior, rows, WIDTH, like, generator).double(), directions


def _swd(**forms):
    """swd_loss and its specification, with samples, directions or a prior that is drawn from generators of ranks."""

    def ours(z1, z2, _, **options):
        return swd_loss(torch.cat([z1, z2]), **forms, **options)

    def exact(z1, z2, _, *, seed, dtype, **options):
        z = torch.cat([z1, z2])
        prior = forms.get("prior", "hypersphere")
        count, directions = forms.get("num_projections", WIDTH), forms.get("projections")
        samples, directions = drawn(prior, len(z), seed, dtype, count, directions)
        unit = forms.get("normalize", "prior_samples" not in forms and prior == "hypersphere")
        return reference.swd(z, forms.get("prior_samples", samples), directions, normalize=unit, **options)

    return ours, exact


def _generalized(prior, **own):
    def ours(z1, z2, temperature, **options):
        return generalized_contrastive_loss(z1, z2, prior=prior, temperature=temperature, **own, **options)

    def exact(z1, z2, temperature, *, seed, dtype, **options):
        distribution = {} if "distribution" in own else dict(
            zip(("prior_samples", "projections"), drawn(prior, 2 * len(z1), seed, dtype), strict=True)
        )  # fmt: skip
        weights = {key: value for key, value in own.items() if key != "distribution"}
        return reference.generalized_contrastive_loss(
            z1, z2, **distribution, temperature=temperature, normalize=prior == "hypersphere", **weights, **options
        )

    return ours, exact


def _plain(function, exact, **own):
    return functools.partial(function, **own), lambda *args, seed, dtype, **options: exact(*args, **own, **options)


def _without_temperature(function):
    return lambda z1, z2, _, **options: function(z1, z2, **options)


def _rows_of_both(function, **own):
    return lambda z1, z2, _, **options: function(torch.cat([z1, z2]), **own, **options)


def _mean_only(z, t, reduction, **options):
    return reference.uniformity(z, t, **options)


# (fastcl's, the specification) as functions of z1, z2 and a temperature.
LOSSES = {
    "decoupled": _plain(decoupled_nt_xent, reference.decoupled_nt_xent, weight=0.4),
    "alignment": _plain(_without_temperature(alignment_loss), _without_temperature(reference.alignment)),
    "uniformity": _plain(_rows_of_both(uniformity_loss, t=1.5), _rows_of_both(_mean_only, t=1.5)),
    "uniformity of lengths": _plain(
        _rows_of_both(uniformity_loss, t=0.1), _rows_of_both(_mean_only, t=0.1), normalize=False
    ),
    "swd": _swd(),
    "swd of samples": _swd(prior_samples=given(7)),
    "generalized swd": _generalized("normal", weight=2.0, loss_scale=10.0),
    "generalized lse": _generalized("hypersphere", distribution="lse", weight=0.5),
}
LEARNED = ("decoupled", "generalized lse")

FORMS = {
    "fewer directions than ranks": _swd(num_projections=1),
    "as many as do not divide": _swd(num_projections=4, prior="hypercube"),
    "more than D": _swd(num_projections=7, prior="normal"),
    "fewer samples than rows": _swd(prior_samples=given(3)),
    "more samples than rows": _swd(prior_samples=given(11), normalize=True),
    "one sample": _swd(prior_samples=given(1)),
    "given directions": _swd(projections=given(2, seed=4)),
    "all given": _swd(projections=given(3, seed=4), prior_samples=given(8)),
}


def two(d=4, dtype=torch.float32, **options):
    return {"z1": torch.randn(3, d).to(dtype), "z2": torch.randn(3, d).to(dtype), **options}


def one(n=3, d=4, dtype=torch.float32, **options):
    return {"z": torch.randn(n, d).to(dtype), **options}


# What the last rank passes to each loss while the others pass the first; the word its message has, and its type if not
# ValueError.
ODD_ONE_OUT = {
    decoupled_nt_xent: (
        two,
        [
            ("feature dimension D", two(d=5)),
            ("weight", two(weight=0.2)),
            ("weight", two(weight=-0.1)),
            ("weight", two(weight="0.1"), TypeError),
            ("temperature", two(temperature=0.5)),
            ("reduction", two(reduction="none")),
            ("normalize", two(normalize=False)),
            ("grad_reduction", two(grad_reduction="sum")),
        ],
    ),
    alignment_loss: (
        two,
        [
            ("dtype", two(dtype=torch.float64)),
            ("z1", two(dtype=torch.int64), TypeError),
            ("reduction", two(reduction="sum")),
            ("normalize", two(normalize=False)),
        ],
    ),
    uniformity_loss: (
        one,
        [
            ("feature dimension D", one(d=5)),
            ("t", one(t=3.0)),
            ("t", one(t=0.0)),
            ("t", one(t=None), TypeError),
            ("reduction", one(reduction="none")),
            ("normalize", one(normalize=False)),
        ],
    ),
    swd_loss: (
        one,
        [
            ("feature dimension D", one(d=5)),
            ("prior", one(prior="normal")),
            ("prior", one(prior="uniform")),
            ("prior", one(prior=torch.randn(3, 4)), TypeError),
            ("prior_samples", one(prior_samples=torch.randn(3, 4))),
            ("prior_samples", one(prior_samples=torch.randn(3, 5))),
            ("projections", one(projections=torch.randn(4, 4))),
            ("num_projections", one(num_projections=5)),
            ("num_projections", one(num_projections=0)),
            ("generator", one(generator=3), TypeError),
            ("reduction", one(reduction="sum")),
            ("normalize", one(normalize=False)),
        ],
    ),
    generalized_contrastive_loss: (
        two,
        [
            ("distribution", two(distribution="lse")),
            ("distribution", two(distribution="sliced")),
            ("prior", two(prior="normal")),
            ("prior", two(prior=None), TypeError),
            ("weight", two(weight=1.0)),
            ("loss_scale", two(loss_scale=1000.0)),
            ("loss_scale", two(loss_scale=0)),
            ("temperature", two(temperature=2.0)),
            ("reduction", two(reduction="none")),
        ],
    ),
}
