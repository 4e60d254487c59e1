"""Losses to be verified, most with a flaw."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import voxloss

# The shape of the label maps that `Forgetful` is given by the tests.
SHAPE = (5, 6, 7)


class Off(voxloss.DiceLoss):
    """Too large by a quarter."""

    def forward(self, input: Tensor, target: Any, *_: Any, **__: Any) -> Tensor:
        return super().forward(input, target) + 0.25


class NotANumber(voxloss.DiceLoss):
    def forward(self, input: Tensor, target: Any, *_: Any, **__: Any) -> Tensor:
        return super().forward(input, target) * float("nan")


class Forgetful(voxloss.DiceLoss):
    """Wrong on volumes of one shape only."""

    def forward(self, input: Tensor, target: Any, *_: Any, **__: Any) -> Tensor:
        return super().forward(input, target) + (0.25 if input.shape[2:] == SHAPE else 0)


class Ordered(voxloss.DiceLoss):
    """One voxel counts more than the others."""

    def forward(self, input: Tensor, target: Any, *_: Any, **__: Any) -> Tensor:
        loss: Tensor = super().forward(input, target) + 0.25 * (target.flatten()[0] > 0)
        return loss


class Imprecise(voxloss.DiceLoss):
    """Wrong in half precision only."""

    def forward(self, input: Tensor, target: Any, *_: Any, **__: Any) -> Tensor:
        return super().forward(input, target) + (0.25 if input.dtype == torch.float16 else 0)


class Warns(voxloss.DiceLoss):
    """Right, but noisy, even while it is differentiated."""

    def forward(self, input: Tensor, target: Any, *_: Any, **__: Any) -> Tensor:
        if input.requires_grad:
            input.register_hook(self.complain)  # type: ignore[no-untyped-call]
        return super().forward(input, target)

    def complain(self, gradient: Tensor) -> None:
        warnings.warn("differentiated", stacklevel=1)


class Raises(nn.Module):
    def forward(self, input: Tensor, target: Any, *_: Any, **__: Any) -> Tensor:
        raise RuntimeError("out of luck\nwith a second line")


class Fussy(nn.Module):
    def __init__(self, size: int = 3) -> None:
        raise ValueError(f"size {size} is odd")


class Interrupted(voxloss.DiceLoss):
    """As by Ctrl-C, in half precision."""

    def forward(self, input: Tensor, target: Any, *_: Any, **__: Any) -> Tensor:
        if input.dtype == torch.float16:
            raise KeyboardInterrupt
        return super().forward(input, target)


class Sleeps(voxloss.DiceLoss):
    """In half precision for a minute; marked by a file."""

    def forward(self, input: Tensor, target: Any, *_: Any, **__: Any) -> Tensor:
        if input.dtype == torch.float16:
            Path("asleep").touch()
            time.sleep(60)
        return super().forward(input, target)


def plain_dice(input: Tensor, target: Tensor, weight: float = 2) -> Tensor:
    """Without flaw: probabilities and one channel per class, without declared properties."""
    axes = tuple(range(2, input.ndim))
    score = weight * (input.double() * target).sum(axes) / (input.double() + target).sum(axes)
    return 1 - score.nan_to_num(1).mean()
