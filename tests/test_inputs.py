"""Bad input is refused by name before any kernel runs; good but odd input works."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastcl.ops
from fastcl import nt_xent, reference
from fastcl.losses.batch import checked_scale
from fastcl.ops import chunked

N, D = 6, 8
NAN, INF = math.nan, math.inf
HALF = (torch.float16, torch.bfloat16)
# One rounding of the rows (2^-11, 2^-8) shared out over D products at 1 / temperature = 5.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def views(dtype=torch.float32, n=N, d=D):
    return tuple(torch.randn(n, d).to(dtype) for _ in range(2))


def exact(z1, z2, temperature=0.2, upstream=1.0, **options):
    """Loss and gradients of both views by the specification, in float64."""
    a, b = (z.detach().double().requires_grad_() for z in (z1, z2))
    loss = reference.nt_xent(a, b, temperature, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum() * upstream, (a, b))


def assert_as_specified(z1, z2, temperature=0.2, upstream=1.0, **options):
    """nt_xent of these very tensors has the loss and gradients of the specification."""
    leaves = [z if z.requires_grad else z.detach().requires_grad_() for z in (z1, z2)]
    loss = nt_xent(*leaves, temperature, **options)
    got = (loss.detach(), *torch.autograd.grad(loss.sum() * upstream, leaves))
    for value, expected in zip(got, exact(z1, z2, temperature, upstream, **options), strict=True):
        torch.testing.assert_close(
            value.double(), expected, rtol=TOLERANCE[z1.dtype], atol=TOLERANCE[z1.dtype] * expected.abs().max().item()
        )


def bad(what, error, argument, z1=None, z2=None, *, fix=None, **options):
    """One case: a valid call with the named parts replaced; `fix` makes both views from one function."""
    change = fix or (lambda a, b: (z1(a) if z1 else a, z2(b) if z2 else b))
    return pytest.param(error, argument, change, options, id=what)


def both(change):
    return lambda a, b: (change(a), change(b))


def cut(*shape):
    return lambda _: torch.randn(*shape)


SHAPES = [
    bad("D differs", ValueError, "z1 and z2", z2=cut(N, D + 1)),
    bad("N differs", ValueError, "z1 and z2", z2=cut(N - 1, D)),
    bad("one row broadcast", ValueError, "z1 and z2", z2=cut(1, D)),
    bad("0-D", ValueError, "z1", z1=lambda _: torch.tensor(1.0)),
    bad("1-D", ValueError, "z1", fix=both(cut(D))),
    bad("3-D", ValueError, "z1", fix=both(cut(N, 2, D))),
    bad("3-D second", ValueError, "z2", z2=cut(N, D, 1)),
    bad("N = 0", ValueError, "z1 and z2", fix=both(cut(0, D))),
    bad("D = 0", ValueError, "z1", fix=both(cut(N, 0))),
]
TYPES = [
    *(
        bad(f"{dtype}", TypeError, "z1", fix=both(lambda z, dtype=dtype: z.to(dtype)))
        for dtype in (
            torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool,
            torch.complex64, torch.complex128, torch.float8_e4m3fn,
        )
    ),
    bad("int64 second", TypeError, "z2", z2=lambda z: z.long()),
    bad("mixed dtypes", TypeError, "z1 and z2", z2=lambda z: z.double()),
    bad("mixed 16-bit dtypes", TypeError, "z1 and z2", lambda z: z.half(), lambda z: z.bfloat16()),
    bad("mixed devices", ValueError, "z1 and z2", z2=lambda z: z.to("meta")),
    bad("list", TypeError, "z1", z1=lambda z: z.tolist()),
    bad("numpy", TypeError, "z1", fix=both(lambda z: z.numpy())),
    bad("None", TypeError, "z2", z2=lambda z: None),
    bad("COO", TypeError, "z1", fix=both(lambda z: z.to_sparse())),
    bad("CSR", TypeError, "z2", z2=lambda z: z.to_sparse_csr()),
    bad("jagged", TypeError, "z1", z1=lambda z: torch.nested.nested_tensor([z[0], z[1, :3]], layout=torch.jagged)),
    bad("nested", TypeError, "z1", z1=lambda z: torch.nested.nested_tensor([z[:2], z[:3]])),
]  # fmt: skip
VALUES = [0, 0.0, -0.0, -0.1, -3, INF, -INF, NAN]
TEMPERATURES = [
    *(bad(f"temperature {value!r}", ValueError, "temperature", temperature=value) for value in VALUES),
    *(
        bad(
            f"temperature {dtype} {shape} {value}", ValueError, "temperature",
            temperature=torch.full(shape, value, dtype=dtype),
        )
        for value in VALUES[3:]
        for dtype, shape in ((torch.float32, ()), (torch.float64, (1,)), (torch.float16, (1, 1)))
    ),
    bad("temperature beyond float", ValueError, "temperature", temperature=10**400),
    bad("temperature whose reciprocal overflows", ValueError, "temperature", temperature=1e-40),
    bad("two temperatures", ValueError, "temperature", temperature=torch.tensor([0.1, 0.2])),
    bad("temperature per row", ValueError, "temperature", temperature=torch.full((N, 1), 0.1)),
    bad("no temperature", ValueError, "temperature", temperature=torch.empty(0)),
    bad("temperature elsewhere", ValueError, "temperature", temperature=torch.tensor(0.1, device="meta")),
    bad("sparse temperature", TypeError, "temperature", temperature=torch.tensor([0.1]).to_sparse()),
    *(
        bad(f"temperature {dtype}", TypeError, "temperature", temperature=torch.ones((), dtype=dtype))
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    bad(
        "complex temperature with gradient", TypeError, "temperature",
        temperature=torch.tensor(0.1 + 0j, requires_grad=True),
    ),
    *(
        bad(f"temperature {type(value).__name__}", TypeError, "temperature", temperature=value)
        for value in ("0.1", None, [0.1], True, 0.1j, np.array([0.1]))
    ),
]  # fmt: skip
OPTIONS = [
    *(bad(f"reduction {value!r}", ValueError, "reduction", reduction=value) for value in ("avg", "", "Mean", None, 1)),
    bad("grad_reduction", ValueError, "grad_reduction", grad_reduction="none"),
    bad("exchange", ValueError, "exchange", exchange="star"),
    *(bad(f"normalize {value!r}", TypeError, "normalize", normalize=value) for value in ("no", 1, None)),
    *(bad(f"group {value!r}", TypeError, "group", group=value) for value in ("world", 3)),
]


@pytest.mark.parametrize("error,argument,change,options", [*SHAPES, *TYPES, *TEMPERATURES, *OPTIONS])
@pytest.mark.filterwarnings("ignore:.*prototype stage")
def test_refused_by_name(no_kernel, error, argument, change, options):
    z1, z2 = change(*views())
    with pytest.raises((TypeError, ValueError)) as caught:
        nt_xent(z1, z2, **options)
    message = str(caught.value)
    assert caught.type is error, message
    assert message.startswith(f"nt_xent: {argument} must "), message
    assert ", got " in message, message


def test_message_shows_both_shapes(no_kernel):
    with pytest.raises(ValueError) as caught:
        nt_xent(torch.randn(4, 8), torch.randn(4, 9))
    assert str(caught.value) == "nt_xent: z1 and z2 must have the same shape [N, D], got [4, 8] and [4, 9]"


@pytest.mark.gpu
def test_cuda_temperature_is_not_read():
    """Its value cannot be checked without waiting for the device: a bad one gives NaN."""
    z1, z2 = (z.cuda() for z in views())
    temperatures = [torch.tensor(value, device="cuda") for value in (0.0, -1.0, NAN, INF)]
    nt_xent(z1, z2, torch.tensor(0.1, device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [nt_xent(z1, z2, temperature) for temperature in temperatures]
        with pytest.raises(ValueError, match="got shape"):
            nt_xent(z1, z2, torch.ones(2, device="cuda"))
        with pytest.raises(ValueError, match="same device"):
            nt_xent(z1, z2.cpu())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isnan() for loss in losses)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_pair_has_no_negatives(reduction, normalize, dtype):
    z1, z2 = (z.requires_grad_() for z in views(dtype, n=1))
    temperature = torch.tensor(0.1, requires_grad=True)
    for t in (0.1, temperature):
        loss = nt_xent(z1, z2, t, normalize=normalize, reduction=reduction)
        assert loss.eq(0).all()
        leaves = (z1, z2) if t is not temperature else (z1, z2, temperature)
        assert all(grad.eq(0).all() for grad in torch.autograd.grad(loss.sum(), leaves))


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF, -INF])
def test_scale_whose_value_nobody_read(bad):
    """Kernels get NaN for a bad one; a good one stays as it is, with its gradient."""
    assert checked_scale(torch.tensor(bad)).isnan()
    good = torch.tensor([1e-38, 0.1, 3e38], requires_grad=True)
    checked = checked_scale(good)
    assert torch.equal(checked, good) and torch.equal(torch.autograd.grad(checked.sum(), good)[0], torch.ones(3))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 2, N])
@pytest.mark.parametrize("bad_value,normalize", [(NAN, True), (NAN, False), (INF, True), (-INF, True)])
def test_nan_and_inf_give_nan(bad_value, normalize, n, dtype):
    """An infinite row has no direction."""
    for view in range(2):
        z = views(dtype, n=n)
        z[view][n // 2, 3] = bad_value
        assert nt_xent(*z, 0.2, normalize=normalize).isnan()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("backend", ["default", "chunked"])
def test_zero_rows_get_no_gradient(backend, dtype, monkeypatch):
    if backend == "chunked":
        for name in fastcl.ops.SCHEMAS:
            monkeypatch.setattr(fastcl.ops, name, getattr(chunked, name))
    z1, z2 = views(dtype)
    z1[0] = z1[3] = z2[3] = 0
    z1, z2 = z1.requires_grad_(), z2.requires_grad_()
    assert_as_specified(z1, z2)
    g1, g2 = torch.autograd.grad(nt_xent(z1, z2, 0.2), (z1, z2))
    assert g1[0].eq(0).all() and g1[3].eq(0).all() and g2[3].eq(0).all()
    assert g1[1].ne(0).any() and g2[0].ne(0).any()


def test_all_rows_zero():
    z1, z2 = (torch.zeros(N, D, requires_grad=True) for _ in range(2))
    loss = nt_xent(z1, z2)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2 * N - 1), rel=1e-6)
    assert z1.grad.eq(0).all() and z2.grad.eq(0).all()


LAYOUTS = {
    "transposed": lambda: torch.randn(D, N).T,
    "every other row": lambda: torch.randn(2 * N, D)[::2],
    "every other column": lambda: torch.randn(N, 2 * D)[:, ::2],
    "storage offset": lambda: torch.randn(N * D + 3)[3:].view(N, D),
    "one row expanded": lambda: torch.randn(1, D).expand(N, D),
    "one column expanded": lambda: torch.randn(N, 1).expand(N, D),
    "one number expanded": lambda: torch.randn(1, 1).expand(N, D),
    "overlapping rows": lambda: torch.randn(N + D).as_strided((N, D), (1, 1)),
    "slice of a 3-D tensor": lambda: torch.randn(N, 2, D)[:, 1],
    "negated lazily": lambda: torch.randn(N, D, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", ["transposed", None])
def test_layouts(first, second, dtype):
    make = LAYOUTS.get(second) or (lambda: torch.randn(N, D))

    def cast(x):
        # .to makes a dense copy: put the values back into the layout under test.
        if dtype == torch.float32:
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x) if 0 not in x.stride() else x.to(dtype)

    assert_as_specified(cast(LAYOUTS[first]()), cast(make()))


def test_gradients_through_expand_and_the_same_tensor_twice():
    row = torch.randn(1, D, dtype=torch.float64, requires_grad=True)
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    cases = {
        "expand": (row, lambda: (row.expand(N, D), x)),
        "same tensor": (x, lambda: (x, x)),
        "views of one tensor": (x, lambda: x.unflatten(0, (2, -1)).unbind(0)),
    }
    for what, (leaf, make) in cases.items():
        got, expected = (torch.autograd.grad(f(*make(), 0.2), leaf)[0] for f in (nt_xent, reference.nt_xent))
        torch.testing.assert_close(got, expected, msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("input_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_temperature_tensors(input_dtype, shape, dtype):
    """One element of any floating dtype; its gradient has its shape and dtype."""
    z1, z2 = views(input_dtype)
    temperature = torch.full(shape, 0.25, dtype=dtype, requires_grad=True)
    loss = nt_xent(z1, z2, temperature)
    (grad,) = torch.autograd.grad(loss, temperature)
    assert loss.dtype == (torch.float64 if input_dtype == torch.float64 else torch.float32) and loss.shape == ()
    assert grad.dtype == dtype and grad.shape == shape
    t = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(reference.nt_xent(z1.double(), z2.double(), t), t)
    tolerance = max(TOLERANCE[dtype], TOLERANCE[input_dtype])
    torch.testing.assert_close(grad.double().reshape(()), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("temperature", [1, np.float64(0.5), 0.5])
def test_temperature_numbers(temperature):
    z1, z2 = views(torch.float64)
    torch.testing.assert_close(nt_xent(z1, z2, temperature), reference.nt_xent(z1, z2, float(temperature)))


def test_inputs_are_left_alone():
    z1, z2 = (z.requires_grad_() for z in views())
    temperature = torch.tensor(0.2, requires_grad=True)
    before = [x.detach().clone() for x in (z1, z2, temperature)]
    nt_xent(z1, z2, temperature).backward()
    for x, old in zip((z1, z2, temperature), before, strict=True):
        assert torch.equal(x, old)


def test_gradient_only_where_asked():
    z1, z2 = views()
    with torch.no_grad():
        assert not nt_xent(z1.clone().requires_grad_(), z2).requires_grad
    with torch.inference_mode():
        assert nt_xent(z1, z2).isfinite()
    z1.requires_grad_()
    nt_xent(z1, z2).backward()
    assert z1.grad.isfinite().all() and z2.grad is None


@pytest.mark.parametrize("upstream", [65536.0, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradient_in_fp16(reduction, upstream):
    z1, z2 = views(torch.float16, n=40)
    # The rows of "none" have no 1 / M in them: without it fp16 could not hold their gradients.
    weight = upstream if reduction == "mean" else upstream / 80
    assert_as_specified(z1, z2, upstream=weight, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    """Autocast changes neither the loss, nor its dtype, nor those of the gradients."""
    z1, z2 = (z.requires_grad_() for z in views(dtype))
    temperature = torch.tensor(0.2, requires_grad=True)
    leaves = (z1, z2, temperature)
    plain = nt_xent(*leaves)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(*leaves)
        inside = torch.autograd.grad(loss, leaves, retain_graph=True)
    outside = torch.autograd.grad(loss, leaves)
    assert loss.dtype == torch.float32 and torch.equal(loss, plain)
    wanted = torch.autograd.grad(plain, leaves)
    for grads in (inside, outside):
        for grad, expected, leaf in zip(grads, wanted, leaves, strict=True):
            assert grad.dtype == leaf.dtype and torch.equal(grad, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("leaf", [0, 1, 2])
def test_double_backward_is_refused(leaf, reduction):
    leaves = (*(z.requires_grad_() for z in views()), torch.tensor(0.2, requires_grad=True))
    loss = nt_xent(*leaves, reduction=reduction).sum()
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    for got, expected in zip(grads, once, strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(RuntimeError, match="nt_xent: double backward is not supported"):
        grads[leaf].square().sum().backward()
