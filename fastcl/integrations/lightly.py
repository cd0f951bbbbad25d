"""`lightly.loss.NTXentLoss`, without its similarity matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..losses import checks
from ..losses.batch import open_batch
from ..losses.info_nce import info_nce
from ..losses.nt_xent import nt_xent
from ..memory import Queue


class _Bank(Queue):
    """A queue that is filled as lightly fills its memory bank: keys beyond the last place are dropped, and the next go
    to the first. Not part of a state dict."""

    def __init__(self, size: int, dim: int, group):
        super().__init__(size, dim, group="local")
        self.sources = group
        for buffer in ("rows", "position"):
            self.register_buffer(buffer, getattr(self, buffer), persistent=False)

    def enqueue(self, keys: Tensor) -> None:
        keys = keys.detach()
        batch = open_batch(
            "NTXentLoss", self.sources, lambda: (keys, 1.0), {"grad_reduction": "mean"}, argument="out1", least=0
        )
        if batch.ranks is not None:
            keys = batch.ranks.gather_rows(keys)
        super().enqueue(keys[: len(self.rows) - int(self.position)])


class NTXentLoss(nn.Module):
    """`lightly.loss.NTXentLoss`: NT-Xent of two views, or InfoNCE against a memory bank.

    Migration: `from fastcl.integrations.lightly import NTXentLoss` in place of `from lightly.loss import NTXentLoss`.

    The same: arguments, value and gradient. Without a bank it is `nt_xent`. With one it is `info_nce` of out0 against
    the bank's rows alone, no in-batch negatives; the rows of before the call count, and after it those of out1 take
    the place of the oldest, if out0 requires grad. Rows that do not fit before the end of the bank are dropped.

    On purpose different: memory is that of the embeddings, and results of half precision are float32. With
    gather_distributed=True every rank returns the loss of the global batch, not of its own rows, and ranks may hold
    different numbers of them; gradients are, as in lightly, those of the global batch after DistributedDataParallel's
    averaging. The bank is `memory_bank.rows`; over ranks start it from the same seed. A temperature must be positive.

    Args:
        temperature: positive number.
        memory_bank_size: 0 for none, or (rows, features).
        gather_distributed: over all ranks of the default process group; otherwise this process alone.

    Example:
        >>> import torch
        >>> from fastcl.integrations.lightly import NTXentLoss
        >>> criterion = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 16))
        >>> out0, out1 = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        >>> loss = criterion(out0, out1)
        >>> loss.backward()
    """

    def __init__(
        self, temperature: float = 0.5, memory_bank_size: int | Sequence[int] = 0, gather_distributed: bool = False
    ):
        super().__init__()
        name = "NTXentLoss"
        self.temperature = checks.constant(name, "temperature", temperature)
        checks.flag(name, "gather_distributed", gather_distributed)
        self.gather_distributed = gather_distributed
        self.group = None if gather_distributed else "local"
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if len(size) not in (1, 2) or (len(size) == 1 and size[0] != 0):
            raise ValueError(f"{name}: memory_bank_size must be 0 or (rows, features), got {memory_bank_size}")
        self.memory_bank = None if size[0] == 0 else _Bank(*size, self.group)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        if self.memory_bank is None:
            return nt_xent(out0, out1, self.temperature, group=self.group)
        loss = info_nce(out0, out1, self.memory_bank.rows, self.temperature, group=self.group)
        if out0.requires_grad and torch.is_grad_enabled():
            self.memory_bank.enqueue(out1)
        return loss
