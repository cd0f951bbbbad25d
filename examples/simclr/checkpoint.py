"""Where a run can be taken up again: one file, replaced as a whole, from which the next step is the one that would have
come."""

import os

import torch
import torch.distributed as dist

from .errors import UsageError

NAME = "checkpoint.pt"
# What may differ between the two parts of a run.
FREE = {"out", "resume", "checkpoint_every", "log_every", "eval_every", "no_probe", "workers", "device"}


def fixed(settings):
    """The settings that make a run what it is."""
    return {key: value for key, value in vars(settings).items() if key not in FREE}


def save(folder, step, settings, modules, log, rank, world):
    """`modules` are {name: what has a state_dict}. Every rank takes part: each has random numbers of its own."""
    states = [_random_state()]
    if world > 1:
        states = [None] * world
        dist.all_gather_object(states, _random_state())
    if rank != 0:
        return
    contents = {"step": step, "settings": fixed(settings), "random": states, "records": log.records}
    contents |= {name: module.state_dict() for name, module in modules.items()}
    temporary = folder / (NAME + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / NAME)


def load(folder, settings, modules, device, rank, world):
    """Put the states back; (step, log records), or (0, []) where nothing was saved yet."""
    path = folder / NAME
    if not path.exists():
        return 0, []
    try:
        contents = torch.load(path, map_location=device, weights_only=True)
        saved, states = contents["settings"], contents["random"]
    except Exception as error:
        raise UsageError(f"{path}: expected a checkpoint of this trainer, got {type(error).__name__}") from error
    for key, value in fixed(settings).items():
        if saved.get(key) != value:
            name = key.replace("_", "-")
            raise UsageError(f"--resume: --{name} must be that of {path}, {saved.get(key)}, got {value}")
    if len(states) != world:
        raise UsageError(f"--resume: expected {len(states)} processes, as in {path}, got {world}")
    for name, module in modules.items():
        module.load_state_dict(contents[name])
    torch.set_rng_state(states[rank]["cpu"].cpu())
    if device.type == "cuda" and "cuda" in states[rank]:
        torch.cuda.set_rng_state(states[rank]["cuda"].cpu(), device)
    return contents["step"], contents["records"]


def _random_state():
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
