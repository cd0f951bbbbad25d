"""The methods of the trainer, each against its formula written out; and what they leave alone."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import trainer_cases  # noqa: F401  (skips where the examples' packages are missing, and puts them on the path)

import fastcl
from simclr import data, methods, settings

normalize = torch.nn.functional.normalize


def build(*arguments):
    chosen = settings.parse(["digits", "--width", "4", "--head-out", "16", *arguments], "test")
    chosen.queue = chosen.queue or 64
    torch.manual_seed(0)
    return methods.build(chosen, data.open_data("digits")).train()


def batch(method, count=12):
    generator = torch.Generator().manual_seed(1)
    views = [torch.rand(count, 1, 48, 48, generator=generator) for _ in range(method.views)]
    return views, torch.randperm(100, generator=generator)[:count]


def step(method, progress=0.5):
    """Rows, targets and loss of one step, without an optimiser."""
    views, index = batch(method)
    targets = method.targets(views, index)
    seen = method.online(views)
    rows = method.network(torch.cat(seen)).chunk(len(seen))
    return rows, targets, method.loss(rows, targets)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_step_moves_every_parameter_of_the_network_alone(name):
    method = build("--method", name)
    *_, loss = step(method)
    loss.backward()
    grads = {n: p.grad for n, p in method.named_parameters()}
    assert {n for n, grad in grads.items() if grad is not None} == {n for n in grads if n.startswith("network.")}
    assert all(grad.isfinite().all() for grad in grads.values() if grad is not None)
    assert any(grad.abs().max() > 0 for grad in grads.values() if grad is not None)


def test_moco_is_cross_entropy_of_the_key_against_the_queue():
    method = build("--method", "moco-v2", "--temperature", "0.3")
    queue = method.queue.rows.clone()
    (query,), (keys, seen), loss = step(method)
    assert torch.equal(seen, queue)
    query, keys = normalize(query.double(), dim=1), normalize(keys.double(), dim=1)
    logits = torch.cat([(query * keys).sum(1, keepdim=True), query @ queue.double().T], 1) / 0.3
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    method.update((keys, seen), 0.1)  # which puts the keys themselves into the queue
    top1 = method.top1([query.float()], (keys.float(), seen))
    assert top1 == (logits.argmax(1) == 0).double().mean()


def test_moco_with_hard_negatives_sees_the_chosen_keys():
    method = build("--method", "moco-v2", "--temperature", "0.3", "--hard-negatives", "24")
    torch.manual_seed(5)
    (query,), (keys, seen), _ = step(method)
    torch.manual_seed(5)
    loss = method.loss([query], (keys, seen))
    torch.manual_seed(5)
    chosen = fastcl.sample_hard_negatives(query.detach(), seen, 24).long()
    query, keys = normalize(query.double(), dim=1), normalize(keys.double(), dim=1)
    negatives = torch.einsum("nd,nkd->nk", query, seen.double()[chosen])
    logits = torch.cat([(query * keys).sum(1, keepdim=True), negatives], 1) / 0.3
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_moco_keys_are_those_of_the_second_view_in_the_queries_order():
    method = build("--method", "moco-v2", "--norm", "group")
    views, index = batch(method)
    keys, _ = method.targets(views, index)
    torch.testing.assert_close(keys, method.network(views[1]).detach(), rtol=1e-4, atol=1e-5)


def test_moco_update_enqueues_and_averages():
    method = build("--method", "moco-v2", "--momentum", "0.75")
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(1.0)
    before = state(method)
    keys = torch.randn(5, 16)
    method.update((keys, None), 0.1)
    torch.testing.assert_close(method.queue.rows[:5], normalize(keys, dim=1))
    assert torch.equal(method.queue.rows[5:], before["queue.rows"][5:])
    for name, parameter in method.average.network.named_parameters():
        expected = 0.75 * before[f"average.network.{name}"] + 0.25 * before[f"network.{name}"]
        torch.testing.assert_close(parameter, expected)
    assert torch.equal(method.network.head[0].weight, before["network.head.0.weight"])


def test_byol_is_two_minus_two_cosines_of_the_other_view():
    method = build("--method", "byol")
    rows, targets, loss = step(method)
    cosine = [torch.nn.functional.cosine_similarity(a.double(), b.double()).mean()
              for a, b in zip(rows, reversed(targets))]
    torch.testing.assert_close(loss.double(), 4 - 2 * sum(cosine), rtol=1e-5, atol=0)
    assert not any(target.requires_grad for target in targets)
    assert method.average.network.predictor is None and method.network.predictor is not None


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_byol_momentum_grows_to_one(progress):
    method = build("--method", "byol", "--momentum", "0.8")
    with torch.no_grad():
        method.network.encoder[0].weight.add_(1.0)
    start = method.average.network.encoder[0].weight.clone()
    method.update(None, progress)
    share = 0.2 * (math.cos(math.pi * progress) + 1) / 2
    torch.testing.assert_close(method.average.network.encoder[0].weight, start + share)


def test_instance_discrimination_is_cross_entropy_over_the_bank():
    method = build("--method", "instdisc", "--bank-momentum", "0.25")
    bank = method.criterion.bank.rows.clone()
    (query,), (index, seen), loss = step(method)
    assert torch.equal(seen, bank) and len(bank) == len(data.open_data("digits").train)
    query = normalize(query.detach().double(), dim=1)
    logits = query @ bank.double().T / 0.07
    torch.testing.assert_close(loss.double(), torch.nn.functional.cross_entropy(logits, index), rtol=1e-5, atol=0)
    assert method.top1([query.float()], (index, bank)) == (logits.argmax(1) == index).double().mean()
    mixed = normalize(0.25 * bank[index].double() + 0.75 * query, dim=1)
    torch.testing.assert_close(method.criterion.bank.rows[index].double(), mixed, rtol=1e-5, atol=1e-6)


def test_parts_of_the_average_give_the_same_rows():
    whole, parts = (build("--method", "moco-v2", "--norm", "group", "--grad-cache-chunks", str(n)) for n in (1, 3))
    pictures = batch(whole)[0][0]
    torch.testing.assert_close(whole.average(pictures), parts.average(pictures), rtol=1e-4, atol=1e-5)


def test_simclr_top1_counts_the_nearest_rows():
    method = build()
    rows = torch.randn(2, 20, 16)
    rows[1, :10] = rows[0, :10] + 0.01 * rows[1, :10]
    found = normalize(rows.flatten(0, 1), dim=1)
    nearest = (found @ found.T).fill_diagonal_(-2).argmax(1)
    assert method.top1(rows, None).item() == (nearest == torch.arange(40).roll(20)).double().mean()
