"""What a call of a two-view loss launches on a GPU, launch by launch, without a GPU.

At small batches launches are the time: in a CUDA graph of dependent kernels each takes about 2 microseconds to start,
against 3 for all products of 2,048 rows. Whoever adds a launch adds it here, with what it is for; docs/performance.md
has the table.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastcl.ops
from fastcl import dcl_loss, decoupled_nt_xent, nt_xent

pytest.importorskip("triton", reason="Triton is not installed")

from fastcl.kernels import host  # noqa: E402
from launches import launches  # noqa: E402

FORWARD = {
    "aten.full": "1 / temperature where kernels read it: no number of theirs, for it may be a tensor; no cached one, "
    "which might belong to the memory of another graph",
    "normalize_pair_kernel": "rows in the type of the products, their lengths, the positives",
    "lse_symmetric_kernel": "sums of exponentials of all pairs of tiles, in parts: no atomics",
    "lse_combine_kernel": "the parts, and the logarithm",
    "pair_loss_kernel": "loss of every row and what the backward needs of it",
    "sum_kernel": "their sum, by one program: no atomics",
}
BACKWARD = {
    "aten.ones_like": "autograd's: the gradient of the loss in itself",
    "row_weight_kernel": "what tiles read of every row",
    "lse_backward_kernel": "gradients of the log-sum-exps, in parts where there are fewer row blocks than programs fit",
    "aten.sum": "the parts",
    "pair_backward_kernel": "the positives' pull, upstream gradient, normalisation",
}
# fp32 gradients go through weights in memory.
BACKWARD_FP32 = {
    "aten.ones_like": BACKWARD["aten.ones_like"],
    "row_weight_kernel": BACKWARD["row_weight_kernel"],
    "lse_weight_kernel": "weights of all pairs",
    "aten.mm": "weights times rows",
    "pair_backward_kernel": BACKWARD["pair_backward_kernel"],
}
# Of a temperature that is a parameter on the device: both paths of the exponential are launched, one returns at once.
LEARNABLE = [
    *("aten.reciprocal", "aten.log", "aten.add"),  # 1 / temperature, NaN for a bad one
    "normalize_pair_kernel",
    *("lse_symmetric_kernel", "lse_rows_kernel"),  # unit rows: no lengths to look at
    *("lse_combine_kernel", "pair_loss_kernel", "sum_kernel"),
]
LEARNABLE_BACKWARD = [
    *("aten.ones_like", "row_weight_kernel"),
    *("lse_backward_kernel", "lse_backward_kernel", "aten.sum"),
    "pair_backward_kernel",
    *("aten.sum", "aten._to_copy"),  # slopes of all rows in the scale, added up in float64
    *("aten.mul", "aten.neg", "aten.mul"),  # autograd's, of the reciprocal
]


@pytest.fixture
def count(monkeypatch):
    """A function: (launches of the forward, of the backward) of a loss of 256 rows."""
    if torch.cuda.is_available():
        pytest.skip("counted on CPU tensors, in the interpreter")
    for name in set(fastcl.ops.SCHEMAS) - set(fastcl.ops.SORTS):
        monkeypatch.setattr(fastcl.ops, name, getattr(host, name))

    def counted(loss, dtype=torch.float16, temperature=0.1, **options):
        leaves = [torch.randn(128, 32).to(dtype).requires_grad_() for _ in range(2)]
        if isinstance(temperature, torch.Tensor):
            leaves.append(temperature)
        with launches(monkeypatch) as found:
            value = loss(leaves[0], leaves[1], temperature, **options)
            forward = len(found)
            grads = torch.autograd.grad(value, leaves)
        assert all(grad.isfinite().all() for grad in grads)
        return found[:forward], found[forward:]

    return counted


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [nt_xent, decoupled_nt_xent, dcl_loss])
def test_two_view_losses(loss, reduction, count):
    """11 launches forward and backward."""
    forward, backward = count(loss, reduction=reduction)
    assert forward == list(FORWARD) and backward == list(BACKWARD)


def test_float32(count):
    forward, backward = count(nt_xent, torch.float32)
    assert forward == list(FORWARD) and backward == list(BACKWARD_FP32)


def test_learnable_temperature(count):
    """20 launches."""
    forward, backward = count(nt_xent, temperature=torch.tensor(0.1, requires_grad=True))
    # The value of a tensor on the CPU is checked, that of one on a device is not.
    assert forward == ["aten._local_scalar_dense", *LEARNABLE] and backward == LEARNABLE_BACKWARD


def test_rows_of_any_length(count):
    """Their lengths are looked at once in each direction: largest norm, times itself."""
    forward, backward = count(nt_xent, normalize=False)
    lengths = ["aten.linalg_vector_norm", "aten.amax", "aten.mul"]
    assert forward == [
        *("aten.full", "normalize_pair_kernel", *lengths),
        *("lse_symmetric_kernel", "lse_rows_kernel", "lse_combine_kernel", "pair_loss_kernel", "sum_kernel"),
    ]
    assert backward == ["aten.ones_like", *lengths, *LEARNABLE_BACKWARD[1:6]]


class OnOneDevice(TorchDispatchMode):
    """Fails where a tensor of another device takes part, or a value goes to the host: neither may be captured."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert func._overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal"), func
        tensors = [x for x in _pytree.tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        assert {x.device.type for x in tensors} <= {"meta"}, f"{func} has {[x.device for x in tensors]}"
        return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("loss", [nt_xent, decoupled_nt_xent, dcl_loss])
def test_nothing_comes_from_the_host(loss, learnable, reduction, dtype):
    """On the meta device, which like a GPU has no values to read: a CUDA graph captures forward and backward."""
    leaves = [torch.empty(128, 32, dtype=dtype, device="meta", requires_grad=True) for _ in range(2)]
    temperature = torch.empty((), device="meta", requires_grad=True) if learnable else 0.1
    if learnable:
        leaves.append(temperature)
    with OnOneDevice():
        value = loss(leaves[0], leaves[1], temperature, reduction=reduction)
        grads = torch.autograd.grad(value, leaves, torch.empty_like(value))
    assert [grad.shape for grad in grads] == [x.shape for x in leaves]
