"""Ordinary torch operations on any device, one block of voxels at a time: bounded memory, nothing saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from voxloss.backends import voxels
from voxloss.backends.voxels import PassSpec

# Elements of [B, C, voxels] in flight: on a CPU a block stays in its cache, elsewhere it fills the device.
CPU_BLOCK = 1 << 19
DEVICE_BLOCK = 1 << 24


def available() -> tuple[bool, str]:
    """Whether this backend can run here, and what it is good for."""
    return True, "torch operations on blocks of voxels, any device"


def takes(device: str, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether it can take such an input: it takes them all."""
    return True, "any floating-point input on any device"


def boxes(shape: Sequence[int], most: int) -> Iterator[tuple[slice, ...]]:
    """Cut a box of voxels into boxes of at most `most` voxels, in memory order."""
    size, *rest = shape
    inner = prod(rest)
    step = max(1, most // inner)
    for start in range(0, size, step):
        here = slice(start, min(start + step, size))
        for inside in boxes(rest, most) if inner > most else [(slice(None),) * len(rest)]:
            yield (here, *inside)


def _blocks(input: Tensor) -> Iterator[tuple[slice, ...]]:
    items, channels, *spatial = input.shape
    elements = CPU_BLOCK if input.device.type == "cpu" else DEVICE_BLOCK
    for box in boxes(spatial, max(1, elements // (items * channels))):
        yield (slice(None), slice(None), *box)


def region_sums(
    input: Tensor, target: Tensor, spec: PassSpec, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sums `[K, B, C]` and whether every voxel was valid.

    A block is summed in float32 (float64 for float64 input) by torch's pairwise sum, the blocks in float64
    (in float32 on a device that has no float64).
    """
    wide = torch.float32 if input.device.type == "mps" else torch.float64
    total = torch.zeros((len(spec.sums), *input.shape[:2]), dtype=wide, device=input.device)
    all_valid = torch.ones((), dtype=torch.bool, device=input.device)
    sums = _sums_of_labels if _knows_by_label(input, target, spec, mask) else voxels.sums
    for block in _blocks(input):
        here = None if mask is None else mask[block]
        rows, valid = sums(input[block], target[block], here, spec, _precision(input))
        total += torch.stack(rows)
        all_valid &= valid
    return total, all_valid


def region_sums_backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    spec: PassSpec,
    wrt: str,
    mask: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """∂L/∂input or ∂L/∂target (`wrt`) in that tensor's dtype and layout; p is computed again."""
    grad, spec = voxels.without_differences(grad, spec)
    result = torch.empty_like(input if wrt == "input" else target) if out is None else out
    gradient = _gradient_of_labels if _knows_by_label(input, target, spec, mask) else voxels.gradient
    for block in _blocks(input):
        here = None if mask is None else mask[block]
        derivative = gradient(grad, input[block], target[block], here, spec, wrt, _precision(input))
        result[block].copy_(derivative)
    return result


# A softmax and a label map, all of whose voxels count, is what most networks are trained with. On a CPU, the same
# terms and derivatives as in `voxels` in half the time: labels are compared as floating-point numbers, for which
# torch has vector instructions, there is no `where`, and min(p, g) = p·g, as p = g leaves no derivative.

_BY_LABEL = {
    "intersection",
    "soft_intersection",
    "prediction",
    "prediction_squared",
    "target",
    "target_squared",
    "cross_entropy",
}


def _knows_by_label(input: Tensor, target: Tensor, spec: PassSpec, mask: Tensor | None) -> bool:
    is_map = target.shape[1] != input.shape[1]
    all_count = mask is None and spec.ignore_index is None
    of_labels = is_map and spec.activation == "softmax" and _BY_LABEL.issuperset(spec.sums)
    return input.device.type == "cpu" and of_labels and all_count


def _of_labels(input: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[B, C, N]`, the one-hot target, and whether every label is a class."""
    z = input.flatten(2).to(dtype).clamp(-voxels.LARGEST_LOGIT, voxels.LARGEST_LOGIT)
    labels = voxels.whole_labels(target.flatten(2)).to(dtype)  # what is rounded is no class
    lowest, highest = labels.aminmax()
    g = torch.eq(labels, torch.arange(z.shape[1], dtype=dtype).view(1, -1, 1), out=torch.empty_like(z))
    return z, g, (lowest >= 0) & (highest < z.shape[1])


def _sums_of_labels(
    input: Tensor, target: Tensor, mask: Tensor | None, spec: PassSpec, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """As `voxels.sums`, where there is no mask."""
    z, g, valid = _of_labels(input, target, dtype)
    p = z.softmax(1)
    terms = {
        "intersection": lambda: p * g,
        "soft_intersection": lambda: p * g,
        "prediction": lambda: p,
        "prediction_squared": lambda: p * p,
        "target": lambda: g,
        "target_squared": lambda: g,
        "cross_entropy": lambda: z.log_softmax(1).mul_(g).neg_(),
    }
    return [terms[name]().sum(-1) for name in spec.sums], valid


def _gradient_of_labels(
    grad: Tensor, input: Tensor, target: Tensor, mask: Tensor | None, spec: PassSpec, wrt: str, dtype: torch.dtype
) -> Tensor:
    """As `voxels.gradient`, where there is no mask: q − p·Σq."""
    z, g, _ = _of_labels(input, target, dtype)
    weights = {name: row.to(dtype).unsqueeze(-1) for name, row in zip(spec.sums, grad, strict=True)}
    zero = torch.zeros_like(grad[0], dtype=dtype).unsqueeze(-1)
    overlap = weights.get("intersection", zero) + weights.get("soft_intersection", zero)
    p = z.softmax(1)
    q = torch.addcmul(weights.get("prediction", zero), overlap, g)
    if "prediction_squared" in weights:
        q = q.addcmul_(2 * weights["prediction_squared"], p)
    q = q.mul_(p)
    if "cross_entropy" in weights:
        q = q.addcmul_(weights["cross_entropy"], g, value=-1)
    return q.addcmul_(p, q.sum(1, keepdim=True), value=-1).view(input.shape)


def _precision(input: Tensor) -> torch.dtype:
    return torch.promote_types(input.dtype, torch.float32)
