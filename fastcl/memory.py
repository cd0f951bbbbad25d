"""Negatives that outlive a batch: a queue of keys, a memory bank of instances, and the choice of hard ones.

    queue  = Queue(65_536, 128)
    loss   = info_nce(query, keys, queue.rows, temperature=0.2)
    queue.enqueue(keys)

Sources: MoCo (He et al., 2020) for the queue, Wu et al., 2018, for the bank, P2, "Towards Good Practices in
Self-supervised Representation Learning", section 5, for hard negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import ops
from .losses import checks, draws
from .losses.batch import Batch, open_batch
from .losses.instance_discrimination import instance_discrimination_loss, with_normaliser
from .ops.chunked import row_chunks
from .ops.rows import product_rows
from .sort import segmented_sort


def _open(
    name: str, group, argument: str, x: Tensor, rows: Tensor, check: Callable[[], None] = lambda: None, **own: object
) -> Batch:
    """Check that x [N, D] fits the rows of a memory, here or on all ranks together."""

    def check_all():
        checks.rows(name, argument, x)
        if x.shape[1] != rows.shape[1]:
            raise ValueError(f"{name}: {argument} must have {rows.shape[1]} features, got shape {list(x.shape)}")
        if x.device != rows.device:
            raise ValueError(f"{name}: {argument} must be on {rows.device}, got {x.device}")
        check()
        return x, 1.0

    settings = {"grad_reduction": "mean", "size": len(rows), **own}
    return open_batch(name, group, check_all, settings, argument=argument, least=0)


def _gathered(batch: Batch, x: Tensor) -> Tensor:
    return x if batch.ranks is None else batch.ranks.gather_rows(x)


class Queue(nn.Module):
    """A circular queue of the last `size` keys, normalised, without gradient: the negatives of MoCo.

    It starts with random unit rows. Over ranks every rank holds the same rows: start from the same state (a seed, or
    DistributedDataParallel's broadcast of buffers), and let all ranks enqueue together. `rows` is replaced, never
    changed in place: a loss that was calculated from it can still be differentiated after `enqueue`.

    Args:
        size: how many keys it holds, K.
        dim: their features, D.
        group: as in `nt_xent`: over ranks the keys of all of them are enqueued, in rank order.
        generator: where the first rows come from.

    Attributes:
        rows: [K, D] float32. `position`: [] int64, where the next key goes.

    Example:
        >>> import torch
        >>> from fastcl import Queue, info_nce
        >>> queue = Queue(100, 16)
        >>> query, keys = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        >>> loss = info_nce(query, keys, queue.rows, temperature=0.2)
        >>> queue.enqueue(keys)
        >>> loss.backward()
    """

    def __init__(self, size: int, dim: int, *, group=None, generator: torch.Generator | None = None):
        super().__init__()
        checks.count("Queue", "size", size)
        checks.count("Queue", "dim", dim)
        checks.random_generator("Queue", generator, torch.device("cpu"))
        self.group = group
        self.register_buffer("rows", draws.prior_samples("hypersphere", size, dim, torch.empty(0), generator))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put keys [N, D] of any floating dtype, normalised, in the place of the oldest ones."""
        name = "Queue.enqueue"
        batch, size = _open(name, self.group, "keys", keys, self.rows), self.rows.shape[0]
        if batch.total > size:
            raise ValueError(f"{name}: keys must fit a queue of {size}, got {batch.total} over all ranks")
        keys = _gathered(batch, ops.unit_rows(keys, None)[0].to(self.rows.dtype))
        places = (self.position + torch.arange(len(keys), device=keys.device)) % size
        self.rows = self.rows.index_copy(0, places, keys)
        self.position = (self.position + len(keys)) % size

    def extra_repr(self) -> str:
        return f"size={self.rows.shape[0]}, dim={self.rows.shape[1]}"


class MemoryBank(nn.Module):
    """A normalised row for each instance of a data set, without gradient: the weights of instance discrimination.

    `update` moves a row towards the present feature, row <- unit(momentum * row + (1 - momentum) * feature). Like
    those of a `Queue`, `rows` are replaced and never changed in place, and are the same on all ranks.

    Args:
        size: instances, n.
        dim: features, D.
        momentum: share of the old row, from 0 to less than 1 (0.5 in the source).
        group, generator: as in `Queue`.

    Example:
        >>> import torch
        >>> from fastcl import MemoryBank, instance_discrimination_loss
        >>> bank = MemoryBank(100, 16)
        >>> query, indices = torch.randn(8, 16, requires_grad=True), torch.arange(8)
        >>> loss = instance_discrimination_loss(query, indices, bank.rows)
        >>> bank.update(indices, query)
        >>> loss.backward()
    """

    def __init__(
        self, size: int, dim: int, *, momentum: float = 0.5, group=None, generator: torch.Generator | None = None
    ):
        super().__init__()
        checks.count("MemoryBank", "size", size)
        checks.count("MemoryBank", "dim", dim)
        checks.number("MemoryBank", "momentum", momentum, zero=True)
        if momentum >= 1:
            raise ValueError(f"MemoryBank: momentum must be less than 1, got {momentum}")
        checks.random_generator("MemoryBank", generator, torch.device("cpu"))
        self.momentum, self.group = momentum, group
        self.register_buffer("rows", draws.prior_samples("hypersphere", size, dim, torch.empty(0), generator))

    @torch.no_grad()
    def update(self, indices: Tensor, features: Tensor) -> None:
        """Move rows indices [N] towards features [N, D]. Of an instance that comes twice the last feature counts; one
        that is not finite leaves its row as it is."""
        name = "MemoryBank.update"
        size = self.rows.shape[0]

        def check():
            checks.integers(name, "indices", indices, [features.shape[0]], features.device)
            checks.indices(name, "indices", indices, size)

        batch = _open(name, self.group, "features", features, self.rows, check, momentum=self.momentum)
        found = _gathered(batch, ops.unit_rows(features, None)[0].to(self.rows.dtype))
        where = _gathered(batch, indices.long())
        # Writes of the same row would come in any order: all of them write what the last one does.
        order = torch.arange(len(where), device=where.device)
        last = where.new_zeros(size).scatter_reduce(0, where, order, "amax")[where]
        old = self.rows[where]
        mixed = ops.unit_rows(self.momentum * old + (1 - self.momentum) * found[last], None)[0].to(old.dtype)
        self.rows = self.rows.index_copy(0, where, torch.where(mixed.isfinite().all(1, keepdim=True), mixed, old))

    def extra_repr(self) -> str:
        return f"size={self.rows.shape[0]}, dim={self.rows.shape[1]}, momentum={self.momentum}"


class InstanceDiscrimination(nn.Module):
    """`instance_discrimination_loss` with its memory bank, which it updates after every call in training mode.

    Args:
        size, dim, momentum: of the `MemoryBank`.
        temperature, num_negatives: as in the function. The estimate's normaliser Z is that of the first call (Wu et
            al.).
        generator: where the noise comes from, on the device of the queries.
        settings: the other keyword arguments of the function.

    Example:
        >>> import torch
        >>> from fastcl import InstanceDiscrimination
        >>> criterion = InstanceDiscrimination(100, 16, num_negatives=32)
        >>> criterion(torch.randn(8, 16, requires_grad=True), torch.arange(8)).backward()
    """

    def __init__(
        self,
        size: int,
        dim: int,
        temperature: float = 0.07,
        *,
        momentum: float = 0.5,
        num_negatives: int | None = None,
        group=None,
        generator: torch.Generator | None = None,
        **settings,
    ):
        super().__init__()
        name = "InstanceDiscrimination"
        self.temperature = checks.constant(name, "temperature", temperature)
        if num_negatives is not None:
            checks.count(name, "num_negatives", num_negatives)
        allowed = ("normalize", "reduction", "grad_reduction", "exchange")
        for key in settings.keys() - set(allowed):
            raise TypeError(f"{name}: keyword must be one of {', '.join(sorted(allowed))}, got {key!r}")
        defaults = instance_discrimination_loss.__kwdefaults__
        self.settings = {key: settings.get(key, defaults[key]) for key in allowed}
        checks.options(name, **self.settings)
        self.num_negatives, self.group, self.generator = num_negatives, group, generator
        self.bank = MemoryBank(size, dim, momentum=momentum, group=group)
        # NaN until the first call in training mode, which is known here without reading it.
        self.register_buffer("log_z", torch.full((), math.nan, dtype=torch.float64))
        self._estimated = False
        self.register_load_state_dict_post_hook(_look_again)

    def forward(self, query: Tensor, indices: Tensor) -> Tensor:
        loss, log_z = with_normaliser(
            query, indices, self.bank.rows, self.temperature, self.num_negatives,
            self.log_z if self._estimated else None, self.generator, self.group, self.settings, self.training,
        )  # fmt: skip
        if self.training:
            if log_z is not None and not self._estimated:
                self.log_z, self._estimated = log_z.to(self.log_z), True
            self.bank.update(indices, query)
        return loss

    def extra_repr(self) -> str:
        shown = {"temperature": self.temperature, "num_negatives": self.num_negatives, **self.settings}
        defaults = instance_discrimination_loss.__kwdefaults__ | {"temperature": None}
        return ", ".join(f"{key}={value!r}" for key, value in shown.items() if value != defaults[key])


def _look_again(module: InstanceDiscrimination, _) -> None:
    # The state may be one from before the first call.
    module._estimated = not module.log_z.isnan().item()


@torch.no_grad()
def sample_hard_negatives(
    query: Tensor,
    queue: Tensor,
    num_samples: int | None = None,
    *,
    width: float = 0.3,
    generator: torch.Generator | None = None,
    normalize: bool = True,
) -> Tensor:
    """For each query, negatives drawn from a queue, the more often the nearer they are.

    The queue is sorted by similarity to the query, descending, and the negatives are those of the ranks
    floor(K min(width |x|, 1 - eps)), with repetition (P2 section 5, which publishes no parameters). P2 draws x from a
    skew-normal distribution; its absolute value is that of a normal one whatever the skewness, which therefore is no
    argument. Queries are worked on in chunks: the rows themselves are never copied.

    Args:
        query: [N, D]. NaN sorts first: a query with NaN gets some rows of the queue.
        queue: [K, D], such as `Queue.rows`, of any floating dtype.
        num_samples: how many for each query, default K.
        width: of the distribution of ranks, as a share of the queue; a smaller one takes harder negatives.
        generator: where the ranks come from, on the device of query.
        normalize: compare by the angle, as the losses do. False: by the product.

    Returns:
        int32 [N, num_samples], rows of the queue: the `negative_indices` of `info_nce`.

    Raises:
        TypeError, ValueError: as in `info_nce`.

    Example:
        >>> import torch
        >>> from fastcl import Queue, info_nce, sample_hard_negatives
        >>> queue, query, keys = Queue(100, 16), torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        >>> chosen = sample_hard_negatives(query, queue.rows, 50)
        >>> info_nce(query, keys, queue.rows, temperature=0.2, negative_indices=chosen).backward()
    """
    name = "sample_hard_negatives"
    checks.rows(name, "query", query)
    checks.matrix_like(name, "queue", queue, query)
    checks.sortable(name, "queue", queue.shape[0])
    if num_samples is not None:
        checks.count(name, "num_samples", num_samples)
    checks.number(name, "width", width)
    checks.random_generator(name, generator, query.device)
    checks.flag(name, "normalize", normalize)
    (q, dtype), (rows, _) = (product_rows(name, x.detach(), normalize) for x in (query, queue))
    q, rows = q.to(dtype), rows.to(dtype)
    n, k = len(q), len(rows)
    chosen = torch.empty((n, num_samples or k), dtype=torch.int32, device=query.device)
    for start, stop in row_chunks(n, max(k, chosen.shape[1])):
        with torch.autocast(query.device.type, enabled=False):
            order = segmented_sort(q[start:stop] @ rows.T, descending=True)[1]
        x = torch.empty((stop - start, chosen.shape[1]), device=query.device).normal_(generator=generator)
        # Of an infinite product no integer could be made.
        rank = (k * (width * x.abs()).clamp(max=1)).long().clamp(max=k - 1)
        chosen[start:stop] = order.gather(1, rank)
    return chosen
