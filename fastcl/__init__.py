"""Exact, memory-free contrastive losses with custom kernels: `from fastcl import nt_xent, swd_loss`."""

from .losses.alignment import AlignmentLoss, UniformityLoss, alignment_loss, uniformity_loss
from .losses.decoupled import DecoupledNTXentLoss, decoupled_nt_xent
from .losses.generalized import GeneralizedContrastiveLoss, generalized_contrastive_loss
from .losses.nt_xent import NTXentLoss, nt_xent
from .losses.swd import SWDLoss, swd_loss
from .sort import segmented_sort

__all__ = [
    "AlignmentLoss",
    "DecoupledNTXentLoss",
    "GeneralizedContrastiveLoss",
    "NTXentLoss",
    "SWDLoss",
    "UniformityLoss",
    "alignment_loss",
    "decoupled_nt_xent",
    "generalized_contrastive_loss",
    "nt_xent",
    "segmented_sort",
    "swd_loss",
    "uniformity_loss",
]
