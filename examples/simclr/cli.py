"""From a command line to a finished run: settings, device, seed, processes, output folder."""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from . import checkpoint, data, losses, model, optim
from .errors import UsageError
from .report import write_report
from .train import Log, NonFiniteLoss, Trainer

# Learning rate and its scaling with the batch: Adam's for small encoders, LARS's as SimCLR has it for ImageNet.
LEARNING_RATES = {"adam": (2e-3, "none"), "lars": (0.075, "sqrt")}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line instead of the usage text, which would bury it."""
        self.exit(2, f"{self.prog}: {message}\n")


def _positive(kind):
    def parse(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse puts it into its message
    return parse


def _by_loss(argument):
    return "default: " + ", ".join(f"{value:g} for {name}" for name, value in losses.defaults(argument).items())


def _parser(prog):
    count, number = _positive(int), _positive(float)
    parser = Parser(prog=prog, description="Train an encoder with a contrastive loss, probe it, and write a report.")
    parser.add_argument("data", metavar="DATA", help="folder of pictures, one sub-folder per class (or train/ and val/ "
                        "like that), or `digits` for the small set that comes with scikit-learn")
    parser.add_argument("--out", default="results/simclr", help="folder for what comes out (%(default)s)")
    group = parser.add_argument_group("model")
    group.add_argument("--arch", choices=model.ARCHITECTURES, help="default: convnet for digits, else resnet50")
    group.add_argument("--width", type=count, default=16, help="channels of the convnet's first layer (%(default)s)")
    group.add_argument("--head-layers", type=int, choices=(2, 3), default=3, help="(%(default)s)")
    group.add_argument("--head-out", type=count, default=128, help="width of the projections (%(default)s)")
    group = parser.add_argument_group("data")
    group.add_argument("--image-size", type=count, help="default: the pictures' own up to 96, else 224")
    group.add_argument("--strength", type=number, default=1.0, help="of the colour jitter (%(default)s)")
    group.add_argument("--workers", type=int, default=max(1, min(8, torch.get_num_threads() - 1)),
                       help="processes that read and augment (%(default)s)")
    group = parser.add_argument_group("loss")
    group.add_argument("--loss", choices=tuple(losses.LOSSES), default="nt_xent", help="(%(default)s) "
                       + "; ".join(f"{name}: {loss.help}" for name, loss in losses.LOSSES.items()))
    group.add_argument("--temperature", type=number, help=_by_loss("temperature"))
    group.add_argument("--loss-weight", type=number, help="lambda, of the distribution term; " + _by_loss("weight"))
    group = parser.add_argument_group("training")
    group.add_argument("--batch", type=count, default=128, help="pictures per step, over all processes (%(default)s)")
    group.add_argument("--epochs", type=count, default=100, help="(%(default)s)")
    group.add_argument("--steps", type=count, help="default: as many as the epochs have")
    group.add_argument("--optimizer", choices=tuple(LEARNING_RATES), default="adam", help="(%(default)s)")
    group.add_argument("--lr", type=number, help="default: 2e-3 for adam, 0.075 for lars")
    group.add_argument("--lr-scaling", choices=("none", "sqrt"), help="default: none for adam, sqrt for lars")
    group.add_argument("--weight-decay", type=float, default=1e-6, help="(%(default)s)")
    group.add_argument("--warmup", type=float, default=0.1, help="share of the steps (%(default)s)")
    group.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    group.add_argument("--device", default="auto", help="cuda, cuda:N or cpu (cuda where there is one)")
    group.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    group = parser.add_argument_group("output")
    group.add_argument("--log-every", type=count, default=10, help="steps between log lines (%(default)s)")
    group.add_argument("--eval-every", type=int, default=0, help="steps between probes; 0: before and after only")
    group.add_argument("--checkpoint-every", type=int, default=0, help="steps between checkpoints (0: none)")
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    group.add_argument("--no-probe", action="store_true", help="train without labels")
    return parser


def parse(arguments, prog):
    """The settings, with every default filled in that follows from other settings."""
    parser = _parser(prog)
    settings = parser.parse_args(arguments)
    for name, low, high in (("workers", 0, 1024), ("seed", 0, 2**63 - 1), ("eval_every", 0, 2**63 - 1),
                            ("checkpoint_every", 0, 2**63 - 1),
                            ("warmup", 0, 1), ("weight_decay", 0, 1)):
        value = getattr(settings, name)
        if not low <= value <= high:
            parser.error(f"argument --{name.replace('_', '-')}: expected {low} to {high}, got {value}")
    losses.fill_in(settings, parser.error)
    lr, scaling = LEARNING_RATES[settings.optimizer]
    settings.lr = settings.lr or lr
    settings.lr_scaling = settings.lr_scaling or scaling
    settings.arch = settings.arch or ("convnet" if settings.data == "digits" else "resnet50")
    return settings


def _device(name):
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "cuda" and dist.is_torchelastic_launched():
            device = torch.device("cuda", dist.get_node_local_rank())
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device: expected auto, cpu or a CUDA device of this machine, got {name}") from error
    return device


def _check(settings, source, world):
    if settings.batch < 2 * world:
        raise UsageError(f"--batch: expected at least 2 pictures for each of {world} processes, got {settings.batch}")
    if len(source.train) < settings.batch:
        raise UsageError(f"{settings.data}: expected at least --batch {settings.batch} training pictures, "
                         f"got {len(source.train)}")
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


def run(settings):
    """Train, probe and report; returns what happened, on rank 0, as a dict: probes, seconds, report's path."""
    device = _device(settings.device)
    if device.type == "cpu":
        # Workers and compute threads share the cores: more threads than cores wait for each other in a spin.
        torch.set_num_threads(max(1, torch.get_num_threads() - settings.workers))
    distributed = dist.is_torchelastic_launched()
    if distributed:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Beside NCCL a backend for the CPU: the losses' settings travel there, so that no step waits for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        return _run(settings, device, rank, world)
    finally:
        if distributed:
            dist.destroy_process_group()


def _run(settings, device, rank, world):
    source = data.open_data(settings.data, settings.image_size, settings.strength)
    _check(settings, source, world)
    folder = _output_folder(settings.out)
    settings.steps = settings.steps or settings.epochs * (len(source.train) // settings.batch)
    settings.image_size = source.image_size
    torch.manual_seed(settings.seed)
    torch.backends.cudnn.deterministic = True  # the same seed gives the same run
    encoder = model.build_encoder(settings.arch, source.channels, source.image_size, settings.width)
    head = model.projection_head(encoder.num_features, settings.head_layers, settings.head_out)
    network = model.SimCLR(encoder, head)
    if world > 1 and device.type == "cuda":  # PyTorch has no synchronised batch norm on the CPU
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network = network.to(device, memory_format=torch.channels_last)
    lr = optim.scaled_lr(settings.lr, settings.batch, settings.lr_scaling)
    optimizer = optim.build_optimizer(settings.optimizer, network, lr, settings.weight_decay)
    criterion = losses.build(settings)
    done, records = 0, ()
    parts = {"network": network, "optimizer": optimizer}
    if settings.resume:
        done, records = checkpoint.load(folder, settings, parts, device, rank, world)
    log = Log(folder / "log.jsonl", rank == 0, records)
    if not done:
        log.write("settings", **vars(settings), loss_settings=losses.describe(settings))

    def keep(step):
        checkpoint.save(folder, step, settings, parts, log, rank, world)

    trainer = Trainer(settings, source, network, criterion, optimizer, lr, log, device, rank, world, done, keep)
    started = time.perf_counter()
    trainer.run()
    facts = dict(seconds=time.perf_counter() - started, device=_device_name(device), processes=world,
                 parameters=sum(p.numel() for p in encoder.parameters()), torch=torch.__version__)
    log.write("end", **facts)
    log.close()
    if rank != 0:
        return None
    _save(network, folder / "model.pt")
    return dict(probes=log.of("probe"), seconds=facts["seconds"], report=write_report(folder, trainer, facts))


def _device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"


def _save(network, path):
    """Written beside and renamed, so that a run that is stopped leaves no half of a file."""
    temporary = path.with_suffix(".tmp")
    torch.save(network.state_dict(), temporary)
    os.replace(temporary, path)


def main(arguments=None, prog="simclr_imagenet.py"):
    """Exit code: 0, 1 where training failed, 2 for settings or data that the person can put right."""
    try:
        outcome = run(parse(arguments, prog))
    except (UsageError, NonFiniteLoss) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    if outcome:
        print_outcome(outcome)
    return 0


def print_outcome(outcome):
    if outcome["probes"]:
        before, after = outcome["probes"][0], outcome["probes"][-1]
        print(f"linear probe {after['linear']:.1%} (untrained {before['linear']:.1%}), "
              f"kNN {after['knn']:.1%} (untrained {before['knn']:.1%})")
    print(f"report: {outcome['report']}")
