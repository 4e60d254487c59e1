"""What losses of all four entries of a confusion matrix must return, for the exact sums of one class.

Nothing here knows torch or voxloss. With N voxels, TP = Σpg, FP = Σp − TP, FN = Σg − TP, TN = N − Σp − Σg + TP.
"""

from __future__ import annotations

import math
from fractions import Fraction

from voxloss_verify.oracle.claims import Claims
from voxloss_verify.oracle.sums import AllSums, Derivatives

FAMILIES = ("mcc", "sensitivity_specificity")


def value(claims: Claims, s: AllSums) -> float:
    """The loss of one class."""
    if claims.family == "sensitivity_specificity":
        return sum(float(share * error / over) for share, error, over in _errors(claims, s) if over)
    if s.intersection == s.prediction == s.target:
        return 0.0
    numerator, product = _matthews(claims, s)
    return 1 - float(numerator) / math.sqrt(product) if product > 0 else 1.0


def derivatives(claims: Claims, s: AllSums) -> Derivatives:
    """By Σpg and Σp, or by the squared errors inside and outside of the target."""
    if claims.family == "sensitivity_specificity":
        by_errors = (float(share / over) if over else 0.0 for share, _, over in _errors(claims, s))
        return Derivatives(0.0, 0.0, *by_errors)
    numerator, product = _matthews(claims, s)
    if product <= 0 or s.intersection == s.prediction == s.target:
        return Derivatives(0.0, 0.0)
    root = math.sqrt(product)
    product_by_p = s.target * (s.voxels - s.target) * (s.voxels - 2 * s.prediction)
    by_p = float(s.target) / root + float(numerator * product_by_p / product) / (2 * root)
    return Derivatives(-float(s.voxels) / root, by_p)


def tolerance(claims: Claims, s: AllSums, rounding: float) -> float:
    """How far a value may be off if each probability may be, by `rounding`, in a random direction."""
    if claims.family == "sensitivity_specificity":
        return rounding
    off = Fraction(rounding * math.sqrt(s.voxels))
    here = value(claims, s)
    found = [rounding]
    for by_i, by_p in ((off, off), (off, -off), (-off, off), (-off, -off)):
        near = AllSums(**{**vars(s), "intersection": s.intersection + by_i, "prediction": s.prediction + by_p})
        if 0 <= near.prediction <= s.voxels:
            found.append(abs(value(claims, near) - here))
    return max(found)


def _errors(claims: Claims, s: AllSums) -> tuple[tuple[Fraction, Fraction, Fraction], ...]:
    r = Fraction(claims.inside)
    return (r, s.inside, s.target), (1 - r, s.outside, s.voxels - s.target)


def _matthews(claims: Claims, s: AllSums) -> tuple[Fraction, Fraction]:
    """TP·TN − FP·FN = N·Σpg − Σp·Σg, and what the root is of; with the smoothing."""
    product = s.prediction * s.target * (s.voxels - s.prediction) * (s.voxels - s.target)
    numerator = s.voxels * s.intersection - s.prediction * s.target
    return numerator + Fraction(claims.smooth_nr), product + Fraction(claims.smooth_dr)
