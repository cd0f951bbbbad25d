"""Encoders and the projection head."""

import torch.nn as nn

from .errors import UsageError
from .torchvision_compat import torchvision  # noqa: F401  (timm imports torchvision)

RESNETS = ("resnet18", "resnet50")
ARCHITECTURES = ("convnet", *RESNETS)
SMALL_PICTURE = 96  # pixels: up to here the ResNets get the stem that does not shrink the picture fourfold


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


def _resnet(arch, channels, image_size):
    import timm

    encoder = timm.create_model(arch, pretrained=False, num_classes=0, in_chans=channels)
    if image_size <= SMALL_PICTURE:
        encoder.conv1 = nn.Conv2d(channels, encoder.conv1.out_channels, 3, stride=1, padding=1, bias=False)
        encoder.maxpool = nn.Identity()
    return encoder


def build_encoder(arch, channels, image_size, width=16):
    """[n, channels, size, size] to features [n, encoder.num_features]; `width` is the convnet's first layer's."""
    if arch == "convnet":
        return ConvNet(channels, width)
    if arch in RESNETS:
        return _resnet(arch, channels, image_size)
    raise UsageError(f"--arch: expected one of {', '.join(ARCHITECTURES)}, got {arch}")


def projection_head(features, layers, out, hidden=None):
    """Linear layers with batch norm after each, and ReLU in between: SimCLR's head."""
    hidden = hidden or features
    widths = [features, *[hidden] * (layers - 1), out]
    parts = []
    for depth, (before, after) in enumerate(zip(widths, widths[1:])):
        last = depth == layers - 1
        # No shift after the last batch norm: a shift common to all projections would only raise every similarity.
        parts += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after, affine=not last)]
        if not last:
            parts.append(nn.ReLU(inplace=True))
    return nn.Sequential(*parts)


class SimCLR(nn.Module):
    """Both views through encoder and head in one pass, so that batch norm sees them together."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, pictures):
        return self.head(self.encoder(pictures))
