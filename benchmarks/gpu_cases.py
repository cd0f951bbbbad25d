"""Time, memory and error of nt_xent on a GPU against eager PyTorch and torch.compile: one process of `gpu.py`.

    python benchmarks/gpu_cases.py --out cases.jsonl --seconds 150

Writes one JSON line when a case starts and one when it ends, so that whatever ends this process, finished cases
are kept and the case that did it is known. Cases already in the file are not run again. The first line of all
holds the ceilings of the device: matrix-product rates and copy bandwidth, measured here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import accuracy, eager, memory, timing
from fastcl import nt_xent

TEMPERATURE = 0.1
# float32 at both settings of torch.set_float32_matmul_precision.
DTYPES = {
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
}
# float64 references up to this many inputs: wider and larger ones take seconds.
ERROR_ELEMENTS = 65536 * 128
# Below this, launches take longer than the kernels: a CUDA graph shows the device's own time.
GRAPH_ROWS = 16384
# Rates that decide which cases are not tried (TFLOP/s): low guesses for any recent data-centre GPU.
GUESSED_RATE = {"bf16": 250, "fp16": 250, "fp32": 30, "tf32": 60}
LONGEST_CALL = 4.0
SECONDS_PER_CASE = 1.0
# Exit status for "the device context is broken: start me again".
BROKEN = 3


@dataclass(frozen=True)
class Case:
    dtype: str
    d: int
    m: int
    other: str = "eager"

    @property
    def key(self) -> str:
        return f"{self.dtype} D={self.d} M={self.m} {self.other}"

    @property
    def flop(self) -> float:
        """Forward half a unit, backward two, one unit being 2 M M D."""
        return 2.5 * 2 * self.m**2 * self.d

    @property
    def expected_seconds(self) -> float:
        return self.flop / (GUESSED_RATE[self.dtype] * 1e12)


def cases() -> list[Case]:
    """All cases, those that matter most first: time may run out."""
    sizes = (2048, 8192, 65536, 262144)
    wanted = [Case("bf16", 128, m) for m in (65536, 8192, 1048576, 2048, 262144)]
    wanted += [Case("bf16", 128, m, "compiled") for m in (8192, 65536)]
    wanted += [Case(dtype, 128, m) for dtype in ("fp32", "tf32", "fp16") for m in sizes]
    wanted += [Case("bf16", d, m) for d in (512, 256, 1024, 64) for m in sizes]
    wanted += [Case("bf16", 128, 2048, "compiled"), Case("fp32", 128, 8192, "compiled")]
    wanted += [Case(dtype, d, m) for dtype in ("fp32", "fp16", "tf32") for d in (512, 256, 64) for m in sizes[1:3]]
    wanted += [Case(dtype, d, 1048576) for dtype, d in (("fp16", 128), ("bf16", 64), ("bf16", 256))]
    return [case for case in wanted if case.expected_seconds <= LONGEST_CALL]


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """torch.set_float32_matmul_precision, put back at the end."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def ceilings(device: torch.device, size: int = 8192, copy_bytes: int = 2 * 2**30) -> dict:
    """Rates of a large matrix product in each type (TFLOP/s) and of a copy (TB/s, reads plus writes)."""
    found = {}
    for name, (dtype, precision) in DTYPES.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        with matmul_precision(precision):
            samples = timing.alternate({"mm": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, device, 0.3)["mm"]
        found[f"{name} TFLOP/s"] = 2 * size**3 / timing.summary(samples)["median"] / 1e9
    source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    samples = timing.alternate({"copy": lambda: target.copy_(source)}, device, 0.3)["copy"]
    found["copy TB/s"] = 2 * copy_bytes / timing.summary(samples)["median"] / 1e9
    return found


def rotating_sets(case: Case, device: torch.device) -> int:
    """Sets of inputs that together are twice the L2, so that no call finds its inputs there; 16 at most."""
    if device.type != "cuda":
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(16, 1 + 2 * l2 // (case.m * case.d * DTYPES[case.dtype][0].itemsize)))


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


def losses(other: str) -> dict:
    second = eager.nt_xent if other == "eager" else eager.compiled()
    return {"fastcl": nt_xent, other: second}


def _first_call(run: timing.Run, device: torch.device) -> float:
    """Seconds of a call that may compile first."""
    begin = time.perf_counter()
    run()
    timing.synchronize(device)
    return time.perf_counter() - begin


def _why_not(side: str, case: Case, device: torch.device) -> str | None:
    """Why a side is not tried, or None."""
    if side == "fastcl" or device.type != "cuda":
        return None
    need, free = eager.bytes_needed(case.m, DTYPES[case.dtype][0].itemsize), torch.cuda.mem_get_info(device)[0]
    return f"needs about {need / 2**30:,.0f} GiB" if need > free else None


def _prepare(case: Case, inputs: list, device: torch.device, record: dict) -> dict:
    """Sides that can run: {name: (loss, {pass: run})}; the rest says in `record` why it cannot."""
    ready = {}
    for name, loss in losses(case.other).items():
        side = record["sides"][name] = {}
        reason = _why_not(name, case, device)
        if reason:
            side["skipped"] = reason
            continue
        runs = {"forward": timing.step(loss, inputs, False), "forward + backward": timing.step(loss, inputs, True)}
        try:
            side["first_call_s"] = sum(_first_call(run, device) for run in runs.values())
            if device.type == "cuda":
                torch.cuda.empty_cache()
                side["peak_extra_bytes"] = memory.cuda_peak(runs["forward + backward"], device)
            ready[name] = (loss, runs)
        except torch.OutOfMemoryError:
            side["skipped"] = "out of memory"
        except Exception:
            side["error"] = traceback.format_exc()
            if timing.context_is_broken(device):
                raise
    return ready


def _time(case: Case, ready: dict, device: torch.device, record: dict, seconds: float) -> None:
    for label in ("forward", "forward + backward"):
        samples = timing.alternate({name: runs[label] for name, (_, runs) in ready.items()}, device, seconds)
        for name, values in samples.items():
            record["sides"][name].setdefault("ms", {})[label] = timing.summary(values)
        if len(samples) == 2:
            record.setdefault("ratio", {})[label] = timing.ratio(samples[case.other], samples["fastcl"])
    ours = record["sides"]["fastcl"].get("ms")
    if ours:
        record["TFLOP/s"] = case.flop / ours["forward + backward"]["median"] / 1e9


def _time_graphs(inputs: list, ready: dict, device: torch.device, record: dict, seconds: float) -> None:
    for name, (_, runs) in ready.items():
        side = record["sides"][name]
        try:
            replay = graphed(len(inputs), runs["forward + backward"], device)
            samples = timing.alternate({name: replay}, device, seconds)[name]
            side["graph_ms"] = timing.summary([ms / len(inputs) for ms in samples])
        except Exception:
            side["graph_error"] = traceback.format_exc()
            if timing.context_is_broken(device):
                raise


def _add_errors(inputs: list, ready: dict, record: dict) -> None:
    z1, z2 = inputs[0]
    truth = accuracy.exact(z1, z2, TEMPERATURE)
    for name, (loss, _) in ready.items():
        record["sides"][name]["error_vs_fp64"] = accuracy.errors(loss, truth, z1, z2, TEMPERATURE)


def run_case(case: Case, device: torch.device, seconds: float = SECONDS_PER_CASE) -> dict:
    """Everything about one case. What fails on one side is recorded there and does not touch the other."""
    with matmul_precision(DTYPES[case.dtype][1]):
        return _run_case(case, device, seconds)


def _run_case(case: Case, device: torch.device, seconds: float) -> dict:
    inputs = timing.rotating_inputs(case.m, case.d, DTYPES[case.dtype][0], device, rotating_sets(case, device))
    record = asdict(case) | {"sides": {}}
    ready = _prepare(case, inputs, device, record)
    # Cached blocks of a big side would be the other's lack of memory.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    _time(case, ready, device, record, seconds / 2)
    if device.type == "cuda" and case.m <= GRAPH_ROWS:
        _time_graphs(inputs, ready, device, record, seconds / 4)
    if case.m * case.d <= ERROR_ELEMENTS and case.other == "eager":
        _add_errors(inputs, ready, record)
    return record


def run_all(todo: list[Case], out: Path, device: torch.device, end: float, seconds: float = SECONDS_PER_CASE) -> int:
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--seconds", type=float, default=150.0, help="wall clock after which no case begins")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_cases.py: expected a CUDA device, got none", file=sys.stderr)
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
    return run_all([case for case in cases() if case.key not in known], args.out, device, end)


if __name__ == "__main__":
    sys.exit(main())
