"""Time, memory and error of the sorts and of swd_loss on a GPU against plain PyTorch: one process of `gpu.py`.

    python benchmarks/gpu_swd.py --out swd.jsonl --seconds 60

Also the losses that share NT-Xent's kernels, once each against NT-Xent itself: they must cost about the same. The
ceilings are copy bandwidth and the clock under load. What is written when is said in `gpu_runner.py`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import eager, gpu_runner, reporting, timing, workloads
from benchmarks.timing import gradient_of
from benchmarks.workloads import WORKLOADS, Workload, has_errors
from fastcl import decoupled_nt_xent, nt_xent, uniformity_loss

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIZES, PROJECTIONS = (8192, 16384, 512, 2048, 65536), (128, 2048)
STABLE = "torch.sort stable"
# Up to this many elements launches take about as long as kernels: a CUDA graph shows the device's own time.
GRAPH_ELEMENTS = 2**21
# Errors in float64 up to this many elements.
ERROR_ELEMENTS = 2**21
# Low guesses, to tell what can end in time and what fits: elements per second of the slower side, and bytes of memory
# that plain PyTorch needs an element (values, int64 indices and the scratch of two sorts, squares and gradients).
GUESSED_RATE, GUESSED_BYTES = 5e8, 128


def _siblings() -> dict[str, Workload]:
    """Losses beside NT-Xent, on one leaf [M, D] for what takes rows and two [M / 2, D] for what takes views."""
    base = gradient_of(nt_xent)
    decoupled = gradient_of(lambda z1, z2: decoupled_nt_xent(z1, z2, 0.1))
    uniformity = gradient_of(uniformity_loss)
    ours = {
        "decoupled_nt_xent": lambda z, z1, z2: decoupled(z1, z2),
        "uniformity_loss": lambda z, z1, z2: uniformity(z),
    }
    return {
        kind: Workload(
            lambda m, d: [(m, d), (m // 2, d), (m // 2, d)],
            {"fastcl": side, "nt_xent": lambda z, z1, z2: base(z1, z2)},
            grads=3,
        )
        for kind, side in ours.items()
    }


SIBLINGS = _siblings()


@dataclass(frozen=True)
class Case:
    """n rows or elements of a segment; p directions or segments, or the features of a sibling of NT-Xent."""

    kind: str
    dtype: str
    p: int
    n: int
    other: str = "eager"

    @property
    def key(self) -> str:
        return f"{self.kind} {self.dtype} P={self.p} N={self.n} {self.other}"

    @property
    def expected_seconds(self) -> float:
        return self.p * self.n / GUESSED_RATE

    @property
    def label(self) -> str:
        return "forward" if self.kind == "segmented_sort" else "forward + backward"


def cases() -> list[Case]:
    """All cases, those that matter most first: time may run out."""
    wanted = [Case("wasserstein_1d", "fp32", p, 8192) for p in PROJECTIONS]
    wanted += [Case("wasserstein_1d", "fp32", 128, 16384), Case("swd_loss", "bf16", 128, 8192)]
    wanted += [Case("swd_loss, given draws", "fp32", 128, 8192)]
    wanted += [Case("segmented_sort", "fp32", p, 8192, STABLE) for p in PROJECTIONS]
    wanted += [Case(kind, "bf16", 128, 8192, "nt_xent") for kind in SIBLINGS]
    wanted += [Case("wasserstein_1d", "fp32", p, n) for n in SIZES for p in PROJECTIONS]
    wanted += [Case("swd_loss", "fp32", 128, 8192), Case("wasserstein_1d", "fp32", 128, 8192, "compiled")]
    for dtype in ("fp16", "fp32"):
        wanted += [Case("segmented_sort", dtype, p, n, STABLE) for n in SIZES for p in PROJECTIONS]
    return list(dict.fromkeys(wanted))


def gigahertz(answer: str | None) -> float | None:
    """What nvidia-smi answers in MHz; None where it does not know."""
    return float(answer) / 1e3 if answer and answer.replace(".", "").isdigit() else None


def clock_ghz(device: torch.device) -> float | None:
    """The clock of the multiprocessors while the device sorts, or None where nvidia-smi does not say."""
    x = torch.randn(2048, 8192, device=device)
    torch.sort(x, dim=1)
    torch.cuda.synchronize(device)
    # About a second of work, so that the answer falls within it.
    for _ in range(100):
        torch.sort(x, dim=1)
    which = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    answer = reporting.output("nvidia-smi", which, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits")
    torch.cuda.synchronize(device)
    return gigahertz(answer)


def ceilings(device: torch.device) -> dict:
    """Copy bandwidth, and what the bandwidth of shared memory follows from."""
    found = {"copy TB/s": gpu_runner.copy_rate(device)}
    clock = clock_ghz(device)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return found | ({"SM GHz": clock} if clock else {}) | {"SMs": count}


def calls(case: Case) -> dict:
    """{side: function of the inputs} of both sides."""
    sides = (WORKLOADS | SIBLINGS)[case.kind].sides
    if case.other == "compiled":
        return {"fastcl": sides["fastcl"], "compiled": gradient_of(eager.compiled(eager.wasserstein_1d))}
    return {name: sides[name] for name in ("fastcl", case.other)}


def run_case(case: Case, device: torch.device, seconds: float = gpu_runner.SECONDS_PER_CASE) -> dict:
    """Everything about one case. What fails on one side is recorded there and does not touch the other."""
    work, dtype = (WORKLOADS | SIBLINGS)[case.kind], DTYPES[case.dtype]
    set_bytes = sum(rows * columns for rows, columns in work.shapes(case.n, case.p)) * dtype.itemsize
    inputs = work.inputs(case.n, case.p, dtype, device, gpu_runner.sets_beyond_l2(set_bytes, device))
    record = asdict(case) | {"sides": {}}
    sides = {name: {case.label: timing.rotate(call, inputs)} for name, call in calls(case).items()}
    need = case.p * case.n * GUESSED_BYTES if case.kind in WORKLOADS else 0
    ready = gpu_runner.prepare(sides, device, record, {case.other: gpu_runner.out_of_reach(need, device)})
    gpu_runner.time_sides(case.other, ready, device, record, seconds / 2)
    if device.type == "cuda" and case.p * case.n <= GRAPH_ELEMENTS:
        # A QR is not made for capture, and a capture that fails may leave PyTorch's generator unusable.
        captured = {name: runs for name, runs in ready.items() if case.kind != "swd_loss" or name == "fastcl"}
        gpu_runner.time_graphs(len(inputs), captured, device, record, seconds / 4)
    if case.dtype == "fp32" and case.p * case.n <= ERROR_ELEMENTS and len(ready) == 2:
        known = {name: call for name, call in calls(case).items() if name in ready}
        for name, found in workloads.errors(case.kind, known, inputs[0]).items() if has_errors(case.kind) else ():
            record["sides"][name]["error_vs_fp64"] = found
    return record


if __name__ == "__main__":
    sys.exit(gpu_runner.main(__doc__, "gpu_swd.py", cases(), run_case, ceilings))
