"""`voxloss bench --inference`: memory and time from a volume to its labels, beside MONAI's inferer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from monai.inferers.inferer import SlidingWindowInferer
from torch import Tensor, nn

from voxloss import SlidingWindowLabels, fuse_head
from voxloss_app.bench.memory import resident_peak
from voxloss_app.bench.own_process import apart
from voxloss_app.exits import ExitCode
from voxloss_app.terminal import results_console

EDGE, ROUNDS = 192, 3
CHANNELS, FEATURES = 118, 16  # TotalSegmentator's classes and the background
WINDOW, OVERLAPS = 64, (0.25, 0.5)
# What may differ: of so many voxels some have two logits that are equal but for rounding.
DIFFERENT = 1e-5


class Outcome(NamedTuple):
    """Of one run in a process of its own."""

    labels: Tensor
    seconds: float
    peak: int | None


def network() -> nn.Module:
    """So small that what is measured is what comes after it; the same weights in every process."""
    torch.manual_seed(0)
    layers = nn.Conv3d(1, FEATURES, 3, padding=1), nn.ReLU(), nn.Conv3d(FEATURES, CHANNELS, 1)
    return nn.Sequential(*layers).eval()


def of_monai(image: Tensor, overlap: float) -> Tensor:
    """Means of logits, C volumes of floats, and their argmax."""
    logits: Any = SlidingWindowInferer(WINDOW, 1, overlap, "gaussian")(image, network())
    labels: Tensor = logits.argmax(1, keepdim=True)
    return labels


def of_voxloss(image: Tensor, overlap: float, fused: bool) -> Tensor:
    """Labels, of the network as it is or with a fused head."""
    net = fuse_head(network()) if fused else network()
    labels: Any = SlidingWindowLabels(WINDOW, 1, overlap, "gaussian")(image, net)
    assert isinstance(labels, Tensor)
    return labels


CONTENDERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "SlidingWindowInferer, argmax": of_monai,
    "SlidingWindowLabels": partial(of_voxloss, fused=False),
    "SlidingWindowLabels, fused head": partial(of_voxloss, fused=True),
}


def outcome(name: str, edge: int, overlap: float, seed: int) -> Outcome:
    """Run a contender once, after a small volume."""
    run, image = CONTENDERS[name], torch.randn(1, 1, *[edge] * 3, generator=torch.Generator().manual_seed(seed))
    found: list[Any] = []

    def timed() -> None:
        start = time.perf_counter()
        found.append(run(image, overlap).to(torch.uint8))
        found.append(time.perf_counter() - start)

    with torch.no_grad():
        run(image[..., :WINDOW, :WINDOW, :WINDOW], overlap)
        peak = resident_peak(timed)
    labels, seconds = found
    return Outcome(labels, seconds, peak)


def compare(edge: int = EDGE, rounds: int = ROUNDS, seed: int = 0) -> int:
    """Print peak memory and time of each; exit code 1 if labels differ by more than rounding."""
    console = results_console()
    console.print(
        f"labels of a volume of {edge}³, C = {CHANNELS}, {FEATURES} features, windows of {WINDOW}³, float32, "
        f"CPU, {torch.get_num_threads()} threads, medians of {rounds} rounds, each in a process of its own; "
        f"torch {torch.__version__}, MONAI {version('monai')}"
    )
    width = max(map(len, CONTENDERS))
    for overlap in OVERLAPS:
        console.print(f"overlap {overlap}")
        runs: dict[str, list[Outcome]] = {name: [] for name in CONTENDERS}
        for _ in range(rounds):
            for name, outcomes in runs.items():
                outcomes.append(apart(partial(outcome, name, edge, overlap, seed)))
        reference = next(iter(runs.values()))[0].labels
        for name, outcomes in runs.items():
            different = int((outcomes[0].labels != reference).sum())
            peaks = [each.peak for each in outcomes if each.peak is not None]
            peak = f"{statistics.median(peaks) / 2**20:6.0f} MiB" if peaks else "unknown on this system"
            seconds = statistics.median(each.seconds for each in outcomes)
            console.print(f"{name:{width}} {peak} {seconds:7.1f} s   {different} voxels differ from the first's")
            if different > DIFFERENT * reference.numel():
                return ExitCode.FAILED
    return ExitCode.DONE
