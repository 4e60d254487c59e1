"""Shapes and spacings in [X, Y, Z], and where voxels lie in mm."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]


def flipped_affine(spacing: Spacing) -> NDArray[np.float64]:
    """Voxel indices to mm: x flipped and the origin elsewhere, since an identity would hide every error."""
    if len(spacing) != 3 or not all(0 < s < math.inf for s in spacing):
        raise ValueError(f"expected a spacing of three positive numbers in mm, received {spacing}")
    x, y, z = spacing
    affine = np.diag([-x, y, z, 1.0])
    affine[:3, 3] = 40.0, -25.5, 12.25
    return affine


def require_integers(name: str, values: tuple[int, ...], count: int = 3, at_least: float = -math.inf) -> None:
    """Raise ValueError unless `values` are `count` integers, none below `at_least`."""
    if len(values) != count or not all(isinstance(value, int) and value >= at_least for value in values):
        bound = f" ≥ {at_least}" if at_least > -math.inf else ""
        raise ValueError(f"{name}: expected {count} integers{bound}, received {values}")
