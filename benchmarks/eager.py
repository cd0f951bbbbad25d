"""The losses as they are usually written in plain PyTorch: the other side of every comparison.

Written to be as fast as these forms get (one fused cross entropy, the diagonal filled in place; sorts along the
contiguous dimension), so that the ratio is not flattered. What compares rows builds the matrix of similarities; the
sliced Wasserstein distance builds sorted copies and int64 indices of the [P, N] projections.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> Tensor:
    """The loss of two views [N, D], differentiable by autograd."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = z @ z.T / temperature
    logits.fill_diagonal_(float("-inf"))
    target = torch.arange(z.shape[0], device=z.device).roll(z1.shape[0])
    return F.cross_entropy(logits, target)


def dcl(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent with the positive in no sum."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = z @ z.T / temperature
    logits.fill_diagonal_(float("-inf"))
    partner = torch.arange(z.shape[0], device=z.device).roll(z1.shape[0])[:, None]
    others = logits.scatter(1, partner, float("-inf"))
    return (others.logsumexp(1) - logits.gather(1, partner).squeeze(1)).mean()


def info_nce(query: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Every query against the keys of the batch."""
    logits = F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def clip(image: Tensor, text: Tensor, logit_scale: float) -> Tensor:
    """Both directions from one matrix of logits."""
    logits = logit_scale * image @ text.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def siglip(image: Tensor, text: Tensor, logit_scale: float, logit_bias: float) -> Tensor:
    logits = logit_scale * image @ text.T + logit_bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def queue_info_nce(query: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """As MoCo writes it: one column for the positive, one for every row of the queue."""
    positive = (query * keys).sum(1, keepdim=True)
    logits = torch.cat([positive, query @ queue.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def supcon(features: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    z = F.normalize(features, dim=1)
    logits = z @ z.T / temperature
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels[None, :]) & ~own
    log_p = logits - logits.masked_fill(own, float("-inf")).logsumexp(1, keepdim=True)
    count = positive.sum(1)
    return -((log_p * positive).sum(1) / count.clamp(min=1))[count > 0].mean()


def wasserstein_1d(x: Tensor, y: Tensor) -> Tensor:
    """Mean over P of the squared distance of projections x [P, N] of the data and y [P, N] of as many samples."""
    return ((x.sort(1).values - y.sort(1).values) ** 2).mean()


def swd(z: Tensor, samples: Tensor, directions: Tensor) -> Tensor:
    """Squared sliced Wasserstein distance of rows z [N, d] and samples [N, d] along directions [P, d]."""
    return wasserstein_1d(directions @ z.T, directions @ samples.T)


def swd_loss(z: Tensor) -> Tensor:
    """The same to the unit sphere, with samples and d orthonormal directions drawn anew."""
    # In float32 at least: a QR knows no 16-bit types, and most of their projections would be equal.
    z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
    samples = F.normalize(torch.randn_like(z), dim=1)
    columns = torch.linalg.qr(torch.randn(z.shape[1], z.shape[1], dtype=z.dtype, device=z.device)).Q
    return swd(z, samples, columns.T)


def compiled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss through torch.compile, for fixed shapes; caches of earlier shapes are dropped first."""
    torch.compiler.reset()
    return torch.compile(loss, fullgraph=True, dynamic=False)


def bytes_needed(m: int, itemsize: int) -> int:
    """About the peak of NT-Xent forward + backward: three [M, M] matrices at once, and one for an allocator's gaps."""
    return 4 * m * m * itemsize
