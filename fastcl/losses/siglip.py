"""SigLIP: every pair of an image and a text is a yes-or-no question of its own.

With image rows x, text rows y, S = logit_scale x y^T and bias b, over N rows:

    L = 1/N sum_i [ softplus(-(S_ii + b)) + sum_{j != i} softplus(S_ij + b) ]

Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023. A composition: the sum of softplus over
pairs, the positives left out and added in full precision.
"""

from __future__ import annotations

from torch import Tensor

from .. import distributed
from ..ops.rows import product_rows
from ..ops.softplus import PairSoftplus
from . import checks
from .batch import beside, checked_scale, needs_grad, open_batch, setting_of, softplus
from .module import FunctionLoss


def siglip_loss(
    image: Tensor, text: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor, *,
    normalize: bool = False, reduction: str = "mean", group=None,
    grad_reduction: str = "mean", exchange: str = "gather",
) -> Tensor:  # fmt: skip
    """SigLIP loss of images and texts, exact, without the N x N matrix of logits.

    L = 1/N sum_ij softplus(-t_ij (logit_scale <x_i, y_j> + logit_bias)), t_ii = 1 and t_ij = -1 elsewhere (Zhai et al.,
    2023): summed over pairs, divided by rows. Memory is O(N D); one process forms the loss, unless its reduction is
    "none", and both gradients from one visit of each tile. Results repeat to the bit.

    Args:
        image, text: features [N, D], row i of both belong together. float16, bfloat16, float32 or float64.
        logit_scale: positive number, or one-element floating tensor (which may require grad), already exponentiated.
            The value of a CUDA tensor is not checked: a bad one gives a NaN loss.
        logit_bias: number, or one-element floating tensor (which may require grad).
        normalize: divide rows by max(length, 1e-12) first. Default False: as in open_clip features come normalised.
        reduction: "mean" over the images of all ranks, "sum", or "none" for this rank's images [n].
        group, grad_reduction, exchange: as in `nt_xent`; over ranks every image meets the texts of all of them.

    Returns:
        The loss, float32 (float64 for float64 input): a scalar, or [n] for reduction "none". NaN in the data gives a
        NaN loss.

    Raises:
        TypeError, ValueError: as in `nt_xent`. RuntimeError: on differentiating twice.

    Example:
        >>> import torch
        >>> from fastcl import siglip_loss
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2).requires_grad_()
        >>> siglip_loss(image, text, logit_scale=10.0, logit_bias=-10.0).backward()
    """
    name = "siglip_loss"
    shared = {"normalize": normalize, "reduction": reduction, "grad_reduction": grad_reduction, "exchange": exchange}
    own = {"logit_bias": setting_of(logit_bias), "requires_grad": needs_grad(image, text, logit_scale, logit_bias)}

    def check():
        checks.options(name, **shared)
        checks.pair(name, image, text, ("image", "text"))
        checks.positive(name, "logit_scale", logit_scale, image.device, largest=checks.LARGEST)
        checks.scalar(name, "logit_bias", logit_bias, image.device)
        return image, logit_scale

    batch = open_batch(name, group, check, shared | own, argument="image and text", number="logit_scale")
    (x, dtype), (y, _) = (product_rows(name, rows, normalize) for rows in (image, text))
    scale, bias = checked_scale(beside(logit_scale, image)), beside(logit_bias, image)
    positive = softplus(-(scale.double() * (x * y).sum(1).double() + bias.double()))
    beta, reduce = bias.expand(len(x)), reduction != "none"
    negative = PairSoftplus.apply(x, y, scale, beta, None, None, 1.0, True, reduce, dtype, batch.ranks, name)
    if not reduce:
        return (positive + negative).to(scale.dtype)
    total = positive.sum() + negative
    if batch.ranks is not None:
        total = distributed.GlobalSum.apply(total, batch.ranks)
    return (total / batch.total if reduction == "mean" else total).to(scale.dtype)


class SigLIPLoss(FunctionLoss, function=siglip_loss):
    """`siglip_loss` as a module: see there for the arguments. `criterion(image, text, logit_scale, logit_bias)`.

    Example:
        >>> import torch
        >>> from fastcl import SigLIPLoss
        >>> criterion = SigLIPLoss(normalize=True)
        >>> loss = criterion(torch.randn(8, 16), torch.randn(8, 16), 10.0, -10.0)
        >>> criterion
        SigLIPLoss(normalize=True)
    """
