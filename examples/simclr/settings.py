"""The command line: every setting of a run, with the defaults that follow from others filled in."""

import argparse
import os

from . import losses, methods, optim
from .errors import UsageError

# Learning rate, its scaling with the batch, weight decay. LARS as SimCLR has it for ImageNet, SGD as MoCo v2.
RECIPES = {"adamw": (2e-3, "none", 1e-6), "lars": (0.075, "sqrt", 1e-6), "sgd": (0.03, "linear", 1e-4)}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """For one line instead of the usage text, which would bury it."""
        raise UsageError(message)


def between(kind, low, high):
    """An argument's type: a number of `kind` from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value

    # argparse puts the name into its message.
    parse.__name__ = f"{kind.__name__} of at least {low}" + (f" and at most {high}" if high < 2**62 else "")
    return parse


COUNT, ANY_COUNT = between(int, 1, 2**62), between(int, 0, 2**62)
NUMBER, SHARE = between(float, 1e-30, 1e30), between(float, 0, 1)


def usual_workers():
    """A core is left for each process that trains."""
    return max(1, min(8, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def cores():
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _by_objective(argument):
    found = {name: value for name, value in _defaults(argument).items() if value is not None}
    return "default: " + ", ".join(f"{value:g} for {name}" for name, value in found.items())


def _defaults(argument):
    """`{option that chooses it: default}` of the losses and methods that have `argument`."""
    found = {f"--loss {name}": loss.options for name, loss in losses.LOSSES.items()}
    found |= {f"--method {name}": method.options for name, method in methods.METHODS.items()}
    return {name: options[argument] for name, options in found.items() if argument in options}


def parser(prog):
    result = Parser(prog=prog, description="Train an encoder without labels, probe it, and write a report. Exit code: "
                    "0; 1 where training failed; 2 for settings or data to be put right; 130 after Ctrl-C.")
    result.add_argument("data", metavar="DATA", help="folder of pictures, one sub-folder per class (or train/ and val/ "
                        "like that); `digits`, the small set that comes with scikit-learn; or `synthetic`, made up, to "
                        "measure with")
    result.add_argument("--out", help="folder for what comes out; default: results/, with the names of data and method")
    _add_objective(result)
    _add_model_and_data(result)
    _add_training(result)
    group = result.add_argument_group("output")
    group.add_argument("--log-every", type=COUNT, default=10, help="steps between log lines (%(default)s)")
    group.add_argument("--eval-every", type=ANY_COUNT, default=0, help="steps between probes; 0: before and after only")
    group.add_argument("--no-probe", action="store_true", help="train without labels")
    group.add_argument("--checkpoint-every", type=ANY_COUNT, default=0,
                       help="steps between checkpoints (0: at the end)")
    group.add_argument("--quiet", action="store_true", help="no progress bar")
    group.add_argument("--keep", type=COUNT, default=3, help="checkpoints to keep, beside the best (%(default)s)")
    group.add_argument("--resume", nargs="?", const="auto", metavar="PATH",
                       help="go on from this checkpoint, or from the newest sound one in --out (without PATH, or "
                       "`auto`)")
    group.add_argument("--tensorboard", action="store_true", help="write what the log has for TensorBoard too")
    return result


def _add_objective(result):
    group = result.add_argument_group("method and loss")
    group.add_argument("--method", choices=tuple(methods.METHODS), default="simclr", help="(%(default)s) "
                       + "; ".join(f"{name}: {method.help}" for name, method in methods.METHODS.items()))
    group.add_argument("--loss", choices=tuple(losses.LOSSES), help="of simclr (nt_xent) "
                       + "; ".join(f"{name}: {loss.help}" for name, loss in losses.LOSSES.items()))
    group.add_argument("--temperature", type=NUMBER, help=_by_objective("temperature"))
    group.add_argument("--loss-weight", type=NUMBER, help="lambda, of the distribution term; "
                       + _by_objective("weight"))
    group.add_argument("--momentum", type=SHARE, help="of the moving average of the network; "
                       + _by_objective("momentum"))
    group.add_argument("--queue", type=between(int, 1, 2**28), help="keys that are kept as negatives; default: 65536, "
                       "or fewer where there are fewer pictures")
    group.add_argument("--hard-negatives", type=COUNT, help="draw so many keys of the queue for each query, the nearer "
                       "the more often (default: all keys once)")
    group.add_argument("--bank-momentum", type=between(float, 0, 0.9999), help="of a picture's row in the memory bank; "
                       + _by_objective("bank_momentum"))
    group.add_argument("--noise", type=COUNT, help="estimate instdisc's softmax from so many samples of the bank "
                       "(default: the whole of it, exact)")


def _add_model_and_data(result):
    group = result.add_argument_group("model")
    group.add_argument("--arch", help="convnet, resnet18, resnet50, vit_small or any other of timm's; default: convnet "
                       "for digits, else resnet50")
    group.add_argument("--width", type=COUNT, default=16, help="channels of the convnet's first layer (%(default)s)")
    group.add_argument("--head-layers", type=int, choices=range(5), help="0: no head; default: 3 for simclr, "
                       "2 for moco-v2 and byol, 1 for instdisc")
    group.add_argument("--head-hidden", type=COUNT, help="width inside the head; default: that of the features")
    group.add_argument("--head-out", type=COUNT, default=128, help="width of the projections (%(default)s)")
    group.add_argument("--norm", choices=("batch", "group"), default="batch", help="group: no picture depends on the "
                       "others of its batch (%(default)s)")
    group.add_argument("--bn-splits", type=COUNT, default=1, help="groups of a batch that batch norm keeps apart "
                       "(%(default)s)")
    group = result.add_argument_group("data")
    group.add_argument("--image-size", type=COUNT, help="default: the pictures' own up to 96, else 224")
    group.add_argument("--strength", type=NUMBER, default=1.0, help="of the colour jitter (%(default)s)")
    group.add_argument("--crop", type=SHARE, nargs=2, metavar=("MIN", "MAX"), help="share of a picture's area that a "
                       "view shows; default: 0.08 1, of digits 0.3 1")
    group.add_argument("--blur", action=argparse.BooleanOptionalAction, help="default: above 96 pixels only")
    group.add_argument("--augment", choices=("workers", "device"), default="workers",
                       help="where views are made (%(default)s); device: by kornia, a batch at a time")
    group.add_argument("--workers", type=ANY_COUNT, default=usual_workers(),
                       help="processes that read pictures, for each process that trains (%(default)s)")


def _add_training(result):
    group = result.add_argument_group("training")
    group.add_argument("--batch", type=COUNT, default=128, help="pictures per step, over all processes (%(default)s)")
    group.add_argument("--epochs", type=COUNT, default=100, help="(%(default)s)")
    group.add_argument("--steps", type=COUNT, help="default: as many as the epochs have")
    group.add_argument("--optimizer", choices=tuple(RECIPES), help="default: adamw for the convnet, else lars for "
                       "simclr and byol, sgd for moco-v2 and instdisc")
    group.add_argument("--lr", type=NUMBER, help="default: "
                       + ", ".join(f"{r[0]:g} for {n}" for n, r in RECIPES.items()))
    group.add_argument("--lr-scaling", choices=optim.SCALINGS, help="with the batch B: none, B / 256 or the root of B; "
                       "default: " + ", ".join(f"{r[1]} for {n}" for n, r in RECIPES.items()))
    group.add_argument("--weight-decay", type=SHARE, help="default: "
                       + ", ".join(f"{r[2]:g} for {n}" for n, r in RECIPES.items()))
    group.add_argument("--warmup", type=SHARE, default=0.1, help="share of the steps (%(default)s)")
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the network "
                       "(%(default)s); fp16 with a gradient scaler")
    group.add_argument("--grad-cache-chunks", type=COUNT, default=1, help="parts of a batch that go through the "
                       "network one after the other; the loss still sees all of it (%(default)s)")
    group.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    group.add_argument("--device", default="auto", help="cuda, cuda:N or cpu (cuda where there is one)")
    group.add_argument("--seed", type=ANY_COUNT, default=0, help="(%(default)s)")


def parse(arguments, prog):
    """The settings, with every default filled in that follows from other settings."""
    reader = parser(prog)
    settings = reader.parse_args(arguments)
    method = methods.METHODS[settings.method]
    if settings.method == "simclr":
        settings.loss = settings.loss or "nt_xent"
    elif settings.loss:
        reader.error(f"argument --loss: expected --method simclr, got --method {settings.method}")
    _fill_in(settings, reader.error)
    settings.out = settings.out or f"results/{os.path.basename(os.path.abspath(settings.data))}-{settings.method}"
    settings.arch = settings.arch or ("convnet" if settings.data == "digits" else "resnet50")
    settings.optimizer = settings.optimizer or ("adamw" if settings.arch == "convnet" else method.recipe["optimizer"])
    for name, value in zip(("lr", "lr_scaling", "weight_decay"), RECIPES[settings.optimizer]):
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    if settings.head_layers is None:
        settings.head_layers = method.recipe["head_layers"]
    if settings.bn_splits > 1 and settings.norm == "group":
        reader.error("argument --bn-splits: expected 1 with --norm group, which does without batch norm, "
                     f"got {settings.bn_splits}")
    if settings.crop and not 0 < settings.crop[0] <= settings.crop[1]:
        reader.error("argument --crop: expected MIN above 0 and up to MAX, got {:g} and {:g}".format(*settings.crop))
    return settings


def _fill_in(settings, error):
    """The options of the loss or method: defaults where the command line gave nothing."""
    chosen = f"--loss {settings.loss}" if settings.loss else f"--method {settings.method}"
    for argument, name in losses.SETTINGS.items():
        given, found = getattr(settings, name), _defaults(argument)
        if given is None:
            setattr(settings, name, found.get(chosen))
        elif chosen not in found:
            error(f"argument --{name.replace('_', '-')}: expected {' or '.join(found)}, got {chosen}")


def objective(settings):
    """(title, settings as text) of what is minimised."""
    kind = losses.LOSSES[settings.loss] if settings.loss else methods.METHODS[settings.method]
    shown = {name: value if isinstance(value, str) else f"{value:g}"
             for name, value in losses.arguments(kind, settings).items() if value is not None}
    return kind.title, ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())
