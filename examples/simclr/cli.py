"""From a command line to a finished run: device, seed, processes, output folder, exit codes."""

import contextlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from . import batches, checkpoint, data, methods, optim
from .errors import RunError, UsageError
from .interrupt import Interrupted
from .log import Log
from .report import write_report
from .settings import objective, parse
from .train import Trainer

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_device(name):
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "cuda" and dist.is_torchelastic_launched():
            device = torch.device("cuda", dist.get_node_local_rank())
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        found = torch.cuda.device_count()
        raise UsageError(f"--device: expected auto, cpu or one of {found} CUDA devices, one for each process, "
                         f"got {name}")
    if device.index is not None:
        torch.cuda.set_device(device)  # events and pinned memory are of the current one
    return device


def _fill_in(settings, source):
    """What follows from the data."""
    settings.steps = settings.steps or batches.steps_of(settings.epochs, len(source.train), settings.batch)
    settings.image_size, settings.channels = source.image_size, source.channels
    if settings.method == "moco-v2" and settings.queue is None:
        settings.queue = min(65536, 1 << len(source.train).bit_length() - 1)


def _check(settings, source, world):
    if settings.batch < 2 * world:
        raise UsageError(f"--batch: expected at least 2 pictures for each of {world} processes, got {settings.batch}")
    share = settings.batch // world // settings.grad_cache_chunks
    if share < 2 * settings.bn_splits:
        option = "--bn-splits" if settings.bn_splits > 1 else "--grad-cache-chunks"
        raise UsageError(f"{option}: expected at least 2 pictures for each part of a process' batch of "
                         f"{settings.batch // world}, got {settings.grad_cache_chunks * settings.bn_splits} parts")
    if len(source.train) < settings.batch:
        raise UsageError(f"{settings.data}: expected at least --batch {settings.batch} training pictures, "
                         f"got {len(source.train)}")
    if settings.queue is not None and settings.queue < settings.batch:
        raise UsageError(f"--queue: expected at least --batch {settings.batch} keys, got {settings.queue}")
    if not settings.no_probe:
        for split, pictures in (("training", source.train), ("test", source.test)):
            found = len(pictures.labels.unique())
            if found < 2:
                raise UsageError(f"{settings.data}: expected at least two classes for the probe in the {split} split "
                                 f"(or --no-probe), got {found}")


def _output_folder(name):
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: expected a folder that can be written, got {name} ({error.strerror})") from None
    return folder


@contextlib.contextmanager
def processes(name, workers=0):
    """(device, rank, world) of this process, which `workers` read pictures for, and the exchange with the others while
    there are any."""
    device = find_device(name)
    if device.type == "cpu":
        # Workers and compute threads share the cores: more threads than cores wait for each other in a spin.
        torch.set_num_threads(max(1, torch.get_num_threads() - workers))
    distributed = dist.is_torchelastic_launched()
    if distributed:
        # Beside NCCL a backend for the CPU: the losses' settings travel there, so that no step waits for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield (device, dist.get_rank(), dist.get_world_size()) if distributed else (device, 0, 1)
    if distributed:
        dist.destroy_process_group()  # after an error it could wait for others: `one_line` ends the process instead


def run(settings):
    """Train, probe and report; returns what happened, on rank 0, as a dict: probes, seconds, report's path."""
    with processes(settings.device, settings.workers) as (device, rank, world):
        return _run(settings, device, rank, world)


def _method(settings, source, device, world, build):
    method = build(settings, source, DTYPES[settings.precision])
    if world > 1 and device.type == "cuda" and settings.bn_splits == 1:  # PyTorch has none for the CPU
        from timm.layers import convert_sync_batchnorm  # PyTorch's would drop activations that timm keeps in norms

        method = convert_sync_batchnorm(method)
    method = method.to(device, memory_format=torch.channels_last)
    if settings.compile:
        for network in method.modules():
            if isinstance(network, methods.Network):
                network.compile()
    return method


def prepare(settings, source, device, rank=0, world=1, build=methods.build):
    """The trainer, where a checkpoint left off or at the start; `build(settings, source, dtype)` makes its method."""
    _fill_in(settings, source)
    _check(settings, source, world)
    folder = _output_folder(settings.out)
    torch.manual_seed(settings.seed)
    torch.backends.cudnn.deterministic = True  # the same seed gives the same run
    method = _method(settings, source, device, world, build)
    lr = optim.scaled_lr(settings.lr, settings.batch, settings.lr_scaling)
    optimizer = optim.build_optimizer(settings.optimizer, method.network, lr, settings.weight_decay)
    if rank:  # weights, queue and bank are alike by now; what a rank draws for its pictures is its own
        torch.manual_seed(batches.seed_of(settings.seed, rank))
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints", settings, settings.keep, rank, world)
    done, records = checkpoints.load(settings.resume, dict(method=method, optimizer=optimizer, scaler=scaler), device)
    log = Log(folder, rank, records, settings.tensorboard)
    if not done:
        log.write("settings", **vars(settings), objective=" ".join(objective(settings)),
                  groups=optim.describe(optimizer))
    return Trainer(settings, source, method, optimizer, scaler, lr, log, checkpoints, device, rank, world, done)


def _run(settings, device, rank, world):
    source = data.open_data(settings.data, settings.image_size, settings.strength, settings.blur, settings.crop)
    trainer = prepare(settings, source, device, rank, world)
    log, encoder = trainer.log, trainer.method.network.encoder
    trainer.run()
    facts = dict(seconds=trainer.elapsed(), device=_device_name(device), processes=world,
                 parameters=sum(p.numel() for p in encoder.parameters()), torch=torch.__version__)
    log.write("end", **facts)
    log.close()
    features = projections = None
    if not settings.no_probe:
        features = trainer.features()
    if rank != 0:
        return None
    if features is not None:
        projections = trainer.projections(features)
    folder = Path(settings.out)
    checkpoint.export_encoder(folder / "encoder.safetensors", encoder, dict(
        arch=settings.arch, channels=source.channels, image_size=source.image_size, width=settings.width,
        norm=settings.norm, method=settings.method, step=settings.steps))
    title, text = objective(settings)
    path = write_report(folder, settings, source, log.records, facts, f"{title} ({text})" if text else title,
                        features, projections)
    return dict(probes=log.of("probe"), seconds=facts["seconds"], report=path)


def _device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"


@contextlib.contextmanager
def one_line(prog):
    """Ends the process with one line and an exit code where a run inside ends by what is no mistake in the program."""
    try:
        yield
        return
    except (UsageError, RunError, Interrupted) as error:
        code, message = error.code, error
    except KeyboardInterrupt:
        code, message = 130, "stopped"
    except torch.OutOfMemoryError as error:
        code = 1
        message = f"the GPU's memory is full; a smaller --batch or more --grad-cache-chunks take less ({error})"
    except OSError as error:
        code, message = 1, error
    print(f"{prog}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(code)  # others may be in an exchange with this process, which an orderly end would wait for
    raise SystemExit(code)


def main(arguments=None, prog="simclr_imagenet.py"):
    """Exit code: 0, 1 where training failed, 2 for settings or data that the person can put right, 128 + a signal."""
    try:
        with one_line(prog):
            outcome = run(parse(arguments, prog))
            if outcome:
                print_outcome(outcome)
    except SystemExit as ended:
        return ended.code
    return 0


def print_outcome(outcome):
    if outcome["probes"]:
        before, after = outcome["probes"][0], outcome["probes"][-1]
        print(f"linear probe {after['linear']:.1%} (untrained {before['linear']:.1%}), "
              f"kNN {after['knn']:.1%} (untrained {before['knn']:.1%})")
    print(f"report: {outcome['report']}")
