"""Compile the CUDA kernels without a GPU, and report registers, spills and shared memory.

    python tests/cuda_report.py                    sm_80, sm_90 and sm_100
    python tests/cuda_report.py --arch 90          one architecture
    python tests/cuda_report.py --json             the same as JSON lines
    python tests/cuda_report.py --out table.md     also into a file

Exit status 1 if a kernel of this library spills registers to memory, or a block wants more shared memory than the chip
has. Kernels of cub (rows of more than 16,384 elements) are listed, but their spills are not ours to avoid.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
ARCHS = (80, 90, 100)
# Shared memory a block may have (bytes): the data-centre chips of each generation.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Words of the longest row that a block holds at once in shared memory.
BUFFERS = {"sort_block_kernel": 1, "wasserstein_block_kernel": 2}
TYPES = {"t": "fp16, bf16", "j": "fp32"}
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_\d+'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def tiers() -> dict[int, int]:
    """{items a thread: most threads} of the table in block_sort.cuh."""
    source = (CSRC / "block_sort.cuh").read_text()
    most = re.search(r"constexpr int kMaxThreads = (\d+);", source)[1]
    table = re.search(r"constexpr Tier kTiers\[\] = \{(.*?)\};", source, re.DOTALL)[1].replace("kMaxThreads", most)
    return {int(items): int(threads) for items, threads in re.findall(r"\{(\d+), (\d+)\}", table)}


def dynamic_shared(kernel: str, items: int) -> int:
    """Bytes of the largest block: 512 bytes of counters a warp, totals and sums, words."""
    threads = tiers()[items]
    return threads // 32 * 512 + 16 + 256 + 4 * threads * items * BUFFERS[kernel]


def describe(mangled: str) -> dict:
    """Kernel, threads x items and type of a mangled name."""
    if "cub" in mangled:
        if "Segmented" not in mangled:
            return {"kernel": "cub::EmptyKernel", "tier": "-", "type": "-"}
        words = "keys" if "NullType" in mangled else "pairs"
        digits = "short" if re.search(r"Policy\d+ELb1E", mangled) else "long"
        return {"kernel": "cub::DeviceSegmentedRadixSort", "tier": "-", "type": f"{words}, {digits} digits"}
    kernel = re.search(r"\d+([a-z][a-z_]*_kernel)", mangled)[1]
    arguments = mangled.split(kernel, 1)[1]
    items = re.match(r"ILi(\d+)E", arguments)
    label = [TYPES[letter] for letter in re.findall(r"^I(?:Li\d+E)?([tj])E", arguments)] or ["fp32"]
    label += ["per row"] * bool(re.match(r"ILi\d+ELb1E", arguments))
    tier = "-"
    if kernel in BUFFERS:
        tier = f"{tiers()[int(items[1])]} x {items[1]}"
    elif items:
        label.append(f"{items[1]} threads a cell" if items[1] != "1" else "a thread a cell")
    return {"kernel": kernel, "tier": tier, "type": ", ".join(label)}


def compile_source(source: Path, arch: int) -> list[dict]:
    """One row for each kernel of a file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [NVCC, "-cubin", "-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v"]
        done = subprocess.run(
            [*command, "-o", f"{folder}/out.cubin", str(source)], capture_output=True, text=True, timeout=600
        )
    if done.returncode:
        raise SystemExit(f"{source.name} for sm_{arch}: {done.stderr}")
    rows = [row_of(source, arch, match) for match in ENTRY.finditer(done.stderr)]
    return sorted(rows, key=lambda row: (row["kernel"], row["type"], row["dynamic shared"]))


def row_of(source: Path, arch: int, match: re.Match) -> dict:
    what = describe(match["name"])
    static = re.search(r"(\d+) bytes smem", match["rest"])
    row = {"file": source.name, **what, "arch": f"sm_{arch}", "registers": int(match["registers"])}
    row |= {"stack": int(match["stack"]), "spill": int(match["stores"]) + int(match["loads"])}
    row |= {"static shared": int(static[1]) if static else 0, "dynamic shared": 0}
    if what["kernel"] in BUFFERS:
        row["dynamic shared"] = dynamic_shared(what["kernel"], int(what["tier"].split(" x ")[1]))
    problem = []
    if row["stack"] or row["spill"]:
        problem.append("spills in cub" if what["kernel"].startswith("cub") else "spills")
    if row["static shared"] + row["dynamic shared"] > SHARED[arch]:
        problem.append("shared memory")
    return row | {"problem": problem}


def report(archs) -> list[dict]:
    cases = [(source, arch) for arch in archs for source in sorted(CSRC.glob("*.cu"))]
    with ThreadPoolExecutor(2) as pool:
        return [row for rows in pool.map(lambda case: compile_source(*case), cases) for row in rows]


def markdown(rows: list[dict]) -> str:
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in rows:
        cells = row | {"problem": ", ".join(row["problem"]) or "none"}
        lines.append("| " + " | ".join(str(cells[name]) for name in header) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, help="architectures, such as 90")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a markdown table")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    if NVCC is None:
        raise SystemExit("nvcc is not on the path")
    rows = report(args.arch or ARCHS)
    text = "\n".join(map(json.dumps, rows)) if args.json else markdown(rows)
    failed = sum(bool(set(row["problem"]) - {"spills in cub"}) for row in rows)
    print(text)
    if not args.json:
        print(f"\n{len(rows)} compiled, {failed} with a problem")
    if args.out:
        args.out.write_text(text + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
