"""Time, memory and error of nt_xent on a GPU against eager PyTorch and torch.compile: one process of `gpu.py`.

    python benchmarks/gpu_cases.py --out cases.jsonl --seconds 150

The ceilings are matrix-product rates and copy bandwidth. What is written when is said in `gpu_runner.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import accuracy, eager, gpu_runner, timing
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


def ceilings(
    device: torch.device, size: int = 8192, copy_bytes: int = 2 * 2**30, names: Iterable[str] = tuple(DTYPES)
) -> dict:
    """Rates of a large matrix product in each type (TFLOP/s) and of a copy (TB/s, reads plus writes)."""
    found = {}
    for name in names:
        dtype, precision = DTYPES[name]
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        with gpu_runner.matmul_precision(precision):
            samples = timing.alternate({"mm": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, device, 0.3)["mm"]
        found[f"{name} TFLOP/s"] = 2 * size**3 / timing.summary(samples)["median"] / 1e9
    return found | {"copy TB/s": gpu_runner.copy_rate(device, copy_bytes)}


def losses(other: str) -> dict:
    second = eager.nt_xent if other == "eager" else eager.compiled(eager.nt_xent)
    return {"fastcl": nt_xent, other: second}


def run_case(case: Case, device: torch.device, seconds: float = gpu_runner.SECONDS_PER_CASE) -> dict:
    """Everything about one case. What fails on one side is recorded there and does not touch the other."""
    with gpu_runner.matmul_precision(DTYPES[case.dtype][1]):
        return _run_case(case, device, seconds)


def _run_case(case: Case, device: torch.device, seconds: float) -> dict:
    dtype = DTYPES[case.dtype][0]
    sets = gpu_runner.sets_beyond_l2(case.m * case.d * dtype.itemsize, device)
    inputs = timing.rotating_inputs(case.m, case.d, dtype, device, sets)
    record = asdict(case) | {"sides": {}}
    sides = {
        name: {"forward": timing.step(loss, inputs, False), "forward + backward": timing.step(loss, inputs, True)}
        for name, loss in losses(case.other).items()
    }
    need = eager.bytes_needed(case.m, dtype.itemsize)
    ready = gpu_runner.prepare(sides, device, record, {case.other: gpu_runner.out_of_reach(need, device)})
    gpu_runner.time_sides(case.other, ready, device, record, seconds / 2)
    ours = record["sides"]["fastcl"].get("ms")
    if ours:
        record["TFLOP/s"] = case.flop / ours["forward + backward"]["median"] / 1e9
    if device.type == "cuda" and case.m <= GRAPH_ROWS:
        gpu_runner.time_graphs(sets, ready, device, record, seconds / 4)
    if case.m * case.d <= ERROR_ELEMENTS and case.other == "eager":
        z1, z2 = inputs[0]
        truth = accuracy.exact(z1, z2, TEMPERATURE)
        for name in ready:
            found = accuracy.errors(losses(case.other)[name], truth, z1, z2, TEMPERATURE)
            record["sides"][name]["error_vs_fp64"] = found
    return record


if __name__ == "__main__":
    sys.exit(gpu_runner.main(__doc__, "gpu_cases.py", cases(), run_case, ceilings))
