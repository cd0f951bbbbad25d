"""Augmentations, as torchvision v2 transforms of one picture.

`photo_views` is SimCLR's recipe for photographs; `digit_views` crops only, because a digit that is mirrored
or recoloured is another picture than the ones to be recognised. Every transform maps a PIL picture or a
uint8 tensor to a float tensor [C, H, W] in 0..1.
"""

import torch

from .torchvision_compat import torchvision  # noqa: F401  (must come before torchvision.transforms)

from torchvision.transforms import v2


def photo_views(size: int, strength: float = 1.0, blur: bool = True) -> v2.Transform:
    """Crop (0.08-1), flip, colour jitter with p 0.8, greyscale with p 0.2, Gaussian blur with p 0.5."""
    jitter = v2.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    steps = [
        v2.ToImage(),
        v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([jitter], p=0.8),
        v2.RandomGrayscale(p=0.2),
    ]
    if blur:
        kernel = max(3, size // 10 | 1)  # a tenth of the side, and odd
        steps.append(v2.RandomApply([v2.GaussianBlur(kernel, sigma=(0.1, 2.0))], p=0.5))
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def digit_views(size: int) -> v2.Transform:
    """Random resized crop (0.3-1) alone: it moves and scales the digit."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.3, 1.0), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def plain_photo(size: int) -> v2.Transform:
    """The whole picture for the probes: shorter side to 8/7 of `size`, then the centre; small ones uncut."""
    resized = size if size <= 96 else size * 8 // 7
    return v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(resized, antialias=True),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.ToPureTensor(),
        ]
    )


def plain_digit() -> v2.Transform:
    return v2.ToDtype(torch.float32, scale=True)
