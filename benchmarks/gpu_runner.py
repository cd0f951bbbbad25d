"""What the GPU benchmarks share: cases that run one after another in a process of `gpu.py`, and how one is measured.

A benchmark writes one JSON line when a case starts and one when it ends, so that whatever ends its process, finished
cases are kept and the case that did it is known. Cases already in the file are not run again. The first line of all
holds the ceilings of the device, measured there and then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from benchmarks import memory, timing

# Seconds to time one case.
SECONDS_PER_CASE = 1.0
# Exit status for "the device context is broken: start me again".
BROKEN = 3


class Case(Protocol):
    """What there is to run: `other` is the side that ours is compared with."""

    other: str

    @property
    def key(self) -> str: ...

    @property
    def expected_seconds(self) -> float: ...


RunCase = Callable[[Case, torch.device, float], dict]
# {label of the pass: one call of it} of each side.
Ready = dict[str, dict[str, timing.Run]]


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """torch.set_float32_matmul_precision, put back at the end."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def copy_rate(device: torch.device, copy_bytes: int = 2 * 2**30) -> float:
    """TB/s of a large copy, reads plus writes."""
    source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    samples = timing.alternate({"copy": lambda: target.copy_(source)}, device, 0.3)["copy"]
    return 2 * copy_bytes / timing.summary(samples)["median"] / 1e9


def sets_beyond_l2(set_bytes: int, device: torch.device) -> int:
    """Sets of inputs that together are twice the L2, so that no call finds its inputs there; 16 at most."""
    if device.type != "cuda":
        return 2
    return max(2, min(16, 1 + 2 * torch.cuda.get_device_properties(device).L2_cache_size // set_bytes))


def graphed(runs: int, run: timing.Run, device: torch.device) -> timing.Run:
    """A CUDA graph of `runs` calls in a row."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(runs):
            run()
    return graph.replay


def _first_call(run: timing.Run, device: torch.device) -> float:
    """Seconds of a call that may compile first."""
    begin = time.perf_counter()
    run()
    timing.synchronize(device)
    return time.perf_counter() - begin


def out_of_reach(need: int, device: torch.device) -> str | None:
    """Why something that needs so many bytes is not tried, or None."""
    if device.type != "cuda" or need <= torch.cuda.mem_get_info(device)[0]:
        return None
    return f"needs about {need / 2**30:,.0f} GiB"


def prepare(sides: Ready, device: torch.device, record: dict, why_not: Mapping[str, str | None]) -> Ready:
    """Sides that can run, called once and their last pass once more for its peak; `record` says why others cannot."""
    ready = {}
    for name, runs in sides.items():
        side = record["sides"][name] = {}
        if why_not.get(name):
            side["skipped"] = why_not[name]
            continue
        try:
            side["first_call_s"] = sum(_first_call(run, device) for run in runs.values())
            if device.type == "cuda":
                torch.cuda.empty_cache()
                side["peak_extra_bytes"] = memory.cuda_peak(list(runs.values())[-1], device)
            ready[name] = runs
        except torch.OutOfMemoryError:
            side["skipped"] = "out of memory"
        except Exception:
            side["error"] = traceback.format_exc()
            if timing.context_is_broken(device):
                raise
    # Cached blocks of a big side would be the other's lack of memory.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return ready


def time_sides(other: str, ready: Ready, device: torch.device, record: dict, seconds: float) -> None:
    """Times of all sides, pass by pass, and the ratio where both are there."""
    labels = dict.fromkeys(label for runs in ready.values() for label in runs)
    for label in labels:
        samples = timing.alternate({name: runs[label] for name, runs in ready.items()}, device, seconds)
        for name, values in samples.items():
            record["sides"][name].setdefault("ms", {})[label] = timing.summary(values)
        if "fastcl" in samples and other in samples:
            record.setdefault("ratio", {})[label] = timing.ratio(samples[other], samples["fastcl"])


def time_graphs(calls: int, ready: Ready, device: torch.device, record: dict, seconds: float) -> None:
    """Times of the last pass of each side in CUDA graphs of so many calls: the device's own time, without launches."""
    for name, runs in ready.items():
        side = record["sides"][name]
        try:
            replay = graphed(calls, list(runs.values())[-1], device)
            samples = timing.alternate({name: replay}, device, seconds)[name]
            side["graph_ms"] = timing.summary([ms / calls for ms in samples])
        except Exception:
            side["graph_error"] = traceback.format_exc()
            if timing.context_is_broken(device):
                raise


def run_all(
    todo: Sequence[Case], run_case: RunCase, out: Path, device: torch.device, end: float,
    seconds: float = SECONDS_PER_CASE,
) -> int:  # fmt: skip
    """Run what the file does not hold yet until the clock says `end`; 0, or BROKEN."""
    with out.open("a") as file:

        def write(**line):
            file.write(json.dumps(line) + "\n")
            file.flush()

        for case in todo:
            # What the last case needed is no guide to this one; a case that cannot end in time is not begun.
            if time.monotonic() + 4 * case.expected_seconds > end:
                write(late=case.key)
                continue
            write(start=case.key)
            try:
                write(done=case.key, record=run_case(case, device, seconds))
                print(f"done {case.key}", flush=True)
            except Exception:
                write(failed=case.key, error=traceback.format_exc())
                print(f"failed {case.key}", flush=True)
                if timing.context_is_broken(device):
                    return BROKEN
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return 0


def settled(out: Path) -> set[str]:
    """Keys of the file's cases that are not to be run (again): finished, failed, or fatal to an earlier process."""
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return {key for line in lines for kind, key in line.items() if kind in ("start", "done", "failed", "ceilings")}


def main(
    description: str, name: str, cases: Sequence[Case], run_case: RunCase, ceilings: Callable[[torch.device], dict]
) -> int:
    """The command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--seconds", type=float, default=150.0, help="wall clock after which no case begins")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"{name}: expected a CUDA device, got none", file=sys.stderr)
        return 2
    end = time.monotonic() + args.seconds
    device, known = torch.device("cuda"), settled(args.out)
    if "ceilings" not in known:
        try:
            line = {"ceilings": "ceilings", "record": ceilings(device)}
        except Exception:
            line = {"failed": "ceilings", "error": traceback.format_exc()}
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        torch.cuda.empty_cache()
    return run_all([case for case in cases if case.key not in known], run_case, args.out, device, end)
