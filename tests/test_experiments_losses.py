"""The experiments about losses: saturation, loss_family, batch_size, temperature_vs_weight."""

import math

import pytest
import torch
import trainer_cases
from trainer_cases import one_thread  # noqa: F401  a fixture

from experiments import batch_size, datasets, loss_family, saturation, temperature_vs_weight
from experiments.results import Results
from experiments.study import Place
from experiments.training import arguments
from simclr import settings

MODULES = [saturation, loss_family, batch_size, temperature_vs_weight]


def small(case):
    """The case, in as little time as it takes to run."""
    sizes = dict(pictures=64, tested=32, side=4, batch=16) if "side" in case else {}
    train = {name: value for name, value in case["train"].items() if name != "epochs"}
    return {**case, **sizes, "train": train | dict(arch="convnet", width=2, steps=2, batch=16, workers=0)}


def record(case, result, seed=0):
    return dict(case=case, seed=seed, seconds=1.0, jobs=1, result=result)


@pytest.fixture(scope="module")
def few_digits():
    """Fewer than there are, for encoders that nobody looks at."""
    found = datasets.load_digits()
    return datasets.Digits(*(part[:60] for part in found))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])
def test_desk(module, tmp_path, monkeypatch, few_digits):
    monkeypatch.setattr(datasets, "load_digits", lambda *_: few_digits)
    chosen = [module.cases("desk")[0], module.cases("desk")[-1]]
    records = []
    for number, case in enumerate(chosen):
        case = small(case)
        records.append(record(case, module.measure(case, 0, Place(tmp_path / str(number), {}, torch.device("cpu")))))
    for value in (value for found in records for value in found["result"].values() if not isinstance(value, list)):
        assert math.isfinite(value)
    for shown in (records, records[:1], []):
        head, *rows = module.STUDY.table(Results(shown))
        assert all(len(row) == len(head) and all(isinstance(cell, str) for cell in row) for row in rows)
        assert module.STUDY.figure(Results(shown)).startswith(b"\x89PNG")


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])
@pytest.mark.parametrize("scale", ["desk", "paper"])
def test_cases_are_settings_of_the_trainer(module, scale):
    cases = module.cases(scale)
    assert len({str(case) for case in cases}) == len(cases)
    for case in cases:
        found = settings.parse(["pictures", *arguments(case["train"])], "trainer")
        assert found.optimizer == case["train"].get("optimizer", "adamw")
        if "batch" in case and case["batch"]:
            assert found.batch == case["batch"]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])
def test_paper(module, tmp_path):
    """The last published case, with little of everything."""
    for split in ("train", "val"):
        trainer_cases.picture_folder(tmp_path / "data" / split, each=8)
    place = Place(tmp_path / "run", dict.fromkeys(["cifar10", "imagenet"], tmp_path / "data"), torch.device("cpu"))
    result = module.measure(small(module.cases("paper")[-1]), 0, place)
    assert all(math.isfinite(value) for value in result.values() if not isinstance(value, list))


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_bit_pictures(bits):
    pictures = saturation.BitPictures(bits, 200, 4, seed=3)
    assert sorted(set(pictures.labels.tolist())) == list(range(2**bits))
    for index in range(20):
        picture = pictures.read(index)
        assert picture.shape == (bits, 4, 4) and picture.dtype == torch.uint8
        values = [channel.unique().tolist() for channel in picture]
        assert all(value in ([0], [255]) for value in values)
        assert sum(2**place for place, value in enumerate(values) if value == [255]) == pictures.labels[index]
    with pytest.raises(ValueError, match="bits: expected 1 to 62, got 0"):
        saturation.BitPictures(0, 2, 4)


def simplex(corners):
    rows = torch.eye(corners, dtype=torch.float64) - 1 / corners
    return torch.nn.functional.normalize(rows, dim=1)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("bits, batch", [(1, 2), (1, 5), (2, 4), (3, 3)])
def test_floor_is_the_term_of_a_simplex_over_all_batches(bits, batch, temperature):
    """Every batch there is, each as likely as the others, by the formula and by the library's loss."""
    corners, numbers = simplex(2**bits), range(2**bits)
    every = torch.cartesian_prod(*[torch.tensor(list(numbers))] * batch)
    products = corners @ corners.T / temperature
    own = (products[every[:, :, None], every[:, None, :]].logsumexp(2) - math.log(batch)).mean().item()
    assert saturation.floor(bits, batch, temperature) == pytest.approx(own, rel=1e-9)
    measured = saturation.lse(temperature)(corners[every[1]])
    expected = (products[every[1][:, None], every[1]].logsumexp(1) - math.log(batch)).mean()
    assert measured.item() == pytest.approx(expected.item(), rel=1e-6)


def test_floor_is_below_other_arrangements():
    """Of eight numbers: rows at random, the same ones, and a simplex that is pulled a little together."""
    draws = torch.Generator().manual_seed(0)
    batches = torch.randint(8, (2000, 16), generator=draws)
    least = saturation.floor(3, 16, 0.5)
    pulled = torch.nn.functional.normalize(torch.cat([simplex(8), torch.full((8, 1), 0.5)], 1).double(), dim=1)
    random = torch.nn.functional.normalize(torch.randn(8, 64, generator=draws).double(), dim=1)
    for corners in (pulled, random, torch.ones(8, 1).double()):
        products = corners @ corners.T / 0.5
        mean = (products[batches[:, :, None], batches[:, None, :]].logsumexp(2) - math.log(16)).mean().item()
        assert mean > least + 1e-3
    assert saturation.floor(62, 512, 1.0) == pytest.approx(math.log((math.e + 511) / 512), rel=1e-6)


def test_floor_for_many_numbers_is_close_to_the_even_sphere():
    """As the text has it: 0.008 below at temperature 1 in 64 dimensions, at most 0.03 at 0.1."""
    rows = torch.nn.functional.normalize(torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    for temperature, low, high in ((1.0, 0.006, 0.010), (0.1, 0.01, 0.03)):
        mean = torch.stack([saturation.lse(temperature)(part) for part in rows.split(512)]).mean().item()
        assert low < mean - saturation.floor(62, 512, temperature) < high


def test_distribution_has_one_view_and_the_gradient_of_its_term():
    rows = torch.randn(12, 8, dtype=torch.float64).requires_grad_()
    method = saturation.Distribution(torch.nn.Identity(), saturation.lse(0.5))
    assert method.views == 1
    method.loss([rows], None).backward()
    given, rows.grad = rows.grad.clone(), None
    unit = torch.nn.functional.normalize(rows, dim=1)
    (unit @ unit.T / 0.5).logsumexp(1).mean().backward()
    torch.testing.assert_close(given.double(), rows.grad, rtol=1e-4, atol=1e-6)


def test_gap_of_losses():
    case = dict(data="digits", head=2, length=100, train={})
    shares = dict(zip(loss_family.LOSSES, (0.5, 0.7, 0.2, 0.4, 0.6)))
    other = dict(shares, **{"SWD to the normal": 0.8})  # the worst of one seed is the best of the other
    records = [record({**case, "loss": loss}, dict(linear=of_seed[loss]), seed)
               for loss in loss_family.LOSSES for seed, of_seed in enumerate((shares, other))]
    factors = dict(data="digits", head=2, length=100)
    assert loss_family.gap(Results(records), factors).values == pytest.approx((50.0, 40.0))
    assert loss_family.gap(Results(records[2:]), factors) is None
    assert loss_family.gap(Results(records[1:]), factors) is None  # a seed of one of them is still to come
    assert loss_family.table(Results(records))[-1] == ["best less worst", "45.0 ± 5.0"]


def test_published_weight_of_the_decoupled_loss():
    for case in loss_family.cases("paper"):
        if case["loss"] == "decoupled NT-Xent":
            assert case["train"]["loss_weight"] == {"cifar10": 6.4, "imagenet": 12.8}[case["data"]]


def test_every_batch_has_the_same_epochs():
    assert len(datasets.load_digits().train) == batch_size.PICTURES
    for case in batch_size.cases("desk")[1:]:
        seen = case["train"]["steps"] * case["batch"] / batch_size.PICTURES
        assert case["epochs"] <= seen < case["epochs"] + case["batch"] / batch_size.PICTURES


def test_coordinates_follow_the_prior():
    module, draws = temperature_vs_weight, torch.Generator().manual_seed(5)
    rows = torch.randn(4000, 64, generator=draws)
    columns = module.coordinates(rows)
    assert columns.shape == (64, 4000)
    torch.testing.assert_close(columns.square().sum(0), torch.full((4000,), 64.0))  # orthogonal: lengths stay
    even = module.follows(columns)
    assert even["distance"] < 0.08 and abs(even["kurtosis"]) < 0.2
    # All rows the same: along a direction one value, whose distance is the root of its square and the variance 1.
    same = module.follows(module.coordinates(rows[:1].expand(4000, -1)))
    assert same["distance"] == pytest.approx(math.sqrt(2), abs=0.01)
    # Two values at equal distance: the kurtosis of a coin.
    coin = module.follows(torch.tensor([[-1.0, 1.0] * 50]))
    assert coin["kurtosis"] == pytest.approx(-2, abs=1e-5)
    assert coin["distance"] == pytest.approx(math.sqrt(2 - 2 * math.sqrt(2 / math.pi)), abs=0.01)


def test_histogram_has_everything():
    counts = temperature_vs_weight.histogram(torch.tensor([-9.0, 0.1, 0.2, 4.0, 77.0]))
    assert len(counts) == len(temperature_vs_weight.EDGES) - 1 and sum(counts) == 5
    assert counts[0] == 1 and counts[-1] == 2 and counts[16] == 2
