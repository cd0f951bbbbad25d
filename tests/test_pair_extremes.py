"""The losses of rows against other rows, and of labels, at the ends of their range: temperatures, aligned, equal,
opposite and zero rows, one row, nothing to compare with, NaN, large upstream gradients."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import fastcl.ops
from error_rule import check, relative
from fastcl import info_nce, reference, supcon_loss
from loss_cases import BACKENDS, DTYPES, exponent_rounding, route, skip_unsupported
from pair_cases import LOSSES, compare, make, results, rows

SCALED = ("clip", "siglip")
# One row of these has nothing to be compared with: the loss is 0.
ALONE = ("clip", "batch_nce", "masked_nce", "supcon", "supcon_in", "dcl")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The name of the backend that the ops go to, and the device to put tensors on."""
    return request.param, route(request.param, monkeypatch)


def at(case, loss, temperature):
    """The case at this temperature."""
    number = 1 / temperature if loss in SCALED else temperature
    return case._replace(numbers=(number, *case.numbers[1:]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1e-3, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_temperatures(backend, loss, temperature, dtype):
    name, device = backend
    skip_unsupported(name, dtype)
    case = at(make(loss, 21, 24, dtype, device), loss, temperature)
    # At 0.001 a row has one or two weights that are not 0 or 1: too few for eager's error to be a measure.
    floor = exponent_rounding(1 / temperature, dtype) if temperature == 1e-3 else 0.0
    compare(case, f"{name} {loss} at {temperature}", floor=floor, normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_logit_scale_of_a_trained_clip(backend, loss, dtype):
    """Rows as open_clip gives them, normalised before, close to their partners, and the scale at its limit of 100."""
    name, device = backend
    skip_unsupported(name, dtype, normalize=False)
    case = make(loss, 40, 32, torch.float32, device)
    image = F.normalize(case.rows[0], dim=1)
    text = F.normalize(image + 0.1 * case.rows[1], dim=1)
    case = case._replace(rows=[x.to(dtype) for x in (image, text)], numbers=(100.0, -30.0)[: len(case.numbers)])
    compare(case, f"{name} {loss} trained")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arrangement", ["aligned", "antipodal"])
@pytest.mark.parametrize("loss", ["clip", "siglip", "batch_nce", "queue_and_batch_nce", "hard_nce", "dcl"])
def test_partners(backend, loss, arrangement, dtype):
    """Equal to their partners, or opposite."""
    name, device = backend
    skip_unsupported(name, dtype)
    case = make(loss, 21, 16, dtype, device)
    sign = 1 if arrangement == "aligned" else -1
    partners = [sign * case.rows[0] if x.shape == case.rows[0].shape else x for x in case.rows[1:]]
    case = case._replace(rows=[case.rows[0], *partners])
    for temperature in (0.05, 0.5):
        compare(at(case, loss, temperature), f"{name} {loss} {arrangement}", normalize=True)


@pytest.mark.parametrize("loss", ["clip", "batch_nce", "queue_and_batch_nce", "supcon_in"])
def test_close_positives_keep_their_digits(backend, loss):
    """1e-2 apart: what the loss is about is a share of 1e-3 or less, or nearly the same in two log-sum-exps."""
    name, device = backend
    case = make(loss, 40, 16, torch.float32, device)
    if loss == "supcon_in":
        # Three rows of each label.
        near = torch.randn(14, 1, 16, device=device) + 0.01 * torch.randn(14, 3, 16, device=device)
        ids, z = torch.arange(14, device=device).repeat_interleave(3), near.flatten(0, 1)
        case = case._replace(
            rows=[z],
            ours=lambda z, t, **options: supcon_loss(z, ids, t, form="in", **options),
            spec=lambda z, t, **options: reference.supcon(z, ids, t, form="in", **options),
        )
    else:
        noise = 0.01 * torch.randn(40, 16, device=device)
        case = case._replace(rows=[case.rows[0], case.rows[0] + noise, *case.rows[2:]])
    case = at(case, loss, 0.05)
    got, exact = (
        results(f, case.leaves(dtype), normalize=True)
        for f, dtype in ((case.ours, torch.float32), (case.spec, torch.float64))
    )
    for g, x in zip(got, exact, strict=True):
        # Exponents up to 20 of both sides: eager is off by 1e-5 to 1e-4.
        assert relative(g, x) <= 4 * exponent_rounding(20.0, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_collapsed_rows(backend, loss, dtype):
    """All rows the same: every similarity is 1 / temperature, and no direction of a unit row changes that."""
    name, device = backend
    skip_unsupported(name, dtype)
    case = make(loss, 21, 16, dtype, device)
    row = torch.randn(16, device=device).to(dtype)
    case = at(case._replace(rows=[row.expand(x.shape).clone() for x in case.rows]), loss, 0.1)
    got, exact, eager = (
        results(f, case.leaves(cast), normalize=True)
        for f, cast in ((case.ours, dtype), (case.spec, torch.float64), (case.eager, dtype))
    )
    check(f"{name} {loss} collapsed", got[0], exact[0], eager[0], dtype)
    if loss in ("noise", "noise_own_z", "instance", "hard_nce"):
        # Compared with rows that are not theirs.
        return
    # Rows may have 16 bits. Gradients are rounded once more.
    rounded = torch.float16 if name == "cuda" and dtype.itemsize == 2 else fastcl.ops.product_dtype(row[None], True)
    for grad in got[1 : 1 + len(case.rows)]:
        lengths = grad.double().flatten(0, -2).norm(dim=1) * row.double().norm()
        assert lengths.max() <= 10 * 8 * torch.finfo(rounded).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_zero_rows_get_no_gradient(backend, loss, dtype):
    name, device = backend
    skip_unsupported(name, dtype)
    case = make(loss, 12, 8, dtype, device)
    for x in case.rows:
        x[0] = x[3] = 0
    for g in results(case.ours, case.leaves(), normalize=True)[1 : 1 + len(case.rows)]:
        assert g[0].eq(0).all() and g[3].eq(0).all() and g[1].ne(0).any()
    # Eager has NaN in fp16, where 1e-12 is 0: what is left to allow are the roundings of rows, weights and gradients.
    floor = 2e-3 if dtype == torch.float16 else 0.0
    compare(case, f"{name} {loss} zero rows", floor=floor, normalize=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_all_rows_zero(backend, loss):
    name, device = backend
    case = make(loss, 12, 8, torch.float32, device)
    case = case._replace(rows=[torch.zeros_like(x) for x in case.rows])
    compare(case, f"{name} {loss} all zero", normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_one_row(backend, loss, dtype):
    name, device = backend
    skip_unsupported(name, dtype)
    case = make(loss, 1, 8, dtype, device)
    # The rounding of rows to 16 bits is not averaged over any.
    floor = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    for reduction in ("mean", "sum", "none"):
        if loss in ALONE:
            assert all(x.eq(0).all() for x in results(case.ours, case.leaves(), normalize=True, reduction=reduction))
        else:
            compare(case, f"{name} {loss} one row", floor=floor, normalize=True, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_nothing_to_compare_with(backend, normalize, dtype):
    """Every pair masked, or no row with a positive: loss and gradients are 0."""
    name, device = backend
    skip_unsupported(name, dtype, normalize)
    given = rows(2, 9, 6, dtype, device)
    same, different = torch.zeros(9, dtype=torch.int32, device=device), torch.arange(9, device=device)

    def masked(query, keys, t, **options):
        return info_nce(query, keys, None, t, ids=same, **options)

    def without_positive(z, t, form, **options):
        return supcon_loss(z, different, t, form=form, **options)

    cases = [(masked, given)]
    cases += [(functools.partial(without_positive, form=form), given[:1]) for form in ("out", "in")]
    for function, tensors in cases:
        for reduction in ("mean", "sum", "none"):
            leaves = [x.clone().requires_grad_() for x in tensors]
            leaves.append(torch.tensor(0.2, device=device, requires_grad=True))
            found = results(function, leaves, normalize=normalize, reduction=reduction)
            assert all(x.eq(0).all() for x in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["out", "in"])
def test_one_label_for_all(backend, form, dtype):
    """Every other row is a positive: L_in is log(M - 1) whatever the rows are."""
    name, device = backend
    skip_unsupported(name, dtype)
    ids = torch.full((15,), 7, device=device)
    case = make("supcon", 15, 8, dtype, device)
    functions = (
        lambda z, t, loss=loss, **options: loss(z, ids, t, form=form, **options)
        for loss in (supcon_loss, reference.supcon)
    )
    case = case._replace(**dict(zip(("ours", "spec"), functions, strict=True)))
    got, exact = (results(f, case.leaves(x)) for f, x in ((case.ours, dtype), (case.spec, torch.float64)))
    if form == "in":
        torch.testing.assert_close(got[0].double(), torch.tensor(14.0, dtype=torch.float64, device=device).log())
        assert all(g.eq(0).all() for g in got[1:])
    else:
        # Roundings of rows, weights and gradients to 16 bits.
        tolerance = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
        for g, x in zip(got, exact, strict=True):
            assert relative(g, x) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "value,normalize", [(torch.nan, True), (torch.nan, False), (torch.inf, True), (-torch.inf, True)]
)
@pytest.mark.parametrize("loss", LOSSES)
def test_nan_and_inf_give_nan(backend, loss, value, normalize, dtype):
    """An infinite row has no direction. Wherever the row is, and whichever operand."""
    name, device = backend
    skip_unsupported(name, dtype, normalize)
    for operand in range(len(make(loss, 5, 8, dtype, device).rows)):
        for place in (0, 4):
            case = make(loss, 5, 8, dtype, device)
            case.rows[operand][place].view(-1)[3] = value
            found = case.ours(*case.rows, *case.numbers, normalize=normalize)
            assert found.isnan(), f"operand {operand} row {place}: {found}"


@pytest.mark.parametrize("upstream", [2.0**16, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_grad_scaler_factor_in_fp16(backend, loss, reduction, upstream):
    """An upstream gradient of 65,536 neither overflows nor flushes on the way to fp16 gradients."""
    name, device = backend
    case = make(loss, 64, 16, torch.float16, device)
    # The rows of "none" have no 1 / N in them: without it fp16 could not hold their gradients.
    weight = upstream if reduction == "mean" else upstream / 64
    got, exact = (
        results(f, case.leaves(dtype), weight, normalize=True, reduction=reduction)
        for f, dtype in ((case.ours, None), (case.spec, torch.float64))
    )
    for g, x in zip(got[1 : 1 + len(case.rows)], exact[1:], strict=False):
        assert g.isfinite().all()
        # fp16 rows and weights (2^-11 each) and one rounding of the result.
        assert relative(g, x) <= 2e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_linear_in_the_upstream_gradient(backend, loss):
    """A power of two changes no digit of them."""
    name, device = backend
    case = make(loss, 17, 8, torch.float32, device)
    for reduction in ("mean", "none"):
        one, other = (results(case.ours, case.leaves(), x, normalize=True, reduction=reduction) for x in (1.0, -0.125))
        assert all(torch.equal(-0.125 * a, b) for a, b in zip(one[1:], other[1:], strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_no_upstream_gradient(backend, loss):
    """Upstream gradients of 0: gradients of 0, and no division by the largest of them."""
    name, device = backend
    case = make(loss, 9, 8, torch.float32, device)
    for reduction in ("mean", "none"):
        found = results(case.ours, case.leaves(), 0.0, normalize=True, reduction=reduction)
        assert all(x.eq(0).all() for x in found[1:])
