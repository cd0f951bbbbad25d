"""What `pytest benchmarks` measures: the sizes of every workload, and all that is found out about one of them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks import floor, gpu_cases, gpu_runner, memory, peers, sort_floor, timing, workloads
from benchmarks.suite_report import PRODUCTS, SORT
from benchmarks.workloads import WORKLOADS

# Seconds to time one side of a case; slow ones take at least LEAST_ROUNDS calls.
SECONDS, LEAST_ROUNDS = 0.3, 5
# Matrices of similarities that a side other than ours holds at once, about, and what they may take together.
MATRICES, MOST_BYTES = 4, {"cpu": 4 * 2**30, "cuda": 16 * 2**30}
# float64 matrices of this many similarities, or so many sorted elements, take a second or two.
EXACT_SIMILARITIES, EXACT_ELEMENTS = 4096**2, 2**20
# An error is right up to twice that of plain PyTorch in the same type, and this much more: the rule of the tests.
ABSOLUTE = {"float32": 1e-6, "float16": 1e-4, "bfloat16": 1e-3}


@dataclass(frozen=True)
class Case:
    """m rows (of the queue, of both views or of each operand) by d features; of sorts: d directions."""

    kind: str
    m: int
    d: int
    dtype: str = "float32"
    # Whether plain PyTorch is measured through torch.compile too, which takes ten seconds to compile on a CPU.
    compiled: bool = False
    # Whether ours is measured alone, because nothing else fits or ends in time.
    alone: bool = False

    @property
    def key(self) -> str:
        return f"{self.kind} {self.m}x{self.d} {self.dtype}"

    @property
    def baseline(self) -> str | None:
        """The side that ratios are taken to."""
        return None if self.alone else list(WORKLOADS[self.kind].sides)[1]

    @functools.cached_property
    def sides(self) -> list[str]:
        """Ours first; last, on a CPU, a time that is no loss's: see `references`."""
        found = ["fastcl"]
        if not self.alone:
            found += [
                name for name in WORKLOADS[self.kind].sides
                if name != "fastcl" and self.m <= peers.most_rows(self.kind, name)
            ]  # fmt: skip
            found += ["compiled"] if self.compiled else []
        return found + list(references(self))

    def fits(self) -> bool:
        """Whether the matrices of plain PyTorch do."""
        similarities = WORKLOADS[self.kind].similarities(self.m) if self.kind in workloads.LOSSES else 0
        return MATRICES * similarities * getattr(torch, self.dtype).itemsize <= MOST_BYTES[device().type]


REFERENCES = {"nt_xent": PRODUCTS, "wasserstein_1d": SORT, "segmented_sort": SORT}


def references(case: Case) -> tuple[str, ...]:
    """Names of the times that ours is held against though they are no loss, on a CPU in float32."""
    if torch.cuda.is_available() or case.dtype != "float32" or case.kind not in REFERENCES or case.m > 16384:
        return ()
    return (REFERENCES[case.kind],)


def cpu_cases() -> list[Case]:
    """Sizes of a CPU: about ten minutes on two cores, compilation and the measurement of memory included."""
    wanted = [Case("nt_xent", m, 128, compiled=m in (256, 4096)) for m in (64, 128, 256, 512, 1024, 2048, 4096, 8192)]
    wanted += [Case("nt_xent", 16384, 128), Case("nt_xent", 32768, 128, alone=True)]
    wanted += [Case("nt_xent", 4096, d) for d in (32, 64, 256, 512, 1024)]
    wanted += [Case("nt_xent", 4096, d, "bfloat16") for d in (128, 512)]
    wanted += [Case("dcl_loss", m, 128) for m in (512, 4096)] + [Case("supcon_loss", m, 128) for m in (512, 4096)]
    wanted += [Case("clip_loss", 512, 128), Case("clip_loss", 4096, 128), Case("clip_loss", 1024, 512)]
    wanted += [Case("clip_loss", 4096, 512, compiled=True), Case("clip_loss", 4096, 512, "bfloat16")]
    wanted += [Case("siglip_loss", 1024, 512), Case("siglip_loss", 4096, 512, compiled=True)]
    wanted += [Case("info_nce", 512, 128), Case("info_nce", 8192, 128)]
    wanted += [Case("info_nce, queue", m, 128) for m in (4096, 65536)]
    wanted += [Case("wasserstein_1d", m, 128) for m in (512, 2048, 8192, 65536)]
    wanted += [Case("swd_loss", m, 128) for m in (512, 8192)]
    wanted += [Case("swd_loss, given draws", m, 128) for m in (512, 2048, 8192)]
    return wanted + [Case("segmented_sort", m, 128, dtype) for dtype in ("float32", "float16") for m in (512, 8192)]


def cuda_cases() -> list[Case]:
    """Sizes of a data-centre GPU; `gpu.py` has more of them, CUDA graphs, and survives kernels that hang."""
    wanted = [Case("nt_xent", m, 128, "bfloat16", compiled=True) for m in (1024, 2048, 4096, 8192, 16384, 32768)]
    wanted += [Case("nt_xent", m, 128, "bfloat16", alone=True) for m in (65536, 262144)]
    wanted += [Case("nt_xent", 8192, d, "bfloat16", compiled=True) for d in (64, 256, 512, 1024)]
    wanted += [Case(kind, 8192, 128, "bfloat16", compiled=True) for kind in ("dcl_loss", "supcon_loss", "info_nce")]
    wanted += [Case(kind, 8192, 768, "bfloat16", compiled=True) for kind in ("clip_loss", "siglip_loss")]
    wanted += [Case("info_nce, queue", 65536, 128, "bfloat16")]
    wanted += [Case("wasserstein_1d", 8192, d) for d in (128, 2048)] + [Case("swd_loss, given draws", 8192, 128)]
    return wanted + [Case("segmented_sort", 8192, d) for d in (128, 2048)]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cases() -> list[Case]:
    return [case for case in (cuda_cases() if torch.cuda.is_available() else cpu_cases()) if case.alone or case.fits()]


@functools.cache
def ceilings() -> dict[str, float]:
    """What this device reaches: rates of a large product in each type (TFLOP/s), and of a copy (TB/s, both ways)."""
    if torch.cuda.is_available():
        return gpu_cases.ceilings(device())
    # Products in float16 are emulated on most CPUs, and no case has any.
    return gpu_cases.ceilings(device(), 2048, 2**28, ("fp32", "bf16"))


def inputs_of(case: Case) -> list[tuple]:
    dtype, where = getattr(torch, case.dtype), device()
    work = WORKLOADS[case.kind]
    set_bytes = sum(rows * columns for rows, columns in work.shapes(case.m, case.d)) * dtype.itemsize
    sets = gpu_runner.sets_beyond_l2(set_bytes, where) if where.type == "cuda" else 1
    return work.inputs(case.m, case.d, dtype, where, sets)


def _reference(case: Case, inputs: tuple) -> timing.Run:
    if case.kind == "nt_xent":
        return floor.step(F.normalize(torch.cat([x.detach() for x in inputs]), dim=1), True)
    return sort_floor.numpy_sort(*(x for x in inputs))


def verdict(found: dict[str, float], plain: dict[str, float], dtype: str) -> str:
    """Whether errors keep the rule that the tests of this library have."""
    return "right" if all(found[key] <= 2 * plain[key] + ABSOLUTE[dtype] for key in plain) else "WRONG"


def errors(case: Case, calls: dict[str, workloads.Call], inputs: tuple) -> dict[str, dict]:
    """{side: errors and verdict} of those sides, where float64 takes seconds at most."""
    work = WORKLOADS[case.kind]
    similarities = work.similarities(case.m) if case.kind in workloads.LOSSES else 0
    if not workloads.has_errors(case.kind) or similarities > EXACT_SIMILARITIES:
        return {}
    if case.kind not in workloads.LOSSES and case.m * case.d > EXACT_ELEMENTS:
        return {}
    found = workloads.errors(case.kind, calls | {case.baseline: workloads.call_of(case.kind, case.baseline)}, inputs)
    plain = found[case.baseline]
    return {
        name: found[name] | {"verdict": "-" if name == case.baseline else verdict(found[name], plain, case.dtype)}
        for name in calls
    }


def measure(case: Case, names: Iterable[str], seconds: float = SECONDS) -> dict[str, dict]:
    """{side: samples (ms) taken in turns, ratios, errors and the rate that the loss's own work comes to}."""
    inputs, where = inputs_of(case), device()
    calls = {name: workloads.call_of(case.kind, name) for name in names if name not in REFERENCES.values()}
    runs = {name: timing.rotate(call, inputs) for name, call in calls.items()}
    runs |= {name: _reference(case, inputs[0]) for name in names if name not in calls}
    samples = timing.alternate(runs, where, seconds * len(runs), LEAST_ROUNDS)
    found = {name: {"samples": values, "ms": timing.summary(values)} for name, values in samples.items()}
    for name, values in samples.items():
        if case.baseline in samples:
            found[name]["faster_than_baseline"] = timing.ratio(samples[case.baseline], values)
        if "fastcl" in samples:
            found[name]["slower_than_fastcl"] = timing.ratio(values, samples["fastcl"])
    for name, error in errors(case, calls, inputs[0]).items() if not case.alone else ():
        found[name]["error"] = error
    work = WORKLOADS[case.kind]
    for name in calls:
        seconds_a_call = found[name]["ms"]["median"] / 1e3
        flop = work.flop(case.m, case.d, where.type)
        found[name]["TFLOP/s"] = flop and flop / seconds_a_call / 1e12
        moved = work.least_bytes(case.m, case.d, getattr(torch, case.dtype).itemsize)
        found[name]["TB/s"] = moved / seconds_a_call / 1e12
    return found


def peaks(wanted: dict[Case, list[str]]) -> dict[tuple[Case, str], int]:
    """Peak extra bytes of every side of these cases; on a CPU all in one fresh process, which takes long to start."""
    pairs = [(case, name) for case, names in wanted.items() for name in names if name not in REFERENCES.values()]
    if device().type == "cuda":
        found = []
        for case, name in pairs:
            run = timing.rotate(workloads.call_of(case.kind, name), inputs_of(case))
            run()
            found.append(memory.cuda_peak(run, device()))
    else:
        found = memory.resident_peaks([memory.Case(name, c.m, c.d, c.dtype, c.kind) for c, name in pairs])
    return dict(zip(pairs, found, strict=True))


def entry(case: Case, side: str, found: dict, peak: int | None) -> dict:
    """What is kept of one side."""
    return {
        "kind": case.kind, "m": case.m, "d": case.d, "dtype": case.dtype, "side": side, "baseline": case.baseline,
        "peak_extra_bytes": peak,
    } | {key: value for key, value in found.items() if key != "samples"}  # fmt: skip
