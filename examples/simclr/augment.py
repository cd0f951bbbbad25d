"""Augmentations: torchvision v2 transforms of one picture, and modules of kornia for a batch on a device.

`photo_views` is SimCLR's recipe for photographs; `digit_views` crops only, because a digit that is mirrored
or recoloured is another picture than the ones to be recognised. These, and the plain ones, map a PIL picture or a
uint8 tensor to a float tensor [C, H, W] in 0..1.

`device_views` and `device_digit_views` are the same recipes for where the processes that read have no time for them,
and the `raw_` transforms what is left to do for those: uint8 pictures of one size, which stack. Two things differ. A
crop is taken from the middle square of a picture, shrunk to little more than the size of a view, so small ones lose
detail. And kornia draws from the process' global generator, that of the device which the module is on: a run goes on
as it would have when that generator's state is put back, but a view is no function of its picture and epoch.
"""

import torch
from torch import nn

from .errors import UsageError
from .torchvision_compat import torchvision  # noqa: F401  (must come before torchvision.transforms)

from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

SMALL = 96  # pixels: up to here pictures are used whole, and not blurred
CROP, DIGIT_CROP = (0.08, 1.0), (0.3, 1.0)  # share of the picture's area
BLUR = (0.1, 2.0)  # standard deviation in pixels
STRONGEST = 2.5  # of the jitter: shifts the hue by half a turn either way


def _jitter(strength):
    """Brightness, contrast, saturation, hue."""
    return 0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength


def _blur_kernel(size):
    return max(3, size // 10 | 1)  # a tenth of the side, and odd


class Blur(v2.GaussianBlur):
    """torchvision's, along rows and then along columns: 2 * 23 products a pixel at 224, not 23 * 23."""

    def transform(self, inpt, params):
        across, down = self.kernel_size
        blurred = self._call_kernel(functional.gaussian_blur, inpt, kernel_size=[across, 1], **params)
        return self._call_kernel(functional.gaussian_blur, blurred, kernel_size=[1, down], **params)


def photo_views(size: int, strength: float = 1.0, blur: bool = True, crop=CROP) -> v2.Transform:
    """Crop (an area of 0.08-1), flip, colour jitter with p 0.8, greyscale with p 0.2, Gaussian blur with p 0.5."""
    steps = [
        v2.ToImage(),
        v2.RandomResizedCrop(size, scale=crop, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(*_jitter(strength))], p=0.8),
        v2.RandomGrayscale(p=0.2),
        *_floats(),
    ]
    if blur:
        steps.append(v2.RandomApply([Blur(_blur_kernel(size), sigma=BLUR)], p=0.5))
    return v2.Compose(steps)


def digit_views(size: int, crop=DIGIT_CROP) -> v2.Transform:
    """Random resized crop (0.3-1) alone: it moves and scales the digit."""
    return v2.Compose([v2.RandomResizedCrop(size, scale=crop, antialias=True), *_floats()])


def plain_photo(size: int) -> v2.Transform:
    """The whole picture for the probes: shorter side to 8/7 of `size`, then the centre; small ones uncut."""
    return v2.Compose([*_middle(size if size <= SMALL else size * 8 // 7, size), *_floats()])


def plain_digit() -> v2.Transform:
    return v2.Compose(_floats())


def raw_photo(size: int) -> v2.Transform:
    """uint8 for `device_views(size)`: the middle square, 8/7 of `size` wide; small ones as they are, if square."""
    side = size if size <= SMALL else size * 8 // 7
    return v2.Compose([*_middle(side, side), v2.ToPureTensor()])


def raw_digit() -> v2.Transform:
    return v2.ToPureTensor()  # they are uint8 and of one size


def _middle(resized, size):
    return [v2.ToImage(), v2.Resize(resized, antialias=True), v2.CenterCrop(size)]


def _floats():
    return [v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]


class DeviceViews(nn.Module):
    """Raw pictures [n, C, H, W], uint8 or float in 0..1, to one random view each, float, on their device.

    Every picture of the batch has draws of its own; only the order of the four parts of the jitter is one for all.
    """

    def __init__(self, *steps):
        super().__init__()
        self.steps = nn.Sequential(*steps)

    @torch.no_grad()
    def forward(self, pictures):
        if not pictures.is_floating_point():
            pictures = pictures.float() / 255
        return self.steps(pictures)


def device_views(size: int, strength: float = 1.0, blur: bool = True, crop=CROP) -> nn.Module:
    """`photo_views` on the device of the batch."""
    kornia = _kornia()
    steps = [
        _device_crop(size, crop),
        kornia.RandomHorizontalFlip(p=0.5),
        kornia.ColorJitter(*_jitter(strength), p=0.8),
        kornia.RandomGrayscale(p=0.2),
    ]
    if blur:
        steps.append(kornia.RandomGaussianBlur((_blur_kernel(size),) * 2, BLUR, p=0.5))
    return DeviceViews(*steps)


def device_digit_views(size: int, crop=DIGIT_CROP) -> nn.Module:
    """`digit_views` on the device of the batch."""
    return DeviceViews(_device_crop(size, crop))


def _kornia():
    """Imported when it is used: nothing else needs it."""
    try:
        from kornia import augmentation
    except ImportError as error:
        raise UsageError(f"views on the device: expected an installed kornia (pip install --no-deps kornia kornia_rs), "
                         f"got {error}") from None
    return augmentation


def _device_crop(size, scale):
    # One call of grid_sample for the batch; "slice" would cut out one picture after another.
    return _kornia().RandomResizedCrop((size, size), scale=scale, ratio=(3 / 4, 4 / 3), cropping_mode="resample", p=1.0)
