"""Instance discrimination: every picture is a class of its own, its row of a memory bank the class's weight.

With a query v of instance i, bank rows f, s = 1 / temperature and n instances:

    full:  L = log sum_j exp(s <v, f_j>) - s <v, f_i>
    NCE:   L = softplus(-x_i) + sum_{m noise rows} softplus(x_j),      x_j = s <v, f_j> - log Z + log(n / m)

Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018; P2, "Towards Good
Practices in Self-supervised Representation Learning", Fig. 4 (temperature 0.07, 4,096 noise rows). A composition: the
log-sum-exp of the other instances less the positive, or a sum of softplus over the noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import ANY_ROWS
from ..ops.pairs import PairLogSumExp
from ..ops.rows import product_rows
from . import checks, draws
from .batch import beside, open_batch, reduce_rows, scale_of, setting_of, shape_of, softplus
from .noise import log_normaliser, noise_rows


def instance_discrimination_loss(
    query: Tensor, indices: Tensor, bank: Tensor, temperature: float | Tensor = 0.07, *,
    num_negatives: int | None = None,
    log_z: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    normalize: bool = True, reduction: str = "mean", group=None,
    grad_reduction: str = "mean", exchange: str = "gather",
) -> Tensor:  # fmt: skip
    """Instance discrimination against a memory bank, exact, without the N x n matrix of similarities.

    L = mean_i log sum_j exp(<v_i, f_j> / temperature) - <v_i, f_i> / temperature over all n rows f of the bank, or its
    noise-contrastive estimate (Wu et al., 2018). Memory is O(N D), beside the bank. Results repeat to the bit.

    Args:
        query: [N, D]. float16, bfloat16, float32 or float64; any strides.
        indices: integers [N], the instance of each query: its row of the bank. Those of a CUDA tensor are not checked.
        bank: [n, D], taken as it is and without gradient; `MemoryBank.rows`. Over ranks the same on every rank.
        temperature: as in `nt_xent`.
        num_negatives: how many noise rows to draw, uniformly with repetition and the same for all queries; default: the
            full softmax over the bank.
        log_z: the logarithm of the estimate's normaliser Z, a constant; default: from this call's noise.
            `InstanceDiscrimination` keeps that of its first call, as the source does.
        generator: where the noise comes from, on the device of query; over ranks that of the first rank decides.
        normalize: divide the queries by max(length, 1e-12) first.
        reduction, group, grad_reduction, exchange: as in `nt_xent`, one row for each query.

    Returns:
        The loss, float32 (float64 for float64 input): a scalar, or [n] for reduction "none"; NaN for NaN in the data.

    Raises:
        TypeError, ValueError: as in `nt_xent`. RuntimeError: on differentiating twice.

    Example:
        >>> import torch
        >>> from fastcl import instance_discrimination_loss
        >>> query, bank = torch.randn(8, 16, requires_grad=True), torch.nn.functional.normalize(torch.randn(100, 16))
        >>> instance_discrimination_loss(query, torch.arange(8), bank).backward()
    """
    shared = {"normalize": normalize, "reduction": reduction, "grad_reduction": grad_reduction, "exchange": exchange}
    return with_normaliser(query, indices, bank, temperature, num_negatives, log_z, generator, group, shared)[0]


def with_normaliser(
    query: Tensor, indices: Tensor, bank: Tensor, temperature: float | Tensor, num_negatives: int | None,
    log_z: float | Tensor | None, generator: torch.Generator | None, group, shared: dict, training: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The loss and, of the estimate, the log Z in use. `training`: whether the bank is updated afterwards."""
    name = "instance_discrimination_loss"

    def check():
        checks.options(name, **shared)
        checks.rows(name, "query", query)
        checks.matrix_like(name, "bank", bank, query)
        checks.integers(name, "indices", indices, [query.shape[0]], query.device)
        checks.indices(name, "indices", indices, bank.shape[0])
        checks.positive(name, "temperature", temperature, query.device)
        if num_negatives is not None:
            checks.count(name, "num_negatives", num_negatives)
        if log_z is not None:
            checks.scalar(name, "log_z", log_z, query.device)
        checks.random_generator(name, generator, query.device)
        return query, temperature

    own = {"num_negatives": num_negatives, "bank": shape_of(bank)}
    own |= {"log_z": setting_of(log_z), "training": training}

    def seed():
        return 0 if num_negatives is None else draws.seed(generator)

    batch = open_batch(name, group, check, shared | own, argument="query", seed=seed)
    rows = product_rows(name, query, shared["normalize"])
    scale, indices, bank = scale_of(temperature, query), indices.long(), bank.detach()
    positive = scale.double() * (rows[0] * bank[indices].to(rows[1]).to(rows[0])).sum(1).double()
    if num_negatives is None:
        places = torch.arange(bank.shape[0], device=bank.device)
        others = PairLogSumExp.apply(
            rows[0], bank, scale, indices, places, None, False, False, rows[1], ANY_ROWS, None, name
        )
        found, log_z = softplus(others - positive), None
    else:
        drawn = generator if batch.ranks is None else torch.Generator(query.device).manual_seed(batch.ranks.seed)
        noise = bank[torch.randint(len(bank), (num_negatives,), generator=drawn, device=query.device)]
        log_z = log_normaliser(rows, noise, scale, len(bank), batch) if log_z is None else beside(log_z, query).detach()
        found = noise_rows(name, rows, noise, positive, scale, len(bank), log_z)
    return reduce_rows(found, shared["reduction"], batch).to(scale.dtype), log_z
