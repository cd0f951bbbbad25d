"""The ops over pairs of rows, C++ and chunked torch, against fastcl.reference in float64, under the error rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from error_rule import check
from fastcl import _native, reference
from fastcl.ops import ANY_ROWS, UNIT_ROWS, chunked

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# One row, one column, none of either, blocks that vectors do not fill, several blocks on either side or both.
SHAPES = [(1, 1, 1), (3, 5, 4), (1, 300, 7), (300, 1, 7), (0, 5, 4), (5, 0, 4)]
SHAPES += [(70, 530, 33), (530, 70, 33), (150, 150, 8)]
SAME = ["keep", "drop", "only", "sum"]
native = pytest.mark.skipif(not _native.LOADED, reason=_native.REASON)


@pytest.fixture(params=[pytest.param("cpp", marks=native), "chunked"])
def ops(request):
    return torch.ops.fastcl if request.param == "cpp" else chunked


def unit(n, d, dtype=torch.float32):
    return F.normalize(torch.randn(n, d), dim=1).to(dtype)


def masks(r, c, same, classes=4):
    if same == "keep":
        return {}
    return {"ids_a": torch.randint(classes, (r,)), "ids_b": torch.randint(classes, (c,)), "same": same}


def number(x, dtype):
    return torch.tensor(x, dtype=dtype)


def every(tensors, cast):
    return [x.to(cast) if x is not None and x.is_floating_point() else x for x in tensors]


def agree(what, got, exact, eager, dtype):
    """The error rule, and -inf where the specification has it."""
    assert got.shape == exact.shape, what
    there = exact != -torch.inf
    assert (got[~there] == -torch.inf).all(), f"{what}: {got[~there]} where nothing is allowed"
    if there.any():
        check(what, got[there], exact[there], eager[there], dtype)


def spec_forward(a, b, scale, offset, pair, *, ids_a=None, ids_b=None, same="keep", bias=None):
    """[lse of the rows, of the columns, positive sums, counts]"""
    ids = {} if same in ("keep", "sum") else {"ids_a": ids_a, "ids_b": ids_b, "same": same}
    S = reference.masked_similarity(a, b, scale, offset, pair, bias=bias, **ids)
    positives = reference.positive_sums(a, b, ids_a, ids_b, offset) if same == "sum" else (None, None)
    return S.logsumexp(1), S.logsumexp(0), *positives


def spec_backward(a, b, scale, offset, pair, lse_a, lse_b, w_a, w_b, pull_a, pull_b, **ids):
    pulls = {"pull_a": pull_a, "pull_b": pull_b}
    return reference.similarity_lse_backward(a, b, scale, offset, lse_a, lse_b, w_a, w_b, pair, **pulls, **ids)


def compare_lse(ops, a, b, scale, bound, offset, ids, pair=0, columns=False):
    """Both directions with weights, some of them 0, against the specification; symmetric where b is None."""
    dtype, other = a.dtype, a if b is None else b
    r, c = len(a), len(other)
    own = {**ids, "ids_b": None} if b is None and ids else ids
    full = {**ids, "ids_b": ids["ids_a"]} if b is None and "ids_a" in ids else ids
    wide = {k: v.double() if k == "bias" and v is not None else v for k, v in full.items()}
    s = number(scale, dtype)
    got = ops.lse_forward(a, b, s, bound, offset, pair, **own, columns=columns)
    exact = spec_forward(a.double(), other.double(), scale, offset, pair, **wide)
    eager = spec_forward(a, other, scale, offset, pair, **full)
    assert all(x.dtype == torch.float64 for x in got[:2])
    agree("lse", got[0], exact[0], eager[0], dtype)
    if columns:
        agree("lse of the columns", got[1], exact[1], eager[1], dtype)
    summed = full.get("same") == "sum"
    if summed:
        agree("positives", got[1], exact[2], eager[2], dtype)
        assert torch.equal(got[2], exact[3])

    weights = [5 * torch.rand(n, dtype=dtype) * (torch.rand(n) < 0.8) for n in (r, c)]
    pulls = [torch.rand(n, dtype=dtype) if summed else None for n in (r, c)]
    if b is not None:
        # Rounded as the similarities are: an exact one would show their rounding.
        allowed = {**own, "same": "keep"} if summed else own
        found = ops.lse_forward(a, b, s, bound, offset, pair, **allowed, columns=True)
    sides = [exact[0], exact[1], *every(weights, torch.float64), *every(pulls, torch.float64)]
    rough = [eager[0], eager[1], *weights, *pulls]
    arguments = [got[0], None, weights[0], None] if b is None else [*found, *weights]
    if b is None:  # The columns' side is the rows'.
        for numbers in (sides, rough):
            numbers[1], numbers[3], numbers[5] = numbers[0], numbers[2], numbers[4]
    extra = {"pull_a": pulls[0], "pull_b": None if b is None else pulls[1]} if summed else {}
    grads = ops.lse_backward(a, b, s, bound, offset, pair, *arguments, **own, **extra, columns=columns)
    exact = spec_backward(a.double(), other.double(), scale, offset, pair, *sides, **wide)
    eager = spec_backward(a, other, scale, offset, pair, *rough, **full)
    assert len(grads) == 1 + columns
    for label, g, x, e in zip(("G", "G of the columns"), grads, exact, eager, strict=False):
        if g.numel():
            check(label, g, x, e, dtype)


@BOTH
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("same", SAME)
@pytest.mark.parametrize("r,c,d", SHAPES)
def test_lse_of_rectangles(ops, r, c, d, same, biased, dtype):
    a, b = unit(r, d, dtype), unit(c, d, dtype)
    ids = masks(r, c, same)
    if biased:
        ids["bias"] = torch.empty(c, dtype=dtype).uniform_(-20, 20)
    for offset in (0, c):
        compare_lse(ops, a, b, 7.0, 7.0, offset, ids, columns=same != "sum")
        compare_lse(ops, a, b, 7.0, -1.0, offset, ids)


@BOTH
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("same", SAME)
@pytest.mark.parametrize("n,pair", [(1, 0), (2, 1), (18, 9), (300, 0), (300, 150)])
def test_lse_of_the_rows_themselves(ops, n, pair, same, biased, dtype):
    ids = masks(n, n, same)
    if same == "sum":
        pair = 0  # what the specification of the positives knows
    if biased:
        ids["bias"] = torch.empty(n, dtype=dtype).uniform_(-20, 20)
    compare_lse(ops, unit(n, 12, dtype), None, 9.0, 9.0, 0, ids, pair)


@BOTH
@pytest.mark.parametrize("length", [1.0, 3.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 14.3, 100.0, 1000.0])
def test_scales(ops, scale, length, dtype):
    """Both forms of the exponential; from the bound that the caller knows, and from the rows' lengths."""
    a, b = length * unit(150, 16, dtype), length * unit(90, 16, dtype)
    for bound in (scale, UNIT_ROWS, ANY_ROWS) if length == 1 else (ANY_ROWS,):
        compare_lse(ops, a, b, scale, bound, 0, {}, columns=True)
        compare_lse(ops, a, b, scale, bound, 90, masks(150, 90, "sum"))
        compare_lse(ops, a, None, scale, bound, 0, masks(150, 150, "sum"))


# Blocks of 64 rows, so that the numbers of blocks stand here, up to the largest blocks of 256 and 192.
@pytest.mark.parametrize("dtype,r,c", [
    *[(torch.float32, 64 * m, 64 * n) for m, n in [(1, 8), (8, 1), (2, 3), (3, 2), (3, 8), (7, 8), (8, 8)]],
    (torch.float32, 40, 4000), (torch.float32, 2400, 70), (torch.float32, 2400, 2200), (torch.float64, 1700, 900),
])  # fmt: skip
def test_numbers_of_blocks(ops, r, c, dtype):
    a, b = unit(r, 3, dtype), unit(c, 3, dtype)
    compare_lse(ops, a, b, 20.0, 20.0, 0, {}, columns=True)
    beta = torch.randn(r, dtype=dtype)
    compare_softplus(ops, a, b, 5.0, beta, -1.0, 0, {})


@BOTH
@pytest.mark.parametrize("ids", ["equal", "different", "far apart"])
def test_kinds_of_ids(ops, ids, dtype):
    """Far apart: they differ in the high bits alone, and by more than 2^63. Some only columns have."""
    n = 140
    codes = {
        "equal": torch.full((n,), -7),
        "different": torch.randperm(n),
        "far apart": (torch.randint(-4, 4, (n,)) << 32) + torch.randint(2, (n,)) * (-(2**63)),
    }[ids]
    for same in SAME[1:]:
        pairs = {"ids_a": codes[:100], "ids_b": codes ^ (torch.arange(n) % 5 == 0), "same": same}
        a, b = unit(100, 6, dtype), unit(n, 6, dtype)
        compare_lse(ops, a, b, 5.0, 5.0, 0, pairs, columns=same != "sum")
        compare_lse(ops, b, None, 5.0, 5.0, 0, {"ids_a": codes, "same": same})
        if same != "sum":
            compare_softplus(ops, a, b, 5.0, torch.zeros(100, dtype=dtype), 1.0, 0, pairs)


@BOTH
@pytest.mark.parametrize("scale", [5.0, 500.0])
def test_sides_that_take_no_part(ops, scale, dtype):
    """An lse of -inf, although similarities are there."""
    a, b = unit(130, 6, dtype), unit(90, 6, dtype)
    lse = [reference.similarity_lse(*x, scale, 130) for x in ((a.double(), b.double()), (b.double(), a.double()))]
    lse[0][::3], lse[1][1::4] = -torch.inf, -torch.inf
    for both in (False, True):
        sides = (lse[0], lse[1] if both else None)
        grads = ops.lse_backward(a, b, number(scale, dtype), scale, 90, 0, *sides, None, None, columns=True)
        exact = reference.similarity_lse_backward(a.double(), b.double(), scale, 90, *sides)
        eager = reference.similarity_lse_backward(a, b, scale, 90, *(x if x is None else x.to(dtype) for x in sides))
        for g, x, e in zip(grads, exact, eager, strict=True):
            check("G", g, x, e, dtype)
    none = torch.full((130,), -torch.inf, dtype=torch.float64)
    (g,) = ops.lse_backward(a, b, number(scale, dtype), scale, 90, 0, none, None, None, None)
    assert g.eq(0).all()


@BOTH
@pytest.mark.parametrize("scale", [25.0, 400.0])
def test_every_column_counts_once(ops, scale, dtype):
    """Row i meets its only large similarity in column (i + step) mod n."""
    n = 330
    s, ids, a = number(scale, dtype), torch.arange(n), torch.eye(n, dtype=dtype)
    for step in range(0, n, 41):
        b = a.roll(step, 0)
        found = ops.lse_forward(a, b, s, scale, n, 0, columns=True)
        exact = torch.tensor(scale).double() + (n - 1) * torch.tensor(-scale).double().exp()
        for lse in (*found, *ops.lse_forward(a, b, s, scale, n, 0)):
            torch.testing.assert_close(lse, exact.expand(n), rtol=1e-6, atol=0)  # twice would be log 2 more
        same = {"ids_a": ids, "ids_b": ids.roll(step), "same": "sum"}
        _, positives, counts = ops.lse_forward(a, b, s, scale, n, 0, **same)
        assert positives.sub(1).abs().max() < 1e-6 and counts.eq(1).all()
        row, column = torch.rand(2, n, dtype=dtype)
        grads = ops.lse_backward(a, b, s, scale, n, 0, *found, row, column, columns=True)
        weights = torch.diag(row + column.roll(-step))
        for grad, expected in zip(grads, (weights, weights.roll(step, 0)), strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)
        sums, slopes, g_a, g_b = ops.softplus_both(a, b, s, torch.full((n,), -20.0, dtype=dtype), 1.0, n, row)
        softplus = F.softplus(torch.tensor([scale - 20, -20.0]).double(), threshold=1e9)
        torch.testing.assert_close(sums, (softplus[0] + (n - 1) * softplus[1]).expand(n), rtol=1e-6, atol=0)
        torch.testing.assert_close(slopes, torch.ones_like(slopes), rtol=0, atol=0.01)
        weights = row.diag()
        assert (g_a - weights).abs().max() < 0.01 and (g_b - weights.roll(step, 0)).abs().max() < 0.01


def spec_softplus(a, b, scale, beta, sign, offset, ids, w_a, w_b=None, beta_b=None):
    """[sums, slopes, W b, W^T a] with W of the rows; W b of both sides last."""
    S = reference.masked_similarity(a, b, scale, offset, **ids)
    allowed = S != -torch.inf
    x = sign * torch.where(allowed, S, 0.0)
    slope = (x + beta[:, None]).sigmoid() * allowed
    rows = w_a[:, None] * slope
    sums = reference.pair_softplus(a, b, scale, beta, sign, offset, **ids)
    both = rows if beta_b is None else rows + w_b * (x + beta_b).sigmoid() * allowed
    return sums, slope.sum(1), rows @ b, rows.T @ a, both @ b


def compare_softplus(ops, a, b, scale, beta, sign, offset, ids):
    dtype, other = a.dtype, a if b is None else b
    r, c = len(a), len(other)
    s, w_a, w_b = number(scale, dtype), torch.rand(r, dtype=dtype), torch.rand(c, dtype=dtype)
    beta_b = torch.randn(c, dtype=dtype)
    if b is None:
        w_b, beta_b = w_a, beta
    full = {**ids, "ids_b": ids["ids_a"]} if b is None and ids else ids
    numbers = [beta, w_a, w_b, beta_b]
    wide = every(numbers, torch.float64)

    def spec(a, b, beta, w_a, w_b, beta_b):
        return spec_softplus(a, b, scale, beta, sign, offset, full, w_a, w_b, beta_b)

    exact, eager = spec(a.double(), other.double(), *wide), spec(a, other, *numbers)
    got = dict(enumerate(ops.softplus_forward(a, b, s, beta, sign, offset, **ids)))
    sides = (beta, None, w_a, None) if b is None else (beta, beta_b, w_a, w_b)
    got[4] = ops.softplus_backward(a, b, s, sign, offset, *sides, **ids)
    found = [got]
    if b is not None:
        found.append(dict(enumerate(ops.softplus_both(a, b, s, beta, sign, offset, w_a, **ids))))
        found.append({2: ops.softplus_backward(a, b, s, sign, offset, beta, None, w_a, None, **ids)})
        columns_only = ops.softplus_backward(a, b, s, sign, offset, None, beta_b, None, w_b, **ids)
        found.append({4: columns_only + found[1][2]})
    for results in found:
        for k, g in results.items():
            assert g.dtype == (torch.float64 if k < 2 else dtype)
            if exact[k].numel():
                check(f"softplus {k}", g, exact[k], eager[k], dtype)


@BOTH
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("same", SAME[:3])
@pytest.mark.parametrize("r,c,d", SHAPES)
def test_softplus(ops, r, c, d, same, sign, dtype):
    a, b = unit(r, d, dtype), unit(c, d, dtype)
    for offset in (0, c):
        compare_softplus(ops, a, b, 6.0, torch.randn(r, dtype=dtype) - 3, sign, offset, masks(r, c, same))
    if r == c:
        own = masks(r, c, same)
        own.pop("ids_b", None)
        compare_softplus(ops, a, None, 6.0, torch.randn(r, dtype=dtype), sign, 0, own)


@BOTH
@pytest.mark.parametrize("x", [-80.0, -30.0, -8.0, -1.0, -1e-3, 0.0, 0.5, 9.0, 40.0, 700.0])
def test_softplus_is_relatively_exact(ops, x, dtype):
    """Five units in the last place of softplus and of its slope, from one pair each."""
    beta = torch.full((20,), x, dtype=dtype) * torch.linspace(0.97, 1.03, 20, dtype=dtype)
    zero = torch.zeros(20, 1, dtype=dtype)
    sums, slopes = ops.softplus_forward(zero, zero[:1], number(1.0, dtype), beta, 1.0, 1)
    limit = 5 * torch.finfo(dtype).eps
    wide = beta.double()
    exact = wide.clamp(min=0) + wide.abs().neg().exp().log1p()
    assert ((sums - exact) / exact).abs().max() <= limit
    assert ((slopes - wide.sigmoid()) / wide.sigmoid()).abs().max() <= limit


@BOTH
@pytest.mark.parametrize("scale", [0.5, 30.0, 1000.0])
@pytest.mark.parametrize("r,c,d", SHAPES)
def test_stats(ops, r, c, d, scale, dtype):
    a, b = unit(r, d, dtype), unit(c, d, dtype)
    for x, y, offset, pair in [(a, b, 0, 0), (a, b, c, 0), (a, None, 0, r // 2 if r % 2 == 0 else 0)]:
        other = x if y is None else y
        got = ops.similarity_stats(x, y, number(scale, dtype), offset, pair)
        if len(other) == 0:
            expected = torch.tensor([-torch.inf, -torch.inf, 0.0], dtype=torch.float64)
            assert torch.equal(torch.stack(got, 1), expected.expand(r, 3))
            continue
        exact = reference.similarity_stats(x.double(), other.double(), scale, offset, pair)
        eager = reference.similarity_stats(x, other, scale, offset, pair)
        for label, g, x64, e in zip(("lse", "largest", "mean"), got, exact, eager, strict=True):
            agree(label, g, x64, e, dtype)


def everything(ops, a, b, scale, ids):
    s = number(scale, a.dtype)
    beta, c = a[:, 0].contiguous(), len(b)
    lse = ops.lse_forward(a, b, s, ANY_ROWS, c, 0, columns=True)
    own = ops.lse_forward(a, None, s, ANY_ROWS, 0, 0, ids_a=ids, same="sum")
    yield from (*lse, *own)
    yield from ops.lse_backward(a, b, s, ANY_ROWS, c, 0, *lse, None, None, columns=True)
    yield from ops.lse_backward(a, b, s, ANY_ROWS, c, 0, *lse, None, None)
    yield from ops.lse_backward(a, None, s, ANY_ROWS, 0, 0, own[0], None, None, None, ids_a=ids, same="sum", pull_a=beta)
    yield from ops.softplus_forward(a, None, s, beta, -1.0, 0)
    yield from ops.softplus_both(a, b, s, beta, 1.0, c)
    yield ops.softplus_backward(a, None, s, 1.0, 0, beta, None, None, None)
    yield from ops.similarity_stats(a, b, s, c, 0)


@native
@pytest.mark.parametrize("r,c", [(700, 500), (60, 900), (900, 60)])
@pytest.mark.parametrize("scale", [5.0, 500.0])
def test_the_same_bits_whatever_the_threads(r, c, scale):
    a, b, ids = unit(r, 24), unit(c, 24), torch.randint(9, (r,))
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            runs.append(list(everything(torch.ops.fastcl, a, b, scale, ids)))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True))


@BOTH
@pytest.mark.parametrize("scale", [5.0, 500.0])
def test_nan_is_not_lost(ops, scale, dtype):
    """One NaN row reaches every row, every column and both gradients of it."""
    a, b, ids = unit(90, 6, dtype), unit(80, 6, dtype), torch.zeros(90, dtype=torch.int64)
    a[7, 3] = torch.nan
    for x in everything(ops, a, b, scale, ids):
        assert x.dtype == torch.int64 or x.isnan().any()
    lse = ops.lse_forward(a, b, number(scale, dtype), ANY_ROWS, 80, 0, columns=True)
    assert lse[1].isnan().all() and lse[0].isnan().sum() == 1


@native
@pytest.mark.parametrize("scale", [0.0, -1.0, torch.nan, torch.inf])
def test_a_bad_scale_gives_nan(scale):
    ids = torch.tensor([0, 0, 1, 0, 1])
    found = list(everything(torch.ops.fastcl, unit(5, 3), unit(4, 3), scale, ids))
    assert all(x.isnan().all() for x in found if x.is_floating_point())
    assert [x.tolist() for x in found if not x.is_floating_point()] == [[2, 2, 1, 2, 1]]


A, B, S, IDS = unit(6, 3), unit(4, 3), number(2.0, torch.float32), {"ids_a": torch.arange(6), "ids_b": torch.arange(4)}
BAD = {
    "same": (ValueError, "keep, drop, only or sum, got most", {**IDS, "same": "most"}),
    "ids missing": (ValueError, "ids_a must be given", {"same": "drop"}),
    "ids of b missing": (ValueError, "ids_b must be given", {"ids_a": IDS["ids_a"], "same": "drop"}),
    "shape of ids": (ValueError, "ids_b must have shape", {**IDS, "ids_b": torch.arange(5), "same": "only"}),
    "type of ids": (TypeError, "ids_a must be Long", {**IDS, "ids_a": torch.arange(6).int(), "same": "only"}),
    "shape of bias": (ValueError, "bias must have shape", {"bias": torch.zeros(6)}),
    "type of bias": (TypeError, "bias must be Float", {"bias": torch.zeros(4).double()}),
    "columns of sum": (ValueError, "with columns, got sum", {**IDS, "same": "sum", "columns": True}),
}


@native
@pytest.mark.parametrize("case", BAD)
def test_bad_calls_of_lse(case):
    error, message, options = BAD[case]
    with pytest.raises(error, match=message):
        torch.ops.fastcl.lse_forward(A, B, S, 2.0, 0, 0, **options)


@native
def test_other_bad_calls():
    op, lse, beta = torch.ops.fastcl, torch.zeros(6), torch.zeros(6)
    with pytest.raises(ValueError, match="columns must be False without b"):
        op.lse_forward(A, None, S, 2.0, 0, 0, columns=True)
    with pytest.raises(ValueError, match="same must be sum with pull_a or pull_b, got drop"):
        op.lse_backward(A, B, S, 2.0, 0, 0, lse, None, None, None, **IDS, same="drop", pull_a=beta)
    with pytest.raises(ValueError, match="same must be keep, drop or only, got sum"):
        op.softplus_forward(A, B, S, beta, 1.0, 0, **IDS, same="sum")
    with pytest.raises(ValueError, match="sign must be 1 or -1, got 2"):
        op.softplus_both(A, B, S, beta, 2.0, 0)
    with pytest.raises(ValueError, match="beta_b must have shape"):
        op.softplus_backward(A, B, S, 1.0, 0, beta, beta, None, None)
