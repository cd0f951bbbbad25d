"""fastcl.integrations.open_clip against open_clip itself, in one process; over ranks in test_integrations_ranks.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastcl import reference
from fastcl.integrations.open_clip import ClipLoss, SigLipLoss
from peers import agree, cold, hold, learned, require, run, same_arguments

open_clip = require("open_clip")
BOTH = [(ClipLoss, open_clip.ClipLoss), (SigLipLoss, open_clip.SigLipLoss)]


def features(n=9, d=6):
    return F.normalize(torch.randn(2, n, d, dtype=torch.float64), dim=2).unbind(0)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(("ours", "theirs"), BOTH)
def test_arguments(ours, theirs):
    same_arguments(ours, theirs)


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize(("ours", "theirs"), BOTH)
def test_value_and_gradients(ours, theirs, n):
    agree(ours(), theirs(), *features(n), number(14.3), number(-10.0))


def test_without_bias():
    rows = features()
    agree(ClipLoss(), open_clip.ClipLoss(), *rows, number(14.3))
    agree(lambda *x: SigLipLoss()(*x, None), lambda *x: open_clip.SigLipLoss()(*x, None), *rows, number(3.0))


def test_numbers_for_tensors():
    agree(lambda *x: ClipLoss()(*x, 14.3, -10.0), lambda *x: open_clip.ClipLoss()(*x, 14.3, -10.0), *features())
    agree(lambda *x: SigLipLoss()(*x, 14.3, -10.0), lambda *x: open_clip.SigLipLoss()(*x, 14.3, -10.0), *features())


@pytest.mark.parametrize(("ours", "theirs"), BOTH)
def test_output_dict(ours, theirs):
    rows = features()
    got, expected = (kind()(*rows, number(14.3), number(-10.0), output_dict=True) for kind in (ours, theirs))
    assert list(got) == list(expected) == ["contrastive_loss"]
    torch.testing.assert_close(got["contrastive_loss"], expected["contrastive_loss"])


def test_in_float32():
    rows = features(40, 12)
    hold(ClipLoss(), open_clip.ClipLoss(), reference.clip, *rows, number(14.3))
    hold(SigLipLoss(), open_clip.SigLipLoss(), reference.siglip, *rows, number(10.0), number(-10.0))


def test_bias_of_a_softmax_has_a_gradient_of_zero():
    """There is one, or DistributedDataParallel would wait for it."""
    bias = number(-10.0).requires_grad_()
    ClipLoss()(*features(), 14.3, bias).backward()
    assert bias.grad is not None and bias.grad == 0


def test_arguments_without_effect():
    rows = (*features(), number(14.3), number(-10.0))
    expected = run(ClipLoss(), rows)
    got = run(ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=3), rows)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    expected = run(SigLipLoss(), rows)
    for implementation in ("bidir", "shift", "reduce", "gather"):
        got = run(SigLipLoss(cache_labels=True, rank=3, dist_impl=implementation), rows)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def without_difference(image, text, scale):
    """The specification of CLIP, with no difference of large numbers: the positive is in no sum."""
    positive = scale * (image * text).sum(1)
    directions = [reference.similarity_lse(x, y, scale, 0) for x, y in ((image, text), (text, image))]
    return torch.cat([reference.cross_entropy_rows(lse, positive) for lse in directions]).mean()


def test_low_temperature():
    rows = features(64, 16)
    cold(lambda *x: ClipLoss()(*x, 1e3), lambda *x: without_difference(*x, 1e3), *rows)
    cold(lambda *x: SigLipLoss()(*x, 1e3, -800.0), lambda *x: reference.siglip(*x, 1e3, -800.0), *rows)


def test_learned_batch():
    image = torch.randn(64, 16).double()
    text = image + 0.1 * torch.randn(64, 16)
    learned(
        lambda *x: ClipLoss()(*x, 100.0),
        lambda *x: open_clip.ClipLoss()(*x, 100.0),
        lambda *x: without_difference(*x, 100.0),
        F.normalize(image),
        F.normalize(text),
    )
