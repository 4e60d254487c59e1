"""Times of contenders in interleaved rounds, and their ratios."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

# Slow cases stop after so many rounds once they have taken so many seconds.
LEAST_ROUNDS, ENOUGH_SECONDS = 5, 30.0


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(*values, *values, *values)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def short(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Of the ratios within each round: what disturbed one contender disturbed the other."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def interleaved(
    contenders: Mapping[str, Callable[[], float]],
    rounds: int,
    seed: int,
    done: Callable[[int], None] = lambda round: None,
) -> dict[str, list[float]]:
    """Let each contender run once per round, in an order that is shuffled anew, and return its seconds per round.

    A round to warm up comes first and is not counted. `contenders` return what their run took.
    """
    chance = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    gc.collect()
    gc.freeze()  # else the collections between the runs take longer than the runs
    try:
        for round in range(rounds + 1):
            for name in chance.sample(sorted(contenders), len(contenders)):
                seconds = contenders[name]()
                if round:
                    times[name].append(seconds)
            done(round)
            if LEAST_ROUNDS <= round < rounds and time.perf_counter() - began > ENOUGH_SECONDS:
                break
    finally:
        gc.unfreeze()
    return times


def seconds(run: Callable[[], object], device: str) -> float:
    """How long something takes, on a GPU until the device has done it."""
    gc.collect()
    gc.disable()
    try:
        if device == "cuda":
            return _on_cuda(run)
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    finally:
        gc.enable()


def seconds_ahead(run: Callable[[], object], steps: int) -> float:
    """How long one of many steps takes that a GPU is given at once, with one synchronisation at the end."""

    def many() -> None:
        for _ in range(steps):
            run()

    return seconds(many, "cuda") / steps


def _on_cuda(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000


def beside_the_first(times: Mapping[str, Sequence[float]]) -> list[str]:
    """A line for each contender: its milliseconds, and their ratio to those of the first."""
    first, width = next(iter(times.values())), max(map(len, times))
    lines = []
    for name, taken in times.items():
        ratio = ratios(taken, first)
        lines.append(
            f"{name:{width}} {short(1e3 * spread(taken).median):>6} ms   {short(ratio.median):>5} × "
            f"({short(ratio.low)}–{short(ratio.high)})"
        )
    return lines
