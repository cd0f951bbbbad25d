"""cached_backward over real gloo processes: DistributedDataParallel and fully_shard have the gradients of one process
with the whole batch, and exchange them once."""

from __future__ import annotations

import contextlib
import functools
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import test_distributed
from fastcl import ClipLoss, NTXentLoss, cached_backward, nt_xent
from ranks import COLLECTIVE_SECONDS
from test_distributed import close, outcomes, same_everywhere  # noqa: F401
from test_gradient_cache import net, plain, rows

CHUNKS = 3
# Samples of each rank: as many, more and fewer than chunks, and none.
COUNTS = {2: [(4, 4), (5, 2), (0, 4)], 3: [(3, 3, 3), (4, 0, 2)]}
# Sums of a few dozen float64 numbers in another order.
ROUNDING = 1e-12
CASES: dict[str, tuple[int, functools.partial]] = {}
case = functools.partial(test_distributed.case, cases=CASES)
alone_loss = functools.partial(nt_xent, group="local")


def views_of(rank, counts, count=2, seed=0):
    """Views of the global batch, and this rank's."""
    first, every = sum(counts[:rank]), [rows(sum(counts), seed=seed + view + 1) for view in range(count)]
    return every, [x[first : first + counts[rank]] for x in every]


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def check_same(got, expected):
    """The gradients of a module, gathered if it is sharded, are those of the module that has the whole batch."""
    for (name, x), y in zip(got.named_parameters(), expected.parameters(), strict=True):
        close(whole(x.grad), y.grad, ROUNDING, f"gradient of {name}")
    for module in (got, expected):
        module.zero_grad()


def check_against_one_process(rank, counts, wrap, chunks=CHUNKS, steps=3):
    """In several steps: DistributedDataParallel arranges its buckets anew after the first."""
    together, alone = net(), net()
    parallel = wrap(together)
    for step in range(steps):
        every, mine = views_of(rank, counts, seed=10 * step)
        loss = cached_backward(parallel, mine, nt_xent, chunks)
        same_everywhere(loss)
        close(loss, plain(alone, every, alone_loss), ROUNDING, "loss")
        check_same(together, alone)


# How an encoder may be wrapped.
WRAPS = {
    "plain": DistributedDataParallel,
    "views of buckets": functools.partial(DistributedDataParallel, gradient_as_bucket_view=True),
    "unused parameters": functools.partial(DistributedDataParallel, find_unused_parameters=True),
    "around a compiled encoder": lambda x: DistributedDataParallel(torch.compile(x, backend="aot_eager")),
    "in a compiled encoder": lambda x: torch.compile(DistributedDataParallel(x), backend="aot_eager"),
}

for _how in WRAPS:

    @case((2,) if "compiled" in _how else (2, 3), how=_how)
    def distributed_data_parallel(rank, world, how):
        for counts in COUNTS[world][1:] if "compiled" in how else COUNTS[world]:
            check_against_one_process(rank, counts, WRAPS[how], steps=1 if "compiled" in how else 3)


@case((2, 3))
def any_number_of_chunks(rank, world):
    for chunks in (1, 2, 9):
        check_against_one_process(rank, COUNTS[world][1], DistributedDataParallel, chunks, steps=1)


def _counting(parallel):
    """The buckets that are reduced from now on, by index."""
    seen = []

    def hook(group, bucket):
        seen.append(bucket.index())
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), group=group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    parallel.register_comm_hook(None, hook)
    return seen


@case((2, 3))
def one_reduction_for_each_bucket(rank, world):
    """Of several buckets, as small as they can be once they were arranged anew: as many as without chunks."""
    every, mine = views_of(rank, COUNTS[world][-1])
    together, alone = net(), net()
    parallel = DistributedDataParallel(together, bucket_cap_mb=1e-5)
    seen = _counting(parallel)
    for _ in range(2):
        seen.clear()
        parallel(torch.cat(mine)).sum().backward()
    usual = list(seen)
    assert len(usual) > 1 and sorted(usual) == list(range(len(usual))), usual
    together.zero_grad()
    plain(alone, every, alone_loss)
    for chunks in (CHUNKS, 1):
        seen.clear()
        cached_backward(parallel, mine, nt_xent, chunks)
        assert seen == usual, (seen, usual)
    for p in together.parameters():
        p.grad /= 2
    check_same(together, alone)


@case((2, 3))
def two_encoders_and_what_the_loss_learns(rank, world):
    """The loss in a DistributedDataParallel of its own: its gradient comes from the one backward of the loss."""
    for counts in COUNTS[world]:
        every, mine = views_of(rank, counts)
        together, alone = [[net(1), net(2), _Scaled(group)] for group in (None, "local")]
        image, text, loss_fn = (DistributedDataParallel(x) for x in together)
        seen = [_counting(x) for x in (image, text, loss_fn)]
        loss = cached_backward([image, text], mine, loss_fn, CHUNKS)
        close(loss, plain(alone[:2], every, alone[2]), ROUNDING, "loss")
        for got, expected in zip(together, alone, strict=True):
            check_same(got, expected)
        assert seen == [[0]] * 3, seen


class _Scaled(nn.Module):
    def __init__(self, group):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.criterion = ClipLoss(normalize=True, group=group)

    def forward(self, x, y):
        return self.criterion(x, y, self.log_scale.exp())


@case((2, 3))
def accumulation_reduces_in_the_last_batch(rank, world):
    together, alone = net(), net()
    parallel = DistributedDataParallel(together)
    seen = _counting(parallel)
    for step in range(2):
        every, mine = views_of(rank, COUNTS[world][1], seed=step)
        with parallel.no_sync() if step == 0 else contextlib.nullcontext():
            cached_backward(parallel, mine, nt_xent, CHUNKS)
        assert len(seen) == step and parallel.require_backward_grad_sync
        plain(alone, every, alone_loss)
    check_same(together, alone)


@case((2, 3))
def buffers_are_exchanged_alike(rank, world):
    """Batch norm in evaluation: its buffers are sent from rank 0, as often on a rank with fewer chunks."""
    together, alone = [net(between=lambda: nn.BatchNorm1d(8)) for _ in range(2)]
    with torch.no_grad():
        alone[1].running_mean += 0.5
        together[1].running_mean += 0.5 + rank
    parallel = DistributedDataParallel(together.eval())
    alone.eval()
    for step in range(2):
        every, mine = views_of(rank, COUNTS[world][-1], seed=step)
        cached_backward(parallel, mine, nt_xent, CHUNKS)
        plain(alone, every, alone_loss)
        check_same(together, alone)


@case((2, 3))
def failure_leaves_reductions_on(rank, world):
    """On all ranks in the first chunk of the second pass, when reductions are off. The next call reduces again."""
    together, alone = net(), net()
    parallel = DistributedDataParallel(together)

    def stop(*_):
        if torch.is_grad_enabled():
            raise RuntimeError("stopped")

    handle = together.register_forward_hook(stop)
    every, mine = views_of(rank, COUNTS[world][0])
    with pytest.raises(RuntimeError, match="stopped"):
        cached_backward(parallel, mine, nt_xent, CHUNKS)
    handle.remove()
    assert parallel.require_backward_grad_sync and torch.is_grad_enabled()
    cached_backward(parallel, mine, nt_xent, CHUNKS)
    plain(alone, every, alone_loss)
    check_same(together, alone)


@case((2,))
def static_graph_is_refused(rank, world):
    """It cannot leave out a reduction in its first step: PyTorch's own check of that names no argument."""
    parallel = DistributedDataParallel(net(), static_graph=True)
    with pytest.raises(ValueError, match="^cached_backward: encoder must .*static_graph.*, got "):
        cached_backward(parallel, views_of(rank, (4, 4))[1], nt_xent, CHUNKS)


class _Reductions(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "reduce_scatter" in str(function):
            self.seen.append(str(function))
        return function(*args, **kwargs or {})


def _sharded(encoder):
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (encoder[0], encoder[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(encoder, mesh=mesh)


@case((2, 3))
def sharded_parameters(rank, world):
    """Three modules that gather and reduce by themselves, of which the outermost has no parameters of its own."""
    check_against_one_process(rank, (4,) * world, _sharded)
    parallel = _sharded(net())
    mine = views_of(rank, (4,) * world)[1]
    for chunks in (1, CHUNKS):
        with _Reductions() as reductions:
            cached_backward(parallel, mine, nt_xent, chunks)
        assert len(reductions.seen) == 2, reductions.seen


@case((2, 3))
def sharded_encoders_need_as_many_samples_as_chunks(rank, world):
    start = time.monotonic()
    parallel = _sharded(net())
    for counts in ((2,) * world, (0,) * world):
        message = f"^cached_backward: chunks must be at most the samples of a sharded encoder, {counts[0]}, got 3$"
        with pytest.raises(ValueError, match=message):
            cached_backward(parallel, views_of(rank, counts)[1], nt_xent, CHUNKS)
    assert time.monotonic() - start < COLLECTIVE_SECONDS / 2, "waited for the others"
    assert all(p.grad is None for p in parallel.parameters())


@case((2, 3))
def a_learned_temperature_outside(rank, world):
    """A loss that is not wrapped: the mean of its gradient over ranks is that of one process."""
    every, mine = views_of(rank, COUNTS[world][-1])
    criteria = [NTXentLoss(0.3, learnable_temperature=True, group=group).double() for group in (None, "local")]
    cached_backward(DistributedDataParallel(net()), mine, criteria[0], CHUNKS)
    plain(net(), every, criteria[1])
    grads = [criterion.log_temperature.grad for criterion in criteria]
    close(test_distributed.reduced(grads[0]), grads[1], ROUNDING, "temperature gradient")


@pytest.mark.parametrize("name", CASES)
def test_ranks(name, outcomes):  # noqa: F811
    problems = outcomes(CASES[name][0])[name]
    assert not any(problems), "\n".join(f"rank {rank}:\n{problem}" for rank, problem in enumerate(problems) if problem)
