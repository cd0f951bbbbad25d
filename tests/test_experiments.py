"""What runs the experiments of examples/: their runs, what is kept of them, the command line, the page."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trainer_cases import ENVIRONMENT, EXAMPLES, one_thread, picture_folder  # noqa: F401

from experiments import all as everything
from experiments import datasets, page, rand_bit, results, study, training
from simclr import cli, methods
from simclr.errors import UsageError

SHORT = dict(training.DESK, width=2, batch=16, steps=2)


def toy(measure, seeds=2, **texts):
    """An experiment of three cases whose runs cost nothing."""
    return study.Study(
        name="toy", title="A finding: it is so", source="P1, Fig. 0", published="It was so.",
        cases=lambda scale: [dict(size=size, train={"steps": 40}) for size in (1, 2, 3)],
        measure=measure, seeds=seeds,
        table=lambda found: (["size", *map(str, (1, 2, 3))],
                               ["score", *(found.cell("score", size=size) for size in (1, 2, 3))]),
        figure=lambda found: b"picture", **texts)


def measured(case, seed, place):
    return dict(score=(10 * case["size"] + seed) / 100)


def options(tmp_path, *arguments):
    return study.parse(["--out", str(tmp_path), "--device", "cpu", "--jobs", "1", *arguments], "test")


# Runs


def test_finished_runs_are_kept_and_the_rest_is_done(tmp_path):
    calls = []

    def stopped(case, seed, place):
        calls.append((case["size"], seed))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measured(case, seed, place)

    with pytest.raises(KeyboardInterrupt):
        study.run(toy(stopped), options(tmp_path))
    study.run(toy(stopped), options(tmp_path))
    found, _ = study.kept(toy(stopped), options(tmp_path))
    assert calls == [(1, 0), (2, 0), (3, 0), (1, 1), (1, 1), (2, 1), (3, 1)]
    assert [(record["case"]["size"], record["seed"]) for record in found.records] == [
        (1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (3, 1)]
    assert (tmp_path / "toy" / "table.md").read_text() == (
        "| size | 1 | 2 | 3 |\n| --- | --- | --- | --- |\n| score | 10.5 ± 0.5 | 20.5 ± 0.5 | 30.5 ± 0.5 |\n")
    assert (tmp_path / "toy" / "figure.png").read_bytes() == b"picture"
    study.run(toy(stopped), options(tmp_path))
    assert len(calls) == 7


def test_a_line_that_was_cut_is_measured_again(tmp_path):
    study.run(toy(measured, seeds=1), options(tmp_path))
    path = tmp_path / "toy" / "runs.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-5])
    calls = []

    def counted(case, seed, place):
        calls.append(case["size"])
        return measured(case, seed, place)

    study.run(toy(counted, seeds=1), options(tmp_path))
    found, _ = study.kept(toy(counted, seeds=1), options(tmp_path))
    assert calls == [3] and len(found.records) == 3
    assert [record["case"]["size"] for record in results.finished(path)] == [1, 2, 3]


def test_a_line_that_was_cut_leaves_no_trace(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"a": 1}\n{"b"')
    results.append(path, '{"c": 3}')
    assert path.read_text() == '{"a": 1}\n{"c": 3}\n'


def test_a_run_with_other_settings_is_another_run(tmp_path):
    study.run(toy(measured, seeds=1), options(tmp_path))
    chosen = options(tmp_path, "--set", "steps=7")
    study.run(toy(measured, seeds=1), chosen)
    found, _ = study.kept(toy(measured, seeds=1), chosen)
    assert [record["case"]["train"] for record in found.records] == [{"steps": 7}] * 3
    assert len(results.finished(tmp_path / "toy" / "runs.jsonl")) == 6


def test_a_reduced_run_has_a_step_of_twenty_and_one_seed(tmp_path):
    plan = study.planned(toy(measured), options(tmp_path, "--smoke"))
    assert [(case["train"]["steps"], seed) for case, seed in plan] == [(2, 0)] * 3
    assert len(study.planned(toy(measured), options(tmp_path, "--seeds", "4"))) == 12


def test_runs_in_processes_of_their_own_find_the_same(tmp_path):
    """Training, too, by the bit: every process computes with one thread."""
    command = [sys.executable, str(EXAMPLES / "experiments" / "rand_bit.py"), "--device", "cpu", "--seeds", "1",
               "--set", "steps=2", "batch=16", "width=2"]
    found = []
    for jobs in ("1", "2"):
        out = tmp_path / jobs
        (out / "rand_bit").mkdir(parents=True)
        chosen = study.parse([*command[2:], "--out", str(out)], "test")
        plan = study.planned(rand_bit.STUDY, chosen)
        with open(out / "rand_bit" / "runs.jsonl", "w") as file:  # all but two are there
            for case, seed in plan[2:]:
                print(json.dumps(dict(case=case, seed=seed, seconds=0, jobs=1, result=dict(linear=0.5))), file=file)
        done = subprocess.run([*command, "--out", str(out), "--jobs", jobs], capture_output=True, text=True,
                              env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        records = results.finished(out / "rand_bit" / "runs.jsonl")[-2:]
        found.append(sorted((json.dumps(record["case"]), record["result"]["linear"]) for record in records))
    assert found[0] == found[1] and found[0][0][1] != 0.5


def test_what_ends_it_ends_its_processes(tmp_path):
    command = [sys.executable, str(EXAMPLES / "experiments" / "rand_bit.py"), "--device", "cpu", "--jobs", "2", "--out",
               str(tmp_path), "--set", "steps=100000", "width=2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while sum('"step"' in log.read_text() for log in tmp_path.glob("rand_bit/run-*/log.jsonl")) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.terminate()
    message = process.communicate(timeout=300)[1]
    assert process.returncode == 143 and "Traceback" not in message, message
    assert "rand_bit.py: stopped; the same command goes on" in message.splitlines(), message
    assert len(children) >= 2
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a process outlives the one that started it"
        time.sleep(0.2)


def test_two_ranks_share_a_run(tmp_path):
    source = str(EXAMPLES / "experiments" / "rand_bit.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", source,
               "--device", "cpu", "--out", str(tmp_path), "--seeds", "1", "--set", "steps=2", "batch=16", "width=2"]
    (tmp_path / "rand_bit").mkdir()
    plan = study.planned(rand_bit.STUDY, study.parse(command[7:], "test"))
    with open(tmp_path / "rand_bit" / "runs.jsonl", "w") as file:
        for case, seed in plan[1:]:
            print(json.dumps(dict(case=case, seed=seed, seconds=0, jobs=1, result=dict(linear=0.5))), file=file)
    done = subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    records = results.finished(tmp_path / "rand_bit" / "runs.jsonl")
    assert len(records) == len(plan) and records[-1]["case"] == plan[0][0] and 0 < records[-1]["result"]["linear"] <= 1


# Results


def test_spreads_and_cells():
    records = [dict(case=dict(kind=kind, bits=bits), seed=seed, seconds=30.0, jobs=2, result=dict(score=score))
               for kind, bits, seed, score in (("a", 0, 0, 0.5), ("a", 0, 1, 0.7), ("a", 2, 0, 0.25))]
    found = results.Results(records)
    assert found.cell("score", kind="a", bits=0) == "60.0 ± 10.0"
    assert found.cell("score", kind="a", bits=2) == "25.0"
    assert found.cell("score", kind="b", bits=2) == results.MISSING
    points = found.points("score", "bits", [0, 1, 2], kind="a")
    assert [(x, round(spread.mean, 6)) for x, spread in points] == [(0, 60.0), (2, 25.0)]
    assert found.factor("bits") == [0, 2] and found.seconds == 45.0 and found.seeds == 2


# The command line


@pytest.mark.parametrize("arguments, message", [
    (["--data", "mnist"], "argument --data: expected mnist=FOLDER or cifar10=FOLDER or imagenet=FOLDER, got mnist"),
    (["--data", "minst=here"], "imagenet=FOLDER, got minst=here"),
    (["--set", "bits=3", "temperature=0.1"], "--set: expected settings that are the same in all runs of rand_bit"),
    (["--set", "seed=3"], "--set: expected settings that are the same in all runs of rand_bit, got seed"),
    (["--set", "=3"], "argument --set: expected NAME=VALUE, got =3"),
    (["--scale", "lab"], "argument --scale"),
    (["--jobs", "0"], "argument --jobs"),
    (["--device", "gpu"], "--device: expected auto, cpu or one of"),
    (["--scale", "paper"], "--data: expected mnist=FOLDER for --scale paper, got none"),
    (["--scale", "paper", "--data", "mnist=there"], "--data: expected mnist=FOLDER with train/ and val/, got there"),
    (["--set", "optimiser=lars"], "unrecognized arguments: --optimiser"),
])
def test_a_mistake_is_one_line(arguments, message, tmp_path, capfd):
    assert rand_bit.STUDY.main(["--jobs", "1", "--out", str(tmp_path), *arguments]) == 2
    error = capfd.readouterr().err
    assert message in error.splitlines()[-1] and "Traceback" not in error


@pytest.mark.parametrize("arguments, name", [
    ([], "experiments"), (["--scale", "paper"], "experiments-paper"), (["--smoke"], "experiments-smoke"),
    (["--seeds", "1"], "experiments-own"), (["--set", "steps=50"], "experiments-own"),
    (["--scale", "paper", "--smoke", "--set", "steps=50"], "experiments-paper-smoke-own"),
])
def test_only_a_plain_run_writes_where_the_pages_results_are(arguments, name):
    assert study.parse(arguments, "test").out == Path("results") / name


def test_a_figure_of_other_settings_gives_way(tmp_path):
    each = toy(measured)
    changing = replace(each, figure=lambda found: str(len(found.records)).encode())
    for arguments in ([], ["--seeds", "1"], []):
        study.run(changing, options(tmp_path, *arguments))
        runs = 3 if arguments else 6
        assert (tmp_path / "toy" / "figure.png").read_bytes() == str(runs).encode()


def test_settings_that_a_later_experiment_refuses_are_refused_before_the_first_one(tmp_path, capfd):
    arguments = ["--set", "batch=64", "--out", str(tmp_path / "out")]
    assert study.main(everything.studies(["rand_bit", "batch_size"]), arguments) == 2
    assert "the same in all runs of batch_size, got batch" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_later_experiment_lacks_is_said_before_the_first_one(tmp_path, capfd):
    folders = [f"{name}={tmp_path}" for name in ("mnist", "cifar10")]
    arguments = ["--scale", "paper", "--data", *folders, "--out", str(tmp_path / "out")]
    assert study.main(everything.studies(["rand_bit", "digit_on_image"]), arguments) == 2
    assert "--data: expected imagenet=FOLDER for --scale paper, got mnist cifar10" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_published_size_takes_folders(tmp_path):
    """Of which these are a small copy, and the network is small too."""
    for split in ("train", "val"):
        picture_folder(tmp_path / "mnist" / split, each=9)
    case = next(case for case in rand_bit.cases("paper") if case["bits"] == 4)
    assert case["train"]["arch"] == "resnet18" and case["train"]["optimizer"] == "lars"
    case["train"] |= dict(SHORT, batch=8, augment="workers")
    place = study.Place(tmp_path / "run", {"mnist": str(tmp_path / "mnist")}, torch.device("cpu"))
    assert 0 <= rand_bit.measure(case, 0, place)["linear"] <= 1


# Training


def place(tmp_path):
    return study.Place(tmp_path, {}, torch.device("cpu"))


def source():
    digits = datasets.load_digits()
    return datasets.digit_source(datasets.Digits(*(part[:64] for part in digits)), 16)


def test_arguments_of_the_trainer():
    train = dict(head_layers=2, no_blur=True, crop=[0.2, 1], lr=1e-3)
    assert list(training.arguments(train)) == ["--head-layers", "2", "--no-blur", "--crop", "0.2", "1", "--lr", "0.001"]


@pytest.mark.parametrize("method", rand_bit.METHODS)
def test_every_method_of_rand_bit(method, tmp_path):
    case = next(case for case in rand_bit.cases("desk") if case["method"] == method and case["bits"] == 4)
    case["train"] |= dict(SHORT, width=4) | ({"queue": 32} if "queue" in case["train"] else {})
    assert 0 < rand_bit.measure(case, 0, place(tmp_path))["linear"] <= 1


def test_supervised_training_learns_the_labels(tmp_path):
    case = dict(train=dict(SHORT, width=8, steps=60, warmup=0.0))
    trainer = training.train(case, 0, place(tmp_path), source(), training.supervised)
    losses = [record["loss"] for record in trainer.log.of("step")]
    assert losses[-1] < 0.7 * losses[0] and trainer.log.of("step")[-1]["top1"] > 0.6


def test_supervised_targets_are_shares():
    pictures = source()
    pictures.train.shares = torch.full((len(pictures.train), 10), 0.1)
    settings = training.settings.parse(["digits", "--width", "2"], "test")
    method = training.supervised(settings, pictures)
    assert torch.equal(method.targets(None, torch.tensor([3])), torch.full((1, 10), 0.1))
    logits = torch.randn(5, 10)
    shares = torch.rand(5, 10).softmax(1)
    expected = -(shares * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(method.loss([logits], shares), expected)
    assert isinstance(method, methods.Method) and method.views == 1


def test_the_bound_of_a_variational_autoencoder():
    """Against torch.distributions'."""
    settings = training.settings.parse(["digits", "--width", "2", "--head-out", "3"], "test")
    method = training.vae(settings, source())
    rows = method.network(torch.rand(4, 1, 16, 16)).detach()
    assert rows.shape == (4, 256 + 6)
    pictures = torch.rand(4, 256)
    logits, mean, log_variance = rows.double().split([256, 3, 3], dim=1)
    prior, posterior = torch.distributions.Normal(0, 1), torch.distributions.Normal(mean, (log_variance / 2).exp())
    divergence = torch.distributions.kl_divergence(posterior, prior).sum(1)
    seen = torch.distributions.ContinuousBernoulli(logits=logits)
    likelihood = (seen.log_prob(pictures.double()) - seen._cont_bern_log_norm()).sum(1)
    expected = (divergence - likelihood).mean()
    found = method.loss([rows], pictures)
    # The log of the normaliser of torch's distribution is a series near one half, good to about 1e-6 an entry.
    assert abs(found - expected) < 1e-4 * expected


# The page


def test_the_page_has_what_came_out(tmp_path):
    each = toy(measured, verdict="yes", found="It is so: 10.5.")
    study.run(each, options(tmp_path))
    text = page.text([each, rand_bit.STUDY], options(tmp_path))
    assert "[toy](#a-finding-it-is-so)" in text and "## A finding: it is so" in text
    assert "6 runs, 2 seeds, under 1 min" in text and "| yes | under 1 |" in text and "It is so: 10.5." in text
    assert (tmp_path / "toy" / "table.md").read_text() in text and "figure.png" in text
    assert "rand_bit](#" not in text  # it has no results here
    path = tmp_path / "toy" / "runs.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    assert "5 of 6 runs, 2 seeds" in page.text([each], options(tmp_path))


def test_the_page_is_that_of_the_committed_runs(monkeypatch):
    """And so are the tables; figures in what is said of them stand in them."""
    monkeypatch.chdir(EXAMPLES.parent)
    out, studies = Path("results/experiments"), everything.studies()
    assert Path("docs/experiments.md").read_text(encoding="utf-8") == page.text(studies, study.Options(out=out))
    for each in studies:
        found, _ = study.kept(each, study.Options(out=out))
        if not found.records:
            continue
        shown = results.markdown(*each.table(found))
        assert (out / each.name / "table.md").read_text(encoding="utf-8") == shown, each.name
        assert each.found and page.discussed(each, shown, study.Options(out=out)), each.name


def test_what_is_said_of_a_desk_is_not_said_of_other_results(tmp_path):
    each = toy(measured, verdict="yes", found="It is so: 10.5.")
    study.run(each, options(tmp_path))
    assert "It is so: 10.5." in page.text([each], options(tmp_path))
    for wrong in ("It is so: 0.5.", "It is so: 10.55."):
        other = toy(measured, verdict="yes", found=wrong)
        text = page.text([other], options(tmp_path))
        assert "| not discussed |" in text and other.found not in text
    paper = options(tmp_path, "--scale", "paper")
    assert each.found not in (text := page.text([each], paper)) and "toy.py --scale paper`" in text


def test_every_experiment_is_in_the_list():
    own = {"__init__", "all", "study", "results", "coloured", "clusters", "training", "datasets", "figures", "page"}
    files = {path.stem for path in (EXAMPLES / "experiments").glob("*.py")} - own
    assert files == set(everything.NAMES)
    for each in everything.studies():
        assert each.cases("desk") and each.cases("paper") and each.name in everything.NAMES
        assert len({json.dumps(case) for case in each.cases("desk")}) == len(each.cases("desk"))
        assert json.loads(json.dumps(each.cases("desk"))) == each.cases("desk"), each.name


class ManyPictures:
    labels = torch.arange(1000)

    def __len__(self):
        return 60_000


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("name", everything.NAMES)
def test_the_trainer_takes_the_published_sizes_on_so_many_gpus(name, world):
    each, = everything.studies([name])
    source = SimpleNamespace(train=ManyPictures(), test=ManyPictures())
    for case in each.cases("paper"):
        found = training.chosen(case, "pictures", "--no-probe")
        splits, found.bn_splits = found.bn_splits, training.splits_of_a_rank(found.bn_splits, world)
        cli._check(found, source, world)
        assert found.bn_splits == 1 if splits == 1 else found.bn_splits * world == max(splits, 2 * world)


def test_a_data_set_that_is_not_named(tmp_path):
    with pytest.raises(UsageError, match="expected imagenet=FOLDER"):
        place(tmp_path).pictures("imagenet")
    assert place(tmp_path).pictures("digits") == "digits"
