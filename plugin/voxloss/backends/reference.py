"""The definition: the whole volume at once, in float64. Slow and large on purpose."""

from __future__ import annotations

import torch
from torch import Tensor

from voxloss.backends import voxels
from voxloss.backends.voxels import PassSpec


def available() -> tuple[bool, str]:
    """Whether this backend can run here, and what it is good for."""
    return True, "float64, the whole volume at once: for checking, not for training"


def takes(device: str, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether it can take such an input: it takes them all."""
    return True, "any floating-point input on any device"


def region_sums(
    input: Tensor,
    target: Tensor,
    spec: PassSpec,
    mask: Tensor | None = None,
    map: Tensor | None = None,
    partition: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sums `[K, B, C]` in float64 and whether every voxel was valid."""
    rows, valid = voxels.sums(input, target, mask, spec, torch.float64, map, partition)
    return torch.stack(rows), valid


def voxel_terms(
    factors: Tensor, input: Tensor, target: Tensor, spec: PassSpec, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what each voxel adds to Σ factor·sum, `[B, 1, spatial...]`, and whether every voxel was valid."""
    each, valid = voxels.each(factors, input, target, mask, spec, torch.float64)
    return each.to(torch.promote_types(input.dtype, torch.float32)).view(len(input), 1, *input.shape[2:]), valid


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
    """∂L/∂input or ∂L/∂target (`wrt`) in that tensor's dtype and layout."""
    result = torch.empty_like(input if wrt == "input" else target) if out is None else out
    given = grad, input, target, mask, spec, wrt, torch.float64, map, partition
    return result.copy_(voxels.gradient(*given))
