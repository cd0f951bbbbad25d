"""What `gpu.py` found, as markdown and as a plot. Every part copes with what is missing: a run may end early."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks import reporting

BOTH = "forward + backward"
COLOURS = {"fastcl": "#1b6ca8", "eager": "#c8553d", "compiled": "#6b8f3c"}
LABELS = {"fastcl": "fastcl", "eager": "eager PyTorch", "compiled": "torch.compile"}


@dataclass(frozen=True)
class Target:
    """What forward + backward should reach on an H200; small ones in a CUDA graph, without launches from Python."""

    dtype: str
    d: int
    m: int
    ms: float
    gib: float | None = None
    # To eager PyTorch and through torch.compile.
    ratio: float | None = None
    compiled_ratio: float | None = None
    graph: bool = False


TARGETS = (
    Target("bf16", 128, 65536, ms=5.8, ratio=10.0, compiled_ratio=4.0),
    Target("bf16", 128, 8192, ms=0.15, graph=True),
    Target("bf16", 128, 1048576, ms=1500.0, gib=4.0),
    Target("bf16", 128, 2048, ms=0.06, graph=True),
)


def case_of(results: dict, dtype: str, d: int, m: int, other: str = "eager") -> dict | None:
    for case in results.get("cases", []):
        if (case["dtype"], case["d"], case["m"], case["other"]) == (dtype, d, m, other):
            return case
    return None


def ms_of(case: dict | None, side: str, label: str = BOTH) -> dict | None:
    return case["sides"].get(side, {}).get("ms", {}).get(label) if case else None


def against(value: float | None, limit: float | None, at_most: bool = True) -> str:
    """A measured value beside its target, and whether it is met."""
    if limit is None:
        return "-"
    bound = f"{'<=' if at_most else '>='} {limit:g}"
    if value is None:
        return f"not measured ({bound})"
    met = value <= limit if at_most else value >= limit
    return f"{value:.4g} ({bound}: {'met' if met else 'MISSED'})"


def ratio_to(results: dict, target: Target, other: str) -> float | None:
    case = case_of(results, target.dtype, target.d, target.m, other)
    quotient = case.get("ratio", {}).get(BOTH) if case else None
    return quotient and quotient["median"]


def time_of(results: dict, target: Target) -> float | None:
    """Milliseconds of ours, in a graph where the target is one of that."""
    case = case_of(results, target.dtype, target.d, target.m)
    found = case["sides"].get("fastcl", {}).get("graph_ms") if target.graph and case else ms_of(case, "fastcl")
    return found and found["median"]


def targets(results: dict) -> str:
    rows = []
    for target in TARGETS:
        case = case_of(results, target.dtype, target.d, target.m)
        peak = case["sides"].get("fastcl", {}).get("peak_extra_bytes") if case else None
        rows.append([
            f"{target.dtype}, D={target.d}, M={target.m:,}" + (", in a CUDA graph" if target.graph else ""),
            against(time_of(results, target), target.ms),
            against(peak and peak / 2**30, target.gib),
            against(ratio_to(results, target, "eager"), target.ratio, at_most=False),
            against(ratio_to(results, target, "compiled"), target.compiled_ratio, at_most=False),
        ])  # fmt: skip
    return reporting.table(["case", "ms", "GiB", "times faster than eager", "than torch.compile"], rows)


def error(side: dict) -> str:
    if "error_vs_fp64" in side:
        found = side["error_vs_fp64"]
        return f"{found['loss']:.1e} / {found['gradient']:.1e} / {found['worst row']:.1e}"
    return "-"


def why(side: dict) -> str:
    if "error" in side:
        return "failed"
    return side.get("skipped", "-")


def gib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**30:.3g}"


def times(results: dict) -> str:
    """One row a case."""
    header = ["dtype", "D", "M", "against", "forward ms", f"{BOTH} ms", "in a graph ms", "other forward ms"]
    header += [f"other {BOTH} ms", "ratio", "TFLOP/s", "of matmul", "GiB", "other GiB"]
    header += ["error loss / grad / worst row", "other error"]
    rows = []
    order = sorted(results.get("cases", []), key=lambda c: (c["dtype"], c["d"], c["m"], c["other"]))
    for case in order:
        ours, other = case["sides"].get("fastcl", {}), case["sides"].get(case["other"], {})
        rate = results.get("ceilings", {}).get(f"{case['dtype']} TFLOP/s")
        reached = case.get("TFLOP/s")
        theirs = ms_of(case, case["other"])
        rows.append([
            case["dtype"], case["d"], f"{case['m']:,}", LABELS[case["other"]],
            reporting.spread(ms_of(case, "fastcl", "forward")),
            reporting.spread(ms_of(case, "fastcl")) if ms_of(case, "fastcl") else why(ours),
            reporting.spread(ours.get("graph_ms")),
            reporting.spread(ms_of(case, case["other"], "forward")),
            reporting.spread(theirs) if theirs else why(other),
            reporting.spread(case.get("ratio", {}).get(BOTH), "×"),
            f"{reached:.0f}" if reached else "-",
            f"{reached / rate:.0%}" if reached and rate else "-",
            gib(ours.get("peak_extra_bytes")), gib(other.get("peak_extra_bytes")),
            error(ours), error(other),
        ])  # fmt: skip
    return reporting.table(header, rows)


def tuning(found: dict) -> str:
    rows = []
    for entry in found.get("entries", []):
        timed = sum("ms" in line for line in entry["tiles"])
        rows.append([
            entry["entry"], entry["rows"], ", ".join(map(str, entry["tiles"][0]["tile"].values())),
            f"{entry['present_ms']:.4f}" if "present_ms" in entry else entry["tiles"][0].get("error", "-"),
            ", ".join(map(str, entry["best"].values())),
            f"{entry['best_ms']:.4f}" if "best_ms" in entry else "-", timed,
        ])  # fmt: skip
    header = ["entry", "M", "present: block m, n, d, warps, stages", "ms", "best", "ms", "timed"]
    return reporting.table(header, rows)


def tests(results: dict) -> str:
    rows = []
    for run in results.get("tests", []):
        count = run.get("counts")
        note = run.get("skipped") or run.get("note", "no summary")
        outcome = ", ".join(f"{value} {key}" for key, value in count.items()) if count else note
        done = "skipped" if "skipped" in run else "passed"
        state = done if run["returncode"] == 0 else "out of time" if run["timed_out"] else "FAILED"
        rows.append([f"`{run['command']}`", state, outcome, f"{run['seconds']:.0f}"])
    return reporting.table(["tests", "result", "of which", "s"], rows)


def opening(title: str, results: dict) -> list[str]:
    """The first parts of a report: what on, whether it passed, and versions."""
    return [
        f"# {title} on {results['name']}",
        "Everything passed." if results["passed"] else "Not everything passed: see the end.",
        "\n".join(f"* {key}: {value}" for key, value in results.get("versions", {}).items()),
    ]


def ceilings(results: dict) -> list[str]:
    lines = [f"* {key}: {value:.3g}" for key, value in results.get("ceilings", {}).items()]
    return ["## Ceilings measured in this run", "\n".join(lines)]


def closing(results: dict) -> list[str]:
    """The last parts of a report: what was not run and what went wrong."""
    parts = []
    for title, key in (("Not run: out of time", "late"), ("Problems", "problems")):
        if results.get(key):
            lines = [f"* {line}" if key == "late" else f"```\n{line}\n```" for line in results[key]]
            parts += [f"## {title}", "\n".join(lines)]
    return parts


def markdown(results: dict) -> str:
    """The whole report; parts whose measurement did not happen say so by being empty."""
    tune = results.get("tune", {})
    parts = [
        *opening("nt_xent", results),
        "## Tests", tests(results),
        "## Targets (H200, forward + backward)", targets(results),
        *ceilings(results),
        "## Times, memory and errors",
        "Medians (quartiles). Both sides took turns in one process, on inputs that rotate so that the L2 does not "
        "hold them. GiB: peak beyond the inputs, gradients included. TFLOP/s: 2.5 units of 2 M² D for forward and "
        "backward, against a large matrix product of the same type. Errors: relative, against float64 on the rounded "
        "inputs. tf32: float32 inputs with `torch.set_float32_matmul_precision(\"high\")`.",
        times(results),
        "## Launch table", tuning(tune),
    ]  # fmt: skip
    if tune.get("table"):
        parts += ["The best entries, for `fastcl/kernels/launch.py`:", f"```python\n{tune['table']}\n```"]
    parts += closing(results)
    return "\n\n".join(parts) + "\n"


def _series(results: dict, dtype: str, d: int, side: str, value) -> tuple[list, list]:
    found = {}
    for case in results.get("cases", []):
        if (case["dtype"], case["d"]) == (dtype, d) and side in case["sides"]:
            y = value(case, side)
            # Measured beside eager and beside torch.compile: the first one counts.
            if y is not None:
                found.setdefault(case["m"], y)
    return sorted(found), [found[m] for m in sorted(found)]


def plot(results: dict, path: Path, dtype: str = "bf16", d: int = 128) -> None:
    """Time and memory of forward + backward over M."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def time_of(case, side):
        found = ms_of(case, side)
        return found and found["median"]

    def gib_of(case, side):
        peak = case["sides"][side].get("peak_extra_bytes")
        return peak and peak / 2**30

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, value, unit in ((axes[0], time_of, "ms"), (axes[1], gib_of, "GiB beyond the inputs")):
        for side, colour in COLOURS.items():
            x, y = _series(results, dtype, d, side, value)
            if x:
                axis.plot(x, y, "o-", color=colour, label=LABELS[side], linewidth=2, markersize=5)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("rows M = 2N")
        axis.set_ylabel(unit)
        axis.grid(True, alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    figure.suptitle(f"nt_xent, forward + backward, {dtype}, D={d}, {results['name']}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(results: dict, folder: Path) -> None:
    """nt_xent.json first: nothing that the others may trip over loses the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    reporting.write_json(folder / "nt_xent.json", results)
    (folder / "nt_xent.md").write_text(markdown(results))
    plot(results, folder / "nt_xent.png")
