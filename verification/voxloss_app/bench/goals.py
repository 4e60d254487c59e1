"""What should be reached, as data, and whether a run reached it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from voxloss_app.bench.cases import BenchCase
from voxloss_app.bench.contenders import COPY, FLOOR, IN_CACHE, OURS
from voxloss_app.bench.results import BenchResult, Run, State
from voxloss_app.bench.timing import Spread, short, spread
from voxloss_verify.tolerances import LOSS

# The loss of a number below 1 in float32 is that far from the same loss rounded the other way.
ROUNDING = 2.0**-24
NOT_HERE = "not in this run"


@dataclass(frozen=True)
class Found:
    """What a run says about a goal.

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

    @property
    def shown(self) -> str:
        """The bound in words."""
        return f"{'≥' if self.at_least else '≤'} {_number(self.bound)}{self.unit}"


@dataclass(frozen=True)
class Verdict:
    """A goal and what came of it; `reached` is None if it was not measured."""

    goal: Goal
    shown: str
    reached: bool | None


def judge(runs: Sequence[Run]) -> list[Verdict]:
    """Every goal, by the run on its device."""
    return [_judge(goal, runs) for goal in GOALS]


def _judge(goal: Goal, runs: Sequence[Run]) -> Verdict:
    results = [result for run in runs if run.device == goal.device for result in run.results]
    if not results:
        return Verdict(goal, f"no {goal.device.upper()} device", None)
    found = goal.find(results)
    if found.value is None:
        return Verdict(goal, found.shown, False if found.broken else None)
    reached = found.value >= goal.bound if goal.at_least else found.value <= goal.bound
    return Verdict(goal, found.shown, reached)


def _number(value: float) -> str:
    return f"{value:.0e}" if 0 < value < 1e-3 else f"{value:g}"


def _missing(result: BenchResult | None, *names: str) -> Found:
    if result is None:
        return Found(None, NOT_HERE)
    ours = result.contenders.get(OURS)
    if ours is not None and ours.state in (State.wrong.value, State.failed.value):
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
    """Float32, from a label map, with the activation that the family is trained with."""
    activation = "sigmoid" if case.family == "dice_focal" else "softmax"
    return case.timed and not case.one_hot and (case.dtype, case.activation) == ("float32", activation)


def _shown(found: Spread, unit: str) -> str:
    return f"{short(found.median)}{unit} ({short(found.low)}–{short(found.high)})"


def _faster(family: str, than: str, edge: int = 96) -> Callable[[Sequence[BenchResult]], Found]:
    """How many times as long as voxloss, and as the floor and then the arithmetic, another takes."""

    def find(results: Sequence[BenchResult]) -> Found:
        result = _case(results, family, 14, edge)
        ratio = result.ratio(than) if result else None
        if result is None or ratio is None:
            return _missing(result, than)
        parts = zip(result.times(than), result.times(FLOOR), result.times(IN_CACHE), strict=False)
        bound = [theirs / (floor + arithmetic) for theirs, floor, arithmetic in parts]
        beside = f"; floor + arithmetic in cache: {_shown(spread(bound), ' ×')}" if bound else ""
        return Found(ratio.median, _shown(ratio, " ×") + beside)

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
    """3 N at the speed of a copy over voxloss's time, in per cent."""

    def find(results: Sequence[BenchResult]) -> Found:
        result = _case(results, "dice", channels, 128, batch=None)
        share = result.ratio(COPY) if result else None
        if share is None:
            return _missing(result, COPY)
        percent = Spread(*(100 * part for part in (share.median, share.low, share.high)))
        return Found(percent.median, _shown(percent, " %"))

    return find


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


_ON_CPU = "CPU, C = 14, 96³, B = 2"
_ON_GPU = "GPU, C = 14, 128³, B = 2"
GOALS = (
    Goal(f"Dice: MONAI's time over voxloss's ({_ON_CPU})", "cpu", 4, True, " ×", _faster("dice", "monai")),
    Goal(
        f"DiceCE: MONAI's time over voxloss's ({_ON_CPU})",
        "cpu",
        6,
        True,
        " ×",
        _faster("dice_ce", "monai"),
    ),
    Goal(
        f"Dice: compiled plain torch's time over voxloss's ({_ON_CPU})",
        "cpu",
        2,
        True,
        " ×",
        _faster("dice", "plain_compiled"),
    ),
    Goal(
        f"DiceCE: compiled plain torch's time over voxloss's ({_ON_CPU})",
        "cpu",
        2,
        True,
        " ×",
        _faster("dice_ce", "plain_compiled"),
    ),
    Goal(
        f"DiceFocal (sigmoid): MONAI's time over voxloss's ({_ON_CPU})",
        "cpu",
        20,
        True,
        " ×",
        _faster("dice_focal", "monai"),
    ),
    Goal(f"Dice: time over the floor ({_ON_CPU})", "cpu", 2.5, False, " ×", _over_floor),
    Goal("Dice: peak extra memory, any C (CPU)", "cpu", 1.1, False, " N", _peak("dice")),
    Goal("DiceCE: peak extra memory, any C (CPU)", "cpu", 1.1, False, " N", _peak("dice_ce")),
    Goal("DiceFocal: peak extra memory, any C (CPU)", "cpu", 1.1, False, " N", _peak("dice_focal")),
    Goal("Dice: share of the copy bandwidth (GPU, C = 14, 128³)", "cuda", 80, True, " %", _bandwidth(14)),
    Goal("Dice: share of the copy bandwidth (GPU, C = 118, 128³)", "cuda", 80, True, " %", _bandwidth(118)),
    Goal(
        f"DiceCE: MONAI's time over voxloss's ({_ON_GPU})",
        "cuda",
        10,
        True,
        " ×",
        _faster("dice_ce", "monai", 128),
    ),
    Goal(
        f"DiceCE: compiled MONAI's time over voxloss's ({_ON_GPU})",
        "cuda",
        4,
        True,
        " ×",
        _faster("dice_ce", "monai_compiled", 128),
    ),
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
