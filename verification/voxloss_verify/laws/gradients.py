"""Laws 20–23: closed-form gradients, and what follows from them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from hypothesis.strategies import SearchStrategy

from voxloss_verify.laws.edges import edges
from voxloss_verify.laws.law import close, each_finite, is_true, law, of_scores
from voxloss_verify.laws.record import Finding
from voxloss_verify.laws.setting import Setting
from voxloss_verify.oracle import exact
from voxloss_verify.oracle.claims import Claims
from voxloss_verify.oracle.entropy import SMALLEST
from voxloss_verify.oracle.generated import volumes
from voxloss_verify.oracle.sums import AllSums
from voxloss_verify.oracle.volumes import Volume
from voxloss_verify.request import Level
from voxloss_verify.subject.subject import Raised, Subject


def smooth(claims: Claims, volume: Volume) -> bool:
    """Whether the loss has a derivative there.

    No p = g in Σ min(p, g), no power at distance 0, no probability where the logarithm has its floor, no infinite
    derivative of a formula of its own, no other voxel about as hard as the last one that is chosen.
    """
    if claims.parts:
        return all(smooth(part, volume) for _, part in claims.parts)
    p = exact.probabilities(volume.input, claims.activation)
    if claims.overlap == "min" and (abs(p - exact.one_hot_target(volume)) < 2.0**-20).any():
        return False
    if claims.chooses_voxels and exact.gradient_tolerance(claims, volume, volume.dtype) == math.inf:
        return False
    if claims.by_voxel and claims.activation == "none":
        return bool(((p > SMALLEST) & (1 - p > SMALLEST)).all())
    if claims.family == "mcc":
        # Nor a root of 0, nor where the loss jumps to 0, as nothing is wrong.
        rows = exact.region_sums(claims, volume)
        sums = [s for row in rows for c in claims.counting(volume.channels) if isinstance(s := row[c], AllSums)]
        edges = ((s.prediction, s.target, s.voxels - s.prediction, s.voxels - s.target) for s in sums)
        return all(min(sides) > s.voxels * 2.0**-10 for s, sides in zip(sums, edges, strict=True))
    if claims.family in ("focal_tversky", "logarithmic_dice"):
        rows = exact.region_sums(claims, volume)
        distances = [1 - float(exact.score(claims, s)) for row in rows for s in row]
        return all(distance > 2.0**-10 for distance in distances)
    if claims.family == "formula":
        return bool(np.isfinite(exact.sum_derivatives(claims, exact.region_sums(claims, volume))).all())
    return True


def _smooth_volumes(claims: Claims, **options: object) -> SearchStrategy[Volume]:
    return volumes(claims, **options).filter(partial(smooth, claims))  # type: ignore[arg-type]


def _gradient_findings(subject: Subject, volume: Volume) -> Iterator[Finding]:
    found = subject.gradient(volume)
    assert found.gradient is not None
    wanted = exact.gradient(subject.claims, volume)
    tolerance = exact.gradient_tolerance(subject.claims, volume, volume.dtype)
    yield close("∂L/∂input", found.gradient, wanted, tolerance, volume.dtype)


@law(
    "20",
    "the gradient in closed form",
    level=Level.formula,
    because="the derivative of the declared formula",
    oracle="∂L/∂p from exact sums, by the chain rule through softmax or sigmoid",
    tolerance="GRADIENT, relative to the largest ∂L/∂p",
    strategy=_smooth_volumes,
)
def closed_form(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """∂D/∂p = (2g − D)/(P + Q); ∂J/∂p = (g − J(1 − g))/(P + Q − a); squared 2(g − D₂p)/(Σp² + Σg²)."""
    yield from _gradient_findings(subject, volume)


@law(
    "21",
    "the gradients of a voxel's logits add up to 0",
    level=Level.formula,
    because="the derivative of a softmax",
    oracle="0",
    tolerance="GRADIENT, relative to the largest ∂L/∂p",
    domain=lambda subject, setting: None if subject.claims.activation == "softmax" else "softmax is not declared",
    strategy=_smooth_volumes,
)
def zero_sum(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Σ_c ∂L/∂logit_c = 0 in every voxel, under softmax; and they are not all 0 where they should not be."""
    found = subject.gradient(volume)
    assert found.gradient is not None
    tolerance = exact.gradient_tolerance(subject.claims, volume, volume.dtype)
    sums = found.gradient.sum(1)
    yield close("Σ_c ∂L/∂logit_c", sums, np.zeros_like(sums), tolerance * volume.channels)


def _euler(subject: Subject, setting: Setting) -> str | None:
    claims = subject.claims
    if of_scores(subject) is not None:
        return of_scores(subject)
    if claims.activation != "none" or not claims.soft_labels:
        return "soft targets for probabilities are not declared"
    if claims.smooth_nr or claims.smooth_dr:
        return "s = 0 is not declared"
    if claims.absent != "count":
        return "which classes are absent changes"
    if _degree(claims) is None:
        return f"{claims.family} of Σ p·g is not homogeneous"
    return None


def _degree(claims: Claims) -> int | None:
    """The degree in which the score is homogeneous jointly in p and g."""
    if claims.overlap == "min":
        return None if claims.family == "generalized_dice" and claims.weight_type != "uniform" else 0
    if claims.family in ("dice", "jaccard") and claims.squared:
        return 0
    return 1 if claims.family == "dice" else None


@law(
    "22",
    "homogeneity",
    level=Level.formula,
    because="an identity of the declared formula",
    oracle="the loss of halved values",
    domain=_euler,
    strategy=lambda claims: volumes(claims, prediction="soft", ignored=False).filter(
        lambda volume: bool(exact.one_hot_target(volume).any((0, *range(2, volume.target.ndim))).all())
    ),
)
def homogeneity(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Linear Dice is homogeneous of degree 1 jointly in (p, g); squared and Σ min(p, g) forms of degree 0."""
    claims = subject.claims
    half = volume.changed(input=volume.input / 2, target=(volume.target / 2).astype(volume.input.dtype))
    whole, halved = (subject.value(v) for v in (volume, half))
    terms = len(claims.counting(volume.channels)) if claims.reduction == "sum" else 1
    if claims.reduction == "sum" and not claims.batch:
        terms *= len(volume.input)
    top = claims.offset * terms * _mean_weight(claims, volume.channels)
    factor = 0.5 ** (_degree(claims) or 0)
    if claims.family == "focal_tversky":
        top, factor = 0.0, 1.0
    wanted = top - factor * (top - whole.value)
    tolerance = 2 * exact.expected(claims, volume).tolerance
    yield replace(close("L(p/2, g/2)", halved.value, wanted, tolerance, whole.dtype), other=half)


def _mean_weight(claims: Claims, channels: int) -> float:
    if claims.family == "generalized_dice" or claims.reduction == "none":
        return 1.0
    return float(np.mean(claims.weights(channels)))


def _double(subject: Subject, setting: Setting) -> str | None:
    if subject.claims.precision == "float32":
        return "it computes in float32, whose values are too coarse for finite differences"
    return None if "float64" in subject.claims.dtypes else "float64 is not declared"


@law(
    "23a",
    "gradcheck",
    level=Level.formula,
    because="a gradient is the derivative of the value, whatever the formula",
    oracle="finite differences",
    tolerance="torch.autograd.gradcheck's",
    code=("print(torch.autograd.gradcheck(lambda x: loss(x, target), input.requires_grad_()))",),
    domain=_double,
    strategy=lambda claims: _smooth_volumes(claims, prediction="soft", dtypes=("float64",), samples=1).filter(
        lambda volume: volume.input.size <= 48
    ),
)
def gradcheck(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Gradient and second derivative are those of the value, in float64, by finite differences."""
    input, target = subject.tensors(volume)
    input.requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return subject.call(x, target)

    # Every element of the gradient; of the second derivatives a random projection.
    for name, check, fast in (
        ("gradcheck", torch.autograd.gradcheck, False),
        ("gradgradcheck", torch.autograd.gradgradcheck, True),
    ):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of float32 at every call
                passed = bool(check(loss, (input,), raise_exception=False, fast_mode=fast))
        except Raised:
            raise
        except RuntimeError as error:
            raise Raised from error
        code = (f"print(torch.autograd.{name}(lambda x: loss(x, target), input.requires_grad_()))",)
        yield is_true(f"torch.autograd.{name} to pass", passed, code=code)


@law(
    "23b",
    "finite gradients at the edges",
    level=Level.numerics,
    because="the formula is finite there, or declared to be: only an implementation can divide by 0",
    oracle="finite numbers; 0 at ignored voxels and channels that do not count",
    tolerance="0",
    strategy=lambda claims: volumes(claims),
    given=edges,
)
def finite(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Finite at perfect, empty and full volumes and extreme logits; zero where a voxel is ignored."""
    found = subject.gradient(volume)
    yield from each_finite(found)
    assert found.gradient is not None
    claims = subject.claims
    ignored = ~np.broadcast_to(exact.valid_mask(claims, volume)[:, None], found.gradient.shape)
    if ignored.any():
        worst = found.gradient[ignored]
        yield is_true("no gradient at ignored voxels", not worst.any(), float(abs(worst).max()))
    if claims.activation != "softmax":
        others = [c for c in range(volume.channels) if c not in claims.counting(volume.channels)]
        if others:
            worst = found.gradient[:, others]
            yield is_true("no gradient in channels that do not count", not worst.any(), float(abs(worst).max()))
