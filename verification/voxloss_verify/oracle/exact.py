"""What a loss that makes certain claims must return: its value and its gradient, from the oracle's sums.

Nothing here knows torch or voxloss. Probabilities are computed from logits in extended precision and rounded to
float64; from there on sums and scores are exact, and gradients are float64. Means over voxels are `entropy`'s; a
compound is the sum of its parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from voxloss_verify.oracle import confusion, entropy, hard
from voxloss_verify.oracle.claims import METRICS, Claims
from voxloss_verify.oracle.sums import (
    AllSums,
    Derivatives,
    Image,
    Number,
    Sums,
    all_sums,
    dice,
    jaccard,
    sums,
    tversky,
)
from voxloss_verify.oracle.volumes import Volume, one_hot
from voxloss_verify.tolerances import GRADIENT, LOSS

# Volumes of up to so many numbers have their probabilities in extended precision, where the machine has it.
EXTENDED = 2**20

Rows = Sequence[Sequence[Sums]]
Outer = Callable[[Claims, Fraction], float]

# Sums are used by many laws and many losses, and cost more than all else.
_known: WeakKeyDictionary[Volume, dict[Any, list[list[Sums]]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Expected:
    """The exact value, `[]` or without reduction `[B, C]`, and how far a value in some dtype may be off."""

    value: NDArray[np.float64]
    tolerance: float


def probabilities(input: Image, activation: str) -> NDArray[np.float64]:
    """Apply softmax over axis 1, sigmoid or nothing to `[B, C, ...]`, correctly rounded but for the last bit."""
    if activation == "none":
        return np.asarray(input, np.float64)
    x = np.asarray(input, np.longdouble if input.size <= EXTENDED else np.float64)
    if activation == "softmax":
        e = np.exp(x - x.max(1, keepdims=True))
        return np.asarray(e / e.sum(1, keepdims=True), np.float64)
    e = np.exp(-abs(x))
    return np.asarray(np.where(np.greater_equal(x, 0), 1, e) / (1 + e), np.float64)


def one_hot_target(volume: Volume) -> NDArray[Any]:
    """The target as one channel per class, `[B, C, ...]`."""
    return volume.target if volume.is_one_hot else one_hot(volume.target, volume.channels)


def valid_mask(claims: Claims, volume: Volume) -> NDArray[np.bool_]:
    """Which voxels count, `[B, ...]`."""
    if claims.ignore_index is None or volume.is_one_hot:
        return np.ones((len(volume.target), *volume.target.shape[2:]), bool)
    return np.asarray(volume.target[:, 0] != claims.ignore_index)


def region_sums(claims: Claims, volume: Volume) -> list[list[Sums]]:
    """The exact sums of every sample and channel."""
    of_all = claims.family in confusion.FAMILIES or bool(extra_sums_of(claims))
    if volume.sums is not None and not of_all:
        return [list(row) for row in volume.sums]
    known = _known.setdefault(volume, {})
    key = claims.activation, claims.ignore_index, of_all
    add_up = all_sums if of_all else sums
    if key not in known:
        keep, g = valid_mask(claims, volume), one_hot_target(volume)
        with np.errstate(invalid="ignore"):  # of what stands in ignored voxels
            p = probabilities(volume.input, claims.activation)
        known[key] = [
            [
                _add([add_up(_mask(p[b, c][keep[b]]), _mask(g[b, c][keep[b]]))], volume.times)
                for c in range(p.shape[1])
            ]
            for b in range(len(p))
        ]
    return known[key]


def expected(claims: Claims, volume: Volume, dtype: str | None = None) -> Expected:
    """Return the exact loss of a volume, and the tolerance of the dtype, by default the volume's."""
    dtype = claims.resolution(dtype or volume.dtype)
    if claims.family in METRICS:
        return Expected(hard.value(claims, volume), hard.TOLERANCE[dtype])
    if claims.parts:
        found = [(factor, expected(part, volume, dtype)) for factor, part in claims.parts]
        value = np.asarray(sum(factor * each.value for factor, each in found))
        return Expected(value, sum(factor * each.tolerance for factor, each in found))
    if claims.by_voxel:
        images = _images(claims, volume)
        value = np.asarray(entropy.value(claims, *images))
        # A factor is one of the error, too, where the loss itself is small.
        scale = max(1.0, float(value), *claims.weights(volume.channels))
        return Expected(value, max(LOSS[dtype] * scale, entropy.value_tolerance(claims, *images, LOSS[dtype])))
    return of_sums(claims, region_sums(claims, volume), dtype)


def _images(claims: Claims, volume: Volume) -> tuple[Image, Image, NDArray[np.bool_], int]:
    """The arguments of `entropy`."""
    return volume.input, one_hot_target(volume), valid_mask(claims, volume), volume.times


def of_sums(claims: Claims, rows: Rows, dtype: str) -> Expected:
    """Return the exact loss for the sums `[B][C]` of all channels."""
    channels = len(rows[0])
    rows = _entering(claims, rows)
    if claims.empty == "nan" and any(_is_empty(claims, row, channels) for row in rows):
        shape = (len(rows), len(rows[0])) if claims.reduction == "none" else ()
        return Expected(np.full(shape, np.nan), LOSS[dtype])
    losses = [
        [claims.offset - 1 if fixed else x for fixed, x in zip(_fixed(claims, row), found, strict=True)]
        for row, found in ((row, _row_losses(claims, row, channels)) for row in rows)
    ]
    weights = _reduction_weights(claims, rows, channels)
    per_term = max((_row_tolerance(claims, row, channels, LOSS[dtype]) for row in rows), default=0.0)
    if claims.reduction == "none":
        values = [
            [float(w * x) if w else 0.0 for w, x in zip(*row, strict=True)]
            for row in zip(weights, losses, strict=True)
        ]
        largest = max(1.0, *(float(w) for row in weights for w in row), *(abs(x) for row in values for x in row))
        return Expected(np.array(values), per_term * largest)
    terms = [(w, x) for row in zip(weights, losses, strict=True) for w, x in zip(*row, strict=True) if w]
    total: Number = Fraction(0)
    for w, x in terms:
        total = total + (w * x if isinstance(x, Fraction) else float(w) * x)
    value = float(total)
    # Smoothing of the numerator alone can make a loss as large as it likes.
    scale = max(1.0, float(sum(w for w, _ in terms)), abs(value) if claims.formula is None else 0.0)
    return Expected(np.array(value), per_term * scale)


def gradient(claims: Claims, volume: Volume) -> NDArray[np.float64]:
    """∂(sum of the losses)/∂input of every voxel, `[B, C, ...]`, by the chain rule."""
    if claims.parts:
        return np.asarray(sum(factor * gradient(part, volume) for factor, part in claims.parts))
    if claims.by_voxel:
        return entropy.gradient(claims, *_images(claims, volume))
    by_p = probability_gradient(claims, volume)
    p = probabilities(volume.input, claims.activation)
    if claims.activation == "sigmoid":
        return np.asarray(by_p * p * probabilities(-np.asarray(volume.input), "sigmoid"))
    if claims.activation == "softmax":
        return np.asarray(p * (by_p - (p * by_p).sum(1, keepdims=True)))
    return by_p


def probability_gradient(claims: Claims, volume: Volume) -> NDArray[np.float64]:
    """∂(sum of the losses)/∂p, by way of sums: ∂L/∂I·∂I/∂p + ∂L/∂P·∂P/∂p, with Dice (2g − D)/(P + Q) of old."""
    derivatives = sum_derivatives(claims, region_sums(claims, volume))
    p, g = probabilities(volume.input, claims.activation), np.asarray(one_hot_target(volume), np.float64)
    keep = valid_mask(claims, volume)[:, None]
    shape = (*p.shape[:2], *[1] * (p.ndim - 2))
    by_intersection = np.array([[s.intersection for s in row] for row in derivatives]).reshape(shape)
    by_prediction = np.array([[s.prediction for s in row] for row in derivatives]).reshape(shape)
    intersection_by_p = g if claims.overlap == "product" else np.where(p < g, 1.0, 0.0)
    prediction_by_p = 2 * p if claims.squared else 1.0
    found = by_intersection * intersection_by_p + by_prediction * prediction_by_p
    for name, share in (("inside", g), ("outside", 1 - g)):
        by_error = np.array([[getattr(s, name) for s in row] for row in derivatives]).reshape(shape)
        found = found + by_error * 2 * share * (p - g)
    return np.where(keep, found, 0.0)


def sum_derivatives(claims: Claims, rows: Rows) -> list[list[Derivatives]]:
    """∂(sum of the losses)/∂I and /∂P for every sample and channel; 0 for channels that do not count."""
    items, channels = len(rows), len(rows[0])
    counting = claims.counting(channels)
    entering = _entering(claims, rows)
    weights = [
        [Fraction(0) if fixed else w for fixed, w in zip(_fixed(claims, row), found, strict=True)]
        for row, found in zip(entering, _reduction_weights(claims, entering, channels), strict=True)
    ]
    found = [[Derivatives(0.0, 0.0)] * channels for _ in range(items)]
    for b in range(items):
        row, row_weights = (entering[0], weights[0]) if claims.batch else (entering[b], weights[b])
        if claims.formula is not None:
            by_sums = claims.formula(
                _arguments(claims, row), [float(w) for w in row_weights], counting, channels
            )[1]
            for c, (by_intersection, by_prediction, _, *others) in zip(counting, by_sums, strict=True):
                derivative = np.array([by_intersection, by_prediction, 0.0, 0.0])
                for name, by_other in zip(extra_sums_of(claims), others, strict=True):
                    derivative += by_other * np.array(_EXTRA_SUMS[name][1])
                found[b][c] = Derivatives(*derivative.tolist())
            continue
        derivatives = _row_derivatives(claims, row, channels)
        for k, c in enumerate(counting):
            at = 0 if claims.average == "micro" else k
            w = float(row_weights[0 if claims.family == "generalized_dice" else at])
            found[b][c] = Derivatives(*(w * derivative for derivative in derivatives[at]))
    return found


def gradient_tolerance(claims: Claims, volume: Volume, dtype: str) -> float:
    """How far a gradient may be off: relative to the largest addend of ∂L/∂p, before anything cancels.

    Of means over voxels that is ∂L/∂log p, which is as large as the gradient by a logit can be.
    """
    dtype = claims.resolution(dtype)
    if claims.parts:
        return sum(factor * gradient_tolerance(part, volume, dtype) for factor, part in claims.parts)
    if claims.by_voxel:
        return GRADIENT[dtype] * entropy.gradient_scale(claims, *_images(claims, volume))
    derivatives = [
        derivative for row in sum_derivatives(claims, region_sums(claims, volume)) for derivative in row
    ]
    largest = max(
        abs(s.intersection) + (1 + claims.squared) * abs(s.prediction) + 2 * abs(s.inside) + 2 * abs(s.outside)
        for s in derivatives
    )
    return GRADIENT[dtype] * largest


def score(claims: Claims, s: Sums) -> Fraction:
    """The score of one class, which `SCORES` names."""
    smooth, kind = (claims.smooth_nr, claims.smooth_dr), claims.score
    if claims.overlap == "min":
        s = replace(s, intersection=s.soft_intersection)
    if kind == "dice":
        found = dice(s, *smooth, squared=claims.squared)
    elif kind == "jaccard":
        found = jaccard(s, 2 * Fraction(smooth[0]), 2 * Fraction(smooth[1]), squared=claims.squared)
    else:
        found = tversky(_squared(claims, s), claims.alpha, claims.beta, *smooth)
    empty = not _denominator(claims, s)
    return Fraction(0) if empty and claims.empty == "worst" else found


def _is_empty(claims: Claims, row: Sequence[Sums], channels: int) -> bool:
    """Whether a denominator is 0."""
    if claims.family in confusion.FAMILIES:
        return False
    if claims.family == "generalized_dice":
        return not _generalized(claims, row, channels)[1]
    return not all(fixed or _denominator(claims, s) for fixed, s in zip(_fixed(claims, row), row, strict=True))


def _fixed(claims: Claims, row: Sequence[Sums]) -> list[bool]:
    """Which terms of a row have the score 1 whatever is predicted."""
    absent = [not s.target for s in row]
    if claims.family == "generalized_dice":
        absent = [all(absent)]
    return [claims.absent == "perfect" and each for each in absent]


def _mask(values: Image) -> Image:
    """Values of 0 and 1 only as bool, which are counted and not summed."""
    if values.dtype != bool and ((values == 0) | (values == 1)).all():
        return np.asarray(values == 1)
    return values


def _squared(claims: Claims, s: Sums) -> Sums:
    return replace(s, prediction=s.prediction_squared, target=s.target_squared) if claims.squared else s


def _denominator(claims: Claims, s: Sums) -> Fraction:
    """Of the score, in the form that `_row_derivatives` takes the derivatives of."""
    i = s.soft_intersection if claims.overlap == "min" else s.intersection
    s = _squared(claims, s)
    by_i, by_p, by_t = _coefficients(claims)[1:]
    return by_i * i + by_p * s.prediction + by_t * s.target + Fraction(claims.smooth_dr)


def _coefficients(claims: Claims) -> tuple[Fraction, Fraction, Fraction, Fraction]:
    """Every score is (n·I + s_n) / (a·I + b·P + c·T + s_d): n, a, b, c."""
    kind = claims.score
    if kind == "dice":
        return Fraction(2), Fraction(0), Fraction(1), Fraction(1)
    if kind == "jaccard":
        return Fraction(1), Fraction(-1), Fraction(1), Fraction(1)
    alpha, beta = Fraction(claims.alpha), Fraction(claims.beta)
    return Fraction(1), 1 - alpha - beta, alpha, beta


def _add(parts: Sequence[Sums], times: int = 1) -> Sums:
    columns = zip(*(vars(s).values() for s in parts), strict=True)
    return type(parts[0])(*(times * sum(values, Fraction(0)) for values in columns))


def _entering(claims: Claims, rows: Rows) -> list[list[Sums]]:
    """The sums that enter a ratio each: of the batch, of the channels that count, of all of those together."""
    counting = claims.counting(len(rows[0]))
    if claims.batch:
        rows = [[_add(column) for column in zip(*rows, strict=True)]]
    chosen = [[row[c] for c in counting] for row in rows]
    return [[_add(row)] for row in chosen] if claims.average == "micro" else chosen


def _region_weights(claims: Claims, row: Sequence[Sums], channels: int) -> list[Fraction]:
    """w of Generalized Dice."""
    power = {"square": 2, "simple": 1, "uniform": 0}[claims.weight_type]
    raw = [1 / s.target**power if s.target else None for s in row]
    largest = max((w for w in raw if w is not None), default=Fraction(1))
    scale = largest if claims.weight_scale == "relative" else Fraction(1)
    factors = [Fraction(w) for w in claims.weights(channels)]
    if claims.absent == "skip":
        factors = [f if s.target else Fraction(0) for f, s in zip(factors, row, strict=True)]
    return [f * (largest if w is None else w) / scale for f, w in zip(factors, raw, strict=True)]


def _generalized(claims: Claims, row: Sequence[Sums], channels: int) -> tuple[Fraction, Fraction, list[Fraction]]:
    """Numerator and denominator of Generalized Dice, and w."""
    weights = _region_weights(claims, row, channels)
    if claims.overlap == "min":
        row = [replace(s, intersection=s.soft_intersection) for s in row]
    row = [_squared(claims, s) for s in row]
    numerator = sum((2 * w * s.intersection for w, s in zip(weights, row, strict=True)), Fraction(0))
    denominator = sum((w * (s.prediction + s.target) for w, s in zip(weights, row, strict=True)), Fraction(0))
    return numerator + Fraction(claims.smooth_nr), denominator + Fraction(claims.smooth_dr), weights


# Of further sums that a formula of its own is given: what they are, and their derivatives by Σpg, by Σp, and by
# the errors inside and outside of the target.
_EXTRA_SUMS: dict[str, tuple[Callable[[AllSums], Fraction], tuple[float, float, float, float]]] = {
    "voxels": (lambda s: s.voxels, (0, 0, 0, 0)),
    "false_positives": (lambda s: s.prediction - s.intersection, (-1, 1, 0, 0)),
    "false_negatives": (lambda s: s.target - s.intersection, (-1, 0, 0, 0)),
    "true_negatives": (lambda s: s.voxels - s.prediction - s.target + s.intersection, (1, -1, 0, 0)),
    "sensitivity_error": (lambda s: s.inside, (0, 0, 1, 0)),
    "specificity_error": (lambda s: s.outside, (0, 0, 0, 1)),
}
# Those that a formula may be given.
EXTRA_SUMS = tuple(_EXTRA_SUMS)


def extra_sums_of(claims: Claims) -> tuple[str, ...]:
    """The sums that a formula given as a function takes beside intersection, prediction and target."""
    return tuple(getattr(claims.formula, "extra_sums", ()))


def _arguments(claims: Claims, row: Sequence[Sums]) -> list[list[float]]:
    """Intersection, prediction and target, and further sums, as a formula is given them."""
    assert claims.formula is not None
    found = []
    for s in row:
        overlap, others = s.soft_intersection if claims.overlap == "min" else s.intersection, _squared(claims, s)
        extra_sums = [_EXTRA_SUMS[name][0](s) for name in extra_sums_of(claims) if isinstance(s, AllSums)]
        found.append([float(each) for each in (overlap, others.prediction, others.target, *extra_sums)])
    return found


def _row_losses(claims: Claims, row: Sequence[Sums], channels: int) -> list[Number]:
    if claims.formula is not None:
        return list(
            claims.formula(_arguments(claims, row), [1.0] * len(row), claims.counting(channels), channels)[0]
        )
    if claims.family in confusion.FAMILIES:
        return [claims.offset - 1 + confusion.value(claims, _all(s)) for s in row]
    if claims.family == "generalized_dice":
        numerator, denominator, _ = _generalized(claims, row, channels)
        found = numerator / denominator if denominator else Fraction(claims.empty == "perfect")
        distance = 1 - found
        return [claims.offset - 1 + distance / (1 + Fraction(claims.penalty) * (1 - distance))]
    scores = [score(claims, s) for s in row]
    outers = _outers(claims, _OUTER, channels, len(row))
    return [
        claims.offset - x if outer is None else claims.offset - 1 + outer(claims, 1 - x)
        for x, outer in zip(scores, outers, strict=True)
    ]


def _all(s: Sums) -> AllSums:
    assert isinstance(s, AllSums)
    return s


def _outers(claims: Claims, known: Mapping[str, Outer], channels: int, terms: int) -> list[Outer | None]:
    """What is made of each term's 1 − score; None if nothing is."""
    outer = known.get(claims.family)
    if claims.average == "micro":
        return [outer] * terms
    return [outer if claims.has_power(c, channels) else None for c in claims.counting(channels)]


def _power(claims: Claims, distance: Fraction) -> float:
    if claims.linear_below and distance < claims.linear_below:
        return float(distance) * math.pow(claims.linear_below, claims.exponent - 1)
    return math.pow(max(distance, Fraction(0)), claims.exponent)


def _power_derivative(claims: Claims, distance: Fraction) -> float:
    if claims.linear_below and distance < claims.linear_below:
        return math.pow(claims.linear_below, claims.exponent - 1)
    if distance <= 0:
        return 1.0 if claims.exponent == 1 else 0.0
    return claims.exponent * math.pow(distance, claims.exponent - 1)


def _log_cosh(claims: Claims, distance: Fraction) -> float:
    # cosh x = 1 + 2 sinh²(x/2), without cancellation near 0; e^|x|/2 where that is all there is.
    x = abs(float(distance))
    return math.log1p(2 * math.sinh(x / 2) ** 2) if x < 300 else x - math.log(2)


def _log_cosh_derivative(claims: Claims, distance: Fraction) -> float:
    return math.tanh(distance)


def _log_power(claims: Claims, distance: Fraction) -> float:
    return _power(claims, _minus_log(distance))


def _log_power_derivative(claims: Claims, distance: Fraction) -> float:
    return _power_derivative(claims, _minus_log(distance)) / float(1 - distance)


def _minus_log(distance: Fraction) -> Fraction:
    return Fraction(-math.log1p(-float(distance)))


# What a family makes of 1 − score, and the derivative.
_OUTER: dict[str, Outer] = {
    "focal_tversky": _power,
    "log_cosh_dice": _log_cosh,
    "logarithmic_dice": _log_power,
}
_OUTER_DERIVATIVE: dict[str, Outer] = {
    "focal_tversky": _power_derivative,
    "log_cosh_dice": _log_cosh_derivative,
    "logarithmic_dice": _log_power_derivative,
}


def _row_tolerance(claims: Claims, row: Sequence[Sums], channels: int, tolerance: float) -> float:
    """How far the losses of a row may be off if scores may be, or the sums that a formula of its own is given."""
    if claims.formula is None:
        return max((_term_tolerance(claims, s, tolerance) for s in row), default=0.0)
    given, others = _arguments(claims, row), ([1.0] * len(row), claims.counting(channels), channels)
    here, _ = claims.formula(given, *others)
    found = [tolerance]
    for at, sign in product(range(len(given[0])), (1, -1)):
        moved = [[x * (1 + sign * tolerance * (k == at)) for k, x in enumerate(sums)] for sums in given]
        there, _ = claims.formula(moved, *others)
        # Off its domain a formula may be no number.
        found += [abs(a - b) for a, b in zip(there, here, strict=True) if math.isfinite(a - b)]
    return max(found)


def _term_tolerance(claims: Claims, s: Sums, tolerance: float) -> float:
    """How far the loss of one class may be off if its score may be off by `tolerance`."""
    if claims.family in confusion.FAMILIES:
        return confusion.tolerance(claims, _all(s), tolerance)
    outer = _OUTER.get(claims.family)
    if outer is None:
        return tolerance * (1 + claims.penalty)
    distance = 1 - score(claims, s)
    here, near = outer(claims, distance), (distance + Fraction(t) for t in (tolerance, -tolerance))
    return max([tolerance, *(abs(outer(claims, other) - here) for other in near if other < 1)])


def _reduction_weights(claims: Claims, rows: Rows, channels: int) -> list[list[Fraction]]:
    """The factor of each term in the result; where terms are left out, 0."""
    if claims.family == "generalized_dice":
        counts = [[not claims.leaves_out or any(s.target for s in row)] for row in rows]
        weights = [[Fraction(1)] for _ in rows]
    elif claims.average == "micro":
        counts = [[True] for _ in rows]
        weights = [[Fraction(1)] for _ in rows]
    else:
        counts = [[not claims.leaves_out or s.target > 0 for s in row] for row in rows]
        weights = [[Fraction(w) for w in claims.weights(channels)] for _ in rows]
    shares = [Fraction(1)] * len(rows)
    if claims.reduction == "mean" and claims.absent == "skip per item":
        shares = [Fraction(1, len(rows) * max(1, sum(row))) for row in counts]
    elif claims.reduction == "mean":
        shares = [Fraction(1, max(1, sum(map(sum, counts))))] * len(rows)
    return [
        [w * share * count for w, count in zip(row, present, strict=True)]
        for row, present, share in zip(weights, counts, shares, strict=True)
    ]


def _row_derivatives(claims: Claims, row: Sequence[Sums], channels: int) -> list[Derivatives]:
    if claims.family == "generalized_dice":
        numerator, denominator, weights = _generalized(claims, row, channels)
        if not denominator:
            return [Derivatives(0.0, 0.0)] * len(row)
        ratio, k = numerator / denominator, Fraction(claims.penalty)
        outer = (1 + k) / (1 + k * ratio) ** 2
        return [
            Derivatives(float(-2 * w * outer / denominator), float(w * outer * ratio / denominator))
            for w in weights
        ]
    if claims.family in confusion.FAMILIES:
        return [confusion.derivatives(claims, _all(s)) for s in row]
    found = []
    by_i, a, b, _ = _coefficients(claims)
    for s, derivative in zip(row, _outers(claims, _OUTER_DERIVATIVE, channels, len(row)), strict=True):
        denominator = _denominator(claims, s)
        if not denominator:
            found.append(Derivatives(0.0, 0.0))
            continue
        value = score(claims, s)
        factor = derivative(claims, 1 - value) if derivative is not None else 1.0
        found.append(
            Derivatives(
                -factor * float((by_i - value * a) / denominator), factor * float(value * b / denominator)
            )
        )
    return found
