"""A loss of voxloss as nnU-Net calls its own."""

from __future__ import annotations

from torch import Tensor, nn

from voxloss.losses.base import StatisticsLoss


class NNUNetScale(nn.Module):
    """L − 1: nnU-Net adds negative Dice to cross entropy, so that a perfect prediction is at −1 and not at 0.

    `forward(net_output, target)`: logits `[B, C, spatial...]`, and what nnU-Net's loaders give: a label map
    `[B, 1, spatial...]`, or one channel for each region, `[B, C, spatial...]`.

    Args:
        loss: a loss that is 0 at a perfect prediction.
        ignored_last: regions with an ignore label. Then the target is `[B, C + 1, spatial...]`, and its last
            channel says which voxels are as if they were not there.
    """

    def __init__(self, loss: StatisticsLoss, ignored_last: bool = False) -> None:
        super().__init__()
        self.loss = loss
        self.ignored_last = ignored_last

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Return the loss, `[]`."""
        mask = None
        if self.ignored_last:
            target, mask = target[:, :-1], target[:, -1:] == 0
        loss: Tensor = self.loss(net_output, target, mask)
        return loss - 1
