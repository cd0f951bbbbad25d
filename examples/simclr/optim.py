"""Optimisers and what they leave alone, learning-rate scaling and the schedule."""

import math

import torch
from torch import nn

from .errors import UsageError
from .lars import LARS

SCALINGS = {"none": lambda batch: 1, "linear": lambda batch: batch / 256, "sqrt": math.sqrt}


def parameter_groups(modules, weight_decay):
    """Two groups of all modules: weights, with decay, and others, without.

    Without are parameters of one dimension (biases, scales and shifts of norms), and of a ViT the tokens and positions,
    which timm names: all of them are added or scale as they are, and pulling them to zero makes nothing simpler.
    LARS, whose steps are a small share of a parameter's norm, would besides hold a token at zero, near which it begins.
    """
    weights, others, seen = [], [], set()
    for module in modules:
        exempt = _named_by_timm(module)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                (others if parameter.ndim <= 1 or name in exempt else weights).append(parameter)
    return [dict(params=weights, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]


def _named_by_timm(module):
    """Names of the parameters that `module` or one of its parts lists as not to be decayed."""
    return {f"{prefix}.{name}".lstrip(".") for prefix, part in module.named_modules()
            if hasattr(part, "no_weight_decay") for name in part.no_weight_decay()}


def build_optimizer(name, modules, lr, weight_decay):
    """`lars`, `sgd` (momentum 0.9) or `adamw` for one module or several."""
    groups = parameter_groups([modules] if isinstance(modules, nn.Module) else modules, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)
    if name == "lars":
        groups[1]["adapt"] = False
        return LARS(groups, lr=lr)
    raise UsageError(f"--optimizer: expected lars, sgd or adamw, got {name}")


def describe(optimizer):
    """One line a parameter group, for the log."""
    lines = []
    for group in optimizer.param_groups:
        count = sum(parameter.numel() for parameter in group["params"])
        line = f"{len(group['params'])} tensors of {count:,} parameters: weight decay {group['weight_decay']:g}"
        if "adapt" in group:
            line += ", steps scaled by norms" if group["adapt"] else ", steps not scaled"
        lines.append(line)
    return lines


def scaled_lr(lr, batch, scaling):
    """For the global batch: `linear` is lr * batch / 256, `sqrt` is lr * sqrt(batch), `none` is lr."""
    if scaling not in SCALINGS:
        raise UsageError(f"--lr-scaling: expected {', '.join(SCALINGS)}, got {scaling}")
    return lr * SCALINGS[scaling](batch)


def warmup_cosine(step, steps, warmup):
    """Factor of the learning rate at `step` (from 0): linear up to 1 over `warmup` steps, then cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
