"""SupCon, the supervised contrastive loss: all other rows of its label are positives of a row.

With M unit rows z, s = 1 / temperature, S = s z z^T and P(i) the other rows of label y_i:

    L_out = mean_i [ log sum_{k != i} exp(S_ik) - mean_{p in P(i)} S_ip ]
    L_in  = mean_i [ log sum_{k != i} exp(S_ik) - log mean_{p in P(i)} exp(S_ip) ]

over the rows i with a positive. Source: Khosla et al., "Supervised Contrastive Learning", 2020, Eq. 2 and 3. A
composition: one visit of each tile gives the log-sum-exp and the sum of the positives. L_in is log(1 + exp(x)) of the
log-sum-exp of the other labels less that of the positives, plus the logarithm of how many positives there are.
"""

from __future__ import annotations

from torch import Tensor

from . import checks
from .batch import needs_grad, open_batch
from .module import TemperatureLoss
from .positives import positives_loss


def supcon_loss(
    features: Tensor, labels: Tensor, temperature: float | Tensor = 0.1, *,
    form: str = "out",
    normalize: bool = True, reduction: str = "mean", group=None,
    grad_reduction: str = "mean", exchange: str = "gather",
) -> Tensor:  # fmt: skip
    """Supervised contrastive loss, exact, without the M x M matrices of similarities and of positives.

    L = mean_i [ log sum_{k != i} exp(S_ik) - mean_p S_ip ], S = z z^T / temperature, p over the other rows of the
    label of row i (L_out, Khosla et al., 2020, Eq. 2); L_in has log mean_p exp(S_ip) in the last place (Eq. 3). Memory
    is O(M D). Results repeat to the bit.

    Args:
        features: rows [M, D], or views [N, V, D], of which row v of image n has the label of n. float16, bfloat16,
            float32 or float64; any strides.
        labels: integers [M], or [N].
        temperature: positive number, or one-element floating tensor (which may require grad).
        form: "out" or "in".
        normalize: as in `nt_xent`.
        reduction: "mean" over the rows, over ranks those of all of them, that have a positive (0 if none has one),
            "sum", or "none" for this rank's rows: 0 for one without a positive, which is not in the mean.
        group, grad_reduction, exchange: as in `nt_xent`.

    Returns:
        The loss, float32 (float64 for float64 input): a scalar, or [m] ([n V], the views of an image together) for
        reduction "none". NaN in the data gives a NaN loss.

    Raises:
        TypeError, ValueError: as in `nt_xent`. RuntimeError: on differentiating twice.

    Example:
        >>> import torch
        >>> from fastcl import supcon_loss
        >>> features, labels = torch.randn(8, 16, requires_grad=True), torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])
        >>> supcon_loss(features, labels).backward()
    """
    name = "supcon_loss"
    shared = {"normalize": normalize, "reduction": reduction, "grad_reduction": grad_reduction, "exchange": exchange}

    def check():
        checks.options(name, **shared, form=form)
        rows = checks.row_groups(name, "features", features)
        checks.integers(name, "labels", labels, [features.shape[0]], features.device)
        checks.positive(name, "temperature", temperature, features.device)
        return rows, temperature

    own = {"form": form, "requires_grad": needs_grad(features, temperature)}
    batch = open_batch(name, group, check, shared | own, argument="features")
    views = features.shape[1] if features.ndim == 3 else 1
    ids = labels.long().repeat_interleave(views)
    return positives_loss(name, features.reshape(-1, features.shape[-1]), ids, temperature, form, shared, batch)


class SupConLoss(TemperatureLoss, function=supcon_loss):
    """`supcon_loss` as a module: see there for the arguments, and `NTXentLoss` for learnable_temperature.

    Example:
        >>> import torch
        >>> from fastcl import SupConLoss
        >>> criterion = SupConLoss(temperature=0.2, form="in")
        >>> loss = criterion(torch.randn(8, 2, 16), torch.arange(8) % 3)
        >>> criterion
        SupConLoss(temperature=0.2, form='in')
    """
