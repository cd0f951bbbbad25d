"""Runs test cases in real processes, a process group of its own for each case.

A test module that has cases keeps them in CASES = {name: (world size, function(rank, world))}.
"""

from __future__ import annotations

import datetime
import importlib
import json
import multiprocessing
import time
import traceback

import torch
import torch.distributed as dist

# How long a collective may wait for the other ranks, and a world for all of its cases.
COLLECTIVE_SECONDS, WORLD_SECONDS = 20, 150


def _outcome(case, rank, world, name, directory):
    """What went wrong in a case on this rank, or an empty text."""
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/{name}.rendezvous",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
        )
        # A rank whose case needs no collective could leave while a slower one is still connecting to it.
        dist.barrier()
        torch.manual_seed(rank)
        case(rank, world)
        return ""
    except BaseException:
        return traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _worker(module, rank, world, names, directory):
    torch.set_num_threads(1)
    cases = importlib.import_module(module).CASES
    with open(f"{directory}/rank{rank}.jsonl", "w", encoding="utf-8") as out:
        for name in names:
            print(json.dumps([name, _outcome(cases[name][1], rank, world, name, directory)]), file=out, flush=True)


def run_world(module, world, names, directory):
    """{case: [problem of rank 0, ...]}; a rank that did not get to a case in time says so."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_worker, args=(module, rank, world, names, directory)) for rank in range(world)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + WORLD_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    outcomes = {name: ["no outcome: hung, crashed or out of time"] * world for name in names}
    for rank in range(world):
        path = directory / f"rank{rank}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            name, problem = json.loads(line)
            outcomes[name][rank] = problem
    return outcomes
