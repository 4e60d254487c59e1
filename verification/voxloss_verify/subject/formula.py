"""A loss's own `per_class` as the formula that it claims: all else that the loss does is verified without it."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch

from voxloss import RegionLoss, RegionStatistics
from voxloss.channels import Channels


class OwnFormula:
    """The `per_class` of a loss, in float64, of one sample at a time: the others must not matter."""

    def __init__(self, loss: RegionLoss) -> None:
        self.loss = loss
        self.extra_sums = loss.extra_sums

    def __repr__(self) -> str:
        return f"{type(self.loss).__name__}.per_class"

    def __call__(
        self, sums: Sequence[Sequence[float]], weights: Sequence[float], counting: Sequence[int], channels: int
    ) -> tuple[list[float], list[list[float]]]:
        """The loss of each class, and the derivatives of Σ weight·loss."""
        fields = torch.tensor(sums, dtype=torch.float64).T.unsqueeze(1).unbind()
        with torch.enable_grad():
            leaves = [field.clone().requires_grad_() for field in fields]
            arguments: dict[str, Any] = dict(zip(self.extra_sums, leaves[3:], strict=True))
            if "channels" in signature(self.loss.per_class).parameters:
                binary = self.loss.sigmoid or channels == 1
                arguments["channels"] = Channels(list(counting), channels, binary)
            losses = self.loss.per_class(RegionStatistics(*leaves[:3]), **arguments)
            total = (losses * losses.new_tensor(weights)).sum()
            derivatives = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return losses[0].tolist(), torch.cat(derivatives).T.tolist()


class MeanOfDistance:
    """The mean over voxels of φ·p for the distance that checks are made with, φ = 1 − 2g: (Σp − 2Σpg)/N."""

    extra_sums = ("voxels",)

    def __repr__(self) -> str:
        return "(Σp − 2Σpg)/N"

    def __call__(
        self, sums: Sequence[Sequence[float]], weights: Sequence[float], counting: Sequence[int], channels: int
    ) -> tuple[list[float], list[list[float]]]:
        """The loss of each class, and the derivatives of Σ weight·loss."""
        losses, derivatives = [], []
        for (intersection, prediction, _, voxels), weight in zip(sums, weights, strict=True):
            share = 1 / voxels if voxels else 0.0
            losses.append((prediction - 2 * intersection) * share)
            derivatives.append([-2 * weight * share, weight * share, 0.0, 0.0])
        return losses, derivatives
