"""Measurements of fastcl against plain PyTorch: time, memory and error, on the CPU and on GPUs."""
