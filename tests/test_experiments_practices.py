"""Experiments on P2's good practices: the head, the negatives, the augmentation, and what features keep."""

import io
import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from trainer_cases import one_thread, picture_folder  # noqa: F401

from experiments import (
    augmentation,
    coloured,
    datasets,
    feature_inversion,
    figures,
    negatives,
    projection_head,
    training,
)
from experiments.results import MISSING, Results, Spread
from experiments.study import Place
from simclr import methods

MODULES = (projection_head, negatives, augmentation, feature_inversion)
NAMES = dict(argvalues=MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
QUICK = dict(steps=2, batch=16, width=2)


def quick(case, **changes):
    """The case, in two small steps."""
    found = dict(case, train=case["train"] | QUICK | changes)
    if "inversion" in case:
        found["inversion"] = dict(case["inversion"], pictures=2, updates=2, channels=4, depth=2)
    return found


def measured(module, cases, tmp_path):
    """`Results` as they would be read from a file."""
    found = [dict(case=case, seed=0, seconds=1.0, jobs=1,
                  result=module.measure(case, 0, Place(tmp_path / str(number), {}, torch.device("cpu"))))
             for number, case in enumerate(cases)]
    return Results(json.loads(json.dumps(found)))


def size_of(png):
    return Image.open(io.BytesIO(png)).size


@pytest.mark.parametrize("module", **NAMES)
def test_desk_runs_from_first_to_last(module, tmp_path, monkeypatch):
    monkeypatch.setitem(augmentation.EACH, "photographs", 4)  # t-SNE of more takes seconds
    every = module.cases("desk")
    chosen = [every[0], every[-1]]
    if module is augmentation:  # one of these has the maps
        chosen.append(next(case for case in every if "supervised" == case["method"]))
    results = measured(module, [quick(case) for case in chosen], tmp_path)
    head, *rows = module.table(results)
    assert all(len(row) == len(head) for row in rows)
    numbers = [cell for row in rows for cell in row[1:] if cell not in ("", MISSING)]
    assert numbers and all(np.isfinite(float(cell)) for cell in numbers)
    assert min(size_of(module.figure(results))) > 300


@pytest.mark.parametrize("module", **NAMES)
def test_table_and_figure_of_nothing(module):
    head, *rows = module.table(Results([]))
    assert all(len(row) == len(head) and set(row[1:]) <= {"", MISSING} for row in rows)
    assert min(size_of(module.figure(Results([])))) > 0


@pytest.mark.parametrize("scale", ("desk", "paper"))
@pytest.mark.parametrize("module", **NAMES)
def test_cases_are_json_and_differ_and_have_settings_of_the_trainer(module, scale):
    every = module.cases(scale)
    assert json.loads(json.dumps(every)) == every
    factors = [json.dumps({name: value for name, value in case.items() if name != "train"}) for case in every]
    assert len(set(factors)) == len(every)
    for case in every:
        training.chosen(case)


@pytest.mark.parametrize("module", **NAMES)
def test_a_published_case_runs_on_a_folder(module, tmp_path):
    for split in ("train", "val"):
        picture_folder(tmp_path / "pictures" / split)
    place = Place(tmp_path / "run", {"imagenet": str(tmp_path / "pictures")}, torch.device("cpu"))
    every = module.cases("paper")
    case = next((case for case in every if case.get("method") == "supervised"), every[0])
    found = module.measure(quick(case, arch="convnet", image_size=32, bn_splits=2, workers=0), 0, place)
    assert "linear" in found or "psnr" in found
    assert all(np.isfinite(value) for value in found.values() if isinstance(value, float))


def begun(module, case, source, tmp_path, build, **changes):
    return training.prepare(quick(case, **changes), 0, Place(tmp_path, {}, torch.device("cpu")), source, build)


@pytest.fixture(scope="module")
def source():
    return datasets.canvas_source(datasets.load_digits(), [14], 32)


def test_a_fixed_head_stays_and_its_encoder_learns(source, tmp_path):
    case = next(case for case in projection_head.cases("desk") if case["head"] == projection_head.FIXED)
    trainer = begun(projection_head, case, source, tmp_path, projection_head.with_fixed_head, steps=3)
    network = trainer.method.network
    before = {name: value.clone() for name, value in network.named_parameters()}
    trainer.run()
    trainer.log.close()
    changed = {name for name, value in network.named_parameters() if not value.equal(before[name])}
    assert changed == {name for name in before if name.startswith("encoder")}
    average = dict(trainer.method.average.network.named_parameters())
    assert all(value.equal(average[name]) for name, value in before.items() if name.startswith("head"))
    assert any(not value.equal(average[name]) for name, value in before.items() if name.startswith("encoder"))


def test_heads_of_the_cases(source, tmp_path):
    widths = {}
    for number, case in enumerate(projection_head.cases("desk")[: len(projection_head.HEADS)]):
        trainer = begun(projection_head, case, source, tmp_path / str(number), methods.build, width=8)
        trainer.log.close()
        linear = [part for part in trainer.method.network.head.modules() if isinstance(part, torch.nn.Linear)]
        widths[case["head"]] = [part.out_features for part in linear]
    assert widths == {"MLP": [64, 128], "none": [], "fixed MLP": [64, 128], "deeper MLP": [64, 64, 128],
                      "narrower MLP": [4, 128], "linear": [128]}


def negatives_method(source, tmp_path, method, count, batch):
    case = next(case for case in negatives.cases("desk")
                if case["method"] == method and case["negatives"] == count)
    build = partial(negatives.with_negatives, count)
    trainer = begun(negatives, case, source, tmp_path, build, batch=batch)
    trainer.log.close()
    return trainer.method


@pytest.mark.parametrize("count, rows", [(16, 16), (64, 64), (1024, 1024)])
def test_moco_compares_with_as_many_keys_as_the_case_says(source, tmp_path, count, rows):
    method = negatives_method(source, tmp_path, "MoCo v2", count, 32)
    assert method.queue.rows.shape[0] == rows
    keys = torch.randn(32, 128)
    method.queue.enqueue(keys)
    kept = F.normalize(keys, dim=1)[:rows]
    assert torch.allclose(method.queue.rows[: len(kept)], kept, atol=1e-6)
    method.queue.enqueue(keys + 1)
    assert method.queue.rows.shape[0] == rows


def test_hard_negatives_are_drawn_from_the_whole_queue_as_many_as_it_has(source, tmp_path):
    for number, count in enumerate((16, 1024)):
        method = negatives_method(source, tmp_path / str(number), negatives.HARD, count, 32)
        assert (method.hard_negatives, len(method.queue.rows)) == (count, count)


def test_simclr_parts_are_the_mean_over_blocks_of_the_batch(source, tmp_path, monkeypatch):
    method = negatives_method(source, tmp_path, negatives.SIMCLR, 16, 32)
    z1, z2 = torch.randn(2, 32, 128)
    logits = []
    for start in range(0, 32, 8):  # 16 rows: 8 pictures
        rows = F.normalize(torch.cat([z1[start : start + 8], z2[start : start + 8]]), dim=1)
        similar = (rows @ rows.T / 0.2).masked_fill(torch.eye(16, dtype=torch.bool), -torch.inf)
        logits.append(F.cross_entropy(similar, torch.arange(16).roll(8)))
    assert torch.isclose(method.loss([z1, z2], None), torch.stack(logits).mean(), rtol=1e-5)
    monkeypatch.setattr(negatives, "_ranks", lambda: 2)  # whose rows the loss gathers
    assert negatives_method(source, tmp_path / "ranks", negatives.SIMCLR, 16, 32).criterion.rows == 8
    whole = negatives_method(source, tmp_path / "whole", negatives.SIMCLR, 64, 32)
    assert not isinstance(whole.criterion, negatives.Parts)


def test_instdisc_takes_the_noise_of_the_case(source, tmp_path):
    method = negatives_method(source, tmp_path, negatives.INSTDISC, 64, 32)
    assert method.criterion.num_negatives == 64


def test_coloured_digits_are_of_one_bright_colour_on_one_dark_one():
    digits = torch.zeros(5, 12, 12, dtype=torch.uint8)
    digits[:, 4:8, 4:8] = 255
    labels = torch.arange(5)
    made = coloured.ColouredDigits(digits, labels, size=16)
    assert len(made) == 5 and made.labels.equal(labels)
    places, colours = set(), set()
    for index in range(5):
        picture = made.read(index)
        assert picture.shape == (3, 16, 16) and picture.dtype == torch.uint8
        inside = (picture >= 128).all(0)
        assert inside.sum() == 16 and (picture[:, ~inside] < 128).all()
        assert all(len(channel[there].unique()) == 1 for channel in picture for there in (inside, ~inside))
        places.add(tuple(inside.nonzero()[0].tolist()))
        colours |= {tuple(picture[:, there][:, 0].tolist()) for there in (inside, ~inside)}
    assert len(places) > 1 and len(colours) == 10
    assert coloured.ColouredDigits(digits, labels, 16).pictures.equal(made.pictures)
    assert not coloured.ColouredDigits(digits, labels, 16, seed=1).pictures.equal(made.pictures)


def test_coloured_splits_and_their_views():
    source = coloured.source(strength=0.5, crop=[0.02, 0.1])
    assert len(source.train) == 1438 and len(source.test) == 359
    assert not source.train.pictures[:359].equal(source.test.pictures)
    assert source.views(source.train.read(0)).shape == source.plain(source.train.read(0)).shape == (3, 32, 32)


def test_purity_against_every_pair_compared():
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(40, 5, generator=generator), torch.arange(40) % 3
    rows[7] = rows[8]  # itself and its double are equally near
    shares = []
    for i in range(40):
        similar = [(float(F.cosine_similarity(rows[i], rows[j], dim=0)), j) for j in range(40) if j != i]
        nearest = [j for _, j in sorted(similar, reverse=True)[:10]]
        shares.append(sum(labels[j] == labels[i] for j in nearest) / 10)
    assert augmentation.purity(rows, labels) == pytest.approx(float(np.mean(shares)), abs=1e-6)
    apart = F.one_hot(torch.arange(36) % 3, 5).float()
    assert augmentation.purity(apart, torch.arange(36) % 3) == 1


def test_correlation_and_psnr():
    a, b = torch.rand(2, 3, 8, 8)
    assert feature_inversion.correlation(a, b) == pytest.approx(np.corrcoef(a.flatten(), b.flatten())[0, 1], abs=1e-5)
    assert feature_inversion.correlation(a, 0.5 * a + 0.1) == pytest.approx(1, abs=1e-5)
    assert feature_inversion.correlation(a, torch.full_like(a, 0.5)) == pytest.approx(0, abs=1e-3)
    assert feature_inversion.psnr(a, a + 0.1) == pytest.approx(20, abs=1e-3)


def test_inversion_finds_a_picture_whose_features_are_all_its_pixels():
    torch.manual_seed(0)
    ramp = torch.linspace(0.2, 0.8, 8)
    picture = torch.stack([ramp.expand(8, 8), ramp.expand(8, 8).T, torch.full((8, 8), 0.5)])
    made, distance = feature_inversion.invert(lambda x: x.flatten(1), picture, 1.0, 150, channels=8, depth=2, lr=0.01)
    assert distance < 0.5 and distance == pytest.approx((made - picture).square().sum().item(), abs=1e-4)
    assert feature_inversion.correlation(made, picture) > 0.9


def test_u_net_keeps_an_odd_side():
    network = feature_inversion.UNet(4, 3, depth=3)
    assert network(torch.rand(1, 4, 21, 21)).shape == (1, 3, 21, 21)


def test_bars_scatters_and_stacked():
    spread = Spread((1.0, 2.0))
    bars = figures.bars(["a", "b"], [("x", [spread, None]), ("y", [None, None])], "y", [("level", 1.5)])
    maps = figures.scatters([("t", [[0, 1], [1, 0]], [0, 11])])
    (wide, high), (other_wide, other_high) = size_of(bars), size_of(maps)
    assert size_of(figures.stacked(bars, maps)) == (max(wide, other_wide), high + other_high)
