"""Decoupled NT-Xent, alignment, uniformity and the generalised loss on every backend, against fastcl.reference in
float64 under the error rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastcl.ops
from error_rule import check
from fastcl import alignment_loss, decoupled_nt_xent, nt_xent, reference, uniformity_loss
from fastcl.ops import chunked
from fastcl.ops.chunked import compute_dtype
from loss_cases import (
    BACKENDS,
    DTYPES,
    LOSSES,
    REDUCED,
    TEMPERED,
    compare,
    exponent_rounding,
    largest_exponent,
    pair,
    route,
    skip_unsupported,
    swd,
    uniformity,
)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The name of the backend that the ops go to, and the device to put tensors on."""
    return request.param, route(request.param, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,d", [(2, 5), (3, 7), (17, 33), (65, 128), (40, 300)])
@pytest.mark.parametrize("loss", LOSSES)
def test_shapes(backend, loss, n, d, dtype):
    name, device = backend
    skip_unsupported(name, dtype)
    temperature = 0.3 if loss in TEMPERED else None
    compare(LOSSES[loss](dtype), *pair(n, d, device, dtype), f"{name} {loss} n={n} d={d}", temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_one_feature(backend, loss, dtype):
    """Not normalised: on a line, unit rows have no gradient to compare."""
    name, device = backend
    skip_unsupported(name, dtype, normalize=False)
    z1, z2 = pair(3, 1, device, dtype)
    temperature = 1.0 if loss in TEMPERED else None
    floor = exponent_rounding(largest_exponent(2, z1, z2), dtype) if loss == "uniformity" else 0.0
    compare(LOSSES[loss](dtype), z1, z2, f"{name} {loss} d=1", temperature, floor=floor, normalize=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [0.005, 0.05, 1.0, 10.0])
@pytest.mark.parametrize("loss,weight", [("decoupled", 0.0), ("decoupled", 0.1), ("decoupled", 2.0), ("lse", 1.0)])
def test_temperatures_and_weights(backend, loss, weight, temperature, dtype):
    name, device = backend
    skip_unsupported(name, dtype)
    z1 = torch.randn(40, 24, device=device).to(dtype)
    z2 = z1 + 0.5 * torch.randn_like(z1)
    compare(LOSSES[loss](dtype, weight), z1, z2, f"{name} {loss} {weight} at {temperature}", temperature)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("t", [0.01, 2, 50.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_widths_of_uniformity(backend, normalize, t, dtype):
    name, device = backend
    skip_unsupported(name, dtype)
    z1, z2 = pair(40, 24, device, dtype)
    largest = 2 * t if normalize else largest_exponent(t, z1, z2)
    compare(uniformity(dtype, t), z1, z2, f"{name} t={t}", floor=exponent_rounding(largest, dtype), normalize=normalize)


@pytest.mark.parametrize("loss_scale", [1, 1000.0])
@pytest.mark.parametrize("weight", [0.0, 5])
@pytest.mark.parametrize("loss", ["lse", "swd"])
def test_weights_of_the_generalised_loss(backend, loss, weight, loss_scale):
    name, device = backend
    temperature = 0.5 if loss == "lse" else None
    made = LOSSES[loss](torch.float32, weight=weight, loss_scale=loss_scale)
    compare(made, *pair(30, 12, device), f"{name} {loss} {weight} {loss_scale}", temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prior", ["hypersphere", "hypercube", "normal"])
def test_priors(backend, prior, dtype):
    """Each with the normalisation that is its default."""
    name, device = backend
    skip_unsupported(name, dtype)
    compare(swd(dtype, prior), *pair(50, 16, device, dtype), f"{name} {prior}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_not_normalised(backend, loss, scale, dtype):
    name, device = backend
    skip_unsupported(name, dtype, normalize=False)
    z1, z2 = ((z * scale).to(dtype) for z in pair(40, 16, device))
    temperature = 1.0 if loss in TEMPERED else None
    floor = exponent_rounding(largest_exponent(2, z1, z2), dtype) if loss == "uniformity" else 0.0
    compare(LOSSES[loss](dtype), z1, z2, f"{name} {loss} length x{scale}", temperature, floor=floor, normalize=False)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("loss", REDUCED)
def test_reductions(backend, loss, reduction):
    name, device = backend
    upstream = torch.randn(100, device=device) if reduction == "none" else None
    temperature = 0.3 if loss in TEMPERED else None
    made = LOSSES[loss](torch.float32)
    compare(made, *pair(50, 12, device), f"{name} {loss} {reduction}", temperature, upstream, reduction=reduction)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(backend, loss, normalize):
    name, device = backend
    skip_unsupported(name, torch.float64)
    leaves = [z.requires_grad_() for z in pair(3, 3, device, torch.float64)]
    if loss in TEMPERED:
        leaves.append(torch.tensor(0.4, dtype=torch.float64, device=device, requires_grad=True))
    ours = LOSSES[loss](torch.float64)[0]
    for reduction in ("mean", "none") if loss in REDUCED else ("mean",):

        def function(a, b, t=None, reduction=reduction):
            return ours(a, b, t, normalize=normalize, reduction=reduction)

        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoupled_contains_nt_xent(backend, dtype):
    """weight = temperature: the temperature times NT-Xent, P1 Eq. 3."""
    name, device = backend
    skip_unsupported(name, dtype)
    leaves = [z.requires_grad_() for z in pair(40, 16, device, dtype)]
    for temperature in (0.05, 0.5):
        results = []
        for loss in (
            decoupled_nt_xent(*leaves, temperature, weight=temperature),
            temperature * nt_xent(*leaves, temperature),
        ):
            results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        for label, got, expected in zip(("loss", "dz1", "dz2"), *results, strict=True):
            # The same kernels: half a unit of the last place each where the coefficient 1 - weight / temperature
            # rounds, and where gradients do.
            check(f"{name} {label}", got, expected.double(), expected, dtype, floor=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_alignment_of_equal_views_is_zero(normalize, dtype):
    z1 = torch.randn(20, 8).to(dtype).requires_grad_()
    z2 = z1.detach().clone().requires_grad_()
    for reduction in ("mean", "sum", "none"):
        loss = alignment_loss(z1, z2, normalize=normalize, reduction=reduction)
        assert loss.eq(0).all()
        assert all(grad.eq(0).all() for grad in torch.autograd.grad(loss.sum(), (z1, z2)))


@pytest.mark.parametrize("normalize", [True, False])
def test_alignment_of_close_views(normalize):
    """1e-4 apart: the square is a tenth of a unit in the last place of 2 - 2 cos."""
    z1 = F.normalize(torch.randn(50, 32), dim=1)
    z2 = z1 + 1e-4 * F.normalize(torch.randn(50, 32), dim=1)
    exact = reference.alignment(z1.double(), z2.double(), normalize=normalize)
    # Coordinates of about 0.2 are a few 2^-26 off, differences of them are 2e-5.
    assert abs(alignment_loss(z1, z2, normalize=normalize).double() - exact) <= 2e-3 * exact


@pytest.mark.parametrize("dtype", DTYPES)
def test_uniformity_of_equal_rows_is_zero(backend, dtype):
    name, device = backend
    skip_unsupported(name, dtype)
    row = torch.randn(1, 24, device=device).to(dtype).expand(30, 24)
    for t in (0.5, 2.0):
        z = row.clone().requires_grad_()
        loss = uniformity_loss(z, t)
        # -t times a squared distance of 0, calculated as 2t (<z_i, z_j> - 1); rows may have 16 bits.
        rounded = torch.float16 if name == "cuda" and dtype.itemsize == 2 else fastcl.ops.product_dtype(z, unit=True)
        assert abs(loss.item()) <= 2 * t * 4 * torch.finfo(rounded).eps
        (grad,) = torch.autograd.grad(loss, z)
        assert (grad.norm(dim=1) * z.norm(dim=1)).max() <= 2 * t * 4 * torch.finfo(rounded).eps
        # Distances are exactly 0, and their exponentials 1. What is left is log(870) twice, 6.8 with 2^2 units in its
        # last place.
        assert abs(uniformity_loss(z, t, normalize=False).item()) <= 4 * torch.finfo(compute_dtype(dtype)).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_uniformity_far_from_the_origin(backend, dtype):
    """Rows about 100 in every coordinate, distances about 1: lengths have no digits left of them."""
    name, device = backend
    skip_unsupported(name, dtype)
    z1, z2 = (0.2 * z + 100 for z in pair(60, 16, device))
    compare(uniformity(dtype), z1.to(dtype), z2.to(dtype), f"{name} offset", normalize=False)


@pytest.mark.parametrize("normalize", [True, False])
def test_uniformity_of_two_rows(backend, normalize):
    """-t times the square of their one distance."""
    name, device = backend
    z1, z2 = pair(1, 6, device)
    compare(uniformity(torch.float32, 0.7), z1, z2, f"{name} two rows", normalize=normalize)
    square = reference.alignment(z1.double(), z2.double(), normalize=normalize)
    torch.testing.assert_close(
        uniformity_loss(torch.cat([z1, z2]), 0.7, normalize=normalize).double(), -0.7 * square, rtol=1e-6, atol=0
    )


def test_chunk_boundaries(monkeypatch):
    """Chunked torch with chunks of a few rows, the last one short."""
    for name in fastcl.ops.SCHEMAS:
        monkeypatch.setattr(fastcl.ops, name, getattr(chunked, name))
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 7 * 46)
    for loss in LOSSES:
        temperature = 0.3 if loss in TEMPERED else None
        compare(LOSSES[loss](torch.float64), *pair(23, 8, "cpu", torch.float64), f"chunks of 7 {loss}", temperature)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("loss", TEMPERED)
def test_number_and_tensor_temperature_agree(backend, loss, dtype):
    name, device = backend
    ours = LOSSES[loss](dtype)[0]
    views = pair(40, 16, device, dtype)
    number, tensor = ours(*views, 0.25), ours(*views, torch.tensor(0.25, device=device))
    # The range check may choose another shift: a few units in the last place of fp32.
    assert abs(number - tensor) <= 1e-6 * abs(number)


@pytest.mark.parametrize("loss", LOSSES)
def test_same_bits_every_time(backend, loss):
    name, device = backend
    leaves = [z.requires_grad_() for z in pair(150, 32, device)]
    ours = LOSSES[loss](torch.float32)[0]
    runs = []
    for _ in range(2):
        value = ours(*leaves, 0.1)
        runs.append((value, *torch.autograd.grad(value, leaves)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("n,d", [(4096, 128), (1000, 768)])
@pytest.mark.parametrize("loss", ["decoupled", "uniformity", "lse"])
def test_large_on_gpu(loss, n, d, dtype):
    temperature = 0.3 if loss in TEMPERED else None
    compare(LOSSES[loss](dtype), *pair(n, d, "cuda", dtype), f"cuda {loss} n={n} d={d}", temperature)


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_device_synchronisation(loss, normalize):
    leaves = [z.requires_grad_() for z in pair(512, 64, "cuda")]
    ours = LOSSES[loss](torch.float32)[0]
    temperature = torch.tensor(0.3, device="cuda", requires_grad=True)
    ours(*leaves, temperature, normalize=normalize).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(*leaves, temperature, normalize=normalize).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["decoupled", "uniformity", "lse"])
def test_memory_is_linear_in_the_batch(loss):
    n, d = 32768, 128
    leaves = [z.requires_grad_() for z in pair(n, d, "cuda", torch.bfloat16)]
    ours = LOSSES[loss](torch.bfloat16)[0]
    ours(*leaves, 0.3).backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours(*leaves, 0.3).backward()
    peak = torch.cuda.max_memory_allocated() - before
    # Unit rows and their gradients in fp32 and in 16 bits, partial sums: under 4 KB a row of 128 features, where one
    # row of the similarity matrix has 128 KB.
    assert peak < 2 * n * 4096
