"""Statistics of two views: against the specification in every type, with ties, NaN, one pair and many tiles."""

from __future__ import annotations

import math

import pytest
import torch

from error_rule import check
from fastcl import ContrastiveStats, contrastive_stats, nt_xent, reference
from fastcl.ops import chunked
from loss_cases import BACKENDS, DTYPES, route, skip_unsupported

FIELDS = ContrastiveStats._fields


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The name of the backend that the ops go to, and the device to put tensors on."""
    return request.param, route(request.param, monkeypatch)


def views(n, d, device="cpu", dtype=torch.float32, noise=0.5):
    """Two views that are alike, but not so much that every row finds its own."""
    z = torch.randn(n, d, device=device)
    return tuple((z + noise * torch.randn(n, d, device=device)).to(dtype) for _ in range(2))


def specified(z1, z2, temperature, normalize):
    found = ContrastiveStats(*reference.contrastive_stats(z1, z2, temperature, normalize=normalize))
    # Said to be NaN without normalisation.
    return found if normalize else found._replace(uniformity=found.uniformity * math.nan)


def compare(what, z1, z2, temperature, normalize=True):
    """Under the error rule, each relative to what it is measured by: similarities to that of the positives, the entropy
    to that of rows that tell nothing apart."""
    got = contrastive_stats(z1, z2, temperature, normalize=normalize)
    assert isinstance(got, ContrastiveStats)
    for name, value in got._asdict().items():
        assert value.shape == () and value.dtype == torch.float64 and value.device == z1.device, name
    cast = [z.double() for z in (z1, z2)]
    exact, eager = specified(*cast, temperature, normalize), specified(z1, z2, temperature, normalize)
    most = torch.tensor(math.log(2 * len(z1) - 1), dtype=torch.float64, device=z1.device)
    for name in FIELDS:
        if name == "uniformity" and not normalize:
            assert got.uniformity.isnan()
            continue
        beside = {"negative_similarity": exact.positive_similarity, "entropy": most}.get(name)
        values = [x if beside is None else torch.stack([x.double(), beside]) for x in
                  (getattr(found, name) for found in (got, exact, eager))]  # fmt: skip
        # Rows are rounded to bf16 where that is multiplied, by up to 2^-8 in length: a few rows do not average it out.
        floor = 2**-8 if name == "uniformity" and z1.dtype == torch.bfloat16 else 0.0
        check(f"{what} {name}", *values, z1.dtype, floor)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n,d", [(2, 3), (33, 8), (80, 32)])
def test_every_dtype(backend, n, d, normalize, dtype):
    """Of one tile and of several, full ones and others."""
    name, device = backend
    skip_unsupported(name, dtype, normalize)
    compare(f"{name} {n}", *views(n, d, device, dtype), 0.3, normalize)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1, 100.0])
def test_temperatures(backend, temperature):
    """From rows that are sure of their nearest one to rows that tell nothing apart; numbers and tensors."""
    name, device = backend
    z = views(40, 16, device)
    got = compare(f"{name} {temperature}", *z, temperature)
    assert temperature > 0.01 or got.entropy < 0.5
    assert temperature < 100 or got.entropy > 0.99 * math.log(79)
    if name == "chunked":
        tensor = torch.tensor([temperature], device=device, dtype=torch.float64)
        torch.testing.assert_close(contrastive_stats(*z, tensor), got, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 100, 1000])
@pytest.mark.parametrize("normalize", [True, False])
def test_chunks(chunk, normalize, monkeypatch):
    """As many rows at a time as there are, and one."""
    route("chunked", monkeypatch)
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", chunk)
    compare(f"chunks of {chunk}", *views(40, 16), 0.2, normalize)


def test_what_they_say(backend):
    """Rows on the axes: each number by hand."""
    _, device = backend
    z = torch.eye(8, device=device)
    got = contrastive_stats(z, z, 0.5)
    # One of 15 other rows is the same, and 14 are at a right angle.
    total = math.exp(2) + 14
    entropy = math.log(total) - 2 * math.exp(2) / total
    uniformity = math.log((1 + 14 * math.exp(-4)) / 15)
    wanted = ContrastiveStats(1.0, 1.0, 0.0, entropy, 0.0, uniformity)
    for name in FIELDS:
        assert getattr(got, name).item() == pytest.approx(getattr(wanted, name), rel=1e-5, abs=1e-6), name
    apart = contrastive_stats(z, z.roll(1, 0), 0.5)
    # Now the row that is the same is a negative.
    assert apart.top1 == 0 and apart.positive_similarity == 0 and apart.alignment.item() == pytest.approx(2, rel=1e-5)
    assert apart.negative_similarity.item() == pytest.approx(1 / 14, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.1, 0.3])
def test_collapsed_rows_find_nothing(backend, temperature, normalize, dtype):
    """All rows alike: whatever the roundings of equal products, no positive is the nearest."""
    name, device = backend
    skip_unsupported(name, dtype, normalize)
    z = torch.randn(1, 40, device=device).to(dtype).expand(40, 40)
    got = contrastive_stats(z, z, temperature, normalize=normalize)
    length = reference.normalize_rows(z.double(), normalize).square().sum(1).mean()
    assert got.top1 == 0 and got.alignment == 0
    assert got.entropy.item() == pytest.approx(math.log(79), rel=1e-5)
    # 16-bit rows of length 1 are rounded (2^-11, 2^-8) where they are multiplied in that type.
    rounded = {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-5)
    for similarity in (got.positive_similarity, got.negative_similarity):
        torch.testing.assert_close(similarity, length, rtol=rounded, atol=0)
    assert not normalize or got.uniformity.item() == pytest.approx(0, abs=4 * rounded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tie_with_one_negative(backend, dtype):
    """A copy of a pair: those four rows have two nearest ones."""
    name, device = backend
    skip_unsupported(name, dtype)
    z = torch.eye(10, device=device, dtype=dtype)
    z[7] = z[2]
    assert contrastive_stats(z, z).top1 == 0.8


def test_a_close_negative_is_no_tie(backend):
    """Similarities that differ by far more than roundings, but little, are told apart."""
    _, device = backend
    z = torch.eye(10, 100, device=device)
    z[7] = torch.nn.functional.normalize(z[2] + 0.02 * z[5], dim=0)
    assert contrastive_stats(z, z).top1 == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_one_pair(backend, normalize, dtype):
    """There are no negatives: nothing to be nearer, nothing to be unsure of."""
    name, device = backend
    skip_unsupported(name, dtype, normalize)
    z1, z2 = views(1, 8, device, dtype)
    got = contrastive_stats(z1, z2, normalize=normalize)
    exact = specified(z1.double(), z2.double(), 0.1, normalize)
    assert got.top1 == 1 and got.entropy == 0 and got.negative_similarity.isnan()
    rounded = {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-5)
    for field in ("positive_similarity", "alignment", "uniformity"):
        torch.testing.assert_close(
            getattr(got, field), getattr(exact, field), rtol=4 * rounded, atol=rounded, equal_nan=True
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value,normalize", [(math.nan, True), (math.nan, False), (math.inf, True)])
@pytest.mark.parametrize("n", [1, 9])
def test_nan_is_not_lost(backend, n, value, normalize, dtype):
    """In either view; an infinite row has no direction. No row finds its positive among such."""
    name, device = backend
    skip_unsupported(name, dtype, normalize)
    for view in range(2):
        z = views(n, 8, device, dtype)
        z[view][n // 2, 3] = value
        got = contrastive_stats(*z, normalize=normalize)
        assert all(getattr(got, field).isnan() for field in FIELDS if field != "top1"), got
        assert got.top1 == 0


def test_zero_rows(backend):
    """They stay zero: at a right angle to everything, and nearer to the others than unit rows are."""
    name, device = backend
    z1, z2 = views(20, 16, device)
    z1[0] = z1[3] = z2[3] = 0
    compare(f"{name} zero rows", z1, z2, 0.2)


def test_no_gradient_and_no_change():
    z1, z2 = (z.requires_grad_() for z in views(9, 8))
    before = [z.detach().clone() for z in (z1, z2)]
    temperature = torch.tensor(0.2, requires_grad=True)
    got = contrastive_stats(z1, z2, temperature)
    assert not any(value.requires_grad for value in got)
    assert all(torch.equal(z, old) for z, old in zip((z1, z2), before, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive_stats(z1, z2, temperature)
    assert all(torch.equal(*values) for values in zip(got, inside, strict=True))


def test_layouts():
    """Of any strides, and views of one tensor."""
    both = torch.randn(16, 2, 9)
    z1, z2 = both[:, 0].T, both[:, 1].T
    for got, wanted in zip(contrastive_stats(z1, z2), contrastive_stats(z1.clone(), z2.contiguous()), strict=True):
        assert torch.equal(got, wanted)


def test_agrees_with_the_losses():
    """NT-Xent is the entropy plus what the softmax expects less the positive; alignment and uniformity are losses."""
    z1, z2 = (z.double() for z in views(30, 8))
    got = contrastive_stats(z1, z2, 0.2)
    z = reference.stack_views(z1, z2)
    S = reference.masked_similarity(z, z, 5.0, 0)
    expected = (S.softmax(1) * S.masked_fill(S == -torch.inf, 0.0)).sum(1).mean()
    torch.testing.assert_close(nt_xent(z1, z2, 0.2), got.entropy + expected - 5 * got.positive_similarity)
    torch.testing.assert_close(got.alignment, reference.alignment(z1, z2))
    torch.testing.assert_close(got.uniformity, reference.uniformity(torch.cat([z1, z2])))


def test_same_bits_every_time(backend):
    name, device = backend
    z = views(40, 16, device)
    first, second = (contrastive_stats(*z, 0.2) for _ in range(2))
    assert all(torch.equal(*values) for values in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_on_gpu(dtype):
    compare("large", *views(700, 128, "cuda", dtype), 0.2)
