"""The training loop: steps, learning rate, log, probes of the encoder and checkpoints every so often."""

import math
import signal
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastcl import cached_backward

from . import batches, probe
from .clock import StepClock
from .errors import RunError, UsageError
from .interrupt import Interrupted, Interrupts
from .log import memory_mib, progress_bar
from .optim import warmup_cosine


class Trainer:
    """Holds what a run consists of; `run` does it. `settings` are the command line's; `done` steps were taken before.
    """

    def __init__(self, settings, source, method, optimizer, scaler, lr, log, checkpoints, device, rank=0, world=1,
                 done=0):
        self.settings, self.source, self.method = settings, source, method
        self.optimizer, self.scaler, self.lr = optimizer, scaler, lr
        self.log, self.checkpoints, self.device = log, checkpoints, device
        self.rank, self.world, self.done = rank, world, done
        self.parallel = DistributedDataParallel(method.network) if world > 1 else method.network
        self.warmup = round(settings.warmup * settings.steps)
        self.clock = StepClock(device)
        self._unchecked = []  # (step, loss) since the last look at them
        self._logged = done  # step of the last record
        self._last_features = None  # those of the probe after the last step, in a tuple of one: None on ranks above 0
        self._before = sum(record["seconds"] for record in log.of("checkpoint")[-1:]) if log else 0.0
        self._started = time.perf_counter()
        self._device_views = source.device_views().to(device) if settings.augment == "device" else None

    def run(self):
        """Train up to `settings.steps` steps, with probes before, in between and after."""
        step = self.done
        try:
            with Interrupts() as interrupts:
                if not self.done:
                    self.probe(0)
                self._stop_if_asked(interrupts, step)
                self.method.train()
                self.clock.lap(None)
                with progress_bar(self.settings, self.done, self.rank) as bar:
                    for step, batch in enumerate(self._batches(), self.done + 1):
                        self._train_step(step, batch, bar)
                        self._stop_if_asked(interrupts, step)
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not _from_a_dead_reader(error):
                raise
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise it again, wherever that is
            raise RunError(f"after step {step}: a process that reads pictures died (out of memory?), --workers "
                           f"{self.settings.workers}; {self._last_checkpoint()}") from error

    def _stop_if_asked(self, interrupts, step):
        if number := interrupts.anywhere(self.world):
            if self.done < step < self.settings.steps:
                self._save(step)
            raise Interrupted(number, f"stopped after step {step}; {self._last_checkpoint()}")

    def elapsed(self):
        """Seconds of training, those before the checkpoint that it went on from included."""
        return self._before + time.perf_counter() - self._started

    def _train_step(self, step, batch, bar):
        settings = self.settings
        loss, rows, targets = self._step(step, batch)
        self._unchecked.append((step, loss))
        last = step == settings.steps
        if step % settings.log_every == 0 or last:
            # Without the time that this takes: the clock is read before, and waits for the GPU.
            seconds = self.clock.read()
            self._log_step(bar, step, self._look_at_losses(), self.method.top1(rows, targets).item(), seconds)
        probed = last or (settings.eval_every and step % settings.eval_every == 0)
        score = self.probe(step) if probed else None
        if last or (settings.checkpoint_every and (probed or step % settings.checkpoint_every == 0)):
            self._save(step)
            if probed and not settings.no_probe:
                self.checkpoints.save_best(step, score)
        bar.update()
        self.clock.lap(None)

    def _batches(self):
        settings, source = self.settings, self.source
        keys = batches.EpochBatches(len(source.train), settings.batch, settings.steps, settings.seed, self.rank,
                                    self.world, self.done)
        loader = batches.train_loader(source, keys, settings.seed, settings.workers, pin=self.device.type == "cuda",
                                      views=self.method.views, on_device=self._device_views is not None)
        for step, batch in enumerate(loader, self.done + 1):
            if batch.unreadable:
                self.log.write("unreadable", step=step, pictures=batch.unreadable)
            if len(batch.index) < 2:  # batch norm needs two
                raise UsageError(f"{batch.unreadable[0]}: expected pictures that can be read, got a batch with "
                                 f"{len(batch.index)} of them")
            yield batch

    def _step(self, step, batch):
        """One update of the network; the loss, and what it is of, detached."""
        lr = self.lr * warmup_cosine(step - 1, self.settings.steps, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        views = [view.to(self.device, non_blocking=True, memory_format=torch.channels_last) for view in batch.views]
        index = batch.index.to(self.device, non_blocking=True)
        if self._device_views is not None:
            views = [self._device_views(views[0]) for _ in range(self.method.views)]
        self.clock.lap("data")
        targets = self.method.targets(views, index)
        self.optimizer.zero_grad()
        loss, rows = self._backward(self.method.online(views), targets)
        self.clock.lap("encoder")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.method.update(targets, step / self.settings.steps)
        self.clock.lap("optimizer")
        return loss, rows, targets

    def _backward(self, views, targets):
        """All views in one pass, so that batch norm sees them together. The loss has a backward of its own, from its
        value to the rows: that of the network goes on from there. So both are timed, and chunks come in between."""
        chunks, kept = self.settings.grad_cache_chunks, {}

        def loss_of(rows):
            self.clock.lap("encoder")
            parts = rows.chunk(len(views))
            loss = self.method.loss(parts, targets)
            kept.update(loss=loss.detach(), rows=[part.detach() for part in parts])
            rows.register_hook(lambda _: self.clock.lap("loss"))
            return self.scaler.scale(loss)

        pictures = torch.cat(views) if len(views) > 1 else views[0]
        if chunks > 1:
            cached_backward(self.parallel, [pictures], loss_of, chunks)
        else:
            rows = self.parallel(pictures)
            leaf = rows.detach().requires_grad_()
            loss_of(leaf).backward()
            rows.backward(leaf.grad)
        return kept["loss"], kept["rows"]

    def _look_at_losses(self):
        """The last loss, where all since the last look are finite; waits for the device."""
        values = torch.stack([loss for _, loss in self._unchecked]).tolist() if self._unchecked else []
        for (step, _), value in zip(self._unchecked, values):
            if not math.isfinite(value):
                raise RunError(f"step {step}: the loss is {value}; a lower --lr or a longer --warmup may help; "
                               f"{self._last_checkpoint()}")
        self._unchecked = []
        return values[-1] if values else None

    def _last_checkpoint(self):
        newest = self.checkpoints.newest
        return f"last checkpoint: {newest} (--resume)" if newest else "there is no checkpoint"

    def _save(self, step):
        """A checkpoint, of a network that can go on: the last update may have ruined what the last loss came from."""
        self._look_at_losses()
        finite = [parameter.isfinite().all() for parameter in self.method.network.parameters()]
        if not torch.stack(finite).all():
            raise RunError(f"step {step}: weights became infinite or NaN; a lower --lr or a longer --warmup may help; "
                           f"{self._last_checkpoint()}")
        self.log.write("checkpoint", step=step, seconds=round(self.elapsed(), 2))
        modules = {"method": self.method, "optimizer": self.optimizer, "scaler": self.scaler}
        self.checkpoints.save(step, modules, self.log.records)

    def _log_step(self, bar, step, loss, top1, seconds):
        since, self._logged = step - self._logged, step
        rate = since * self.settings.batch / max(sum(seconds.values()), 1e-9)
        lr, memory = self.optimizer.param_groups[0]["lr"], memory_mib(self.device)
        parts = {f"{part}_s": seconds.get(part, 0.0) / since for part in ("data", "encoder", "loss", "optimizer")}
        self.log.write("step", step=step, loss=loss, top1=top1, lr=lr, images_per_s=round(rate, 1),
                       memory_mib=round(memory), **{name: round(value, 6) for name, value in parts.items()})
        bar.set_postfix_str(f"loss {loss:.3f}, top-1 {top1:.1%}, lr {lr:.2g}, {rate:.0f} images/s, {memory:.0f} MiB",
                            refresh=False)

    def probe(self, step):
        """Accuracy of linear and kNN probes of the frozen encoder, on rank 0, logged; returns the linear one there."""
        if self.settings.no_probe:
            return None
        started = time.perf_counter()
        features, score = self.features(), None
        if step == self.settings.steps:  # between others training needs the memory
            self._last_features = (features,)
        if self.rank == 0:
            if step == 0:
                self._log_unread(step, features)
            linear, knn = probe.linear_probe(features), probe.knn_probe(features)
            self.log.write("probe", step=step, linear=linear.top1, linear_top5=linear.top5, knn=knn.top1,
                           knn_top5=knn.top5, seconds=round(time.perf_counter() - started, 2))
            score = linear.top1
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # what the log shows is training's
        if self.world > 1:
            dist.barrier()
        return score

    def _log_unread(self, step, features):
        for pictures, index in ((self.source.train, features.train_index), (self.source.test, features.test_index)):
            unread = set(range(len(pictures))) - set(index.tolist())
            if unread:
                self.log.write("unreadable", step=step, pictures=[pictures.name(i) for i in sorted(unread)])

    def features(self):
        """Features of both splits from the frozen encoder, as it is now; every rank reads its share, rank 0 gets all.
        Those of a probe after the last step are given again."""
        if self._last_features:
            return self._last_features[0]
        parts = [part for pictures in (self.source.train, self.source.test)
                 for part in self.rows_of(pictures)]
        return probe.Features(*parts) if self.rank == 0 else None

    @torch.no_grad()
    def projections(self, features):
        """Of the test pictures, what the head makes of their features."""
        return self.method.network.head.eval()(features.test)

    def rows_of(self, pictures):
        """(features, labels, indices) of all readable pictures, on rank 0."""
        encoder = self.method.network.encoder
        loader = batches.plain_loader(pictures, self.source.plain, self.settings.batch, self.settings.workers,
                                      rank=self.rank, world=self.world)
        if self.world == 1:
            return probe.extract(encoder, loader, pictures.labels, self.device)
        for buffer in encoder.buffers():  # batch norm's statistics are each rank's own: here those of the checkpoint
            dist.broadcast(buffer, 0)
        try:
            share = probe.extract(encoder, loader, pictures.labels, self.device)
        except UsageError as error:  # not one picture of this share: others may have some
            share = error
        found = [None] * self.world if self.rank == 0 else None
        dist.gather_object(share if isinstance(share, UsageError) else [part.cpu() for part in share], found)
        if self.rank:
            return None, None, None
        read = [part for part in found if not isinstance(part, UsageError)]
        if not read:
            raise found[0]
        rows, labels, index = (torch.cat(part) for part in zip(*read))
        order = index.argsort()
        return rows[order].to(self.device), labels[order].to(self.device), index[order]


def _from_a_dead_reader(error):
    """PyTorch raises a RuntimeError wherever the main process happens to be; but before that, tensors that wait in the
    reader's socket may be missed there. What a living reader raises says that it comes from one."""
    said = str(error)
    lost = isinstance(error, (ConnectionError, EOFError)) and "in DataLoader worker process" not in said
    return lost or "DataLoader worker (pid" in said
