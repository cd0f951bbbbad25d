"""What the rows find in one block of columns after another, put together."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def join_lse(parts: Iterable[list[Tensor]]) -> list[Tensor]:
    """Log-sum-exp of all columns from that of each block; with it sums and numbers of columns, added up."""
    total: list[Tensor] = []
    for lse, *sums in parts:
        if not total:
            total = [lse, *sums]
        else:
            total = [torch.logaddexp(total[0], lse), *(x + y for x, y in zip(total[1:], sums, strict=True))]
    return total


def add_up(parts: Iterable[tuple[Tensor, ...] | list[Tensor]]) -> list[Tensor]:
    """The sums over all blocks, in the memory of those of the first."""
    total: list[Tensor] = []
    for part in parts:
        total = [x.add_(y) for x, y in zip(total, part, strict=True)] if total else list(part)
    return total
