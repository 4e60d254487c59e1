"""The independent witness for cross entropy and focal loss: logarithms in extended precision, sums rounded once.

Nothing here knows torch or voxloss. Shapes are `[B, C, ...]`; the target has one channel per class. One answer of
many classes has a term for what is there; a yes-or-no question for each channel (`binary`) also one for what is
not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[Any]

# Of a probability that is given as such; log 2⁻¹²⁶ = −87.3.
SMALLEST = 2.0**-126
# Volumes of up to so many numbers are computed in extended precision, where the machine has it.
EXTENDED = 2**20


@dataclass(frozen=True, kw_only=True)
class VoxelTerms:
    """What a mean over voxels is of.

    Attributes:
        activation: "softmax", "sigmoid" or "none".
        binary: each channel is a question of its own.
        counting: the channels that count.
        weights: a factor for each of these.
        smoothing: ε of the target (1 − ε) g + ε/C, for a yes-or-no question (1 − ε) g + ε/2.
        gamma: None for cross entropy; the exponent of focal loss.
        there, missing: factors of focal loss for what is there, one per channel that counts, and for what is not.
    """

    activation: str
    binary: bool
    counting: Sequence[int]
    weights: Sequence[float]
    smoothing: float = 0.0
    gamma: float | None = None
    there: Sequence[float] | None = None
    missing: Sequence[float] | None = None


def logarithms(input: Image, activation: str) -> tuple[Image, Image, Image]:
    """Return log p, log(1 − p) and p."""
    x = np.asarray(input, np.longdouble if input.size <= EXTENDED else np.float64)
    if activation == "softmax":
        x = x - x.max(1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
        p = np.exp(log_p)
        with np.errstate(divide="ignore"):
            return log_p, np.log1p(np.negative(p)), p
    if activation == "sigmoid":
        log_p, log_n = (np.negative(np.logaddexp(0, y)) for y in (np.negative(x), x))
        return log_p, log_n, np.exp(log_p)
    return np.log(np.maximum(x, SMALLEST)), np.log(np.maximum(1 - x, SMALLEST)), x


def mean(terms: VoxelTerms, input: Image, target: Image, kept: NDArray[np.bool_]) -> float:
    """The loss with reduction "mean"; `kept` [B, ...] are the voxels that count.

    Focal loss and yes-or-no questions are divided by the number of voxels (for these, times classes), cross
    entropy of one answer by the weights of the right classes.
    """
    log_p, log_n, p = logarithms(np.where(kept[:, None], input, 0.5), terms.activation)
    total = below = 0.0
    for k, c in enumerate(terms.counting):
        g, yes, no, q = (np.asarray(each[:, c][kept]) for each in (target, log_p, log_n, p))
        g = g.astype(yes.dtype)
        if terms.gamma is None:
            smooth = terms.smoothing / (2 if terms.binary else input.shape[1])
            share = (1 - terms.smoothing) * g + smooth
            other = (1 - terms.smoothing) * (1 - g) + smooth
        else:
            there, missing = (1.0 if row is None else row[k] for row in (terms.there, terms.missing))
            share, other = there * g * (1 - q) ** terms.gamma, missing * (1 - g) * q**terms.gamma
        total -= terms.weights[k] * _sum(share, yes)
        if terms.binary:
            total -= terms.weights[k] * _sum(other, no)
        if terms.binary:
            below += g.size
        elif terms.gamma is None:
            below += terms.weights[k] * math.fsum(g.tolist())
        else:
            below = g.size
    return total / below if below else 0.0


def _sum(share: Image, log: Image) -> float:
    """Σ share·log, where 0·(−∞) is 0."""
    with np.errstate(invalid="ignore"):
        return math.fsum(np.where(share == 0, 0, share * log).astype(np.float64).tolist())
