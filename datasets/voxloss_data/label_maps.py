"""Label maps in NIfTI files: pairing them by name, and reading them with care."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxloss_data.nifti import TOLERANCE_MM, NiftiFile
from voxloss_data.nifti_files import nifti_files
from voxloss_data.text import quoted


@dataclass(frozen=True)
class LabelMapPair:
    """A prediction and its reference."""

    name: str
    prediction: Path
    reference: Path


def find_pairs(prediction: Path, reference: Path) -> list[LabelMapPair]:
    """Pair two files, or the NIfTI files of two folders by name, sorted; a partner may turn out to be missing.

    Raises ValueError if one is a file and the other a folder, if there is nothing to score, or if a folder has
    NAME.nii and NAME.nii.gz.
    """
    if not prediction.is_dir() and not reference.is_dir():
        return [LabelMapPair(prediction.name, prediction, reference)]
    for path in (prediction, reference):
        if not path.is_dir():
            found = "a file" if path.exists() else "nothing"
            raise ValueError(f"expected two files or two folders, received {found} at {quoted(path)}")
    names = sorted({path.name for folder in (prediction, reference) for path in nifti_files(folder).values()})
    if not names:
        raise ValueError(
            f"expected .nii or .nii.gz files in {quoted(prediction)} and {quoted(reference)}, received none"
        )
    return [LabelMapPair(name, prediction / name, reference / name) for name in names]


class LabelFile(NiftiFile):
    """A 3D NIfTI file of whole numbers."""

    dimensions = (3,)
    layout = "3 dimensions"
    content = "whole numbers"

    def require_grid_of(self, other: LabelFile) -> None:
        """Raise ValueError unless the other file has this shape and, within `TOLERANCE_MM`, these corners."""
        if self.shape != other.shape:
            raise ValueError(
                f"{self.name}: expected the shape {other.shape} of {other.name}, received {self.shape}"
            )
        corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(self.shape) - 1)
        apart = (self.affine - other.affine) @ np.vstack([corners.T, np.ones(8)])
        distance = float(np.linalg.norm(apart, axis=0).max())
        if not distance <= TOLERANCE_MM:
            raise ValueError(
                f"{self.name}: expected the affine of {other.name} to within {TOLERANCE_MM:g} mm, "
                f"received corners {distance:.3g} mm apart"
            )

    def labels(self) -> NDArray[Any]:
        """Read the voxels in the dtype of the file. Raises ValueError if one is no whole number."""
        data = self._read()
        if data.dtype.kind == "f":
            for z in range(data.shape[2]):  # by slices, to save memory
                # The remainder of NaN and ±∞ is NaN.
                with np.errstate(invalid="ignore"):
                    wrong = np.argwhere((np.mod(data[:, :, z], 1) != 0) | (np.abs(data[:, :, z]) >= 2.0**63))
                if len(wrong):
                    x, y = wrong[0].tolist()
                    where, value = (x, y, z), data[x, y, z]
                    limit = " below 2^63" if 2.0**63 <= abs(value) < math.inf else ""
                    raise ValueError(
                        f"{self.name}: expected whole numbers{limit}, received {value} at voxel {where}"
                    )
        return data
