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

    So it is if no value needs more bits than float32 has, and some are rounded by it.
    """
    claims = subject.claims
    if claims.precision != "input" or "float64" not in claims.dtypes or claims.may_be_nan:
        return subject
    rough = replace(claims, precision="float32")
    inexact = False
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
        if not error <= exact.expected(rough, volume).tolerance:
            return subject
        inexact |= error > wanted.tolerance
    return replace(subject, claims=rough) if inexact else subject
