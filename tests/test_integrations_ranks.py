"""The drop-in losses over real gloo processes against the originals there, which are right about gradients if they are
asked to gather with them: the same gradients on each rank, and the loss of the global batch."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peers
import test_distributed
from fastcl import reference
from fastcl.integrations import lightly, open_clip, sentence_transformers
from test_distributed import close, outcomes, reduced, same_everywhere  # noqa: F401

CASES: dict[str, tuple[int, functools.partial]] = {}
case = functools.partial(test_distributed.case, cases=CASES)
ROWS, WIDTH = 3, 5


def everyone(count, world, rows=ROWS):
    """`count` global batches, the same in every process."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, world * rows, WIDTH, generator=generator, dtype=torch.float64)


def mine(x, rank):
    return x[:, ROWS * rank : ROWS * (rank + 1)].unbind(0)


def mean(value):
    """Over ranks: what a loss of each rank's own rows is of the global batch."""
    return reduced(value)


def compare(ours, theirs, leaves, shared=()):
    """The gradients of the rows are the same on each rank, those of shared parameters after the reduction; the value is
    the mean of the original's over ranks."""
    got, expected = (peers.run(loss, (*leaves, *shared)) for loss in (ours, theirs))
    same_everywhere(got[0])
    close(got[0], mean(expected[0]), 1e-12, "value")
    for place, (x, y) in enumerate(zip(got[1:], expected[1:], strict=True)):
        if place >= len(leaves):
            x, y = reduced(x), reduced(y)
        close(x, y, 1e-10, f"gradient {place}")
    return got, expected


@case((2,))
def lightly_gathers(rank, world):
    original = peers.original("lightly")
    options = {"temperature": 0.2, "gather_distributed": True}
    leaves = mine(everyone(2, world), rank)
    got, _ = compare(lightly.NTXentLoss(**options), original.NTXentLoss(**options), leaves)
    close(got[0], reference.nt_xent(*everyone(2, world), 0.2), 1e-12, "value")


@case((2,))
def lightly_fills_its_bank_from_all_ranks(rank, world):
    """Ten places, six rows a step: the second step runs over the end."""
    original = peers.original("lightly")
    options = {"temperature": 0.2, "gather_distributed": True, "memory_bank_size": (10, WIDTH)}
    ours, theirs = (kind(**options).double() for kind in (lightly.NTXentLoss, original.NTXentLoss))
    start = F.normalize(everyone(1, 1, rows=10)[0])
    theirs.memory_bank.bank.copy_(start)
    ours.memory_bank.rows.copy_(start)
    for step in range(4):
        compare(ours, theirs, mine(everyone(2, world) + step, rank))
        close(ours.memory_bank.rows, theirs.memory_bank.bank, 1e-12, "bank")
        assert ours.memory_bank.position == theirs.memory_bank.bank_ptr


@case((2,))
def lightly_alone(rank, world):
    """Without gather_distributed each rank has a loss of its own."""
    original = peers.original("lightly")
    leaves = mine(everyone(2, world), rank)
    got, expected = (peers.run(module.NTXentLoss(0.2), leaves) for module in (lightly, original))
    for x, y in zip(got, expected, strict=True):
        close(x, y, 1e-10, "alone")


def features(world, rank):
    """(of all ranks, of this one): unit rows of images and texts."""
    every = F.normalize(everyone(2, world), dim=2)
    return every, mine(every, rank)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


for _local in (False, True):

    @case((2,), local_loss=_local)
    def clip(rank, world, **options):
        """The original with gather_with_grad. Without it, of a global loss, its gradient is 1 / world of that."""
        original = peers.original("open_clip")
        options = {"rank": rank, "world_size": world, **options}
        every, leaves = features(world, rank)
        ours = open_clip.ClipLoss(**options)
        got, _ = compare(ours, original.ClipLoss(gather_with_grad=True, **options), leaves, [number(7.0)])
        close(got[0], reference.clip(*every, 7.0), 1e-12, "value")
        wrong = peers.run(original.ClipLoss(**options), (*leaves, number(7.0)))
        for place in (1, 2):
            if options["local_loss"]:
                assert (got[place] - wrong[place]).norm() > 0.05 * got[place].norm()
            else:
                close(world * wrong[place], got[place], 1e-10, "gradient without gather_with_grad")


for _implementation in (None, "shift", "reduce", "gather"):

    # A third rank: rows come from both sides.
    @case((2, 3) if _implementation is None else (2,), dist_impl=_implementation)
    def siglip(rank, world, **options):
        original = peers.original("open_clip")
        options = {"rank": rank, "world_size": world, **options}
        every, leaves = features(world, rank)
        ours, theirs = (module.SigLipLoss(**options) for module in (open_clip, original))
        got, _ = compare(ours, theirs, leaves, [number(7.0), number(-6.0)])
        close(got[0], reference.siglip(*every, 7.0, -6.0), 1e-12, "value")


@case((2,))
def open_clip_of_one_process(rank, world):
    """world_size=1 is this process alone, in a process group too; any other number is not that of the group."""
    _, leaves = features(world, rank)
    close(open_clip.ClipLoss()(*leaves, 7.0), reference.clip(*leaves, 7.0), 1e-12, "alone")
    close(open_clip.SigLipLoss()(*leaves, 7.0, -6.0), reference.siglip(*leaves, 7.0, -6.0), 1e-12, "alone")
    with pytest.raises(ValueError, match="world_size must be that of the default process group, 2, got 3"):
        open_clip.ClipLoss(world_size=3)(*leaves, 7.0)


SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
for _symmetric in (False, True):

    @case((2,), symmetric=_symmetric)
    def ranking(rank, world, symmetric):
        """Pairs, and with two columns of hard negatives; across devices, and each alone."""
        original = peers.original("sentence_transformers")
        options = SYMMETRIC if symmetric else {}

        def of_columns(module, gather):
            criterion = module.MultipleNegativesRankingLoss(nn.Identity(), gather_across_devices=gather, **options)
            return lambda *columns: criterion([{"sentence_embedding": column} for column in columns], None)

        for count in (2, 4):
            leaves = mine(everyone(count, world), rank)
            compare(of_columns(sentence_transformers, True), of_columns(original, True), leaves)
            got, expected = (peers.run(of_columns(kind, False), leaves) for kind in (sentence_transformers, original))
            for x, y in zip(got, expected, strict=True):
                close(x, y, 1e-10, "alone")


def library(name):
    """What a case compares with."""
    return {"lightly": "lightly", "ranking": "sentence_transformers"}.get(name.split("_")[0].split("-")[0], "open_clip")


@pytest.mark.parametrize("name", CASES)
def test_ranks(name, outcomes):  # noqa: F811
    if not peers.installed(library(name)):
        pytest.skip(f"{library(name)} is not installed")
    problems = outcomes(CASES[name][0])[name]
    assert not any(problems), "\n".join(f"rank {rank}:\n{problem}" for rank, problem in enumerate(problems) if problem)
