"""The benchmark suite beside other libraries: what it measures, its report, and the comparison with a baseline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastcl import _native

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import baseline, compare, compare_simd, peers, report, suite, suite_report, timing, workloads

CPU = torch.device("cpu")
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
needs_matplotlib = pytest.mark.skipif(not peers.installed("matplotlib"), reason="needs matplotlib")


def run_main(monkeypatch, module, *args) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
    return module.main()


def test_cases_cover_every_loss_and_every_target(monkeypatch):
    for wanted in (suite.cpu_cases(), suite.cuda_cases()):
        assert len({case.key for case in wanted}) == len(wanted)
        assert {case.kind for case in wanted} >= set(workloads.LOSSES) | {"wasserstein_1d", "segmented_sort"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert suite.cases() == suite.cpu_cases(), "one does not fit"
    sides = {(case.kind, case.m, case.d, case.dtype): case.sides for case in suite.cpu_cases()}
    for target in suite_report.TARGETS:
        measured = sides[(target.kind, target.m, target.d, target.dtype)]
        assert target.side in measured or target.side in {peer.name for peer in peers.PEERS if peer.why_not()}


def test_sides_of_a_case(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plain = {"fastcl": None, "eager": None, "lightly": None, "pytorch-metric-learning": None}
    monkeypatch.setitem(workloads.WORKLOADS, "nt_xent", replace(workloads.LOSSES["nt_xent"], sides=plain))
    floor = suite.REFERENCES["nt_xent"]
    assert suite.Case("nt_xent", 512, 8).sides == [*plain, floor]
    # Its memory grows with the cube of the rows.
    assert suite.Case("nt_xent", 1024, 8, compiled=True).sides == ["fastcl", "eager", "lightly", "compiled", floor]
    assert suite.Case("nt_xent", 64, 8, "bfloat16").sides == list(plain)
    assert suite.Case("nt_xent", 32768, 8, alone=True).sides == ["fastcl"]
    assert not suite.Case("nt_xent", 32768, 8).fits() and suite.Case("wasserstein_1d", 2**20, 8).fits()
    assert suite.Case("nt_xent", 64, 8).baseline == "eager"
    assert suite.Case("segmented_sort", 64, 8).baseline == "torch.sort stable"


@pytest.mark.parametrize("kind", [*workloads.LOSSES, *workloads.SORTS])
def test_every_side_is_measured_and_right(kind):
    case = suite.Case(kind, 64, 8)
    found = suite.measure(case, case.sides, 0.0)
    assert list(found) == case.sides
    for name, side in found.items():
        assert min(side["samples"]) > 0 and side["ms"]["median"] > 0
        assert side["slower_than_fastcl"]["median"] > 0 and side["faster_than_baseline"]["median"] > 0
        if name not in suite.REFERENCES.values():
            assert (side["TFLOP/s"] is None) == (kind in workloads.SORTS) and side["TB/s"] > 0
            assert ("error" in side) == workloads.has_errors(kind)
            if "error" in side:
                expected = "-" if name == case.baseline else "right"
                assert side["error"]["verdict"] == expected, (name, side["error"])
    json.dumps(found)


def test_a_wrong_side_is_marked(monkeypatch):
    work = workloads.LOSSES["clip_loss"]
    plain = timing.gradient_of(work.plain)
    sides = work.sides | {"wrong": lambda x, y: (plain(x, y)[0], *(2 * grad for grad in plain(x, y)[1:]))}
    monkeypatch.setitem(workloads.WORKLOADS, "clip_loss", replace(work, sides=sides))
    found = suite.measure(suite.Case("clip_loss", 64, 8), ["fastcl", "wrong"], 0.0)
    assert found["wrong"]["error"]["verdict"] == "WRONG" and found["fastcl"]["error"]["verdict"] == "right"
    # Not asked for, so not timed: only what it errs by is needed.
    assert "eager" not in found and "faster_than_baseline" not in found["fastcl"]


def test_the_rule_of_errors():
    plain = {"loss": 1e-7, "gradient": 1e-6, "worst row": 0.0}
    assert suite.verdict({"loss": 1.1e-6, "gradient": 2.9e-6, "worst row": 9e-7}, plain, "float32") == "right"
    assert suite.verdict({"loss": 1e-7, "gradient": 1e-6, "worst row": 2e-6}, plain, "float32") == "WRONG"
    assert suite.verdict({"loss": 1e-7, "gradient": 1e-6, "worst row": 2e-6}, plain, "bfloat16") == "right"
    assert suite.verdict(dict.fromkeys(plain, float("nan")), plain, "float32") == "WRONG"


def test_large_cases_have_no_errors(monkeypatch):
    monkeypatch.setattr(suite, "EXACT_SIMILARITIES", 64 * 64 - 1)
    assert not any("error" in side for side in suite.measure(suite.Case("nt_xent", 64, 8), ["fastcl"], 0.0).values())
    assert "error" in suite.measure(suite.Case("nt_xent", 62, 8), ["fastcl"], 0.0)["fastcl"]


def test_a_peer_that_is_missing_says_why(monkeypatch):
    peer = peers.Peer("no-such-library", "no_such_library", {})
    assert peer.why_not() == "not installed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert replace(peer, needs_gpu=True).why_not() == "its kernels need a GPU"
    versions = peers.versions()
    assert set(versions) == {one.name for one in peers.PEERS}
    listed = "\n".join(suite_report.missing(versions))
    assert all((f"* {one.name}: " in listed) == bool(one.why_not()) for one in peers.PEERS)


def entries(**times) -> list[dict]:
    """Made up: not measurements of anything."""
    found = []
    for key, sides in times.items():
        kind, m, d, dtype = key.split("__")
        for side, ms in sides.items():
            quotient = {
                key: timing.summary([value])
                for key, value in (
                    ("slower_than_fastcl", ms / sides["fastcl"]),
                    ("faster_than_baseline", sides.get("eager", ms) / ms),
                )
            }
            info = {"kind": kind, "m": int(m), "d": int(d), "dtype": dtype, "side": side, "ms": timing.summary([ms])}
            info |= {"peak_extra_bytes": int(m) * 1024, "TFLOP/s": 0.1, "TB/s": 0.01}
            info |= {"error": {"loss": 1e-8, "gradient": 2e-7, "verdict": "WRONG" if side == "lightly" else "right"}}
            found.append({"name": f"{key} {side}", "extra_info": info | quotient})
    return found


CANNED = entries(
    nt_xent__4096__128__float32={"fastcl": 50.0, "eager": 220.0, "lightly": 400.0, "compiled": 100.0},
    nt_xent__8192__128__float32={"fastcl": 200.0, "eager": 700.0, "tile products and exponentials": 230.0},
    nt_xent__16384__128__float32={"fastcl": 1000.0},
)  # fmt: skip
INFO = {"torch": "1", "threads": 2, "cpu": {"brand_raw": "Some CPU"}, "build": {}, "ceilings": {"fp32 TFLOP/s": 0.2, "copy TB/s": 0.02},
        "peers": {"lightly": "1.0", "inf-cl": "its kernels need a GPU"}}  # fmt: skip


def test_tables_by_hand():
    text = suite_report.markdown({"benchmarks": CANNED, "machine_info": INFO})
    assert "| nt_xent | M=4,096 D=128 | eager PyTorch | 4× | 4.4× | met |" in text
    assert "| nt_xent | M=8,192 D=128 | eager PyTorch | 4× | 3.5× | MISSED |" in text
    assert "| nt_xent | M=8,192 D=128 | tile products and exponentials | 0.9× | 1.15× | met |" in text
    # 1,000 ms at twice the rows: a quarter more than four times 200.
    assert "| 16,384 | 1e+03 (1e+03..1e+03) | 16.0 | 1.25 | 1.00 | MISSED |" in text
    assert "lightly 1.0 | 400 (400..400) | 8× (8..8) | 8× | 4.0 | 50% | 50% | 1.0e-08 | 2.0e-07 | WRONG |" in text
    assert "* inf-cl: its kernels need a GPU" in text
    line = suite_report.summary(CANNED, INFO["ceilings"]).splitlines()[2]
    assert "| 50% | - | 4.4× (4.4..4.4) | 2× (2..2) | lightly 8× (wrong) | 4.0 | 4.0 |" in line


@needs_matplotlib
def test_report_writes_tables_and_plots(tmp_path, monkeypatch, capsys):
    source = tmp_path / "found.json"
    source.write_text(json.dumps({"benchmarks": CANNED, "machine_info": INFO}))
    assert run_main(monkeypatch, report, source, "--out", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "benchmarks.json", "benchmarks.md", "benchmarks.png", "summary.md",
    ]  # fmt: skip
    assert (tmp_path / "out" / "benchmarks.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "benchmarks.json").read_text())["benchmarks"] == CANNED
    assert "MISSED" in capsys.readouterr().out
    (tmp_path / "bad.json").write_text("{}")
    for bad in ("bad.json", "none.json"):
        assert run_main(monkeypatch, report, tmp_path / bad, "--out", tmp_path / "never") == 2
        assert "expected a JSON file of pytest benchmarks, got" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_baseline_tells_slower_from_noise(tmp_path, monkeypatch, capsys):
    def summary(median, low, high):
        return {"median": median, "low": low, "high": high}

    assert baseline.slower(summary(3.0, 2.9, 3.1), summary(4.0, 3.9, 4.1))
    assert not baseline.slower(summary(3.5, 3.4, 3.6), summary(4.0, 3.9, 4.1)), "within the margin"
    assert not baseline.slower(summary(3.0, 2.0, 4.0), summary(4.0, 3.9, 4.1)), "quartiles overlap"
    before, now, other = (tmp_path / name for name in ("before.json", "now.json", "other.json"))
    before.write_text(json.dumps({"benchmarks": CANNED}))
    slow = entries(
        nt_xent__4096__128__float32={"fastcl": 80.0, "eager": 220.0},
        nt_xent__8192__128__float32={"fastcl": 200.0, "eager": 690.0},
    )
    now.write_text(json.dumps({"benchmarks": slow}))
    other.write_text(json.dumps({"benchmarks": entries(nt_xent__2__2__float32={"fastcl": 1.0, "eager": 2.0})}))
    assert run_main(monkeypatch, baseline, before, before) == 0
    assert "0 of 3 cases" in capsys.readouterr().out
    assert run_main(monkeypatch, baseline, now, before) == 1
    printed = capsys.readouterr().out
    assert "0.62 | SLOWER |" in printed and "0.99 |  |" in printed and "1 of 2 cases" in printed
    assert run_main(monkeypatch, baseline, other, before) == 2
    assert run_main(monkeypatch, baseline, tmp_path / "none.json", before) == 2


@needs_linux
def test_compare_measures_a_size_of_ones_own(monkeypatch, capsys):
    monkeypatch.setattr(suite, "ceilings", lambda: {})
    assert run_main(monkeypatch, compare, *"nt_xent --m 64 --d 8 --sides fastcl eager --seconds 0".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "| right |" in lines[2] and "eager PyTorch" in lines[3]
    for wrong in (["--m", "7"], ["--d", "0"], ["--sides", "nothing"]):
        with pytest.raises(SystemExit) as stop:
            run_main(monkeypatch, compare, "nt_xent", *wrong)
        assert stop.value.code == 2


@pytest.mark.skipif(not _native.LOADED, reason=_native.REASON)
def test_compare_simd(monkeypatch, tmp_path):
    """Two tables; level and threads are afterwards what they were."""
    before = _native.build_info()["simd"], torch.get_num_threads()
    sizes = ("--simd-m", "64", "--thread-m", "64", "128", "--seconds", "0", "--folder", str(tmp_path))
    assert run_main(monkeypatch, compare_simd, *sizes) == 0
    assert (_native.build_info()["simd"], torch.get_num_threads()) == before
    simd, threads = (json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in ("simd", "threads"))
    assert list(simd[0]["ms"])[-1] == before[0] and [row["dtype"] for row in simd] == ["float32", "bfloat16"]
    assert [row["m"] for row in threads] == [64, 128] and set(threads[0]["speedup"]) == {"fastcl", "eager"}
    assert (tmp_path / "threads.md").read_text().count("\n") == 4


@needs_linux
@pytest.mark.skipif(not peers.installed("pytest_benchmark"), reason="pytest-benchmark is not installed")
def test_suite_runs_and_its_json_names_no_machine(tmp_path):
    """As a user runs it, for one small case: rounds that took turns, and a JSON file that the report reads."""
    found = tmp_path / "found.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-p", "no:cacheprovider"]
    command += ["-k", "nt_xent and 256x128 and (fastcl or eager)", f"--benchmark-json={found}"]
    # Not as one of the workers that these tests may run in: pytest-benchmark measures nothing there.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    env |= {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout and "all sides in turns" in done.stdout
    results = json.loads(found.read_text())
    ours, theirs = results["benchmarks"]
    assert [one["extra_info"]["side"] for one in (ours, theirs)] == ["fastcl", "eager"]
    for one in (ours, theirs):
        assert one["stats"]["rounds"] == one["extra_info"]["ms"]["rounds"] >= suite.LEAST_ROUNDS
        assert one["stats"]["median"] == pytest.approx(one["extra_info"]["ms"]["median"] / 1e3, rel=1e-6)
        assert one["extra_info"]["peak_extra_bytes"] >= 0
    assert results["machine_info"]["ceilings"]["fp32 TFLOP/s"] > 0
    assert not {"node", "commit_info"} & (results.keys() | results["machine_info"].keys())
    assert suite_report.markdown(results).count("nt_xent | 256") == 2


def test_committed_results_are_the_report_of_the_committed_json():
    """Tables that the README shows come out of the JSON file beside them, to the letter."""
    results = json.loads((RESULTS / "benchmarks.json").read_text())
    assert (RESULTS / "benchmarks.md").read_text() == suite_report.markdown(results)
    entries_, ceilings = results["benchmarks"], results["machine_info"]["ceilings"]
    assert (RESULTS / "summary.md").read_text() == suite_report.summary(entries_, ceilings) + "\n"
