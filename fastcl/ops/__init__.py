"""Registration and dispatch of the ops: which implementation serves which tensors, in one place.

    CPU tensor   -> C++ (`fastcl._C`, csrc/cpu) where it is built, else chunked torch
    CUDA tensor  -> Triton (fastcl/kernels) where it is installed, else chunked torch; float64 and more than 4,096
                    features always chunked torch

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
}
TRITON = importlib.util.find_spec("triton") is not None
# Features a row of the Triton kernels may have: a row-local program holds whole rows in registers.
WIDEST = 4096
# Kept alive as long as the package: torch drops registrations with their library object.
_library = torch.library.Library("fastcl", "FRAGMENT")


def backends() -> dict[str, str]:
    """What serves the tensors of each device type, and why."""
    cpu = "C++" if _native.LOADED else "chunked torch"
    cuda = "Triton (float64 or D > 4,096: chunked torch)" if TRITON else "chunked torch: triton is not installed"
    return {"cpu": f"{cpu}: {_native.REASON}", "cuda": cuda}


def _triton_serves(x: torch.Tensor) -> bool:
    """Every floating type but float64, and rows that fit the row-local kernels."""
    return TRITON and x.dtype != torch.float64 and x.shape[1] <= WIDEST


def _on_cuda(name: str):
    """The CUDA implementation of an op."""
    fallback = getattr(chunked, name)
    if not TRITON:
        return fallback

    def dispatch(first, *args):
        if not _triton_serves(first):
            return fallback(first, *args)
        # Here and not above: importing Triton takes a second, which a CPU user need not pay.
        from ..kernels import host

        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(first.device):
            return getattr(host, name)(first, *args)

    return dispatch


def _rows_like(x: torch.Tensor, rows: int, normalize: bool) -> torch.Tensor:
    """The rows that normalize_pair returns, uninitialised, for the fake implementation."""
    if x.is_cuda and _triton_serves(x):
        from ..kernels import host

        return host.empty_rows(x, rows, x.shape[1], host.product_dtype(x.dtype, normalize))
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


_FAKES = {
    "normalize_pair": _normalize_pair_fake,
    "lse_forward": _lse_forward_fake,
    "lse_backward": _lse_backward_fake,
    "pair_backward": _pair_backward_fake,
}

for _name, _schema in SCHEMAS.items():
    if not _native.LOADED:
        _library.define(_name + _schema)
        _library.impl(_name, getattr(chunked, _name), "CPU")
    _library.impl(_name, _on_cuda(_name), "CUDA")
    torch.library.register_fake(f"fastcl::{_name}", _FAKES[_name], lib=_library)

normalize_pair = torch.ops.fastcl.normalize_pair.default
lse_forward = torch.ops.fastcl.lse_forward.default
lse_backward = torch.ops.fastcl.lse_backward.default
pair_backward = torch.ops.fastcl.pair_backward.default
