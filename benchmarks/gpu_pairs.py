"""Time, memory and error of CLIP, SigLIP, InfoNCE and SupCon on a GPU in bfloat16: one process of `gpu.py`.

    python benchmarks/gpu_pairs.py --out pairs.jsonl --seconds 60

Against plain PyTorch where its matrices fit, SigLIP also against siglip-kernel where it is installed, and dcl_loss
against nt_xent, whose kernels it shares. The ceilings are matrix-product rates and copy bandwidth. What is written when
is said in `gpu_runner.py`.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import accuracy, gpu_cases, gpu_runner, timing, workloads
from benchmarks.gpu_report import BOTH
from benchmarks.timing import gradient_of
from benchmarks.workloads import OTHERS, PAIRS, Workload
from fastcl import nt_xent, reference

DTYPES = {"bf16": torch.bfloat16}
KERNEL = "siglip-kernel"
# SigLIP's other sides, the first of them at every size.
SIGLIP_PEERS = [KERNEL, "eager"] if importlib.util.find_spec("siglip_kernel") else ["eager"]
MANY_QUERIES = "info_nce, queue, 4,096 queries"
# Products of 2 rows columns D that one process forms, forward and backward. dcl_loss: 2.5 of its two views' rows, as
# nt_xent, each view having half of them.
UNITS = {
    "clip_loss": 4.0, "siglip_loss": 3.0, "info_nce, queue": 3.0, MANY_QUERIES: 3.0, "supcon_loss": 3.0,
    "info_nce": 4.0, "dcl_loss": 10.0,
}  # fmt: skip
# About how many matrices of similarities plain PyTorch holds at once, and one for an allocator's gaps.
MATRICES = 7
# Up to this many similarities: launches may take longer than the kernels, so that a CUDA graph shows the device's own
# time, and float64 matrices of all of them fit.
SMALL = 8192**2
# Rows chosen by a mask make the host wait, which a capture does not allow; what siglip-kernel does is not known.
NOT_CAPTURED = (("supcon_loss", "eager"), ("siglip_loss", KERNEL))
# TFLOP/s of the slower side, a low guess: matrices that go through memory take longer than the products.
GUESSED_RATE = 60


def _siglip_kernel(image: Tensor, text: Tensor) -> Tensor:
    """Scale and bias without gradient, as on the other sides; the scale as a logarithm."""
    from siglip_kernel import fused_siglip_loss

    numbers = (math.log(workloads.logit_scale(image)), workloads.LOGIT_BIAS)
    return fused_siglip_loss(image, text, *(torch.full((), number, device=image.device) for number in numbers))


def _in_batch(query: Tensor, keys: Tensor) -> Tensor:
    """info_nce as it is usually written."""
    logits = F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T / 0.07
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def _with(work: Workload, name: str, loss: Callable[..., Tensor]) -> Workload:
    """The same inputs with one more side."""
    return replace(work, sides=work.sides | {name: gradient_of(loss)})


WORK = PAIRS | {
    "siglip_loss": _with(PAIRS["siglip_loss"], KERNEL, _siglip_kernel),
    MANY_QUERIES: workloads.queue_of(4096),
    "info_nce": _with(OTHERS["info_nce"], "eager", _in_batch),
    "dcl_loss": _with(OTHERS["dcl_loss"], "nt_xent", nt_xent),
}


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
        shapes = WORK[self.kind].shapes(self.m, self.d)
        return shapes[0][0] * shapes[-1][0]

    @property
    def flop(self) -> float:
        return UNITS[self.kind] * 2 * self.similarities * self.d

    @property
    def expected_seconds(self) -> float:
        return self.flop / (GUESSED_RATE * 1e12)


def cases() -> list[Case]:
    """All cases, those that matter most first: time may run out."""
    wanted = [Case("siglip_loss", 65536, 768, SIGLIP_PEERS[0]), Case("clip_loss", 65536, 768)]
    wanted += [Case("info_nce, queue", 65536, 128), Case("supcon_loss", 8192, 128)]
    wanted += [Case("siglip_loss", 8192, 768, peer) for peer in SIGLIP_PEERS] + [Case("clip_loss", 8192, 768)]
    wanted += [Case(MANY_QUERIES, 65536, 128), Case("dcl_loss", 8192, 128, "nt_xent"), Case("info_nce", 8192, 128)]
    wanted += [Case("clip_loss", 32768, 512), Case("supcon_loss", 65536, 128)]
    return wanted + [Case("siglip_loss", 65536, 768, peer) for peer in SIGLIP_PEERS[1:]]


def calls(case: Case) -> dict[str, Callable[..., tuple]]:
    """{side: function of the inputs} of both sides."""
    sides = WORK[case.kind].sides
    return {name: sides[name] for name in ("fastcl", case.other)}


def bytes_needed(case: Case) -> int:
    """By the other side; siglip-kernel and nt_xent build no matrix."""
    return MATRICES * case.similarities * DTYPES[case.dtype].itemsize if case.other == "eager" else 0


def errors(case: Case, sides: Iterable[str], inputs: tuple[Tensor, ...]) -> dict[str, dict[str, float]]:
    """Of the loss and of all gradients together, against float64 on the already rounded inputs."""
    # dcl_loss has no other side that calculates the same number.
    exact = gradient_of(reference.dcl) if case.kind == "dcl_loss" else WORK[case.kind].sides["eager"]
    loss, *grads = exact(*(x.detach().double().requires_grad_(x.requires_grad) for x in inputs))
    found = {}
    for name in sides:
        if name != "nt_xent":
            value, *got = calls(case)[name](*inputs)
            found[name] = accuracy.relative(value, torch.cat(got), loss, torch.cat(grads))
    return found


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
        captured = {name: runs for name, runs in ready.items() if (case.kind, name) not in NOT_CAPTURED}
        gpu_runner.time_graphs(len(inputs), captured, device, record, seconds / 4)
    if case.similarities <= SMALL:
        for name, found in errors(case, ready, inputs[0]).items():
            record["sides"][name]["error_vs_fp64"] = found
    return record


if __name__ == "__main__":
    sys.exit(gpu_runner.main(__doc__, "gpu_pairs.py", cases(), run_case, gpu_cases.ceilings))
