"""What should be reached, as data, and whether a run reached it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from voxloss_app.bench.cases import BenchCase
from voxloss_app.bench.contenders import CONTENDERS, COPY, FLOOR, IN_CACHE, OURS
from voxloss_app.bench.results import BenchResult, Run, State
from voxloss_app.bench.timing import Spread, short, spread
from voxloss_verify.tolerances import LOSS

# The loss of a number below 1 in float32 is that far from the same loss rounded the other way.
ROUNDING = 2.0**-24
NOT_HERE = "not in this run"
_BROKEN = (State.wrong.value, State.failed.value)


@dataclass(frozen=True)
class Found:
    """The result of a run for a goal.

    Attributes:
        value: None if it was not measured.
        shown: the value as the page shows it, or why there is none.
        broken: it could not be measured because voxloss was wrong or failed: the goal is missed.
    """

    value: float | None
    shown: str
    broken: bool = False


@dataclass(frozen=True)
class Goal:
    """A figure that should be at least, or at most, so much."""

    text: str
    device: str
    bound: float
    at_least: bool
    unit: str
    find: Callable[[Sequence[BenchResult]], Found]
    than: str = ""  # the contender that voxloss is compared with, if it is one

    @property
    def shown(self) -> str:
        """The bound in words."""
        return f"{'≥' if self.at_least else '≤'} {_number(self.bound)}{self.unit}"


@dataclass(frozen=True)
class Verdict:
    """A goal and its result; `reached` is None if it was not measured."""

    goal: Goal
    shown: str
    reached: bool | None
    versions: str = ""


def judge(runs: Sequence[Run]) -> list[Verdict]:
    """Every goal, by the run on its device."""
    return [_judge(goal, runs) for goal in GOALS]


def _judge(goal: Goal, runs: Sequence[Run]) -> Verdict:
    results = [result for run in runs if run.device == goal.device for result in run.results]
    if not results:
        return Verdict(goal, f"no {goal.device.upper()} device", None)
    found = goal.find(results)
    versions = _versions(goal, runs)
    if found.value is None:
        return Verdict(goal, found.shown, False if found.broken else None, versions)
    reached = found.value >= goal.bound if goal.at_least else found.value <= goal.bound
    return Verdict(goal, found.shown, reached, versions)


def _versions(goal: Goal, runs: Sequence[Run]) -> str:
    """The versions of both sides of a goal."""
    (run,) = (run for run in runs if run.device == goal.device)
    packages = [package for each in CONTENDERS if each.name in (OURS, goal.than) for package in each.packages]
    return ", ".join(f"{name} {run.versions[name]}" for name in packages if run.versions.get(name))


def _number(value: float) -> str:
    return f"{value:.0e}" if 0 < value < 1e-3 else f"{value:g}"


def _missing(result: BenchResult | None, *names: str) -> Found:
    if result is None:
        return Found(None, NOT_HERE)
    ours = result.contenders.get(OURS)
    if ours is not None and ours.state in _BROKEN:
        return Found(None, f"voxloss is {ours}", broken=True)
    name = next(name for name in (OURS, *names) if not result.times(name))
    return Found(None, result.why_not(name))


def _case(
    results: Sequence[BenchResult], family: str, channels: int, edge: int, batch: int | None = 2
) -> BenchResult | None:
    """The usual case of that family and size."""
    for result in results:
        case = result.case
        fits = (case.family, case.channels, case.edge) == (family, channels, edge) and batch in (None, case.batch)
        if fits and _usual(case):
            return result
    return None


def _usual(case: BenchCase) -> bool:
    """Float32, from an int64 label map, with the activation that the family is trained with."""
    activation = "sigmoid" if case.family == "dice_focal" else "softmax"
    kind = (case.one_hot, case.label_dtype, case.dtype, case.activation)
    return case.timed and kind == (False, "int64", "float32", activation)


def _shown(found: Spread, unit: str) -> str:
    return f"{short(found.median)}{unit} ({short(found.low)}–{short(found.high)})"


def _faster(
    family: str, than: str, edge: int = 96, channels: int = 14
) -> Callable[[Sequence[BenchResult]], Found]:
    """How many times as long as voxloss, and as the floor and then the arithmetic, another takes."""

    def find(results: Sequence[BenchResult]) -> Found:
        result = _case(results, family, channels, edge)
        ratio = result.ratio(than) if result else None
        if result is None or ratio is None:
            return _missing(result, than)
        parts = zip(result.times(than), result.times(FLOOR), result.times(IN_CACHE), strict=False)
        bound = [theirs / (floor + arithmetic) for theirs, floor, arithmetic in parts]
        beside = f"; floor + arithmetic in cache: {_shown(spread(bound), ' ×')}" if bound else ""
        ahead = result.ratio(than, ahead=True)
        beside += f"; host ahead: {_shown(ahead, ' ×')}" if ahead else ""
        return Found(ratio.median, _shown(ratio, " ×") + beside)

    return find


def _eager(family: str) -> Callable[[Sequence[BenchResult]], Found]:
    """How many times as long as voxloss's eager backend MONAI takes, where that is the least."""

    def find(results: Sequence[BenchResult]) -> Found:
        cases = [r for r in results if r.case.family == family and _usual(r.case)]
        broken = [r for r in cases if (eager := r.contenders.get("eager")) and eager.state in _BROKEN]
        if broken:
            return Found(None, f"voxloss, eager is {broken[0].contenders['eager']}", broken=True)
        found = [(ratio, r.case) for r in cases if (ratio := r.ratio("monai", "eager"))]
        if not found:
            return Found(None, cases[0].why_not("monai") if cases else NOT_HERE)
        least, case = min(found, key=lambda pair: pair[0].median)
        channels = sorted({case.channels for _, case in found})
        where = f"least at C = {case.channels}, {case.edge}³; measured at C = {', '.join(map(str, channels))}"
        return Found(least.median, f"{_shown(least, ' ×')} ({where})")

    return find


def _over_floor(results: Sequence[BenchResult]) -> Found:
    result = _case(results, "dice", 14, 96)
    ours = result.over_floor() if result else None
    if result is None or ours is None:
        return _missing(result, FLOOR)
    theirs = result.over_floor("monai")
    beside = f", MONAI {short(theirs.median)} ×" if theirs else ""
    return Found(ours.median, _shown(ours, " ×") + beside)


def _peak(family: str) -> Callable[[Sequence[BenchResult]], Found]:
    """The largest peak of voxloss over all usual cases of a family."""

    def find(results: Sequence[BenchResult]) -> Found:
        cases = [result for result in results if result.case.family == family and _usual(result.case)]
        peaks = [(peak, r.case) for r in cases if (peak := r.peak(OURS)) is not None]
        broken = next((found for r in cases if (found := _missing_ours(r)).broken), None)
        if broken or not peaks:
            return broken or Found(None, NOT_HERE)
        worst, case = max(peaks, key=lambda pair: pair[0])
        channels = sorted({case.channels for _, case in peaks})
        where = f"largest at C = {case.channels}, {case.edge}³; measured at C = {', '.join(map(str, channels))}"
        return Found(worst, f"{short(worst)} N ({where})")

    return find


def _missing_ours(result: BenchResult) -> Found:
    return Found(None, "") if result.times(OURS) else _missing(result)


def _bandwidth(channels: int) -> Callable[[Sequence[BenchResult]], Found]:
    """The floor's bytes at the speed of a copy over voxloss's time, in per cent."""

    def find(results: Sequence[BenchResult]) -> Found:
        result = _case(results, "dice", channels, 128, batch=None)
        share = result.ratio(COPY) if result else None
        if result is None or share is None:
            return _missing(result, COPY)
        ahead = result.ratio(COPY, ahead=True)
        beside = f"; host ahead: {_shown(_percent(ahead), ' %')}" if ahead else ""
        return Found(100 * share.median, _shown(_percent(share), " %") + beside)

    return find


def _percent(share: Spread) -> Spread:
    return Spread(100 * share.median, 100 * share.low, 100 * share.high)


def _errors(results: Sequence[BenchResult], name: str) -> list[tuple[float, BenchResult]]:
    found = [(result.contenders.get(name), result) for result in results if not result.case.timed]
    return [(each.value_error, r) for each, r in found if each is not None and each.value_error is not None]


def _accuracy(results: Sequence[BenchResult]) -> Found:
    """The largest distance of voxloss's values from the exact ones."""
    found = _errors(results, OURS)
    if not found:
        return Found(None, NOT_HERE)
    worst, result = max(found, key=lambda pair: pair[0])
    return Found(worst, f"{worst:.1e} ({result.case.family}, {result.case.edge}³)")


def _beyond_eager(results: Sequence[BenchResult]) -> Found:
    """How much further from the exact value than eager voxloss is, at the worst."""
    eager = {result.case: error for error, result in _errors(results, "eager")}
    beyond = [error - eager[r.case] for error, r in _errors(results, OURS) if r.case in eager]
    if not beyond:
        return Found(None, NOT_HERE)
    worst = max(beyond)
    return Found(worst, f"{worst:.1e}" if worst > 0 else "never further")


_NAMES = {"dice": "Dice", "dice_ce": "DiceCE", "dice_focal": "DiceFocal"}


def _speed(
    family: str, than: str, words: str, bound: float, channels: int = 14, device: str = "cpu", edge: int = 96
) -> Goal:
    """Another's time over voxloss's, at one size, B = 2."""
    name = f"{_NAMES[family]} (sigmoid)" if family == "dice_focal" else _NAMES[family]
    where = f"{'CPU' if device == 'cpu' else 'GPU'}, C = {channels}, {edge}³, B = 2"
    text = f"{name}: {words}'s time over voxloss's ({where})"
    return Goal(text, device, bound, True, " ×", _faster(family, than, edge, channels), than)


GOALS = (
    _speed("dice", "monai", "MONAI", 4),
    _speed("dice_ce", "monai", "MONAI", 6),
    *(
        _speed(family, "monai", "MONAI", bound, channels)
        for channels in (2, 3)
        for family, bound in (("dice", 3), ("dice_ce", 5))
    ),
    _speed("dice", "plain_compiled", "compiled plain torch", 2),
    _speed("dice_ce", "plain_compiled", "compiled plain torch", 2),
    _speed("dice_focal", "monai", "MONAI", 20),
    *(
        Goal(
            f"{_NAMES[family]}: MONAI's time over that of voxloss's eager backend, any C (CPU)",
            "cpu",
            1,
            True,
            " ×",
            _eager(family),
            "monai",
        )
        for family in _NAMES
    ),
    Goal("Dice: time over the floor (CPU, C = 14, 96³, B = 2)", "cpu", 2.5, False, " ×", _over_floor),
    *(
        Goal(f"{_NAMES[family]}: peak extra memory, any C (CPU)", "cpu", 1.1, False, " N", _peak(family))
        for family in _NAMES
    ),
    *(
        Goal(
            f"Dice: share of the copy bandwidth (GPU, C = {channels}, 128³)",
            "cuda",
            80,
            True,
            " %",
            _bandwidth(channels),
        )
        for channels in (14, 118)
    ),
    _speed("dice_ce", "monai", "MONAI", 10, device="cuda", edge=128),
    _speed("dice_ce", "monai_compiled", "compiled MONAI", 4, device="cuda", edge=128),
    Goal(
        "error against the exact value: the suite's tolerance for a loss (CPU, C = 4)",
        "cpu",
        LOSS["float32"],
        False,
        "",
        _accuracy,
    ),
    Goal(
        "error beyond that of voxloss's eager backend: one rounding of float32 (CPU, C = 4)",
        "cpu",
        ROUNDING,
        False,
        "",
        _beyond_eager,
    ),
)
