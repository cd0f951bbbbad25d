"""CLIP: each image finds its text among all texts, each text its image among all images.

With image rows x, text rows y and S = logit_scale x y^T:

    L = 1/2 mean_i [ log sum_j exp(S_ij) - S_ii ] + 1/2 mean_j [ log sum_i exp(S_ij) - S_jj ]

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021. A composition:
the log-sum-exp of rows and of columns from the same products, the positive left out of both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.pairs import PairLogSumExp
from ..ops.rows import product_rows
from . import checks
from .batch import beside, checked_scale, needs_grad, open_batch, reduce_rows, scale_bound, softplus
from .module import FunctionLoss


def clip_loss(
    image: Tensor, text: Tensor, logit_scale: float | Tensor, *,
    normalize: bool = False, reduction: str = "mean", group=None,
    grad_reduction: str = "mean", exchange: str = "gather",
) -> Tensor:  # fmt: skip
    """CLIP loss of images and texts, exact, without the N x N matrix of logits.

    L = mean over the 2N rows of both: of images log sum_j exp(S_ij) - S_ii, of texts log sum_i exp(S_ij) - S_jj, with
    S = logit_scale * image @ text.T (Radford et al., 2021). Memory is O(N D), and one process forms four products of
    N^2 D, the fewest there can be (on CUDA five above a scale of about 70). Results repeat to the bit.

    Args:
        image, text: features [N, D], row i of both belong together. float16, bfloat16, float32 or float64.
        logit_scale: positive number, or one-element floating tensor (which may require grad), already exponentiated: in
            open_clip `logit_scale.exp()`. The value of a CUDA tensor is not checked: a bad one gives a NaN loss.
        normalize: divide rows by max(length, 1e-12) first. Default False: as in open_clip features come normalised.
        reduction: "mean" over the 2N rows of all ranks, "sum", or "none" for this rank's [2n], images first.
        group, grad_reduction, exchange: as in `nt_xent`; over ranks every image meets the texts of all of them.

    Returns:
        The loss, float32 (float64 for float64 input): a scalar, or [2n] for reduction "none". One pair alone has loss
        and gradient 0. NaN in the data gives a NaN loss.

    Raises:
        TypeError, ValueError: as in `nt_xent`. RuntimeError: on differentiating twice.

    Example:
        >>> import torch
        >>> from fastcl import clip_loss
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2).requires_grad_()
        >>> clip_loss(image, text, logit_scale=14.3).backward()
    """
    name = "clip_loss"
    shared = {"normalize": normalize, "reduction": reduction, "grad_reduction": grad_reduction, "exchange": exchange}

    def check():
        checks.options(name, **shared)
        checks.pair(name, image, text, ("image", "text"))
        checks.positive(name, "logit_scale", logit_scale, image.device, largest=checks.LARGEST)
        return image, logit_scale

    own = {"requires_grad": needs_grad(image, text, logit_scale)}
    batch = open_batch(name, group, check, shared | own, argument="image and text", number="logit_scale")
    (x, dtype), (y, _) = (product_rows(name, rows, normalize) for rows in (image, text))
    scale, bound = checked_scale(beside(logit_scale, image)), scale_bound(logit_scale, normalize)
    positive = scale.double() * (x * y).sum(1).double()
    per_image, per_text = PairLogSumExp.apply(
        x, y, scale, None, None, None, True, True, dtype, bound, batch.ranks, name
    )
    rows = softplus(torch.cat([per_image - positive, per_text - positive]))
    return reduce_rows(rows, reduction, batch._replace(total=2 * batch.total)).to(scale.dtype)


class ClipLoss(FunctionLoss, function=clip_loss):
    """`clip_loss` as a module: see there for the arguments. `criterion(image, text, logit_scale)`.

    Example:
        >>> import torch
        >>> from fastcl import ClipLoss
        >>> criterion = ClipLoss(normalize=True)
        >>> loss = criterion(torch.randn(8, 16), torch.randn(8, 16), 14.3)
        >>> criterion
        ClipLoss(normalize=True)
    """
