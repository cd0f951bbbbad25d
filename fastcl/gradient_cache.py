"""Batches larger than the encoder's memory: the rows of all chunks first, then the encoder's gradient chunk by chunk.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021 (GradCache). A loss
of all rows has for every row a gradient dL/dz. Once these are known, chunks are independent of each other:

    dL/dw = sum_chunks (dL/dz_chunk)^T dz_chunk/dw
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .losses import checks

NAME = "cached_backward"


def cached_backward(
    encoder: Callable[..., Tensor] | Sequence[Callable[..., Tensor]],
    views: Sequence[object],
    loss_fn: Callable[..., Tensor],
    chunks: int,
) -> Tensor:
    """The backward of loss_fn(encoder(view 1), encoder(view 2), ...) with the activations of one chunk at a time.

    Every row is a negative of all others, as without chunks; the encoder runs twice forward, once without gradient
    and once with, and its gradients are added to `.grad` as those of `backward()` are. The second pass of a chunk
    has the random numbers of its first. Exact for encoders that treat samples one by one. Batch norm takes the
    statistics of a chunk (and its running ones are moved twice), with which the loss is that of another function.

    Args:
        encoder: turns a view into rows [N, D]; or one encoder for each view, such as CLIP's two. Modules in
            DistributedDataParallel, or sharded by `fully_shard`, exchange their gradients once, in the last chunk; of
            a sharded one every rank needs as many samples as chunks.
        views: a tensor with samples along its first dimension for each view, or a dict, list or tuple of such tensors.
        loss_fn: called with the rows of every view, [N, D] each, returns a number. Its own parameters, such as a
            learned temperature, get their gradient from this call. For a GradScaler let it return the scaled loss.
        chunks: how many chunks a view is cut into; at most one a sample. The same on all ranks.

    Returns:
        The loss, detached, on this rank what loss_fn returned. NaN in the data gives a NaN loss.

    Raises:
        TypeError, ValueError: of wrong types, no views, views of different lengths in a dict, chunks below 1, more
        chunks than a sharded encoder has samples, DistributedDataParallel with static_graph, an encoder that returns
        not one row a sample, or a loss that is no number or does not depend on the rows.

    Example:
        >>> import torch
        >>> from fastcl import cached_backward, nt_xent
        >>> encoder, views = torch.nn.Linear(32, 16), torch.randn(2, 64, 32)
        >>> loss = cached_backward(encoder, list(views), nt_xent, chunks=8)
        >>> encoder.weight.grad.shape
        torch.Size([16, 32])
    """
    encoders = _check(encoder, views, loss_fn, chunks)
    pieces = [_cut(view, chunks) for view in views]
    parts = [_Chunk(encode, part) for encode, cut in zip(encoders, pieces, strict=True) for part in cut]
    states, found = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_Random.now(part))
            found.append(part.rows())
    # Weights that autocast rounded without gradient must not be taken for those of the second pass.
    torch.clear_autocast_cache()
    places = iter(found)
    rows = [torch.cat([next(places) for _ in cut]).requires_grad_() for cut in pieces]
    loss = loss_fn(*rows)
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        loss.backward()
    if all(x.grad is None for x in rows):
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{NAME}: loss_fn must return one number that depends on the rows, got {got}")
    grads = [
        part
        for x, cut in zip(rows, pieces, strict=True)
        for part in (torch.zeros_like(x) if x.grad is None else x.grad).split([_length(part) for part in cut])
    ]
    last = {id(part.encode): index for index, part in enumerate(parts)}
    for index, (part, state, grad) in enumerate(zip(parts, states, grads, strict=True)):
        with state.again(), _synchronised(part.encode, index == last[id(part.encode)]):
            found = part.rows()
            if found.requires_grad:
                torch.autograd.backward(found, grad)
    return loss.detach()


class _Chunk(NamedTuple):
    encode: Callable[..., Tensor]
    inputs: object

    def rows(self) -> Tensor:
        rows = self.encode(self.inputs)
        if not isinstance(rows, Tensor) or rows.shape[:1] != (_length(self.inputs),):
            got = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"{NAME}: encoder must return one row for each sample, {_length(self.inputs)}, got {got}")
        return rows


class _Random(NamedTuple):
    """The generators that an encoder may draw from, as they are before a chunk."""

    cpu: Tensor
    devices: list[torch.device]
    states: list[Tensor]

    @staticmethod
    def now(part: _Chunk) -> _Random:
        parameters = part.encode.parameters() if isinstance(part.encode, nn.Module) else ()
        devices = list({x.device for x in (*_tensors(part.inputs), *parameters) if x.is_cuda})
        return _Random(torch.get_rng_state(), devices, [torch.cuda.get_rng_state(device) for device in devices])

    @contextlib.contextmanager
    def again(self):
        """These states inside, and those of before afterwards."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def _check(encoder: object, views: object, loss_fn: object, chunks: object) -> list[Callable[..., Tensor]]:
    """The encoder of each view."""
    checks.count(NAME, "chunks", chunks)
    if isinstance(views, Tensor) or not isinstance(views, Sequence):
        raise TypeError(f"{NAME}: views must be a list of them, got {type(views).__name__}")
    if not views:
        raise ValueError(f"{NAME}: views must be at least one, got none")
    encoders = list(encoder) if isinstance(encoder, (list, tuple)) else [encoder] * len(views)
    for argument, function in (*(("encoder", encode) for encode in encoders), ("loss_fn", loss_fn)):
        if not callable(function):
            raise TypeError(f"{NAME}: {argument} must be callable, got {type(function).__name__}")
    if len(encoders) != len(views):
        raise ValueError(f"{NAME}: encoder must be one, or one for each of {len(views)} views, got {len(encoders)}")
    for view in views:
        lengths = {len(x) if x.ndim else -1 for x in _tensors(view)}
        if len(lengths) != 1 or -1 in lengths:
            got = ["none" if length < 0 else length for length in sorted(lengths)]
            raise ValueError(f"{NAME}: views must have one number of samples each, got {got}")
    for encode, view in zip(encoders, views, strict=True):
        # Its ranks gather parameters in every pass: one with fewer chunks would leave the others waiting.
        if _is_sharded(encode) and _length(view) < chunks:
            most = f"the samples of a sharded encoder, {_length(view)}"
            raise ValueError(f"{NAME}: chunks must be at most {most}, got {chunks}")
        if getattr(getattr(encode, "_orig_mod", encode), "static_graph", False):
            # It cannot leave the reduction out in its first step.
            raise ValueError(f"{NAME}: encoder must have static_graph=False, got True")
    return encoders


def _is_sharded(encode: object) -> bool:
    return hasattr(encode, "set_requires_gradient_sync")


def _tensors(x: object) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, Mapping):
        x = list(x.values())
    if not isinstance(x, (list, tuple)):
        raise TypeError(f"{NAME}: views must be tensors, or dicts, lists or tuples of them, got {type(x).__name__}")
    return [tensor for part in x for tensor in _tensors(part)]


def _length(x: object) -> int:
    return len(_tensors(x)[0])


def _cut(x: object, chunks: int) -> list[object]:
    """A view in as many parts, or one a sample, of as equal a length as can be; an empty one in one."""
    count = max(1, min(chunks, _length(x)))
    if isinstance(x, Tensor):
        return list(x.tensor_split(count))
    if isinstance(x, Mapping):
        return [dict(zip(x, part, strict=True)) for part in _cut(list(x.values()), count)]
    make = getattr(type(x), "_make", type(x))
    return [make(part) for part in zip(*(_cut(part, count) for part in x), strict=True)]


@contextlib.contextmanager
def _synchronised(encode: object, last: bool):
    """Ranks reduce the gradients of an encoder in its last chunk only."""
    encode = getattr(encode, "_orig_mod", encode)
    if last or not isinstance(encode, nn.Module):
        yield
    elif isinstance(encode, nn.parallel.DistributedDataParallel):
        with encode.no_sync():
            yield
    elif _is_sharded(encode):
        encode.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            encode.set_requires_gradient_sync(True)
    else:
        yield
