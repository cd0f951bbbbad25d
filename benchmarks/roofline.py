"""What the kernels can take at least, on paper: clocks of every unit for a tile, and milliseconds of a pass.

    python benchmarks/roofline.py                               # the tables of docs/performance.md
    python benchmarks/roofline.py --page docs/performance.md    # puts them into the page

Instructions of a tile come from the ahead-of-time report (benchmarks/results/aot/all.md), rates from data sheets.
"overlapped" is the busiest unit alone, "in turn" the matrix units and the busiest of the others one after the other:
what a kernel takes lies between the two.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu_pairs_report, gpu_report, reporting
from fastcl.kernels import launch
from fastcl.kernels.operands import split

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
AOT = RESULTS / "aot" / "all.md"
PAGE_TABLE = re.compile(r"(<!-- benchmarks/roofline.py: (\w+) -->\n)\n.*?\n\n(<!-- end -->)", re.DOTALL)
# An H100 or H200 SXM: multiprocessors, clock (Hz), and what a multiprocessor does in a clock: dense fp16 FLOP (989.4
# TFLOP/s in all), special functions, float32 operations, warps that issue an instruction. Memory: bytes a second.
CHIP = {"multiprocessors": 132, "clock": 1.83e9, "flop": 4096, "special": 16, "fp32": 128, "issue": 4}
# Dense fp16 FLOP of a multiprocessor in a clock, by generation; the other units are the same.
FLOP = {90: 4096, 100: 8192}
MEMORY = {"H100": 3.35e12, "H200": 4.8e12}
# Kernels whose counted loop is one tile, at up to 128 features in fp16, and the matrix products of it.
KERNELS = {
    "lse_symmetric": 1, "lse_rows": 1, "lse_rows online": 1, "lse_two_way": 1, "lse_masked drop": 1,
    "lse_masked sum online": 1, "softplus_rows": 1, "softplus_rows only": 1, "lse_backward": 2,
}  # fmt: skip
# Those in which rows walk past columns that stay; in the others columns walk.
ROWS_WALK = ("lse_symmetric", "lse_two_way")
# 2^x without the special function: x rounded to an integer by two additions, the rest of x by one, a polynomial of
# degree 5 (2^-22, as the special function), and the integer added to the exponent. Instructions more than the one it
# replaces; on sm_100 two float32 operations are one instruction.
POLYNOMIAL = {90: 8, 100: 4}
# A kernel that waits for the one before it, in a CUDA graph (ms, assumed), and how many a call of nt_xent has.
LAUNCH_MS, LAUNCHES = 0.0022, 11
# Share of the peak that a large cuBLAS product is assumed to reach.
CUBLAS = 0.75


def aot_row(kernel: str, d: int = 128, arch: int = 90) -> dict[str, str]:
    """A line of the ahead-of-time report: fp16."""
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in AOT.read_text().splitlines()]
    rows = (dict(zip(lines[0], line, strict=True)) for line in lines[2:])
    wanted = (kernel, "fp16", f"<= {d}", f"sm_{arch}")
    return next(r for r in rows if (r["kernel"], r["dtype"], r["d"], r["arch"]) == wanted)


def clocks(kernel: str, d: int = 128, arch: int = 90) -> dict[str, float]:
    """Clocks of a multiprocessor that each unit is busy with one tile."""
    row = aot_row(kernel, d, arch)
    m, n = (int(x) for x in row["tile"].split("x"))
    warps = int(row["warps"])
    lanes = {key: 32 * warps * int(row[key]) for key in ("MUFU", "FFMA", "FADD", "FMUL")}
    return {
        "elements": m * n,
        "matrix": KERNELS[kernel] * 2 * m * n * d / FLOP[arch],
        "special": lanes["MUFU"] / CHIP["special"],
        "fp32": sum(lanes[key] for key in ("FFMA", "FADD", "FMUL")) / CHIP["fp32"],
        "issue": int(row["instructions"]) * warps / CHIP["issue"],
    }


def programs(row: dict[str, str]) -> int:
    """How many fit on a multiprocessor of Hopper: registers come in eights a thread, and a program takes 1 KiB of
    shared memory for itself."""
    registers = -(-int(row["registers"]) // 8) * 8
    by_registers = launch.REGISTERS // (32 * int(row["warps"]) * registers)
    return min(by_registers, 228 * 1024 // (int(row["shared"]) + 1024))


def pass_ms(kernel: str, elements: float) -> tuple[float, float]:
    """(overlapped, in turn) milliseconds of so many elements of the similarity matrix."""
    unit = clocks(kernel)
    others = max(unit["special"], unit["fp32"], unit["issue"])
    factor = 1e3 * elements / unit["elements"] / CHIP["multiprocessors"] / CHIP["clock"]
    return max(unit["matrix"], others) * factor, (unit["matrix"] + others) * factor


def kernels_table() -> str:
    lines = []
    for kernel in KERNELS:
        row, unit = aot_row(kernel), clocks(kernel)
        busy = {key: unit[key] for key in ("matrix", "special", "fp32", "issue")}
        limit = max(busy, key=busy.get)
        m, n = (int(x) for x in row["tile"].split("x"))
        loaded = 2 * 128 * (m if kernel in ROWS_WALK else n) / busy[limit]
        shown = [f"{value:,.0f}" for value in busy.values()]
        fixed = [kernel, row["tile"], row["warps"], row["registers"], programs(row)]
        lines.append([*fixed, *shown, limit, f"{loaded:.0f}"])
    header = [
        "kernel", "tile", "warps", "registers", "programs", "matrix", "special", "fp32", "issue", "limit",
        "bytes a clock",
    ]  # fmt: skip
    return reporting.table(header, lines)


def polynomial_table() -> str:
    """The share of the exponentials that fp32 units should take, where special functions are the limit."""
    lines = []
    for kernel in ("lse_symmetric", "lse_rows", "lse_two_way", "lse_backward"):
        for arch, d in ((90, 64), (90, 128), (100, 64), (100, 128)):
            unit = clocks(kernel, d, arch)
            extra = POLYNOMIAL[arch] * unit["elements"] / (32 * CHIP["issue"])
            before = max(unit["matrix"], unit["special"], unit["issue"])
            tried = [
                (max(unit["matrix"], unit["special"] * (1 - share / 100), unit["issue"] + extra * share / 100), share)
                for share in range(101)
            ]
            after, share = min(tried)
            numbers = [f"{unit[key]:,.0f}" for key in ("matrix", "special", "issue")]
            lines.append([kernel, f"sm_{arch}", d, *numbers, f"{share}%", f"{100 * (1 - after / before):.0f}%"])
    header = ["kernel", "arch", "D", "matrix", "special", "issue", "share", "less time"]
    return reporting.table(header, lines)


def waves_table() -> str:
    """Programs of the symmetric forward and of the backward at 128 features, and the places they run in."""
    forward, backward = (launch.TABLE[name][2][128][90] for name in ("lse_symmetric", "lse_backward"))
    lines = []
    for m in (2048, 8192, 65536):
        blocks = -(-m // forward.block_n)
        supers = -(-blocks // -(-blocks // launch.MAX_PARTIALS))
        rows, columns = -(-m // backward.block_m), -(-m // backward.block_n)
        splits, _ = split(rows, columns, launch.MAX_GRAD_PARTIALS)
        for name, count in (("lse_symmetric", supers * (supers + 1) // 2), ("lse_backward", rows * splits)):
            waves = count / (CHIP["multiprocessors"] * programs(aot_row(name)))
            idle = 1 - waves / math.ceil(waves)
            lines.append([f"{m:,}", name, f"{count:,}", f"{waves:.2f}", f"{100 * (math.ceil(waves) - waves):.0f}%",
                          f"{100 * idle:.0f}%"])  # fmt: skip
    return reporting.table(["M", "kernel", "programs", "waves", "idle in the last wave", "idle in all"], lines)


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
    return reporting.table(header, lines)


def wide_ms(loss: str) -> dict[str, float]:
    """Of N pairs with 768 features, whose gradients go through scratch: products by count, weights by bytes."""
    n, d = 65536, 768
    unit = 1e3 * 2 * n * n * d / (CHIP["flop"] * CHIP["multiprocessors"] * CHIP["clock"])
    # Products of our kernels and of cuBLAS.
    own, library, kernel = {"clip_loss": (2, 2, "lse_rows"), "siglip_loss": (1, 2, "softplus_rows")}[loss]
    tile = clocks(kernel)
    others = max(tile["special"], tile["fp32"], tile["issue"]) / tile["elements"]
    around = 1e3 * own * n * n * others / CHIP["multiprocessors"] / CHIP["clock"]
    return {
        "products": own + library,
        "at the peak": (own + library) * unit,
        "predicted": own * max(unit, around / own) + library * unit / CUBLAS,
        "of it around the products": around,
        # Written once and read by each of two products; what of it stays in the second-level cache comes for nothing.
        "weights through memory": 1e3 * 3 * 2 * n * n / MEMORY["H100"],
    }


def wide_table() -> str:
    found = {loss: wide_ms(loss) for loss in ("clip_loss", "siglip_loss")}
    lines = [[loss, *(f"{x:.3g}" for x in ms.values())] for loss, ms in found.items()]
    return reporting.table(["loss", *found["clip_loss"]], lines)


def results_of(name: str) -> dict[str, dict]:
    """{GPU: results} of a benchmark that `make gpu` left."""
    found = {}
    for path in sorted(RESULTS.glob(f"nvidia-*/{name}.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        found[results["name"]] = results
    return found


def measured(name: str, read: Callable[[dict], float | None]) -> str:
    """What every GPU that ran took."""
    times = {gpu: read(results) for gpu, results in results_of(name).items()}
    shown = [f"{ms:.3g} ({gpu})" for gpu, ms in times.items() if ms is not None]
    return ", ".join(shown) or "no GPU yet"


def targets_table() -> str:
    """What is aimed at in milliseconds, predicted between the busiest unit and all in turn, and measured."""
    lines = []
    for target in gpu_report.TARGETS:
        m, launches = target.m, LAUNCHES * LAUNCH_MS
        passes = pass_ms("lse_symmetric", m * m / 2), pass_ms("lse_backward", m * m)
        low, high = (sum(one[k] for one in passes) + launches for k in (0, 1))
        found = measured("nt_xent", functools.partial(gpu_report.time_of, target=target))
        where = ", in a CUDA graph" if target.graph else ""
        what = f"nt_xent, M={m:,}, D={target.d}{where}"
        lines.append([what, f"{target.ms:g}", f"{low:.3g} to {high:.3g}", found])
    for target in gpu_pairs_report.TARGETS:
        if target.ms is not None:
            found = measured("pairs", functools.partial(gpu_pairs_report.time_of, target=target))
            predicted = f"{wide_ms(target.kind)['predicted']:.3g}"
            lines.append([f"{target.kind}, N={target.m:,}, D={target.d}", f"{target.ms:g}", predicted, found])
    return reporting.table(["bf16, forward + backward", "aim, ms", "predicted", "measured"], lines)


TABLES = {
    "targets": targets_table,
    "kernels": kernels_table,
    "nt_xent": nt_xent_table,
    "waves": waves_table,
    "wide": wide_table,
    "polynomial": polynomial_table,
}


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
