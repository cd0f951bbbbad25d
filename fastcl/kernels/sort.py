"""Host side of the CUDA kernels: the sorts of `fastcl.ops` on CUDA tensors, float64 excepted.

Allocates results, and scratch for rows that do not fit in shared memory: none up to 16,384 elements. No function
here waits for the device, and all can be captured in a graph. The caller has made the tensors' device the current one.
"""

from __future__ import annotations

import torch

from .. import _native

LONGEST = 2**31 - 2**16  # positions in a row are int32, and blocks look ahead
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _scratch(like: torch.Tensor, size: int) -> torch.Tensor:
    return like.new_empty(size, dtype=torch.uint8)


def _check(op: str, name: str, x: torch.Tensor, dtypes) -> None:
    """What the kernels rely on: they take addresses and sizes."""
    if x.dim() != 2 or x.shape[1] > LONGEST:
        raise ValueError(f"{op}: {name} must be a matrix of at most {LONGEST} columns, got shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {' or '.join(map(str, dtypes))}, got {x.dtype}")


def segmented_sort(x: torch.Tensor, descending: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x [S, N] -> values [S, N], int32 indices [S, N]."""
    _check("segmented_sort", "x", x, DTYPE_NAMES)
    native = _native.module
    x = x.contiguous()
    values, indices = torch.empty_like(x), torch.empty_like(x, dtype=torch.int32)
    scratch = _scratch(x, native.cuda_segmented_sort_scratch(*x.shape))
    native.cuda_segmented_sort(
        x.data_ptr(), values.data_ptr(), indices.data_ptr(), *x.shape,
        getattr(native.CudaDtype, DTYPE_NAMES[x.dtype]), descending, scratch.data_ptr(), _stream(),
    )  # fmt: skip
    return values, indices


def wasserstein_1d(x: torch.Tensor, y: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x [P, M], y [P, K] -> cost, float64 [P] or with per_row [P, M], and gradient [P, M]."""
    for name, tensor in (("x", x), ("y", y)):
        _check("wasserstein_1d", name, tensor, (torch.float32,))
        if tensor.shape[1] == 0:
            raise ValueError(f"wasserstein_1d: {name} must have columns, got shape {tuple(tensor.shape)}")
    if x.shape[0] != y.shape[0] or x.device != y.device:
        raise ValueError(
            "wasserstein_1d: y must have as many rows as x, on the same device, "
            f"got {tuple(x.shape)} on {x.device} and {tuple(y.shape)} on {y.device}"
        )
    native = _native.module
    x, y = x.contiguous(), y.contiguous()
    (p, m), k = x.shape, y.shape[1]
    cost = torch.empty_like(x) if per_row else x.new_empty(p, dtype=torch.float64)
    grad = torch.empty_like(x)
    scratch = _scratch(x, native.cuda_wasserstein_1d_scratch(p, m, k))
    native.cuda_wasserstein_1d(
        x.data_ptr(), y.data_ptr(), cost.data_ptr(), grad.data_ptr(), p, m, k, per_row,
        scratch.data_ptr(), _stream(),
    )  # fmt: skip
    return cost, grad
