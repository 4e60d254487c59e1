"""The stages of `voxloss doctor --gpu`, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from voxloss_app.doctor import kernels, properties, right, steps, suite, yardsticks
from voxloss_app.doctor.notes import Notes, Sizes
from voxloss_app.doctor.place import Place


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        seconds: its share of the ten minutes.
        run: writes what it finds into the notes.
        launches: functions that prepare what it will launch, to be compiled beforehand by parallel processes.
    """

    name: str
    seconds: float
    run: Callable[[Place, Sizes, Notes], None]
    launches: Callable[[Sizes], Iterator[Any]] | None = None


STAGES = (
    Stage("yardsticks", 30, yardsticks.yardsticks),
    Stage("right", 140, right.right, right.launches),
    Stage("properties", 80, properties.properties),
    Stage("kernels", 140, kernels.kernels, kernels.launches),
    Stage("steps", 110, steps.steps),
    Stage("suite", 80, suite.suite),
)
TOTAL = sum(stage.seconds for stage in STAGES)
