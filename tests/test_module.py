"""NTXentLoss as a module: settings, copies, state, the learned temperature; and torch.compile."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch._dynamo.testing

from fastcl import NTXentLoss, nt_xent, reference


def _views(dtype=torch.float32, n=6):
    return tuple(torch.randn(n, 8).to(dtype) for _ in range(2))


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
        (ValueError, "exchange", {"exchange": "ring"}),
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


def test_module_equals_function():
    z1, z2 = _views()
    options = {"normalize": False, "reduction": "none", "grad_reduction": "sum"}
    assert torch.equal(NTXentLoss(0.3, **options)(z1, z2), nt_xent(z1, z2, 0.3, **options))
    assert torch.equal(NTXentLoss()(z1, z2), nt_xent(z1, z2))


@pytest.mark.filterwarnings("error")
def test_module_shows_its_settings():
    assert repr(NTXentLoss()) == "NTXentLoss(temperature=0.1)"
    shown = repr(NTXentLoss(0.07, learnable_temperature=True, normalize=False, reduction="sum", group="local"))
    for part in ("temperature=0.07", "learnable_temperature=True", "normalize=False", "'sum'", "group='local'"):
        assert part in shown


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
