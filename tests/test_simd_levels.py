"""Every instruction set that the C++ kernels were compiled for, as far as this processor has it.

The op tests proper run with the highest one. Here each entry of the table in csrc/cpu/simd.h is reached at every level:
both forms of the exponential, ids, biases, pulls, softplus, moments, and the loops over single rows.
"""

from __future__ import annotations

import pytest
import torch

from error_rule import check
from fastcl import _native
from fastcl.ops import chunked
from test_pair_ops import compare_lse, compare_softplus, everything, masks, number, unit

LEVELS = ["baseline", "avx2", "avx512"]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
OP = torch.ops.fastcl
# Vectors have 2 to 16 lanes: around each number of them, and more than one tile.
SHAPES = [(1, 1, 1), (5, 3, 2), (17, 15, 16), (70, 33, 7), (31, 130, 65), (300, 290, 5)]


@pytest.fixture(params=LEVELS, autouse=True)
def level(request):
    if not _native.LOADED:
        pytest.skip(_native.REASON)
    try:
        previous = _native.module._use_simd(request.param)
    except ValueError:
        pytest.skip(f"this processor or build has no {request.param}")
    yield request.param
    _native.module._use_simd(previous)


def test_the_level_in_use_is_reported(level):
    assert _native.build_info()["simd"] == level
    with pytest.raises(ValueError, match="name must be a level of this processor, got sse9"):
        _native.module._use_simd("sse9")
    assert _native.build_info()["simd"] == level


@BOTH
@pytest.mark.parametrize("scale", [9.0, 900.0])
@pytest.mark.parametrize("r,c,d", SHAPES)
def test_lse(r, c, d, scale, dtype):
    a, b = unit(r, d, dtype), unit(c, d, dtype)
    biases = {"bias": torch.empty(c, dtype=dtype).uniform_(-20, 20)}
    for same in ("keep", "drop", "only", "sum"):
        ids = masks(r, c, same)
        compare_lse(OP, a, b, scale, scale, 0, ids, columns=same != "sum")
        compare_lse(OP, a, b, scale, -1.0, c, {**ids, **biases})
        compare_lse(OP, a, None, scale, scale, 0, masks(r, r, same), r // 2 if r % 2 == 0 and same != "sum" else 0)


@BOTH
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("r,c,d", SHAPES)
def test_softplus(r, c, d, sign, dtype):
    a, b = unit(r, d, dtype), unit(c, d, dtype)
    for same in ("keep", "drop", "only"):
        compare_softplus(OP, a, b, 6.0, 9 * torch.randn(r, dtype=dtype), sign, 0, masks(r, c, same))
    compare_softplus(OP, a, None, 6.0, 9 * torch.randn(r, dtype=dtype), sign, 0, {})


@BOTH
@pytest.mark.parametrize("scale", [3.0, 900.0])
@pytest.mark.parametrize("r,c,d", SHAPES)
def test_stats(r, c, d, scale, dtype):
    a, b = unit(r, d, dtype), unit(c, d, dtype)
    got = OP.similarity_stats(a, b, number(scale, dtype), c, 0)
    exact = chunked.similarity_stats(a.double(), b.double(), torch.tensor(scale).double(), c, 0)
    eager = chunked.similarity_stats(a, b, number(scale, dtype), c, 0)
    for label, g, x, e in zip(("lse", "largest", "mean"), got, exact, eager, strict=True):
        check(label, g, x, e, dtype)


@BOTH
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n,d", [(1, 1), (3, 2), (5, 7), (4, 8), (9, 17), (20, 64), (3, 131)])
def test_rows(n, d, normalize, dtype):
    """Normalisation and the way back through it."""
    x1, x2 = torch.randn(2, n, d, dtype=dtype) * 10.0 ** torch.randint(-3, 3, (n, 1))
    wide = (x1.double(), x2.double(), normalize)
    names = ("z", "rnorm", "positives")
    for label, g, x, e in zip(
        names, OP.normalize_pair(x1, x2, normalize), chunked.normalize_pair(*wide),
        chunked.normalize_pair(x1, x2, normalize), strict=True,
    ):  # fmt: skip
        if g.numel():
            check(label, g, x, e, dtype)
    z, rnorm, pos = OP.normalize_pair(x1, x2, normalize)
    numbers = [torch.randn(2 * n, d, dtype=dtype), pos, torch.rand(2 * n, dtype=torch.float64)]
    numbers += [number(3.0, dtype), number(0.7, dtype), torch.rand(2 * n, dtype=dtype)]
    settings = (0.5, 2.0, 7)
    got = OP.pair_backward(z, rnorm, *numbers, *settings, dtype)
    eager = chunked.pair_backward(z, rnorm, *numbers, *settings, dtype)
    wide = (z.double(), rnorm.double(), *(x.double() for x in numbers))
    exact = chunked.pair_backward(*wide, *settings, torch.float64)
    # One feature is no direction: what is left of the gradient is rounding, of numbers of 1 / rnorm.
    floor = 0.0 if d > 1 or not normalize else 1e3
    for label, g, x, e in zip(("dx1", "dx2", "slope"), got, exact, eager, strict=True):
        check(label, g, x, e, dtype, floor if label != "slope" else 0.0)


@BOTH
@pytest.mark.parametrize("scale", [5.0, 500.0])
def test_nan_is_not_lost(scale, dtype):
    a, b, ids = unit(90, 6, dtype), unit(80, 6, dtype), torch.zeros(90, dtype=torch.int64)
    a[7, 3] = torch.nan
    for x in everything(OP, a, b, scale, ids):
        assert x.dtype == torch.int64 or x.isnan().any()


@BOTH
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_poisoned_rows_have_no_direction(poison, dtype):
    a = unit(90, 21, dtype)
    a[7, 3] = a[31, 20] = poison
    z, rnorm, pos = OP.normalize_pair(a[:45], a[45:], True)
    assert z.isnan().sum(1).eq(torch.where(torch.isin(torch.arange(90), torch.tensor([7, 31])), 21, 0)).all()
    assert rnorm.isnan().nonzero().flatten().tolist() == [7, 31] == pos.isnan().nonzero().flatten().tolist()


@BOTH
@pytest.mark.parametrize("scale", [25.0, 400.0])
def test_every_column_decides(scale, dtype):
    """Row i meets its only large similarity in column (i + step) mod n: no lane is left out."""
    n = 143
    s, a = number(scale, dtype), torch.eye(n, dtype=dtype)
    for step in range(0, n, 13):
        b = a.roll(step, 0)
        found = OP.lse_forward(a, b, s, scale, n, 0, columns=True)
        for lse in found:
            torch.testing.assert_close(lse, torch.full_like(lse, scale), rtol=1e-6, atol=0)
        grads = OP.lse_backward(a, b, s, scale, n, 0, *found, None, None, columns=True)
        weights = 2 * torch.eye(n, dtype=dtype)
        for grad, expected in zip(grads, (weights, weights.roll(step, 0)), strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)
        sums, slopes = OP.softplus_forward(a, b, s, torch.full((n,), -20.0, dtype=dtype), 1.0, n)
        torch.testing.assert_close(sums, torch.full_like(sums, scale - 20), rtol=2e-3, atol=0)
        assert (slopes - 1).abs().max() < 0.01
