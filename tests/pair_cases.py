"""The losses of rows against other rows, and of labels, as cases: their inputs, the specification and the eager form
that people write, and the comparison under the error rule."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from error_rule import FLOOR, check
from fastcl import (
    clip_loss,
    dcl_loss,
    info_nce,
    instance_discrimination_loss,
    nt_xent_views,
    reference,
    siglip_loss,
    supcon_loss,
)
from fastcl.ops.chunked import compute_dtype

SEED = 11


class Case(NamedTuple):
    """A loss, its specification and the eager form, all functions of (*rows, *numbers) and the options that losses
    share: `rows` are tensors that get gradients, `numbers` a temperature, or a logit scale and bias."""

    rows: list[Tensor]
    numbers: tuple[float, ...]
    ours: Callable[..., Tensor]
    spec: Callable[..., Tensor]
    eager: Callable[..., Tensor]

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Rows and numbers as leaves, the latter rounded to what the loss calculates in whatever the dtype."""
        own = self.rows[0].dtype
        rows = [x.detach().to(dtype or own).requires_grad_() for x in self.rows]
        wide, device = compute_dtype(dtype or own), rows[0].device
        numbers = [torch.tensor(x, dtype=compute_dtype(own), device=device).to(wide) for x in self.numbers]
        return rows + [x.requires_grad_() for x in numbers]


def drawn(seed: int = SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(count: int, n: int, d: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(n, d, device=device).to(dtype) for _ in range(count)]


def labels(n: int, device: str = "cpu") -> Tensor:
    """Labels of 1, 3, 5, ... rows, in no order: one row has no positive."""
    return torch.arange(n).float().sqrt().long()[torch.randperm(n, generator=drawn())].to(device)


def units(normalize: bool, *xs: Tensor) -> list[Tensor]:
    return [F.normalize(x, dim=1) for x in xs] if normalize else list(xs)


def eager_clip(image, text, scale, *, normalize=False, reduction="mean"):
    x, y = units(normalize, image, text)
    logits = scale * x @ y.T
    target = torch.arange(len(x), device=x.device)
    both = [F.cross_entropy(S, target, reduction="none") for S in (logits, logits.T)]
    return reference.reduce_rows(torch.cat(both), reduction)


def eager_siglip(image, text, scale, bias, *, normalize=False, reduction="mean"):
    x, y = units(normalize, image, text)
    logits = scale * x @ y.T + bias
    signs = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
    return reference.reduce_rows(-F.logsigmoid(signs * logits).sum(1), reduction)


def eager_info_nce(
    query, keys, negatives, temperature, *, in_batch=None, ids=None, log_q=None, negative_indices=None,
    normalize=True, reduction="mean",
):  # fmt: skip
    """The target's column first (a queue), or on the diagonal (a batch)."""
    q, k = units(normalize, query, keys)
    if in_batch or negatives is None:
        logits = q @ k.T / temperature
        logits = logits if log_q is None else logits - log_q.to(logits)
        target = torch.arange(len(q), device=q.device)
        if ids is not None:
            same = (ids[:, None] == ids[None, :]) & (target[:, None] != target)
            logits = logits.masked_fill(same, -torch.inf)
    else:
        logits = (q * k).sum(1, keepdim=True) / temperature
        target = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    if negatives is not None:
        more = q @ units(normalize, negatives)[0].T / temperature
        more = more if negative_indices is None else more.gather(1, negative_indices.long())
        logits = torch.cat([logits, more], 1)
    return F.cross_entropy(logits, target, reduction=reduction)


def eager_supcon(features, labels, temperature, *, form="out", normalize=True, reduction="mean"):
    (z,) = units(normalize, features)
    logits = z @ z.T / temperature
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels[None, :]) & ~own
    log_p = logits - logits.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
    count = positive.sum(1)
    has = count > 0
    if form == "out":
        found = -(log_p * positive).sum(1)[has] / count[has]
    else:
        found = count[has].to(z).log() - log_p.masked_fill(~positive, -torch.inf)[has].logsumexp(1)
    if reduction == "mean":
        return found.sum() / max(len(found), 1)
    return reference.reduce_rows(torch.zeros_like(z[:, 0]).index_put((has.nonzero()[:, 0],), found.to(z)), reduction)


def eager_dcl(z1, z2, temperature, *, normalize=True, reduction="mean"):
    z1, z2 = units(normalize, z1, z2)
    z = torch.cat([z1, z2])
    logits = z @ z.T / temperature
    own = torch.eye(len(z1), dtype=torch.bool, device=z.device).repeat(2, 2)
    found = logits.masked_fill(own, -torch.inf).logsumexp(1) - (z1 * z2).sum(1).repeat(2) / temperature
    return reference.reduce_rows(found, reduction)


def eager_instance(query, indices, bank, temperature, *, noise=None, log_z=None, normalize=True, reduction="mean"):
    (q,) = units(normalize, query)
    logits = q @ bank.to(q).T / temperature
    if noise is None:
        return F.cross_entropy(logits, indices.long(), reduction=reduction)
    n, m = len(bank), len(noise)
    if log_z is None:
        log_z = logits[:, noise].detach().exp().mean().log() + math.log(n)
    positive = logits.gather(1, indices[:, None].long())[:, 0]
    own, other = (x - log_z + math.log(n / m) for x in (positive, logits[:, noise]))
    return reference.reduce_rows(-F.logsigmoid(own) - F.logsigmoid(-other).sum(1), reduction)


# Each of these makes a Case of n rows (or pairs, or images) with d features; what gets no gradient is in its functions.


def clip(n, d, dtype, device):
    return Case(rows(2, n, d, dtype, device), (5.0,), clip_loss, reference.clip, eager_clip)


def siglip(n, d, dtype, device):
    return Case(rows(2, n, d, dtype, device), (5.0, -2.0), siglip_loss, reference.siglip, eager_siglip)


def _info_nce(given, temperature, /, ids=None, log_q=None, **own):
    """Of queries and keys, and negatives that are the third rows or `own`; the specification in float64."""
    third = own.pop("constant", None)

    def function(loss):
        def of_rows(*arguments, **options):
            *tensors, t = arguments
            negatives = tensors[2] if len(tensors) == 3 else third
            cast = tensors[0].dtype if loss is reference.info_nce else None
            if negatives is not None and cast is not None:
                negatives = negatives.to(cast)
            bias = log_q if log_q is None or cast is None else log_q.to(cast)
            return loss(tensors[0], tensors[1], negatives, t, ids=ids, log_q=bias, **own, **options)

        return of_rows

    return Case(given, (temperature,), *map(function, (info_nce, reference.info_nce, eager_info_nce)))


def batch_nce(n, d, dtype, device):
    return _info_nce(rows(2, n, d, dtype, device), 0.2)


def masked_nce(n, d, dtype, device):
    """Duplicates, and keys drawn more or less often."""
    log_q = -torch.rand(n, generator=drawn()).mul(4).to(device)
    return _info_nce(rows(2, n, d, dtype, device), 0.2, ids=labels(n, device), log_q=log_q)


def queue_nce(n, d, dtype, device):
    return _info_nce(rows(2, n, d, dtype, device) + rows(1, 2 * n + 3, d, dtype, device), 0.2)


def queue_and_batch_nce(n, d, dtype, device):
    given = rows(2, n, d, dtype, device) + rows(1, 2 * n + 3, d, dtype, device)
    return _info_nce(given, 0.2, in_batch=True, ids=labels(n, device))


def hard_nce(n, d, dtype, device):
    """Negatives chosen with repetition."""
    chosen = torch.randint(2 * n + 3, (n, n + 4), generator=drawn(), dtype=torch.int32).to(device)
    queue = rows(1, 2 * n + 3, d, dtype, device)[0]
    return _info_nce(rows(2, n, d, dtype, device), 0.2, constant=queue, negative_indices=chosen)


def _supcon(given, ids, form):
    def flat(loss):
        # The specification takes rows, each with its label.
        def of_rows(features, t, **options):
            views = features.shape[1] if features.ndim == 3 else 1
            z = features.reshape(-1, features.shape[-1])
            return loss(z, ids.repeat_interleave(views), t, form=form, **options)

        return of_rows

    def ours(features, t, **options):
        return supcon_loss(features, ids, t, form=form, **options)

    return Case(given, (0.2,), ours, flat(reference.supcon), flat(eager_supcon))


def supcon(n, d, dtype, device, form="out"):
    return _supcon(rows(1, n, d, dtype, device), labels(n, device), form)


def supcon_views(n, d, dtype, device):
    """Three views of every image."""
    return _supcon([torch.randn(n, 3, d, device=device).to(dtype)], labels(n, device), "out")


def dcl(n, d, dtype, device):
    return Case(rows(2, n, d, dtype, device), (0.2,), dcl_loss, reference.dcl, eager_dcl)


def views(n, d, dtype, device, count=3):
    def eager(given, t, **options):
        return eager_supcon(torch.cat(given), torch.arange(n, device=device).repeat(count), t, **options)

    def listed(loss):
        return lambda *given, **options: loss(list(given[:-1]), given[-1], **options)

    functions = map(listed, (nt_xent_views, reference.nt_xent_views, eager))
    return Case(rows(count, n, d, dtype, device), (0.2,), *functions)


def _instance(n, d, dtype, device, **own):
    """Of a bank that MemoryBank would hold, float32 whatever the queries are."""
    instances = 2 * n + 3
    bank = F.normalize(torch.randn(instances, d, generator=drawn(), dtype=torch.float64), dim=1)
    bank = bank.to(device, compute_dtype(dtype))
    indices = torch.randint(instances, (n,), generator=drawn()).to(device)
    estimate = own.get("num_negatives") is not None
    noise, generator = {}, lambda: {}
    if estimate:
        # The same draw as the loss makes.
        place = torch.randint(instances, (own["num_negatives"],), generator=_seeded(device), device=device)
        noise = {"noise": place} | {key: own[key] for key in own.keys() - {"num_negatives"}}
        generator = lambda: {"generator": _seeded(device)}  # noqa: E731

    def ours(query, t, **options):
        return instance_discrimination_loss(query, indices, bank, t, **own, **generator(), **options)

    def spec(query, t, **options):
        return reference.instance_discrimination(query, indices, bank.to(query), t, **noise, **options)

    def eager(query, t, **options):
        return eager_instance(query, indices, bank, t, **noise, **options)

    return Case(rows(1, n, d, dtype, device), (0.2,), ours, spec, eager)


def _seeded(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(SEED)


def noise(n, d, dtype, device):
    """The estimate with a normaliser that is given; the one it calculates depends on the temperature and is a
    constant, which no difference quotient can know."""
    return _instance(n, d, dtype, device, num_negatives=n + 4, log_z=4.0)


LOSSES = {
    "clip": clip,
    "siglip": siglip,
    "batch_nce": batch_nce,
    "masked_nce": masked_nce,
    "queue_nce": queue_nce,
    "queue_and_batch_nce": queue_and_batch_nce,
    "hard_nce": hard_nce,
    "supcon": supcon,
    "supcon_in": functools.partial(supcon, form="in"),
    "supcon_views": supcon_views,
    "dcl": dcl,
    "views": views,
    "instance": _instance,
    "noise": noise,
    "noise_own_z": lambda n, d, dtype, device: _instance(n, d, dtype, device, num_negatives=n + 4),
}


def make(loss: str, n: int, d: int, dtype: torch.dtype, device: str = "cpu") -> Case:
    return LOSSES[loss](n, d, dtype, device)


def results(function, leaves: list[Tensor], upstream: Tensor | float = 1.0, **options) -> tuple[Tensor, ...]:
    """(loss, gradient of every leaf)."""
    value = function(*leaves, **options)
    total = (value * (upstream.to(value) if isinstance(upstream, Tensor) else upstream)).sum()
    return value.detach(), *torch.autograd.grad(total, leaves)


def number_floor(case: Case, number: int, upstream: Tensor | float, **options) -> float:
    """What the gradient of a number, one sum over all rows, may be off by relative to it: what one row may, times how
    much larger the parts of all rows are than their sum. Rows and upstream gradients of either sign cancel most of it.
    In 16 bits the weights of a row are half a unit in the last place off, of which a sum need not be free."""
    leaves = case.leaves(torch.float64)
    found = case.spec(*leaves, **{**options, "reduction": "none"})
    # The gradient is linear in weights of the rows: its own gradient is the slope of every row.
    weights = torch.ones_like(found, requires_grad=True)
    (total,) = torch.autograd.grad((found * weights).sum(), leaves[number], create_graph=True)
    parts = torch.autograd.grad(total, weights)[0] * upstream
    dtype = case.rows[0].dtype
    larger = parts.abs().sum() / parts.sum().abs()
    return max(FLOOR[dtype], torch.finfo(dtype).eps / 2) * (larger.item() if parts.any() else 1.0)


def compare(case: Case, what: str, upstream: Tensor | float = 1.0, floor: float = 0.0, **options) -> None:
    """Loss and the gradients of all rows and numbers, against float64 and eager."""
    dtype = case.rows[0].dtype
    got, exact, plain = (
        results(function, case.leaves(cast), upstream, **options)
        for function, cast in ((case.ours, dtype), (case.spec, torch.float64), (case.eager, dtype))
    )
    assert got[0].dtype == compute_dtype(dtype) and all(g.dtype == dtype for g in got[1 : 1 + len(case.rows)])
    for place, (g, x, e) in enumerate(zip(got, exact, plain, strict=True)):
        label = f"gradient {place}" if place else "loss"
        g, x, e = (y.flatten(0, -2) if y.ndim == 3 else y for y in (g, x, e))
        least = number_floor(case, place - 1, upstream, **options) if place > len(case.rows) else 0.0
        check(f"{what} {label}", g, x, e, dtype, max(floor, least))
