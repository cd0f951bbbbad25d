"""CLIP, SigLIP, InfoNCE with a queue and SupCon against plain PyTorch on the CPU, interleaved in one process.

    python benchmarks/compare_pairs.py
    python benchmarks/compare_pairs.py --kind clip_loss --m 4096 --d 512 --seconds 20 --json pairs.json

Prints a markdown table, and on standard error which targets are met. Each line holds one other side: "ratio" is its
time over ours, loss and gradients, a median over rounds in which the sides took turns, with quartiles; "fastest" is the
quotient of each side's fastest round. M: rows of both operands, of the features (eight of every label), or of the
queue of 256 queries. MiB is memory beyond the inputs. pytorch-metric-learning's NTXentLoss is compared where it is
installed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import memory, report, timing
from benchmarks.workloads import METRIC_LEARNING, PAIRS

CPU = torch.device("cpu")
# (rows, features) of each, and how many times faster than eager it should be at the size it is named for.
SIZES = {
    "clip_loss": [(1024, 512), (4096, 512), (4096, 128), (8192, 512)],
    "siglip_loss": [(1024, 512), (4096, 512)],
    "info_nce, queue": [(4096, 128), (65536, 128)],
    "supcon_loss": [(1024, 128), (4096, 128)],
    "metric learning NTXentLoss": [(256, 128), (512, 128)],
}
TARGETS = {
    ("clip_loss", 4096, 512): 2.0,
    ("info_nce, queue", 65536, 128): 1.5,
    ("supcon_loss", 4096, 128): 4.0,
}


def sides(kind: str, m: int, d: int) -> dict[str, timing.Run]:
    work = PAIRS[kind]
    inputs = work.inputs(m, d, torch.float32, CPU)
    return {name: timing.rotate(side, inputs) for name, side in work.sides.items()}


def row(kind: str, m: int, d: int, samples: dict[str, list[float]]) -> dict:
    """Times and quotients of one size: one line of the table for each other side."""
    others = [name for name in samples if name != "fastcl"]
    return {
        "kind": kind, "m": m, "d": d, "dtype": "float32",
        "ms": {name: timing.summary(values) for name, values in samples.items()},
        "ratio": {name: timing.ratio(samples[name], samples["fastcl"]) for name in others},
    }  # fmt: skip


def compare(kind: str, m: int, d: int, seconds: float) -> dict:
    """Time one size and make its row."""
    return row(kind, m, d, timing.alternate(sides(kind, m, d), CPU, seconds))


def markdown(rows: list[dict]) -> str:
    header = ["loss", "M", "D", "ours ms", "against", "its ms", "ratio", "fastest", "ours MiB", "its MiB"]
    lines = []
    for row in rows:
        ms, peaks = row["ms"], row["peak_extra_bytes"]
        for other, quotient in row["ratio"].items():
            lines.append([
                row["kind"], row["m"], row["d"], report.spread(ms["fastcl"]), other, report.spread(ms[other]),
                report.spread(quotient, "×"), f"{report.fastest(ms, other, 'fastcl'):.3g}×",
                report.mebibytes(peaks["fastcl"]), report.mebibytes(peaks[other]),
            ])  # fmt: skip
    return report.table(header, lines)


def targets(rows: list[dict]) -> list[str]:
    """One line for each target whose size was measured."""
    lines = []
    for row in rows:
        least = TARGETS.get((row["kind"], row["m"], row["d"]))
        if least is not None:
            reached = row["ratio"]["eager"]["median"]
            state = "met" if reached >= least else "MISSED"
            lines.append(f"{row['kind']} M={row['m']} D={row['d']}: {reached:.3g}×, at least {least:g}×: {state}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=SIZES, nargs="+", default=list(SIZES), help="what to measure")
    parser.add_argument("--m", type=int, help="rows, with --d, in place of the usual sizes")
    parser.add_argument("--d", type=int, help="features")
    parser.add_argument("--seconds", type=float, default=8.0, help="about how long to time each size")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    if (args.m is None) != (args.d is None) or any(given is not None and given < 1 for given in (args.m, args.d)):
        parser.error(f"--m and --d must be given together and be positive, got {args.m} and {args.d}")
    if not METRIC_LEARNING:
        print("compare_pairs.py: pytorch-metric-learning is not installed, its side is left out", file=sys.stderr)
    rows = []
    for kind in args.kind:
        sizes = SIZES[kind] if args.m is None else [(args.m, args.d)]
        rows += [compare(kind, m, d, args.seconds) for m, d in sizes]
    memory.add_peaks(rows)
    print(markdown(rows))
    print("\n".join(targets(rows)), file=sys.stderr)
    if args.json:
        report.write_json(args.json, {"versions": report.versions(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
