"""What a run tells while it goes: a progress bar, one JSON object a line, TensorBoard where asked for."""

import json
import sys

import torch
from tqdm import tqdm

from .errors import UsageError

SCALARS = {"step": ("loss", "top1", "lr", "images_per_s", "memory_mib", "data_s", "encoder_s", "loss_s", "optimizer_s"),
           "probe": ("linear", "linear_top5", "knn", "knn_top5")}


class Log:
    """Keeps the records of a run, those of before a checkpoint too; on ranks other than 0 nothing is written."""

    def __init__(self, folder, rank=0, records=(), tensorboard=False):
        self.records = []
        self._file = open(folder / "log.jsonl", "w", encoding="utf-8", buffering=1) if rank == 0 else None
        self._board = _board(folder / "tensorboard") if tensorboard and rank == 0 else None
        for record in records:
            self.write(**record)

    def write(self, event, **fields):
        self.records.append(dict(event=event, **fields))
        if self._file:
            print(json.dumps(self.records[-1]), file=self._file)
        if self._board:
            for name in SCALARS.get(event, ()):
                if fields.get(name) is not None:
                    self._board.add_scalar(f"{event}/{name}", fields[name], fields["step"])

    def of(self, event):
        return [record for record in self.records if record["event"] == event]

    def close(self):
        for output in (self._file, self._board):
            if output:
                output.close()


def _board(folder):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard: expected the package tensorboard to be installed, got none") from None
    return SummaryWriter(folder)


def progress_bar(settings, done, rank):
    """tqdm's, which knows the time that is left; into a file it writes every 15 seconds, not ten times a second."""
    seconds = 0.1 if sys.stderr.isatty() else 15
    return tqdm(total=settings.steps, initial=done, unit="step", disable=settings.quiet or rank != 0,
                dynamic_ncols=True, mininterval=seconds)


def memory_mib(device):
    """The most that this process has held: of the GPU's memory there, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, kilobytes elsewhere
