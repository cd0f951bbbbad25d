"""Sweep of the launch table on the GPU at hand.

    python benchmarks/tune.py
    python benchmarks/tune.py --only lse_backward --seconds 60

Times candidate tiles for every pass and width class of `fastcl/kernels/launch.py`, prints the time of the present
entry beside the best one, and the table with the best entries for this GPU's generation in the syntax of that
file. Entries of other generations stay. Before pasting, `make test-aot` says whether the new entries spill.

Compiling takes far longer than timing, so worker processes compile and launch every candidate once on few rows:
they fill Triton's cache on disk, and a candidate that breaks its process breaks only a worker.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import reporting, timing
from fastcl.kernels import launch
from fastcl.kernels.launch import Tile

# What one process with a usual temperature runs; the other passes are swept after these.
COMMON = ("lse_symmetric", "lse_backward", "lse_weight")
# Blocks below 64 rows for float32 alone: its three-product tiles fill the registers sooner.
BLOCKS = {2: (64, 128), 4: (32, 64, 128)}
CHUNKS = {2: (64,), 4: (16, 32)}
WARPS = (4, 8)
STAGES = (2, 3, 4)
# fp32 accumulators a thread: more of them spill, since a thread has 255 registers for everything. Float32 operands
# are split into three products, whose parts need registers too.
MOST_ACCUMULATORS = {2: 160, 4: 64}
# Tiles tried for an entry, those nearest to the present one first: each costs seconds of compilation.
MOST_TILES = 12
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Rows to time at, and the width that stands for all that are read in chunks.
ROWS = {2: 16384, 4: 8192}
CHUNKED_WIDTH = {2: 768, 4: 128}
WARM_ROWS = 256
# A candidate replaces the present entry if it is faster by more than this: less is noise.
GAIN = 0.02
# 1 / temperature of the usual passes, and one so large that the passes with the online maximum are launched.
SCALE, ONLINE_SCALE = 10.0, 100.0


@dataclass(frozen=True)
class Entry:
    """One place of the table: pass, bytes of an element, width class."""

    name: str
    itemsize: int
    width: int | None

    @property
    def d(self) -> int:
        return self.width or CHUNKED_WIDTH[self.itemsize]

    @property
    def dtype(self) -> torch.dtype:
        return {2: torch.float16, 4: torch.float32}[self.itemsize]

    def tiles(self) -> dict[int, Tile]:
        return launch.TABLE[self.name][self.itemsize][self.width]

    def __str__(self) -> str:
        width = f"<= {self.width}" if self.width else f"= {self.d}, in chunks"
        return f"{self.name} {8 * self.itemsize} bits, D {width}"


def entries(only: str = "") -> list[Entry]:
    """All places of the table, the common widths in 16 bits first: time may run out."""
    found = [
        Entry(name, itemsize, width)
        for name, sizes in launch.TABLE.items()
        for itemsize, widths in sizes.items()
        for width in widths
        if only in name
    ]
    return sorted(found, key=lambda e: (e.itemsize, e.name not in COMMON, abs((e.width or 512) - 128)))


def accumulators(name: str, tile: Tile) -> float:
    """fp32 values that a thread holds over the inner loop."""
    count = tile.block_m * tile.block_n
    if name in ("lse_symmetric", "lse_two_way"):
        count *= 2  # the products and their column sums
    if name.startswith("lse_backward"):
        count += tile.block_m * tile.block_d
    return count / (32 * tile.num_warps)


def shared_bytes(entry: Entry, tile: Tile) -> int:
    """Shared memory of the operands, at least."""
    walk = tile.block_m if entry.name in ("lse_symmetric", "lse_two_way") else tile.block_n
    stay = tile.block_m + tile.block_n - walk
    if entry.width is None:
        return tile.num_stages * (walk + stay) * tile.block_d * entry.itemsize
    return (tile.num_stages * walk + stay) * tile.block_d * entry.itemsize


def candidates(entry: Entry, generation: int) -> list[Tile]:
    """The present tile first, then others that may fit: those that differ from it in the fewest numbers."""
    present = entry.tiles()[generation]
    widths = CHUNKS[entry.itemsize] if entry.width is None else (present.block_d,)
    blocks = BLOCKS[entry.itemsize]
    found = [present]
    for sizes in itertools.product(blocks, blocks, widths, WARPS, STAGES):
        tile = Tile(*sizes, present.programs)
        fits = (
            accumulators(entry.name, tile) <= MOST_ACCUMULATORS[entry.itemsize]
            and shared_bytes(entry, tile) <= SHARED_BYTES[generation]
            # The symmetric kernel cuts a column block into whole row blocks.
            and not (entry.name == "lse_symmetric" and tile.block_n % tile.block_m)
        )
        if fits and tile != present:
            found.append(tile)
    found.sort(key=lambda tile: sum(a != b for a, b in zip(astuple(tile), astuple(present), strict=True)))
    return found[:MOST_TILES]


@contextlib.contextmanager
def using(entry: Entry, generation: int, tile: Tile) -> Iterator[None]:
    """Launch with this tile instead of the table's."""
    tiles = entry.tiles()
    before = tiles[generation]
    tiles[generation] = tile
    try:
        yield
    finally:
        tiles[generation] = before


def workload(entry: Entry, rows: int, device: torch.device) -> timing.Run:
    """A call whose time is the pass of this entry and little else."""
    from fastcl.kernels import host

    generator = torch.Generator(device).manual_seed(0)

    def unit_rows():
        x = torch.randn(rows, entry.d, generator=generator, device=device)
        return host.empty_rows(x, rows, entry.d, entry.dtype).copy_(torch.nn.functional.normalize(x, dim=1))

    bound = ONLINE_SCALE if entry.name.endswith("_online") else SCALE
    a, scale = unit_rows(), torch.full((), bound, device=device)
    shared = (scale, bound, 0, rows // 2)
    if entry.name == "lse_symmetric":
        return lambda: host.lse_forward(a, None, *shared)[0]
    if entry.name in ("lse_backward", "lse_backward_online", "lse_weight"):
        (lse,) = host.lse_forward(a, None, *shared)
        return lambda: host.lse_backward(a, None, *shared, lse, None, None, None)[0]
    b, ids, beta = unit_rows(), torch.arange(rows, device=device) // 4, torch.full((rows,), -bound, device=device)
    return {
        "lse_rows": lambda: host.lse_forward(a, b, *shared)[0],
        "lse_two_way": lambda: host.lse_forward(a, b, scale, bound, rows, 0, columns=True)[0],
        "lse_masked": lambda: host.lse_forward(a, b, *shared, ids_a=ids, ids_b=ids, same="drop")[0],
        "softplus_rows": lambda: host.softplus_forward(a, b, scale, beta, 1.0, rows)[0],
        "softplus_weight": lambda: host.softplus_both(a, b, scale, beta, 1.0, rows)[0],
        "stats": lambda: host.similarity_stats(a, b, scale, 0, rows // 2)[0],
    }[entry.name]


def sweep_entry(entry: Entry, tiles: list[Tile], rows: int, device: torch.device, seconds: float) -> dict:
    """Times of all tiles; the best again, in turns with the present one. tiles[0] is the present one."""
    generation = launch.generation(device)
    run = workload(entry, rows, device)
    record = {"entry": str(entry), "rows": rows, "tiles": []}
    expected = None
    for tile in tiles:
        line = {"tile": asdict(tile)}
        record["tiles"].append(line)
        try:
            with using(entry, generation, tile):
                got = run().clone()
                expected = got if expected is None else expected
                # A tile that miscalculates is not fast.
                error = (torch.linalg.vector_norm((got - expected).double()) / expected.double().norm()).item()
                line["difference"] = error
                if not error < 1e-2:
                    line["error"] = f"differs from the present tile by {error:.1e}"
                    continue
                line["ms"] = timing.summary(timing.alternate({"": run}, device, seconds)[""])["median"]
        except Exception as caught:
            line["error"] = f"{type(caught).__name__}: {str(caught).splitlines()[0] if str(caught) else ''}"
    timed = [(line["ms"], tile) for line, tile in zip(record["tiles"], tiles, strict=True) if "ms" in line]
    record["best"] = asdict(tiles[0])
    if timed and "ms" in record["tiles"][0]:
        record["present_ms"] = record["best_ms"] = record["tiles"][0]["ms"]
        best = min(timed, key=lambda pair: pair[0])[1]
        if best != tiles[0]:
            _confirm(record, entry, generation, run, tiles[0], best, device, seconds)
    return record


def _confirm(record, entry: Entry, generation: int, run, present: Tile, best: Tile, device, seconds: float) -> None:
    def launched(tile):
        def call():
            with using(entry, generation, tile):
                return run()

        return call

    samples = timing.alternate({"present": launched(present), "best": launched(best)}, device, 3 * seconds)
    record["present_ms"] = timing.summary(samples["present"])["median"]
    ms = timing.summary(samples["best"])["median"]
    if ms < record["present_ms"] * (1 - GAIN):
        record["best"], record["best_ms"] = asdict(best), ms
    else:
        record["best_ms"] = record["present_ms"]


def _tile(tile: Tile) -> str:
    numbers = astuple(tile) if tile.programs > 1 else astuple(tile)[:-1]
    return f"Tile({', '.join(map(str, numbers))})"


def _generations(tiles: dict[int, Tile]) -> str:
    """One width class as launch.py writes it: the common tile, then what differs."""
    values = list(tiles.values())
    common = max(values, key=values.count)
    differ = ", ".join(f"{generation}: {_tile(tile)}" for generation, tile in tiles.items() if tile != common)
    if len(set(values)) == len(values) > 1:
        return "{" + ", ".join(f"{generation}: {_tile(tile)}" for generation, tile in tiles.items()) + "}"
    return f"_everywhere({_tile(common)})" + (f" | {{{differ}}}" if differ else "")


def table_source(best: dict[Entry, Tile], generation: int) -> str:
    """The TABLE of launch.py with these entries for one generation, as Python source."""
    lines = ["TABLE: dict[str, dict[int, dict[int | None, dict[int, Tile]]]] = {"]
    for name, sizes in launch.TABLE.items():
        lines.append(f'    "{name}": {{')
        for itemsize, widths in sizes.items():
            if not widths:
                lines.append(f"        {itemsize}: {{}},")
                continue
            lines.append(f"        {itemsize}: {{")
            for width, tiles in widths.items():
                tile = best.get(Entry(name, itemsize, width), tiles[generation])
                lines.append(f"            {width}: {_generations(tiles | {generation: tile})},")
            lines.append("        },")
        lines.append("    },")
    return "\n".join([*lines, "}"])


def warm(part: int, parts: int, only: str, out: Path, device: torch.device) -> int:
    """One worker: compile and launch its share of the candidates, one JSON line each."""
    generation = launch.generation(device)
    jobs = [(entry, tile) for entry in entries(only) for tile in candidates(entry, generation)]
    runs: dict[Entry, timing.Run] = {}
    with out.open("w") as file:
        for entry, tile in jobs[part::parts]:
            line = {"entry": str(entry), "tile": asdict(tile)}
            try:
                # Before the candidate is in place: the gradient's workload runs the present forward.
                runs[entry] = runs.get(entry) or workload(entry, WARM_ROWS, device)
                with using(entry, generation, tile):
                    runs[entry]()
                timing.synchronize(device)
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            file.write(json.dumps(line) + "\n")
            file.flush()
            if timing.context_is_broken(device):
                return 1
    return 0


def warm_all(only: str, seconds: float) -> dict[tuple, str | None]:
    """What the workers found: {(entry, tile): error or None}; a candidate that is missing was not reached."""
    found: dict[tuple, str | None] = {}
    parts = max(1, min(12, (os.cpu_count() or 1) - 2))
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder, f"{part}.jsonl") for part in range(parts)]
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, "--warm", str(part), str(parts), str(out), "--only", only],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for part, out in enumerate(outs)
        ]  # fmt: skip
        end = time.monotonic() + seconds
        try:
            for worker in workers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.wait(max(0.1, end - time.monotonic()))
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        for out in outs:
            for text in out.read_text().splitlines() if out.exists() else []:
                with contextlib.suppress(json.JSONDecodeError):
                    line = json.loads(text)
                    found[line["entry"], tuple(line["tile"].values())] = line.get("error")
    return found


def sweep(only: str, device: torch.device, end: float, warmed: dict, write, rows: int | None = None) -> None:
    """Sweep entry by entry until the clock says `end`; `write` gets the whole record after each."""
    generation = launch.generation(device)
    record = {"generation": generation, "entries": [], "errors": [], "not reached": []}
    best: dict[Entry, Tile] = {}
    for entry in entries(only):
        if time.monotonic() > end:
            record["not reached"].append(str(entry))
            write(record)
            continue
        present, *others = candidates(entry, generation)
        tiles = [present, *(t for t in others if warmed.get((str(entry), astuple(t)), "not reached") is None)]
        try:
            line = sweep_entry(entry, tiles, rows or ROWS[entry.itemsize], device, 0.1)
            line["not timed"] = {
                _tile(t): warmed.get((str(entry), astuple(t)), "not reached") for t in others if t not in tiles
            }
            record["entries"].append(line)
            best[entry] = Tile(**line["best"])
        except Exception:
            record["errors"].append(f"{entry}:\n{traceback.format_exc()}")
        record["table"] = table_source(best, generation)
        write(record)
        if timing.context_is_broken(device):
            record["errors"].append(f"{entry}: a candidate broke the device context, nothing after it was timed")
            write(record)
            return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="passes whose name contains this")
    parser.add_argument("--seconds", type=float, default=150.0, help="wall clock after which no entry begins")
    parser.add_argument("--json", type=Path, help="write all figures here, after every entry")
    parser.add_argument("--warm", nargs=3, metavar=("PART", "PARTS", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune.py: expected a CUDA device, got none", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    if args.warm:
        return warm(int(args.warm[0]), int(args.warm[1]), args.only, Path(args.warm[2]), device)
    end = time.monotonic() + args.seconds
    record: dict = {}

    def write(found: dict) -> None:
        record.update(found)
        if args.json:
            reporting.write_json(args.json, found)

    sweep(args.only, device, end, warm_all(args.only, args.seconds * 0.6), write)
    for line in record["entries"]:
        if "present_ms" in line:
            print(f"{line['entry']}: present {line['present_ms']:.4f} ms, best {line['best_ms']:.4f} ms")
    print(record.get("table", ""))
    return 1 if record["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
