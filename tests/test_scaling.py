"""docs/scaling.md holds what benchmarks/scaling.py says, and its formulas what the tests of ranks count."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import roofline, scaling

PAGE = ROOT / "docs" / "scaling.md"


def test_the_tables_of_the_page_are_the_scripts():
    text = PAGE.read_text(encoding="utf-8")
    assert {name for _, name, _ in scaling.PAGE_TABLE.findall(text)} == set(scaling.TABLES)
    assert scaling.with_tables(text) == text, "run: python benchmarks/scaling.py --page docs/scaling.md"
    assert len(text.splitlines()) <= 200


def test_the_measured_table_is_the_committed_one():
    pattern = r"<!-- (benchmarks/results/\S+) -->\n\n(.*?)\n<!-- end -->"
    ((path, included),) = re.findall(pattern, PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert included == (ROOT / path).read_text()
    rows = json.loads((ROOT / path).with_suffix(".json").read_text())["rows"]
    assert included == scaling.measured_table(rows) + "\n"


def test_an_input_changes_the_tables(monkeypatch):
    before = {name: make() for name, make in scaling.TABLES.items()}
    monkeypatch.setitem(scaling.INPUTS, "element", 4)
    changed = {name for name, make in scaling.TABLES.items() if make() != before[name]}
    assert changed == set(scaling.TABLES) - {"header"}


@pytest.mark.parametrize("d", scaling.WIDTHS)
def test_products_and_bytes(d):
    """By hand: 64 ranks of 1,024 pairs. Whole waves of tiles are up to 132 tiles too many."""
    found = scaling.predict("nt_xent", 64, 1024, d)
    m, total = 2048, 64 * 2048
    products = 3 * 2 * m * total * d / (scaling.INPUTS["matrix"] * scaling.INPUTS["efficiency"][d])
    assert products <= found["compute"] <= 1.05 * products
    assert (found["held by gather"], found["held by ring"]) == (2 * total * d, 2 * 2 * m * d)
    assert found["wire of gather"] == 2 * total * d + 4 * total
    assert found["wire of ring"] == pytest.approx(2 * 63 * 2 * m * d + 4 * total)
    clip, siglip = (scaling.predict(loss, 64, 1024, d) for loss in ("clip_loss", "siglip_loss"))
    assert clip["wire of gather"] - siglip["wire of gather"] == 36 * 64 * 1024
    assert siglip["wire of ring"] == pytest.approx(3 * 63 * 2 * 1024 * d + 4 * 64 * 1024)


def test_a_gather_is_never_faster_than_its_bytes_and_takes_longer_with_more_ranks():
    size = 1e9
    times = [scaling.gather_seconds(world, size) for world in (2, 8, 16, 64, 4096)]
    assert times == sorted(times) and times[0] > size / 2 / scaling.INPUTS["nvlink"]


def test_measuring(capsys, tmp_path):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch is built without gloo")
    path = tmp_path / "found.json"
    assert scaling.main(["--measure", "--worlds", "2", "--d", "3", "--rounds", "2", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert capsys.readouterr().out == scaling.measured_table(rows) + "\n"
    for row, what in zip(rows, scaling.UNEVEN, strict=True):
        # What a way returned has been compared with the rows of all ranks.
        assert row["what"] == what and not {"padded", "broadcasts"} & set(row["refused"])
        assert min(ms["median"] for ms in row["ms"].values()) > 0


@pytest.mark.parametrize("arguments, expected", [
    (["--worlds", "1"], "--worlds: expected 2 or more, got [1]"),
    (["--d", "0"], "--d: expected 1 or more"),
    (["--rounds", "0"], "--rounds"),
    (["--page", "missing.md"], "a page that exists, got missing.md"),
    (["--json", "found.json"], "expected --measure"),
    (["--gpu"], "--gpu"),
])  # fmt: skip
def test_bad_arguments_are_one_line(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        scaling.main(arguments)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1 and expected in message, message


def test_page_in_place(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- benchmarks/scaling.py: header -->\nold\n<!-- end -->\nafter\n")
    for _ in range(2):
        assert scaling.main(["--page", str(page)]) == 0
    assert page.read_text() == (
        f"before\n<!-- benchmarks/scaling.py: header -->\n\n{scaling.header_table()}\n\n<!-- end -->\nafter\n"
    )


def test_share_of_the_exchanges(tmp_path):
    """Both exchanges on two ranks, and one rank that exchanges nothing."""
    path = tmp_path / "ranks.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "compare_ranks.py", *"--pairs 64 --d 8 --steps 3 --json".split(), path],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [(row["loss"], row["w"], row["exchange"]) for row in rows] == [
        *((loss, 1, "gather") for loss in ("nt_xent", "clip_loss")),
        *((loss, 2, exchange) for loss in ("nt_xent", "clip_loss") for exchange in ("gather", "ring")),
    ]
    for row in rows:
        times = row["exchange_ms"]["median"], row["ms"]["median"]
        assert times[0] == 0 < times[1] if row["w"] == 1 else 0 < times[0] <= times[1]
    assert done.stdout.count("\n| ") == 1 + len(rows)


def test_the_tables_of_the_performance_page_are_the_scripts():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert {name for _, name in re.findall(r"(roofline.py: )(\w+) -->", text)} == set(roofline.TABLES)
    assert roofline.with_tables(text) == text, "run: python benchmarks/roofline.py --page docs/performance.md"


def test_clocks_of_a_tile():
    """lse_symmetric: 2 * 64 * 128 * 128 FLOP at 4,096 a clock, as many exponentials as elements at 16 a clock."""
    unit = roofline.clocks("lse_symmetric")
    assert unit["matrix"] == 512 and unit["special"] == 512 == unit["elements"] / 16
    assert roofline.clocks("lse_backward")["matrix"] == 1024
    overlapped, in_turn = roofline.pass_ms("lse_backward", 2.0**32)
    assert overlapped < in_turn <= 2 * overlapped


def test_share_of_a_polynomial():
    """By hand, for lse_symmetric at 64 features on Hopper: from no share to all of it special functions fall by 512
    clocks, and eight instructions more an element take 512."""
    unit = roofline.clocks("lse_symmetric", 64)
    share = (unit["special"] - unit["issue"]) / (512 + 512)
    lines = roofline.polynomial_table().splitlines()
    row = next(line for line in lines if line.startswith("| lse_symmetric | sm_90 | 64 "))
    assert abs(float(row.split("|")[7].strip(" %")) / 100 - share) <= 0.01


def test_waves_are_whole_programs():
    """2,048 rows: 16 blocks of columns, each pair of them a program; two programs on each of 132 multiprocessors."""
    row = roofline.waves_table().splitlines()[2].split("|")
    assert [cell.strip() for cell in row[1:5]] == ["2,048", "lse_symmetric", "136", f"{136 / 264:.2f}"]


def test_measured_times_stand_beside_the_predicted_ones(tmp_path, monkeypatch):
    """Made up: not measurements of anything."""
    both, graph = ({"median": ms} for ms in (4.25, 0.125))
    cases = [
        {"dtype": "bf16", "d": 128, "m": m, "other": "eager",
         "sides": {"fastcl": {"ms": {"forward + backward": both}, "graph_ms": graph}}}
        for m in (65536, 8192)
    ]  # fmt: skip
    (tmp_path / "nvidia-some").mkdir()
    (tmp_path / "nvidia-some" / "nt_xent.json").write_text(json.dumps({"name": "NVIDIA Some", "cases": cases}))
    assert "4.25" not in roofline.targets_table()
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    lines = roofline.targets_table().splitlines()[2:]
    assert [line.split("|")[-2].strip() for line in lines] == [
        "4.25 (NVIDIA Some)", "0.125 (NVIDIA Some)", *["no GPU yet"] * 4,
    ]  # fmt: skip
    assert lines[1].startswith("| nt_xent, M=8,192, D=128, in a CUDA graph | 0.15 | 0.0")
