"""Probes of frozen features in the trainer of examples/: scores by hand, both solvers, and no random number drawn."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from trainer_cases import one_thread  # noqa: F401  (the fixture applies here too)

from simclr import probe
from simclr.errors import UsageError


def features_of(rows, labels, split):
    index = torch.arange(len(rows))
    return probe.Features(rows[:split], labels[:split], index[:split], rows[split:], labels[split:], index[split:])


def separable(n=120, classes=4, dim=16):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    rows = torch.randn(classes, dim, generator=generator)[labels] * 3
    return features_of(rows + 0.3 * torch.randn(n, dim, generator=generator), labels, n // 2)


# Scores


def test_scores_by_hand():
    logits = torch.tensor([
        [0.1, 0.9, 0.2, 0.3, 0.4, 0.5],  # class 1 is first, class 0 last
        [0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
        [0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
        [0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
    ])
    assert probe.scores(logits, torch.tensor([1, 0, 1, 4])) == probe.Scores(0.5, 1.0)
    assert probe.scores(logits, torch.tensor([0, 0, 5, 4])) == probe.Scores(0.25, 0.5)


def test_of_few_classes_all_are_among_the_first_five():
    logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    assert probe.scores(logits, torch.tensor([0, 0])) == probe.Scores(0.5, 1.0)


def on_circle(*degrees):
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_neighbours_vote_by_their_cosine():
    train, labels = on_circle(0.0, 8.0, 12.0, 40.0, 180.0), torch.tensor([0, 1, 1, 2, 3])
    found = probe.Features(train, labels, labels, on_circle(1.0, 1.0, 1.0, 1.0), torch.tensor([0, 1, 2, 3]), labels)
    assert probe.knn_probe(found, k=1) == probe.Scores(0.25, 0.25)  # the one of class 0, and no other class has a vote
    # cosines 0.9998, 0.9925, 0.9816: 0.9 of a vote for class 1's nearer one and 0.77 for the other, together the most
    assert probe.knn_probe(found, k=3) == probe.Scores(0.25, 0.5)
    assert probe.knn_probe(found, k=4).top5 == 0.75
    assert probe.knn_probe(found, k=99) == probe.knn_probe(found, k=5) == probe.Scores(0.25, 1.0)
    # so sharp that the nearest alone decides
    found.test_labels = torch.zeros(4, dtype=torch.long)
    assert probe.knn_probe(found, k=3).top1 == 0.0 and probe.knn_probe(found, k=3, temperature=0.003).top1 == 1.0


def test_nearest_in_chunks_is_the_full_matrix():
    queries, bank = torch.randn(23, 5), torch.randn(31, 5)
    unit = torch.nn.functional.normalize
    expected = (unit(queries) @ unit(bank).T).topk(4)
    for chunk in (1, 10, 1024):
        cosine, index = probe.nearest(queries, bank, 4, chunk)
        torch.testing.assert_close(cosine, expected.values)
        assert torch.equal(index, expected.indices)


# Linear probe


@pytest.mark.parametrize("solver", probe.SOLVERS)
def test_separable_features_are_told_apart_and_meaningless_ones_are_not(solver):
    features = separable()
    assert probe.linear_probe(features, solver) == probe.knn_probe(features) == probe.Scores(1.0, 1.0)
    features.train, features.test = torch.randn(2, *features.train.shape)
    assert probe.linear_probe(features, solver).top1 < 0.6 and probe.knn_probe(features).top1 < 0.6


@pytest.mark.parametrize("solver", probe.SOLVERS)
def test_scale_and_place_of_features_do_not_matter(solver):
    features = separable(n=400, classes=8, dim=8)
    features.train, features.test = (rows + 4 * torch.randn(200, 8) for rows in (features.train, features.test))
    before = probe.linear_probe(features, solver)
    assert 0.2 < before.top1 < 0.95 and before.top1 < before.top5
    scale = 2.0 ** torch.arange(-12, 12, 3)  # powers of two: no digit is another one
    features.train, features.test = features.train * scale, features.test * scale
    assert probe.linear_probe(features, solver) == before
    features.train, features.test = features.train + 64 * scale, features.test + 64 * scale
    # Four of 200 pictures: 4 of 23 bits are lost, and sgd's rate multiplies what rounding does.
    assert abs(probe.linear_probe(features, solver).top1 - before.top1) <= 0.02


def test_lbfgs_finds_the_minimum():
    rows, labels = torch.randn(80, 6), torch.arange(80) % 3
    weight, bias = (x.double().requires_grad_() for x in probe.SOLVERS["lbfgs"](rows, labels, 3))
    loss = torch.nn.functional.cross_entropy(rows.double() @ weight.T + bias, labels) + 5e-4 * weight.square().sum()
    loss.backward()
    assert weight.detach().norm() > 0.1
    # The search stops where the loss, of order 1 in float32, changes no more: at gradients near the root of its 6e-8.
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 2.5e-4


def test_sgd_is_momentum_with_a_cosine_over_shuffled_epochs():
    # Twelve classes and five epochs: a rate of 30 is made for a thousand, and of few it goes to and fro for a while,
    # which multiplies what rounding did.
    rows, labels = torch.randn(600, 4), torch.arange(600) % 12
    weight, bias = probe.SOLVERS["sgd"](rows, labels, 12, epochs=5)
    unit, generator = rows.double() / 2, torch.Generator().manual_seed(0)  # four features: length 2 on average
    one_hot = torch.nn.functional.one_hot(labels).double()
    w, b, vw, vb = torch.zeros(12, 4).double(), torch.zeros(12).double(), 0, 0
    for epoch in range(5):
        lr = 15 * (1 + np.cos(np.pi * epoch / 5))
        order = torch.randperm(600, generator=generator)
        for chosen in (order[:256], order[256:512], order[512:]):
            error = ((unit[chosen] @ w.T + b).softmax(1) - one_hot[chosen]) / len(chosen)
            vw, vb = 0.9 * vw + error.T @ unit[chosen], 0.9 * vb + error.sum(0)
            w, b = w - lr * vw, b - lr * vb
    assert min(w.abs().max(), b.abs().max()) > 1
    # Each of 15 steps is rounded to 6e-8 of terms of order 1, times a rate of 30 and ten steps of momentum.
    torch.testing.assert_close(weight.double(), w / 2, rtol=0, atol=3e-4)
    torch.testing.assert_close(bias.double(), b, rtol=0, atol=3e-4)


def test_unknown_solver():
    with pytest.raises(ValueError, match="linear_probe: solver: expected lbfgs or sgd, got 'adam'"):
        probe.linear_probe(separable(), "adam")


def test_probes_draw_no_random_number():
    features = separable()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    found = [probe.linear_probe(features, solver) for solver in probe.SOLVERS]
    probe.knn_probe(features)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    torch.manual_seed(99)
    assert found == [probe.linear_probe(features, solver) for solver in probe.SOLVERS]


# Features


def test_extract_reads_what_can_be_read_in_eval_mode():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(4, affine=False))
    pictures = torch.randn(3, 1, 2, 2)
    loader = [(pictures[:2], torch.tensor([0, 2]), ["one"]), (None, None, ["three"]),
              (pictures[2:], torch.tensor([4]), [])]
    rows, labels, index = probe.extract(module, loader, torch.tensor([5, 6, 7, 8, 9]), torch.device("cpu"))
    # The running statistics are still those of no batch, 0 and 1, to batch norm's eps of 1e-5.
    torch.testing.assert_close(rows, pictures.flatten(1), rtol=1e-5, atol=1e-5)
    assert labels.tolist() == [5, 7, 9] and index.tolist() == [0, 2, 4] and module.training
    assert not rows.requires_grad


def test_nothing_that_can_be_read():
    with pytest.raises(UsageError, match="one: expected pictures that can be read for the probe, got none"):
        probe.extract(torch.nn.Flatten(), [(None, None, ["one"])], torch.tensor([0]), torch.device("cpu"))
