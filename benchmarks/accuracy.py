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


def errors(
    loss: Callable[[Tensor, Tensor, float], Tensor], truth: tuple[Tensor, Tensor, Tensor], z1: Tensor, z2: Tensor,
    temperature: float,
) -> dict[str, float]:  # fmt: skip
    """Relative errors: of the loss, of both gradients together, and of their worst row against the longest row."""
    exact_loss, *exact_grads = truth
    value = loss(z1, z2, temperature)
    got = torch.cat(torch.autograd.grad(value, (z1, z2))).double()
    want = torch.cat(exact_grads)
    row = torch.linalg.vector_norm(got - want, dim=1).amax() / torch.linalg.vector_norm(want, dim=1).amax()
    return {
        "loss": ((value.detach().double() - exact_loss).abs() / exact_loss.abs()).item(),
        "gradient": (torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want)).item(),
        "worst row": row.item(),
    }
