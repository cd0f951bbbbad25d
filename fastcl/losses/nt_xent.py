"""NT-Xent, the normalised temperature-scaled cross entropy of SimCLR.

With M = 2N unit rows z (both views, view 1 first), s = 1 / temperature, S = s z z^T and p(i) the partner of i:

    L = 1/M sum_i [ log sum_{k != i} exp(S_ik) - S_i,p(i) ]

Source: P1, "Intriguing Properties of Contrastive Losses", Eq. 1; SimCLR (Chen et al., 2020). The positive stays
in the denominator, self does not.
"""

from __future__ import annotations

from torch import Tensor

from .module import TemperatureLoss
from .two_view import two_view_loss


def nt_xent(
    z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.1, *,
    normalize: bool = True, reduction: str = "mean", group=None,
    grad_reduction: str = "mean", exchange: str = "gather",
) -> Tensor:  # fmt: skip
    """NT-Xent loss of two views, exact, without the 2N x 2N similarity matrix.

    L = mean_i [ log sum_{k != i} exp(<z_i, z_k> / temperature) - <z_i, z_p(i)> / temperature ] over the 2N rows of
    both views, p(i) the other view of row i (P1 Eq. 1). Memory is O(N D). Results repeat to the bit.

    Args:
        z1, z2: embeddings [N, D] of the two views, row i of both from the same image. float16, bfloat16, float32
            or float64; any strides. They need not be normalised.
        temperature: positive number, or one-element floating tensor (which may require grad). The value of a CUDA
            tensor is not checked, since that would wait for the device: a bad one gives a NaN loss.
        normalize: divide rows by max(length, 1e-12) first. Rows shorter than that get no gradient.
        reduction: "mean" over the rows of all ranks, "sum", or "none" for this rank's 2n rows, view 1 first.
        group: None for the default process group if there is one; "local" for this process alone; or a
            ProcessGroup or one-dimensional DeviceMesh. Over ranks every row sees the rows of all of them, ranks may
            hold different numbers of rows (also none), and all ranks return the same loss.
        grad_reduction: "mean" where gradients are averaged over ranks afterwards (DistributedDataParallel), "sum"
            where they are summed. Either way parameters get the gradient that one process would compute. With reduction
            "none" each rank forms a number of its own, and "mean" gives the gradient of the mean of these numbers.
        exchange: "gather", the rows of all ranks at once, or "ring", those of one rank after another while the last
            ones are worked on: the same to rounding, in memory for two ranks' rows, and the rows move in the backward
            too.

    Returns:
        The loss, float32 (float64 for float64 input): a scalar, or [2n] for reduction "none". One pair alone has no
        negatives: its loss and gradient are 0. NaN in the data gives a NaN loss.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; over ranks the same on every rank.
        RuntimeError: on differentiating twice.

    fp32 products follow `torch.set_float32_matmul_precision`; "highest" is fp32-accurate on GPUs too.

    Example:
        >>> import torch
        >>> from fastcl import nt_xent
        >>> z1 = torch.randn(256, 128, requires_grad=True)
        >>> z2 = torch.randn(256, 128, requires_grad=True)
        >>> loss = nt_xent(z1, z2, temperature=0.1)
        >>> loss.backward()
        >>> z1.grad.shape
        torch.Size([256, 128])
    """
    return two_view_loss(
        "nt_xent", z1, z2, temperature,
        normalize=normalize, reduction=reduction, group=group, grad_reduction=grad_reduction, exchange=exchange,
    )  # fmt: skip


class NTXentLoss(TemperatureLoss, function=nt_xent):
    """`nt_xent` as a module: see there for the arguments.

    With learnable_temperature=True the temperature is a parameter, kept as its logarithm so that no step of an
    optimiser makes it negative.

    Example:
        >>> import torch
        >>> from fastcl import NTXentLoss
        >>> criterion = NTXentLoss(temperature=0.2)
        >>> loss = criterion(torch.randn(8, 16), torch.randn(8, 16))
        >>> criterion
        NTXentLoss(temperature=0.2)
    """
