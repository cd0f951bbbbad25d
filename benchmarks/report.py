"""The report of `pytest benchmarks`.

    python -m pytest benchmarks --benchmark-only --benchmark-json found.json
    python benchmarks/report.py found.json --out benchmarks/results/cpu

Writes benchmarks.md (every side of every case), summary.md (a line a case), benchmarks.png and, for the next comparison,
benchmarks.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import reporting, suite_report


def main() -> int:
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
    reporting.write_json(args.out / "benchmarks.json", results)
    (args.out / "benchmarks.md").write_text(text, encoding="utf-8")
    (args.out / "summary.md").write_text(lines + "\n", encoding="utf-8")
    suite_report.plot(results, args.out / "benchmarks.png")
    print(suite_report.targets(entries))
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
