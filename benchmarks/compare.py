"""nt_xent against eager PyTorch and against the floor on the CPU, interleaved in one process.

    python benchmarks/compare.py
    python benchmarks/compare.py --m 4096 8192 --d 128 --seconds 20 --json compare.json

Prints a markdown table. "ratio" is eager's time over ours, "floor" the floor's time over ours (100% is as fast as
the tile products and exponentials of `floor.py`); both are medians over rounds in which the sides took turns, with
quartiles. "fastest" is the same quotient of each side's fastest round.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from benchmarks import eager, floor, memory, report, timing
from fastcl import nt_xent

DTYPES = ("float32", "float64", "bfloat16", "float16")
# Above this eager is left out: it would swap on ordinary machines.
EAGER_BYTES = 4 * 2**30
CPU = torch.device("cpu")


def eager_fits(m: int, dtype: torch.dtype) -> bool:
    return eager.bytes_needed(m, dtype.itemsize) <= EAGER_BYTES


def sides(m: int, d: int, dtype: torch.dtype, backward: bool) -> dict[str, timing.Run]:
    """What is compared at one size; the floor in the type that the CPU kernels calculate in."""
    inputs = timing.rotating_inputs(m, d, dtype, CPU)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    z = F.normalize(torch.cat([x.detach().to(compute) for x in inputs[0]]), dim=1)
    result = {"fastcl": timing.step(nt_xent, inputs, backward), "floor": floor.step(z, backward)}
    if eager_fits(m, dtype):
        result["eager"] = timing.step(eager.nt_xent, inputs, backward)
    return result


def row(m: int, d: int, dtype_name: str, backward: bool, samples: dict[str, list[float]]) -> dict:
    """One row of the table: times, quotients and nothing of memory."""
    ours = samples["fastcl"]
    return {
        "kind": "nt_xent" if backward else "nt_xent forward",
        "m": m, "d": d, "dtype": dtype_name, "pass": "forward + backward" if backward else "forward",
        "ms": {name: timing.summary(values) for name, values in samples.items()},
        "floor_share": timing.ratio(samples["floor"], ours),
        "eager_ratio": timing.ratio(samples["eager"], ours) if "eager" in samples else None,
    }  # fmt: skip


def compare(m: int, d: int, dtype_name: str, backward: bool, seconds: float) -> dict:
    """Time one size and make its row."""
    samples = timing.alternate(sides(m, d, getattr(torch, dtype_name), backward), CPU, seconds)
    return row(m, d, dtype_name, backward, samples)


def markdown(rows: list[dict]) -> str:
    header = ["M", "D", "dtype", "pass", "ours ms", "eager ms", "ratio", "fastest", "floor", "fastest"]
    header += ["ours MiB", "eager MiB"]
    lines = []
    for row in rows:
        ms, peaks, quotient = row["ms"], row["peak_extra_bytes"], row["eager_ratio"]
        lines.append([
            row["m"], row["d"], row["dtype"], row["pass"],
            report.spread(ms["fastcl"]), report.spread(ms.get("eager")),
            report.spread(quotient, "×"), f"{report.fastest(ms, 'eager', 'fastcl'):.3g}×" if quotient else "-",
            report.percent(row["floor_share"]), f"{report.fastest(ms, 'floor', 'fastcl'):.0%}",
            report.mebibytes(peaks.get("fastcl")), report.mebibytes(peaks.get("eager")),
        ])  # fmt: skip
    return report.table(header, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [256, 1024, 4096, 8192, 16384]
    parser.add_argument("--m", type=int, nargs="+", default=sizes, help="rows, twice the pairs")
    parser.add_argument("--d", type=int, nargs="+", default=[128], help="features")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    parser.add_argument("--forward", action="store_true", help="the forward alone too")
    parser.add_argument("--seconds", type=float, default=5.0, help="about how long to time each row")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    if any(m < 2 or m % 2 for m in args.m):
        parser.error(f"--m must be even and at least 2, got {args.m}")
    rows = []
    for dtype in args.dtype:
        for d in args.d:
            for m in args.m:
                for backward in (False, True) if args.forward else (True,):
                    rows.append(compare(m, d, dtype, backward, args.seconds))
    memory.add_peaks(rows)
    print(markdown(rows))
    if args.json:
        report.write_json(args.json, {"versions": report.versions(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
