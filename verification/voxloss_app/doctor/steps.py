"""Stage 5: whole steps, forward and backward, of voxloss and of MONAI: how long, and with how many kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial

from torch import Tensor

from voxloss_app.bench import timing
from voxloss_app.bench.cases import BenchCase, tensors
from voxloss_app.bench.contenders import CONTENDERS, OURS, Step, Unavailable, first_line
from voxloss_app.bench.exact import exact
from voxloss_app.bench.machine import versions
from voxloss_app.bench.measure import examine
from voxloss_app.bench.results import Measurement
from voxloss_app.doctor.notes import Notes, Sizes, described
from voxloss_app.doctor.place import Place, copy_speed

# Those that are compiled, which takes most of the time, come when all others have their figures.
ROUNDS = ((OURS, "monai"), (OURS, "monai_compiled"))
# Seconds without which torch.compile is not begun: a process that is ended in the midst of it has no figures.
_COMPILES = 20.0
BOUND, AHEAD, GRAPH, ONCE = "host-bound", "host ahead", "graph", "one step"


def cases(place: Place, sizes: Sizes) -> list[BenchCase]:
    """The most usual first."""
    kinds = [("float32", "int64"), ("float32", "uint8")]
    kinds += [("bfloat16", "int64")] if place.device.type == "cuda" else []
    return [
        BenchCase(
            family,
            "softmax",
            sizes.step_classes,
            sizes.step_edge,
            label_dtype=labels,
            dtype=dtype,
            device=place.device.type,
        )
        for dtype, labels in kinds
        for family in ("dice", "dice_ce")
    ]


def steps(place: Place, sizes: Sizes, notes: Notes) -> None:
    """Time every case; a contender that is wrong has no times."""
    copied = copy_speed(place, sizes.copied)
    notes.fact("copy, GB/s", round(copied / 1e9, 1))
    todo = {f"{case.id}, {names[-1]}": (case, names) for names in ROUNDS for case in cases(place, sizes)}
    for name in notes.in_time(todo, str):
        if not notes.attempt(name, lambda name=name: _case(*todo[name], place, sizes, notes, copied)):  # type: ignore[misc]
            place.synchronize()


def _case(case: BenchCase, names: Sequence[str], place: Place, sizes: Sizes, notes: Notes, copied: float) -> None:
    """Enter what was measured; voxloss itself in the first round only, beside the others in every one."""
    entered = names if names == ROUNDS[0] else names[1:]
    input, target = tensors(case)
    reference = exact(case, input, target)
    titles = {each.name: each.titled(versions()) for each in CONTENDERS}
    runs: dict[str, Step] = {}
    examined: dict[str, Measurement] = {}
    for contender in (each for each in CONTENDERS if each.name in names):
        if notes.seconds_left() <= (_COMPILES if contender.compiles else 0):
            notes.due([f"{case.id}, {contender.title}"])
            continue
        notes.progress(0.5, f"{case.id}: {contender.title}")
        measured, step = examine(case, contender, input, target, reference, place.available())
        if step is not None:
            runs[contender.name], examined[contender.name] = step, measured
            continue
        if contender.name in entered:
            notes.row(case=case.id, contender=titles[contender.name], mode="", why=str(measured))
        if contender.name == OURS:
            notes.failure(f"{case.id}: {measured}")
    del reference
    fresh = {name: partial(_fresh, step, input, target) for name, step in runs.items()}

    def timed(mode: str, contenders: dict[str, Callable[[], float]]) -> None:
        if notes.seconds_left() <= 0:
            notes.due([f"{case.id}, {mode}"])
        elif contenders:
            times = timing.interleaved(contenders, sizes.rounds, seed=0)
            for name, taken in ((name, times[name]) for name in entered if name in times):
                _enter(case, mode, titles[name], taken, times.get(OURS), copied, notes)

    timed(BOUND, {name: partial(_one, place, step, input, target) for name, step in runs.items()})
    timed(AHEAD, {name: partial(place.ahead, run, sizes.steps) for name, run in fresh.items()})
    # What may disturb the clocks, or end the process, comes after them.
    replays: dict[str, Callable[[], float]] = {}
    for name, run in fresh.items():
        replay = _captured(place, run)
        if isinstance(replay, str):
            if name in entered:
                notes.row(case=case.id, contender=titles[name], mode=GRAPH, why=f"{GRAPH}: {replay}")
            place.synchronize()
        else:
            replays[name] = partial(place.ahead, replay, sizes.steps)
    timed(GRAPH, replays)
    for name, run in ((name, fresh[name]) for name in entered if name in fresh):
        found = asdict(replace(examined[name], times=(), ahead=()))
        peak = (examined[name].peak or 0) / case.logit_bytes
        notes.row(**found, case=case.id, contender=titles[name], mode=ONCE, kernels=_counted(place, run), N=peak)


def _enter(
    case: BenchCase,
    mode: str,
    title: str,
    taken: list[float],
    ours: list[float] | None,
    copied: float,
    notes: Notes,
) -> None:
    spread = timing.spread([1000 * seconds for seconds in taken])
    ratio = None if ours is None or ours is taken else timing.ratios(taken, ours)
    notes.row(
        case=case.id,
        contender=title,
        mode=mode,
        ms=[spread.median, spread.low, spread.high],
        ratio=None if ratio is None else [ratio.median, ratio.low, ratio.high],
        **{"floor ms": 1000 * case.floor_bytes / copied},
    )


def _fresh(step: Step, input: Tensor, target: Tensor) -> None:
    input.grad = None
    step(input, target)


def _one(place: Place, step: Step, input: Tensor, target: Tensor) -> float:
    input.grad = None
    return place.bound(lambda: step(input, target))


def _captured(place: Place, run: Callable[[], None]) -> Callable[[], object] | str:
    """A function that replays it, or why there is none."""
    try:
        return place.graph(run)
    except Unavailable as error:
        return str(error)
    except Exception as error:
        return f"cannot be captured: {described(error)}"


def _counted(place: Place, run: Callable[[], None]) -> int | str:
    try:
        return place.kernels(run)
    except Unavailable as error:
        return f"not counted ({error})"
    except Exception as error:
        return f"not counted ({first_line(error)})"
