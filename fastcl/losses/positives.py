"""What the losses of many positives a row share: all rows of its label, or all other views of its image."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.rows import RowLogSumExp, product_rows
from .batch import Batch, product_bound, reduce_rows, scale_of, softplus


def positives_loss(
    name: str, x: Tensor, ids: Tensor, temperature: float | Tensor, form: str, shared: dict, batch: Batch
) -> Tensor:
    """Of rows that share their id with another row: the log-sum-exp over all other rows less the mean of the positives
    ("out") or the logarithm of the mean of their exponentials ("in")."""
    z, dtype = product_rows(name, x, shared["normalize"])
    scale, bound = scale_of(temperature, x), product_bound(temperature, shared["normalize"])

    def lse(same: str):
        return RowLogSumExp.apply(z, scale, ids, same, dtype, bound, False, False, batch.ranks, name)

    if form == "in":
        counts = _counts(ids, batch)
        # Of close positives both log-sum-exps over all and over them are nearly equal, their gradients too. Where there
        # is no positive, the branch not taken is infinite and its gradient must not be.
        has = counts > 0
        rows = softplus(torch.where(has, lse("drop") - lse("only"), -torch.inf))
        rows = rows + counts.clamp(min=1).double().log()
    else:
        everything, sums, counts = lse("sum")
        has = counts > 0
        rows = torch.where(has, everything, 0.0) - scale.double() * sums / counts.clamp(min=1)
    if shared["reduction"] != "mean":
        return reduce_rows(rows, shared["reduction"], batch).to(scale.dtype)
    anchors = has.sum().double()
    if batch.ranks is not None:
        anchors = batch.ranks.sum(anchors)
    return (reduce_rows(rows, "sum", batch) / anchors.clamp(min=1)).to(scale.dtype)


def _counts(ids: Tensor, batch: Batch) -> Tensor:
    """How many other rows have the id of each."""
    ordered = (ids if batch.ranks is None else batch.ranks.gather_rows(ids)).sort().values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids) - 1
