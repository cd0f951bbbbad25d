"""The losses of the SimCLR trainer of examples/: each by name, its settings, its random draws, the comparison."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from trainer_cases import ENVIRONMENT, EXAMPLES, SHORT, events, one_thread  # noqa: F401

from simclr import cli, losses
from simclr.settings import objective, parse

from fastcl import swd_loss

SWD = {"swd-normal": ("normal", 1.0), "swd-hypercube": ("hypercube", 1.0), "swd-hypersphere": ("hypersphere", 1000.0)}


def settings(*arguments):
    return parse(["digits", *arguments], "test")


def describe(chosen):
    return objective(chosen)[1]


def unit(z):
    return z / z.norm(dim=1, keepdim=True)


def log_sum_exp_and_positive(z1, z2, temperature):
    """log sum_{k != i} exp(<z_i, z_k> / temperature), and <z_i, z_p(i)>, of unit rows."""
    z = unit(torch.cat([z1, z2]))
    similarity = z @ z.T
    partner = similarity.diagonal(len(z1))
    others = (similarity / temperature).fill_diagonal_(-math.inf)
    return others.logsumexp(1), torch.cat([partner, partner])


def uniformity(z):
    return (-2 * torch.pdist(unit(z)).square()).exp().mean().log()


def expected_loss(name, z1, z2):
    if name == "nt_xent":
        total, positive = log_sum_exp_and_positive(z1, z2, 0.2)
        return (total - positive / 0.2).mean()
    if name == "decoupled":
        total, positive = log_sum_exp_and_positive(z1, z2, 1.0)
        return (12.8 * total - positive).mean()
    if name == "align-uniform":
        return (unit(z1) - unit(z2)).square().sum(1).mean() + (uniformity(z1) + uniformity(z2)) / 2
    prior, scale = SWD[name]
    rows = (unit(z1), unit(z2)) if prior == "hypersphere" else (z1, z2)
    return scale * ((rows[0] - rows[1]).square().mean() / 2 + 5 * swd_loss(torch.cat([z1, z2]), prior))


@pytest.mark.parametrize("name", losses.LOSSES)
def test_each_name_is_the_loss_of_its_paper(name):
    z1, z2 = torch.randn(2, 40, 16, dtype=torch.float64)
    torch.manual_seed(5)
    found = losses.build(settings("--loss", name))(z1, z2)
    torch.manual_seed(5)
    torch.testing.assert_close(found, expected_loss(name, z1, z2))  # both in float64


@pytest.mark.parametrize("name", losses.LOSSES)
def test_each_loss_trains_and_is_named(name, tmp_path):
    assert cli.main(["digits", "--out", str(tmp_path), "--no-probe", "--loss", name, *SHORT]) == 0
    values = [record["loss"] for record in events(tmp_path, "step")]
    assert len(values) == 2 and all(math.isfinite(value) for value in values)
    logged, wanted = events(tmp_path, "settings")[0], settings("--loss", name)
    assert (logged["loss"], logged["objective"]) == (name, " ".join(objective(wanted)))
    report = (tmp_path / "report.html").read_text()
    assert " ".join(describe(wanted).split()) in report and "None" not in report


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_loss_takes_bf16(name):
    z1, z2 = torch.randn(2, 40, 16)
    criterion = losses.build(settings("--loss", name))
    with torch.autocast("cpu", torch.bfloat16):
        z1 = (z1 @ torch.eye(16)).requires_grad_()
        criterion(z1, z2.bfloat16()).backward()
    assert z1.dtype == torch.bfloat16 and z1.grad.isfinite().all()


@pytest.mark.parametrize("name, options, expected", [
    ("nt_xent", [], "temperature 0.2"),
    ("nt_xent", ["--temperature", "0.5"], "temperature 0.5"),
    ("decoupled", [], "temperature 1, weight 12.8"),
    ("decoupled", ["--loss-weight", "0.3"], "temperature 1, weight 0.3"),
    ("swd-normal", [], "prior normal, weight 5"),
    ("swd-hypercube", ["--loss-weight", "2"], "prior hypercube, weight 2"),
    ("swd-hypersphere", [], "prior hypersphere, loss scale 1000, weight 5"),
    ("align-uniform", ["--loss-weight", "0.5"], "t 2, weight 0.5"),
])
def test_settings_follow_the_loss_unless_given(name, options, expected):
    assert describe(settings("--loss", name, *options)) == expected


def test_options_reach_the_loss():
    z1, z2 = torch.randn(2, 20, 8)
    total, positive = log_sum_exp_and_positive(z1.double(), z2.double(), 0.5)
    criterion = losses.build(settings("--loss", "decoupled", "--temperature", "0.5", "--loss-weight", "0.3"))
    torch.testing.assert_close(criterion(z1.double(), z2.double()), (0.3 * total - positive).mean())


@pytest.mark.parametrize("arguments, expected", [
    (["--loss", "triplet"], "swd-normal"),
    (["--loss", "swd-normal", "--temperature", "1"], "--temperature: expected --loss nt_xent or --loss decoupled or --method moco-v2 or --method instdisc, got --loss swd"),
    (["--loss", "align-uniform", "--temperature", "1"], "got --loss align-uniform"),
    (["--loss-weight", "1"], "--loss-weight: expected --loss decoupled or --loss swd-normal"),
    (["--loss", "decoupled", "--loss-weight", "0"], "float of at least 1e-30"),
])
def test_options_that_do_not_apply_are_one_line(arguments, expected, capfd):
    assert cli.main(["digits", *arguments]) == 2
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and expected in message, message


def test_random_draws_follow_the_seed_alone(tmp_path):
    """Neither the probes nor the number of workers take numbers from the stream that the draws come from."""
    values = {}
    for name, extra in (("a", ["--no-probe"]), ("b", ["--workers", "1", "--eval-every", "2"]),
                        ("c", ["--no-probe", "--seed", "1"])):
        torch.rand(7)  # what the process drew before has no effect
        arguments = ["--loss", "swd-hypersphere", *SHORT, *extra]
        assert cli.main(["digits", "--out", str(tmp_path / name), *arguments]) == 0
        values[name] = [record["loss"] for record in events(tmp_path / name, "step")]
    assert values["a"] == values["b"] != values["c"]


def test_draws_of_a_loss_change_nothing_else(tmp_path, monkeypatch):
    """Order of the data, views and weights are the same for a loss that draws and one that does not."""
    build, values = losses.build, []
    for count in (0, 3):
        def drawing(settings, count=count):
            criterion = build(settings)
            return lambda z1, z2: criterion(z1, z2) + 0 * torch.rand(count).sum()

        monkeypatch.setattr(losses, "build", drawing)
        out = tmp_path / str(count)
        assert cli.main(["digits", "--out", str(out), "--no-probe", *SHORT]) == 0
        values.append([record["loss"] for record in events(out, "step")])
    assert values[0] == values[1]


@pytest.mark.slow
def test_two_processes_draw_alike(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
               str(EXAMPLES / "simclr_imagenet.py"), "digits", "--no-probe", "--loss", "swd-normal", *SHORT]
    values = []
    for name in "ab":
        done = subprocess.run([*command, "--out", str(tmp_path / name)], capture_output=True, text=True, timeout=300,
                              env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        values.append([record["loss"] for record in events(tmp_path / name, "step")])
    assert values[0] == values[1]
