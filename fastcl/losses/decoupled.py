"""Decoupled NT-Xent: alignment and distribution with a weight of their own.

With M = 2N unit rows z (both views, view 1 first), s = 1 / temperature, S = s z z^T and p(i) the partner of i:

    L = 1/M sum_i [ weight * log sum_{k != i} exp(S_ik) - <z_i, z_p(i)> ]

Source: P1, "Intriguing Properties of Contrastive Losses", Eq. 4. weight = temperature is temperature times NT-Xent
(Eq. 3). A composition: NT-Xent's primitive with two other weights.
"""

from __future__ import annotations

from torch import Tensor

from . import checks
from .module import LossModule
from .two_view import two_view_loss


def decoupled_nt_xent(
    z1: Tensor, z2: Tensor, temperature: float | Tensor = 1.0, *,
    weight: float = 0.1,
    normalize: bool = True, reduction: str = "mean", group=None,
    grad_reduction: str = "mean", exchange: str = "gather",
) -> Tensor:  # fmt: skip
    """Decoupled NT-Xent of two views, exact, without the 2N x 2N similarity matrix.

    L = mean_i [ weight * log sum_{k != i} exp(<z_i, z_k> / temperature) - <z_i, z_p(i)> ] over the 2N rows of both
    views, p(i) the other view of row i (P1 Eq. 4). In NT-Xent the temperature is both the width of the kernel and
    the weight of the distribution term; here they are two numbers. Memory is O(N D). Results repeat to the bit.

    Args:
        z1, z2: embeddings [N, D] of the two views, row i of both from the same image. float16, bfloat16, float32
            or float64; any strides. They need not be normalised.
        temperature: positive number, or one-element floating tensor (which may require grad). The value of a CUDA
            tensor is not checked: a bad one gives a NaN loss.
        weight: of the distribution term, P1's lambda: a number that is positive or 0. The larger the temperature, the
            smaller the weight should be (P1 Figure A.2). Rows are pushed apart with weight / temperature against a
            pull of 1: far below 1 they collapse to a few dimensions. P1's published form takes the mean over the D
            entries for its alignment, so its 0.1 at temperature 1 is 0.1 D here.
        normalize, reduction, group, grad_reduction, exchange: as in `nt_xent`.

    Returns:
        The loss, float32 (float64 for float64 input): a scalar, or [2n] for reduction "none". NaN in the data gives a
        NaN loss.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; over ranks the same on every rank.
        RuntimeError: on differentiating twice.

    Example:
        >>> import torch
        >>> from fastcl import decoupled_nt_xent
        >>> z1 = torch.randn(256, 128, requires_grad=True)
        >>> z2 = torch.randn(256, 128, requires_grad=True)
        >>> loss = decoupled_nt_xent(z1, z2, temperature=1.0, weight=0.1)
        >>> loss.backward()
        >>> z1.grad.shape
        torch.Size([256, 128])
    """
    return two_view_loss(
        "decoupled_nt_xent", z1, z2, temperature, weight=weight, pull=1.0,
        check=lambda: checks.number("decoupled_nt_xent", "weight", weight, zero=True), settings={"weight": weight},
        normalize=normalize, reduction=reduction, group=group, grad_reduction=grad_reduction, exchange=exchange,
    )  # fmt: skip


class DecoupledNTXentLoss(LossModule):
    """`decoupled_nt_xent` as a module: see there for the arguments.

    The temperature is not learned: without NT-Xent's coupling the loss falls for good as it grows.

    Example:
        >>> import torch
        >>> from fastcl import DecoupledNTXentLoss
        >>> criterion = DecoupledNTXentLoss(temperature=0.5, weight=0.2)
        >>> loss = criterion(torch.randn(8, 16), torch.randn(8, 16))
        >>> criterion
        DecoupledNTXentLoss(temperature=0.5, weight=0.2)
    """

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        weight: float = 0.1,
        normalize: bool = True,
        reduction: str = "mean",
        group=None,
        grad_reduction: str = "mean",
        exchange: str = "gather",
    ):
        super().__init__(
            decoupled_nt_xent, weight=weight,
            normalize=normalize, reduction=reduction, group=group, grad_reduction=grad_reduction, exchange=exchange,
        )  # fmt: skip
        self.temperature = checks.constant("DecoupledNTXentLoss", "temperature", temperature)
        checks.number("DecoupledNTXentLoss", "weight", weight, zero=True)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return decoupled_nt_xent(z1, z2, self.temperature, **self.settings)

    def extra_repr(self) -> str:
        return ", ".join([f"temperature={self.temperature:.4g}", *self.changed_settings()])
