"""A loss of voxloss by the name of its class, for networks that are trained here."""

from __future__ import annotations

from typing import Any

from torch import nn

import voxloss


def softmax_loss(kind: str, **arguments: Any) -> nn.Module:
    """The loss of this class over logits of classes that exclude each other, and a label map."""
    softmax = "use_softmax" if kind == "FocalLoss" else "softmax"  # MONAI's names
    loss: nn.Module = getattr(voxloss, kind)(**{"to_onehot_y": True, softmax: True, **arguments})
    return loss
