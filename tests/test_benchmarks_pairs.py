"""The benchmarks of the losses that compare rows of two kinds or many positives, at sizes that take no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastcl import reference

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import (
    gpu,
    gpu_cases,
    gpu_pairs,
    gpu_pairs_report,
    gpu_runner,
    loss_table,
    peers,
    timing,
    workloads,
)
from benchmarks.timing import gradient_of

CPU = torch.device("cpu")
BOTH = "forward + backward"
needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
M, D = 48, 6
QUERIES, KERNEL = workloads.QUERIES, "siglip-kernel"
NO_MATRIX = {peer.name for peer in peers.PEERS if peer.no_matrix}
# CLIP's first scale for rows of about this length, and the labels of eight rows each.
SCALE, LABELS = 1 / 0.07 / D, torch.arange(M) % (M // 8)


def queued(q, k, rows):
    return reference.info_nce(reference.normalize(q), reference.normalize(k), rows, 1.0, normalize=False)


# What the sides of each workload calculate.
EXACT = {
    "clip_loss": lambda x, y: reference.clip(x, y, SCALE),
    "siglip_loss": lambda x, y: reference.siglip(x, y, SCALE, -10.0),
    "info_nce, queue": queued,
    "supcon_loss": lambda x: reference.supcon(x, LABELS),
    "nt_xent": lambda x, y: reference.nt_xent(x, y, 0.1),
    "dcl_loss": lambda x, y: reference.dcl(x, y, 0.1),
    "nt_xent_views": lambda *views: reference.nt_xent_views(views),
    "info_nce": lambda q, k: reference.info_nce(q, k, temperature=0.07),
    "instance_discrimination_loss": lambda q, bank: reference.instance_discrimination(q, torch.arange(len(q)), bank),
    "decoupled_nt_xent": reference.decoupled_nt_xent,
    "uniformity_loss": reference.uniformity,
}
# The float64 twins of every side of the CPU and of the GPU, but for what has kernels for GPUs and what is another loss.
COMPARED = workloads.LOSSES | workloads.OTHERS | gpu_pairs.WORK
SIDES = [
    (kind, name, side)
    for kind, work in COMPARED.items()
    for name, side in work.sides.items()
    if kind in EXACT and not (torch.cuda.is_available() and name in NO_MATRIX) and (kind, name) != ("dcl_loss", "nt_xent")
]
# What does not calculate in float64: sums of logits in float32, and the smallest float32 within logarithms.
ROUGH = {"cut-cross-entropy": 1e-5, "pytorch-metric-learning": 1e-5}


def doubles(kind: str) -> tuple:
    m = QUERIES + 8 if kind == "instance_discrimination_loss" else M
    return COMPARED[kind].inputs(m, D, torch.float64, CPU)[0]


def test_every_workload_is_held_against_its_specification():
    assert EXACT.keys() == (workloads.LOSSES | workloads.OTHERS).keys() - {"contrastive_stats"}
    assert {kind for kind, name, _ in SIDES if name == "eager"} == set(workloads.LOSSES)


@pytest.mark.parametrize(("kind", "name", "side"), SIDES, ids=[f"{kind} {name}" for kind, name, _ in SIDES])
def test_all_sides_calculate_the_loss_and_its_gradients(kind, name, side):
    inputs = doubles(kind)
    expected = gradient_of(EXACT[kind])(*inputs)
    assert len(expected) == 1 + sum(x.requires_grad for x in inputs)
    rtol = ROUGH.get(name, 1e-9)
    torch.testing.assert_close(side(*inputs), expected, rtol=rtol, atol=1e-2 * rtol, check_dtype=name not in ROUGH)


@pytest.mark.parametrize("kind", list(workloads.LOSSES))
def test_float64_truth_is_the_specification(kind):
    inputs = tuple(x.detach().float().requires_grad_(x.requires_grad) for x in doubles(kind))
    wide = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
    torch.testing.assert_close(workloads.exact(kind, inputs), gradient_of(EXACT[kind])(*wide), rtol=1e-9, atol=1e-13)


def test_queries_of_a_queue_are_counted():
    shapes = workloads.queue_of(5).shapes(70, 3)
    assert shapes == [(5, 3), (5, 3), (70, 3)]
    inputs = workloads.queue_of(5).inputs(70, 3, torch.float64, CPU)[0]
    assert [x.requires_grad for x in inputs] == [True, False, False]
    torch.testing.assert_close(workloads.queue_of(5).sides["fastcl"](*inputs), gradient_of(queued)(*inputs))


def run_main(monkeypatch, module, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, *args])
    return module.main()


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
        assert line[3] == "< 0.1" or float(line[3]) > 0
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
    assert {case.kind for case in wanted} == set(gpu_pairs.WORK)
    assert {f"{case.dtype} TFLOP/s" for case in wanted} <= set(gpu_cases.ceilings(CPU, 32, 1024))
    # With four of the longest left to do, the clock still has room for it.
    assert max(case.expected_seconds for case in wanted) < 1


def test_libraries_with_kernels_are_compared_at_every_size_of_their_loss(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(peers, "installed", lambda name: True)
    assert gpu_pairs.libraries("siglip_loss") == ["siglip-kernel"]
    assert gpu_pairs.libraries("clip_loss") == ["cut-cross-entropy", "liger-kernel", "inf-cl"]
    found = [(case.kind, case.m, case.other) for case in gpu_pairs.cases()]
    for kind in ("siglip_loss", "clip_loss"):
        for m in (8192, 65536):
            assert {(kind, m, other) for other in (*gpu_pairs.libraries(kind), "eager")} <= set(found)
    assert found[0] == ("siglip_loss", 65536, "siglip-kernel") and len(set(found)) == len(found)


def test_products_by_hand():
    def flop(kind):
        return gpu_pairs.Case(kind, 100, 10).flop

    # Forward one product, backward that again and two more; a queue needs but one of the two.
    assert flop("clip_loss") == 4 * 2 * 100 * 100 * 10
    assert flop("siglip_loss") == 3 * 2 * 100 * 100 * 10
    assert flop("info_nce, queue") == 3 * 2 * QUERIES * 100 * 10
    assert flop(gpu_pairs.MANY_QUERIES) == 3 * 2 * 4096 * 100 * 10
    assert flop("info_nce") == 4 * 2 * 50 * 50 * 10
    assert flop("dcl_loss") == gpu_cases.Case("bf16", 10, 100).flop
    # Half of the tiles forward; backward half of them again, each used for both of its blocks of rows.
    assert workloads.LOSSES["nt_xent"].flop(100, 10, "cpu") == (0.5 + 0.5 + 1) * 2 * 100 * 100 * 10
    # Two views in, two gradients out; a queue has no gradient.
    assert workloads.LOSSES["nt_xent"].least_bytes(100, 10, 4) == 2 * 100 * 10 * 4
    assert workloads.LOSSES["info_nce, queue"].least_bytes(100, 10, 4) == (3 * QUERIES + 100) * 10 * 4
    assert gpu_pairs.bytes_needed(gpu_pairs.Case("clip_loss", 100, 10)) == gpu_pairs.MATRICES * 2 * 100 * 100
    assert gpu_pairs.bytes_needed(gpu_pairs.Case("siglip_loss", 100, 10, KERNEL)) == 0


@pytest.mark.parametrize("kind", list(gpu_pairs.WORK))
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
    monkeypatch.setitem(gpu_pairs.WORK["clip_loss"].sides, "fastcl", lambda x, y: (*right(x, y)[:2], 0 * y))
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
    work = gpu_pairs.WORK["siglip_loss"]
    sides = work.sides | {KERNEL: gradient_of(peers._siglip_kernel())}
    monkeypatch.setitem(gpu_pairs.WORK, "siglip_loss", replace(work, sides=sides))
    case = gpu_pairs.Case("siglip_loss", 64, 8, KERNEL)
    record = gpu_pairs.run_case(case, CPU, 0.0)
    assert record["sides"][KERNEL]["error_vs_fp64"]["loss"] < 0.02
    inputs = work.inputs(64, 8, torch.float32, CPU)[0]
    found = gpu_pairs.errors(case, gpu_pairs.calls(case), inputs)
    assert set(found) == {"fastcl", KERNEL} and found[KERNEL]["gradient"] < 1e-5


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
