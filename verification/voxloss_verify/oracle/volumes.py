"""What a loss is given: a prediction and a target, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from voxloss_verify.oracle.sums import Image, Sums

if TYPE_CHECKING:
    from voxloss_verify.oracle.claims import Claims

# A logit that leaves e^−1024, which is 0 in float64, to the other classes: the hard prediction, in every dtype.
CERTAIN = 1024.0

# NumPy has no bfloat16: its values are kept in float32.
STORED = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": np.float32}


@dataclass(frozen=True, eq=False)
class Volume:
    """A prediction, a target, and the dtype in which a loss gets them; it represents their values exactly.

    `input` [B, C, ...] is logits or probabilities; `target` labels [B, 1, ...] or, if floating point or bool, one
    channel per class [B, C, ...]. `sums` [B][C], if given, follow from geometry and replace those over voxels.
    `times`: how often all voxels stand side by side in what a loss is given; the arrays hold them once.
    """

    name: str
    input: Image
    target: Image
    dtype: str = "float64"
    affine: NDArray[np.float64] = field(default_factory=lambda: np.eye(4))
    sums: Sequence[Sequence[Sums]] | None = None
    times: int = 1

    @property
    def is_one_hot(self) -> bool:
        """Whether the target has one channel per class."""
        return self.target.dtype.kind in "fb"

    @property
    def channels(self) -> int:
        """C of the input."""
        return int(self.input.shape[1])

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype} {list(self.input.shape)}"

    def changed(self, **fields: Any) -> Volume:
        """A copy with other arrays, whose sums are no longer known."""
        return replace(self, **{"sums": None, **fields})


def one_hot(labels: Image, channels: int) -> NDArray[np.bool_]:
    """Labels [B, 1, ...] as one channel per class, [B, C, ...]; a single channel is that of label 1."""
    classes = np.arange(channels) if channels > 1 else np.ones(1)
    return np.asarray(labels == classes.reshape(1, -1, *[1] * (labels.ndim - 2)))


def target_for(claims: Claims, labels: Image, channels: int) -> Image:
    """Labels [B, 1, ...] in the form that a loss takes."""
    return one_hot(labels, channels) if claims.has_channels else labels


def as_given(claims: Claims, target: Image) -> Image:
    """The target in the form that a loss is given: of regions the label map whose channels these are."""
    if claims.regions is None or target.dtype.kind not in "fb" or target.shape[1] != len(claims.regions):
        return target
    bits = sum((target[:, c : c + 1] != 0).astype(np.int64) << c for c in range(len(claims.regions)))
    labels = np.array([label for _, label in sorted(claims.label_of_channels.items())])
    return np.asarray(labels[bits])


def certain(claims: Claims, masks: Image) -> Image:
    """The input [B, C, ...] that makes exactly these hard predictions of a loss, one channel per class."""
    p = np.asarray(masks, np.float64)
    if claims.activation == "none":
        return p
    return CERTAIN * p if claims.activation == "softmax" else CERTAIN * (2 * p - 1)


def from_probabilities(claims: Claims, p: Image, dtype: str) -> Image:
    """The input that makes these probabilities of a loss, but for the rounding of logits to `dtype`."""
    p = np.asarray(p, np.float64)
    if claims.activation != "none":
        with np.errstate(divide="ignore"):
            other = 0.0 if claims.activation == "softmax" else np.log1p(-p)
            p = np.clip(np.log(p) - other, -CERTAIN, CERTAIN)
    return p.astype(STORED[dtype])
