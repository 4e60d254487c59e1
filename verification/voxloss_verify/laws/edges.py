"""Volumes at the edges of what a loss is defined for; more than one law is checked on them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from voxloss_verify.laws.setting import Setting
from voxloss_verify.oracle.volumes import STORED, Volume, certain, one_hot, target_for
from voxloss_verify.subject.subject import Subject


def edges(subject: Subject, setting: Setting) -> Iterator[Volume]:
    """A class in neither, in the prediction only, in the target only; nothing but ignored voxels."""
    claims = subject.claims
    channels = claims.fixed_channels or max(3, claims.named_channels)
    shape = (2, 1, *[2] * claims.spatial_dims)
    zeros, ones = np.zeros(shape, np.int64), np.ones(shape, np.int64)
    cases = [("no foreground in either", zeros, zeros)]
    cases += [("foreground predicted where there is none", zeros, ones)]
    cases += [("foreground missed", ones, zeros), ("nothing but foreground", ones, ones)]
    for dtype in ("float64", "float32"):
        if dtype not in claims.dtypes:
            continue
        for name, wanted, predicted in cases:
            if claims.ignore_index in (0, 1) and name != "no foreground in either":
                continue
            input = certain(claims, one_hot(predicted, channels)).astype(STORED[dtype])
            yield Volume(name, input, target_for(claims, wanted, channels), dtype)
        if claims.ignore_index is not None and not claims.has_channels:
            input = certain(claims, one_hot(zeros, channels)).astype(STORED[dtype])
            yield Volume("all voxels ignored", input, zeros + claims.ignore_index, dtype)
