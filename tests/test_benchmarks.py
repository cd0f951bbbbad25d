"""The benchmarks' own arithmetic, reports and command lines, at sizes that take no time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch

from fastcl import nt_xent, reference
from fastcl.kernels import launch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import (
    accuracy,
    eager,
    floor,
    gpu,
    gpu_cases,
    gpu_report,
    gpu_runner,
    memory,
    reporting,
    timing,
    tune,
)

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


def script(name: str, *args: str) -> subprocess.CompletedProcess:
    """A benchmark started as a user starts it, on a machine without a GPU."""
    # The empty string hides GPUs that are there.
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / name), *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def exact_pair(z1, z2):
    z1, z2 = (z.detach().double().requires_grad_() for z in (z1, z2))
    loss = reference.nt_xent(z1, z2, 0.1)
    return loss, *torch.autograd.grad(loss, (z1, z2))


def test_eager_and_the_float64_truth_are_nt_xent(monkeypatch):
    monkeypatch.setattr(accuracy, "CHUNK_ELEMENTS", 1000)
    z1, z2 = timing.rotating_inputs(74, 9, torch.float64, CPU)[0]
    expected = exact_pair(z1, z2)
    torch.testing.assert_close(accuracy.exact(z1, z2, 0.1), expected, rtol=1e-12, atol=1e-15)
    loss = eager.nt_xent(z1, z2, 0.1)
    torch.testing.assert_close((loss, *torch.autograd.grad(loss, (z1, z2))), expected, rtol=1e-12, atol=1e-15)


def test_errors_see_a_wrong_row():
    z1, z2 = timing.rotating_inputs(40, 8, torch.float32, CPU)[0]
    truth = accuracy.exact(z1, z2, 0.1)
    assert max(accuracy.errors(nt_xent, truth, z1, z2, 0.1).values()) < 1e-5
    wrong = accuracy.errors(lambda a, b, t: nt_xent(a, b, t) + a[3].sum(), truth, z1, z2, 0.1)
    assert wrong["worst row"] > wrong["gradient"] > 0.1


def test_floor_visits_half_the_tiles_forward_and_all_backward():
    assert len(floor._tiles(5, False)) == 15
    assert len(floor._tiles(5, True)) == 15 + 25
    threads = torch.get_num_threads()
    for m in (40, 3 * floor.TILE + 7):
        floor.step(torch.randn(m, 6), True)()
    assert threads == torch.get_num_threads()


def test_sides_take_turns_and_quotients_are_taken_round_by_round():
    order = []
    sides = {name: (lambda name=name: order.append(name) or time.sleep(0.002)) for name in ("a", "b")}
    samples = timing.alternate(sides, CPU, 0.0, least_rounds=4, round_ms=0.0)
    assert [len(values) for values in samples.values()] == [4, 4]
    assert "".join(order[2:]) == "abbaabba"
    assert timing.ratio([2.0, 8.0, 30.0], [1.0, 2.0, 10.0]) == {
        "median": 3.0, "low": 2.5, "high": 3.5, "fastest": 2.0, "rounds": 3,
    }  # fmt: skip
    assert timing.summary([5.0])["low"] == 5.0


def test_cuda_time_is_read_from_events(monkeypatch):
    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.now += 6.0
            self.at = Event.now

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    calls = []
    assert timing.milliseconds(lambda: calls.append(1), 3, torch.device("cuda")) == 2.0
    assert len(calls) == 3


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_sees_the_matrix_of_eager_and_none_of_ours():
    # Large enough that the chunks of the pure-PyTorch fallback are small beside the matrix.
    m = 4096
    ours, theirs = memory.resident_peaks([memory.Case("fastcl", m, 16), memory.Case("eager", m, 16)])
    assert theirs > 2 * 4 * m * m
    assert 0 <= ours < 4 * m * m


@pytest.mark.parametrize("name", ["gpu.py", "tune.py", "gpu_cases.py", "gpu_swd.py"])
def test_without_cuda_one_line_and_exit_status_2(name, tmp_path):
    done = script(name, *(["--out", str(tmp_path / "x")] if name != "tune.py" else []))
    assert done.returncode == 2
    assert done.stderr.startswith(f"{name}: expected a CUDA device, got none")
    assert done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.parametrize("generation", launch.GENERATIONS)
def test_candidates_fit_and_begin_with_the_present_tile(generation):
    assert len(tune.entries()) == sum(len(widths) for sizes in launch.TABLE.values() for widths in sizes.values())
    for entry in tune.entries():
        tiles = tune.candidates(entry, generation)
        assert tiles[0] == entry.tiles()[generation]
        assert 2 <= len(tiles) == len(set(tiles)) <= tune.MOST_TILES
        for tile in tiles[1:]:
            assert tune.shared_bytes(entry, tile) <= tune.SHARED_BYTES[generation]
            assert entry.width is None or tile.block_d == tiles[0].block_d
            assert entry.name != "lse_symmetric" or tile.block_n % tile.block_m == 0


def test_printed_table_is_the_table_with_the_best_tiles():
    def parsed(best):
        scope = vars(launch).copy()
        exec(tune.table_source(best, 90), scope)
        return scope["TABLE"]

    assert parsed({}) == launch.TABLE
    for entry in tune.entries():
        tile = replace(entry.tiles()[90], num_stages=7)
        table = parsed({entry: tile})
        assert table[entry.name][entry.itemsize][entry.width] == entry.tiles() | {90: tile}
        table[entry.name][entry.itemsize][entry.width][90] = entry.tiles()[90]
        assert table == launch.TABLE


@needs_triton
def test_sweep_times_good_tiles_and_records_bad_ones():
    before = repr(launch.TABLE)
    entry = tune.Entry("lse_symmetric", 2, 64)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    present = entry.tiles()[launch.generation(device)]
    # A block must be a power of two.
    tiles = [present, replace(present, num_stages=2), replace(present, block_m=48)]
    record = tune.sweep_entry(entry, tiles, 70, device, 0.0)
    good, other, bad = record["tiles"]
    assert good["ms"] > 0 and other["ms"] > 0 and "ms" not in bad and bad["error"]
    assert record["best"] in (good["tile"], other["tile"])
    assert record["best_ms"] <= record["present_ms"]
    assert repr(launch.TABLE) == before


@needs_triton
@pytest.mark.parametrize("name", list(launch.TABLE))
def test_workload_runs_the_pass_of_its_entry(name, monkeypatch):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = []
    look_up = launch.tile
    run = tune.workload(tune.Entry(name, 2, next(iter(launch.TABLE[name][2]))), 20, device)
    monkeypatch.setattr(launch, "tile", lambda *args: asked.append(args[0]) or look_up(*args))
    assert torch.isfinite(run()).all()
    # The wide backward asks for the narrow one first.
    assert asked[-1] == name


def test_sweep_goes_on_after_an_entry_that_fails_and_keeps_time(monkeypatch):
    def sweep_entry(entry, tiles, *_):
        if entry.name == "lse_rows":
            raise RuntimeError("broken")
        return {"entry": str(entry), "tiles": [], "best": dict(zip(("block_m", "block_n", "block_d", "num_warps",
                "num_stages", "programs"), astuple(tiles[-1]), strict=True))}  # fmt: skip

    monkeypatch.setattr(tune, "sweep_entry", sweep_entry)
    written = []
    generation = launch.generation(CPU)
    warmed = {(str(e), astuple(t)): None for e in tune.entries() for t in tune.candidates(e, generation)[:2]}
    tune.sweep("", CPU, time.monotonic() + 60, warmed, written.append)
    record = written[-1]
    assert len(record["errors"]) == sum(entry.name == "lse_rows" for entry in tune.entries())
    assert len(record["entries"]) + len(record["errors"]) == len(tune.entries())
    assert all(set(line["not timed"].values()) <= {"not reached"} for line in record["entries"])
    scope = vars(launch).copy()
    exec(record["table"], scope)
    first = tune.entries()[0]
    assert scope["TABLE"][first.name][first.itemsize][first.width][generation] == tune.candidates(first, generation)[1]
    tune.sweep("", CPU, time.monotonic() - 1, warmed, written.append)
    assert len(written[-1]["not reached"]) == len(tune.entries())


def test_cases_hold_the_targets_first():
    wanted = gpu_cases.cases()
    first = {(case.dtype, case.d, case.m) for case in wanted[: len(gpu_report.TARGETS)]}
    assert first == {(target.dtype, target.d, target.m) for target in gpu_report.TARGETS}
    assert len({case.key for case in wanted}) == len(wanted)


def test_a_run_resumes_behind_the_case_that_ended_it(tmp_path, monkeypatch):
    path = tmp_path / "cases.jsonl"
    todo = [gpu_cases.Case("fp32", 8, 16), gpu_cases.Case("bf16", 8, 16), gpu_cases.Case("fp16", 8, 16)]
    path.write_text(json.dumps({"start": todo[0].key}) + "\n")
    left = [case for case in todo if case.key not in gpu_runner.settled(path)]
    assert left == todo[1:]

    def broken(z1, z2, temperature=0.1):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_cases.eager, "nt_xent", broken)
    assert gpu_runner.run_all(left, gpu_cases.run_case, path, CPU, time.monotonic() + 60, 0.0) == 0
    assert gpu_runner.run_all(todo[:1], gpu_cases.run_case, path, CPU, time.monotonic() - 1, 0.0) == 0
    with path.open("a") as file:
        file.write('{"done": "cut sho')
    found = gpu.read_cases(path)
    assert [case["dtype"] for case in found["cases"]] == ["bf16", "fp16"]
    assert found["late"] == []
    assert any("its process ended in it" in line and todo[0].key in line for line in found["problems"])
    for case in found["cases"]:
        assert case["sides"]["fastcl"]["ms"]["forward + backward"]["median"] > 0
        assert case["sides"]["fastcl"]["error_vs_fp64"]["gradient"] < 1e-2
        assert "no such kernel" in case["sides"]["eager"]["error"]
        assert any("D=8 M=16 eager, eager, error" in line for line in found["problems"])


def test_ceilings_are_positive_and_leave_the_precision_alone():
    before = torch.get_float32_matmul_precision()
    assert all(rate > 0 for rate in gpu_cases.ceilings(CPU, 32, 1024).values())
    assert torch.get_float32_matmul_precision() == before


def test_a_command_is_ended_at_its_limit_or_when_it_stalls(tmp_path):
    log, progress = tmp_path / "log", tmp_path / "progress"
    good = gpu.run_command([sys.executable, "-c", "print('fine')"], log, 60)
    assert good["returncode"] == 0 and not good["timed_out"] and log.read_text() == "fine\n"
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    late = gpu.run_command(sleep, log, 0.5)
    assert late["timed_out"] and late["returncode"] and late["seconds"] < 30
    progress.write_text("x")
    stalled = gpu.run_command(sleep, log, 60, progress, stall=0.5)
    assert stalled["stalled"] and not stalled["timed_out"] and stalled["seconds"] < 30


def test_junit_counts(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/>'
        '<testcase classname="a" name="two"><failure message="assert 1\nmore"/></testcase>'
        '<testcase classname="a" name="three"><skipped/></testcase></testsuite></testsuites>'
    )
    assert gpu.junit(path) == ({"passed": 1, "failed": 1, "skipped": 1}, ["a::two: assert 1 more"])


def side(ms, peak, **more):
    return {"ms": {label: timing.summary([ms]) for label in ("forward", "forward + backward")}} | {
        "peak_extra_bytes": peak
    } | more  # fmt: skip


def canned() -> dict:
    """Results of a run, made up: not measurements of anything."""
    fast = side(4.0, 2**28, error_vs_fp64={"loss": 1e-8, "gradient": 2e-3, "worst row": 3e-3})
    cases = [
        {"dtype": "bf16", "d": 128, "m": 65536, "other": "eager", "TFLOP/s": 500.0,
         "sides": {"fastcl": fast, "eager": side(60.0, 2**35)},
         "ratio": {"forward + backward": timing.summary([15.0])}},
        {"dtype": "bf16", "d": 128, "m": 8192, "other": "eager", "TFLOP/s": 100.0,
         "sides": {"fastcl": side(0.2, 2**22, graph_ms=timing.summary([0.14])), "eager": {"error": "Traceback"}}},
        {"dtype": "bf16", "d": 128, "m": 262144, "other": "compiled",
         "sides": {"fastcl": {"error": "Traceback"}, "compiled": {"skipped": "out of memory"}}},
    ]  # fmt: skip
    return {
        "name": "Some GPU", "passed": False, "seconds": {}, "versions": {"torch": "1"}, "cases": cases,
        "ceilings": {"bf16 TFLOP/s": 800.0},
        "tests": [{"command": "pytest", "returncode": 1, "timed_out": True, "seconds": 1.0}],
        "tune": {"table": "TABLE = {}", "entries": [{
            "entry": "lse_rows", "rows": 9, "present_ms": 2.0, "best_ms": 1.0, "best": {"block_m": 64},
            "tiles": [{"tile": {"block_m": 128}, "ms": 2.0}],
        }]},
        "late": ["bf16 D=64 M=2"], "problems": ["it broke"],
    }  # fmt: skip


def test_report_of_a_partial_run():
    text = gpu_report.markdown(canned())
    assert "4 (<= 5.8: met)" in text and "15 (>= 10: met)" in text
    assert "in a CUDA graph | 0.14 (<= 0.15: met)" in text
    assert "not measured (<= 1500)" in text
    assert "62%" in text and "out of memory" in text and "1.0e-08 / 2.0e-03 / 3.0e-03" in text
    assert "TABLE = {}" in text and "* bf16 D=64 M=2" in text and "it broke" in text and "out of time" in text


def test_report_of_nothing():
    empty = {"name": "x", "passed": True, "tests": [], "cases": [], "tune": {}, "problems": []}
    assert "Everything passed." in gpu_report.markdown(empty)


@needs_matplotlib
@pytest.mark.parametrize("results", [canned(), canned() | {"cases": []}], ids=["full", "empty"])
def test_files_of_a_report(results, tmp_path):
    gpu_report.write(results, tmp_path / "gpu")
    assert json.loads((tmp_path / "gpu" / "nt_xent.json").read_text()) == results
    assert (tmp_path / "gpu" / "nt_xent.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "gpu").iterdir()) == ["nt_xent.json", "nt_xent.md", "nt_xent.png"]


@needs_matplotlib
def test_a_phase_that_fails_costs_that_phase_alone(tmp_path):
    results = canned() | {"problems": []}
    ran = []

    def broken(limit):
        raise OSError("disk on fire")

    phases = {"tests": broken, "cases": lambda limit: ran.append(limit), "tune": lambda limit: ran.append(limit)}
    gpu.run_phases(results, {"name": "x", "problems": []}, tmp_path, 100.0, phases)
    assert len(ran) == 2 and ran[0] + ran[1] > 85
    assert json.loads((tmp_path / "swd.json").read_text())["passed"]
    assert set(results["seconds"]) == set(phases) and not results["passed"]
    saved = json.loads((tmp_path / "nt_xent.json").read_text())
    assert "disk on fire" in saved["problems"][0]


def test_slug_and_tables():
    assert reporting.slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"
    assert reporting.table(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert reporting.versions()["torch"] == torch.__version__
