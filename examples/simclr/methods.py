"""What is learnt from, by `--method`: SimCLR, MoCo v2, instance discrimination or BYOL, on the same encoder and head.

A method owns its network, the part with gradients, and what it compares with. The trainer asks it, in this order:

    targets = method.targets(views, index)     what is compared with, without gradient
    loss = method.loss(rows, targets)          of the network's rows [N, D], one tensor for each view of `online(views)`
    method.update(targets, progress)           after the optimiser: moving averages, queue

MoCo v2 is P2's ("Towards Good Practices in Self-supervised Representation Learning", Eq. 1 and Table 1), instance
discrimination Wu et al.'s (2018), BYOL Grill et al.'s (2020), which P1 compares with in section 5.
"""

import contextlib
import copy
import math

import torch
import torch.distributed as dist
from torch import nn

from fastcl import (
    InstanceDiscrimination,
    Queue,
    alignment_loss,
    contrastive_stats,
    info_nce,
    sample_hard_negatives,
)

from . import losses, model


class Network(nn.Module):
    """Encoder, head and, where there is one, predictor; `dtype` is what autocast computes in, None for none."""

    def __init__(self, encoder, head, predictor=None, dtype=None):
        super().__init__()
        self.encoder, self.head, self.predictor = encoder, head, predictor
        self.dtype = dtype

    def forward(self, pictures):
        with self.autocast(pictures.device.type):
            rows = self.head(self.encoder(pictures))
            return rows if self.predictor is None else self.predictor(rows)

    def autocast(self, device):
        return torch.autocast(device, self.dtype) if self.dtype else contextlib.nullcontext()


class Average(nn.Module):
    """A moving average of a network without its predictor; its forward goes in `parts` and has no gradient."""

    def __init__(self, network, parts):
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.network.predictor = None
        self.parts = parts

    @torch.no_grad()
    def forward(self, pictures):
        return torch.cat([self.network(part) for part in pictures.tensor_split(self.parts)])

    @torch.no_grad()
    def move(self, network, momentum):
        """average <- momentum * average + (1 - momentum) * network, parameter by parameter."""
        live = dict(network.named_parameters())
        for name, parameter in self.network.named_parameters():
            parameter.lerp_(live[name], 1 - momentum)


class Method(nn.Module):
    """What all methods share. `options` are settings with their defaults, as `fixed` those of `losses.Loss`; `recipe`
    are the defaults of training."""

    title, help = "", ""
    options, fixed, recipe = {}, {}, {}
    views = 2  # of a picture, in a step

    def __init__(self, network):
        super().__init__()
        self.network = network

    def online(self, views):
        """The views that the network sees."""
        return views

    def targets(self, views, index):
        return None

    def update(self, targets, progress):
        """`progress` is the share of all steps that has been taken."""


class SimCLR(Method):
    title, help = "SimCLR", "both views among all of the batch, by --loss"
    recipe = dict(optimizer="lars", head_layers=3)

    def __init__(self, network, criterion):
        super().__init__(network)
        self.criterion = criterion

    def loss(self, rows, targets):
        return self.criterion(*rows)

    def top1(self, rows, targets):
        """Share of rows that are nearest to their partner: of both views, over the rows of all processes."""
        return contrastive_stats(*rows).top1


class MoCo(Method):
    title, help = "MoCo v2", "a queue of keys from a moving average of the network"
    options = dict(temperature=0.2, momentum=0.999, queue=None, hard_negatives=None)
    recipe = dict(optimizer="sgd", head_layers=2)

    def __init__(self, network, dim, temperature, momentum, queue, hard_negatives=None, parts=1):
        super().__init__(network)
        self.average = Average(network, parts)
        self.queue = Queue(queue, dim)
        self.temperature, self.momentum, self.hard_negatives = temperature, momentum, hard_negatives

    def online(self, views):
        return views[:1]

    @torch.no_grad()
    def targets(self, views, index):
        # In another order than the queries: what batch norm tells of a group of pictures must not betray the key.
        order = torch.randperm(len(index), device=views[1].device)
        return self.average(views[1][order])[order.argsort()], self.queue.rows

    def loss(self, rows, targets):
        keys, queue = targets
        chosen = None
        if self.hard_negatives:
            chosen = sample_hard_negatives(rows[0].detach(), queue, self.hard_negatives)
        return info_nce(rows[0], keys, queue, self.temperature, negative_indices=chosen)

    def top1(self, rows, targets):
        """Share of queries that are nearer to their key than to the whole queue as the loss saw it."""
        keys, queue = targets
        return nearest_is_positive(rows[0], keys, queue)

    def update(self, targets, progress):
        self.average.move(self.network, self.momentum)
        self.queue.enqueue(targets[0])


class InstDisc(Method):
    title, help = "Instance discrimination", "each picture is a class: a memory bank with one row for each"
    options = dict(temperature=0.07, bank_momentum=0.5, noise=None)
    recipe = dict(optimizer="sgd", head_layers=1)
    views = 1

    def __init__(self, network, dim, pictures, temperature, bank_momentum, noise):
        super().__init__(network)
        self.criterion = InstanceDiscrimination(pictures, dim, temperature, momentum=bank_momentum,
                                                num_negatives=noise)

    def targets(self, views, index):
        # The rows to beat, as they are before the loss moves them.
        return index, self.criterion.bank.rows

    def loss(self, rows, targets):
        return self.criterion(rows[0], targets[0])

    def top1(self, rows, targets):
        index, bank = targets
        nearest = [(part @ bank.T).argmax(1) for part in rows[0].float().split(_rows_beside(bank))]
        return _mean_over_ranks(torch.cat(nearest) == index)


class BYOL(Method):
    title, help = "BYOL", "a predictor of the other view's row in a moving average of the network; no negatives"
    options = dict(momentum=0.99)
    recipe = dict(optimizer="lars", head_layers=2)

    def __init__(self, network, momentum, parts=1):
        super().__init__(network)
        self.average = Average(network, parts)
        self.momentum = momentum

    @torch.no_grad()
    def targets(self, views, index):
        return self.average(torch.cat(views)).float().chunk(2)

    def loss(self, rows, targets):
        # In float32: autocast gives a predictor that ends in a product another dtype than a head that ends in a norm.
        rows = [row.float() for row in rows]
        # |a - b|^2 = 2 - 2 cos(a, b) for unit rows; each view predicts the other one.
        return alignment_loss(rows[0], targets[1]) + alignment_loss(rows[1], targets[0])

    def top1(self, rows, targets):
        return contrastive_stats(rows[0].float(), targets[1]).top1

    def update(self, targets, progress):
        # From its first value to 1 along half a cosine, as published.
        self.average.move(self.network, 1 - (1 - self.momentum) * (math.cos(math.pi * progress) + 1) / 2)


METHODS = {"simclr": SimCLR, "moco-v2": MoCo, "instdisc": InstDisc, "byol": BYOL}


def nearest_is_positive(query, keys, negatives):
    """Share of queries that are nearer to their key than to every negative."""
    query, keys, negatives = (nn.functional.normalize(x.float(), dim=1) for x in (query, keys, negatives))
    nearest = torch.cat([(part @ negatives.T).amax(1) for part in query.split(_rows_beside(negatives))])
    return _mean_over_ranks((query * keys).sum(1) > nearest)


def _rows_beside(bank):
    """How many rows to compare with a bank at a time: 256 MB of similarities."""
    return max(1, 2**26 // len(bank))


def _mean_over_ranks(hits):
    counts = torch.stack([hits.double().sum(), hits.new_tensor(len(hits), dtype=torch.float64)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts[0] / counts[1]


def build(settings, source, dtype=None):
    """The method of the settings, on a new encoder and head."""
    encoder = model.build_encoder(settings.arch, source.channels, source.image_size, settings.width)
    head = model.projection_head(encoder.num_features, settings.head_layers, settings.head_out, settings.head_hidden)
    dim = settings.head_out if settings.head_layers else encoder.num_features
    predictor = None
    if settings.method == "byol":
        predictor = model.projection_head(dim, 2, dim, settings.head_hidden or encoder.num_features, last_norm=False)
    network = Network(encoder, head, predictor, dtype)
    if settings.norm == "group":
        model.group_norm(network)
    if settings.bn_splits > 1:
        model.split_batch_norm(network, settings.bn_splits)
    kind = METHODS[settings.method]
    options = losses.arguments(kind, settings)
    if "momentum" in options:
        options["parts"] = settings.grad_cache_chunks
    if kind is SimCLR:
        return SimCLR(network, losses.build(settings))
    if kind is MoCo:
        return MoCo(network, dim, **options)
    return InstDisc(network, dim, len(source.train), **options) if kind is InstDisc else BYOL(network, **options)
