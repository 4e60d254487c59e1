"""performance.md, from the results alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from voxloss_app.bench import gpu_report
from voxloss_app.bench.cases import ALPHA, BETA, FAMILIES, GAMMA, SMOOTH, BenchCase
from voxloss_app.bench.contenders import COMPARED, CONTENDERS, FLOOR, OURS
from voxloss_app.bench.goals import judge
from voxloss_app.bench.gpu_report import GpuReport
from voxloss_app.bench.measure import STEPS_AHEAD
from voxloss_app.bench.results import BenchResult, Measurement, Run, State
from voxloss_app.bench.timing import ENOUGH_SECONDS, LEAST_ROUNDS, Spread, short
from voxloss_app.templates import environment
from voxloss_data.files import save_text
from voxloss_verify.tolerances import GRADIENT, LOSS

MARKS = {True: "✓", False: "✗", None: "–"}
_WORDS = {True: "✓ reached", False: "✗ missed", None: "– not measured"}
_NAMES = [contender.name for contender in CONTENDERS]
_HOST_BOUND = (
    "On a GPU the host is synchronised before each step: what it takes to launch the kernels is in the time."
)
_HOST_AHEAD = f"The host ahead: {STEPS_AHEAD} steps are enqueued, then synchronised once; time per step."

Cell = Callable[[BenchResult, str], str]


def write(out: Path, runs: Sequence[Run]) -> Path:
    """Write performance.md, with what is in gpu.json beside it; return its path."""
    path = out / "performance.md"
    save_text(path, render(runs, gpu_report.load(out / gpu_report.FILE)))
    return path


def render(runs: Sequence[Run], gpu: GpuReport | None = None) -> str:
    """The page about some runs, and about what `voxloss doctor --gpu` found if it ran."""
    templates = environment("bench", html=False)
    templates.filters["md"] = markdown
    verdicts = judge(runs)
    return templates.get_template("performance.md.j2").render(
        summary=[*_summary(runs)],
        chosen=[*_chosen(runs)],
        reached=sum(verdict.reached is True for verdict in verdicts),
        measured=sum(verdict.reached is not None for verdict in verdicts),
        goals=[
            {
                "text": verdict.goal.text,
                "bound": verdict.goal.shown,
                "shown": verdict.shown,
                "versions": verdict.versions,
                "mark": _WORDS[verdict.reached],
            }
            for verdict in verdicts
        ],
        runs=[_run(run) for run in runs],
        gpu=gpu,
        gpu_lines=gpu_report.lines(gpu) if gpu else [],
        on_gpu=any(run.device == "cuda" for run in runs),
        loss_tolerances=LOSS,
        gradient_tolerances=GRADIENT,
        alpha=ALPHA,
        beta=BETA,
        gamma=GAMMA,
        smooth=SMOOTH,
        least_rounds=LEAST_ROUNDS,
        enough_seconds=ENOUGH_SECONDS,
    )


def markdown(text: str) -> str:
    """Text as it is, in Markdown and within its tables."""
    return re.sub(r"([\\`*_\[\]<>|~])", r"\\\1", text)


# The rows of the first table: family and classes, each on 96³ voxels.
_FIRST = (("dice_ce", 2), ("dice_ce", 14), ("dice_ce", 118), ("dice", 14), ("dice_focal", 14))


def _timed(runs: Sequence[Run], device: str) -> list[BenchResult]:
    return [
        result
        for run in runs
        if run.device == device
        for result in run.results
        if result.case.timed and result.ratio("monai") is not None
    ]


def _summary(runs: Sequence[Run]) -> Iterator[str]:
    """What the figures amount to, one sentence for each device and for the memory."""
    for device in dict.fromkeys(run.device for run in runs):
        found = [(r, ratio.median) for r in _timed(runs, device) if (ratio := r.ratio("monai"))]
        if not found:
            continue
        ratios = [ratio for _, ratio in found]
        slower = [f"{FAMILIES[r.case.family]}, {describe(r.case)}" for r, ratio in found if ratio <= 1]
        faster = f"{len(found) - len(slower)} of {len(found)} cases"
        yield (
            f"{device.upper()}: faster than MONAI in {faster}. MONAI takes "
            f"{short(min(ratios))} to {short(max(ratios))} times as long as voxloss, in the median "
            f"{short(median(ratios))} times." + (f" Slower: {'; '.join(slower)}." if 0 < len(slower) <= 3 else "")
        )
        few = [ratio for result, ratio in found if result.case.channels <= 3]
        many = [ratio for result, ratio in found if result.case.channels >= 14]
        if few and many:
            yield (
                f"The more classes, the more it saves: in the median MONAI takes {short(median(few))} times as "
                f"long with 2 or 3 classes, {short(median(many))} times with 14 or more."
            )
        peaks = {name: [m for r, _ in found if (m := _peak(r, name)) is not None] for name in (OURS, "monai")}
        if all(peaks.values()):
            ours, theirs = (f"{median(each):.1f} N" for each in peaks.values())
            yield f"Memory beside the inputs, the gradient included: {ours} in the median, MONAI {theirs}."


def _peak(result: BenchResult, name: str) -> float | None:
    found = result.contenders.get(name)
    return None if found is None or found.peak is None else found.peak / result.case.logit_bytes


def _chosen(runs: Sequence[Run]) -> Iterator[dict[str, str]]:
    for family, channels in _FIRST:
        for result in _timed(runs, "cpu"):
            case = result.case
            usual = (case.dtype, case.label_dtype, case.one_hot) == ("float32", "int64", False)
            if usual and (case.family, case.channels, case.edge) == (family, channels, 96):
                time = result.time(OURS)
                yield {
                    "case": f"{FAMILIES[family]}, {case.activation}, {_size(case)}",
                    "time": f"{_milli(time)} ms" if time else "–",
                    **{name: _ratio(result, name) for name in ("monai", "monai_compiled", "plain_compiled")},
                    "memory": _memory(result, OURS),
                    "theirs": _memory(result, "monai"),
                }
                break


def _ratio(result: BenchResult, name: str) -> str:
    ratio = result.ratio(name)
    return f"{short(ratio.median)} ×" if ratio else "–"


def _run(run: Run) -> dict[str, Any]:
    timed = [result for result in run.results if result.case.timed]
    return {
        "device": run.device.upper(),
        "date": run.date,
        "command": run.command,
        "machine": run.machine,
        "versions": {name: version for name, version in run.versions.items() if version is not None},
        "missing": [name for name, version in run.versions.items() if version is None],
        "commit": run.commit,
        "settings": run.settings,
        "backends": sorted({result.backend for result in timed if result.backend}),
        "families": [
            _family(title, [result for result in timed if result.case.family == name], run.versions)
            for name, title in FAMILIES.items()
            if any(result.case.family == name for result in timed)
        ],
        "accuracy": [
            {
                "case": f"{FAMILIES[r.case.family]}, {_size(r.case)}, {_kind(r.case)}",
                "cells": [_error(r, n) for n in COMPARED],
            }
            for r in run.results
            if not r.case.timed
        ],
        "floors": _floors(timed),
        "compared": [_titles(run.versions)[name] for name in COMPARED],
        "floor": run.settings["floor"],
    }


def _floors(results: Sequence[BenchResult]) -> str:
    """The range of the floor of the most frequent size, if it is wide enough to mention."""
    times: dict[int, list[float]] = {}
    for result in results:
        times.setdefault(result.case.logit_bytes, []).extend(1000 * t for t in result.times(FLOOR))
    size, found = max(times.items(), key=lambda pair: len(pair[1]), default=(0, []))
    if not found or max(found) < 1.5 * min(found):
        return ""
    return f"{short(min(found))} to {short(max(found))} ms for N = {size / 2**20:.0f} MiB"


def _titles(versions: Mapping[str, str | None]) -> dict[str, str]:
    return {contender.name: contender.titled(versions) for contender in CONTENDERS}


def _family(title: str, results: Sequence[BenchResult], versions: Mapping[str, str | None]) -> dict[str, Any]:
    titles = _titles(versions)
    begun = [result for result in results if result.state == State.measured.value]
    names = [name for name in _NAMES if any(name in result.contenders for result in begun)]
    absent = [name for name in names if len(_reasons(begun, name)) == 1 and not _any_times(begun, name)]
    shown = [name for name in names if name not in absent]
    ahead = any(result.times(name, ahead=True) for result in begun for name in shown)

    def table(title: str, cell: Cell) -> dict[str, Any]:
        rows = [{"case": describe(r.case), "cells": [cell(r, name) for name in shown]} for r in begun]
        return {"title": title, "headings": [titles[name] for name in shown], "rows": rows}

    return {
        "title": title,
        "not_begun": [
            {"case": describe(r.case), "why": f"{r.state}: {r.why}"} for r in results if r not in begun
        ],
        "absent": [f"{titles[name]}: {_reasons(begun, name).pop()}" for name in absent],
        "notes": _notes(begun, {name: titles[name] for name in shown}),
        "tables": [
            {"intro": _HOST_BOUND if ahead else "", **table("", _headline)},
            *([{"intro": _HOST_AHEAD, **table("", partial(_headline, ahead=True))}] if ahead else []),
            table("Ratios: median (quartiles)", partial(_headline, quartiles=True)),
            table("Milliseconds: median (quartiles)", _milliseconds),
            *(
                [
                    table("Ratios with the host ahead", partial(_headline, ahead=True, quartiles=True)),
                    table("Milliseconds with the host ahead", partial(_milliseconds, ahead=True)),
                ]
                if ahead
                else []
            ),
            table("Peak extra memory in N, of torch's allocator", _memory),
            table("First call, in seconds", _first_call),
        ],
    }


def describe(case: BenchCase) -> str:
    """A case within its family."""
    return f"{case.activation}, {_size(case)}, {_kind(case)}"


def _kind(case: BenchCase) -> str:
    return f"{case.dtype}, {'one-hot' if case.one_hot else f'{case.label_dtype} labels'}"


def _size(case: BenchCase) -> str:
    return f"C = {case.channels}, {case.edge}³, B = {case.batch}"


def _or_why(result: BenchResult, name: str, shown: str | None) -> str:
    if shown is not None:
        return shown
    return "–" if name not in result.contenders else str(result.contenders[name])


def _headline(result: BenchResult, name: str, ahead: bool = False, quartiles: bool = False) -> str:
    """Ours in milliseconds and floors, others in times of ours."""
    ratio = result.over_floor(ahead=ahead) if name == OURS else result.ratio(name, ahead=ahead)
    time = result.time(name, ahead)
    if ratio is None or time is None:
        return _or_why(result, name, None)
    if name == OURS:
        return f"{_milli(time)} ms, {short(ratio.median)} × floor"
    return f"{short(ratio.median)} ×" + (f" ({short(ratio.low)}–{short(ratio.high)})" if quartiles else "")


def _milliseconds(result: BenchResult, name: str, ahead: bool = False) -> str:
    time = result.time(name, ahead)
    shown = f"{_milli(time)} ({short(1000 * time.low)}–{short(1000 * time.high)})" if time else None
    return _or_why(result, name, shown)


def _milli(time: Spread) -> str:
    return f"{short(1000 * time.median)}"


def _memory(result: BenchResult, name: str) -> str:
    found = result.contenders.get(name)
    if found is None or found.peak is None:
        return _or_why(result, name, None)
    return f"{found.peak / result.case.logit_bytes:.2f}"


def _first_call(result: BenchResult, name: str) -> str:
    found = result.contenders.get(name)
    if found is None or found.first_call is None or not found.times:
        return _or_why(result, name, None)
    return f"{found.first_call:.2g}"


def _error(result: BenchResult, name: str) -> str:
    found = result.contenders.get(name)
    if found is None or found.value_error is None:
        return result.why_not(name)
    return f"{found.value_error:.1e}"


def _any_times(results: Sequence[BenchResult], name: str) -> bool:
    return any(result.times(name) for result in results)


def _reasons(results: Sequence[BenchResult], name: str) -> set[str]:
    """Why a contender has no times, each reason once."""
    found: list[Measurement] = [r.contenders[name] for r in results if name in r.contenders]
    return {str(each) for each in found if each.state != State.measured.value}


def _notes(results: Sequence[BenchResult], titles: Mapping[str, str]) -> list[str]:
    notes = []
    for name, title in titles.items():
        counts = Counter(r.contenders[name].note for r in results if name in r.contenders)
        counts.pop("", None)
        notes += [f"{title}: {note} ({_cases(count)})" for note, count in counts.items()]
    return notes


def _cases(count: int) -> str:
    return "1 case" if count == 1 else f"{count} cases"
