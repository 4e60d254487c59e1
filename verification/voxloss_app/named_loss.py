"""A loss of voxloss by the name of its class, for networks that are trained here on label maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

import voxloss


def softmax_loss(kind: str, **arguments: Any) -> nn.Module:
    """The loss of this class over logits of classes that exclude each other, and a label map."""
    softmax = "use_softmax" if kind == "FocalLoss" else "softmax"  # MONAI's names
    loss: nn.Module = getattr(voxloss, kind)(**{"to_onehot_y": True, softmax: True, **arguments})
    return loss


def sigmoid_loss(kind: str, regions: Sequence[Sequence[int]], **arguments: Any) -> nn.Module:
    """The loss of this class over logits of regions, which may overlap, and a label map."""
    sigmoid = {} if kind == "FocalLoss" else {"sigmoid": True}  # which it has if there is no softmax
    loss: nn.Module = getattr(voxloss, kind)(**{**sigmoid, "regions": regions, **arguments})
    return loss
