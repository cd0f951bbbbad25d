"""The SimCLR trainer of examples/: its parts against hand-written values, and short runs from the command line."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

MISSING = [
    name
    for name in ("torchvision", "timm", "sklearn", "matplotlib", "tqdm", "PIL")
    if importlib.util.find_spec(name) is None
]
if MISSING:
    pytest.skip(f"the examples need {', '.join(MISSING)}", allow_module_level=True)

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}  # the working tree's library, installed or not
sys.path.insert(0, str(EXAMPLES))

from simclr import augment, cli, data, model, optim, probe

SHORT = ["--steps", "4", "--batch", "16", "--log-every", "2", "--workers", "0", "--device", "cpu"]


def picture_folder(root, classes=("cat", "dog"), each=12, side=32, kind="png"):
    """An ImageFolder tree of noisy pictures, each class with a colour of its own."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(each):
            pixels = rng.integers(0, 120, (side, side, 3))
            pixels[..., number % 3] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.{kind}")
    return root


@pytest.fixture(autouse=True)
def one_thread():
    """Runs set the number of threads and cuDNN's mode for their process: the same here for all, and put back."""
    threads, deterministic = torch.get_num_threads(), torch.backends.cudnn.deterministic
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = deterministic


def events(folder, name):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == name]


# Optimiser and schedule


def test_lars_equals_its_formula():
    start, gradients = torch.tensor([[3.0, 4.0]]), [torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, -2.0]])]
    weight = torch.nn.Parameter(start.clone())
    optimizer = optim.LARS([weight], lr=0.5, momentum=0.9, weight_decay=0.1, trust=0.001)
    expected, velocity = start.double().numpy(), 0.0
    for gradient, lr in zip(gradients, (0.5, 0.25)):
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = gradient.clone()
        optimizer.step()
        update = gradient.double().numpy() + 0.1 * expected
        ratio = 0.001 * np.linalg.norm(expected) / np.linalg.norm(update)
        velocity = 0.9 * velocity + lr * ratio * update
        expected = expected - velocity
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-6)


def test_lars_without_adaptation_is_momentum_sgd():
    ours, theirs = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    lars = optim.LARS([dict(params=[ours], adapt=False)], lr=0.1)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for step in range(3):
        for weight, optimizer in ((ours, lars), (theirs, sgd)):
            weight.grad = torch.tensor([1.0, -2.0, 0.5]) * (step + 1)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("start, gradient", [(0.0, 1.0), (1.0, 0.0)])
def test_lars_with_a_norm_of_zero_stays_finite(start, gradient):
    weight = torch.nn.Parameter(torch.full((2, 2), start))
    weight.grad = torch.full((2, 2), gradient)
    optim.LARS([weight], lr=0.1).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), start - 0.1 * gradient))


def test_only_weights_are_decayed_and_adapted():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    decayed, plain = optim.build_optimizer("lars", network, lr=1.0, weight_decay=0.1).param_groups
    assert [p.ndim for p in decayed["params"]] == [4, 2] and [p.ndim for p in plain["params"]] == [1, 1, 1, 1]
    assert (decayed["weight_decay"], decayed["adapt"]) == (0.1, True)
    assert (plain["weight_decay"], plain["adapt"]) == (0.0, False)


def test_schedule_and_scaling():
    factors = [optim.warmup_cosine(step, steps=110, warmup=10) for step in range(110)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[10] == 1.0 and factors[60] == pytest.approx(0.5) and 0 < factors[-1] < 1e-3
    assert optim.warmup_cosine(0, steps=1, warmup=0) == 1.0
    assert optim.scaled_lr(0.075, 1024, "sqrt") == pytest.approx(2.4)
    assert optim.scaled_lr(0.075, 1024, "none") == 0.075


# Data


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


def test_stratified_split_keeps_one_of_a_pair():
    train, test = data.stratified_split(torch.tensor([0, 0, 1, 1, 1, 2]))
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(6))
    assert torch.tensor([0, 0, 1, 1, 1, 2])[test].tolist() == [0, 1]


def test_views_depend_on_seed_epoch_and_index_alone():
    source = data.open_data("digits")
    views = data.TwoViews(source.train, source.views, seed=3)
    before = torch.random.get_rng_state()
    first, second = views[2, 7]
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.shape == (1, 48, 48) and 0 <= first.min() and first.max() <= 1
    assert not torch.equal(first, second)
    torch.rand(5)
    assert torch.equal(first, views[2, 7][0])
    assert not torch.equal(first, views[3, 7][0])
    assert not torch.equal(first, data.TwoViews(source.train, source.views, seed=4)[2, 7][0])


def test_ranks_share_every_batch_and_epochs_repeat_nothing():
    ranks = [list(data.EpochBatches(50, batch=16, steps=6, seed=0, rank=rank, world=3)) for rank in range(3)]
    whole = list(data.EpochBatches(50, batch=16, steps=6, seed=0))
    assert [sum(parts, []) for parts in zip(*ranks)] == whole
    for epoch in range(2):
        keys = [key for batch in whole for key in batch if key[0] == epoch]
        assert len(keys) == len(set(keys)) == 48
    assert [key[1] for key in whole[0]] != [key[1] for key in whole[3]]


def test_photo_views_and_plain_pictures(tmp_path):
    folder = picture_folder(tmp_path / "data", side=120, kind="jpg")
    source = data.open_data(str(folder))
    assert (source.image_size, source.channels, source.classes) == (224, 3, ["cat", "dog"])
    first, _ = data.TwoViews(source.train, source.views, 0)[0, 0]
    assert first.shape == source.plain(source.train.read(0)).shape == (3, 224, 224)
    assert first.dtype == torch.float32 and 0 <= first.min() and first.max() <= 1
    assert augment.photo_views(32)(source.train.read(0)).shape == (3, 32, 32)


def test_train_and_val_folders_are_the_splits(tmp_path):
    picture_folder(tmp_path / "train", each=5)
    picture_folder(tmp_path / "val", each=3)
    source = data.open_data(str(tmp_path))
    assert (len(source.train), len(source.test), source.image_size) == (10, 6, 32)


# Model and probes


@pytest.mark.parametrize("arch, features", [("convnet", 128), ("resnet18", 512)])
def test_encoders(arch, features):
    encoder = model.build_encoder(arch, 1, 32)
    assert encoder(torch.rand(2, 1, 32, 32)).shape == (2, features) and encoder.num_features == features


def test_small_pictures_get_the_stem_that_keeps_their_size():
    small, large = (model.build_encoder("resnet18", 3, size) for size in (32, 224))
    assert small.conv1.stride == (1, 1) and large.conv1.stride == (2, 2)


@pytest.mark.parametrize("layers", [2, 3])
def test_projection_head(layers):
    head = model.projection_head(8, layers, 4)
    assert sum(isinstance(part, torch.nn.Linear) for part in head) == layers
    assert isinstance(head[-1], torch.nn.BatchNorm1d) and head(torch.rand(5, 8)).shape == (5, 4)


def separable(n=120, classes=4, dim=16):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    rows = torch.randn(classes, dim, generator=generator)[labels] * 3
    rows = rows + 0.3 * torch.randn(n, dim, generator=generator)
    index = torch.arange(n)
    half = n // 2
    return probe.Features(rows[:half], labels[:half], index[:half], rows[half:], labels[half:], index[half:])


def test_probes_on_separable_and_on_meaningless_features():
    features = separable()
    assert probe.linear_probe(features) == probe.knn_probe(features) == 1.0
    features.train, features.test = torch.randn(2, *features.train.shape)
    assert probe.linear_probe(features) < 0.6 and probe.knn_probe(features) < 0.6


def test_contrastive_top1_equals_the_full_matrix():
    z1, z2 = torch.randn(37, 5), torch.randn(37, 5)
    z2[:20] = z1[:20] + 0.01 * z2[:20]
    rows = torch.nn.functional.normalize(torch.cat([z1, z2]), dim=1)
    similarity = (rows @ rows.T).fill_diagonal_(-2)
    expected = (similarity.argmax(1) == torch.arange(74).roll(37)).float().mean().item()
    for chunk in (1, 10, 74, 1024):
        assert probe.contrastive_top1(z1, z2, chunk) == pytest.approx(expected)
    assert 0.5 < expected < 1


# Whole runs


def check_outputs(folder):
    report = (folder / "report.md").read_text()
    for name in ("curves.png", "views.png", "neighbours.png"):
        assert f"({name})" in report
        with Image.open(folder / name) as picture:
            assert picture.width > 400 and picture.height > 300
    assert "| linear (logistic regression) |" in report and "| temperature | 0.2 |" in report
    losses = [record["loss"] for record in events(folder, "step")]
    assert losses and all(math.isfinite(loss) for loss in losses)
    assert [record["step"] for record in events(folder, "probe")][0] == 0
    assert torch.load(folder / "model.pt", weights_only=True)
    return losses


def test_run_on_digits_is_complete_and_reproducible(tmp_path, capsys):
    losses = []
    for name, extra in (("a", []), ("b", ["--workers", "1"]), ("c", ["--seed", "1"])):
        assert cli.main(["digits", "--out", str(tmp_path / name), *SHORT, "--eval-every", "2", *extra]) == 0
        losses.append(check_outputs(tmp_path / name))
    assert losses[0] == losses[1], "the number of workers changed the run"
    assert losses[0] != losses[2], "the seed has no effect"
    assert [record["step"] for record in events(tmp_path / "a", "probe")] == [0, 2, 4]
    assert "report: " in capsys.readouterr().out


def test_run_on_a_folder_names_what_it_could_not_read(tmp_path):
    folder = picture_folder(tmp_path / "data", each=14)
    for path in (folder / "cat").glob("*.png"):
        if path.stem in ("3", "5"):
            path.write_bytes(path.read_bytes()[:200])
    out = tmp_path / "out"
    arguments = ["--arch", "resnet18", "--optimizer", "lars", "--bf16", "--head-layers", "2", "--image-size", "16"]
    assert cli.main([str(folder), "--out", str(out), *SHORT, *arguments]) == 0
    check_outputs(out)
    unreadable = {Path(name).name for record in events(out, "unreadable") for name in record["pictures"]}
    assert unreadable == {"3.png", "5.png"}
    assert "2 pictures could not be read" in (out / "report.md").read_text()
    assert events(out, "settings")[0]["lr_scaling"] == "sqrt"


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("simclr.losses.build", lambda settings: lambda z1, z2: (z1 - z2).sum() * math.nan)
    assert cli.main(["digits", "--out", str(tmp_path), "--no-probe", *SHORT]) == 1
    assert "step 2: the loss is nan" in capfd.readouterr().err.splitlines()[-1]


def test_run_without_labels(tmp_path):
    folder = picture_folder(tmp_path / "data", ("all",), each=24)
    assert cli.main([str(folder), "--out", str(tmp_path), "--arch", "convnet", "--no-probe", *SHORT]) == 0
    assert not events(tmp_path, "probe") and "neighbours" not in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
               str(EXAMPLES / "simclr_imagenet.py"), "digits", "--out", str(tmp_path), *SHORT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    check_outputs(tmp_path)
    assert events(tmp_path, "end")[0]["processes"] == 2
    assert done.stdout.count("report: ") == 1


def _unreadable(root):
    (root / "cat").mkdir(parents=True)
    (root / "cat" / "one.png").write_bytes(b"no picture")


def _flat(root):
    root.mkdir()
    Image.new("RGB", (8, 8)).save(root / "one.png")


def _different_classes(root):
    picture_folder(root / "train", ("cat", "dog"))
    picture_folder(root / "val", ("cat", "cow"))


BAD_DATA = {
    "missing": (lambda root: None, "nothing at that path"),
    "file": (lambda root: root.write_text("x"), "a file"),
    "empty": (lambda root: root.mkdir(), "one sub-folder"),
    "no pictures": (lambda root: (root / "cat").mkdir(parents=True), "no picture"),
    "pictures without class folders": (_flat, "one sub-folder"),
    "unreadable": (_unreadable, "can be read"),
    "fewer than the batch": (lambda root: picture_folder(root, each=5), "--batch 16"),
    "one class": (lambda root: picture_folder(root, ("cat",), each=40), "two classes"),
    "splits that differ": (_different_classes, "same classes"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line(case, tmp_path, capfd):
    make, expected = BAD_DATA[case]
    make(tmp_path / "data")
    code = cli.main([str(tmp_path / "data"), "--out", str(tmp_path / "out"), *SHORT])
    message = capfd.readouterr().err
    assert code == 2 and message.count("\n") == 1 and expected in message and "got" in message, message


@pytest.mark.parametrize("arguments, expected", [
    (["--arch", "vgg"], "convnet"),
    (["--batch", "0"], "positive int"),
    (["--lr", "nan"], "positive float"),
    (["--warmup", "2"], "0 to 1"),
    (["--seed", "-1"], "--seed"),
    (["--optimizer", "sgd"], "adam"),
    (["--head-layers", "9"], "2, 3"),
])
def test_bad_settings_are_one_line(arguments, expected, capfd):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["digits", *arguments])
    message = capfd.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1 and expected in message, message


@pytest.mark.parametrize("arguments, expected", [
    (["--device", "tpu"], "--device"),
    (["--batch", "1"], "at least 2"),
    (["--batch", "2000"], "--batch 2000"),
    (["--image-size", "32"], "--image-size"),
])
def test_settings_that_do_not_fit_are_one_line(arguments, expected, tmp_path, capfd):
    assert cli.main(["digits", "--out", str(tmp_path / "out"), "--workers", "0", *arguments]) == 2
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and expected in message and "got" in message, message


def test_script_fails_without_traceback(tmp_path):
    script = [sys.executable, str(EXAMPLES / "simclr_imagenet.py")]
    for arguments in ([], [str(tmp_path / "nothing")]):
        done = subprocess.run([*script, *arguments], capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
