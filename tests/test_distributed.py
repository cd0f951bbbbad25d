"""nt_xent over real gloo processes against one process in float64: values, the gradient contract, agreement on errors.

Worlds of 1, 2 and 3 processes are started once each and run every selected case; each case has a process group of
its own, so that one that fails leaves nothing behind for the next.
"""

from __future__ import annotations

import functools
import itertools
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastcl import NTXentLoss, distributed, nt_xent, reference
from ranks import COLLECTIVE_SECONDS, run_world

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch is built without gloo", allow_module_level=True)

# Rows of one view on each rank: equal, uneven, and with a rank that has none.
COUNTS = {1: [(4,)], 2: [(3, 3), (5, 2), (0, 4)], 3: [(2, 2, 2), (4, 0, 2)]}
FEATURES, WIDTH = 6, 5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
CASES: dict[str, tuple[int, functools.partial]] = {}


def case(worlds, cases=CASES, **options):
    """Register a function (rank, world, **options) as a case of each of these world sizes."""

    def register(function):
        suffix = "".join(f"-{key}={value}" for key, value in options.items()).replace("torch.", "")
        for world in worlds:
            name = f"{function.__name__}{suffix}-{world}".replace(" ", "_")
            assert name not in cases
            cases[name] = (world, functools.partial(function, **options))
        return function

    return register


class Problem:
    """Two views of a global batch, an encoder and a temperature: the same in every process."""

    def __init__(self, counts, dtype=torch.float64, temperature=0.3):
        generator = torch.Generator().manual_seed(7)
        self.counts, self.n = counts, sum(counts)
        self.x = [torch.randn(self.n, FEATURES, generator=generator, dtype=torch.float64) for _ in range(2)]
        self.weight = torch.randn(FEATURES, WIDTH, generator=generator, dtype=torch.float64)
        self.upstream = torch.randn(2, self.n, generator=generator, dtype=torch.float64)
        self.dtype, self.temperature = dtype, temperature

    def mine(self, rank: int) -> slice:
        first = sum(self.counts[:rank])
        return slice(first, first + self.counts[rank])

    def parameters(self, dtype=torch.float64):
        return self.weight.to(dtype).requires_grad_(), torch.tensor(
            self.temperature, dtype=torch.float64, requires_grad=True
        )

    def exact(self, reduction="mean", normalize=True):
        """(loss, encoder gradient, temperature gradient) of one process; the loss of "none" is weighted."""
        weight, temperature = self.parameters()
        loss = reference.nt_xent(
            self.x[0] @ weight, self.x[1] @ weight, temperature, normalize=normalize, reduction=reduction
        )
        total = loss if reduction != "none" else (loss * self.upstream.flatten()).sum()
        return loss.detach(), *torch.autograd.grad(total, (weight, temperature))

    def run(self, rank: int, reduction="mean", learn=True, **options):
        """The same of this rank's rows through nt_xent, gradients not yet reduced."""
        rows = self.mine(rank)
        weight, temperature = self.parameters(self.dtype)
        z1, z2 = (x[rows].to(self.dtype) @ weight for x in self.x)
        loss = nt_xent(z1, z2, temperature if learn else self.temperature, reduction=reduction, **options)
        total = loss if reduction != "none" else (loss * self.upstream[:, rows].flatten().to(loss.dtype)).sum()
        grads = torch.autograd.grad(total, (weight, temperature), allow_unused=not learn)
        return loss.detach(), *grads


def close(got, expected, tolerance, what):
    assert got.shape == expected.shape, f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}"
    if not got.numel():
        return
    error = (got.double() - expected).abs().max()
    bound = tolerance * expected.abs().max()
    assert error <= bound, f"{what}: error {error:.3e} above {bound:.3e}, got {got}, expected {expected}"


def reduced(x, grad_reduction="mean", group=None):
    """What DistributedDataParallel (or a sum over ranks) makes of a gradient."""
    total = x.double().clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group) if grad_reduction == "mean" else total


def same_everywhere(x):
    every = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(every, x)
    assert all(torch.equal(x, other) for other in every), f"the loss differs over ranks: {every}"


def check_contract(rank, counts, dtype=torch.float64, temperature=0.3, **options):
    problem = Problem(counts, dtype, temperature)
    loss, *grads = problem.run(rank, **options)
    reduction, grad_reduction = options.get("reduction", "mean"), options.get("grad_reduction", "mean")
    expected, *expected_grads = problem.exact(reduction, options.get("normalize", True))
    if reduction == "none":
        expected = expected.unflatten(0, (2, -1))[:, problem.mine(rank)].flatten()
    else:
        same_everywhere(loss)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(loss, expected, TOLERANCE[dtype], "loss")
    # Of "none" each rank makes a number of its own; averaging gradients then means averaging those numbers.
    share = 1 / len(counts) if reduction == "none" and grad_reduction == "mean" else 1
    for what, grad, wanted in zip(("encoder", "temperature"), grads, expected_grads, strict=True):
        if grad is not None:
            close(reduced(grad, grad_reduction), share * wanted, TOLERANCE[dtype], f"{what} gradient")


for _reduction, _grad_reduction in itertools.product(("mean", "sum", "none"), ("mean", "sum")):

    @case((1, 2, 3), reduction=_reduction, grad_reduction=_grad_reduction)
    def contract(rank, world, **options):
        for counts in COUNTS[world]:
            check_contract(rank, counts, **options)


@case((2, 3), learn=False)
@case((2, 3), normalize=False)
@case((2, 3), dtype=torch.float32)
@case((2,), dtype=torch.float16)
@case((2,), dtype=torch.bfloat16)
@case((2, 3), temperature=0.01)
@case((2, 3), temperature=0.01, learn=False)
def contract_with(rank, world, **options):
    for counts in COUNTS[world]:
        check_contract(rank, counts, **options)


@case((2,), dtype=torch.float64)
@case((2,), dtype=torch.float32)
def contract_over_several_tiles(rank, world, dtype):
    """Batches that no kernel takes in one tile, cut between ranks in the middle of one."""
    for temperature in (0.3, 0.01) if dtype == torch.float64 else (0.3,):
        check_contract(rank, (70, 150), dtype, temperature)


@case((2, 3))
def local_group_ignores_the_others(rank, world):
    """Also called on rank 0 alone, as an evaluation does."""
    problem = Problem(COUNTS[world][0])
    rows = problem.mine(rank)
    z1, z2 = (x[rows] for x in problem.x)
    close(nt_xent(z1, z2, 0.3, group="local"), reference.nt_xent(z1, z2, 0.3), 1e-12, "loss")
    if rank == 0:
        NTXentLoss(0.3, group="local")(z1.clone().requires_grad_(), z2).backward()


@case((3,))
def sub_group(rank, world):
    counts = (2, 3)
    group = dist.new_group([0, 2])
    if rank == 1:
        try:
            nt_xent(torch.randn(2, 3), torch.randn(2, 3), group=group)
        except ValueError as error:
            assert "group" in str(error)
        else:
            raise AssertionError("a rank outside of the group got a loss")
        return
    problem = Problem(counts)
    loss, *grads = problem.run(rank // 2, group=group)
    expected, *expected_grads = problem.exact()
    close(loss, expected, 1e-12, "loss")
    for grad, wanted in zip(grads, expected_grads, strict=True):
        close(reduced(grad, group=group), wanted, 1e-12, "gradient")


@case((2, 3))
def group_spellings(rank, world):
    """A ProcessGroup and a one-dimensional DeviceMesh are the default group by another name."""
    problem = Problem(COUNTS[world][-1])
    plain = problem.run(rank)
    mesh = dist.init_device_mesh("cpu", (world,))
    for group in (dist.group.WORLD, mesh):
        for got, expected in zip(problem.run(rank, group=group), plain, strict=True):
            assert torch.equal(got, expected)
    try:
        nt_xent(*problem.x, group=dist.init_device_mesh("cpu", (1, world)))
    except ValueError as error:
        assert "one-dimensional" in str(error) and "got 2" in str(error)
    else:
        raise AssertionError("a mesh of two dimensions was taken")


@case((1,))
def world_of_one(rank, world):
    problem = Problem((4,))
    for got, expected in zip(problem.run(0), problem.run(0, group="local"), strict=True):
        assert torch.equal(got, expected)


@case((2, 3))
def one_pair_in_the_world(rank, world):
    """No negatives anywhere: loss and gradients are 0, on the empty ranks too."""
    problem = Problem((0,) * (world - 1) + (1,))
    for value in problem.run(rank):
        assert value.eq(0).all()


@case((2, 3))
def one_pair_on_each_rank(rank, world):
    check_contract(rank, (1,) * world)


@case((2, 3))
def nan_on_one_rank(rank, world):
    problem = Problem(COUNTS[world][-1])
    problem.x[1][-1, 0] = float("nan")
    loss, *_ = problem.run(rank)
    assert loss.isnan()


@case((2, 3))
def no_gradient_wanted(rank, world):
    problem = Problem(COUNTS[world][-1])
    rows = problem.mine(rank)
    with torch.no_grad():
        loss = nt_xent(*(x[rows] @ problem.weight for x in problem.x), problem.temperature)
    close(loss, problem.exact()[0], 1e-12, "loss")


@case((2, 3))
def collectives_are_few(rank, world):
    """Forward: one gather of rows and one sum. Backward: one gather of a number a row; no gradient travels."""
    problem = Problem(COUNTS[world][0])
    n = 2 * problem.counts[rank]
    rows = problem.mine(rank)
    z1, z2 = (x[rows].clone().requires_grad_() for x in problem.x)
    seen = []
    kinds = ("all_gather", "all_reduce", "reduce", "broadcast", "all_to_all", "gather", "scatter")
    originals = {name: value for name, value in vars(dist).items() if name.startswith(kinds) and callable(value)}

    def spy(name, *args, **kwargs):
        kind = "all_gather" if name.startswith("all_gather") else name
        seen.append((kind, max(arg.numel() for arg in args if isinstance(arg, torch.Tensor))))
        return originals[name](*args, **kwargs)

    for name in originals:
        setattr(dist, name, functools.partial(spy, name))
    try:
        loss = nt_xent(z1, z2)
        forward = list(seen)
        seen.clear()
        loss.backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    assert len(forward) == 3, forward
    assert forward[0][1] == distributed.HEADER * world, f"more than a header before the rows: {forward}"
    assert forward[1:] == [("all_gather", world * n * FEATURES), ("all_reduce", 1)], forward
    assert seen == [("all_gather", world * n)], seen


def _views(n=3, d=4, dtype=torch.float32, **options):
    return {"z1": torch.randn(n, d).to(dtype), "z2": torch.randn(n, d).to(dtype), **options}


# What the last rank does while the others pass three pairs of four features at temperature 0.1.
ODD_ONE_OUT = {
    "feature dimension": (ValueError, "D", lambda: _views(d=5)),
    "dtype": (ValueError, "dtype", lambda: _views(dtype=torch.float64)),
    "rows of views": (ValueError, "z1 and z2", lambda: _views() | {"z2": torch.randn(2, 4)}),
    "integers": (TypeError, "z1", lambda: _views(dtype=torch.int64)),
    "no tensor": (TypeError, "z2", lambda: _views() | {"z2": [1.0]}),
    "three dimensions": (ValueError, "z1", lambda: _views() | {"z1": torch.randn(3, 4, 1)}),
    "bad temperature": (ValueError, "temperature", lambda: _views(temperature=-1.0)),
    "huge temperature": (ValueError, "temperature", lambda: _views(temperature=10**400)),
    "text temperature": (TypeError, "temperature", lambda: _views(temperature="0.1")),
    "bad temperature tensor": (ValueError, "temperature", lambda: _views(temperature=torch.tensor(0.0))),
    "other temperature": (ValueError, "temperature", lambda: _views(temperature=0.2)),
    "temperature tensor": (ValueError, "temperature", lambda: _views(temperature=torch.tensor(0.1))),
    "bad reduction": (ValueError, "reduction", lambda: _views(reduction="avg")),
    "other reduction": (ValueError, "reduction", lambda: _views(reduction="none")),
    "other normalize": (ValueError, "normalize", lambda: _views(normalize=False)),
    "other grad_reduction": (ValueError, "grad_reduction", lambda: _views(grad_reduction="sum")),
}

for _what in ODD_ONE_OUT:

    @case((2, 3), what=_what)
    def all_ranks_raise(rank, world, what):
        error, argument, make = ODD_ONE_OUT[what]
        odd = rank == world - 1
        try:
            nt_xent(**make(), group="local")
            expected = ""
        except (TypeError, ValueError):
            # Wrong in itself, not only beside the others' arguments: they are told whose they are.
            expected = "" if odd else f"got an error on rank {world - 1}"
        start = time.monotonic()
        try:
            nt_xent(**(make() if odd else _views()))
        except (TypeError, ValueError) as caught:
            message = str(caught)
            assert message.startswith("nt_xent: ") and ", got " in message and expected in message, message
            if odd:
                assert type(caught) is error and argument in message, repr(caught)
        else:
            raise AssertionError("no error on this rank")
        assert time.monotonic() - start < COLLECTIVE_SECONDS / 2, "waited for the others"


@case((2, 3))
def no_rows_anywhere(rank, world):
    try:
        nt_xent(torch.randn(0, 4), torch.randn(0, 4))
    except ValueError as error:
        assert "at least one row" in str(error) and "got" in str(error)
    else:
        raise AssertionError("no error without rows")


class Trained(nn.Module):
    """An encoder with its criterion: what people wrap in DistributedDataParallel."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, WIDTH))
        self.criterion = NTXentLoss(0.3, learnable_temperature=True)

    def forward(self, x1, x2):
        return self.criterion(self.encoder(x1), self.encoder(x2))


def _train(model, x, steps=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(*(view + step for view in x))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@case((1, 2, 3))
def distributed_data_parallel(rank, world):
    """The same weights, temperature and losses as one process with the whole batch, to the last digits."""
    for counts in COUNTS[world]:
        problem = Problem(counts)
        torch.manual_seed(0)
        alone = Trained().double()
        together = Trained().double()
        together.load_state_dict(alone.state_dict())
        rows = problem.mine(rank)
        losses = _train(nn.parallel.DistributedDataParallel(together), [x[rows] for x in problem.x])
        alone.criterion = NTXentLoss(0.3, learnable_temperature=True, group="local").double()
        expected = _train(alone, problem.x)
        close(losses, expected, 1e-10, "losses")
        for (name, got), wanted in zip(together.named_parameters(), alone.parameters(), strict=True):
            close(got.detach(), wanted.detach(), 1e-10, name)


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """Starts a world for the selected cases of its size, at most once for a module."""
    module = request.module
    ours = (item for item in request.session.items if item.module is module and item.originalname == "test_ranks")
    selected = [item.callspec.params["name"] for item in ours]

    @functools.cache
    def of_world(world):
        names = [name for name in selected if module.CASES[name][0] == world]
        return run_world(module.__name__, world, names, tmp_path_factory.mktemp(f"world{world}"))

    return of_world


@pytest.mark.parametrize("name", CASES)
def test_ranks(name, outcomes):
    problems = outcomes(CASES[name][0])[name]
    assert not any(problems), "\n".join(f"rank {rank}:\n{problem}" for rank, problem in enumerate(problems) if problem)
