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
import math

import torch

from .. import _native
from . import chunked

_PAIRS = "Tensor a, Tensor? b, Tensor scale"
_IDS = "Tensor? ids_a=None, Tensor? ids_b=None, str same='keep'"
# Rows a [R, D] against columns b [C, D], none for a itself. S = scale * a @ b.T (+ bias of the column). Row i leaves
# out column i + offset, and with `pair` its partner. `same` says what becomes of the pairs that have the same id:
# "keep" (there are no ids), "drop" them, "only" them, or "sum": all stay, and the products of those of the same id are
# summed up apart. `bound` is one of |S|; where the host knows none, UNIT_ROWS or ANY_ROWS.
SCHEMAS = {
    "normalize_pair": "(Tensor x1, Tensor x2, bool normalize) -> (Tensor, Tensor, Tensor)",
    # -> rows of unit length, their values rounded to a dtype where one is given, and 1 / length or 0.
    "unit_rows": "(Tensor x, ScalarType? rounded) -> (Tensor, Tensor)",
    "unit_rows_backward": "(Tensor z, Tensor rnorm, Tensor dz, ScalarType dtype) -> Tensor",
    # -> [log-sum-exp of the rows]; columns: and of the columns; "sum": and the sum and number of a row's pairs.
    "lse_forward": (
        f"({_PAIRS}, float bound, SymInt offset, SymInt pair, *, {_IDS}, Tensor? bias=None, bool columns=False) "
        "-> Tensor[]"
    ),
    # -> [weights @ b]; columns: and weights.T @ a.
    "lse_backward": (
        f"({_PAIRS}, float bound, SymInt offset, SymInt pair, "
        "Tensor lse_a, Tensor? lse_b, Tensor? w_a, Tensor? w_b, *, "
        f"{_IDS}, Tensor? bias=None, Tensor? pull_a=None, Tensor? pull_b=None, bool columns=False) -> Tensor[]"
    ),
    # -> the rows' losses [2n], or their sum over the divisor; log-sum-exp of all that a row's sum counts; and in it the
    # share of the negatives.
    "pair_loss": (
        "(Tensor pos, Tensor lse, Tensor scale, float weight, float? pull, bool positive_counts, SymInt? divisor, "
        "ScalarType dtype) -> (Tensor, Tensor, Tensor)"
    ),
    # -> gradients of both views, and of each row in the gradient of the scale.
    "pair_backward": (
        "(Tensor z, Tensor rnorm, Tensor grad_lse, Tensor pos, Tensor share, Tensor scale, Tensor grad, Tensor? w, "
        "float weight, float? pull, SymInt divisor, ScalarType dtype) -> (Tensor, Tensor, Tensor)"
    ),
    # -> sum_j softplus(sign * S_ij + beta_i) and its slope in beta_i.
    "softplus_forward": f"({_PAIRS}, Tensor beta, float sign, SymInt offset, *, {_IDS}) -> (Tensor, Tensor)",
    "softplus_backward": (
        f"({_PAIRS}, float sign, SymInt offset, Tensor? beta_a, Tensor? beta_b, Tensor? w_a, Tensor? w_b, *, {_IDS}) "
        "-> Tensor"
    ),
    # Forward and the gradients of both operands from one visit of each tile.
    "softplus_both": (
        f"(Tensor a, Tensor b, Tensor scale, Tensor beta, float sign, SymInt offset, Tensor? w=None, *, {_IDS}) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    # -> log-sum-exp, largest and mean (under the softmax) similarity of each row.
    "similarity_stats": f"({_PAIRS}, SymInt offset, SymInt pair) -> (Tensor, Tensor, Tensor)",
    "segmented_sort": "(Tensor x, bool descending) -> (Tensor, Tensor)",
    "wasserstein_1d": "(Tensor x, Tensor y, bool per_row) -> (Tensor, Tensor)",
}
# Permutations: C++ and CUDA. The others are matrix-shaped: C++ and Triton.
SORTS = ("segmented_sort", "wasserstein_1d")
TRITON = importlib.util.find_spec("triton") is not None
# Features a row of the Triton kernels may have: a row-local program holds whole rows in registers.
WIDEST = 4096
# In place of a bound on |S|.
UNIT_ROWS, ANY_ROWS = -1.0, -math.inf
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
    """Every floating type but float64, and rows that fit the row-local kernels; of numbers a row, any number."""
    return TRITON and x.dtype != torch.float64 and (x.dim() < 2 or x.shape[1] <= WIDEST)


def product_dtype(x: torch.Tensor, unit: bool) -> torch.dtype:
    """The type in which rows like x are multiplied."""
    if x.is_cuda and _triton_serves(x):
        from ..kernels import host

        return host.product_dtype(x.dtype, unit)
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and _native.BF16:
        return x.dtype
    return chunked.compute_dtype(x.dtype)


def _on_cuda(name: str):
    """The CUDA implementation of an op: the first tensor says which."""
    fallback, sorts = getattr(chunked, name), name in SORTS
    if not (_native.CUDA if sorts else TRITON):
        return fallback

    def dispatch(first, *args, **options):
        if not (first.dtype != torch.float64 if sorts else _triton_serves(first)):
            return fallback(first, *args, **options)
        # Here and not above: importing Triton takes a second, which a CPU user need not pay.
        if sorts:
            from ..kernels import sort as host
        else:
            from ..kernels import host

        # Kernels are launched on the current device, which need not be the tensors'.
        with torch.cuda.device(first.device):
            return getattr(host, name)(first, *args, **options)

    return dispatch


def _rows_like(x: torch.Tensor, rows: int, normalize: bool) -> torch.Tensor:
    """The rows that normalize_pair returns, uninitialised, for the fake implementation."""
    if x.is_cuda and _triton_serves(x):
        from ..kernels import host

        return host.empty_rows(x, rows, x.shape[1], product_dtype(x, normalize))
    return x.new_empty((rows, x.shape[1]), dtype=product_dtype(x, normalize))


def _normalize_pair_fake(x1, x2, normalize):
    rows = x1.shape[0] + x2.shape[0]
    dtype = chunked.compute_dtype(x1.dtype)
    rnorm = x1.new_empty(rows if normalize else 0, dtype=dtype)
    return _rows_like(x1, rows, normalize), rnorm, x1.new_empty(x1.shape[0], dtype=dtype)


def _unit_rows_fake(x, rounded):
    return _rows_of(x), x.new_empty(x.shape[0], dtype=chunked.compute_dtype(x.dtype))


def _unit_rows_backward_fake(z, rnorm, dz, dtype):
    return z.new_empty(z.shape, dtype=dtype)


def _column_count(a, b):
    return a.shape[0] if b is None else b.shape[0]


def _numbers(a, rows, dtype=torch.float64):
    return a.new_empty(rows, dtype=dtype)


def _rows_of(x):
    return x.new_empty(x.shape, dtype=chunked.compute_dtype(x.dtype))


def _lse_forward_fake(a, b, scale, bound, offset, pair, *, same="keep", columns=False, **_):
    lse = _numbers(a, a.shape[0])
    if same == "sum":
        return [lse, _numbers(a, a.shape[0]), _numbers(a, a.shape[0], torch.int64)]
    return [lse, _numbers(a, _column_count(a, b))] if columns else [lse]


def _lse_backward_fake(a, b, scale, bound, offset, pair, lse_a, lse_b, w_a, w_b, *, columns=False, **_):
    return [_rows_of(a), _rows_of(b)] if columns else [_rows_of(a)]


def _softplus_forward_fake(a, b, scale, beta, sign, offset, **_):
    return _numbers(a, a.shape[0]), _numbers(a, a.shape[0])


def _softplus_backward_fake(a, b, scale, sign, offset, beta_a, beta_b, w_a, w_b, **_):
    return _rows_of(a)


def _softplus_both_fake(a, b, scale, beta, sign, offset, w=None, **_):
    return _numbers(a, a.shape[0]), _numbers(a, a.shape[0]), _rows_of(a), _rows_of(b)


def _similarity_stats_fake(a, b, scale, offset, pair):
    return tuple(_numbers(a, a.shape[0]) for _ in range(3))


def _pair_loss_fake(pos, lse, scale, weight, pull, positive_counts, divisor, dtype):
    rows = lse.shape[0]
    loss = pos.new_empty(rows if divisor is None else (), dtype=dtype)
    return loss, _numbers(pos, rows), _numbers(pos, rows)


def _pair_backward_fake(z, rnorm, grad_lse, pos, share, scale, grad, w, weight, pull, divisor, dtype):
    rows, d = z.shape
    return *(z.new_empty((rows // 2, d), dtype=dtype) for _ in range(2)), _numbers(z, rows)


def _segmented_sort_fake(x, descending):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.int32)


def _wasserstein_1d_fake(x, y, per_row):
    cost = x.new_empty(x.shape) if per_row else x.new_empty(x.shape[0], dtype=torch.float64)
    return cost, x.new_empty(x.shape)


for _name, _schema in SCHEMAS.items():
    if _native.LOADED and not hasattr(torch.ops.fastcl, _name):
        raise ImportError(f"fastcl: the C++ extension is older than the package and lacks {_name}: build it again")
    if not _native.LOADED:
        _library.define(_name + _schema)
        _library.impl(_name, getattr(chunked, _name), "CPU")
    _library.impl(_name, _on_cuda(_name), "CUDA")
    torch.library.register_fake(f"fastcl::{_name}", globals()[f"_{_name}_fake"], lib=_library)

normalize_pair = torch.ops.fastcl.normalize_pair.default
unit_rows = torch.ops.fastcl.unit_rows.default
unit_rows_backward = torch.ops.fastcl.unit_rows_backward.default
lse_forward = torch.ops.fastcl.lse_forward.default
lse_backward = torch.ops.fastcl.lse_backward.default
pair_loss = torch.ops.fastcl.pair_loss.default
pair_backward = torch.ops.fastcl.pair_backward.default
softplus_forward = torch.ops.fastcl.softplus_forward.default
softplus_backward = torch.ops.fastcl.softplus_backward.default
softplus_both = torch.ops.fastcl.softplus_both.default
similarity_stats = torch.ops.fastcl.similarity_stats.default
segmented_sort = torch.ops.fastcl.segmented_sort.default
wasserstein_1d = torch.ops.fastcl.wasserstein_1d.default
