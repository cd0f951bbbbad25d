"""What the host sides of the passes share: layout of rows, choice of the exponential path, cutting of the work.

Rows that are normalised are rounded to fp16 whatever 16-bit type they came in, because unit rows fit its range and
it keeps three bits more than bf16. No function here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops import UNIT_ROWS
from . import launch
from .tiles import RANGE, UNIT_SLACK

# Of one launch over a chunk of rows: the second dimension of a grid ends at 65,535 blocks.
MOST_ROWS = 2**20


def product_dtype(dtype: torch.dtype, normalize: bool) -> torch.dtype:
    """The type of the rows in the matrix products."""
    return torch.float16 if normalize and dtype == torch.bfloat16 else dtype


def empty_rows(like: torch.Tensor, rows: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised [rows, d] whose rows start at multiples of 16 bytes, as tensor descriptors need."""
    align = 16 // dtype.itemsize
    return like.new_empty((rows, -(-d // align) * align), dtype=dtype)[:, :d]


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """x itself where descriptors can read it, else a padded copy."""
    if x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    out = empty_rows(x, *x.shape, x.dtype)
    return out.copy_(x)


def operand_pair(a: torch.Tensor, b: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns as descriptors can read them; without b the columns are the rows."""
    a = aligned_rows(a)
    return a, a if b is None else aligned_rows(b)


def vector(x: torch.Tensor | None) -> torch.Tensor | None:
    """One number a row, the next beside it in memory."""
    return None if x is None else x.contiguous()


def id_pair(b, ids_a, ids_b, same: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Ids of the rows and of the columns; without b the columns are the rows."""
    if same == "keep":
        return None, None
    ids_a = vector(ids_a)
    return ids_a, ids_a if b is None else vector(ids_b)


def fixed_shift_fits(bound: float, cols: int) -> bool:
    """Whether one constant shift keeps sums over `cols` exponentials of |S| <= bound in the fp32 range."""
    return 2 * bound * UNIT_SLACK.value * math.log2(math.e) + math.log2(max(cols, 1)) <= 2 * RANGE.value


class Range:
    """Which of the two exponential paths to launch, and what the kernels read to agree with it.

    The host chooses where it knows the bound on |S|. Where only the device knows it (a temperature on the
    device, rows of any length) both are launched and one of them returns at once: no synchronisation. Of unit rows the
    scale is all that the kernels read.
    """

    def __init__(self, a, b, scale, bound: float, cols: int):
        self.scale = scale.reshape(())
        self.log2_cols = math.log2(max(cols, 1))
        self.norms = None
        self.check = bound < 0
        if not self.check:
            self.paths = (not fixed_shift_fits(bound, cols),)
            return
        self.paths = (False, True)
        if bound != UNIT_ROWS:
            # fp32 whatever the rows are: the square of an fp16 row of length 300 is infinite in fp16.
            longest = torch.linalg.vector_norm(a, dim=1, dtype=torch.float32).amax()
            other = longest if b is None else torch.linalg.vector_norm(b, dim=1, dtype=torch.float32).amax()
            self.norms = longest * other

    def constants(self, online_max: bool) -> dict:
        return {"ONLINE_MAX": online_max, "CHECK_RANGE": self.check}


def precision(dtype: torch.dtype) -> str:
    """fp32 products follow torch.set_float32_matmul_precision; "highest" is fp32-accurate on tensor cores too."""
    # Not torch.get_float32_matmul_precision, which raises once precision was set through torch.backends.
    exact = torch.backends.cuda.matmul.fp32_precision in ("none", "ieee")
    return "tf32x3" if dtype == torch.float32 and exact else "tf32"


def descriptor(x, block_rows: int, block_d: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [block_rows, block_d])


def descriptors(a, b, tile: launch.Tile) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of the rows and of the columns of this pass."""
    return descriptor(a, tile.block_m, tile.block_d), descriptor(b, tile.block_n, tile.block_d)


def blocks_of(tile: launch.Tile) -> dict:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": tile.block_d}


def split(row_blocks: int, col_blocks: int, most: int, least: int = 1) -> tuple[int, int]:
    """(splits, column blocks a split): enough programs for the chip, at most `most` partials a row."""
    wanted = min(most, max(least, launch.TARGET_PROGRAMS // row_blocks))
    per_split = triton.cdiv(col_blocks, wanted)
    return triton.cdiv(col_blocks, per_split), per_split


def row_splits(rows: int, cols: int, tile: launch.Tile) -> tuple[int, int, int]:
    """(row blocks, splits of the columns, column blocks a split) of a pass that sums up a number a row."""
    row_blocks = triton.cdiv(rows, tile.block_m)
    col_blocks = triton.cdiv(cols, tile.block_n)
    # Also enough splits that none adds up more tiles one by one than a fp32 sum takes.
    least = triton.cdiv(col_blocks, launch.FLUSH_TILES)
    return row_blocks, *split(row_blocks, col_blocks, launch.MAX_PARTIALS, least)


def weighted_products(
    a: torch.Tensor, b: torch.Tensor, columns: bool, weight_bits: int, fill: Callable[[int, torch.Tensor], None]
) -> list[torch.Tensor]:
    """[W @ b], with `columns` also W.T @ a, for any width: `fill(first, scratch)` writes 2^weight_bits W of a chunk
    of rows, from row `first`, into bounded scratch; the products are plain matrix products."""
    rows, cols = a.shape[0], b.shape[0]
    chunk = min(rows, MOST_ROWS, max(1, launch.SCRATCH_BYTES // (cols * a.element_size())))
    scratch = empty_rows(a, chunk, cols, a.dtype)
    found = []
    for first in range(0, rows, chunk):
        chosen = slice(first, min(first + chunk, rows))
        weights = scratch[: chosen.stop - first]
        fill(first, weights)
        product = _product_fp32(weights, b)
        if chunk == rows:
            # Small batches: no copy.
            found[:1] = [product]
        else:
            found[:1] = found[:1] or [a.new_empty(a.shape, dtype=torch.float32)]
            found[0][chosen] = product
        if columns:
            product = _product_fp32(weights.T, a[chosen])
            found[1:] = [product if first == 0 else found[1].add_(product)]
    return [x.mul_(0.5**weight_bits) for x in found] if weight_bits else found


def _product_fp32(weights, b):
    with torch.autocast(b.device.type, enabled=False):
        if b.dtype == torch.float32 or not b.is_cuda:
            return weights.float() @ b.float()
        return torch.mm(weights, b, out_dtype=torch.float32)
