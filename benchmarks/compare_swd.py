"""The sorts and the sliced Wasserstein distance against plain PyTorch and POT on the CPU, interleaved in one process.

    python benchmarks/compare_swd.py
    python benchmarks/compare_swd.py --kind wasserstein_1d --n 512 8192 --seconds 20 --json swd.json

Prints a markdown table, and on standard error which targets are met. Each line holds one other side: "ratio" is its
time over ours. "np.sort" and "bytes" are the times of the references of `sort_floor.py` over ours. All are medians over
rounds in which the sides took turns, with quartiles; "fastest" is the quotient of each side's fastest round.

wasserstein_1d       from projections [P, N] of data and samples to the loss and the gradient of the projections
swd_loss             from rows [N, P] to loss and gradient, draws of samples and P directions included
..., given draws     the same with samples and directions given, not normalised: POT calculates this number
segmented_sort       values and indices of [P, N]

Errors are relative, against float64, of the loss and of the gradient, and those of swd_loss are of given draws: there
they are what rounded projections cost, which swap neighbours in the order. A gradient of wasserstein_1d is compared
where the row has no equal of the element: among equals any order is right, and torch.sort without stable=True takes one
of its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import memory, report, sort_floor, timing, workloads
from benchmarks.workloads import POT, WORKLOADS

CPU = torch.device("cpu")
# With the types of the inputs: losses calculate in float32.
KINDS = {
    "wasserstein_1d": ("float32",),
    "swd_loss": ("float32",),
    "swd_loss, given draws": ("float32",),
    "segmented_sort": ("float32", "float16"),
}
SIZES = [512, 2048, 8192, 65536]
# How many times faster than the composition wasserstein_1d should be, by N.
TARGETS = {512: 2.0, 8192: 3.0, 65536: 4.0}


def references(kind: str, n: int, p: int, dtype: torch.dtype) -> dict[str, timing.Run]:
    """What sorts of this size are held against; other work than sorting and its memory traffic is not in them."""
    x, y = WORKLOADS["wasserstein_1d"].inputs(n, p, dtype, CPU)[0]
    if kind == "segmented_sort":
        return {"np.sort": sort_floor.numpy_sort(x), "bytes": sort_floor.sort_bytes(x)}
    found = {"np.sort": sort_floor.numpy_sort(x, y)}
    return found | ({"bytes": sort_floor.wasserstein_bytes(x, y)} if kind == "wasserstein_1d" else {})


def sides(kind: str, n: int, p: int, dtype: torch.dtype) -> dict[str, timing.Run]:
    work = WORKLOADS[kind]
    inputs = work.inputs(n, p, dtype, CPU)
    found = {name: timing.rotate(side, inputs) for name, side in work.sides.items()}
    return found | references(kind, n, p, dtype)


def row(kind: str, n: int, p: int, dtype_name: str, samples: dict[str, list[float]]) -> dict:
    """Times and quotients of one size: one line of the table for each other side."""
    ours = samples["fastcl"]
    others = [name for name in WORKLOADS[kind].sides if name in samples and name != "fastcl"]
    return {
        "kind": kind, "m": n, "d": p, "dtype": dtype_name,
        "ms": {name: timing.summary(values) for name, values in samples.items()},
        "ratio": {name: timing.ratio(samples[name], ours) for name in others},
        "share": {name: timing.ratio(samples[name], ours) for name in ("np.sort", "bytes") if name in samples},
    }  # fmt: skip


def compare(kind: str, n: int, p: int, dtype_name: str, seconds: float) -> dict:
    """Time one size and make its row, errors included."""
    samples = timing.alternate(sides(kind, n, p, getattr(torch, dtype_name)), CPU, seconds)
    return row(kind, n, p, dtype_name, samples) | {"error": workloads.errors(kind, n, p, CPU)}


def _error(found: dict[str, float] | None) -> str:
    return f"{found['loss']:.1e} / {found['gradient']:.1e}" if found else "-"


def markdown(rows: list[dict]) -> str:
    header = ["what", "dtype", "P", "N", "ours ms", "against", "its ms", "ratio", "fastest", "np.sort", "bytes"]
    header += ["ours MiB", "its MiB", "our error", "its error"]
    lines = []
    for row in rows:
        ms, peaks, error = row["ms"], row["peak_extra_bytes"], row["error"]
        for other, quotient in row["ratio"].items():
            lines.append([
                row["kind"], row["dtype"], row["d"], row["m"], report.spread(ms["fastcl"]),
                other, report.spread(ms[other]),
                report.spread(quotient, "×"), f"{report.fastest(ms, other, 'fastcl'):.3g}×",
                report.percent(row["share"].get("np.sort")), report.percent(row["share"].get("bytes")),
                report.mebibytes(peaks.get("fastcl")), report.mebibytes(peaks.get(other)),
                _error(error.get("fastcl")), _error(error.get(other)),
            ])  # fmt: skip
    return report.table(header, lines)


def targets(rows: list[dict]) -> list[str]:
    """One line for each target whose size was measured."""
    lines = []
    for row in rows:
        least = TARGETS.get(row["m"])
        if row["kind"] == "wasserstein_1d" and least is not None:
            reached = row["ratio"]["eager"]["median"]
            state = "met" if reached >= least else "MISSED"
            lines.append(f"wasserstein_1d N={row['m']}: {reached:.3g}×, at least {least:g}×: {state}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS), help="what to measure")
    parser.add_argument("--n", type=int, nargs="+", default=SIZES, help="rows of the data")
    parser.add_argument("--p", type=int, default=128, help="directions, and features of swd_loss")
    parser.add_argument("--seconds", type=float, default=5.0, help="about how long to time each size")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    if min(*args.n, args.p) < 1:
        parser.error(f"--n and --p must be positive, got {args.n} and {args.p}")
    if not POT:
        print("compare_swd.py: POT is not installed, its side is left out (pip install POT)", file=sys.stderr)
    rows = []
    for kind in args.kind:
        for dtype in KINDS[kind]:
            rows += [compare(kind, n, args.p, dtype, args.seconds) for n in args.n]
    memory.add_peaks(rows)
    print(markdown(rows))
    print("\n".join(targets(rows)), file=sys.stderr)
    if args.json:
        report.write_json(args.json, {"versions": report.versions(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
