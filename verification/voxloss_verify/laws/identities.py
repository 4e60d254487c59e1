"""Laws 6–10: how Dice, IoU, Tversky and Focal Tversky follow from each other, and what they are at p = g."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
from hypothesis.strategies import SearchStrategy
from sklearn.metrics import f1_score, jaccard_score

from voxloss_verify.laws.law import close, close_value, law, of_scores, unlabelled
from voxloss_verify.laws.record import Finding
from voxloss_verify.laws.setting import Setting
from voxloss_verify.oracle import exact
from voxloss_verify.oracle.claims import Claims
from voxloss_verify.oracle.generated import volumes
from voxloss_verify.oracle.sums import dice, jaccard, tversky
from voxloss_verify.oracle.volumes import Volume, certain, target_for
from voxloss_verify.request import Level
from voxloss_verify.subject.subject import Subject
from voxloss_verify.tolerances import LOSS


def _alike(claims: Claims, **options: str) -> SearchStrategy[Volume]:
    """Volumes in which all channels have the same sums, so that a mean over classes is the loss of each."""
    drawn = volumes(claims, samples=1, ignored=False, **options).map(alike)  # type: ignore[arg-type]
    # Of classes without target, which may be treated apart, there is no score.
    return drawn if claims.absent == "count" else drawn.filter(lambda volume: bool(volume.target.any()))


def alike(volume: Volume) -> Volume:
    """Every cyclic change of the channels, side by side along the last axis."""
    channels, axis = volume.channels, volume.input.ndim - 1
    shifts = range(channels)
    input = np.concatenate([np.roll(volume.input, k, axis=1) for k in shifts], axis)
    if volume.is_one_hot:
        target = np.concatenate([np.roll(volume.target, k, axis=1) for k in shifts], axis)
    else:
        target = np.concatenate([(volume.target + k) % channels for k in shifts], axis)
    return volume.changed(input=input, target=target)


def _plain(subject: Subject, families: tuple[str, ...]) -> str | None:
    """Why the loss is not offset − score of one of these families for volumes whose classes are all alike."""
    claims = subject.claims
    if claims.family not in families:
        return f"a check of {', '.join(families)}, not of {claims.family}"
    if claims.class_weight is not None:
        return "class weights are declared, and the check is one of a single class"
    if claims.average == "micro":
        return "all classes share one ratio, and the check is one of a single class"
    return unlabelled(subject)


def _scores(subject: Subject, volume: Volume) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float64]], str]:
    """The scores that the loss implies, one for each term of a sum or a mean."""
    found = subject.value(volume)
    terms = 1
    if subject.claims.reduction == "sum" and subject.claims.family != "generalized_dice":
        terms = len(subject.claims.counting(volume.channels))
    return subject.claims.offset - found.value / terms, found.dtype


def _dice_and_iou(subject: Subject, setting: Setting) -> str | None:
    reason = _plain(subject, ("dice", "jaccard"))
    if reason is None and subject.claims.smooth_nr != subject.claims.smooth_dr:
        reason = "s_n = s_d is not declared"
    return reason


@law(
    "6",
    "Dice is 2J/(1 + J)",
    level=Level.formula,
    because="an identity of the scores",
    oracle="the other score, from integer counts (scikit-learn's where nothing is smoothed) and exact sums",
    domain=_dice_and_iou,
    strategy=_alike,
)
def dice_and_jaccard(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """D = 2J/(1 + J) per class, for every s = s_n = s_d beside 2 TP."""
    claims = subject.claims
    scores, dtype = _scores(subject, volume)
    s = exact.region_sums(claims, volume)[0][0]
    if claims.overlap == "min":
        s = replace(s, intersection=s.soft_intersection)
    smooth = Fraction(claims.smooth_nr) * (2 if claims.family == "jaccard" else 1)
    witness = _scikit_learn(claims, volume)
    if claims.family == "dice":
        j = jaccard(s, smooth, smooth, squared=claims.squared) if witness is None else witness
        wanted = float(2 * j / (1 + j))
    else:
        d = dice(s, smooth, smooth, squared=claims.squared) if witness is None else witness
        wanted = float(d / (2 - d))
    if wanted == 1 and not s.prediction + s.target and not smooth:
        wanted = float(claims.empty == "perfect")
    yield close("score", scores, np.full(scores.shape, wanted), LOSS[claims.resolution(volume.dtype)], dtype)


def _scikit_learn(claims: Claims, volume: Volume) -> float | None:
    """The other score of class 0 by scikit-learn, if prediction and target are masks and nothing is smoothed."""
    p, g = exact.probabilities(volume.input, claims.activation)[:, 0], exact.one_hot_target(volume)[:, 0]
    if claims.smooth_nr or not (np.isin(p, (0, 1)).all() and np.isin(g, (0, 1)).all() and (p.any() or g.any())):
        return None
    other = jaccard_score if claims.family == "dice" else f1_score
    return float(other(g.ravel() == 1, p.ravel() == 1, zero_division=0))


def _tversky_domain(subject: Subject, setting: Setting) -> str | None:
    claims = subject.claims
    reason = _plain(subject, ("dice", "jaccard", "tversky"))
    if reason is None and claims.squared:
        reason = "squared denominators are declared, which Tversky does not have"
    if reason is None and claims.family == "tversky":
        if claims.alpha == claims.beta == 0.5 or claims.alpha == claims.beta == 1:
            return None
        return "neither α = β = ½ nor α = β = 1 is declared"
    return reason


@law(
    "7",
    "Tversky(½, ½) is Dice, Tversky(1, 1) is IoU",
    level=Level.formula,
    because="an identity of the scores",
    oracle="the other formula, of exact sums",
    domain=_tversky_domain,
    strategy=_alike,
)
def tversky_and_the_others(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Tversky(½, ½, s/2) = Dice(s) and Tversky(1, 1, s) = IoU(s), s beside TP."""
    claims = subject.claims
    twice, half = partial(Fraction.__mul__, Fraction(2)), partial(Fraction.__mul__, Fraction(1, 2))
    n, d = Fraction(claims.smooth_nr), Fraction(claims.smooth_dr)
    s = exact.region_sums(claims, volume)[0][0]
    if claims.overlap == "min":
        s = replace(s, intersection=s.soft_intersection)
    if claims.family == "dice":
        wanted = tversky(s, 0.5, 0.5, half(n), half(d))
    elif claims.family == "jaccard":
        wanted = tversky(s, 1, 1, n, d)
    elif claims.alpha == 0.5:
        wanted = dice(s, twice(n), twice(d))
    else:
        wanted = jaccard(s, twice(n), twice(d))
    if not s.prediction + s.target + d:
        wanted = Fraction(claims.empty == "perfect")
    scores, dtype = _scores(subject, volume)
    yield close(
        "score", scores, np.full(scores.shape, float(wanted)), LOSS[claims.resolution(volume.dtype)], dtype
    )


@law(
    "8",
    "Focal Tversky is a power of Tversky",
    level=Level.formula,
    because="an identity of the scores",
    oracle="the Tversky index of exact sums, and the loss without its power",
    domain=lambda subject, setting: _plain(subject, ("focal_tversky",)),
    strategy=partial(_alike, prediction="soft"),
)
def focal_tversky(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """L^(1/exponent) = 1 − Tversky per class; with γ = 1 Focal Tversky is Tversky."""
    claims = subject.claims
    s = exact.region_sums(claims, volume)[0][0]
    distance = 1 - float(exact.score(claims, s))
    if distance > max(claims.linear_below, 1e-3):
        scores, _ = _scores(subject, volume)
        yield close(
            "loss without its power",
            np.maximum(claims.offset - scores, 0) ** (1 / claims.exponent),
            np.full(scores.shape, distance),
            LOSS[claims.resolution(volume.dtype)] * max(1.0, 1 / claims.exponent),
        )
    without = subject.with_arguments(replace(claims, gamma=1.0, linear_below=0.0), gamma=1.0)
    if without is not None and claims.gamma_as != "1-gamma":
        plain = replace(claims, family="tversky")
        finding = close_value("loss with γ = 1", without, without.value(volume), volume, plain)
        yield replace(finding, code=tuple(without.source.splitlines()))


def _two_masks(subject: Subject, setting: Setting) -> str | None:
    claims = subject.claims
    if of_scores(subject) is not None:
        return of_scores(subject)
    if claims.family == "generalized_dice":
        return "its weights are those of the target, so target and prediction are not alike"
    if claims.absent != "count":
        return "which classes are absent depends on the target alone"
    return unlabelled(subject)


def swapped(claims: Claims, volume: Volume) -> Volume:
    """Prediction and target in each other's place; both must be masks."""
    masks = exact.probabilities(volume.input, claims.activation) == 1
    labels = masks.argmax(1, keepdims=True) if masks.shape[1] > 1 else masks.astype(np.int64)
    target = masks if claims.has_channels else target_for(claims, labels, volume.channels)
    input = certain(claims, exact.one_hot_target(volume)).astype(volume.input.dtype)
    return volume.changed(input=input, target=target)


@law(
    "9",
    "symmetry",
    level=Level.formula,
    because="a symmetry of the scores",
    oracle="the loss with prediction and target swapped, and α with β",
    domain=_two_masks,
    strategy=lambda claims: volumes(claims, prediction="hard", target="hard", ignored=False),
)
def symmetry(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Dice and IoU: L(p, g) = L(g, p). Tversky: T_αβ(p, g) = T_βα(g, p)."""
    claims = subject.claims
    other_way = swapped(claims, volume)
    found = subject.value(volume)
    turned = replace(claims, alpha=claims.beta, beta=claims.alpha)
    tolerance = exact.expected(claims, volume).tolerance
    if turned == claims:
        finding = close("loss", found.value, subject.value(other_way).value, tolerance, found.dtype)
        yield replace(finding, other=other_way)
        return
    yield close_value("loss, to be T_βα(g, p)", subject, found, other_way, turned)
    remade = subject.with_arguments(turned, alpha=claims.beta, beta=claims.alpha)
    if remade is not None:
        finding = close("loss", found.value, remade.value(other_way).value, tolerance, found.dtype)
        yield replace(finding, other=other_way)


def _soft_perfect(subject: Subject, setting: Setting) -> str | None:
    claims = subject.claims
    if of_scores(subject) is not None:
        return of_scores(subject)
    if not claims.soft_labels or claims.activation != "none":
        return "soft targets for probabilities are not declared"
    if claims.overlap != "min" and not (claims.squared and claims.family in ("dice", "jaccard")):
        return "a check of squared denominators and of Σ min(p, g)"
    if claims.smooth_nr != claims.smooth_dr:
        return "s_n = s_d is not declared"
    return None


@law(
    "10",
    "perfect soft predictions",
    level=Level.formula,
    because="what is declared of equal prediction and target",
    oracle="0",
    domain=_soft_perfect,
    strategy=lambda claims: volumes(claims, prediction="soft", target="soft", ignored=False),
)
def perfect_soft(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """L(q, q) = 0 for soft q, squared or min, with gradient 0; soft-label IoU obeys the triangle inequality."""
    claims = subject.claims
    perfect = volume.changed(target=volume.input)
    if claims.empty == "perfect" or claims.smooth_dr or volume.input.sum((0, 2)).all():
        found = subject.value(perfect)
        terms = claims.offset - 1 if claims.reduction != "sum" else 0
        tolerance = exact.expected(claims, perfect).tolerance
        wanted = np.full(found.value.shape, float(terms))
        yield replace(close("L(q, q)", found.value, wanted, tolerance, found.dtype), volume=perfect)
        derivatives = subject.gradient(perfect).gradient
        assert derivatives is not None
        slack = exact.gradient_tolerance(claims, perfect, volume.dtype)
        rest = close("∂L/∂p at p = g", derivatives, np.zeros_like(derivatives), slack, volume.dtype)
        yield replace(rest, volume=perfect)
    if claims.family == "jaccard" and claims.overlap == "min" and not claims.smooth_dr and claims.offset == 1:
        # a = p, b = g, c = the mean of p and an upside-down g.
        middle = ((volume.input + np.flip(volume.target, -1)) / 2).astype(volume.input.dtype)
        a_b = subject.value(volume).value
        a_c = subject.value(volume.changed(target=middle)).value
        c_b = subject.value(volume.changed(input=middle)).value
        excess = float((a_b - a_c - c_b).max())
        tolerance = 3 * exact.expected(claims, volume).tolerance
        yield Finding("L(a, b) − L(a, c) − L(c, b) ≤ 0", excess, 0.0, tolerance, max(0.0, excess))
