"""Losses of rows against other rows, and of labels, as modules: settings, copies, state, the learned temperature."""

from __future__ import annotations

import copy
import inspect
import math
import pickle

import pytest
import torch

from fastcl import (
    ClipLoss,
    DCLLoss,
    InfoNCELoss,
    InstanceDiscrimination,
    MemoryBank,
    NTXentLoss,
    Queue,
    SigLIPLoss,
    SupConLoss,
    clip_loss,
    dcl_loss,
    info_nce,
    instance_discrimination_loss,
    nt_xent,
    reference,
    siglip_loss,
    supcon_loss,
)

N, D, K = 6, 8, 16
# Each with its function, options that are not the default, and what a call takes after two tensors of rows.
OTHER = {"normalize": False, "grad_reduction": "sum", "reduction": "none"}
FLIPPED = {"normalize": True, "grad_reduction": "sum", "reduction": "none"}
MODULES = {
    NTXentLoss: (nt_xent, {"temperature": 0.3, **OTHER}, ()),
    DCLLoss: (dcl_loss, {"temperature": 0.3, **OTHER}, ()),
    InfoNCELoss: (info_nce, {"temperature": 0.3, "in_batch": True, **OTHER}, (torch.randn(K, D),)),
    SupConLoss: (supcon_loss, {"temperature": 0.3, "form": "in", **OTHER}, ()),
    ClipLoss: (clip_loss, FLIPPED, (0.7,)),
    SigLIPLoss: (siglip_loss, FLIPPED, (0.7, -0.2)),
}
TEMPERED = (NTXentLoss, DCLLoss, InfoNCELoss, SupConLoss)
SPECIFIED = {NTXentLoss: reference.nt_xent, DCLLoss: reference.dcl}
SPECIFIED |= {InfoNCELoss: reference.info_nce, SupConLoss: reference.supcon}
SHARED = ("normalize", "reduction", "group", "grad_reduction", "exchange")


def inputs(module, dtype=torch.float32):
    """What a call takes, the same numbers every time."""
    first, second = torch.randn(2, N, D, generator=torch.Generator().manual_seed(3)).to(dtype).unbind(0)
    rest = (x.to(dtype) if isinstance(x, torch.Tensor) else x for x in MODULES[module][2])
    return (first, torch.arange(N) % 3) if module is SupConLoss else (first, second, *rest)


def copied(module, how):
    return copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("module", MODULES)
def test_module_equals_function(module):
    function, options, _ = MODULES[module]
    given = inputs(module)
    assert torch.equal(module(**options)(*given), function(*given, **options))
    assert torch.equal(module()(*given), function(*given))
    assert module(**options)(*given).shape != module()(*given).shape


@pytest.mark.parametrize("option,value", [("ids", torch.arange(N) % 2), ("log_q", torch.linspace(-2, 0, N))])
def test_arguments_of_a_call(option, value):
    """They go into the call, and do not stay."""
    criterion = InfoNCELoss(0.3)
    query, keys, queue = inputs(InfoNCELoss)
    plain = criterion(query, keys)
    loss = criterion(query, keys, **{option: value})
    assert torch.equal(loss, info_nce(query, keys, temperature=0.3, **{option: value})) and not torch.equal(loss, plain)
    assert torch.equal(criterion(query, keys), plain)


def test_chosen_negatives_of_a_call():
    chosen = torch.arange(N)[:, None].expand(N, 3)
    query, keys, queue = inputs(InfoNCELoss)
    loss = InfoNCELoss(0.3)(query, keys, queue, negative_indices=chosen)
    assert torch.equal(loss, info_nce(query, keys, queue, 0.3, negative_indices=chosen))


@pytest.mark.parametrize("module", [*MODULES, InstanceDiscrimination])
@pytest.mark.parametrize(
    "error,argument,options",
    [
        (TypeError, "normalize", {"normalize": "no"}),
        (TypeError, "normalize", {"normalize": None}),
        (ValueError, "reduction", {"reduction": "avg"}),
        (ValueError, "grad_reduction", {"grad_reduction": "none"}),
        (ValueError, "exchange", {"exchange": "star"}),
        (TypeError, "keyword", {"margin": 0.2}),
        (TypeError, "keyword", {"norm": True, "reduction": "sum"}),
    ],
    ids=str,
)
def test_refused_when_constructed(no_kernel, module, error, argument, options):
    sizes = (K, D) if module is InstanceDiscrimination else ()
    refused(lambda: module(*sizes, **options), module, error, argument)


def refused(make, module, error, argument):
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    message = str(caught.value)
    assert caught.type is error, message
    assert message.startswith(f"{module.__name__}: {argument} must ") and ", got " in message, message


OWN = [
    *((m, TypeError, "learnable_temperature", {"learnable_temperature": "no"}) for m in TEMPERED),
    *((m, TypeError, "learnable_temperature", {"learnable_temperature": 1}) for m in TEMPERED),
    *(
        (m, ValueError, "temperature", {"temperature": value})
        for m in (*TEMPERED, InstanceDiscrimination)
        for value in (0, -0.1, math.nan, math.inf, 10**400, torch.ones(2), torch.tensor(0.1, requires_grad=True))
    ),
    *(
        (m, TypeError, "temperature", {"temperature": value})
        for m in (*TEMPERED, InstanceDiscrimination)
        for value in ("0.1", None, True, torch.tensor(1))
    ),
    *((m, TypeError, "keyword", {"temperature": 0.1}) for m in (ClipLoss, SigLIPLoss)),
    *((m, TypeError, "keyword", {"learnable_temperature": True}) for m in (ClipLoss, SigLIPLoss)),
    *((InfoNCELoss, TypeError, "keyword", {key: None}) for key in ("ids", "log_q", "negative_indices")),
    *((InfoNCELoss, TypeError, "in_batch", {"in_batch": value}) for value in ("no", 1)),
    *((SupConLoss, ValueError, "form", {"form": value}) for value in ("both", None)),
    (SigLIPLoss, TypeError, "keyword", {"logit_bias": 1.0}),
    *((InstanceDiscrimination, ValueError, "num_negatives", {"num_negatives": value}) for value in (0, -1)),
    *((InstanceDiscrimination, TypeError, "num_negatives", {"num_negatives": value}) for value in (2.0, "2", True)),
    (InstanceDiscrimination, TypeError, "keyword", {"log_z": 1.0}),
    *((Queue, TypeError, key, {key: value}) for key in ("size", "dim") for value in (2.0, None, True, torch.tensor(2))),
    *((Queue, ValueError, key, {key: value}) for key in ("size", "dim") for value in (0, -1)),
    *((MemoryBank, TypeError, key, {key: value}) for key in ("size", "dim") for value in (2.0, None, True)),
    *((MemoryBank, ValueError, key, {key: value}) for key in ("size", "dim") for value in (0, -1)),
    *((MemoryBank, ValueError, "momentum", {"momentum": value}) for value in (-0.1, 1, 1.5, math.nan, math.inf)),
    *((MemoryBank, TypeError, "momentum", {"momentum": value}) for value in ("0.5", None, True, torch.tensor(0.5))),
    *((m, TypeError, "generator", {"generator": 3}) for m in (Queue, MemoryBank)),
]


@pytest.mark.parametrize("module,error,argument,options", OWN, ids=str)
def test_own_arguments_are_refused_when_constructed(no_kernel, module, error, argument, options):
    sizes = {"size": K, "dim": D} if module in (Queue, MemoryBank, InstanceDiscrimination) else {}
    refused(lambda: module(**sizes | options), module, error, argument)


def test_message_of_an_unknown_keyword():
    with pytest.raises(TypeError) as caught:
        InfoNCELoss(0.1, margin=0.2)
    assert str(caught.value) == (
        "InfoNCELoss: keyword must be one of in_batch, normalize, reduction, group, grad_reduction, exchange, "
        "got 'margin'"
    )


@pytest.mark.filterwarnings("error")
def test_settings_are_shown():
    shown = {
        NTXentLoss(): "NTXentLoss(temperature=0.1)",
        DCLLoss(): "DCLLoss(temperature=0.1)",
        DCLLoss(torch.tensor(0.5), reduction="sum"): "DCLLoss(temperature=0.5, reduction='sum')",
        InfoNCELoss(): "InfoNCELoss(temperature=0.07)",
        InfoNCELoss(0.2, in_batch=True): "InfoNCELoss(temperature=0.2, in_batch=True)",
        SupConLoss(learnable_temperature=True, form="in"): (
            "SupConLoss(temperature=0.1, learnable_temperature=True, form='in')"
        ),
        ClipLoss(): "ClipLoss()",
        ClipLoss(normalize=True, group="local"): "ClipLoss(normalize=True, group='local')",
        SigLIPLoss(grad_reduction="sum"): "SigLIPLoss(grad_reduction='sum')",
        Queue(K, D): "Queue(size=16, dim=8)",
        MemoryBank(K, D, momentum=0.25): "MemoryBank(size=16, dim=8, momentum=0.25)",
        InstanceDiscrimination(K, D): (
            "InstanceDiscrimination(\n  temperature=0.07\n  (bank): MemoryBank(size=16, dim=8, momentum=0.5)\n)"
        ),
        InstanceDiscrimination(K, D, momentum=0.25): (
            "InstanceDiscrimination(\n  temperature=0.07\n  (bank): MemoryBank(size=16, dim=8, momentum=0.25)\n)"
        ),
        InstanceDiscrimination(K, D, 0.1, num_negatives=4, reduction="sum"): (
            "InstanceDiscrimination(\n  temperature=0.1, num_negatives=4, reduction='sum'\n"
            "  (bank): MemoryBank(size=16, dim=8, momentum=0.5)\n)"
        ),
    }
    for module, expected in shown.items():
        assert repr(module) == expected


@pytest.mark.parametrize("module", MODULES)
def test_signature(module):
    """The function's keywords and defaults, less what belongs to a call; a temperature of its own by position."""
    function = MODULES[module][0]
    given, own = inspect.signature(function).parameters, inspect.signature(module).parameters
    names = ["temperature", "learnable_temperature"] if module in TEMPERED else []
    names += {InfoNCELoss: ["in_batch"], SupConLoss: ["form"]}.get(module, []) + list(SHARED)
    assert list(own) == names
    for name in names:
        positional = name == "temperature"
        assert own[name].kind.name == ("POSITIONAL_OR_KEYWORD" if positional else "KEYWORD_ONLY")
        assert own[name].default == (False if name == "learnable_temperature" else given[name].default)
        assert name == "group" or own[name].annotation in ("float", "bool", "str", "bool | None"), own[name]
    # As it says, so it can be called.
    options = MODULES[module][1]
    bound = inspect.signature(module).bind(**options)
    assert repr(module(*bound.args, **bound.kwargs)) == repr(module(**options))


def test_only_the_temperature_goes_by_position():
    assert SupConLoss(0.25).temperature == 0.25
    for make in (lambda: SupConLoss(0.25, True), lambda: ClipLoss(True)):
        with pytest.raises(TypeError, match="ClipLoss: arguments must have names|positional argument"):
            make()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("module", MODULES)
def test_copies(module, how):
    original = module(**MODULES[module][1])
    other = copied(original, how)
    assert repr(other) == repr(original) and torch.equal(other(*inputs(module)), original(*inputs(module)))
    assert not original.state_dict() and not list(original.parameters())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("module", TEMPERED)
def test_copies_of_a_learned_temperature(module, how):
    original = module(0.3, learnable_temperature=True, reduction="sum")
    other = copied(original, how)
    assert repr(other) == repr(original) and torch.equal(other(*inputs(module)), original(*inputs(module)))
    with torch.no_grad():
        other.log_temperature.add_(1.0)
    assert original.temperature.item() == pytest.approx(0.3)
    assert not torch.equal(other(*inputs(module)), original(*inputs(module)))


@pytest.mark.parametrize("module", TEMPERED)
def test_state_of_a_learned_temperature(module):
    original, other = (module(t, learnable_temperature=True) for t in (0.3, 0.5))
    assert list(original.state_dict()) == ["log_temperature"]
    other.load_state_dict(original.state_dict())
    assert torch.equal(other(*inputs(module)), original(*inputs(module)))


@pytest.mark.parametrize("module", TEMPERED)
def test_learnable_temperature(module):
    given = inputs(module, torch.float64)
    criterion = module(0.3, learnable_temperature=True).double()
    (parameter,) = criterion.parameters()
    criterion(*given).backward()
    logarithm = parameter.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(SPECIFIED[module](*given, temperature=logarithm.exp()), logarithm)
    torch.testing.assert_close(parameter.grad, expected)
    # A step far too large still leaves a positive temperature.
    torch.optim.SGD(criterion.parameters(), lr=100.0).step()
    assert criterion.temperature > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("module", TEMPERED)
def test_moved_to_another_dtype(module, dtype):
    """The parameter goes along, and its gradient has its dtype; the loss has that of its rows."""
    criterion = module(0.25, learnable_temperature=True).to(dtype)
    assert criterion.log_temperature.dtype == dtype and criterion.temperature.dtype == dtype
    loss = criterion(*inputs(module))
    loss.backward()
    assert loss.dtype == torch.float32 and criterion.log_temperature.grad.dtype == dtype
    exact = SPECIFIED[module](*inputs(module, torch.float64), temperature=criterion.temperature.detach().double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("module", TEMPERED)
def test_moved_to_another_device(no_kernel, module):
    """Rows elsewhere than the parameter: a scalar on the CPU serves them, one on another device does not."""
    assert module(learnable_temperature=True).to("meta").log_temperature.device.type == "meta"
    function = MODULES[module][0]
    with pytest.raises(ValueError, match=rf"^{function.__name__}: temperature must be on cpu, got meta"):
        module(learnable_temperature=True).to("meta")(*inputs(module))


@pytest.mark.gpu
@pytest.mark.parametrize("module", MODULES)
def test_moved_to_the_gpu(module):
    learned = {"learnable_temperature": True} if module in TEMPERED else {}
    criterion = module(**learned)
    given = inputs(module)
    there = [x.cuda() if isinstance(x, torch.Tensor) else x for x in given]
    # Products of the fp32 rows as the GPU forms them.
    torch.testing.assert_close(criterion.cuda()(*there).cpu(), module(**learned)(*given), rtol=1e-4, atol=1e-5)
    assert all(parameter.is_cuda for parameter in criterion.parameters())


@pytest.mark.parametrize("form", [None, 4])
def test_instances_equal_the_function(form):
    """Module and function, from the same bank, noise and normaliser."""
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    criterion = InstanceDiscrimination(K, D, 0.3, num_negatives=form, generator=generators[0], **OTHER)
    bank = copy.deepcopy(criterion.bank)
    query, indices = torch.randn(N, D), torch.arange(N)
    for _ in range(3):
        loss = criterion(query, indices)
        options = {} if form is None else {"num_negatives": form, "log_z": criterion.log_z, "generator": generators[1]}
        assert torch.equal(loss, instance_discrimination_loss(query, indices, bank.rows, 0.3, **options, **OTHER))
        bank.update(indices, query)
        assert torch.equal(criterion.bank.rows, bank.rows)
