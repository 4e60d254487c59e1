"""Laws 11 and 12: between 0 and 1, 0 only if perfect, and lower for every voxel that is put right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from voxloss_verify.laws.law import is_true, law
from voxloss_verify.laws.record import Finding
from voxloss_verify.laws.setting import Setting
from voxloss_verify.oracle import exact
from voxloss_verify.oracle.generated import volumes
from voxloss_verify.oracle.volumes import Volume, certain
from voxloss_verify.request import Level
from voxloss_verify.subject.subject import Subject


def _bounded(subject: Subject, setting: Setting) -> str | None:
    for claims in subject.claims.formulas:
        if claims.family == "formula":
            return "the bounds of a formula of its own are not known"
        if claims.by_voxel:
            continue
        if claims.smooth_nr != claims.smooth_dr:
            return "s_n = s_d is not declared"
        if subject.claims.parts and claims.offset == 1:
            continue  # of the lower bound, 0, weights and sums make nothing else
        if claims.class_weight is not None and claims.family != "generalized_dice":
            return "class weights are declared, which scale the bounds"
        if claims.reduction == "sum":
            return "a sum of losses is declared, whose bound depends on how many there are"
    return None


@law(
    "11",
    "0 ≤ L ≤ 1, and 0 only if perfect",
    level=Level.formula,
    because="a bound of the score that is declared",
    oracle="the bounds; whether two masks are equal",
    domain=_bounded,
    strategy=lambda claims: volumes(claims, ignored=False),
)
def bounds(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """0 ≤ L ≤ 1 for s_n = s_d (−1 ≤ L ≤ 0 if L = −score); for masks L is at its least iff p = g.

    Logarithms, and so compounds, have no upper bound; that of Matthews' correlation is 2.
    """
    claims = subject.claims
    found = subject.value(volume)
    wanted = exact.expected(claims, volume)
    loss = found.value - claims.perfect
    bounds = [("L ≥ 0", float(-loss.min()))]
    if not (claims.parts or claims.by_voxel or claims.family in ("mcc", "logarithmic_dice")):
        bounds += [("L ≤ 1", float(loss.max() - 1))]
    for what, excess in bounds:
        # NaN is no bound.
        beyond = excess if math.isnan(excess) else max(0.0, excess)
        yield Finding(what, float(loss.ravel()[0]), 0.0, wanted.tolerance, beyond)
    p, g = exact.probabilities(volume.input, claims.activation), exact.one_hot_target(volume)
    masks = np.isin(p, (0, 1)).all() and np.isin(g, (0, 1)).all()
    unclear = any(
        each.empty != "perfect" or each.family == "generalized_dice" or each.label_smoothing
        for each in claims.formulas
    )
    if not masks or unclear:
        return
    counting = claims.counting(volume.channels)
    equal = bool((p[:, counting] == g[:, counting]).all())
    least = float(wanted.value.max()) - claims.perfect
    if equal:
        yield is_true("L = 0 as p = g", float(abs(loss).max()) <= wanted.tolerance, float(loss.max()))
    elif all(each.absent == "count" for each in claims.formulas) and least > 2 * wanted.tolerance:
        # With huge smoothing, or α or β of 0, an error may cost less than rounding.
        yield is_true("L > 0 as p ≠ g", float(loss.max()) > wanted.tolerance, float(loss.max()))


def _monotone(subject: Subject, setting: Setting) -> str | None:
    for claims in subject.claims.formulas:
        if claims.family == "formula":
            return "a formula of its own need not fall with every error"
        if claims.label_smoothing:
            return "a smoothed target is declared, which a sure prediction overshoots"
        if claims.family in ("tversky", "focal_tversky") and not (claims.alpha > 0 and claims.beta > 0):
            return "α > 0 and β > 0 are not declared"
        if claims.class_weight is not None:
            return "class weights are declared, which may make a class count for nothing"
        if claims.absent != "count" or claims.average == "micro":
            return "classes that are absent or share one ratio need not improve by a voxel put right"
        if claims.smooth_nr > claims.smooth_dr:
            return "s_n ≤ s_d is not declared"
    return None


@law(
    "12a",
    "correcting a voxel lowers the loss",
    level=Level.formula,
    because="the order of the declared formula's values",
    oracle="the order of two losses",
    tolerance="strict",
    domain=_monotone,
    strategy=lambda claims: volumes(
        claims, prediction="hard", target="hard", ignored=False, dtypes=("float64", "float32")
    ),
)
def repair(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Correcting one wrong voxel of a hard prediction strictly lowers the loss."""
    claims = subject.claims
    p, g = exact.probabilities(volume.input, claims.activation) == 1, exact.one_hot_target(volume) == 1
    counting = claims.counting(volume.channels)
    wrong = np.argwhere((p != g)[:, counting].any(1))
    if not len(wrong):
        return
    before = subject.value(volume).value
    for voxel in wrong[:3]:
        item, *where = voxel.tolist()
        better = p.copy()
        better[(item, slice(None), *where)] = g[(item, slice(None), *where)]
        mended = volume.changed(input=certain(claims, better).astype(volume.input.dtype))
        gain = float(exact.expected(claims, volume).value.sum() - exact.expected(claims, mended).value.sum())
        if not gain > 4 * exact.expected(claims, volume).tolerance:  # NaN is no gain
            continue  # less than rounding, as for a voxel of a huge class beside a smoothed one
        after = subject.value(mended).value
        change = float(after.sum() - before.sum())
        lower = is_true(f"a lower loss after putting voxel {[item, *where]} right", change < 0, change)
        yield replace(lower, other=mended)


def _signed(subject: Subject, setting: Setting) -> str | None:
    claims = subject.claims
    if any(each.squared for each in claims.formulas):
        return "a check of linear forms, not of squared denominators"
    if claims.activation == "softmax":
        return "softmax mixes the classes of a voxel: ∂L/∂logit has no sign of its own"
    if any(each.family == "mcc" for each in claims.formulas):
        return "a correlation below 0 may grow with an error"
    if any(each.overlap != "product" for each in claims.formulas):
        return "a check of Σ p·g, not of Σ min(p, g)"
    return _monotone(subject, setting)


@law(
    "12b",
    "the sign of the gradient",
    level=Level.formula,
    because="the sign of the declared formula's derivative",
    oracle="the sign",
    tolerance="0",
    domain=_signed,
    strategy=lambda claims: volumes(claims, prediction="soft", target="hard", ignored=False),
)
def signs(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """∂L/∂p < 0 where g = 1 and ≥ 0 where g = 0."""
    claims = subject.claims
    counting = claims.counting(volume.channels)
    found = subject.gradient(volume)
    assert found.gradient is not None
    derivative, g = found.gradient[:, counting], exact.one_hot_target(volume)[:, counting] == 1
    wanted = exact.gradient(claims, volume)[:, counting]
    inside, outside = derivative[g & (wanted < 0)], derivative[~g]
    if inside.size:
        yield is_true("∂L/∂p < 0 where g = 1", bool((inside < 0).all()), float(inside.max()))
    if outside.size:
        yield is_true("∂L/∂p ≥ 0 where g = 0", bool((outside >= 0).all()), float(outside.min()))
