"""What `gpu_swd.py` found, as markdown, beside two floors. Every part copes with what is missing.

Bytes: each input read and each output written once, at the copy bandwidth: 12 bytes an element of `wasserstein_1d`.
Shared memory: the accesses of the block sorts, 32 lanes a clock on each multiprocessor that has a row, without bank
conflicts. Longer rows sort in device memory and have the first floor alone.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import reporting
from benchmarks.gpu_report import LABELS, against, ceilings, closing, error, gib, ms_of, opening, why

ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# Lanes that shared memory serves in a clock.
LANES = 32
# Words a thread holds, by the longest row for which it does: the tiers of csrc/cuda/block_sort.cuh.
TIERS = {512: 4, 1024: 8, 16384: 16}
# What a pass of that file touches: the counter of a word's digit is read, left for the next word and read again; a
# word, and its index if that is not in it, goes to its place and comes back.
COUNTER, THERE, BACK = 3, 1, 1
# Clearing, adding up, and replacing the 128 words of counters of one warp.
SCAN_WORDS = 4 * 128
# The composition against which a kernel at this size should be so many times faster; how near to its floor with so
# many rows; and the memory beyond the gradient up to this length: the distances of the rows, and what the allocator
# rounds up.
RATIO, RATIO_AT = 5.0, (128, 8192)
OF_FLOOR, FLOOR_AT = 1.5, (2048, 8192)
EXTRA_MIB, LONGEST_LEAN = 1.0, 16384
SIBLING_RATIO = 1.15
SIBLINGS = ("decoupled_nt_xent", "uniformity_loss")


def accesses(kind: str, dtype: str, n: int) -> float | None:
    """Accesses to shared memory for one element of a row, or None for rows that do not fit there."""
    items = next((items for longest, items in TIERS.items() if n <= longest), None)
    if items is None or kind not in ("segmented_sort", "wasserstein_1d"):
        return None
    passes = ITEM_BYTES[dtype]
    counters = passes * (COUNTER + SCAN_WORDS / (32 * items))
    move = THERE + BACK
    if kind == "segmented_sort":
        # A 16-bit key and its index are one word.
        return counters + passes * move * (2 if dtype == "fp32" else 1)
    sort_y = counters + (passes - 1) * move + THERE
    sort_x = counters + (passes - 1) * 2 * move
    # The element of Y of the same rank, and the gradient to its place and from there to the output.
    return sort_y + sort_x + 1 + move


def floors(case: dict, limits: dict) -> dict[str, float]:
    """{"bytes": ms, "shared": ms}, as far as they are known."""
    kind, p, n = case["kind"], case["p"], case["n"]
    found = {}
    if kind in ("segmented_sort", "wasserstein_1d"):
        each = 12 if kind == "wasserstein_1d" else 2 * ITEM_BYTES[case["dtype"]] + 4
        if "copy TB/s" in limits:
            found["bytes"] = each * p * n / limits["copy TB/s"] / 1e9
    each = accesses(kind, case["dtype"], n)
    if each is not None and {"SM GHz", "SMs"} <= limits.keys():
        found["shared"] = each * p * n / (LANES * min(p, limits["SMs"]) * limits["SM GHz"]) / 1e6
    return found


def _label(case: dict) -> str:
    return "forward" if case["kind"] == "segmented_sort" else "forward + backward"


def device_ms(case: dict | None, side: str = "fastcl") -> float | None:
    """The time in a CUDA graph where there is one: without the launches."""
    if case is None:
        return None
    found = case["sides"].get(side, {}).get("graph_ms") or ms_of(case, side, _label(case))
    return found["median"] if found else None


def case_of(results: dict, kind: str, p: int, n: int, other: str = "eager") -> dict | None:
    for case in results.get("cases", []):
        if (case["kind"], case["p"], case["n"], case["other"]) == (kind, p, n, other):
            return case
    return None


def beyond_gradient(case: dict | None) -> float | None:
    """MiB of the peak that are not the gradient."""
    peak = case["sides"].get("fastcl", {}).get("peak_extra_bytes") if case else None
    return None if peak is None else (peak - ITEM_BYTES[case["dtype"]] * case["p"] * case["n"]) / 2**20


def targets(results: dict) -> str:
    rows = []
    case = case_of(results, "wasserstein_1d", *RATIO_AT)
    quotient = case.get("ratio", {}).get(_label(case)) if case else None
    name = "wasserstein_1d, P={}, N={:,}: times faster than eager".format(*RATIO_AT)
    rows.append([name, against(quotient and quotient["median"], RATIO, at_most=False)])
    case = case_of(results, "wasserstein_1d", *FLOOR_AT)
    floor = max(floors(case, results.get("ceilings", {})).values(), default=None) if case else None
    ours = device_ms(case)
    name = "wasserstein_1d, P={}, N={:,}: time over the larger floor".format(*FLOOR_AT)
    rows.append([name, against(ours and floor and ours / floor, OF_FLOOR)])
    lean = [c for c in results.get("cases", []) if c["kind"] == "wasserstein_1d" and c["n"] <= LONGEST_LEAN]
    for case in sorted(lean, key=lambda c: (c["p"], c["n"])):
        if case["other"] == "eager":
            name = f"wasserstein_1d, P={case['p']}, N={case['n']:,}: MiB beyond the gradient"
            rows.append([name, against(beyond_gradient(case), EXTRA_MIB)])
    for kind in SIBLINGS:
        case = case_of(results, kind, 128, 8192, "nt_xent")
        ours, base = device_ms(case), device_ms(case, "nt_xent")
        name = f"{kind}, M=8,192: time over that of nt_xent"
        rows.append([name, against(ours and base and ours / base, SIBLING_RATIO)])
    return reporting.table(["target", "reached"], rows)


def times(results: dict) -> str:
    """One row a case."""
    header = ["what", "dtype", "P", "N", "against", "ours ms", "in a graph ms", "its ms", "in a graph ms", "ratio"]
    header += ["of bytes", "of shared", "GiB", "its GiB", "error loss / grad / worst row", "its error"]
    rows = []
    order = sorted(results.get("cases", []), key=lambda c: (c["kind"], c["dtype"], c["p"], c["n"], c["other"]))
    for case in order:
        label, found = _label(case), floors(case, results.get("ceilings", {}))
        ours, other, reached = case["sides"].get("fastcl", {}), case["sides"].get(case["other"], {}), device_ms(case)
        shares = [f"{found[k] / reached:.0%}" if reached and k in found else "-" for k in ("bytes", "shared")]
        rows.append([
            case["kind"], case["dtype"], case["p"], f"{case['n']:,}", LABELS.get(case["other"], case["other"]),
            reporting.spread(ms_of(case, "fastcl", label)) if ms_of(case, "fastcl", label) else why(ours),
            reporting.spread(ours.get("graph_ms")),
            reporting.spread(ms_of(case, case["other"], label)) if ms_of(case, case["other"], label) else why(other),
            reporting.spread(other.get("graph_ms")),
            reporting.spread(case.get("ratio", {}).get(label), "×"), *shares,
            gib(ours.get("peak_extra_bytes")), gib(other.get("peak_extra_bytes")), error(ours), error(other),
        ])  # fmt: skip
    return reporting.table(header, rows)


def markdown(results: dict) -> str:
    parts = [
        *opening("Sorts and sliced Wasserstein distance", results),
        "## Targets (H200)", targets(results),
        *ceilings(results),
        "## Times, memory and errors",
        "Medians (quartiles). Both sides took turns in one process, on inputs that rotate so that the L2 does not "
        "hold them. Of bytes, of shared: the time that the bytes of all inputs and outputs take at the copy bandwidth, "
        "and that the accesses to shared memory take at one a lane and clock, over the time reached (in a graph where "
        "there is one). GiB: peak beyond the inputs, gradients included. P and N of the siblings of nt_xent are "
        "features and rows. Errors: relative, against float64, of what draws nothing. wasserstein_1d and "
        "swd_loss: forward and backward; segmented_sort: values and indices.",
        times(results),
        *closing(results),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def write(results: dict, folder: Path) -> None:
    """swd.json first: nothing that the other may trip over loses the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    reporting.write_json(folder / "swd.json", results)
    (folder / "swd.md").write_text(markdown(results))
