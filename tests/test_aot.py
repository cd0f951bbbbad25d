"""Ahead-of-time compilation, without a GPU: zero spills, matrix instructions, tiles and splits of the right size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from fastcl.kernels import launch, operands  # noqa: E402

REPORT = Path(__file__).with_name("aot_report.py")


def test_one_configuration_of_each_kernel():
    """In a process of its own: this one may have decorated the kernels for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, REPORT, "--json", "--arch", "90"], capture_output=True, text=True, env=environment, timeout=600
    )
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows, result.stderr
    for row in rows:
        print({key: row[key] for key in ("kernel", "dtype", "d", "tile", "registers", "stack", "matrix")})
    bad = [row for row in rows if row["problem"]]
    assert not bad, bad
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", launch.TABLE)
def test_sixteen_bit_tiles_are_not_toys(name):
    for width, tiles in launch.TABLE[name][2].items():
        for generation, tile in tiles.items():
            assert tile.block_m >= 64 and tile.block_n >= 64, (name, width, generation)


@pytest.mark.parametrize("row_blocks", [1, 100, 1024, 8192])
def test_rectangular_sums_stay_short(row_blocks):
    """At 2^20 columns no program adds up more tiles one by one than a fp32 sum takes."""
    col_blocks = 2**20 // 128
    least = col_blocks // launch.FLUSH_TILES
    splits, per_split = operands.split(row_blocks, col_blocks, launch.MAX_PARTIALS, least)
    assert per_split <= launch.FLUSH_TILES and splits <= launch.MAX_PARTIALS and splits * per_split >= col_blocks


def test_registers_leave_room_for_the_programs_of_a_tile():
    """65,536 registers of a multiprocessor; a thread has 255 at most, which nobody has to say."""
    assert launch.Tile(128, 64, 64, 8, 3, 2).options["maxnreg"] == 128
    for tile in (launch.Tile(128, 64, 64, 8, 3), launch.Tile(64, 64, 64, 4, 3, 2)):
        assert "maxnreg" not in tile.options
