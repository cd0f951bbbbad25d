"""Gradients whose own derivative is not implemented: an error for whoever asks for it, instead of zeros."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class _RaiseOnBackward(torch.autograd.Function):
    """The gradients, as functions of `count` tensors that they belong to."""

    @staticmethod
    def forward(ctx: FunctionCtx, name: str, count: int, *tensors: Tensor | None):
        ctx.name = name
        return tuple(grad if grad is None else grad.view_as(grad) for grad in tensors[count:])

    @staticmethod
    def backward(ctx: FunctionCtx, *_):
        raise RuntimeError(
            f"{ctx.name}: double backward is not supported; "
            "use fastcl.reference for a version that differentiates twice"
        )


def refuse_double_backward(
    name: str, output: Tensor, upstream: tuple[Tensor | None, ...], *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients as they are; under create_graph they raise when they are differentiated.

    `output` is the saved output of the function, `upstream` its gradients. Through them the way from the gradients to
    the inputs exists, and to what else the upstream gradients depend on: without one, autograd would take them for
    constants and leave them out, where it is asked for the gradient of some of these alone.
    """
    if not torch.is_grad_enabled():
        return grads
    return _RaiseOnBackward.apply(name, 1 + len(upstream), output, *upstream, *grads)
