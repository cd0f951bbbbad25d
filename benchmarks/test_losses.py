"""Every loss and sort beside plain PyTorch and the libraries that people use: `pytest benchmarks --benchmark-only`.

All sides of a case take turns in one process, on the same tensors, so that drift of the machine hits them alike. Their
times are handed to pytest-benchmark afterwards, on a clock of its own: its tables, comparisons and JSON then show
rounds that were measured side by side. `-k "fastcl or eager"` measures those sides alone.
"""

from __future__ import annotations

import pytest

from benchmarks import suite
from benchmarks.conftest import Clock

CASES = [(case, side) for case in suite.cases() for side in case.sides]
CLOCK = Clock()


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize(("case", "side"), CASES, ids=[f"{case.key} {side}" for case, side in CASES])
def test_losses(benchmark, measured, peaks, entries, case, side):
    found = measured(case)[side]
    seconds = iter([ms / 1e3 for ms in found["samples"]])
    benchmark.group = case.key
    benchmark.pedantic(CLOCK.advance, setup=lambda: ((next(seconds),), {}), rounds=len(found["samples"]))
    benchmark.extra_info |= suite.entry(case, side, found, peaks().get((case, side)))
    entries.append({"extra_info": benchmark.extra_info})
