"""The floor of NT-Xent on the CPU: the matrix products and exponentials of its tiles, and nothing else.

Forward: the tiles on or above the diagonal, one product and one exponential each. Backward: every tile, two
products and one exponential. No sums, weights, masks or normalisation. It is the work of the row-owned algorithm
with PyTorch's product and exponential, not a bound on every algorithm: a kernel that uses one tile of the backward
for both its row blocks, or calculates exponentials faster, goes past 100%. Each tile stays in a scratch of its own
thread, and each thread runs whole tiles: a product this small does not gain from being split.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

TILE = 256


def _tiles(blocks: int, backward: bool) -> list[tuple[int, int, bool]]:
    """(row block, column block, whether the second product follows) of all tiles."""
    tiles = [(i, j, False) for i in range(blocks) for j in range(i, blocks)]
    if backward:
        tiles += [(i, j, True) for i in range(blocks) for j in range(blocks)]
    return tiles


def _work(tiles, rows: list[Tensor], columns: list[Tensor]) -> None:
    d = rows[0].shape[1]
    scratch, grad = rows[0].new_empty(TILE, TILE), rows[0].new_empty(TILE, d)
    with torch.inference_mode():
        for i, j, second in tiles:
            tile = scratch[: rows[i].shape[0], : rows[j].shape[0]]
            torch.mm(rows[i], columns[j], out=tile)
            torch.exp(tile, out=tile)
            if second:
                torch.mm(tile, rows[j], out=grad[: rows[i].shape[0]])


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    # A thread takes the number over when it first asks: now, before the main thread sets another.
    torch.get_num_threads()


def single_threaded_pool(workers: int) -> ThreadPoolExecutor:
    """Threads that are up already and run torch on one core each."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=_use_one_thread)
    started = threading.Barrier(workers)
    list(pool.map(lambda _: started.wait(), range(workers)))
    torch.set_num_threads(threads)
    return pool


def step(z: Tensor, backward: bool):
    """A function that does the work of one call on rows z [m, d], on as many threads as torch uses."""
    rows = list(z.detach().split(TILE))
    columns = [block.T for block in rows]
    tiles = _tiles(len(rows), backward)
    workers = min(torch.get_num_threads(), len(tiles))
    pool = single_threaded_pool(workers)

    def run():
        list(pool.map(lambda first: _work(tiles[first::workers], rows, columns), range(workers)))

    return run
