"""The losses beside nt_xent as cases: each with its specification and the eager form that people write, the backends
that they run on, and the comparison under the error rule."""

from __future__ import annotations

import functools
import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

import fastcl.ops
from error_rule import check
from fastcl import (
    _native,
    alignment_loss,
    decoupled_nt_xent,
    generalized_contrastive_loss,
    reference,
    uniformity_loss,
)
from fastcl.losses import draws
from fastcl.ops import chunked
from fastcl.ops.chunked import compute_dtype

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BACKENDS = [
    pytest.param("cpp", marks=pytest.mark.skipif(not _native.LOADED, reason=_native.REASON)),
    "chunked",
    pytest.param(
        "triton", marks=pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# Those with a Triton kernel; the sorts go where they go without one.
MATRIX_OPS = tuple(name for name in fastcl.ops.SCHEMAS if name not in fastcl.ops.SORTS)
SEED = 11


def route(backend: str, monkeypatch) -> str:
    """Send the ops to this backend; the device to put tensors on."""
    if backend == "chunked":
        for name in fastcl.ops.SCHEMAS:
            monkeypatch.setattr(fastcl.ops, name, getattr(chunked, name))
        monkeypatch.setattr(fastcl.ops, "product_dtype", lambda x, unit: compute_dtype(x.dtype))
    if backend == "triton":
        from fastcl.kernels import host

        for name in MATRIX_OPS:
            monkeypatch.setattr(fastcl.ops, name, getattr(host, name))
        # CPU tensors too are multiplied in the type that a GPU would.
        monkeypatch.setattr(fastcl.ops, "product_dtype", lambda x, unit: host.product_dtype(x.dtype, unit))
    return "cuda" if backend == "cuda" or (backend == "triton" and DEVICE == "cuda") else "cpu"


def skip_unsupported(backend: str, dtype: torch.dtype, normalize: bool = True) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton kernels do not take float64: chunked torch serves it")
    if backend == "triton" and dtype == torch.bfloat16 and not normalize and DEVICE == "cpu":
        pytest.skip("tl.dot on bf16 is silently wrong in Triton's interpreter")


# Each of these returns the loss, its specification and how people write it: functions of z1, z2, a temperature and
# the options that losses share. `dtype` is that of the rows, which decides in what type numbers are drawn.


def _views(z1, z2, normalize):
    return (F.normalize(z1, dim=1), F.normalize(z2, dim=1)) if normalize else (z1, z2)


def decoupled(dtype, weight=0.1):
    def eager(z1, z2, temperature, *, normalize=True, reduction="mean"):
        z1, z2 = _views(z1, z2, normalize)
        z = torch.cat([z1, z2])
        logits = z @ z.T / temperature
        logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), float("-inf"))
        rows = weight * torch.logsumexp(logits, dim=1) - (z1 * z2).sum(1).repeat(2)
        return reference.reduce_rows(rows, reduction)

    return (
        functools.partial(decoupled_nt_xent, weight=weight),
        functools.partial(reference.decoupled_nt_xent, weight=weight),
        eager,
    )


def alignment(dtype):
    def ours(z1, z2, _, **options):
        return alignment_loss(z1, z2, **options)

    def spec(z1, z2, _, **options):
        return reference.alignment(z1, z2, **options)

    def eager(z1, z2, _, *, normalize=True, reduction="mean"):
        z1, z2 = _views(z1, z2, normalize)
        return reference.reduce_rows((z1 - z2).norm(dim=1).pow(2).repeat(2), reduction)

    return ours, spec, eager


def uniformity(dtype, t=2.0):
    def ours(z1, z2, _, **options):
        return uniformity_loss(torch.cat([z1, z2]), t, **options)

    def spec(z1, z2, _, **options):
        return reference.uniformity(torch.cat([z1, z2]), t, **options)

    def eager(z1, z2, _, *, normalize=True):
        x = torch.cat(_views(z1, z2, normalize))
        # There is no 16-bit pdist: autocast runs it in float32.
        exponents = torch.pdist(x.to(compute_dtype(x.dtype)), p=2).pow(2).mul(-t)
        loss = exponents.exp().mean().log()
        # Rows far apart underflow; who sees that writes this.
        return loss if loss.isfinite() else exponents.logsumexp(0) - math.log(len(exponents))

    return ours, spec, eager


def lse(dtype, weight=1.0, loss_scale=1.0):
    own = {"weight": weight, "loss_scale": loss_scale}

    def ours(z1, z2, temperature, **options):
        return generalized_contrastive_loss(z1, z2, distribution="lse", temperature=temperature, **own, **options)

    def spec(z1, z2, temperature, **options):
        return reference.generalized_contrastive_loss(z1, z2, temperature=temperature, **own, **options)

    def eager(z1, z2, temperature, *, normalize=True, reduction="mean"):
        z1, z2 = _views(z1, z2, normalize)
        z = torch.cat([z1, z2])
        aligned = (z1 - z2).square().mean(1).repeat(2) / 2
        spread = torch.logsumexp(z @ z.T / temperature, dim=1) - math.log(z.shape[1])
        return reference.reduce_rows(loss_scale * (aligned + weight * spread), reduction)

    return ours, spec, eager


def _drawn(prior, z1, dtype):
    """(samples, directions) of the call with a generator seeded SEED."""
    generator = torch.Generator(z1.device).manual_seed(SEED)
    like = torch.empty(0, dtype=compute_dtype(dtype), device=z1.device)
    d = z1.shape[1]
    directions = draws.orthogonal_projections(d, d, like, generator)
    return draws.prior_samples(prior, 2 * len(z1), d, like, generator).to(z1.dtype), directions.to(z1.dtype)


def swd(dtype, prior="hypersphere", weight=5.0, loss_scale=1.0):
    own = {"weight": weight, "loss_scale": loss_scale}
    default = prior == "hypersphere"

    def ours(z1, z2, _, **options):
        generator = torch.Generator(z1.device).manual_seed(SEED)
        return generalized_contrastive_loss(z1, z2, prior=prior, generator=generator, **own, **options)

    def spec(z1, z2, _, *, normalize=default, **options):
        drawn = _drawn(prior, z1, dtype)
        return reference.generalized_contrastive_loss(z1, z2, *drawn, normalize=normalize, **own, **options)

    def eager(z1, z2, _, *, normalize=default, reduction="mean"):
        samples, directions = _drawn(prior, z1, dtype)
        z1, z2 = _views(z1, z2, normalize)
        aligned = (z1 - z2).square().mean(1).repeat(2) / 2
        ordered, rows = (directions @ torch.cat([z1, z2]).T).sort(1)
        cost = (ordered - (directions @ samples.T).sort(1).values).square()
        spread = torch.zeros_like(cost).scatter(1, rows, cost).mean(0)
        return reference.reduce_rows(loss_scale * (aligned + weight * spread), reduction)

    return ours, spec, eager


LOSSES = {"decoupled": decoupled, "alignment": alignment, "uniformity": uniformity, "lse": lse, "swd": swd}
TEMPERED = ("decoupled", "lse")
REDUCED = [name for name in LOSSES if name != "uniformity"]


def compare(loss, z1, z2, what, temperature=None, upstream=None, floor=0.0, **options):
    """Loss and the gradients of both views and the temperature, against float64 and eager."""
    dtype = z1.dtype
    ours, spec, eager = loss

    def run(function, cast):
        leaves = [z.detach().to(cast).requires_grad_() for z in (z1, z2)]
        t = None
        if temperature is not None:
            t = torch.tensor(temperature, dtype=compute_dtype(cast), device=z1.device, requires_grad=True)
            leaves.append(t)
        value = function(*leaves[:2], t, **options)
        total = value if upstream is None else (value * upstream.to(value.dtype)).sum()
        return value.detach(), *torch.autograd.grad(total, leaves)

    got, exact, plain = run(ours, dtype), run(spec, torch.float64), run(eager, dtype)
    assert got[0].dtype == compute_dtype(dtype) and got[1].dtype == got[2].dtype == dtype
    labels = ["loss", "dz1", "dz2", "dtemperature"][: len(got)]
    for label, g, x, e in zip(labels, got, exact, plain, strict=True):
        check(f"{what} {label}", g, x, e, dtype, floor)


def largest_exponent(t, z1, z2):
    """The largest exponent of uniformity, t ||z_i - z_j||^2."""
    return t * torch.pdist(torch.cat([z1, z2]).double()).max().item() ** 2


def exponent_rounding(largest, dtype):
    """Half a unit in the last place of exponents so large: the relative error of their exponentials. Eager knows the
    distances of close rows, which count most, to more digits."""
    return largest * torch.finfo(compute_dtype(dtype)).eps / 2


def pair(n, d, device, dtype=torch.float32):
    return tuple(torch.randn(n, d, device=device).to(dtype) for _ in range(2))
