"""Encoders of timm, which takes seconds to import: `model.build_encoder` imports this file when it needs one."""

import difflib
import re

import timm
import torch
from torch import nn

from .errors import UsageError

ALIASES = {"vit_small": "vit_small_patch16_224"}
SMALL_PICTURE = 96  # pixels: up to here ResNets and ViTs look closer than they do at 224
PATCHES = 7  # to a side of a small picture, at least: half of what a ViT has of 224 pixels


def build(arch, channels, image_size):
    """An encoder with random weights and `num_features` outputs."""
    name = ALIASES.get(arch, arch)
    known = timm.list_models()
    if name not in known:
        close = difflib.get_close_matches(arch, ["convnet", *ALIASES, *known], n=4) or ["resnet50", "vit_small"]
        raise UsageError(f"--arch: expected convnet or a name of timm.list_models(), such as {', '.join(close)}; "
                         f"got {arch}")
    options = _size_options(name, image_size)
    try:
        encoder = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels, **options)
        if isinstance(encoder, timm.models.ResNet) and image_size <= SMALL_PICTURE:
            _keep_size_in_stem(encoder)
        encoder.num_features = _feature_width(encoder, channels, image_size)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"--arch: expected one that makes rows of features of {channels} x {image_size} x "
                         f"{image_size} pictures, got {arch} ({said})") from error
    return encoder


def _size_options(name, size):
    """What an architecture that is made for one size of picture has to be told."""
    facts = timm.models.get_pretrained_cfg(name)
    options = dict(img_size=size) if facts is not None and facts.fixed_input_size else {}
    if named := re.search(r"patch(\d+)", name):
        patch = int(named[1])
        if size <= SMALL_PICTURE and timm.models.is_model_in_modules(name, ("vision_transformer", "deit")):
            while size // patch < PATCHES and patch > 2:
                patch //= 2
            options["patch_size"] = patch
        if size % patch:
            raise UsageError(f"--image-size: expected a multiple of {patch} pixels, the patch of {name}, got {size}")
    return options


def _keep_size_in_stem(resnet):
    """A stem that shrinks fourfold leaves too little of a small picture: no stride, no pooling."""
    if isinstance(resnet.conv1, nn.Conv2d):
        resnet.conv1 = nn.Conv2d(resnet.conv1.in_channels, resnet.conv1.out_channels, 3, padding=1, bias=False)
    else:  # a deep stem, of three 3x3 convolutions
        resnet.conv1[0].stride = (1, 1)
    resnet.maxpool = nn.Identity()


@torch.no_grad()
def _feature_width(encoder, channels, size):
    """By trying: timm's own num_features is not the width of the output in every architecture."""
    encoder.eval()
    features = encoder(torch.zeros(1, channels, size, size))
    encoder.train()
    if features.ndim != 2:
        raise ValueError(f"its features have the shape {list(features.shape)}")
    return features.shape[1]
