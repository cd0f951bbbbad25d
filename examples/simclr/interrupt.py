"""Ctrl-C and SIGTERM end a run between two steps, with a checkpoint."""

import signal

import torch
import torch.distributed as dist


class Interrupted(Exception):
    """Raised after the last step's checkpoint; `code` is the exit code that shells expect, 128 + the signal."""

    def __init__(self, number, message):
        super().__init__(number, message)
        self.code = 128 + number

    def __str__(self):
        return self.args[1]


class Interrupts:
    """Takes note of the first SIGINT or SIGTERM while it is open. A second one acts as if nobody listened."""

    def __enter__(self):
        self.number = 0
        self._before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number, _frame):
        self.number = number
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def anywhere(self, world):
        """The signal that any of the processes has got, the same on all of them; 0 for none."""
        if world == 1:
            return self.number
        number = torch.tensor(self.number)  # on the CPU: over gloo, beside the GPU's work
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()
