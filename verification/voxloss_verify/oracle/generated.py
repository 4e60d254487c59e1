"""Volumes that Hypothesis draws and shrinks: small, and with the cases on purpose that losses get wrong."""

from __future__ import annotations

from typing import Literal

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from voxloss_verify.oracle.claims import Claims
from voxloss_verify.oracle.sums import Image
from voxloss_verify.oracle.volumes import STORED, Volume, certain, one_hot, target_for

# A logit that float16 and bfloat16 hold exactly and whose exponential overflows in all of them.
EXTREME = 8192

Prediction = Literal["hard", "soft", "any"]
Target = Literal["hard", "soft", "any"]


def channel_counts(claims: Claims) -> st.SearchStrategy[int]:
    """How many channels a loss may be given."""
    if claims.fixed_channels is not None:
        return st.just(claims.fixed_channels)
    every = all(each.every_class for each in claims.formulas)
    several = claims.activation == "softmax" or not claims.has_channels or not every
    least = max(2 if several or claims.ignore_index is not None else 1, claims.named_channels)
    if claims.ignore_index == 0:
        least = max(least, 3)
    return st.integers(least, max(least, 4))


@st.composite
def volumes(
    draw: st.DrawFn,
    claims: Claims,
    *,
    prediction: Prediction = "any",
    target: Target = "any",
    dtypes: tuple[str, ...] = ("float64", "float32"),
    samples: int = 2,
    ignored: bool = True,
) -> Volume:
    """Draw a volume for a loss with such properties; its name identifies the kind of draw.

    `prediction`: "hard" p of 0 and 1; "soft" moderate ones;
    "any" also extreme logits and perfect predictions. `target`: soft only where the loss takes it.
    """
    dtype = draw(st.sampled_from([d for d in dtypes if d in claims.dtypes]))
    channels = draw(channel_counts(claims))
    shape = (
        draw(st.integers(1, samples)),
        *draw(st.tuples(*[st.integers(1, 4)] * claims.spatial_dims)),
    )
    kind, wanted = _labels(draw, claims, shape, max(2, channels))
    if ignored and claims.ignore_index is not None and not claims.has_channels:
        spared = draw(arrays.arrays(bool, wanted.shape, elements=st.booleans(), fill=st.just(False)))
        wanted = np.where(spared, claims.ignore_index, wanted)
        kind += " with ignored voxels" if spared.any() else ""
    softness = target == "soft" or (target == "any" and draw(st.booleans()))
    if softness and claims.soft_labels and claims.labels == "one-hot":
        kind, wanted_target = "soft", _eighths(draw, claims, (shape[0], channels, *shape[1:]))
    elif claims.has_channels and claims.activation != "softmax" and draw(st.booleans()):
        # Classes may overlap where each has a prediction of its own.
        kind = "overlapping"
        wanted_target = draw(
            arrays.arrays(bool, (shape[0], channels, *shape[1:]), elements=st.booleans(), fill=st.nothing())
        )
    else:
        wanted_target = target_for(claims, wanted, channels)
    sure, input = _input(draw, claims, (shape[0], channels, *shape[1:]), wanted_target, prediction)
    wanted_target = wanted_target.astype(STORED[dtype]) if wanted_target.dtype.kind == "f" else wanted_target
    return Volume(
        f"drawn (labels: {kind}, prediction: {sure})", input.astype(STORED[dtype]), wanted_target, dtype
    )


def _labels(draw: st.DrawFn, claims: Claims, shape: tuple[int, ...], classes: int) -> tuple[str, Image]:
    """Their kind, and labels [B, 1, ...]: random, empty, full, one voxel of a class, or a class never."""
    shape = (shape[0], 1, *shape[1:])
    kind = draw(st.sampled_from(["random", "empty", "full", "single voxel", "absent class"]))
    labels = np.zeros(shape, np.int64)
    one = draw(st.integers(0, classes - 1))
    if kind in ("random", "absent class"):
        labels = draw(arrays.arrays(np.int64, shape, elements=st.integers(0, classes - 1), fill=st.nothing()))
        if kind == "absent class":
            labels = np.where(labels == one, 0 if one else classes - 1, labels)
    elif kind == "full":
        labels[:] = one
    elif kind == "single voxel":
        labels.flat[draw(st.integers(0, labels.size - 1))] = one
    return kind, np.where(labels == claims.ignore_index, (labels + 1) % classes, labels)


def _eighths(draw: st.DrawFn, claims: Claims, shape: tuple[int, ...]) -> Image:
    """Soft values [B, C, ...], multiples of 1/8; under softmax their sum over the channels is 1."""
    whole = draw(arrays.arrays(np.int64, shape, elements=st.integers(0, 8), fill=st.nothing()))
    if claims.activation == "softmax":
        whole[:, 1:] = np.minimum(np.cumsum(whole, 1), 8)[:, :-1]
        whole[:, 0] = np.minimum(whole[:, 0], 8)
        edges = np.sort(whole, 1)
        edges[:, -1] = 8
        whole = np.diff(edges, axis=1, prepend=0)
    return np.asarray(whole / 8)


def _input(
    draw: st.DrawFn, claims: Claims, shape: tuple[int, ...], wanted_target: Image, prediction: Prediction
) -> tuple[str, Image]:
    """The kind of a prediction, and the prediction [B, C, ...]."""
    kinds = {
        "hard": ["hard", "perfect"],
        "soft": ["soft"],
        "any": ["soft", "hard", "perfect", "extreme", "constant"],
    }[prediction]
    kind = draw(st.sampled_from(kinds))
    channels = shape[1]
    if kind == "perfect" and wanted_target.dtype.kind != "f":
        masks = wanted_target if wanted_target.dtype == bool else one_hot(wanted_target, channels)
        return kind, certain(claims, masks)
    if kind in ("hard", "perfect"):
        kind = "hard"
        if claims.activation == "softmax" or channels == 1:
            labels = draw(
                arrays.arrays(
                    np.int64,
                    (shape[0], 1, *shape[2:]),
                    elements=st.integers(0, max(1, channels - 1)),
                    fill=st.nothing(),
                )
            )
            return kind, certain(claims, one_hot(labels, channels))
        return kind, certain(claims, draw(arrays.arrays(bool, shape, elements=st.booleans(), fill=st.nothing())))
    if kind == "constant":
        whole = np.full(shape, draw(st.integers(-16, 16)))
    elif kind == "extreme":
        values = st.sampled_from([0, 2 * EXTREME, -2 * EXTREME, 176, -176])
        whole = draw(arrays.arrays(np.int64, shape, elements=values, fill=st.nothing()))
    else:
        whole = draw(arrays.arrays(np.int64, shape, elements=st.integers(-16, 16), fill=st.nothing()))
    if claims.activation != "none":
        return kind, whole / 2
    # Odd multiples of 1/64 and of 1/16 meet no soft target, which are multiples of 1/8.
    if kind == "soft":
        return kind, np.asarray((2 * np.clip(whole, -16, 15) + 33) / 64)
    return kind, np.asarray(np.clip(whole, -8, 8) / 16 + 0.5)
