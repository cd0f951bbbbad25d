"""Pictures on disk, the built-in digits or synthetic ones: two splits, and the transforms that go with them.

A split has a length, `labels`, `read(index)`, which gives a PIL picture or a uint8 tensor [C, H, W], or None where it
cannot be read, and `name(index)`, by which a log can call it.
"""

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from . import augment
from .errors import UsageError
from .torchvision_compat import torchvision  # noqa: F401  (must come before torchvision.datasets)

from torchvision.datasets import ImageFolder

EXPECTED = (
    "expected `digits`, `synthetic` or a folder with one sub-folder of PNG or JPEG pictures per class (or train/ and "
    "val/ like that)"
)
TEST_SHARE = 0.2  # of each class, where the data comes without a split of its own
SPLIT_SEED = 0  # the split and the digits' places belong to the data set: the same for every --seed
CANVAS, DIGIT = 48, 20  # pixels: side of the dark canvas, side of the digit on it
SYNTHETIC_TRAIN, SYNTHETIC_TEST, SYNTHETIC_CLASSES = 4096, 1024, 10
STRIPES, NOISE = 8, 32  # across a synthetic picture; brightest grain on it, of 255


class MemoryPictures:
    """`pictures` in memory, uint8 [n, C, H, W], each called by its `kind` and number: `read(i)` gives [C, H, W]."""

    def __init__(self, pictures, labels, kind="digit"):
        self.pictures, self.labels, self.kind = pictures, labels, kind

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"{self.kind} {index}"

    def read(self, index):
        return self.pictures[index]


class FilePictures:
    """Pictures on disk: `read(i)` gives an RGB PIL picture, or None for a file that cannot be read."""

    def __init__(self, samples):
        # One array: of a list of strings every worker process gets a copy sooner or later, because reading an object
        # writes its reference count. Of ImageNet's paths that is 150 MB a worker.
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.labels = torch.tensor([label for _, label in samples])

    def __len__(self):
        return len(self.paths)

    def name(self, index):
        return os.fsdecode(self.paths[index])

    def read(self, index):
        try:
            with Image.open(self.name(index)) as picture:
                return picture.convert("RGB")
        except Exception:  # Pillow's decoders raise whatever their parser met: OSError, SyntaxError, zlib.error, ...
            return None


class SyntheticPictures:
    """Pictures drawn from their index: `read(i)` gives uint8 [3, size, size], at 224 pixels in a millisecond.

    Stripes in two random colours under noise. The class is the stripes' direction, one of five, and whether finer ones
    cross them: neither mirroring nor other colours change it, and a crop changes it little.
    """

    def __init__(self, length, size, split):
        self.size, self.split = size, split
        self.labels = torch.arange(length) % SYNTHETIC_CLASSES

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"synthetic picture {index}"

    def read(self, index):
        draws = np.random.default_rng((self.split, index))
        crossed, direction = divmod(index % SYNTHETIC_CLASSES, 5)
        angle = direction * math.pi / 8
        wave = self._stripes(angle, STRIPES, draws)
        if crossed:
            wave = (wave + self._stripes(angle + math.pi / 2, 3 * STRIPES, draws)) / 2
        dark, light = np.sort(draws.uniform(0, 255 - NOISE, (2, 3, 1, 1)), axis=0).astype(np.float32)
        picture = dark + (light - dark) * (wave + 1) / 2
        return torch.from_numpy(picture.astype(np.uint8) + draws.integers(0, NOISE, picture.shape, dtype=np.uint8))

    def _stripes(self, angle, count, draws):
        """A sine of random phase along `angle`, `count` periods to the side of the picture: [size, size]."""
        steps = np.arange(self.size, dtype=np.float32) * np.float32(2 * math.pi * count / self.size)
        phase = np.float32(draws.uniform(0, 2 * math.pi))
        return np.sin(np.add.outer(steps * np.float32(math.sin(angle)), steps * np.float32(math.cos(angle)) + phase))


@dataclass
class Source:
    """What the trainer needs to know about its data.

    `views` makes one random view of a picture and `plain` the same one always, float [channels, image_size, image_size]
    in 0..1. For views made on a device instead, `raw` gives uint8 pictures of one size, and `device_views()` builds the
    module that makes views [n, channels, image_size, image_size] of a batch of them.
    """

    train: object
    test: object
    classes: list
    channels: int
    image_size: int
    views: object
    plain: object
    raw: object = None
    device_views: object = None


def place_digits(images, canvas=CANVAS, size=DIGIT, seed=SPLIT_SEED):
    """Enlarge `images` [n, 8, 8] (0..16) and put each at a random place: uint8 [n, 1, canvas, canvas]."""
    digits = torch.as_tensor(images, dtype=torch.float32)[:, None] * (255 / 16)
    digits = F.interpolate(digits, (size, size), mode="bilinear", align_corners=False).round().to(torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(canvas - size + 1, (len(digits), 2), generator=generator).tolist()
    placed = torch.zeros(len(digits), 1, canvas, canvas, dtype=torch.uint8)
    for picture, digit, (top, left) in zip(placed, digits, corners):
        picture[:, top : top + size, left : left + size] = digit
    return placed


def stratified_split(labels, share=TEST_SHARE, seed=SPLIT_SEED):
    """Indices (train, test), with `share` of each class in test: at least one picture of a class that has two."""
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        held_out = min(max(1, round(share * len(members))), len(members) - 1)
        test.append(members[:held_out])
        train.append(members[held_out:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def open_digits(image_size=None, crop=None):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pictures, labels = place_digits(bunch.images), torch.as_tensor(bunch.target)
    train, test = (MemoryPictures(pictures[part], labels[part]) for part in stratified_split(labels))
    size = image_size or CANVAS
    if size != CANVAS:
        raise UsageError(f"--image-size: digits are {CANVAS} pixels wide, got {size}")
    recipe = (size, crop or augment.DIGIT_CROP)
    return Source(train, test, list("0123456789"), 1, size, augment.digit_views(*recipe), augment.plain_digit(),
                  augment.raw_digit(), partial(augment.device_digit_views, *recipe))


def open_synthetic(image_size=None, strength=1.0, blur=None, crop=None):
    size = image_size or 224
    train = SyntheticPictures(SYNTHETIC_TRAIN, size, split=0)
    test = SyntheticPictures(SYNTHETIC_TEST, size, split=1)
    classes = [f"{'plaid' if label >= 5 else 'stripes'} {label % 5 * 22.5:g}" for label in range(SYNTHETIC_CLASSES)]
    return photo_source(train, test, classes, size, strength, blur, crop)


def _samples(folder):
    """(path, label) pairs and class names of one ImageFolder tree."""
    try:
        tree = ImageFolder(folder, allow_empty=True)
    except OSError as error:
        raise UsageError(f"{folder}: {EXPECTED}, got {str(error).splitlines()[0]}") from None
    if not tree.samples:
        raise UsageError(f"{folder}: {EXPECTED}, got no picture in its {len(tree.classes)} sub-folders")
    return tree.samples, tree.classes


def open_folder(folder, image_size=None, strength=1.0, blur=None, crop=None):
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"{folder}: {EXPECTED}, got {'a file' if root.exists() else 'nothing at that path'}")
    if (root / "train").is_dir() and (root / "val").is_dir():
        samples, classes = _samples(root / "train")
        test_samples, test_classes = _samples(root / "val")
        if classes != test_classes:
            raise UsageError(f"{folder}: expected the same classes in train/ and val/, got {len(classes)} and "
                             f"{len(test_classes)} of which {len(set(classes) & set(test_classes))} are in both")
        train, test = FilePictures(samples), FilePictures(test_samples)
    else:
        samples, classes = _samples(root)
        labels = torch.tensor([label for _, label in samples])
        train, test = (FilePictures([samples[i] for i in part.tolist()]) for part in stratified_split(labels))
    natural = _natural_size(train)  # also with --image-size: it makes sure that there is something to read
    return photo_source(train, test, classes, image_size or natural, strength, blur, crop)


def _natural_size(pictures):
    """The side of small pictures (up to 96 pixels), 224 for larger ones, judged by the first one readable."""
    for index in range(min(len(pictures), 16)):
        picture = pictures.read(index)
        if picture is not None:
            side = min(picture.size)
            return max(side, 16) if side <= augment.SMALL else 224
    raise UsageError(f"{pictures.name(0)}: expected pictures that can be read, got none among the first {index + 1}")


def photo_source(train, test, classes, size, strength=1.0, blur=None, crop=None):
    """A Source of colour pictures; `blur` None is SimCLR's choice, none for small pictures."""
    if not 0 <= strength <= augment.STRONGEST:
        raise UsageError(f"--strength: expected 0 to {augment.STRONGEST}, got {strength:g}")
    recipe = (size, strength, size > augment.SMALL if blur is None else blur, crop or augment.CROP)
    return Source(train, test, classes, 3, size, augment.photo_views(*recipe), augment.plain_photo(size),
                  augment.raw_photo(size), partial(augment.device_views, *recipe))


def open_data(data, image_size=None, strength=1.0, blur=None, crop=None):
    """The data set named on the command line; UsageError says in one line what is wrong with it."""
    if data == "digits":
        return open_digits(image_size, crop)
    if data == "synthetic":
        return open_synthetic(image_size, strength, blur, crop)
    return open_folder(data, image_size, strength, blur, crop)
