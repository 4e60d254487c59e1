"""Slips in the code of a loss, each with the value that it leads to: what a wrong value is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from voxloss_verify.oracle.claims import Claims
from voxloss_verify.oracle.exact import one_hot_target, probabilities
from voxloss_verify.oracle.volumes import Volume, one_hot

FAMILIES = ("dice", "jaccard", "tversky", "focal_tversky")


@dataclass(frozen=True)
class Slip:
    """What is done differently.

    Attributes:
        said: a clause that completes "the value is what results if".
        factor: of the intersection in the numerator.
        softmax_axis: over which probabilities add up to 1; the classes are axis 1.
        activations: how often the activation is applied.
        power_last: the power is taken of the mean, not of the loss of each class.
        divides_by_weights: the mean is divided by the weights of the classes, not by their number.
        summed: the axes that the sums run over; None for the spatial ones.
        hard: what takes the place of the probabilities: the one-hot of their "argmax", or whether they are above
            "0.5".
        union_is_sum: the intersection is not subtracted from the union.
        background_first: the background is dropped before the softmax, not after it.
        order, flipped: in which the target's spatial axes come, and of which one its voxels come last to first.
    reshaped: the classes of the one-hot target are its last axis, and it is reshaped, not permuted.
    """

    said: str
    factor: float = 1.0
    softmax_axis: int = 1
    activations: int = 1
    power_last: bool = False
    divides_by_weights: bool = False
    summed: tuple[int, ...] | None = None
    hard: Literal["", "argmax", "0.5"] = ""
    union_is_sum: bool = False
    background_first: bool = False
    order: tuple[int, ...] = ()
    flipped: int | None = None
    reshaped: bool = False


def slips(claims: Claims) -> Iterator[Slip]:
    """Those that could have been made in a loss of such claims."""
    plain = claims.average == "macro" and claims.reduction == "mean" and claims.absent == "count"
    if claims.family not in FAMILIES or not plain or claims.ignore_index is not None:
        return
    if claims.family == "dice":
        yield Slip("the factor 2 before the intersection is missing", factor=0.5)
    if claims.family == "jaccard":
        yield Slip("the intersection is not subtracted from the union", union_is_sum=True)
    if claims.activation == "softmax" and not claims.include_background and claims.channels != 1:
        yield Slip("the background is left out before the softmax, not after it", background_first=True)
    if claims.family == "focal_tversky" and claims.offset == 1:
        yield Slip("the power is taken of the mean, not of the loss of each class", power_last=True)
    axes = range(2, 2 + claims.spatial_dims)
    if claims.activation == "softmax":
        for axis in (0, *axes):
            said = f"the softmax is taken over axis {axis}, not over the classes, axis 1"
            yield Slip(said, softmax_axis=axis)
    if claims.activation != "none":
        yield Slip(f"the {claims.activation} is applied twice", activations=2)
        yield Slip(f"no {claims.activation} is applied", activations=0)
    if claims.labels in ("map", "indices"):
        said = "the one-hot target, whose last axis is the classes, is reshaped to [B, C, ...], not permuted"
        yield Slip(said, reshaped=True)
    if isinstance(claims.class_weight, tuple):
        said = "the mean is divided by the sum of the class weights, not by the number of classes"
        yield Slip(said, divides_by_weights=True)
    for axis in axes:
        yield Slip(f"the sums leave out axis {axis}", summed=tuple(other for other in axes if other != axis))
        yield Slip(f"the target is flipped along axis {axis}", flipped=axis)
    with_classes = tuple(range(1, 1 + claims.spatial_dims))
    said = f"the sums run over axes {_listed(with_classes)}, not over the spatial axes {_listed(axes)}"
    yield Slip(said, summed=with_classes)
    yield Slip("the one-hot of the argmax takes the place of the probabilities", hard="argmax")
    yield Slip("p > 0.5, or a rounded p, takes the place of the probability p", hard="0.5")
    for order in list(permutations(axes))[1:]:
        moved = [axis for axis, other in zip(axes, order, strict=True) if axis != other]
        said = f"axes {moved[0]} and {moved[1]} of the target are exchanged"
        if len(moved) > 2:
            said = f"axes 2, 3, 4 of the target are in the order {', '.join(map(str, order))}"
        yield Slip(f"{said}, and its voxels reshaped to the size of the prediction", order=order)


def _listed(axes: Iterable[int]) -> str:
    *first, last = map(str, axes)
    return f"{', '.join(first)} and {last}" if first else last


def value(claims: Claims, slip: Slip, volume: Volume) -> float:
    """The loss of a volume with a slip, in float64."""
    p = np.array(volume.input, np.float64)
    if slip.background_first:
        p[:, 0] = -np.inf
    for _ in range(slip.activations):
        p = np.moveaxis(
            probabilities(np.moveaxis(p, slip.softmax_axis, 1), claims.activation), 1, slip.softmax_axis
        )
    g = np.asarray(one_hot_target(volume), np.float64)
    if slip.reshaped:
        g = np.moveaxis(g, 1, -1).reshape(g.shape)
    if slip.order:
        g = g.transpose(0, 1, *slip.order).reshape(g.shape)
    if slip.flipped is not None:
        g = np.flip(g, slip.flipped)
    if slip.hard == "argmax":
        p = np.asarray(one_hot(p.argmax(1)[:, None], p.shape[1]), np.float64)
    elif slip.hard:
        p = np.asarray(p > float(slip.hard), np.float64)
    axes = tuple(range(2, p.ndim)) if slip.summed is None else slip.summed
    axes = (0, *axes) if claims.batch else axes

    def total(of: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(of[:, claims.counting(volume.channels)].sum(axes, keepdims=True))

    tp = total(np.minimum(p, g) if claims.overlap == "min" else p * g)
    sum_p, sum_g = (total(x * x if claims.squared else x) for x in (p, g))
    if claims.family == "dice":
        numerator, denominator = 2 * tp, sum_p + sum_g
    elif claims.family == "jaccard":
        numerator, denominator = tp, sum_p + sum_g - (0 if slip.union_is_sum else tp)
    else:
        numerator, denominator = tp, tp + claims.alpha * (sum_p - tp) + claims.beta * (sum_g - tp)
    numerator = slip.factor * numerator + claims.smooth_nr
    denominator = denominator + claims.smooth_dr
    score = np.divide(numerator, denominator, out=np.ones_like(numerator), where=denominator != 0)
    loss = claims.offset - score
    has_power = claims.family == "focal_tversky"
    if has_power and not slip.power_last:
        loss = np.maximum(1 - score, 0) ** claims.exponent + claims.offset - 1
    weights = np.asarray(claims.weights(volume.channels)).reshape(1, -1, *[1] * (loss.ndim - 2))
    if slip.divides_by_weights:
        weights = weights / weights.mean()
    mean = float((weights * loss).mean())
    return max(mean, 0.0) ** claims.exponent if slip.power_last else mean
