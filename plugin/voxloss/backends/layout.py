"""Any memory layout as samples, channels and one line of voxels, which a fused pass iterates over."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def flatten_spatial(tensors: Sequence[Tensor]) -> list[Tensor]:
    """See each `[B, channels, spatial...]` as `[B, channels, N]`, all with their voxels in the same order.

    The order is that in which the first tensor's voxels lie in memory. A view is returned wherever the spatial
    axes, in this order, have one common stride: so for tensors that are contiguous, channels-last, transposed,
    expanded along the batch or the channels, or sliced in them or in the outermost spatial axis. Otherwise (for
    example `x[..., 1:]`, or a second tensor with another axis order than the first) a copy is returned, as no
    single stride connects the voxels. Code that writes to a result checks whether it still shares the tensor's
    storage.
    """
    first = tensors[0]
    order = sorted(range(2, first.ndim), key=first.stride, reverse=True)
    return [tensor.permute(0, 1, *order).flatten(2) for tensor in tensors]
