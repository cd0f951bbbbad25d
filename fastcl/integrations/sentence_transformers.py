"""`MultipleNegativesRankingLoss` of sentence_transformers, without its matrices of scores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import checks
from ..losses.batch import beside, needs_grad, open_batch, reduce_rows, scale_bound, softplus
from ..ops.pairs import PairLogSumExp
from ..ops.rows import product_rows

NAME = "MultipleNegativesRankingLoss"
# Whether rows are normalised, by the name of the similarity function.
SIMILARITIES = {"cos_sim": True, "pytorch_cos_sim": True, "dot_score": False}
FORWARD, SYMMETRIC = {"query_to_doc"}, {"query_to_doc", "doc_to_query"}


class MultipleNegativesRankingLoss(nn.Module):
    """`MultipleNegativesRankingLoss` of sentence_transformers.

    L = mean_i [ log sum_d exp(scale sim(q_i, d)) - scale sim(q_i, d_i) ], d over the positives and the hard negatives
    of all rows. With directions=("query_to_doc", "doc_to_query") and partition_mode="per_direction" it is the mean of
    that and of the same of d_i against all queries.

    Migration: `from fastcl.integrations.sentence_transformers import MultipleNegativesRankingLoss` in place of
    `from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss`. It takes the place of
    `CachedMultipleNegativesRankingLoss` too where that was chosen for the matrix of scores: value and gradients of the
    embeddings are the same. The activations of the model, which that one recomputes, are kept here.

    The same: arguments, value and gradient. Each column is embedded by a call of the model.

    On purpose different: memory is that of the embeddings. With gather_across_devices=True every rank returns the loss
    of the global batch, not of its own rows; gradients are, as in the original, those of the global batch after
    DistributedDataParallel's averaging. Other directions, and hardness_mode, are refused.

    Args:
        model: called with the features of a column, returns them with "sentence_embedding" [N, D].
        scale: positive number, 1 / temperature.
        similarity_fct: `cos_sim` or `dot_score` of sentence_transformers, or its name.
        gather_across_devices: over all ranks of the default process group; otherwise this process alone.
        directions, partition_mode: as above.
        hardness_mode, hardness_strength: None, and without effect.

    Example:
        >>> import torch
        >>> from fastcl.integrations.sentence_transformers import MultipleNegativesRankingLoss
        >>> class Model(torch.nn.Linear):
        ...     def forward(self, features):
        ...         return {"sentence_embedding": super().forward(features["input"])}
        >>> criterion = MultipleNegativesRankingLoss(Model(16, 8))
        >>> anchor, positive, negative = ({"input": torch.randn(4, 16)} for _ in range(3))
        >>> criterion([anchor, positive, negative], labels=None).backward()
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | str = "cos_sim",
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: None = None,
        hardness_strength: float = 0.0,
    ):
        super().__init__()
        self.scale = checks.constant(NAME, "scale", scale)
        self.similarity = similarity_fct if isinstance(similarity_fct, str) else getattr(similarity_fct, "__name__", "")
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"{NAME}: similarity_fct must be cos_sim or dot_score, got {similarity_fct!r}")
        checks.flag(NAME, "gather_across_devices", gather_across_devices)
        checks.one_of(NAME, "partition_mode", partition_mode, ("joint", "per_direction"))
        self.symmetric = set(directions) == SYMMETRIC and partition_mode == "per_direction"
        if set(directions) != FORWARD and not self.symmetric:
            expected = '("query_to_doc",), or ("query_to_doc", "doc_to_query") with partition_mode="per_direction"'
            raise ValueError(f'{NAME}: directions must be {expected}, got {directions!r} with "{partition_mode}"')
        if hardness_mode is not None:
            raise ValueError(f"{NAME}: hardness_mode must be None, got {hardness_mode!r}")
        self.model, self.gather_across_devices = model, gather_across_devices
        self.directions, self.partition_mode = tuple(directions), partition_mode

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of the columns: queries, their positives, and hard negatives in any number of columns."""
        queries, *others = embeddings
        normalize = SIMILARITIES[self.similarity]
        settings = {"columns": len(embeddings), "symmetric": self.symmetric, "similarity": self.similarity}
        settings |= {"grad_reduction": "mean", "requires_grad": needs_grad(*embeddings)}

        def check():
            if not others:
                raise ValueError(f"{NAME}: embeddings must be two or more columns, got {len(embeddings)}")
            for number, column in enumerate(others, 2):
                checks.pair(NAME, queries, column, ("column 1", f"column {number}"))
            return queries, self.scale

        group = None if self.gather_across_devices else "local"
        batch = open_batch(NAME, group, check, settings, argument="columns", number="scale")
        (q, dtype), *rest = (product_rows(NAME, column, normalize) for column in embeddings)
        scale, bound = beside(self.scale, queries), scale_bound(self.scale, normalize)
        positive = scale.double() * (q * rest[0][0]).sum(1).double()

        def negatives(rows: Tensor, columns: Tensor, own: bool) -> Tensor:
            return PairLogSumExp.apply(
                rows, columns, scale, None, None, None, False, own, dtype, bound, batch.ranks, NAME
            )

        # Positives of other queries, and all rows of the other columns.
        lse = functools.reduce(torch.logaddexp, [negatives(q, d, own=k == 0) for k, (d, _) in enumerate(rest)])
        loss = reduce_rows(softplus(lse - positive), "mean", batch)
        if self.symmetric:
            back = softplus(negatives(rest[0][0], q, own=True) - positive)
            loss = (loss + reduce_rows(back, "mean", batch)) / 2
        return loss.to(scale.dtype)

    def get_config_dict(self) -> dict[str, Any]:
        """What the trainer writes into a model card."""
        return {
            "scale": self.scale,
            "similarity_fct": self.similarity,
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
        }
