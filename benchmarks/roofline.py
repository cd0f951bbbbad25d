"""What the kernels can take at least, on paper: clocks of every unit for a tile, and milliseconds of a pass.

    python benchmarks/roofline.py                               # the tables of docs/performance.md
    python benchmarks/roofline.py --page docs/performance.md    # puts them into the page

Instructions of a tile come from the ahead-of-time report (benchmarks/results/aot/all.md), rates from data sheets.
"overlapped" is the busiest unit alone, "in turn" the matrix units and the busiest of the others one after the other:
what a kernel takes lies between the two.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

ROOT = Path(__file__).resolve().parent.parent
AOT = ROOT / "benchmarks" / "results" / "aot" / "all.md"
PAGE_TABLE = re.compile(r"(<!-- benchmarks/roofline.py: (\w+) -->\n)\n.*?\n\n(<!-- end -->)", re.DOTALL)
# An H100 or H200 SXM: multiprocessors, clock (Hz), and what a multiprocessor does in a clock: dense fp16 FLOP (989.4
# TFLOP/s in all), exp2, float32 operations, warps that issue an instruction. Memory: bytes a second.
CHIP = {"multiprocessors": 132, "clock": 1.83e9, "flop": 4096, "exp2": 16, "fp32": 128, "issue": 4}
MEMORY = {"H100": 3.35e12, "H200": 4.8e12}
# Kernels whose counted loop is one tile, at up to 128 features in fp16, and the matrix products of it.
KERNELS = {
    "lse_symmetric": 1, "lse_rows": 1, "lse_two_way": 1, "lse_masked drop": 1, "softplus_rows": 1, "lse_backward": 2,
}  # fmt: skip
# Share of the peak that a large cuBLAS product is assumed to reach.
CUBLAS = 0.75


def aot_row(kernel: str, d: str = "<= 128") -> dict[str, str]:
    """A line of the ahead-of-time report: sm_90, fp16."""
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in AOT.read_text().splitlines()]
    rows = (dict(zip(lines[0], line, strict=True)) for line in lines[2:])
    return next(r for r in rows if (r["kernel"], r["dtype"], r["d"], r["arch"]) == (kernel, "fp16", d, "sm_90"))


def clocks(kernel: str, d: int = 128) -> dict[str, float]:
    """Clocks of a multiprocessor that each unit is busy with one tile."""
    row = aot_row(kernel)
    m, n = (int(x) for x in row["tile"].split("x"))
    warps = int(row["warps"])
    lanes = {key: 32 * warps * int(row[key]) for key in ("MUFU.EX2", "FFMA", "FADD", "FMUL")}
    return {
        "elements": m * n,
        "matrix": KERNELS[kernel] * 2 * m * n * d / CHIP["flop"],
        "exp2": lanes["MUFU.EX2"] / CHIP["exp2"],
        "fp32": sum(lanes[key] for key in ("FFMA", "FADD", "FMUL")) / CHIP["fp32"],
        "issue": int(row["instructions"]) * warps / CHIP["issue"],
    }


def pass_ms(kernel: str, elements: float) -> tuple[float, float]:
    """(overlapped, in turn) milliseconds of so many elements of the similarity matrix."""
    unit = clocks(kernel)
    others = max(unit["exp2"], unit["fp32"], unit["issue"])
    factor = 1e3 * elements / unit["elements"] / CHIP["multiprocessors"] / CHIP["clock"]
    return max(unit["matrix"], others) * factor, (unit["matrix"] + others) * factor


def kernels_table() -> str:
    lines = []
    for kernel in KERNELS:
        row, unit = aot_row(kernel), clocks(kernel)
        busy = {key: unit[key] for key in ("matrix", "exp2", "fp32", "issue")}
        programs = min(65536 // (32 * int(row["warps"]) * int(row["registers"])), 227 * 1024 // int(row["shared"]))
        limit = max(busy, key=busy.get)
        shown = [f"{value:,.0f}" for value in busy.values()]
        lines.append([kernel, row["tile"], row["warps"], row["registers"], programs, *shown, limit])
    header = ["kernel", "tile", "warps", "registers", "programs", "matrix", "exp2", "fp32", "issue", "limit"]
    return report.table(header, lines)


def nt_xent_table() -> str:
    lines = []
    for m in (2048, 8192, 65536, 1048576):
        forward, backward = pass_ms("lse_symmetric", m * m / 2), pass_ms("lse_backward", m * m)
        products = 1e3 * 2.5 * 2 * m * m * 128 / (CHIP["flop"] * CHIP["multiprocessors"] * CHIP["clock"])
        # Rows in, gradients out, both in float32; rows in fp16 written once and read by every pass.
        moved = 1e3 * m * 128 * (4 + 4 + 3 * 2) / MEMORY["H100"]
        cells = [*forward, *backward, products, forward[0] + backward[0], forward[1] + backward[1], moved]
        lines.append([f"{m:,}", *(f"{x:.3g}" for x in cells)])
    header = [
        "M", "forward, overlapped", "in turn", "backward, overlapped", "in turn", "2.5 products",
        "both, overlapped", "in turn", "memory",
    ]  # fmt: skip
    return report.table(header, lines)


def wide_table() -> str:
    """Losses of N pairs with 768 features, whose gradients go through scratch: products by count, weights by bytes."""
    n, d = 65536, 768
    unit = 1e3 * 2 * n * n * d / (CHIP["flop"] * CHIP["multiprocessors"] * CHIP["clock"])
    # Written once and read by each of two products; what of it stays in the second-level cache comes for nothing.
    weights = 1e3 * 3 * 2 * n * n / MEMORY["H100"]
    lines = []
    for loss, own, library, kernel in (("clip_loss", 2, 2, "lse_rows"), ("siglip_loss", 1, 2, "softplus_rows")):
        tile = clocks(kernel)
        others = max(tile["exp2"], tile["fp32"], tile["issue"]) / tile["elements"]
        around = 1e3 * own * n * n * others / CHIP["multiprocessors"] / CHIP["clock"]
        cells = [(own + library) * unit, own * max(unit, around / own) + library * unit / CUBLAS, around, weights]
        lines.append([loss, own + library, *(f"{x:.3g}" for x in cells)])
    header = ["loss", "products", "at the peak", "predicted", "of it around the products", "weights through memory"]
    return report.table(header, lines)


TABLES = {"kernels": kernels_table, "nt_xent": nt_xent_table, "wide": wide_table}


def with_tables(page: str) -> str:
    """The page with each of its tables made anew."""
    return PAGE_TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="put the tables into this page")
    args = parser.parse_args()
    if args.page:
        args.page.write_text(with_tables(args.page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(make() for make in TABLES.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
