"""The losses of rows and other rows over real gloo processes, against one process in float64: values, the gradient
contract, memories that are the same on all ranks, what moves between ranks, agreement on errors."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn

import test_distributed
from fastcl import (
    InstanceDiscrimination,
    MemoryBank,
    Queue,
    clip_loss,
    contrastive_stats,
    reference,
    siglip_loss,
    supcon_loss,
)
from pair_rank_cases import LOSSES, ODD_ONE_OUT, pairs_across
from rank_cases import seed_of
from test_distributed import COUNTS, FEATURES, WIDTH, Problem, close, outcomes, reduced, same_everywhere  # noqa: F401
from test_distributed_losses import _collectives, _refused_together

# Rounding of sums over a few dozen numbers; where plain PyTorch in float32 has more than half of it, twice that (the
# rule of `error_rule`).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
# Gradients of numbers of order 1 that are as small as this stand for 0.
NOTHING = 1e-15
# Beside "mean" of both.
REDUCTIONS = [("mean", "sum"), ("sum", "mean"), ("sum", "sum"), ("none", "mean"), ("none", "sum")]
COUNTS_OF = {**COUNTS, 4: [(2, 2, 2, 2), (2, 0, 3, 1)]}
CASES: dict[str, tuple[int, functools.partial]] = {}
case = functools.partial(test_distributed.case, cases=CASES)


def check_contract(rank, counts, what, dtype=torch.float64, grad_reduction="mean", reduction="mean", **options):
    """The loss on every rank, and the gradients after the reduction over ranks, are those of one process."""
    loss, problem = LOSSES[what], Problem(counts, dtype)
    learn, group = options.pop("learn", True), options.get("group")
    drawn, noise = loss.noise_of(rank, alone=len(counts) == 1)
    mine = problem.mine(rank)
    value, grads = loss.run(
        loss.ours, problem, mine, dtype, reduction, learn, grad_reduction=grad_reduction, **drawn, **options
    )
    expected, wanted = loss.run(loss.exact, problem, slice(None), torch.float64, reduction, learn, **noise)
    eager = wanted if dtype == torch.float64 else loss.run(
        loss.exact, problem, slice(None), dtype, reduction, learn, **noise
    )[1]  # fmt: skip
    what = f"{what} {counts} {reduction} {grad_reduction} {dtype}"
    if reduction == "none":
        expected = expected.unflatten(0, (loss.views, -1))[:, mine].flatten()
    elif group is None:
        same_everywhere(value)
    assert value.dtype == dtype, what
    close(value, expected, TOLERANCE[dtype], f"{what} loss")
    # Of "none" each rank makes a number of its own; averaging gradients then means averaging those numbers.
    share = 1 / len(counts) if reduction == "none" and grad_reduction == "mean" else 1
    for name, grad in grads.items():
        exact, found = wanted[name], reduced(grad, grad_reduction, group)
        if exact.abs().max() <= NOTHING:
            assert found.abs().max() <= TOLERANCE[dtype], f"{what} {name} gradient"
        else:
            rounding = 2 * (eager[name].double() - exact).abs().max() / exact.abs().max()
            close(found, share * exact, max(TOLERANCE[dtype], rounding.item()), f"{what} {name} gradient")


for _family in dict.fromkeys(what.split()[0] for what in LOSSES):

    @case((1, 2, 3, 4), family=_family)
    def contract(rank, world, family):
        for what in (what for what in LOSSES if what.split()[0] == family):
            for counts in COUNTS_OF[world]:
                check_contract(rank, counts, what)
            for reduction, grad_reduction in REDUCTIONS if world < 4 else REDUCTIONS[-1:]:
                check_contract(rank, counts, what, reduction=reduction, grad_reduction=grad_reduction)


@case((2, 3))
def contract_in_float32(rank, world):
    for what, reduction in itertools.product(LOSSES, ("mean", "none")):
        check_contract(rank, COUNTS[world][1], what, torch.float32, reduction=reduction)


@case((2, 3))
def contract_of_constant_numbers(rank, world):
    """Of a number that the host knows the kernels may know the largest exponent in advance."""
    for what in LOSSES:
        check_contract(rank, COUNTS[world][-1], what, learn=False)


@case((2, 3))
def one_image_on_each_rank(rank, world):
    for what in LOSSES:
        check_contract(rank, (1,) * world, what)


@case((2,), dtype=torch.float64)
@case((2,), dtype=torch.float32)
def contract_over_several_tiles(rank, world, dtype):
    """Batches that no kernel takes in one tile, cut between ranks in the middle of one."""
    for what in LOSSES:
        check_contract(rank, (70, 150), what, dtype)


@case((2, 3))
def positives_are_on_other_ranks(rank, world):
    """The labels of "across" do what their name says: of equal counts no row has its positive beside it."""
    counts = COUNTS[world][0]
    labels = pairs_across(sum(counts))
    mine = labels[Problem(counts).mine(rank)]
    assert labels.bincount().eq(2).all() and len(mine.unique()) == len(mine) > 0


@case((2, 3))
def one_image_in_the_world(rank, world):
    """Without negatives loss and gradients are 0, on the empty ranks too."""
    counts = (0,) * (world - 1) + (1,)
    for what in ("info_nce", "info_nce ids and log_q", "clip", "dcl"):
        value, grads = LOSSES[what].run(LOSSES[what].ours, Problem(counts), Problem(counts).mine(rank), torch.float64)
        assert value.eq(0) and all(grad.eq(0).all() for grad in grads.values()), what
    for what in ("siglip", "three views", "supcon of groups"):
        check_contract(rank, counts, what)


@case((2, 3))
def nan_on_one_rank(rank, world):
    problem = Problem(COUNTS[world][-1])
    # In both views of an image of the last rank: a loss may take one of them only.
    for x in problem.x:
        x[-1, 0] = float("nan")
    for what, loss in LOSSES.items():
        if "without positives" not in what:
            value, _ = loss.run(loss.ours, problem, problem.mine(rank), torch.float64, **loss.noise_of(0, False)[0])
            assert value.isnan(), what


@case((2, 3))
def local_group_ignores_the_others(rank, world):
    """Also called on rank 0 alone, as an evaluation does."""
    problem = Problem((2 + world,))
    for what, loss in LOSSES.items():
        drawn, noise = loss.noise_of(0, alone=True)
        if rank == 0:
            value, grads = loss.run(loss.ours, problem, slice(None), torch.float64, group="local", **drawn)
            expected, wanted = loss.run(loss.exact, problem, slice(None), torch.float64, **noise)
            close(value, expected, 1e-12, what)
            for name, grad in grads.items():
                close(grad, wanted[name], 1e-12, f"{what} {name} gradient")


@case((3,))
def sub_group(rank, world):
    """Ranks are counted in the group, and its first rank decides what is drawn."""
    group = dist.new_group([0, 2])
    for what, loss in LOSSES.items():
        if rank != 1:
            check_contract(rank // 2, (2, 3), what, group=group)
            continue
        problem = Problem((2,))
        with pytest.raises(ValueError, match="group must be one that this rank is part of"):
            loss.run(loss.ours, problem, slice(None), torch.float64, group=group, **loss.noise_of(0, False)[0])


@case((2, 3))
def device_mesh(rank, world):
    """The default group by another name, to the bit."""
    problem, mesh = Problem(COUNTS[world][-1]), dist.init_device_mesh("cpu", (world,))
    for what, loss in LOSSES.items():
        found = [
            loss.run(loss.ours, problem, problem.mine(rank), torch.float64, group=group, **loss.noise_of(0, False)[0])
            for group in (None, mesh)
        ]
        (value, grads), (other, others) = found
        assert torch.equal(value, other) and all(torch.equal(grads[name], others[name]) for name in grads), what


@case((1, 2, 3, 4))
def stats(rank, world):
    """Those of one process, the same bits on every rank."""
    for counts, normalize in itertools.product([*COUNTS_OF[world], (1,) * world], (True, False)):
        problem = Problem(counts)
        views = [x @ problem.weight for x in problem.x]
        # Products of lengths are a hundred times those of angles; the softmax of both is to be none of one row.
        options = {"temperature": 0.3 if normalize else 30.0, "normalize": normalize}
        found = contrastive_stats(*(view[problem.mine(rank)] for view in views), **options)
        wanted = reference.contrastive_stats(*views, **options)
        for name, value, expected in zip(found._fields, found, wanted, strict=True):
            same_everywhere(value.nan_to_num(-77.0))
            if name == "uniformity" and not normalize or name == "negative_similarity" and problem.n == 1:
                assert value.isnan(), f"{name} {counts}"
            else:
                # Similarities are of size 1, also where their mean is not.
                one = 1.0 if normalize and "similarity" in name else 0.0
                close(value + one, expected + one, 1e-12, f"{name} {counts} normalize={normalize}")


def _seeded(rows=11):
    return Queue(rows, WIDTH, generator=torch.Generator().manual_seed(0))


@case((1, 2, 3, 4))
def queue(rank, world):
    """Keys in rank order, whatever the counts, around the end of the queue too: to the bit that of one process."""
    together, alone = _seeded(), _seeded()
    alone.group = "local"
    for step, counts in enumerate(COUNTS_OF[world] * 3):
        problem = Problem(counts)
        keys = problem.x[step % 2] @ problem.weight + step
        together.enqueue(keys[problem.mine(rank)])
        alone.enqueue(keys)
        same_everywhere(together.rows)
        assert torch.equal(together.rows, alone.rows) and together.position == alone.position
    assert not torch.equal(together.rows, _seeded().rows)


@case((1, 2, 3, 4))
def memory_bank(rank, world):
    options = {"momentum": 0.3, "generator": torch.Generator().manual_seed(0)}
    together = MemoryBank(11, WIDTH, **options)
    alone = copy.deepcopy(together)
    alone.group = "local"
    for step, counts in enumerate(COUNTS_OF[world] * 2):
        problem = Problem(counts)
        features, indices = problem.x[0] @ problem.weight, (torch.arange(problem.n) * 3 + step) % 11
        together.update(indices[problem.mine(rank)].int(), features[problem.mine(rank)])
        alone.update(indices, features)
        same_everywhere(together.rows)
        assert torch.equal(together.rows, alone.rows)
    # An instance that is twice on every rank: the last feature of the last rank counts.
    every = torch.randn(2 * world, WIDTH, generator=torch.Generator().manual_seed(0))
    together.update(torch.tensor([4, 4]), every[2 * rank : 2 * rank + 2])
    alone.update(torch.tensor([4]), every[-1:])
    assert torch.equal(together.rows, alone.rows)


class Trained(nn.Module):
    """An encoder with its criterion: what people wrap in DistributedDataParallel."""

    def __init__(self, **options):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, WIDTH))
        self.criterion = InstanceDiscrimination(9, WIDTH, 0.2, **options)

    def forward(self, x, indices):
        return self.criterion(self.encoder(x), indices)


@case((2, 3))
def full_softmax_draws_nothing(rank, world):
    loss, state = LOSSES["instances"], torch.get_rng_state()
    loss.run(loss.ours, Problem(COUNTS[world][0]), slice(2), torch.float64)
    assert torch.equal(torch.get_rng_state(), state)


@case((2, 3), num_negatives=None)
@case((2, 3), num_negatives=4)
def instance_discrimination_steps(rank, world, num_negatives):
    """Losses, weights, bank and normaliser of one process with the whole batch and the same noise."""
    for counts in COUNTS[world]:
        problem = Problem(counts)
        rows, indices = problem.mine(rank), 2 * torch.arange(problem.n) % 9
        torch.manual_seed(0)
        options = {"group": "local", "generator": torch.Generator()}
        alone = Trained(num_negatives=num_negatives, **options).double()
        together = Trained(num_negatives=num_negatives).double()
        together.load_state_dict(alone.state_dict())
        parallel = nn.parallel.DistributedDataParallel(together)
        torch.manual_seed(70 + rank)
        seeds = torch.Generator().manual_seed(70)
        for step in range(4):
            options["generator"].manual_seed(seed_of(seeds))
            losses = []
            for model, mine in ((parallel, rows), (alone, slice(None))):
                optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
                optimizer.zero_grad()
                loss = model(problem.x[step % 2][mine], indices[mine])
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            same_everywhere(losses[0])
            close(*losses, 1e-10, "loss")
        for (name, got), wanted in zip(together.state_dict().items(), alone.state_dict().values(), strict=True):
            if num_negatives is None and name == "criterion.log_z":
                assert got.isnan() and wanted.isnan()
            else:
                close(got, wanted, 1e-10, name)
        same_everywhere(together.criterion.bank.rows)


# [(collective, bytes that this rank passes to it)]; an all_gather brings it as many from every rank.
_bytes_sent = functools.partial(_collectives, lambda kind, tensors: (kind, tensors[-1].nbytes))


def _moved(function, *leaves):
    """What the forward passes on after the header of the arguments, and what the backward does, sorted."""
    with _bytes_sent() as seen:
        loss = function(*leaves)
        forward = list(seen)
        seen.clear()
        loss.backward()
    assert forward[0][0] == "all_gather" and forward[0][1] < 32 * 8, forward
    return sorted(forward[1:]), sorted(seen)


@case((2, 3))
def bytes_of_clip(rank, world):
    """With n pairs of D float32 features on each of W ranks, N = W n: of the forward 4 n D (the texts), 16 N (the
    largest logits and the sums of the texts' columns) and 8 (the loss); of the backward 4 n D (the images), 16 n and
    8 n (upstream gradient and log-sum-exp of both directions). Texts without gradient: no images."""
    n, total = COUNTS[world][0][rank], sum(COUNTS[world][0])
    columns, rows = [("all_reduce", 8 * total)] * 2, ("all_gather", 4 * n * WIDTH)
    for learned in (True, False):
        image, text = torch.randn(n, WIDTH, requires_grad=True), torch.randn(n, WIDTH, requires_grad=learned)
        forward, backward = _moved(functools.partial(clip_loss, logit_scale=3.0), image, text)
        assert forward == sorted([rows, *columns, ("all_reduce", 8)]), forward
        vectors = [("all_gather", 16 * n), ("all_gather", 8 * n)]
        assert backward == sorted([rows, *vectors] if learned else vectors), backward


@case((2, 3))
def bytes_of_siglip(rank, world):
    """Of the forward 4 n D (the texts) and 8 (the loss); of the backward 4 n D (the images) and 4 n (the bias)."""
    n = COUNTS[world][0][rank]
    rows = ("all_gather", 4 * n * WIDTH)
    views = [torch.randn(n, WIDTH, requires_grad=True) for _ in range(2)]
    forward, backward = _moved(functools.partial(siglip_loss, logit_scale=3.0, logit_bias=-1.0), *views)
    assert forward == [rows, ("all_reduce", 8)], forward
    assert backward == sorted([rows, ("all_gather", 4 * n)]), backward


@case((2, 3))
def bytes_of_supcon(rank, world):
    """With m rows of D float32 features on each rank: of the forward 4 m D (the rows), 8 m (the labels) and twice 8
    (the anchors, the loss); of the backward 16 m (upstream gradients of the log-sum-exp and of the positives) and 4 m
    (the log-sum-exp). The form "in" has two log-sum-exps and counts positives: of the forward 8 m D, 24 m and twice 8,
    of the backward 8 m and 4 m for each."""
    m = 2 * COUNTS[world][0][rank]
    numbers = [("all_reduce", 8)] * 2
    for form, sent, returned in (("out", (4 * WIDTH, 8), (16, 4)), ("in", (4 * WIDTH, 8) * 2 + (8,), (8, 4) * 2)):
        features = torch.randn(m, WIDTH, requires_grad=True)
        function = functools.partial(supcon_loss, labels=torch.arange(m) % 2, form=form)
        forward, backward = _moved(function, features)
        assert forward == sorted([*(("all_gather", width * m) for width in sent), *numbers]), forward
        assert backward == sorted(("all_gather", width * m) for width in returned), backward


def _raises(function, options):
    try:
        function(**options, group="local")
    except (TypeError, ValueError):
        return True
    return False


for _what in ODD_ONE_OUT:

    @case((2, 3), what=_what)
    def all_ranks_raise(rank, world, what):
        function, usual, odd_ones = ODD_ONE_OUT[what]
        for argument, odd, *error in odd_ones:
            passed = odd if rank == world - 1 else usual()
            error = (error or [ValueError])[0]
            _refused_together(function, rank, world, passed, argument, error, everyone=not _raises(function, odd))


@case((2, 3))
def no_rows_anywhere(rank, world):
    problem = Problem((0,) * world)
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match="at least one row over all ranks, got 0"):
            loss.run(loss.ours, problem, slice(0), torch.float64, **loss.noise_of(0, False)[0])


@pytest.mark.parametrize("name", CASES)
def test_ranks(name, outcomes):  # noqa: F811
    problems = outcomes(CASES[name][0])[name]
    assert not any(problems), "\n".join(f"rank {rank}:\n{problem}" for rank, problem in enumerate(problems) if problem)
