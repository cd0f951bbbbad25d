"""What a call launches on a device: every kernel of aten and of Triton, in order, counted without a device.

The ops run through the host side of the Triton kernels on CPU tensors, in Triton's interpreter. What PyTorch dispatches
around them is what it dispatches for CUDA tensors: the composition does not ask for the device.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

# Besides views: what makes memory, hands a tensor on or asks about one, and starts nothing. Not lift_fresh: it is what
# torch.tensor makes of a number, a copy from the host.
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "is_same_size")


class Launches(TorchDispatchMode):
    """Within it, `found` grows by a name for every launch: "aten.add", or "lse_combine_kernel"."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self._inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else (result,)
        # A kernel over no element is not launched.
        work = not isinstance(result, torch.Tensor) or any(x.numel() for x in results)
        name = func._overloadpacket.__name__
        free = name in FREE or (func.is_view and name != "lift_fresh") or func.namespace != "aten"
        if work and not free and not self._inside:
            self.found.append(f"aten.{name}")
        return result

    @contextmanager
    def of(self, kernel: str):
        """A launch whose interpreter calculates with tensors of its own."""
        self.found.append(kernel)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False


@contextmanager
def launches(monkeypatch):
    """The list that grows while the body runs."""
    mode, run = Launches(), interpreter.GridExecutor.__call__

    def recorded(self, *args, **options):
        with mode.of(self.fn.__name__):
            return run(self, *args, **options)

    with monkeypatch.context() as patch, mode:
        patch.setattr(interpreter.GridExecutor, "__call__", recorded)
        yield mode.found
