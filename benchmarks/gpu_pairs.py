"""Time, memory and error of CLIP, SigLIP, InfoNCE and SupCon on a GPU in bfloat16: one process of `gpu.py`.

    python benchmarks/gpu_pairs.py --out pairs.jsonl --seconds 60

Against plain PyTorch where its matrices fit, CLIP and SigLIP also against the libraries of `peers.py` that have kernels
for them and are installed, and dcl_loss against nt_xent, whose kernels it shares. The ceilings are matrix-product rates and copy bandwidth. What is written when
is said in `gpu_runner.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import gpu_cases, gpu_runner, peers, timing, workloads
from benchmarks.gpu_report import BOTH
from benchmarks.timing import gradient_of
from benchmarks.workloads import LOSSES
from fastcl import nt_xent

DTYPES = {"bf16": torch.bfloat16}
MANY_QUERIES = "info_nce, queue, 4,096 queries"
# About how many matrices of similarities plain PyTorch holds at once, and one for an allocator's gaps.
MATRICES = 7
# Up to this many similarities: launches may take longer than the kernels, so that a CUDA graph shows the device's own
# time, and float64 matrices of all of them fit.
SMALL = 8192**2
# Rows chosen by a mask make the host wait, which a capture does not allow. Whether other libraries do is not known.
NOT_CAPTURED = (("supcon_loss", "eager"),)
# TFLOP/s of the slower side, a low guess: matrices that go through memory take longer than the products.
GUESSED_RATE = 60


# The same losses, dcl_loss also beside the one whose kernels it shares.
WORK = {kind: work for kind, work in LOSSES.items() if kind != "nt_xent"} | {
    MANY_QUERIES: workloads.queue_of(4096),
    "dcl_loss": replace(LOSSES["dcl_loss"], sides=LOSSES["dcl_loss"].sides | {"nt_xent": gradient_of(nt_xent)}),
}


def libraries(kind: str) -> list[str]:
    """Other libraries that are installed and have kernels for this loss, without the matrix of similarities."""
    return [peer.name for peer in peers.PEERS if kind in peer.losses and peer.no_matrix and not peer.why_not()]


@dataclass(frozen=True)
class Case:
    """m rows of both operands, of the features, of the queue, or of both views; d features."""

    kind: str
    m: int
    d: int
    other: str = "eager"
    dtype: str = "bf16"

    @property
    def key(self) -> str:
        return f"{self.kind} {self.dtype} M={self.m} D={self.d} {self.other}"

    @property
    def similarities(self) -> int:
        return WORK[self.kind].similarities(self.m)

    @property
    def flop(self) -> float:
        return WORK[self.kind].flop(self.m, self.d, "cuda")

    @property
    def expected_seconds(self) -> float:
        return self.flop / (GUESSED_RATE * 1e12)


def cases() -> list[Case]:
    """All cases, those that matter most first: time may run out."""
    wanted = []
    for kind in ("siglip_loss", "clip_loss"):
        wanted.append(Case(kind, 65536, 768, (*libraries(kind), "eager")[0]))
    wanted += [Case("info_nce, queue", 65536, 128), Case("supcon_loss", 8192, 128)]
    for kind in ("siglip_loss", "clip_loss"):
        wanted += [Case(kind, 8192, 768, other) for other in (*libraries(kind), "eager")]
    wanted += [Case(MANY_QUERIES, 65536, 128), Case("dcl_loss", 8192, 128, "nt_xent"), Case("info_nce", 8192, 128)]
    wanted += [Case("clip_loss", 32768, 512), Case("supcon_loss", 65536, 128)]
    wanted += [Case(kind, 65536, 768, name) for kind in ("siglip_loss", "clip_loss") for name in libraries(kind)[1:]]
    wanted += [Case(kind, 65536, 768) for kind in ("siglip_loss", "clip_loss")]
    return list(dict.fromkeys(wanted))


def calls(case: Case) -> dict[str, Callable[..., tuple]]:
    """{side: function of the inputs} of both sides."""
    sides = WORK[case.kind].sides
    return {name: sides[name] for name in ("fastcl", case.other)}


def bytes_needed(case: Case) -> int:
    """By the other side; those with kernels build no matrix."""
    return MATRICES * case.similarities * DTYPES[case.dtype].itemsize if case.other == "eager" else 0


def errors(case: Case, sides: Iterable[str], inputs: tuple[Tensor, ...]) -> dict[str, dict[str, float]]:
    """Of the loss and of all gradients together, against float64 on the already rounded inputs."""
    kind = "info_nce, queue" if case.kind == MANY_QUERIES else case.kind
    # Beside dcl_loss, nt_xent is another loss.
    known = {name: call for name, call in calls(case).items() if name in sides and name != "nt_xent"}
    return workloads.errors(kind, known, inputs)


def run_case(case: Case, device: torch.device, seconds: float = gpu_runner.SECONDS_PER_CASE) -> dict:
    """Everything about one case. What fails on one side is recorded there and does not touch the other."""
    work, dtype = WORK[case.kind], DTYPES[case.dtype]
    set_bytes = sum(rows * columns for rows, columns in work.shapes(case.m, case.d)) * dtype.itemsize
    inputs = work.inputs(case.m, case.d, dtype, device, gpu_runner.sets_beyond_l2(set_bytes, device))
    record = asdict(case) | {"sides": {}}
    sides = {name: {BOTH: timing.rotate(call, inputs)} for name, call in calls(case).items()}
    why_not = {case.other: gpu_runner.out_of_reach(bytes_needed(case), device)}
    ready = gpu_runner.prepare(sides, device, record, why_not)
    gpu_runner.time_sides(case.other, ready, device, record, seconds / 2)
    ours = record["sides"]["fastcl"].get("ms")
    if ours:
        record["TFLOP/s"] = case.flop / ours[BOTH]["median"] / 1e9
    if device.type == "cuda" and case.similarities <= SMALL:
        captured = {
            name: runs
            for name, runs in ready.items()
            if name in ("fastcl", "eager", "nt_xent") and (case.kind, name) not in NOT_CAPTURED
        }
        gpu_runner.time_graphs(len(inputs), captured, device, record, seconds / 4)
    if case.similarities <= SMALL:
        for name, found in errors(case, ready, inputs[0]).items():
            record["sides"][name]["error_vs_fp64"] = found
    return record


if __name__ == "__main__":
    sys.exit(gpu_runner.main(__doc__, "gpu_pairs.py", cases(), run_case, gpu_cases.ceilings))
