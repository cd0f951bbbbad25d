"""Tables, numbers and versions that all reports share; as a command, the report of `pytest benchmarks`.

    python -m pytest benchmarks --benchmark-only --benchmark-json found.json
    python benchmarks/report.py found.json --out benchmarks/results/cpu

Writes benchmarks.md (every side of every case), summary.md (a line a case), benchmarks.png and, for the next comparison,
benchmarks.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import fastcl._native
from fastcl import ops


def table(header: list[str], rows: list[list]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def spread(summary: dict | None, unit: str = "") -> str:
    """Median and quartiles, such as 5.1 (5.0..5.3)."""
    if summary is None:
        return "-"
    return f"{summary['median']:.3g}{unit} ({summary['low']:.3g}..{summary['high']:.3g})"


def fastest(ms: dict[str, dict], above: str, below: str) -> float:
    """The quotient of the fastest rounds of two sides."""
    return ms[above]["fastest"] / ms[below]["fastest"]


def mebibytes(count: int | None) -> str:
    """Less than a few pages of memory is below what the resident set of a process tells."""
    if count is None:
        return "-"
    return "< 0.1" if count < 0.1 * 2**20 else f"{count / 2**20:,.1f}"


def slug(name: str) -> str:
    """A folder name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_json(path: Path, content: object) -> None:
    """All of it or, if this process is ended midway, what was there before."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def output(*command: str) -> str | None:
    """What a tool says about itself, or None where it is not there."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() or None


def versions() -> dict:
    """What the figures were measured with."""
    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "backends": {name: ops.backends(name) for name in ops.SCHEMAS},
        "build": fastcl._native.build_info(),
        "simd of torch": torch.backends.cpu.get_cpu_capability(),
    }
    if ops.TRITON:
        import triton

        found["triton"] = triton.__version__
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm"
        nvcc = output("nvcc", "--version")
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu memory": properties.total_memory,
            "l2": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "nvcc": nvcc.splitlines()[-1] if nvcc else None,
            "driver, clocks": output("nvidia-smi", query, "--format=csv,noheader"),
        }
    return found


def main() -> int:
    from benchmarks import suite_report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    args = parser.parse_args()
    try:
        results = json.loads(args.json.read_text(encoding="utf-8"))
        entries, info = results["benchmarks"], results["machine_info"]
        text, lines = (suite_report.markdown(results), suite_report.summary(entries, info["ceilings"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"report.py: expected a JSON file of pytest benchmarks, got {args.json} ({error!r})", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "benchmarks.json", results)
    (args.out / "benchmarks.md").write_text(text, encoding="utf-8")
    (args.out / "summary.md").write_text(lines + "\n", encoding="utf-8")
    suite_report.plot(results, args.out / "benchmarks.png")
    print(suite_report.targets(entries))
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
