"""The op wasserstein_1d on every backend against fastcl.reference in float64, under the error rule."""

from __future__ import annotations

import pytest
import torch

from error_rule import check
from fastcl import ops, reference
from fastcl.ops import chunked
from sort_backends import BACKENDS, route

DTYPES = [torch.float32, torch.float64]
NAMES = ["float32", "float64"]
NAN, INF = float("nan"), float("inf")
# On either side of where an implementation changes its method, and of powers of two.
SIZES = (1, 2, 3, 7, 64, 65, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 4097, 16385, 32768)
# Smaller, larger, coprime, multiples, and a single number on one side.
PAIRS = [
    (1, 7), (7, 1), (2, 3), (3, 2), (5, 4), (4, 5), (6, 4), (8, 64), (64, 8), (255, 256), (256, 255), (257, 1024),
    (1000, 17), (17, 1000), (1024, 512), (512, 1024), (1024, 1025), (1, 4097), (4097, 1), (4097, 1023), (16385, 4096),
]  # fmt: skip
TIERS = tuple(size + step for size in (512, 1024, 2048, 4096, 8192, 16384) for step in (-1, 0, 1))


@pytest.fixture(params=BACKENDS)
def device(request, monkeypatch):
    return route(request.param, monkeypatch)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def by_autograd(x, y, dtype):
    """(cost [P], share of each x [P, M], gradient of the costs [P, M]) of the specification."""
    x = x.detach().to(dtype).requires_grad_()
    shares = reference.wasserstein_1d(x, y.to(dtype))
    return shares.sum(1).detach(), shares.detach(), torch.autograd.grad(shares.sum(), x)[0]


def compare(x, y, what):
    """Costs, shares and gradients; both forms of the op."""
    exact, eager = by_autograd(x, y, torch.float64), by_autograd(x, y, x.dtype)
    cost, grad = ops.wasserstein_1d(x, y, False)
    shares, grad_of_shares = ops.wasserstein_1d(x, y, True)
    assert cost.dtype == torch.float64 and shares.dtype == grad.dtype == x.dtype
    for label, i, got in (("cost", 0, cost), ("shares", 1, shares), ("gradient", 2, grad)):
        check(f"{what} {label}", got, exact[i], eager[i], x.dtype)
    assert torch.equal(grad, grad_of_shares), what
    # Shares are rounded once more than what is added up to the cost.
    check(f"{what} sum of shares", shares.double().sum(1), cost, cost, x.dtype)


def _pair(m, k, p, dtype, device="cpu"):
    return torch.randn(p, m, device=device, dtype=dtype), torch.randn(p, k, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("m", SIZES)
def test_as_many_on_both_sides(device, m, dtype):
    compare(*_pair(m, m, 2 if m > 4000 else 5, dtype, device), f"M = K = {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("m,k", PAIRS)
def test_other_numbers(device, m, k, dtype):
    compare(*_pair(m, k, 2 if m > 4000 else 5, dtype, device), f"M = {m}, K = {k}")


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("p", [1, 2, 65])
def test_numbers_of_projections(device, p, dtype):
    compare(*_pair(100, 100, p, dtype, device), f"P = {p}")
    compare(*_pair(40, 100, p, dtype, device), f"P = {p}")


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("m,k", [(1, 1), (7, 7), (7, 5), (512, 512), (512, 100)])
def test_no_projection(device, m, k, dtype):
    for per_row in (False, True):
        cost, grad = ops.wasserstein_1d(*_pair(m, k, 0, dtype, device), per_row)
        assert cost.shape == ((0, m) if per_row else (0,)) and grad.shape == (0, m)


# Few bits, so that ties are many and every difference is exact.
TIED = {
    "few values": lambda p, m: torch.randint(5, (p, m)) / 4 - 0.5,
    "constant rows": lambda p, m: torch.randint(5, (p, 1)).expand(p, m) / 4 - 0.5,
    "constant": lambda p, m: torch.full((p, m), -0.75),
    "zeros of both signs": lambda p, m: torch.tensor([0.0, -0.0])[torch.randint(2, (p, m))],
    "zeros of both signs and others": lambda p, m: torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0])[torch.randint(5, (p, m))],
    "sorted": lambda p, m: torch.randn(p, m).sort().values,
    "reversed": lambda p, m: torch.randn(p, m).sort(descending=True).values,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("m,k", [(7, 7), (40, 40), (600, 600), (2500, 2500), (40, 60), (600, 250)])
@pytest.mark.parametrize("kind", TIED)
def test_ties_take_the_order_of_the_rows(device, kind, m, k, dtype):
    x = TIED[kind](6, m).to(device, dtype)
    # Different numbers opposite equal ones: their gradients tell who came first.
    compare(x, torch.randn(6, k, device=device, dtype=dtype), f"{kind} against normal")
    compare(x, TIED[kind](6, k).to(device, dtype), f"{kind} on both sides")


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("m", [1, 3, 31, 255, 256, 600, 4097])
def test_equal_samples_cost_nothing(device, m, dtype):
    """To the bit, whatever their order, and also where each number of y stands several times."""
    for x in (torch.randn(5, m, dtype=dtype, device=device), TIED["few values"](5, m).to(device, dtype)):
        shuffled = x.gather(1, torch.rand_like(x).argsort(1))
        for y in (x.clone(), shuffled, shuffled.repeat(1, 3)):
            for per_row in (False, True):
                cost, grad = ops.wasserstein_1d(x, y, per_row)
                assert cost.eq(0).all() and grad.eq(0).all(), f"M = {m}, K = {y.shape[1]}"


@pytest.mark.parametrize("m,k", [(40, 40), (600, 600), (600, 451), (37, 500)])
def test_denormals(device, m, k):
    """They are neither all equal nor 0: the gradient of such numbers is one of them."""
    x, y = (torch.randn(4, count, device=device) * 1e-40 for count in (m, k))
    assert x.ne(0).any() and x.abs().max() < torch.finfo(torch.float32).smallest_normal
    exact, eager = (by_autograd(x, y, dtype)[2] for dtype in (torch.float64, torch.float32))
    _, grad = ops.wasserstein_1d(x, y, False)
    # Each overlap of two cells rounds to a multiple of the smallest denormal number, 2^-149.
    pieces = 1 if m == k else k // m + 2
    floor = 2.0**-149 * 2 * (pieces + 1) * (4 * m) ** 0.5 / exact.norm().item()
    check(f"denormals {m} {k}", grad, exact, eager, torch.float32, floor)
    # The order is theirs: opposite normal numbers it decides everything.
    compare(x, torch.randn(4, k, device=device), "denormals against normal")


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("side", ["x", "y", "both"])
@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("m,k", [(7, 7), (40, 40), (600, 600), (40, 60), (7, 5), (600, 1200), (16, 4)])
def test_infinity(device, m, k, value, side, dtype):
    """Cost and gradient of the rows it meets; opposite another infinity NaN. An overlap of no width counts nothing."""
    x, y = _pair(m, k, 4, dtype, device)
    if side != "y":
        x[1, m // 2] = value
    if side != "x":
        y[1, k // 3] = value
    cost, shares, grad = by_autograd(x, y, torch.float64)
    got = ops.wasserstein_1d(x, y, True)
    assert not (side == "both" and m == k) or shares[1].isnan().any()
    # What is finite is held to its value elsewhere: here 1e-5 is far above rounding and far below a missing share.
    for ours, expected in zip(got, (shares, grad), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-8, equal_nan=True)
    got, _ = ops.wasserstein_1d(x, y, False)
    torch.testing.assert_close(got, cost, rtol=1e-5, atol=0, equal_nan=True)
    assert not got[1].isfinite() and got[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("side", ["x", "y", "both"])
@pytest.mark.parametrize("m,k", [(1, 1), (7, 7), (40, 40), (600, 600), (2500, 2500), (40, 60), (600, 250), (1, 9)])
def test_nan_stays_in_its_projection(device, m, k, side, dtype):
    x, y = _pair(m, k, 4, dtype, device)
    clean = [ops.wasserstein_1d(x, y, per_row) for per_row in (False, True)]
    for data in {"x": [x], "y": [y], "both": [x, y]}[side]:
        data[2, data.shape[1] // 2] = NAN
    for per_row, before in zip((False, True), clean, strict=True):
        cost, grad = ops.wasserstein_1d(x, y, per_row)
        assert cost[2].isnan().any() and grad[2].isnan().any()
        for got, expected in ((cost, before[0]), (grad, before[1])):
            assert torch.equal(got[[0, 1, 3]], expected[[0, 1, 3]])


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("m,k", [(7, 7), (600, 600), (40, 60)])
def test_nothing_but_nan(device, m, k, dtype):
    """Of both signs: nothing in them can be ordered, and yet the op ends."""
    x = torch.full((3, m), NAN, dtype=dtype, device=device)
    x[1] = x[1].neg()
    _, y = _pair(m, k, 3, dtype, device)
    for a, b in ((x, y), (y, x), (x, x)):
        for per_row in (False, True):
            cost, grad = ops.wasserstein_1d(a, b, per_row)
            assert cost.isnan().all() and grad.isnan().all()


def _layouts(dtype, device):
    def randn(*shape):
        return torch.randn(*shape, dtype=dtype, device=device)

    return {
        "transposed": randn(300, 5).T,
        "every other element": randn(5, 600)[:, ::2],
        "every other projection": randn(10, 300)[::2],
        "storage offset": randn(1503)[3:].view(5, 300),
        "one projection expanded": randn(1, 300).expand(5, 300),
        "one number expanded": randn(1, 1).expand(5, 300),
        "overlapping projections": randn(305).as_strided((5, 300), (1, 1)),
        "negated lazily": torch.randn(5, 300, dtype=torch.complex128).conj().imag.to(dtype=dtype, device=device),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("per_row", [False, True])
def test_layouts(device, per_row, dtype):
    views = _layouts(dtype, device)
    plain = torch.randn(5, 300, dtype=dtype, device=device)
    for what, x in views.items():
        for a, b in ((x, plain), (plain, x), (x, x), (x, plain[:, :70])):
            before = a.clone(), b.clone()
            got = ops.wasserstein_1d(a, b, per_row)
            expected = ops.wasserstein_1d(a.contiguous(), b.contiguous(), per_row)
            for ours, theirs in zip(got, expected, strict=True):
                # Contiguous whatever x is: torch.compile relies on the strides that the fake op states.
                assert torch.equal(ours, theirs) and ours.is_contiguous(), what
            assert torch.equal(a, before[0]) and torch.equal(b, before[1]), what


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("m,k", [(3000, 3000), (3000, 700), (700, 3000)])
def test_same_bits_every_time(device, m, k, per_row):
    x, y = _pair(m, k, 9, torch.float32, device)
    first = ops.wasserstein_1d(x, y, per_row)
    for _ in range(3):
        for got, expected in zip(ops.wasserstein_1d(x, y, per_row), first, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("p,m,k", [(1, 70_000, 30_001), (5, 20_000, 20_000), (5, 9_000, 20_000), (40, 33, 50)])
def test_any_number_of_threads(device, p, m, k, dtype, threads):
    x, y = _pair(m, k, p, dtype, device)
    for per_row in (False, True):
        results = []
        for count in (1, 2, 5):
            threads(count)
            results.append(ops.wasserstein_1d(x, y, per_row))
        for other in results[1:]:
            for got, expected in zip(other, results[0], strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("m,k", [(23, 23), (23, 40), (23, 7)])
def test_chunk_boundaries(monkeypatch, m, k, dtype):
    """Chunked torch with chunks of three projections, the last one of one, or of a single projection."""
    route("chunked", monkeypatch)
    x, y = _pair(m, k, 7, dtype)
    whole = [ops.wasserstein_1d(x, y, per_row) for per_row in (False, True)]
    reach = 1 if k == m else k // m + 2
    for elements in (3 * m * reach, 1):
        monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", elements)
        for per_row, expected in zip((False, True), whole, strict=True):
            for got, one in zip(ops.wasserstein_1d(x, y, per_row), expected, strict=True):
                assert torch.equal(got, one)
        compare(x, y, f"chunks of {elements}")


@pytest.mark.gpu
@pytest.mark.parametrize("n", [*TIERS, 100_000])
def test_tiers_on_gpu(n):
    p = 67 if n < 20_000 else 3
    compare(*_pair(n, n, p, torch.float32, "cuda"), f"M = K = {n}")
    compare(TIED["few values"](p, n).cuda(), torch.randn(p, n, device="cuda"), f"ties, M = K = {n}")
    compare(*_pair(n, n // 3 + 1, p, torch.float32, "cuda"), f"M = {n}, fewer on the other side")
    compare(*_pair(n // 3 + 1, n, p, torch.float32, "cuda"), f"K = {n}, fewer on this side")


@pytest.mark.gpu
@pytest.mark.parametrize("m,k", [(600, 600), (600, 100), (16_384, 16_384), (100_000, 100_000), (100_000, 30_000)])
def test_no_device_synchronisation(m, k):
    x, y = _pair(m, k, 8, torch.float32, "cuda")
    for per_row in (False, True):
        ops.wasserstein_1d(x, y, per_row)
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.wasserstein_1d(x, y, per_row)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("m,k", [(600, 600), (600, 100), (16_384, 16_384), (100_000, 100_000)])
def test_cuda_graph(m, k):
    x, y = _pair(m, k, 8, torch.float32, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.wasserstein_1d(x, y, False)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.wasserstein_1d(x, y, False)
    # Other numbers than those of the capture.
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, ops.wasserstein_1d(x, y, False), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("n", [600, 4096, 16_384])
def test_no_memory_but_the_results(n, per_row):
    x, y = _pair(n, n, 8, torch.float32, "cuda")
    ops.wasserstein_1d(x, y, per_row)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    results = ops.wasserstein_1d(x, y, per_row)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == len(results)
