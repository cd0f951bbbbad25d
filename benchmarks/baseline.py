"""Whether the library became slower than a committed baseline, as ratios to plain PyTorch measured beside it.

    python benchmarks/baseline.py found.json benchmarks/results/cpu/benchmarks.json

Both files are of `pytest benchmarks --benchmark-only --benchmark-json`. How many times longer plain PyTorch takes than
ours carries over from one run and machine to the next, milliseconds do not. A case is slower where that ratio has
fallen below MARGIN of what it was and its upper quartile is below the lower quartile of the baseline. Exit status: 0
nothing is slower, 1 something is, 2 the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import reporting, suite_report

# Two runs of the same code on one quiet machine differ by up to a tenth at the sizes that are measured often, and by
# more where a call takes less than a millisecond: those are told apart by their quartiles.
MARGIN = 0.85


def ratios(results: dict) -> dict[tuple, dict]:
    """{case: how many times longer plain PyTorch, or the plain sort, takes}."""
    found = {}
    for case, sides in suite_report.cases_of(results["benchmarks"]).items():
        ours = sides.get("fastcl", {}).get("faster_than_baseline")
        if ours:
            found[case] = ours
    return found


def slower(now: dict, before: dict) -> bool:
    return now["median"] < MARGIN * before["median"] and now["high"] < before["low"]


def compare(now: dict[tuple, dict], before: dict[tuple, dict]) -> tuple[str, list[tuple]]:
    """A table of what both have, and the cases that became slower."""
    lines, worse = [], []
    for case, then in before.items():
        if case in now:
            bad = slower(now[case], then)
            worse += [case] if bad else []
            quotient = now[case]["median"] / then["median"]
            kind, m, d, dtype = case
            lines.append([kind, f"{m:,}", d, dtype, reporting.spread(then, "×"), reporting.spread(now[case], "×"),
                          f"{quotient:.2f}", "SLOWER" if bad else ""])  # fmt: skip
    return reporting.table(["what", "M", "D", "dtype", "over ours, before", "now", "now / before", ""], lines), worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="this run")
    parser.add_argument("baseline", type=Path, help="the committed one")
    args = parser.parse_args()
    try:
        now, before = (ratios(json.loads(path.read_text(encoding="utf-8"))) for path in (args.json, args.baseline))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"baseline.py: expected two JSON files of pytest benchmarks, got {error!r}", file=sys.stderr)
        return 2
    if not set(now) & set(before):
        print("baseline.py: expected cases that both files have, got none", file=sys.stderr)
        return 2
    text, worse = compare(now, before)
    print(text)
    print(f"{len(worse)} of {len(set(now) & set(before))} cases are slower than the baseline")
    if absent := len(set(before) - set(now)):
        print(f"{absent} cases of the baseline were not measured")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
