"""The losses beside nt_xent: bad input is refused by name before any kernel runs, good but odd input works, and what
PyTorch users expect of a differentiable function holds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastcl import alignment_loss, decoupled_nt_xent, generalized_contrastive_loss, uniformity_loss
from loss_cases import BACKENDS, DTYPES, LOSSES, TEMPERED, compare, pair, route

N, D = 6, 8
NAN, INF = math.nan, math.inf
TWO_VIEWS = (decoupled_nt_xent, alignment_loss, generalized_contrastive_loss)
EVERY = (*TWO_VIEWS, uniformity_loss)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The name of the backend that the ops go to, and the device to put tensors on."""
    return request.param, route(request.param, monkeypatch)


def bad(what, functions, error, argument, change=None, **options):
    """A case of each of these functions: a valid call with its tensors changed, or other options."""
    return [
        pytest.param(function, error, argument, change, options, id=f"{function.__name__} {what}")
        for function in (functions if isinstance(functions, tuple) else (functions,))
    ]


def both(change):
    return lambda z1, z2: (change(z1), change(z2))


def first(change):
    return lambda z1, z2: (change(z1), z2)


def second(change):
    return lambda z1, z2: (z1, change(z2))


def one(change):
    return lambda z: (change(z),)


def cut(*shape):
    return lambda _: torch.randn(*shape)


TENSORS = [
    *bad("D differs", TWO_VIEWS, ValueError, "z1 and z2", second(cut(N, D + 1))),
    *bad("N differs", TWO_VIEWS, ValueError, "z1 and z2", second(cut(N - 1, D))),
    *bad("one row broadcast", TWO_VIEWS, ValueError, "z1 and z2", second(cut(1, D))),
    *bad("1-D", TWO_VIEWS, ValueError, "z1", both(cut(D))),
    *bad("3-D", TWO_VIEWS, ValueError, "z2", second(cut(N, D, 1))),
    *bad("N = 0", TWO_VIEWS, ValueError, "z1 and z2", both(cut(0, D))),
    *bad("D = 0", TWO_VIEWS, ValueError, "z1", both(cut(N, 0))),
    *bad("integers", TWO_VIEWS, TypeError, "z1", both(torch.Tensor.long)),
    *bad("complex", TWO_VIEWS, TypeError, "z1", both(lambda z: z.to(torch.complex64))),
    *bad("mixed dtypes", TWO_VIEWS, TypeError, "z1 and z2", second(torch.Tensor.double)),
    *bad("mixed devices", TWO_VIEWS, ValueError, "z1 and z2", second(lambda z: z.to("meta"))),
    *bad("list", TWO_VIEWS, TypeError, "z1", first(torch.Tensor.tolist)),
    *bad("None", TWO_VIEWS, TypeError, "z2", second(lambda _: None)),
    *bad("sparse", TWO_VIEWS, TypeError, "z2", second(torch.Tensor.to_sparse)),
    *bad("0-D", uniformity_loss, ValueError, "z", one(lambda _: torch.tensor(1.0))),
    *bad("1-D", uniformity_loss, ValueError, "z", one(cut(D))),
    *bad("3-D", uniformity_loss, ValueError, "z", one(cut(N, D, 1))),
    *bad("N = 0", uniformity_loss, ValueError, "z", one(cut(0, D))),
    *bad("one row", uniformity_loss, ValueError, "z", one(cut(1, D))),
    *bad("D = 0", uniformity_loss, ValueError, "z", one(cut(N, 0))),
    *bad("integers", uniformity_loss, TypeError, "z", one(torch.Tensor.long)),
    *bad("numpy", uniformity_loss, TypeError, "z", one(torch.Tensor.numpy)),
    *bad("None", uniformity_loss, TypeError, "z", one(lambda _: None)),
    *bad("sparse", uniformity_loss, TypeError, "z", one(torch.Tensor.to_sparse)),
]
WEIGHTED = TEMPERATURES = (decoupled_nt_xent, generalized_contrastive_loss)
SCALED, WIDE = generalized_contrastive_loss, uniformity_loss
POSITIVE = ((WEIGHTED, "weight", ()), (SCALED, "loss_scale", (0, -0.0)), (WIDE, "t", (0, 0.0)))
NO_NUMBERS = ("1.0", None, True, [1.0], 1j, torch.tensor(1.0), np.array([1.0]))
NUMBERS = [
    *(
        case
        for functions, argument, zero in POSITIVE
        for value in (-1, -1e-9, NAN, INF, -INF, 1e39, 10**400, *zero)
        for case in bad(f"{argument} {str(value)[:9]}", functions, ValueError, argument, **{argument: value})
    ),
    *(
        case
        for functions, argument, _ in POSITIVE
        for value in NO_NUMBERS
        for case in bad(f"{argument} {type(value).__name__}", functions, TypeError, argument, **{argument: value})
    ),
    *(
        case
        for value in (0, -0.1, NAN, INF, 1e-40, torch.tensor(-1.0), torch.ones(2), torch.tensor(1.0, device="meta"))
        for case in bad(f"temperature {value}", TEMPERATURES, ValueError, "temperature", temperature=value)
    ),
    *(
        case
        for value in ("0.1", None, True, torch.tensor(1))
        for case in bad(f"temperature {value!r}", TEMPERATURES, TypeError, "temperature", temperature=value)
    ),
]
OPTIONS = [
    *(
        case
        for value in ("avg", "", "Mean", None, 1)
        for case in bad(f"reduction {value!r}", EVERY, ValueError, "reduction", reduction=value)
    ),
    *(case for value in ("sum", "none") for case in bad(value, WIDE, ValueError, "reduction", reduction=value)),
    *bad("grad_reduction", EVERY, ValueError, "grad_reduction", grad_reduction="none"),
    *bad("exchange", EVERY, ValueError, "exchange", exchange="star"),
    *(
        case
        for value in ("no", 1)
        for case in bad(f"normalize {value!r}", EVERY, TypeError, "normalize", normalize=value)
    ),
    *bad("normalize None", (decoupled_nt_xent, alignment_loss, WIDE), TypeError, "normalize", normalize=None),
    *(case for value in ("world", 3) for case in bad(f"group {value!r}", EVERY, TypeError, "group", group=value)),
    *(
        case
        for value in ("sliced", "", None, 3)
        for case in bad(f"distribution {value!r}", SCALED, ValueError, "distribution", distribution=value)
    ),
    *(case for value in ("uniform", "") for case in bad(f"prior {value!r}", SCALED, ValueError, "prior", prior=value)),
    *(
        case
        for value in (torch.randn(N, D), None, 3)
        for case in bad(f"prior {type(value).__name__}", SCALED, TypeError, "prior", prior=value)
    ),
    *(
        case
        for value in ("normal", "hypercube")
        for case in bad(f"lse {value}", SCALED, ValueError, "prior", prior=value, distribution="lse")
    ),
    *bad("generator", SCALED, TypeError, "generator", generator=3),
    *bad(
        "generator elsewhere", SCALED, ValueError, "generator", both(lambda z: z.to("meta")),
        generator=torch.Generator(),
    ),
]  # fmt: skip


@pytest.mark.parametrize("function,error,argument,change,options", [*TENSORS, *NUMBERS, *OPTIONS])
def test_refused_by_name(no_kernel, function, error, argument, change, options):
    tensors = torch.randn(1 if function is uniformity_loss else 2, N, D).unbind(0)
    with pytest.raises((TypeError, ValueError)) as caught:
        function(*(change(*tensors) if change else tensors), **options)
    message = str(caught.value)
    assert caught.type is error, message
    assert message.startswith(f"{function.__name__}: {argument} must "), message
    assert ", got " in message, message


@pytest.mark.parametrize("distribution", ["swd", "lse"])
def test_numbers_of_any_kind(distribution):
    """Integers and what numpy calculates with are numbers, and a weight may be 0."""
    z1, z2 = pair(N, D, "cpu", torch.float64)
    for weight, scale in ((0, 1), (0.0, np.float64(2.0)), (3, 10)):
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        got, expected = (
            generalized_contrastive_loss(
                z1, z2, distribution=distribution, weight=w, loss_scale=s, temperature=t, generator=generator
            )
            for (w, s, t), generator in zip(
                ((weight, scale, 1), (float(weight), float(scale), 1.0)), generators, strict=True
            )
        )
        assert torch.equal(got, expected)
        assert torch.equal(decoupled_nt_xent(z1, z2, 1, weight=weight), decoupled_nt_xent(z1, z2, 1.0, weight=weight))
    assert torch.equal(uniformity_loss(z1, 2), uniformity_loss(z1, np.float64(2.0)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("loss", ["decoupled", "alignment", "uniformity", "lse"])
def test_one_pair(loss, normalize, dtype):
    """No negatives: what is left of each loss, and its gradient."""
    z1, z2 = ((0.5 * z).to(dtype) for z in pair(1, D, "cpu"))
    temperature = 0.5 if loss in TEMPERED else None
    floor = 0.0
    if dtype == torch.bfloat16 and loss == "decoupled" and normalize:
        # One product of two rows, each rounded to bf16, by at most 2^-9 an entry: eager errs twice as much in the mean,
        # and may be lucky with one pair.
        floor = 2**-8 / F.cosine_similarity(z1.double(), z2.double()).abs().item()
    compare(LOSSES[loss](dtype), z1, z2, f"one pair {loss}", temperature, floor=floor, normalize=normalize)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value,normalize", [(NAN, True), (NAN, False), (INF, True), (-INF, True)])
@pytest.mark.parametrize("loss", LOSSES)
def test_nan_and_inf_give_nan(loss, value, normalize, dtype):
    """An infinite row has no direction."""
    for view in range(2):
        views = pair(N, D, "cpu", dtype)
        views[view][N // 2, 3] = value
        assert LOSSES[loss](dtype)[0](*views, 0.3, normalize=normalize).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_zero_rows_get_no_gradient(backend, loss, dtype):
    name, device = backend
    if name == "triton" and dtype == torch.float64:
        pytest.skip("Triton kernels do not take float64: chunked torch serves it")
    z1, z2 = (z.requires_grad_() for z in pair(N, D, device, dtype))
    with torch.no_grad():
        z1[0] = z1[3] = z2[3] = 0
    value = LOSSES[loss](dtype)[0](z1, z2, 0.3)
    g1, g2 = torch.autograd.grad(value, (z1, z2))
    assert g1[0].eq(0).all() and g1[3].eq(0).all() and g2[3].eq(0).all()
    assert g1[1].ne(0).any() and g2[1].ne(0).any()
    temperature = 0.3 if loss in TEMPERED else None
    # Eager has NaN in fp16, where 1e-12 is 0: what is left to allow are the roundings of rows, weights and gradients.
    floor = 2e-3 if dtype == torch.float16 else 0.0
    compare(LOSSES[loss](dtype), z1, z2, f"{name} {loss} zero rows", temperature, floor=floor)


LAYOUTS = {
    "transposed": lambda: torch.randn(D, N).T,
    "every other column": lambda: torch.randn(N, 2 * D)[:, ::2],
    "storage offset": lambda: torch.randn(N * D + 3)[3:].view(N, D),
    "overlapping rows": lambda: torch.randn(N + D).as_strided((N, D), (1, 1)),
    "negated lazily": lambda: torch.randn(N, D, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_layouts(loss, layout, normalize):
    """The values of a dense copy; `.to` in the comparison keeps float32 tensors as they are."""
    z1, z2 = LAYOUTS[layout](), torch.randn(D, N).T
    temperature = 0.2 if loss in TEMPERED else None
    compare(LOSSES[loss](torch.float32), z1, z2, f"{loss} {layout}", temperature, normalize=normalize)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_inputs_are_left_alone(loss, normalize):
    leaves = [z.requires_grad_() for z in pair(N, D, "cpu")]
    before = [z.detach().clone() for z in leaves]
    LOSSES[loss](torch.float32)[0](*leaves, 0.3, normalize=normalize).backward()
    for z, old in zip(leaves, before, strict=True):
        assert torch.equal(z, old)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_only_where_asked(loss):
    z1, z2 = pair(N, D, "cpu")
    ours = LOSSES[loss](torch.float32)[0]
    with torch.no_grad():
        assert not ours(z1.clone().requires_grad_(), z2, 0.3).requires_grad
    with torch.inference_mode():
        assert ours(z1, z2, 0.3).isfinite()
    assert not ours(z1, z2, 0.3).requires_grad
    z1.requires_grad_()
    ours(z1, z2, 0.3).backward()
    assert z1.grad.isfinite().all() and z2.grad is None


def test_same_tensor_as_both_views():
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    for loss in ("decoupled", "lse"):
        ours, spec, _ = LOSSES[loss](torch.float64)
        got, expected = (torch.autograd.grad(function(x, x, 0.3), x)[0] for function in (ours, spec))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("scale", [2.0**16, 1.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_grad_scaler_factor_in_fp16(backend, loss, scale):
    """An upstream gradient of 65,536 neither overflows nor flushes on the way to fp16 gradients."""
    name, device = backend
    leaves = [z.requires_grad_() for z in pair(64, 16, device, torch.float16)]
    ours, spec, _ = LOSSES[loss](torch.float16)
    got = torch.autograd.grad(ours(*leaves, 0.3) * scale, leaves)
    exact = torch.autograd.grad(spec(*(z.double() for z in leaves), 0.3) * scale, leaves)
    for g, x in zip(got, exact, strict=True):
        assert g.isfinite().all()
        # fp16 rows and weights (2^-11 each) and one rounding of the result.
        assert (g.double() - x.double()).norm() <= 2e-3 * x.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast(loss, dtype):
    """Autocast changes neither the loss, nor its dtype, nor those of the gradients."""
    ours = LOSSES[loss](dtype)[0]
    leaves = [z.requires_grad_() for z in pair(20, 8, "cpu", dtype)]
    extra = [torch.tensor(0.2, requires_grad=True)] if loss in TEMPERED else []
    plain = ours(*leaves, *(extra or [None]))
    with torch.autocast("cpu", torch.bfloat16):
        value = ours(*leaves, *(extra or [None]))
        inside = torch.autograd.grad(value, leaves + extra, retain_graph=True)
    outside = torch.autograd.grad(value, leaves + extra)
    assert value.dtype == torch.float32 and torch.equal(value, plain)
    wanted = torch.autograd.grad(plain, leaves + extra)
    for grads in (inside, outside):
        for grad, expected, leaf in zip(grads, wanted, leaves + extra, strict=True):
            assert grad.dtype == leaf.dtype and torch.equal(grad, expected)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_double_backward_is_refused(loss, normalize):
    """Also where autograd is asked for some of the leaves alone, and could leave out what it takes for constant."""
    leaves = [z.requires_grad_() for z in pair(6, 8, "cpu")]
    extra = [torch.tensor(0.2, requires_grad=True)] if loss in TEMPERED else []
    value = LOSSES[loss](torch.float32)[0](*leaves, *(extra or [None]), normalize=normalize)
    once = torch.autograd.grad(value, leaves + extra, retain_graph=True)
    grads = torch.autograd.grad(value, leaves + extra, create_graph=True)
    for got, expected in zip(grads, once, strict=True):
        assert torch.equal(got, expected)
    penalty = sum(grad.square().sum() for grad in grads)
    if loss == "alignment" and not normalize:
        # Differentiable torch throughout: penalty = 2 sum_i (2 / n)^2 ||z1_i - z2_i||^2.
        (second,) = torch.autograd.grad(penalty, leaves[:1])
        torch.testing.assert_close(second, 16 / 36 * (leaves[0] - leaves[1]).detach())
        return
    for inputs in (None, leaves[:1], extra):
        if inputs != []:
            with pytest.raises(RuntimeError, match=r"^\w+: double backward is not supported"):
                penalty.backward(inputs=inputs, retain_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_result_may_be_changed_in_place(loss, reduction):
    """As `loss /= steps` does."""
    if loss == "uniformity" and reduction != "mean":
        pytest.skip("the loss is one logarithm")
    leaves = [z.requires_grad_() for z in pair(6, 8, "cpu")]
    value = LOSSES[loss](torch.float32)[0](*leaves, 0.2, reduction=reduction)
    expected = torch.autograd.grad(0.25 * value.sum(), leaves, retain_graph=True)
    value *= 0.25
    for got, wanted in zip(torch.autograd.grad(value.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(got, wanted)
