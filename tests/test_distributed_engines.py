"""Losses inside PyTorch's engines over real gloo processes: training by DistributedDataParallel and fully_shard is that
of one process with the whole batch, and the work of all ranks together is that of one."""

from __future__ import annotations

import contextlib
import functools
import re
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import error_rule
import test_distributed
from fastcl import clip_loss, nt_xent, ops, siglip_loss, supcon_loss, swd_loss, uniformity_loss
from test_distributed import FEATURES, WIDTH, close, outcomes, reduced, same_everywhere  # noqa: F401

# Samples of each rank: 12 in all, equal, uneven, and with a rank that has none.
COUNTS = {1: [(12,)], 2: [(6, 6), (9, 3)], 4: [(3, 3, 3, 3), (5, 0, 3, 4)]}
STEPS, LEARNING_RATE = 20, 0.2
# A step's error in float32 is a few units of 6e-8 (the floor of the error rule is 1e-6, for one call), and they add up.
FLOOR = STEPS * error_rule.FLOOR[torch.float32]
# float64 rounds to 1e-16; what 20 steps make of it stays far below.
ROUNDING = 1e-10
RING = {"exchange": "ring"}
CASES: dict[str, tuple[int, functools.partial]] = {}
case = functools.partial(test_distributed.case, cases=CASES)


class Batch(NamedTuple):
    x1: Tensor  # [n, FEATURES]
    x2: Tensor
    labels: Tensor  # [n]
    samples: Tensor  # [K, WIDTH], directions [WIDTH, WIDTH]: the same on all ranks
    directions: Tensor

    @staticmethod
    def of_step(step, counts, dtype, rank=None):
        """The global batch, or a rank's part of it. The same numbers in every type."""
        generator, n = torch.Generator().manual_seed(step), sum(counts)
        drawn = [torch.randn(size, generator=generator) for size in ((2, n, FEATURES), (2 * n, WIDTH), (WIDTH, WIDTH))]
        (x1, x2), samples, directions = (x.to(dtype) for x in drawn)
        labels, first = torch.arange(n) % 4, 0 if rank is None else sum(counts[:rank])
        mine = slice(first, n if rank is None else first + counts[rank])
        return Batch(x1[mine], x2[mine], labels[mine], samples, torch.linalg.qr(directions)[0])


# -> (how many numbers it learns, the loss of two views, a batch and these numbers)
LOSSES = {
    "nt_xent": (1, lambda z1, z2, _, s, **options: nt_xent(z1, z2, (-s).exp(), **options)),
    "clip": (1, lambda z1, z2, _, s, **options: clip_loss(z1, z2, s.exp(), normalize=True, **options)),
    "siglip": (2, lambda z1, z2, _, s, b, **options: siglip_loss(z1, z2, s.exp(), b, normalize=True, **options)),
    "supcon": (
        1,
        lambda z1, z2, batch, s, **options: supcon_loss(torch.stack([z1, z2], 1), batch.labels, (-s).exp(), **options),
    ),
    "swd": (
        0,
        lambda z1, z2, batch, **options: swd_loss(
            torch.cat([z1, z2]), prior_samples=batch.samples, projections=batch.directions, normalize=True, **options
        ),
    ),
}


class Learner(nn.Module):
    """An encoder and the numbers that its loss learns: all that a step trains."""

    def __init__(self, what, dtype=torch.float64, shape=(), **options):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, WIDTH)]
        self.encoder = nn.Sequential(*layers).to(dtype)
        count, self.loss = LOSSES[what]
        self.numbers = nn.ParameterList(torch.full(shape, value, dtype=dtype) for value in (1.0, -1.0)[:count])
        self.options = options

    def forward(self, batch):
        return self.loss(self.encoder(batch.x1), self.encoder(batch.x2), batch, *self.numbers, **self.options)


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def weights(model):
    return [whole(p.detach()).clone() for p in model.parameters()]


def train(model, counts, dtype, rank=None, steps=STEPS):
    """-> [steps] losses and the weights afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(Batch.of_step(step, counts, dtype, rank))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [torch.stack(losses), *weights(model)]


@functools.cache
def of_one_process(what, count, dtype, steps=STEPS):
    start = weights(Learner(what, dtype))
    found = train(Learner(what, dtype, group="local"), (count,), dtype, steps=steps)
    assert all(not torch.allclose(x, y, rtol=1e-3) for x, y in zip(found[1:], start, strict=True)), "it did not learn"
    return found


def check_training(rank, counts, what, wrap, steps=STEPS, **options):
    """In float64 losses and weights are those of one process."""
    found = train(wrap(Learner(what, **options)), counts, torch.float64, rank, steps)
    same_everywhere(found[0])
    for index, (got, expected) in enumerate(
        zip(found, of_one_process(what, sum(counts), torch.float64, steps), strict=True)
    ):
        close(got, expected.reshape(got.shape), ROUNDING, f"{what} {counts}: {index or 'losses'}")


for _what in LOSSES:

    @case((1, 2, 4), what=_what)
    def distributed_data_parallel(rank, world, what):
        """In float32 no further from float64 than twice one process, or the roundings of as many steps."""
        for counts in COUNTS[world]:
            check_training(rank, counts, what, DistributedDataParallel)
            model = DistributedDataParallel(Learner(what, torch.float32))
            found = train(model, counts, torch.float32, rank)
            exact, eager = (of_one_process(what, sum(counts), dtype) for dtype in (torch.float64, torch.float32))
            for index, (got, wanted, usual) in enumerate(zip(found, exact, eager, strict=True)):
                error_rule.check(f"{what} {counts}: {index}", got, wanted, usual, torch.float32, FLOOR)


@case((2, 4))
def exchange_by_ring(rank, world):
    for what in LOSSES:
        if what != "swd":
            for counts in COUNTS[world]:
                check_training(rank, counts, what, DistributedDataParallel, steps=4, **RING)


@case((2, 4), static_graph=True)
@case((2, 4), gradient_as_bucket_view=True)
@case((2, 4), find_unused_parameters=True)
def with_option(rank, world, **option):
    for what in LOSSES:
        check_training(rank, COUNTS[world][-1], what, functools.partial(DistributedDataParallel, **option), steps=4)


@case((2, 4))
def accumulation_without_reduction(rank, world):
    """Two batches, each with its own negatives, of which the second reduces: the mean of their gradients."""
    for what in LOSSES:
        alone, together = Learner(what, group="local"), Learner(what)
        parallel = DistributedDataParallel(together)
        for step, counts in enumerate(COUNTS[world]):
            with parallel.no_sync() if step == 0 else contextlib.nullcontext():
                (parallel(Batch.of_step(step, counts, torch.float64, rank)) / 2).backward()
            (alone(Batch.of_step(step, counts, torch.float64)) / 2).backward()
        for (name, got), wanted in zip(together.named_parameters(), alone.parameters(), strict=True):
            close(got.grad, wanted.grad, ROUNDING, f"{what}: {name}")


def sharded(model, **options):
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.encoder[0], model.encoder[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh, **options)


@case((2, 4))
def sharded_parameters(rank, world):
    """The numbers are vectors of one element: fully_shard takes no scalars."""
    for what in LOSSES:
        for counts in COUNTS[world]:
            check_training(rank, counts, what, sharded, steps=4, shape=(1,))


@case((2, 4))
def a_scalar_beside_sharded_parameters(rank, world):
    """It is left to this process, which then takes the mean of its gradient itself."""
    together, alone, counts = Learner("nt_xent"), Learner("nt_xent", group="local"), COUNTS[world][-1]
    sharded(together, ignored_params=set(together.numbers))
    together(Batch.of_step(0, counts, torch.float64, rank)).backward()
    alone(Batch.of_step(0, counts, torch.float64)).backward()
    close(reduced(together.numbers[0].grad), alone.numbers[0].grad, ROUNDING, "scalar")
    for got, wanted in zip(together.encoder.parameters(), alone.encoder.parameters(), strict=True):
        close(whole(got.grad), wanted.grad, ROUNDING, "encoder")


# Products of a row and a column that a loss forms for each pair, forward and both gradients.
PRODUCTS = {"nt_xent": 2, "supcon": 2, "uniformity": 2, "clip": 3, "siglip": 3}
WORK = LOSSES | {"uniformity": (0, lambda z1, z2, _, **options: uniformity_loss(torch.cat([z1, z2]), **options))}


@contextlib.contextmanager
def _products():
    """What this rank's kernels multiply: [(op, rows, columns, products of each pair)]."""
    seen = []

    def spy(name, function, a, b, *args, **options):
        each = {"softplus_both": 3, "lse_backward": 1 + options.get("columns", False)}.get(name, 1)
        seen.append((name, len(a), len(a if b is None else b), each))
        return function(a, b, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("lse_forward", "lse_backward", "softplus_forward", "softplus_backward", "softplus_both"):
            patch.setattr(ops, name, functools.partial(spy, name, getattr(ops, name)))
        yield seen


@case((1, 2, 4))
def work_does_not_grow_with_ranks(rank, world):
    """Each forms the products of its rows with those of all, in either exchange: together as many as one process."""
    for counts in COUNTS[world]:
        for what, exchange in ((what, exchange) for what in PRODUCTS for exchange in ("gather", "ring")):
            views = 1 if what in ("clip", "siglip") else 2
            n, every = views * counts[rank], views * sum(counts)
            number, loss = WORK[what]
            numbers = [torch.tensor(1.0, requires_grad=True) for _ in range(number)]
            z1, z2 = (torch.randn(counts[rank], WIDTH, requires_grad=True) for _ in range(2))
            batch = Batch.of_step(0, counts, torch.float32, rank)
            with _products() as seen:
                total = loss(z1, z2, batch, *numbers, exchange=exchange)
                forward = sum(x * y for name, x, y, _ in seen if name.endswith(("_forward", "_both")))
                total.backward()
            assert forward == n * every, (what, exchange, seen)
            assert sum(x * y * each for _, x, y, each in seen) == PRODUCTS[what] * n * every, (what, exchange, seen)


@case((1, 2, 4))
def sorting_does_not_grow_with_ranks(rank, world):
    """Each sorts the values of all rows in its share of the projections, once."""
    seen, original, counts = [], ops.wasserstein_1d, COUNTS[world][-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "wasserstein_1d", lambda x, *rest: seen.append(list(x.shape)) or original(x, *rest))
        Learner("swd")(Batch.of_step(0, counts, torch.float64, rank)).backward()
    share = WIDTH // world + (rank < WIDTH % world)
    assert seen == [[share, 2 * sum(counts)]], seen


@case((2,))
def a_group_for_gpus_alone(rank, world):
    """Rows on the CPU are refused before anything is sent."""
    arguments = {"clip": "image and text", "siglip": "image and text", "supcon": "features", "nt_xent": "z1 and z2"}
    for what in LOSSES:
        name, argument = what if what == "nt_xent" else f"{what}_loss", arguments.get(what, "z")
        message = re.escape(f"{name}: {argument} must be where the group works, cuda (nccl), got cpu")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "get_backend_config", lambda group=None: "cuda:nccl")
            patch.setattr(dist, "get_backend", lambda group=None: "nccl")
            patch.setattr(torch.cuda, "is_available", lambda: False)
            with pytest.raises(ValueError, match=f"^{message}$"):
                Learner(what)(Batch.of_step(0, (3, 3), torch.float64, rank))


@pytest.mark.parametrize("name", CASES)
def test_ranks(name, outcomes):  # noqa: F811
    problems = outcomes(CASES[name][0])[name]
    assert not any(problems), "\n".join(f"rank {rank}:\n{problem}" for rank, problem in enumerate(problems) if problem)
