"""A loss of voxloss as nnU-Net calls its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from voxloss.losses.base import StatisticsLoss


def is_by_channel(target: Tensor) -> bool:
    """Whether a target of regions has a channel for each, and is no label map."""
    return target.dtype == torch.bool or target.shape[1] > 1


class NNUNetScale(nn.Module):
    """L − 1: nnU-Net adds negative Dice to cross entropy, so that a perfect prediction is at −1 and not at 0.

    `forward(net_output, target)`: logits `[B, C, spatial...]` and a label map `[B, 1, spatial...]`, which with
    regions stays one; or one channel for each region, booleans if it is a single one, as nnU-Net's own loaders
    make them.

    Args:
        loss: a loss that is 0 at a perfect prediction.
        by_channel: the same for one channel per region.
        ignored_last: regions with an ignore label. Then such a target is `[B, C + 1, spatial...]`, and its last
            channel marks the voxels to ignore.
    """

    def __init__(
        self, loss: StatisticsLoss, by_channel: StatisticsLoss | None = None, ignored_last: bool = False
    ) -> None:
        super().__init__()
        self.loss = loss
        self.by_channel = by_channel
        self.ignored_last = ignored_last

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Return the loss, `[]`."""
        loss, mask = self.loss, None
        if self.by_channel is not None and is_by_channel(target):
            loss = self.by_channel
            if self.ignored_last:
                target, mask = target[:, :-1], target[:, -1:] == 0
        value: Tensor = loss(net_output, target) if mask is None else loss(net_output, target, mask)
        return value - 1
