"""How good are frozen features? A linear classifier and nearest neighbours on them say."""

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


@torch.no_grad()
def extract(encoder, loader, labels, device):
    """Features [n, d], labels [n] and indices [n] of all readable pictures; the encoder in eval mode meanwhile."""
    was_training = encoder.training
    encoder.eval()
    features, indices = [], []
    for pictures, index, unreadable in loader:
        if pictures is not None:
            pictures = pictures.to(device, memory_format=torch.channels_last)
            features.append(encoder(pictures).float())
            indices.append(index)
    encoder.train(was_training)
    if not features:
        raise UsageError(f"{unreadable[0]}: expected pictures that can be read for the probe, got none")
    indices = torch.cat(indices)
    return torch.cat(features), labels[indices].to(device), indices


def linear_probe(features, penalty=1e-3, iterations=100):
    """Test accuracy of logistic regression on standardised features, fitted by L-BFGS.

    `penalty` is fixed, not chosen by the test split: the objective is mean cross-entropy + penalty/2 * |W|^2.
    """
    mean, std = features.train.mean(0), features.train.std(0).clamp_min(1e-6)
    train, test = (features.train - mean) / std, (features.test - mean) / std
    classes = int(max(features.train_labels.max(), features.test_labels.max())) + 1
    weight = torch.zeros(classes, train.shape[1], device=train.device, requires_grad=True)
    bias = torch.zeros(classes, device=train.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight.T + bias, features.train_labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return accuracy(test @ weight.T + bias, features.test_labels)


def nearest(queries, bank, k, chunk=1024):
    """Cosine similarities and indices [q, k] of the `k` nearest rows of `bank`, without a full q x n matrix."""
    queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    found = [(part @ bank.T).topk(min(k, len(bank))) for part in queries.split(chunk)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def knn_probe(features, k=20, temperature=0.07):
    """Test accuracy of a vote of the `k` nearest training pictures, weighted by exp(cosine / temperature)."""
    similarity, index = nearest(features.test, features.train, k)
    classes = int(max(features.train_labels.max(), features.test_labels.max())) + 1
    votes = torch.zeros(len(similarity), classes, device=similarity.device)
    votes.scatter_add_(1, features.train_labels[index], (similarity / temperature).exp())
    return accuracy(votes, features.test_labels)


def accuracy(scores, labels):
    return (scores.argmax(1) == labels).float().mean().item()


@torch.no_grad()
def contrastive_top1(z1, z2, chunk=1024):
    """Share of the 2N projections whose most similar other one is their partner; never a 2N x 2N matrix."""
    rows = F.normalize(torch.cat([z1, z2]).float(), dim=1)
    total = len(rows)
    hits = 0
    for start in range(0, total, chunk):
        similarity = rows[start : start + chunk] @ rows.T
        own = torch.arange(start, start + len(similarity), device=rows.device)
        similarity[own - start, own] = -2.0  # below every cosine: a row is not its own neighbour
        hits += (similarity.argmax(1) == (own + total // 2) % total).sum()
    return (hits / total).item()
