"""Ordinary torch operations on any device, one block of voxels at a time: bounded memory, nothing saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from voxloss.backends import by_label, voxels
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


def _blocks(input: Tensor, cells: int = 0) -> Iterator[tuple[slice, ...]]:
    items, channels, *spatial = input.shape
    on_cpu = input.device.type == "cpu"
    elements = CPU_BLOCK if on_cpu else DEVICE_BLOCK
    for box in boxes(spatial, max(1, elements // (items * max(channels, 0 if on_cpu else cells)))):
        yield (slice(None), slice(None), *box)


def region_sums(
    input: Tensor,
    target: Tensor,
    spec: PassSpec,
    mask: Tensor | None = None,
    map: Tensor | None = None,
    partition: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sums `[K, B, C]` and whether every voxel was valid.

    A block is summed in float32 (float64 for float64 input) by torch's pairwise sum, the blocks in float64
    (in float32 on a device that has no float64).
    """
    if partition is None and by_label.takes(input, target, mask, spec):
        return by_label.sums(input, target, spec, CPU_BLOCK)
    wide = torch.float32 if input.device.type == "mps" else torch.float64
    rows_of = len(input) * max(1, spec.cells)
    total = torch.zeros((len(spec.sums), rows_of, input.shape[1]), dtype=wide, device=input.device)
    all_valid = torch.ones((), dtype=torch.bool, device=input.device)
    for block in _blocks(input, spec.cells):
        here, *others = (None if each is None else each[block] for each in (mask, map, partition))
        rows, valid = voxels.sums(input[block], target[block], here, spec, _precision(input), *others)
        total += torch.stack(rows)
        all_valid &= valid
    return total, all_valid


def voxel_terms(
    factors: Tensor, input: Tensor, target: Tensor, spec: PassSpec, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what each voxel adds to Σ factor·sum, `[B, 1, spatial...]`, and whether every voxel was valid."""
    result = torch.empty((len(input), 1, *input.shape[2:]), dtype=_precision(input), device=input.device)
    all_valid = torch.ones((), dtype=torch.bool, device=input.device)
    for block in _blocks(input):
        here = None if mask is None else mask[block]
        each, valid = voxels.each(factors, input[block], target[block], here, spec, _precision(input))
        result[block] = each.view_as(result[block])
        all_valid &= valid
    return result, all_valid


def region_sums_backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    spec: PassSpec,
    wrt: str,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    map: Tensor | None = None,
    partition: Tensor | None = None,
) -> Tensor:
    """∂L/∂input or ∂L/∂target (`wrt`) in that tensor's dtype and layout; p is computed again."""
    grad, spec = voxels.without_differences(grad, spec)
    result = torch.empty_like(input if wrt == "input" else target) if out is None else out
    if wrt == "input" and partition is None and by_label.takes(input, target, mask, spec, result):
        by_label.gradient(grad, input, target, spec, result, CPU_BLOCK)
        return result
    for block in _blocks(input):
        here, *others = (None if each is None else each[block] for each in (mask, map, partition))
        given: tuple[Any, ...] = grad, input[block], target[block], here, spec, wrt, _precision(input), *others
        result[block].copy_(voxels.gradient(*given))
    return result


def _precision(input: Tensor) -> torch.dtype:
    return torch.promote_types(input.dtype, torch.float32)
