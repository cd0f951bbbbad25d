"""fastcl.integrations.sentence_transformers against sentence_transformers itself, with a model of one matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastcl import reference
from fastcl.integrations.sentence_transformers import MultipleNegativesRankingLoss
from peers import agree, cold, hold, learned, require, same_arguments

theirs = require("sentence_transformers")
from sentence_transformers import util  # noqa: E402

SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


class Encoder(nn.Module):
    """The embedding is a matrix times the input."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))

    def forward(self, features):
        return {"sentence_embedding": features["input"] @ self.matrix}


def of_columns(kind, **options):
    """A loss as a function of the embeddings of the columns."""
    criterion = kind(nn.Identity(), **options)
    return lambda *columns: criterion([{"sentence_embedding": column} for column in columns], None)


def columns(count, n=7, d=6):
    return torch.randn(count, n, d, dtype=torch.float64).unbind(0)


def test_arguments():
    original = theirs.MultipleNegativesRankingLoss
    same_arguments(MultipleNegativesRankingLoss, original, defaults={"similarity_fct": "cos_sim"})


@pytest.mark.parametrize("options", [{}, SYMMETRIC], ids=["forward", "symmetric"])
@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_columns(count, n, options):
    """Pairs, triplets, and more hard negatives."""
    ours, original = (
        of_columns(kind, **options) for kind in (MultipleNegativesRankingLoss, theirs.MultipleNegativesRankingLoss)
    )
    agree(ours, original, *columns(count, n))


@pytest.mark.parametrize("options", [{}, SYMMETRIC], ids=["forward", "symmetric"])
@pytest.mark.parametrize("similarity", [util.cos_sim, util.pytorch_cos_sim, util.dot_score])
def test_similarities(similarity, options):
    ours, original = (
        of_columns(kind, scale=1.5, similarity_fct=similarity, **options)
        for kind in (MultipleNegativesRankingLoss, theirs.MultipleNegativesRankingLoss)
    )
    agree(ours, original, *columns(3))
    by_name = of_columns(MultipleNegativesRankingLoss, scale=1.5, similarity_fct=similarity.__name__, **options)
    agree(by_name, original, *columns(3))


def exact(q, d, *hard, scale=20.0):
    """The specification of the default."""
    return reference.info_nce(q, d, torch.cat(hard) if hard else None, 1 / scale, in_batch=True)


@pytest.mark.parametrize("count", [2, 4])
def test_in_float32(count):
    ours, original = (of_columns(kind) for kind in (MultipleNegativesRankingLoss, theirs.MultipleNegativesRankingLoss))
    hold(ours, original, exact, *columns(count, 30, 12))


def test_symmetric_in_float32():
    ours, original = (
        of_columns(kind, **SYMMETRIC) for kind in (MultipleNegativesRankingLoss, theirs.MultipleNegativesRankingLoss)
    )
    hold(ours, original, lambda q, d: reference.clip(q, d, 20.0, normalize=True), *columns(2, 30, 12))
    hold(ours, original, lambda q, d, h: (exact(q, d, h) + exact(d, q)) / 2, *columns(3, 30, 12))


@pytest.mark.parametrize("options", [{}, SYMMETRIC], ids=["forward", "symmetric"])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("mini_batch", [None, 3])
def test_gradients_of_the_model(mini_batch, count, options):
    """With mini_batch against the cached loss, which embeds, and forms its scores, three rows at a time."""
    ours = MultipleNegativesRankingLoss(nn.Sequential(Encoder()), **options)
    model = copy.deepcopy(ours.model)
    if mini_batch is None:
        original = theirs.MultipleNegativesRankingLoss(model, **options)
    else:
        original = theirs.CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch, **options)
    features = [{"input": x} for x in columns(count, 8)]
    values = [criterion(features, None) for criterion in (ours, original)]
    for value in values:
        value.backward()
    torch.testing.assert_close(*values, rtol=1e-10, atol=0)
    torch.testing.assert_close(ours.model[0].matrix.grad, model[0].matrix.grad, rtol=1e-10, atol=1e-14)


def test_config_is_part_of_the_original():
    ours, original = (
        kind(nn.Identity(), 5.0, **SYMMETRIC).get_config_dict()
        for kind in (MultipleNegativesRankingLoss, theirs.MultipleNegativesRankingLoss)
    )
    assert ours and ours.items() <= original.items()


def without_difference(q, d, *, scale):
    """The specification, with no difference of large numbers: the positive is in no sum."""
    q, d = reference.normalize(q), reference.normalize(d)
    negatives = reference.similarity_lse(q, d, scale, 0)
    return reference.cross_entropy_rows(negatives, scale * (q * d).sum(1)).mean()


def test_low_temperature():
    cold(
        of_columns(MultipleNegativesRankingLoss, scale=1e3),
        lambda q, d: without_difference(q, d, scale=1e3),
        *columns(2, 64, 16),
    )


def test_learned_batch():
    q, noise = columns(2, 64, 16)
    learned(
        of_columns(MultipleNegativesRankingLoss, scale=100.0),
        of_columns(theirs.MultipleNegativesRankingLoss, scale=100.0),
        lambda q, d: without_difference(q, d, scale=100.0),
        q,
        q + 0.1 * noise,
    )
