"""Ranks: agreement before work, exchange of rows and of projections, and the gradient contract.

Forward returns the loss of the global batch, the same on every rank. Backward returns, for the local rows,
W * dL/dz with `grad_reduction="mean"` (what DistributedDataParallel's averaging expects) or dL/dz with "sum":
after the reduction every parameter, the temperature too, has the gradient that one process would compute.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Numbers that ranks compare in a call: rows, features, dtype, temperature (two), seed; with the settings, all of them.
FACTS, HEADER = 6, 28


def resolve_group(name: str, group) -> dist.ProcessGroup | None:
    """The process group to work over, or None for this process alone.

    None is the default group where one is initialised; "local" is this rank alone.
    """
    if isinstance(group, str) and group == "local":
        return None
    available = dist.is_available() and dist.is_initialized()
    if group is None:
        group = dist.group.WORLD if available else None
    elif available and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name}: group must be one that this rank is part of, got one that it is not")
    elif isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"{name}: group must be a one-dimensional DeviceMesh, got {group.ndim} dimensions")
        if group.get_coordinate() is None:
            raise ValueError(f"{name}: group must be one that this rank is part of, got a mesh that it is not in")
        group = group.get_group()
    elif not (available and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f'{name}: group must be None, "local", a ProcessGroup or a DeviceMesh, got {type(group).__name__}'
        )
    return None if group is None or dist.get_world_size(group) == 1 else group


class Block(NamedTuple):
    """Columns [c, D] of one rank or of all, and the gathered position of the first. None: the rows themselves."""

    rows: Tensor | None
    first: int

    def of(self, x: Tensor | None) -> Tensor | None:
        """Its part of a vector gathered from all ranks."""
        return x if x is None or self.rows is None else x[self.first : self.first + self.rows.shape[0]]


@dataclass(frozen=True)
class Ranks:
    """This rank's place among ranks that hold counts[r] rows each, in a call of the loss `name`."""

    group: dist.ProcessGroup
    counts: tuple[int, ...]
    rank: int
    grad_factor: float
    seed: int
    ring: bool
    name: str

    @property
    def first_row(self) -> int:
        """The gathered position of this rank's row 0."""
        return sum(self.counts[: self.rank])

    def shares(self, items: int) -> list[int]:
        """How many of `items` each rank takes, in rank order: as equal as can be."""
        world = len(self.counts)
        return [items // world + (rank < items % world) for rank in range(world)]

    def share(self, items: int) -> slice:
        """The items that this rank takes."""
        shares = self.shares(items)
        first = sum(shares[: self.rank])
        return slice(first, first + shares[self.rank])

    def gather_rows(self, x: Tensor) -> Tensor:
        """All ranks' rows [sum(counts), ...] in rank order; equal counts move nothing but the rows."""
        most = max(self.counts)
        padded = x.contiguous()
        if x.shape[0] != most:
            # all_gather of unequal shapes is undefined: pad to the largest rank, then cut.
            padded = x.new_zeros((most, *x.shape[1:]))
            padded[: x.shape[0]] = x
        out = x.new_empty((most * len(self.counts), *x.shape[1:]))
        with exchanging(self.name, "gathering rows"):
            _all_gather(out, padded, self.group)
        if min(self.counts) == most:
            return out
        return torch.cat([part[:count] for part, count in zip(out.split(most), self.counts, strict=True)])

    def ring_of_rows(self, x: Tensor) -> Iterator[Block]:
        """Every rank's rows, this one's first: each rank hands on what it holds, while that is worked on.

        Wire bytes: those of all rows but this rank's. Two blocks are held at a time.
        """
        world = len(self.counts)
        held, owner = x.contiguous(), self.rank
        # What comes takes the place of what was worked on before.
        places = [x.new_empty((max(self.counts), *x.shape[1:])) for _ in range(min(2, world - 1))]
        for step in range(world - 1):
            source = (owner - 1) % world
            coming = places[step % 2][: self.counts[source]]
            transfers = [
                dist.P2POp(call, rows, group=self.group, group_peer=(self.rank + toward) % world)
                for call, rows, toward in ((dist.isend, held, 1), (dist.irecv, coming, -1))
                if rows.numel()
            ]
            with exchanging(self.name, "handing on rows"):
                pending = dist.batch_isend_irecv(transfers) if transfers else []
            if owner == self.rank or held.shape[0]:
                yield Block(held, sum(self.counts[:owner]))
            with exchanging(self.name, "handing on rows"):
                for work in pending:
                    work.wait()
            held, owner = coming, source
        if held.shape[0]:
            yield Block(held, sum(self.counts[:owner]))

    def gather_number(self, x: Tensor) -> Tensor:
        """One number of every rank, [W]."""
        out = x.new_empty(len(self.counts))
        with exchanging(self.name, "gathering numbers"):
            _all_gather(out, x.reshape(1), self.group)
        return out

    def columns_to_rows(self, x: Tensor) -> Tensor:
        """From all P rows of this rank's columns [P, n] to all columns of its share of the rows [P / W, sum(counts)].

        Wire bytes: those of x, less what stays.
        """
        shares = self.shares(x.shape[0])
        mine = shares[self.rank]
        received = x.new_empty(mine * sum(self.counts))
        sizes = [mine * count for count in self.counts]
        self._all_to_all(received, x.contiguous().flatten(), sizes, [share * x.shape[1] for share in shares])
        blocks = zip(received.split(sizes), self.counts, strict=True)
        return torch.cat([block.view(mine, count) for block, count in blocks], 1)

    def rows_to_columns(self, x: Tensor, rows: int) -> Tensor:
        """The way back: from [P / W, sum(counts)] to this rank's columns of all `rows` rows [P, n]."""
        shares, n = self.shares(rows), self.counts[self.rank]
        sent = torch.cat([block.flatten() for block in x.split(self.counts, 1)])
        received = x.new_empty(rows * n)
        sizes = [x.shape[0] * count for count in self.counts]
        self._all_to_all(received, sent, [share * n for share in shares], sizes)
        return received.view(rows, n)

    def _all_to_all(self, out: Tensor, x: Tensor, out_sizes: list[int], sizes: list[int]) -> None:
        with exchanging(self.name, "exchanging projections"):
            dist.all_to_all_single(out, x, out_sizes, sizes, group=self.group)

    def logsumexp(self, x: Tensor) -> Tensor:
        """Element by element, the log of the sum of exp(x) over ranks, the same bits on every rank."""
        peak = x.detach().clone()
        with exchanging(self.name, "finding the largest number"):
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=self.group)
        shift = torch.where(peak.isfinite(), peak, 0.0)
        return self.sum((x - shift).exp()).log() + shift

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of a number, the same bits on every rank."""
        total = x.detach().clone()
        with exchanging(self.name, "adding up numbers"):
            dist.all_reduce(total, group=self.group)
        return total


def columns_of(ranks: Ranks | None, x: Tensor) -> Tensor:
    """What the columns of all ranks are made of, and the backward has to keep: all rows, gathered at once, or with
    exchange "ring" this rank's alone."""
    return x if ranks is None or ranks.ring else ranks.gather_rows(x)


def blocks(ranks: Ranks | None, columns: Tensor | None) -> Iterator[Block]:
    """The columns in blocks: all of them, or with exchange "ring" those of one rank after another, as they come."""
    if ranks is None or not ranks.ring:
        yield Block(columns, 0)
    else:
        yield from ranks.ring_of_rows(columns)


def _all_gather(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
    # The name of before torch 2.13 warns there.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, x, group=group)


@contextmanager
def exchanging(name: str, what: str):
    """Says in which loss ranks waited for one that did not come."""
    if torch.compiler.is_compiling():
        # Every rank compiles a graph of its own, in which collectives could come in another order than on others.
        torch._dynamo.graph_break()
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{name}: {what} over ranks failed: {error}") from error


class GlobalSum(torch.autograd.Function):
    """The sum over all ranks of a number, under the gradient contract."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.factor = ranks.grad_factor
        return ranks.sum(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.factor, None


def agree(
    name: str,
    group: dist.ProcessGroup,
    check: Callable[[], tuple[Tensor, object]],
    settings: dict[str, object],
    views: int,
    seed: Callable[[], int],
    argument: str,
    number_name: str,
) -> Ranks:
    """Run `check` on every rank and exchange its outcome, so that all ranks raise together or none does.

    `check` validates this rank's arguments and returns (rows of one view, temperature or the number so named);
    `settings` are those that all ranks must pass alike; the seed of rank 0 becomes that of all. A rank that raised
    alone, or took another path, would leave the others waiting in a collective until it times out.

    The facts travel between CPUs where the group has a backend for that, as "cpu:gloo,cuda:nccl" has: no host then
    waits for its device. On a group of NCCL alone it does.
    """
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    error: Exception | None = None
    facts = [0] * FACTS
    try:
        x, number = check()
        if x.device.type not in backends:
            served = " and ".join(f"{device} ({backend})" for device, backend in backends.items())
            raise ValueError(f"{name}: {argument} must be where the group works, {served}, got {x.device}")
        facts = [views * x.shape[0], x.shape[1], DTYPES.index(x.dtype), *_number_facts(number), seed()]
    except Exception as caught:  # whatever it is, the others wait for this rank's facts
        error = caught
    if "cpu" not in backends and not torch.cuda.is_available():
        raise error or ValueError(f"{name}: group must have a backend for the CPU without a GPU, got {backends}")
    device = torch.device("cpu") if "cpu" in backends else torch.device("cuda", torch.cuda.current_device())
    hashes = [zlib.crc32(repr(_as_float(value)).encode()) for value in settings.values()]
    # Of one length, whatever the loss: ranks that call different ones shall find that out.
    sent = [error is not None, zlib.crc32(name.encode()), *facts, *hashes]
    mine = torch.tensor(sent + [0] * (HEADER - len(sent)), dtype=torch.int64, device=device)
    every = mine.new_empty(dist.get_world_size(group) * HEADER)
    with exchanging(name, "comparing arguments"):
        _all_gather(every, mine, group)
        rows = every.view(-1, HEADER).tolist()
    _raise_together(name, group, error, [rank for rank, row in enumerate(rows) if row[0]])
    others = [rank for rank, row in enumerate(rows) if row[1] != sent[1]]
    if others:
        raise ValueError(f"{name}: the loss must be the same on all ranks, got another one on rank {others[0]}")
    rows = [row[2:] for row in rows]
    for places, what, show in (
        (slice(1, 2), "feature dimension D", lambda facts: facts[0]),
        (slice(2, 3), "dtype", lambda facts: str(DTYPES[facts[0]])),
        (slice(3, 5), number_name, _show_number),
    ):
        values = [row[places] for row in rows]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name}: {what} must be equal on all ranks, got {[show(value) for value in values]}")
    for index, (what, value) in enumerate(settings.items(), FACTS):
        other = [rank for rank, row in enumerate(rows) if row[index] != hashes[index - FACTS]]
        if other:
            raise ValueError(f"{name}: {what} must be equal on all ranks, got {value!r} but not on rank {other[0]}")
    counts = tuple(row[0] for row in rows)
    factor = float(len(counts)) if settings["grad_reduction"] == "mean" else 1.0
    ring = settings.get("exchange") == "ring"
    return Ranks(group, counts, dist.get_rank(group), factor, rows[0][FACTS - 1], ring, name)


def _raise_together(name: str, group: dist.ProcessGroup, error: Exception | None, failed: list[int]) -> None:
    """Where a rank failed, its own error there and what it says on all others."""
    if not failed:
        return
    said: list[str] = [""] * dist.get_world_size(group)
    with exchanging(name, "telling of an error"):
        dist.all_gather_object(said, "" if error is None else str(error), group=group)
    if error is not None:
        raise error
    where = f"an error on rank {failed[0]}: {said[failed[0]]}"
    raise ValueError(f"{name}: arguments must be valid on every rank, got {where}")


def _number_facts(number: object) -> list[int]:
    """(what it is, its bits): a number, a tensor on the CPU, or one whose value nobody waits for."""
    if not isinstance(number, Tensor):
        return [0, struct.unpack("q", struct.pack("d", number))[0]]
    if number.device.type != "cpu":
        return [2, 0]
    return [1, struct.unpack("q", struct.pack("d", number.item()))[0]]


def _show_number(facts: list[int]) -> str:
    kind, bits = facts
    value = struct.unpack("d", struct.pack("q", bits))[0]
    return (str(value), f"a tensor of {value}", "a tensor on a device")[kind]


def _as_float(value: object) -> object:
    """1 and 1.0 are the same setting."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53
    return float(value) if is_number else value
