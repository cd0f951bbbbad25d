"""Kill a run of the trainer again and again, and compare what it comes to with a run that nobody disturbed.

    python tests/kill_check.py --steps 400 --kills 10

The run trains the convolutional net on digits, on the CPU in float32, with a checkpoint every few steps, and is started
anew with --resume auto after each SIGKILL. Half of the kills come at a random moment, half while a checkpoint is being
written. One line for each: the step of the newest checkpoint, and whether half of a file was left. Exit status 1 if the
weights, the optimizer's state, or the losses in the log differ from the undisturbed run's in a single bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from simclr import checkpoint

EVERY = 5  # steps between checkpoints
POLL_SECONDS, START_SECONDS = 0.0005, 300
NAMED_BY_KILL = ("at random", "while writing")


def start(out: Path, steps: int) -> subprocess.Popen:
    """The trainer, with its output in a file that is read where it fails."""
    command = [sys.executable, str(ROOT / "examples" / "simclr_imagenet.py"), "digits", "--arch", "convnet"]
    command += ["--steps", str(steps), "--batch", "64", "--no-probe", "--checkpoint-every", str(EVERY)]
    command += ["--log-every", "1", "--workers", "0", "--device", "cpu", "--out", str(out), "--resume", "auto"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(f"{out}.output", "ab") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def said(out: Path) -> str:
    return "\n".join(Path(f"{out}.output").read_text(errors="replace").splitlines()[-5:])


def finish(out: Path, steps: int) -> None:
    if start(out, steps).wait():
        sys.exit(f"{out}: the run failed\n{said(out)}")


def newest(out: Path) -> int:
    """Step of the newest checkpoint, 0 where there is none."""
    return max((int(path.stem.removeprefix("step-")) for path in out.glob("checkpoints/step-*.ckpt")), default=0)


def half_written(out: Path) -> bool:
    return any(out.glob("checkpoints/*.tmp"))


def kill_once(out: Path, steps: int, target: int, writing: bool, delay: float) -> str:
    """Start the run, and end it by SIGKILL once a checkpoint of step `target` or later is there: after `delay` seconds,
    or when next a checkpoint is being written. Says what it left."""
    process = start(out, steps)
    try:
        deadline = time.monotonic() + START_SECONDS
        while newest(out) < target:
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{out}: the run did not get to step {target}\n{said(out)}")
            time.sleep(POLL_SECONDS)
        if writing:
            while not half_written(out) and process.poll() is None:
                pass  # the file is there for a few milliseconds
        else:
            time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        code = process.wait()
    if code != -signal.SIGKILL:
        sys.exit(f"{out}: expected a run that SIGKILL ends, got exit status {code}\n{said(out)}")
    return f"step {newest(out)}" + (", half of a file left" if half_written(out) else "")


def leaves(tree: object, name: str = "") -> dict[str, object]:
    """{path: value} of nested dicts and lists."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return {name: tree}
    return {path: leaf for key, value in items for path, leaf in leaves(value, f"{name}/{key}").items()}


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return first == second


def losses(out: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records if record["event"] == "step"]


def differences(whole: Path, killed: Path) -> list[str]:
    """What two finished runs do not agree on: states of all modules and generators, and the losses of all steps."""
    steps = newest(whole), newest(killed)
    if steps[0] != steps[1] or not steps[0]:
        return [f"newest checkpoint: step {steps[0]} and step {steps[1]}"]
    name = f"checkpoints/step-{steps[0]:08d}.ckpt"
    first, second = (checkpoint.read(out / name) for out in (whole, killed))
    first, second = ({**leaves(c["modules"], "modules"), **leaves(c["random"], "random")} for c in (first, second))
    found = sorted(first.keys() ^ second.keys())
    found += [key for key in first if key in second and not same(first[key], second[key])]
    return found + ["losses in the log"] * (losses(whole) != losses(killed))


def check(folder: Path, steps: int, kills: int, seed: int) -> list[str]:
    """Both runs; the differences."""
    draw = random.Random(seed)
    killed, whole = folder / "killed", folder / "whole"
    for number in range(kills):
        # Spread over the run; after the last one a checkpoint is still to come.
        target = 1 + int(draw.uniform(number, number + 1) / kills * (steps - 2 * EVERY))
        writing = number % 2 == 1
        left = kill_once(killed, steps, target, writing, delay=draw.uniform(0, 0.3))
        print(f"kill {number + 1} {NAMED_BY_KILL[writing]}: {left}", flush=True)
    finish(killed, steps)
    finish(whole, steps)
    return differences(whole, killed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of the run (%(default)s)")
    parser.add_argument("--kills", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastcl-kill-check-") as folder:
        found = check(Path(folder), args.steps, args.kills, args.seed)
    verdict = f"differs in {', '.join(found)}" if found else "the same to the bit"
    print(f"{args.steps} steps, killed {args.kills} times: {verdict}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
