"""Triton kernels, one file per pass; `launch` holds their parameters, `host` calls them on tensors."""
