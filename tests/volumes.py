"""Small random volumes for the tests, and what they should sum to."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from voxloss import RegionStatistics

SHAPES = {"1-D": (31,), "2-D": (9, 11), "3-D": (5, 6, 7)}


def logits(
    items: int = 2,
    channels: int = 4,
    spatial: tuple[int, ...] = SHAPES["3-D"],
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    return (2 * torch.randn(items, channels, *spatial, dtype=torch.float64)).to(dtype)


def label_map(items: int = 2, channels: int = 4, spatial: tuple[int, ...] = SHAPES["3-D"]) -> Tensor:
    return torch.randint(channels, (items, 1, *spatial))


def one_hot(labels: Tensor, channels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (labels == torch.arange(channels).view(1, -1, *[1] * (labels.ndim - 2))).to(dtype)


def exact_statistics(
    p: Tensor, g: Tensor, keep: Tensor, *, squared: bool = False, soft_label: bool = False
) -> dict[str, list[list[Fraction]]]:
    """Add up one voxel after the other in rational arithmetic: floats are fractions. `keep` is [B, 1, ...]."""
    sums: dict[str, list[list[Fraction]]] = {name: [] for name in RegionStatistics._fields}
    for item in range(p.shape[0]):
        for rows in sums.values():
            rows.append([Fraction(0)] * p.shape[1])
        for channel in range(p.shape[1]):
            values = zip(
                p[item, channel].flatten().tolist(),
                g[item, channel].flatten().tolist(),
                keep[item, 0].flatten().tolist(),
                strict=True,
            )
            for a, b in ((Fraction(x), Fraction(y)) for x, y, kept in values if kept):
                sums["intersection"][item][channel] += min(a, b) if soft_label and not squared else a * b
                sums["prediction"][item][channel] += a * a if squared else a
                sums["target"][item][channel] += b * b if squared else b
    return sums
