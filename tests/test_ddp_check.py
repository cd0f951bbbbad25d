"""examples/ddp_check.py as a user starts it, and that it notices a loss that is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch is built without gloo", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SCRIPT = EXAMPLES / "ddp_check.py"
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
sys.path.insert(0, str(EXAMPLES))

import ddp_cases
import ddp_check

OURS = [name for name in ddp_cases.names() if name not in ddp_cases.PEERS]


@pytest.fixture(autouse=True)
def threads():
    """The check sets their number for its process: put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def start(*arguments, script=SCRIPT):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=150,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(EXAMPLES)))},
    )  # fmt: skip


def table(done):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert lines[0] == list(ddp_check.COLUMNS), done.stderr
    return [dict(zip(ddp_check.COLUMNS, line, strict=True)) for line in lines[2:]]


@pytest.mark.parametrize("options", [(), ("--uneven",)])
def test_all_of_ours_are_right(options, tmp_path):
    done = start("--json", str(tmp_path / "found.json"), "--losses", *OURS, *options)
    lines = table(done)
    assert done.returncode == 0, done.stderr
    assert {line["loss"] for line in lines} == set(OURS) and len(lines) == 2 * len(OURS) - 1
    for line in lines:
        assert line["verdict"] == "right" and line["value"] == "1.000", line
        numbers = (line["encoder"], line["temperature or scale"], line["bias"])
        assert all(cell == "-" or cell.startswith("1.000 (") for cell in numbers) and numbers[0] != "-", line
    assert done.stderr.count(": right (") == len(lines)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["processes"] == 2 and found["uneven"] == bool(options)
    assert [len(line["ranks"]) for line in found["lines"]] == [2] * len(lines)


WRONG = """
import functools, sys
import fastcl
fastcl.nt_xent = functools.partial(fastcl.nt_xent, grad_reduction="sum")
uniformity = fastcl.uniformity_loss
fastcl.uniformity_loss = lambda *args, **options: uniformity(*args, **options) + 1
def raises(rows, **options):
    import torch.distributed as dist
    if dist.is_initialized():
        raise ValueError("no rows")
    return rows.sum()
fastcl.swd_loss = raises
import ddp_check
sys.exit(ddp_check.main(["--losses", "nt_xent", "uniformity_loss", "swd_loss", "info_nce"]))
"""


def test_a_loss_that_is_wrong_is_noticed(tmp_path):
    """A gradient of half its size, a value that is off, an exception; the line after them is as ever."""
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    done = start(script=script)
    found = {(line["loss"], line["with"]): line for line in table(done)}
    assert done.returncode == 1
    assert found["nt_xent", "exchange=ring"]["encoder"] == "0.500 (0.5)"
    assert found["uniformity_loss", "exchange=ring"]["encoder"].startswith("1.000 (")
    verdicts = {key[0]: line["verdict"] for key, line in found.items()}
    assert verdicts == {
        "nt_xent": "wrong", "uniformity_loss": "wrong", "info_nce": "right", "swd_loss": "failed: ValueError: no rows",
    }  # fmt: skip
    assert "ddp_check.py: nt_xent exchange=gather: wrong" in done.stderr


def test_one_process_and_a_library_that_is_missing(monkeypatch, capfd):
    monkeypatch.setattr(ddp_cases, "_installed", lambda *packages: None)
    assert ddp_check.main(["--losses", "nt_xent", "lightly"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert [line.split("|")[-2].strip() for line in out[2:]] == ["right", "right", "not installed"]


@pytest.mark.parametrize("library", [name for name in ddp_cases.PEERS if name != "Inf-CL"])
def test_libraries(library, capfd):
    """One process of each library that is installed is right: it is compared with itself."""
    if ddp_cases._installed(*ddp_cases.PEERS[library][1]) is None:
        pytest.skip(f"{library} is not installed")
    assert ddp_check.main(["--losses", library]) == 0
    lines = capfd.readouterr().out.splitlines()[2:]
    assert lines and all(line.endswith("| right |") for line in lines), lines


def test_verdict():
    case = ddp_cases.Case("a", None, None)
    fine = {"value": 1.0, "gradients": {"encoder": [1.0, 0.0]}}
    for value, distance, expected in ((1, 0, "right"), (1, 2e-5, "wrong"), (1, float("nan"), "wrong"), (2, 0, "wrong")):
        found = {"value": value, "gradients": {"encoder": [1.0, distance]}}
        assert ddp_check.verdict(case, [fine, found]) == expected
    # Another library's value may be that of a rank's own rows.
    assert ddp_check.verdict(case._replace(library="b"), [fine, {**fine, "value": 2.0}]) == "right"
    errors = [{"error": "waited", "at": 2.0}, {"error": "broke", "at": 1.0}]
    assert ddp_check.verdict(case, [fine, *errors]) == "failed: broke"


@pytest.mark.parametrize("arguments, expected", [
    (["--losses", "l2"], "nt_xent"),
    (["--losses"], "--losses"),
    (["--json", "missing/found.json"], "a folder that exists, got missing/found.json"),
    (["--seed", "1"], "--seed"),
])  # fmt: skip
def test_bad_arguments_are_one_line(arguments, expected, capfd):
    with pytest.raises(SystemExit) as stopped:
        ddp_check.main(arguments)
    message = capfd.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1 and expected in message, message


def test_the_committed_table_is_that_of_its_figures():
    lines = json.loads((RESULTS / "ddp_check.json").read_text())["lines"]
    assert (RESULTS / "ddp_check.md").read_text() == ddp_check.markdown(lines) + "\n"
    assert all(line["verdict"] == "right" for line in lines if line["ours"])
    assert {line["loss"] for line in lines if line["ours"]} == set(OURS)
