"""CPU benchmarks of CLIP, SigLIP, InfoNCE with a queue and SupCon:
`python -m pytest benchmarks/test_pairs.py --benchmark-only`.

As for nt_xent: pytest-benchmark's tables give absolute times, one group a size; ratios in `extra_info` and in the
closing table come from a second, interleaved measurement.
"""

from __future__ import annotations

import pytest

from benchmarks import compare_pairs, memory, timing
from benchmarks.workloads import PAIRS

# One small size, and those that targets name; `compare_pairs.py` has the others.
SIZES = {
    "clip_loss": [(512, 128), (4096, 512)],
    "siglip_loss": [(512, 128), (1024, 512)],
    "info_nce, queue": [(4096, 128), (65536, 128)],
    "supcon_loss": [(512, 128), (4096, 128)],
    "metric learning NTXentLoss": [(256, 128)],
}
# For each side.
SECONDS = 0.15
CASES = [
    memory.Case(side, m, d, kind=kind) for kind, sizes in SIZES.items() for m, d in sizes for side in PAIRS[kind].sides
]


@pytest.fixture(scope="module")
def case_peaks() -> dict[memory.Case, int]:
    """All at once: starting a process takes longer than most of the measurements in it."""
    return dict(zip(CASES, memory.resident_peaks(CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind} M={case.m} D={case.d} {case.side}")
def test_pairs(benchmark, pair_rows, case_peaks, case):
    benchmark.group = f"{case.kind} M={case.m} D={case.d}"
    sides = compare_pairs.sides(case.kind, case.m, case.d)
    run = sides[case.side]
    benchmark.pedantic(run, rounds=timing.rounds_within(SECONDS, run, compare_pairs.CPU), iterations=1)
    benchmark.extra_info |= {"m": case.m, "d": case.d, "peak_extra_bytes": case_peaks[case]}
    if case.side == "fastcl":
        samples = timing.alternate(sides, compare_pairs.CPU, len(sides) * SECONDS)
        row = compare_pairs.row(case.kind, case.m, case.d, samples)
        same = (case.kind, case.m, case.d)
        row["peak_extra_bytes"] = {c.side: peak for c, peak in case_peaks.items() if (c.kind, c.m, c.d) == same}
        pair_rows.append(row)
        benchmark.extra_info["ratio"] = row["ratio"]
