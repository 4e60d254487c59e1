"""Maps for losses that need one beside the labels: made from the labels, so that any volume is enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from voxloss import Target
from voxloss.regions import memberships
from voxloss_verify.oracle.claims import MapName


@dataclass(frozen=True)
class MapOfTarget:
    """A hook before the call of a loss: in the target's place it puts a `Target` with the map that is made of it.

    The skeleton s is the whole target, so that its recall is Σpg / Σg. The distance is φ = 1 − 2g, of one voxel
    and negative inside, so that Σφp = Σp − 2Σpg. Both follow the target wherever it is moved. A partition has one
    cell, the whole sample, so that the loss of cells is that of samples: number 0 of the "nearest" lesions,
    number 1 of the "components".

    Attributes:
        name: of the map, or of the kind of partition.
        regions: of each channel the labels, if the target is a map of them.
    """

    name: MapName
    regions: tuple[tuple[int, ...], ...] | None = None

    def __call__(self, loss: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of the call with the map."""
        input, target, *others = given
        if not isinstance(target, Tensor):  # one of a test's own
            return given
        return input, self._with_map(input, target), *others

    def _with_map(self, input: Tensor, target: Tensor) -> Target:
        if self.name == "skeleton":
            return Target(target, skeleton=target.detach())
        if self.name == "distance":
            return Target(target, distance=self._distance(input, target).detach())
        number = 1 if self.name == "components" else 0
        return Target(target, partition=torch.full_like(input[:, :1], number, dtype=torch.int64))

    def _distance(self, input: Tensor, target: Tensor) -> Tensor:
        dtype, channels = torch.promote_types(input.dtype, torch.float32), input.shape[1]
        if self.regions is not None:
            bits = torch.tensor([*memberships(self.regions, softmax=False)], device=target.device)
            known = target.to(torch.int64).clamp(0, len(bits) - 1)
            shifts = torch.arange(channels, device=target.device).view(1, -1, *[1] * (target.ndim - 2))
            inside = (bits[known] >> shifts) & 1
        elif target.shape[1] == channels:
            inside = target
        else:
            inside = target == torch.arange(channels, device=target.device).view(1, -1, *[1] * (target.ndim - 2))
        return 1 - 2 * inside.to(dtype)
