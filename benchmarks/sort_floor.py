"""A reference for the sorts on the CPU: numpy's sort, on as many threads as torch uses.

Values of the same rows, no indices and nothing calculated from them. On AVX2 and AVX-512 it is a vectorised
quicksort, about the fastest comparison sort there is, and one that a fused sort may pass: it moves each element
about log2(N) times, a radix sort as often as a key has digits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.floor import single_threaded_pool


def numpy_sort(x: Tensor, y: Tensor | None = None) -> timing.Run:
    """Sorts the rows [P, N] of one or two matrices, each thread a block of them, in scratch that is there already."""
    blocks = []
    workers = torch.get_num_threads()
    for matrix in (x, y):
        if matrix is not None:
            blocks += np.array_split(matrix.detach().numpy(), workers)
    scratch = [np.empty_like(block) for block in blocks]
    pool = single_threaded_pool(workers)

    def work(first: int) -> None:
        for block, out in zip(blocks[first::workers], scratch[first::workers], strict=True):
            np.copyto(out, block)
            out.sort(axis=1)

    def run() -> list[np.ndarray]:
        list(pool.map(work, range(workers)))
        return scratch

    return run
