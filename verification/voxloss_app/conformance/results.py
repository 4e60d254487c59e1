"""The records of each loss, as data to show and to keep."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import voxloss
import voxloss_data
import voxloss_verify
from voxloss_app.conformance.losses import ExaminedLoss
from voxloss_app.finished import digest
from voxloss_verify.check import run_checks
from voxloss_verify.laws import LAWS, METRIC_LAWS
from voxloss_verify.laws.law import Law
from voxloss_verify.laws.record import LITERAL, Record, Status
from voxloss_verify.laws.setting import Setting
from voxloss_verify.request import Level, ProfileName
from voxloss_verify.subject.metric import as_metric, is_metric
from voxloss_verify.subject.subject import TargetError, subject_of

# Of a file on this machine only its name is shown, and so of a function; of an object in memory no address.
_FOLDERS = re.compile(r"(?<![\w:./])(?:~|[A-Za-z]:)?(?:/[\w.+@-]+)+/(?=[\w.+@-]+)")
_FUNCTION = re.compile(r"<(?:function|built-in \w+) ([\w.]+)[^<>]* at 0x[0-9a-f]+>")
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}\b")


@dataclass(frozen=True)
class Cell:
    """The check of one law on one loss.

    Attributes:
        reason: of a broken law what was expected and received, of one that does not apply why not.
        where: the volume that broke it.
        snippet: Python that shows the broken law.
        severity: of a broken law its level: formula, numerics or interface; else empty.
        size: of a broken law, by which share of the largest expected number the worst one is off; None if it is
            no number that is off.
    """

    law: str
    status: str
    reason: str = ""
    where: str = ""
    snippet: str = ""
    severity: str = ""
    size: float | None = None


@dataclass(frozen=True)
class Row:
    """One loss: a cell for each law; or `error`, why it could not be constructed or called, and no cells."""

    examined: ExaminedLoss
    cells: Sequence[Cell]
    error: str = ""

    def count(self, status: Status) -> int:
        """How many laws have this status."""
        return sum(cell.status == status.value for cell in self.cells)

    def broken(self, *levels: Level) -> list[Cell]:
        """The broken laws of these levels, as far as a formula that is only inaccurate counts as numerics."""
        return [cell for cell in self.cells if cell.severity in [level.value for level in levels]]


def to_json(row: Row) -> dict[str, Any]:
    """A row as plain data."""
    return {"source": row.examined.source, "error": row.error, "cells": [asdict(cell) for cell in row.cells]}


def from_json(examined: ExaminedLoss, content: Mapping[str, Any]) -> Row:
    """The row of a loss from plain data."""
    return Row(examined, [Cell(**cell) for cell in content["cells"]], content["error"])


def name_of(examined: ExaminedLoss, depends_on: str) -> str:
    """Under which name the row of a loss is kept."""
    return f"{examined.library.lower()}-{examined.name}-{digest([depends_on, examined.source])[:16]}"


# What the suite is built on, beside the library that is examined; and what of the suite no record depends on.
BUILT_ON = ("torch", "NumPy", "Hypothesis", "Python")
ELSEWHERE = ("mutants", "pytest_plugin.py", "xfails.py", "verification.py", "request.py", "forms.py")


def depends_on(library: str, versions: Mapping[str, str | None], profile: ProfileName, seed: int) -> str:
    """A hash of what the records of a library's losses depend on.

    That is its version and those of what the suite is built on, the profile, the seed, and the sources of the
    suite and its data; of voxloss's losses, also those of voxloss.
    """
    known = {name: versions.get(name) for name in (library, *BUILT_ON)}
    sources: list[Path] = [Path(__file__)]
    for package in (voxloss_verify, voxloss_data, *([voxloss] if library == "voxloss" else [])):
        (folder,) = map(Path, package.__path__)
        found = (path for path in folder.rglob("*.py") if path.relative_to(folder).parts[0] not in ELSEWHERE)
        sources += sorted(found)
    return digest([known, profile, seed], sources)


def examine(
    examined: ExaminedLoss,
    laws: Sequence[Law],
    setting: Setting,
    profile: ProfileName,
    starting: Callable[[Law], None] = lambda law: None,
) -> Row:
    """Run those of the checks that are of its kind, loss or metric; `starting` is called before each."""
    module, _, name = examined.target.partition(":")
    try:
        subject = subject_of(getattr(import_module(module), name), kwargs=examined.kwargs)
        subject = as_metric(replace(subject, source=examined.source))
        known = METRIC_LAWS if is_metric(subject.claims) else LAWS
        records = list(run_checks(subject, setting, _announced([law for law in laws if law in known], starting)))
    except TargetError as error:
        return Row(examined, [], _anywhere(str(error)))
    return Row(examined, [_cell(examined, record, profile, setting.seed) for record in records])


def _announced(laws: Sequence[Law], starting: Callable[[Law], None]) -> Iterator[Law]:
    for law in laws:
        starting(law)
        yield law


def _cell(examined: ExaminedLoss, record: Record, profile: ProfileName, seed: int) -> Cell:
    return Cell(
        record.law,
        record.status.value,
        _anywhere(record.reason),
        record.worst_where if record.status is Status.broken else "",
        _anywhere(_snippet(examined, record, profile, seed)),
        record.level.value if record.status is Status.broken else "",
        _size(record),
    )


def _size(record: Record) -> float | None:
    worst = record.worst
    if record.status is not Status.broken or worst is None or worst.expected is None:
        return None
    size = worst.error / (worst.magnitude or 1.0)
    return size if math.isfinite(size) else None


def _snippet(examined: ExaminedLoss, record: Record, profile: ProfileName, seed: int) -> str:
    """Python that shows a broken law: on its volume, or by checking again if that is too large to write out."""
    example = record.counterexample
    if example is None:
        return ""
    volumes = [example.volume] if example.other is None else [example.volume, example.other]
    if all(max(volume.input.size, volume.target.size) <= LITERAL for volume in volumes):
        return example.snippet()
    kwargs = examined.call.removeprefix(f"{examined.name}(").removesuffix(")")
    return "\n".join(
        [
            examined.imports,
            "from voxloss_verify import check_loss",
            f"kwargs = dict({kwargs})",
            f"options = dict(laws=[{record.law!r}], profile={profile!r}, seed={seed})",
            f"(record,) = check_loss({examined.name}, kwargs=kwargs, **options)",
            "print(record.status.value, record.reason, sep=': ')",
        ]
    )


def _anywhere(text: str) -> str:
    """A text without what is true on this machine only."""
    return _ADDRESS.sub("0x…", _FUNCTION.sub(r"\1", _FOLDERS.sub("", text)))


def plain(row: Row) -> dict[str, Any]:
    """A row for the templates."""
    return {
        "name": row.examined.name,
        "label": row.examined.label,
        "call": row.examined.call,
        "imports": row.examined.imports,
        "error": row.error,
        "counts": {
            status.value: row.count(status) for status in (Status.holds, Status.broken, Status.not_applicable)
        },
        "cells": [asdict(cell) for cell in row.cells],
        "severities": {level.value: len(row.broken(level)) for level in Level},
    }
