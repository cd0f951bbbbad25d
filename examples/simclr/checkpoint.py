"""Where a run can be taken up again, so that the next step is the one that would have come; and encoders to pass on.

A checkpoint is a header and what `torch.save` wrote. The header is MAGIC, the length of the rest, and its SHA-256: all
three are compared, to the bit, before anything is unpickled. PyTorch by itself takes most damaged files for good ones.
"""

import hashlib
import io
import json
import math
import os
import re
import struct
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from . import files
from .errors import RunError, UsageError
from .model import build_encoder, group_norm

MAGIC = b"fastcl checkpoint 1\n"  # with the version of the format
HEADER = struct.Struct(f">{len(MAGIC)}sQ32s")
NAME = re.compile(r"step-(\d{8,})\.ckpt")
BEST = "best.ckpt"
# What may differ between the parts of a run.
FREE = {"out", "resume", "keep", "checkpoint_every", "log_every", "eval_every", "no_probe", "workers", "device",
        "tensorboard", "quiet"}


def fixed(settings):
    """The settings that make a run what it is, as they come back from a file."""
    own = {key: value for key, value in vars(settings).items() if key not in FREE}
    return json.loads(json.dumps(own, default=str))


def _line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# Files


def _write(path, contents):
    """`contents` are those of `read`; all but tensors is written as JSON, which holds no surprises for the reader."""
    tensors = {name: contents[name] for name in ("modules", "random")}
    facts = json.dumps({name: value for name, value in contents.items() if name not in tensors})
    buffer = io.BytesIO()
    torch.save({"facts": facts, **tensors}, buffer)
    payload = buffer.getbuffer()
    files.write(path, HEADER.pack(MAGIC, len(payload), hashlib.sha256(payload).digest()), payload)


def _payload(path):
    """What `torch.save` wrote into a checkpoint, to the bit, or UsageError."""
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
            if not header.startswith(MAGIC):
                found = repr(header[: len(MAGIC)]) if header else "an empty file"
                raise UsageError(f"{path}: expected a checkpoint, which begins with {MAGIC}, got {found}")
            if len(header) < HEADER.size:
                raise UsageError(f"{path}: expected a header of {HEADER.size} bytes, got {len(header)}")
            _, length, digest = HEADER.unpack(header)
            size = os.fstat(file.fileno()).st_size
            if size != HEADER.size + length:
                raise UsageError(f"{path}: expected {HEADER.size + length} bytes, as its header says, got {size}")
            payload = file.read()
    except OSError as error:
        raise UsageError(f"{path}: expected a checkpoint, got {error.strerror}") from error
    found = hashlib.sha256(payload).digest()
    if found != digest:
        raise UsageError(f"{path}: expected contents with SHA-256 {digest.hex()}, got {found.hex()}")
    return payload


def _unpack(path, payload):
    try:
        contents = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        return {**json.loads(contents["facts"]), "modules": contents["modules"], "random": contents["random"]}
    except Exception as error:  # unpicklers raise whatever they met
        raise UsageError(f"{path}: expected a checkpoint of this trainer, got {_line(error)}") from error


def read(path):
    """The contents of a checkpoint: "step", "settings", "records", "score" (best.ckpt's, else None), "modules" (state
    dicts by name, on the CPU) and "random" (of every rank, the states of its generators). UsageError for any other
    file."""
    return _unpack(path, _payload(path))


# A run's checkpoints


def _random_state(modules):
    """Of the generators that this rank draws from: the CPU's, and that of the device its modules are on."""
    state = {"cpu": torch.get_rng_state()}
    parameters = (p for module in modules.values() if hasattr(module, "parameters") for p in module.parameters())
    device = next(parameters, state["cpu"]).device
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class Checkpoints:
    """Those of one run, in one folder. Every rank calls every method; rank 0 alone touches files, and what it could not
    do is raised on all ranks."""

    def __init__(self, folder, settings, keep, rank=0, world=1):
        if keep < 1:
            raise ValueError(f"Checkpoints: keep: expected at least 1, got {keep}")
        self.folder, self.settings, self.keep, self.rank, self.world = Path(folder), settings, keep, rank, world
        self.newest, self.best = None, -math.inf  # path of the last one written or loaded; on rank 0, the best score

    def save(self, step, modules, records):
        """`modules` are {name: what has a state_dict}, `records` the log so far."""
        own = _random_state(modules)
        states = [own] * self.world
        if self.world > 1:
            dist.all_gather_object(states, own)

        def work():
            self._remove_leftovers()
            path = self._path(step)
            parts = {name: module.state_dict() for name, module in modules.items()}
            _write(path, dict(step=step, settings=fixed(self.settings), records=records, score=None, modules=parts,
                              random=states))
            # Those of later steps, which an earlier attempt left, are not this one's to remove.
            older = [file for saved, file in self._saved() if saved < step]
            for file in older[self.keep - 1 :]:
                file.unlink(missing_ok=True)
            return path

        self.newest = self._by_first_rank(work)

    def save_best(self, step, score):
        """After `save(step, ...)`: best.ckpt becomes a copy of it, with the score, where none had a higher one. The
        score is rank 0's."""

        def work():
            if score > self.best:
                # The score is in the file itself: killed between two files, a run would find another one's score.
                _write(self.folder / BEST, read(self._path(step)) | {"score": float(score)})
                self.best = score

        self._by_first_rank(work)

    def load(self, which, modules, device):
        """Put the states back; (step, log records), or (0, []) where there is nothing to go on from.

        `which` is a path; or "auto", the newest that is whole; or None for a run from its start, which is refused in a
        folder that holds checkpoints.
        """
        found = self._by_first_rank(lambda: self._choose(which))
        if found is None:
            return 0, []
        path, payload = found  # the bytes are rank 0's, so that all go on from the same file
        contents = _unpack(path, payload)
        self._check(path, contents)
        for name, module in modules.items():
            try:
                module.load_state_dict(contents["modules"][name])
            except Exception as error:
                raise UsageError(f"{path}: expected the state of this run's {name}, got {_line(error)}") from error
        _set_random_state(contents["random"][self.rank], device)
        self.newest = path
        return contents["step"], contents["records"]

    def _path(self, step):
        return self.folder / f"step-{step:08d}.ckpt"

    def _saved(self):
        """(step, path), newest first."""
        matches = ((NAME.fullmatch(path.name), path) for path in self.folder.glob("step-*.ckpt"))
        return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)

    def _remove_leftovers(self):
        """What a run that was killed while it wrote left behind."""
        for path in self.folder.glob("*.ckpt.tmp"):
            path.unlink(missing_ok=True)

    def _choose(self, which):
        """(path, payload) of the checkpoint to go on from, or None."""
        self._remove_leftovers()
        saved, best = self._saved(), self.folder / BEST
        if which is None:
            found = [path.name for _, path in saved] + [BEST] * best.exists()
            if found:
                raise UsageError(f"{self.folder}: expected no checkpoints where a run begins anew (another --out, or "
                                 f"--resume), got {found[0]}")
            return None
        self.best = self._score(best)
        if which != "auto":
            return Path(which), _payload(which)
        for _, path in saved:
            try:
                return path, _payload(path)
            except UsageError as error:
                print(f"{error}; trying the one before", file=sys.stderr)
        if saved:
            raise UsageError(f"{self.folder}: expected a checkpoint that is whole, got {len(saved)} damaged")
        return None

    def _score(self, best):
        """That of best.ckpt, if there is one."""
        if not best.exists():
            return -math.inf
        try:
            contents = read(best)
        except UsageError as error:
            print(f"{error}; the next one takes its place", file=sys.stderr)
            return -math.inf
        self._check(best, contents)
        return -math.inf if contents["score"] is None else contents["score"]

    def _check(self, path, contents):
        """That they are of this run."""
        saved, own = contents["settings"], fixed(self.settings)
        for key in {**own, **saved}:
            expected, got = saved.get(key), own.get(key)
            if expected != got:
                raise UsageError(f"--{key.replace('_', '-')}: expected {expected}, as in {path}, got {got}")
        if len(contents["random"]) != self.world:
            raise UsageError(f"--resume: expected {len(contents['random'])} processes, as in {path}, got {self.world}")

    def _by_first_rank(self, work):
        """What `work()` gives on rank 0, on every rank; what it raises there is raised on every rank."""
        result = failure = None
        if self.rank == 0:
            try:
                result = work()
            except OSError as error:
                failure = RunError(f"{error.filename}: expected a file that can be changed, got {error.strerror}")
            except Exception as error:
                failure = error
        if self.world > 1:
            # Others have nothing to do with a mistake in the program but to stop.
            ours = failure is None or isinstance(failure, (UsageError, RunError))
            outcome = [result, failure if ours else RunError(f"rank 0: {_line(failure)}")]
            dist.broadcast_object_list(outcome)
            result, failure = outcome[0], failure or outcome[1]
        if failure is not None:
            raise failure
        return result


# Encoders


def export_encoder(path, encoder, facts):
    """The encoder's weights as safetensors, with `facts` (arch, channels, image_size, width, norm) as metadata."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    files.write(Path(path), save(tensors, {"format": "pt", **{name: str(value) for name, value in facts.items()}}))


def rebuild_encoder(facts, weights):
    """The encoder that `facts` (those of `export_encoder`, or a run's settings) tell of, with these weights."""
    sizes = (int(facts[name]) for name in ("channels", "image_size", "width"))
    encoder = build_encoder(facts["arch"], *sizes)
    if facts.get("norm") == "group":
        encoder = group_norm(encoder)
    encoder.load_state_dict(weights)
    return encoder


def load_encoder(path):
    """The encoder of a file by `export_encoder`, on the CPU, ready to give features."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return rebuild_encoder(facts, tensors).eval()
    except Exception as error:
        raise UsageError(f"{path}: expected an encoder that this trainer exported, got {_line(error)}") from error
