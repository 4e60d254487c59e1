"""Laws 24 and 25: accuracy at real sizes, in half precision, and under autocast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from voxloss_verify.laws.law import close, close_value, each_finite, is_true, law
from voxloss_verify.laws.record import Finding
from voxloss_verify.laws.setting import Setting
from voxloss_verify.laws.sources import cube, mri_pair, volume_of
from voxloss_verify.oracle import exact
from voxloss_verify.oracle.generated import volumes
from voxloss_verify.oracle.volumes import Volume
from voxloss_verify.request import Level
from voxloss_verify.subject.subject import Subject

HALF = ("float16", "bfloat16")


def _real(subject: Subject, setting: Setting, dtypes: tuple[str, ...]) -> Iterator[Volume]:
    """The MRI and the user's label maps, as far as they have no more classes than the loss takes."""
    for pair in (mri_pair(), *setting.data):
        for dtype in dtypes:
            volume = volume_of(subject.claims, pair, dtype) if dtype in subject.claims.dtypes else None
            if volume is not None:
                yield volume


def _accuracy_volumes(subject: Subject, setting: Setting) -> Iterator[Volume]:
    dtype = "float32" if "float32" in subject.claims.dtypes else subject.claims.dtypes[0]
    for edge in setting.profile.sizes:
        yield cube(subject.claims, edge, dtype, setting.seed)
    yield from _real(subject, setting, (dtype,))


@law(
    "24",
    "the value",
    level=Level.formula,
    because="the value of the declared formula",
    oracle="integer counts and exact dyadic sums; math.fsum above 4096 voxels",
    strategy=lambda claims: volumes(claims),
    given=_accuracy_volumes,
)
def accuracy(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """The loss is its formula of the exact sums, on drawn volumes, 64³ … 257³, a brain MRI, the user's data."""
    yield close_value("loss", subject, subject.value(volume), volume)


def _half_volumes(subject: Subject, setting: Setting) -> Iterator[Volume]:
    for dtype in HALF:
        if dtype in subject.claims.dtypes:
            yield cube(subject.claims, setting.profile.sizes[0], dtype, setting.seed)
    yield from _real(subject, setting, HALF)


@law(
    "25",
    "half precision",
    level=Level.numerics,
    because="sums of half-precision inputs can overflow, the formula cannot",
    oracle="the exact value for the rounded inputs",
    tolerance="LOSS of half-precision inputs",
    domain=lambda subject, setting: (
        None if set(HALF) & set(subject.claims.dtypes) else "no half-precision dtype is declared"
    ),
    strategy=lambda claims: volumes(claims, dtypes=HALF),
    given=_half_volumes,
)
def half_precision(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """float16 and bfloat16 inputs: finite, right, with a gradient that is not all zero where it should not be."""
    found = subject.gradient(volume)
    yield from each_finite(found)
    yield close_value("loss", subject, found, volume)
    if found.gradient is None or found.gradient.any():
        return
    wanted = abs(exact.gradient(subject.claims, volume))
    if any(each.overlap == "min" for each in subject.claims.formulas):
        p = exact.probabilities(volume.input, subject.claims.activation)
        wanted = wanted[p != exact.one_hot_target(volume)]  # elsewhere 0 is a sub-gradient
    smallest = 2.0**-24 if volume.dtype == "float16" else 2.0**-133
    rounds_to_zero = wanted.max(initial=0.0) <= 2 * smallest
    yield is_true("a gradient that is not all zero", rounds_to_zero, 0.0)


def _autocast_volumes(subject: Subject, setting: Setting) -> Iterator[Volume]:
    dtypes = HALF if subject.device.type == "cuda" else ("bfloat16",)
    for dtype in dtypes:
        yield cube(subject.claims, setting.profile.sizes[0], dtype, setting.seed)


@law(
    "25b",
    "autocast around network and loss",
    level=Level.numerics,
    because="most networks are trained with autocast, in which torch chooses the operations in float32",
    oracle="the exact value for the half-precision logits that a network returns under autocast",
    tolerance="LOSS and GRADIENT of half-precision inputs",
    domain=lambda subject, setting: (
        "no half-precision dtype is declared"
        if not set(HALF) & set(subject.claims.dtypes)
        else "its input is probabilities, of which no network makes half-precision ones under autocast"
        if subject.claims.activation == "none"
        else None
    ),
    code=(
        "computed = loss",
        "def loss(input, target):",
        "    with torch.autocast(input.device.type, input.dtype):",
        "        return computed(input, target)",
    ),
    strategy=lambda claims: volumes(
        replace(claims, dtypes=("bfloat16",)), prediction="soft", dtypes=("bfloat16",)
    ),
    given=_autocast_volumes,
)
def autocast(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Within torch.autocast, on half-precision logits and a target that is not: finite and right."""
    input, target = subject.tensors(volume)
    if target.is_floating_point():
        target = target.float()
    with torch.autocast(subject.device.type, input.dtype):
        found = subject.differentiate(input.requires_grad_(), target)
    yield from each_finite(found)
    yield close_value("loss", subject, found, volume)
    if found.gradient is None or any(each.overlap == "min" for each in subject.claims.formulas):
        return
    wanted = exact.gradient(subject.claims, volume)
    slack = exact.gradient_tolerance(subject.claims, volume, volume.dtype)
    yield close("∂L/∂input", found.gradient, wanted, slack, volume.dtype)
