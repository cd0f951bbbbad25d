"""Where the time of a step goes."""

import time
from collections import Counter

import torch


class StepClock:
    """Seconds of each part of the steps: `lap(part)` says that what ran since the last lap was `part`.

    On a GPU the laps are events in its stream, read in `read` alone: no step waits for the GPU. The time of a part is
    then the GPU's, and the wait for data what the GPU stands still for.
    """

    def __init__(self, device):
        self._on_gpu = device.type == "cuda"
        self._parts, self._marks = [], [self._now()]

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, part):
        """`part` None: time that is nobody's."""
        self._parts.append(part)
        self._marks.append(self._now())

    def read(self):
        """{part: seconds} since the last reading."""
        if self._on_gpu:
            self._marks[-1].synchronize()
        seconds = Counter()
        for part, start, stop in zip(self._parts, self._marks, self._marks[1:]):
            seconds[part] += start.elapsed_time(stop) / 1000 if self._on_gpu else stop - start
        self._parts, self._marks = [], self._marks[-1:]
        del seconds[None]
        return dict(seconds)
