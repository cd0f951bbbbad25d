"""The Triton kernels at both ends, row by row: normalisation, the loss of every row, the way back.

Without a GPU the same kernels run through Triton's interpreter. The loss of a row and its gradient also by the C++ ops
and by chunked torch.
"""

from __future__ import annotations

import math

import pytest
import torch

from error_rule import relative
from fastcl import _native, ops, reference
from fastcl.ops import chunked

pytest.importorskip("triton", reason="Triton is not installed")

from fastcl.kernels import host  # noqa: E402
from test_kernels import DEVICE, _poison  # noqa: E402, F401

NEEDS_NATIVE = pytest.mark.skipif(not _native.LOADED, reason=_native.REASON)
EVERY = pytest.mark.parametrize(
    "module,device",
    [
        pytest.param(host, DEVICE, id="triton"),
        pytest.param(chunked, "cpu", id="chunked"),
        pytest.param(ops, "cpu", marks=NEEDS_NATIVE, id="cpp"),
    ],
)
# (weight, pull): NT-Xent, twice that, the decoupled form.
WEIGHTS = pytest.mark.parametrize("weight,pull", [(1.0, None), (2.0, None), (0.25, 1.0)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n,d", [(1, 1), (5, 3), (33, 130), (3, 1000)])
def test_normalised_pairs(n, d, normalize, dtype):
    """Layout, lengths and positives."""
    x = torch.randn(2, d, n, device=DEVICE).to(dtype).transpose(1, 2)
    z, rnorm, pos = host.normalize_pair(x[0], x[1], normalize)
    exact_z = reference.stack_views(x[0].double(), x[1].double(), normalize)
    unit = torch.finfo(z.dtype).eps
    assert z.dtype == (torch.float16 if normalize and dtype == torch.bfloat16 else dtype)
    assert relative(z, exact_z) <= unit  # rounded once to the product type
    zd = z.double()
    # Of the rounded rows, in fp32: d products.
    assert relative(pos, (zd[:n] * zd[n:]).sum(1)) < 1e-6 * max(1, d**0.5)
    assert rnorm.numel() == (2 * n if normalize else 0)


@pytest.mark.parametrize("scale", [1e-30, 1e-14, 1e-6, 1e6, 1e30])
def test_normalize_lengths(scale):
    """Squares of such rows leave the fp32 range; rows shorter than 1e-12 count as zero and get no gradient."""
    x = torch.randn(6, 9, device=DEVICE) * scale
    z, rnorm, _ = host.normalize_pair(x, x, True)
    assert relative(z[:6], reference.normalize(x.double())) < 1e-6
    if scale < 1e-13:
        assert rnorm.eq(0).all()
    else:
        assert relative(rnorm[:6] * scale, scale / torch.linalg.vector_norm(x.double(), dim=1)) < 1e-6


def numbers(n, device):
    """(log-sum-exps fp64 [2n], positives fp32 [n], scale) whose difference goes from far below 0 to far above."""
    pos = torch.rand(n, device=device) * 2 - 1
    lse = 8 * torch.cat([pos, pos]).double() + torch.linspace(-90, 90, 2 * n, dtype=torch.float64, device=device)
    return lse, pos, torch.tensor(8.0, device=device)


@EVERY
@WEIGHTS
@pytest.mark.parametrize("positive_counts", [True, False])
@pytest.mark.parametrize("n", [1, 5, 64, 3000])
def test_pair_loss(n, positive_counts, weight, pull, module, device):
    """Rows and their sum, against the twin; several programs, several turns of the one that adds up."""
    lse, pos, scale = numbers(n, device)
    exact = reference.pair_loss(pos.double(), lse, scale.double(), weight, pull, positive_counts)
    shared = (pos, lse, scale, weight, pull, positive_counts)
    rows, whole, share = module.pair_loss(*shared, None, torch.float64)
    for got, x in zip((rows, whole, share), exact, strict=True):
        # A few roundings of float64, of each row alone: down to exp(-90). The last digits of a loss are of both terms.
        bound = 1e-14 * (x.abs() if pull is None or x is not exact[0] else x.abs() + 8)
        assert got.dtype == torch.float64 and ((got - x).abs() <= bound).all()
    for dtype in (torch.float32, torch.float64):
        total, *_ = module.pair_loss(*shared, 7, dtype)
        assert total.shape == () and total.dtype == dtype
        assert abs(total.double() - exact[0].sum() / 7) <= torch.finfo(dtype).eps * exact[0].abs().sum()
    assert torch.equal(module.pair_loss(*shared, None, torch.float32)[0], rows.float())


def test_sum_of_many_programs(monkeypatch):
    """More of them than the one that adds up takes in a turn."""
    monkeypatch.setattr(host, "SUM_BLOCK", 16)
    lse, pos, scale = numbers(3000, DEVICE)
    exact, *_ = reference.pair_loss(pos.double(), lse, scale.double(), 1.0, None, True)
    total, *_ = host.pair_loss(pos, lse, scale, 1.0, None, True, 7, torch.float64)
    assert abs(total - exact.sum() / 7) <= 1e-14 * exact.sum()  # float64, rounded a few times


@EVERY
@pytest.mark.parametrize("positive_counts", [True, False])
def test_pair_loss_of_rows_without_negatives(positive_counts, module, device):
    """Loss 0 and share 0, to the bit; what is not a number stays so, and so does the sum."""
    lse, pos, scale = numbers(3, device)
    lse[1], lse[4] = -math.inf, math.nan
    rows, whole, share = module.pair_loss(pos, lse, scale, 1.0, None, positive_counts, None, torch.float32)
    assert rows[1] == 0 and share[1] == 0 and whole[1] == (8 * pos[1].double() if positive_counts else -math.inf)
    assert [x.isnan().nonzero().tolist() for x in (rows, whole)] == [[[4]]] * 2
    assert module.pair_loss(pos, lse, scale, 1.0, None, positive_counts, 6, torch.float32)[0].isnan()


@EVERY
@WEIGHTS
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n,d", [(1, 1), (5, 3), (33, 130), (3, 1000)])
def test_pair_backward(n, d, normalize, dtype, weighted, weight, pull, module, device):
    """Projection, weights, and the slope of every row in the scale."""
    x = torch.randn(2, n, d, device=device).to(dtype)
    z, rnorm, pos = module.normalize_pair(x[0], x[1], normalize)
    grad_lse, share = torch.randn(2 * n, d, device=device), torch.rand(2 * n, device=device).double()
    scale, grad = torch.tensor(3.0, device=device), torch.tensor(-5.0, device=device)
    w = torch.rand(2 * n, device=device) if weighted else None
    dx1, dx2, slope = module.pair_backward(z, rnorm, grad_lse, pos, share, scale, grad, w, weight, pull, 7, dtype)
    exact_w = torch.ones_like(share) if w is None else w.double()
    dz, exact_slope = reference.pair_backward(
        z.double(), grad_lse.double(), pos.double(), share, 3.0, -5 / 7, exact_w, weight, pull
    )
    exact, zd = dz, z.double()
    if normalize:
        exact = (dz - zd * (zd * dz).sum(1, keepdim=True)) * rnorm.double()[:, None]
    assert dx1.dtype == dx2.dtype == dtype
    size = dz.norm() * (rnorm.double().max() if normalize else 1)
    error = (torch.cat([dx1, dx2]).double() - exact).norm() / size
    assert error < 2 * torch.finfo(dtype).eps + 1e-6  # rounded once on the way out
    # d products in fp32, of a size that their sum need not have.
    assert (slope - exact_slope).norm() < 1e-5 * (exact_slope.norm() + weight * (zd * grad_lse).norm())


@EVERY
def test_pair_backward_of_a_multiple_of_nt_xent(module, device):
    """weight = pull / scale: nothing is left of the positive where the negatives have no share."""
    z, rnorm, pos = module.normalize_pair(*torch.randn(2, 4, 8, device=device), True)
    share, one = torch.zeros(8, dtype=torch.float64, device=device), torch.tensor(1.0, device=device)
    scale, nothing = torch.tensor(4.0, device=device), torch.zeros(8, 8, device=device)
    *dx, _ = module.pair_backward(z, rnorm, nothing, pos, share, scale, one, None, 0.25, 1.0, 1, torch.float32)
    assert not torch.cat(dx).any()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n,d", [(1, 1), (5, 3), (33, 130), (3, 1000), (600, 128)])
def test_unit_rows_and_the_way_back(n, d, dtype, module, device):
    """In any layout, against float64: eps a few times over for the length, and for the products of the projection."""
    x = torch.randn(d, n, device=device).to(dtype).T * 10.0 ** torch.randint(-3, 3, (n, 1), device=device).to(dtype)
    z, rnorm = module.unit_rows(x, None)
    exact = reference.normalize(x.double())
    assert z.dtype == rnorm.dtype == torch.float32
    eps = torch.finfo(torch.float32).eps
    assert relative(z, exact) <= 4 * eps and relative(rnorm, 1 / x.double().norm(dim=1)) <= 4 * eps
    dz = torch.randn(d, n, device=device).T
    dx = module.unit_rows_backward(z, rnorm, dz, dtype)
    wide = x.double().requires_grad_()
    (truth,) = torch.autograd.grad(reference.normalize(wide), wide, dz.double())
    # Row by row: lengths differ by powers of ten. One feature has no direction, and what is left of it is rounding.
    floor = (rnorm.double() * dz.double().norm(dim=1))[:, None]
    unit = 4 * eps * max(1, d**0.5) + (torch.finfo(dtype).eps if dtype != torch.float32 else 0)
    small = torch.finfo(dtype).tiny
    assert dx.dtype == dtype and ((dx.double() - truth).norm(dim=1) <= unit * floor[:, 0] + small).all()


@EVERY
def test_unit_rows_are_rounded_where_that_is_asked_for(module, device):
    x = torch.randn(9, 21, device=device)
    z, _ = module.unit_rows(x, None)
    rounded, _ = module.unit_rows(x, torch.float16)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, z)
    # One last place of fp16: z itself may differ in one of fp32 before it is rounded.
    assert relative(rounded, reference.normalize(x.double()).half().double()) < 2**-10


@EVERY
@pytest.mark.parametrize("length", [0.0, 1e-14, 1e-30, 1e30, 3e38])
def test_unit_rows_of_any_length(length, module, device):
    x = torch.ones(3, 7, device=device) * length
    x[1] = torch.arange(7, device=device)
    z, rnorm = module.unit_rows(x, None)
    # Rows below 1e-12 are divided by that, and get no gradient.
    torch.testing.assert_close(z.double(), reference.normalize(x.double()), rtol=1e-6, atol=1e-30)
    if length < 1e-12:
        assert (rnorm[0] == 0) and (module.unit_rows_backward(z, rnorm, torch.ones_like(z), torch.float32)[0] == 0).all()
    assert (rnorm[1] > 0) and z.isfinite().all()


@EVERY
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_rows_that_are_no_numbers_stay_so_alone(poison, module, device):
    x = torch.randn(5, 40, device=device)
    x[2, 33] = poison
    z, rnorm = module.unit_rows(x, None)
    dx = module.unit_rows_backward(z, rnorm, torch.ones_like(z), torch.float32)
    for found in (z.sum(1), rnorm if math.isnan(poison) else z.sum(1), dx.sum(1)):
        assert found.isnan().tolist() == [False, False, True, False, False]


@EVERY
def test_no_rows(module, device):
    z, rnorm = module.unit_rows(torch.empty(0, 5, device=device), None)
    assert z.shape == (0, 5) and rnorm.shape == (0,)
    assert module.unit_rows_backward(z, rnorm, z, torch.float32).shape == (0, 5)


@pytest.mark.parametrize("name", ["pair_loss", "pair_backward"])
def test_weights_reach_the_kernels_in_fp64(name):
    """Unannotated, a Python number is fp32 on a GPU, and weight * scale - pull no longer 0 where it should be. The
    interpreter keeps all digits of either."""
    kernel = getattr(host, f"{name}_kernel")
    assert {kernel.fn.__annotations__[key] for key in ("weight", "pull")} == {"fp64"}
