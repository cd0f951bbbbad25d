"""DCL: NT-Xent without the positive in the denominator.

With M = 2N unit rows z (both views, view 1 first), s = 1 / temperature, S = s z z^T and p(i) the partner of i:

    L = 1/M sum_i [ log sum_{k != i, p(i)} exp(S_ik) - S_i,p(i) ]

Source: Yeh et al., "Decoupled Contrastive Learning", 2022. A composition: the kernels leave self and partner out
anyway. Not to be taken for `decoupled_nt_xent` (P1 Eq. 4), which decouples the weight of a term.
"""

from __future__ import annotations

from torch import Tensor

from .module import TemperatureLoss
from .two_view import two_view_loss


def dcl_loss(
    z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.1, *,
    normalize: bool = True, reduction: str = "mean", group=None,
    grad_reduction: str = "mean", exchange: str = "gather",
) -> Tensor:  # fmt: skip
    """Decoupled contrastive loss of two views, exact, without the 2N x 2N similarity matrix.

    L = mean_i [ log sum_{k != i, p(i)} exp(<z_i, z_k> / temperature) - <z_i, z_p(i)> / temperature ] over the 2N rows
    of both views, p(i) the other view of row i (Yeh et al., 2022). Memory is O(N D). Results repeat to the bit.

    Args:
        z1, z2: embeddings [N, D] of the two views, as in `nt_xent`.
        temperature, normalize, reduction, group, grad_reduction, exchange: as in `nt_xent`; over ranks every row sees
            the rows of all of them.

    Returns:
        The loss, float32 (float64 for float64 input): a scalar, or [2n] for reduction "none". It has no lower bound.
        One pair alone has no negatives: its loss and gradient are 0. NaN in the data gives a NaN loss.

    Raises:
        TypeError, ValueError: as in `nt_xent`. RuntimeError: on differentiating twice.

    Example:
        >>> import torch
        >>> from fastcl import dcl_loss
        >>> z1, z2 = torch.randn(2, 256, 128).requires_grad_()
        >>> dcl_loss(z1, z2, temperature=0.1).backward()
    """
    return two_view_loss(
        "dcl_loss", z1, z2, temperature, positive_counts=False,
        normalize=normalize, reduction=reduction, group=group, grad_reduction=grad_reduction, exchange=exchange,
    )  # fmt: skip


class DCLLoss(TemperatureLoss, function=dcl_loss):
    """`dcl_loss` as a module: see there for the arguments, and `NTXentLoss` for learnable_temperature.

    Example:
        >>> import torch
        >>> from fastcl import DCLLoss
        >>> criterion = DCLLoss(temperature=0.2)
        >>> loss = criterion(torch.randn(8, 16), torch.randn(8, 16))
        >>> criterion
        DCLLoss(temperature=0.2)
    """
