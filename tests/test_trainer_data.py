"""Data of the trainer of examples/: pictures, their transforms, and how they are dealt out in batches."""

from __future__ import annotations

import pytest
import torch
from trainer_cases import one_thread, picture_folder  # noqa: F401

from simclr import augment, batches, data
from torch.utils.data._utils.pin_memory import pin_memory

# length, batch, world; of some, an epoch has less than two batches
DEALT = [(50, 16, 3), (50, 50, 1), (7, 3, 2), (100, 64, 4), (10, 9, 1), (64, 16, 5), (13, 1, 1), (5, 4, 2), (37, 12, 6)]


def dealt(length, batch, epochs=6, seed=0, **rest):
    return list(batches.EpochBatches(length, batch, batches.steps_of(epochs, length, batch), seed, **rest))


# Batches


@pytest.mark.parametrize("length, batch, _world", DEALT)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_epoch_has_every_picture_once(length, batch, _world, seed):
    whole = dealt(length, batch, seed=seed)
    assert all(len({index for _, index in keys}) == len(keys) == batch for keys in whole)
    stream = sum(whole, [])
    assert 6 * length <= len(stream) < 6 * length + batch
    for epoch in range(6):
        part = stream[epoch * length : (epoch + 1) * length]
        assert {key[0] for key in part} == {epoch}
        assert sorted(index for _, index in part) == list(range(length))


@pytest.mark.parametrize("length, batch, world", DEALT)
def test_ranks_share_every_batch(length, batch, world):
    whole = dealt(length, batch)
    ranks = [dealt(length, batch, rank=rank, world=world) for rank in range(world)]
    assert [sum(shares, []) for shares in zip(*ranks, strict=True)] == whole
    sizes = {len(share) for share in zip(*ranks) for share in share}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("length, batch, world", DEALT)
def test_going_on_is_going_there(length, batch, world):
    whole = dealt(length, batch, rank=world - 1, world=world)
    for done in range(len(whole) + 1):
        rest = batches.EpochBatches(length, batch, len(whole), 0, world - 1, world, done)
        assert len(rest) == len(whole) - done and list(rest) == whole[done:], done


def test_orders_differ_from_epoch_to_epoch_and_by_seed():
    first, second = ([index for keys in dealt(60, 20, 1, seed) for _, index in keys] for seed in (0, 1))
    both = [index for keys in dealt(60, 20, 2) for _, index in keys]
    assert both[:60] == first and len({tuple(order) for order in (first, second, both[60:], range(60))}) == 4


def test_going_on_late_draws_few_orders(monkeypatch):
    drawn, permutation = [], batches.EpochBatches._permutation
    monkeypatch.setattr(batches.EpochBatches, "_permutation",
                        lambda self, epoch: drawn.append(epoch) or permutation(self, epoch))
    steps = batches.steps_of(100, 1000, 64)
    assert len(list(batches.EpochBatches(1000, 64, steps, 0, done=steps - 1))) == 1
    assert drawn == [98, 99, 100]


@pytest.mark.parametrize("batch", [0, 11])
def test_a_batch_has_no_more_pictures_than_there_are(batch):
    with pytest.raises(ValueError, match=f"EpochBatches: expected batch from 1 to length, 10, got {batch}"):
        batches.EpochBatches(10, batch, 1, 0)


@pytest.mark.parametrize("epochs, length, batch, steps", [(1, 10, 5, 2), (1, 11, 5, 3), (3, 7, 5, 5)])
def test_steps_of_whole_epochs(epochs, length, batch, steps):
    assert batches.steps_of(epochs, length, batch) == steps


# Loaders


class Few:
    """Six pictures of which the third cannot be read; each is its index and the reading process' threads."""

    labels = torch.arange(6)

    def __len__(self):
        return 6

    def name(self, index):
        return f"picture {index}"

    def read(self, index):
        return None if index == 2 else torch.tensor([[[float(index), torch.get_num_threads()]]])


def few():
    return data.Source(Few(), Few(), ["any"], 1, 2, views=lambda picture: picture + torch.rand(()),
                       plain=lambda picture: picture, raw=lambda picture: picture.to(torch.uint8))


@pytest.mark.parametrize("views", [1, 2, 3])
def test_a_batch_is_views_index_and_names(views):
    source, keys = few(), batches.EpochBatches(6, 4, 3, seed=0)
    for batch, wanted in zip(batches.train_loader(source, keys, 0, workers=0, views=views), keys, strict=True):
        indices = [index for _, index in wanted if index != 2]
        assert batch.index.dtype == torch.int64 and batch.index.tolist() == indices
        assert batch.unreadable == ["picture 2"] * (len(wanted) - len(indices))
        assert len(batch.views) == views and len({tuple(view.flatten().tolist()) for view in batch.views}) == views
        for view in batch.views:
            assert view.shape == (len(indices), 1, 1, 2) and view[:, 0, 0, 0].long().tolist() == indices


def test_workers_change_nothing_and_have_one_thread():
    torch.set_num_threads(2)
    source, keys = few(), batches.EpochBatches(6, 4, 3, seed=0)
    alone, beside = (list(batches.train_loader(source, keys, 5, workers)) for workers in (0, 2))
    for own, theirs in zip(alone, beside, strict=True):
        assert torch.equal(own.index, theirs.index) and own.unreadable == theirs.unreadable
        for view, other in zip(own.views, theirs.views, strict=True):
            assert torch.equal(view[..., 0], other[..., 0])
            assert (view[..., 1].floor() == 2).all() and (other[..., 1].floor() == 1).all()


def test_raw_pictures_come_once():
    (batch,) = batches.train_loader(few(), batches.EpochBatches(6, 6, 1, seed=0), 0, workers=0, on_device=True)
    assert len(batch.views) == 1 and batch.views[0].dtype == torch.uint8
    assert batch.views[0][:, 0, 0, 0].tolist() == batch.index.tolist()


def test_a_batch_without_a_single_picture():
    batch = batches.collate(["one", "two"])
    assert batch.views == [] and batch.index.shape == (0,) and batch.unreadable == ["one", "two"]


def test_pinning_reaches_every_tensor(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    pinned = pin_memory(batches.Batch([torch.zeros(2, 1), torch.ones(2, 1)], torch.tensor([4, 5]), ["a"]))
    assert [view.tolist() for view in pinned.views] == [[[1], [1]], [[2], [2]]]
    assert pinned.index.tolist() == [5, 6] and pinned.unreadable == ["a"]


@pytest.mark.gpu(reason="pins memory")
def test_loaders_pin():
    (batch,) = batches.train_loader(few(), batches.EpochBatches(6, 6, 1, seed=0), 0, workers=1, pin=True)
    assert batch.index.is_pinned() and all(view.is_pinned() for view in batch.views)


def test_plain_pictures_come_in_order_as_triples():
    triples = list(batches.plain_loader(Few(), lambda picture: picture, 2, workers=0))
    assert [index.tolist() for _, index, _ in triples] == [[0, 1], [3], [4, 5]]
    assert [pictures[:, 0, 0, 0].tolist() for pictures, _, _ in triples] == [[0, 1], [3], [4, 5]]
    assert [unreadable for _, _, unreadable in triples] == [[], ["picture 2"], []]
    (_, _, nothing, *_) = batches.plain_loader(Few(), lambda picture: picture, 1, workers=0)
    assert nothing == (None, None, ["picture 2"])


def test_views_depend_on_seed_epoch_and_index_alone():
    source = data.open_data("digits")
    views = batches.RandomViews(source.train, source.views, seed=3)
    before = torch.random.get_rng_state()
    (first, second), index = views[2, 7]
    assert torch.equal(before, torch.random.get_rng_state())
    assert index == 7 and first.shape == (1, 48, 48) and 0 <= first.min() and first.max() <= 1
    assert not torch.equal(first, second)
    torch.rand(5)
    assert torch.equal(first, views[2, 7][0][0])
    assert not torch.equal(first, views[3, 7][0][0])
    assert not torch.equal(first, batches.RandomViews(source.train, source.views, seed=4)[2, 7][0][0])


# Digits


def test_digits_lie_whole_on_a_dark_canvas():
    images = torch.arange(1, 65).reshape(1, 8, 8).expand(50, 8, 8) % 17
    placed = data.place_digits(images, canvas=48, size=20)
    again = data.place_digits(images, canvas=48, size=20)
    assert placed.shape == (50, 1, 48, 48) and placed.dtype == torch.uint8
    assert torch.equal(placed, again)
    assert not torch.equal(placed, data.place_digits(images, canvas=48, size=20, seed=1))
    totals = placed.flatten(1).long().sum(1)
    assert (totals == totals[0]).all(), "a digit was cut off"
    corners = {tuple((picture[0] > 0).nonzero().min(0).values.tolist()) for picture in placed}
    assert len(corners) > 40, "the places are not random"


def test_digits_source_is_split_by_class():
    source = data.open_data("digits")
    assert len(source.train) + len(source.test) == 1797
    counts = source.test.labels.bincount() / (source.train.labels.bincount() + source.test.labels.bincount())
    assert ((counts - 0.2).abs() < 0.01).all()
    assert torch.equal(source.train.pictures, data.open_data("digits").train.pictures)
    assert torch.equal(source.raw(source.train.read(3)), source.train.pictures[3])


def test_stratified_split_keeps_one_of_a_pair():
    train, test = data.stratified_split(torch.tensor([0, 0, 1, 1, 1, 2]))
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(6))
    assert torch.tensor([0, 0, 1, 1, 1, 2])[test].tolist() == [0, 1]


# Synthetic pictures


def test_synthetic_pictures_are_made_from_their_index():
    source, again = data.open_data("synthetic"), data.open_data("synthetic")
    assert (len(source.train), len(source.test), len(source.classes), source.image_size) == (4096, 1024, 10, 224)
    assert source.train.labels.bincount().min() >= 409 and source.test.labels.bincount().min() >= 102
    picture = source.train.read(7)
    assert picture.dtype == torch.uint8 and picture.shape == (3, 224, 224) and picture.float().std() > 5
    assert torch.equal(picture, again.train.read(7))
    for other in (source.train.read(8), source.train.read(17), source.test.read(7)):
        assert not torch.equal(picture, other)
    small = data.open_data("synthetic", image_size=32)
    assert small.train.read(7).shape == small.views(small.train.read(7)).shape == (3, 32, 32)


def stripes(picture):
    """How strong each pair of frequencies is, of the brightness: the spectrum without its phases."""
    grey = picture.float().mean(0)
    spectrum = torch.fft.rfft2(grey - grey.mean()).abs()
    return spectrum / spectrum.norm()


def test_synthetic_classes_have_structures_of_their_own():
    """The spectra of a class are alike, and those of two classes are not: whatever the colours and the phases."""
    pictures = data.SyntheticPictures(60, 64, split=0)
    spectra = torch.stack([stripes(pictures.read(index)).flatten() for index in range(60)])
    similar = spectra @ spectra.T
    same = pictures.labels[:, None] == pictures.labels
    nearest = (similar - 2 * torch.eye(60)).argmax(1)
    assert (pictures.labels[nearest] == pictures.labels).float().mean() > 0.9
    assert similar[same].mean() > similar[~same].mean() + 0.3


# Folders


def test_photo_views_and_plain_pictures(tmp_path):
    folder = picture_folder(tmp_path / "data", side=120, kind="jpg")
    source = data.open_data(str(folder))
    assert (source.image_size, source.channels, source.classes) == (224, 3, ["cat", "dog"])
    (first, _), _ = batches.RandomViews(source.train, source.views, 0)[0, 0]
    assert first.shape == source.plain(source.train.read(0)).shape == (3, 224, 224)
    assert first.dtype == torch.float32 and 0 <= first.min() and first.max() <= 1
    raw = source.raw(source.train.read(0))
    assert raw.dtype == torch.uint8 and raw.shape == (3, 256, 256)
    assert augment.photo_views(32)(source.train.read(0)).shape == (3, 32, 32)


def test_train_and_val_folders_are_the_splits(tmp_path):
    picture_folder(tmp_path / "train", each=5)
    picture_folder(tmp_path / "val", each=3)
    source = data.open_data(str(tmp_path))
    assert (len(source.train), len(source.test), source.image_size) == (10, 6, 32)


def test_names_are_paths_and_what_cannot_be_read_is_none(tmp_path):
    folder = picture_folder(tmp_path / "daté", each=5)
    good, bad = sorted(folder.rglob("*.png"))[:2]
    bad.write_bytes(bad.read_bytes()[:200])
    pictures = data.FilePictures([(str(good), 0), (str(bad), 1), (str(tmp_path / "missing.png"), 1)])
    assert [pictures.name(index) for index in range(2)] == [str(good), str(bad)] and len(pictures) == 3
    assert pictures.read(0).size == (32, 32) and pictures.read(1) is pictures.read(2) is None
