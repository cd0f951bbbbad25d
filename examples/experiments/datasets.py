"""Pictures with features that compete, in known amounts: the data sets that P1 constructs (sections 3.1 and 4.1).

    MultiDigits    several digits on one canvas, or two of different sizes
    DigitOnImage   a digit over every photograph
    RandBit        channels with the bits of a random number beside those of every picture

Like every split of `simclr.data` they have a length, `labels`, `read(index)` and `name(index)`. What they draw, they
draw when they are made, from their seed alone. `digit_source`, `canvas_source`, `photo_source` and `with_bits` make the
trainer's sources of them.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from simclr import augment, data
from simclr.errors import UsageError
from simclr.torchvision_compat import torchvision  # noqa: F401  (must come before torchvision.transforms)

from torchvision.transforms import v2

PLACES = (0.15, 0.45, 0.75)  # of DigitOnImage's digits: their centres, as shares of the side, along both axes
DIGITS = tuple("0123456789")  # the classes
GRID = 4  # cells to a side of MultiDigits' canvas
PHOTO_TILES = (2, 3)  # of a sample photograph: rows and columns, each of which is a class
PHOTO_CROPS = (0.3, 0.75)  # sides of the squares cut from a tile, as shares of its shorter side
PHOTO_PICTURES = 1920, 960  # to learn from, to test with


class Digits(NamedTuple):
    """Pictures uint8 [n, h, w] of one digit each, and their labels [n]."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor


def load_digits(name="digits", image_size=28):
    """scikit-learn's 1,797 digits of 8 x 8 pixels, or those of a folder, such as MNIST's, all in memory."""
    if name == "digits":
        from sklearn.datasets import load_digits as load

        bunch = load()
        images = torch.as_tensor(bunch.images * (255 / 16)).round().to(torch.uint8)
        labels = torch.as_tensor(bunch.target)
        return Digits(*(part[index] for index in data.stratified_split(labels) for part in (images, labels)))
    source = data.open_folder(name, image_size)
    if len(source.classes) > len(DIGITS):
        raise UsageError(f"{name}: expected up to {len(DIGITS)} classes of digits, got {len(source.classes)}")
    gray = v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size), v2.Grayscale(), v2.PILToTensor()])
    parts = []
    for split in (source.train, source.test):
        read = [(gray(picture)[0], label) for picture, label in zip(map(split.read, range(len(split))), split.labels)
                if picture is not None]
        # A folder is in the order of its classes: the first so many are to have all.
        order = torch.randperm(len(read), generator=torch.Generator().manual_seed(data.SPLIT_SEED))
        parts += [torch.stack([read[i][part] for i in order.tolist()]) for part in (0, 1)]
    return Digits(*parts)


def resized(images, size):
    """uint8 [n, h, w] to uint8 [n, size, size]."""
    if images.shape[1:] == (size, size):
        return images
    found = F.interpolate(images[:, None].float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    return found[:, 0].round().to(torch.uint8)


class MultiDigits:
    """Canvases with one digit of each of `sizes` pixels: uint8 [1, canvas, canvas].

    The first digit of canvas i is image i, in turn; the others are drawn with replacement. Placed "random", a digit may
    be anywhere on the canvas, over others too, where the brighter pixel shows. Placed in the "grid", every digit is in
    the middle of a cell of its own of 4 x 4. P1: digits of 28 pixels on a canvas of 112.

    `contents` [length, digits] are the labels in the order of `sizes`, `labels` those of the first, and `shares`
    [length, 10] what share of a canvas' digits is of each class.
    """

    def __init__(self, images, labels, sizes=(28,), length=None, placement="random", canvas=112, seed=0):
        if placement not in ("random", "grid"):
            raise ValueError(f"MultiDigits: placement: expected random or grid, got {placement!r}")
        largest = canvas // GRID if placement == "grid" else canvas
        if not sizes or max(sizes) > largest or min(sizes) < 1:
            raise ValueError(f"MultiDigits: sizes: expected 1 to {largest} pixels, got {list(sizes)}")
        if placement == "grid" and len(sizes) > GRID**2:
            raise ValueError(f"MultiDigits: sizes: expected up to {GRID**2} digits in a grid, got {len(sizes)}")
        length, generator = length or len(images), torch.Generator().manual_seed(seed)
        self.sizes, self.canvas = tuple(sizes), canvas
        self.images = {size: resized(images, size) for size in set(sizes)}
        self.chosen = torch.randint(len(images), (length, len(sizes)), generator=generator)
        self.chosen[:, 0] = torch.arange(length) % len(images)
        self.corners = (self._in_grid if placement == "grid" else self._anywhere)(length, generator)
        self.contents = labels[self.chosen]
        self.labels = self.contents[:, 0]
        self.shares = F.one_hot(self.contents, len(DIGITS)).float().mean(1)

    def _anywhere(self, length, generator):
        """Top left corners [length, digits, 2], every place within the canvas alike."""
        room = self.canvas - torch.tensor(self.sizes)[:, None] + 1
        return (torch.rand(length, len(self.sizes), 2, generator=generator) * room).long()

    def _in_grid(self, length, generator):
        side = self.canvas // GRID
        cells = torch.rand(length, GRID**2, generator=generator).argsort(1)[:, : len(self.sizes)]
        corners = torch.stack([cells // GRID, cells % GRID], dim=2) * side
        return corners + (side - torch.tensor(self.sizes)[:, None]) // 2

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"canvas {index}"

    def read(self, index):
        picture = torch.zeros(1, self.canvas, self.canvas, dtype=torch.uint8)
        for size, chosen, (top, left) in zip(self.sizes, self.chosen[index].tolist(), self.corners[index].tolist()):
            there = picture[0, top : top + size, left : left + size]
            torch.maximum(there, self.images[size][chosen], out=there)
        return picture


class DigitOnImage:
    """Every picture with a digit added to it at nine places, clipped at white: uint8 [3, side, side].

    The nine are the same digit, `digit` pixels wide, with their centres at 0.15, 0.45 and 0.75 of the side. It is one
    of the first `unique` of `digits`, or of all: drawn, but each for as many pictures as another. `labels` are those of
    the pictures, `digit_labels` those of the digits on them. P1: digits of 28 pixels on pictures of 224.
    """

    def __init__(self, pictures, digits, digit_labels, unique=None, digit=28, side=224, seed=0):
        unique = len(digits) if unique is None else unique
        if not 1 <= unique <= len(digits):
            raise ValueError(f"DigitOnImage: unique: expected 1 to {len(digits)}, the number of digits, got {unique}")
        self.pictures, self.side = pictures, side
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
        self.chosen = order % unique
        self.labels, self.digit_labels = pictures.labels, digit_labels[self.chosen]
        self.digits = resized(digits[:unique], digit)
        square = [v2.ToImage(), v2.Resize(side, antialias=True), v2.CenterCrop(side), v2.ToPureTensor()]
        self.square = v2.Compose(square)

    def __len__(self):
        return len(self.pictures)

    def name(self, index):
        return self.pictures.name(index)

    def read(self, index):
        picture = self.pictures.read(index)
        return None if picture is None else self.over(self.square(picture), self.digits[self.chosen[index]])

    def over(self, picture, digit):
        """uint8 [3, side, side] with the digit [h, w] at its nine places; what lies outside the picture is cut."""
        added, (high, wide) = picture.to(torch.int16), digit.shape
        for top in (round(place * self.side) - high // 2 for place in PLACES):
            for left in (round(place * self.side) - wide // 2 for place in PLACES):
                inside = digit[max(-top, 0) :, max(-left, 0) :][: self.side - max(top, 0), : self.side - max(left, 0)]
                there = added[:, max(top, 0) : top + high, max(left, 0) : left + wide]
                there += inside
        return added.clamp_(max=255).to(torch.uint8)


def random_bits(length, bits, seed):
    """(numbers int64 [length], their binary digits uint8 [length, bits], the lowest first), all numbers alike."""
    numbers = torch.randint(2**bits, (length,), generator=torch.Generator().manual_seed(seed))
    return numbers, (numbers[:, None] >> torch.arange(bits) & 1).to(torch.uint8)


class RandBit:
    """(picture, code): beside every picture the `bits` binary digits, uint8 [bits], of a random number of its own.

    The transforms of `with_bits` make channels of the code, the same for every pixel and every view.
    """

    def __init__(self, pictures, bits, seed=0):
        if not 0 <= bits <= 62:
            raise ValueError(f"RandBit: bits: expected 0 to 62, got {bits}")
        self.pictures, self.labels = pictures, pictures.labels
        self.numbers, self.codes = random_bits(len(pictures), bits, seed)

    def __len__(self):
        return len(self.pictures)

    def name(self, index):
        return self.pictures.name(index)

    def read(self, index):
        picture = self.pictures.read(index)
        return None if picture is None else (picture, self.codes[index])


def _beside(transform, pair):
    """What `transform` makes of the picture, with a channel for each bit: 1 for a set one, as uint8 255."""
    picture, code = pair
    view = transform(picture)
    code = code.to(view.dtype) * (1 if view.is_floating_point() else 255)
    return torch.cat([view, code[:, None, None].expand(-1, *view.shape[1:])])


class BitsAside(nn.Module):
    """Views of the first `channels` alone, uint8 or float [n, C, H, W] to float; the bits after them stay."""

    def __init__(self, views, channels):
        super().__init__()
        self.views, self.channels = views, channels

    def forward(self, pictures):
        views, bits = self.views(pictures[:, : self.channels]), pictures[:, self.channels :]
        bits = bits if bits.is_floating_point() else bits.float() / 255
        return torch.cat([views, bits[:, :, : views.shape[2], : views.shape[3]]], dim=1)


def with_bits(source, bits, seed=0):
    """The source with `bits` more channels, of a random number for each picture, which no augmentation touches."""
    train, test = RandBit(source.train, bits, seed), RandBit(source.test, bits, seed + 1)
    transforms = {name: partial(_beside, getattr(source, name)) for name in ("views", "plain", "raw")}
    return replace(source, train=train, test=test, channels=source.channels + bits, **transforms,
                   device_views=lambda: BitsAside(source.device_views(), source.channels))


def digit_source(digits, size=28, crop=None):
    """Digits that fill their pictures."""
    train, test = (data.MemoryPictures(resized(images, size)[:, None], labels)
                   for images, labels in (digits[:2], digits[2:]))
    return _gray(train, test, size, crop)


def canvas_source(digits, sizes, canvas, placement="random", crop=None, length=None, seed=0):
    """`MultiDigits` of the training digits, and of the test digits one for each of them."""
    train = MultiDigits(*digits[:2], sizes, length, placement, canvas, seed)
    return _gray(train, MultiDigits(*digits[2:], sizes, None, placement, canvas, seed + 1), canvas, crop)


def single_digits(digits, size, canvas, seed=0):
    """Training and test split with one digit on every canvas, anywhere: what P1 probes the encoders of canvases on."""
    return (MultiDigits(images, labels, [size], canvas=canvas, seed=seed + number)
            for number, (images, labels) in enumerate((digits[:2], digits[2:])))


def _gray(train, test, size, crop):
    recipe = (size, crop or augment.DIGIT_CROP)
    return data.Source(train, test, list(DIGITS), 1, size, augment.digit_views(*recipe), augment.plain_digit(),
                       augment.raw_digit(), partial(augment.device_digit_views, *recipe))


class PhotoCrops(data.MemoryPictures):
    """Squares cut from scikit-learn's two photographs, each of whose `tiles` is a class: uint8 [3, size, size].

    Natural colours and textures that come with a package. Training and test pictures show the same tiles, at other
    places and sizes.
    """

    def __init__(self, size=32, each=150, seed=0, tiles=PHOTO_TILES):
        from sklearn.datasets import load_sample_images

        draws, pictures, labels = np.random.default_rng(seed), [], []
        rows, columns = tiles
        for photo in load_sample_images().images:
            high, wide = photo.shape[0] // rows, photo.shape[1] // columns
            for tile in range(rows * columns):
                corner = tile // columns * high, tile % columns * wide
                labels += [labels[-1] + 1 if labels else 0] * each
                pictures += [self._cut(photo, corner, (high, wide), size, draws) for _ in range(each)]
        super().__init__(torch.stack(pictures), torch.tensor(labels), "photo crop")

    @staticmethod
    def _cut(photo, corner, tile, size, draws):
        smallest, largest = (round(share * min(tile)) for share in PHOTO_CROPS)
        side = draws.integers(smallest, largest + 1)
        top, left = (start + draws.integers(room - side + 1) for start, room in zip(corner, tile))
        square = torch.from_numpy(photo[top : top + side, left : left + side].copy()).permute(2, 0, 1)
        return v2.functional.resize(square, [size, size], antialias=True)


def photo_source(size=32, strength=1.0, crop=None, tiles=PHOTO_TILES):
    """`PhotoCrops` of both photographs, as many pictures of each tile."""
    classes = 2 * tiles[0] * tiles[1]
    train, test = (PhotoCrops(size, count // classes, seed, tiles) for seed, count in enumerate(PHOTO_PICTURES))
    return data.photo_source(train, test, [f"tile {label}" for label in range(classes)], size, strength, crop=crop)
