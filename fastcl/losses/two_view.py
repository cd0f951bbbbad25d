"""What the two-view losses share: checks, ranks, and the call of the primitive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor

from ..ops.similarity import TwoViewLoss
from . import checks
from .batch import needs_grad, open_batch, product_bound, scale_of


def two_view_loss(
    name: str,
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    *,
    weight: float = 1.0,
    pull: float | None = None,
    check: Callable[[], None] = lambda: None,
    settings: Mapping[str, object] = MappingProxyType({}),
    arguments: tuple[str, str] = ("z1", "z2"),
    positive_counts: bool = True,
    normalize: bool,
    reduction: str,
    group,
    grad_reduction: str,
    exchange: str,
) -> Tensor:
    """The loss of ops.similarity.TwoViewLoss: `weight` is that of the log-sum-exp, `pull` that of the positive (None:
    weight / temperature), which is one of the columns of its row's sum or (positive_counts=False) is not.

    `check` and `settings` are for arguments that this loss has beside the shared ones, `arguments` what messages call
    z1 and z2.
    """
    shared = {"normalize": normalize, "reduction": reduction, "grad_reduction": grad_reduction, "exchange": exchange}

    def check_all():
        checks.options(name, **shared)
        checks.pair(name, z1, z2, arguments)
        checks.positive(name, "temperature", temperature, z1.device)
        check()
        return z1, temperature

    both = " and ".join(arguments)
    agreed = {**shared, **settings, "requires_grad": needs_grad(z1, z2, temperature)}
    ranks, total = open_batch(name, group, check_all, agreed, argument=both, views=2)
    scale, bound = scale_of(temperature, z1), product_bound(temperature, normalize)
    divisor = {"mean": total, "sum": 1, "none": None}[reduction]
    loss, _ = TwoViewLoss.apply(z1, z2, scale, weight, pull, positive_counts, bound, normalize, divisor, ranks, name)
    return loss
