"""What voxels contribute to each sum, and the derivatives: written once, in plain differentiable torch.

The reference applies this to a whole volume in float64, the eager backend to one block of voxels at a time.
Shapes are `[B, C, N]` with N voxels.

| sum | term | derivative by p | derivative by g |
|---|---|---|---|
| `intersection` | p·g | g | p |
| `soft_intersection` | min(p, g) | 1 where p < g | 1 where g < p |
| `prediction`, `prediction_squared` | p, p² | 1, 2p | 0 |
| `target`, `target_squared` | g, g² | 0 | 1, 2g |

min(p, g) = (p + g − |p − g|)/2 is the intersection of soft labels (Wang et al. 2023, "Jaccard Metric Losses",
"Dice Semimetric Losses") without the cancellation of the right-hand side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "intersection": lambda p, g: p * g,
    "soft_intersection": torch.minimum,
    "prediction": lambda p, g: p,
    "prediction_squared": lambda p, g: p * p,
    "target": lambda p, g: g,
    "target_squared": lambda p, g: g * g,
}


class Pass(NamedTuple):
    """What a pass is asked to do; every backend's functions take one."""

    activation: str  # "softmax", "sigmoid" or "none"
    sums: Sequence[str]  # names out of TERMS, in the order of the result's first axis
    ignore_index: int | None


class Voxels(NamedTuple):
    """Prediction and target of some voxels, ready to be summed."""

    p: Tensor  # [B, C, N]; 0 where ignored
    g: Tensor  # [B, C, N]; 0 where ignored
    ignored: Tensor | None  # [B, 1, N]
    valid: Tensor  # []: labels are classes, probabilities lie in [0, 1]


def range_tolerance(dtype: torch.dtype) -> float:
    """How far outside [0, 1] rounding can carry a probability that was computed in `dtype`."""
    return 1e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-3


def prepare(input: Tensor, target: Tensor, job: Pass, dtype: torch.dtype) -> Voxels:
    """Apply the activation, compare the labels and take the ignored voxels out, all in `dtype`."""
    p = input.flatten(2).to(dtype)
    if job.activation == "softmax":
        p = torch.softmax(p, 1)
    elif job.activation == "sigmoid":
        p = torch.sigmoid(p)
    g, ignored, valid = _encode(target.flatten(2), p.shape[1], job.ignore_index, dtype)
    if ignored is not None:
        p, g = p.masked_fill(ignored, 0), g.masked_fill(ignored, 0)
        valid = valid | ignored
    valid = valid.all()
    if job.activation == "none":
        low, high = p.detach().aminmax()
        tolerance = range_tolerance(input.dtype)
        # Written so that NaN passes: in a prediction it must reach the loss, where GradScaler looks for it.
        valid = valid & ~((low < -tolerance) | (high > 1 + tolerance))
    return Voxels(p, g, ignored, valid)


def _encode(
    target: Tensor, channels: int, ignore_index: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    ignored = None
    if target.shape[1] != channels:
        labels = target.to(torch.int64)  # a uint8 compared with -1 would wrap around to 255
        valid = (labels >= 0) & (labels < channels)
        if ignore_index is not None:
            ignored = labels == ignore_index
        if target.is_floating_point():
            whole = labels == target
            valid &= whole
            ignored = None if ignored is None else ignored & whole
        classes = torch.arange(channels, device=target.device).view(1, -1, 1)
        return (labels == classes).to(dtype), ignored, valid
    g = target.to(dtype)
    tolerance = range_tolerance(target.dtype)
    valid = (g >= -tolerance) & (g <= 1 + tolerance)
    if ignore_index is not None and channels > 1 and 0 <= ignore_index < channels:
        channel = g[:, ignore_index, None]
        ignored = channel == 1
        valid &= ignored | (channel == 0)
    elif ignore_index is not None:
        ignored = (g == ignore_index).all(1, keepdim=True)
    return g, ignored, valid


def sums(input: Tensor, target: Tensor, job: Pass, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return each sum `[B, C]` over the given voxels, in `dtype`, and whether all of them were valid."""
    voxels = prepare(input, target, job, dtype)
    return [TERMS[name](voxels.p, voxels.g).sum(-1) for name in job.sums], voxels.valid


def gradient(grad: Tensor, input: Tensor, target: Tensor, job: Pass, wrt: str, dtype: torch.dtype) -> Tensor:
    """∂L/∂input (`wrt="input"`) or ∂L/∂target from grad = ∂L/∂sums `[K, B, C]`, in `dtype`."""
    p, g, ignored, _ = prepare(input, target, job, dtype)
    weights = {name: row.to(dtype).unsqueeze(-1) for name, row in zip(job.sums, grad, strict=True)}
    slope = _slope(weights, p, g, "prediction") if wrt == "input" else _slope(weights, g, p, "target")
    if wrt == "input" and job.activation == "softmax":
        weighted = p * slope
        slope = weighted - p * weighted.sum(1, keepdim=True)
    elif wrt == "input" and job.activation == "sigmoid":
        slope = slope * p * (1 - p)
    if ignored is not None:
        slope = slope.masked_fill(ignored, 0)
    return slope.view(input.shape)


def _slope(weights: dict[str, Tensor], own: Tensor, other: Tensor, name: str) -> Tensor:
    slope = torch.zeros_like(own)
    if name in weights:
        slope = slope + weights[name]
    if f"{name}_squared" in weights:
        slope = slope + 2 * weights[f"{name}_squared"] * own
    if "intersection" in weights:
        slope = slope + weights["intersection"] * other
    if "soft_intersection" in weights:
        below = slope + weights["soft_intersection"]
        # At p = g every value between the two one-sided slopes is a sub-gradient. The one nearest to zero
        # makes a perfect prediction stationary for every formula, also where α ≠ β.
        at = torch.minimum(slope, below).clamp(min=0) + torch.maximum(slope, below).clamp(max=0)
        slope = torch.where(own < other, below, torch.where(own > other, slope, at))
    return slope
