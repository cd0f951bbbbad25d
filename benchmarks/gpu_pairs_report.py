"""What `gpu_pairs.py` found, as markdown. Every part copes with what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks import reporting
from benchmarks.gpu_report import BOTH, LABELS, against, ceilings, closing, error, gib, ms_of, opening, why


@dataclass(frozen=True)
class Target:
    """What forward + backward should reach on an H200; the ratio is that to plain PyTorch."""

    kind: str
    m: int
    d: int
    ms: float | None = None
    gb: float | None = None
    ratio: float | None = None


TARGETS = (
    Target("siglip_loss", 65536, 768, ms=35.0, gb=1.4),
    Target("clip_loss", 65536, 768, ms=48.0, gb=1.0),
    Target("info_nce, queue", 65536, 128, ratio=3.0),
)


def cases_of(results: dict, kind: str, m: int, d: int) -> list[dict]:
    return [case for case in results.get("cases", []) if (case["kind"], case["m"], case["d"]) == (kind, m, d)]


def _first(values: list) -> float | None:
    """Measured beside one side and beside another: the first one counts."""
    return next((value for value in values if value is not None), None)


def _median(summary: dict | None) -> float | None:
    return summary and summary["median"]


def graph_ratio(case: dict) -> float | None:
    """The other side's time in a CUDA graph over ours."""
    ours, other = (_median(case["sides"].get(name, {}).get("graph_ms")) for name in ("fastcl", case["other"]))
    return other / ours if ours and other else None


def time_of(results: dict, target: Target) -> float | None:
    """Milliseconds of ours, whatever it was measured beside."""
    found = cases_of(results, target.kind, target.m, target.d)
    return _first([_median(ms_of(case, "fastcl")) for case in found])


def targets(results: dict) -> str:
    rows = []
    for target in TARGETS:
        found = cases_of(results, target.kind, target.m, target.d)
        beside_eager = [case for case in found if case["other"] == "eager"]
        peak = _first([case["sides"].get("fastcl", {}).get("peak_extra_bytes") for case in found])
        in_graphs = _first([graph_ratio(case) for case in beside_eager])
        rows.append([
            f"{target.kind}, M={target.m:,}, D={target.d}",
            against(time_of(results, target), target.ms),
            against(peak and peak / 1e9, target.gb),
            against(_first([_median(case.get("ratio", {}).get(BOTH)) for case in beside_eager]), target.ratio, False),
            "-" if in_graphs is None else f"{in_graphs:.4g}",
        ])  # fmt: skip
    return reporting.table(["case", "ms", "GB", "times faster than eager", "in CUDA graphs"], rows)


def times(results: dict) -> str:
    """One row a case."""
    header = ["loss", "dtype", "M", "D", "against", "ours ms", "in a graph ms", "its ms", "in a graph ms", "ratio"]
    header += ["in graphs", "TFLOP/s", "of matmul", "GiB", "its GiB", "error loss / grad / worst row", "its error"]
    rows = []
    for case in sorted(results.get("cases", []), key=lambda c: (c["kind"], c["d"], c["m"], c["other"])):
        ours, other = case["sides"].get("fastcl", {}), case["sides"].get(case["other"], {})
        mine, theirs, in_graphs = ms_of(case, "fastcl"), ms_of(case, case["other"]), graph_ratio(case)
        reached, rate = case.get("TFLOP/s"), results.get("ceilings", {}).get(f"{case['dtype']} TFLOP/s")
        rows.append([
            case["kind"], case["dtype"], f"{case['m']:,}", case["d"], LABELS.get(case["other"], case["other"]),
            reporting.spread(mine) if mine else why(ours), reporting.spread(ours.get("graph_ms")),
            reporting.spread(theirs) if theirs else why(other), reporting.spread(other.get("graph_ms")),
            reporting.spread(case.get("ratio", {}).get(BOTH), "×"), "-" if in_graphs is None else f"{in_graphs:.3g}×",
            f"{reached:.0f}" if reached else "-", f"{reached / rate:.0%}" if reached and rate else "-",
            gib(ours.get("peak_extra_bytes")), gib(other.get("peak_extra_bytes")), error(ours), error(other),
        ])  # fmt: skip
    return reporting.table(header, rows)


def markdown(results: dict) -> str:
    parts = [
        *opening("CLIP, SigLIP, InfoNCE and SupCon", results),
        "## Targets (H200, forward + backward)", targets(results),
        *ceilings(results),
        "## Times, memory and errors",
        "Forward and backward, medians (quartiles). Both sides took turns in one process, on inputs that rotate so "
        "that the L2 does not hold them. M: rows of both operands, of the features, of the queue (256 queries unless "
        "the name says otherwise), or of both views of dcl_loss and info_nce. GiB: peak beyond the inputs, gradients "
        "included. TFLOP/s: of the products that are formed, 4 units of 2 M² D for clip_loss, 3 for siglip_loss and "
        "supcon_loss, 3 of 2 M D a query of a queue, 4 of M² D / 2 for info_nce and 2.5 of 2 M² D for dcl_loss, also "
        "against a large matrix product of the same type. Errors: relative, against float64 on the rounded inputs.",
        times(results),
        *closing(results),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def write(results: dict, folder: Path) -> None:
    """pairs.json first: nothing that the other may trip over loses the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    reporting.write_json(folder / "pairs.json", results)
    (folder / "pairs.md").write_text(markdown(results))
