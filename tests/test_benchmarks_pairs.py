"""The benchmarks of the losses that compare rows of two kinds or many positives, at sizes that take no time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastcl import reference

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import (
    compare_pairs,
    gpu,
    gpu_cases,
    gpu_pairs,
    gpu_pairs_report,
    gpu_runner,
    loss_table,
    timing,
    workloads,
)
from benchmarks.timing import gradient_of

CPU = torch.device("cpu")
BOTH = "forward + backward"
needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
M, D = 48, 6
QUERIES = workloads.QUERIES
# CLIP's first scale for rows of about this length, and the labels of eight and of two rows each.
SCALE, LABELS, TWINS = 1 / 0.07 / D, torch.arange(M) % (M // 8), torch.arange(M) // 2


def every_pair_of_a_label(x):
    """Of each positive pair, the logarithm of 1 + the sum over the negatives; one after another."""
    S = reference.normalize(x) @ reference.normalize(x).T / 0.07
    negatives = S.masked_fill(TWINS[:, None] == TWINS, -torch.inf).logsumexp(1)
    pairs = [(i, p) for i in range(M) for p in range(M) if i != p and TWINS[i] == TWINS[p]]
    return torch.stack([torch.logaddexp(negatives[i] - S[i, p], S.new_zeros(())) for i, p in pairs]).mean()


def queued(q, k, rows):
    return reference.info_nce(reference.normalize(q), reference.normalize(k), rows, 1.0, normalize=False)


# What the sides of each workload calculate.
EXACT = {
    "clip_loss": lambda x, y: reference.clip(x, y, SCALE),
    "siglip_loss": lambda x, y: reference.siglip(x, y, SCALE, -10.0),
    "info_nce, queue": queued,
    "supcon_loss": lambda x: reference.supcon(x, LABELS),
    "metric learning NTXentLoss": every_pair_of_a_label,
    "dcl_loss": reference.dcl,
    "nt_xent_views": lambda *views: reference.nt_xent_views(views),
    "info_nce": reference.info_nce,
    "instance_discrimination_loss": lambda q, bank: reference.instance_discrimination(q, torch.arange(len(q)), bank),
    "decoupled_nt_xent": reference.decoupled_nt_xent,
    "uniformity_loss": reference.uniformity,
}
# The float64 twins of every side of the CPU and of the GPU, but for siglip-kernel and what is another loss.
SIDES = [
    (kind, name, side)
    for kind, work in (workloads.PAIRS | workloads.OTHERS | gpu_pairs.WORK).items()
    for name, side in work.sides.items()
    if kind in EXACT and name not in (gpu_pairs.KERNEL, "nt_xent")
]


def doubles(kind: str) -> tuple:
    m = QUERIES + 8 if kind == "instance_discrimination_loss" else M
    return (gpu_pairs.WORK | workloads.OTHERS)[kind].inputs(m, D, torch.float64, CPU)[0]


def test_every_workload_is_held_against_its_specification():
    assert EXACT.keys() == (workloads.PAIRS | workloads.OTHERS).keys() - {"contrastive_stats"}
    assert {kind for kind, name, _ in SIDES if name == "eager"} == set(gpu_pairs.UNITS) - {
        "dcl_loss", gpu_pairs.MANY_QUERIES,
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "side"), SIDES, ids=[f"{kind} {name}" for kind, name, _ in SIDES])
def test_all_sides_calculate_the_loss_and_its_gradients(kind, name, side):
    inputs = doubles(kind)
    expected = gradient_of(EXACT[kind])(*inputs)
    assert len(expected) == 1 + sum(x.requires_grad for x in inputs)
    if name == "pytorch-metric-learning":
        # It adds the smallest float32 to what it takes logarithms of.
        torch.testing.assert_close(side(*inputs), expected, rtol=1e-5, atol=1e-7)
    else:
        torch.testing.assert_close(side(*inputs), expected, rtol=1e-9, atol=1e-13)


def test_queries_of_a_queue_are_counted():
    shapes = workloads.queue_of(5).shapes(70, 3)
    assert shapes == [(5, 3), (5, 3), (70, 3)]
    inputs = workloads.queue_of(5).inputs(70, 3, torch.float64, CPU)[0]
    assert [x.requires_grad for x in inputs] == [True, False, False]
    torch.testing.assert_close(workloads.queue_of(5).sides["fastcl"](*inputs), gradient_of(queued)(*inputs))


def run_main(monkeypatch, module, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, *args])
    return module.main()


@pytest.fixture
def without_peer(monkeypatch):
    """As where pytorch-metric-learning is not installed."""
    monkeypatch.setattr(compare_pairs, "METRIC_LEARNING", {})
    sides = workloads.PAIRS["metric learning NTXentLoss"].sides
    monkeypatch.delitem(sides, "pytorch-metric-learning", raising=False)


@needs_linux
def test_compare_prints_a_line_for_each_other_side(without_peer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_pairs, "TARGETS", {("supcon_loss", 64, 8): 1e-6, ("clip_loss", 64, 8): 1e6})
    out = tmp_path / "pairs.json"
    assert run_main(monkeypatch, compare_pairs, "--m", "64", "--d", "8", "--seconds", "0", "--json", str(out)) == 0
    printed = capsys.readouterr()
    rows = json.loads(out.read_text())["rows"]
    assert [row["kind"] for row in rows] == list(workloads.PAIRS) == list(compare_pairs.SIZES)
    for row in rows:
        others = set() if row["kind"] == "metric learning NTXentLoss" else {"eager"}
        assert set(row["ratio"]) == others and all(quotient["median"] > 0 for quotient in row["ratio"].values())
        assert set(row["peak_extra_bytes"]) == set(row["ms"]) == {"fastcl", *others}
    assert printed.out.count("\n") == 2 + len(rows) - 1
    missing, clip, supcon = printed.err.splitlines()
    assert missing.startswith("compare_pairs.py: pytorch-metric-learning is not installed")
    assert re.fullmatch(r"clip_loss M=64 D=8: .*×, at least 1e\+06×: MISSED", clip)
    assert re.fullmatch(r"supcon_loss M=64 D=8: .*×, at least 1e-06×: met", supcon)


def test_compare_measures_the_usual_sizes_unless_told_others(without_peer, tmp_path, monkeypatch):
    monkeypatch.setattr(
        compare_pairs.memory, "add_peaks",
        lambda rows: [row.update(peak_extra_bytes=dict.fromkeys(row["ms"], 0)) for row in rows],
    )  # fmt: skip
    monkeypatch.setitem(compare_pairs.SIZES, "supcon_loss", [(32, 4), (64, 8)])
    out = tmp_path / "pairs.json"
    assert run_main(monkeypatch, compare_pairs, "--kind", "supcon_loss", "--seconds", "0", "--json", str(out)) == 0
    assert [(row["m"], row["d"]) for row in json.loads(out.read_text())["rows"]] == [(32, 4), (64, 8)]


@pytest.mark.parametrize("wrong", [["--m", "64"], ["--d", "8"], ["--m", "0", "--d", "8"], ["--m", "8", "--d", "-1"]])
def test_compare_refuses_sizes(wrong, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, compare_pairs, *wrong)
    assert stop.value.code == 2


def test_targets_tell_met_from_missed():
    assert {(kind, (m, d)) for kind, m, d in compare_pairs.TARGETS} <= {
        (kind, size) for kind, sizes in compare_pairs.SIZES.items() for size in sizes
    }
    found = {kind: least for (kind, _, _), least in compare_pairs.TARGETS.items()}
    ratios = [found["clip_loss"] - 0.1, found["info_nce, queue"], 9.0]
    rows = [
        {"kind": kind, "m": m, "d": d, "ratio": {"eager": {"median": ratio}}}
        for (kind, m, d), ratio in zip(compare_pairs.TARGETS, ratios, strict=True)
    ]
    rows.append(rows[0] | {"m": 1024})
    assert [line.split(": ")[-1] for line in compare_pairs.targets(rows)] == ["MISSED", "met", "met"]


@needs_linux
def test_table_of_losses(tmp_path, monkeypatch, capsys):
    # One of two operands, one of a bank, and one that is no loss.
    some = ("clip_loss", "instance_discrimination_loss", "contrastive_stats")
    monkeypatch.setattr(loss_table, "LOSSES", {kind: loss_table.LOSSES[kind] for kind in some})
    out = tmp_path / "losses.md"
    assert run_main(monkeypatch, loss_table, "--m", "1024", "--d", "8", "--out", str(out)) == 0
    text = out.read_text()
    assert capsys.readouterr().out == text
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines()]
    assert lines[0][3] == "MiB, M = 1,024, D = 8"
    assert [line[0] for line in lines[2:]] == [text[0] for text in loss_table.LOSSES.values()]
    for kind, line in zip(loss_table.LOSSES, lines[2:], strict=True):
        assert float(line[3]) >= 0
        assert (line[4] == "-") == ("eager" not in workloads.WORKLOADS[kind].sides)
    for wrong in ("512", "1026"):
        with pytest.raises(SystemExit) as stop:
            run_main(monkeypatch, loss_table, "--m", wrong)
        assert stop.value.code == 2


def test_table_of_losses_measures_both_operands_as_the_rows(monkeypatch):
    asked = []
    monkeypatch.setattr(loss_table.memory, "resident_peaks", lambda cases: asked.extend(cases) or [2**20] * len(cases))
    assert "| 1.0 | 1.0 |" in loss_table.markdown(2048, 4)
    rows = {case.kind: sum(m for m, _ in workloads.WORKLOADS[case.kind].shapes(case.m, case.d)) for case in asked}
    kept = {"info_nce, queue": 2 * QUERIES, "instance_discrimination_loss": QUERIES}
    assert rows == {kind: 2048 + kept.get(kind, 0) for kind in loss_table.LOSSES}


def test_gpu_cases_hold_the_targets_first():
    wanted = gpu_pairs.cases()
    first = [(case.kind, case.m, case.d) for case in wanted[:3]]
    assert first == [(target.kind, target.m, target.d) for target in gpu_pairs_report.TARGETS]
    assert len({case.key for case in wanted}) == len(wanted)
    assert {case.kind for case in wanted} == set(gpu_pairs.UNITS)
    assert {f"{case.dtype} TFLOP/s" for case in wanted} <= set(gpu_cases.ceilings(CPU, 32, 1024))
    # With four of the longest left to do, the clock still has room for it.
    assert max(case.expected_seconds for case in wanted) < 1


def test_units_by_hand():
    def flop(kind):
        return gpu_pairs.Case(kind, 100, 10).flop

    # Forward one product, backward that again and two more; a queue needs but one of the two.
    assert flop("clip_loss") == 4 * 2 * 100 * 100 * 10
    assert flop("siglip_loss") == 3 * 2 * 100 * 100 * 10
    assert flop("info_nce, queue") == 3 * 2 * QUERIES * 100 * 10
    assert flop(gpu_pairs.MANY_QUERIES) == 3 * 2 * 4096 * 100 * 10
    assert flop("info_nce") == 4 * 2 * 50 * 50 * 10
    assert flop("dcl_loss") == gpu_cases.Case("bf16", 10, 100).flop
    assert gpu_pairs.bytes_needed(gpu_pairs.Case("clip_loss", 100, 10)) == gpu_pairs.MATRICES * 2 * 100 * 100
    assert gpu_pairs.bytes_needed(gpu_pairs.Case("siglip_loss", 100, 10, gpu_pairs.KERNEL)) == 0


@pytest.mark.parametrize("kind", list(gpu_pairs.UNITS))
def test_gpu_case_runs_both_sides(kind):
    other = "nt_xent" if kind == "dcl_loss" else "eager"
    case = gpu_pairs.Case(kind, 64, 8, other)
    record = gpu_pairs.run_case(case, CPU, 0.0)
    assert set(record["sides"]) == {"fastcl", other}
    assert not [side for side in record["sides"].values() if "error" in side]
    assert all(side["ms"][BOTH]["median"] > 0 for side in record["sides"].values())
    assert record["ratio"][BOTH]["median"] > 0
    assert record["TFLOP/s"] == pytest.approx(case.flop / record["sides"]["fastcl"]["ms"][BOTH]["median"] / 1e9)
    found = {name: side["error_vs_fp64"] for name, side in record["sides"].items() if "error_vs_fp64" in side}
    assert set(found) == ({"fastcl"} if kind == "dcl_loss" else {"fastcl", "eager"})
    # bfloat16 has 8 bits: products and sums that are rounded to it are off by a few parts in 256.
    assert all(error["loss"] < 0.02 and error["gradient"] < 0.05 for error in found.values())
    json.dumps(record)


def test_gpu_errors_see_a_wrong_gradient(monkeypatch):
    case = gpu_pairs.Case("clip_loss", 32, 8)
    right = gpu_pairs.WORK["clip_loss"].sides["fastcl"]
    monkeypatch.setitem(gpu_pairs.WORK["clip_loss"].sides, "fastcl", lambda x, y: [*right(x, y)[:2], 0 * y])
    inputs = gpu_pairs.WORK["clip_loss"].inputs(32, 8, torch.float32, CPU)[0]
    found = gpu_pairs.errors(case, ("fastcl", "eager"), inputs)
    assert found["fastcl"]["gradient"] > 0.1 and found["fastcl"]["loss"] < 1e-5 > found["eager"]["gradient"]


def test_large_gpu_case_has_no_error(monkeypatch):
    monkeypatch.setattr(gpu_pairs, "SMALL", 64 * 64 - 1)
    record = gpu_pairs.run_case(gpu_pairs.Case("siglip_loss", 64, 8), CPU, 0.0)
    assert not any("error_vs_fp64" in side for side in record["sides"].values())


def test_siglip_kernel_gets_the_logarithm_of_the_scale(monkeypatch):
    def fused(image, text, log_scale, bias):
        assert log_scale.device == bias.device == image.device and not (log_scale.requires_grad or bias.requires_grad)
        return reference.siglip(image, text, log_scale.exp(), bias)

    monkeypatch.setitem(sys.modules, "siglip_kernel", SimpleNamespace(fused_siglip_loss=fused))
    case = gpu_pairs.Case("siglip_loss", 64, 8, gpu_pairs.KERNEL)
    record = gpu_pairs.run_case(case, CPU, 0.0)
    assert record["sides"][gpu_pairs.KERNEL]["error_vs_fp64"]["loss"] < 0.02
    inputs = gpu_pairs.WORK["siglip_loss"].inputs(64, 8, torch.float32, CPU)[0]
    found = gpu_pairs.errors(case, gpu_pairs.calls(case), inputs)
    assert set(found) == {"fastcl", gpu_pairs.KERNEL} and found[gpu_pairs.KERNEL]["gradient"] < 1e-5


def test_gpu_case_that_fails_costs_its_side_alone(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu_pairs.WORK["clip_loss"].sides, "fastcl", broken)
    todo = [gpu_pairs.Case("clip_loss", 32, 8), gpu_pairs.Case("supcon_loss", 32, 8)]
    path = tmp_path / "pairs.jsonl"
    assert gpu_runner.run_all(todo, gpu_pairs.run_case, path, CPU, time.monotonic() + 60, 0.0) == 0
    assert gpu_runner.settled(path) == {case.key for case in todo}
    found = gpu.read_cases(path)
    assert [case["kind"] for case in found["cases"]] == ["clip_loss", "supcon_loss"]
    assert found["cases"][0]["sides"]["eager"]["ms"][BOTH]["median"] > 0 and "TFLOP/s" not in found["cases"][0]
    assert len(found["problems"]) == 1 and "no such kernel" in found["problems"][0]
    assert "| failed |" in gpu_pairs_report.markdown({"name": "x", "passed": False} | found)


def side(ms, peak, graph=None, **more):
    found = {"ms": {BOTH: timing.summary([ms])}, "peak_extra_bytes": peak}
    return found | ({"graph_ms": timing.summary([graph])} if graph else {}) | more


def canned() -> dict:
    """Results of a run, made up: not measurements of anything."""

    def case(kind, m, d, ours, other, theirs, **more):
        record = {"kind": kind, "dtype": "bf16", "m": m, "d": d, "other": other} | more
        quotient = theirs["ms"][BOTH]["median"] / ours["ms"][BOTH]["median"] if "ms" in theirs else None
        record |= {"ratio": {BOTH: timing.summary([quotient])}} if quotient else {}
        return record | {"sides": {"fastcl": ours, other: theirs}}

    error = {"loss": 1e-8, "gradient": 2e-3, "worst row": 3e-3}
    siglip = side(40.0, 1.2e9)
    return {
        "name": "Some GPU", "passed": False, "versions": {"torch": "1"}, "late": ["clip"], "problems": ["it broke"],
        "ceilings": {"bf16 TFLOP/s": 800.0},
        "cases": [
            case("siglip_loss", 65536, 768, siglip, "siglip-kernel", side(50.0, 2**31), **{"TFLOP/s": 480.0}),
            case("siglip_loss", 65536, 768, side(41.0, 1.2e9), "eager", {"skipped": "out of memory"}),
            case("clip_loss", 65536, 768, side(44.0, 1.5e9), "eager", side(200.0, 2**35)),
            case("info_nce, queue", 65536, 128, side(0.3, 2**20, 0.05), "eager", side(0.6, 2**26, 0.25)),
            case("supcon_loss", 8192, 128, side(1.0, 2**20, error_vs_fp64=error), "eager", side(9.0, 2**30)),
        ],
    }  # fmt: skip


def test_report_of_a_partial_run():
    text = gpu_pairs_report.markdown(canned())
    assert "| siglip_loss, M=65,536, D=768 | 40 (<= 35: MISSED) | 1.2 (<= 1.4: met) | - | - |" in text
    assert "| clip_loss, M=65,536, D=768 | 44 (<= 48: met) | 1.5 (<= 1: MISSED) | - | - |" in text
    # Launches included 2, in graphs 5.
    assert "| info_nce, queue, M=65,536, D=128 | - | - | 2 (>= 3: MISSED) | 5 |" in text
    assert "| siglip-kernel | 40 (40..40) | - | 50 (50..50) | - | 1.25× (1.25..1.25) | - | 480 | 60% |" in text
    assert "| eager PyTorch | 41 (41..41) | - | out of memory | - |" in text
    assert "1.0e-08 / 2.0e-03 / 3.0e-03" in text and "* clip" in text and "it broke" in text


def test_report_of_nothing(tmp_path):
    empty = {"name": "x", "passed": True, "cases": [], "problems": []}
    text = gpu_pairs_report.markdown(empty)
    assert "| not measured (<= 35) | not measured (<= 1.4) |" in text and "not measured (>= 3)" in text
    gpu_pairs_report.write(empty, tmp_path / "gpu")
    assert json.loads((tmp_path / "gpu" / "pairs.json").read_text()) == empty
    assert (tmp_path / "gpu" / "pairs.md").read_text() == text


def test_phase_keeps_what_was_found_before_it_broke(tmp_path, monkeypatch):
    def run_cases(script, results, work, seconds):
        assert (ROOT / "benchmarks" / script).exists()
        results["problems"].append("slow")
        raise OSError("disk on fire")

    monkeypatch.setattr(gpu, "run_cases", run_cases)
    results = {"name": "x", "passed": False, "cases": [], "problems": []}
    with pytest.raises(OSError, match="disk on fire"):
        gpu.run_pairs(results, tmp_path, tmp_path, 9.0)
    assert json.loads((tmp_path / "pairs.json").read_text())["problems"] == ["slow"] and not results["passed"]


def test_kernel_tests_of_pairs_run_on_the_gpu_too():
    assert {"tests/test_kernels.py", "tests/test_pair_kernels.py"} <= set(gpu.kernel_tests())


def test_without_cuda_one_line_and_exit_status_2(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_pairs.py"), "--out", str(tmp_path / "x")]
    # The empty string hides GPUs that are there.
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "gpu_pairs.py: expected a CUDA device, got none\n"
