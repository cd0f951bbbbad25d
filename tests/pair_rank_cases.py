"""What ranks are tested with: the losses of rows and other rows, each with its specification and with what its rows
have beside their features, and arguments on which ranks disagree."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl import (
    InstanceDiscrimination,
    MemoryBank,
    Queue,
    clip_loss,
    contrastive_stats,
    dcl_loss,
    info_nce,
    instance_discrimination_loss,
    nt_xent_views,
    reference,
    siglip_loss,
    supcon_loss,
)
from rank_cases import given, one, seed_of, two
from test_distributed import Problem

QUEUE = given(7)
ANGLES = {"normalize": True}
BANK = reference.normalize(given(7, seed=5))


def pairs_across(n: int) -> Tensor:
    """Each number twice, half a batch apart: of equal counts on another rank. With an odd n one number comes once."""
    return torch.arange(n) % max(1, -(-n // 2))


def _chosen(n: int) -> Tensor:
    return torch.randint(len(QUEUE), (n, 9), generator=torch.Generator().manual_seed(n))


def _log_q(n: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).log()


def _two(function, views, **rest):
    return function(views[0], views[1], **rest)


def _constant_keys(function, views, **rest):
    return function(views[0], views[1].detach(), **rest)


def _one(function, views, **rest):
    return function(views[0], **rest)


def _all(function, views, **rest):
    return function(views, **rest)


def _groups(function, views, reduction, **rest):
    """Two views as groups of rows; "none" has the rows of a group together, here put view by view."""
    rows = function(torch.stack(views[:2], 1), reduction=reduction, **rest)
    return rows.unflatten(0, (-1, 2)).T.flatten() if reduction == "none" else rows


def _supcon_of_groups(features, labels, *args, **options):
    return reference.supcon(features.flatten(0, 1), labels.repeat_interleave(features.shape[1]), *args, **options)


class Case(NamedTuple):
    """A loss and its specification. `call` passes them the views; `numbers` are learned; `rows` are made for a batch of
    n, and each rank passes its own; `shared` all ranks pass alike, and `learned` of it get a gradient."""

    ours: Callable
    exact: Callable
    call: Callable = _two
    numbers: dict[str, float] = {"temperature": 0.3}
    rows: dict[str, Callable[[int], Tensor]] = {}
    shared: dict[str, object] = {}
    learned: tuple[str, ...] = ()
    # Loss rows of an image, and noise rows that are drawn.
    views: int = 1
    noise: int = 0

    def run(self, function, problem: Problem, rows: slice, dtype, reduction="mean", learn=True, **options):
        """(loss, {name: gradient}) of these rows; the loss of "none" is weighted."""
        leaves = {"encoder": problem.weight.to(dtype).requires_grad_()}
        if learn:
            numbers = {key: torch.tensor(value, dtype=torch.float64) for key, value in self.numbers.items()}
            leaves |= {key: value.requires_grad_() for key, value in numbers.items()}
        shared = {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in self.shared.items()}
        leaves |= {key: shared[key].clone().requires_grad_() for key in self.learned}
        passed = self.numbers | shared | {key: leaves[key] for key in leaves if key != "encoder"}
        for key, make in self.rows.items():
            passed[key] = make(problem.n)[rows]
            if passed[key].is_floating_point():
                passed[key] = passed[key].to(dtype)
        x = (*problem.x, problem.x[0].flip(1))
        views = [view[rows].to(dtype) @ leaves["encoder"] for view in x]
        value = self.call(function, views, reduction=reduction, **passed, **options)
        weights = torch.randn(3, problem.n, generator=torch.Generator().manual_seed(problem.n), dtype=torch.float64)
        weights = weights[: self.views, rows].flatten().to(value)
        total = (value * weights).sum() if reduction == "none" else value
        return value.detach(), dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))

    def noise_of(self, seed: int, alone: bool) -> tuple[dict, dict]:
        """What the loss is given to draw its noise, and the specification has as noise drawn: from the generator
        itself, or over ranks from a seed that rank 0's gives."""
        if not self.noise:
            return {}, {}
        generator = torch.Generator().manual_seed(0)
        source = generator if alone else torch.Generator().manual_seed(seed_of(generator))
        noise = torch.randint(len(BANK), (self.noise,), generator=source)
        return {"generator": torch.Generator().manual_seed(seed), "num_negatives": self.noise}, {"noise": noise}


def _info(call=_two, rows=None, learned=(), **shared):
    return Case(info_nce, reference.info_nce, call, rows=rows or {}, shared=shared, learned=learned)


def _supcon(labels, **shared):
    return Case(supcon_loss, reference.supcon, _one, rows={"labels": labels}, shared=shared)


def _instances(noise=0, **shared):
    rows = {"indices": lambda n: 2 * torch.arange(n) % len(BANK)}
    return Case(
        instance_discrimination_loss, reference.instance_discrimination, _one, rows=rows,
        shared={"bank": BANK, **shared}, noise=noise,
    )  # fmt: skip


LOSSES = {
    "info_nce": _info(),
    "info_nce of lengths": _info(normalize=False),
    "info_nce constant keys": _info(_constant_keys),
    "info_nce ids": _info(rows={"ids": pairs_across}),
    "info_nce log_q": _info(rows={"log_q": _log_q}),
    "info_nce ids and log_q": _info(rows={"ids": lambda n: pairs_across(n).int(), "log_q": _log_q}),
    "info_nce queue": _info(_constant_keys, negatives=QUEUE),
    "info_nce queue and batch": _info(negatives=QUEUE, in_batch=True, rows={"ids": pairs_across, "log_q": _log_q}),
    "info_nce learned negatives": _info(negatives=QUEUE, learned=("negatives",)),
    "info_nce learned and batch": _info(negatives=QUEUE, learned=("negatives",), in_batch=True),
    "info_nce chosen": _info(negatives=QUEUE, rows={"negative_indices": _chosen}),
    "info_nce chosen and batch": _info(negatives=QUEUE, rows={"negative_indices": _chosen}, in_batch=True),
    "clip": Case(clip_loss, reference.clip, numbers={"logit_scale": 0.7}, views=2),
    "clip of angles": Case(clip_loss, reference.clip, numbers={"logit_scale": 3.0}, shared=ANGLES, views=2),
    "siglip": Case(siglip_loss, reference.siglip, numbers={"logit_scale": 0.7, "logit_bias": -2.0}),
    "siglip of angles": Case(
        siglip_loss, reference.siglip, numbers={"logit_scale": 3.0, "logit_bias": 0.5}, shared=ANGLES
    ),
    "supcon": _supcon(lambda n: -(torch.arange(n) % 2)),
    "supcon of lengths": _supcon(lambda n: torch.arange(n) % 2, normalize=False),
    "supcon across": _supcon(pairs_across),
    "supcon without positives": _supcon(torch.arange),
    "supcon in": _supcon(lambda n: torch.arange(n, dtype=torch.int32) % 2, form="in"),
    "supcon in across": _supcon(pairs_across, form="in"),
    "supcon in without positives": _supcon(torch.arange, form="in"),
    "supcon of groups": Case(
        supcon_loss, _supcon_of_groups, _groups, rows={"labels": lambda n: torch.arange(n) % 3}, views=2
    ),
    "three views": Case(nt_xent_views, reference.nt_xent_views, _all, views=3),
    "dcl": Case(dcl_loss, reference.dcl, views=2),
    "instances": _instances(),
    "instances by noise": _instances(5),
    "instances by noise, log_z": _instances(5, log_z=1.5),
}  # fmt: skip


def _views_named(*names):
    """Two views under other names."""

    def make(d=4, dtype=torch.float32, **options):
        return {**dict(zip(names, two(d, dtype).values(), strict=True)), **options}

    return make


_query, _image = _views_named("query", "keys"), _views_named("image", "text")
_few = QUEUE[:, :4].float()


def _clip(**options):
    return _image(**{"logit_scale": 3.0, **options})


def _siglip(**options):
    return _image(**{"logit_scale": 3.0, "logit_bias": -1.0, **options})


def _features(d=4, dtype=torch.float32, **options):
    return {"features": one(3, d, dtype)["z"], "labels": torch.tensor([0, 1, 0]), **options}


def _instance(d=4, dtype=torch.float32, **options):
    bank = torch.ones(7, d, dtype=dtype)
    return {"query": one(3, d, dtype)["z"], "indices": torch.arange(3), "bank": bank, **options}


def _views(count=3, d=4, dtype=torch.float32, **options):
    return {"views": [one(3, d, dtype)["z"] for _ in range(count)], **options}


def _for_all(make, number="temperature"):
    """What no loss takes of one rank alone."""
    return [
        ("feature dimension D", make(d=5)),
        ("dtype", make(dtype=torch.float64)),
        (number, make(**{number: 0.5})),
        (number, make(**{number: torch.tensor(0.1)})),
        (number, make(**{number: -1.0})),
        (number, make(**{number: "0.1"}), TypeError),
        ("reduction", make(reduction="none")),
        ("reduction", make(reduction="avg")),
        ("normalize", make(normalize=number == "logit_scale")),
        ("normalize", make(normalize=1), TypeError),
        ("grad_reduction", make(grad_reduction="sum")),
        ("exchange", make(exchange="ring")),
    ]


# {name: (function, what all ranks but the last pass, what the last one passes instead)}: each of these with the word
# that the message has, and its type if not ValueError.
ODD_ONE_OUT = {
    "info_nce": (
        info_nce,
        _query,
        [
            *_for_all(_query),
            ("query and keys", _query(keys=torch.randn(2, 4))),
            ("keys", _query(keys=None), TypeError),
            ("in_batch", _query(in_batch=True)),
            ("in_batch", _query(in_batch=1), TypeError),
            ("negatives", _query(in_batch=False)),
            ("negatives", _query(negatives=_few)),
            ("ids", _query(ids=torch.arange(3))),
            ("ids", _query(ids=torch.arange(4))),
            ("ids", _query(ids=torch.rand(3)), TypeError),
            ("log_q", _query(log_q=torch.zeros(3))),
            ("log_q", _query(log_q=torch.zeros(3, dtype=torch.int64)), TypeError),
        ],
    ),
    "info_nce of a queue": (
        info_nce,
        lambda: _query(negatives=_few),
        [
            ("negatives", _query()),
            ("negatives", _query(negatives=_few[:, :3])),
            ("negatives", _query(negatives=_few[:6])),
            ("negatives", _query(negatives=_few.int()), TypeError),
            ("in_batch", _query(negatives=_few, in_batch=True)),
            ("negative_indices", _query(negatives=_few, negative_indices=torch.full((3, 2), 7))),
            ("negative_indices", _query(negatives=_few, negative_indices=torch.zeros(3, 2)), TypeError),
            ("negative_indices", _query(negatives=_few, negative_indices=torch.zeros(3, 2).int())),
        ],
    ),
    "clip": (clip_loss, _clip, [*_for_all(_clip, "logit_scale"), ("image and text", _clip(text=torch.ones(4, 4)))]),
    "siglip_loss": (
        siglip_loss,
        _siglip,
        [
            *_for_all(_siglip, "logit_scale"),
            ("logit_bias", _siglip(logit_bias=-2.0)),
            ("logit_bias", _siglip(logit_bias=torch.tensor(-1.0))),
            ("logit_bias", _siglip(logit_bias=float("inf"))),
            ("logit_bias", _siglip(logit_bias="0"), TypeError),
        ],
    ),
    "supcon_loss": (
        supcon_loss,
        _features,
        [
            *_for_all(_features),
            ("form", _features(form="in")),
            ("form", _features(form="inside")),
            ("labels", _features(labels=torch.arange(2))),
            ("labels", _features(labels=torch.zeros(3)), TypeError),
            ("features", _features(features=torch.randn(4))),
        ],
    ),
    "nt_xent_views": (
        nt_xent_views,
        _views,
        [
            *_for_all(_views),
            ("views", _views(4)),
            ("views", _views(2)),
            ("views", _views(1)),
            ("views", _views(views=torch.randn(3, 3, 4)), TypeError),
            ("view 1 and view 3", _views(views=[*_views(2)["views"], torch.randn(2, 4)])),
        ],
    ),
    "nt_xent_views of two": (nt_xent_views, lambda: _views(2), [("views", _views(3)), ("views", _views(1))]),
    "dcl_loss": (dcl_loss, two, [*_for_all(two), ("z1 and z2", two(z2=torch.randn(2, 4)))]),
    "instance_discrimination_loss": (
        instance_discrimination_loss,
        _instance,
        [
            *_for_all(_instance),
            ("num_negatives", _instance(num_negatives=5)),
            ("num_negatives", _instance(num_negatives=0)),
            ("log_z", _instance(log_z=1.0)),
            ("log_z", _instance(log_z="1"), TypeError),
            ("indices", _instance(indices=torch.full((3,), 7))),
            ("indices", _instance(indices=torch.zeros(3)), TypeError),
            ("bank", _instance(bank=torch.ones(7, 3))),
            ("bank", _instance(bank=torch.ones(6, 4))),
            ("generator", _instance(generator=3), TypeError),
        ],
    ),
    "contrastive_stats": (
        contrastive_stats,
        two,
        [case for case in _for_all(two) if case[0] not in ("reduction", "grad_reduction", "exchange")],
    ),
}


def _changing(name, make):
    """A new memory's method as a function with the name that its messages have."""

    def function(group=None, **passed):
        make(group)(**passed)

    function.__name__ = name
    return function


def steps(group=None, **passed):
    InstanceDiscrimination(7, 4, num_negatives=3, group=group)(**passed)


# The module's messages have the function's name.
steps.__name__ = "instance_discrimination_loss"
enqueue = _changing("Queue.enqueue", lambda group: Queue(6, 4, group=group).enqueue)
update = _changing("MemoryBank.update", lambda group: MemoryBank(6, 4, group=group).update)


def _keys(d=4, n=2, dtype=torch.float32, **options):
    return {"keys": one(n, d, dtype)["z"], **options}


def _steps(**options):
    return {"query": one()["z"], "indices": torch.arange(3), **options}


def _moved(d=4, dtype=torch.float32, **options):
    return {"indices": torch.arange(3), "features": one(3, d, dtype)["z"], **options}


ODD_ONE_OUT |= {
    "Queue.enqueue": (
        enqueue,
        _keys,
        [
            ("keys", _keys(d=5)),
            ("keys", _keys(keys=torch.randn(3))),
            ("keys", _keys(dtype=torch.int64), TypeError),
            ("keys", _keys(keys=None), TypeError),
            ("keys", _keys(n=5)),
        ],
    ),
    "InstanceDiscrimination": (
        steps,
        _steps,
        [
            ("bank", _steps(query=torch.randn(3, 5))),
            ("query", _steps(query=None), TypeError),
            ("query", _steps(query=torch.randn(3))),
            ("indices", _steps(indices=torch.full((3,), 7))),
            ("indices", _steps(indices=None), TypeError),
        ],
    ),
    "MemoryBank.update": (
        update,
        _moved,
        [
            ("features", _moved(d=5)),
            ("features", _moved(dtype=torch.int64), TypeError),
            ("indices", _moved(indices=torch.full((3,), 6))),
            ("indices", _moved(indices=torch.zeros(3)), TypeError),
            ("indices", _moved(indices=torch.arange(2))),
        ],
    ),
}
