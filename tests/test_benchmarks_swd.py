"""The benchmarks of the sorts and of the sliced Wasserstein distance, at sizes that take no time."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcl import _native, reference

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import (
    accuracy,
    eager,
    gpu,
    gpu_runner,
    gpu_swd,
    gpu_swd_report,
    memory,
    sort_floor,
    timing,
    workloads,
)

CPU = torch.device("cpu")
BOTH = "forward + backward"


def doubles(kind: str, m: int, d: int) -> tuple:
    return workloads.WORKLOADS[kind].inputs(m, d, torch.float64, CPU)[0]


def test_float64_truth_and_eager_are_the_specification():
    x, y = doubles("wasserstein_1d", 37, 5)
    loss = reference.wasserstein_1d(x, y).sum(1).mean()
    expected = loss.detach(), torch.autograd.grad(loss, x)[0]
    torch.testing.assert_close(accuracy.exact_wasserstein_1d(x, y), expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(timing.gradient_of(eager.wasserstein_1d)(x, y), expected, rtol=1e-12, atol=1e-15)
    z, samples, directions = doubles("swd_loss, given draws", 37, 5)
    loss = reference.swd(z, samples, directions)
    expected = loss.detach(), torch.autograd.grad(loss, z)[0]
    torch.testing.assert_close(accuracy.exact_swd(z, samples, directions), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["wasserstein_1d", "swd_loss, given draws"])
def test_all_sides_calculate_the_same_loss_and_gradient(kind):
    inputs = doubles(kind, 50, 6)
    truth = accuracy.exact_wasserstein_1d(*inputs) if kind == "wasserstein_1d" else accuracy.exact_swd(*inputs)
    for name, side in workloads.WORKLOADS[kind].sides.items():
        loss, grad = side(*inputs)
        factor = 6 if (kind, name) == ("wasserstein_1d", "fastcl") else 1
        torch.testing.assert_close((loss, grad / factor), truth, rtol=1e-10, atol=1e-15)


def test_drawn_losses_are_of_the_same_size():
    # Both sides draw anew: means over draws agree within 5 standard errors of their difference.
    (z,) = workloads.WORKLOADS["swd_loss"].inputs(64, 8, torch.float32, CPU)[0]
    draws = [[side(z)[0].item() for _ in range(40)] for side in workloads.WORKLOADS["swd_loss"].sides.values()]
    ours, theirs = (np.array(values) for values in draws)
    assert abs(ours.mean() - theirs.mean()) < 5 * np.sqrt((ours.var() + theirs.var()) / 40)
    assert eager.swd_loss(z.detach().bfloat16()).dtype == torch.float32


def test_sorting_sides_return_the_same_values():
    (x,) = doubles("segmented_sort", 40, 3)
    for name, side in workloads.WORKLOADS["segmented_sort"].sides.items():
        values, indices = side(x)
        assert torch.equal(values, x.sort(1).values) and torch.equal(x.gather(1, indices.long()), values), name


def test_errors_see_a_wrong_gradient_but_not_the_order_of_equals():
    ours = workloads.WORKLOADS["wasserstein_1d"].sides["fastcl"]
    theirs = timing.gradient_of(eager.wasserstein_1d)
    inputs = workloads.WORKLOADS["wasserstein_1d"].inputs(100, 4, torch.float32, CPU)[0]
    wrong = {"fastcl": ours, "eager": lambda x, y: (theirs(x, y)[0], 0 * x)}
    found = workloads.errors("wasserstein_1d", wrong, inputs)
    assert found["eager"]["gradient"] == pytest.approx(1) and found["eager"]["loss"] < 1e-5
    assert max(found["fastcl"].values()) < 1e-5
    x = torch.tensor([[1.0, 2.0, 1.0, 0.0], [3.0, 3.0, -0.0, 0.0]])
    assert accuracy.distinct(x).tolist() == [[False, True, False, True], [False] * 4]


@pytest.mark.parametrize("rows", [1, 5])
def test_reference_sorts_all_rows(rows):
    x, y = (torch.randn(rows, 33) for _ in range(2))
    blocks = sort_floor.numpy_sort(x, y)()
    assert np.array_equal(np.concatenate(blocks), torch.cat([x, y]).sort(1).values.numpy())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.skipif(not _native.LOADED, reason="the fallback sorts chunks by torch.sort")
def test_peak_memory_sees_the_copies_of_the_composition():
    n, p = 65536, 16
    gradient = 4 * n * p
    ours, theirs = memory.resident_peaks([memory.Case(s, n, p, kind="wasserstein_1d") for s in ("fastcl", "eager")])
    # Values and int64 indices of both sorts, and the gradient.
    assert theirs > 2 * 3 * gradient
    # The gradient, and a few rows of scratch for each thread.
    assert gradient <= ours < 2 * gradient


def test_gpu_cases_hold_the_targets_first():
    wanted = gpu_swd.cases()
    first = [(case.p, case.n) for case in wanted[:3] if case.kind == "wasserstein_1d"]
    assert first == [gpu_swd_report.RATIO_AT, gpu_swd_report.FLOOR_AT, (128, gpu_swd_report.LONGEST_LEAN)]
    assert len({case.key for case in wanted}) == len(wanted)
    assert set(gpu_swd_report.SIBLINGS) == set(gpu_swd.SIBLINGS)
    assert {case.kind for case in wanted[:9]} == {case.kind for case in wanted}


@pytest.mark.parametrize(
    ("kind", "dtype", "other"),
    [
        ("wasserstein_1d", "fp32", "eager"), ("swd_loss, given draws", "fp32", "eager"), ("swd_loss", "bf16", "eager"),
        ("segmented_sort", "fp16", gpu_swd.STABLE), ("segmented_sort", "fp32", gpu_swd.STABLE),
        ("decoupled_nt_xent", "bf16", "nt_xent"), ("uniformity_loss", "bf16", "nt_xent"),
    ],
)  # fmt: skip
def test_gpu_case_runs_both_sides(kind, dtype, other):
    case = gpu_swd.Case(kind, dtype, 8, 64, other)
    record = gpu_swd.run_case(case, CPU, 0.0)
    assert not [side for side in record["sides"].values() if "error" in side]
    assert all(side["ms"][case.label]["median"] > 0 for side in record["sides"].values())
    assert record["ratio"][case.label]["median"] > 0
    errors = [side["error_vs_fp64"]["gradient"] for side in record["sides"].values() if "error_vs_fp64" in side]
    # Projections of 64 rows in float32 hardly ever change places.
    assert len(errors) == (2 if kind in ("wasserstein_1d", "swd_loss, given draws") else 0) and all(e < 1e-3 for e in errors)
    json.dumps(record)


def test_gpu_case_that_fails_costs_its_side_alone(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel")

    sides = workloads.WORKLOADS["wasserstein_1d"].sides
    monkeypatch.setitem(sides, "fastcl", broken)
    todo = [gpu_swd.Case("wasserstein_1d", "fp32", 4, 32), gpu_swd.Case("swd_loss", "fp32", 4, 32)]
    path = tmp_path / "swd.jsonl"
    assert gpu_runner.run_all(todo, gpu_swd.run_case, path, CPU, time.monotonic() + 60, 0.0) == 0
    assert gpu_runner.settled(path) == {case.key for case in todo}
    found = gpu.read_cases(path)
    assert [case["kind"] for case in found["cases"]] == ["wasserstein_1d", "swd_loss"]
    assert found["cases"][0]["sides"]["eager"]["ms"][BOTH]["median"] > 0
    assert len(found["problems"]) == 1 and "no such kernel" in found["problems"][0]
    assert "| failed |" in gpu_swd_report.markdown({"name": "x", "passed": False} | found)


def test_accesses_are_those_of_the_block_sort():
    # 16 words a thread: 3 + 1 accesses to counters a pass. Sort: 4 passes that move word and index there and back.
    assert gpu_swd_report.accesses("segmented_sort", "fp32", 8192) == 4 * (4 + 4)
    # One word with key and index, two passes.
    assert gpu_swd_report.accesses("segmented_sort", "fp16", 8192) == 2 * (4 + 2)
    # Y: three moves and one way there; x: three of word and index; the Y of the rank, and the gradient both ways.
    assert gpu_swd_report.accesses("wasserstein_1d", "fp32", 16384) == (16 + 7) + (16 + 12) + 3
    # 4 words a thread: the counters of a warp are shared by fewer words.
    assert gpu_swd_report.accesses("segmented_sort", "fp32", 512) == 4 * (3 + 4 + 4)
    assert gpu_swd_report.accesses("segmented_sort", "fp32", 16385) is None
    assert gpu_swd_report.accesses("swd_loss", "fp32", 512) is None


def test_tiers_are_those_of_the_kernels():
    source = (ROOT / "csrc" / "cuda" / "block_sort.cuh").read_text()
    threads = int(re.search(r"kMaxThreads = (\d+);", source)[1])
    tiers = re.search(r"kTiers\[\] = \{(.*)\};", source)[1].replace("kMaxThreads", str(threads))
    pairs = [(int(items), int(most)) for items, most in re.findall(r"\{(\d+), (\d+)\}", tiers)]
    assert {items * most: items for items, most in pairs} == gpu_swd_report.TIERS
    assert int(re.search(r"kDigitBits = (\d+);", source)[1]) == 8


def test_floors_by_hand():
    limits = {"copy TB/s": 4.0, "SM GHz": 2.0, "SMs": 132}
    case = {"kind": "wasserstein_1d", "dtype": "fp32", "p": 2048, "n": 8192}
    found = gpu_swd_report.floors(case, limits)
    assert found["bytes"] == pytest.approx(12 * 2048 * 8192 / 4e12 * 1e3)
    assert found["shared"] == pytest.approx(54 * 2048 * 8192 / (32 * 132 * 2e9) * 1e3)
    # With fewer rows than multiprocessors some of these have nothing to do.
    few = gpu_swd_report.floors(case | {"p": 66}, limits)
    assert few["shared"] == pytest.approx(54 * 8192 / (32 * 2e9) * 1e3)
    assert gpu_swd_report.floors(case | {"kind": "segmented_sort", "dtype": "fp16"}, limits)["bytes"] == pytest.approx(
        8 * 2048 * 8192 / 4e12 * 1e3
    )
    assert gpu_swd_report.floors(case, {}) == {} and gpu_swd_report.floors(case | {"kind": "swd_loss"}, limits) == {}
    assert gpu_swd.gigahertz("1980") == 1.98
    assert gpu_swd.gigahertz("[N/A]") is None and gpu_swd.gigahertz(None) is None


def canned() -> dict:
    """Results of a run, made up: not measurements of anything."""

    def case(kind, p, n, other, ours, theirs, extra=0, graph=None, dtype="fp32"):
        sides = {
            name: {"ms": {BOTH: timing.summary([ms])}, "peak_extra_bytes": 4 * p * n + extra}
            for name, ms in (("fastcl", ours), (other, theirs))
        }
        if graph:
            sides["fastcl"]["graph_ms"] = timing.summary([graph])
        record = {"kind": kind, "dtype": dtype, "p": p, "n": n, "other": other, "sides": sides}
        return record | {"ratio": {BOTH: timing.summary([theirs / ours])}}

    return {
        "name": "Some GPU", "passed": False, "versions": {"torch": "1"}, "late": ["swd_loss"], "problems": ["it broke"],
        "ceilings": {"copy TB/s": 4.0, "SM GHz": 2.0, "SMs": 132},
        "cases": [
            case("wasserstein_1d", 128, 8192, "eager", 0.03, 0.3, extra=1024, graph=0.02),
            case("wasserstein_1d", 2048, 8192, "eager", 0.2, 2.0, extra=2**24),
            case("uniformity_loss", 128, 8192, "nt_xent", 0.2, 0.1, dtype="bf16"),
            case("decoupled_nt_xent", 128, 8192, "nt_xent", 0.1, 0.1, dtype="bf16"),
        ],
    }  # fmt: skip


def test_report_of_a_partial_run():
    text = gpu_swd_report.markdown(canned())
    assert "times faster than eager | 10 (>= 5: met)" in text
    # 54 accesses an element take 0.1073 ms.
    assert "time over the larger floor | 1.865 (<= 1.5: MISSED)" in text
    assert "N=8,192: MiB beyond the gradient | 0.0009766 (<= 1: met)" in text
    assert "N=8,192: MiB beyond the gradient | 16 (<= 1: MISSED)" in text
    assert "uniformity_loss, M=8,192: time over that of nt_xent | 2 (<= 1.15: MISSED)" in text
    assert "decoupled_nt_xent, M=8,192: time over that of nt_xent | 1 (<= 1.15: met)" in text
    # 12 bytes an element at 4 TB/s are 3.15 us: of the time in the graph.
    assert "| 16% |" in text
    assert "* swd_loss" in text and "it broke" in text


def test_report_of_nothing(tmp_path):
    empty = {"name": "x", "passed": True, "cases": [], "problems": []}
    assert "times faster than eager | not measured (>= 5)" in gpu_swd_report.markdown(empty)
    gpu_swd_report.write(empty, tmp_path / "gpu")
    assert json.loads((tmp_path / "gpu" / "swd.json").read_text()) == empty
    assert (tmp_path / "gpu" / "swd.md").read_text() == gpu_swd_report.markdown(empty)


def executable(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def selftest(tmp_path, monkeypatch):
    """Runs the self-test phase with a compiler that makes a program of this text."""

    def run(program: str, checker: str | None = 'echo checked; shift 2; "$@"', seconds: float = 60.0) -> dict:
        made = tmp_path / "made"
        executable(made, program)
        tools = {"nvcc": executable(tmp_path / "nvcc", f'while [ "$1" != -o ]; do shift; done; cp {made} "$2"')}
        if checker is not None:
            tools["compute-sanitizer"] = executable(tmp_path / "checker", checker)
        monkeypatch.setattr(gpu, "cuda_tool", tools.get)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        results = {"tests": [], "problems": []}
        (tmp_path / "tests.txt").write_text("")
        gpu.run_selftest(results, tmp_path, tmp_path, seconds)
        return results

    return run


def test_selftest_is_built_run_and_checked(selftest, tmp_path):
    results = selftest('echo "7 checks, 0 failed"')
    assert [run["note"] for run in results["tests"]] == ["-", "7 checks, 0 failed", "7 checks, 0 failed"]
    assert not any(run["returncode"] for run in results["tests"])
    assert not results["problems"]
    assert (tmp_path / "tests.txt").read_text() == "7 checks, 0 failed\nchecked\n7 checks, 0 failed\n"
    table = gpu.gpu_report.tests(results)
    assert table.count("passed") == 3 and "| 7 checks, 0 failed |" in table


def test_selftest_that_fails_is_a_problem_and_not_checked(selftest):
    results = selftest('echo "7 checks, 2 failed"; exit 1')
    assert len(results["tests"]) == 2
    assert len(results["problems"]) == 1 and "exit status 1\n7 checks, 2 failed" in results["problems"][0]


def test_selftest_without_tools_is_skipped(selftest, monkeypatch, tmp_path):
    results = selftest("echo fine", checker=None)
    assert [run.get("skipped") for run in results["tests"]] == ["compute-sanitizer not found", None, None]
    monkeypatch.setattr(gpu, "cuda_tool", lambda name: None)
    results = {"tests": [], "problems": []}
    gpu.run_selftest(results, tmp_path, tmp_path, 60.0)
    assert "| skipped | nvcc and compute-sanitizer not found |" in gpu.gpu_report.tests(results)
    assert not results["problems"]


def test_checker_may_run_out_of_time(selftest, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    results = selftest("echo fine", checker="sleep 60", seconds=3.0)
    assert results["tests"][-1]["timed_out"] and results["tests"][-1]["returncode"]
    assert not results["problems"]


def test_phases_have_shares():
    source = (ROOT / "benchmarks" / "gpu.py").read_text()
    phases = re.findall(r'^            "(\w+)": lambda limit', source, re.MULTILINE)
    assert phases == list(gpu.SHARES) and sum(gpu.SHARES.values()) == pytest.approx(1)


def test_calls_rotate_through_the_inputs():
    run = timing.rotate(lambda x, y: x + y, [(1, 1), (2, 2)])
    assert [run(), run(), run()] == [2, 4, 2]


def test_benchmark_is_started_again_behind_a_case_that_ends_its_process(tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(
        "import json, pathlib, sys\n"
        "path = pathlib.Path(sys.argv[2])\n"
        "again = path.exists()\n"
        "with path.open('a') as file:\n"
        "    print(json.dumps({'start': 'second' if again else 'first'}), file=file)\n"
        "    if again:\n"
        "        print(json.dumps({'done': 'second', 'record': {'kind': 'second', 'sides': {}}}), file=file)\n"
        "sys.exit(0 if again else 9)\n"
    )
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    swd = {"problems": ["before"]}
    gpu.run_cases("fake.py", swd, tmp_path, 90.0)
    assert swd["problems"] == ["before", "first: its process ended in it"]
    assert [case["kind"] for case in swd["cases"]] == ["second"] and swd["late"] == []
