"""All sides of one workload at a size of your own, interleaved in one process: what `pytest benchmarks` does for many.

    python benchmarks/compare.py nt_xent --m 4096 --d 128
    python benchmarks/compare.py clip_loss --m 2048 --d 768 --dtype bfloat16 --sides fastcl eager compiled

Prints a markdown table; benchmarks/report.py says what its columns are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import peers, suite, suite_report, workloads


def main() -> int:
    kinds = list(workloads.LOSSES | workloads.SORTS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=kinds, help="what to measure")
    parser.add_argument("--m", type=int, default=4096, help="rows: of both views, of each operand, of the queue")
    parser.add_argument("--d", type=int, default=128, help="features, or directions of a sort")
    parser.add_argument("--dtype", choices=tuple(suite.ABSOLUTE), default="float32")
    parser.add_argument("--sides", nargs="+", help="these alone; `compiled` is plain PyTorch through torch.compile")
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long to time each side")
    args = parser.parse_args()
    if args.m < 2 or args.m % 2 or args.d < 1:
        parser.error(f"--m must be even and at least 2, --d at least 1, got {args.m} and {args.d}")
    case = suite.Case(args.kind, args.m, args.d, args.dtype, compiled="compiled" in (args.sides or ()))
    sides = args.sides or case.sides
    if unknown := set(sides) - set(case.sides):
        parser.error(f"--sides must be among {', '.join(case.sides)} at this size, got {', '.join(sorted(unknown))}")
    found, peaks = suite.measure(case, sides, args.seconds), suite.peaks({case: sides})
    entries = [{"extra_info": suite.entry(case, side, found[side], peaks.get((case, side)))} for side in sides]
    print(suite_report.table(entries, suite.ceilings(), peers.versions()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
