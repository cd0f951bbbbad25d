"""The Triton kernels of pairs that ids choose, of rows and columns at once, of softplus and of statistics, op by op
against the materialising twins of fastcl.reference in float64. Without a GPU they run through Triton's interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch

from error_rule import check, relative
from fastcl import ops, reference

pytest.importorskip("triton", reason="Triton is not installed")

from fastcl.kernels import host, launch  # noqa: E402
from fastcl.kernels.tiles import RANGE, UNIT_SLACK  # noqa: E402
from test_kernels import DEVICE, DTYPES, _poison, rows_of, scalar, unit_rows, weight_rounding  # noqa: E402, F401

# Largest |S| of both exponential paths.
FIXED, ONLINE = 5.0, 125.0
SOFTPLUS_CASES = [(1, 1, 1, "keep"), (1, 70, 3, "sum"), (70, 33, -64, "only"), (130, 129, 0, "drop")]
# What `same` says of pairs of the same id, without and with a bias.
MASKS = [("keep", True), *[(same, biased) for same in ("drop", "only", "sum") for biased in (False, True)]]


def ids_of(*counts: int) -> list[torch.Tensor]:
    """Few ids, that differ in the upper half of their 64 bits alone."""
    return [torch.randint(-4, 5, (count,), device=DEVICE) * 2**33 + 7 for count in counts]


def numbers(count: int) -> torch.Tensor:
    """Weights of any sign."""
    return torch.rand(count, device=DEVICE) * 2 - 1


def bias_of(count: int, size: float) -> torch.Tensor:
    """Any sign, and columns that are ruled out."""
    return (numbers(count) * size).masked_fill(torch.arange(count, device=DEVICE) % 7 == 0, -math.inf)


def unfused(scale: float) -> float:
    """What the interpreter adds to a weight: it rounds acc * c before it subtracts, which the GPU's FMA does not."""
    return 0.0 if DEVICE == "cuda" else 2 * scale * math.log2(math.e) * 2.0**-24


def cast(options: dict, dtype: torch.dtype) -> dict:
    """The same options with their floating tensors in dtype."""
    floating = {key for key, x in options.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    return {key: x.to(dtype) if key in floating else x for key, x in options.items()}


def check_lse(what, got, exact, eager, dtype):
    """Empty rows are -inf in all; the others by the rule."""
    empty = exact == -math.inf
    assert torch.equal(got == -math.inf, empty), what
    check(what, *(x.masked_fill(empty, 0.0) for x in (got, exact, eager)), dtype)


def twins(function, a, b, *args, dtype, **options):
    """(float64, the dtype of the rows) of a function of fastcl.reference."""
    return tuple(function(a.to(t), b.to(t), *args, **cast(options, t)) for t in (torch.float64, dtype))


def operands(rows: int, cols: int | None, d: int, dtype: torch.dtype):
    """(a, b or None, the columns)."""
    a = unit_rows(rows, d, dtype)
    b = None if cols is None else unit_rows(cols, d, dtype)
    return a, b, a if b is None else b


def check_masked(a, b, scale, offset, pair, dtype, ids_a, ids_b, same, bias=None):
    """Log-sum-exp of the pairs that ids choose, and what "sum" adds."""
    columns, ids_columns = (a, ids_a) if b is None else (b, ids_b)
    masks = {"ids_a": ids_a, "ids_b": ids_columns, "same": same, "bias": bias}
    exact, eager = twins(reference.similarity_lse, a, columns, scale, offset, pair, dtype=dtype, **masks)
    got, *positives = host.lse_forward(a, b, scalar(scale), scale, offset, pair, **masks | {"ids_b": ids_b})
    check_lse("lse", got, exact, eager, dtype)
    assert len(positives) == 2 * (same == "sum")
    if positives:
        S = reference.masked_similarity(a, columns, 1.0, offset, pair, **masks)
        counted = reference.same_id(S, ids_a, ids_columns)
        sums = [torch.where(counted, x @ y.T, 0.0).sum(1) for x, y in ((a.double(), columns.double()), (a, columns))]
        check("positives", positives[0], *sums, dtype)
        assert positives[1].dtype == torch.int64 and torch.equal(positives[1], counted.sum(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("same,biased", MASKS)
@pytest.mark.parametrize("cols,offset,pair", [(None, 0, 35), (150, 3, 0), (33, -40, 9)])
def test_masked_forward(cols, offset, pair, same, biased, dtype):
    a, b, columns = operands(70, cols, 40, dtype)
    ids_a, ids_b = ids_of(70, columns.shape[0])
    bias = bias_of(columns.shape[0], 20) if biased else None
    check_masked(a, b, FIXED, offset, pair, dtype, ids_a, None if b is None else ids_b, same, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 64, 100, 200, 256, 257])
def test_widths(d, dtype):
    """Every entry of the launch table, and odd ones."""
    a, b, _ = operands(70, 134, d, dtype)
    check_masked(a, b, FIXED, 2, 0, dtype, *ids_of(70, 134), "drop")
    check_columns(a, b, FIXED, 2, dtype)
    check_softplus(a, b, FIXED, -1.0, 2, numbers(70) * 4, None, dtype)
    check_stats(a, b, FIXED, 2, 0, dtype)


def check_columns(a, b, scale, offset, dtype, bound=None, **masks):
    """Both log-sum-exps at once."""
    swapped = {"ids_a": masks.get("ids_b"), "ids_b": masks.get("ids_a"), "same": masks.get("same", "keep")}
    got = host.lse_forward(a, b, scalar(scale), scale if bound is None else bound, offset, 0, columns=True, **masks)
    rows = twins(reference.similarity_lse, a, b, scale, offset, dtype=dtype, **masks)
    columns = twins(reference.similarity_lse, b, a, scale, -offset, dtype=dtype, **swapped)
    if masks.get("bias") is not None:
        columns = [x + masks["bias"].to(x.dtype) for x in columns]
    for what, lse, twin in zip(("rows", "columns"), got, (rows, columns), strict=True):
        check_lse(what, lse, *twin, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale,bound", [(FIXED, FIXED), (ONLINE, ONLINE), (FIXED, -1.0), (ONLINE, -1.0)])
@pytest.mark.parametrize("rows,cols,offset", [(1, 1, 1), (70, 1, -64), (64, 99, 99), (130, 257, 99), (257, 129, -127)])
def test_columns(rows, cols, offset, scale, bound, dtype):
    a, b, _ = operands(rows, cols, 24, dtype)
    check_columns(a, b, scale, offset, dtype, bound)


@pytest.mark.parametrize("same,bias", [("drop", 0), ("drop", 20), ("only", 20), ("keep", 20)])
def test_columns_with_masks(same, bias):
    a, b, _ = operands(70, 134, 24, torch.float32)
    masks = dict(zip(("ids_a", "ids_b"), ids_of(70, 134), strict=True), same=same, bias=numbers(134) * bias)
    check_columns(a, b, FIXED, 2, torch.float32, **masks if bias else masks | {"bias": None})


@pytest.mark.parametrize("partials", [1, 2, 3])
def test_several_blocks(partials, monkeypatch):
    """Several blocks in a super-block or a walk: sums are read back and added, maxima rise, splits are joined."""
    monkeypatch.setattr(launch, "MAX_PARTIALS", partials)
    a, b, _ = operands(330, 700, 16, torch.float16)
    check_columns(a, b, FIXED, 300, torch.float16)
    a, b, _ = operands(20, 700, 16, torch.float32)
    check_masked(a, b, ONLINE, 5, 0, torch.float32, *ids_of(20, 700), "sum")
    check_stats(a, b, ONLINE, 5, 0, torch.float32)
    check_softplus(a, b, FIXED, 1.0, 5, numbers(20), None, torch.float32)


@pytest.mark.parametrize("rows,cols,path", [(70, 1, "lse_rows"), (1, 70, "lse_rows"), (1, 1, "lse_two_way")])
def test_the_longer_side_decides_the_path(rows, cols, path, monkeypatch):
    """A bound at which one exponential fits a constant shift, and seventy do not."""
    asked, look_up = [], launch.tile
    monkeypatch.setattr(launch, "tile", lambda *args: asked.append(args[0]) or look_up(*args))
    a, b, _ = operands(rows, cols, 8, torch.float32)
    bound = 0.99 * RANGE.value / UNIT_SLACK.value / math.log2(math.e)
    host.lse_forward(a, b, scalar(bound), bound, cols, 0, columns=True)
    assert set(asked) == {path}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [140, 300])
def test_every_column_decides(d, dtype):
    """Row i is decided by one column and column j by one row, different ones for all: losing any fails by far."""
    n, scale = 132, 20.0
    b = rows_of(torch.eye(n, d), dtype)
    a, count = rows_of(b.flip(0), dtype), torch.arange(n, device=DEVICE)
    ids = {"ids_a": count.flip(0), "ids_b": count}
    # One-hot rows leave the rounding of fp32 sums: exp(20) of one column against n - 1 ones.
    both = math.log(math.exp(scale) + n - 1)
    for lse in host.lse_forward(a, b, scalar(scale), scale, n, 0, columns=True):
        assert (lse - both).abs().max() < 1e-5
    for same, value in {"drop": math.log(n - 1), "only": scale, "sum": both}.items():
        lse, *ones = host.lse_forward(a, b, scalar(scale), scale, n, 0, **ids, same=same)
        assert (lse - value).abs().max() < 1e-5 and all(x.eq(1).all() for x in ones)
    lse, largest, mean = host.similarity_stats(a, b, scalar(scale), n, 0)
    assert (lse - both).abs().max() < 1e-5 and (largest - scale).abs().max() < 1e-5
    assert (mean - scale / (1 + (n - 1) * math.exp(-scale))).abs().max() < 1e-5
    beta = torch.full((n,), -scale, device=DEVICE)
    got = host.softplus_both(a, b, scalar(2 * scale), beta, 1.0, n)
    # softplus(20) of one, exp(-20) of the others.
    assert (got[0] - scale - n * math.exp(-scale)).abs().max() < 1e-5 and (got[1] - 1).abs().max() < 1e-6
    assert relative(got[2], b.flip(0)) < 1e-5 and relative(got[3], a.flip(0)) < 1e-5


def check_backward(a, b, scale, offset, pair, dtype, columns, has_col=True, bound=None, **options):
    """Gradients against the twin. Weights of any sign, log-sum-exps as the forward finds them."""
    cols, twin = (a if b is None else b), dict(options)
    if b is None:
        twin |= {f"{key}_b": options.get(f"{key}_a") for key in ("ids", "pull")}
    masks = {key: x for key, x in twin.items() if not key.startswith("pull")}
    w_a, w_b = numbers(a.shape[0]), numbers(cols.shape[0])
    S = reference.masked_similarity(a.double(), cols.double(), scale, offset, pair, **cast(masks, torch.float64))
    lse_a, lse_b = S.logsumexp(1), S.logsumexp(0)
    sides = (lse_a, w_a, w_a) if b is None else (lse_b, w_a, w_b) if has_col else (None, w_a, None)
    names = dict(zip(("lse_a", "lse_b", "w_a", "w_b"), (lse_a, *sides), strict=True))
    wanted = twins(reference.similarity_lse_backward, a, cols, scale, offset, pair=pair, dtype=dtype, **twin, **names)
    given = (lse_a, None, w_a, None) if b is None else (lse_a, *sides)
    got = host.lse_backward(
        a, b, scalar(scale), scale if bound is None else bound, offset, pair, *given, columns=columns, **options
    )
    assert len(got) == 1 + columns
    for what, grad, exact, eager in zip(("rows", "columns"), got, *wanted, strict=False):
        check(what, grad, exact, eager, dtype, max(weight_rounding(dtype), unfused(scale)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns,has_col", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("scale,bound,d", [(FIXED, FIXED, 40), (ONLINE, ONLINE, 300), (FIXED, ops.ANY_ROWS, 300)])
def test_backward_of_both(scale, bound, d, columns, has_col, dtype, monkeypatch):
    """A scratch of a few rows only, so that the columns' gradient adds up over chunks."""
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 134 * 30 * dtype.itemsize)
    a, b, _ = operands(70, 134, d, dtype)
    check_backward(a, b, scale, 3, 0, dtype, columns, has_col, bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("same,biased", MASKS)
@pytest.mark.parametrize("cols,offset,pair", [(None, 0, 35), (150, 3, 0), (33, -40, 9)])
def test_masked_backward(cols, offset, pair, same, biased, dtype):
    a, b, columns = operands(70, cols, 40, dtype)
    ids_a, ids_b = ids_of(70, columns.shape[0])
    options = {"ids_a": ids_a, "ids_b": None if b is None else ids_b, "same": same}
    if biased:
        # Without b the columns' side has no bias in its sums, and a large one would make infinite weights.
        options["bias"] = bias_of(columns.shape[0], 1 if b is None else 20)
    if same == "sum":
        options |= {"pull_a": numbers(70), "pull_b": None if b is None else numbers(columns.shape[0])}
    check_backward(a, b, FIXED, offset, pair, dtype, b is not None, **options)


@pytest.mark.parametrize("scale,masked", [(FIXED, False), (ONLINE, False), (FIXED, True)])
@pytest.mark.parametrize("columns", [False, True])
def test_sides_that_take_no_part(scale, masked, columns):
    """lse = -inf of a row or a column: its weight is 0, never NaN, whatever its products are. A bias that is the same
    for all changes nothing, however large."""
    a, b, _ = operands(20, 30, 16, torch.float32)
    lse_a = reference.similarity_lse(a.double(), b.double(), scale, 30)
    lse_b = reference.similarity_lse(b.double(), a.double(), scale, 20)
    lse_a[::3], lse_b[::2] = -math.inf, -math.inf
    shift, bias = (300.0, torch.full((30,), 300.0, device=DEVICE)) if masked else (0.0, None)
    given = (lse_a + shift, lse_b + shift, None, None)
    got = host.lse_backward(a, b, scalar(scale), scale, 30, 0, *given, columns=columns, bias=bias)
    sides = {"lse_a": lse_a, "lse_b": lse_b, "dtype": torch.float32}
    wanted = twins(reference.similarity_lse_backward, a, b, scale, 30, **sides)
    for grad, exact, eager in zip(got, *wanted, strict=False):
        # Exponents of a biased weight are rounded on the GPU as well.
        check("gradient", grad, exact, eager, torch.float32, unfused(scale) + shift * math.log2(math.e) * 2.0**-23)


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_weights(dtype):
    """Each pair alone in its row and column, and both pulls at full strength against it: a weight of 4."""
    a = rows_of(torch.eye(3, 16), dtype)
    ids, one = torch.arange(3, device=DEVICE), torch.ones(3, device=DEVICE)
    masks = {"ids_a": ids, "ids_b": ids, "same": "sum", "pull_a": -one, "pull_b": -one}
    sides = (100 * one.double(), 100 * one.double(), one, one)
    got = host.lse_backward(a, a.clone(), scalar(100.0), 100.0, 3, 0, *sides, **masks, columns=True)
    for grad in got:
        assert relative(grad, 4 * a) < 100 * math.log2(math.e) * 2.0**-23


def softplus_twin(a, b, scale, sign, offset, beta_a, beta_b, w_a, w_b, dtype, **masks):
    """(sums, slopes, W @ b, W.T @ a) by autograd of the twin; either side may be None, the numbers are the rows'."""
    a, b = (x.detach().to(dtype).requires_grad_() for x in (a, b))
    total, sums, slopes = 0.0, None, None
    swapped = masks | ({"ids_a": masks["ids_b"], "ids_b": masks["ids_a"]} if "ids_a" in masks else {})
    sides = ((a, b, beta_a, w_a, offset, masks), (b, a, beta_b, w_b, -offset, swapped))
    for rows, columns, beta, w, shift, chosen in sides:
        if beta is None:
            continue
        beta = beta.to(dtype).requires_grad_()
        f = reference.pair_softplus(rows, columns, scale, beta, sign, shift, **chosen)
        if rows is a:
            sums, slopes = f.detach(), torch.autograd.grad(f.sum(), beta, retain_graph=True)[0]
        total = total + (f if w is None else f * w.to(dtype)).sum()
    return sums, slopes, *(grad / (sign * scale) for grad in torch.autograd.grad(total, (a, b)))


def check_softplus(a, b, scale, sign, offset, beta_a, w_a, dtype, **masks):
    """Forward, backward of the rows, and all at once."""
    sides = (beta_a, None, w_a, None)
    exact, eager = (softplus_twin(a, b, scale, sign, offset, *sides, t, **masks) for t in (torch.float64, dtype))
    got = host.softplus_forward(a, b, scalar(scale), beta_a, sign, offset, **masks)
    both = host.softplus_both(a, b, scalar(scale), beta_a, sign, offset, w_a, **masks)
    alone = host.softplus_backward(a, b, scalar(scale), sign, offset, beta_a, None, w_a, None, **masks)
    names = ("sums", "slopes", "rows", "columns")
    for what, *triple in [*zip(names, both, exact, eager), *zip(names, (*got, alone), exact, eager)]:
        check(what, *triple, dtype, 0.0 if what.startswith("s") else weight_rounding(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("rows,cols,offset,same", SOFTPLUS_CASES)
def test_softplus(rows, cols, offset, same, sign, dtype, monkeypatch):
    monkeypatch.setattr(launch, "SCRATCH_BYTES", cols * 50 * dtype.itemsize)
    a, b, _ = operands(rows, cols, 24, dtype)
    masks = dict(zip(("ids_a", "ids_b"), ids_of(rows, cols), strict=True), same=same)
    check_softplus(a, b, 10.0, sign, offset, numbers(rows) * 10, None if sign > 0 else numbers(rows), dtype, **masks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given,sides", [(False, "ab"), (True, "ab"), (True, "b"), (True, "a")])
@pytest.mark.parametrize("weighted", [False, True])
def test_softplus_sides(given, sides, weighted, dtype):
    """The weights of the rows, of the columns, and of both; without b both are the rows'."""
    a, b, columns = operands(70, 134 if given else None, 24, dtype)
    ids_a, ids_b = ids_of(70, columns.shape[0])
    beta_a, beta_b, w_a, w_b = (numbers(n) for n in (70, columns.shape[0]) * 2)
    beta_b, w_b = (beta_b, w_b) if given else (beta_a, w_a)
    used = ("a" in sides, "b" in sides, weighted and "a" in sides, weighted and "b" in sides)
    values = [x if use else None for x, use in zip((beta_a, beta_b, w_a, w_b), used, strict=True)]
    masks = {"ids_a": ids_a, "ids_b": ids_b if given else ids_a, "same": "drop"}
    # Without b both operands of the twin are the rows, held apart by autograd.
    exact, eager = (softplus_twin(a, columns, 5.0, -1.0, 2, *values, t, **masks)[2] for t in (torch.float64, dtype))
    ours = values if given else [values[0], None, values[2], None]
    masks = masks if given else masks | {"ids_b": None}
    got = host.softplus_backward(a, b, scalar(5.0), -1.0, 2, *ours, **masks)
    check("gradient", got, exact, eager, dtype, weight_rounding(dtype))


@pytest.mark.parametrize("beta", [-80.0, -30.0, -5.0, 0.0, 5.0, 30.0, 80.0])
def test_softplus_is_relatively_exact_at_both_ends(beta):
    """Orthogonal rows: every argument is beta. What is lost is the rounding of beta * log2(e) in the exponent."""
    a = rows_of(torch.eye(3, 16), torch.float32)
    b = rows_of(torch.eye(7, 16)[3:], torch.float32)
    x = torch.tensor(beta, dtype=torch.float64)
    given = torch.full((3,), beta, device=DEVICE)
    # The GPU approximates exponential and inverse root to two units in the last place each.
    tolerance = 2.0**-20 + abs(beta) * 2.0**-23
    for op, sign in ((host.softplus_forward, 1.0), (host.softplus_both, -1.0)):
        sums, slopes, *_ = op(a, b, scalar(2.0), given, sign, 0)
        # Each row leaves out one of four columns.
        assert relative(sums, torch.full_like(sums, 3 * torch.logaddexp(x, torch.zeros_like(x)))) < tolerance
        assert relative(slopes, torch.full_like(sums, 3 * torch.sigmoid(x))) < tolerance


def check_stats(a, b, scale, offset, pair, dtype):
    exact, eager = twins(reference.similarity_stats, a, a if b is None else b, scale, offset, pair, dtype=dtype)
    got = host.similarity_stats(a, b, scalar(scale), offset, pair)
    for triple in zip(("lse", "largest", "mean"), got, exact, eager, strict=True):
        check_lse(*triple, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [FIXED, ONLINE])
@pytest.mark.parametrize("rows,cols,offset,pair", [(2, None, 0, 1), (70, None, 0, 35), (1, 70, 70, 0), (70, 33, -9, 7)])
def test_stats(rows, cols, offset, pair, scale, dtype):
    a, b, _ = operands(rows, cols, 24, dtype)
    check_stats(a, b, scale, offset, pair, dtype)


def every_op(a, b, scale):
    """All results of all ops on these rows and columns, by name."""
    rows, cols = a.shape[0], b.shape[0]
    ids = dict(zip(("ids_a", "ids_b"), (torch.arange(n, device=DEVICE) % 5 for n in (rows, cols)), strict=True))
    beta, zero = torch.ones(rows, device=DEVICE), torch.zeros(rows, dtype=torch.float64, device=DEVICE)
    shared = (a, b, scale, -1.0, 1, 0)
    return {
        "columns": host.lse_forward(*shared, columns=True),
        "masked": host.lse_forward(*shared, **ids, same="sum"),
        "backward": host.lse_backward(*shared, zero, None, None, None, columns=True),
        "pulled": host.lse_backward(*shared, zero, None, None, None, **ids, same="sum", pull_a=beta),
        "softplus": host.softplus_forward(a, b, scale, beta, 1.0, 1),
        "sides": [host.softplus_backward(a, b, scale, 1.0, 1, beta, None, None, None)],
        "both": host.softplus_both(a, b, scale, beta, 1.0, 1),
        "stats": host.similarity_stats(a, b, scale, 1, 0),
    }


def test_same_bits_every_time():
    a, b, _ = operands(70, 140, 32, torch.float32)
    first, second = every_op(a, b, scalar(FIXED)), every_op(a, b, scalar(FIXED))
    assert [name for name in first if not all(map(torch.equal, first[name], second[name]))] == []


def test_bad_scale_stays_visible():
    a, b, _ = operands(20, 30, 16, torch.float32)
    for name, results in every_op(a, b, scalar(math.nan)).items():
        for place, x in enumerate(results):
            assert x.isnan().all() or (name, place) in (("masked", 1), ("masked", 2)), (name, place)


@pytest.mark.parametrize("rows,cols", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_do(rows, cols):
    a, b = (rows_of(torch.randn(n, 8), torch.float16) for n in (rows, cols))
    found = every_op(a, b, scalar(FIXED))
    nothing = {"columns": [-math.inf] * 2, "masked": [-math.inf, 0, 0], "stats": [-math.inf, -math.inf, 0]}
    sizes = {"columns": [rows, cols], "backward": [rows, cols], "both": [rows, rows, rows, cols]}
    for name, results in found.items():
        for place, x in enumerate(results):
            assert x.shape[0] == sizes.get(name, [rows] * 3)[place], (name, place)
            assert x.eq(nothing.get(name, [0] * 4)[place]).all(), (name, place)


def test_columns_know_no_partners():
    a = unit_rows(4, 8, torch.float32)
    with pytest.raises(ValueError, match="lse_forward: pair must be 0 with columns, got 2"):
        host.lse_forward(a, a, scalar(FIXED), FIXED, 0, 2, columns=True)
