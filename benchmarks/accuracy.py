"""Errors of a loss and its gradients against float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the largest temporary.
CHUNK_ELEMENTS = 16 * 2**20


def exact(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of z1, gradient of z2) of NT-Xent in float64 on the already rounded inputs, in chunks of rows.

    By autograd and without any code of the library, so that nothing under measurement takes part.
    """
    x = torch.cat([z1.detach(), z2.detach()]).double().requires_grad_()
    unit = F.normalize(x, dim=1)
    z = unit.detach().requires_grad_()
    m = z.shape[0]
    loss = -(z * z.roll(m // 2, 0)).sum() / (temperature * m)
    grad = torch.autograd.grad(loss, z)[0]
    loss = loss.detach()
    size = max(1, CHUNK_ELEMENTS // m)
    for start in range(0, m, size):
        rows = z[start : start + size]
        similarity = rows @ z.T / temperature
        own = torch.arange(rows.shape[0], device=z.device)
        similarity[own, own + start] = float("-inf")
        part = similarity.logsumexp(1).sum() / m
        grad += torch.autograd.grad(part, z)[0]
        loss += part.detach()
    return loss, *torch.autograd.grad(unit, x, grad)[0].split(z1.shape[0])


def exact_wasserstein_1d(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, gradient of x [P, N]) in float64: the mean over P of the squared distance of the rows of x and y."""
    x = x.detach().double().requires_grad_()
    ordered = torch.sort(x, dim=1, stable=True).values
    loss = (ordered - y.detach().double().sort(1).values).square().mean()
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def exact_swd(z: Tensor, samples: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, gradient of z [N, d]) in float64 of the distance to samples [N, d] along directions [P, d]."""
    z, samples, directions = (x.detach().double() for x in (z, samples, directions))
    loss, grad = exact_wasserstein_1d(directions @ z.T, directions @ samples.T)
    return loss, grad.T @ directions


def distinct(x: Tensor) -> Tensor:
    """[P, N]: whether no other element of the row equals this one. Among equals every order gives a gradient."""
    values, places = torch.sort(x.detach(), dim=1)
    equal = values.diff(dim=1) == 0
    tied = F.pad(equal, (1, 0)) | F.pad(equal, (0, 1))
    return ~torch.zeros_like(tied).scatter(1, places, tied)


def relative(loss: Tensor, grad: Tensor, exact_loss: Tensor, exact_grad: Tensor) -> dict[str, float]:
    """Relative errors: of the loss, of the gradient [rows, d], and of its worst row against the longest row."""
    loss, grad = loss.detach().double(), grad.double()
    row = torch.linalg.vector_norm(grad - exact_grad, dim=1).amax() / torch.linalg.vector_norm(exact_grad, dim=1).amax()
    return {
        "loss": ((loss - exact_loss).abs() / exact_loss.abs()).item(),
        "gradient": (torch.linalg.vector_norm(grad - exact_grad) / torch.linalg.vector_norm(exact_grad)).item(),
        "worst row": row.item(),
    }


def errors(
    loss: Callable[[Tensor, Tensor, float], Tensor], truth: tuple[Tensor, Tensor, Tensor], z1: Tensor, z2: Tensor,
    temperature: float,
) -> dict[str, float]:  # fmt: skip
    """Relative errors of a loss of two views and of both gradients together."""
    exact_loss, *exact_grads = truth
    value = loss(z1, z2, temperature)
    grads = torch.autograd.grad(value, (z1, z2))
    return relative(value, torch.cat(grads), exact_loss, torch.cat(exact_grads))
