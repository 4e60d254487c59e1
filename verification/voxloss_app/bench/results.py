"""What is kept of a run: figures as they were taken, so that pages and goals can be made from the file alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from voxloss_app.bench.cases import BenchCase
from voxloss_app.bench.contenders import COPY, FLOOR, OURS, copied_share
from voxloss_app.bench.timing import Spread, ratios, spread
from voxloss_data.files import save_json

SCHEMA = 2


class State(str, Enum):
    """What became of a contender, or of a case."""

    measured = "measured"
    wrong = "wrong"
    failed = "failed"
    skipped = "skipped"


@dataclass(frozen=True)
class Measurement:
    """One contender in one case.

    Attributes:
        state: only what is measured has times.
        why: of every other state.
        note: a remark.
        value_error, gradient_error: distance from the exact ones, as `exact.errors` has it; None of yardsticks.
        first_call: seconds, with whatever is compiled or loaded by it.
        peak: bytes that torch's allocator gave out at once beyond the inputs, the gradient included.
        resident: the same as the system sees the process; None where that means nothing.
        times: seconds per round, in the order of the rounds; on a GPU with a synchronisation before each step.
        ahead: on a GPU, seconds per step of many that are enqueued at once, per round.
    """

    state: str
    why: str = ""
    note: str = ""
    value_error: float | None = None
    gradient_error: float | None = None
    first_call: float | None = None
    peak: int | None = None
    resident: int | None = None
    times: Sequence[float] = ()
    ahead: Sequence[float] = ()

    def __str__(self) -> str:
        return self.state if self.state == State.measured.value else f"{self.state}: {self.why}"


@dataclass(frozen=True)
class BenchResult:
    """One case: what became of every contender, or why there are none.

    Attributes:
        backend: the one that voxloss chose.
        exact: the exact value of the loss.
    """

    case: BenchCase
    state: str
    why: str = ""
    backend: str = ""
    exact: float | None = None
    contenders: Mapping[str, Measurement] = field(default_factory=dict)

    def times(self, name: str, ahead: bool = False) -> Sequence[float]:
        """Seconds per round; none of what was not measured. Those of the copy are of the floor's bytes."""
        found = self.contenders.get(name)
        if found is None:
            return ()
        share = copied_share(self.case) if name == COPY else 1.0
        return [seconds * share for seconds in (found.ahead if ahead else found.times)]

    def time(self, name: str, ahead: bool = False) -> Spread | None:
        """Seconds of a contender."""
        times = self.times(name, ahead)
        return spread(times) if times else None

    def ratio(self, name: str, to: str = OURS, ahead: bool = False) -> Spread | None:
        """How many times as long as another it took, round by round."""
        above, below = self.times(name, ahead), self.times(to, ahead)
        return ratios(above, below) if above and below else None

    def over_floor(self, name: str = OURS, ahead: bool = False) -> Spread | None:
        """How many times the floor."""
        return self.ratio(name, FLOOR, ahead)

    def peak(self, name: str) -> float | None:
        """Peak extra memory in sizes of the logits, the larger of the allocator's and the system's."""
        found = self.contenders.get(name)
        if found is None or found.peak is None:
            return None
        return max(found.peak, found.resident or 0) / self.case.logit_bytes

    def why_not(self, name: str) -> str:
        """Why there are no figures of a contender."""
        if self.state != State.measured.value:
            return f"{self.state}: {self.why}"
        found = self.contenders.get(name)
        return "not in this run" if found is None else str(found)


@dataclass(frozen=True)
class Run:
    """All cases of a run, and where it ran."""

    device: str
    date: str
    command: str
    machine: Mapping[str, str]
    versions: Mapping[str, str | None]
    commit: str | None
    settings: Mapping[str, Any]
    results: Sequence[BenchResult]


def to_json(result: BenchResult) -> dict[str, Any]:
    """A result as plain data."""
    return {"id": result.case.id, **asdict(result)}


def from_json(content: Mapping[str, Any]) -> BenchResult:
    """A result from plain data."""
    contenders = {name: Measurement(**measured) for name, measured in content["contenders"].items()}
    fields = {name: value for name, value in content.items() if name not in ("id", "case", "contenders")}
    return BenchResult(case=BenchCase(**content["case"]), contenders=contenders, **fields)


def save_runs(path: Path, runs: Sequence[Run]) -> None:
    """Write performance.json."""
    plain = [{**vars(run), "results": [to_json(result) for result in run.results]} for run in runs]
    save_json(path, {"schema": SCHEMA, "runs": plain})


def load_runs(path: Path) -> list[Run]:
    """Read performance.json; none if there is no such file, or it is of another schema."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    if content.get("schema") != SCHEMA:
        return []
    return [
        Run(**{**run, "results": [from_json(result) for result in run["results"]]}) for run in content["runs"]
    ]
