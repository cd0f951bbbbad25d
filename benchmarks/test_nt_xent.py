"""CPU benchmarks of nt_xent: `python -m pytest benchmarks --benchmark-only`.

The tables of pytest-benchmark give absolute times, one group a size and pass. Its tests run one after another,
so drift of the machine gets between the sides: ratios in `extra_info` and in the closing table come from a
second, interleaved measurement.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import accuracy, compare, eager, memory, timing
from benchmarks.workloads import WORKLOADS
from fastcl import nt_xent

SIZES = [(m, d) for m in (256, 1024, 4096, 8192) for d in (64, 128, 512)]
TEMPERATURE = 0.1
# float64 on the CPU is slow, and errors hardly depend on the batch.
ERROR_ROWS = 1024
# For each side.
SECONDS = 0.3
# Eager PyTorch is left out above this many multiplications a product: seconds a call, and nothing new to see.
EAGER_WORK = 8192**2 * 128


def eager_runs(m: int, d: int) -> bool:
    return m * m * d <= EAGER_WORK and compare.eager_fits(m, torch.float32)


@pytest.mark.parametrize("side", ["fastcl", "eager", "floor"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize(("m", "d"), SIZES)
def test_nt_xent(benchmark, rows, peaks, m, d, backward, side):
    benchmark.group = f"M={m} D={d} {'forward + backward' if backward else 'forward'}"
    if side == "eager" and not eager_runs(m, d):
        pytest.skip("eager PyTorch takes too long or too much memory")
    sides = compare.sides(m, d, torch.float32, backward)
    run = sides[side]
    benchmark.pedantic(run, rounds=timing.rounds_within(SECONDS, run, compare.CPU), iterations=1)
    benchmark.extra_info |= {"m": m, "d": d}
    if side == "floor" or not backward:
        return
    if not peaks:
        # All at once, on first use: starting a process takes longer than most of the measurements in it.
        sides_of = WORKLOADS["nt_xent"].sides
        wanted = [memory.Case(s, *size) for s in sides_of for size in SIZES if s == "fastcl" or eager_runs(*size)]
        peaks.update(zip(wanted, memory.resident_peaks(wanted), strict=True))
    benchmark.extra_info["peak_extra_bytes"] = peaks[memory.Case(side, m, d)]
    if m <= ERROR_ROWS:
        loss = {"fastcl": nt_xent, "eager": eager.nt_xent}[side]
        z1, z2 = timing.rotating_inputs(m, d, torch.float32, compare.CPU)[0]
        truth = accuracy.exact(z1, z2, TEMPERATURE)
        benchmark.extra_info["error"] = accuracy.errors(loss, truth, z1, z2, TEMPERATURE)
    if side == "fastcl":
        if not eager_runs(m, d):
            sides.pop("eager", None)
        row = compare.row(m, d, "float32", backward, timing.alternate(sides, compare.CPU, len(sides) * SECONDS))
        row["peak_extra_bytes"] = {case.side: peak for case, peak in peaks.items() if (case.m, case.d) == (m, d)}
        rows.append(row)
        benchmark.extra_info |= {key: row[key] for key in ("eager_ratio", "floor_share")}
