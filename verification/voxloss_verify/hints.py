"""What explains a wrong value: other claims that the loss would hold, or a slip in its code."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from typing import Any, TypeVar

import numpy as np

from voxloss_verify.laws.sources import cube
from voxloss_verify.oracle import exact
from voxloss_verify.oracle.claims import Claims
from voxloss_verify.oracle.volumes import Volume, from_probabilities, target_for
from voxloss_verify.slips import slips, value
from voxloss_verify.subject.subject import Outcome, Raised, Subject
from voxloss_verify.tolerances import ROUNDING

SMOOTHINGS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1.0)
MOST_FORGOTTEN = 3
# A misfit, in roundings of float32, that is one of float64.
EXACT = 1e-5
T = TypeVar("T")
# Properties that are often not declared.
_SWITCHES: list[dict[str, Any]] = [{"batch": True}, {"include_background": False}, {"average": "micro"}]
_OF_DICE: list[dict[str, Any]] = [{"squared": True}, {"offset": 0}]
_SMOOTH: list[dict[str, Any]] = [
    {},
    *({"smooth_nr": s, "smooth_dr": s} for s in SMOOTHINGS if s),
    *({"smooth_dr": s} for s in SMOOTHINGS if s),
]
_TVERSKY: list[dict[str, Any]] = [{}, {"alpha": 0.3, "beta": 0.7}, {"alpha": 0.7, "beta": 0.3}]
_FOCAL_TVERSKY: list[dict[str, Any]] = [
    {**weights, **power}
    for weights in _TVERSKY
    for power in ({}, {"gamma": 4 / 3}, {"gamma": 0.75}, {"gamma": 2.0}, {"gamma": 0.5})
]


def hint(subject: Subject, wrong: Volume) -> str:
    """What explains a wrong value: one or two other claims with which it is right, or a slip; "" if nothing does.

    It explains the value of the volume where it is `wrong` by what is declared, and of a few others.
    """
    found = tried(subject, wrong)
    if not found:
        return ""
    if misfit(subject.claims, found) <= 1:  # only rounding is wrong
        return ""
    return _other_claims(subject, found) or _slip(subject.claims, found)


def hint_of_half_precision(subject: Subject, wrong: Volume) -> str:
    """The remedy for a loss that is wrong only because it sums in half precision; "" if it is wrong otherwise."""
    exactly = wrong.changed(dtype="float32")  # the same numbers
    try:
        found = subject.gradient(exactly)
    except Raised:
        return ""
    if found.gradient is None or not np.isfinite(found.gradient).all():
        return ""
    if misfit(subject.claims, [(exactly, found)]) > 1:
        return ""
    return "with the same numbers in float32 it is right: begin the loss with input = input.float()"


def hint_of_a_power(claims: Claims) -> str:
    """The remedy for a gradient that is not finite because of the formula itself; "" if it is not."""
    if claims.family != "focal_tversky" or claims.exponent >= 1 or claims.linear_below:
        return ""
    power = f"{claims.exponent:.4g}"
    return (
        f"the derivative of x^{power} at x = 0, a class without error, is infinite: take the power where x > 0 "
        f"only, torch.where(x > 0, x, 1).pow({power}).where(x > 0, x)"
    )


def usual(claims: Claims, declared: Collection[str] = ()) -> list[dict[str, Any]]:
    """Changes to properties that were not declared, the fewest first, beginning with none."""
    weights = {"tversky": _TVERSKY, "focal_tversky": _FOCAL_TVERSKY}.get(claims.family, [{}])
    switches = _SWITCHES if claims.family == "focal_tversky" else [*_SWITCHES, *_OF_DICE]
    each = (
        {name: value for part in (*switched, smooth, weight) for name, value in part.items()}
        for count in range(len(switches) + 1)
        for switched in combinations(switches, count)
        for smooth in _SMOOTH
        for weight in weights
    )
    open_ones = ({name: value for name, value in one.items() if name not in declared} for one in each)
    different = {tuple(sorted(one.items())): one for one in open_ones}
    return sorted(different.values(), key=len)


def contradictions(claims: Claims, declared: Collection[str]) -> list[dict[str, Any]]:
    """Changes to properties that were declared, the family among them, each of which may explain a value."""
    names = {*declared, "family", *(["gamma_as"] if "gamma" in declared else [])}
    return [change for change in _changes(claims) if names.issuperset(change)]


def closest(candidates: Iterable[tuple[float, T]]) -> T | None:
    """The first candidate whose values are exact; else the nearest of those that are off by rounding; else None.

    Each comes with its misfit, those of fewest changes first: a later one must be more than twice as near.
    """
    nearest: tuple[float, T] | None = None
    for off, candidate in candidates:
        if off <= EXACT:
            return candidate
        if off <= 1 and (nearest is None or off < nearest[0] / 2):
            nearest = off, candidate
    return None if nearest is None else nearest[1]


def _slip(claims: Claims, found: list[tuple[Volume, Outcome]]) -> str:
    """A slip, or one beside up to three claims that were forgotten."""
    forgotten = (
        others
        for others in usual(claims)
        if len(others) <= MOST_FORGOTTEN and all(getattr(claims, name) != said for name, said in others.items())
    )
    said = closest(
        (off, f"{slip}, with {options(others)}" if others else slip)
        for others in forgotten
        for off, slip in slips_that_fit(replace(claims, **others), found)
    )
    return said or ""


def _other_claims(subject: Subject, found: list[tuple[Volume, Outcome]]) -> str:
    changes = list(_changes(subject.claims))
    for count in (1, 2):
        fitting: list[tuple[float, str]] = []
        for chosen in combinations(changes, count):
            fields = {name: value for change in chosen for name, value in change.items()}
            if len(fields) < sum(map(len, chosen)):
                continue
            off = misfit(replace(subject.claims, **fields), found)
            if off <= 1:
                fitting.append((off, options(fields)))
        if fitting:  # smoothings lie close together: the closest
            return f"it would be right with {min(fitting)[1]}"
    return ""


def slips_that_fit(claims: Claims, found: list[tuple[Volume, Outcome]]) -> Iterator[tuple[float, str]]:
    """The slips that explain all these values, each with its misfit."""
    for slip in slips(claims):
        worst = 0.0
        for volume, outcome in found:
            if outcome.value.size != 1:
                return
            off = abs(float(outcome.value.ravel()[0]) - value(claims, slip, volume)) / ROUNDING
            worst = off if math.isnan(off) else max(worst, off)
            if not worst <= 1:
                break
        else:
            yield worst, f"the value is what results if {slip.said}"


def options(fields: Mapping[str, Any]) -> str:
    """Claims as they are typed."""
    return " ".join(f"--claim {name}={_spelled(value)}" for name, value in fields.items())


def tried(subject: Subject, wrong: Volume) -> list[tuple[Volume, Outcome]]:
    """The loss of a volume and of two others; nothing if it raises on one."""
    claims = subject.claims
    dtype = claims.dtypes[0]
    # Two samples of three classes, one of them absent from the first: batch and absent classes show.
    wide = claims if claims.fixed_channels or claims.named_channels else replace(claims, channels=3)
    parts = [cube(wide, 4, dtype, seed) for seed in (0, 1)]
    target = np.concatenate([part.target for part in parts])
    if target.dtype.kind == "i":
        target[0][target[0] == parts[0].channels - 1] = 0
    volumes = [
        wrong,
        parts[0],
        parts[0].changed(input=np.concatenate([part.input for part in parts]), target=target),
    ]
    try:
        found = [(volume, subject.value(volume)) for volume in volumes]
    except Raised:
        return []
    uneven = _uneven(wide, dtype)
    with suppress(Raised):  # a loss may take cubes only
        found.append((uneven, subject.value(uneven)))
    return found


def _uneven(claims: Claims, dtype: str) -> Volume:
    """As many voxels of each class, and axes of different lengths: which of them are exchanged shows."""
    channels = claims.fixed_channels or max(2, claims.named_channels)
    spatial = (2, 3, 4)[3 - claims.spatial_dims :]
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.arange(np.prod(spatial)) % max(2, channels)).reshape(1, 1, *spatial)
    shares = generator.dirichlet(np.ones(max(2, channels)), spatial)
    p = np.moveaxis(shares, -1, 0)[None, -channels:]
    input = from_probabilities(claims, p, dtype)
    return Volume("uneven", input, target_for(claims, labels, channels), dtype)


def _changes(claims: Claims) -> Iterator[dict[str, Any]]:
    if claims.family in ("cross_entropy", "focal", "compound"):
        yield from _single(claims, {"activation": ("softmax", "sigmoid", "none"), "reduction": ("mean", "sum")})
        return
    choices: dict[str, tuple[Any, ...]] = {
        "activation": ("softmax", "sigmoid", "none"),
        "include_background": (True, False),
        "squared": (True, False),
        "batch": (True, False),
        **({} if claims.ignore_index is not None else {"average": ("macro", "micro")}),
        "absent": ("count", "perfect", "skip", "skip per item"),
        "offset": (0, 1),
        "overlap": ("product", "min"),
        "reduction": ("mean", "sum"),
        "family": ("dice", "jaccard", "tversky"),
        "smooth_nr": SMOOTHINGS,
        "smooth_dr": SMOOTHINGS,
    }
    if claims.family == "focal_tversky":
        choices["gamma_as"] = ("1/gamma", "gamma", "1-gamma")
    if claims.family == "generalized_dice":
        choices["weight_type"] = ("square", "simple", "uniform")
        choices["weight_scale"] = ("relative", "absolute")
    if claims.family in ("generalized_dice", "formula"):
        del choices["family"]
    yield from _single(claims, choices)
    yield from ({"smooth_nr": s, "smooth_dr": s} for s in SMOOTHINGS)
    if claims.alpha != claims.beta:
        yield {"alpha": claims.beta, "beta": claims.alpha}


def _single(claims: Claims, choices: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    for name, values in choices.items():
        yield from ({name: value} for value in values if value != getattr(claims, name))


def misfit(claims: Claims, found: list[tuple[Volume, Outcome]]) -> float:
    """How far off the loss is by these claims, in what it may be off by rounding: of the first volume above 1."""
    worst = 0.0
    for volume, outcome in found:
        try:
            wanted = exact.expected(claims, volume)
        except (ValueError, ArithmeticError):
            return math.inf
        if outcome.value.size != wanted.value.size or not np.isfinite(outcome.value).all():
            return math.inf
        off = float(abs(outcome.value.ravel() - wanted.value.ravel()).max())
        worst = max(worst, off / max(wanted.tolerance, ROUNDING))
        if worst > 1:  # the first volumes are small, and most guesses end there
            break
    return worst


def _spelled(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
