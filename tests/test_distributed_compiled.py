"""torch.compile with losses over real gloo processes: values and gradients are those without it, also where ranks hold
different numbers of rows and compile at different times."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import test_distributed
from test_distributed import close, outcomes, reduced, same_everywhere  # noqa: F401
from test_distributed_engines import RING, Batch, Learner

# float64, sums of a few dozen numbers.
ROUNDING = 1e-12
CASES: dict[str, tuple[int, functools.partial]] = {}
case = functools.partial(test_distributed.case, cases=CASES)
# Fast to compile, and it traces forward and backward as other backends do.
compiled = functools.partial(torch.compile, backend="aot_eager")


def _encoder(model):
    model.encoder = compiled(model.encoder)
    return model


# What is compiled, and how.
COMPILED = {
    "encoder": _encoder,
    "DistributedDataParallel": lambda model: compiled(DistributedDataParallel(model)),
}


def check_compiled(rank, what, wrap=compiled, **options):
    """In a first call, and in a second for which rank 0 alone has more rows: it compiles again for sizes that change,
    the others for its number of rows. Were collectives in these graphs, the order of one rank need not be that of the
    others, and the gradient would wait for ever or be wrong."""
    plain, model = Learner(what, **options), Learner(what, **options)
    graph = wrap(model)
    for step, counts in enumerate([(3, 4), (6, 4)]):
        batch = Batch.of_step(step, counts, torch.float64, rank)
        expected, loss = plain(batch), graph(batch)
        expected.backward()
        loss.backward()
        same_everywhere(loss.detach())
        close(loss.detach(), expected.detach(), ROUNDING, f"{what} loss {step}")
        for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
            close(reduced(got.grad), reduced(wanted.grad), ROUNDING, f"{what} gradient {step}")
        for module in (plain, model):
            module.zero_grad()
    torch.compiler.reset()


# Each has an exchange that the others have not; compilation takes seconds.
for _what in ("nt_xent", "clip", "siglip", "swd"):

    @case((2,), what=_what)
    def all_compiled(rank, world, what):
        check_compiled(rank, what)


for _how in COMPILED:

    @case((2,), how=_how)
    def partly_compiled(rank, world, how):
        check_compiled(rank, "nt_xent", COMPILED[how])


@case((2,))
def a_ring_compiled(rank, world):
    check_compiled(rank, "clip", **RING)


@pytest.mark.parametrize("name", CASES)
def test_ranks(name, outcomes):  # noqa: F811
    problems = outcomes(CASES[name][0])[name]
    assert not any(problems), "\n".join(f"rank {rank}:\n{problem}" for rank, problem in enumerate(problems) if problem)
