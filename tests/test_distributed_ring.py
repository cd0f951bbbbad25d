"""exchange="ring" over real gloo processes: the same loss and gradients as by gathering, in the memory of two ranks'
rows; and what a rank that dies leaves to the others."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import pair_rank_cases
import rank_cases
import test_distributed
import test_distributed_losses
import test_distributed_pairs
from fastcl import clip_loss, nt_xent, siglip_loss, supcon_loss, uniformity_loss
from test_distributed import outcomes, same_everywhere  # noqa: F401

RING = {"exchange": "ring"}
COUNTS = test_distributed_pairs.COUNTS_OF
CASES: dict[str, tuple[int, functools.partial]] = {}
case = functools.partial(test_distributed.case, cases=CASES)


@case((2, 3, 4))
def contract(rank, world):
    for counts, reduction in itertools.product([*COUNTS[world], (1,) * world], ("mean", "none")):
        test_distributed.check_contract(rank, counts, reduction=reduction, **RING)


@case((3,))
def contract_without_tensors(rank, world):
    """A temperature that the host knows, and one at which every row keeps its maximum."""
    for temperature in (0.3, 0.01):
        test_distributed.check_contract(rank, (4, 0, 2), temperature=temperature, learn=False, **RING)


@case((2, 3, 4))
def contract_of_losses(rank, world):
    for what, loss in rank_cases.LOSSES.items():
        test_distributed_losses.check_contract(rank, COUNTS[world][-1], what, loss, **RING)


for _family in dict.fromkeys(what.split()[0] for what in pair_rank_cases.LOSSES):

    @case((2, 3, 4), family=_family)
    def contract_of_pairs(rank, world, family):
        for what in (what for what in pair_rank_cases.LOSSES if what.split()[0] == family):
            for reduction in ("mean", "none"):
                test_distributed_pairs.check_contract(rank, COUNTS[world][-1], what, reduction=reduction, **RING)


@case((2,))
def contract_in_bf16(rank, world):
    """Rows that a CPU may multiply as they are, handed on in their own type."""
    for counts in COUNTS[world]:
        test_distributed.check_contract(rank, counts, torch.bfloat16, **RING)


@case((2,), dtype=torch.float64)
@case((2,), dtype=torch.float32)
def contract_over_several_tiles(rank, world, dtype):
    test_distributed.check_contract(rank, (70, 150), dtype, **RING)
    for what in pair_rank_cases.LOSSES:
        test_distributed_pairs.check_contract(rank, (70, 150), what, dtype, **RING)


@case((3,))
def sub_group(rank, world):
    """Ranks are counted in the group."""
    group = dist.new_group([0, 2])
    if rank != 1:
        for what in pair_rank_cases.LOSSES:
            test_distributed_pairs.check_contract(rank // 2, (2, 3), what, group=group, **RING)


# Functions of two operands, in what is worked on: rows of both views, or of images and texts.
WORK = {
    "nt_xent": nt_xent,
    "clip": functools.partial(clip_loss, logit_scale=3.0, normalize=True),
    "siglip": functools.partial(siglip_loss, logit_scale=3.0, logit_bias=-1.0, normalize=True),
    "supcon": lambda x, y, **options: supcon_loss(torch.cat([x, y]), torch.arange(2 * len(x)) % 5, **options),
    "uniformity": lambda x, y, **options: uniformity_loss(torch.cat([x, y]), **options),
}


class _Largest(TorchDispatchMode):
    """The most rows of any matrix as wide as the features."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor) and x.ndim == 2 and x.shape[1] >= self.width:
                self.rows = max(self.rows, x.shape[0])
        return found


@case((4,))
def memory_is_that_of_a_rank(rank, world):
    """No matrix of features or of similarities has more rows than this rank holds; by gathering, one has all."""
    n, width = 6, 64
    for what, function in WORK.items():
        most = {}
        for exchange in ("ring", "gather"):
            views = [torch.randn(n, width, requires_grad=True) for _ in range(2)]
            with _Largest(width) as largest:
                function(*views, exchange=exchange).backward()
            most[exchange] = largest.rows
        held = n if what in ("clip", "siglip") else 2 * n
        assert most == {"ring": held, "gather": world * held}, (what, most)


@case((4,))
def two_blocks_are_held(rank, world):
    """Beside this rank's own rows: what is worked on and what is on its way."""
    ranks, places = _agreed(), set()
    for block in ranks.ring_of_rows(torch.full((2, 3), rank)):
        places.add(block.rows.untyped_storage().data_ptr())
    assert len(places) == 3


@case((2, 3, 4))
def bytes_of_a_ring(rank, world):
    """Each pass over the columns hands on (W - 1) blocks of n D floats: what other ranks have, once for nt_xent's
    forward and once for its backward; for CLIP the texts in both and the images in the second. The rest is as by
    gathering."""
    n, width, sent = 3, 8, []
    original = dist.batch_isend_irecv

    def spy(operations):
        sent.append(sum(operation.tensor.nbytes for operation in operations if operation.op is dist.isend))
        return original(operations)

    for what, rows, passes in (("nt_xent", 2 * n, (1, 1)), ("clip", n, (1, 2)), ("siglip", n, (1, 2))):
        views = [torch.randn(n, width, requires_grad=True) for _ in range(2)]
        vectors = {}
        for exchange in ("gather", "ring"):
            with pytest.MonkeyPatch.context() as patch, test_distributed_pairs._bytes_sent() as seen:
                patch.setattr(dist, "batch_isend_irecv", spy)
                sent.clear()
                loss = WORK[what](*views, exchange=exchange)
                forward, found = sum(sent), [x for x in seen if x != ("all_gather", 4 * rows * width)]
                loss.backward()
                vectors[exchange] = found
            moved = (world - 1) * 4 * rows * width if exchange == "ring" else 0
            assert (forward, sum(sent)) == (passes[0] * moved, sum(passes) * moved), (what, exchange, forward, sent)
        assert vectors["ring"] == vectors["gather"], what


@case((3,))
def blocks_come_while_others_are_worked_on(rank, world):
    """The next block is on its way before a block is handed out, which is what work on it hides."""
    ranks = _agreed()
    started, original = [], dist.batch_isend_irecv
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", lambda transfers: started.append(1) or original(transfers))
        rows = torch.full((2, 3), rank)
        seen = [(block.first, len(started), block.rows.clone()) for block in ranks.ring_of_rows(rows)]
    assert [(first, count) for first, count, _ in seen] == [(2 * ((rank - k) % 3), min(k + 1, 2)) for k in range(3)]
    assert all(rows.eq((rank - k) % 3).all() for k, (_, _, rows) in enumerate(seen))


def _agreed():
    from fastcl.losses.batch import open_batch

    settings = {"grad_reduction": "mean", **RING}
    return open_batch("nt_xent", None, lambda: (torch.empty(2, 3), 1.0), settings, argument="z").ranks


@case((2, 3))
def ranks_agree_on_the_exchange(rank, world):
    exchange = "gather" if rank == world - 1 else "ring"
    for function in WORK.values():
        with pytest.raises(ValueError, match="exchange must be equal on all ranks, got "):
            function(torch.randn(3, 4), torch.randn(3, 4), exchange=exchange)


@case((2, 3))
def same_bits_every_time(rank, world):
    for function in WORK.values():
        found = []
        for _ in range(2):
            torch.manual_seed(rank)
            views = [torch.randn(5, 6, requires_grad=True) for _ in range(2)]
            loss = function(*views, **RING)
            same_everywhere(loss.detach())
            found.append([loss.detach(), *torch.autograd.grad(loss, views)])
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_ranks(name, outcomes):  # noqa: F811
    problems = outcomes(CASES[name][0])[name]
    assert not any(problems), "\n".join(f"rank {rank}:\n{problem}" for rank, problem in enumerate(problems) if problem)


# How long the group waits for a rank.
SECONDS = 5
DIES = """
import datetime, os, sys, time
import torch, torch.distributed as dist
from fastcl import nt_xent
rank, when, exchange, directory = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=3,
                        timeout=datetime.timedelta(seconds=%d))
views = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]
nt_xent(*views, exchange=exchange).backward()
dist.barrier()
if when == "forward" and rank == 1:
    os._exit(3)
try:
    loss = nt_xent(*views, exchange=exchange)
    if rank == 1:
        os._exit(3)
    loss.backward()
except RuntimeError as error:
    print(str(error).splitlines()[0], flush=True)
    os._exit(4)
""" % SECONDS


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_rank_that_dies_is_noticed(when, exchange, tmp_path):
    """The others raise within the time that their group waits, and say in which loss; no process is left."""
    start = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DIES, str(rank), when, exchange, str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        found = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [4, 3, 4], found
    for out, _ in found[::2]:
        assert out.startswith("nt_xent: ") and " over ranks failed: " in out, out
    assert time.monotonic() - start < SECONDS + 40
