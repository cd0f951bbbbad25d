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


def random_sets(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device, sets: int = 1, grads: int = 1
) -> list[tuple[Tensor, ...]]:
    """`sets` tuples of normal tensors of these shapes; the first `grads` of each tuple require grad."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(number: int, shape: Sequence[int]) -> Tensor:
        # Drawn in float32: every dtype sees the same numbers, rounded.
        x = torch.randn(*shape, generator=generator, device=device)
        return x.to(dtype).requires_grad_(number < grads)

    return [tuple(draw(number, shape) for number, shape in enumerate(shapes)) for _ in range(sets)]


def rotating_inputs(m: int, d: int, dtype: torch.dtype, device: torch.device, sets: int = 1) -> list:
    """`sets` pairs of views [m / 2, d] that require grad."""
    return random_sets([(m // 2, d)] * 2, dtype, device, sets, grads=2)


def rotate(call: Callable[..., object], inputs: Sequence[tuple]) -> Run:
    """Calls of `call`, each with the next inputs."""
    turns = itertools.cycle(inputs)
    return lambda: call(*next(turns))


def value_of(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward alone."""
    return torch.no_grad()(loss)


def gradient_of(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """(the loss, its gradients with respect to the inputs that require grad)."""

    def call(*args: Tensor) -> tuple[Tensor, ...]:
        value = loss(*args)
        # Not .backward(): accumulating into .grad would be timed too.
        return value.detach(), *torch.autograd.grad(value, [x for x in args if x.requires_grad])

    return call


def step(loss: Callable[..., Tensor], inputs: Sequence[tuple], backward: bool) -> Run:
    """One call of the loss, with its gradients if `backward`; each call takes the next inputs."""
    return rotate((gradient_of if backward else value_of)(loss), inputs)


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
