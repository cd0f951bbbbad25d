"""Pictures on disk or the built-in digits, as two splits and as batches of two augmented views.

The randomness of a view is a function of (seed, epoch, index) and nothing else, so a run does not depend on
the number of worker processes or on which of them handled a picture. Pictures that cannot be read are left
out of their batch and named there.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from . import augment
from .errors import UsageError
from .torchvision_compat import torchvision  # noqa: F401  (must come before torchvision.datasets)

from torchvision.datasets import ImageFolder

EXPECTED = (
    "expected `digits` or a folder with one sub-folder of PNG or JPEG pictures per class (or train/ and val/ like that)"
)
TEST_SHARE = 0.2  # of each class, where the data comes without a split of its own
SPLIT_SEED = 0  # the split and the digits' places belong to the data set: the same for every --seed
CANVAS, DIGIT = 48, 20  # pixels: side of the dark canvas, side of the digit on it


class DigitPictures:
    """Digits in memory: `read(i)` gives uint8 [1, CANVAS, CANVAS]."""

    def __init__(self, pictures, labels):
        self.pictures, self.labels = pictures, labels

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"digit {index}"

    def read(self, index):
        return self.pictures[index]


class FilePictures:
    """Pictures on disk: `read(i)` gives an RGB PIL picture, or None for a file that cannot be read."""

    def __init__(self, samples):
        self.paths = [path for path, _ in samples]
        self.labels = torch.tensor([label for _, label in samples])

    def __len__(self):
        return len(self.paths)

    def name(self, index):
        return self.paths[index]

    def read(self, index):
        try:
            with Image.open(self.paths[index]) as picture:
                return picture.convert("RGB")
        except Exception:  # Pillow's decoders raise whatever their parser met: OSError, SyntaxError, zlib.error, ...
            return None


@dataclass
class Source:
    """What the trainer needs to know about its data; `views` and `plain` are transforms of one picture."""

    train: object
    test: object
    classes: list
    channels: int
    image_size: int
    views: object
    plain: object


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


def open_digits(image_size=None):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pictures, labels = place_digits(bunch.images), torch.as_tensor(bunch.target)
    train, test = (DigitPictures(pictures[part], labels[part]) for part in stratified_split(labels))
    size = image_size or CANVAS
    if size != CANVAS:
        raise UsageError(f"--image-size: digits are {CANVAS} pixels wide, got {size}")
    return Source(train, test, list("0123456789"), 1, size, augment.digit_views(size), augment.plain_digit())


def _samples(folder):
    """(path, label) pairs and class names of one ImageFolder tree."""
    try:
        tree = ImageFolder(folder, allow_empty=True)
    except OSError as error:
        raise UsageError(f"{folder}: {EXPECTED}, got {str(error).splitlines()[0]}") from None
    if not tree.samples:
        raise UsageError(f"{folder}: {EXPECTED}, got no picture in its {len(tree.classes)} sub-folders")
    return tree.samples, tree.classes


def open_folder(folder, image_size=None, strength=1.0):
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
    size = image_size or natural
    return Source(train, test, classes, 3, size, augment.photo_views(size, strength, blur=size > 96),
                  augment.plain_photo(size))


def _natural_size(pictures):
    """The side of small pictures (up to 96 pixels), 224 for larger ones, judged by the first one readable."""
    for index in range(min(len(pictures), 16)):
        picture = pictures.read(index)
        if picture is not None:
            side = min(picture.size)
            return max(side, 16) if side <= 96 else 224
    raise UsageError(f"{pictures.name(0)}: expected pictures that can be read, got none among the first {index + 1}")


def open_data(data, image_size=None, strength=1.0):
    """The data set named on the command line; UsageError says in one line what is wrong with it."""
    return open_digits(image_size) if data == "digits" else open_folder(data, image_size, strength)


def view_seed(*parts):
    """One 64-bit seed out of several small numbers, so that neighbours do not get related streams."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


class TwoViews(Dataset):
    """Two views of a picture, by the key (epoch, index); the picture's name where it cannot be read."""

    def __init__(self, pictures, transform, seed):
        self.pictures, self.transform, self.seed = pictures, transform, seed

    def __getitem__(self, key):
        epoch, index = key
        picture = self.pictures.read(index)
        if picture is None:
            return self.pictures.name(index)
        with torch.random.fork_rng(devices=[]):  # the transforms draw from the global generator
            torch.default_generator.manual_seed(view_seed(self.seed, epoch, index))
            return self.transform(picture), self.transform(picture)


class Plain(Dataset):
    """(picture, its index) without augmentation; the picture's name where it cannot be read."""

    def __init__(self, pictures, transform):
        self.pictures, self.transform = pictures, transform

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        picture = self.pictures.read(index)
        if picture is None:
            return self.pictures.name(index)
        return self.transform(picture), torch.tensor(index)


def collate(samples):
    """Stack what could be read: (first, second, names of what could not); None, None where nothing could."""
    unreadable = [sample for sample in samples if isinstance(sample, str)]
    pairs = [sample for sample in samples if not isinstance(sample, str)]
    first, second = (torch.stack(parts) for parts in zip(*pairs)) if pairs else (None, None)
    return first, second, unreadable


class EpochBatches(Sampler):
    """`steps` batches of (epoch, index) keys for one rank, less the first `done` ones; each epoch a fresh order, its
    incomplete batch dropped.

    `batch` counts the pictures of all ranks: every rank gets its own contiguous share of each batch.
    """

    def __init__(self, length, batch, steps, seed, rank=0, world=1, done=0):
        self.length, self.batch, self.steps, self.seed, self.done = length, batch, steps, seed, done
        self.share = slice(rank * batch // world, (rank + 1) * batch // world)

    def __len__(self):
        return self.steps - self.done

    def __iter__(self):
        per_epoch = self.length // self.batch
        order = None
        for step in range(self.done, self.steps):
            epoch, position = divmod(step, per_epoch)
            if position == 0 or order is None:
                generator = torch.Generator().manual_seed(view_seed(self.seed, epoch))
                order = torch.randperm(self.length, generator=generator)
            batch = order[position * self.batch : (position + 1) * self.batch]
            yield [(epoch, index) for index in batch[self.share].tolist()]


def _one_thread(_worker):
    torch.set_num_threads(1)  # one core per worker process: the pools of several would fight over the cores


def _own_stream():
    """A loader draws a seed for its workers: from here, so that the draws of a loss do not depend on the loaders."""
    return torch.Generator()


def train_loader(source, batches, seed, workers, pin):
    return DataLoader(TwoViews(source.train, source.views, seed), batch_sampler=batches, num_workers=workers,
                      collate_fn=collate, pin_memory=pin, worker_init_fn=_one_thread, generator=_own_stream())


def plain_loader(pictures, transform, batch, workers):
    return DataLoader(Plain(pictures, transform), batch_size=batch, num_workers=workers, collate_fn=collate,
                      worker_init_fn=_one_thread, generator=_own_stream())
