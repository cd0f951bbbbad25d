"""Registration and dispatch of the ops: which implementation serves which tensors, in one place.

    CPU tensor   -> C++ (`fastcl._C`, csrc/cpu) where it is built, else chunked torch
    CUDA tensor  -> what is matrix-shaped: Triton (fastcl/kernels) where it is installed; float64 and more than 4,096
                    features chunked torch
                    what is permutation-shaped (the sorts): CUDA (csrc/cuda) where `fastcl._C` was built with it;
                    float64 chunked torch

The schemas are those of csrc/ops.cpp; a test holds the two lists against each other.
"""

from __future__ import annotations

import importlib.util

import torch

from .. import _native
from . import chunked

SCHEMAS = {
    "normalize_pair": "(Tensor x1, Tensor x2, bool normalize) -> (Tensor, Tensor, Tensor)",
    "lse_forward": "(Tensor a, Tensor? b, Tensor scale, float bound, int offset, SymInt pair) -> Tensor",
    "lse_backward": (
        "(Tensor a, Tensor? b, Tensor scale, float bound, int offset, SymInt pair, "
        "Tensor lse_a, Tensor? lse_b, Tensor? w_a, Tensor? w_b) -> Tensor"
    ),
    "pair_backward": (
        "(Tensor z, Tensor rnorm, Tensor grad_lse, Tensor lse_coef, Tensor pull, ScalarType dtype) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "segmented_sort": "(Tensor x, bool descending) -> (Tensor, Tensor)",
    "wasserstein_1d": "(Tensor x, Tensor y, bool per_row) -> (Tensor, Tensor)",
}
# Permutations: C++ and CUDA. The others are matrix-shaped: C++ and Triton.
SORTS = ("segmented_sort", "wasserstein_1d")
TRITON = importlib.util.find_spec("triton") is not None
# Features a row of the Triton kernels may have: a row-local program holds whole rows in registers.
WIDEST = 4096
# Kept alive as long as the package: torch drops registrations with their library object.
_library = torch.library.Library("fastcl", "FRAGMENT")


def backends(name: str) -> dict[str, str]:
    """What serves the tensors of each device type in this op, and why."""
    cpu = f"{'C++' if _native.LOADED else 'chunked torch'}: {_native.REASON}"
    if name in SORTS:
        built = "CUDA (float64: chunked torch)", "chunked torch: the extension was built without CUDA"
        return {"cpu": cpu, "cuda": built[not _native.CUDA]}
    triton = "Triton (float64 or D > 4,096: chunked torch)", "chunked torch: triton is not installed"
    return {"cpu": cpu, "cuda": triton[not TRITON]}


def _triton_serves(x: torch.Tensor) -> bool:
    """Every floating type but float64, and rows that fit the row-local kernels."""
    return TRITON and x.dtype != torch.float64 and x.shape[1] <= WIDEST


def product_dtype(x: torch.Tensor, unit: bool) -> torch.dtype:
    """The type in which rows like x are multiplied."""
    if x.is_cuda and _triton_serves(x):
        from ..kernels import host

        return host.product_dtype(x.dtype, unit)
    return chunked.compute_dtype(x.dtype)


def _on_cuda(name: str):
    """The CUDA implementation of an op."""
    fallback, sorts = getattr(chunked, name), name in SORTS
    if not (_native.CUDA if sorts else TRITON):
        return fallback

    def dispatch(first, *args):
        if not (first.dtype != torch.float64 if sorts else _triton_serves(first)):
            return fallback(first, *args)
        # Here and not above: importing Triton takes a second, which a CPU user need not pay.
        if sorts:
            from ..kernels import sort as host
        else:
            from ..kernels import host

        # Kernels are launched on the current device, which need not be the tensors'.
        with torch.cuda.device(first.device):
            return getattr(host, name)(first, *args)

    return dispatch


def _rows_like(x: torch.Tensor, rows: int, normalize: bool) -> torch.Tensor:
    """The rows that normalize_pair returns, uninitialised, for the fake implementation."""
    if x.is_cuda and _triton_serves(x):
        from ..kernels import host

        return host.empty_rows(x, rows, x.shape[1], product_dtype(x, normalize))
    return x.new_empty((rows, x.shape[1]), dtype=chunked.compute_dtype(x.dtype))


def _normalize_pair_fake(x1, x2, normalize):
    rows = x1.shape[0] + x2.shape[0]
    dtype = chunked.compute_dtype(x1.dtype)
    rnorm = x1.new_empty(rows if normalize else 0, dtype=dtype)
    return _rows_like(x1, rows, normalize), rnorm, x1.new_empty(x1.shape[0], dtype=dtype)


def _lse_forward_fake(a, b, scale, bound, offset, pair):
    return a.new_empty(a.shape[0], dtype=torch.float64)


def _lse_backward_fake(a, b, scale, bound, offset, pair, lse_a, lse_b, w_a, w_b):
    return a.new_empty(a.shape, dtype=chunked.compute_dtype(a.dtype))


def _pair_backward_fake(z, rnorm, grad_lse, lse_coef, pull, dtype):
    rows, d = z.shape
    dx = [z.new_empty((rows // 2, d), dtype=dtype) for _ in range(2)]
    return *dx, z.new_empty(rows, dtype=chunked.compute_dtype(z.dtype))


def _segmented_sort_fake(x, descending):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.int32)


def _wasserstein_1d_fake(x, y, per_row):
    cost = x.new_empty(x.shape) if per_row else x.new_empty(x.shape[0], dtype=torch.float64)
    return cost, x.new_empty(x.shape)


_FAKES = {
    "normalize_pair": _normalize_pair_fake,
    "lse_forward": _lse_forward_fake,
    "lse_backward": _lse_backward_fake,
    "pair_backward": _pair_backward_fake,
    "segmented_sort": _segmented_sort_fake,
    "wasserstein_1d": _wasserstein_1d_fake,
}

for _name, _schema in SCHEMAS.items():
    if _native.LOADED and not hasattr(torch.ops.fastcl, _name):
        raise ImportError(f"fastcl: the C++ extension is older than the package and lacks {_name}: build it again")
    if not _native.LOADED:
        _library.define(_name + _schema)
        _library.impl(_name, getattr(chunked, _name), "CPU")
    _library.impl(_name, _on_cuda(_name), "CUDA")
    torch.library.register_fake(f"fastcl::{_name}", _FAKES[_name], lib=_library)

normalize_pair = torch.ops.fastcl.normalize_pair.default
lse_forward = torch.ops.fastcl.lse_forward.default
lse_backward = torch.ops.fastcl.lse_backward.default
pair_backward = torch.ops.fastcl.pair_backward.default
segmented_sort = torch.ops.fastcl.segmented_sort.default
wasserstein_1d = torch.ops.fastcl.wasserstein_1d.default
