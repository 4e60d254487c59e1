"""Correct losses in the styles that people write, and what a newcomer would claim of them.

None is written for the suite: each computes in float32 or in the dtype that it is given, checks little or nothing
of its arguments, and knows its own form of tensors only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SoftDiceLoss(nn.Module):
    """Label map in, softmax inside, sums over the spatial axes."""

    def __init__(self, smooth: float = 1e-5) -> None:
        super().__init__()
        self.smooth = smooth

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        p = torch.softmax(logits.float(), dim=1)
        g = F.one_hot(labels[:, 0].long(), logits.shape[1]).movedim(-1, 1).float()
        axes = tuple(range(2, p.ndim))
        intersection = (p * g).sum(axes)
        total = p.sum(axes) + g.sum(axes)
        return 1 - ((2 * intersection + self.smooth) / (total + self.smooth)).mean()


def dice_of_probabilities(p: Tensor, g: Tensor) -> Tensor:
    """One-hot in, probabilities in, no smoothing but a guard against 0/0."""
    p, g = p.double(), g.double()
    axes = tuple(range(2, p.ndim))
    total = p.sum(axes) + g.sum(axes)
    score = torch.where(total == 0, torch.ones_like(total), 2 * (p * g).sum(axes) / total.clamp(min=1e-300))
    return (1 - score).mean()


class BinaryDice(nn.Module):
    """The sigmoid Dice of a hundred notebooks: everything flattened, one number for the batch."""

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        p = torch.sigmoid(logits.float()).reshape(-1)
        g = masks.float().reshape(-1)
        return 1 - (2 * (p * g).sum() + 1.0) / (p.sum() + g.sum() + 1.0)


class EinsumDice(nn.Module):
    """By einsum, as in papers on boundary losses; one-hot targets, without the background.

    In float64, as einsum takes float32 to half precision inside autocast, and adds up less well.
    """

    def forward(self, logits: Tensor, g: Tensor) -> Tensor:
        p = torch.softmax(logits.double(), 1).flatten(2)[:, 1:]
        g = g.flatten(2)[:, 1:].double()
        intersection = torch.einsum("bcn,bcn->bc", p, g)
        total = torch.einsum("bcn->bc", p) + torch.einsum("bcn->bc", g)
        return (1 - (2 * intersection + 1e-5) / (total + 1e-5)).mean()


class VNetDice(nn.Module):
    """Squares in the denominator (Milletari et al. 2016), sigmoid, per channel."""

    def forward(self, logits: Tensor, g: Tensor) -> Tensor:
        p, g = logits.float().sigmoid(), g.float()
        axes = tuple(range(2, p.ndim))
        numerator = 2 * (p * g).sum(axes) + 1.0
        return (1 - numerator / ((p * p).sum(axes) + (g * g).sum(axes) + 1.0)).mean()


class IoUOfTheBatch(nn.Module):
    """IoU, sums over the batch, label map, softmax inside."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        p = logits.float().softmax(1)
        g = torch.zeros_like(p).scatter_(1, labels.long(), 1.0)
        axes = (0, *range(2, p.ndim))
        intersection = (p * g).sum(axes)
        union = p.sum(axes) + g.sum(axes) - intersection
        return (1 - (intersection + 1.0) / (union + 1.0)).mean()


ALPHA, BETA, SMOOTH = 0.3, 0.7, 1.0


def tversky_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """With named constants; labels without a channel axis, as for torch's cross entropy."""
    p = F.softmax(logits.float(), dim=1)
    g = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(p.dtype)
    axes = tuple(range(2, p.ndim))
    tp = (p * g).sum(axes)
    fp = (p * (1 - g)).sum(axes)
    fn = ((1 - p) * g).sum(axes)
    return (1 - (tp + SMOOTH) / (tp + ALPHA * fp + BETA * fn + SMOOTH)).mean()


class FocalTversky(nn.Module):
    """(1 − Tversky)^0.75 per class (Abraham & Khan 2019)."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        p = logits.float().softmax(1)
        g = torch.zeros_like(p).scatter_(1, labels.long(), 1.0)
        axes = tuple(range(2, p.ndim))
        tp = (p * g).sum(axes)
        fp, fn = p.sum(axes) - tp, g.sum(axes) - tp
        tversky = (tp + 1.0) / (tp + 0.7 * fn + 0.3 * fp + 1.0)
        return ((1 - tversky).clamp(min=1e-12) ** 0.75).mean()  # the gradient of the power is infinite at 0


class NegativeDice(nn.Module):
    """−Dice, as nnU-Net has it: without the background, smoothed below only by a clip."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        p = logits.float().softmax(1)
        g = torch.zeros_like(p).scatter_(1, labels.long(), 1.0)
        axes = tuple(range(2, p.ndim))
        numerator = 2 * (p * g).sum(axes)[:, 1:] + 1e-5
        return -(numerator / (p.sum(axes)[:, 1:] + g.sum(axes)[:, 1:] + 1e-5)).mean()


class DiceOfTheDtype(nn.Module):
    """In whatever dtype it is given, so that float64 inputs have float64 losses; claims no half precision."""

    def forward(self, logits: Tensor, g: Tensor) -> Tensor:
        p = logits.softmax(1)
        axes = tuple(range(2, p.ndim))
        intersection = (p * g).sum(axes)
        return 1 - ((2 * intersection + 1) / (p.sum(axes) + g.sum(axes) + 1)).mean()


LABEL_MAP = {"activation": "softmax", "labels": "map"}
# By name: the family, and what else is declared.
CLAIMS: dict[str, tuple[str, dict[str, Any]]] = {
    "SoftDiceLoss": ("dice", {**LABEL_MAP, "smooth_nr": 1e-5, "smooth_dr": 1e-5}),
    "dice_of_probabilities": ("dice", {}),
    "BinaryDice": (
        "dice",
        {"activation": "sigmoid", "channels": 1, "batch": True, "smooth_nr": 1, "smooth_dr": 1},
    ),
    "EinsumDice": (
        "dice",
        {"activation": "softmax", "include_background": False, "smooth_nr": 1e-5, "smooth_dr": 1e-5},
    ),
    "VNetDice": ("dice", {"activation": "sigmoid", "squared": True, "smooth_nr": 1, "smooth_dr": 1}),
    "IoUOfTheBatch": ("jaccard", {**LABEL_MAP, "batch": True, "smooth_nr": 1, "smooth_dr": 1}),
    "tversky_loss": (
        "tversky",
        {
            "activation": "softmax",
            "labels": "indices",
            "alpha": ALPHA,
            "beta": BETA,
            "smooth_nr": 1,
            "smooth_dr": 1,
        },
    ),
    "FocalTversky": (
        "focal-tversky",
        {**LABEL_MAP, "alpha": 0.3, "beta": 0.7, "gamma": 4 / 3, "smooth_nr": 1, "smooth_dr": 1},
    ),
    "NegativeDice": (
        "dice",
        {**LABEL_MAP, "include_background": False, "offset": 0, "smooth_nr": 1e-5, "smooth_dr": 1e-5},
    ),
    "DiceOfTheDtype": (
        "dice",
        {"activation": "softmax", "dtypes": ["float64", "float32"], "smooth_nr": 1, "smooth_dr": 1},
    ),
}
