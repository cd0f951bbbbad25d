"""Compile the Triton kernels ahead of time, without a GPU, and report registers, spills and instructions.

    python tests/aot_report.py            one configuration a kernel, sm_90
    python tests/aot_report.py --all      the whole launch table, sm_80, sm_90 and sm_100
    python tests/aot_report.py --json     the same as JSON lines

Columns from "instructions" on count the machine code of one warp: of one tile in the loop without masks where the
kernel has one, else of the whole kernel. Exit status 1 if any kernel spills registers to memory or does not use matrix
instructions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastcl.kernels import launch
from fastcl.kernels.lse_backward import lse_backward_kernel, lse_weight_kernel, row_weight_kernel
from fastcl.kernels.lse_masked import lse_masked_kernel
from fastcl.kernels.lse_rows import lse_combine_kernel, lse_rows_kernel
from fastcl.kernels.lse_symmetric import lse_symmetric_kernel
from fastcl.kernels.lse_two_way import lse_two_way_kernel
from fastcl.kernels.rows import (
    normalize_pair_kernel,
    pair_backward_kernel,
    pair_loss_kernel,
    sum_kernel,
    unit_rows_backward_kernel,
    unit_rows_kernel,
)
from fastcl.kernels.softplus import softplus_rows_kernel, softplus_weight_kernel
from fastcl.kernels.stats import stats_kernel

ARCHS = launch.GENERATIONS
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTC[A-Z]*MMA"}
# Shared memory a program may have (bytes): the smallest of the data-centre chips of each generation.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
OPCODES = ("MUFU", "FFMA", "FADD", "FMUL", "SHFL", "BAR")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+[^;]*;")
WIDE = 768  # the d that stands for every width that is read in chunks

# Without bias and pulls; without ids as well.
DROP = {"SAME": "drop"} | dict.fromkeys(("p_bias", "p_pull_a", "p_pull_b"))
PLAIN = DROP | {"SAME": "keep"} | dict.fromkeys(("p_ids_a", "p_ids_b"))
# The host knows the path, or the device chooses from the norms.
FIXED = {"ONLINE_MAX": False, "CHECK_RANGE": False, "p_norms": None}
FIXED_CHECKED = {"ONLINE_MAX": False, "CHECK_RANGE": True}
ONLINE_CHECKED = {"ONLINE_MAX": True, "CHECK_RANGE": True}
ONLINE = {"ONLINE_MAX": True, "CHECK_RANGE": False, "p_norms": None}
NO_SUMS = {"p_sums": None, "p_slopes": None}

# pass -> kernel, and what to say of each of its variants; the last of the masked ones are those with all operands.
PASSES = {
    "lse_symmetric": (lse_symmetric_kernel, {"": FIXED, " checked": FIXED_CHECKED}),
    "lse_rows": (lse_rows_kernel, {"": FIXED, " online": ONLINE_CHECKED}),
    "lse_two_way": (lse_two_way_kernel, {"": FIXED, " checked": FIXED_CHECKED}),
    "lse_masked": (
        lse_masked_kernel,
        {
            " drop": DROP | FIXED,
            " sum online": DROP | ONLINE_CHECKED | {"SAME": "sum"},
            " sum, bias": {"SAME": "sum"} | ONLINE,
        },
    ),
    "lse_backward": (lse_backward_kernel, {"": FIXED}),
    "lse_backward_online": (lse_backward_kernel, {" online": ONLINE_CHECKED}),
    "lse_weight": (
        lse_weight_kernel,
        {
            "": PLAIN | FIXED,
            " online": PLAIN | ONLINE_CHECKED,
            " sum, pull": FIXED | {"SAME": "sum", "p_bias": None},
            " sum, bias, pull": {"SAME": "sum"} | ONLINE,
        },
    ),
    "softplus_rows": (softplus_rows_kernel, {"": PLAIN, " only": {"SAME": "only"}}),
    "softplus_weight": (
        softplus_weight_kernel,
        {" sums": PLAIN | {"p_beta_b": None, "p_w_b": None}, " both sides, only": {"SAME": "only"} | NO_SUMS},
    ),
    "stats": (stats_kernel, {"": {}}),
}


def matrix_cases(arch: int):
    """(label, kernel, signature types, constants, tile) of every matrix pass in the launch table."""
    for name, (kernel, variants) in PASSES.items():
        for itemsize, widths in launch.TABLE[name].items():
            dtypes = ("fp16", "bf16") if itemsize == 2 else ("fp32",)
            precisions = ("tf32",) if itemsize == 2 else ("tf32x3", "tf32")
            for width, dtype, variant, precision in itertools.product(widths, dtypes, variants.items(), precisions):
                yield matrix_case(name, kernel, dtype, width, widths[width][arch], precision, *variant)


def matrix_case(name, kernel, dtype, width, tile, precision, variant, what):
    constants = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tile.block_d,
        "CHUNKED": width is None,
        "PRECISION": precision,
        "WEIGHT_BITS": 14 if dtype == "fp16" else 0,
        "FLUSH": launch.FLUSH_TILES,
        "HAS_COL": True,
        **what,
    }
    types = {
        "d_row": f"tensordesc<{dtype}[{tile.block_m},{tile.block_d}]>",
        "d_col": f"tensordesc<{dtype}[{tile.block_n},{tile.block_d}]>",
        "p_out": f"*{dtype}" if name.endswith("_weight") else "*fp32",
        **dict.fromkeys(("p_ids_a", "p_ids_b"), "*i64"),
        "p_counts": "*i32",
    }
    label = {
        "kernel": name.removesuffix("_online") + variant,
        "dtype": dtype if dtype != "fp32" else f"fp32 {precision}",
        "d": f"<= {width}" if width else f"{WIDE}, chunks of {tile.block_d}",
        "tile": f"{tile.block_m}x{tile.block_n}",
        "warps": tile.num_warps,
        "stages": tile.num_stages,
    }
    return label, kernel, types, constants, tile.options, True


def row_cases():
    """The row-local kernels, whose programs hold a few rows of up to 4,096 features."""
    for d in (128, 4096):
        block_m, block_d = launch.row_block(d)
        for dtype, z in (("fp16", "fp16"), ("bf16", "fp16"), ("fp32", "fp32")):
            constants = {"NORMALIZE": True, "PULLED": True, "BLOCK_M": block_m, "BLOCK_D": block_d}
            types = {n: f"*{dtype}" for n in ("p_x1", "p_x2", "p_dx1", "p_dx2")} | {"p_z": f"*{z}"}
            types |= dict.fromkeys(("p_share", "p_slope"), "*fp64") | dict.fromkeys(("weight", "pull"), "fp64")
            for kernel in (normalize_pair_kernel, pair_backward_kernel):
                name = kernel.fn.__name__.removesuffix("_kernel")
                label = {"kernel": name, "dtype": dtype, "d": f"<= {d}", "tile": f"{block_m}x{block_d}"}
                options = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
                yield label | {"warps": 8, "stages": 1}, kernel, types, constants, options, False
        for kernel in (unit_rows_kernel, unit_rows_backward_kernel):
            name = kernel.fn.__name__.removesuffix("_kernel")
            constants = {"ROUNDED": tl.float16, "BLOCK_M": block_m, "BLOCK_D": block_d}
            types = {"p_x": "*fp16", "p_dx": "*fp16"}
            label = {"kernel": name, "dtype": "fp16", "d": f"<= {d}", "tile": f"{block_m}x{block_d}"}
            options = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
            yield label | {"warps": 8, "stages": 1}, kernel, types, constants, options, False
    for kernel in (row_weight_kernel, lse_combine_kernel, pair_loss_kernel, sum_kernel):
        constants = {"BLOCK_M": 128, "BLOCK": 1024, "WEIGHT_BITS": 14, "ONLINE_MAX": True, "CHECK_RANGE": True}
        constants |= {"POSITIVE_COUNTS": True, "PULLED": True, "SUM": True, "p_w": None, "p_norms": None}
        types = dict.fromkeys(("p_lse", "p_loss", "p_whole", "p_share", "p_x"), "*fp64")
        types |= dict.fromkeys(("weight", "pull"), "fp64")
        name, tile = kernel.fn.__name__.removesuffix("_kernel"), "1024" if kernel is sum_kernel else "128"
        label = {"kernel": name, "dtype": "fp32", "d": "-", "tile": tile, "warps": 4, "stages": 1}
        yield label, kernel, types, constants, {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}, False


def compile_case(case, arch: int) -> dict:
    label, kernel, types, constants, options, is_matrix = case
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature, attrs = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        elif name.startswith("p_"):
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name in ("log2_cols", "sign") else "i32"
        # What a launch sees: torch aligns its allocations, and usual widths are multiples of 16.
        if signature[name].startswith("*") or name in ("d", "stride_z"):
            attrs[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attrs)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return label | {"arch": f"sm_{arch}"} | resources(binary, arch, is_matrix)


def resources(binary, arch: int, is_matrix: bool) -> dict:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    spills = stack + _count("LDL", sass) + _count("STL", sass)
    matrix = _count(MATRIX[arch], sass)
    loop = hot_loop(sass, MATRIX[arch]) or sass
    mix = {"instructions": len(INSTRUCTION.findall(loop)), "matrix": _count(MATRIX[arch], loop)}
    mix |= {op: _count(re.escape(op), loop) for op in OPCODES}
    shared = binary.metadata.shared
    problem = []
    if spills:
        problem.append("spills")
    if is_matrix and not matrix:
        problem.append("no matrix instructions")
    if shared > SHARED[arch]:
        problem.append("shared memory")
    return {"registers": registers, "stack": stack, "shared": shared, **mix, "problem": problem}


def _count(pattern: str, sass: str) -> int:
    return len(re.findall(rf"\b{pattern}\b", sass))


def hot_loop(sass: str, matrix: str) -> str | None:
    """The machine code of the smallest loop with a matrix product and an exponential: one tile of the unmasked walk."""
    lines = [(int(match[1], 16), match[0]) for match in INSTRUCTION.finditer(sass)]
    place = {address: index for index, (address, _) in enumerate(lines)}
    loops = []
    for index, (address, text) in enumerate(lines):
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            body = "\n".join(line for _, line in lines[place[int(target[1], 16)] : index + 1])
            if _count(matrix, body) and _count(r"MUFU\.EX2", body):
                loops.append(body)
    return min(loops, key=len, default=None)


def select_cases(arch: int, everything: bool, only: str) -> list:
    """All cases of an architecture, or of each kernel the width and type that most people train with."""
    cases = [case for case in (*matrix_cases(arch), *row_cases()) if only in case[0]["kernel"]]
    if everything:
        return cases
    chosen = {case[0]["kernel"]: case for case in reversed(cases)}
    chosen |= {case[0]["kernel"]: case for case in cases if case[0]["d"] == "<= 128" and case[0]["dtype"] == "fp16"}
    return list(chosen.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the whole launch table on every architecture")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a markdown table")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--arch", type=int, action="append", help="architectures, such as 90")
    args = parser.parse_args()
    archs = args.arch or (ARCHS if args.all else (90,))
    count = failed = 0
    header = None
    for arch in archs:
        for case in select_cases(arch, args.all, args.only):
            row = compile_case(case, arch)
            count += 1
            failed += bool(row["problem"])
            if args.json:
                print(json.dumps(row), flush=True)
                continue
            if header is None:
                header = list(row)
                print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
            row["problem"] = ", ".join(row["problem"]) or "none"
            print("| " + " | ".join(str(row[name]) for name in header) + " |", flush=True)
    if not args.json:
        print(f"\n{count} compiled, {failed} with a problem")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
