"""swd_loss on every backend against fastcl.reference in float64, under the error rule; and what the distance is."""

from __future__ import annotations

import math

import pytest
import torch

from error_rule import check
from fastcl import reference, swd_loss
from fastcl.losses import draws
from fastcl.ops.chunked import compute_dtype
from sort_backends import BACKENDS, route

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=BACKENDS)
def device(request, monkeypatch):
    return route(request.param, monkeypatch)


def drawn(prior, count, p, d, dtype=torch.float32, device="cpu"):
    """Samples [count, d] and directions [p, d], in the dtype that rows of `dtype` are calculated in."""
    like = torch.empty(0, dtype=compute_dtype(dtype), device=device)
    return draws.prior_samples(prior, count, d, like, None), draws.orthogonal_projections(p, d, like, None)


def compare(z, samples, directions, what, normalize=False, reduction="mean", upstream=1.0):
    """Loss and gradient against float64 and plain PyTorch on the same samples and directions.

    Plain PyTorch calculates in float32 for 16-bit rows too, since its 16-bit result would forgive anything. Its
    products are the same numbers as ours: where two of them lie nearer than rounding, both sort them alike.
    """
    dtype = z.dtype

    def run(function, leaf_dtype, cast):
        leaf = z.detach().to(leaf_dtype).requires_grad_()
        loss = function(leaf.to(cast), samples.to(compute_dtype(cast)), directions.to(compute_dtype(cast)))
        return loss.detach(), *torch.autograd.grad((loss * upstream).sum(), leaf)

    def ours(z, samples, directions):
        options = {"normalize": normalize, "reduction": reduction}
        return swd_loss(z, prior_samples=samples, projections=directions, **options)

    def spec(*inputs):
        return reference.swd(*inputs, normalize=normalize, reduction=reduction)

    got, exact = run(ours, dtype, dtype), run(spec, torch.float64, torch.float64)
    eager = run(spec, dtype, compute_dtype(dtype))
    assert got[0].dtype == compute_dtype(dtype) and got[1].dtype == dtype
    check(f"{what} loss", got[0], exact[0], eager[0], compute_dtype(dtype))
    check(f"{what} dz", got[1], exact[1], eager[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("n,d", [(1, 1), (2, 2), (3, 64), (7, 1), (64, 7), (65, 16), (255, 2), (256, 1), (9, 512)])
@pytest.mark.parametrize("prior", draws.PRIORS)
def test_priors(device, prior, n, d, dtype):
    z = torch.randn(n, d, device=device).to(dtype)
    compare(z, *drawn(prior, n, d, d, dtype, device), f"{prior} N={n} d={d}", normalize=prior == "hypersphere")


@pytest.mark.parametrize("n,d", [(257, 128), (512, 64), (513, 2), (1024, 7), (1025, 64), (4097, 2), (16385, 1)])
@pytest.mark.parametrize("normalize", [True, False])
def test_larger(device, n, d, normalize):
    for dtype in (torch.float32, torch.bfloat16):
        z = torch.randn(n, d, device=device).to(dtype)
        compare(z, *drawn("normal", n, d, d, dtype, device), f"N={n} d={d} {dtype}", normalize=normalize)


def _few_bits(*shape):
    """Multiples of 1/8 in [-1, 1): their products and sums of 64 products are exact in float32."""
    return torch.randint(-8, 8, shape) / 8


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("n,k,p,d", [(600, 600, 64, 64), (2049, 2049, 8, 64), (4097, 1000, 3, 16), (300, 900, 64, 8)])
def test_products_that_are_exact(device, n, k, p, d, dtype):
    """Then plain PyTorch has no wrong order either, and the rule is as strict as it is for few rows. Ties abound."""
    z, samples, directions = (_few_bits(rows, d).to(device) for rows in (n, k, p))
    compare(z.to(dtype), samples, directions, f"N={n} K={k} P={p} d={d}")


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n,k,p,d", [(1, 9, 2, 3), (9, 1, 3, 3), (40, 60, 4, 8), (60, 40, 8, 8), (30, 90, 20, 8)])
def test_other_numbers_of_samples_and_directions(device, n, k, p, d, normalize, dtype):
    z = torch.randn(n, d, device=device).to(dtype)
    compare(z, *drawn("hypersphere", k, p, d, dtype, device), f"N={n} K={k} P={p} d={d}", normalize=normalize)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(device, reduction, normalize, dtype):
    z = torch.randn(50, 12, device=device).to(dtype)
    upstream = torch.randn(50, device=device, dtype=torch.float64) if reduction == "none" else -2.5
    for k in (50, 31):
        draw = drawn("hypercube", k, 12, 12, dtype, device)
        compare(z, *draw, f"{reduction} K={k}", normalize=normalize, reduction=reduction, upstream=upstream)


def test_samples_and_directions_of_any_dtype(device):
    """They are used in the precision of the calculation, and get no gradient."""
    z = torch.randn(20, 4, device=device)
    samples, directions = (_few_bits(rows, 4).to(device) for rows in (20, 5))
    expected = swd_loss(z, prior_samples=samples, projections=directions)
    for dtype in DTYPES:
        draw = {"prior_samples": samples.to(dtype), "projections": directions.to(dtype)}
        assert torch.equal(swd_loss(z, **draw), expected)
        for x in draw.values():
            x.requires_grad_()
        assert not swd_loss(z, **draw).requires_grad


@pytest.mark.parametrize("k", [7, 5, 12])
def test_gradcheck(device, k):
    z = torch.randn(7, 4, dtype=torch.float64, device=device, requires_grad=True)
    samples, directions = drawn("normal", k, 6, 4, torch.float64, device)
    for normalize in (True, False):
        for reduction in ("mean", "sum", "none"):
            options = {"normalize": normalize, "reduction": reduction}
            assert torch.autograd.gradcheck(
                lambda z, o=options: swd_loss(z, prior_samples=samples, projections=directions, **o), z
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_distance_to_itself_is_zero(device, dtype):
    z = torch.randn(65, 16, device=device).to(dtype).requires_grad_()
    for p in (3, 16, 40):
        loss = swd_loss(z, prior_samples=z.detach(), num_projections=p)
        assert loss == 0 and torch.autograd.grad(loss, z)[0].eq(0).all()


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("d", [1, 2, 64, 512])
def test_distance_to_a_translation(device, d, blocks):
    """Each orthonormal block sees all of the shift once, so that the loss is |t|^2 / d whatever the block.

    float32: a projection of d products errs by a few 2^-24 of |z| ~ sqrt(d) and is held against a shift as long:
    the differences and the right angles of the directions (1e-6) leave some 1e-6 of the loss.
    """
    z, t = torch.randn(40, d, device=device), torch.randn(d, device=device)
    # Rounded so that the sum is exact.
    z, t = (x.mul(1024).round().div(1024) for x in (z, t))
    loss = swd_loss(z, prior_samples=z + t, num_projections=blocks * d)
    assert loss.item() == pytest.approx(t.square().sum().item() / d, rel=1e-5)


@pytest.mark.parametrize("d,repeats", [(2, 64), (8, 16)])
def test_two_samples_of_one_sphere(d, repeats):
    """Their distance falls like 1 / N.

    Measured over ten seeds: slopes of -0.94 to -1.00 (d = 2) and -0.97 to -1.02 (d = 8).
    """
    sizes = (64, 128, 256, 512, 1024, 2048, 4096)
    losses = torch.empty(len(sizes), repeats)
    for i, n in enumerate(sizes):
        for k in range(repeats):
            losses[i, k] = swd_loss(drawn("hypersphere", n, 1, d)[0])
    size, mean = torch.tensor(sizes).log(), losses.mean(1).log()
    size = size - size.mean()
    slope = (size * mean).sum() / size.square().sum()
    assert abs(slope + 1) <= 0.15, f"slope {slope:.3f}"
    if d == 2:
        # N times the expectation tends to 2 * integral of F (1 - F) / f (Bobkov & Ledoux 2019), here of the arcsine
        # distribution: pi^2 / 6 + 1 / 2.
        scaled = (losses * torch.tensor(sizes)[:, None]).flatten()
        error = scaled.std() / len(scaled) ** 0.5
        assert abs(scaled.mean() - (math.pi**2 / 6 + 0.5)) <= 4 * error, f"{scaled.mean():.3f} +- {error:.3f}"


@pytest.mark.parametrize("prior", draws.PRIORS)
def test_distance_of_priors(prior):
    """A sample is nearest to its own prior, by far."""
    z, _ = drawn(prior, 1000, 1, 6)
    own = {other: swd_loss(z, other, normalize=False).item() for other in draws.PRIORS}
    assert min(own, key=own.get) == prior and 5 * own[prior] < sorted(own.values())[1], own


def _generator(device="cpu"):
    return torch.Generator(device).manual_seed(7)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("count", [None, 1, 5, 6, 12, 15])
@pytest.mark.parametrize("prior", draws.PRIORS)
def test_what_is_drawn(device, prior, count, dtype):
    """As many samples as rows, of the prior; num_projections directions, D unless told; rows as the prior asks."""
    z = torch.randn(31, 6, device=device).to(dtype)
    like, generator = torch.empty(0, dtype=compute_dtype(dtype), device=device), _generator(device)
    directions = draws.orthogonal_projections(count or 6, 6, like, generator)
    samples = draws.prior_samples(prior, 31, 6, like, generator)
    assert directions.shape == (count or 6, 6) and samples.shape == (31, 6)
    assert directions.dtype == samples.dtype == like.dtype
    unit = prior == "hypersphere"
    expected = swd_loss(z, prior_samples=samples, projections=directions, normalize=unit)
    got = swd_loss(z, prior, num_projections=count, generator=_generator(device))
    assert torch.equal(got, expected)


def test_normalize_follows_the_prior(device):
    z = 3 * torch.randn(40, 6, device=device)
    for prior in draws.PRIORS:
        plain, unit, rows = (
            swd_loss(z, prior, normalize=choice, generator=_generator(device)) for choice in (None, True, False)
        )
        assert torch.equal(plain, unit if prior == "hypersphere" else rows) and not torch.equal(unit, rows)
        draw = {"prior_samples": z + 1, "generator": _generator(device)}
        assert torch.equal(
            swd_loss(z, prior, **draw), swd_loss(z, prior, **draw | {"generator": _generator(device)}, normalize=False)
        )


def test_seeds(device):
    """A generator gives the same bits again and leaves the global one alone; without one torch.manual_seed counts."""
    z = torch.randn(40, 6, device=device)
    state_of = torch.cuda.get_rng_state if device == "cuda" else torch.get_rng_state
    state, generator = state_of(), _generator(device)
    for prior in draws.PRIORS:
        first = swd_loss(z, prior, generator=_generator(device))
        assert torch.equal(first, swd_loss(z, prior, generator=_generator(device)))
        assert not torch.equal(swd_loss(z, prior, generator=generator), swd_loss(z, prior, generator=generator))
    assert torch.equal(state_of(), state)
    torch.manual_seed(3)
    first, second = swd_loss(z), swd_loss(z)
    torch.manual_seed(3)
    assert torch.equal(first, swd_loss(z)) and not torch.equal(first, second)
    # One of the two may be given: the other one is still drawn.
    for fixed in ({"prior_samples": z + 1}, {"projections": torch.eye(6, device=device)}):
        assert not torch.equal(swd_loss(z, **fixed), swd_loss(z, **fixed))


def test_same_bits_every_time(device):
    z = torch.randn(600, 16, device=device).requires_grad_()
    results = []
    for _ in range(2):
        loss = swd_loss(z, "normal", generator=_generator(device))
        results.append((loss, *torch.autograd.grad(loss, z)))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("scale", [2.0**16, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_grad_scaler_factor_in_fp16(device, normalize, scale):
    """An upstream gradient of 65,536 neither overflows nor is lost on the way to fp16 gradients."""
    z = torch.randn(64, 16, device=device).half().requires_grad_()
    samples, directions = drawn("hypersphere", 64, 16, 16, device=device)
    loss = swd_loss(z, prior_samples=samples, projections=directions, normalize=normalize)
    (got,) = torch.autograd.grad(loss * scale, z)
    draw = samples.double(), directions.double()
    (exact,) = torch.autograd.grad(reference.swd(z.double(), *draw, normalize=normalize) * scale, z)
    assert got.isfinite().all() and exact.dtype == torch.float16
    # One rounding each, 2^-11 at most.
    assert (got.double() - exact.double()).norm() <= 1e-3 * exact.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prior", draws.PRIORS)
def test_autocast(prior, dtype):
    """Autocast changes neither the draws, nor the loss, nor its dtype, nor the gradient's."""
    z = torch.randn(40, 16).to(dtype).requires_grad_()
    plain = swd_loss(z, prior, generator=_generator())
    with torch.autocast("cpu", torch.bfloat16):
        loss = swd_loss(z, prior, generator=_generator())
        (inside,) = torch.autograd.grad(loss, z, retain_graph=True)
    assert loss.dtype == torch.float32 and torch.equal(loss, plain)
    (expected,) = torch.autograd.grad(plain, z)
    for grad in (inside, *torch.autograd.grad(loss, z)):
        assert grad.dtype == dtype and torch.equal(grad, expected)


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"reduction": "none"}], ids=str)
def test_double_backward_is_refused(device, options):
    z = torch.randn(9, 4, device=device, requires_grad=True)
    loss = swd_loss(z, **options).sum()
    (once,) = torch.autograd.grad(loss, z, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    assert torch.equal(grad, once)
    with pytest.raises(RuntimeError, match="swd_loss: double backward is not supported"):
        grad.square().sum().backward()


@pytest.mark.parametrize("prior", draws.PRIORS)
def test_compile_fullgraph(prior):
    def step(z):
        return swd_loss(z * 2, prior)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (8, 13, 21):
        z = torch.randn(n, 6, requires_grad=True)
        results = []
        for function in (step, compiled):
            torch.manual_seed(1)
            loss = function(z)
            results.append((loss, *torch.autograd.grad(loss, z)))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)


@pytest.mark.parametrize("value,expected", [(NAN, "isnan"), (INF, "isposinf"), (-INF, "isposinf")])
def test_nan_and_infinity(device, value, expected):
    z = torch.randn(40, 6, device=device)
    z[17, 3] = value
    # An infinite row has no direction.
    assert swd_loss(z, normalize=True).isnan()
    # Not an orthogonal draw, whose products with infinity may be infinite of both signs and meet.
    direction = torch.eye(6, device=device)[3:4]
    for prior in draws.PRIORS:
        assert getattr(swd_loss(z, prior, projections=direction, normalize=False), expected)()
    assert swd_loss(torch.randn_like(z), prior_samples=torch.full_like(z, NAN)).isnan()


def test_zero_rows_get_no_gradient(device):
    z = torch.randn(9, 4, device=device)
    z[2] = z[7] = 0
    z.requires_grad_()
    (grad,) = torch.autograd.grad(swd_loss(z), z)
    zero = grad.eq(0).all(1).nonzero().flatten()
    assert zero.tolist() == [2, 7]


def test_layouts(device):
    samples, directions = drawn("normal", 30, 8, 8, device=device)
    layouts = {
        "transposed": torch.randn(8, 30, device=device).T,
        "every other row": torch.randn(60, 8, device=device)[::2],
        "every other column": torch.randn(30, 16, device=device)[:, ::2],
        "one row expanded": torch.randn(1, 8, device=device).expand(30, 8),
        "overlapping rows": torch.randn(37, device=device).as_strided((30, 8), (1, 1)),
    }
    for what, z in layouts.items():
        for normalize in (True, False):
            compare(z, samples.T.contiguous().T, directions.T.contiguous().T, what, normalize=normalize)


def test_inputs_are_left_alone(device):
    z = torch.randn(30, 8, device=device, requires_grad=True)
    inputs = z, *drawn("normal", 30, 8, 8, device=device)
    before = [x.detach().clone() for x in inputs]
    for normalize in (True, False):
        swd_loss(z, prior_samples=inputs[1], projections=inputs[2], normalize=normalize).backward()
    for x, old in zip(inputs, before, strict=True):
        assert torch.equal(x, old)


@pytest.mark.gpu
@pytest.mark.parametrize("prior", draws.PRIORS)
def test_no_device_synchronisation(prior):
    z = torch.randn(512, 64, device="cuda", requires_grad=True)
    swd_loss(z, prior).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        swd_loss(z, prior).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_graph():
    z = torch.randn(1024, 64, device="cuda", requires_grad=True)
    draw = dict(zip(("prior_samples", "projections"), drawn("normal", 1024, 64, 64, device="cuda"), strict=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(swd_loss(z, **draw), z)
            torch.autograd.grad(swd_loss(z), z)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fixed = swd_loss(z, **draw)
        (grad,) = torch.autograd.grad(fixed, z)
        fresh = swd_loss(z)
    graph.replay()
    torch.cuda.synchronize()
    eager = swd_loss(z, **draw)
    assert torch.equal(fixed, eager) and torch.equal(grad, torch.autograd.grad(eager, z)[0])
    # A replay draws anew.
    first = fresh.item()
    graph.replay()
    assert fresh.item() != first
