"""Products of bf16 rows on the CPU: as exact as the type allows, whatever the shape, and the same on every run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from error_rule import check, relative, worst_row
from fastcl import _native, nt_xent, ops
from test_pair_ops import everything, number, unit

pytestmark = pytest.mark.skipif(not _native.BF16, reason="needs a processor and a torch that multiply bf16")
OP = torch.ops.fastcl
# Panels of 64 and of 16 columns, pairs of features and of rows, steps of 64 rows: full, with a rest, odd.
SHAPES = [
    (1, 1, 1),
    (3, 5, 2),
    (64, 64, 64),
    (65, 63, 33),
    (130, 90, 63),
    (97, 300, 65),
    (300, 97, 100),
    (700, 530, 31),
]


def positive(r, d):
    """Unit rows without negative entries: products with weights do not cancel."""
    return F.normalize(torch.rand(r, d) + 0.05, dim=1).bfloat16()


@pytest.mark.parametrize("scale", [5.0, 500.0])
@pytest.mark.parametrize("r,c,d", SHAPES)
def test_as_exact_as_the_type_allows(r, c, d, scale):
    """Sums of products are those of float32, because products of bf16 are exact in it. Gradients differ by the
    rounding of weights, at most 2^-9 of each; twice that, for the sums."""
    a, b, ids = positive(r, d), positive(c, d), torch.randint(9, (r,))
    exact = everything(OP, a.double(), b.double(), scale, ids)
    # What is taken from `a` inside has the type of the calculation.
    single = everything(OP, a.float(), b.float(), scale, ids)
    got = wide_everything(a, b, scale, ids)
    for k, (g, x, f) in enumerate(zip(got, exact, single, strict=True)):
        if g.dtype == torch.int64:
            assert torch.equal(g, x)
        elif g.ndim == 1:
            there = x.isfinite()
            assert torch.equal(g[~there], x[~there])
            check(f"sum {k}", g[there], x[there], f[there], torch.float32)
        else:
            assert g.dtype == torch.float32
            assert max(relative(g, x), worst_row(g, x)) <= 2**-8, k


class Widened:
    """torch.ops.fastcl for operands of bf16: numbers that go with them are float32."""

    def __getattr__(self, name):
        def call(a, b, scale, *args, **options):
            args = [x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x for x in args]
            for key, x in options.items():
                if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16:
                    options[key] = x.float()
            return getattr(OP, name)(a, b, scale.float(), *args, **options)

        return call


def wide_everything(a, b, scale, ids):
    return list(everything(Widened(), a, b, scale, ids))


@pytest.mark.parametrize("features", [330, 331])
@pytest.mark.parametrize("scale", [25.0, 400.0])
def test_every_column_counts_once(scale, features):
    """Row i meets its only large similarity in column (i + step) mod n."""
    n = 330
    s, a = number(scale, torch.float32), torch.eye(n, features).bfloat16()
    for step in range(0, n, 41):
        b = a.roll(step, 0)
        found = OP.lse_forward(a, b, s, scale, n, 0, columns=True)
        exact = torch.tensor(scale).double() + (n - 1) * torch.tensor(-scale).double().exp()
        for lse in (*found, *OP.lse_forward(a, b, s, scale, n, 0)):
            torch.testing.assert_close(lse, exact.expand(n), rtol=1e-6, atol=0)  # twice would be log 2 more
        row, column = torch.rand(2, n)
        grads = OP.lse_backward(a, b, s, scale, n, 0, *found, row, column, columns=True)
        weights = F.pad(torch.diag(row + column.roll(-step)), (0, features - n))
        for grad, expected in zip(grads, (weights, weights.roll(step, 0)), strict=True):
            torch.testing.assert_close(grad, expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("r,c,d", [(0, 5, 4), (5, 0, 4), (0, 0, 3), (40, 30, 0)])
def test_nothing_to_multiply(r, c, d):
    a, b, s = torch.ones(r, d).bfloat16(), torch.ones(c, d).bfloat16(), number(2.0, torch.float32)
    lse = OP.lse_forward(a, b, s, 2.0, c, 0, columns=True)
    other = OP.lse_forward(a.float(), b.float(), s, 2.0, c, 0, columns=True)
    grads = OP.lse_backward(a, b, s, 2.0, c, 0, *lse, None, None, columns=True)
    assert all(torch.equal(x, y) for x, y in zip(lse, other, strict=True))
    assert [g.shape for g in grads] == [(r, d), (c, d)] and all(g.eq(0).all() for g in grads)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scale", [5.0, 500.0])
def test_poison_is_not_lost(scale, poison):
    """It reaches what it reaches in float32: sums of its row and of all columns, and gradients."""
    a, b, s = unit(90, 7).bfloat16(), positive(83, 7), number(scale, torch.float32)
    a[7, 3] = poison
    lse = OP.lse_forward(a, b, s, ops.UNIT_ROWS, 83, 0, columns=True)
    expected = OP.lse_forward(a.float(), b.float(), s, ops.UNIT_ROWS, 83, 0, columns=True)
    for got, other in zip(lse, expected, strict=True):
        assert torch.equal(got.isfinite(), other.isfinite()) and torch.equal(got.isnan(), other.isnan())
    grads = OP.lse_backward(a, b, s, ops.UNIT_ROWS, 83, 0, *lse, None, None, columns=True)
    expected = OP.lse_backward(a.float(), b.float(), s, ops.UNIT_ROWS, 83, 0, *lse, None, None, columns=True)
    assert any(g.isnan().any() for g in grads)
    for got, other in zip(grads, expected, strict=True):
        assert torch.equal(got.isfinite(), other.isfinite())


@pytest.mark.parametrize("r,c", [(700, 500), (60, 900), (900, 60)])
@pytest.mark.parametrize("scale", [5.0, 500.0])
def test_the_same_bits_whatever_the_threads(r, c, scale):
    a, b, ids = unit(r, 24).bfloat16(), unit(c, 24).bfloat16(), torch.randint(9, (r,))
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            runs.append(wide_everything(a, b, scale, ids))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True))


def test_without_onednn_rows_are_widened():
    """It can be switched off after rows were rounded."""
    a, b, ids = unit(150, 24).bfloat16(), unit(90, 24).bfloat16(), torch.randint(9, (150,))
    expected = list(everything(OP, a.float(), b.float(), 5.0, ids))
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        got = wide_everything(a, b, 5.0, ids)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert not torch.equal(wide_everything(a, b, 5.0, ids)[5], expected[5])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n,d", [(1, 1), (9, 31), (40, 33), (33, 64)])
def test_rows_are_rounded_once_and_positives_are_of_them(n, d, normalize):
    x1, x2 = torch.randn(2, n, d).bfloat16()
    z, rnorm, pos = OP.normalize_pair(x1, x2, normalize)
    assert z.dtype == ops.product_dtype(x1, normalize) == torch.bfloat16 and pos.dtype == torch.float32
    rows = torch.cat([x1, x2])
    wide, wide_rnorm, _ = OP.normalize_pair(x1.float(), x2.float(), normalize)
    assert torch.equal(z, wide.bfloat16() if normalize else rows) and torch.equal(rnorm, wide_rnorm)
    exact = (z[:n].double() * z[n:].double()).sum(1)
    torch.testing.assert_close(pos.double(), exact, rtol=1e-5, atol=1e-6)
    share = torch.rand(2 * n, dtype=torch.float64)
    numbers = (torch.randn(2 * n, d), pos, share, torch.tensor(3.0), torch.tensor(0.7), torch.rand(2 * n), 0.5, 2.0, 7)
    for dtype in (torch.float32, torch.bfloat16):
        got = OP.pair_backward(z, rnorm, *numbers, dtype)
        expected = OP.pair_backward(z.float(), rnorm, *numbers, dtype)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_bf16_rows_at_any_stride():
    x1, x2 = (x.bfloat16() for x in torch.randn(2, 40, 66))
    whole = nt_xent(x1[:, ::2].contiguous(), x2[:, 1::2].contiguous(), 0.2)
    assert torch.equal(nt_xent(x1[:, ::2], x2[:, 1::2], 0.2), whole)
