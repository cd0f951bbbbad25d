"""Every loss beside nt_xent over real gloo processes, against one process in float64: values, the gradient contract,
what is drawn, what moves between ranks, agreement on errors."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import test_distributed
from fastcl import (
    SWDLoss,
    alignment_loss,
    decoupled_nt_xent,
    generalized_contrastive_loss,
    reference,
    swd_loss,
    uniformity_loss,
)
from rank_cases import FORMS, LEARNED, LOSSES, ODD_ONE_OUT, drawn, given, one, seed_of
from ranks import COLLECTIVE_SECONDS
from test_distributed import COUNTS, FEATURES, WIDTH, Problem, close, outcomes, reduced, same_everywhere  # noqa: F401

# Rounding of sums over a few dozen numbers.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
CASES: dict[str, tuple[int, functools.partial]] = {}
case = functools.partial(test_distributed.case, cases=CASES)


def check_contract(rank, counts, what, loss, dtype=torch.float64, grad_reduction="mean", reduction="mean", **options):
    """The loss on every rank, and the gradients after the reduction over ranks, are those of one process."""
    problem = Problem(counts, dtype)
    ours, spec = loss
    learned = what in LEARNED
    # Ranks may be anywhere in their random numbers.
    torch.manual_seed(1000 * rank + sum(counts))
    seed = seed_of(torch.Generator().manual_seed(sum(counts)))

    def run(function, cast, rows, **settings):
        leaves = problem.parameters(cast)[: 1 + learned]
        z1, z2 = (x[rows].to(cast) @ leaves[0] for x in problem.x)
        value = function(z1, z2, leaves[1] if learned else 0.5, reduction=reduction, **settings)
        total = value if reduction != "none" else (value * problem.upstream[:, rows].flatten().to(value.dtype)).sum()
        return value.detach(), torch.autograd.grad(total, leaves)

    mine = problem.mine(rank)
    value, grads = run(ours, dtype, mine, grad_reduction=grad_reduction, **options)
    expected, wanted = run(spec, torch.float64, slice(None), seed=seed, dtype=dtype)
    what = f"{what} {counts} {reduction} {grad_reduction} {dtype}"
    if reduction == "none":
        expected = expected.unflatten(0, (2, -1))[:, mine].flatten()
    else:
        same_everywhere(value)
    assert value.dtype == dtype, what
    close(value, expected, TOLERANCE[dtype], f"{what} loss")
    # Of "none" each rank makes a number of its own; averaging gradients then means averaging those numbers.
    share = 1 / len(counts) if reduction == "none" and grad_reduction == "mean" else 1
    for name, grad, exact in zip(("encoder", "temperature"), grads, wanted, strict=False):
        close(reduced(grad, grad_reduction), share * exact, TOLERANCE[dtype], f"{what} {name} gradient")


for _what in LOSSES:

    @case((1, 2, 3), what=_what)
    def contract(rank, world, what):
        # A group of one rank is none: it draws from the generator itself, not from a seed of it.
        if world == 1 and "swd" in what:
            return _alone(what)
        for counts in COUNTS[world]:
            check_contract(rank, counts, what, LOSSES[what])
        check_contract(rank, counts, what, LOSSES[what], grad_reduction="sum")
        if not what.startswith("uniformity"):
            for reduction, grad_reduction in (("sum", "mean"), ("none", "mean"), ("none", "sum")):
                options = {"reduction": reduction, "grad_reduction": grad_reduction}
                check_contract(rank, counts, what, LOSSES[what], **options)


def _alone(what):
    """In a world of one the call is that without ranks, random numbers included."""
    problem = Problem((4,))
    views = [x @ problem.weight for x in problem.x]
    values = []
    for options in ({}, {"group": "local"}):
        torch.manual_seed(5)
        values.append(LOSSES[what][0](*views, 0.5, **options))
    assert torch.equal(*values)


@case((2, 3))
def contract_in_float32(rank, world):
    for what, counts in itertools.product(LOSSES, COUNTS[world]):
        check_contract(rank, counts, what, LOSSES[what], torch.float32)


@case((4,))
def contract_of_four(rank, world):
    for what in LOSSES:
        check_contract(rank, (2, 0, 3, 1), what, LOSSES[what])


@case((2, 3))
def contract_of_swd_forms(rank, world):
    for what, reduction in itertools.product(FORMS, ("mean", "none")):
        check_contract(rank, COUNTS[world][-1], what, FORMS[what], reduction=reduction)


@case((3,))
def sub_group(rank, world):
    """Ranks are counted in the group, and rank 0 of the group decides what is drawn."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return
    problem = Problem((2, 3))
    rows = problem.mine(rank - 1)
    x = torch.cat([x[rows] @ problem.weight for x in problem.x]).requires_grad_()
    torch.manual_seed(40 + rank)
    loss = swd_loss(x, group=group)
    (grad,) = torch.autograd.grad(loss, x)
    every = torch.cat([x @ problem.weight for x in problem.x]).requires_grad_()
    seed = seed_of(torch.Generator().manual_seed(41))
    exact = reference.swd(every, *drawn("hypersphere", 10, seed, x.dtype), normalize=True)
    (wanted,) = torch.autograd.grad(exact, every)
    close(loss.detach(), exact.detach(), 1e-12, "loss")
    close(grad, 2 * wanted.unflatten(0, (2, -1))[:, rows].flatten(0, 1), 1e-12, "gradient")


@case((2, 3))
def draws_are_those_of_rank_0(rank, world):
    """The same as one process that draws from a generator with the seed that rank 0's would give."""
    problem = Problem(COUNTS[world][1])
    rows = problem.mine(rank)
    every = torch.cat([x @ problem.weight for x in problem.x])
    mine = torch.cat([x[rows] @ problem.weight for x in problem.x])
    for own_generator in (True, False):
        generator = torch.Generator().manual_seed(50 + rank) if own_generator else None
        torch.manual_seed(50 + rank)
        reproduced = torch.Generator().manual_seed(50)
        state = torch.random.get_rng_state()
        losses = []
        for prior in ("hypersphere", "normal", "hypersphere"):
            loss = swd_loss(mine, prior, generator=generator)
            same_everywhere(loss)
            seed = seed_of(reproduced)
            alone = swd_loss(every, prior, generator=torch.Generator().manual_seed(seed), group="local")
            close(loss, alone, 1e-12, f"loss with draws of seed {seed}")
            losses.append(loss)
        assert not torch.equal(losses[0], losses[2]), "every call draws anew"
        moved = not torch.equal(torch.random.get_rng_state(), state)
        assert moved != own_generator, "numbers come from the generator that is given, else from PyTorch's"


@case((2, 3))
def nan_on_one_rank(rank, world):
    problem = Problem(COUNTS[world][-1])
    problem.x[1][-1, 0] = float("nan")
    rows = problem.mine(rank)
    for what, (ours, _) in LOSSES.items():
        loss = ours(*(x[rows] @ problem.weight for x in problem.x), 0.5)
        assert loss.isnan(), what


@case((2, 3))
def no_gradient_wanted(rank, world):
    problem = Problem(COUNTS[world][-1])
    rows = problem.mine(rank)
    for what, (ours, spec) in LOSSES.items():
        torch.manual_seed(60 + rank)
        seed = seed_of(torch.Generator().manual_seed(60))
        with torch.no_grad():
            loss = ours(*(x[rows] @ problem.weight for x in problem.x), 0.5)
        views = [x @ problem.weight for x in problem.x]
        close(loss, spec(*views, 0.5, seed=seed, dtype=torch.float64, reduction="mean"), 1e-12, what)


# By either of its names.
GATHER = "all_gather"


@contextlib.contextmanager
def _collectives(entry=lambda kind, tensors: (kind, tensors[-1].numel(), tensors[0].numel())):
    """[(collective, elements sent, elements received)], or other entries, of what this rank takes part in."""
    kinds = ("all_gather", "all_reduce", "reduce", "broadcast", "all_to_all", "gather", "scatter")
    originals = {name: value for name, value in vars(dist).items() if name.startswith(kinds) and callable(value)}
    seen = []

    def spy(name, *args, **kwargs):
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        seen.append(entry(GATHER if name.startswith("all_gather") else name, tensors))
        return originals[name](*args, **kwargs)

    try:
        for name in originals:
            setattr(dist, name, functools.partial(spy, name))
        yield seen
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _moved(function, *leaves):
    """What the forward moves after the header of the arguments, and what the backward moves."""
    with _collectives() as seen:
        loss = function(*leaves)
        forward = list(seen)
        seen.clear()
        loss.backward()
        backward = list(seen)
    assert forward[0][0] == GATHER and forward[0][1] < 32, forward
    return forward[1:], backward


@case((2, 3))
def swd_moves_projections_once_each_way(rank, world):
    """P numbers a row to those who sort them, and as many back; not the rows, not the samples."""
    for counts, projections in itertools.product(COUNTS[world], (1, 4, 9)):
        n, total = counts[rank], sum(counts)
        z = torch.randn(n, WIDTH, requires_grad=True)
        directions, samples = given(projections).float(), given(6).float()
        shares = [projections // world + (other < projections % world) for other in range(world)]
        sorted_here = shares[rank] * total
        forward, backward = _moved(functools.partial(swd_loss, prior_samples=samples, projections=directions), z)
        assert forward == [("all_to_all_single", projections * n, sorted_here), ("all_reduce", 1, 1)], forward
        assert backward == [("all_to_all_single", sorted_here, projections * n)], backward


@case((2, 3))
def uniformity_moves_rows_once(rank, world):
    """Forward: the rows and a number of each rank. Backward: nothing, where losses of rows gather a vector."""
    n = 2 * COUNTS[world][0][rank]
    z = torch.randn(n, WIDTH, requires_grad=True)
    for normalize, width in ((True, WIDTH), (False, WIDTH + 2)):
        forward, backward = _moved(functools.partial(uniformity_loss, normalize=normalize), z)
        gathers = [entry[1:] for entry in forward if entry[0] == GATHER]
        assert gathers == [(n * width, world * n * width), (1, world)], forward
        sums = [entry for entry in forward if entry[0] != GATHER]
        assert all(entry[0] == "all_reduce" and entry[1] <= WIDTH for entry in sums) and len(sums) <= 1, forward
        assert not backward, backward


@case((2, 3))
def alignment_and_lse_move_little(rank, world):
    n = COUNTS[world][0][rank]
    views = [torch.randn(n, WIDTH, requires_grad=True) for _ in range(2)]
    assert _moved(alignment_loss, *views) == ([("all_reduce", 1, 1)], [])
    forward, backward = _moved(functools.partial(generalized_contrastive_loss, distribution="lse"), *views)
    rows = (GATHER, 2 * n * WIDTH, 2 * world * n * WIDTH)
    assert sorted(forward) == [rows, ("all_reduce", 1, 1), ("all_reduce", 1, 1)], forward
    # Of each row its log-sum-exp and its upstream gradient.
    assert backward == [(GATHER, 2 * n, 2 * world * n)] * 2, backward


@case((2,))
def one_and_one_point_zero_are_the_same_setting(rank, world):
    assert uniformity_loss(torch.randn(3, 4), 2 if rank == 0 else 2.0).isfinite()


def _refused_together(function, rank, world, passed, argument, error, everyone):
    """All ranks raise at once: of the rank whose arguments are wrong in themselves, or of those that differ."""
    odd = rank == world - 1
    start = time.monotonic()
    try:
        function(**passed)
    except (TypeError, ValueError) as caught:
        message = str(caught)
        assert type(caught) is (error if odd else ValueError), repr(caught)
    else:
        raise AssertionError(f"{function.__name__}: no error on this rank, where {argument} was to be refused")
    assert message.startswith(f"{function.__name__}: ") and ", got " in message, message
    if odd or everyone:
        assert message.startswith(f"{function.__name__}: {argument} must "), message
    else:
        assert f"got an error on rank {world - 1}" in message, message
    assert time.monotonic() - start < COLLECTIVE_SECONDS / 2, "waited for the others"


for _function in ODD_ONE_OUT:

    @case((2, 3), function=_function.__name__)
    def all_ranks_raise(rank, world, function):
        (function,) = (value for value in ODD_ONE_OUT if value.__name__ == function)
        usual, odd_ones = ODD_ONE_OUT[function]
        for argument, odd, *error in odd_ones:
            try:
                function(**odd, group="local")
                alone_is_fine = True
            except (TypeError, ValueError):
                alone_is_fine = False
            passed = odd if rank == world - 1 else usual()
            _refused_together(function, rank, world, passed, argument, (error or [ValueError])[0], alone_is_fine)


@case((2, 3))
def samples_of_another_shape(rank, world):
    """Where all ranks pass samples or directions, and one of them others."""
    for argument in ("prior_samples", "projections"):
        passed = one(**{argument: torch.randn(4 if rank == world - 1 else 3, 4)})
        _refused_together(swd_loss, rank, world, passed, argument, ValueError, True)


@case((2, 3))
def one_row_has_no_uniformity(rank, world):
    z = torch.randn(1 if rank == 1 else 0, 4)
    _refused_together(uniformity_loss, rank, world, {"z": z}, "z", ValueError, True)
    # Two rows on two ranks do.
    z = torch.randn(1 if rank < 2 else 0, 4)
    loss = uniformity_loss(z)
    assert loss.isfinite() and loss < 0


@case((2, 3))
def no_rows_anywhere(rank, world):
    for function in (alignment_loss, decoupled_nt_xent, generalized_contrastive_loss):
        empty = {"z1": torch.randn(0, 4), "z2": torch.randn(0, 4)}
        _refused_together(function, rank, world, empty, "z1 and z2", ValueError, True)
    _refused_together(swd_loss, rank, world, {"z": torch.randn(0, 4)}, "z", ValueError, True)


class Trained(nn.Module):
    """An encoder with its criterion, as in `test_distributed`."""

    def __init__(self, **options):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, WIDTH))
        self.criterion = SWDLoss(**options)

    def forward(self, x):
        return self.criterion(self.encoder(x))


@case((2, 3))
def distributed_data_parallel(rank, world):
    """The weights and losses of one process with the whole batch and the same draws, to the last digits."""
    problem = Problem(COUNTS[world][1])
    rows = problem.mine(rank)
    torch.manual_seed(0)
    alone = Trained(group="local", generator=torch.Generator()).double()
    together = Trained().double()
    together.load_state_dict(alone.state_dict())
    parallel = nn.parallel.DistributedDataParallel(together)
    torch.manual_seed(70 + rank)
    seeds = torch.Generator().manual_seed(70)
    for _ in range(4):
        alone.criterion.settings["generator"].manual_seed(seed_of(seeds))
        losses = []
        for model, x in ((parallel, problem.x[0][rows]), (alone, problem.x[0])):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            optimizer.zero_grad()
            loss = model(x)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        close(*losses, 1e-10, "loss")
    for (name, got), wanted in zip(together.named_parameters(), alone.parameters(), strict=True):
        close(got.detach(), wanted.detach(), 1e-10, name)


@pytest.mark.parametrize("name", CASES)
def test_ranks(name, outcomes):  # noqa: F811
    problems = outcomes(CASES[name][0])[name]
    assert not any(problems), "\n".join(f"rank {rank}:\n{problem}" for rank, problem in enumerate(problems) if problem)
