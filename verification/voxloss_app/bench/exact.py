"""What is right: value and gradient in float64, from textbook formulas that share no code with voxloss.

The volume is taken in slabs, so that the float64 copies stay small at every size: the sums over the slabs first,
then the formula, then the gradient of each slab by the derivatives of the sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from voxloss_app.bench.cases import ALPHA, BETA, GAMMA, SMOOTH, BenchCase
from voxloss_verify.tolerances import GRADIENT, LOSS

_SLAB = 1 << 22  # elements
Slab = tuple[slice, ...]


@dataclass(frozen=True)
class Exact:
    """The exact value, and the exact gradient times the case's loss scale, rounded to float32 at the least."""

    value: float
    gradient: Tensor


def exact(case: BenchCase, input: Tensor, target: Tensor) -> Exact:
    """Value and gradient of a case's loss."""
    input = input.detach()
    with torch.no_grad():
        sums = sum(_sums(case, input[slab].double(), target[slab]) for slab in _slabs(input))
    assert isinstance(sums, Tensor)
    sums.requires_grad_()
    value = _formula(case, sums, prod(input.shape[2:]))
    (by_sums,) = torch.autograd.grad(value, sums)
    gradient = torch.empty_like(input, dtype=torch.promote_types(input.dtype, torch.float32))
    for slab in _slabs(input):
        z = input[slab].double().requires_grad_()
        (by_z,) = torch.autograd.grad(_sums(case, z, target[slab]), z, by_sums * case.loss_scale)
        gradient[slab] = by_z
    return Exact(value.item(), gradient)


def errors(found: float, gradient: Tensor | None, reference: Exact) -> tuple[float, float]:
    """Distances of a value, relative to one above 1, and of a gradient, relative to its largest element."""
    by_value = abs(found - reference.value) / max(1.0, abs(reference.value))
    if gradient is None:
        return by_value, float("inf")
    largest = max(float(reference.gradient[slab].abs().max()) for slab in _slabs(reference.gradient))
    parts = [(gradient[slab].double() - reference.gradient[slab]).abs().max() for slab in _slabs(gradient)]
    return by_value, float(torch.stack(parts).max()) / largest  # NaN in any part is NaN here


def verdict(case: BenchCase, by_value: float, by_gradient: float) -> str:
    """What is wrong with a contender that is so far off; nothing within the suite's tolerances."""
    for what, off, tolerance in (
        ("value", by_value, LOSS[case.dtype]),
        ("gradient", by_gradient, GRADIENT[case.dtype]),
    ):
        if not off <= tolerance:  # NaN is wrong, too
            return f"{what} off by {off:.2e}, {off / tolerance:.4g} × the tolerance"
    return ""


def _slabs(input: Tensor) -> Iterator[Slab]:
    per_row = max(1, input[:, :, :1].numel())
    step = max(1, _SLAB // per_row)
    for start in range(0, input.shape[2], step):
        yield (slice(None), slice(None), slice(start, start + step))


def _sums(case: BenchCase, z: Tensor, target: Tensor) -> Tensor:
    """Σp·g, Σp, Σg and the family's own sum over the voxels, `[4, B, C]`."""
    p = z.softmax(1) if case.activation == "softmax" else z.sigmoid()
    g = (target if case.one_hot else F.one_hot(target[:, 0].long(), case.channels).movedim(-1, 1)).double()
    own = torch.zeros_like(p)
    if case.family == "dice_ce":
        own = -g * z.log_softmax(1)
    elif case.family == "dice_focal":
        surprise = -(g * F.logsigmoid(z) + (1 - g) * F.logsigmoid(-z))
        own = (g * (1 - p) + (1 - g) * p) ** GAMMA * surprise
    return torch.stack([term.flatten(2).sum(-1) for term in (p * g, p, g, own)])


def _formula(case: BenchCase, sums: Tensor, voxels: int) -> Tensor:
    overlap, prediction, target, own = sums
    if case.family == "tversky":
        errors = ALPHA * (prediction - overlap) + BETA * (target - overlap)
        loss = 1 - (overlap + SMOOTH) / (overlap + errors + SMOOTH)
    else:
        loss = 1 - (2 * overlap + SMOOTH) / (prediction + target + SMOOTH)
    terms = case.batch * voxels * (case.channels if case.family == "dice_focal" else 1)
    value: Tensor = loss.mean() + own.sum() / terms  # Σ own is 0 where the family has none
    return value
