"""segmented_sort against torch.sort(stable=True): the same permutation, the same bits."""

from __future__ import annotations

import functools

import pytest
import torch

from fastcl import ops, segmented_sort
from sort_backends import BACKENDS, route

# The integers of the same width.
INTEGERS = {
    torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16,
}  # fmt: skip
DTYPES = list(INTEGERS)
NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
# On either side of where an implementation changes its method, and of powers of two.
SMALL = (0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
SMALL += (511, 512, 513, 1023, 1024, 1025)
LARGE = (2047, 2048, 2049, 4097, 16384, 16385, 70_000)
TIERS = tuple(size + step for size in (512, 1024, 2048, 4096, 8192, 16384) for step in (-1, 0, 1))


@pytest.fixture(params=BACKENDS)
def device(request, monkeypatch):
    return route(request.param, monkeypatch)


def _bits(shape, dtype):
    """Every bit pattern alike: numbers of all sizes, denormals, infinities, NaNs of both signs with any payload."""
    width = torch.iinfo(INTEGERS[dtype])
    return torch.randint(width.min, width.max, shape, dtype=INTEGERS[dtype]).view(dtype)


def _of(*values):
    """Few values, so mostly ties."""

    def make(shape, dtype):
        return torch.tensor(values, dtype=torch.float64).to(dtype)[torch.randint(len(values), shape)]

    return make


def _special(shape, dtype):
    """Zeros and NaNs of both signs, infinities, denormals of both signs, the largest and the smallest numbers."""
    tiny = torch.finfo(dtype).smallest_normal
    values = [0.0, tiny, tiny / 2, tiny / 4, torch.finfo(dtype).max, torch.inf, torch.nan, 1.0]
    bits = torch.tensor(values, dtype=dtype).view(INTEGERS[dtype])
    # Not -values, which need not flip the sign of NaN.
    values = torch.cat([bits, bits ^ torch.iinfo(bits.dtype).min]).view(dtype)
    return values[torch.randint(16, shape)]


def _one_byte(shape, dtype):
    """Numbers that differ in a single byte, another one in each segment."""
    bits = torch.randint(256, shape, dtype=INTEGERS[dtype])
    shift = torch.arange(shape[0])[:, None] % dtype.itemsize * 8
    return bits.bitwise_left_shift(shift.to(bits.dtype)).view(dtype)


KINDS = {
    "normal": lambda shape, dtype: torch.randn(shape).to(dtype),
    "bits": _bits,
    "special": _special,
    "one byte": _one_byte,
    "ties": _of(-2.5, -1.0, 0.25, 3.0, 3.5),
    "constant": _of(-0.75),
    "zeros of both signs": _of(0.0, -0.0),
    "sorted": lambda shape, dtype: torch.randn(shape).to(dtype).sort(-1).values,
    "reversed": lambda shape, dtype: torch.randn(shape).to(dtype).sort(-1, descending=True).values,
}


def assert_sorted(x: torch.Tensor, descending: bool) -> None:
    """Permutation and bits of torch.sort."""
    values, indices = segmented_sort(x, descending=descending)
    expected, order = torch.sort(x, dim=-1, descending=descending, stable=True)
    where = f"{list(x.shape)} {x.dtype} descending={descending}"
    assert indices.dtype == torch.int32 and indices.shape == x.shape, where
    assert values.dtype == x.dtype and values.shape == x.shape, where
    assert torch.equal(indices.long(), order), where
    # As integers: -0 and +0, and NaNs with other payloads, are different.
    integers = INTEGERS[x.dtype]
    assert torch.equal(values.view(integers), expected.view(integers)), where


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_small(device, kind, dtype, descending):
    for n in SMALL:
        assert_sorted(KINDS[kind]((9, n), dtype).to(device), descending)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("kind", ["bits", "special", "one byte", "ties"])
def test_large(device, kind, dtype, descending):
    for n in LARGE:
        # As many segments as the widest type has bytes, where that is cheap.
        assert_sorted(KINDS[kind]((8 if n < 5000 else 2, n), dtype).to(device), descending)


def test_many_segments(device):
    """More segments than threads or blocks take at a time."""
    for n in (1, 5, 40):
        assert_sorted(_special((3001, n), torch.float32).to(device), False)


@pytest.mark.parametrize("shape", [(5,), (1,), (0,), (3, 0), (0, 3), (2, 3, 4), (2, 0, 4), (1, 2, 3, 0), (2, 1, 3, 17)])
def test_shapes(device, shape):
    for dtype in DTYPES:
        assert_sorted(torch.randn(shape, device=device).to(dtype), True)


LAYOUTS = {
    "transposed": lambda randn: randn(30, 7).T,
    "every other element": lambda randn: randn(7, 60)[:, ::2],
    "every other segment": lambda randn: randn(14, 30)[::2],
    "storage offset": lambda randn: randn(213)[3:].view(7, 30),
    "one segment expanded": lambda randn: randn(1, 30).expand(7, 30),
    "one number expanded": lambda randn: randn(1, 1).expand(7, 30),
    "overlapping segments": lambda randn: randn(37).as_strided((7, 30), (1, 1)),
    "last dimension first in memory": lambda randn: randn(30, 2, 3).permute(1, 2, 0),
    "negated lazily": lambda randn: randn(7, 30, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout):
    x = LAYOUTS[layout](functools.partial(torch.randn, device=device))
    before = x.clone()
    assert_sorted(x, False)
    assert torch.equal(x, before)
    # Contiguous whatever x is: torch.compile relies on the strides that the fake op states.
    assert all(result.is_contiguous() for result in segmented_sort(x))


def test_same_bits_every_time(device):
    x = _special((5, 3000), torch.float32).to(device)
    first = segmented_sort(x)
    for _ in range(3):
        for got, expected in zip(segmented_sort(x), first, strict=True):
            assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_any_number_of_threads(device, threads):
    x = _of(1.0, 2.0, -3.0)((7, 20_000), torch.float32).to(device)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(segmented_sort(x)[1])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("shape", [(6,), (2, 3, 5)])
def test_gradients(device, shape, descending):
    # Far enough apart that the finite differences do not change the order.
    x = torch.randperm(torch.Size(shape).numel()).view(shape).double().to(device).requires_grad_()

    def values(x):
        return segmented_sort(x, descending=descending)[0]

    assert torch.autograd.gradcheck(values, x)
    # Squared: the sort alone is linear, all its second derivatives are 0.
    assert torch.autograd.gradgradcheck(lambda x: values(x).square(), x)


def test_gradient_goes_where_values_came_from(device):
    """Also among equal elements, and in the dtype of x."""
    for dtype in DTYPES:
        x = _of(1.0, -1.0)((4, 50), dtype).to(device).requires_grad_()
        weight = torch.randn(4, 50, device=device).to(dtype)
        values, indices = segmented_sort(x)
        assert not indices.requires_grad
        (grad,) = torch.autograd.grad(values, x, weight)
        expected, _ = torch.sort(x, dim=-1, stable=True)
        assert grad.dtype == dtype and torch.equal(grad, torch.autograd.grad(expected, x, weight)[0])


def test_gradient_of_a_view(device):
    base = torch.randn(3, 8, 2, device=device, requires_grad=True)
    x = base.transpose(1, 2)
    weight = torch.randn(3, 2, 8, device=device)
    got, expected = (
        torch.autograd.grad(values, base, weight)[0] for values in (segmented_sort(x)[0], torch.sort(x, -1).values)
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_opcheck(dtype):
    x = torch.randn(3, 8).to(dtype)
    for descending in (False, True):
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(ops.segmented_sort, (x, descending), test_utils=tests)


def test_compile_fullgraph():
    def step(x):
        values, indices = segmented_sort(x * 2, descending=True)
        return values.square().cumsum(-1), indices

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for shape in ((3, 8), (3, 13), (2, 4, 21)):
        x = torch.randn(shape, requires_grad=True)
        results = []
        for function in (step, compiled):
            values, indices = function(x)
            results.append((values, indices, torch.autograd.grad(values.sum(), x)[0]))
        for eager, other in zip(*results, strict=True):
            assert torch.equal(eager, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("n", [*TIERS, 100_000])
def test_tiers_on_gpu(n, dtype):
    for descending in (False, True):
        for make in (_bits, _special):
            assert_sorted(make((67 if n < 20_000 else 3, n), dtype).cuda(), descending)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [600, 16_384, 100_000])
def test_no_device_synchronisation(n):
    x = torch.randn(8, n, device="cuda", requires_grad=True)
    segmented_sort(x)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        segmented_sort(x)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("n", [600, 16_384, 100_000])
def test_cuda_graph(n):
    x = torch.randn(8, n, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        segmented_sort(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values, indices = segmented_sort(x)
    # Other numbers than those of the capture.
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    expected, order = torch.sort(x, stable=True)
    assert torch.equal(values, expected) and torch.equal(indices.long(), order)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [600, 4096, 16_384])
def test_no_memory_but_the_results(n):
    x = torch.randn(8, n, device="cuda")
    ops.segmented_sort(x, False)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    results = ops.segmented_sort(x, False)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == len(results)
