"""fastcl.integrations.lightly against lightly itself, step by step where it has a memory bank."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastcl import reference
from fastcl.integrations.lightly import NTXentLoss
from peers import agree, cold, hold, learned, require, same_arguments

lightly = require("lightly")


def test_arguments():
    same_arguments(NTXentLoss, lightly.NTXentLoss)


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_without_bank(n, temperature):
    rows = torch.randn(2, n, 6, dtype=torch.float64)
    options = {"temperature": temperature}
    agree(NTXentLoss(**options), lightly.NTXentLoss(**options), *rows)


def test_without_bank_in_float32():
    hold(
        NTXentLoss(0.1),
        lightly.NTXentLoss(0.1),
        lambda a, b: reference.nt_xent(a, b, 0.1),
        *torch.randn(2, 40, 12, dtype=torch.float64),
    )


def test_default_temperature():
    rows = torch.randn(2, 9, 6, dtype=torch.float64)
    agree(NTXentLoss(), lightly.NTXentLoss(), *rows)


def both_with_bank(size, dim, dtype=torch.float64):
    """Both losses, with the same rows of unit length in their banks."""
    ours, theirs = (kind(0.2, memory_bank_size=(size, dim)).to(dtype) for kind in (NTXentLoss, lightly.NTXentLoss))
    start = F.normalize(torch.randn(size, dim, dtype=dtype))
    theirs.memory_bank.bank.copy_(start)
    ours.memory_bank.rows.copy_(start)
    return ours, theirs


def same_bank(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours.memory_bank.rows, theirs.memory_bank.bank, rtol=0, atol=tolerance)
    assert ours.memory_bank.position == theirs.memory_bank.bank_ptr


# Of ten places: a batch that fits to the last place, some that run over the end, one place alone, more than there are.
@pytest.mark.parametrize("batches", [(5, 5, 5), (4, 4, 4, 4), (1, 1, 9, 3), (7, 10, 10), (12, 3, 8, 2)], ids=str)
def test_bank_over_steps(batches):
    ours, theirs = both_with_bank(10, 6)
    for n in batches:
        agree(ours, theirs, *torch.randn(2, n, 6, dtype=torch.float64))
        same_bank(ours, theirs)


def test_bank_in_float32():
    ours, theirs = both_with_bank(64, 12, torch.float32)
    for _ in range(3):
        bank = ours.memory_bank.rows.double()
        hold(
            ours,
            theirs,
            lambda a, b: reference.info_nce(a, b, bank, 0.2),
            *torch.randn(2, 24, 12, dtype=torch.float64),
        )
        # Each normalises in its own way.
        same_bank(ours, theirs, 1e-6)


def test_bank_is_kept_where_nothing_is_learned():
    ours, theirs = both_with_bank(10, 6)
    a, b = torch.randn(2, 4, 6, dtype=torch.float64)
    start = ours.memory_bank.rows.clone()
    for criterion in (ours, theirs):
        with torch.no_grad():
            criterion(a.clone().requires_grad_(), b)
        criterion(a, b.clone().requires_grad_())
    same_bank(ours, theirs)
    assert torch.equal(ours.memory_bank.rows, start)


def test_state_dict_is_that_of_the_original():
    """A checkpoint of a model with lightly's loss loads into the same model with this one."""
    options = {"memory_bank_size": (10, 6)}
    assert list(NTXentLoss(**options).state_dict()) == list(lightly.NTXentLoss(**options).state_dict())


@pytest.mark.parametrize("size", [0, (0,), [0, 6]])
def test_no_bank_of_size_zero(size):
    agree(
        NTXentLoss(0.2, memory_bank_size=size),
        lightly.NTXentLoss(0.2, memory_bank_size=size),
        *torch.randn(2, 4, 6, dtype=torch.float64),
    )


def without_difference(a, b, temperature):
    """The specification, with no difference of large numbers: the positive is in no sum."""
    z = reference.stack_views(a, b)
    negatives = reference.similarity_lse(z, z, 1 / temperature, 0, len(a))
    return reference.cross_entropy_rows(negatives, reference.positives(z) / temperature).mean()


def test_low_temperature():
    cold(NTXentLoss(1e-3), lambda a, b: without_difference(a, b, 1e-3), *torch.randn(2, 64, 16).double())


def test_learned_batch():
    a = torch.randn(64, 16).double()
    learned(
        NTXentLoss(0.01),
        lightly.NTXentLoss(0.01),
        lambda a, b: without_difference(a, b, 0.01),
        a,
        a + 0.1 * torch.randn(64, 16),
    )
