"""The training loop: steps, learning rate, progress bar, log, and a probe of the encoder every so often."""

import contextlib
import json
import math
import sys
import time

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import data, probe
from .errors import UsageError
from .optim import warmup_cosine


class Log:
    """One JSON object a line; on ranks other than 0 nothing is written."""

    def __init__(self, path, enabled=True, records=()):
        self._file = open(path, "w", encoding="utf-8", buffering=1) if enabled else None
        self.records = []
        for record in records:
            self.write(**record)

    def write(self, event, **fields):
        self.records.append(dict(event=event, **fields))
        if self._file:
            print(json.dumps(self.records[-1]), file=self._file)

    def of(self, event):
        return [record for record in self.records if record["event"] == event]

    def close(self):
        if self._file:
            self._file.close()


class NonFiniteLoss(Exception):
    """Training cannot go on: the loss became infinite or NaN."""


class Trainer:
    """Holds what a run consists of; `run` does it. `settings` are the command line's, `criterion` is the loss; `done`
    steps were taken before, `keep(step)` makes a checkpoint."""

    def __init__(self, settings, source, model, criterion, optimizer, lr, log, device, rank=0, world=1, done=0,
                 keep=lambda step: None):
        self.done, self.keep = done, keep
        self.settings, self.source, self.optimizer, self.lr, self.log = settings, source, optimizer, lr, log
        self.device, self.rank, self.world = device, rank, world
        self.model, self.criterion = model, criterion
        self.parallel = DistributedDataParallel(model) if world > 1 else model
        self.warmup = round(settings.warmup * settings.steps)

    def run(self):
        """Train up to `settings.steps` steps, with probes before, in between and after."""
        settings = self.settings
        batches = data.EpochBatches(len(self.source.train), settings.batch, settings.steps, settings.seed, self.rank,
                                    self.world, self.done)
        loader = data.train_loader(self.source, batches, settings.seed, settings.workers,
                                   pin=self.device.type == "cuda")
        if not self.done:
            self.probe(0)
        self.model.train()
        seconds = 0.1 if sys.stderr.isatty() else 15  # between updates: a file keeps every one of them
        with tqdm(total=settings.steps, initial=self.done, unit="step", disable=self.rank != 0, dynamic_ncols=True,
                  mininterval=seconds) as bar:
            self._train(loader, bar)
        self.probe(settings.steps)

    def _train(self, loader, bar):
        settings = self.settings
        clock, pictures = time.perf_counter(), 0
        for step, (first, second, unreadable) in enumerate(loader, self.done + 1):
            self._report_unreadable(step, unreadable, first)
            loss, z1, z2 = self._step(step, first, second)
            pictures += settings.batch
            if step % settings.log_every == 0 or step == settings.steps:
                loss = loss.item()  # waits for the device, so that the clock is right
                rate = pictures / (time.perf_counter() - clock)
                top1 = probe.contrastive_top1(z1, z2)  # among this process's rows; the loss is over all processes
                self._log_step(bar, step, loss, top1, rate)
                clock, pictures = time.perf_counter(), 0
            bar.update()
            if settings.eval_every and step % settings.eval_every == 0 and step < settings.steps:
                started = time.perf_counter()
                self.probe(step)
                clock += time.perf_counter() - started
            if settings.checkpoint_every and step % settings.checkpoint_every == 0:
                self.keep(step)

    def _step(self, step, first, second):
        """One update of the model; returns the loss and both views' projections, detached."""
        settings = self.settings
        lr = self.lr * warmup_cosine(step - 1, settings.steps, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        pictures = torch.cat([first, second]).to(self.device, non_blocking=True, memory_format=torch.channels_last)
        with self._autocast():
            z1, z2 = self.parallel(pictures).chunk(2)
            loss = self.criterion(z1, z2)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach(), z1.detach(), z2.detach()

    def _autocast(self):
        if not self.settings.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _log_step(self, bar, step, loss, top1, rate):
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"step {step}: the loss is {loss}; a lower --lr or a longer --warmup may help")
        lr = self.optimizer.param_groups[0]["lr"]
        self.log.write("step", step=step, loss=loss, top1=top1, lr=lr, images_per_s=round(rate, 1))
        bar.set_postfix_str(f"loss {loss:.3f}, top-1 {top1:.1%}, {rate:.0f} images/s", refresh=False)

    def _report_unreadable(self, step, unreadable, first):
        if unreadable:
            self.log.write("unreadable", step=step, pictures=unreadable)
        if first is None:
            raise UsageError(f"{unreadable[0]}: expected pictures that can be read, got a batch without a single one")

    def probe(self, step):
        """Linear and kNN accuracy of the frozen encoder on the plain pictures, on rank 0, logged."""
        if self.settings.no_probe:
            return
        if self.rank == 0:
            features = self.features()
            if step == 0:
                self._log_unread(step, features)
            self.log.write("probe", step=step, linear=probe.linear_probe(features), knn=probe.knn_probe(features))
        if self.world > 1:
            torch.distributed.barrier()

    def _log_unread(self, step, features):
        for pictures, index in ((self.source.train, features.train_index), (self.source.test, features.test_index)):
            unread = set(range(len(pictures))) - set(index.tolist())
            if unread:
                self.log.write("unreadable", step=step, pictures=[pictures.name(i) for i in sorted(unread)])

    def features(self):
        """Features of both splits from the frozen encoder, as it is now."""
        parts = []
        for pictures in (self.source.train, self.source.test):
            loader = data.plain_loader(pictures, self.source.plain, self.settings.batch, self.settings.workers)
            parts += probe.extract(self.model.encoder, loader, pictures.labels, self.device)
        return probe.Features(*parts)
