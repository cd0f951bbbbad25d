"""The losses as modules: settings, copies, state, the learned temperature; and torch.compile of every loss."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch._dynamo.testing

from fastcl import (
    AlignmentLoss,
    DecoupledNTXentLoss,
    GeneralizedContrastiveLoss,
    NTXentLoss,
    SWDLoss,
    UniformityLoss,
    alignment_loss,
    decoupled_nt_xent,
    generalized_contrastive_loss,
    nt_xent,
    reference,
    swd_loss,
    uniformity_loss,
)

# Each with its function, and options that are not the default.
OTHER = {"normalize": False, "grad_reduction": "sum", "reduction": "none"}
LSE = {"distribution": "lse", "temperature": 0.3, "weight": 0.5, "loss_scale": 10}
MODULES = {
    NTXentLoss: (nt_xent, {"temperature": 0.3, **OTHER}),
    DecoupledNTXentLoss: (decoupled_nt_xent, {"temperature": 0.3, "weight": 0, **OTHER}),
    AlignmentLoss: (alignment_loss, OTHER),
    UniformityLoss: (uniformity_loss, {"t": 3, "normalize": False, "grad_reduction": "sum"}),
    SWDLoss: (swd_loss, {"prior": "normal", "num_projections": 5, "normalize": True, "reduction": "sum"}),
    GeneralizedContrastiveLoss: (generalized_contrastive_loss, LSE | OTHER),
}
ONE_TENSOR = (UniformityLoss, SWDLoss)


def _views(dtype=torch.float32, n=6):
    return tuple(torch.randn(n, 8).to(dtype) for _ in range(2))


def _call(criterion, module, **options):
    """The loss of a module or of its function; the same numbers are drawn in every call."""
    generator = torch.Generator().manual_seed(3)
    views = torch.randn(2, 6, 8, generator=generator).unbind(0)
    torch.manual_seed(4)
    return criterion(*(views[:1] if module in ONE_TENSOR else views), **options)


def _refused(module, error, argument, **options):
    return pytest.param(module, error, argument, options, id=f"{module.__name__} {options}"[:80])


@pytest.mark.parametrize(
    "error,argument,options",
    [
        *((ValueError, "temperature", {"temperature": value}) for value in (0, -0.1, math.inf, math.nan)),
        (ValueError, "temperature", {"temperature": 10**400}),
        (TypeError, "temperature", {"temperature": "0.1"}),
        (TypeError, "temperature", {"temperature": None}),
        (ValueError, "temperature", {"temperature": torch.ones(2)}),
        (ValueError, "reduction", {"reduction": "avg"}),
        (ValueError, "grad_reduction", {"grad_reduction": "none"}),
        (ValueError, "exchange", {"exchange": "star"}),
        (TypeError, "normalize", {"normalize": "no"}),
        (TypeError, "learnable_temperature", {"learnable_temperature": "no"}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:40],
)
def test_module_refuses_when_constructed(error, argument, options):
    with pytest.raises((TypeError, ValueError)) as caught:
        NTXentLoss(**options)
    message = str(caught.value)
    assert caught.type is error, message
    assert message.startswith(f"NTXentLoss: {argument} must ") and ", got " in message, message


@pytest.mark.parametrize(
    "module,error,argument,options",
    [
        *(_refused(m, TypeError, "normalize", normalize="no") for m in MODULES),
        *(_refused(m, ValueError, "reduction", reduction="avg") for m in MODULES),
        *(_refused(m, ValueError, "grad_reduction", grad_reduction="none") for m in MODULES),
        *(_refused(m, ValueError, "exchange", exchange="star") for m in MODULES),
        *(_refused(m, TypeError, "normalize", normalize=None) for m in (AlignmentLoss, UniformityLoss)),
        *(_refused(UniformityLoss, ValueError, "reduction", reduction=value) for value in ("none", "sum")),
        *(_refused(UniformityLoss, ValueError, "t", t=value) for value in (0, -2.0, math.nan, math.inf)),
        *(_refused(UniformityLoss, TypeError, "t", t=value) for value in ("2", None, True, torch.tensor(2.0))),
        *(
            _refused(m, ValueError, "weight", weight=value)
            for m in (DecoupledNTXentLoss, GeneralizedContrastiveLoss)
            for value in (-1, math.nan, math.inf)
        ),
        *(
            _refused(m, TypeError, "weight", weight=value)
            for m in (DecoupledNTXentLoss, GeneralizedContrastiveLoss)
            for value in ("1", None, True)
        ),
        *(
            _refused(m, ValueError, "temperature", temperature=value)
            for m in (DecoupledNTXentLoss, GeneralizedContrastiveLoss)
            for value in (0, math.nan, torch.tensor(0.1, requires_grad=True))
        ),
        _refused(SWDLoss, ValueError, "prior", prior="uniform"),
        _refused(SWDLoss, TypeError, "prior", prior=torch.ones(2, 2)),
        _refused(SWDLoss, ValueError, "num_projections", num_projections=0),
        _refused(SWDLoss, TypeError, "num_projections", num_projections=2.0),
        _refused(SWDLoss, TypeError, "generator", generator=3),
        _refused(GeneralizedContrastiveLoss, ValueError, "prior", prior="uniform"),
        _refused(GeneralizedContrastiveLoss, TypeError, "prior", prior=None),
        _refused(GeneralizedContrastiveLoss, ValueError, "prior", prior="normal", distribution="lse"),
        _refused(GeneralizedContrastiveLoss, ValueError, "distribution", distribution="sliced"),
        _refused(GeneralizedContrastiveLoss, ValueError, "loss_scale", loss_scale=0),
        _refused(GeneralizedContrastiveLoss, TypeError, "generator", generator=3),
    ],
)
def test_every_module_refuses_when_constructed(module, error, argument, options):
    with pytest.raises((TypeError, ValueError)) as caught:
        module(**options)
    message = str(caught.value)
    assert caught.type is error, message
    assert message.startswith(f"{module.__name__}: {argument} must ") and ", got " in message, message


@pytest.mark.parametrize("module", MODULES)
def test_module_equals_function(module):
    function, options = MODULES[module]
    assert torch.equal(_call(module(**options), module), _call(function, module, **options))
    assert torch.equal(_call(module(), module), _call(function, module))
    assert not torch.equal(_call(module(**options), module), _call(module(), module))


@pytest.mark.parametrize("module", [SWDLoss, GeneralizedContrastiveLoss])
def test_module_draws_from_its_generator(module):
    """A call moves it on, and leaves PyTorch's own where it is."""
    function, _ = MODULES[module]
    criterion = module(generator=torch.Generator().manual_seed(7))
    state = torch.random.get_rng_state()
    views = _views() if module is GeneralizedContrastiveLoss else _views()[:1]
    torch.random.set_rng_state(state)
    losses = [criterion(*views) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    generator = torch.Generator().manual_seed(7)
    for loss in losses:
        assert torch.equal(loss, function(*views, generator=generator))
    assert not torch.equal(*losses)


@pytest.mark.filterwarnings("error")
def test_module_shows_its_settings():
    assert repr(NTXentLoss()) == "NTXentLoss(temperature=0.1)"
    shown = repr(NTXentLoss(0.07, learnable_temperature=True, normalize=False, reduction="sum", group="local"))
    for part in ("temperature=0.07", "learnable_temperature=True", "normalize=False", "'sum'", "group='local'"):
        assert part in shown


@pytest.mark.filterwarnings("error")
def test_every_module_shows_its_settings():
    shown = {
        DecoupledNTXentLoss(): "DecoupledNTXentLoss(temperature=1)",
        DecoupledNTXentLoss(0.07, weight=0, normalize=False): (
            "DecoupledNTXentLoss(temperature=0.07, weight=0, normalize=False)"
        ),
        AlignmentLoss(): "AlignmentLoss()",
        AlignmentLoss(reduction="sum", group="local"): "AlignmentLoss(reduction='sum', group='local')",
        UniformityLoss(): "UniformityLoss(t=2)",
        UniformityLoss(0.5, grad_reduction="sum"): "UniformityLoss(t=0.5, grad_reduction='sum')",
        SWDLoss(): "SWDLoss(prior='hypersphere')",
        SWDLoss("normal", num_projections=64): "SWDLoss(prior='normal', num_projections=64)",
        GeneralizedContrastiveLoss(): "GeneralizedContrastiveLoss()",
        GeneralizedContrastiveLoss(temperature=torch.tensor(0.5), distribution="lse", loss_scale=1000.0): (
            "GeneralizedContrastiveLoss(distribution='lse', temperature=0.5, loss_scale=1000.0)"
        ),
    }
    for module, expected in shown.items():
        assert repr(module) == expected


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_every_module_copies(how, module):
    original = module(**MODULES[module][1])
    other = copy.deepcopy(original) if how == "deepcopy" else pickle.loads(pickle.dumps(original))
    assert repr(other) == repr(original) and torch.equal(_call(other, module), _call(original, module))
    assert not original.state_dict() and not list(original.parameters())


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_module_copies(how, learnable):
    z1, z2 = _views()
    module = NTXentLoss(0.3, learnable_temperature=learnable, reduction="sum")
    other = copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))
    assert repr(other) == repr(module) and torch.equal(other(z1, z2), module(z1, z2))
    assert list(other.state_dict()) == list(module.state_dict())
    if learnable:
        with torch.no_grad():
            other.log_temperature.add_(1.0)
        assert module.temperature.item() == pytest.approx(0.3)


def test_module_state():
    assert not NTXentLoss(0.3).state_dict() and not list(NTXentLoss(0.3).parameters())
    module = NTXentLoss(0.3, learnable_temperature=True)
    other = NTXentLoss(0.5, learnable_temperature=True)
    other.load_state_dict(module.state_dict())
    assert other.temperature.item() == pytest.approx(0.3)


def test_learnable_temperature():
    z1, z2 = _views(torch.float64)
    module = NTXentLoss(0.3, learnable_temperature=True).double()
    (parameter,) = module.parameters()
    module(z1, z2).backward()
    logarithm = parameter.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference.nt_xent(z1, z2, logarithm.exp()), logarithm)
    torch.testing.assert_close(parameter.grad, expected)
    # A step far too large still leaves a positive temperature.
    torch.optim.SGD(module.parameters(), lr=100.0).step()
    assert module.temperature > 0


@pytest.mark.parametrize("temperature", [0.2, "tensor", "module"])
def test_compiled_whole(temperature):
    """One graph, the values of the eager call, and no further compilation after the second batch size."""
    torch._dynamo.reset()
    if temperature == "module":
        criterion = NTXentLoss(0.2, learnable_temperature=True)
        extra = list(criterion.parameters())
    else:
        t = torch.tensor(0.2, requires_grad=True) if temperature == "tensor" else temperature
        criterion = lambda a, b: nt_xent(a, b, t)  # noqa: E731
        extra = [t] if temperature == "tensor" else []
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(a, b):
        return criterion(a.tanh(), b)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for n in (6, 9, 15, 2):
        leaves = [z.requires_grad_() for z in _views(n=n)]
        results = []
        for function in (step, compiled):
            loss = function(*leaves)
            results.append((loss, *torch.autograd.grad(loss, [*leaves, *extra])))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)
    assert counter.frame_count <= 2


# Each loss as a function of two views and a temperature that may be learned, where it has one.
COMPILED = {
    "decoupled": lambda a, b, t: decoupled_nt_xent(a, b, t, weight=0.2),
    "alignment": lambda a, b, t: alignment_loss(a, b),
    "uniformity": lambda a, b, t: uniformity_loss(a) + uniformity_loss(b, t=3.0, normalize=False),
    "lse": lambda a, b, t: generalized_contrastive_loss(a, b, distribution="lse", temperature=t),
    "swd": lambda a, b, t: generalized_contrastive_loss(a, b, prior="normal", loss_scale=10.0),
    "modules": None,
}


@pytest.mark.parametrize("loss", COMPILED)
def test_every_loss_compiled_whole(loss):
    """One graph, and the values of the eager call with the same draws."""
    torch._dynamo.reset()
    temperature = torch.tensor(0.3, requires_grad=True)
    modules = [DecoupledNTXentLoss(0.5), AlignmentLoss(), GeneralizedContrastiveLoss(), SWDLoss(), UniformityLoss()]

    def step(a, b):
        a = a.tanh()
        if loss == "modules":
            total = sum(module(a, b) for module in modules[:3]) + modules[3](a) + modules[4](a)
            return total + temperature
        return COMPILED[loss](a, b, temperature)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (6, 9):
        leaves = [*(z.requires_grad_() for z in _views(n=n)), temperature]
        results = []
        for function in (step, compiled):
            torch.manual_seed(5)
            value = function(*leaves[:2])
            results.append((value, *torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)
