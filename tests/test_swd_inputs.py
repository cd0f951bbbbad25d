"""Bad input to swd_loss, SWDLoss and segmented_sort is refused by name before any kernel runs; SWDLoss as a module."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from fastcl import SWDLoss, segmented_sort, swd_loss

N, D = 6, 8
# No memory behind them: as many rows as int32 cannot number.
MANY = 2**31


def bad(what, error, argument, *, z=None, **options):
    """One case: a valid call with the named parts replaced; `z` makes the rows from valid ones."""
    return pytest.param(error, argument, z, options, id=what)


BAD_DTYPES = (
    torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
    torch.float8_e4m3fn,
)  # fmt: skip
ROWS = [
    bad("0-D", ValueError, "z", z=lambda z: torch.tensor(1.0)),
    bad("1-D", ValueError, "z", z=lambda z: z[0]),
    bad("3-D", ValueError, "z", z=lambda z: z[None]),
    bad("N = 0", ValueError, "z", z=lambda z: z[:0]),
    bad("D = 0", ValueError, "z", z=lambda z: z[:, :0]),
    bad("2^31 rows", ValueError, "z", z=lambda z: torch.empty(1, 1).expand(MANY, 1)),
    *(bad(f"{dtype}", TypeError, "z", z=lambda z, dtype=dtype: z.to(dtype)) for dtype in BAD_DTYPES),
    bad("list", TypeError, "z", z=lambda z: z.tolist()),
    bad("numpy", TypeError, "z", z=lambda z: z.numpy()),
    bad("two views", TypeError, "z", z=lambda z: (z, z)),
    bad("None", TypeError, "z", z=lambda z: None),
    bad("COO", TypeError, "z", z=lambda z: z.to_sparse()),
    bad("CSR", TypeError, "z", z=lambda z: z.to_sparse_csr()),
    bad("nested", TypeError, "z", z=lambda z: torch.nested.nested_tensor([z[:2], z[:3]])),
]
DRAWS = [
    *(bad(f"prior {prior!r}", ValueError, "prior", prior=prior) for prior in ("gaussian", "", "Normal", "hyper")),
    *(
        bad(f"prior {type(prior).__name__}", TypeError, "prior", prior=prior)
        for prior in (torch.randn(N, D), None, 1, ["normal"], torch.distributions.Normal(0.0, 1.0))
    ),
    bad("prior that is another view, with samples", TypeError, "prior", prior=torch.randn(N, D),
        prior_samples=torch.randn(N, D)),
    *(
        bad(f"{argument} {what}", error, argument, **{argument: value})
        for argument in ("prior_samples", "projections")
        for what, error, value in (
            ("narrower", ValueError, torch.randn(N, D - 1)),
            ("wider", ValueError, torch.randn(N, D + 1)),
            ("transposed", ValueError, torch.randn(D, N)),
            ("empty", ValueError, torch.randn(0, D)),
            ("without features", ValueError, torch.randn(N, 0)),
            ("1-D", ValueError, torch.randn(D)),
            ("3-D", ValueError, torch.randn(N, D, 1)),
            ("integers", TypeError, torch.ones(N, D, dtype=torch.int64)),
            ("complex", TypeError, torch.ones(N, D, dtype=torch.complex64)),
            ("float8", TypeError, torch.ones(N, D).to(torch.float8_e4m3fn)),
            ("sparse", TypeError, torch.ones(N, D).to_sparse()),
            ("elsewhere", ValueError, torch.empty(N, D, device="meta")),
            ("list", TypeError, [[0.0] * D]),
            ("numpy", TypeError, np.zeros((N, D))),
            ("name", TypeError, "normal"),
        )
    ),
    bad("2^31 samples", ValueError, "prior_samples", prior_samples=torch.empty(1, D).expand(MANY, D)),
    *(bad(f"num_projections {p!r}", ValueError, "num_projections", num_projections=p) for p in (0, -1)),
    *(
        bad(f"num_projections {p!r}", TypeError, "num_projections", num_projections=p)
        for p in (1.5, 4.0, True, "8", [8], torch.tensor(8))
    ),
    *(
        bad(f"num_projections {p} and projections", ValueError, "num_projections", num_projections=p,
            projections=torch.randn(N, D))
        for p in (N, 1)
    ),
    *(bad(f"generator {g!r}", TypeError, "generator", generator=g) for g in (0, "cpu", torch.Generator)),
]  # fmt: skip
OPTIONS = [
    *(bad(f"reduction {value!r}", ValueError, "reduction", reduction=value) for value in ("avg", "", "Mean", None, 1)),
    *(bad(f"grad_reduction {value!r}", ValueError, "grad_reduction", grad_reduction=value) for value in ("none", None)),
    *(bad(f"exchange {value!r}", ValueError, "exchange", exchange=value) for value in ("star", None)),
    *(bad(f"normalize {value!r}", TypeError, "normalize", normalize=value) for value in ("yes", 1, 0)),
    *(bad(f"group {value!r}", TypeError, "group", group=value) for value in ("world", 3)),
]


def assert_names(caught, name, error, argument):
    message = str(caught.value)
    assert caught.type is error, message
    assert message.startswith(f"{name}: {argument} must "), message
    assert ", got " in message, message


@pytest.mark.parametrize("error,argument,z,options", [*ROWS, *DRAWS, *OPTIONS])
@pytest.mark.filterwarnings("ignore:.*(prototype stage|beta state)")
def test_refused_by_name(no_kernel, error, argument, z, options):
    rows = torch.randn(N, D)
    rows = z(rows) if z else rows
    state = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError)) as caught:
        swd_loss(rows, **options)
    assert_names(caught, "swd_loss", error, argument)
    assert torch.equal(torch.get_rng_state(), state)


def test_generator_elsewhere(no_kernel):
    z = torch.empty(N, D, device="meta")
    with pytest.raises((TypeError, ValueError)) as caught:
        swd_loss(z, generator=torch.Generator())
    assert_names(caught, "swd_loss", ValueError, "generator")
    assert "on meta, as the rows, got cpu" in str(caught.value)


def test_messages(no_kernel):
    """What was expected, and what was got instead."""
    z = torch.randn(N, D)
    cases = {
        'swd_loss: prior must be "normal" or "hypercube" or "hypersphere", got \'gaussian\'': {"prior": "gaussian"},
        "swd_loss: prior_samples must have shape [at least 1, 8], as wide as the rows, got [4, 9]": {
            "prior_samples": torch.randn(4, 9)
        },
        "swd_loss: projections must have shape [at least 1, 8], as wide as the rows, got [0, 8]": {
            "projections": torch.randn(0, 8)
        },
        "swd_loss: num_projections must be at least 1, got 0": {"num_projections": 0},
        "swd_loss: num_projections must be None where projections are given, got 3": {
            "num_projections": 3, "projections": torch.randn(3, 8),
        },
    }  # fmt: skip
    for message, options in cases.items():
        with pytest.raises(ValueError) as caught:
            swd_loss(z, **options)
        assert str(caught.value) == message


@pytest.mark.gpu
@pytest.mark.parametrize("there,here", [("cuda", "cpu"), ("cpu", "cuda")])
def test_devices_on_gpu(there, here):
    z = torch.randn(N, D, device=there)
    cases = {
        "generator": {"generator": torch.Generator(here)},
        "prior_samples": {"prior_samples": torch.randn(N, D, device=here)},
        "projections": {"projections": torch.randn(N, D, device=here)},
    }
    for argument, options in cases.items():
        with pytest.raises((TypeError, ValueError)) as caught:
            swd_loss(z, **options)
        assert_names(caught, "swd_loss", ValueError, argument)
    assert swd_loss(z, generator=torch.Generator(there)).isfinite()


# What is wrong whatever the rows are. A group is looked up in the call.
NOT_OF_MODULES = {"prior_samples", "projections", "group"}
AT_CONSTRUCTION = [case for case in [*DRAWS, *OPTIONS] if not NOT_OF_MODULES & set(case.values[3])]


@pytest.mark.parametrize("error,argument,z,options", AT_CONSTRUCTION)
def test_module_refuses_when_constructed(error, argument, z, options):
    with pytest.raises((TypeError, ValueError)) as caught:
        SWDLoss(**options)
    assert_names(caught, "SWDLoss", error, argument)


def sort_case(what, error, argument, x, **options):
    return pytest.param(error, argument, x, options, id=what)


SORTS = [
    sort_case("0-D", ValueError, "x", lambda: torch.tensor(1.0)),
    *(sort_case(f"{dtype}", TypeError, "x", lambda t=dtype: torch.ones(N, D).to(t)) for dtype in BAD_DTYPES),
    sort_case("COO", TypeError, "x", lambda: torch.ones(N, D).to_sparse()),
    sort_case("CSR", TypeError, "x", lambda: torch.ones(N, D).to_sparse_csr()),
    sort_case("nested", TypeError, "x", lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    sort_case("list", TypeError, "x", lambda: [1.0, 2.0]),
    sort_case("numpy", TypeError, "x", lambda: np.ones(3)),
    sort_case("None", TypeError, "x", lambda: None),
    sort_case("2^31 elements", ValueError, "x", lambda: torch.empty(1).expand(MANY)),
    sort_case("2^31 elements in each of 3", ValueError, "x", lambda: torch.empty(1, 1).expand(3, MANY)),
    # No segment at all, and still none that indices could number.
    sort_case("2^31 elements in none", ValueError, "x", lambda: torch.empty(0, 1).expand(0, MANY)),
    *(
        sort_case(f"descending={value!r}", TypeError, "descending", lambda: torch.ones(N, D), descending=value)
        for value in (1, 0, None, "yes", torch.tensor(True))
    ),
]


@pytest.mark.parametrize("error,argument,x,options", SORTS)
@pytest.mark.filterwarnings("ignore:.*(prototype stage|beta state)")
def test_sort_refuses_by_name(no_kernel, error, argument, x, options):
    with pytest.raises((TypeError, ValueError)) as caught:
        segmented_sort(x(), **options)
    assert_names(caught, "segmented_sort", error, argument)


def test_arguments_by_keyword_only():
    z = torch.randn(N, D)
    with pytest.raises(TypeError, match="positional"):
        swd_loss(z, "normal", z)
    with pytest.raises(TypeError, match="positional"):
        segmented_sort(z, True)


def test_int32_is_enough_for_what_is_allowed(no_kernel):
    """One row less than refused reaches the computation."""
    with pytest.raises(pytest.fail.Exception, match="reached the computation"):
        segmented_sort(torch.empty(0, 1).expand(0, MANY - 1))


def test_gradient_only_where_asked():
    z = torch.randn(N, D)
    assert not swd_loss(z).requires_grad
    with torch.no_grad():
        assert not swd_loss(z.clone().requires_grad_()).requires_grad
    with torch.inference_mode():
        assert swd_loss(z).isfinite() and segmented_sort(z)[0].shape == (N, D)


def test_module_equals_function():
    z = torch.randn(N, D)
    options = {"num_projections": 9, "normalize": False, "reduction": "none"}
    module, function = (torch.Generator().manual_seed(7) for _ in range(2))
    got = SWDLoss("hypercube", **options, generator=module)(z)
    assert torch.equal(got, swd_loss(z, "hypercube", **options, generator=function))
    module = SWDLoss()
    torch.manual_seed(5)
    first, second = module(z), copy.deepcopy(module)(z)
    torch.manual_seed(5)
    assert torch.equal(first, swd_loss(z)) and torch.equal(second, swd_loss(z)) and first != second


def test_module_shows_its_settings():
    assert repr(SWDLoss()) == "SWDLoss(prior='hypersphere')"
    shown = repr(SWDLoss("normal", num_projections=3, normalize=True, reduction="sum"))
    assert shown == "SWDLoss(prior='normal', num_projections=3, normalize=True, reduction='sum')"


def test_module_keeps_given_samples_and_directions():
    """As buffers: they move with the module, and are saved with it."""
    z, samples, directions = torch.randn(8, 4), torch.randn(5, 4), torch.randn(3, 4)
    module = SWDLoss(prior_samples=samples, projections=directions)
    assert torch.equal(module(z), swd_loss(z, prior_samples=samples, projections=directions))
    assert set(module.state_dict()) == {"prior_samples", "projections"}
    assert repr(module) == "SWDLoss(prior='hypersphere', prior_samples=[5, 4], projections=[3, 4])"
    for argument in ("prior_samples", "projections"):
        with pytest.raises(TypeError, match=f"SWDLoss: {argument} must be a tensor, got list"):
            SWDLoss(**{argument: [1.0]})
