"""Predicted step time, memory and traffic of a loss over many GPUs: a small simulation, its inputs in the open.

    python benchmarks/scaling.py                              # the tables of docs/scaling.md
    python benchmarks/scaling.py --page docs/scaling.md       # puts them into the page
    python benchmarks/scaling.py --measure --json gather.json # uneven rows over gloo, measured on this machine

Every number that goes in is in INPUTS, with where it comes from. Nothing here has been measured on a GPU: rates are
what the chip can do at most, times an assumed efficiency.
"""

from __future__ import annotations

import argparse
import datetime
import math
import multiprocessing
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks import reporting, timing

INPUTS = {
    # H100 SXM5 data sheet: dense fp16 and bf16, FLOP/s. The H200 is the same chip with other memory.
    "matrix": 989.4e12,
    # CUDA programming guide, arithmetic instructions of capability 9.0: 16 exp2 a clock and multiprocessor. 132 of
    # them at 1.83 GHz, the clock of the figure above (4,096 FLOP a clock and multiprocessor).
    "exponentials": 16 * 132 * 1.83e9,
    "multiprocessors": 132,
    # Rows and columns of a tile, one tile at a time on a multiprocessor (fastcl/kernels/launch.py has 64 to 128).
    "tile": 128,
    # Assumed: share of min(products, exponentials) that the kernels reach, by number of features. At 128 both units are
    # busy all the time, and what one waits for the other is lost; at 768 it is a matrix product and little else.
    "efficiency": {128: 0.5, 768: 0.6},
    # (products, exponentials) that a rank forms of each pair of a row and a column, forward and backward: counted in
    # fastcl/ops. nt_xent: S; S again and W z. CLIP and SigLIP: S; S again and its product for rows, and for columns.
    "work": {"nt_xent": ((1, 1), (2, 1)), "clip_loss": ((1, 1), (4, 2)), "siglip_loss": ((1, 1), (4, 2))},
    # Bytes of a feature on the wire: 16-bit training. In float32 it is 4.
    "element": 2,
    # Data sheets, bytes.
    "memory": {"H100": 80e9, "H200": 141e9},
    "gpus a node": 8,
    # NVLink 4 is 450 GB/s each way (data sheet). Assumed: 80% of it.
    "nvlink": 0.8 * 450e9,
    # NDR InfiniBand, one 400 Gbit/s port for each GPU: 50 GB/s, "46-48 GB/s per NIC" in nccl-tests by NVIDIA's own
    # account (github.com/NVIDIA/nccl-tests/issues/290).
    "network": 46e9,
    # NCCL's own model of its rings (src/graph/tuning.cc of NCCL 2.20): seconds of a call, of a step within a node, of a
    # step between nodes, least of a step on the host of many nodes; share of the bandwidth, and most of it on 1, 2 and
    # more nodes.
    "protocols": {
        "LL": (6.6e-6, 0.6e-6, 2.7e-6, 1e-6, 0.25, (87.7e9, 22.5e9, 19.0e9)),
        "LL128": (14.0e-6, 1.9e-6, 4.0e-6, 1e-6, 0.92, (math.inf,) * 3),
        "Simple": (8.4e-6, 3.4e-6, 14.0e-6, 3e-6, 1.0, (math.inf,) * 3),
    },
    # Assumed: from one rank to the next, within a node and between nodes.
    "hop": (10e-6, 20e-6),
    # Assumed: the host's time for one block of a ring, with its send, receive and kernels. ring_of_rows alone takes
    # 18 us a block where nothing is moved (PyTorch's "fake" backend, one core of a server).
    "block": 80e-6,
    # Assumed: gloo over TCP, from one rank to the next. It goes around a ring of all ranks.
    "gloo hop": 50e-6,
    # Assumed: the host's time for one collective.
    "call": 20e-6,
    # int64 numbers of a rank in the exchange that compares arguments (fastcl.distributed.HEADER).
    "header": 28,
    # Assumed: what gathered rows may take of a GPU's memory before one looks for another way.
    "share": 0.05,
}
WORLDS, WIDTHS, PAIRS = (8, 64, 512, 4096), (128, 768), (256, 1024, 4096)
PAGE_TABLE = re.compile(r"(<!-- benchmarks/scaling\.py: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pass_seconds(work: tuple[int, int], rows: int, columns: int, d: int) -> float:
    """One visit of all pairs: the slower of products and exponentials, in whole waves of tiles."""
    products, exponentials = work
    pair = max(2 * d * products / INPUTS["matrix"], exponentials / INPUTS["exponentials"])
    tiles = math.prod(math.ceil(count / INPUTS["tile"]) for count in (rows, columns))
    waves = math.ceil(tiles / INPUTS["multiprocessors"])
    return waves * INPUTS["multiprocessors"] * INPUTS["tile"] ** 2 * pair / INPUTS["efficiency"][d]


def nodes_of(world: int) -> int:
    return math.ceil(world / INPUTS["gpus a node"])


def link_of(world: int) -> float:
    """What a rank can receive a second in a collective: between nodes its rings use the ports of all GPUs of a node."""
    across = INPUTS["gpus a node"] * INPUTS["network"]
    return INPUTS["nvlink"] if nodes_of(world) == 1 else min(INPUTS["nvlink"], across)


def gather_seconds(world: int, size: float) -> float:
    """NCCL's all_gather of `size` bytes in all, by the protocol that is fastest."""
    nodes = nodes_of(world)
    across, within = nodes - 1, world - nodes
    found = []
    for call, near, far, least, share, most in INPUTS["protocols"].values():
        near = near if nodes == 1 else max(near, least)
        rate = min(share * link_of(world), most[min(nodes, 3) - 1])
        found.append(call + within * near + across * far + size * (world - 1) / world / rate)
    return min(found)


def ring_seconds(work: tuple[int, int], world: int, rows: int, columns: int, d: int, moved: int = 1) -> float:
    """One pass over the columns of all ranks, `columns` of each: block after block, the next on its way meanwhile."""
    near, far = INPUTS["hop"]
    hop, link = (near, INPUTS["nvlink"]) if nodes_of(world) == 1 else (far, INPUTS["network"])
    transfer = hop + moved * columns * d * INPUTS["element"] / link
    block = max(pass_seconds(work, rows, columns, d), INPUTS["block"])
    return (world - 1) * max(block, transfer) + block


def predict(loss: str, world: int, pairs: int, d: int) -> dict[str, float]:
    """Seconds and bytes of one step of one rank that holds `pairs` pairs."""
    forward, backward = INPUTS["work"][loss]
    element = INPUTS["element"]
    two_way = loss != "nt_xent"
    rows = pairs if two_way else 2 * pairs
    total = world * rows
    matrix = total * d * element
    # Numbers of all rows: of nt_xent the log-sum-exp; of CLIP upstream gradient and log-sum-exp of both directions, and
    # the sums over ranks of the columns' parts; of SigLIP the bias.
    vectors = {"nt_xent": 4, "clip_loss": 24 + 16, "siglip_loss": 4}[loss] * total
    compute = pass_seconds(forward, rows, total, d) + pass_seconds(backward, rows, total, d)
    numbers = gather_seconds(world, vectors)
    passes = 2 if two_way else 1  # that gather rows, and that a ring makes in the backward
    ring = ring_seconds(forward, world, rows, rows, d)
    half = tuple(count // passes for count in backward)
    ring += passes * ring_seconds(half, world, rows, rows, d)
    return {
        "compute": compute,
        "gather": compute + passes * gather_seconds(world, matrix) + numbers,
        "ring": ring + numbers,
        "held by gather": passes * matrix,
        "held by ring": 2 * rows * d * element,
        "wire of gather": passes * matrix + vectors,
        "wire of ring": (1 + passes) * (world - 1) / world * matrix + vectors,
        "total": total,
    }


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def _line(found: dict[str, float]) -> list[str]:
    times = (found["compute"], *(x for key in ("gather", "ring") for x in (found[key] - found["compute"], found[key])))
    sizes = (found[f"{what} {key}"] for what in ("held by", "wire of") for key in ("gather", "ring"))
    return [*map(_ms, times), *map(reporting.mebibytes, sizes)]


FIGURES = ["compute ms", "gather: exposed", "step ms", "ring: exposed", "step ms", "gather holds MiB", "ring MiB",
           "gather moves MiB", "ring MiB"]  # fmt: skip


def nt_xent_table() -> str:
    lines = []
    for d in WIDTHS:
        for pairs in PAIRS:
            for world in WORLDS:
                found = predict("nt_xent", world, pairs, d)
                lines.append([d, f"{pairs:,}", f"{world:,}", f"{found['total']:,}", *_line(found)])
    return reporting.table(["D", "pairs a rank", "W", "M", *FIGURES], lines)


def pairs_table() -> str:
    lines = []
    for loss in ("clip_loss", "siglip_loss"):
        for world in WORLDS:
            found = predict(loss, world, 1024, 768)
            lines.append([f"`{loss}`", f"{world:,}", f"{found['total']:,}", *_line(found)])
    return reporting.table(["loss", "W", "N", *FIGURES], lines)


def ring_table() -> str:
    """From which W on the rows that nt_xent gathers take more than their share of the memory."""
    lines = []
    for d in WIDTHS:
        for pairs in (*PAIRS, 16384):
            rank = 2 * pairs * d * INPUTS["element"]
            worlds = {name: math.ceil(INPUTS["share"] * size / rank) for name, size in INPUTS["memory"].items()}
            found = predict("nt_xent", worlds["H100"], pairs, d)
            lines.append([
                d, f"{pairs:,}", reporting.mebibytes(rank), *(f"{world:,}" for world in worlds.values()),
                _ms(found["gather"]), _ms(found["ring"]), f"{found['ring'] / found['gather']:.2f}×",
            ])  # fmt: skip
    header = ["D", "pairs a rank", "MiB of a rank", "W, H100", "W, H200", "gather ms, H100's W", "ring ms", "costs"]
    return reporting.table(header, lines)


def header_table() -> str:
    lines = []
    for world in WORLDS:
        size = 8 * INPUTS["header"] * world
        seconds = gather_seconds(world, size), (world - 1) * INPUTS["gloo hop"]
        lines.append([f"{world:,}", f"{size:,}", *map(_ms, seconds)])
    return reporting.table(["W", "bytes", "NCCL ms", "gloo ms"], lines)


def uneven_table() -> str:
    """nt_xent's rows, 1,024 pairs of 768 features a rank on average, if the largest has half more or twice that."""
    lines = []
    for world in WORLDS:
        size = world * 2048 * 768 * INPUTS["element"]
        call, *steps = INPUTS["protocols"]["Simple"][:3]
        # A broadcast is handed on in small pieces along the ring: the first one's way, and the bytes.
        way = max(INPUTS["call"], call + steps[nodes_of(world) > 1])
        times = [gather_seconds(world, factor * size) for factor in (1, 1.5, 2)] + [world * way + size / link_of(world)]
        lines.append([f"{world:,}", *map(_ms, times)])
    header = ["W", "even ms", "padded, half more ms", "padded, twice ms", "W broadcasts ms"]
    return reporting.table(header, lines)


TABLES = {
    "nt_xent": nt_xent_table, "pairs": pairs_table, "ring": ring_table, "header": header_table, "uneven": uneven_table,
}  # fmt: skip


def with_tables(page: str) -> str:
    """The page with each of its tables made anew."""
    return PAGE_TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", page)


# Uneven rows over gloo, measured. {what: rows of each rank, as a function of the number of ranks}
UNEVEN = {
    "even": lambda world: (1024,) * world,
    "the last one a third less": lambda world: (*(1024,) * (world - 1), 683),
    "the last one twice as many": lambda world: (*(1024,) * (world - 1), 2048),
    "the last one none": lambda world: (*(1024,) * (world - 1), 0),
}
SECONDS = 60


def padded(x: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    """What fastcl does: every rank's rows as many as those of the largest, then cut."""
    most = max(counts)
    rows = x if len(x) == most else torch.cat([x, x.new_zeros(most - len(x), x.shape[1])])
    out = x.new_empty(most * len(counts), x.shape[1])
    dist.all_gather_into_tensor(out, rows)
    if min(counts) == most:
        return out
    return torch.cat([part[:count] for part, count in zip(out.split(most), counts, strict=True)])


def broadcasts(x: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    """Each rank's rows to the place where they belong, all at once: no byte too many."""
    out = x.new_empty(sum(counts), x.shape[1])
    parts = out.split(counts)
    parts[dist.get_rank()].copy_(x)
    for work in [dist.broadcast(part, source, async_op=True) for source, part in enumerate(parts) if part.numel()]:
        work.wait()
    return out


def unequal(x: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    """all_gather into tensors of different sizes."""
    parts = [x.new_empty(count, x.shape[1]) for count in counts]
    dist.all_gather(parts, x)
    return torch.cat(parts)


WAYS: dict[str, Callable] = {"padded": padded, "broadcasts": broadcasts, "all_gather of unequal tensors": unequal}


def _measure_one(rank: int, counts: tuple[int, ...], d: int, rounds: int) -> dict:
    x = torch.full((counts[rank], d), float(rank))
    expected = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).float()
    samples: dict[str, list[float]] = {}
    refused = {}
    for turn in range(rounds + 1):
        for name, way in WAYS.items():
            if name in refused:
                continue
            dist.barrier()
            try:
                begin = time.perf_counter()
                out = way(x, counts)
                ms = (time.perf_counter() - begin) * 1e3
            except RuntimeError as error:
                refused[name] = str(error)
                continue
            if not torch.equal(out, expected[:, None].expand(-1, d)):
                refused[name] = "wrong rows"
            elif turn:  # the first connects
                samples.setdefault(name, []).append(ms)
    return {"ms": {name: timing.summary(values) for name, values in samples.items()}, "refused": refused}


def _worker(rank: int, world: int, widths: list[int], rounds: int, folder: str, found) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=SECONDS),
    )  # fmt: skip
    rows = []
    for d in widths:
        for what, make in UNEVEN.items():
            counts = make(world)
            sizes = {"padded": 4 * d * max(counts) * world, "broadcasts": 4 * d * sum(counts)}
            facts = {"what": what, "counts": counts, "d": d, "bytes": sizes}
            rows.append(facts | _measure_one(rank, counts, d, rounds))
    if rank == 0:
        found.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def measure(world: int, widths: list[int], rounds: int) -> list[dict]:
    """All ways of each distribution of rows, taking turns, in processes of their own."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_worker, args=(rank, world, widths, rounds, folder, found)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            rows = found.get(timeout=10 * SECONDS)
            for process in processes:
                process.join(SECONDS)
        finally:
            for process in processes:
                process.kill()
    return rows


def measured_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        cells = [reporting.spread(row["ms"].get(name)) if name not in row["refused"] else "refused" for name in WAYS]
        sizes = map(reporting.mebibytes, row["bytes"].values())
        lines.append([len(row["counts"]), row["what"], row["d"], *sizes, *cells])
    header = ["W", "1,024 rows a rank", "D", "padded MiB", "broadcasts MiB", *(f"{name} ms" for name in WAYS)]
    return reporting.table(header, lines)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line instead of the usage text, which would bury it."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="scaling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the tables into this page, in place")
    parser.add_argument("--measure", action="store_true", help="gather uneven rows over gloo, on this machine")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4], metavar="W", help="processes to measure with")
    parser.add_argument("--d", type=int, nargs="+", default=[128, 768], help="features to measure with")
    parser.add_argument("--rounds", type=int, default=60, help="of each way (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured here")
    args = parser.parse_args(arguments)
    for name, least in (("worlds", 2), ("d", 1), ("rounds", 1)):
        given = getattr(args, name)
        if min(given if isinstance(given, list) else [given]) < least:
            parser.error(f"argument --{name}: expected {least} or more, got {given}")
    if args.page and not args.page.is_file():
        parser.error(f"argument --page: expected a page that exists, got {args.page}")
    if args.json and not (args.measure and args.json.parent.is_dir()):
        parser.error(f"argument --json: expected --measure and a file in a folder that exists, got {args.json}")
    if args.measure:
        rows = [row for world in args.worlds for row in measure(world, args.d, args.rounds)]
        print(measured_table(rows))
        if args.json:
            reporting.write_json(args.json, {"versions": reporting.versions(), "rows": rows})
    elif args.page:
        args.page.write_text(with_tables(args.page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(f"<!-- benchmarks/scaling.py: {name} -->\n\n{make()}" for name, make in TABLES.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
