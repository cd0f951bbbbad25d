"""Encoders, the projection head, and other normalisations in the place of batch norm."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class ConvNet(nn.Sequential):
    """Four 3x3 convolutions, each halving the picture and doubling the width, then a global average pool."""

    def __init__(self, channels, width=16):
        layers, previous = [], channels
        for depth in range(4):
            current = width << depth
            layers += [nn.Conv2d(previous, current, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(current),
                       nn.ReLU(inplace=True)]
            previous = current
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = previous


def build_encoder(arch, channels, image_size, width=16):
    """[n, channels, image_size, image_size] to features [n, encoder.num_features], with random weights.

    `arch` is `convnet`, whose first layer has `width` channels, or any architecture of timm. Of small pictures ResNets
    do not shrink the first layers' output, and ViTs have smaller patches than their names say.
    """
    if arch == "convnet":
        return ConvNet(channels, width)
    from .torchvision_compat import torchvision  # noqa: F401  (timm imports torchvision)

    from . import backbones

    return backbones.build(arch, channels, image_size)


def projection_head(features, layers, out, hidden=None, last_norm=True):
    """SimCLR's head: linear layers with batch norm after each, and ReLU in between; of no layer, the features.

    With two layers and without the last norm it is BYOL's predictor.
    """
    if not 0 <= layers <= 4:
        raise ValueError(f"projection_head: expected layers from 0 to 4, got {layers}")
    if layers == 0:
        return nn.Identity()
    widths = [features, *[hidden or features] * (layers - 1), out]
    parts = []
    for depth, (before, after) in enumerate(zip(widths, widths[1:]), 1):
        last = depth == layers
        normed = last_norm or not last
        parts.append(nn.Linear(before, after, bias=not normed))
        if normed:
            # No shift after the last batch norm: a shift common to all projections would only raise every similarity.
            parts.append(nn.BatchNorm1d(after, affine=not last))
        if not last:
            parts.append(nn.ReLU(inplace=True))
    return nn.Sequential(*parts)


def group_norm(module):
    """`module` with group norm in the place of every batch norm: no row of a batch depends on another.

    Up to 32 groups, the most that divide the channels. In heads, where a channel is one number, groups have 16 numbers
    or more: normalised, two numbers keep their order alone, and one nothing.
    """

    def replaced(norm):
        channels = norm.num_features
        most = 32 if isinstance(norm, nn.BatchNorm2d) else max(1, min(32, channels // 16))
        groups = max(divisor for divisor in range(1, most + 1) if channels % divisor == 0)
        new = nn.GroupNorm(groups, channels, norm.eps, norm.affine)
        new.weight, new.bias = norm.weight, norm.bias  # the very ones: a residual block's last weights begin at 0
        # timm's BatchNormAct2d applies dropout and activation as well.
        return nn.Sequential(new, norm.drop, norm.act) if hasattr(norm, "act") else new

    return _with_norms(module, replaced)


def split_batch_norm(module, splits):
    """`module` with batch norms that take `splits` consecutive parts of a batch for batches of their own.

    What MoCo needs on one device: with a key normalised beside other pictures than its query, the statistics of a batch
    do not tell which belong together. Names and tensors of the state stay, so checkpoints fit either way.
    """
    if splits < 1:
        raise ValueError(f"split_batch_norm: expected at least 1 split, got {splits}")
    return _with_norms(module, lambda norm: SplitBatchNorm(norm, splits))


def _with_norms(module, replaced):
    """`module`, of which every batch norm, be it `module` itself, gave way to replaced(norm)."""
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return replaced(module)
    for name, child in module.named_children():
        setattr(module, name, _with_norms(child, replaced))
    return module


class SplitBatchNorm(_BatchNorm):
    """The batch norm that it is made from, in training over each part of the batch apart; see `split_batch_norm`.

    The running statistics follow the parts' mean. Parts differ by one row at most; a batch that has not two rows for
    each is not split.
    """

    def __init__(self, norm, splits):
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.splits = splits
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        # timm's BatchNormAct2d applies dropout and activation as well.
        self.drop, self.act = getattr(norm, "drop", nn.Identity()), getattr(norm, "act", nn.Identity())
        self.train(norm.training)

    def _check_input_dim(self, rows):
        if rows.ndim < 2:
            raise ValueError(f"SplitBatchNorm: expected [n, channels, ...], got {rows.ndim} dimensions")

    def forward(self, rows):
        split = self.training and len(rows) >= 2 * self.splits
        return self.act(self.drop(self._in_parts(rows) if split else super().forward(rows)))

    def _in_parts(self, rows):
        parts = rows.tensor_split(self.splits)
        if not self.track_running_stats:
            return torch.cat([self._normalised(part, None, None) for part in parts])
        means = [torch.zeros_like(self.running_mean) for _ in parts]
        variances = [torch.zeros_like(self.running_var) for _ in parts]
        normalised = torch.cat([self._normalised(*part) for part in zip(parts, means, variances)])
        self.num_batches_tracked += 1
        momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        for running, found in ((self.running_mean, means), (self.running_var, variances)):
            running += momentum * (torch.stack(found).mean(0) - running)
        return normalised

    def _normalised(self, part, mean, variance):
        """Writes the statistics of `part` into `mean` and `variance`: that is what a momentum of 1 does."""
        return F.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
