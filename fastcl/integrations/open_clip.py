"""`open_clip.ClipLoss` and `open_clip.loss.SigLipLoss`, without the matrix of logits."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from ..losses import checks
from ..losses.clip import clip_loss
from ..losses.siglip import siglip_loss

EXCHANGES = ("bidir", "shift", "reduce", "gather")


class _OverRanks(nn.Module):
    """A loss over the default process group where world_size says so, and otherwise of this process."""

    def __init__(self, rank: int, world_size: int):
        super().__init__()
        checks.count(type(self).__name__, "world_size", world_size)
        self.rank, self.world_size = rank, world_size

    @property
    def group(self) -> str | None:
        if self.world_size == 1:
            return "local"
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks != self.world_size:
            raise ValueError(
                f"{type(self).__name__}: world_size must be that of the default process group, {ranks}, "
                f"got {self.world_size}"
            )
        return None


class ClipLoss(_OverRanks):
    """`open_clip.ClipLoss`, by `clip_loss`.

    Migration: `from fastcl.integrations.open_clip import ClipLoss` in place of `from open_clip import ClipLoss`.

    The same: arguments, and in one process value and gradient. Features come normalised, logit_scale exponentiated.
    logit_bias shifts all logits, has no effect on a softmax, and gets a zero gradient.

    On purpose different: with world_size > 1 every rank returns the loss of the global batch, and gradients are, after
    DistributedDataParallel's averaging, those that one process would compute. So is the original with
    gather_with_grad=True; without it, its features' gradient is 1 / world_size of that (local_loss=False), or lacks the
    terms of other ranks (local_loss=True). local_loss, gather_with_grad and cache_labels therefore change nothing here.
    Results are float32 (float64 for float64).

    Args:
        local_loss, gather_with_grad, cache_labels, rank: taken and not needed.
        world_size: more than 1 for the default process group, which must have that size.
        use_horovod: must be False.

    Example:
        >>> import torch
        >>> from fastcl.integrations.open_clip import ClipLoss
        >>> criterion = ClipLoss()
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2).requires_grad_()
        >>> losses = criterion(image, text, logit_scale=torch.tensor(14.3), output_dict=True)
        >>> losses["contrastive_loss"].backward()
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        if use_horovod:
            raise ValueError("ClipLoss: use_horovod must be False: ranks are those of torch.distributed, got True")
        super().__init__(rank, world_size)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        loss = clip_loss(image_features, text_features, logit_scale, group=self.group)
        if isinstance(logit_bias, Tensor):
            # DistributedDataParallel waits for a gradient of every parameter.
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(_OverRanks):
    """`open_clip.loss.SigLipLoss`, by `siglip_loss`.

    Migration: `from fastcl.integrations.open_clip import SigLipLoss` in place of
    `from open_clip.loss import SigLipLoss`.

    The same: arguments; value and gradient in one process, and over ranks the gradient.

    On purpose different: with world_size > 1 every rank returns the loss of the global batch, not of its own images;
    dist_impl names one of the original's ways to move the same rows, and changes nothing here.
    Results are float32 (float64 for float64).

    Args:
        cache_labels, rank: taken and not needed.
        world_size: as in `ClipLoss`.
        dist_impl: None, "bidir", "shift", "reduce" or "gather".

    Example:
        >>> import torch
        >>> from fastcl.integrations.open_clip import SigLipLoss
        >>> criterion = SigLipLoss()
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2).requires_grad_()
        >>> criterion(image, text, logit_scale=torch.tensor(10.0), logit_bias=torch.tensor(-10.0)).backward()
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ):
        if dist_impl is not None:
            checks.one_of("SigLipLoss", "dist_impl", dist_impl, EXCHANGES)
        super().__init__(rank, world_size)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        bias = 0.0 if logit_bias is None else logit_bias
        loss = siglip_loss(image_features, text_features, logit_scale, bias, group=self.group)
        return {"contrastive_loss": loss} if output_dict else loss
