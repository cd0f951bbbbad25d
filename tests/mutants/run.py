"""Break the library on purpose, one small change at a time: each must turn the test that it names red.

    python tests/mutants/run.py                all mutants
    python tests/mutants/run.py --only csrc    those whose name, file or test contains a word
    python tests/mutants/run.py --list         what there is

Works on temporary copies of the tree, never on the checkout. First the named tests must pass unchanged; then a mutant
counts as dead only if its test fails by assertion. Exit status 1 if one survives, breaks in another way or does not
apply any more.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bf16
import checkpoints
import cuda
import drop_ins
import exchanges
import experiments
import library
import native
import pairs
import pairs_kernels
import pairs_tiles
import row_kernels
import sorting
import trainer_loop
import trainer_parts
import trainer_report
import triton_kernels
from mutant import Mutant

MUTANTS = [
    *native.MUTANTS,
    *pairs_kernels.NATIVE,
    *row_kernels.NATIVE,
    *sorting.NATIVE,
    *bf16.MUTANTS,
    *cuda.MUTANTS,
    *triton_kernels.MUTANTS,
    *pairs_kernels.TRITON,
    *pairs_tiles.MUTANTS,
    *row_kernels.TRITON,
    *library.MUTANTS,
    *pairs.MUTANTS,
    *drop_ins.MUTANTS,
    *exchanges.MUTANTS,
    *experiments.MUTANTS,
    *checkpoints.MUTANTS,
    *sorting.MUTANTS,
    *trainer_loop.MUTANTS,
    *trainer_parts.MUTANTS,
    *trainer_report.MUTANTS,
]
ROOT = Path(__file__).resolve().parents[2]
PARTS = ("csrc", "fastcl", "tests", "benchmarks", "examples", "setup.py", "pyproject.toml")
TEST_SECONDS, BUILD_SECONDS = 180, 900
# A copy whose code does not even run would turn any test red.
BROKEN = re.compile(r"\b(ImportError|ModuleNotFoundError|SyntaxError|IndentationError|NameError|CompilationError)\b")


class Copy:
    """A temporary copy of the tree, and what is run in it."""

    def __init__(self, directory: str):
        self.root = Path(directory)
        for part in PARTS:
            source, target = ROOT / part, self.root / part
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, target)

    def python(self, *arguments: str, seconds: float) -> subprocess.CompletedProcess:
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.root),
            # A mutant has the size and, within a second, the time of the original: stale bytecode would hide it.
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env=environment,
            timeout=seconds,
            capture_output=True,
            text=True,
        )

    def is_imported(self) -> bool:
        """Whether `import fastcl` means this copy, and not an installation."""
        result = self.python("-c", "import fastcl; print(fastcl.__file__)", seconds=TEST_SECONDS)
        return result.stdout.strip() == str(self.root / "fastcl" / "__init__.py")

    def test(self, *tests: str, seconds: float = TEST_SECONDS) -> tuple[dict[str, list[str]], str]:
        """{"passed", "failed", "error", "skipped": messages} and the end of the output."""
        report = self.root / "report.xml"
        report.unlink(missing_ok=True)
        try:
            result = self.python(
                "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests, seconds=seconds
            )
        except subprocess.TimeoutExpired:
            return {}, f"no result after {seconds:.0f} s"
        outcomes: dict[str, list[str]] = {}
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
            problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            kind = "passed" if problem is None else problem.tag
            outcomes.setdefault(kind, []).append(case.get("name") if problem is None else said(problem))
        return outcomes, "\n".join((result.stdout + result.stderr).splitlines()[-15:])

    def build(self) -> str:
        """Build the C++ extension; what went wrong, or an empty text."""
        result = self.python("setup.py", "build_ext", "--inplace", seconds=BUILD_SECONDS)
        if result.returncode or "building without C++ kernels" in result.stderr:
            return "\n".join((result.stdout + result.stderr).splitlines()[-15:])
        return ""


def said(problem: ElementTree.Element) -> str:
    """The message of a test that did not pass, with what the report marks as raised: a long message is cut in it."""
    raised = [line for line in (problem.text or "").splitlines() if line.startswith("E ")]
    return "\n".join([problem.get("message") or "", *raised])


def drifted(mutant: Mutant) -> str:
    """Why a mutant does not apply to the tree as it is, or an empty text."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    count = text.count(mutant.old)
    if count != 1:
        return f"the text to replace occurs {count} times in {mutant.file}, expected once"
    if mutant.file.endswith(".py"):
        try:
            compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
        except SyntaxError as error:
            return f"not Python: {error}"
    return ""


def verdict(outcomes: dict[str, list[str]], tail: str) -> str:
    """"dead", or what happened instead."""
    if set(outcomes) == {"passed"}:
        return "SURVIVED"
    failures = outcomes.get("failure", [])
    if not failures or "error" in outcomes:
        return "BROKEN: " + (outcomes.get("error") or [tail or "no test ran"])[0]
    message = failures[0]
    if BROKEN.search(message) or not message.startswith(("AssertionError", "assert ", "Failed: ")):
        return "BROKEN: " + message
    return "dead"


def try_mutant(mutant: Mutant, copy: Copy) -> tuple[Mutant, str, float]:
    start = time.monotonic()
    path = copy.root / mutant.file
    original = path.read_text(encoding="utf-8")
    path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        problem = copy.build() if needs_build(mutant) else ""
        result = f"BROKEN: {problem}" if problem else verdict(*copy.test(mutant.test))
    finally:
        path.write_text(original, encoding="utf-8")
    return mutant, result, time.monotonic() - start


def needs_build(mutant: Mutant) -> bool:
    """Of the extension; the test of a CUDA mutant compiles what it runs."""
    return mutant.file.startswith("csrc/") and not mutant.file.startswith("csrc/cuda/")


def check_unchanged(copy: Copy, mutants: list[Mutant]) -> str:
    """The named tests on the tree as it is: what is not green, or an empty text."""
    tests = sorted({mutant.test for mutant in mutants})
    outcomes, tail = copy.test(*tests, seconds=TEST_SECONDS + 10 * len(tests))
    if set(outcomes) != {"passed"} or len(outcomes["passed"]) < len(tests):
        skipped = "".join(f"\nskipped: {reason}" for reason in outcomes.get("skipped", []))
        return f"the named tests must pass on the unchanged tree:\n{tail}{skipped}"
    return ""


def run_chain(mutants: list[Mutant], copies: queue.Queue) -> list[tuple[Mutant, str, float]]:
    """Mutants one after another in one copy; those that need a build share its object files."""
    copy = copies.get()
    built: dict[Path, bytes] = {}
    try:
        if needs_build(mutants[0]):
            problem = copy.build() or check_unchanged(copy, mutants)
            if problem:
                return [(mutant, f"NOT RUN: {problem}", 0.0) for mutant in mutants]
            built = {path: path.read_bytes() for path in copy.root.glob("fastcl/_C*")}
        results = []
        for mutant in mutants:
            results.append(try_mutant(mutant, copy))
            show(*results[-1])
        return results
    finally:
        for path, content in built.items():
            path.write_bytes(content)
        copies.put(copy)


def show(mutant: Mutant, result: str, seconds: float) -> None:
    mark = "dead" if result == "dead" else result.split(":")[0]
    print(f"| {mark:8} | {mutant.name:54} | {mutant.file:33} | {seconds:5.1f} s | {mutant.test}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose name, file or test contains this")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="list the mutants and stop")
    args = parser.parse_args()
    mutants = [m for m in MUTANTS if any(args.only in text for text in (m.name, m.file, m.test))]
    if args.list:
        for mutant in mutants:
            print(f"{mutant.name} ({mutant.file}): {mutant.test}")
        return 0
    stale = [f"{mutant.name}: {problem}" for mutant in mutants if (problem := drifted(mutant))]
    if stale or not mutants:
        print("\n".join(stale) or f"no mutant matches {args.only!r}", file=sys.stderr)
        return 1
    compiled = [mutant for mutant in mutants if needs_build(mutant)]
    python = [mutant for mutant in mutants if not needs_build(mutant)]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fastcl-mutants-") as directory, ThreadPoolExecutor(args.jobs) as pool:
        copies: queue.Queue[Copy] = queue.Queue()
        everything = [Copy(f"{directory}/{index}") for index in range(args.jobs)]
        if not all(copy.is_imported() for copy in everything):
            print("`import fastcl` finds another installation than the copy", file=sys.stderr)
            return 1
        shares = [python[index :: args.jobs] for index in range(args.jobs)]
        checks = pool.map(lambda pair: check_unchanged(*pair) if pair[1] else "", zip(everything, shares, strict=True))
        problems = [problem for problem in checks if problem]
        if problems:
            print("\n".join(problems), file=sys.stderr)
            return 1
        print(f"named tests green on the unchanged tree: {time.monotonic() - start:.0f} s", flush=True)
        for copy in everything:
            copies.put(copy)
        # The builds take longest, so they start first.
        chains = ([compiled] if compiled else []) + [[mutant] for mutant in python]
        results = [result for chain in pool.map(lambda chain: run_chain(chain, copies), chains) for result in chain]
    alive = [(mutant, result) for mutant, result, _ in results if result != "dead"]
    for mutant, result in alive:
        print(f"\n{mutant.name} ({mutant.file}, {mutant.test}): {result}")
    print(f"\n{len(results) - len(alive)} of {len(results)} mutants dead in {time.monotonic() - start:.0f} s")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
