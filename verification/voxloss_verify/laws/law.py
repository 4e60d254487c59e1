"""What a law is: a statement with a domain, volumes to try it on, and a comparison."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from hypothesis.strategies import SearchStrategy
from numpy.typing import ArrayLike

from voxloss_verify.laws.record import Finding
from voxloss_verify.laws.setting import Setting
from voxloss_verify.oracle import exact
from voxloss_verify.oracle.claims import Claims
from voxloss_verify.oracle.volumes import Volume
from voxloss_verify.request import Level
from voxloss_verify.subject.subject import Outcome, Subject

Check = Callable[[Subject, Volume, Setting], Iterable[Finding]]


@dataclass(frozen=True)
class Law:
    """A check in the registry.

    Attributes:
        number: its place among the laws; the file that it stands in names the range.
        part: a letter where one number has several parts, else empty.
        name: in a few words.
        level: what a broken check means for a loss, `because` of what.
        statement: what must be true, with the equation.
        oracle: what the loss is compared with.
        tolerance: how far off a loss may be.
        domain: why it does not apply to a loss, None if it does.
        check: the findings on one volume.
        strategy: volumes that Hypothesis draws; None if the law has only given ones.
        given: further volumes, by what is at hand.
        code: Python that prepares `loss`, `input` and `target` in the snippet of a counter-example.
        version: raised when the check, its volumes or its tolerance change, so that results can be compared.
    """

    number: int
    part: str
    name: str
    level: Level
    because: str
    statement: str
    oracle: str
    tolerance: str
    check: Check
    domain: Callable[[Subject, Setting], str | None]
    strategy: Callable[[Claims], SearchStrategy[Volume]] | None = None
    given: Callable[[Subject, Setting], Iterable[Volume]] | None = None
    code: tuple[str, ...] = ()
    version: int = 1

    @property
    def id(self) -> str:
        """Number and part: 24, 31a."""
        return f"{self.number}{self.part}"


LAWS: list[Law] = []  # of losses
METRIC_LAWS: list[Law] = []


def law(
    id: str,
    name: str,
    *,
    level: Level,
    because: str,
    oracle: str,
    tolerance: str = "LOSS",
    domain: Callable[[Subject, Setting], str | None] = lambda subject, setting: None,
    strategy: Callable[[Claims], SearchStrategy[Volume]] | None = None,
    given: Callable[[Subject, Setting], Iterable[Volume]] | None = None,
    code: tuple[str, ...] = (),
    version: int = 1,
    entered: list[Law] = LAWS,
) -> Callable[[Check], Check]:
    """Enter a check as a law of losses, or of metrics; its docstring is the statement."""

    digits, part = re.fullmatch(r"(\d+)([a-z]?)", id).groups()  # type: ignore[union-attr]

    def enter(check: Check) -> Check:
        statement = " ".join((check.__doc__ or "").split())
        found = Law(
            int(digits),
            part,
            name,
            level,
            because,
            statement,
            oracle,
            tolerance,
            check,
            domain,
            strategy,
            given,
            code,
            version,
        )
        entered.append(found)
        return check

    return enter


def close(
    what: str,
    received: ArrayLike,
    expected: ArrayLike,
    tolerance: float,
    dtype: str | None = None,
) -> Finding:
    """Compare arrays; the finding is the element that is furthest off, NaN before all others.

    `dtype` of the value, for its distance in ULP.
    """
    found, wanted = np.asarray(received, np.float64), np.asarray(expected, np.float64)
    if found.size != wanted.size:
        shapes = f"{what}: shape {list(found.shape)} for {list(wanted.shape)}"
        return Finding(shapes, None, None, tolerance, float("inf"))
    if not found.size:
        return Finding(what, 0.0, 0.0, tolerance, 0.0)
    found = found.reshape(wanted.shape)
    same = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
    with np.errstate(invalid="ignore"):
        errors = np.where(same, 0.0, abs(found - wanted))
    errors = np.where(np.isnan(errors), np.inf, errors)
    worst = np.unravel_index(int(errors.argmax()), errors.shape)
    one, other, error = float(found[worst]), float(wanted[worst]), float(errors[worst])
    if errors.size > 1:
        what = f"{what} at {[int(i) for i in worst]}"
    # Beside 0 the spacing is that of the smallest numbers, and has no meaning.
    ulp = error / spacing(other, dtype) if dtype is not None and np.isfinite(error) and other else None
    magnitude = float(abs(wanted[np.isfinite(wanted)]).max(initial=0.0))
    return Finding(what, one, other, tolerance, error, ulp, magnitude=magnitude)


def spacing(value: float, dtype: str) -> float:
    """The distance between neighbouring numbers of a dtype at a value."""
    if dtype == "bfloat16":  # float32 with 16 bits of the significand cut off
        return float(np.spacing(np.float32(abs(value)))) * 2**16
    return float(np.spacing(np.asarray(abs(value), dtype)))


def unlabelled(subject: Subject) -> str | None:
    """Why a law whose volumes use every label does not apply; None if no label of a class is ignored."""
    ignored = subject.claims.ignore_index
    if ignored is None or not 0 <= ignored < 16:
        return None
    return "the ignored label may be that of a class, and the volumes of this check use every label"


def of_scores(subject: Subject) -> str | None:
    """Why a law of scores does not apply; None if the loss is one of a known score."""
    family = subject.claims.family
    known = not subject.claims.by_voxel and family not in ("sensitivity_specificity", "compound", "formula")
    return None if known else f"a check of scores of sums over voxels, not of {family}"


def is_true(
    what: str, statement: bool | np.bool_, received: float | None = None, code: tuple[str, ...] = ()
) -> Finding:
    """A statement that has no distance: its error is 0 or infinite."""
    return Finding(what, received, None, 0.0, 0.0 if statement else float("inf"), code=code)


def close_value(
    what: str, subject: Subject, outcome: Outcome, volume: Volume, claims: Claims | None = None
) -> Finding:
    """Compare a value with the exact one, of what the loss claims or of other claims."""
    wanted = exact.expected(claims or subject.claims, volume)
    tolerance = wanted.tolerance
    if outcome.dtype in ("float16", "bfloat16"):  # the score and 1 − score may be rounded to what is returned
        what = f"{what}, returned as {outcome.dtype}"
        largest = float(np.nanmax(abs(wanted.value), initial=1.0))
        tolerance += spacing(largest, outcome.dtype) / 2
    return close(what, outcome.value, wanted.value, tolerance, outcome.dtype)


def each_finite(outcome: Outcome) -> Iterator[Finding]:
    """Value and gradient hold no NaN and no infinity."""
    yield is_true("a finite value", np.isfinite(outcome.value).all(), float(outcome.value.ravel()[0]))
    if outcome.gradient is not None:
        bad = outcome.gradient[~np.isfinite(outcome.gradient)]
        yield is_true("a finite gradient", not bad.size, float(bad[0]) if bad.size else 0.0)
