"""How good are frozen features? A linear classifier and nearest neighbours on them say.

Nothing here draws from the program's random streams: a run is the same with and without probes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .errors import UsageError


@dataclass
class Features:
    """Features and labels of both splits; `*_index` says which picture of the split a row belongs to."""

    train: torch.Tensor  # [n, d]
    train_labels: torch.Tensor  # [n]
    train_index: torch.Tensor  # [n]
    test: torch.Tensor  # [m, d]
    test_labels: torch.Tensor  # [m]
    test_index: torch.Tensor  # [m]

    @property
    def classes(self):
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


@dataclass(frozen=True)
class Scores:
    """Shares of the test pictures whose class a probe names first, and among its first five."""

    top1: float
    top5: float  # where there are fewer than five classes: among all of them


@torch.no_grad()
def extract(encoder, loader, labels, device):
    """Features [n, d], labels [n] and indices [n] of all readable pictures; the encoder in eval mode meanwhile."""
    was_training = encoder.training
    encoder.eval()
    features, indices, unreadable = [], [], []
    for pictures, index, unreadable in loader:
        if pictures is not None:
            pictures = pictures.to(device, memory_format=torch.channels_last)
            features.append(encoder(pictures).float())
            indices.append(index)
    encoder.train(was_training)
    if not features:
        name = unreadable[0] if unreadable else "a split"
        raise UsageError(f"{name}: expected pictures that can be read for the probe, got none")
    indices = torch.cat(indices)
    return torch.cat(features), labels[indices].to(device), indices


def linear_probe(features, solver="lbfgs"):
    """Test scores of logistic regression on features that are standardised by the training split.

    `lbfgs` minimises mean cross-entropy + 1e-3 / 2 * |W|^2 over the whole split: a minimum that the features alone
    decide. `sgd` is the linear evaluation of MoCo's paper, with a cosine for the two steps of its learning rate, for
    comparison with published figures. No setting of either is chosen by the test split.
    """
    if solver not in SOLVERS:
        raise ValueError(f"linear_probe: solver: expected {' or '.join(SOLVERS)}, got {solver!r}")
    mean, std = features.train.mean(0), features.train.std(0).clamp_min(1e-6)
    train, test = (features.train - mean) / std, (features.test - mean) / std
    weight, bias = SOLVERS[solver](train, features.train_labels, features.classes)
    return scores(test @ weight.T + bias, features.test_labels)


def _classifier(rows, classes):
    weight = torch.zeros(classes, rows.shape[1], device=rows.device, requires_grad=True)
    return weight, torch.zeros(classes, device=rows.device, requires_grad=True)


def _by_lbfgs(rows, labels, classes, penalty=1e-3, iterations=100):
    weight, bias = _classifier(rows, classes)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(rows @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _by_sgd(rows, labels, classes, lr=30.0, epochs=100, batch=256, momentum=0.9):
    weight, bias = _classifier(rows, classes)
    # Standardised rows are as long as the root of their width. At a length of 1, on average, a rate of 30 means the
    # same for every encoder, and is one that descends.
    scale = rows.shape[1] ** -0.5
    rows, generator = rows * scale, torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows), generator=generator).to(rows.device).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(rows[chosen] @ weight.T + bias, labels[chosen]).backward()
            optimizer.step()
        schedule.step()
    return scale * weight.detach(), bias.detach()


SOLVERS = {"lbfgs": _by_lbfgs, "sgd": _by_sgd}


def nearest(queries, bank, k, chunk=1024):
    """Cosine similarities and indices [q, k] of the `k` nearest rows of `bank`, without a full q x n matrix."""
    queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    found = [(part @ bank.T).topk(min(k, len(bank))) for part in queries.split(chunk)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def knn_probe(features, k=20, temperature=0.07):
    """Test scores of a vote of the `k` nearest training pictures, weighted by exp(cosine / temperature)."""
    similarity, index = nearest(features.test, features.train, k)
    votes = torch.zeros(len(similarity), features.classes, device=similarity.device)
    votes.scatter_add_(1, features.train_labels[index], ((similarity - 1) / temperature).exp())  # at most 1 each
    return scores(votes.masked_fill(votes == 0, -math.inf), features.test_labels)


def scores(logits, labels):
    """`Scores` of rows [m, classes]; a class at -inf is not named at all."""
    best = logits.topk(min(5, logits.shape[1]), dim=1)
    hit = (best.indices == labels[:, None]) & (best.values > -math.inf)
    return Scores(hit[:, 0].float().mean().item(), hit.any(1).float().mean().item())
