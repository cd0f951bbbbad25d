"""Host side of the Triton kernels: the four ops of `fastcl.ops` on CUDA tensors.

Shapes are checked by the losses, types are chosen here: rows that are normalised are rounded to fp16 whatever
16-bit type they came in, because unit rows fit its range and it keeps three bits more than bf16.
No function here waits for the device.
"""

from __future__ import annotations

import math

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .lse_backward import lse_backward_kernel, lse_weight_kernel, row_weight_kernel
from .lse_rows import lse_combine_kernel, lse_rows_kernel
from .lse_symmetric import lse_symmetric_kernel
from .rows import normalize_pair_kernel, pair_backward_kernel
from .tiles import RANGE, UNIT_SLACK

ROW_OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
VECTOR_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
VECTOR_BLOCK = 128


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


def normalize_pair(x1, x2, normalize: bool):
    n, d = x1.shape
    z = empty_rows(x1, 2 * n, d, product_dtype(x1.dtype, normalize))
    rnorm = x1.new_empty(2 * n if normalize else 0, dtype=torch.float32)
    pos = x1.new_empty(n, dtype=torch.float32)
    if n:
        block_m, block_d = launch.row_block(d)
        normalize_pair_kernel[(triton.cdiv(n, block_m),)](
            x1, x2, z, rnorm, pos, n, d, *x1.stride(), *x2.stride(), z.stride(0),
            NORMALIZE=normalize, BLOCK_M=block_m, BLOCK_D=block_d, **ROW_OPTIONS,
        )  # fmt: skip
    return z, rnorm, pos


def pair_backward(z, rnorm, grad_lse, lse_coef, pull, dtype):
    n, d = z.shape[0] // 2, z.shape[1]
    dx1, dx2 = z.new_empty((n, d), dtype=dtype), z.new_empty((n, d), dtype=dtype)
    rowdot = z.new_empty(2 * n, dtype=torch.float32)
    if n:
        block_m, block_d = launch.row_block(d)
        pair_backward_kernel[(triton.cdiv(n, block_m),)](
            z, rnorm, grad_lse, lse_coef, pull, dx1, dx2, rowdot, n, d, z.stride(0),
            NORMALIZE=rnorm.numel() > 0, BLOCK_M=block_m, BLOCK_D=block_d, **ROW_OPTIONS,
        )  # fmt: skip
    return dx1, dx2, rowdot


def fixed_shift_fits(bound: float, cols: int) -> bool:
    """Whether one constant shift keeps sums over `cols` exponentials of |S| <= bound in the fp32 range."""
    return 2 * bound * UNIT_SLACK.value * math.log2(math.e) + math.log2(max(cols, 1)) <= 2 * RANGE.value


class _Range:
    """Which of the two exponential paths to launch, and what the kernels read to agree with it.

    The host chooses where it knows the bound on |S|. Where only the device knows it (a temperature on the
    device, rows of any length) both are launched and one of them returns at once: no synchronisation.
    """

    def __init__(self, a, b, scale, bound: float, cols: int):
        self.scale = scale.reshape(())
        self.log2_cols = math.log2(max(cols, 1))
        self.norms = None
        self.check = bound < 0
        if self.check:
            self.paths = (False, True)
            # fp32 whatever the rows are: the square of an fp16 row of length 300 is infinite in fp16.
            longest = torch.linalg.vector_norm(a, dim=1, dtype=torch.float32).amax()
            other = longest if b is None else torch.linalg.vector_norm(b, dim=1, dtype=torch.float32).amax()
            self.norms = longest * other
        else:
            self.paths = (not fixed_shift_fits(bound, cols),)

    def constants(self, online_max: bool) -> dict:
        return {"ONLINE_MAX": online_max, "CHECK_RANGE": self.check}


def _precision(dtype: torch.dtype) -> str:
    """fp32 products follow torch.set_float32_matmul_precision; "highest" is fp32-accurate on tensor cores too."""
    # Not torch.get_float32_matmul_precision, which raises once precision was set through torch.backends.
    exact = torch.backends.cuda.matmul.fp32_precision in ("none", "ieee")
    return "tf32x3" if dtype == torch.float32 and exact else "tf32"


def _descriptor(x, block_rows: int, block_d: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [block_rows, block_d])


def lse_forward(a, b, scale, bound: float, offset: int, pair: int):
    rows = a.shape[0]
    columns = a if b is None else b
    lse = a.new_empty(rows, dtype=torch.float64)
    if rows == 0:
        return lse
    if columns.shape[0] == 0:
        return lse.fill_(-math.inf)
    a = aligned_rows(a)
    b = None if b is None else aligned_rows(b)
    reach = _Range(a, b, scale, bound, columns.shape[0])
    for online_max in reach.paths:
        if b is None and not online_max:
            part, part_max = _partials_symmetric(a, pair, reach)
        else:
            part, part_max = _partials_rows(a, a if b is None else b, offset, pair, reach, online_max)
        lse_combine_kernel[(triton.cdiv(rows, VECTOR_BLOCK),)](
            part, part_max, reach.scale, reach.norms, lse, rows, part.shape[0], reach.log2_cols,
            BLOCK_M=VECTOR_BLOCK, **reach.constants(online_max), **VECTOR_OPTIONS,
        )  # fmt: skip
    return lse


def _partials_symmetric(z, pair: int, reach: _Range):
    m, d = z.shape
    tile, chunked = launch.tile("lse_symmetric", z)
    blocks = triton.cdiv(m, tile.block_n)
    per_super = triton.cdiv(blocks, launch.MAX_PARTIALS)
    supers = triton.cdiv(blocks, per_super)
    part = z.new_empty((supers, m), dtype=torch.float32)
    lse_symmetric_kernel[(supers * (supers + 1) // 2,)](
        _descriptor(z, tile.block_m, tile.block_d), _descriptor(z, tile.block_n, tile.block_d),
        reach.scale, reach.norms, part, m, d, pair, blocks, per_super, reach.log2_cols,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, CHUNKED=chunked,
        PRECISION=_precision(z.dtype), CHECK_RANGE=reach.check, **tile.options,
    )  # fmt: skip
    return part, part


def _split(row_blocks: int, col_blocks: int, most: int, least: int = 1) -> tuple[int, int]:
    """(splits, column blocks a split): enough programs for the chip, at most `most` partials a row."""
    wanted = min(most, max(least, launch.TARGET_PROGRAMS // row_blocks))
    per_split = triton.cdiv(col_blocks, wanted)
    return triton.cdiv(col_blocks, per_split), per_split


def _partials_rows(a, b, offset: int, pair: int, reach: _Range, online_max: bool):
    rows, cols, d = a.shape[0], b.shape[0], a.shape[1]
    tile, chunked = launch.tile("lse_rows", a)
    row_blocks = triton.cdiv(rows, tile.block_m)
    col_blocks = triton.cdiv(cols, tile.block_n)
    # Also enough splits that none adds up more tiles one by one than a fp32 sum takes.
    least = triton.cdiv(col_blocks, launch.FLUSH_TILES)
    splits, per_split = _split(row_blocks, col_blocks, launch.MAX_PARTIALS, least)
    part = a.new_empty((splits, rows), dtype=torch.float32)
    part_max = torch.empty_like(part) if online_max else part
    lse_rows_kernel[(row_blocks, splits)](
        _descriptor(a, tile.block_m, tile.block_d), _descriptor(b, tile.block_n, tile.block_d),
        reach.scale, reach.norms, part, part_max, rows, cols, d, offset, pair, per_split, reach.log2_cols,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, CHUNKED=chunked,
        PRECISION=_precision(a.dtype), **reach.constants(online_max), **tile.options,
    )  # fmt: skip
    return part, part_max


def _row_weights(lse, w, reach: _Range, weight_bits: int):
    """(u, k) of one side of the tile weights, for the path or paths that will run."""
    rows = lse.shape[0]
    u, k = (lse.new_empty(rows, dtype=torch.float32) for _ in range(2))
    for online_max in reach.paths:
        row_weight_kernel[(triton.cdiv(rows, VECTOR_BLOCK),)](
            lse, w, reach.scale, reach.norms, u, k, rows, reach.log2_cols, WEIGHT_BITS=weight_bits,
            BLOCK_M=VECTOR_BLOCK, **reach.constants(online_max), **VECTOR_OPTIONS,
        )  # fmt: skip
    return u, k


def lse_backward(a, b, scale, bound: float, offset: int, pair: int, lse_a, lse_b, w_a, w_b):
    (rows, d), columns = a.shape, a if b is None else b
    if rows == 0 or columns.shape[0] == 0:
        return a.new_zeros((rows, d), dtype=torch.float32)
    has_col = b is None or lse_b is not None
    a = aligned_rows(a)
    b = None if b is None else aligned_rows(b)
    reach = _Range(a, b, scale, bound, columns.shape[0])
    weight_bits = 14 if a.dtype == torch.float16 else 0
    row_side = col_side = _row_weights(lse_a, w_a, reach, weight_bits)
    if b is None:
        b = a
    elif has_col:
        col_side = _row_weights(lse_b, w_b, reach, weight_bits)
    constants = {"HAS_COL": has_col, "PRECISION": _precision(a.dtype)}
    operands = (a, b, *row_side, *col_side)
    backward = _backward_wide if launch.tile("lse_backward", a) is None else _backward_tiles
    return backward(operands, offset, pair, reach, constants, weight_bits)


def _backward_tiles(operands, offset: int, pair: int, reach: _Range, constants: dict, weight_bits: int):
    a, b, *sides = operands
    (rows, d), cols = a.shape, b.shape[0]
    tiles = {path: launch.tile("lse_backward_online" if path else "lse_backward", a)[0] for path in reach.paths}
    # Where both paths are launched either writes the same partial gradients; a split without columns writes zeros.
    row_blocks = min(triton.cdiv(rows, tile.block_m) for tile in tiles.values())
    col_blocks = min(triton.cdiv(cols, tile.block_n) for tile in tiles.values())
    splits, _ = _split(row_blocks, col_blocks, launch.MAX_GRAD_PARTIALS)
    part = a.new_empty((splits, rows, d), dtype=torch.float32)
    for online_max, tile in tiles.items():
        per_split = triton.cdiv(triton.cdiv(cols, tile.block_n), splits)
        lse_backward_kernel[(triton.cdiv(rows, tile.block_m), splits)](
            _descriptor(a, tile.block_m, tile.block_d), _descriptor(b, tile.block_n, tile.block_d),
            reach.scale, reach.norms, *sides, part, rows, cols, d, offset, pair, per_split, reach.log2_cols,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, WEIGHT_BITS=weight_bits,
            FLUSH=launch.FLUSH_TILES, **constants, **reach.constants(online_max), **tile.options,
        )  # fmt: skip
    return part[0] if splits == 1 else part.sum(0)


def _backward_wide(operands, offset: int, pair: int, reach: _Range, constants: dict, weight_bits: int):
    """Weights of a chunk of rows into bounded scratch, then one matrix product: for any width."""
    a, b, *sides = operands
    (rows, d), cols = a.shape, b.shape[0]
    tile, _ = launch.tile("lse_weight", a)
    chunk = min(rows, max(1, launch.SCRATCH_BYTES // (cols * a.element_size())))
    scratch = empty_rows(a, chunk, cols, a.dtype)
    grad = a.new_empty((rows, d), dtype=torch.float32)
    for first in range(0, rows, chunk):
        count = min(chunk, rows - first)
        for online_max in reach.paths:
            lse_weight_kernel[(triton.cdiv(cols, tile.block_n), triton.cdiv(count, tile.block_m))](
                _descriptor(a, tile.block_m, tile.block_d), _descriptor(b, tile.block_n, tile.block_d),
                reach.scale, reach.norms, *sides, scratch, rows, cols, d, offset, pair, first,
                count, scratch.stride(0), reach.log2_cols,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d,
                **constants, **reach.constants(online_max), **tile.options,
            )  # fmt: skip
        grad[first : first + count] = _product_fp32(scratch[:count], b)
    return grad.mul_(0.5**weight_bits)


def _product_fp32(weights, b):
    with torch.autocast(b.device.type, enabled=False):
        if b.dtype == torch.float32 or not b.is_cuda:
            return weights.float() @ b.float()
        return torch.mm(weights, b, out_dtype=torch.float32)
