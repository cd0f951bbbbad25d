"""How good are the frozen features of a trained encoder?

    python examples/evaluate.py results/demo/checkpoints/best.ckpt digits
    python examples/evaluate.py results/demo/encoder.safetensors digits --solver both --json scores.json

A linear classifier and a vote of nearest neighbours learn from the training pictures' features, and are judged by those
of the test pictures.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from simclr import batches, checkpoint, data, probe
from simclr.cli import find_device
from simclr.errors import UsageError
from simclr.settings import ANY_COUNT, COUNT, Parser, usual_workers

SOLVERS = tuple(probe.SOLVERS)
ENCODER = "network.encoder."  # how names of the encoder's weights begin among those of a training method


def parse(arguments, prog):
    parser = Parser(prog=prog, description="Probe the frozen features of a trained encoder. Exit code: 0, or 2 for "
                    "what has to be put right.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="of the trainer, *.ckpt, or an encoder "
                        "that it exported, *.safetensors")
    parser.add_argument("data", metavar="DATA", help="as the trainer takes it: a folder of pictures, or `digits`")
    parser.add_argument("--solver", choices=(*SOLVERS, "both"), default=SOLVERS[0], help="of the linear probe; lbfgs "
                        "finds the minimum, sgd goes as far as in MoCo's paper (%(default)s)")
    parser.add_argument("--k", type=COUNT, default=20, help="neighbours that vote (%(default)s)")
    parser.add_argument("--batch", type=COUNT, default=256, help="pictures at a time (%(default)s)")
    parser.add_argument("--workers", type=ANY_COUNT, default=usual_workers(),
                        help="processes that read pictures (%(default)s)")
    parser.add_argument("--device", default="auto", help="cuda, cuda:N or cpu (cuda where there is one)")
    parser.add_argument("--json", metavar="PATH", type=Path, help="write the scores to this file as well")
    return parser.parse_args(arguments)


def load(path):
    """(encoder, channels, image_size) of either kind of file."""
    if path.suffix == ".safetensors":
        encoder = checkpoint.load_encoder(path)
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
        return encoder, int(facts["channels"]), int(facts["image_size"])
    contents = checkpoint.read(path)
    settings, trained = contents["settings"], contents["modules"]["method"]
    weights = {name.removeprefix(ENCODER): weight for name, weight in trained.items() if name.startswith(ENCODER)}
    try:
        encoder = checkpoint.rebuild_encoder(settings, weights)
    except RuntimeError:
        raise UsageError(f"{path}: expected the weights of a {settings['arch']}, got others") from None
    return encoder, settings["channels"], settings["image_size"]


def open_source(settings, channels, image_size):
    """The data, if the encoder takes such pictures and there is something to tell apart."""
    source = data.open_data(settings.data, image_size)
    if source.channels != channels:
        raise UsageError(f"{settings.data}: expected pictures of {channels} channel{'s' if channels > 1 else ''}, as "
                         f"{settings.checkpoint} was trained on, got {source.channels}")
    for split, pictures in (("training", source.train), ("test", source.test)):
        found = len(pictures.labels.unique())
        if found < 2:
            raise UsageError(f"{settings.data}: expected at least two classes in the {split} split, got {found}")
    return source


def extract(encoder, source, settings, device):
    """Features of both splits."""
    parts = []
    for pictures in (source.train, source.test):
        loader = batches.plain_loader(pictures, source.plain, settings.batch, settings.workers)
        parts += probe.extract(encoder, loader, pictures.labels, device)
    features = probe.Features(*parts)
    if not (features.train.isfinite().all() and features.test.isfinite().all()):
        raise UsageError(f"{settings.checkpoint}: expected an encoder with finite features, got infinity or NaN")
    return features


def evaluate(settings):
    """{probe: Scores}, and what was read."""
    device = find_device(settings.device)
    if settings.json and not settings.json.parent.is_dir():  # before the work, not after it
        raise UsageError(f"--json: expected a file in a folder that is there, got {settings.json}")
    encoder, channels, image_size = load(settings.checkpoint)
    source = open_source(settings, channels, image_size)
    features = extract(encoder.to(device, memory_format=torch.channels_last), source, settings, device)
    solvers = SOLVERS if settings.solver == "both" else (settings.solver,)
    found = {f"linear, {solver}": probe.linear_probe(features, solver) for solver in solvers}
    found[f"kNN, k = {settings.k}"] = probe.knn_probe(features, settings.k)
    read = dict(train=len(features.train), test=len(features.test))
    return found, dict(read, unreadable=len(source.train) + len(source.test) - sum(read.values()))


def table(found):
    rows = [("probe", "top-1", "top-5"), *((name, f"{s.top1:.1%}", f"{s.top5:.1%}") for name, s in found.items())]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"| {name:<{width}} | {top1:>6} | {top5:>6} |" for name, top1, top5 in rows]
    return "\n".join([lines[0], f"| {'-' * width} | -----: | -----: |", *lines[1:]])


def main(arguments=None, prog="evaluate.py"):
    try:
        settings = parse(arguments, prog)
        found, read = evaluate(settings)
        print(table(found))
        if read["unreadable"]:
            print(f"left out what could not be read: {read['unreadable']:,} of the pictures", file=sys.stderr)
        if settings.json:
            scores = {name: vars(score) for name, score in found.items()}
            contents = dict(checkpoint=str(settings.checkpoint), data=settings.data, **read, probes=scores)
            settings.json.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    except UsageError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{prog}: {error.filename}: expected a file that can be written, got {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
