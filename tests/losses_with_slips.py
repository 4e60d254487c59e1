"""Losses of people who meant a Dice, Tversky or Focal Tversky loss and made one slip each; label map, softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

AXES = (2, 3, 4)


def _of(labels: Tensor, channels: int) -> Tensor:
    return F.one_hot(labels[:, 0].long(), channels).movedim(-1, 1).double()


def factor_missing(x: Tensor, y: Tensor) -> Tensor:
    p, g = x.double().softmax(1), _of(y, x.shape[1])
    return 1 - (((p * g).sum(AXES) + 1) / (p.sum(AXES) + g.sum(AXES) + 1)).mean()


def reshaped_one_hot(x: Tensor, y: Tensor) -> Tensor:
    p = x.double().softmax(1)
    g = F.one_hot(y[:, 0].long(), x.shape[1]).reshape(p.shape).double()
    return 1 - ((2 * (p * g).sum(AXES) + 1) / (p.sum(AXES) + g.sum(AXES) + 1)).mean()


def softmax_over_depth(x: Tensor, y: Tensor) -> Tensor:
    p, g = x.double().softmax(2), _of(y, x.shape[1])
    return 1 - ((2 * (p * g).sum(AXES) + 1) / (p.sum(AXES) + g.sum(AXES) + 1)).mean()


def softmax_twice(x: Tensor, y: Tensor) -> Tensor:
    p, g = x.double().softmax(1).softmax(1), _of(y, x.shape[1])
    return 1 - ((2 * (p * g).sum(AXES) + 1) / (p.sum(AXES) + g.sum(AXES) + 1)).mean()


def slice_by_slice(x: Tensor, y: Tensor) -> Tensor:
    p, g = x.double().softmax(1), _of(y, x.shape[1])
    return 1 - ((2 * (p * g).sum((3, 4)) + 1) / (p.sum((3, 4)) + g.sum((3, 4)) + 1)).mean()


def smoothed_below_only(x: Tensor, y: Tensor) -> Tensor:
    p, g = x.double().softmax(1), _of(y, x.shape[1])
    return 1 - (2 * (p * g).sum(AXES) / (p.sum(AXES) + g.sum(AXES) + 1)).mean()


def over_the_batch(x: Tensor, y: Tensor) -> Tensor:
    p, g = x.double().softmax(1), _of(y, x.shape[1])
    axes = (0, *AXES)
    return 1 - ((2 * (p * g).sum(axes) + 1) / (p.sum(axes) + g.sum(axes) + 1)).mean()


def swapped(x: Tensor, y: Tensor) -> Tensor:
    p, g = x.double().softmax(1), _of(y, x.shape[1])
    tp = (p * g).sum(AXES)
    fp, fn = p.sum(AXES) - tp, g.sum(AXES) - tp
    return (1 - (tp + 1) / (tp + 0.7 * fp + 0.3 * fn + 1)).mean()


def power_of_the_mean(x: Tensor, y: Tensor) -> Tensor:
    p, g = x.double().softmax(1), _of(y, x.shape[1])
    tp = (p * g).sum(AXES)
    fp, fn = p.sum(AXES) - tp, g.sum(AXES) - tp
    return (1 - (tp + 1) / (tp + 0.3 * fp + 0.7 * fn + 1)).mean() ** 0.75


def weights_normalised(x: Tensor, y: Tensor) -> Tensor:
    p, g = x.double().softmax(1), _of(y, x.shape[1])
    weight = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    loss = 1 - (2 * (p * g).sum(AXES) + 1) / (p.sum(AXES) + g.sum(AXES) + 1)
    return ((weight * loss).sum(1) / weight.sum()).mean()


def union_is_the_sum(x: Tensor, y: Tensor) -> Tensor:
    p, g = x.double().softmax(1), _of(y, x.shape[1])
    return 1 - (((p * g).sum(AXES) + 1) / (p.sum(AXES) + g.sum(AXES) + 1)).mean()


def background_before_the_softmax(x: Tensor, y: Tensor) -> Tensor:
    p, g = x.double()[:, 1:].softmax(1), _of(y, x.shape[1])[:, 1:]
    return 1 - ((2 * (p * g).sum(AXES) + 1) / (p.sum(AXES) + g.sum(AXES) + 1)).mean()


def axes_exchanged(x: Tensor, y: Tensor) -> Tensor:
    p = x.double().softmax(1)
    g = F.one_hot(y[:, 0].long(), x.shape[1]).permute(0, 4, 2, 1, 3).reshape(p.shape)
    return 1 - ((2 * (p * g).sum(AXES) + 1) / (p.sum(AXES) + g.sum(AXES) + 1)).mean()


def axes_in_another_order(x: Tensor, y: Tensor) -> Tensor:
    p = x.double().softmax(1)
    g = F.one_hot(y[:, 0].long(), x.shape[1]).permute(0, 4, 3, 1, 2).reshape(p.shape)
    return 1 - ((2 * (p * g).sum(AXES) + 1) / (p.sum(AXES) + g.sum(AXES) + 1)).mean()


def target_flipped(x: Tensor, y: Tensor) -> Tensor:
    p, g = x.double().softmax(1), _of(y, x.shape[1]).flip(4)
    return 1 - ((2 * (p * g).sum(AXES) + 1) / (p.sum(AXES) + g.sum(AXES) + 1)).mean()


def classes_summed(x: Tensor, y: Tensor) -> Tensor:
    p, g, axes = x.double().softmax(1), _of(y, x.shape[1]), (1, 2, 3)
    return 1 - ((2 * (p * g).sum(axes) + 1) / (p.sum(axes) + g.sum(axes) + 1)).mean()


def argmax(x: Tensor, y: Tensor) -> Tensor:
    p, g = _of(x.argmax(1, keepdim=True), x.shape[1]), _of(y, x.shape[1])
    return 1 - ((2 * (p * g).sum(AXES) + 1) / (p.sum(AXES) + g.sum(AXES) + 1)).mean()


def threshold(x: Tensor, y: Tensor) -> Tensor:
    p, g = (x.double().softmax(1) > 0.5).double(), _of(y, x.shape[1])
    return 1 - ((2 * (p * g).sum(AXES) + 1) / (p.sum(AXES) + g.sum(AXES) + 1)).mean()


_SMOOTH = {"activation": "softmax", "labels": "map", "smooth_nr": 1.0, "smooth_dr": 1.0}
_TVERSKY = {**_SMOOTH, "alpha": 0.3, "beta": 0.7}
# The loss, what was meant, and words that the explanation has.
SLIPS: list[tuple[Callable[[Tensor, Tensor], Tensor], str, dict[str, Any], str]] = [
    (factor_missing, "dice", _SMOOTH, "the factor 2 before the intersection is missing"),
    (reshaped_one_hot, "dice", _SMOOTH, "the one-hot target, whose last axis is the classes, is reshaped"),
    (softmax_over_depth, "dice", _SMOOTH, "the softmax is taken over axis 2"),
    (softmax_twice, "dice", _SMOOTH, "the softmax is applied twice"),
    (slice_by_slice, "dice", _SMOOTH, "the sums leave out axis 2"),
    (classes_summed, "dice", _SMOOTH, "the sums run over axes 1, 2 and 3, not over the spatial axes 2, 3 and 4"),
    (argmax, "dice", _SMOOTH, "the one-hot of the argmax takes the place of the probabilities"),
    (threshold, "dice", _SMOOTH, "p > 0.5, or a rounded p, takes the place of the probability p"),
    (smoothed_below_only, "dice", _SMOOTH, "--claim smooth_nr=0.0"),
    (over_the_batch, "dice", _SMOOTH, "--claim batch=true"),
    (swapped, "tversky", _TVERSKY, "--claim alpha=0.7 --claim beta=0.3"),
    (power_of_the_mean, "focal_tversky", {**_TVERSKY, "gamma": 4 / 3}, "the power is taken of the mean"),
    (axes_exchanged, "dice", _SMOOTH, "axes 2 and 3 of the target are exchanged"),
    (axes_in_another_order, "dice", _SMOOTH, "axes 2, 3, 4 of the target are in the order 4, 2, 3"),
    (target_flipped, "dice", _SMOOTH, "the target is flipped along axis 4"),
    (union_is_the_sum, "jaccard", _SMOOTH, "the intersection is not subtracted from the union"),
    (
        background_before_the_softmax,
        "dice",
        {**_SMOOTH, "include_background": False},
        "the background is left out before the softmax",
    ),
    (weights_normalised, "dice", {**_SMOOTH, "class_weight": [0.1, 0.3, 0.6]}, "the sum of the class weights"),
]
