"""Exact, memory-free contrastive losses with custom kernels: `from fastcl import nt_xent`."""

from .losses.nt_xent import NTXentLoss, nt_xent

__all__ = ["NTXentLoss", "nt_xent"]
