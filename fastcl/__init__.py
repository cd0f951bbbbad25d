"""Exact, memory-free contrastive losses with custom kernels: `from fastcl import nt_xent, swd_loss`."""

from .gradient_cache import cached_backward
from .losses.alignment import AlignmentLoss, UniformityLoss, alignment_loss, uniformity_loss
from .losses.clip import ClipLoss, clip_loss
from .losses.dcl import DCLLoss, dcl_loss
from .losses.decoupled import DecoupledNTXentLoss, decoupled_nt_xent
from .losses.generalized import GeneralizedContrastiveLoss, generalized_contrastive_loss
from .losses.info_nce import InfoNCELoss, info_nce
from .losses.instance_discrimination import instance_discrimination_loss
from .losses.nt_xent import NTXentLoss, nt_xent
from .losses.siglip import SigLIPLoss, siglip_loss
from .losses.supcon import SupConLoss, supcon_loss
from .losses.swd import SWDLoss, swd_loss
from .losses.views import nt_xent_views
from .memory import InstanceDiscrimination, MemoryBank, Queue, sample_hard_negatives
from .sort import segmented_sort
from .stats import ContrastiveStats, contrastive_stats

__all__ = [
    "AlignmentLoss",
    "ClipLoss",
    "ContrastiveStats",
    "DCLLoss",
    "DecoupledNTXentLoss",
    "GeneralizedContrastiveLoss",
    "InfoNCELoss",
    "InstanceDiscrimination",
    "MemoryBank",
    "NTXentLoss",
    "Queue",
    "SWDLoss",
    "SigLIPLoss",
    "SupConLoss",
    "UniformityLoss",
    "alignment_loss",
    "cached_backward",
    "clip_loss",
    "contrastive_stats",
    "dcl_loss",
    "decoupled_nt_xent",
    "generalized_contrastive_loss",
    "info_nce",
    "instance_discrimination_loss",
    "nt_xent",
    "nt_xent_views",
    "sample_hard_negatives",
    "segmented_sort",
    "siglip_loss",
    "supcon_loss",
    "swd_loss",
    "uniformity_loss",
]
