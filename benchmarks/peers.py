"""Losses of other libraries as functions of the inputs of our workloads, and why one of them is not measured.

Nothing is imported before a loss is called first: some libraries take seconds.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# Where each library has its losses.
LOSSES = {
    "lightly": "lightly.loss",
    "open_clip": "open_clip.loss",
    "pytorch_metric_learning": "pytorch_metric_learning.losses",
    "sentence_transformers": "sentence_transformers.sentence_transformer.losses",
}
# The settings of the workloads; scale and bias are SigLIP's first.
TEMPERATURE, IN_BATCH_TEMPERATURE, LOGIT_BIAS = 0.1, 0.07, -10.0


def logit_scale(x: Tensor) -> float:
    """CLIP's first, for rows as long as these."""
    return 1 / 0.07 / x.shape[1]


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def losses_of(name: str) -> ModuleType:
    """The module of a library's losses."""
    if name == "open_clip":
        # By itself: the package around it imports tokenisers and models, which takes longer than all tests.
        path = Path(importlib.util.find_spec(name).origin).with_name("loss.py")
        spec = importlib.util.spec_from_file_location("open_clip_loss", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    if installed("torchvision"):
        # Made importable beside a CPU-only PyTorch.
        sys.path.append(str(EXAMPLES))
        importlib.import_module("simclr.torchvision_compat")
    return importlib.import_module(LOSSES[name])


def _lightly_nt_xent() -> Loss:
    return losses_of("lightly").NTXentLoss(TEMPERATURE)


def _lightly_dcl() -> Loss:
    return losses_of("lightly").DCLLoss(TEMPERATURE)


def _metric_learning_nt_xent() -> Loss:
    loss = losses_of("pytorch_metric_learning").NTXentLoss(TEMPERATURE)
    return lambda z1, z2: loss(torch.cat([z1, z2]), torch.arange(len(z1), device=z1.device).repeat(2))


def _metric_learning_supcon() -> Loss:
    loss = losses_of("pytorch_metric_learning").SupConLoss(TEMPERATURE)
    return lambda x: loss(x, labels_of_eight(x))


def labels_of_eight(x: Tensor) -> Tensor:
    """Eight rows of every label."""
    return torch.arange(len(x), device=x.device) % max(1, len(x) // 8)


def _open_clip_clip() -> Loss:
    loss = losses_of("open_clip").ClipLoss()
    return lambda x, y: loss(x, y, logit_scale(x))


def _open_clip_siglip() -> Loss:
    loss = losses_of("open_clip").SigLipLoss()
    return lambda x, y: loss(x, y, logit_scale(x), LOGIT_BIAS)


def _sentence_transformers_info_nce() -> Loss:
    kind = losses_of("sentence_transformers").MultipleNegativesRankingLoss
    # Rows stand in for the model's output.
    loss = kind(lambda rows: {"sentence_embedding": rows}, scale=1 / IN_BATCH_TEMPERATURE)
    return lambda q, k: loss([q, k], None)


def _both_directions(rows: Callable[[Tensor, Tensor, float], Tensor]) -> Loss:
    """CLIP by a loss of rows among columns."""
    return lambda x, y: (rows(x, y, logit_scale(x)) + rows(y, x, logit_scale(x))) / 2


def _unit_rows(rows: Callable[[Tensor, Tensor, float], Tensor]) -> Loss:
    """InfoNCE of a batch by the same."""
    return lambda q, k: rows(F.normalize(q, dim=1), F.normalize(k, dim=1), 1 / IN_BATCH_TEMPERATURE)


def _cut_cross_entropy() -> Callable[[Tensor, Tensor, float], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    def rows(x: Tensor, y: Tensor, scale: float) -> Tensor:
        # Its kernels run on GPUs alone; elsewhere it compiles the plain form. Nothing is filtered: all sides are exact.
        how = {"impl": "cce", "filter_eps": None} if x.is_cuda else {"impl": "torch_compile"}
        return linear_cross_entropy(scale * x, y, torch.arange(len(x), device=x.device), **how)

    return rows


def _liger() -> Callable[[Tensor, Tensor, float], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda x, y, scale: loss(y, scale * x, torch.arange(len(x), device=x.device))


def _inf_cl() -> Callable[[Tensor, Tensor, float], Tensor]:
    from inf_cl import cal_flash_loss

    def rows(x: Tensor, y: Tensor, scale: float) -> Tensor:
        # Heads add up to the product; 256 features at most, and a power of two.
        head = math.gcd(x.shape[1], 256)
        return cal_flash_loss(x, y, scale=scale, head_dim=head).mean()

    return rows


def _siglip_kernel() -> Loss:
    """Scale and bias without gradient, as on the other sides; the scale as a logarithm."""
    from siglip_kernel import fused_siglip_loss

    def loss(image: Tensor, text: Tensor) -> Tensor:
        numbers = (math.log(logit_scale(image)), LOGIT_BIAS)
        return fused_siglip_loss(image, text, *(torch.full((), number, device=image.device) for number in numbers))

    return loss


def _pot() -> Loss:
    """Takes directions as columns and returns the distance itself."""
    import ot

    return lambda z, samples, directions: ot.sliced_wasserstein_distance(z, samples, projections=directions.T, p=2) ** 2


@dataclass(frozen=True)
class Peer:
    """A library: its name on PyPI, the module that it installs, and, by workload, what imports and returns its loss."""

    name: str
    module: str
    losses: dict[str, Callable[[], Loss]]
    needs_gpu: bool = False
    # Whether it has kernels of its own on a GPU that build no matrix of similarities.
    no_matrix: bool = False
    # Rows from which on a call takes more than a few seconds or gigabytes, by workload.
    most: dict[str, int] = field(default_factory=dict)

    def why_not(self) -> str | None:
        """Why it cannot be measured here, or None."""
        if self.needs_gpu and not torch.cuda.is_available():
            return "its kernels need a GPU"
        return None if installed(self.module) else "not installed"

    @property
    def version(self) -> str:
        return metadata.version(self.name)


PEERS = (
    Peer("lightly", "lightly", {"nt_xent": _lightly_nt_xent, "dcl_loss": _lightly_dcl}),
    Peer(
        "pytorch-metric-learning", "pytorch_metric_learning",
        {"nt_xent": _metric_learning_nt_xent, "supcon_loss": _metric_learning_supcon},
        # Its NTXentLoss builds a tensor of rows x positives x negatives: 2 GiB here, eight times that at twice the rows.
        most={"nt_xent": 512},
    ),
    Peer("open_clip_torch", "open_clip", {"clip_loss": _open_clip_clip, "siglip_loss": _open_clip_siglip}),
    Peer("sentence-transformers", "sentence_transformers", {"info_nce": _sentence_transformers_info_nce}),
    Peer(
        "cut-cross-entropy", "cut_cross_entropy",
        {
            "clip_loss": lambda: _both_directions(_cut_cross_entropy()),
            "info_nce": lambda: _unit_rows(_cut_cross_entropy()),
        },
        no_matrix=True,
    ),
    Peer(
        "liger-kernel", "liger_kernel",
        {"clip_loss": lambda: _both_directions(_liger()), "info_nce": lambda: _unit_rows(_liger())},
        needs_gpu=True, no_matrix=True,
    ),
    Peer(
        "inf-cl", "inf_cl",
        {"clip_loss": lambda: _both_directions(_inf_cl()), "info_nce": lambda: _unit_rows(_inf_cl())},
        needs_gpu=True, no_matrix=True,
    ),
    Peer("siglip-kernel", "siglip_kernel", {"siglip_loss": _siglip_kernel}, needs_gpu=True, no_matrix=True),
    Peer("POT", "ot", {"swd_loss, given draws": _pot}),
)  # fmt: skip


def _when_called(make: Callable[[], Loss]) -> Loss:
    """The loss, made at its first call."""
    made = functools.cache(make)
    return lambda *args: made()(*args)


def losses_for(kind: str) -> dict[str, Loss]:
    """{library: its loss} of a workload, of those that run here."""
    return {peer.name: _when_called(peer.losses[kind]) for peer in PEERS if kind in peer.losses and not peer.why_not()}


def most_rows(kind: str, name: str) -> float:
    """Up to how many rows a library is measured."""
    return next((peer.most.get(kind, math.inf) for peer in PEERS if peer.name == name), math.inf)


def versions() -> dict[str, str]:
    """{library: version, or why it is not measured}."""
    return {peer.name: peer.why_not() or peer.version for peer in PEERS}
