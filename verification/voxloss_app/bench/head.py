"""`voxloss bench --head`: logits that are never whole, beside a convolution and a loss: time and memory.

`head_time` and `head_memory` make the rows. Each case has a process of its own, in which nothing has run before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

import voxloss
from voxloss_app.bench import head_memory, head_time
from voxloss_app.bench.head_memory import StepCase, StepMemory
from voxloss_app.bench.head_picture import memory_png
from voxloss_app.bench.head_time import (
    CLASSES,
    CONTENDERS,
    DICE_CE,
    EDGE,
    FEATURES,
    ROUNDS,
    HeadMeasurement,
    HeadTimes,
)
from voxloss_app.bench.machine import commit, machine, versions
from voxloss_app.bench.own_process import SETTINGS, apart
from voxloss_app.bench.page import MARKS, markdown
from voxloss_app.bench.results import State
from voxloss_app.bench.timing import short
from voxloss_app.exits import ExitCode
from voxloss_app.finished import Finished, digest, interrupted
from voxloss_app.templates import environment
from voxloss_app.terminal import is_quiet, results_console
from voxloss_app.theme import THEMES
from voxloss_data.files import save_bytes, save_json, save_text
from voxloss_verify.tolerances import GRADIENT, LOSS

SCHEMA, FILE = 1, "head.json"
BY_CLASSES = "DynUNet"  # the network whose memory is counted with several numbers of classes


@dataclass(frozen=True)
class HeadRequest:
    """The choice of the command line.

    Attributes:
        channels: numbers of classes of times and memory; without any, the default ones of each.
        features, edge: of the times; those of the memory are fixed.
        rounds: of the times.
        pattern: "time" or "memory", or * and ? in them: only that table.
        out: where the files go.
        fresh: measure again what an interrupted run has measured.
    """

    channels: Sequence[int] = ()
    features: int = FEATURES
    edge: int = EDGE
    rounds: int = ROUNDS
    seed: int = 0
    pattern: str | None = None
    out: Path = Path("out")
    fresh: bool = False

    @property
    def command(self) -> str:
        """The command line that measures the same figures."""
        usual = HeadRequest()
        parts = ["voxloss bench --head", *(f"--classes {each}" for each in self.channels)]
        for option in ("features", "edge", "rounds", "seed"):
            value = getattr(self, option)
            parts += [] if value == getattr(usual, option) else [f"--{option} {value}"]
        return " ".join([*parts, *([] if self.pattern is None else [f"--only '{self.pattern}'"])])


@dataclass(frozen=True)
class Part:
    """One of the two: how it was made, and its rows as plain data."""

    date: str
    command: str
    machine: Mapping[str, str]
    versions: Mapping[str, str | None]
    commit: str | None
    settings: Mapping[str, Any]
    rows: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Grid:
    """A table, on the terminal and on the page."""

    title: str
    headings: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)


def compare(request: HeadRequest) -> int:
    """Measure, print, and write head.json and head.md, in which a part that is not measured now is kept.

    Returns the exit code: 1 if voxloss was wrong or failed anywhere. Raises ValueError for another pattern.
    """
    wanted = [part for part in _PARTS if fnmatchcase(part, f"*{request.pattern or ''}*")]
    if not wanted:
        raise ValueError(f"--only: expected {' or '.join(_PARTS)} with --head, received {request.pattern!r}.")
    console = results_console()
    request.out.mkdir(parents=True, exist_ok=True)
    kept = Finished(request.out, "head")
    made, count = {}, 0
    try:
        for part in wanted:
            rows: list[dict[str, Any]] = []
            for title, facts, measure in _PARTS[part][0](request):
                rows.append(_row(request, kept, title, facts, measure))
                count += 1
            made[part] = _part(request, rows)
    except KeyboardInterrupt:
        total = sum(1 for part in wanted for _ in _PARTS[part][0](request))
        console.print(interrupted(count, total, "cases", kept))
        return ExitCode.INTERRUPTED
    for name, shown in made.items():
        for grid in _PARTS[name][1](shown.rows):
            table = Table(*grid.headings, title=grid.title, title_justify="left", box=None, pad_edge=False)
            for row in grid.rows:
                table.add_row(*row)
            console.print(table)
            console.print()
    file, page = request.out / FILE, request.out / "head.md"
    parts = {**load(file), **made}
    save_json(file, {"schema": SCHEMA, **{name: vars(part) for name, part in parts.items()}})
    save_text(page, render(parts))
    written = [file, page]
    classes = by_classes([*map(head_memory.from_json, parts["memory"].rows)]) if "memory" in parts else {}
    if classes:  # with one number of them there is nothing to draw
        for name, theme in THEMES.items():
            written.append(request.out / f"head-memory-{name}.png")
            save_bytes(written[-1], memory_png(classes, theme))
    console.print(*(f"written: {path}" for path in written), sep="\n")
    return ExitCode.FAILED if any(map(_is_broken, made.values())) else ExitCode.DONE


def load(path: Path) -> dict[str, Part]:
    """Read head.json; nothing if there is no such file, or it is of another schema."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    if content.pop("schema", None) != SCHEMA:
        return {}
    return {name: Part(**part) for name, part in content.items()}


def render(parts: Mapping[str, Part]) -> str:
    """The page."""
    templates = environment("bench", html=False)
    templates.filters["md"] = markdown
    return templates.get_template("head.md.j2").render(
        parts={name: parts.get(name) for name in _PARTS},
        grids={name: [*_PARTS[name][1](part.rows)] for name, part in parts.items()},
        tiles=head_memory.TILES // 2**20,
        loss=LOSS,
        gradient=GRADIENT,
    )


def _part(request: HeadRequest, rows: Sequence[dict[str, Any]]) -> Part:
    settings = {
        "rounds": request.rounds,
        "threads": torch.get_num_threads(),
        "seed": request.seed,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", SETTINGS["OMP_WAIT_POLICY"]),
    }
    today = datetime.now(timezone.utc).date().isoformat()
    return Part(today, request.command, machine("cpu"), versions(), commit(), settings, rows)


# What is measured.


class _Case(NamedTuple):
    """A row that is to be measured: its name, what it depends on, and what measures it."""

    title: str
    facts: Any
    measure: Callable[[], Any]


def _time_cases(request: HeadRequest) -> Iterator[_Case]:
    for case in head_time.cases(request.channels or CLASSES, request.features, request.edge):
        measure = partial(apart, partial(head_time.measure, case, request.rounds, request.seed))
        yield _Case(f"{case.loss}, C = {case.channels}", [vars(case), request.rounds, request.seed], measure)


def _memory_cases(request: HeadRequest) -> Iterator[_Case]:
    channels = request.channels or head_memory.CLASSES
    for case in head_memory.cases(channels):
        title = f"{case.network}, C = {case.channels}, {case.loss}"
        yield _Case(title, ["counted", vars(case)], partial(head_memory.count, case))
    for case in head_memory.cpu_cases(max(channels)):
        title = f"{case.network} on the CPU, {case.loss}"
        yield _Case(title, ["measured", vars(case)], partial(apart, partial(head_memory.measure, case)))


def _row(
    request: HeadRequest, kept: Finished, title: str, facts: Any, measure: Callable[[], Any]
) -> dict[str, Any]:
    """As plain data; what an earlier run with the same source, machine and versions has measured stays."""
    (package,) = map(Path, voxloss.__path__)
    own = [Path(str(module.__file__)) for module in (head_memory, head_time)]
    depends_on = [facts, torch.get_num_threads(), machine("cpu"), versions()]
    name = digest(depends_on, [*package.rglob("*.py"), *own])[:16]
    found: dict[str, Any] | None = None if request.fresh else kept.read(name, dict)
    if found is None:
        if not is_quiet():
            results_console().print(title)
        found = measure().to_json()
        kept.write(name, found)
    return found


def _is_broken(part: Part) -> bool:
    states = {
        found["state"]
        for row in part.rows
        for name, found in row.get("contenders", {}).items()
        if "fused" in name or "voxloss" in name
    }
    return bool(states & {State.wrong.value, State.failed.value})


# What is shown.

# What the times should be of those of the fused head, by classes: convolution and voxloss, convolution and MONAI.
_NEVER_SLOWER = 1 / 1.05
_MOST_FOR_FEW = 14
_GOALS = {
    118: {head_time.UNFUSED: 2.0, head_time.MONAI: 5.0},
    42: {head_time.UNFUSED: 1.3, head_time.MONAI: 3.0},
}


def _goal(found: HeadTimes, name: str) -> str:
    """The bound and whether it was reached, of what has one."""
    case = found.case
    few = {head_time.UNFUSED: _NEVER_SLOWER} if case.channels <= _MOST_FOR_FEW else {}
    bound = _GOALS.get(case.channels, few).get(name) if case.loss == DICE_CE else None
    ratio = found.ratio(name, CONTENDERS[name].beside) if bound else None
    return f"≥ {short(bound)} × {MARKS[ratio.median >= bound]}" if bound and ratio else ""


def _time_grids(rows: Sequence[dict[str, Any]]) -> Iterator[Grid]:
    headings = ["C", "", "ms (quartiles)", "times of fused", "goal", "peak MiB"]
    headings += ["value off by", "gradient by features", "by weights"]
    found = [head_time.from_json(row) for row in rows]
    for loss in dict.fromkeys(each.case.loss for each in found):
        of_loss = [each for each in found if each.case.loss == loss]
        case = of_loss[0].case
        size = f"F = {case.features}, {case.edge}³, B = 1, float32, int64 labels"
        grid = Grid(f"Convolution 1×1×1 and {loss}, forward and backward, {size}", headings)
        for each in of_loss:
            for name, measured in each.contenders.items():
                grid.rows.append([str(each.case.channels), name, *_time_cells(each, name, measured)])
        yield grid


def _time_cells(found: HeadTimes, name: str, measured: HeadMeasurement) -> list[str]:
    time = head_time.milliseconds(measured)
    to = CONTENDERS[name].beside if name in CONTENDERS else ""
    ratio = found.ratio(name, to)
    errors = measured.value_error, measured.gradient_error, measured.weight_error
    no_time = "" if measured.state == State.measured.value else str(measured)
    return [
        f"{short(time.median)} ({short(time.low)}–{short(time.high)})" if time else no_time,
        f"{short(ratio.median)} × ({short(ratio.low)}–{short(ratio.high)})" if ratio else "",
        _goal(found, name),
        "" if measured.peak is None else f"{measured.peak / 2**20:.0f}",
        *("" if error is None else f"{error:.1e}" for error in errors),
    ]


def _memory_grids(rows: Sequence[dict[str, Any]]) -> Iterator[Grid]:
    found = [*map(head_memory.from_json, rows)]
    classes = by_classes(found)
    columns = sorted({channels for counted in classes.values() for channels in counted})
    if columns:
        title = f"Peak memory of a training step by classes: {BY_CLASSES}, 128³, B = 2, float32, counted, GiB"
        grid = Grid(title, ["loss", *(f"C = {channels}" for channels in columns)])
        for loss, counted in classes.items():
            grid.rows.append([loss, *(_gib(counted.get(channels)) for channels in columns)])
        yield grid
    by_size: dict[str, list[StepMemory]] = {}
    for each in found:
        case = each.case
        if _is_usual(case) and case.channels in columns[:-1]:
            continue  # it is in the table above
        filters = " ".join(map(str, case.filters))
        size = f"C = {case.channels}, {case.edge}³, B = {case.batch}, float32, filters {filters}"
        by_size.setdefault(f"Peak memory of a training step: {case.network}, {size}", []).append(each)
    for title, steps in by_size.items():
        on_cpu = any(each.allocated for each in steps)
        headings = ["loss", "counted, GiB", "tiles at most, GiB", "largest tensor, GiB"]
        grid = Grid(title, [*headings, *(["allocated on the CPU, GiB", "resident, GiB"] if on_cpu else [])])
        for each in steps:
            sizes = [each.counted, each.tiles or None, each.largest]
            sizes += [each.allocated, each.resident] if on_cpu else []
            cells = [each.why, *[""] * (len(sizes) - 1)] if each.why else [*map(_gib, sizes)]
            grid.rows.append([each.case.loss, *cells])
        yield grid


def by_classes(found: Sequence[StepMemory]) -> dict[str, dict[int, int]]:
    """For each loss the counted bytes of the same step by the number of classes."""
    classes: dict[str, dict[int, int]] = {}
    for each in found:
        if each.counted is not None and _is_usual(each.case):
            classes.setdefault(each.case.loss, {})[each.case.channels] = each.counted
    return {loss: counted for loss, counted in classes.items() if len(counted) > 1}


def _is_usual(case: StepCase) -> bool:
    """Whether only loss and classes are its own."""
    usual = StepCase(BY_CLASSES, "")
    return replace(case, loss="", channels=usual.channels) == usual


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"


Rows = Sequence[dict[str, Any]]
# Each with its cases, and what shows their rows.
_PARTS: dict[str, tuple[Callable[[HeadRequest], Iterator[_Case]], Callable[[Rows], Iterator[Grid]]]] = {
    "time": (_time_cases, _time_grids),
    "memory": (_memory_cases, _memory_grids),
}
