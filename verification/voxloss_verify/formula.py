"""A loss's own `per_class` as the formula that it claims: all else that the loss does is verified without it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from voxloss import RegionLoss, RegionStatistics
from voxloss_verify.claims import Triple


class OwnFormula:
    """The `per_class` of a loss, in float64, of one item at a time: it must not notice the others."""

    def __init__(self, loss: RegionLoss) -> None:
        self.loss = loss

    def __repr__(self) -> str:
        return f"{type(self.loss).__name__}.per_class"

    def __call__(self, sums: Sequence[Triple], weights: Sequence[float]) -> tuple[list[float], list[Triple]]:
        """The loss of each class, and the derivatives of Σ weight·loss."""
        fields = torch.tensor(sums, dtype=torch.float64).T.unsqueeze(1).unbind()
        with torch.enable_grad():
            statistics = RegionStatistics(*(field.clone().requires_grad_() for field in fields))
            losses = self.loss.per_class(statistics)
            total = (losses * losses.new_tensor(weights)).sum()
            slopes = torch.autograd.grad(total, statistics, allow_unused=True, materialize_grads=True)
        by_class = torch.cat(slopes).T.tolist()
        return losses[0].tolist(), [(i, p, t) for i, p, t in by_class]
