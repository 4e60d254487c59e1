"""What a loss computes in: nearly every one that is written for mixed precision computes in float32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from voxloss_verify.laws.sources import cube
from voxloss_verify.oracle import exact
from voxloss_verify.subject.subject import Raised, Subject

CUBES = 4


def with_precision(subject: Subject) -> Subject:
    """The same loss; if float64 inputs come out as float32 computes them, that is one of its claims.

    So it is if no value needs more bits than float32 has, and some are rounded by it. Where the value is wrong,
    it may have few bits by chance, as the volumes have: then no value of these volumes, scaled a little, may need
    more bits either.
    """
    claims = subject.claims
    if claims.precision != "input" or "float64" not in claims.dtypes or claims.may_be_nan:
        return subject
    rough = replace(claims, precision="float32")
    inexact = wrong = False
    for seed in range(CUBES):
        volume = cube(claims, 4, "float64", seed)
        try:
            found = subject.value(volume).value
        except Raised:
            return subject
        wanted = exact.expected(claims, volume)
        if found.size != wanted.value.size or (found != found.astype(np.float32)).any():
            return subject
        error = float(abs(found.ravel() - wanted.value.ravel()).max())
        wrong |= not error <= exact.expected(rough, volume).tolerance
        inexact |= error > wanted.tolerance
        if wrong:
            try:
                scaled = subject.value(volume.changed(input=volume.input * (1 - 1e-6 / 3))).value
            except Raised:
                return subject
            if not np.isfinite(scaled).all() or (scaled != scaled.astype(np.float32)).any():
                return subject
    return replace(subject, claims=rough) if inexact else subject
