"""Tables, numbers and versions that all reports share."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

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
