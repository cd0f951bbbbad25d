"""Negatives that outlive a batch: the queue, the memory bank and its module, and the choice of hard negatives."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from error_rule import check
from fastcl import InstanceDiscrimination, MemoryBank, Queue, info_nce, instance_discrimination_loss, reference
from fastcl import sample_hard_negatives
from fastcl.ops import chunked

N, D, K = 6, 8, 16
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def drawn(seed=7):
    return torch.Generator().manual_seed(seed)


def unit(x):
    return reference.normalize(x.double())


def copied(module, how):
    return copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))


def test_queue_starts_with_random_unit_rows():
    queue = Queue(K, D, generator=drawn())
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(K))
    assert queue.rows.shape == (K, D) and queue.rows.dtype == torch.float32 and queue.position == 0
    assert torch.equal(queue.rows, Queue(K, D, generator=drawn()).rows)
    assert not torch.equal(queue.rows, Queue(K, D, generator=drawn(8)).rows)


@pytest.mark.parametrize("size", [1, 3, 5, 8, 15, K])
def test_queue_is_circular(size):
    """Batches that divide the queue and those that do not, over several wraps: always the last K keys, in place."""
    queue, every = Queue(K, D), torch.zeros(0, D)
    expected = queue.rows.clone()
    for step in range(4 * K // size + 3):
        keys = torch.randn(size, D)
        every = torch.cat([every, F.normalize(keys)])
        queue.enqueue(keys)
        for age, key in enumerate(F.normalize(keys)):
            expected[(step * size + age) % K] = key
        torch.testing.assert_close(queue.rows, expected, rtol=0, atol=1e-6)
        assert queue.position == (step + 1) * size % K
    # The oldest one is where the next key goes.
    torch.testing.assert_close(queue.rows.roll(-int(queue.position), 0), every[-K:], rtol=0, atol=1e-6)


def test_queue_of_changing_batches():
    """Also empty ones, which change nothing."""
    queue, every = Queue(K, D), torch.zeros(0, D)
    for size in (5, 0, K, 1, 7, 16, 3):
        keys = torch.randn(size, D)
        before = queue.rows
        queue.enqueue(keys)
        every = torch.cat([every, F.normalize(keys)])
        assert size or torch.equal(queue.rows, before)
    assert queue.position == len(every) % K
    torch.testing.assert_close(queue.rows.roll(-int(queue.position), 0), every[-K:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queue_normalises_keys_of_any_dtype(dtype):
    """As the losses do: also keys whose squares are beyond their type, and none of length 0."""
    queue, keys = Queue(K, D), torch.randn(4, D)
    keys = (keys * torch.tensor([[1.0], [1e-4], [1e4], [0.0]])).to(dtype)
    queue.enqueue(keys)
    # fp32 rows of unit length: the sum of the D squares, its root and the quotient, each rounded.
    torch.testing.assert_close(queue.rows[:4].double(), unit(keys), rtol=0, atol=1e-6)
    assert queue.rows.dtype == torch.float32 and queue.rows[3].eq(0).all()


def test_enqueue_between_forward_and_backward():
    """The loss keeps the rows that it was calculated from, and the keys get no gradient from the queue."""
    queue, query, keys = Queue(K, D), torch.randn(N, D, requires_grad=True), torch.randn(N, D, requires_grad=True)
    (expected,) = torch.autograd.grad(info_nce(query, keys, queue.rows), query)
    rows = queue.rows
    kept = rows.clone()
    loss = info_nce(query, keys, queue.rows)
    queue.enqueue(keys)
    loss.backward()
    assert torch.equal(query.grad, expected)
    assert torch.equal(rows, kept) and not torch.equal(queue.rows, rows)
    assert not queue.rows.requires_grad and not list(queue.parameters())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_queue_copies(how):
    queue = Queue(K, D)
    queue.enqueue(torch.randn(5, D))
    other, keys = copied(queue, how), torch.randn(3, D)
    kept = queue.rows.clone()
    other.enqueue(keys)
    assert torch.equal(queue.rows, kept) and queue.position == 5 and other.position == 8
    queue.enqueue(keys)
    assert torch.equal(queue.rows, other.rows)


def test_queue_state():
    """A run that goes on from its state has the same queue as one that was not cut off."""
    queue, other = Queue(K, D), Queue(K, D)
    queue.enqueue(torch.randn(13, D))
    assert set(queue.state_dict()) == {"rows", "position"}
    other.load_state_dict(pickle.loads(pickle.dumps(queue.state_dict())))
    keys = torch.randn(7, D)
    for each in (queue, other):
        each.enqueue(keys)
    assert torch.equal(queue.rows, other.rows) and queue.position == other.position == 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", [Queue, MemoryBank])
def test_moved_to_another_dtype(memory, dtype):
    """It keeps the dtype; places stay integers."""
    moved, x = memory(K, D).to(dtype), torch.randn(N, D)
    moved.enqueue(x) if memory is Queue else moved.update(torch.arange(N), x)
    assert moved.rows.dtype == dtype and moved.rows.isfinite().all()
    assert memory is MemoryBank or (moved.position.dtype == torch.int64 and moved.position == N)
    lengths = moved.rows.double().norm(dim=1)
    # Each entry of a row is rounded once, by at most eps / 2, and so is a mean of two.
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=max(torch.finfo(dtype).eps, 1e-6), atol=0)


@pytest.mark.parametrize("momentum", [0, 0.25, 0.5, 0.999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bank_moves_rows(dtype, momentum):
    """row <- unit(momentum * row + (1 - momentum) * unit(feature)); the others stay."""
    bank, indices = MemoryBank(K, D, momentum=momentum), torch.tensor([3, 0, 15, 7])
    old, features = bank.rows.clone(), (5 * torch.randn(4, D)).to(dtype)
    bank.update(indices, features)
    expected = old.double()
    expected[indices] = unit(momentum * expected[indices] + (1 - momentum) * unit(features))
    # Roundings of fp32 rows of unit length, as above; the mean may be shorter than the rows.
    torch.testing.assert_close(bank.rows.double(), expected, rtol=0, atol=2e-6)
    others = torch.ones(K, dtype=torch.bool).index_fill(0, indices, False)
    assert torch.equal(bank.rows[others], old[others])
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(K))


@pytest.mark.parametrize("count", [2, 100])
def test_bank_takes_the_last_of_an_instance(count):
    bank, indices = MemoryBank(K, D), torch.tensor([4, 9] * count)
    old, features = bank.rows.clone(), torch.randn(2 * count, D)
    bank.update(indices, features)
    expected = unit(old[[4, 9]].double() + unit(features[-2:]))
    torch.testing.assert_close(bank.rows[[4, 9]].double(), expected, rtol=0, atol=2e-6)


def test_bank_of_no_instances():
    bank = MemoryBank(K, D)
    rows = bank.rows
    bank.update(torch.zeros(0).long(), torch.zeros(0, D))
    assert torch.equal(bank.rows, rows)


def test_update_between_forward_and_backward():
    bank, query, indices = MemoryBank(K, D), torch.randn(N, D, requires_grad=True), torch.arange(N)
    (expected,) = torch.autograd.grad(instance_discrimination_loss(query, indices, bank.rows), query)
    loss = instance_discrimination_loss(query, indices, bank.rows)
    bank.update(indices, query)
    loss.backward()
    assert torch.equal(query.grad, expected) and not bank.rows.requires_grad


def test_bank_state():
    bank, other = MemoryBank(K, D), MemoryBank(K, D)
    bank.update(torch.arange(N), torch.randn(N, D))
    assert list(bank.state_dict()) == ["rows"]
    other.load_state_dict(bank.state_dict())
    features = torch.randn(N, D)
    for each in (bank, other, copied(bank, "deepcopy")):
        each.update(torch.arange(N) + 3, features)
    assert torch.equal(bank.rows, other.rows)


@pytest.mark.parametrize("normalize", [True, False])
def test_normaliser_is_that_of_the_first_call(normalize):
    """log Z = log(n mean exp(s <v, f>)) over the queries and the noise, never again."""
    criterion = InstanceDiscrimination(K, D, 0.3, num_negatives=5, generator=drawn(), normalize=normalize)
    bank, query = criterion.bank.rows, torch.randn(N, D)
    criterion(query, torch.arange(N))
    noise = bank[torch.randint(K, (5,), generator=drawn())].double()
    expected = ((unit(query) if normalize else query.double()) @ noise.T / 0.3).exp().mean().mul(K).log()
    torch.testing.assert_close(criterion.log_z, expected, rtol=1e-6, atol=0)
    first = criterion.log_z
    for _ in range(3):
        criterion(torch.randn(N, D), torch.arange(N))
        assert torch.equal(criterion.log_z, first)


def test_normaliser_is_of_training():
    """Not of an evaluation before it; with a state of before, a new one."""
    criterion, given = InstanceDiscrimination(K, D, num_negatives=5), (torch.randn(N, D), torch.arange(N))
    assert criterion.eval()(*given).isfinite() and criterion.log_z.isnan()
    before = copy.deepcopy(criterion).state_dict()
    criterion.train()(*given)
    criterion.load_state_dict(before)
    assert criterion(*given).isfinite() and criterion.log_z.isfinite()


@pytest.mark.parametrize("noise", [5, 40])
def test_estimate_as_specified(noise):
    """Also from more noise rows than there are instances."""
    criterion = InstanceDiscrimination(K, D, 0.3, num_negatives=noise, generator=drawn())
    bank, query, indices = criterion.bank.rows, torch.randn(N, D, requires_grad=True), torch.arange(N)
    options = {"noise": torch.randint(K, (noise,), generator=drawn())}
    loss = criterion(query, indices)
    options["log_z"] = criterion.log_z
    exact = reference.instance_discrimination(query.double(), indices, bank.double(), 0.3, **options)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("noise", [None, 5])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_module_goes_on_from_a_copy(how, noise):
    criterion = InstanceDiscrimination(K, D, num_negatives=noise, generator=drawn())
    criterion(torch.randn(N, D), torch.arange(N))
    if how == "state_dict":
        other = InstanceDiscrimination(K, D, num_negatives=noise, generator=drawn())
        assert set(criterion.state_dict()) == {"bank.rows", "log_z"}
        other.load_state_dict(criterion.state_dict())
        # A generator is no state of a module.
        other.generator.set_state(criterion.generator.get_state())
    else:
        other = copied(criterion, how)
    query, indices = torch.randn(N, D), torch.arange(N) + 2
    assert torch.equal(criterion(query, indices), other(query, indices))
    assert torch.equal(criterion.bank.rows, other.bank.rows)
    torch.testing.assert_close(criterion.log_z, other.log_z, rtol=0, atol=0, equal_nan=True)
    assert criterion.log_z.isnan() == (noise is None)


@pytest.mark.parametrize("noise", [None, 5])
def test_evaluation_changes_nothing(noise):
    criterion = InstanceDiscrimination(K, D, num_negatives=noise)
    criterion(torch.randn(N, D), torch.arange(N))
    before = {key: x.clone() for key, x in criterion.state_dict().items()}
    loss = criterion.eval()(torch.randn(N, D), torch.arange(N))
    assert loss.isfinite()
    torch.testing.assert_close(dict(criterion.state_dict()), before, rtol=0, atol=0, equal_nan=True)
    criterion.train()(torch.randn(N, D), torch.arange(N))
    assert not torch.equal(criterion.bank.rows, before["bank.rows"])


def skew_normal(x, skewness):
    return 2 * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * torch.special.ndtr(skewness * x)


def law(k, width, skewness=4.0):
    """P(rank = r) of floor(k min(width |x|, 1 - eps)), by the midpoint rule in each rank; the last takes the tail."""
    points = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    x = (torch.arange(k)[:, None] + points) / (k * width)
    p = (skew_normal(x, skewness) + skew_normal(-x, skewness)).mean(1) / (k * width)
    p[-1] = 1 - p[:-1].sum()
    return p


def ranks(query, queue, chosen):
    """Of the chosen rows in the true order of similarity."""
    order = (unit(query) @ unit(queue).T).argsort(1, descending=True)
    return order.argsort(1).gather(1, chosen.long())


def chi_square(found, p):
    """Deviation of counts from the law, ranks of less than five expected counts in one cell, and the deviation that
    one sample in a million exceeds (Wilson-Hilferty; 4.7534 is that quantile of the normal distribution)."""
    n = found.numel()
    counts = torch.bincount(found.flatten(), minlength=len(p)).double()
    rare = n * p < 5
    counts, p = (torch.cat([x[~rare], x[rare].sum().reshape(-1)[: int(rare.any())]]) for x in (counts, p))
    free = len(p) - 1
    limit = free * (1 - 2 / (9 * free) + 4.7534 * math.sqrt(2 / (9 * free))) ** 3
    return ((counts - n * p).square() / (n * p)).sum().item(), limit


@pytest.mark.parametrize("chunk", [None, 1000])
@pytest.mark.parametrize("width", [0.3, 0.05, 1.0])
def test_ranks_follow_the_skew_normal_law(width, chunk, monkeypatch):
    """In one chunk of rows and in many, and of any skewness; a law that is 5% wider is told apart."""
    if chunk:
        monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", chunk)
    query, queue = torch.randn(64, D).double(), torch.randn(100, D).double()
    chosen = sample_hard_negatives(query, queue, 1500, width=width, generator=drawn())
    found = ranks(query, queue, chosen)
    for skewness in (0.0, 1.5, 4.0):
        deviation, limit = chi_square(found, law(100, width, skewness))
        assert deviation < limit
    deviation, limit = chi_square(found, law(100, 1.05 * width))
    assert deviation > limit
    # Every query for itself: none is the same as another.
    assert len(found.unique(dim=0)) == len(found)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_takes_the_nearest(dtype, normalize):
    query, queue = (torch.randn(n, D).to(dtype) for n in (N, 100))
    queue *= torch.linspace(0.5, 2, 100)[:, None].to(dtype)
    chosen = sample_hard_negatives(query, queue, 3, width=1e-9, normalize=normalize)
    q, rows = ((unit(x) if normalize else x.double()) for x in (query, queue))
    S = q @ rows.T
    assert chosen.shape == (N, 3) and (chosen == chosen[:, :1]).all()
    # Of similarities that are equal to fp32's rounding either may come first.
    torch.testing.assert_close(S.gather(1, chosen.long())[:, 0], S.amax(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [1.0, 50.0, 1e38])
def test_ranks_stay_in_range(width):
    query, queue = torch.randn(N, D), torch.randn(37, D)
    chosen = sample_hard_negatives(query, queue, 500, width=width)
    assert chosen.dtype == torch.int32 and chosen.shape == (N, 500)
    assert chosen.min() >= 0 and chosen.max() < 37
    # Nearly all of the law is beyond the last rank.
    if width > 1:
        assert (ranks(query, queue, chosen) == 36).double().mean() > 0.9
    lost = sample_hard_negatives(query * math.nan, queue, 500)
    assert lost.min() >= 0 and lost.max() < 37
    assert sample_hard_negatives(query, queue).shape == (N, 37)
    assert sample_hard_negatives(query[:0], queue).shape == (0, 37)
    assert sample_hard_negatives(query, queue[:1], 4).eq(0).all()


def test_choice_repeats():
    query, queue = torch.randn(N, D, requires_grad=True), torch.randn(50, D)
    first, second, other = (sample_hard_negatives(query, queue, 20, generator=drawn(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, second) and not torch.equal(first, other)
    state = torch.random.get_rng_state()
    sample_hard_negatives(query, queue, 20, generator=drawn())
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sample_hard_negatives(query, queue, 20, generator=drawn()), first)
    torch.manual_seed(1)
    drawn_from_torch = sample_hard_negatives(query, queue, 20)
    torch.manual_seed(1)
    assert torch.equal(sample_hard_negatives(query, queue, 20), drawn_from_torch)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def test_chosen_rows_are_not_copied():
    """Neither choice nor loss nor gradient makes a tensor of [N, m, D]: nothing is larger than two numbers for each of
    the N m choices."""
    n, m, d, k = 64, 512, 32, 128
    query, keys, queue = torch.randn(n, d, requires_grad=True), torch.randn(n, d), Queue(k, d)
    with Largest() as seen:
        chosen = sample_hard_negatives(query, queue.rows, m)
        info_nce(query, keys, queue.rows, negative_indices=chosen).backward()
    assert n * m * 4 <= seen.bytes <= 2 * n * m * 4
    with Largest() as seen:
        F.normalize(queue.rows)[chosen.long()]
    assert seen.bytes == n * m * d * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [None, 40])
def test_loss_of_hard_negatives(chunk, dtype, monkeypatch):
    """Loss and gradients with the indices that were chosen, from rows in one chunk and in many."""
    if chunk:
        monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", chunk)
    query, keys, queue = (torch.randn(n, D).to(dtype) for n in (N, N, K))
    chosen = sample_hard_negatives(query, queue, 40)
    results = []
    for function, cast in ((info_nce, dtype), (reference.info_nce, torch.float64), (reference.info_nce, dtype)):
        leaves = [x.to(cast).requires_grad_() for x in (query, keys)]
        loss = function(*leaves, queue.to(cast), 0.2, negative_indices=chosen)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for what, got, exact, eager in zip(("loss", "dquery", "dkeys"), *results, strict=True):
        check(what, got, exact, eager, dtype)
