"""CPU benchmarks of the sorts and of swd_loss: `python -m pytest benchmarks/test_swd.py --benchmark-only`.

As for nt_xent: pytest-benchmark's tables give absolute times, one group a size; ratios in `extra_info` and in the
closing table come from a second, interleaved measurement.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import compare_swd, memory, timing, workloads
from benchmarks.workloads import WORKLOADS

P = 128
# The largest sizes of the slow sides alone would take longer than everything here: `compare_swd.py` has them.
SIZES = {
    "wasserstein_1d": (512, 2048, 8192, 65536),
    "swd_loss": (512, 2048, 8192),
    "swd_loss, given draws": (512, 2048),
    "segmented_sort": (512, 2048, 8192),
}
# Errors up to this many rows: sorting in float64 takes longer than what is measured.
ERROR_ROWS = 8192
# For each side.
SECONDS = 0.15
CASES = [
    memory.Case(side, n, P, dtype, kind)
    for kind, dtypes in compare_swd.KINDS.items()
    for dtype in dtypes
    for n in SIZES[kind]
    for side in WORKLOADS[kind].sides
]


@pytest.fixture(scope="module")
def case_peaks() -> dict[memory.Case, int]:
    """All at once: starting a process takes longer than most of the measurements in it."""
    return dict(zip(CASES, memory.resident_peaks(CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind} {case.dtype} N={case.m} {case.side}")
def test_swd(benchmark, swd_rows, case_peaks, case):
    benchmark.group = f"{case.kind} {case.dtype} P={case.d} N={case.m}"
    work = WORKLOADS[case.kind]
    inputs = work.inputs(case.m, case.d, getattr(torch, case.dtype), compare_swd.CPU)
    run = timing.rotate(work.sides[case.side], inputs)
    benchmark.pedantic(run, rounds=timing.rounds_within(SECONDS, run, compare_swd.CPU), iterations=1)
    benchmark.extra_info |= {"m": case.m, "d": case.d, "peak_extra_bytes": case_peaks[case]}
    if case.side == "fastcl":
        sides = compare_swd.sides(case.kind, case.m, case.d, getattr(torch, case.dtype))
        samples = timing.alternate(sides, compare_swd.CPU, len(sides) * SECONDS)
        row = compare_swd.row(case.kind, case.m, case.d, case.dtype, samples)
        row["error"] = workloads.errors(case.kind, case.m, case.d, compare_swd.CPU) if case.m <= ERROR_ROWS else {}
        same = (case.m, case.d, case.dtype, case.kind)
        row["peak_extra_bytes"] = {c.side: n for c, n in case_peaks.items() if (c.m, c.d, c.dtype, c.kind) == same}
        swd_rows.append(row)
        benchmark.extra_info |= {key: row[key] for key in ("ratio", "share", "error")}
