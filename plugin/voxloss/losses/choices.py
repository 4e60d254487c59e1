"""The values of `reduction` and `w_type`, which are those of MONAI's enumerations.

They are written out because importing MONAI for them takes longer than all of torch. MONAI's own members are
strings, and are taken as well.
"""

from __future__ import annotations

from enum import Enum


class _Choice(str, Enum):
    def __str__(self) -> str:
        return str(self.value)

    __repr__ = __str__


class LossReduction(_Choice):
    """How the values of samples and classes, or of voxels, become what a loss returns."""

    NONE = "none"
    MEAN = "mean"
    SUM = "sum"


class WeightType(_Choice):
    """How the weight of a class in Generalized Dice falls with its number of voxels."""

    SQUARE = "square"
    SIMPLE = "simple"
    UNIFORM = "uniform"
