"""What the stages of `voxloss doctor --gpu` write down, and how large they are."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from voxloss_app.bench.contenders import Unavailable, first_line
from voxloss_app.bench.gpu_report import plain

T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """How large everything is; a test takes less.

    Attributes:
        copied: bytes of the yardsticks; operations: how many tiny ones are timed at once.
        classes, edge: of the volumes that are compared with the reference.
        runs: how many of them must have equal bits.
        large: classes and edge of a volume of more than 2³¹ elements.
        kernel_classes, kernel_edges, kernel_batches: of the kernels that are timed alone.
        step_classes, step_edge: of whole steps; rounds: how often each is timed; steps: how many are enqueued.
    """

    copied: int = 1 << 30
    operations: int = 1000
    classes: Sequence[int] = (2, 4, 14, 16, 17, 32, 118, 220, 600)
    edge: int = 33
    runs: int = 20
    large: Sequence[int] = (118, 270)
    kernel_classes: Sequence[int] = (14, 4, 118)
    kernel_edges: Sequence[int] = (128, 96, 127)
    kernel_batches: Sequence[int] = (2, 1)
    step_classes: int = 14
    step_edge: int = 128
    rounds: int = 9
    steps: int = 20


class Notes:
    """Where a stage writes its results, and reads how much time is left.

    Every entry is sent at once: nothing is lost if a stage crashes the device.
    """

    def __init__(
        self,
        send: Callable[[Mapping[str, Any]], None],
        deadline: float = float("inf"),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._send, self._deadline, self._clock = send, deadline, clock

    def fact(self, name: str, value: Any) -> None:
        """A single value."""
        self._send({"fact": [name, plain(value)]})

    def row(self, **values: Any) -> None:
        """One case that was measured."""
        self._send({"row": plain(values)})

    def failure(self, text: str) -> None:
        """Something that is wrong."""
        self._send({"failure": text})

    def due(self, names: Sequence[str]) -> None:
        """Cases that are to be tried: those that are never begun are in the report."""
        self._send({"due": list(names)})

    def begun(self, name: str) -> None:
        """One of them is tried now: if it takes the process down with it, the report names it."""
        self._send({"begun": name})

    def skip(self, why: str) -> None:
        """The whole stage is not for this machine."""
        self._send({"skipped": why})

    def error(self, error: BaseException) -> None:
        """What ended the stage."""
        self._send({"error": described(error)})

    def progress(self, share: float, what: str) -> None:
        """How far it is."""
        self._send({"progress": [share, what]})

    def seconds_left(self) -> float:
        """Until the stage must come to its end."""
        return self._deadline - self._clock()

    def in_time(self, cases: Iterable[T], name: Callable[[T], str], takes: float = 0.0) -> Iterator[T]:
        """One case after the other as long as there is time; those that are not begun are in the report.

        `takes`: the seconds without which none is begun, where a case takes long.
        """
        every = list(cases)
        self.due([*map(name, every)])
        for number, case in enumerate(every):
            if self.seconds_left() <= takes:
                return
            self.begun(name(case))
            self.progress(number / len(every), name(case))
            yield case

    def attempt(self, name: str, action: Callable[[], None]) -> bool:
        """Do something; what it raises is a failure of this name, or a row if it cannot be done here."""
        try:
            action()
        except Unavailable as error:
            self.row(case=name, result=f"skipped: {error}", why=f"skipped: {error}")
        except Exception as error:
            self.failure(f"{name}: {described(error)}")
        else:
            return True
        return False


def described(error: BaseException) -> str:
    """An error in a line, and where it was raised; a report may be published, so it names no folder of a user."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{first_line(error)}{where}".replace(str(Path.home()), "~")
