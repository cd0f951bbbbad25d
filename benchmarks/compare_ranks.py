"""The losses over ranks on one machine: time of a step, and the share of it that exchanges take, over gloo.

    python benchmarks/compare_ranks.py
    python benchmarks/compare_ranks.py --worlds 1 2 4 --pairs 2048 --d 128 --json ranks.json

The global batch is the same for all numbers of ranks W: each works on pairs / W of it, on one thread. Many ranks form
more products in all than one process, 3 for 2.5 of nt_xent and 5 for 4 of CLIP. "exchanges" is the time within
collectives and hand-overs, waiting for the slowest rank included; of the ring what its work does not hide. Medians over
steps of rank 0, with quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks import reporting
from fastcl import clip_loss, distributed, nt_xent

LOSSES = {"nt_xent": nt_xent, "clip_loss": functools.partial(clip_loss, logit_scale=10.0, normalize=True)}
EXCHANGES = ("gather", "ring")


class Exchanges:
    """Stands in for `distributed.exchanging` and adds up the time within."""

    def __init__(self):
        self.seconds = 0.0

    @contextlib.contextmanager
    def __call__(self, name: str, what: str):
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


def measure(loss: str, exchange: str, pairs: int, d: int, steps: int) -> dict:
    """Times of a step and of its exchanges, in ms, on this rank."""
    clock = distributed.exchanging = Exchanges()
    generator = torch.Generator().manual_seed(dist.get_rank())
    views = [torch.randn(pairs // dist.get_world_size(), d, generator=generator).requires_grad_() for _ in range(2)]
    found = []
    for step in range(steps + 1):
        dist.barrier()
        clock.seconds, start = 0.0, time.perf_counter()
        value = LOSSES[loss](*views, exchange=exchange)
        torch.autograd.grad(value, views)
        if step:  # the first one warms up
            found.append((time.perf_counter() - start, clock.seconds))
    totals, inside = zip(*found, strict=True)
    return {"ms": summary(totals), "exchange_ms": summary(inside)}


def summary(seconds: tuple[float, ...]) -> dict[str, float]:
    low, median, high = statistics.quantiles([1e3 * x for x in seconds], n=4)
    return {"low": low, "median": median, "high": high}


def _worker(rank: int, world: int, args: argparse.Namespace, folder: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    rows = []
    for loss in LOSSES:
        for exchange in EXCHANGES[: 1 if world == 1 else None]:
            found = measure(loss, exchange, args.pairs, args.d, args.steps)
            rows.append({"loss": loss, "w": world, "exchange": exchange, "pairs": args.pairs, "d": args.d, **found})
    if rank == 0:
        results.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def run_world(world: int, args: argparse.Namespace) -> list[dict]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_worker, args=(rank, world, args, folder, results)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            return results.get(timeout=args.seconds)
        finally:
            for process in processes:
                process.join(10)
                process.kill()


def markdown(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        share = row["exchange_ms"]["median"] / row["ms"]["median"]
        exchange = "-" if row["w"] == 1 else row["exchange"]
        lines.append([
            row["loss"], f"{row['pairs']:,}", row["d"], row["w"], exchange,
            reporting.spread(row["ms"]), reporting.spread(row["exchange_ms"]), f"{share:.0%}",
        ])  # fmt: skip
    return reporting.table(["loss", "pairs in all", "D", "W", "exchange", "step ms", "exchanges ms", "share"], lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2], help="numbers of ranks")
    parser.add_argument("--pairs", type=int, default=4096, help="of all ranks together")
    parser.add_argument("--d", type=int, default=128, help="features")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=300.0, help="most that one number of ranks may take")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    if min(args.worlds) < 1 or min(args.pairs // max(args.worlds), args.d) < 1 or args.steps < 2:
        parser.error("--worlds, --pairs for every rank and --d must be positive, --steps at least 2")
    if any(args.pairs % world for world in args.worlds):
        parser.error(f"--pairs must be a multiple of --worlds, got {args.pairs} and {args.worlds}")
    rows = [row for world in args.worlds for row in run_world(world, args)]
    print(markdown(rows))
    if args.json:
        reporting.write_json(args.json, {"versions": reporting.versions(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
