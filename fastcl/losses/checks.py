"""Argument checks shared by the losses: before any kernel, without waiting for the device.

TypeError for types and dtypes, ValueError for the rest. Every message names the function, the argument, what
was expected and what was got.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REDUCTIONS = ("mean", "sum", "none")
GRAD_REDUCTIONS = ("mean", "sum")
EXCHANGES = ("gather", "ring")
FORMS = ("out", "in")
# Its reciprocal is a float32 number.
SMALLEST = 1e-38
# It and its double are.
LARGEST = 1e38


def one_of(name: str, argument: str, value: object, allowed: Sequence[str]) -> None:
    if not (isinstance(value, str) and value in allowed):
        expected = " or ".join(f'"{choice}"' for choice in allowed)
        raise ValueError(f"{name}: {argument} must be {expected}, got {value!r}")


def flag(name: str, argument: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be a bool, got {type(value).__name__}")


def options(
    name: str, *, normalize: object, reduction: object, grad_reduction: object, exchange: object,
    by_prior: bool = False, form: object = "out", in_batch: object = None,
) -> None:  # fmt: skip
    """The keyword arguments that all losses share, less the group, and those of single losses that need no tensor to be
    checked. With by_prior, normalize=None leaves it to the prior."""
    if not (by_prior and normalize is None):
        flag(name, "normalize", normalize)
    one_of(name, "reduction", reduction, REDUCTIONS)
    one_of(name, "grad_reduction", grad_reduction, GRAD_REDUCTIONS)
    one_of(name, "exchange", exchange, EXCHANGES)
    one_of(name, "form", form, FORMS)
    if in_batch is not None:
        flag(name, "in_batch", in_batch)


def dense(name: str, argument: str, x: Tensor) -> None:
    if x.layout != torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name}: {argument} must be a dense tensor, got {kind}")


def floating(name: str, argument: str, x: object) -> None:
    """x is a dense floating tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {type(x).__name__}")
    dense(name, argument, x)
    if x.dtype not in FLOATING:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise TypeError(f"{name}: {argument} must be one of {expected}, got {x.dtype}")


def rows(name: str, argument: str, x: object) -> None:
    """x is a dense floating matrix [N, D] with D >= 1."""
    floating(name, argument, x)
    if x.ndim != 2:
        raise ValueError(f"{name}: {argument} must have shape [N, D], got {list(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"{name}: {argument} must have D of at least 1, got shape {list(x.shape)}")


def row_groups(name: str, argument: str, x: object) -> Tensor:
    """x is a floating tensor of rows [M, D] or of groups of rows [N, V, D]: its rows."""
    floating(name, argument, x)
    if x.ndim not in (2, 3) or 0 in x.shape[1:]:
        expected = "shape [M, D] or [N, V, D], V and D of at least 1"
        raise ValueError(f"{name}: {argument} must have {expected}, got {list(x.shape)}")
    return x.reshape(-1, x.shape[-1])


def view_list(name: str, views: object) -> None:
    """views is a list of two or more rows [N, D] that fit together."""
    if not isinstance(views, (list, tuple)):
        raise TypeError(f"{name}: views must be a list of tensors, got {type(views).__name__}")
    if len(views) < 2:
        raise ValueError(f"{name}: views must be at least two, got {len(views)}")
    for number, view in enumerate(views[1:], 2):
        pair(name, views[0], view, ("view 1", f"view {number}"))


def pair(name: str, z1: object, z2: object, arguments: tuple[str, str] = ("z1", "z2")) -> None:
    """z1 and z2 are two views [N, D] of the same shape, dtype and device. N = 0 passes: a rank may be empty."""
    rows(name, arguments[0], z1)
    rows(name, arguments[1], z2)
    both = " and ".join(arguments)
    if z1.shape != z2.shape:
        raise ValueError(
            f"{name}: {both} must have the same shape [N, D], got {list(z1.shape)} and {list(z2.shape)}"
        )
    if z1.dtype != z2.dtype:
        raise TypeError(f"{name}: {both} must have the same dtype, got {z1.dtype} and {z2.dtype}")
    if z1.device != z2.device:
        raise ValueError(f"{name}: {both} must be on the same device, got {z1.device} and {z2.device}")


def integers(name: str, argument: str, x: object, shape: Sequence[object], device: torch.device) -> None:
    """x is a dense integer tensor on this device, of this shape; a name in place of a size stands for any."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {argument} must be an integer tensor, got {type(x).__name__}")
    dense(name, argument, x)
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name}: {argument} must be an integer tensor, got {x.dtype}")
    fits = x.ndim == len(shape) and all(isinstance(n, str) or n == m for n, m in zip(shape, x.shape, strict=True))
    if not fits:
        expected = ", ".join(str(n) for n in shape)
        raise ValueError(f"{name}: {argument} must have shape [{expected}], got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: {argument} must be on {device}, got {x.device}")


def same_length(name: str, argument: str, x: Tensor, z: Tensor) -> None:
    """x has one entry for each row of z, and is on its device."""
    if list(x.shape) != [z.shape[0]]:
        raise ValueError(f"{name}: {argument} must have shape [{z.shape[0]}], one for each row, got {list(x.shape)}")
    if x.device != z.device:
        raise ValueError(f"{name}: {argument} must be on {z.device}, got {x.device}")


def indices(name: str, argument: str, x: Tensor, length: int) -> None:
    """The values of x are places in a table of this length. Those of a CUDA tensor are not read."""
    if x.device.type == "cpu" and x.numel() and not torch.compiler.is_compiling():
        low, high = (value.item() for value in x.aminmax())
        if low < 0 or high >= length:
            raise ValueError(f"{name}: {argument} must be from 0 to {length - 1}, got {low} to {high}")


def one_element(name: str, argument: str, x: Tensor, device: torch.device) -> None:
    """x is a floating tensor of one element, on this device or a number on the CPU."""
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: {argument} must be a floating tensor, got {x.dtype}")
    dense(name, argument, x)
    if x.numel() != 1:
        raise ValueError(f"{name}: {argument} must have one element, got shape {list(x.shape)}")
    if x.device != device and not (x.device.type == "cpu" and x.ndim == 0):
        raise ValueError(f"{name}: {argument} must be on {device}, got {x.device}")


def scalar(name: str, argument: str, value: object, device: torch.device) -> None:
    """A finite number, or a one-element floating tensor of one on this device. That of a CUDA tensor is not read."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: {argument} must be a number or a one-element tensor, got {type(value).__name__}")
    else:
        one_element(name, argument, value, device)
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return
        value = value.item()
    if not abs(value) <= LARGEST:
        raise ValueError(f"{name}: {argument} must be finite and at most {LARGEST}, got {value}")


def matrix_like(name: str, argument: str, x: object, z: Tensor) -> None:
    """x is a floating matrix of at least one row, as wide as z and on its device."""
    rows(name, argument, x)
    if x.shape[0] == 0 or x.shape[1] != z.shape[1]:
        expected = f"shape [at least 1, {z.shape[1]}], as wide as the rows"
        raise ValueError(f"{name}: {argument} must have {expected}, got {list(x.shape)}")
    if x.device != z.device:
        raise ValueError(f"{name}: {argument} must be on {z.device}, got {x.device}")


def sortable(name: str, argument: str, length: int) -> None:
    """Indices of sorts are int32."""
    if length >= 2**31:
        raise ValueError(f"{name}: {argument} must have fewer than 2^31 elements to sort, got {length}")


def count(name: str, argument: str, value: object) -> None:
    """A positive integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {argument} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: {argument} must be at least 1, got {value}")


def number(name: str, argument: str, value: object, *, zero: bool = False) -> None:
    """A positive finite Python number, or 0 where that makes sense."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: {argument} must be a number, got {type(value).__name__}")
    # Not math.isfinite, which raises on integers beyond the range of a float.
    if not (0 < value <= sys.float_info.max or (zero and value == 0)):
        raise ValueError(f"{name}: {argument} must be {'0 or ' if zero else ''}positive and finite, got {value}")
    if value > LARGEST:
        raise ValueError(f"{name}: {argument} must be at most {LARGEST}, got {value}")


def random_generator(name: str, generator: object, device: torch.device | None) -> None:
    """None, or a torch.Generator on the device where the numbers are drawn (None: not known yet)."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"{name}: generator must be a torch.Generator or None, got {type(generator).__name__}")
    if device is None:
        return
    # A generator made for "cuda" has no index: it belongs to the current device.
    same = generator.device.type == device.type and generator.device.index in (None, device.index)
    if not same:
        raise ValueError(f"{name}: generator must be on {device}, as the rows, got {generator.device}")


def constant(name: str, argument: str, value: object, *, learnable: bool = False) -> float:
    """What a module keeps as a number: a positive number, or a one-element tensor of one that is not trained."""
    positive(name, argument, value, torch.device("cpu"))
    if isinstance(value, Tensor) and value.requires_grad:
        hint = f" (learnable_{argument}=True makes it a parameter)" if learnable else ""
        raise ValueError(f"{name}: {argument} must be a number{hint}, got a tensor that requires grad")
    return float(value)


def positive(
    name: str, argument: str, value: object, device: torch.device, *, largest: float = sys.float_info.max
) -> None:
    """A positive finite number, or a one-element floating tensor of one.

    The value of a CUDA tensor is not read: that would wait for the device. A bad one there gives a NaN loss.
    """
    if isinstance(value, Tensor):
        one_element(name, argument, value, device)
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return
        value = value.item()
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: {argument} must be a number or a one-element tensor, got {type(value).__name__}")
    # Not math.isfinite, which raises on integers beyond the range of a float.
    if not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name}: {argument} must be positive and finite, got {value}")
    if not SMALLEST <= value <= largest:
        bound = f"at least {SMALLEST}" if value < SMALLEST else f"at most {largest}"
        raise ValueError(f"{name}: {argument} must be {bound}, got {value}")


def negatives(name: str, query: Tensor, rows: object, in_batch: object, chosen: object) -> None:
    """The negatives of InfoNCE: rows for all queries, the keys of the batch, or chosen rows for each query."""
    if rows is None:
        if in_batch is False or chosen is not None:
            raise ValueError(f"{name}: negatives must be given with in_batch=False or negative_indices, got None")
        return
    matrix_like(name, "negatives", rows, query)
    if chosen is not None:
        integers(name, "negative_indices", chosen, [query.shape[0], "m"], query.device)
        if chosen.shape[1] == 0:
            raise ValueError(f"{name}: negative_indices must have m of at least 1, got shape {list(chosen.shape)}")
        indices(name, "negative_indices", chosen, rows.shape[0])
        if rows.requires_grad:
            raise ValueError(f"{name}: negatives must not require grad with negative_indices, got a tensor that does")
