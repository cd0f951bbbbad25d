"""`NTXentLoss` and `SupConLoss` of `pytorch_metric_learning.losses`, without the tables of pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..losses import checks
from ..losses.batch import product_bound, scale_of
from ..losses.supcon import supcon_loss
from ..ops.pairs import PairLogSumExp
from ..ops.rows import RowLogSumExp, product_rows
from ..ops.softplus import PairSoftplus


def _checked(
    name: str, embeddings: Tensor, labels: Tensor | None, indices_tuple: object, names: tuple[str, str]
) -> Tensor:
    """The labels, beside their embeddings."""
    if indices_tuple is not None:
        got = type(indices_tuple).__name__
        raise ValueError(f"{name}: indices_tuple must be None: pairs are those of the labels, got {got}")
    checks.rows(name, names[0], embeddings)
    if len(embeddings) == 0:
        raise ValueError(f"{name}: {names[0]} must have at least one row, got shape {list(embeddings.shape)}")
    if labels is None:
        raise ValueError(f"{name}: {names[1]} must be given, got None")
    if isinstance(labels, Tensor):
        labels = labels.to(embeddings.device)
    checks.integers(name, names[1], labels, [embeddings.shape[0]], embeddings.device)
    return labels.long().contiguous()


class NTXentLoss(nn.Module):
    """`pytorch_metric_learning.losses.NTXentLoss`: one term for each pair of rows of the same label.

    L = mean_{i, p != i, y_p = y_i} log( 1 + sum_{n: y_n != y_i} exp((<z_i, z_n> - <z_i, z_p>) / temperature) )

    Migration: `from fastcl.integrations.pytorch_metric_learning import NTXentLoss` in place of
    `from pytorch_metric_learning.losses import NTXentLoss`.

    The same: value and gradient, with unit rows; negatives are the rows of another label and never the other
    positives; 0 where there are no positives or no negatives. It works inside `SelfSupervisedLoss` and
    `DistributedLossWrapper`.

    On purpose different: memory is that of the embeddings, where the original holds a number for each positive pair and
    each negative pair together. A term is exact however large it is: the original's is at most -log(smallest
    float), 87 in float32, and has no gradient there. No indices_tuple, and no distance, reducer or
    embedding_regularizer but the default ones.

    Args:
        temperature: positive number.

    Example:
        >>> import torch
        >>> from fastcl.integrations.pytorch_metric_learning import NTXentLoss
        >>> criterion = NTXentLoss(temperature=0.1)
        >>> embeddings, labels = torch.randn(8, 16, requires_grad=True), torch.arange(8) % 3
        >>> loss = criterion(embeddings, labels)
        >>> loss.backward()
    """

    def __init__(self, temperature: float = 0.07):
        super().__init__()
        self.temperature = checks.constant("NTXentLoss", "temperature", temperature)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """With ref_emb the pairs are those of a row and a reference row; row i meets not reference row i where
        ref_labels is the same tensor as labels."""
        name = "NTXentLoss"
        ids = columns = _checked(name, embeddings, labels, indices_tuple, ("embeddings", "labels"))
        refs, diagonal = None, True
        if ref_emb is not None or ref_labels is not None:
            columns = _checked(name, ref_emb, ref_labels, None, ("ref_emb", "ref_labels"))
            checks.matrix_like(name, "ref_emb", ref_emb, embeddings)
            # As in the original: the very labels of the rows say that row i of both is the same sample.
            diagonal = ref_labels is labels
        z, dtype = product_rows(name, embeddings, True)
        scale, bound = scale_of(self.temperature, embeddings), product_bound(self.temperature, True)
        if ref_emb is None:
            negatives = RowLogSumExp.apply(z, scale, ids, "drop", dtype, bound, False, False, None, name)
        else:
            refs, _ = product_rows(name, ref_emb, True)
            negatives = PairLogSumExp.apply(
                z, refs, scale, ids, columns, None, False, False, dtype, bound, None, name
            )
        total = PairSoftplus.apply(
            z, refs, scale, negatives.to(scale.dtype), ids, None if refs is None else columns, -1.0, diagonal, True,
            dtype, None, name,
        )  # fmt: skip
        ordered = columns.sort().values
        positives = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
        count = positives.sum() - (len(ids) if diagonal else 0)
        return (total / count.clamp(min=1)).to(scale.dtype)


class SupConLoss(nn.Module):
    """`pytorch_metric_learning.losses.SupConLoss`, by `supcon_loss`.

    Migration: `from fastcl.integrations.pytorch_metric_learning import SupConLoss` in place of
    `from pytorch_metric_learning.losses import SupConLoss`.

    The same: value and gradient, with unit rows, as a mean over rows that have a positive; 0 where no row has one, and
    where all rows have the same label. It works inside `SelfSupervisedLoss` and `DistributedLossWrapper`.

    On purpose different: memory is that of the embeddings. The mean is over all rows with a positive, where the
    original leaves out those whose loss rounds to 0 or below: its value jumps where a batch is learned well. No
    indices_tuple or ref_emb, and no distance, reducer or embedding_regularizer but the default ones.

    Args:
        temperature: positive number.

    Example:
        >>> import torch
        >>> from fastcl.integrations.pytorch_metric_learning import SupConLoss
        >>> criterion = SupConLoss(temperature=0.1)
        >>> embeddings, labels = torch.randn(8, 16, requires_grad=True), torch.arange(8) % 3
        >>> criterion(embeddings, labels).backward()
    """

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        self.temperature = checks.constant("SupConLoss", "temperature", temperature)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: None = None,
        ref_emb: None = None,
        ref_labels: None = None,
    ) -> Tensor:
        name = "SupConLoss"
        if ref_emb is not None or ref_labels is not None:
            raise ValueError(f"{name}: ref_emb and ref_labels must be None: rows meet each other alone, got one")
        ids = _checked(name, embeddings, labels, indices_tuple, ("embeddings", "labels"))
        loss = supcon_loss(embeddings, ids, self.temperature, group="local")
        return torch.where((ids != ids[:1]).any(), loss, 0.0)
