"""Everything that needs a GPU, in a few minutes: tests, benchmark and launch-table sweep of this machine.

    python benchmarks/gpu.py --out benchmarks/results

Writes <out>/<name of the GPU>/nt_xent.json, nt_xent.md, nt_xent.png, swd.json, swd.md, pairs.json, pairs.md,
trainer.json, trainer.md and tests.txt. Each phase runs in processes of its own and has its share of the wall clock, so a
hang or a crash costs that phase alone, and what was measured before it is kept. Exit status: 0 everything passed, 1
something did not, 2 there is no CUDA device. Targets that are missed are reported and do not change the status.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import torch

from benchmarks import gpu_pairs_report, gpu_report, gpu_swd_report, reporting

HERE = Path(__file__).resolve().parent
# Shares of the wall clock. What a phase leaves over goes to those after it.
SHARES = {"tests": 0.33, "selftest": 0.09, "cases": 0.17, "swd": 0.10, "pairs": 0.12, "trainer": 0.08, "tune": 0.11}
# A process that was asked to end gets this long to write its summary.
GRACE = 15.0
# One case of the benchmark takes a few seconds, one that compiles perhaps a minute: after this it hangs.
STALL = 100.0
MOST_RESTARTS = 8
REPORT_SECONDS = 10.0


def run_command(
    command: list[str], log: Path, seconds: float, progress: Path | None = None, stall: float = STALL
) -> dict:
    """Run with output appended to `log`; ended after `seconds`, or when `progress` has not grown for `stall`."""
    begin = time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # A session of its own: ending it ends its workers too.
    with log.open("a") as output:
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path},
        )  # fmt: skip
    timed_out = stalled = False
    size, grown = -1, begin
    try:
        while child.poll() is None:
            now = time.monotonic()
            if progress is not None and progress.exists() and progress.stat().st_size != size:
                size, grown = progress.stat().st_size, now
            timed_out = now - begin > seconds
            stalled = progress is not None and now - grown > stall
            if timed_out or stalled:
                # Interrupted first: pytest then still writes its summary.
                os.killpg(child.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(GRACE)
                break
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return {
        "command": " ".join(command[1:]),
        "returncode": child.returncode,
        "seconds": time.monotonic() - begin,
        "timed_out": timed_out,
        "stalled": stalled,
    }


def junit(path: Path) -> tuple[dict, list[str]]:
    """Counts and failures of a JUnit file."""
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in xml.parse(path).iter("testcase"):
        broken = [part for part in case if part.tag in ("failure", "error")]
        if broken:
            counts["failed"] += 1
            message = (broken[0].get("message") or "").splitlines() or [""]
            failures.append(f"{case.get('classname')}::{case.get('name')}: {message[0]}")
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    return counts, failures


def kernel_tests() -> list[str]:
    """The files of kernel tests, which run on the GPU where there is one."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*kernels*.py"))


def run_tests(results: dict, folder: Path, work: Path, seconds: float) -> None:
    """Tests that need a GPU, then the kernel tests."""
    log = folder / "tests.txt"
    # Compiling kernels fills most of the time, and is done on all cores this way.
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    spread = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
    end = time.monotonic() + seconds
    selections = ((0.6, ["tests", "-m", "gpu"]), (1.0, [*kernel_tests(), "-m", "not gpu"]))
    for number, (share, selection) in enumerate(selections):
        summary = work / f"tests-{number}.xml"
        command = [sys.executable, "-m", "pytest", *selection, "-v", "-rs", "--tb=short", "-p", "no:cacheprovider"]
        limit = max(1.0, share * (end - time.monotonic()) - GRACE)
        outcome = run_command([*command, *spread, f"--junitxml={summary}"], log, limit)
        outcome["command"] = "pytest " + " ".join(selection)
        results["tests"].append(outcome)
        if summary.exists():
            # Cut short where pytest was killed while it wrote: then tests.txt has to do.
            with contextlib.suppress(xml.ParseError):
                outcome["counts"], outcome["failures"] = junit(summary)
        if outcome["returncode"]:
            why = "ran out of time" if outcome["timed_out"] else f"exit status {outcome['returncode']}"
            results["problems"].append("\n".join([f"{outcome['command']}: {why}", *outcome.get("failures", [])]))


def cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on the path or where PyTorch found the toolkit."""
    from torch.utils.cpp_extension import CUDA_HOME

    return shutil.which(name) or (CUDA_HOME and shutil.which(name, path=os.path.join(CUDA_HOME, "bin")))


def run_selftest(results: dict, folder: Path, work: Path, seconds: float) -> None:
    """The CUDA kernels without PyTorch: built, run, and run on fewer rows under the memory checker."""
    log, program, end = folder / "tests.txt", str(work / "selftest"), time.monotonic() + seconds
    nvcc, checker = cuda_tool("nvcc"), cuda_tool("compute-sanitizer")
    missing = [name for name, tool in (("nvcc", nvcc), ("compute-sanitizer", checker)) if tool is None]
    if missing:
        note = f"{' and '.join(missing)} not found"
        results["tests"].append({"command": "CUDA self-test", "returncode": 0, "seconds": 0.0, "skipped": note})
    if nvcc is None:
        return
    sources = [ROOT / "tests" / "cuda_selftest.cu", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    major, minor = torch.cuda.get_device_capability()
    build = [nvcc, "-std=c++17", "-O2", f"-arch=sm_{major}{minor}", "-o", program, *map(str, sources)]
    steps = [("CUDA self-test, build", 0.7, build), ("CUDA self-test", 0.6, [program])]
    if checker:
        # Rows of up to 1,100 elements reach every tier of the block sort; on longer ones the checker takes minutes.
        steps.append(("CUDA self-test, memory checker", 1.0, [checker, "--error-exitcode", "1", program, "1100"]))
    for name, share, command in steps:
        outcome = run_command(command, log, max(1.0, share * (end - time.monotonic())))
        lines = log.read_text().splitlines() or [""]
        results["tests"].append(outcome | {"command": name, "note": lines[-1] if command is not build else "-"})
        # The checker is slow: what it has not complained about when time is up has passed.
        if outcome["returncode"] and not (outcome["timed_out"] and command[0] == checker):
            why = "ran out of time" if outcome["timed_out"] else f"exit status {outcome['returncode']}"
            results["problems"].append("\n".join([f"{name}: {why}", *lines[-50:]]))
            return


def read_cases(path: Path) -> dict:
    """The file of a benchmark, sorted into what worked and what did not."""
    found = {"ceilings": {}, "cases": [], "late": [], "problems": []}
    started, ended, late = [], set(), []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # the last line of a process that was ended while it wrote
        if "ceilings" in line:
            found["ceilings"] = line["record"]
        elif "start" in line:
            started.append(line["start"])
        elif "done" in line:
            ended.add(line["done"])
            found["cases"].append(line["record"])
            for name, side in line["record"]["sides"].items():
                for key in ("error", "graph_error"):
                    if key in side:
                        found["problems"].append(f"{line['done']}, {name}, {key}:\n{side[key]}")
        elif "failed" in line:
            ended.add(line["failed"])
            found["problems"].append(f"{line['failed']}:\n{line['error']}")
        elif "late" in line:
            late.append(line["late"])
    found["problems"] += [f"{key}: its process ended in it" for key in started if key not in ended]
    found["late"] = list(dict.fromkeys(key for key in late if key not in started))
    return found


def run_cases(script: str, results: dict, work: Path, seconds: float) -> None:
    """A benchmark, started again behind a case that ends its process."""
    path, log = work / f"{script}.jsonl", work / f"{script}.log"
    end = time.monotonic() + seconds
    size_before = None
    outcome: dict = {}
    try:
        for _ in range(MOST_RESTARTS):
            left = end - time.monotonic()
            if left < 2 * GRACE:
                break
            command = [sys.executable, str(HERE / script), "--out", str(path), "--seconds", str(left - GRACE)]
            outcome = run_command(command, log, left - GRACE / 2, path)
            size = path.stat().st_size if path.exists() else 0
            if outcome["returncode"] == 0 or size == size_before:
                break
            size_before = size
    finally:
        for key, value in read_cases(path).items():
            results[key] = results["problems"] + value if key == "problems" else value
    if outcome.get("returncode") and not outcome["timed_out"]:
        results["problems"].append(f"{script}: exit status {outcome['returncode']}\n{log.read_text()[-4000:]}")


def run_tune(results: dict, work: Path, seconds: float) -> None:
    path, log = work / "tune.json", work / "tune.log"
    command = [sys.executable, str(HERE / "tune.py"), "--json", str(path), "--seconds", str(seconds - GRACE)]
    outcome = run_command(command, log, seconds - GRACE / 2)
    if path.exists():
        results["tune"] = json.loads(path.read_text())
        results["problems"] += results["tune"]["errors"]
    if outcome["returncode"] and not outcome["timed_out"]:
        results["problems"].append(f"sweep: exit status {outcome['returncode']}\n{log.read_text()[-4000:]}")
    elif outcome["timed_out"]:
        results["problems"].append("sweep: ran out of time")


def run_trainer(results: dict, folder: Path, work: Path, seconds: float) -> None:
    """What the loss costs a step of the trainer, which needs more packages than the library."""
    log = work / "trainer.log"
    if missing := [name for name in ("torchvision", "timm", "tqdm", "PIL") if not importlib.util.find_spec(name)]:
        print(f"trainer: not measured, without {', '.join(missing)}")
        return
    # Three cases and the search for the largest batch, which is written as far as it gets.
    command = [sys.executable, str(HERE / "trainer.py"), "--folder", str(folder), "--seconds", str(seconds / 10)]
    outcome = run_command(command, log, seconds - GRACE / 2)
    if outcome["returncode"]:
        why = "ran out of time" if outcome["timed_out"] else f"exit status {outcome['returncode']}"
        results["problems"].append(f"trainer: {why}\n{log.read_text()[-4000:]}")


def save(results: dict, folder: Path, name: str = "nt_xent", write=gpu_report.write) -> None:
    """Write what there is; a report that cannot be written is itself a problem."""
    results["passed"] = not results["problems"]
    try:
        write(results, folder)
    except Exception:
        results["problems"].append(traceback.format_exc())
        results["passed"] = False
        reporting.write_json(folder / f"{name}.json", results)


def run_pairs(results: dict, folder: Path, work: Path, seconds: float) -> None:
    """The benchmark of the losses of pairs, and its report."""
    try:
        run_cases("gpu_pairs.py", results, work, seconds)
    finally:
        save(results, folder, "pairs", gpu_pairs_report.write)


def run_phases(results: dict, swd: dict, folder: Path, seconds: float, phases: dict) -> None:
    """Each phase within its share; a report after each of them."""
    end = time.monotonic() + seconds - REPORT_SECONDS
    waiting = list(phases)
    while waiting:
        name = waiting[0]
        share = SHARES[name] / sum(SHARES[other] for other in waiting)
        limit = max(1.0, (end - time.monotonic()) * share)
        print(f"{name}: at most {limit:.0f} s", flush=True)
        begin = time.monotonic()
        try:
            phases[name](limit)
        except Exception:
            results["problems"].append(f"{name}:\n{traceback.format_exc()}")
        finally:
            results["seconds"][name] = time.monotonic() - begin
            save(results, folder)
            save(swd, folder, "swd", gpu_swd_report.write)
        waiting.pop(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of results")
    parser.add_argument("--seconds", type=float, default=480.0, help="wall clock for everything")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"gpu.py: expected a CUDA device, got none (torch {torch.__version__})", file=sys.stderr)
        return 2
    # Ended from outside: the child is ended and what there is is kept.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    name = torch.cuda.get_device_name()
    folder = args.out / reporting.slug(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tests.txt").write_text("")
    results: dict = {"name": name, "passed": False, "seconds": {}, "tests": [], "cases": [], "tune": {}, "problems": []}
    swd: dict = {"name": name, "passed": False, "cases": [], "problems": []}
    pairs: dict = {"name": name, "passed": False, "cases": [], "problems": []}
    try:
        results["versions"] = swd["versions"] = pairs["versions"] = reporting.versions()
    except Exception:
        results["problems"].append(traceback.format_exc())
    work = Path(tempfile.mkdtemp())
    try:
        run_phases(results, swd, folder, args.seconds, {
            "tests": lambda limit: run_tests(results, folder, work, limit),
            "selftest": lambda limit: run_selftest(results, folder, work, limit),
            "cases": lambda limit: run_cases("gpu_cases.py", results, work, limit),
            "swd": lambda limit: run_cases("gpu_swd.py", swd, work, limit),
            "pairs": lambda limit: run_pairs(pairs, folder, work, limit),
            "trainer": lambda limit: run_trainer(results, folder, work, limit),
            "tune": lambda limit: run_tune(results, work, limit),
        })  # fmt: skip
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(gpu_report.markdown(results), gpu_swd_report.markdown(swd), gpu_pairs_report.markdown(pairs), sep="\n")
    print(f"written to {folder}")
    return 0 if results["passed"] and swd["passed"] and pairs["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
