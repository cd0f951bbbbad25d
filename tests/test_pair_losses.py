"""InfoNCE, CLIP, SigLIP, SupCon, DCL, several views and instance discrimination on every backend, against
fastcl.reference in float64 under the error rule; and what they have to do with each other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastcl.ops
from error_rule import check
from fastcl import (
    _native,
    clip_loss,
    dcl_loss,
    info_nce,
    instance_discrimination_loss,
    nt_xent,
    nt_xent_views,
    reference,
    siglip_loss,
    supcon_loss,
)
from fastcl.ops import chunked
from fastcl.ops.softplus import PairSoftplus
from loss_cases import BACKENDS, DTYPES, route, skip_unsupported
from pair_cases import LOSSES, compare, drawn, labels, make, results, rows

# Number of entries of the loss with reduction "none", of n rows.
LENGTHS = {"clip": 2, "dcl": 2, "views": 3, "supcon_views": 3}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The name of the backend that the ops go to, and the device to put tensors on."""
    return request.param, route(request.param, monkeypatch)


def upstream_of(loss, n, device):
    return torch.randn(LENGTHS.get(loss, 1) * n, device=device)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_reduction(backend, loss, dtype, normalize):
    name, device = backend
    skip_unsupported(name, dtype, normalize)
    n = 17
    case = make(loss, n, 12, dtype, device)
    if not normalize:
        # Products of about 3.5: at the temperatures of unit rows one of them would be all of the softmax.
        case = case._replace(numbers=(1.0, -2.0)[: len(case.numbers)])
    for reduction in ("mean", "sum", "none"):
        upstream = upstream_of(loss, n, device) if reduction == "none" else 1.0
        compare(case, f"{name} {loss} {reduction}", upstream, normalize=normalize, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n,d", [(2, 5), (65, 33), (40, 300)])
@pytest.mark.parametrize("loss", LOSSES)
def test_shapes(backend, loss, n, d, dtype):
    name, device = backend
    compare(make(loss, n, d, dtype, device), f"{name} {loss} n={n} d={d}", normalize=True)


@pytest.mark.parametrize("loss", ["clip", "siglip", "queue_and_batch_nce", "supcon", "supcon_in", "dcl"])
def test_more_rows_than_a_block(backend, loss):
    """A few more than 128 and 192 rows, the largest blocks of Triton in 16 bits and of C++."""
    name, device = backend
    n, dtype = (129, torch.bfloat16) if name == "triton" else (200, torch.float32)
    compare(make(loss, n, 8, dtype, device), f"{name} {loss} n={n}", normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", ["clip", "siglip", "queue_nce", "supcon"])
def test_wide_rows(backend, loss, dtype):
    name, device = backend
    skip_unsupported(name, dtype)
    compare(make(loss, 20, 1024, dtype, device), f"{name} {loss} d=1024", normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_one_feature(backend, loss, dtype):
    """Not normalised: on a line, unit rows have no gradient to compare."""
    name, device = backend
    skip_unsupported(name, dtype, normalize=False)
    case = make(loss, 5, 1, dtype, device)
    compare(case._replace(numbers=(1.0, -2.0)[: len(case.numbers)]), f"{name} {loss} d=1", normalize=False)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "noise_own_z"])
def test_gradcheck(backend, loss, normalize):
    """Not with the normaliser that the estimate calculates: it depends on the rows, and is a constant."""
    name, device = backend
    skip_unsupported(name, torch.float64)
    case = make(loss, 4, 3, torch.float64, device)
    for reduction in ("mean", "none"):

        def function(*leaves, reduction=reduction):
            return case.ours(*leaves, normalize=normalize, reduction=reduction)

        assert torch.autograd.gradcheck(function, case.leaves())


def test_chunk_boundaries(monkeypatch):
    """Chunked torch with chunks of a few rows, the last one short."""
    for name in fastcl.ops.SCHEMAS:
        monkeypatch.setattr(fastcl.ops, name, getattr(chunked, name))
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 7 * 23)
    for loss in LOSSES:
        for reduction in ("mean", "none"):
            upstream = upstream_of(loss, 23, "cpu") if reduction == "none" else 1.0
            compare(make(loss, 23, 8, torch.float64), f"small chunks {loss}", upstream, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("loss", LOSSES)
def test_numbers_and_tensors_agree(backend, loss, dtype):
    name, device = backend
    case = make(loss, 20, 16, dtype, device)
    number = case.ours(*case.rows, *case.numbers, normalize=True)
    tensor = case.ours(*case.rows, *(torch.tensor(x, device=device) for x in case.numbers), normalize=True)
    # A few units in the last place of fp32: 1 / temperature is rounded at another place, and so may be the shift.
    assert abs(number - tensor) <= 1e-6 * abs(number)


@pytest.mark.parametrize("loss", ["clip", "batch_nce", "queue_nce"])
def test_numbers_and_tensors_agree_on_long_rows(backend, loss):
    """Rows of length 16: from the number alone they would seem to be within the range of one exponential."""
    _, device = backend
    case = make(loss, 20, 16, torch.float32, device)
    long, one = [4 * x for x in case.rows], torch.ones((), device=device)
    number, tensor = (case.ours(*long, x, normalize=False) for x in (1.0, one))
    # The rounding of fp32, as above.
    assert number.isfinite() and abs(number - tensor) <= 1e-6 * abs(tensor)


@pytest.mark.parametrize("dtype,reduction", [(torch.float32, "mean"), (torch.float16, "none")])
@pytest.mark.parametrize("loss", LOSSES)
def test_same_bits_every_time(backend, loss, reduction, dtype):
    name, device = backend
    case = make(loss, 70, 16, dtype, device)
    first, second = (results(case.ours, case.leaves(), reduction=reduction) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(not _native.LOADED, reason=_native.REASON)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "hard_nce"])
def test_same_bits_with_any_number_of_threads(loss, reduction):
    """Of the C++ kernels. Chosen negatives go through torch's own products."""
    case = make(loss, 410, 24, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(case.ours, case.leaves(), reduction=reduction))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", ["queue_nce", "hard_nce"])
def test_queue_of_another_dtype(backend, loss, dtype):
    """Queues are float32 whatever the queries are; their gradient has their dtype. Float64 queries meet all digits of
    what the queue holds."""
    name, device = backend
    skip_unsupported(name, dtype)
    (query, keys), (queue,) = rows(2, 12, 16, dtype, device), rows(1, 31, 16, torch.float32, device)
    chosen = torch.randint(31, (12, 9), generator=drawn()).to(device) if loss == "hard_nce" else None
    queue.requires_grad_(chosen is None)
    value = info_nce(query, keys, queue, 0.2, negative_indices=chosen)
    exact = reference.info_nce(query.double(), keys.double(), queue.double(), 0.2, negative_indices=chosen)
    eager = reference.info_nce(query, keys, queue.to(dtype), 0.2, negative_indices=chosen)
    check(f"{name} {loss}", value.detach(), exact.detach(), eager.detach(), dtype)
    if name in ("cpp", "chunked") and dtype.itemsize == 2 and fastcl.ops.product_dtype(query, True) == torch.float32:
        # The queue is not rounded to the queries' type.
        wide = info_nce(query.float(), keys.float(), queue, 0.2, negative_indices=chosen)
        assert torch.equal(value, wide)
    if chosen is None:
        pairs = zip((value, exact, eager), (torch.autograd.grad(x, queue)[0] for x in (value, exact, eager)))
        got, wanted, plain = (grad for _, grad in pairs)
        assert got.dtype == torch.float32
        # Of float64 queries too it is rounded to float32.
        rounded = torch.float32 if dtype == torch.float64 else dtype
        check(f"{name} gradient of the queue", got, wanted, plain, rounded)


# What the losses have to do with each other, in float64. Both sides are rounded: a few units in the last place.


def same(first, second, leaves, upstream=None):
    """The two values and their gradients agree."""
    upstream = torch.linspace(-1, 2, len(first), dtype=first.dtype) if upstream is None else upstream
    for value in (first, second):
        assert value.shape == first.shape
    torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-12)
    grads = [torch.autograd.grad((value * upstream).sum(), leaves, retain_graph=True) for value in (first, second)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def leaves_of(count, n=11, d=6):
    return [x.requires_grad_() for x in rows(count, n, d, torch.float64, "cpu")]


def test_dcl_is_nt_xent_without_the_positive():
    leaves = leaves_of(2)
    dcl = dcl_loss(*leaves, 0.3, reduction="none")
    same(nt_xent(*leaves, 0.3, reduction="none"), dcl.exp().log1p(), leaves)


def test_supcon_of_two_views_is_nt_xent():
    """With a label for every image; both forms, for there is one positive."""
    leaves = leaves_of(2)
    expected = nt_xent(*leaves, 0.3, reduction="none").view(2, -1).T.flatten()
    for form in ("out", "in"):
        views = torch.stack(leaves, 1)
        same(supcon_loss(views, torch.arange(11), 0.3, form=form, reduction="none"), expected, leaves)
        whole = supcon_loss(torch.cat(leaves), torch.arange(11).repeat(2), 0.3, form=form)
        torch.testing.assert_close(whole, expected.mean())


def test_two_views_are_nt_xent():
    leaves = leaves_of(2)
    for reduction in ("mean", "sum", "none"):
        assert torch.equal(
            nt_xent_views(leaves, 0.3, reduction=reduction), nt_xent(*leaves, 0.3, reduction=reduction)
        )


def test_views_are_supcon():
    leaves = leaves_of(4)
    rows_of_images = supcon_loss(torch.stack(leaves, 1), torch.arange(11), 0.3, reduction="none").view(11, 4)
    same(nt_xent_views(leaves, 0.3, reduction="none"), rows_of_images.T.flatten(), leaves)


def test_clip_is_info_nce_in_both_directions():
    leaves = leaves_of(2)
    ways = [info_nce(a, b, None, 0.25, reduction="none") for a, b in (leaves, leaves[::-1])]
    same(clip_loss(*leaves, 4.0, normalize=True, reduction="none"), torch.cat(ways), leaves)


def test_a_queue_of_the_other_keys_is_the_batch():
    leaves = leaves_of(2, n=12)
    query, keys = leaves
    whole = info_nce(query, keys, None, 0.3, reduction="none")
    part = info_nce(query[:5], keys[:5], keys[5:], 0.3, in_batch=True, reduction="none")
    same(part, whole[:5], leaves)
    # A queue that has the key itself: the positive counts twice.
    twice = info_nce(query, keys, keys, 0.3, reduction="none")
    same(twice, whole.exp().log1p(), leaves)
    # Row by row, the queue of each made of the others.
    others = [torch.cat([keys[:i], keys[i + 1 :]]) for i in range(12)]
    single = [info_nce(query[i : i + 1], keys[i : i + 1], others[i], 0.3, reduction="none") for i in range(12)]
    same(torch.cat(single), whole, leaves)


def test_choosing_every_negative_once_is_the_queue():
    leaves = leaves_of(2)
    queue = torch.randn(20, 6, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(20) for _ in range(11)])
    every = info_nce(*leaves, queue, 0.3, reduction="none")
    same(info_nce(*leaves, queue, 0.3, negative_indices=chosen, reduction="none"), every, leaves)
    # Twice each: log 2 more.
    twice = info_nce(*leaves, queue, 0.3, negative_indices=chosen.repeat(1, 2), reduction="none")
    same(twice, (2 * every.expm1()).log1p(), leaves)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_masked_duplicates(dtype):
    """Rows of the same id leave each other out: as if the others were not there."""
    leaves = leaves_of(2, n=6)
    query, keys = leaves
    ids = torch.tensor([3, 1, 3, 4, 3, 0], dtype=dtype)
    found = info_nce(query, keys, None, 0.3, ids=ids, reduction="none")
    for i in range(6):
        keep = [j for j in range(6) if j == i or ids[j] != ids[i]]
        alone = info_nce(query[keep], keys[keep], None, 0.3, reduction="none")[keep.index(i)]
        same(found[i : i + 1], alone[None], leaves)


def test_bias_of_sampling():
    leaves = leaves_of(2)
    log_q = -torch.rand(11, dtype=torch.float64).mul(3)
    plain = info_nce(*leaves, None, 0.3, reduction="none")
    # The same for all keys: it cancels.
    same(info_nce(*leaves, None, 0.3, log_q=torch.full((11,), -7.5), reduction="none"), plain, leaves)
    # A row's own: off its positive, and off what it is as a negative of others.
    own = log_q.clone().requires_grad_()
    found = info_nce(*leaves, None, 0.3, log_q=own, reduction="none")
    shifted = F.normalize(leaves[0], dim=1) @ F.normalize(leaves[1], dim=1).T / 0.3 - log_q
    same(found, F.cross_entropy(shifted, torch.arange(11), reduction="none"), leaves)
    assert torch.autograd.grad(found.sum(), own, allow_unused=True)[0] is None


def test_estimate_from_every_instance(monkeypatch):
    """All rows of the bank as noise: log(n / m) is 0, and this is SigLIP and one softplus of the positive more."""
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.arange(*size))
    (query,) = leaves_of(1)
    bank = F.normalize(torch.randn(11, 6, dtype=torch.float64), dim=1)
    options = {"num_negatives": 11, "reduction": "none"}
    found = instance_discrimination_loss(query, torch.arange(11), bank, 0.3, log_z=2.5, **options)
    unit = F.normalize(query, dim=1)
    positive = (unit * bank).sum(1) / 0.3 - 2.5
    same(found, siglip_loss(unit, bank, 1 / 0.3, -2.5, reduction="none") + F.softplus(positive), [query])
    # Z is then the mean over the queries of the softmax's denominator.
    log_z = (unit.detach() @ bank.T / 0.3).logsumexp((0, 1)).item() - math.log(11)
    own, given = (
        instance_discrimination_loss(query, torch.arange(11), bank, 0.3, log_z=z, **options) for z in (None, log_z)
    )
    same(own, given, [query])


def test_instances_are_info_nce_against_the_rest_of_the_bank():
    (query,) = leaves_of(1)
    bank = F.normalize(torch.randn(15, 6, dtype=torch.float64), dim=1)
    indices = torch.randint(15, (11,))
    found = instance_discrimination_loss(query, indices, bank, 0.3, reduction="none")
    single = []
    for i, place in enumerate(indices.tolist()):
        others = bank[[j for j in range(15) if j != place]]
        single.append(info_nce(query[i : i + 1], bank[place : place + 1], others, 0.3, reduction="none"))
    same(found, torch.cat(single), [query])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("reduce", [True, False])
def test_softplus_of_the_rows_themselves(sign, reduce):
    """With the gradients of the scale and of beta, which no loss of the rows themselves needs."""
    (z,), ids = leaves_of(1), torch.arange(11) % 3
    scale, beta = (torch.rand(size, dtype=torch.float64).requires_grad_() for size in ((), (11,)))
    found = PairSoftplus.apply(z, None, scale, beta, ids, None, sign, True, reduce, z.dtype, None, "softplus")
    exact = reference.pair_softplus(z, z, scale, beta, sign, 0, ids_a=ids, ids_b=ids, same="only")
    same(*([found[None], exact.sum()[None]] if reduce else [found, exact]), [z, scale, beta])


def test_supcon_counts_anchors_with_a_positive():
    (z,) = leaves_of(1)
    ids = labels(11)
    lonely = (ids[:, None] == ids).sum(1) == 1
    assert lonely.sum() == 1
    for form in ("out", "in"):
        found = supcon_loss(z, ids, 0.3, form=form, reduction="none")
        assert found[lonely].eq(0).all() and found[~lonely].gt(0).all()
        mean, total = (supcon_loss(z, ids, 0.3, form=form, reduction=how) for how in ("mean", "sum"))
        torch.testing.assert_close(mean, found.sum() / 10)
        torch.testing.assert_close(total, found.sum())
        # Its own upstream gradient goes nowhere, and as a negative it has a gradient.
        upstream = torch.zeros(11, dtype=z.dtype)
        (own,) = torch.autograd.grad((found * upstream.masked_fill(lonely, 1e3)).sum(), z, retain_graph=True)
        assert own.eq(0).all()
        (whole,) = torch.autograd.grad(found.sum(), z)
        assert whole[lonely].ne(0).any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("n,d", [(2048, 128), (500, 768)])
@pytest.mark.parametrize("loss", LOSSES)
def test_large_on_gpu(loss, n, d, dtype):
    compare(make(loss, n, d, dtype, "cuda"), f"cuda {loss} n={n} d={d}", normalize=True)


@pytest.mark.gpu
@pytest.mark.parametrize("loss", LOSSES)
def test_no_device_synchronisation(loss):
    case = make(loss, 256, 64, torch.float32, "cuda")
    leaves = case.leaves()
    results(case.ours, leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(case.ours, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
