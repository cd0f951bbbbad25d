"""The Triton kernels, op by op, against the materialising twins of fastcl.reference in float64.

Without a GPU the same kernels run through Triton's interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch

from error_rule import check, relative
from fastcl import reference

pytest.importorskip("triton", reason="Triton is not installed")

from fastcl.kernels import host, launch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.gpu(reason="tl.dot on bf16 is silently wrong in Triton's interpreter")
)
DTYPES = [torch.float32, torch.float16, BF16]
# Widths on both sides of every entry of the launch table, and odd ones.
WIDTHS = [1, 3, 64, 100, 128, 200, 256, 257]


@pytest.fixture(autouse=True)
def _poison():
    """Every torch.empty is full of NaN, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def unit_rows(m: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    return rows_of(torch.nn.functional.normalize(torch.randn(m, d), dim=1), dtype)


def rows_of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in the layout that normalize_pair gives the kernels."""
    x = x.to(DEVICE, dtype)
    return host.empty_rows(x, *x.shape, dtype).copy_(x)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=DEVICE)


def forward_backward(a, b, temperature, bound=None, offset=0, pair=0, w=None):
    """(lse, G) of the kernels, and of the float64 twin on the same rounded rows; with b, rows take no column term."""
    scale = 1 / temperature
    bound = scale if bound is None else bound
    columns = (a if b is None else b).double()
    (lse,) = host.lse_forward(a, b, scalar(scale), bound, offset, pair)
    (grad,) = host.lse_backward(a, b, scalar(scale), bound, offset, pair, lse, None, w, None)
    exact_lse = reference.similarity_lse(a.double(), columns, scale, offset, pair)
    wide = None if w is None else w.double()
    both = (exact_lse, wide) if b is None else (None, None)
    exact, _ = reference.similarity_lse_backward(
        a.double(), columns, scale, offset, exact_lse, both[0], wide, both[1], pair
    )
    return (lse, grad), (exact_lse, exact)


def eager_pair(a, columns, temperature, offset=0, pair=0):
    """What plain PyTorch gets in the dtype of the rows."""
    scale = 1 / temperature
    lse = reference.similarity_lse(a, columns, scale, offset, pair)
    return lse, reference.similarity_lse_backward(a, columns, scale, offset, lse, lse, pair=pair)[0]


def check_pair(what, got, exact, eager, dtype, largest=0.0):
    """`largest` is the largest |S|: the interpreter rounds acc * c before it subtracts the shift, which the
    GPU's FMA does not, and so errs by half a unit in the last place of that product."""
    unfused = 0.0 if DEVICE == "cuda" else largest * math.log2(math.e) * 2.0**-24
    check(f"{what} lse", got[0], exact[0], eager[0], dtype)
    check(f"{what} gradient", got[1], exact[1], eager[1], dtype, weight_rounding(dtype) + 2 * unfused)


def weight_rounding(dtype: torch.dtype) -> float:
    """Tile weights are rounded once, to the type of the rows. Where all are equal (collapsed rows) so are their
    errors, and nothing averages out."""
    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", WIDTHS)
def test_symmetric_widths(d, dtype):
    z = unit_rows(134, d, dtype)
    got, exact = forward_backward(z, None, 0.2, pair=67)
    check_pair(f"symmetric d={d}", got, exact, eager_pair(z, z, 0.2, pair=67), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [4, 6, 62, 64, 126, 128, 130, 192, 258, 300])
@pytest.mark.parametrize("paired", [False, True])
def test_symmetric_rows(m, paired, dtype):
    z = unit_rows(m, 32, dtype)
    pair = m // 2 if paired else 0
    got, exact = forward_backward(z, None, 0.1, pair=pair)
    check_pair(f"symmetric m={m}", got, exact, eager_pair(z, z, 0.1, pair=pair), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.005, 0.0125, 0.0145, 0.02, 0.07, 1.0, 10.0])
@pytest.mark.parametrize("kind", ["random", "collapsed", "antipodal"])
def test_temperatures(temperature, kind, dtype):
    """Both sides of the switch between the fixed shift and the online maximum, at the ends of the range."""
    z = unit_rows(150, 24, dtype)
    if kind == "collapsed":
        z[:] = z[0].clone()
    if kind == "antipodal":
        z[::2] = z[0].clone()
        z[1::2] = -z[0]
    got, exact = forward_backward(z, None, temperature)
    eager = eager_pair(z, z, temperature)
    check_pair(f"{kind} temperature={temperature}", got, exact, eager, dtype, largest=1 / temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.02, 0.0145, 0.01, 0.005])
def test_antipodal_pair(temperature, dtype):
    """The only product is -1/temperature: sums and weights sit at opposite ends of the fixed-shift range."""
    z = rows_of(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), dtype)
    got, exact = forward_backward(z, None, temperature)
    assert relative(got[0], exact[0]) < 1e-6  # a few roundings of one fp32 number
    # The weight is exp(S - lse) of numbers up to 200, each with half a unit in the last place of fp32.
    assert relative(got[1], exact[1]) < 2 * 200 * math.log2(math.e) * 2.0**-24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 8.0])
def test_rows_of_any_length(scale, dtype):
    """Rows that are not normalised: the device decides between the paths, and both must be launched right."""
    z = rows_of(torch.randn(140, 40) * scale, dtype)
    got, exact = forward_backward(z, None, 1.0, bound=-math.inf)
    largest = z.double().square().sum(1).max().item()
    check_pair(f"length x{scale}", got, exact, eager_pair(z, z, 1.0), dtype, largest)


@pytest.mark.parametrize("bound", [1 / 0.2, -1.0])
def test_device_choice_agrees_with_host_choice(bound):
    z = unit_rows(140, 40, torch.float32)
    known, _ = forward_backward(z, None, 0.2)
    chosen, _ = forward_backward(z, None, 0.2, bound=bound)
    assert torch.equal(known[0], chosen[0]) or relative(chosen[0], known[0]) < 1e-6  # shift rounds differently
    assert relative(chosen[1], known[1]) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [48, 300])
@pytest.mark.parametrize("temperature", [0.2, 0.008])
@pytest.mark.parametrize("start,stop", [(0, 70), (70, 72), (72, 260), (2, 258)])
def test_rectangular_offsets(start, stop, temperature, d, dtype):
    """A slice of rows with its pairs against all columns, as one of many ranks does it."""
    z = unit_rows(260, d, dtype)
    pair, scale = (stop - start) // 2, 1 / temperature
    columns_lse = reference.similarity_lse(z.double(), z.double(), scale, 0)
    wide = z.double()
    exact = reference.similarity_lse(wide[start:stop], wide, scale, start, pair)
    arguments = (wide[start:stop], wide, scale, start, exact, columns_lse, None, None, pair)
    exact_grad = reference.similarity_lse_backward(*arguments)[0]
    eager = reference.similarity_lse(z[start:stop], z, scale, start, pair)
    arguments = (z[start:stop], z, scale, start, eager, columns_lse.to(dtype), None, None, pair)
    eager_grad = reference.similarity_lse_backward(*arguments)[0]
    a = host.aligned_rows(z[start:stop])
    shared = (a, z, scalar(scale), scale, start, pair)
    (lse,) = host.lse_forward(*shared)
    (grad,) = host.lse_backward(*shared, lse, columns_lse.float(), None, None)
    check_pair("rows", (lse, grad), (exact, exact_grad), (eager, eager_grad), dtype, largest=scale)


@pytest.mark.parametrize("cols", [1, 63, 128, 129])
def test_rectangular_without_mask(cols):
    """An offset past the last column masks nothing; columns that take no gradient of their own."""
    a, b = unit_rows(70, 20, torch.float32), unit_rows(cols, 20, torch.float32)
    got, exact = forward_backward(a, b, 0.1, offset=cols)  # no lse of columns: rows only
    eager = reference.similarity_lse(a, b, 10.0, cols)
    check("lse", got[0], exact[0], eager, torch.float32)
    eager_grad, _ = reference.similarity_lse_backward(a, b, 10.0, cols, eager, None)
    check("gradient", got[1], exact[1], eager_grad, torch.float32)


def test_row_without_columns():
    """Its only column masked, a row has lse = -inf, gradient 0, and does not disturb others."""
    z = unit_rows(2, 8, torch.float32)
    for scale in (5.0, 200.0):
        for columns, column_lse in ((None, None), (z, torch.full((2,), -math.inf, device=DEVICE))):
            (lse,) = host.lse_forward(z, columns, scalar(scale), scale, 0, 1)
            assert lse.tolist() == [-math.inf, -math.inf]
            (grad,) = host.lse_backward(z, columns, scalar(scale), scale, 0, 1, lse, column_lse, None, None)
            assert grad.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.3, 0.008])
def test_upstream_weights(temperature, dtype):
    """Weights of any sign on rows and columns."""
    z = unit_rows(150, 20, dtype)
    w = torch.rand(150, device=DEVICE) * 2 - 1
    got, exact = forward_backward(z, None, temperature, w=w)
    lse = reference.similarity_lse(z, z, 1 / temperature, 0)
    eager, _ = reference.similarity_lse_backward(z, z, 1 / temperature, 0, lse, lse, w.to(dtype), w.to(dtype))
    check("weighted gradient", got[1], exact[1], eager, dtype, weight_rounding(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [140, 300])
def test_every_column_decides(d, dtype):
    """Row i is decided by one column, a different one for every row: losing any column fails by far."""
    n = 132
    z = rows_of(torch.cat([torch.eye(n, d), torch.eye(n, d)]), dtype)
    # exp(20) of one column against at most 264 ones; one-hot rows leave only fp32 rounding of the sums.
    for rows, columns, offset in ((z, None, 0), (z[:n].flip(0).clone(), z[:n], n)):
        got, exact = forward_backward(rows, columns, 0.05, offset=offset)
        assert (got[0] - exact[0]).abs().max() < 1e-5
        assert relative(got[1], exact[1]) < 2e-3  # weights rounded to bf16 at worst: 2^-9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [40, 130, 200])
@pytest.mark.parametrize("temperature", [0.05, 0.008])
def test_partners_are_left_out_and_nothing_else(temperature, n, dtype):
    """Partners are equal rows: one that is not left out, or a neighbour that is, changes every sum by far."""
    half = torch.nn.functional.normalize(torch.randn(n, 48), dim=1)
    z = rows_of(torch.cat([half, half]), dtype)
    columns = host.empty_rows(z, 2 * n + 9, 48, dtype)
    columns[:5], columns[5 : 5 + 2 * n], columns[5 + 2 * n :] = z[:5], z, z[:4]
    scale = 1 / temperature
    for b, offset in ((None, 0), (columns, 5)):
        wide = z.double() if b is None else b.double()
        exact = reference.similarity_lse(z.double(), wide, scale, offset, n)
        (got,) = host.lse_forward(z, b, scalar(scale), scale, offset, n)
        assert (got - exact).abs().max() < 1e-6 * scale + 1e-5  # fp32 rounding of exponents, and of sums


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_sixteen_bits_against_their_twin(dtype):
    """Eager is so bad in 16 bits that the rule alone is blunt: hold lse to fp32 accuracy on the rounded rows,
    and the gradient to a twin that rounds the weights as the kernel does."""
    m, d, temperature = 600, 64, 0.1
    z = unit_rows(m, d, dtype)
    (lse, grad), (exact, _) = forward_backward(z, None, temperature)
    tolerance = 1e-5 * d**0.5  # d products rounded to fp32, in any order
    assert relative(lse, exact) < tolerance
    S = reference.masked_similarity(z.double(), z.double(), 1 / temperature, 0)
    weights = torch.exp(S - exact[:, None]) + torch.exp(S - exact[None, :])
    bits = 2.0**14 if dtype == torch.float16 else 1.0
    twin = (weights * bits).to(dtype).double() / bits @ z.double()
    # Weights within fp32 rounding of a rounding boundary go the other way: one in 2^11 by 2^-11, averaged.
    assert relative(grad, twin) < 5 * tolerance


@pytest.mark.parametrize("partials", [1, 2, 3])
@pytest.mark.parametrize("m", [257, 520, 700])
def test_super_blocks(m, partials, monkeypatch):
    """Several blocks in a super-block: partial sums are read back and added, in both directions."""
    monkeypatch.setattr(launch, "MAX_PARTIALS", partials)
    z = unit_rows(m, 16, torch.float16)
    pair = m // 2 if m % 2 == 0 else 0
    exact = reference.similarity_lse(z.double(), z.double(), 5.0, 0, pair)
    (got,) = host.lse_forward(z, None, scalar(5.0), 5.0, 0, pair)
    assert (got - exact).abs().max() < 1e-5  # fp32 sums of 700 terms


@pytest.mark.parametrize("partials", [1, 2])
def test_online_maximum_over_several_blocks(partials, monkeypatch):
    """A program that walks several blocks of columns raises its maxima on the way."""
    monkeypatch.setattr(launch, "MAX_PARTIALS", partials)
    z = unit_rows(520, 16, torch.float16)
    scale = 1 / 0.005
    exact = reference.similarity_lse(z.double(), z.double(), scale, 0, 260)
    (got,) = host.lse_forward(z, None, scalar(scale), scale, 0, 260)
    # fp32 sums of 520 terms, and exponents of up to scale * log2(e), rounded once or twice.
    assert (got - exact).abs().max() < 1e-5 + scale * 2.0**-23


@pytest.mark.parametrize("flush", [1, 2])
@pytest.mark.parametrize("partials", [1, 2])
def test_flushed_and_split_gradients(flush, partials, monkeypatch):
    """The register accumulator is flushed between tiles, and splits are added up."""
    monkeypatch.setattr(launch, "FLUSH_TILES", flush)
    monkeypatch.setattr(launch, "MAX_GRAD_PARTIALS", partials)
    z = unit_rows(650, 16, torch.float16)
    got, exact = forward_backward(z, None, 0.2, pair=325)
    check_pair("flush", got, exact, eager_pair(z, z, 0.2, pair=325), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_features_in_chunks_of_rows(dtype, monkeypatch):
    """A scratch of a few rows only; row counts that do not divide."""
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 130 * 50 * dtype.itemsize)
    z = unit_rows(130, 260, dtype)
    got, exact = forward_backward(z, None, 0.2, pair=65)
    check_pair("wide", got, exact, eager_pair(z, z, 0.2, pair=65), dtype)


def test_widest_features():
    z = unit_rows(66, 4096, torch.float16)
    got, exact = forward_backward(z, None, 0.2)
    check_pair("d=4096", got, exact, eager_pair(z, z, 0.2), torch.float16)


@pytest.mark.parametrize("temperature", [0.2, 0.008])
def test_same_bits_every_time(temperature):
    z = unit_rows(300, 32, torch.float32)
    (first, _), (second, _) = (forward_backward(z, None, temperature) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("temperature", [0.2, 0.008])
def test_bad_numbers_stay_visible(temperature):
    z = unit_rows(140, 16, torch.float32)
    z[17, 3] = math.nan
    seen = host.lse_forward(z, None, scalar(1 / temperature), 1 / temperature, 0, 70)[0].isnan()
    assert seen.sum() == 139 and not seen[87]  # its partner alone does not look at row 17
    z[17, 3] = math.inf
    assert not host.lse_forward(z, None, scalar(1 / temperature), 1 / temperature, 0, 70)[0][17].isfinite()


def test_offsets_beyond_31_bits():
    """Rows 2^25 elements apart: element offsets pass 2^31. The memory between them is never touched."""
    m, d, stride = 70, 16, 2**25
    far = torch.empty(m * stride, dtype=torch.float16, device=DEVICE) if DEVICE == "cuda" else _untouched(m * stride)
    x = far.as_strided((m, d), (stride, 1))
    x.copy_(torch.randn(m, d))
    z, rnorm, pos = host.normalize_pair(x, x.clone(), True)
    exact = reference.normalize(x.double())
    assert relative(z[:m], exact) < 2**-11  # rounded to fp16 once
    assert relative(rnorm[:m], 1 / torch.linalg.vector_norm(x.double(), dim=1)) < 1e-6
    x.copy_(z[:m])
    near = host.aligned_rows(x.contiguous())
    for a, b, offset in ((x, None, 0), (near, x, m), (x, near, m)):
        assert torch.equal(
            host.lse_forward(a, b, scalar(5.0), 5.0, offset, 0)[0],
            host.lse_forward(near, None if b is None else near, scalar(5.0), 5.0, offset, 0)[0],
        )


def _untouched(elements: int) -> torch.Tensor:
    """Virtual memory without pages behind it; torch.empty would be poisoned, that is, written."""
    torch.use_deterministic_algorithms(False)
    far = torch.empty(elements, dtype=torch.float16)
    torch.use_deterministic_algorithms(True, warn_only=True)
    return far


@pytest.mark.parametrize("precision,bound", [("highest", 1e-6), ("high", 2e-3)])
@pytest.mark.gpu(reason="tf32 and its compensated form exist on the GPU's matrix units only")
def test_fp32_follows_the_precision_setting(precision, bound):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        z = unit_rows(512, 128, torch.float32)
        got, exact = forward_backward(z, None, 0.1)
        assert relative(got[0], exact[0]) < bound and relative(got[1], exact[1]) < 10 * bound
    finally:
        torch.set_float32_matmul_precision(before)
