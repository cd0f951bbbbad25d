"""Launch parameters of every Triton kernel: one static table.

Static, because autotuning at import or at the first call costs seconds, makes results depend on the machine's
mood and fails without a driver. `python benchmarks/tune.py` sweeps the candidates on the GPU at hand and
prints this table. `python tests/aot_report.py --all` compiles all of it and shows registers and spills.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Bound on the scratch of the wide-feature backward, whatever the batch.
SCRATCH_BYTES = 256 * 2**20
# Partial sums a row in the forward passes, and partial gradients a row in the backward.
MAX_PARTIALS = 64
MAX_GRAD_PARTIALS = 16
# Tiles added to one register accumulator before it is flushed to memory: fp32 sums of thousands of tiles one by
# one lose three digits.
FLUSH_TILES = 128
# Programs that a rectangular pass aims at: about two waves of the largest chips.
TARGET_PROGRAMS = 264

# Of a multiprocessor, and the most of a thread.
REGISTERS, MOST_REGISTERS = 65536, 255


@dataclass(frozen=True)
class Tile:
    """One launch: tile rows, tile columns, features per step, warps, software-pipeline stages, and how many programs
    the registers of a multiprocessor shall hold at least."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    programs: int = 1

    @property
    def options(self) -> dict:
        # FP fusion by name: one FMA for acc * c - shift, and its default changes between Triton releases.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        registers = REGISTERS // (32 * self.num_warps * self.programs)
        return options | ({"maxnreg": registers} if registers < MOST_REGISTERS else {})


GENERATIONS = (80, 90, 100)


def _everywhere(tile: Tile) -> dict[int, Tile]:
    return dict.fromkeys(GENERATIONS, tile)


# pass -> element bytes -> {largest d: {GPU generation: tile}}; None is every larger d, read in chunks of block_d.
# Float32 has no row-owned backward: three products a tile in registers spill, so its weights go to scratch.
TABLE: dict[str, dict[int, dict[int | None, dict[int, Tile]]]] = {
    "lse_symmetric": {
        2: {
            64: _everywhere(Tile(64, 128, 64, 4, 3)),
            128: _everywhere(Tile(64, 128, 128, 4, 3)),
            256: _everywhere(Tile(64, 64, 256, 8, 2)),
            None: _everywhere(Tile(64, 64, 64, 8, 3)) | {90: Tile(64, 128, 64, 8, 3, 2)},
        },
        4: {None: _everywhere(Tile(64, 64, 16, 8, 2))},
    },
    "lse_rows": {
        2: {
            64: _everywhere(Tile(128, 128, 64, 8, 3)),
            # Shared memory holds a second program beside two stages, not beside three.
            128: _everywhere(Tile(128, 128, 128, 8, 2)) | {80: Tile(128, 128, 128, 8, 3)},
            256: _everywhere(Tile(128, 64, 256, 8, 2)),
            None: _everywhere(Tile(64, 128, 64, 8, 3)) | {90: Tile(128, 128, 64, 8, 3)},
        },
        4: {None: _everywhere(Tile(64, 32, 32, 8, 2)) | {90: Tile(64, 64, 32, 8, 2)}},
    },
    # Rows and columns at once: products and column sums in registers, as in the symmetric pass.
    "lse_two_way": {
        2: {
            64: _everywhere(Tile(64, 128, 64, 4, 3)),
            128: _everywhere(Tile(64, 128, 128, 4, 3)) | {100: Tile(64, 128, 128, 8, 3)},
            256: _everywhere(Tile(64, 64, 256, 8, 2)),
            None: _everywhere(Tile(64, 64, 64, 8, 3)) | {90: Tile(64, 128, 64, 8, 3, 2)},
        },
        4: {None: _everywhere(Tile(64, 64, 16, 8, 2))},
    },
    "lse_masked": {
        2: {
            64: _everywhere(Tile(128, 64, 64, 8, 3)) | {90: Tile(128, 64, 64, 8, 3, 2)},
            128: _everywhere(Tile(128, 64, 128, 8, 3)) | {90: Tile(128, 64, 128, 8, 3, 2)},
            256: _everywhere(Tile(128, 64, 256, 8, 2)) | {80: Tile(64, 64, 256, 8, 2)},
            None: _everywhere(Tile(64, 64, 64, 8, 3)) | {90: Tile(128, 64, 64, 8, 3, 2)},
        },
        4: {None: _everywhere(Tile(64, 32, 32, 8, 2))},
    },
    "lse_backward": {
        2: {
            64: _everywhere(Tile(128, 64, 64, 8, 3)) | {90: Tile(128, 64, 64, 4, 3)},
            128: _everywhere(Tile(64, 64, 128, 8, 2)) | {90: Tile(64, 128, 128, 4, 2)},
            256: _everywhere(Tile(64, 64, 256, 8, 1)) | {90: Tile(64, 64, 256, 8, 2)},
        },
        4: {},
    },
    # Two exponentials an element need more registers.
    "lse_backward_online": {
        2: {
            64: _everywhere(Tile(128, 64, 64, 8, 3)) | {90: Tile(64, 64, 64, 4, 3)},
            128: _everywhere(Tile(64, 64, 128, 8, 2)) | {90: Tile(64, 64, 128, 4, 3)},
            256: _everywhere(Tile(64, 64, 256, 8, 1)) | {90: Tile(64, 64, 256, 8, 2)},
        },
        4: {},
    },
    "lse_weight": {
        2: {None: _everywhere(Tile(64, 64, 64, 8, 3)) | {90: Tile(128, 64, 64, 8, 3)}},
        4: {None: _everywhere(Tile(64, 32, 32, 8, 2)) | {90: Tile(64, 64, 32, 8, 2)}},
    },
    "softplus_rows": {
        2: {
            64: _everywhere(Tile(128, 64, 64, 8, 3)),
            128: _everywhere(Tile(128, 64, 128, 8, 3)),
            256: _everywhere(Tile(128, 64, 256, 8, 2)) | {80: Tile(64, 64, 256, 8, 2)},
            None: _everywhere(Tile(64, 64, 64, 8, 3)) | {90: Tile(128, 64, 64, 8, 3)},
        },
        4: {None: _everywhere(Tile(64, 32, 32, 8, 2))},
    },
    "softplus_weight": {
        2: {None: _everywhere(Tile(128, 64, 64, 8, 3)) | {80: Tile(64, 64, 64, 8, 3)}},
        4: {None: _everywhere(Tile(64, 32, 32, 8, 2))},
    },
    "stats": {
        2: {None: _everywhere(Tile(64, 64, 64, 8, 3)) | {90: Tile(128, 64, 64, 8, 3)}},
        4: {None: _everywhere(Tile(64, 32, 32, 8, 2))},
    },
}


@functools.cache
def generation(device: torch.device) -> int:
    """The column of the table for a device: 80 (Ampere and all without their own), 90 (Hopper), 100 (Blackwell)."""
    if device.type != "cuda":
        return 90
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


def tile(name: str, x: torch.Tensor) -> tuple[Tile, bool] | None:
    """(tile, chunked) of a pass over rows like x [*, d], or None where the pass does not cover that width."""
    for width, tiles in TABLE[name][x.element_size()].items():
        if width is None or x.shape[1] <= width:
            return tiles[generation(x.device)], width is None
    return None


def row_block(d: int, budget: int = 4096) -> tuple[int, int]:
    """(rows, padded d) a program of a row-local pass holds: about `budget` elements of each operand."""
    block_d = max(16, 1 << (d - 1).bit_length())
    return max(1, budget // block_d), block_d
