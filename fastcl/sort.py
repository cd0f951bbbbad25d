"""The segmented sort on its own: many short sorts at once, as sliced distances, ranks and top-k statistics need."""

from __future__ import annotations

from torch import Tensor

from .losses import checks
from .ops.sorting import SegmentedSort


def segmented_sort(x: Tensor, *, descending: bool = False) -> tuple[Tensor, Tensor]:
    """Stable sort of the last dimension, every segment on its own.

    The order is that of `torch.sort(x, dim=-1, stable=True)`: NaN counts as the largest number, -0 equals +0, equal
    elements keep their order, also when descending. Values are those of x, bit for bit.

    Args:
        x: [..., N], N below 2^31. float16, bfloat16, float32 or float64; any strides.
        descending: largest first.

    Returns:
        values, like x and differentiable, and indices, int32 of the same shape: values[..., r] is
        x[..., indices[..., r]]. No element at all is fine.

    Raises:
        TypeError: x is not a dense floating tensor, descending is not a bool.
        ValueError: x has no dimension, or too many elements in one segment.

    Example:
        >>> import torch
        >>> from fastcl import segmented_sort
        >>> values, indices = segmented_sort(torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, -1.0]]))
        >>> values
        tensor([[ 1.,  2.,  3.],
                [-1.,  0.,  0.]])
        >>> indices
        tensor([[1, 2, 0],
                [2, 0, 1]], dtype=torch.int32)
    """
    name = "segmented_sort"
    checks.floating(name, "x", x)
    checks.flag(name, "descending", descending)
    if x.ndim == 0:
        raise ValueError(f"{name}: x must have shape [..., N], got {list(x.shape)}")
    checks.sortable(name, "x", x.shape[-1])
    segments = x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(0, x.shape[-1])
    values, indices = SegmentedSort.apply(segments, descending)
    return values.view(x.shape), indices.view(x.shape)
