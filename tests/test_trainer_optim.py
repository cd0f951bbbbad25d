"""Optimisers of the trainer of examples/, what they decay and adapt, and the learning rate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trainer_cases import one_thread  # noqa: F401

from simclr import model, optim
from simclr.errors import UsageError
from simclr.lars import LARS
from torch import nn

# LARS


def test_lars_equals_its_formula():
    start, gradients = torch.tensor([[3.0, 4.0]]), [torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, -2.0]])]
    weight = nn.Parameter(start.clone())
    optimizer = LARS([weight], lr=0.5, momentum=0.9, weight_decay=0.1, trust=0.001)
    expected, velocity = start.double().numpy(), 0.0
    for gradient, lr in zip(gradients, (0.5, 0.25)):
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = gradient.clone()
        optimizer.step()
        update = gradient.double().numpy() + 0.1 * expected
        ratio = 0.001 * np.linalg.norm(expected) / np.linalg.norm(update)
        velocity = 0.9 * velocity + lr * ratio * update
        expected = expected - velocity
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-6)


def test_lars_without_adaptation_is_momentum_sgd():
    ours, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    lars = LARS([dict(params=[ours], adapt=False)], lr=0.1)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for step in range(3):
        for weight, optimizer in ((ours, lars), (theirs, sgd)):
            weight.grad = torch.tensor([1.0, -2.0, 0.5]) * (step + 1)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("start, gradient", [(0.0, 1.0), (1.0, 0.0)])
def test_lars_with_a_norm_of_zero_stays_finite(start, gradient):
    weight = nn.Parameter(torch.full((2, 2), start))
    weight.grad = torch.full((2, 2), gradient)
    LARS([weight], lr=0.1).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), start - 0.1 * gradient))


# Parameter groups


def network():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_only_weights_are_decayed_and_adapted(name):
    decayed, plain = optim.build_optimizer(name, network(), lr=0.5, weight_decay=0.1).param_groups
    assert [p.ndim for p in decayed["params"]] == [4, 2] and [p.ndim for p in plain["params"]] == [1, 1, 1, 1]
    assert (decayed["weight_decay"], plain["weight_decay"], decayed["lr"], plain["lr"]) == (0.1, 0.0, 0.5, 0.5)
    if name == "lars":
        assert (decayed["adapt"], plain["adapt"]) == (True, False)


def test_sgd_has_momentum_and_no_lookahead():
    (group, _) = optim.build_optimizer("sgd", network(), lr=0.5, weight_decay=0.1).param_groups
    assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.9, False, 0)


def test_several_modules_share_their_groups_and_a_parameter_counts_once():
    first, second = nn.Linear(3, 2), nn.Linear(2, 3)
    second.extra = first.weight
    frozen = nn.Linear(2, 2).requires_grad_(False)
    decayed, plain = optim.build_optimizer("adamw", [first, second, frozen], lr=0.5, weight_decay=0.1).param_groups
    assert [*map(id, decayed["params"])] == [id(first.weight), id(second.weight)]
    assert [*map(id, plain["params"])] == [id(first.bias), id(second.bias)]


def test_tokens_and_positions_of_a_vit_are_left_alone():
    encoder = model.build_encoder("test_vit", 3, 32)
    modules = nn.ModuleDict({"encoder": encoder})  # their names count from the part that lists them
    decayed, plain = optim.build_optimizer("lars", modules, lr=1.0, weight_decay=0.1).param_groups
    left = {id(parameter) for parameter in plain["params"]}
    assert id(encoder.pos_embed) in left and id(encoder.cls_token) in left
    assert {parameter.ndim for parameter in plain["params"]} == {1, 3}
    assert all(parameter.ndim in (2, 4) for parameter in decayed["params"])


def test_a_description_counts_what_is_decayed():
    assert optim.describe(optim.build_optimizer("lars", network(), lr=1.0, weight_decay=1e-6)) == [
        "2 tensors of 44 parameters: weight decay 1e-06, steps scaled by norms",
        "4 tensors of 14 parameters: weight decay 0, steps not scaled",
    ]
    big = nn.Linear(1000, 2)
    assert optim.describe(optim.build_optimizer("sgd", big, lr=1.0, weight_decay=0.1)) == [
        "1 tensors of 2,000 parameters: weight decay 0.1",
        "1 tensors of 2 parameters: weight decay 0",
    ]


def test_other_names_are_refused():
    with pytest.raises(UsageError, match="--optimizer: expected lars, sgd or adamw, got adam"):
        optim.build_optimizer("adam", network(), 1.0, 0.0)
    with pytest.raises(UsageError, match="--lr-scaling: expected none, linear, sqrt, got log"):
        optim.scaled_lr(1.0, 256, "log")


# Learning rate


def test_schedule():
    factors = [optim.warmup_cosine(step, steps=110, warmup=10) for step in range(110)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[10] == 1.0 and factors[60] == pytest.approx(0.5) and 0 < factors[-1] < 1e-3
    assert optim.warmup_cosine(0, steps=1, warmup=0) == 1.0


@pytest.mark.parametrize("scaling, expected", [("none", 0.075), ("linear", 0.3), ("sqrt", 2.4)])
def test_scaling(scaling, expected):
    assert optim.scaled_lr(0.075, 1024, scaling) == pytest.approx(expected)
