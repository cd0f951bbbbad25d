"""Does DistributedDataParallel give the gradient that one process would compute? A table, for every loss and library.

    torchrun --nproc-per-node 4 examples/ddp_check.py
    torchrun --nproc-per-node 4 examples/ddp_check.py --uneven --losses nt_xent clip_loss
    torchrun --nproc-per-node 4 examples/ddp_check.py --json ddp_check.json > ddp_check.md

An encoder and the numbers that a loss learns (temperature, scale, bias) go one step forward and back, in float64, on
a batch whose rows are shared out over the processes: gloo on CPUs, NCCL on GPUs. It is compared with the same step of
one process on the whole batch: for a loss of fastcl in plain PyTorch (`fastcl.reference`), for one of another library
by that library. The table has the value over the single-process value, smallest and largest if ranks differ; and of
each gradient the projection on the single-process gradient, as a multiple of that, with the relative distance of both
in brackets. "right" is a distance below 1e-5 of all gradients; for fastcl's losses the value has to be right too, on
every rank. Other libraries run with as many rows on every rank only.

Exit status: 0, 1 if a loss of fastcl is wrong, 2 for bad arguments.
"""

import argparse
import datetime
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

import ddp_cases
from ddp_cases import BIAS, SCALE, TEMPERATURE, WIDTH

LIMIT = 1e-5  # float64 rounds to about 1e-15: what is right is far below, what is wrong far above
FEATURES = 12
ROWS, UNEVEN_ROWS = 6, (6, 1, 9, 0)  # of rank 0, 1, ...; from the fifth rank on they repeat
COLLECTIVE_SECONDS = 30  # what a rank waits for the others before the case has failed
COLUMNS = ("library", "loss", "with", "value", "encoder", "temperature or scale", "bias", "verdict")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, and of one process."""
        self.exit(2, "" if int(os.environ.get("RANK", "0")) else f"{self.prog}: {message}\n")


class Model(nn.Module):
    """An encoder, the numbers that the loss learns, and the loss: what people wrap in DistributedDataParallel."""

    def __init__(self, loss, numbers):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 20), nn.Tanh(), nn.Linear(20, WIDTH))
        self.numbers = nn.ParameterDict({name: torch.tensor(value) for name, value in numbers.items()})
        self.loss = loss

    def forward(self, x, ids, labels):
        return self.loss([self.encoder(view) for view in x], ids, labels, **self.numbers)

    def gradients(self):
        encoder = torch.cat([weight.grad.flatten() for weight in self.encoder.parameters()])
        return {"encoder": encoder} | {name: number.grad.flatten() for name, number in self.numbers.items()}


def split_batch(uneven, rank, world, device):
    """(the global batch, this rank's part): three views, the number of each row, and labels that each come twice, half
    a batch apart."""
    counts = [UNEVEN_ROWS[place % len(UNEVEN_ROWS)] if uneven else ROWS for place in range(world)]
    total, first = sum(counts), sum(counts[:rank])
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, total, FEATURES, generator=generator, dtype=torch.float64).to(device)
    ids = torch.arange(total, device=device)
    mine = slice(first, first + counts[rank])
    labels = ids % (total // 2)
    return (x, ids, labels), (x[:, mine], ids[mine], labels[mine])


def step(model, rows):
    value = model(*rows)
    value.backward()
    return value.item()


def over_ranks(case, rows, device, expected, exact):
    """What this rank finds of a step under DistributedDataParallel, beside that of one process."""
    model = Model(case.together, case.numbers).to(device, torch.float64)
    value = step(nn.parallel.DistributedDataParallel(model), rows)
    gradients = {}
    for name, gradient in model.gradients().items():
        wanted = exact[name]
        ratio, distance = gradient @ wanted / (wanted @ wanted), (gradient - wanted).norm() / wanted.norm()
        gradients[name] = [ratio.item(), distance.item()]
    return {"value": value / expected, "gradients": gradients}


def verdict(case, found):
    """Of what all ranks found. A NaN is no distance below the limit: wrong."""
    errors = [rank for rank in found if "error" in rank]
    if errors:
        # The others' only say that they waited.
        return f"failed: {min(errors, key=lambda rank: rank['at'])['error']}"
    right = all(distance < LIMIT for rank in found for _, distance in rank["gradients"].values())
    if case.ours:
        right = right and all(abs(rank["value"] - 1) < LIMIT for rank in found)
    return "right" if right else "wrong"


def run_case(case, place, batches, device, store):
    """One line of the table. Each has a process group of its own: what breaks leaves nothing behind for the next."""
    store, rank, world = store
    whole, mine = batches
    # Before there is a process group, so that no loss can see one.
    alone = Model(case.alone, case.numbers).to(device, torch.float64)
    expected = step(alone, whole)
    timeout = datetime.timedelta(seconds=COLLECTIVE_SECONDS)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    group_store = dist.PrefixStore(f"group{place}", store)
    dist.init_process_group(backend, store=group_store, rank=rank, world_size=world, timeout=timeout)
    try:
        try:
            found = over_ranks(case, mine, device, expected, alone.gradients())
        except Exception as error:  # of any library: this line fails, the others go on
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            found = {"error": message[:120].replace("|", "/"), "at": time.time()}
        # Not over the process group, which may be broken. No rank leaves it before all are done with it.
        store.set(f"found{place}/{rank}", json.dumps(found))
        keys = [f"found{place}/{other}" for other in range(world)]
        store.wait(keys, 4 * timeout)
        found = [json.loads(store.get(key)) for key in keys]
    finally:
        dist.destroy_process_group()
    line = {"library": case.library, "loss": case.name, "with": case.options, "ranks": found}
    return line | {"ours": case.ours, "verdict": verdict(case, found)}


def run_cases(cases, batches, device, store):
    lines = []
    for place, case in enumerate(cases, 1):
        started = time.perf_counter()
        lines.append(run_case(case, place, batches, device, store))
        if store[1] == 0:
            text, seconds = lines[-1]["verdict"], time.perf_counter() - started
            title = " ".join(filter(None, (case.library, case.name, case.options)))
            print(f"[{place}/{len(cases)}] {title}: {text} ({seconds:.1f} s)", file=sys.stderr, flush=True)
    return lines


def cells(line):
    """Of a line, in the order of the columns. Of the ranks' distances the largest."""
    found = [rank for rank in line["ranks"] if "error" not in rank]
    value, gradients = "-", []
    if found:
        low, high = (f"{end(rank['value'] for rank in found):.3f}" for end in (min, max))
        value = low if low == high else f"{low}..{high}"
    for names in (("encoder",), (*TEMPERATURE, *SCALE), BIAS):
        pairs = [rank["gradients"][name] for rank in found for name in names if name in rank["gradients"]]
        ratio, distance = max(pairs, key=lambda pair: pair[1], default=(None, None))
        gradients.append(f"{ratio:.3f} ({distance:.2g})" if pairs else "-")
    return [line["library"], line["loss"], line["with"] or "-", value, *gradients, line["verdict"]]


def markdown(lines):
    rows = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parse(arguments):
    parser = Parser(prog="ddp_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ddp_cases.names()
    parser.add_argument("--losses", nargs="+", choices=names, default=names, metavar="NAME",
                        help=f"these alone, of {', '.join(names)}")
    parser.add_argument("--uneven", action="store_true", help="as many rows on each rank as come, and none on some")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="cuda where there is a GPU for each process (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what every rank found here")
    settings = parser.parse_args(arguments)
    if settings.json and not settings.json.parent.is_dir():
        parser.error(f"argument --json: expected a file in a folder that exists, got {settings.json}")
    enough = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if settings.device == "cuda" and not enough:
        parser.error(f"argument --device: expected a GPU for each process, got {torch.cuda.device_count()} GPUs")
    settings.gpu = settings.device != "cpu" and enough
    return settings


def main(arguments=None):
    settings = parse(arguments)
    warnings.filterwarnings("ignore")  # other libraries', on every rank
    # Small matrices: threads of several processes only get in each other's way.
    torch.set_num_threads(1)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if settings.gpu else torch.device("cpu")
    if settings.gpu:
        torch.cuda.set_device(device)
    # One process where nobody has started more.
    store = next(rendezvous("env://")) if dist.is_torchelastic_launched() else (dist.HashStore(), 0, 1)
    _, rank, world = store
    cases, absent = ddp_cases.choose(settings.losses, settings.gpu, settings.uneven and world > 1)
    lines = run_cases(cases, split_batch(settings.uneven, rank, world, device), device, store) + absent
    if rank == 0:
        print(markdown(lines), flush=True)
        if settings.json:
            facts = {"processes": world, "uneven": settings.uneven, "device": device.type, "torch": torch.__version__}
            body = ",\n".join(map(json.dumps, lines))
            settings.json.write_text(f'{json.dumps(facts)[:-1]}, "lines": [\n{body}\n]}}\n')
    wrong = [line for line in lines if line["ours"] and line["verdict"] != "right"]
    if rank == 0:
        for line in wrong:
            print(f"ddp_check.py: {line['loss']} {line['with']}: {line['verdict']}", file=sys.stderr)
    # The first rank has the store: it leaves last.
    store[0].set(f"left/{rank}", "")
    if rank == 0:
        store[0].wait([f"left/{other}" for other in range(world)], datetime.timedelta(seconds=COLLECTIVE_SECONDS))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
