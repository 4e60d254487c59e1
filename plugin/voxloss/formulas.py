"""Statistics → score per class: one equation and one paper each, in ordinary torch on `[B, C]`.

I, P, T are the fields intersection, prediction and target of `RegionStatistics`; s_n and s_d the smoothing of
numerator and denominator. A score is 1 for a perfect prediction; its loss is 1 − score. Where a denominator is
0 (empty target and empty prediction, no smoothing) the score is 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from voxloss.statistics import RegionStatistics

# Below this a linear segment replaces focal_power: the spacing of float32 below 1, which is the accuracy of 1 −
# TI for a float32 prediction.
FOCAL_LINEAR_BELOW = 2.0**-23


def dice(statistics: RegionStatistics, smooth_nr: float = 0.0, smooth_dr: float = 0.0) -> Tensor:
    """Dice = (2I + s_n) / (P + T + s_d) per class, `[B, C]`.

    With plain sums the form of Drozdzal et al. 2016; with squared sums V-Net's (Milletari et al. 2016).
    """
    s = statistics
    return _ratio(2 * s.intersection, s.prediction + s.target, smooth_nr, smooth_dr)


def jaccard(statistics: RegionStatistics, smooth_nr: float = 0.0, smooth_dr: float = 0.0) -> Tensor:
    """IoU = (2I + s_n) / (2(P + T − I) + s_d) per class, `[B, C]` (Jaccard 1912; soft: Rahman & Wang 2016).

    The smoothing stands beside 2I, as in MONAI, so that Dice = 2·IoU/(1 + IoU) holds for every s_n = s_d.
    """
    s = statistics
    union = s.prediction + s.target - s.intersection
    return _ratio(2 * s.intersection, 2 * union, smooth_nr, smooth_dr)


def tversky(
    statistics: RegionStatistics,
    alpha: float = 0.5,
    beta: float = 0.5,
    smooth_nr: float = 0.0,
    smooth_dr: float = 0.0,
) -> Tensor:
    """TI = (I + s_n) / (I + α(P − I) + β(T − I) + s_d) per class, `[B, C]` (Salehi et al. 2017).

    α weights false positives, β false negatives. TI(½, ½, s) = Dice(2s), TI(1, 1) = IoU at s = 0.
    """
    s = statistics
    with_false_positives = torch.lerp(s.intersection, s.prediction, alpha)
    all_three = torch.add(with_false_positives, s.false_negatives, alpha=beta)
    return _ratio(s.intersection, all_three, smooth_nr, smooth_dr)


def generalized_dice(
    statistics: RegionStatistics,
    weight_type: str = "square",
    smooth_nr: float = 0.0,
    smooth_dr: float = 0.0,
    class_weight: Tensor | None = None,
) -> Tensor:
    """GD = (2 Σ_c w_c I_c + s_n) / (Σ_c w_c (P_c + T_c) + s_d) over the classes, `[B, 1]` (Sudre et al. 2017).

    w_c = 1/T_c², 1/T_c or 1 ("square", "simple", "uniform"), relative to the largest finite one of the sample,
    so that the sums keep the size of voxels beside the smoothing. A class absent from the target has that
    largest weight, 1; if all are absent, each has 1. `class_weight` `[C]` or `[B, C]` multiplies w.
    """
    s = statistics
    if weight_type == "uniform":
        weights = torch.ones_like(s.target)
    else:
        absent = s.target <= 0
        smallest = s.target.masked_fill(absent, torch.inf).amin(1, keepdim=True)
        relative = smallest.expand_as(absent).masked_fill(absent, 1) / s.target.masked_fill(absent, 1)
        weights = relative if weight_type == "simple" else relative * relative
    if class_weight is not None:
        weights = weights * class_weight
    numerator = 2 * (weights * s.intersection).sum(1, keepdim=True)
    denominator = (weights * (s.prediction + s.target)).sum(1, keepdim=True)
    return _ratio(numerator, denominator, smooth_nr, smooth_dr)


def penalty(distance: Tensor, k: float) -> Tensor:
    """x / (1 + k(1 − x)), for x = 1 − score (Yang et al. 2019 on Generalized Dice, k = 2.5).

    From 0 to 1 like x itself, but below it in between: the derivative is 1/(1 + k) at x = 0 and 1 + k at x = 1.
    """
    return distance / (1 + k * (1 - distance))


def matthews(
    true_positives: Tensor,
    false_positives: Tensor,
    false_negatives: Tensor,
    true_negatives: Tensor,
    smooth_nr: float = 0.0,
    smooth_dr: float = 0.0,
) -> Tensor:
    """MCC = (TP·TN − FP·FN + s_n) / √((TP + FP)(TP + FN)(TN + FP)(TN + FN) + s_d) per class, in [−1, 1].

    Matthews 1975; soft: Abhishek & Hamarneh 2021. It is 1 without false positives and false negatives, also for
    an empty target, and otherwise 0 where the root is 0.
    """
    tp, fp, fn, tn = true_positives, false_positives, false_negatives, true_negatives
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn) + smooth_dr
    zero = product <= 0  # NaN is not: it must reach the loss, where GradScaler detects it
    root = product.masked_fill(zero, 1).sqrt()  # its derivative is infinite at 0
    score = ((tp * tn - fp * fn + smooth_nr) / root).masked_fill(zero, 0)
    return score.masked_fill((fp == 0) & (fn == 0), 1)


def sensitivity_specificity(
    inside: Tensor, outside: Tensor, target: Tensor, voxels: Tensor, r: float = 0.05
) -> Tensor:
    """r · Σ g(g − p)² / Σg + (1 − r) · Σ (1 − g)(g − p)² / Σ(1 − g) per class, `[B, C]` (Brosch et al. 2015).

    This is a loss and not a score: the mean squared errors where the target is and where it is not, which for
    masks are 1 − sensitivity and 1 − specificity. An error over no voxels is 0.
    """
    inside, outside = ratio_or(0, inside, target), ratio_or(0, outside, voxels - target)
    return torch.lerp(outside, inside, r)


def focal_power(distance: Tensor, gamma: float) -> Tensor:
    """x^(1/γ) per class, for x = 1 − score (Abraham & Khan 2019: γ = 4/3 on the Tversky index).

    For γ > 1 the derivative is infinite at x = 0, and 1 − score can round below 0. Below ε = 2⁻²³, the resolution
    of a float32 prediction, the linear segment x·ε^(1/γ − 1) therefore replaces the power: finite, never NaN, at
    most .11·ε^(3/4) ≈ 7e-7 away from the power for γ = 4/3.
    """
    exponent = 1 / gamma
    return distance * distance.clamp(min=FOCAL_LINEAR_BELOW) ** (exponent - 1)


def log_cosh(x: Tensor, up_to_one: bool = False) -> Tensor:
    """Log cosh x per class, for x = 1 − score (Jadon 2020 on Dice), without overflow, or cancellation near 0.

    `up_to_one`: no x is beyond ±1, so the branch for larger values is skipped.
    """
    near = x if up_to_one else x.clamp(-1, 1)
    small = torch.log1p(2 * torch.sinh(near / 2) ** 2)  # cosh x = 1 + 2 sinh²(x/2)
    if up_to_one:
        return small
    large = x.abs() + torch.log1p(torch.exp(-2 * x.abs())) - math.log(2)
    return torch.where(x.abs() < 1, small, large)


def _ratio(numerator: Tensor, denominator: Tensor, smooth_nr: float, smooth_dr: float) -> Tensor:
    """(numerator + s_n) / (denominator + s_d), or 1 for a division by 0, which s_d > 0 excludes."""
    if smooth_nr:
        numerator = numerator + smooth_nr
    if smooth_dr:
        return numerator / (denominator + smooth_dr)
    return ratio_or(1, numerator, denominator)


def ratio_or(otherwise: float, numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, or a number without a gradient where the denominator is not above 0."""
    empty = denominator <= 0
    return (numerator / denominator.masked_fill(empty, 1)).masked_fill(empty, otherwise)
