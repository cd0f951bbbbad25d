"""InfoNCE: which of many keys belongs to a query.

With queries q_i, their keys k_i, s = 1 / temperature and negatives n, other keys of the batch, a queue's rows or both:

    L = mean_i -log e^(s <q_i, k_i>) / (e^(s <q_i, k_i>) + sum_n e^(s <q_i, n>))

Source: P2, "Towards Good Practices in Self-supervised Representation Learning", Eq. 1; van den Oord et al., 2018;
MoCo (He et al., 2020) with a queue. A composition: the log-sum-exp of the negatives less the positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.pairs import PairLogSumExp
from ..ops.rows import product_rows
from ..ops.sampled import SampledLogSumExp
from . import checks
from .batch import needs_grad, open_batch, product_bound, reduce_rows, scale_of, shape_of, softplus
from .module import TemperatureLoss


def info_nce(
    query: Tensor, keys: Tensor, negatives: Tensor | None = None, temperature: float | Tensor = 0.07, *,
    in_batch: bool | None = None,
    ids: Tensor | None = None,
    log_q: Tensor | None = None,
    negative_indices: Tensor | None = None,
    normalize: bool = True, reduction: str = "mean", group=None,
    grad_reduction: str = "mean", exchange: str = "gather",
) -> Tensor:  # fmt: skip
    """InfoNCE loss of queries and their keys, exact, without the matrix of similarities.

    L = mean_i softplus( log sum_n exp(<q_i, n> / temperature) - <q_i, k_i> / temperature ), n over the negatives of
    row i (P2 Eq. 1). Memory is O((N + K) D). Results repeat to the bit.

    Args:
        query, keys: [N, D], row i of both belong together. float16, bfloat16, float32 or float64; any strides.
        negatives: [K, D], of every query, such as `Queue.rows`; over ranks the same on all. They may require grad.
        temperature: positive number, or one-element floating tensor (which may require grad).
        in_batch: whether the keys of the other rows, on all ranks, are negatives. Default: where no negatives are
            given.
        ids: integers [N]: rows of the same id are not each other's negatives (duplicates in the batch).
        log_q: [N], the logarithm of how often each key is drawn into a batch, taken off its logits: off the positive of
            its row, and off the negative that it is for others (Yi et al., 2019). A constant.
        negative_indices: integers [N, m], the negatives of each query with repetition, from `sample_hard_negatives`.
        normalize, reduction, group, grad_reduction, exchange: as in `nt_xent`, one row for each query.

    Returns:
        The loss, float32 (float64 for float64 input): a scalar, or [n] for reduction "none". A query without negatives
        has loss and gradient 0. NaN in the data gives a NaN loss.

    Raises:
        TypeError, ValueError: as in `nt_xent`. RuntimeError: on differentiating twice.

    Example:
        >>> import torch
        >>> from fastcl import info_nce
        >>> query, keys, queue = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16), torch.randn(100, 16)
        >>> info_nce(query, keys, queue, temperature=0.2).backward()
    """
    name = "info_nce"
    shared = {"normalize": normalize, "reduction": reduction, "grad_reduction": grad_reduction, "exchange": exchange}
    per_row = {"ids": ids, "log_q": log_q, "negative_indices": negative_indices}
    own = {"in_batch": in_batch, "negatives": shape_of(negatives)}
    own["requires_grad"] = needs_grad(query, keys, temperature)
    within = in_batch or (in_batch is None and negatives is None)
    own |= {key: None if value is None else "one" for key, value in per_row.items()}

    def check():
        checks.options(name, **shared, in_batch=in_batch)
        checks.pair(name, query, keys, ("query", "keys"))
        checks.positive(name, "temperature", temperature, query.device)
        checks.negatives(name, query, negatives, in_batch, negative_indices)
        if ids is not None:
            checks.integers(name, "ids", ids, [query.shape[0]], query.device)
        if log_q is not None:
            checks.floating(name, "log_q", log_q)
            checks.same_length(name, "log_q", log_q, query)
        if not within and (given := [key for key in ("ids", "log_q") if per_row[key] is not None]):
            raise ValueError(f"{name}: {given[0]} must be None where no keys of the batch are negatives, got a tensor")
        return query, temperature

    batch = open_batch(name, group, check, shared | own, argument="query")
    (q, dtype), (k, _) = (product_rows(name, x, normalize) for x in (query, keys))
    scale, bound = scale_of(temperature, query), product_bound(temperature, normalize)
    positive = scale.double() * (q * k).sum(1).double()
    bias = None if log_q is None else -log_q.detach().to(scale)
    lse = []
    if within:
        ids = None if ids is None else ids.long().contiguous()
        lse.append(PairLogSumExp.apply(q, k, scale, ids, None, bias, False, True, dtype, bound, batch.ranks, name))
        positive = positive if bias is None else positive + bias
    if negatives is not None:
        # A queue is float32 also where queries are float64: in theirs, it is normalised to all of its digits.
        rows, _ = product_rows(name, negatives.to(torch.promote_types(query.dtype, negatives.dtype)), normalize)
        if negative_indices is None:
            lse.append(PairLogSumExp.apply(q, rows, scale, None, None, None, False, False, dtype, bound, None, name))
        else:
            lse.append(SampledLogSumExp.apply(q, scale, rows, negative_indices, dtype, name))
    total = lse[0] if len(lse) == 1 else torch.logaddexp(*lse)
    return reduce_rows(softplus(total - positive), reduction, batch).to(scale.dtype)


class InfoNCELoss(TemperatureLoss, function=info_nce, per_call=("ids", "log_q", "negative_indices")):
    """`info_nce` as a module (`NTXentLoss`: learnable_temperature); ids, log_q, negative_indices go into the call.

    Example:
        >>> import torch
        >>> from fastcl import InfoNCELoss
        >>> criterion = InfoNCELoss(temperature=0.2)
        >>> loss = criterion(torch.randn(8, 16), torch.randn(8, 16), torch.randn(100, 16))
        >>> criterion
        InfoNCELoss(temperature=0.2)
    """
