"""Interleaved timing: all sides take turns in one process, so that drift of the machine hits them alike."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Run = Callable[[], object]
# Calls within one timed round: enough to be long against the resolution of the clock and the gaps between launches.
ROUND_MS = 5.0
MOST_CALLS = 200
MOST_ROUNDS = 50


def rotating_inputs(m: int, d: int, dtype: torch.dtype, device: torch.device, sets: int = 1) -> list:
    """`sets` pairs of views [m / 2, d] that require grad."""
    generator = torch.Generator(device).manual_seed(0)

    def view() -> Tensor:
        # Drawn in float32: every dtype sees the same numbers, rounded.
        x = torch.randn(m // 2, d, generator=generator, device=device)
        return x.to(dtype).requires_grad_()

    return [(view(), view()) for _ in range(sets)]


def step(loss: Callable[[Tensor, Tensor], Tensor], inputs: Sequence, backward: bool) -> Run:
    """One call of the loss, with gradients of both views if `backward`; each call takes the next inputs."""
    turns = itertools.cycle(inputs)

    def run():
        z1, z2 = next(turns)
        if not backward:
            with torch.no_grad():
                return loss(z1, z2)
        # Not .backward(): accumulating into .grad would be timed too.
        return torch.autograd.grad(loss(z1, z2), (z1, z2))

    return run


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def context_is_broken(device: torch.device) -> bool:
    """Whether a kernel left the device unusable for this process, as an illegal access does."""
    try:
        synchronize(device)
        torch.ones(8, device=device).sum().item()
    except RuntimeError:
        return True
    return False


def milliseconds(run: Run, calls: int, device: torch.device) -> float:
    """Time of one of `calls` calls in a row: device events on CUDA, the host's clock elsewhere."""
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / calls
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) * 1e3 / calls


def calls_a_round(run: Run, device: torch.device, round_ms: float = ROUND_MS) -> int:
    """How many calls fill a round, found by calling: this is the warm-up too."""
    begin = time.perf_counter()
    run()
    synchronize(device)
    if (time.perf_counter() - begin) * 1e3 > 100 * round_ms:
        # So slow that one more call to look again would cost more than it tells.
        return 1
    # The first call may have built caches, and one alone may be disturbed.
    once = min(milliseconds(run, 1, device) for _ in range(2))
    return max(1, min(MOST_CALLS, int(round_ms / max(once, 1e-3))))


def alternate(
    sides: dict[str, Run], device: torch.device, seconds: float, least_rounds: int = 3, round_ms: float = ROUND_MS
) -> dict[str, list[float]]:
    """Milliseconds of each side, round by round: `seconds` in all, and at least `least_rounds` rounds."""
    calls = {name: calls_a_round(run, device, round_ms) for name, run in sides.items()}
    samples: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    for turn in range(MOST_ROUNDS):
        if turn >= least_rounds and time.perf_counter() > end:
            break
        # Each round in the opposite order: no side always runs on caches that the same other side left behind.
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            samples[name].append(milliseconds(sides[name], calls[name], device))
    return samples


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, and the fastest: on a machine that others use too, it was disturbed the least."""
    if len(samples) == 1:
        low = high = samples[0]
    else:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    middle = statistics.median(samples)
    return {"median": middle, "low": low, "high": high, "fastest": min(samples), "rounds": len(samples)}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the quotients round by round: what two sides of one round share cancels."""
    return summary([a / b for a, b in zip(above, below, strict=True)])
