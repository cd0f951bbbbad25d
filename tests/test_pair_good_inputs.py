"""Losses of rows against other rows, and of labels: odd but good input works, and what is said to be constant is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastcl import (
    MemoryBank,
    contrastive_stats,
    info_nce,
    instance_discrimination_loss,
    siglip_loss,
    supcon_loss,
)
from test_pair_inputs import CHOSEN, NUMBERS, VALID, K, N, rows

NAN = math.nan


def exactly(function, changes, wanted):
    """The same bits with these arguments as with those wanted."""
    results = []
    for given in (changes, wanted):
        torch.manual_seed(5)
        results.append(function(**VALID[function]() | given))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integers_of_any_type_and_strides(dtype):
    wide = torch.tensor([0, 1, 0, 2, 1, 0])
    strided = torch.stack([wide, wide + 1], 1).to(dtype)[:, 0]
    chosen = torch.arange(K)[:, None].expand(K, N).T
    for x in (wide.to(dtype), strided):
        exactly(info_nce, {"ids": x}, {"ids": wide})
        exactly(supcon_loss, {"labels": x}, {"labels": wide})
        exactly(instance_discrimination_loss, {"indices": x}, {"indices": wide})
    wanted = {"negatives": CHOSEN["negatives"], "negative_indices": chosen.contiguous()}
    exactly(info_nce, wanted | {"negative_indices": chosen.to(dtype)}, wanted)


def test_ids_are_names():
    """Of any size and sign, and only their being equal counts."""
    names = torch.tensor([-(2**63), 2**63 - 1, -(2**63), 0, 2**63 - 1, 2**32])
    wide = torch.tensor([0, 1, 0, 2, 1, 3])
    exactly(info_nce, {"ids": names}, {"ids": wide})
    exactly(supcon_loss, {"labels": names}, {"labels": wide})


@pytest.mark.parametrize("value", [3, np.float64(3.0), torch.tensor(3.0), torch.tensor([[3.0]], dtype=torch.float64)])
@pytest.mark.parametrize("function", NUMBERS, ids=lambda function: function.__name__)
def test_numbers_of_any_kind(function, value):
    argument = NUMBERS[function]
    for key in (argument, "logit_bias") if function is siglip_loss else (argument,):
        results = []
        for number in (value, 3.0):
            torch.manual_seed(5)
            results.append(function(**VALID[function]() | {key: number}))
        for got, wanted in zip(*results, strict=True) if function is contrastive_stats else [results]:
            # 1 / 3 is rounded in another type where it is a tensor.
            torch.testing.assert_close(got, wanted)


def test_scalars_without_a_range():
    """A bias and a normaliser may be 0 or negative."""
    for value in (0, -7.5, torch.tensor(-7.5)):
        assert siglip_loss(rows(), rows(), 2.0, value).isfinite()
        assert estimate_with(value).isfinite()


def estimate_with(log_z):
    return instance_discrimination_loss(rows(), torch.arange(N), rows(K), num_negatives=4, log_z=log_z)


def test_what_is_constant_gets_no_gradient():
    query, keys, bank = rows().requires_grad_(), rows(), rows(K).requires_grad_()
    log_q, log_z = torch.zeros(N, requires_grad=True), torch.zeros((), requires_grad=True)
    info_nce(query, keys, log_q=log_q).backward()
    instance_discrimination_loss(query, torch.arange(N), bank).backward()
    instance_discrimination_loss(query, torch.arange(N), bank, num_negatives=4, log_z=log_z).backward()
    assert query.grad.ne(0).any()
    assert all(x.grad is None for x in (keys, bank, log_q, log_z))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_no_negative_at_all(dtype):
    """Loss and gradient are 0 where the other keys are all copies, or there are none."""
    for n, ids in ((N, torch.zeros(N).int()), (1, None)):
        leaves = [rows(n).to(dtype).requires_grad_() for _ in range(2)]
        temperature = torch.tensor(0.2, requires_grad=True)
        loss = info_nce(*leaves, temperature=temperature, ids=ids)
        assert loss.eq(0)
        assert all(grad.eq(0).all() for grad in torch.autograd.grad(loss, [*leaves, temperature]))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_negatives_of_another_dtype(requires_grad):
    """A queue is float32 whatever the network computes in: its rows are taken as they are."""
    query, keys = (rows().double() for _ in range(2))
    queue = rows(K).requires_grad_(requires_grad)
    loss = info_nce(query, keys, queue)
    torch.testing.assert_close(loss, info_nce(query, keys, queue.detach().double()), rtol=1e-6, atol=0)
    if requires_grad:
        (grad,) = torch.autograd.grad(loss, queue)
        assert grad.dtype == torch.float32 and grad.ne(0).any()


def test_a_feature_that_is_not_finite_leaves_its_row():
    """One bad step would otherwise stay in the bank for ever: what is NaN once is so in every mean."""
    bank, features = MemoryBank(K, 8), rows(3, 8)
    before = bank.rows
    features[1, 2], features[2, 0] = NAN, math.inf
    bank.update(torch.tensor([4, 5, 6]), features)
    assert bank.rows.isfinite().all() and not torch.equal(bank.rows[4], before[4])
    assert torch.equal(bank.rows[5:7], before[5:7])
