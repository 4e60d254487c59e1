"""Label maps in NIfTI files: pairing them by name, and reading them with care."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from voxloss_data.nifti_files import nifti_files
from voxloss_data.text import quoted

# How far apart corresponding corners of two volumes may lie, in mm. Headers hold float32, which is good to 1e-4.
TOLERANCE_MM = 1e-3

_MM_PER_UNIT = {"meter": 1e3, "micron": 1e-3}  # most tools write mm, or no unit and mean mm


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
            raise ValueError(f"expected two files or two folders, got {found} at {quoted(path)}")
    names = sorted({path.name for folder in (prediction, reference) for path in nifti_files(folder).values()})
    if not names:
        raise ValueError(
            f"expected .nii or .nii.gz files in {quoted(prediction)} and {quoted(reference)}, got none"
        )
    return [LabelMapPair(name, prediction / name, reference / name) for name in names]


class LabelFile:
    """A 3D NIfTI file whose header has been read, and its voxels not yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise ValueError(f"{path}: expected a NIfTI file, got nothing: it does not exist")
        try:
            self._require_checksum()
            image: Any = nib.load(path)
            header: Any = image.header
            unit = header.get_xyzt_units()[0] if isinstance(image, nib.Nifti1Pair) else ""
        except Exception as error:  # a broken header can break nibabel anywhere
            raise self._unreadable(error) from error
        if not isinstance(image, nib.Nifti1Pair):
            raise ValueError(f"{path}: expected a NIfTI file, got {type(image).__name__}")
        self.image: Any = image
        self.shape: tuple[int, ...] = image.shape
        if len(self.shape) != 3:
            raise ValueError(f"{path}: expected 3 dimensions, got {len(self.shape)}: {self.shape}")
        # Voxel indices to mm, 3x4.
        self.affine: NDArray[np.float64] = self.image.affine[:3] * _MM_PER_UNIT.get(unit, 1)
        self.voxel_ml = abs(float(np.linalg.det(self.affine[:, :3]))) / 1000
        if not 0 < self.voxel_ml < math.inf:
            raise ValueError(f"{path}: expected voxels of some volume, got the affine {self.affine.tolist()}")

    def require_grid_of(self, other: LabelFile) -> None:
        """Raise ValueError unless the other file has this shape and, within `TOLERANCE_MM`, these corners."""
        if self.shape != other.shape:
            raise ValueError(f"{self.path}: expected the shape {other.shape} of {other.path}, got {self.shape}")
        corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(self.shape) - 1)
        apart = (self.affine - other.affine) @ np.vstack([corners.T, np.ones(8)])
        distance = float(np.linalg.norm(apart, axis=0).max())
        if not distance <= TOLERANCE_MM:
            raise ValueError(
                f"{self.path}: expected the affine of {other.path} to within {TOLERANCE_MM:g} mm, "
                f"got corners {distance:.3g} mm apart"
            )

    def labels(self) -> NDArray[Any]:
        """Read the voxels in the dtype of the file; only scaled ones become floats."""
        try:
            data: NDArray[Any] = np.asanyarray(self.image.dataobj)
        except Exception as error:  # OSError, ValueError, MemoryError, …
            raise self._unreadable(error) from error
        if data.dtype.kind not in "iuf":
            raise ValueError(f"{self.path}: expected whole numbers, got the dtype {data.dtype}")
        if data.dtype.kind == "f":
            for z in range(data.shape[2]):  # by slices, to save memory
                # The remainder of NaN and ±∞ is NaN.
                with np.errstate(invalid="ignore"):
                    wrong = np.argwhere((np.mod(data[:, :, z], 1) != 0) | (np.abs(data[:, :, z]) >= 2.0**63))
                if len(wrong):
                    x, y = wrong[0].tolist()
                    where, value = (x, y, z), data[x, y, z]
                    limit = " below 2^63" if 2.0**63 <= abs(value) < math.inf else ""
                    raise ValueError(f"{self.path}: expected whole numbers{limit}, got {value} at voxel {where}")
        return data

    def _require_checksum(self) -> None:
        """Decompress to the end, where the checksum is: nibabel stops before it, and does not see damage."""
        if self.path.suffix.lower() == ".gz":
            with gzip.open(self.path) as stream:
                while stream.read(2**20):
                    pass

    def _unreadable(self, error: Exception) -> ValueError:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return ValueError(f"{self.path}: expected a whole NIfTI file, got {reason}")
