"""The independent witness: what a region loss must cost, from integer counts and exact sums.

Nothing here knows torch or voxloss. Every float is a dyadic rational, so sums are `fractions.Fraction`s: of
integers for hard masks, of the values themselves for small soft volumes, and rounded once by `math.fsum` for
large ones. TP = Σpg, FP = Σp − TP, FN = Σg − TP.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Image = NDArray[Any]
Number = Fraction | float

# Soft volumes of up to so many voxels are summed as fractions, at about a microsecond per voxel and sum.
SMALL = 4096
# Label maps are counted in blocks of so many voxels, which bounds the memory beside the maps.
BLOCK = 2**22


@dataclass(frozen=True)
class Sums:
    """Sums over the voxels of one class, in voxels; p is the prediction, g the target."""

    intersection: Fraction  # Σ p·g
    soft_intersection: Fraction  # Σ min(p, g)
    prediction: Fraction  # Σ p
    prediction_squared: Fraction  # Σ p²
    target: Fraction  # Σ g
    target_squared: Fraction  # Σ g²


@dataclass(frozen=True)
class AllSums(Sums):
    """And those for losses that look at all voxels."""

    voxels: Fraction
    inside: Fraction  # Σ g·(g − p)²
    outside: Fraction  # Σ (1 − g)·(g − p)²


class Derivatives(NamedTuple):
    """Derivatives of the reduced loss by the sums of one class."""

    intersection: float
    prediction: float
    inside: float = 0.0
    outside: float = 0.0


def all_sums(prediction: Image, target: Image) -> AllSums:
    """As `sums`."""
    base, voxels = sums(prediction, target), Fraction(prediction.size)
    if prediction.dtype.kind in "biu" and target.dtype.kind in "biu":
        wrong = (base.target - base.intersection, base.prediction - base.intersection)
    else:
        p, g = _rationals(prediction), _rationals(target)
        wrong = (_sum(g * (g - p) ** 2), _sum((1 - g) * (g - p) ** 2))
    return AllSums(**vars(base), voxels=voxels, inside=wrong[0], outside=wrong[1])


def sums(prediction: Image, target: Image) -> Sums:
    """Sum over two images of one shape with values in [0, 1]; of bool or integers, by counting.

    The result is exact, except for float images of more than `SMALL` voxels: there each sum is rounded once,
    to 53 bits, and so is every product of two float64 values.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"expected two images of one shape, received {prediction.shape} and {target.shape}")
    if prediction.dtype.kind in "biu" and target.dtype.kind in "biu":
        p, g = prediction != 0, target != 0
        if (prediction > 1).any() or (target > 1).any():
            raise ValueError("expected masks of 0 and 1, received a label map; see label_sums")
        both, predicted, wanted = (Fraction(int(np.count_nonzero(mask))) for mask in (p & g, p, g))
        return Sums(both, both, predicted, predicted, wanted, wanted)
    p, g = _rationals(prediction), _rationals(target)
    return Sums(*(_sum(terms) for terms in (p * g, np.minimum(p, g), p, p * p, g, g * g)))


def label_sums(prediction: Image, target: Image, classes: int) -> list[Sums]:
    """Count two label maps of one shape, per class 0 … `classes` − 1."""
    return [sums(prediction == label, target == label) for label in range(classes)]


def pair_counts(prediction: Image, target: Image) -> Counter[tuple[Any, Any]]:
    """Count the voxels of each pair of labels (p, g) of two label maps of one shape, of any number of labels.

    Runs of one pair are found first, and only they are sorted: label maps are piecewise constant.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"expected two images of one shape, received {prediction.shape} and {target.shape}")
    counts: Counter[tuple[Any, Any]] = Counter()
    # In the order in which NIfTI stores voxels, and so without a copy.
    predicted, wanted = prediction.ravel(order="F"), target.ravel(order="F")
    for start in range(0, predicted.size, BLOCK):
        p, g = predicted[start : start + BLOCK], wanted[start : start + BLOCK]
        runs = _run_starts(p, g)
        lengths = np.diff(runs, append=p.size)
        p, g = p[runs], g[runs]
        order = np.lexsort((g, p))
        p, g = p[order], g[order]
        pairs = _run_starts(p, g)
        totals = np.add.reduceat(lengths[order], pairs)
        for pair_p, pair_g, total in zip(p[pairs].tolist(), g[pairs].tolist(), totals.tolist(), strict=True):
            counts[pair_p, pair_g] += total
    return counts


def dice(s: Sums, smooth_nr: Number = 0, smooth_dr: Number = 0, *, squared: bool = False) -> Fraction:
    """Dice = (2 TP + s_n) / (Σp + Σg + s_d), with `squared` (2 TP + s_n) / (Σp² + Σg² + s_d)."""
    p, g = (s.prediction_squared, s.target_squared) if squared else (s.prediction, s.target)
    return _ratio(2 * s.intersection + Fraction(smooth_nr), p + g + Fraction(smooth_dr))


def jaccard(s: Sums, smooth_nr: Number = 0, smooth_dr: Number = 0, *, squared: bool = False) -> Fraction:
    """IoU = (2 TP + s_n) / (2(Σp + Σg − TP) + s_d), with `squared` Σp² and Σg²."""
    p, g = (s.prediction_squared, s.target_squared) if squared else (s.prediction, s.target)
    return _ratio(2 * s.intersection + Fraction(smooth_nr), 2 * (p + g - s.intersection) + Fraction(smooth_dr))


def tversky(
    s: Sums, alpha: Number = 0.5, beta: Number = 0.5, smooth_nr: Number = 0, smooth_dr: Number = 0
) -> Fraction:
    """TI = (TP + s_n) / (TP + α FP + β FN + s_d)."""
    false_positives, false_negatives = s.prediction - s.intersection, s.target - s.intersection
    errors = Fraction(alpha) * false_positives + Fraction(beta) * false_negatives
    return _ratio(s.intersection + Fraction(smooth_nr), s.intersection + errors + Fraction(smooth_dr))


def generalized_dice(
    classes: Sequence[Sums], weight_type: str = "square", smooth_nr: Number = 0, smooth_dr: Number = 0
) -> Fraction:
    """GD = (2 Σ_c w TP + s_n) / (Σ_c w(Σp + Σg) + s_d) over the classes of one sample.

    w = 1/(Σg)², 1/Σg or 1 ("square", "simple", "uniform"), divided by the largest finite w; where Σg = 0 it is 1.
    """
    power = {"square": 2, "simple": 1, "uniform": 0}[weight_type]
    raw = [1 / s.target**power if s.target else None for s in classes]
    largest = max((w for w in raw if w is not None), default=Fraction(1))
    weights = [Fraction(1) if w is None else w / largest for w in raw]
    numerator = sum(2 * w * s.intersection for w, s in zip(weights, classes, strict=True))
    denominator = sum(w * (s.prediction + s.target) for w, s in zip(weights, classes, strict=True))
    return _ratio(numerator + Fraction(smooth_nr), denominator + Fraction(smooth_dr))


def _ratio(numerator: Fraction, denominator: Fraction) -> Fraction:
    """An empty target and an empty prediction have a score of 1."""
    return numerator / denominator if denominator else Fraction(1)


def _run_starts(p: Image, g: Image) -> NDArray[np.intp]:
    """Where a run of equal pairs (p, g) begins."""
    return np.flatnonzero(np.concatenate([[True], (p[1:] != p[:-1]) | (g[1:] != g[:-1])]))


def _rationals(image: Image) -> Image:
    if image.size > SMALL:
        return image.astype(np.float64).ravel()
    return np.array([Fraction(value) for value in image.ravel().tolist()], dtype=object)


def _sum(terms: Image) -> Fraction:
    return sum(terms.tolist(), Fraction(0)) if terms.dtype == object else Fraction(math.fsum(terms.tolist()))
