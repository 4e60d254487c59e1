"""What a loss costs in a study: its time and memory alone, and those of a whole step, beside no other work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from voxloss_app.bench.memory import allocated_peak
from voxloss_app.bench.timing import interleaved, seconds
from voxloss_app.study.contenders import Contender
from voxloss_app.train.network import Steps, network_of
from voxloss_app.train.plan import Plan

ROUNDS = 15


@dataclass(frozen=True)
class Cost:
    """Seconds of each round, and bytes at the peak.

    Attributes:
        loss_times: forward and backward of the loss, to the gradient of the logits.
        step_times: a whole step: network, loss, gradients, optimiser.
        loss_peak: allocated at once beyond logits and labels, the gradient included.
        step_peak: allocated at once beyond network, optimiser's state and batch.
    """

    contender: Contender
    loss_times: Sequence[float]
    step_times: Sequence[float]
    loss_peak: int
    step_peak: int

    @property
    def share(self) -> float:
        """The loss's part of a step, of the medians."""
        return median(self.loss_times) / median(self.step_times)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "contender": vars(self.contender)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Cost:
        """From plain data. Raises KeyError or TypeError if it is not what `to_json` wrote."""
        return cls(**{**content, "contender": Contender(**content["contender"])})


def measure(plan: Plan, contenders: Sequence[Contender], device: str, rounds: int = ROUNDS) -> list[Cost]:
    """Measure all contenders in turns, on random batches of the plan's shape."""
    place = torch.device(device)
    chance = torch.Generator().manual_seed(plan.seed)
    image = torch.randn(plan.batch, plan.channels, *plan.patch, generator=chance).to(place)
    classes = len(plan.labels)
    label = torch.randint(classes, (plan.batch, 1, *plan.patch), generator=chance).float().to(place)
    logits = torch.randn(plan.batch, classes, *plan.patch, generator=chance).to(place).requires_grad_()
    losses: dict[str, Callable[[], None]] = {}
    steps: dict[str, Callable[[], object]] = {}
    for contender in contenders:
        criterion = contender.criterion()
        losses[contender.title] = partial(_backward, criterion, logits, label)
        torch.manual_seed(plan.seed)
        trained = Steps(plan, network_of(plan).to(place), criterion, place, total=10**9)
        steps[contender.title] = partial(trained.take, image, label, 0)
    times = {}
    kinds: tuple[Mapping[str, Callable[[], object]], ...] = (losses, steps)
    for number, runs in enumerate(kinds):
        for run in runs.values():
            run()  # compiles, and makes the optimiser's state
        timed = {title: partial(seconds, run, place.type) for title, run in runs.items()}
        times[number] = interleaved(timed, rounds, plan.seed)
    found = []
    for each in contenders:
        peaks = []
        for runs in kinds:
            logits.grad = None
            peaks.append(allocated_peak(runs[each.title], place.type))
        found.append(Cost(each, times[0][each.title], times[1][each.title], *peaks))
    return found


def _backward(criterion: torch.nn.Module, logits: Tensor, label: Tensor) -> None:
    logits.grad = None
    criterion(logits, label).backward()
