"""What a Dice or IoU metric must return of hard label maps, from whole numbers of voxels."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from voxloss_verify.oracle.claims import Claims
from voxloss_verify.oracle.volumes import Volume, one_hot

# A score is a ratio of whole numbers, and a mean of such: how far rounding in float32 carries it.
TOLERANCE = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}


def masks(claims: Claims, volume: Volume) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Prediction and reference as one mask per class, `[B, C, ...]`, False in ignored voxels."""
    p = volume.input > 0.5
    g = volume.target > 0.5 if volume.is_one_hot else one_hot(volume.target, volume.channels)
    if claims.ignore_index is None or volume.is_one_hot:
        return p, g
    keep = volume.target != claims.ignore_index
    return p & keep, g & keep


def counts(claims: Claims, volume: Volume) -> NDArray[np.int64]:
    """TP, P and G of each sample and class that counts, `[3, B, C]`; of the batch, B is 1."""
    p, g = masks(claims, volume)
    axes = tuple(range(2, p.ndim))
    found = np.stack([mask.sum(axes, dtype=np.int64) for mask in (p & g, p, g)]) * volume.times
    found = found[:, :, claims.counting(volume.channels)]
    return found.sum(1, keepdims=True) if claims.batch else found


def value(claims: Claims, volume: Volume) -> NDArray[np.float64]:
    """The scores `[B, C]`, of Generalized Dice `[B, 1]`, or their mean without NaN: by sample, then of all."""
    both, predicted, reference = counts(claims, volume)
    if claims.family == "generalized_dice_metric":
        items = zip(both.tolist(), predicted.tolist(), reference.tolist(), strict=True)
        scores = np.array([[_generalized(claims, *item)] for item in items])
    else:
        scores = np.empty(both.shape)
        for at in np.ndindex(both.shape):
            scores[at] = _score(claims, int(both[at]), int(predicted[at]), int(reference[at]))
    if claims.reduction == "none":
        return scores if "B" in claims.unreduced.split() else np.asarray([_mean(column) for column in scores.T])
    if claims.reduction == "sum":
        return np.asarray(np.nansum(scores))
    if claims.mean_without_nan == "over all":
        return np.asarray(_mean(scores.ravel()))
    return np.asarray(_mean(np.asarray([_mean(row) for row in scores])))


def _mean(scores: NDArray[np.float64]) -> float:
    """Of those that are no NaN."""
    known = [Fraction(float(x)) for x in scores if not np.isnan(x)]
    return float(sum(known, Fraction(0)) / len(known)) if known else float("nan")


def _score(claims: Claims, both: int, predicted: int, reference: int) -> float:
    """2 TP / (P + G) or TP / (P + G − TP), and what is declared of empty ones."""
    if not reference and claims.absent != "count":
        return 1.0 if claims.absent == "perfect" else float("nan")
    if not predicted + reference:
        return _EMPTY[claims.empty]
    if claims.family == "dice_metric":
        return float(Fraction(2 * both, predicted + reference))
    return float(Fraction(both, predicted + reference - both))


def _generalized(claims: Claims, both: list[int], predicted: list[int], reference: list[int]) -> float:
    """2 Σ_c w TP / Σ_c w (P + G) of the classes of one sample."""
    power = {"square": 2, "simple": 1, "uniform": 0}[claims.weight_type]
    known = [Fraction(1, g**power) if g else None for g in reference]
    largest = max((w for w in known if w is not None), default=Fraction(1))
    of_absent = largest if claims.absent == "count" else Fraction(0)
    weights = [of_absent if w is None else w for w in known]
    below = sum(w * (p + g) for w, p, g in zip(weights, predicted, reference, strict=True))
    if not below:
        return _EMPTY[claims.empty]
    return float(sum(2 * w * tp for w, tp in zip(weights, both, strict=True)) / below)


_EMPTY = {"perfect": 1.0, "worst": 0.0, "nan": float("nan")}
