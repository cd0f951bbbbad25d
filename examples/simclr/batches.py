"""Pictures dealt out in batches of random views, every picture once an epoch.

The randomness of a view is a function of (seed, epoch, index) and nothing else, so a run does not depend on the number
of worker processes or on which of them handled a picture. Pictures that cannot be read are left out of their batch
and named there.
"""

import contextlib
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

PREFETCH = 4  # batches that each worker prepares ahead: what evens out pictures that take long to read
AHEAD = 4 << 30  # bytes that all workers of a process may prepare ahead, in memory that they share with it


@dataclass
class Batch:
    """What the training loop gets: `views[v][i]` is view v of the picture `index[i]`.

    Where not a single picture could be read there are no views, and `index` is empty.
    """

    views: list  # of tensors [n, C, H, W], one a view
    index: torch.Tensor  # int64 [n], the pictures' places in the data set
    unreadable: list  # names of pictures

    def pin_memory(self):
        return Batch([view.pin_memory() for view in self.views], self.index.pin_memory(), self.unreadable)


def seed_of(*parts):
    """One 64-bit seed out of several small numbers, so that neighbours do not get related streams."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


@contextlib.contextmanager
def drawing_from(seed):
    """Transforms draw from the global generator: inside, from one that begins at `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class RandomViews(Dataset):
    """`count` views of a picture and its index, by the key (epoch, index); its name where it cannot be read.

    With `seed` None the transform draws nothing: to seed a generator takes as long as to look at a small picture.
    """

    def __init__(self, pictures, transform, seed, count=2):
        self.pictures, self.transform, self.seed, self.count = pictures, transform, seed, count

    def __getitem__(self, key):
        epoch, index = key
        picture = self.pictures.read(index)
        if picture is None:
            return self.pictures.name(index)
        if self.seed is None:
            return [self.transform(picture)] * self.count, index
        with drawing_from(seed_of(self.seed, epoch, index)):
            return [self.transform(picture) for _ in range(self.count)], index


class PlainPictures(Dataset):
    """A picture without augmentation and its index; the picture's name where it cannot be read."""

    def __init__(self, pictures, transform):
        self.pictures, self.transform = pictures, transform

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        picture = self.pictures.read(index)
        if picture is None:
            return self.pictures.name(index)
        return [self.transform(picture)], index


def collate(samples):
    """A Batch of what could be read."""
    unreadable = [sample for sample in samples if isinstance(sample, str)]
    read = [sample for sample in samples if not isinstance(sample, str)]
    views = [torch.stack(view) for view in zip(*(views for views, _ in read))]
    return Batch(views, torch.tensor([index for _, index in read], dtype=torch.int64), unreadable)


def collate_plain(samples):
    """(pictures, index, names of those that could not be read); None, None where not one could."""
    batch = collate(samples)
    return (batch.views[0], batch.index, batch.unreadable) if batch.views else (None, None, batch.unreadable)


class EpochBatches(Sampler):
    """`steps` batches of (epoch, index) keys for one rank, less the first `done` ones.

    `batch` counts the pictures of all ranks: every rank gets its own contiguous share of each batch. The epochs' orders
    follow one another without a gap and are cut into batches of exactly `batch` pictures, so that every epoch has
    every picture once, and a batch may have the last pictures of one epoch and the first ones of the next. All of
    them are different: what the next order would repeat comes later in it.
    """

    def __init__(self, length, batch, steps, seed, rank=0, world=1, done=0):
        if not 1 <= batch <= length:
            raise ValueError(f"EpochBatches: expected batch from 1 to length, {length}, got {batch}")
        self.length, self.batch, self.steps, self.seed, self.done = length, batch, steps, seed, done
        self.share = slice(rank * batch // world, (rank + 1) * batch // world)

    def __len__(self):
        return self.steps - self.done

    def __iter__(self):
        first, place = divmod(self.done * self.batch, self.length)
        orders = self._orders(first)
        epoch, order = next(orders)
        for _ in range(self.done, self.steps):
            keys = [(epoch, index) for index in order[place : place + self.batch].tolist()]
            place += self.batch
            if place >= self.length:  # on to the next epoch, whose first pictures fill this batch
                place -= self.length
                epoch, order = next(orders)
                keys += [(epoch, index) for index in order[:place].tolist()]
            yield keys[self.share]

    def _orders(self, first):
        """(epoch, order) from the epoch `first` on."""
        # A batch across two epochs moves none but the first `batch` pictures of the later one. With two batches an
        # epoch or more, the end of an order is therefore known without the orders before it.
        epoch = max(0, first - 1) if self.length >= 2 * self.batch else 0
        begun = torch.empty(0, dtype=torch.int64)  # the last pictures of an epoch, in a batch that the next one fills
        while True:
            order = self._permutation(epoch)
            head, tail = order[: self.batch], order[self.batch :]
            known = torch.zeros(self.length, dtype=torch.bool)
            known[begun] = True
            again = known[head]
            order = torch.cat([head[~again], head[again], tail])
            if epoch >= first:
                yield epoch, order
            epoch += 1
            begun = order[self.length - epoch * self.length % self.batch :]

    def _permutation(self, epoch):
        # The index after the last belongs to no picture, so no view has the same seed.
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, self.length))
        return torch.randperm(self.length, generator=generator)


def steps_of(epochs, length, batch):
    """Batches until every picture had its `epochs` turns; the last batch goes on into the epoch after them."""
    return -(-epochs * length // batch)


def _group_of_its_own(_worker):
    """A terminal's Ctrl-C and torchrun's SIGTERM go to the whole group of processes: they are for the main one, which
    ends its workers itself."""
    os.setpgrp()


def _loader(dataset, workers, pin, batch_bytes=0, **options):
    """Each worker computes with one thread, by the loader's own doing: pools of several would fight over the cores."""
    if workers:
        fits = AHEAD // (workers * max(batch_bytes, 1))
        options |= dict(persistent_workers=True, prefetch_factor=max(1, min(PREFETCH, fits)),
                        worker_init_fn=_group_of_its_own)
    # A loader draws a seed for its workers: from here, so that the draws of a loss do not depend on the loaders.
    return DataLoader(dataset, num_workers=workers, pin_memory=pin, generator=torch.Generator(), **options)


def train_loader(source, batches, seed, workers, pin=False, views=2, on_device=False):
    """Batches of `views` random views of each picture; with `on_device`, of the raw pictures alone.

    Raw pictures are uint8, as `source.raw` makes them, one view of each: the module that `source.device_views()` builds
    makes random views of such a batch on its device, one more at every call.
    """
    transform, count, seed = (source.raw, 1, None) if on_device else (source.views, views, seed)
    pictures = batches.share.stop - batches.share.start
    size = pictures * count * source.channels * source.image_size**2 * 4  # of floats, the larger kind
    return _loader(RandomViews(source.train, transform, seed, count), workers, pin, size, batch_sampler=batches,
                   collate_fn=collate)


def plain_loader(pictures, transform, batch, workers, pin=False, rank=0, world=1):
    """(pictures, index, unreadable) triples of this rank's share of the split, in order."""
    return _loader(PlainPictures(pictures, transform), workers, pin, batch_size=batch, collate_fn=collate_plain,
                   sampler=range(rank, len(pictures), world))
