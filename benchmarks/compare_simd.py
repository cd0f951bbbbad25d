"""nt_xent on the CPU by instruction set, and by the number of threads, interleaved in one process.

    python benchmarks/compare_simd.py
    python benchmarks/compare_simd.py --seconds 10 --folder benchmarks/results/cpu

Two tables: every instruction set that the kernels were compiled for and the processor has, against the highest one
(the matrix products are the BLAS library's, which chooses for itself); and ours and eager PyTorch with one thread and
with all, with what the others add. Times are of the fastest round, forward + backward, quotients of fastest rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import eager, reporting, timing
from fastcl import _native, nt_xent

CPU = torch.device("cpu")
LEVELS = ("baseline", "avx2", "avx512")
D = 128
SIDES = {"fastcl": nt_xent, "eager": eager.nt_xent}


def has_level(name: str) -> bool:
    try:
        _native.module._use_simd(_native.module._use_simd(name))
    except ValueError:
        return False
    return True


def at_level(name: str, run: timing.Run) -> timing.Run:
    def call() -> object:
        previous = _native.module._use_simd(name)
        try:
            return run()
        finally:
            _native.module._use_simd(previous)

    return call


def with_threads(count: int, run: timing.Run) -> timing.Run:
    def call() -> object:
        torch.set_num_threads(count)
        return run()

    return call


def fastest(runs: dict[str, timing.Run], seconds: float) -> dict[str, float]:
    """Milliseconds of each side's fastest round."""
    return {name: min(times) for name, times in timing.alternate(runs, CPU, seconds).items()}


def step(loss: Callable, m: int, dtype: torch.dtype) -> timing.Run:
    return timing.step(loss, timing.rotating_inputs(m, D, dtype, CPU), backward=True)


def simd_rows(sizes: list[int], seconds: float) -> list[dict]:
    """One row a size and dtype: ms of every level."""
    found = []
    levels = [name for name in LEVELS if has_level(name)]
    for m in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            runs = {name: at_level(name, step(nt_xent, m, dtype)) for name in levels}
            found.append({"m": m, "d": D, "dtype": str(dtype)[6:], "ms": fastest(runs, seconds)})
    return found


def thread_rows(sizes: list[int], seconds: float) -> list[dict]:
    """One row a size: ms of both sides by number of threads."""
    counts = sorted({1, torch.get_num_threads()})
    found = []
    for m in sizes:
        sides = {name: step(loss, m, torch.float32) for name, loss in SIDES.items()}
        runs = {f"{name} {count}": with_threads(count, run) for name, run in sides.items() for count in counts}
        ms = fastest(runs, seconds)
        torch.set_num_threads(counts[-1])
        row = {"m": m, "d": D, "dtype": "float32", "ms": ms}
        row["speedup"] = {name: ms[f"{name} 1"] / ms[f"{name} {counts[-1]}"] for name in sides}
        found.append(row)
    return found


def simd_table(rows: list[dict]) -> str:
    """The time at every level, and how many times that of the highest it is."""
    levels = list(rows[0]["ms"])
    lines = []
    for row in rows:
        highest = row["ms"][levels[-1]]
        cells = [f"{ms:.3g} ({ms / highest:.2f}×)" for ms in row["ms"].values()]
        lines.append([row["m"], row["d"], row["dtype"], *cells])
    return reporting.table(["M", "D", "dtype", *(f"{name} ms" for name in levels)], lines)


def thread_table(rows: list[dict]) -> str:
    names = list(rows[0]["ms"])
    lines = []
    for row in rows:
        speedups = [f"{x:.2f}×" for x in row["speedup"].values()]
        lines.append([row["m"], row["d"], row["dtype"], *(f"{row['ms'][name]:.3g}" for name in names), *speedups])
    header = ["M", "D", "dtype", *(f"{name} ms" for name in names), *(f"{name} speed-up" for name in SIDES)]
    return reporting.table(header, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simd-m", type=int, nargs="+", default=[1024, 4096], help="rows, by instruction set")
    parser.add_argument("--thread-m", type=int, nargs="+", default=[256, 1024, 4096, 8192], help="rows, by threads")
    parser.add_argument("--seconds", type=float, default=8.0, help="about how long to time each row")
    parser.add_argument("--folder", type=Path, help="write simd.json, simd.md, threads.json and threads.md here")
    args = parser.parse_args()
    if not _native.LOADED:
        parser.error(_native.REASON)
    tables = {
        "simd": (simd_rows(args.simd_m, args.seconds), simd_table),
        "threads": (thread_rows(args.thread_m, args.seconds), thread_table),
    }
    for name, (rows, table) in tables.items():
        print(table(rows), end="\n\n")
        if args.folder is not None:
            (args.folder / f"{name}.md").write_text(table(rows) + "\n")
            reporting.write_json(args.folder / f"{name}.json", {"versions": reporting.versions(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
