"""What the walks over tiles keep apart: blocks that compare places and blocks that do not, a constant shift and a
running maximum, and the arithmetic of a softplus.

Without a GPU the same kernels run through Triton's interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from error_rule import check  # noqa: E402
from fastcl import reference  # noqa: E402
from fastcl.kernels import host, launch, softplus  # noqa: E402
from test_kernels import DEVICE, _poison, rows_of, scalar  # noqa: E402, F401
from test_pair_kernels import (  # noqa: E402
    FIXED,
    ONLINE,
    bias_of,
    check_lse,
    check_softplus,
    ids_of,
    numbers,
    operands,
    softplus_twin,
    twins,
)

# What `same` says of pairs of the same id, without and with a bias.
MASKS = [("drop", False), ("only", False), ("sum", False), ("sum", True), ("keep", True)]


def launches(monkeypatch, kernel: str) -> list[dict]:
    """What a kernel is launched with from here on."""
    found, real = [], getattr(host, kernel)

    class Spy:
        def __getitem__(self, grid):
            def launched(*args, **options):
                found.append(options)
                return real[grid](*args, **options)

            return launched

    monkeypatch.setattr(host, kernel, Spy())
    return found


@pytest.mark.parametrize("same,biased", MASKS)
@pytest.mark.parametrize("scale,bound", [(FIXED, FIXED), (ONLINE, ONLINE), (FIXED, -1.0), (ONLINE, -1.0)])
@pytest.mark.parametrize("cols,offset,pair", [(None, 0, 165), (400, 150, 0)])
def test_walks_of_all_kinds_of_blocks(cols, offset, pair, scale, bound, same, biased, monkeypatch):
    """Six or seven blocks of columns a walk: some hold a row itself, some a partner, one ends, and some are whole."""
    monkeypatch.setattr(launch, "MAX_PARTIALS", 1)
    a, b, columns = operands(330, cols, 16, torch.float16)
    ids_a, ids_b = ids_of(330, columns.shape[0])
    bias = bias_of(columns.shape[0], 20) if biased else None
    masks = {"ids_a": ids_a, "ids_b": ids_a if b is None else ids_b, "same": same, "bias": bias}
    exact, eager = twins(reference.similarity_lse, a, columns, scale, offset, pair, dtype=torch.float16, **masks)
    found = launches(monkeypatch, "lse_masked_kernel")
    got, *positives = host.lse_forward(
        a, b, scalar(scale), bound, offset, pair, **masks | {"ids_b": None if b is None else ids_b}
    )
    check_lse("lse", got, exact, eager, torch.float16)
    # A bias has no bound; without one the host decides, or where it knows nothing the device.
    online = {True} if biased or bound == ONLINE else {False} if bound == FIXED else {False, True}
    assert {options["ONLINE_MAX"] for options in found} == online and len(found) == len(online)
    if positives:
        S = reference.masked_similarity(a.double(), columns.double(), 1.0, offset, pair, **masks)
        counted = reference.same_id(S, ids_a, masks["ids_b"])
        sums = [torch.where(counted, x @ y.T, 0.0).sum(1) for x, y in ((a.double(), columns.double()), (a, columns))]
        check("positives", positives[0], *sums, torch.float16)
        assert torch.equal(positives[1], counted.sum(1))


@pytest.mark.parametrize("scale", [FIXED, ONLINE])
def test_rows_whose_id_no_column_has(scale):
    a, b, _ = operands(20, 150, 16, torch.float32)
    ids_a, ids_b = (torch.full((count,), value, device=DEVICE) for count, value in ((20, 1), (150, 2)))
    ids_a[3] = 2
    got = host.lse_forward(a, b, scalar(scale), scale, 150, 0, ids_a=ids_a, ids_b=ids_b, same="only")[0]
    assert got[3].isfinite() and got.isfinite().sum() == 1 and (got[torch.arange(20) != 3] == -math.inf).all()


@pytest.mark.parametrize("same", ["keep", "drop", "only"])
@pytest.mark.parametrize("offset", [-400, -127, 150, 383, 399])
def test_softplus_in_blocks_of_all_kinds(offset, same, monkeypatch):
    """The diagonal in no block, in the last corner of the first, in the middle, in the first corner of the last whole
    one, and in the one that ends."""
    monkeypatch.setattr(launch, "MAX_PARTIALS", 1)
    a, b, _ = operands(130, 400, 16, torch.float16)
    rows = torch.arange(130, device=DEVICE)
    rows = rows[(rows + offset >= 0) & (rows + offset < 400)]
    # Of the pair that is left out the softplus is 10, of all others together it is less than 1.
    b[rows + offset] = a[rows]
    masks = {} if same == "keep" else dict(zip(("ids_a", "ids_b"), ids_of(130, 400), strict=True), same=same)
    check_softplus(a, b, 20.0, 1.0, offset, numbers(130) - 10, None, torch.float16, **masks)


@pytest.mark.parametrize("cols", [129, 135, 136])
def test_weights_beside_the_padding_of_their_rows(cols, monkeypatch):
    """Padded rows of scratch: what is written past the last column is in no product."""
    monkeypatch.setattr(launch, "SCRATCH_BYTES", cols * 2 * 40)
    a, b, _ = operands(70, cols, 24, torch.float16)
    beta = numbers(70) * 4
    wanted = (softplus_twin(a, b, FIXED, 1.0, 3, beta, None, None, None, t) for t in (torch.float64, torch.float16))
    got = host.softplus_both(a, b, scalar(FIXED), beta, 1.0, 3)
    for what, grad, exact, eager in zip(("rows", "columns"), got[2:], *(x[2:] for x in wanted), strict=True):
        check(what, grad, exact, eager, torch.float16, 2.0**-11)


def test_polynomial_of_the_logarithm():
    """log2(1 + e) = z (C0 + C1 z^2 + ...) with z = e / sqrt(1 + e), to half a unit in the last place of fp32."""
    e = torch.cat([torch.linspace(0, 1, 100001, dtype=torch.float64)[1:], 2.0 ** -torch.arange(1.0, 127).double()])
    z = e / (1 + e).sqrt()
    series = sum(c.value * z ** (2 * k) for k, c in enumerate((softplus.C0, softplus.C1, softplus.C2, softplus.C3)))
    # The bound that softplus.py gives, and as near to it: a minimax polynomial is at its bound at both ends.
    error = (z * series * math.log(2) / e.log1p() - 1).abs()
    assert 4.69e-8 < error.max() < 4.7e-8 and error[99999] > 4.69e-8 and error[-1] > 4.69e-8


@pytest.mark.parametrize("x", [0.0, 1e-3, 0.3, 1.0, 3.0, 9.0, 17.0, 60.0, 87.0, 1e4])
def test_one_softplus_and_its_slope(x):
    """Both signs: beta is the argument. The rounding of x log2(e) is relative to x, what remains is a few roundings."""
    a, b = (rows_of(torch.eye(2, 16)[k : k + 1], torch.float32) for k in range(2))
    for sign in (1.0, -1.0):
        exact = torch.tensor(sign * x, dtype=torch.float64)
        sums, slopes = host.softplus_forward(a, b, scalar(1.0), torch.full((1,), sign * x, device=DEVICE), 1.0, 1)
        for got, value in ((sums, exact.logaddexp(torch.zeros(()).double())), (slopes, exact.sigmoid())):
            # Below 2^-126 the result is 0, as any number there is on a GPU.
            floor = 2.0**-126 if value < 2.0**-125 else 0.0
            assert (got.item() - value).abs() <= (2.0**-20 + x * 2.0**-23) * value + floor, (sign, got, value)


@pytest.mark.parametrize("argument", [math.nan, math.inf, -math.inf])
def test_arguments_that_are_no_numbers(argument):
    a, b, _ = operands(3, 5, 16, torch.float32)
    given = torch.tensor([0.0, argument, 0.0], device=DEVICE)
    sums, slopes = host.softplus_forward(a, b, scalar(1.0), given, 1.0, 5)
    wanted = {math.inf: (math.inf, 5.0), -math.inf: (0.0, 0.0)}.get(argument, (math.nan, math.nan))
    assert sums[::2].isfinite().all()
    torch.testing.assert_close(torch.stack([sums[1], slopes[1]]).cpu(), torch.tensor(wanted).double(), equal_nan=True)
