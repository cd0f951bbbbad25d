"""What the loss costs a training step: the trainer of examples/ with ours and with an eager loss, in turns.

    python benchmarks/trainer.py
    python benchmarks/trainer.py --arch resnet50 --image-size 224 --batch 256 --precision bf16 --folder results

Both sides start from the same weights and see the same made-up pictures, which lie on the device: no time goes into
reading. On a GPU the largest batch that fits is looked for too, the network's activations cached in chunks on both
sides, so that it is the loss that decides. Writes trainer.json and trainer.md where --folder is given.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "examples"))

import torch
from simclr import methods, optim
from simclr.batches import Batch
from simclr.cli import DTYPES
from simclr.data import Source
from simclr.settings import parse
from simclr.train import Trainer

from benchmarks import eager, reporting, timing

SIDES = ("fastcl", "eager")
PARTS = ("encoder", "loss", "optimizer")
# Network, side of the pictures, batch, chunks, precision. On a GPU SimCLR's own size; on a CPU what takes seconds.
GPU_CASES = [("resnet50", 224, 256, 1, "bf16"), ("resnet18", 32, 4096, 4, "bf16"), ("resnet18", 32, 16384, 16, "bf16")]
CPU_CASES = [("convnet", 32, 128, 1, "fp32"), ("convnet", 32, 1024, 1, "fp32"), ("convnet", 32, 4096, 8, "fp32")]
LARGEST = 1 << 18  # pictures: further than this the search does not go
CHUNK = 1024


class Eager(torch.nn.Module):
    """NT-Xent as one writes it, with its matrix."""

    def forward(self, z1, z2):
        return eager.nt_xent(z1, z2, 0.2)


def trainer(case: tuple, side: str, device: torch.device) -> Trainer:
    arch, size, batch, chunks, precision = case
    settings = parse(["synthetic", "--arch", arch, "--batch", str(batch), "--grad-cache-chunks", str(chunks),
                      "--optimizer", "sgd", "--precision", precision, "--steps", "1000", "--no-probe"], "trainer.py")
    source = Source(range(batch), None, [], 3, size, None, None)
    torch.manual_seed(0)
    method = methods.build(settings, source, DTYPES[precision])
    if side == "eager":
        method.criterion = Eager()
    method = method.to(device, memory_format=torch.channels_last).train()
    optimizer = optim.build_optimizer("sgd", method.network, 0.03, 1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    return Trainer(settings, source, method, optimizer, scaler, 0.03, None, None, device)


def pictures(case: tuple, device: torch.device) -> Batch:
    _, size, batch, *_ = case
    views = [torch.rand(batch, 3, size, size, device=device).to(memory_format=torch.channels_last) for _ in range(2)]
    return Batch(views, torch.arange(batch), [])


def measure(case: tuple, device: torch.device, seconds: float) -> dict:
    """Milliseconds of every part of a step, of both sides, a step of each at a time."""
    sides, batch = {side: trainer(case, side, device) for side in SIDES}, pictures(case, device)
    found: dict = {side: {part: [] for part in (*PARTS, "step")} for side in SIDES}
    losses: dict = {side: [] for side in SIDES}
    step = 0

    def run(side: str) -> None:
        worker = sides[side]
        worker.clock.lap(None)
        losses[side].append(worker._step(step + 1, batch)[0])
        read = worker.clock.read()
        for part in PARTS:
            found[side][part].append(read[part] * 1e3)
        found[side]["step"].append(sum(read[part] for part in PARTS) * 1e3)

    def turn() -> None:
        nonlocal step
        for side in SIDES[:: 1 if step % 2 == 0 else -1]:
            run(side)
        step += 1

    turn()
    first = {side: values[0].item() for side, values in losses.items()}
    for side in SIDES:
        found[side] = {part: [] for part in found[side]}
    timing.synchronize(device)
    end = time.perf_counter() + seconds
    while step < 4 or time.perf_counter() < end:
        turn()
    ratio = timing.ratio(found["eager"]["step"], found["fastcl"]["step"])
    arch, size, batch_size, chunks, precision = case
    return {"arch": arch, "image_size": size, "batch": batch_size, "chunks": chunks, "precision": precision,
            "first_loss": first, "speedup": ratio,
            "ms": {side: {part: timing.summary(values) for part, values in parts.items()}
                   for side, parts in found.items()}}  # fmt: skip


def fits(side: str, batch: int, device: torch.device) -> bool:
    case = ("resnet18", 32, batch, max(1, batch // CHUNK), "bf16")
    try:
        trainer(case, side, device)._step(1, pictures(case, device))
        timing.synchronize(device)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()


def largest(device: torch.device) -> dict:
    """The largest power of two that one step takes, for each side."""
    found = {}
    for side in SIDES:
        batch = CHUNK
        while batch < LARGEST and fits(side, 2 * batch, device):
            batch *= 2
        found[side] = batch
    return found


def markdown(results: dict) -> str:
    head = ["network", "pictures", "batch", "chunks", "precision"]
    for side in ("", "eager "):
        head += [f"{side}images/s", f"{side}loss ms", f"{side}loss of the step"]
    rows = []
    for row in results["cases"]:
        cells = [row["arch"], f"{row['image_size']} px", f"{row['batch']:,}", row["chunks"], row["precision"]]
        for side in SIDES:
            ms = {part: value["median"] for part, value in row["ms"][side].items()}
            cells += [f"{row['batch'] / ms['step'] * 1e3:,.0f}", f"{ms['loss']:.3g}", f"{ms['loss'] / ms['step']:.1%}"]
        rows.append([*cells, reporting.spread(row["speedup"], "×")])
    text = reporting.table([*head, "step, eager over ours"], rows) + "\n"
    if results.get("largest"):
        found = {side: f"{batch:,}" + (" or more" if batch == LARGEST else "")
                 for side, batch in results["largest"].items()}
        text += (f"\nLargest batch that fits, ResNet-18 on pictures of 32 px in chunks of {CHUNK:,}: "
                 f"{found['fastcl']} with ours, {found['eager']} with the eager loss.\n")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each case")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = GPU_CASES if device.type == "cuda" else CPU_CASES
    if args.arch:
        cases = [(args.arch, args.image_size, args.batch, args.chunks, args.precision)]
    results: dict = {"versions": reporting.versions(), "device": str(device), "cases": []}

    def keep() -> None:
        """After every part: what was measured survives what comes next."""
        if args.folder:
            args.folder.mkdir(parents=True, exist_ok=True)
            reporting.write_json(args.folder / "trainer.json", results)
            (args.folder / "trainer.md").write_text(markdown(results))

    for case in cases:
        print("measuring", *case, flush=True)
        results["cases"].append(measure(case, device, args.seconds))
        keep()
    if device.type == "cuda" and not args.arch:
        results["largest"] = largest(device)
        keep()
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
