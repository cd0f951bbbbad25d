"""What every loss does around its mathematics: which rows there are, over which ranks, and the reduction."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import distributed
from ..ops import ANY_ROWS, UNIT_ROWS
from ..ops.chunked import compute_dtype


class Batch(NamedTuple):
    """The global batch: `total` rows over `ranks`, or in this process where that is None."""

    ranks: distributed.Ranks | None
    total: int


def open_batch(
    name: str,
    group,
    check: Callable[[], tuple[Tensor, object]],
    settings: dict[str, object],
    *,
    argument: str,
    views: int = 1,
    least: int = 1,
    seed: Callable[[], int] = lambda: 0,
    number: str = "temperature",
) -> Batch:
    """Check the arguments, here or on all ranks together, and count the rows: `views` for each row of the tensor.

    `check` raises or returns (tensor of rows, temperature or the `number` in its place); `settings` are what all ranks
    must pass alike; `seed` draws the number of which the first rank's is that of all; `argument` and `least` are for
    the message about too few rows.
    """
    process_group = distributed.resolve_group(name, group)
    if process_group is None:
        x, _ = check()
        ranks, total, where = None, views * x.shape[0], ""
    else:
        ranks = distributed.agree(name, process_group, check, settings, views, seed, argument, number)
        total, where = sum(ranks.counts), " over all ranks"
    if total < least:
        rows = "one row" if least == 1 else f"{least} rows"
        raise ValueError(f"{name}: {argument} must have at least {rows}{where}, got {total}")
    return Batch(ranks, total)


def shape_of(x: object) -> object:
    """Of a tensor that all ranks hold: what they can compare without looking at its data."""
    return list(x.shape) if isinstance(x, Tensor) and not x.is_nested else x


def needs_grad(*tensors: object) -> list[object]:
    """Which of them get a gradient: a rank whose backward does not come would leave the others waiting in theirs."""
    return [torch.is_grad_enabled() and getattr(x, "requires_grad", False) for x in tensors]


def setting_of(number: object) -> object:
    """What ranks compare of a number: its value, where that is known without waiting for a device."""
    if not isinstance(number, Tensor):
        return number
    known = number.device.type == "cpu" and number.numel() == 1 and not torch.compiler.is_compiling()
    return f"a tensor of {number.item()}" if known else "a tensor"


def beside(number: float | Tensor, x: Tensor) -> Tensor:
    """A number or one-element tensor as a tensor [] beside x, in the dtype that losses calculate in."""
    dtype = compute_dtype(x.dtype)
    if not isinstance(number, Tensor):
        return torch.full((), number, dtype=dtype, device=x.device)
    return number.reshape(()).to(x.device, dtype)


def scale_of(temperature: float | Tensor, x: Tensor) -> Tensor:
    """1 / temperature beside x."""
    if not isinstance(temperature, Tensor):
        return beside(1 / temperature, x)
    return checked_scale(beside(temperature, x).reciprocal())


def checked_scale(scale: Tensor) -> Tensor:
    # Where the value could not be checked without waiting for the device, a bad one gives NaN: 0 times its logarithm.
    return torch.add(scale, scale.detach().log(), alpha=0)


def product_bound(temperature: float | Tensor, normalize: bool) -> float:
    """A bound on |<z_i, z_j>| / temperature, or what the host knows in its place."""
    return scale_bound(1 / temperature if not isinstance(temperature, Tensor) else temperature, normalize)


def scale_bound(logit_scale: float | Tensor, normalize: bool) -> float:
    """The same of logits multiplied by logit_scale."""
    if not normalize:
        return ANY_ROWS
    return UNIT_ROWS if isinstance(logit_scale, Tensor) else float(logit_scale)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact at both ends (torch's cuts off at 20, which float64 can see).

    Of x = log-sum-exp of the negatives - positive it is the cross entropy of the positive against all of them: no
    difference of two nearly equal numbers, and 0 with zero gradient where there is no negative.
    """
    return torch.logaddexp(x, torch.zeros_like(x))


def reduce_rows(rows: Tensor, reduction: str, batch: Batch) -> Tensor:
    """This rank's loss rows as they are, or their sum or mean over the global batch."""
    if reduction == "none":
        return rows
    total = rows.sum()
    if batch.ranks is not None:
        total = distributed.GlobalSum.apply(total, batch.ranks)
    return total / batch.total if reduction == "mean" else total
