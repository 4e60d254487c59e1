"""What `voxloss doctor --gpu` found: the file gpu.json, and the lines that a table shows of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from voxloss_app.bench.timing import short
from voxloss_data.files import save_json

SCHEMA = 2
FILE = "gpu.json"


class StageState(str, Enum):
    """The outcome of a stage."""

    done = "done"
    wrong = "wrong"  # it ran, and found what must not be
    failed = "failed"  # an error ended it
    skipped = "skipped"
    not_run = "not run"


@dataclass
class StageReport:
    """One stage.

    Attributes:
        seconds: how long it ran; budget: how long it was allowed to.
        why: the error, or the reason why it was skipped or not run.
        facts: single values by their names.
        rows: what was measured, one case each.
        failures: what is wrong, in words.
        left: the cases that were not begun, as its time was over or its process ended.
        at: the case that was begun last.
        date, commit: of its run, as those of a report.
    """

    number: int
    name: str
    state: str = StageState.not_run.value
    seconds: float = 0.0
    budget: float = 0.0
    why: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    at: str = ""
    date: str = ""
    commit: str | None = None

    def take(self, event: Mapping[str, Any]) -> None:
        """Enter what a stage has sent, see `Notes`."""
        if "fact" in event:
            name, value = event["fact"]
            self.facts[name] = value
        elif "row" in event:
            self.rows.append(event["row"])
        elif "failure" in event:
            self.failures.append(event["failure"])
        elif "due" in event:
            self.left += event["due"]
        elif "begun" in event:
            self.at = event["begun"]
            self.left.remove(self.at)
        elif "skipped" in event:
            self.state, self.why = StageState.skipped.value, event["skipped"]
        elif "error" in event:
            self.state, self.why = StageState.failed.value, event["error"]

    def ended(self, why: str = "") -> None:
        """Record the outcome; `why`: what ended its process too early."""
        if why:
            self.state, self.why = StageState.failed.value, f"{why}, in {self.at}" if self.at else why
        elif self.state == StageState.not_run.value:
            self.state = StageState.wrong.value if self.failures else StageState.done.value

    @property
    def is_bad(self) -> bool:
        """Whether it found something wrong or was ended by an error."""
        return bool(self.failures) or self.state in (StageState.wrong.value, StageState.failed.value)


@dataclass
class GpuReport:
    """All stages, and where they ran.

    Attributes:
        date, command, commit: of the last run; a stage that it did not run may be of an earlier one.
        complete: all six ran to their ends, whatever they found.
    """

    date: str
    command: str
    commit: str | None
    versions: Mapping[str, str | None]
    machine: Mapping[str, str]
    stages: list[StageReport]
    complete: bool = False


def save(path: Path, report: GpuReport) -> None:
    """Write the file, atomically."""
    save_json(path, {"schema": SCHEMA, **asdict(report)})


def load(path: Path) -> GpuReport | None:
    """Read it; None if there is none, or it is damaged or of another schema."""
    try:
        content = json.loads(path.read_bytes())
        if content.pop("schema") != SCHEMA:
            return None
        stages = [StageReport(**stage) for stage in content.pop("stages")]
        return GpuReport(**content, stages=stages)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def lines(report: GpuReport) -> list[tuple[str, str, str]]:
    """Stage, case and result of each line of the table."""
    found = []
    for stage in report.stages:
        title = f"{stage.number} {stage.name}"
        state = stage.state if not stage.why else f"{stage.state}: {stage.why}"
        details = [f"{short(stage.seconds)} s"] if stage.seconds else []
        if stage.date and (stage.date, stage.commit) != (report.date, report.commit):
            details.append(f"of {stage.date}, commit {stage.commit or 'unknown'}")
        found.append((title, "", f"{state} ({'; '.join(details)})" if details else state))
        found += [("", case, result) for case, result in _SHOWN[stage.name](stage)]
        found += [("", "wrong", failure) for failure in stage.failures]
        if stage.left:
            found.append(("", "not run", f"{len(stage.left)}: {_few(stage.left)}"))
    return found


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _facts(stage: StageReport) -> Iterator[tuple[str, str]]:
    for name, value in stage.facts.items():
        yield name, str(value)


def _yardsticks(stage: StageReport) -> Iterator[tuple[str, str]]:
    yield from _facts(stage)
    for row in stage.rows:
        yield row["case"], row.get("why") or f"{short(row['value'])} {row['unit']}"


def _right(stage: StageReport) -> Iterator[tuple[str, str]]:
    if "compiled beforehand" in stage.facts:
        yield "compiled beforehand", stage.facts["compiled beforehand"]
    if "compared" in stage.facts:
        largest = stage.facts.get("largest error, share of the tolerance", 0.0)
        # A share that is no number comes as text.
        shown = short(largest) if isinstance(largest, float) else str(largest)
        of = stage.facts.get("largest error in", "none")
        yield (
            "compared with the reference",
            f"{stage.facts['compared']}; largest error {shown} of the tolerance ({of})",
        )


def _properties(stage: StageReport) -> Iterator[tuple[str, str]]:
    for row in stage.rows:
        yield row["case"], row["result"]


def _kernels(stage: StageReport) -> Iterator[tuple[str, str]]:
    """Where tiles were varied a line for each launch, for all others how far they are from the copy at most."""
    yield from _facts(stage)
    others = []
    for row in stage.rows:
        if row.get("why"):
            yield row["case"], row["why"]
        elif row.get("best"):
            best = row["best"]
            text = f"{short(row['GB/s'])} GB/s, {_percent(row['share of the copy'])} of the copy"
            text += f"; {row['tiling']}; best: {best['variation']}, {short(best['GB/s'])} GB/s"
            yield f"{row['case']}, {row['pass']}", text
        else:
            others.append(row)
    if others:
        least, *_, most = sorted([*others, others[0]], key=lambda row: float(row["share of the copy"]))
        shares = f"{_percent(least['share of the copy'])} to {_percent(most['share of the copy'])} of the copy"
        yield f"{len(others)} launches of other sizes", f"{shares}; least: {least['case']}, {least['pass']}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _steps(stage: StageReport) -> Iterator[tuple[str, str]]:
    yield from _facts(stage)
    for row in stage.rows:
        name = f"{row['case']}, {row['contender']}"
        if row.get("why"):
            yield name, row["why"]
            continue
        if "ms" not in row:
            kernels = row["kernels"]
            text = f"{kernels} kernels" if isinstance(kernels, int) else f"kernels {kernels}"
            text += f", {short(row['N'])} N at its peak, first call {short(row['first_call'])} s"
            yield f"{name}, {row['mode']}", "; ".join(filter(None, (text, row["note"])))
            continue
        median, low, high = row["ms"]
        text = f"{short(median)} ms ({short(low)}–{short(high)})"
        if row.get("ratio"):
            median, low, high = row["ratio"]
            text += f", {short(median)} × voxloss ({short(low)}–{short(high)})"
        yield f"{name}, {row['mode']}", f"{text}; floor {short(row['floor ms'])} ms"


_SHOWN = {
    "yardsticks": _yardsticks,
    "right": _right,
    "properties": _properties,
    "kernels": _kernels,
    "steps": _steps,
    "suite": _facts,
}


def plain(value: Any) -> Any:
    """A value as JSON has it everywhere: numbers that are not finite are text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value
