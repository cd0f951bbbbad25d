"""nt_xent on every backend against fastcl.reference in float64, under the error rule."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

import fastcl.ops
from error_rule import check
from fastcl import _native, nt_xent, reference
from fastcl.ops import UNIT_ROWS, chunked
from fastcl.ops.similarity import TwoViewLoss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = ("normalize_pair", "lse_forward", "pair_loss", "lse_backward", "pair_backward")


def _eager(z1, z2, temperature, normalize=True, reduction="mean"):
    """NT-Xent as people write it, in the dtype of the input."""
    z = torch.cat([z1, z2])
    if normalize:
        z = F.normalize(z, dim=1)
    logits = z @ z.T / temperature
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), float("-inf"))
    target = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy(logits, target, reduction=reduction)


@pytest.fixture(
    params=[
        pytest.param("cpp", marks=pytest.mark.skipif(not _native.LOADED, reason=_native.REASON)),
        "chunked",
        pytest.param(
            "triton",
            marks=pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed"),
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request, monkeypatch):
    """Routes the five ops; the name of the device to put tensors on."""
    if request.param in ("chunked", "triton"):
        if request.param == "triton":
            from fastcl.kernels import host as module
        else:
            module = chunked
        for name in OPS:
            monkeypatch.setattr(fastcl.ops, name, getattr(module, name))
    if request.param == "cuda" or (request.param == "triton" and DEVICE == "cuda"):
        return request.param, "cuda"
    return request.param, "cpu"


def _supported(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton kernels do not take float64: chunked torch serves it")


def _gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def compare(z1, z2, temperature, what, normalize=True, reduction="mean", upstream=None):
    """Loss and the gradients of both views and the temperature, against float64 and eager."""
    dtype = z1.dtype

    def run(function, cast):
        a, b = (z.detach().to(cast).requires_grad_() for z in (z1, z2))
        t = torch.tensor(temperature, dtype=torch.float64 if cast == torch.float64 else torch.float32)
        t = t.to(z1.device).requires_grad_()
        loss = function(a, b, t, normalize, reduction)
        total = loss if upstream is None else (loss * upstream.to(loss.dtype)).sum()
        return loss.detach(), *_gradients(total, a, b, t)

    def ours(a, b, t, normalize, reduction):
        return nt_xent(a, b, t, normalize=normalize, reduction=reduction)

    def spec(a, b, t, normalize, reduction):
        return reference.nt_xent(a, b, t, normalize=normalize, reduction=reduction)

    got, exact, eager = run(ours, dtype), run(spec, torch.float64), run(_eager, dtype)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got[1].dtype == dtype
    for label, g, x, e in zip(("loss", "dz1", "dz2", "dtemperature"), got, exact, eager, strict=True):
        check(f"{what} {label}", g, x, e, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n,d", [(2, 1), (3, 7), (17, 33), (65, 128), (150, 20), (40, 300)])
def test_shapes(backend, n, d, dtype):
    name, device = backend
    _supported(name, dtype)
    z1, z2 = (torch.randn(n, d, device=device).to(dtype) for _ in range(2))
    compare(z1, z2, 0.2, f"{name} n={n} d={d}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [0.005, 0.0145, 0.05, 1.0, 10.0])
def test_temperatures(backend, temperature, dtype):
    name, device = backend
    _supported(name, dtype)
    z1 = torch.randn(70, 24, device=device).to(dtype)
    z2 = z1 + 0.5 * torch.randn_like(z1)
    compare(z1, z2, temperature, f"{name} temperature={temperature}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_rows_not_normalised(backend, scale, dtype):
    name, device = backend
    _supported(name, dtype)
    z1, z2 = ((torch.randn(60, 16, device=device) * scale).to(dtype) for _ in range(2))
    compare(z1, z2, 1.0, f"{name} length x{scale}", normalize=False)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(backend, reduction):
    name, device = backend
    z1, z2 = torch.randn(2, 50, 12, device=device)
    upstream = torch.randn(100, device=device) if reduction == "none" else None
    compare(z1, z2, 0.3, f"{name} {reduction}", reduction=reduction, upstream=upstream)


def test_gradcheck(backend):
    name, device = backend
    _supported(name, torch.float64)
    z1, z2 = (torch.randn(5, 4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    t = torch.tensor(0.4, dtype=torch.float64, device=device, requires_grad=True)
    for options in ({}, {"normalize": False}, {"reduction": "none"}, {"reduction": "sum"}):
        assert torch.autograd.gradcheck(lambda a, b, s, o=options: nt_xent(a, b, s, **o), (z1, z2, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_number_and_tensor_temperature_agree(backend, dtype):
    name, device = backend
    z1, z2 = (torch.randn(40, 16, device=device).to(dtype) for _ in range(2))
    number = nt_xent(z1, z2, 0.25)
    tensor = nt_xent(z1, z2, torch.tensor(0.25, device=device))
    # The range check may choose another shift: a few units in the last place of fp32.
    assert abs(number - tensor) <= 1e-6 * abs(number)


def test_same_bits_every_time(backend):
    name, device = backend
    z1, z2 = torch.randn(2, 200, 32, device=device).requires_grad_().unbind(0)
    runs = []
    for _ in range(2):
        loss = nt_xent(z1, z2, 0.1)
        runs.append((loss, *_gradients(loss, z1, z2)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("scale", [2.0**16, 1.0])
def test_grad_scaler_factor_in_fp16(backend, scale):
    """An upstream gradient of 65,536 neither overflows nor flushes on the way to fp16 gradients."""
    name, device = backend
    z1, z2 = (torch.randn(64, 16, device=device).half().requires_grad_() for _ in range(2))
    got = _gradients(nt_xent(z1, z2, 0.1) * scale, z1, z2)
    exact = _gradients(reference.nt_xent(z1.double(), z2.double(), 0.1) * scale, z1, z2)
    for g, x in zip(got, exact, strict=True):
        assert g.isfinite().all()
        # fp16 rows and weights (2^-11 each) and one rounding of the result.
        assert (g.double() - x.double()).norm() <= 2e-3 * x.double().norm()


@pytest.mark.parametrize("weight", [0.1, 2.0])
def test_other_weights_of_alignment_and_distribution(backend, weight):
    """TwoViewLoss with other weights: weight * lse_i - <z_i, z_p(i)>, the decoupled form of P1 Eq. 4."""
    name, device = backend
    _supported(name, torch.float64)
    leaves = [torch.randn(9, 5, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]
    leaves.append(torch.tensor(3.0, dtype=torch.float64, device=device, requires_grad=True))
    x1, x2, scale = leaves
    got, _ = TwoViewLoss.apply(x1, x2, scale, weight, 1.0, True, UNIT_ROWS, True, 1, None, "decoupled")
    z = reference.stack_views(x1, x2)
    exact = (weight * reference.similarity_lse(z, z, scale, 0) - reference.positives(z)).sum()
    check("decoupled", got, exact, exact, torch.float64)
    for ours, theirs in zip(_gradients(got, *leaves), _gradients(exact, *leaves), strict=True):
        check("decoupled gradient", ours, theirs, theirs, torch.float64)


def test_chunk_boundaries(monkeypatch):
    """Chunked torch with chunks of a few rows, the last one short."""
    for name in OPS:
        monkeypatch.setattr(fastcl.ops, name, getattr(chunked, name))
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 7 * 46)
    z1, z2 = torch.randn(2, 23, 8, dtype=torch.float64)
    compare(z1, z2, 0.3, "chunks of 7")


@pytest.mark.skipif(not _native.LOADED, reason=_native.REASON)
def test_more_blocks_than_one_level_of_sums():
    """The C++ backward folds its sums every 64 blocks of at most 192 rows: against chunked torch, which has none."""
    z = F.normalize(torch.randn(12_400, 2, dtype=torch.float64), dim=1)
    scale = torch.tensor(5.0, dtype=torch.float64)
    (lse,) = fastcl.ops.lse_forward(z, None, scale, 5.0, 0, 6_200)
    arguments = (z, None, scale, 5.0, 0, 6_200, lse, None, None, None)
    torch.testing.assert_close(fastcl.ops.lse_backward(*arguments), chunked.lse_backward(*arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n,d", [(4096, 128), (1000, 768), (3000, 64)])
def test_large_on_gpu(n, d, dtype):
    z1, z2 = (torch.randn(n, d, device="cuda").to(dtype) for _ in range(2))
    compare(z1, z2, 0.1, f"cuda n={n} d={d}")


@pytest.mark.gpu
def test_no_device_synchronisation():
    z1, z2 = torch.randn(2, 512, 64, device="cuda").requires_grad_().unbind(0)
    t = torch.tensor(0.1, device="cuda", requires_grad=True)
    nt_xent(z1, z2, t).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        nt_xent(z1, z2, t).backward()
        nt_xent(z1, z2, 0.1).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_no_recompilation_for_another_n():
    from fastcl.kernels.lse_symmetric import lse_symmetric_kernel

    def compiled_after(n):
        z1, z2 = torch.randn(2, n, 64, device="cuda")
        nt_xent(z1, z2, 0.1)
        return len(lse_symmetric_kernel.device_caches[torch.cuda.current_device()][0])

    before = compiled_after(100)
    assert [compiled_after(n) for n in (300, 333, 1000, 1024)] == [before] * 4


@pytest.mark.gpu
def test_cuda_graph():
    z1, z2 = torch.randn(2, 1024, 128, device="cuda", dtype=torch.bfloat16)
    z1.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(nt_xent(z1, z2, 0.1), z1)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = nt_xent(z1, z2, 0.1)
        (grad,) = torch.autograd.grad(loss, z1)
    graph.replay()
    torch.cuda.synchronize()
    eager = nt_xent(z1, z2, 0.1)
    assert torch.equal(loss, eager) and torch.equal(grad, torch.autograd.grad(eager, z1)[0])


@pytest.mark.gpu
def test_memory_is_linear_in_the_batch():
    n, d = 32768, 128
    z1, z2 = torch.randn(2, n, d, device="cuda", dtype=torch.bfloat16).requires_grad_().unbind(0)
    nt_xent(z1, z2, 0.1).backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nt_xent(z1, z2, 0.1).backward()
    peak = torch.cuda.max_memory_allocated() - before
    # Rows in 16 bits, gradients in fp32 and in 16 bits, 64 partial sums a row: under 2 KB a row of 128 features.
    assert peak < 2 * n * 2048
