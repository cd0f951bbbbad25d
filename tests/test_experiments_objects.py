"""Experiments on pictures of several things: digits on canvases, digits on photographs, clusters of local features."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from trainer_cases import one_thread, picture_folder  # noqa: F401  (a fixture of every test)

from experiments import (
    clusters,
    datasets,
    digit_on_image,
    dominant_object,
    figures,
    local_features,
    multi_digits,
    results,
    study,
    training,
)
from experiments.results import Results
from experiments.study import Place
from simclr import model, settings
from simclr.errors import UsageError

ALL = [dominant_object, multi_digits, digit_on_image, local_features]
QUICK = dict(steps=2, batch=16, workers=0, width=4)
CPU = torch.device("cpu")


def quick(case, **train):
    small = {"length": 64} if case.get("length") else {}
    return {**case, **small, "train": case["train"] | QUICK | train}


def record(case, seed, result):
    return dict(case=case, seed=seed, seconds=1.0, jobs=1, result=result)


def shown(experiment, records):
    """The table, whose rows are all as long as its head, and a figure."""
    head, *rows = experiment.table(Results(records))
    assert rows and all(len(row) == len(head) for row in rows)
    assert all(isinstance(cell, str) for row in (head, *rows) for cell in row)
    assert experiment.figure(Results(records))[:4] == b"\x89PNG"
    return head, *rows


@pytest.mark.parametrize("experiment", ALL)
def test_first_and_last_case_are_measured_and_shown_with_the_others_missing(experiment, tmp_path):
    cases = experiment.cases("desk")
    assert json.loads(json.dumps(cases)) == cases and len({json.dumps(case) for case in cases}) == len(cases)
    records = []
    for number, case in enumerate((cases[0], cases[-1])):
        result = experiment.measure(quick(case), 1, Place(tmp_path / str(number), {}, CPU))
        assert json.loads(json.dumps(result)) == result
        assert all(-0.1 < value <= 1 for value in result.values() if isinstance(value, float))
        records.append(record(case, 1, result))
    assert any(results.MISSING in cell for row in shown(experiment, records[:1]) for cell in row)
    shown(experiment, records)
    shown(experiment, [record({**case, "number": 0, "unique": 5}, 0, records[0]["result"]) for case in cases[:1]])


@pytest.mark.parametrize("experiment", [dominant_object, multi_digits, local_features])
def test_a_run_is_decided_by_its_case_and_seed(experiment, tmp_path):
    case = quick(experiment.cases("desk")[-1])
    first, again, other = (experiment.measure(case, seed, Place(tmp_path / name, {}, CPU))
                           for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first == again != other


@pytest.mark.parametrize("experiment", ALL)
@pytest.mark.parametrize("scale", study.SCALES)
def test_the_settings_of_every_case_are_the_trainers(experiment, scale):
    for case in experiment.cases(scale):
        parsed = settings.parse(["pictures", *training.arguments(case["train"])], "test")
        assert (parsed.arch, parsed.optimizer) == ("convnet", "adamw") if scale == "desk" else (
            parsed.arch.startswith("resnet") and parsed.optimizer == "lars")


@pytest.mark.parametrize("experiment, name, change", [
    (dominant_object, "SimCLR, temperature 0.1", {}), (multi_digits, "supervised", {}),
    (digit_on_image, "SimCLR, temperature 0.5", dict(unique=2, side=64, digit=8)),
    (local_features, "SimCLR", dict(side=32, larger=64, count=4)),
])
def test_a_case_of_the_published_size_runs_on_folders(experiment, name, change, tmp_path):
    folders = {}
    for data in ("mnist", "imagenet"):
        for split in ("train", "val"):
            picture_folder(tmp_path / data / split, each=16)
        folders[data] = str(tmp_path / data)
    case = next(case for case in experiment.cases("paper") if case.get("method") == name)
    case = quick({**case, **change}, batch=4, arch="convnet", optimizer="adamw")
    case["train"].pop("augment", None)
    result = experiment.measure(case, 0, Place(tmp_path / "out", folders, CPU))
    shown(experiment, [record(case, 0, result)])


def test_the_published_size_asks_for_its_data(tmp_path):
    for experiment in ALL:
        with pytest.raises(UsageError, match="--data: expected (mnist|imagenet)=FOLDER"):
            experiment.measure(experiment.cases("paper")[0], 0, Place(tmp_path, {}, CPU))


# --- what they vary ---


@pytest.mark.parametrize("scale", study.SCALES)
def test_the_second_digit_begins_at_the_firsts_size_and_all_fit(scale):
    cases = dominant_object.cases(scale)
    assert min(case["second"] for case in cases) == cases[0]["first"]
    assert max(case["second"] for case in cases) < cases[0]["canvas"]
    assert {case["first"] for case in cases} == {cases[0]["first"]}
    if scale == "paper":
        assert (cases[0]["canvas"], cases[0]["first"]) == (112, 20)
        assert sorted({case["second"] for case in cases}) == list(range(20, 81, 10))
    for case in multi_digits.cases(scale):
        assert case["canvas"] == 4 * case["size"]


def test_single_digits_are_alone_of_their_size_and_of_their_split():
    digits = datasets.load_digits()
    for split, images, labels in zip(datasets.single_digits(digits, 12, 36), digits[::2], digits[1::2]):
        assert len(split) == len(images) and torch.equal(split.labels, labels)
        for index in (0, 5):
            (top, left), picture = split.corners[index, 0].tolist(), split.read(index)[0]
            digit = datasets.resized(images[index : index + 1], 12)[0]
            assert torch.equal(picture[top : top + 12, left : left + 12], digit) and picture.sum() == digit.sum()


def test_the_probe_of_each_digit_is_on_its_size(tmp_path, monkeypatch):
    seen = []

    def linear(trainer, train, test):
        assert train.canvas == test.canvas == 36
        seen.append(train.sizes)
        return train.sizes[0] / 100

    monkeypatch.setattr(training, "linear", linear)
    case = next(c for c in dominant_object.cases("desk") if c["method"] == "untrained" and c["second"] == 24)
    found = dominant_object.measure(quick(case), 0, Place(tmp_path, {}, CPU))
    assert found == dict(first=0.12, second=0.24) and seen == [(12,), (24,)]


def test_digits_and_photographs_are_probed_on_all_digits(tmp_path, monkeypatch):
    seen = {}

    def features(trainer, train, test):
        seen.update(trained=trainer.source.train, train=train, test=test)
        return None

    monkeypatch.setattr(training, "features", features)
    case = next(c for c in digit_on_image.cases("desk") if c["method"] == "supervised" and c["unique"] == 4)
    assert digit_on_image.measure(quick(case), 0, Place(tmp_path, {}, CPU)) is None
    digits = datasets.load_digits()
    assert len(seen["trained"].chosen.unique()) == 4
    assert len(seen["train"].chosen.unique()) == len(digits.train)
    assert len(seen["test"].chosen.unique()) == len(digits.test) and len(seen["test"]) == 960
    assert torch.equal(seen["test"].digit_labels, digits.test_labels[seen["test"].chosen])
    assert seen["train"].pictures is seen["trained"].pictures


def test_the_two_probes_tell_a_digit_from_its_photograph(tmp_path, monkeypatch):
    """Features that are the digit's label and nothing else: one probe is right, the other one guesses."""
    extract = training.features

    def features(trainer, train, test):
        found = extract(trainer, train, test)
        found.train, found.test = (F.one_hot(split.digit_labels[index], 10).float() for split, index in
                                   ((train, found.train_index), (test, found.test_index)))
        return found

    monkeypatch.setattr(training, "features", features)
    case = next(c for c in digit_on_image.cases("desk") if c["method"] == "untrained")
    found = digit_on_image.measure(quick(case), 0, Place(tmp_path, {}, CPU))
    assert found["digit"] == 1.0 and found["image"] < 0.2


# --- photographs ---


def test_photo_crops_are_squares_of_their_tiles():
    crops = datasets.PhotoCrops(16, each=4, seed=1)
    assert len(crops) == 48 and crops.labels.tolist() == [tile for tile in range(12) for _ in range(4)]
    assert crops.read(0).shape == (3, 16, 16) and crops.read(0).dtype == torch.uint8
    again, other = datasets.PhotoCrops(16, each=4, seed=1), datasets.PhotoCrops(16, each=4, seed=2)
    assert torch.equal(crops.pictures, again.pictures) and not torch.equal(crops.pictures, other.pictures)


def test_a_photo_crop_lies_inside_its_tile():
    # A photograph whose red says the row and whose green the column: the corners of a crop say where it was cut.
    photo = np.zeros((213 * 2, 213 * 3, 3), np.uint8)
    photo[..., 0], photo[..., 1] = np.arange(426)[:, None] // 2, np.arange(639) // 3
    draws, sides = np.random.default_rng(0), []
    for _ in range(50):
        crop = datasets.PhotoCrops._cut(photo, (213, 426), (213, 213), 32, draws)
        (low, left), (high, right) = crop[:2].flatten(1).amin(1).tolist(), crop[:2].flatten(1).amax(1).tolist()
        assert 2 * low >= 212 and 2 * high <= 426 and 3 * left >= 425 and 3 * right <= 639
        sides.append(2 * (high - low))
    assert min(sides) < 90 and max(sides) > 130


# --- clusters ---


def test_feature_maps_are_what_the_encoder_pools():
    torch.manual_seed(0)
    encoder, pictures = model.build_encoder("convnet", 1, 32, 4), torch.rand(3, 1, 64, 48)
    maps = clusters.feature_maps(encoder, pictures, (1, 2, 3, 4))
    assert [tuple(found.shape) for found in maps.values()] == [
        (3, 4, 32, 24), (3, 8, 16, 12), (3, 16, 8, 6), (3, 32, 4, 3)]
    torch.testing.assert_close(maps[4].mean((2, 3)), encoder(pictures))
    torch.testing.assert_close(maps[2], encoder[5](encoder[4](encoder[3](maps[1]))))
    assert not any(part._forward_hooks for part in encoder)
    resnet = model.build_encoder("resnet18", 3, 32).eval()
    found = clusters.feature_maps(resnet, torch.rand(2, 3, 64, 64), (2, 3, 4))
    assert [tuple(rows.shape[1:]) for rows in found.values()] == [(128, 32, 32), (256, 16, 16), (512, 8, 8)]
    with pytest.raises(UsageError, match="expected convnet or a ResNet, got VisionTransformer"):
        clusters.stages(model.build_encoder("vit_small", 3, 32))


def test_patches_are_the_pixels_of_their_location():
    pictures = torch.rand(2, 3, 33, 48)
    found = clusters.patches(pictures, torch.zeros(2, 5, 8, 12))
    assert found.shape == (2, 48, 8, 12)
    assert torch.equal(found[1, :, 3, 7].sort().values, pictures[1, :, 12:16, 28:32].flatten().sort().values)


def test_of_features_directions_are_clustered_and_of_pixels_their_brightness_too(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(clusters, "clustered", lambda maps, count, seed: seen.append(maps) or maps[:, 0].long())
    for number, method in enumerate(("untrained", "pixels")):
        case = next(c for c in local_features.cases("desk") if c["method"] == method)
        local_features.measure(quick(case), 0, Place(tmp_path / str(number), {}, CPU))
        lengths = torch.cat([maps.square().sum(1).sqrt().flatten() for maps in seen])
        assert torch.allclose(lengths[lengths > 0], torch.ones(())) == (method == "untrained")
        seen.clear()


def test_clusters_are_of_near_locations_and_the_largest_comes_first():
    # Three points, nearly, and of locations 3 : 2 : 1.
    kinds = torch.tensor([0, 0, 0, 1, 1, 2]).repeat(8).view(2, 4, 6)
    maps = torch.eye(3)[kinds].permute(0, 3, 1, 2) * (1 + 0.1 * torch.rand(2, 1, 4, 6))
    found = clusters.clustered(maps, 3, seed=0)
    assert torch.equal(found, kinds)
    assert torch.equal(clusters.clustered(maps, 3, seed=0), found)


def mutual_information(one, two):
    """In nats, by its definition; and the entropies."""
    joint = np.zeros((max(one) + 1, max(two) + 1))
    for pair in zip(one, two):
        joint[pair] += 1 / len(one)
    first, second = joint.sum(1), joint.sum(0)
    found = sum(joint[i, j] * np.log(joint[i, j] / first[i] / second[j]) for i, j in np.argwhere(joint))
    return found, *(-sum(p * np.log(p) for p in marginal if p) for marginal in (first, second))


def test_agreement_is_the_adjusted_mutual_information_where_something_is_known():
    pixels = torch.full((1, 8, 12), -1)
    pixels[:, :4, :4], pixels[:, :4, 4:8], pixels[:, 4:, :8] = 0, 1, 2
    found = torch.tensor([[[0, 0, 1, 1, 5, 6], [0, 2, 1, 1, 5, 6], [2, 2, 2, 2, 5, 6], [2, 2, 2, 0, 5, 6]]])
    known, cluster = [0, 0, 1, 1, 0, 0, 1, 1] + [2] * 8, [0, 0, 1, 1, 0, 2, 1, 1] + [2] * 7 + [0]
    information, first, second = mutual_information(known, cluster)
    # Its mean over labelings at random with the same counts, from many of them.
    draws = np.random.default_rng(0)
    expected = np.mean([mutual_information(known, draws.permutation(cluster))[0] for _ in range(1500)])
    wanted = (information - expected) / ((first + second) / 2 - expected)
    assert clusters.agreement(found, pixels) == pytest.approx(wanted, abs=0.02)
    assert clusters.agreement(found[:, :1, :4], pixels[:, :4, :8]) == pytest.approx(1.0)


def test_what_is_known_of_canvases_is_where_their_digits_are(tmp_path):
    case = quick(local_features.cases("desk")[0])
    source, pictures, known = local_features.canvases(case, 3, Place(tmp_path, {}, CPU))
    assert pictures.shape == (32, 1, 64, 64) and known.shape == (32, 64, 64)
    assert not pictures[:, 0][known < 0].any() and pictures[:, 0][known >= 0].mean() > 0.1
    for one, picture in zip(known, pictures):
        cells = one.view(4, 16, 4, 16).permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
        assert (cells == cells[:, :1]).all() and int((cells[:, 0] >= 0).sum()) == 8
    wanted = source.test.contents[:32].sort().values
    assert torch.equal(torch.stack([one[8::16, 8::16][one[8::16, 8::16] >= 0] for one in known]).sort().values, wanted)


def test_what_is_known_of_the_photographs_is_their_tiles(tmp_path):
    case = next(case for case in local_features.cases("desk") if case["pictures"] == "photographs")
    source, pictures, known = local_features.photographs(case, 0, Place(tmp_path, {}, CPU))
    assert pictures.shape == (2, 3, 128, 192) and 0.2 < pictures.mean() < 0.8 and pictures.max() <= 1
    tiles = itertools.product(range(2), range(2), range(3))
    for label, (photo, row, column) in enumerate(tiles):
        there = known[photo, 64 * row : 64 * row + 64, 64 * column : 64 * column + 64]
        assert (there == label).all()
        # Crops of the class to train on have the colours of that tile.
        colour = source.train.pictures[source.train.labels == label].float().mean((0, 2, 3)) / 255
        tile = pictures[photo, :, 64 * row : 64 * row + 64, 64 * column : 64 * column + 64].mean((1, 2))
        assert (colour - tile).abs().max() < 0.1


def test_a_sheet_leaves_out_what_is_missing():
    full = figures.pictures([("a", [np.eye(4), np.eye(4)])], ["one", "two"])
    half = figures.pictures([("a", [np.eye(4), None])], ["one", "two"])
    assert half[:4] == b"\x89PNG" and half != full
