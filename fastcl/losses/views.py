"""NT-Xent of more than two views of an image: every other view is a positive.

    L = mean_i mean_{p in P(i)} [ log sum_{k != i} exp(S_ik) - S_ip ],      P(i) the other V - 1 views of the image of
    row i

Source: P1, "Intriguing Properties of Contrastive Losses", Eq. 1, averaged over pairs of views; for two views it is
that. A composition: the supervised contrastive loss with the image as the label.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .batch import needs_grad, open_batch
from .positives import positives_loss
from .two_view import two_view_loss


def nt_xent_views(
    views: Sequence[Tensor], temperature: float | Tensor = 0.1, *,
    normalize: bool = True, reduction: str = "mean", group=None,
    grad_reduction: str = "mean", exchange: str = "gather",
) -> Tensor:  # fmt: skip
    """NT-Xent of two or more views, every other view a positive: the mean of its cross entropies.

    L = mean_i mean_{p in P(i)} [ log sum_{k != i} exp(S_ik) - S_ip ] over the V N rows of all views, P(i) the V - 1
    other views of row i. Two views are `nt_xent`. Memory is O(V N D).

    Args:
        views: two or more tensors [N, D], row i of all from the same image.
        temperature, normalize, reduction, group, grad_reduction, exchange: as in `nt_xent`; over ranks every row sees
            the rows of all of them, and "none" gives this rank's V n rows, view 1 first.

    Returns:
        The loss, float32 (float64 for float64 input): a scalar, or [V n] for reduction "none". NaN in the data gives a
        NaN loss.

    Raises:
        TypeError, ValueError: as in `nt_xent`. RuntimeError: on differentiating twice.

    Example:
        >>> import torch
        >>> from fastcl import nt_xent_views
        >>> loss = nt_xent_views([torch.randn(8, 16) for _ in range(4)], temperature=0.2)
    """
    name = "nt_xent_views"
    shared = {"normalize": normalize, "reduction": reduction, "grad_reduction": grad_reduction, "exchange": exchange}
    if isinstance(views, (list, tuple)) and len(views) == 2:
        return two_view_loss(
            name, *views, temperature, settings={"views": 2},
            arguments=("view 1", "view 2"), group=group, **shared,
        )  # fmt: skip

    def check():
        checks.options(name, **shared)
        checks.view_list(name, views)
        checks.positive(name, "temperature", temperature, views[0].device)
        return views[0], temperature

    count = len(views) if isinstance(views, (list, tuple)) else 0
    own = {"views": count, "requires_grad": needs_grad(*(views if count else ()), temperature)}
    batch = open_batch(name, group, check, shared | own, argument="views", views=count)
    # An image is its place among those of all ranks.
    first = 0 if batch.ranks is None else batch.ranks.first_row // count
    ids = torch.arange(first, first + len(views[0]), device=views[0].device).repeat(count)
    return positives_loss(name, torch.cat(list(views)), ids, temperature, "out", shared, batch)
