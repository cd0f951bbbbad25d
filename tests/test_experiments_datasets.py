"""The pictures that the experiments construct: where digits lie, how bright they are, bits beside pictures, seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from trainer_cases import one_thread, picture_folder  # noqa: F401  (a fixture of every test)

from experiments import datasets
from experiments.datasets import DigitOnImage, MultiDigits, RandBit
from simclr import batches, data
from simclr.errors import UsageError


def blocks(count=10, side=8):
    """(pictures, labels): digit i is a square of one brightness, 20 + 20 i, and of class i: nothing in it is black."""
    values = 20 + 20 * torch.arange(count, dtype=torch.uint8)
    return values[:, None, None].expand(-1, side, side).clone(), torch.arange(count) % 10


def box(picture):
    """(top, left, height, width) of what is not black in [1, h, w]."""
    rows, columns = picture[0].any(1).nonzero().flatten(), picture[0].any(0).nonzero().flatten()
    return int(rows[0]), int(columns[0]), int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1


# --- digits ---


def test_scikit_learns_digits_are_stretched_to_white_and_split_by_class():
    from sklearn.datasets import load_digits

    digits = datasets.load_digits()
    assert (len(digits.train), len(digits.test)) == (len(digits.train_labels), len(digits.test_labels))
    assert len(digits.train) + len(digits.test) == 1797
    assert digits.train.dtype == torch.uint8 and digits.train.shape[1:] == (8, 8)
    assert int(digits.train.max()) == 255 and int(digits.train.min()) == 0
    for labels, share in ((digits.train_labels, 0.8), (digits.test_labels, 0.2)):
        assert torch.bincount(labels, minlength=10).float().div(178).sub(share).abs().max() < 0.03
    # A picture of either split is one of scikit-learn's, with its label, and none is in both.
    bunch = load_digits()
    known = {np.round(image * (255 / 16)).astype(np.uint8).tobytes(): label
             for image, label in zip(bunch.images, bunch.target)}
    for pictures, labels in (digits[:2], digits[2:]):
        assert all(known[picture.numpy().tobytes()] == label for picture, label in zip(pictures, labels.tolist()))


def test_a_folder_of_digits_is_read_in_grey_at_one_size_without_what_is_broken(tmp_path):
    for split, brightness in (("train", 10), ("val", 100)):
        for label in ("0", "1"):
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(3):
                grey = np.full((20 + 4 * index, 20), brightness + 50 * int(label), np.uint8)  # not all are square
                Image.fromarray(grey).save(tmp_path / split / label / f"{index}.png")
    (tmp_path / "train" / "0" / "1.png").write_bytes(b"no picture")
    digits = datasets.load_digits(tmp_path, image_size=28)
    assert digits.train.shape == (5, 28, 28) and digits.test.shape == (6, 28, 28)
    assert digits.train.dtype == torch.uint8
    assert sorted(digits.train_labels.tolist()) == [0, 0, 1, 1, 1] and digits.test_labels.bincount().tolist() == [3, 3]
    for pictures, labels, brightness in ((*digits[:2], 10), (*digits[2:], 100)):
        assert torch.equal(pictures.float().mean((1, 2)), brightness + 50.0 * labels)


def test_a_folder_with_more_than_ten_classes_has_no_digits(tmp_path):
    for split in ("train", "val"):
        picture_folder(tmp_path / split, [f"{i:02d}" for i in range(11)], each=1)
    with pytest.raises(UsageError, match="expected up to 10 classes of digits, got 11"):
        datasets.load_digits(tmp_path)


@pytest.mark.parametrize("size", [1, 5, 8, 13, 28])
def test_digits_are_resized_as_pillow_does(size):
    images = datasets.load_digits().train[:20]
    wanted = [np.array(Image.fromarray(image).resize((size, size), Image.BILINEAR)) for image in images.numpy()]
    found = datasets.resized(images, size)
    assert found.shape == (20, size, size) and found.dtype == torch.uint8
    assert np.abs(found.numpy().astype(int) - np.stack(wanted).astype(int)).max() <= (1 if size != 8 else 0)


def test_the_first_digits_of_a_folder_are_of_all_classes(tmp_path):
    for split in ("train", "val"):
        picture_folder(tmp_path / split, each=30, side=8)
    first, again = (datasets.load_digits(tmp_path, 8) for _ in range(2))
    for labels in (first.train_labels, first.test_labels):
        assert 3 <= int(labels[:20].sum()) <= 17
    assert all(torch.equal(*parts) for parts in zip(first, again))


# --- MultiDigits ---


@pytest.mark.parametrize("canvas, size", [(112, 28), (48, 12), (50, 12), (45, 9), (112, 5)])
@pytest.mark.parametrize("count", [1, 7, 16])
def test_in_the_grid_every_digit_is_in_the_middle_of_a_cell_of_its_own(canvas, size, count):
    pictures, labels = blocks()
    made = MultiDigits(pictures, labels, [size] * count, 60, "grid", canvas)
    cell = canvas // 4
    for index in range(len(made)):
        picture = made.read(index)
        assert picture.shape == (1, canvas, canvas) and picture.dtype == torch.uint8
        seen = []
        for row in range(4):
            for column in range(4):
                top, left = row * cell + (cell - size) // 2, column * cell + (cell - size) // 2
                there = picture[0, top : top + size, left : left + size]
                assert there.min() == there.max(), "a digit that is not in its place"
                if there.any():
                    seen.append(int(there[0, 0]))
                    picture[0, top : top + size, left : left + size] = 0
        assert not picture.any(), "something outside the cells' middles"
        assert sorted(seen) == sorted(20 + 20 * label for label in made.contents[index].tolist())


def test_in_the_grid_all_cells_are_as_likely_for_every_digit():
    made = MultiDigits(*blocks(), [8] * 3, 8000, "grid", 32)
    cells = made.corners // 8 @ torch.tensor([4, 1])
    for digit in range(3):
        counts = torch.bincount(cells[:, digit], minlength=16)
        assert (counts - 500).abs().max() < 6 * math.sqrt(500)  # six standard deviations
    assert all(len(set(row)) == 3 for row in cells.tolist())


@pytest.mark.parametrize("canvas, size", [(112, 28), (12, 8), (8, 8)])
def test_placed_at_random_every_place_is_as_likely_the_corners_too(canvas, size):
    room = canvas - size + 1
    made = MultiDigits(*blocks(), [size], 40 * room * room if room < 10 else 60_000, canvas=canvas)
    corners = made.corners[:, 0]
    assert corners.min() == 0 and corners.max() == canvas - size
    expected = len(made) / room
    for axis in (0, 1):
        counts = torch.bincount(corners[:, axis], minlength=room)
        assert (counts - expected).abs().max() < 6 * math.sqrt(expected)
    if room < 10:  # few enough to have been drawn together
        assert len({tuple(corner) for corner in corners.tolist()}) == room * room
    for index in (0, 1, 2, int(corners.sum(1).argmax()), int(corners.sum(1).argmin())):
        assert box(made.read(index)) == (*corners[index].tolist(), size, size)


def test_the_two_axes_and_two_digits_are_drawn_independently():
    corners = MultiDigits(*blocks(), [28, 28], 20_000).corners.float().flatten(1)
    off_diagonal = torch.corrcoef(corners.T) - torch.eye(4)
    assert off_diagonal.abs().max() < 6 / math.sqrt(20_000)


def test_the_papers_digits_are_28_pixels_on_112():
    digits = datasets.load_digits()
    made = MultiDigits(*digits[:2])
    assert len(made) == len(digits.train) and made.read(0).shape == (1, 112, 112)
    top, left, high, wide = box(made.read(5))
    assert high <= 28 and wide <= 28
    (y, x), large = made.corners[5, 0].tolist(), datasets.resized(digits.train[5:6], 28)[0]
    assert torch.equal(made.read(5)[0, y : y + 28, x : x + 28], large)
    assert made.read(5).sum() == large.sum()


def test_digits_have_the_sizes_of_the_case_and_the_brighter_shows():
    made = MultiDigits(*blocks(), [20, 80], 300)
    overlapping = 0
    for index in range(300):
        picture, wanted = made.read(index)[0], torch.zeros(112, 112, dtype=torch.uint8)
        for size, label, (top, left) in zip((20, 80), made.contents[index].tolist(), made.corners[index].tolist()):
            for y in range(top, top + size):
                there = wanted[y, left : left + size]
                overlapping += int((there > 0).any())
                there[there < 20 + 20 * label] = 20 + 20 * label
        assert torch.equal(picture, wanted)
    assert overlapping


def test_labels_are_the_first_digits_and_shares_those_of_all():
    pictures, labels = blocks(7)
    made = MultiDigits(pictures, labels, [8, 12, 12], 100, canvas=40)
    assert torch.equal(made.labels, torch.arange(100) % 7)  # every image in turn
    assert made.contents.shape == (100, 3) and made.shares.shape == (100, 10)
    for label, contents, shares in zip(made.labels.tolist(), made.contents.tolist(), made.shares.tolist()):
        assert contents[0] == label
        assert shares == pytest.approx([contents.count(digit) / 3 for digit in range(10)])


def test_canvases_are_decided_by_their_seed():
    first, again, other = (MultiDigits(*blocks(), [10, 12], 50, canvas=40, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(5)  # the process' generator has no part in it
    assert all(torch.equal(first.read(i), again.read(i)) for i in range(50))
    assert torch.equal(first.read(3), first.read(3))
    assert sum(torch.equal(first.read(i), other.read(i)) for i in range(50)) < 5


@pytest.mark.parametrize("options, message", [
    (dict(placement="middle"), "placement: expected random or grid, got 'middle'"),
    (dict(sizes=[]), "sizes: expected 1 to 112 pixels"),
    (dict(sizes=[28, 113]), r"sizes: expected 1 to 112 pixels, got \[28, 113\]"),
    (dict(sizes=[0]), r"sizes: expected 1 to 112 pixels, got \[0\]"),
    (dict(sizes=[29], placement="grid"), r"sizes: expected 1 to 28 pixels, got \[29\]"),
    (dict(sizes=[28] * 17, placement="grid"), "sizes: expected up to 16 digits in a grid, got 17"),
])
def test_canvases_that_cannot_be(options, message):
    with pytest.raises(ValueError, match="MultiDigits: " + message):
        MultiDigits(*blocks(), **options)


# --- DigitOnImage ---


class Plain:
    """Pictures of one brightness each; the last cannot be read."""

    def __init__(self, count=6, shape=(32, 32), kind="tensor"):
        self.shape, self.kind, self.labels = shape, kind, torch.arange(count)

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"plain {index}"

    def read(self, index):
        if index == len(self) - 1:
            return None
        picture = torch.full((3, *self.shape), 40 * index, dtype=torch.uint8)
        return picture if self.kind == "tensor" else Image.fromarray(picture.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("side, digit", [(224, 28), (32, 8), (32, 7), (60, 18), (20, 9)])
@pytest.mark.parametrize("kind", ["tensor", "PIL"])
def test_a_digit_is_added_at_nine_places_and_clipped_at_white(side, digit, kind):
    values = torch.arange(1, digit * digit + 1).reshape(1, digit, digit) % 200 + 56
    made = DigitOnImage(Plain(kind=kind), values.to(torch.uint8), torch.tensor([7]), digit=digit, side=side)
    starts = [math.floor(percent * side / 100 + 0.5) - digit // 2 for percent in (15, 45, 75)]
    clipped = False
    for index in range(5):
        wanted = np.full((side, side), 40 * index)
        for y in range(side):
            for x in range(side):
                for top in starts:
                    for left in starts:
                        if top <= y < top + digit and left <= x < left + digit:
                            wanted[y, x] += int(values[0, y - top, x - left])
        clipped = clipped or wanted.max() > 255
        picture = made.read(index)
        assert picture.dtype == torch.uint8 and picture.shape == (3, side, side)
        assert all((channel.numpy() == np.minimum(wanted, 255)).all() for channel in picture)
    assert clipped
    assert made.read(5) is None and made.name(5) == "plain 5"


def test_digits_larger_than_their_place_are_cut_at_the_border():
    made = DigitOnImage(Plain(2), torch.full((1, 20, 20), 9, dtype=torch.uint8), torch.tensor([1]), digit=20, side=32)
    counts = torch.zeros(32, 32, dtype=torch.int64)
    for top in (-5, 4, 14):  # 4.8, 14.4 and 24 are the centres
        for left in (-5, 4, 14):
            counts[max(top, 0) : top + 20, max(left, 0) : left + 20] += 1
    assert torch.equal(made.read(0)[0].long(), 9 * counts)


def test_pictures_that_are_not_square_are_cut_to_their_middle():
    class Wide(Plain):
        def read(self, index):
            return torch.arange(64, dtype=torch.uint8).expand(3, 32, 64).clone()

    made = DigitOnImage(Wide(2), torch.zeros(1, 8, 8, dtype=torch.uint8), torch.tensor([0]), digit=8, side=32)
    assert torch.equal(made.read(0)[0, 0], torch.arange(16, 48, dtype=torch.uint8))


@pytest.mark.parametrize("unique", [1, 4, 10, None])
def test_every_one_of_the_unique_digits_is_over_as_many_pictures(unique):
    digits, labels = blocks(10)
    made = DigitOnImage(Plain(41), digits, labels, unique, digit=8, side=32)
    counts = torch.bincount(made.chosen, minlength=10)
    number = unique or 10
    assert counts[:number].min() >= 41 // number and counts[:number].max() <= -(-41 // number)
    assert not counts[number:].any()
    assert torch.equal(made.digit_labels, labels[made.chosen]) and torch.equal(made.labels, torch.arange(41))
    picture, place = made.read(0), round(0.15 * 32)
    assert picture[0, place, place] == 20 + 20 * int(made.digit_labels[0])


def test_which_digit_is_decided_by_the_seed():
    first, again, other = (DigitOnImage(Plain(41), *blocks(10), digit=8, side=32, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.chosen, again.chosen) and not torch.equal(first.chosen, other.chosen)


@pytest.mark.parametrize("unique", [0, 11])
def test_as_many_unique_digits_as_there_are(unique):
    with pytest.raises(ValueError, match=f"DigitOnImage: unique: expected 1 to 10, the number of digits, got {unique}"):
        DigitOnImage(Plain(), *blocks(10), unique)


# --- RandBit ---


def small_source():
    return datasets.digit_source(datasets.load_digits(), 16)


@pytest.mark.parametrize("bits", [0, 1, 5, 62])
def test_the_bits_are_the_binary_digits_of_a_number_below_two_to_their_count(bits):
    made = RandBit(Plain(400), bits)
    assert made.codes.shape == (400, bits)
    for number, code in zip(made.numbers.tolist(), made.codes.tolist()):
        assert 0 <= number < 2**bits
        assert "".join(map(str, reversed(code))) == (format(number, f"0{bits}b") if bits else "")
    if bits:
        assert (made.codes.float().mean(0) - 0.5).abs().max() < 6 * 0.5 / math.sqrt(400)
    assert made.read(399) is None and made.name(0) == "plain 0" and torch.equal(made.labels, torch.arange(400))


def test_bits_are_decided_by_their_seed_and_the_test_pictures_have_others():
    first, again, other = (datasets.with_bits(small_source(), 8, seed) for seed in (0, 0, 5))
    assert torch.equal(first.train.numbers, again.train.numbers)
    assert not torch.equal(first.train.numbers, other.train.numbers)
    assert not torch.equal(first.train.numbers[: len(first.test)], first.test.numbers)


@pytest.mark.parametrize("bits", [-1, 63])
def test_as_many_bits_as_a_number_has(bits):
    with pytest.raises(ValueError, match=f"RandBit: bits: expected 0 to 62, got {bits}"):
        RandBit(Plain(), bits)


def check_bits(views, index, codes, plain):
    """Float views whose last channels are the picture's bits, everywhere, and whose first are a picture."""
    for view, number in zip(views, index.tolist()):
        wanted = codes[number].float()[:, None, None].expand(-1, *view.shape[1:])
        assert view.dtype == torch.float32 and torch.equal(view[-len(codes[0]) :], wanted)
        assert len(view) == plain + len(codes[0])
    shown = views[:, :plain]
    assert shown.amin() >= 0 and 0.5 < shown.amax() <= 1 and shown.std() > 0.05


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("make, channels", [(small_source, 1), (datasets.photo_source, 3)])
def test_no_view_touches_the_bits_and_both_views_share_them(make, channels, on_device):
    source = datasets.with_bits(make(), 6)
    assert source.channels == channels + 6
    keys = batches.EpochBatches(len(source.train), 32, 1, seed=0)
    batch = next(iter(batches.train_loader(source, keys, 0, 0, on_device=on_device)))
    views = batch.views
    if on_device:
        assert views[0].dtype == torch.uint8
        module = source.device_views()
        views = [module(views[0]) for _ in range(2)]
    assert len(views) == 2 and not torch.equal(views[0], views[1])
    for view in views:
        check_bits(view, batch.index, source.train.codes, channels)
    loader = batches.plain_loader(source.test, source.plain, 16, 0)
    pictures, index, _ = next(iter(loader))
    check_bits(pictures, index, source.test.codes, channels)


def test_the_pictures_views_are_those_without_bits():
    source = small_source()
    with_bits = datasets.with_bits(source, 4)
    picture, pair = source.train.read(3), with_bits.train.read(3)
    for name in ("views", "plain", "raw"):
        with batches.drawing_from(7):
            alone = getattr(source, name)(picture)
        with batches.drawing_from(7):
            assert torch.equal(getattr(with_bits, name)(pair)[:1], alone)


# --- sources ---


def test_sources_have_what_the_trainer_asks_for():
    digits = datasets.load_digits()
    single = datasets.digit_source(digits, 16)
    canvases = datasets.canvas_source(digits, [12, 12], 48, "grid", length=2000, seed=3)
    photos = datasets.photo_source(32)
    assert (single.channels, single.image_size, len(single.train)) == (1, 16, len(digits.train))
    assert (canvases.channels, canvases.image_size, len(canvases.train)) == (1, 48, 2000)
    assert len(canvases.test) == len(digits.test)  # one for each of the test digits
    assert (photos.channels, photos.image_size, len(photos.classes)) == (3, 32, 12)
    for source in (single, canvases, photos):
        assert isinstance(source, data.Source)
        shape = (source.channels, source.image_size, source.image_size)
        assert source.views(source.train.read(0)).shape == source.plain(source.test.read(0)).shape == shape
        assert len(source.classes) > int(source.train.labels.max())
        assert set(source.test.labels.tolist()) == set(source.train.labels.tolist())
    # The test canvases show test digits: what is in them is in no training digit.
    (top, left), place = canvases.test.corners[0, 0].tolist(), slice(0, 12)
    there = canvases.test.read(0)[0, top:, left:][place, place]
    assert torch.equal(there, datasets.resized(digits.test[:1], 12)[0])
