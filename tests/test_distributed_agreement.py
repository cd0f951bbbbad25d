"""What ranks agree on beside their arguments: who gets a gradient, the state of memories, the columns of a drop-in."""

from __future__ import annotations

import functools

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
    dcl_loss,
    info_nce,
    nt_xent,
    nt_xent_views,
    reference,
    siglip_loss,
    supcon_loss,
    swd_loss,
    uniformity_loss,
)
from fastcl.integrations.sentence_transformers import MultipleNegativesRankingLoss
from test_distributed import close, outcomes, reduced, same_everywhere  # noqa: F401

CASES: dict[str, tuple[int, functools.partial]] = {}
case = functools.partial(test_distributed.case, cases=CASES)

WANTED = "requires_grad must be equal on all ranks"
# Functions of two views and a number.
LOSSES = {
    "nt_xent": nt_xent,
    "dcl": dcl_loss,
    "info_nce": lambda x, y, s: info_nce(x, y, temperature=s),
    "clip": clip_loss,
    "siglip": lambda x, y, s: siglip_loss(x, y, s, -1.0),
    "siglip bias": lambda x, y, s: siglip_loss(x, y, 2.0, s),
    "supcon": lambda x, y, s: supcon_loss(torch.cat([x, y]), torch.arange(2 * len(x)) % 2, s),
    "views": lambda x, y, s: nt_xent_views([x, y, x + y], s),
    "ring": lambda x, y, s: nt_xent(x, y, s, exchange="ring"),
}


@case((2, 3))
def gradients_are_wanted_together(rank, world):
    """A rank that gets none does not come to the backward's exchange: all refuse, and none waits."""
    last = rank == world - 1
    for what, loss in LOSSES.items():
        for odd in range(3):
            leaves = [torch.randn(3, 4), torch.randn(3, 4), torch.tensor(0.7)]
            leaves[odd].requires_grad_(last)
            with pytest.raises(ValueError, match=WANTED):
                loss(*leaves)
        with torch.set_grad_enabled(last), pytest.raises(ValueError, match=WANTED):
            loss(*(x.requires_grad_() for x in leaves))
        with torch.set_grad_enabled(False):
            assert loss(*leaves).isfinite(), what
    for loss in (swd_loss, uniformity_loss):
        with pytest.raises(ValueError, match=WANTED):
            loss(torch.randn(3, 4, requires_grad=last))


@case((2, 3))
def the_same_loss_on_all_ranks(rank, world):
    """Whatever the number of their settings."""
    last = rank == world - 1
    views = [torch.randn(3, 4) for _ in range(2)]
    for odd in (dcl_loss, lambda *views: siglip_loss(*views, 1.0, 0.0)):
        with pytest.raises(ValueError, match="the loss must be the same on all ranks, got another one on rank "):
            odd(*views) if last else nt_xent(*views)


@case((2, 3))
def values_of_tensors_are_compared(rank, world):
    """Those on the CPU, which nobody waits for."""
    last = rank == world - 1
    views = [torch.randn(3, 4) for _ in range(2)]
    with pytest.raises(ValueError, match=r"temperature must be equal on all ranks, got \['a tensor of 0.5', "):
        nt_xent(*views, torch.tensor(0.25 if last else 0.5))
    with pytest.raises(ValueError, match=r"temperature must be equal on all ranks, got \['0.5', "):
        nt_xent(*views, torch.tensor(0.5) if last else 0.5)
    with pytest.raises(ValueError, match="logit_bias must be equal on all ranks"):
        siglip_loss(*views, 1.0, torch.tensor(-1.0 if last else -2.0))


@case((2, 3))
def an_error_is_told_to_all(rank, world):
    views = [torch.randn(3, 4), torch.randn(3, 4 + (rank == world - 1))]
    message = r"z1 and z2 must have the same shape \[N, D\], got \[3, 4\] and \[3, 5\]"
    with pytest.raises(ValueError, match=message):
        nt_xent(*views)


@case((2, 3))
def groups_of_others(rank, world):
    """A rank that is not part of a group is told so."""
    group, mesh = dist.new_group([0]), dist.DeviceMesh("cpu", [0])
    for other in (group, mesh):
        if rank:
            with pytest.raises(ValueError, match="group must be one that this rank is part of"):
                nt_xent(torch.randn(3, 4), torch.randn(3, 4), group=other)
        else:
            assert nt_xent(torch.randn(3, 4), torch.randn(3, 4), group=other).isfinite()


@case((2, 3))
def a_rank_with_an_older_state(rank, world):
    """The normaliser is estimated on all ranks together or on none."""
    criterion = InstanceDiscrimination(9, 4, num_negatives=3)
    old, indices = criterion.state_dict(), torch.arange(3)
    state = {key: value.clone() for key, value in old.items()}
    criterion(torch.randn(3, 4), indices)
    if rank == 0:
        criterion.load_state_dict(state)
    with pytest.raises(ValueError, match="log_z must be equal on all ranks"):
        criterion(torch.randn(3, 4), indices)
    criterion.load_state_dict(state)
    assert criterion(torch.randn(3, 4), indices).isfinite()
    with pytest.raises(ValueError, match="training must be equal on all ranks"):
        criterion.train(rank == 0)(torch.randn(3, 4), indices)
    with pytest.raises(ValueError, match="momentum must be equal on all ranks"):
        MemoryBank(9, 4, momentum=0.5 if rank else 0.25).update(indices, torch.randn(3, 4))


@case((2, 3))
def memories_of_other_sizes(rank, world):
    size = 10 if rank == 0 else 100
    with pytest.raises(ValueError, match="size must be equal on all ranks"):
        Queue(size, 4).enqueue(torch.randn(4, 4))
    with pytest.raises(ValueError, match="size must be equal on all ranks"):
        MemoryBank(size, 4).update(torch.arange(4), torch.randn(4, 4))


def _ranking(columns, **options):
    criterion = MultipleNegativesRankingLoss(nn.Identity(), gather_across_devices=True, **options)
    return criterion([{"sentence_embedding": column} for column in columns])


@case((2, 3), symmetric=False)
@case((2, 3), symmetric=True)
def ranking_of_uneven_rows(rank, world, symmetric):
    """Hard negatives of ranks that hold different numbers of rows, also none."""
    options = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"} if symmetric else {}
    counts = (4, 0, 3)[:world]
    first, total = sum(counts[:rank]), sum(counts)
    generator = torch.Generator().manual_seed(0)
    every = torch.randn(4, total, 5, generator=generator, dtype=torch.float64).requires_grad_()
    mine = every.detach()[:, first : first + counts[rank]].clone().requires_grad_()
    loss = _ranking(mine.unbind(0), **options)
    q, d, *hard = (reference.normalize(x) for x in every.unbind(0))
    exact = reference.info_nce(q, d, torch.cat(hard), 1 / 20.0, in_batch=True, normalize=False)
    if symmetric:
        exact = (exact + reference.info_nce(d, q, None, 1 / 20.0, normalize=False)) / 2
    same_everywhere(loss.detach())
    close(loss.detach(), exact.detach(), 1e-12, "loss")
    (wanted,), (grad,) = torch.autograd.grad(exact, every), torch.autograd.grad(loss, mine)
    close(grad / world, wanted[:, first : first + counts[rank]], 1e-10, "gradient")


@case((2, 3))
def ranking_refused_together(rank, world):
    """A rank with a column more or of other features."""
    last = rank == world - 1
    with pytest.raises(ValueError, match="columns must be equal on all ranks"):
        _ranking([torch.randn(3, 4) for _ in range(3 + last)])
    with pytest.raises(ValueError, match="two or more columns"):
        _ranking([torch.randn(3, 4) for _ in range(1 if last else 2)])
    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    for what, options in (("symmetric", both), ("similarity", {"similarity_fct": "dot_score"})):
        with pytest.raises(ValueError, match=f"{what} must be equal on all ranks"):
            _ranking([torch.randn(3, 4), torch.randn(3, 4)], **(options if last else {}))
    with pytest.raises(ValueError, match="same shape" if last else "got an error on rank"):
        _ranking([torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4 + last)])


@case((2,))
def facts_travel_between_cpus(rank, world):
    """Of a group that serves the CPU too; rows where the group does not work are refused on all ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda group=None: "cpu:gloo,cuda:nccl")
        assert nt_xent(torch.randn(3, 4), torch.randn(3, 4)).isfinite()
        patch.setattr(dist, "get_backend_config", lambda group=None: "cpu:gloo,cuda:nccl" if rank else "cpu:gloo")
        x = torch.randn(3, 4, device="meta" if rank else "cpu")
        message = r"z1 and z2 must be where the group works, cpu \(gloo\) and cuda \(nccl\), got meta"
        with pytest.raises(ValueError, match=message if rank else "got an error on rank 1"):
            nt_xent(x, x)


@case((2,))
def a_group_of_nccl_without_a_gpu(rank, world):
    if torch.cuda.is_available():
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda group=None: "cuda:nccl")
        message = r"nt_xent: z1 and z2 must be where the group works, cuda \(nccl\), got cpu"
        with pytest.raises(ValueError, match=message):
            nt_xent(torch.randn(3, 4), torch.randn(3, 4))


@pytest.mark.parametrize("name", CASES)
def test_ranks(name, outcomes):  # noqa: F811
    problems = outcomes(CASES[name][0])[name]
    assert not any(problems), "\n".join(f"rank {rank}:\n{problem}" for rank, problem in enumerate(problems) if problem)
