"""One small mistake in the library, and the test that has to notice it."""

from __future__ import annotations

from typing import NamedTuple

KERNELS = "tests/test_kernels.py::"
ROW_KERNELS = "tests/test_row_kernels.py::"
LAUNCHES = "tests/test_launches.py::"
NT_XENT = "tests/test_nt_xent.py::"
INPUTS = "tests/test_inputs.py::"
MODULE = "tests/test_module.py::"
SORT = "tests/test_sort.py::"
WASSERSTEIN = "tests/test_wasserstein.py::"
SWD = "tests/test_swd.py::"
SWD_INPUTS = "tests/test_swd_inputs.py::"
DRAWS = "tests/test_draws.py::"
RANKS = "tests/test_distributed.py::test_ranks"
PAIR_OPS = "tests/test_pair_ops.py::"
PAIR_KERNELS = "tests/test_pair_kernels.py::"
PAIR_TILES = "tests/test_pair_kernels_tiles.py::"
PAIR_LOSSES = "tests/test_pair_losses.py::"
PAIR_RANKS = "tests/test_distributed_pairs.py::test_ranks"


class Mutant(NamedTuple):
    """`old` occurs exactly once in `file`, so that a mutant whose code moved on is noticed at once."""

    name: str
    file: str
    old: str
    new: str
    test: str
