"""Tables and plots of what `pytest benchmarks --benchmark-only` found, from the entries of its JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import reporting

# Names of sides in tables.
LABELS = {"eager": "eager PyTorch", "compiled": "torch.compile"}
# Times that are no loss's.
PRODUCTS, SORT = "tile products and exponentials", "np.sort"
REFERENCES = (PRODUCTS, SORT)
COLOURS = {
    "fastcl": "#1f5fa8", "eager": "#d1751f", "compiled": "#2e9e4f", "lightly": "#7b4fa3",
    "pytorch-metric-learning": "#c8372d",
}  # fmt: skip
# Time and memory from this many rows on are to grow as M^2 and M D, within GROWTH.
GROWTH_FROM, GROWTH = 8192, 0.15


@dataclass(frozen=True)
class Target:
    """How many times longer than ours a side should take at this size: a least value."""

    kind: str
    m: int
    side: str
    least: float
    d: int = 128
    dtype: str = "float32"


TARGETS = (
    *(Target("nt_xent", m, "eager", 4.0) for m in (4096, 8192)),
    *(Target("nt_xent", m, PRODUCTS, 0.9) for m in (4096, 8192)),
    *(Target("nt_xent", m, "lightly", 1.0) for m in (64, 128, 256, 512, 1024, 2048, 4096, 8192)),
    *(Target("nt_xent", m, "pytorch-metric-learning", 1.0) for m in (64, 128, 256, 512)),
    Target("clip_loss", 4096, "eager", 2.0, 512),
    Target("supcon_loss", 4096, "eager", 4.0),
    Target("info_nce, queue", 65536, "eager", 1.5),
    *(Target("wasserstein_1d", m, "eager", least) for m, least in ((512, 2.0), (8192, 3.0), (65536, 4.0))),
)


def cases_of(entries: Iterable[dict]) -> dict[tuple, dict[str, dict]]:
    """{(kind, m, d, dtype): {side: what was found}}, in the order of the measurement."""
    found: dict[tuple, dict[str, dict]] = {}
    for entry in entries:
        info = entry["extra_info"]
        found.setdefault((info["kind"], info["m"], info["d"], info["dtype"]), {})[info["side"]] = info
    return found


def label(side: str, versions: dict[str, str]) -> str:
    return LABELS.get(side, f"{side} {versions[side]}" if side in versions else side)


def _times(summary: dict | None) -> str:
    return f"{summary['median']:.3g}× ({summary['low']:.3g}..{summary['high']:.3g})" if summary else "-"


def _share(value: float | None, ceiling: float | None) -> str:
    return f"{value / ceiling:.0%}" if value and ceiling else "-"


def _ceiling(ceilings: dict[str, float], dtype: str) -> float | None:
    return ceilings.get({"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype] + " TFLOP/s")


def table(entries: Iterable[dict], ceilings: dict[str, float], versions: dict[str, str]) -> str:
    """One line a side."""
    header = ["what", "M", "D", "dtype", "side", "ms", "over ours", "fastest", "MiB", "of matmul", "of copy"]
    header += ["error loss", "gradient", "verdict"]
    lines = []
    for (kind, m, d, dtype), sides in cases_of(entries).items():
        for side, info in sides.items():
            error = info.get("error", {})
            numbers = [f"{error[key]:.1e}" if error else "-" for key in ("loss", "gradient")]
            quotient = info.get("slower_than_fastcl") if side != "fastcl" else None
            lines.append([
                kind, f"{m:,}", d, dtype, label(side, versions), reporting.spread(info["ms"]), _times(quotient),
                f"{info['ms']['fastest'] / sides['fastcl']['ms']['fastest']:.3g}×" if quotient else "-",
                reporting.mebibytes(info["peak_extra_bytes"]),
                _share(info.get("TFLOP/s"), _ceiling(ceilings, dtype)),
                _share(info.get("TB/s"), ceilings.get("copy TB/s")), *numbers, error.get("verdict", "-"),
            ])  # fmt: skip
    return reporting.table(header, lines)


def summary(entries: Iterable[dict], ceilings: dict[str, float]) -> str:
    """One line a case: ours, and how many times longer the others take."""
    header = ["what", "M", "D", "dtype", "ours ms", "of matmul", "floor", "eager", "torch.compile", "other libraries"]
    header += ["ours MiB", "eager MiB"]
    lines = []
    for (kind, m, d, dtype), sides in cases_of(entries).items():
        ours = sides["fastcl"]
        over = {side: info.get("slower_than_fastcl") for side, info in sides.items()}
        base = "torch.sort stable" if "torch.sort stable" in sides else "eager"
        others = [
            f"{side} {quotient['median']:.3g}×" + (" (wrong)" if verdict_of(sides[side]) == "WRONG" else "")
            for side, quotient in over.items()
            if quotient and side not in ("fastcl", base, "compiled", *REFERENCES)
        ]
        floor = next((over[side] for side in REFERENCES if side in over), None)
        lines.append([
            kind, f"{m:,}", d, dtype, reporting.spread(ours["ms"]),
            _share(ours.get("TFLOP/s"), _ceiling(ceilings, dtype)),
            f"{floor['median']:.0%}" if floor else "-", _times(over.get(base)), _times(over.get("compiled")),
            ", ".join(others) or "-", reporting.mebibytes(ours["peak_extra_bytes"]),
            reporting.mebibytes(sides.get(base, {}).get("peak_extra_bytes")),
        ])  # fmt: skip
    return reporting.table(header, lines)


def verdict_of(info: dict) -> str | None:
    return info.get("error", {}).get("verdict")


def targets(entries: Iterable[dict]) -> str:
    """What was aimed at, and what was reached; targets of other devices than the measured one are not listed."""
    cases, lines = cases_of(entries), []
    for target in TARGETS:
        found = cases.get((target.kind, target.m, target.d, target.dtype), {}).get(target.side)
        if found:
            reached = found["slower_than_fastcl"]["median"]
            state = "met" if reached >= target.least else "MISSED"
            size = f"M={target.m:,} D={target.d}"
            lines.append([target.kind, size, LABELS.get(target.side, target.side), f"{target.least:g}×",
                          f"{reached:.3g}×", state])  # fmt: skip
    return reporting.table(["what", "size", "its time over ours:", "at least", "reached", ""], lines)


def growth(entries: Iterable[dict]) -> str:
    """Median time over M^2 and memory over M D of NT-Xent, as multiples of those at the first of the large sizes."""
    found = [(m, d, sides["fastcl"]) for (kind, m, d, dtype), sides in cases_of(entries).items()
             if (kind, d) == ("nt_xent", 128) and m >= GROWTH_FROM and dtype in ("float32", "bfloat16")]  # fmt: skip
    lines = []
    for m, d, ours in sorted(found, key=lambda one: one[0]):
        units = (ours["ms"]["median"] / m**2, (ours["peak_extra_bytes"] or math.nan) / (m * d))
        if not lines:
            first = units
        time, memory = (unit / base for unit, base in zip(units, first, strict=True))
        state = "met" if max(abs(time - 1), abs(memory - 1)) <= GROWTH else "MISSED"
        extra = reporting.mebibytes(ours["peak_extra_bytes"])
        lines.append([f"{m:,}", reporting.spread(ours["ms"]), extra, f"{time:.2f}", f"{memory:.2f}", state])
    return reporting.table(["M", "ms", "MiB", "time over M²", "memory over M D", f"within {GROWTH:.0%}"], lines)


def missing(versions: dict[str, str]) -> list[str]:
    """Libraries that were not measured, and why: their entry is no version."""
    return [f"* {name}: {why}" for name, why in versions.items() if not why[0].isdigit()]


def markdown(results: dict) -> str:
    """The whole report of one JSON file."""
    entries, info = results["benchmarks"], results["machine_info"]
    parts = [
        f"# Benchmarks on {info.get('gpu') or info['cpu']['brand_raw']}",
        f"torch {info['torch']}, {info['threads']} threads, {info['build'].get('simd')}. All sides of a case take turns "
        "in one process, on the same tensors: medians (quartiles) of forward and backward; the sorts are forward alone. "
        "\"over ours\" is a side's time over ours, round by round, and \"fastest\" that of each side's fastest round. "
        "MiB is memory beyond the inputs. \"of matmul\": the products that ours forms, those of the backward's "
        "recomputation among them, over the time of a side, as a share of the rate of a large matrix product in the same "
        "type; the same number for all sides, though those that keep the matrix form fewer. \"of copy\": inputs and "
        "gradients, once each, over that of a large copy. Both rates were measured once, at the end. Errors are relative, "
        "against float64; \"right\" keeps the rule of the tests: at most twice the error of plain PyTorch in the same "
        "type, plus 1e-6 (float32) or 1e-3 (bfloat16); \"-\" is plain PyTorch itself, or where nothing was compared.",
        "\n".join(f"* {key}: {value:.3g}" for key, value in info["ceilings"].items()),
        "## Targets", targets(entries),
        "## Growth of nt_xent, D = 128", growth(entries),
        "## Every side", table(entries, info["ceilings"], info["peers"]),
        "## Not measured", "\n".join(missing(info["peers"])) or "Every library was.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _line(cases: dict, side: str, over: str, value, **fixed) -> tuple[list, list]:
    """Values of a side of nt_xent over "m" or "d", where the rest is fixed."""
    points = {}
    for (kind, m, d, dtype), sides in cases.items():
        at = {"kind": kind, "m": m, "d": d, "dtype": dtype}
        if side in sides and all(at[key] == wanted for key, wanted in fixed.items()):
            found = value(sides[side])
            if found:
                points[at[over]] = found
    return sorted(points), [points[x] for x in sorted(points)]


def plot(results: dict, path: Path) -> None:
    """NT-Xent: time and memory over M, and the share of the matrix products' rate over D."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    info, cases = results["machine_info"], cases_of(results["benchmarks"])
    dtype = "bfloat16" if info.get("gpu") else "float32"
    rows = 8192 if info.get("gpu") else 4096
    rate = _ceiling(info["ceilings"], dtype)
    panels = (
        ("m", "rows M = 2N", "ms, forward + backward", {"d": 128}, lambda side: side["ms"]["median"]),
        ("m", "rows M = 2N", "MiB beyond the inputs", {"d": 128}, lambda s: (s["peak_extra_bytes"] or 0) / 2**20),
        ("d", f"features D, at M = {rows:,}", "share of the rate of torch.mm", {"m": rows},
         lambda side: side["TFLOP/s"] and side["TFLOP/s"] / rate),
    )  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for axis, (over, title, unit, fixed, value) in zip(axes, panels, strict=True):
        for side, colour in COLOURS.items():
            x, y = _line(cases, side, over, value, kind="nt_xent", dtype=dtype, **fixed)
            if x:
                axis.plot(x, y, "o-", color=colour, label=LABELS.get(side, side), linewidth=2, markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_yscale("linear" if over == "d" else "log")
        axis.set_ylim(bottom=0 if over == "d" else None)
        axis.set_xlabel(title)
        axis.set_ylabel(unit)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(f"nt_xent, {dtype}, {info.get('gpu') or info['cpu']['brand_raw']}, D = 128 on the left")
    figure.savefig(path, dpi=110)
    plt.close(figure)
