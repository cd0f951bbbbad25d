"""Peak extra memory of one call: what it needs on top of its inputs, gradients included.

On CUDA the caching allocator counts every byte that the library allocates. On the CPU the high-water mark of
the resident set of a fresh process is read instead of torch's profiler: the profiler sees torch's allocator
alone, and would miss the packing buffers of the BLAS and any scratch that C++ code allocates itself.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import torch

from benchmarks import timing
from benchmarks.workloads import WORKLOADS, call_of

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt


@dataclass(frozen=True)
class Case:
    """One side of a workload at one size."""

    side: str
    m: int
    d: int
    dtype: str = "float32"
    kind: str = "nt_xent"


def cuda_peak(run: timing.Run, device: torch.device) -> int:
    """Bytes allocated at most during run() beyond those before it. Run it once before: kernels load on first use."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def resident_peaks(cases: Sequence[Case]) -> list[int]:
    """Peak extra bytes of each case on the CPU, measured one after another in one fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps([asdict(case) for case in cases])],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"memory measurement failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {field}, got none")


def _run(case: Case, m: int) -> timing.Run:
    inputs = WORKLOADS[case.kind].inputs(m, case.d, getattr(torch, case.dtype), torch.device("cpu"))
    return timing.rotate(call_of(case.kind, case.side), inputs)


def _measure(case: Case) -> int:
    # Small first: libraries and thread pools come up now and are not charged to the call.
    _run(case, min(512, case.m))()
    run = _run(case, case.m)
    gc.collect()
    # 5 resets the high-water mark to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    result = run()
    peak = _status_bytes("VmHWM") - before
    del result
    return peak


def main() -> int:
    # Every large block from the system and back to it: one that the heap kept from an earlier case would be
    # resident already and hide what this one needs.
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 64 * 1024)
    print(json.dumps([_measure(Case(**case)) for case in json.loads(sys.argv[1])]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
