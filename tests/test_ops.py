"""The op registrations: schemas, fake implementations, torch.compile, dispatch."""

from __future__ import annotations

import contextlib

import pytest
import torch

from fastcl import _native, info, nt_xent, ops

OPCHECK = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def samples(dtype=torch.float32, normalize=True):
    """Arguments of every op, as the losses call them."""
    x1, x2 = torch.randn(2, 9, 5).to(dtype)
    z, rnorm, pos = ops.normalize_pair(x1, x2, normalize)
    scale = torch.tensor(3.0, dtype=pos.dtype)
    (lse,) = ops.lse_forward(z, None, scale, 3.0, 0, 9)
    (grad,) = ops.lse_backward(z, None, scale, 3.0, 0, 9, lse, None, None, None)
    w = torch.rand(18, dtype=pos.dtype)
    yield ops.normalize_pair, (x1, x2, normalize)
    unit, rnorm1 = ops.unit_rows(x1, None)
    yield ops.unit_rows, (x1, torch.bfloat16 if normalize else None)
    yield ops.unit_rows, (x1.T, None)
    yield ops.unit_rows_backward, (unit, rnorm1, torch.ones_like(unit), dtype)
    yield ops.lse_forward, (z, None, scale, 3.0, 0, 9)
    yield ops.lse_forward, (z[4:], z, scale, -1.0, 4, 7)
    yield ops.lse_backward, (z, None, scale, 3.0, 0, 9, lse, None, None, None)
    yield ops.lse_backward, (z[4:], z, scale, -1.0, 4, 7, lse[4:], lse, w[4:], w)
    yield ops.lse_backward, (z[4:], z, scale, -1.0, 4, 7, lse[4:], None, None, None)
    yield from pair_samples(z, scale, lse, w)
    share, grad_out = torch.rand(18, dtype=torch.float64), torch.ones_like(scale)
    yield ops.pair_loss, (pos, lse, scale, 1.0, None, normalize, 18, scale.dtype)
    yield ops.pair_loss, (pos, lse, scale, 0.5, 1.0, True, None, torch.float64)
    yield ops.pair_backward, (z, rnorm, grad, pos, share, scale, grad_out, None, 1.0, None, 18, dtype)
    yield ops.pair_backward, (z, rnorm, grad, pos, share, scale, grad_out, w, 0.5, 1.0, 1, dtype)
    yield ops.segmented_sort, (x1, normalize)
    yield ops.segmented_sort, (x1.T, normalize)
    rows = z.to(pos.dtype)
    yield ops.wasserstein_1d, (rows, rows[:, :3] + 1, normalize)
    yield ops.wasserstein_1d, (rows.T, rows.T + 1, normalize)


def pair_samples(z, scale, lse, w):
    """With ids, biases and the sums of the columns; softplus and statistics of pairs."""
    shared, ids = (z[4:], z, scale), torch.arange(18) // 4
    drop, sums = ({"ids_a": ids[4:], "ids_b": ids, "same": same} for same in ("drop", "sum"))
    own = {"ids_a": ids, "same": "sum"}
    columns = {"bias": w, "columns": True}
    yield ops.lse_forward, (z, None, scale, 3.0, 0, 0), own
    yield ops.lse_forward, (*shared, 3.0, 4, 0), sums
    yield ops.lse_forward, (*shared, 3.0, 4, 0), {**drop, **columns}
    yield ops.lse_backward, (z, None, scale, 3.0, 0, 0, lse, None, None, None), {**own, "pull_a": w}
    yield ops.lse_backward, (*shared, 3.0, 4, 0, lse[4:], lse, None, w), {**sums, "pull_a": w[4:], "pull_b": w}
    yield ops.lse_backward, (*shared, -1.0, 4, 0, lse[4:], lse, w[4:], w), {**drop, **columns}
    yield ops.softplus_forward, (z, None, scale, w, 1.0, 0), {**own, "same": "only"}
    yield ops.softplus_forward, (*shared, w[4:], -1.0, 18)
    yield ops.softplus_backward, (*shared, 1.0, 4, w[4:], w, None, w), drop
    yield ops.softplus_backward, (z, None, scale, -1.0, 0, w, None, w, None)
    yield ops.softplus_both, (*shared, w[4:], -1.0, 4, w[4:]), drop
    yield ops.similarity_stats, (z, None, scale, 0, 9)
    yield ops.similarity_stats, (*shared, 4, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_opcheck(dtype, normalize):
    for op, args, *options in samples(dtype, normalize):
        torch.library.opcheck(op, args, *options, test_utils=OPCHECK)


def test_schemas_agree():
    """What is registered, by C++ or by Python, is what ops.SCHEMAS says."""
    for name, schema in ops.SCHEMAS.items():
        registered = torch._C.parse_schema(str(getattr(ops, name)._schema))
        stated = torch._C.parse_schema(f"fastcl::{name}{schema}")
        assert registered == stated, f"{name}: {registered} != {stated}"


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_backends_say_why(name):
    served = ops.backends(name)
    assert served["cpu"].startswith("C++" if _native.LOADED else "chunked torch")
    assert _native.REASON in served["cpu"]
    rows = [line.split(maxsplit=2) for line in info.report().splitlines()]
    for device, serves in served.items():
        assert [name, device, serves] in rows


def test_what_serves_cuda_tensors():
    """Triton the matrices, CUDA the sorts."""
    for name in ops.SCHEMAS:
        built, missing = ("CUDA", "without CUDA") if name in ops.SORTS else ("Triton", "triton is not installed")
        there = _native.CUDA if name in ops.SORTS else ops.TRITON
        serves = ops.backends(name)["cuda"]
        assert serves.startswith(built) if there else serves.startswith("chunked torch") and missing in serves


@pytest.mark.parametrize("tensor_temperature", [False, True])
def test_compile_fullgraph(tensor_temperature):
    def step(a, b, t):
        return nt_xent(a * 2, b, t)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    for n in (8, 13, 21):
        a, b = torch.randn(2, n, 6)
        t = torch.tensor(0.2, requires_grad=True) if tensor_temperature else 0.2
        results = []
        for function in (step, compiled):
            x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
            loss = function(x, y, t)
            leaves = (x, y, t) if tensor_temperature else (x, y)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_temperature_that_is_not_checked_gives_nan(bad):
    """Under torch.compile, as on a GPU, the value of a temperature is not read."""
    compiled = torch.compile(lambda a, b, t: nt_xent(a, b, t), fullgraph=True)
    assert compiled(*torch.randn(2, 8, 6), torch.tensor(bad)).isnan()


def test_interface_of_empty_ranks():
    """Ranks may hold no rows: every op takes none."""
    x = torch.empty(0, 5)
    z, rnorm, pos = ops.normalize_pair(x, x, True)
    columns = torch.nn.functional.normalize(torch.randn(6, 5), dim=1)
    scale = torch.tensor(3.0)
    (lse,) = ops.lse_forward(z, columns, scale, 3.0, 2, 0)
    (columns_lse,) = ops.lse_forward(columns, None, scale, 3.0, 0, 3)
    (grad,) = ops.lse_backward(z, columns, scale, 3.0, 2, 0, lse, columns_lse, None, None)
    loss, whole, share = ops.pair_loss(pos, lse, scale, 1.0, None, True, 6, torch.float32)
    assert loss == 0 and lse.shape == whole.shape == share.shape == (0,)
    dx1, dx2, slope = ops.pair_backward(z, rnorm, grad, pos, share, scale, scale, None, 1.0, None, 6, torch.float32)
    assert grad.shape == dx1.shape == dx2.shape == (0, 5) and slope.shape == (0,)


@pytest.mark.skipif(not ops.TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrix_ops_on_cuda_are_triton_but_in_float64(dtype, monkeypatch):
    """Whatever the first tensor of the op is: here on the CPU, where the kernels are replaced by names."""
    from fastcl.kernels import host

    called = []
    for name in set(ops.SCHEMAS) - set(ops.SORTS):
        monkeypatch.setattr(host, name, lambda *args, _name=name, **options: called.append(_name))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for op, args, *options in samples(dtype):
        name = op.name().split("::")[1]
        if name not in ops.SORTS:
            called.clear()
            ops._on_cuda(name)(*args, **(options[0] if options else {}))
            assert called == ([name] if dtype == torch.float32 else []), name
