"""NIfTI files, checked when they are opened: a damaged one raises an error that names it."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.nifti1 import data_type_codes
from nibabel.openers import Opener
from numpy.typing import NDArray

from voxloss_data.nifti_files import in_place_of_a_file
from voxloss_data.text import quoted

# How far apart corresponding corners of two volumes may lie, in mm. Headers hold float32, which is good to 1e-4.
TOLERANCE_MM = 1e-3
LARGEST_VOLUME = 2**31  # voxels; 8 GiB of float32

_MM_PER_UNIT = {"meter": 1e3, "micron": 1e-3}  # most tools write mm, or no unit and mean mm
_BLOCK = 2**20
_COPY = "Replace it by an undamaged copy"


class NiftiFile:
    """A NIfTI file that is whole and holds real numbers: its header has been read, and its voxels not yet."""

    dimensions: tuple[int, ...]  # how many it may have
    layout: str  # the same in words
    content: str  # what its voxels are

    def __init__(self, path: Path) -> None:
        """Raises ValueError that names the file unless it is a whole one of these dimensions.

        Nothing of the size that a header claims is allocated before as many bytes have been counted.
        """
        self.path = path
        self.name = quoted(path)
        try:
            _require_regular(path)
            stored = _length(path)
            loaded = nib.load(path)
            if not isinstance(loaded, nib.Nifti1Pair):
                raise _Unexpected("a NIfTI file", type(loaded).__name__)
            image: Any = loaded
            data = Path(image.file_map["image"].filename)
            if data != path:  # a pair of .hdr and .img
                _require_regular(data)
                stored = _length(data)
            unit = image.header.get_xyzt_units()[0]
            affine: NDArray[np.float64] = image.affine
            dtype = image.get_data_dtype()
            kind = data_type_codes.label[int(image.header["datatype"])]
            needed = image.dataobj.offset + math.prod(map(int, image.shape)) * dtype.itemsize
        except _Unexpected as error:
            raise ValueError(f"{self.name}: {error}") from error
        except Exception as error:  # a broken header can break nibabel anywhere
            raise self._unreadable(error) from error
        self.image = image
        self.shape: tuple[int, ...] = tuple(map(int, image.shape))
        if len(self.shape) not in self.dimensions:
            raise ValueError(
                f"{self.name}: expected {self.layout}, received {len(self.shape)}: {self.shape}{self._squeezed()}"
            )
        if min(self.shape) < 1:
            raise ValueError(f"{self.name}: expected voxels along each axis, received the shape {self.shape}")
        if stored < needed:
            raise ValueError(
                f"{self.name}: expected a whole NIfTI file of {needed} bytes, as its header claims, "
                f"received {stored}. {_COPY}"
            )
        if dtype.kind not in "iuf":
            raise ValueError(f"{self.name}: expected {self.content}, received the dtype {kind}")
        # Voxel indices to mm, 3x4.
        self.affine: NDArray[np.float64] = affine[:3] * _MM_PER_UNIT.get(unit, 1)
        edges = self.affine[:, :3]
        with np.errstate(all="ignore"):
            self.voxel_ml = abs(float(np.linalg.det(edges))) / 1000
            flat = not self.voxel_ml > 1e-9 * float(np.prod(np.linalg.norm(edges, axis=0))) / 1000
        if flat or not np.isfinite(self.affine).all() or not 0 < self.voxel_ml < math.inf:
            raise ValueError(
                f"{self.name}: expected voxels of some volume, received the affine {self.affine.tolist()}"
            )

    def _read(self) -> NDArray[Any]:
        """The voxels in the dtype of the file; only scaled ones become floats."""
        try:
            data: NDArray[Any] = np.asanyarray(self.image.dataobj)
        except Exception as error:  # OSError, ValueError, MemoryError, …
            raise self._unreadable(error) from error
        return data

    def _squeezed(self) -> str:
        if len(self.shape) > max(self.dimensions) and len([n for n in self.shape if n != 1]) in self.dimensions:
            return ". Write it without its axes of length 1 (numpy.squeeze)"
        return ""

    def _unreadable(self, error: Exception) -> ValueError:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return ValueError(f"{self.name}: expected a whole NIfTI file, received {reason}. {_COPY}")


class ImageFile(NiftiFile):
    """A 3D image, or one whose channels are a fourth axis."""

    dimensions = (3, 4)
    layout = "3 dimensions, or 4 with channels last"
    content = "real numbers"

    @property
    def channels(self) -> int:
        """How many there are."""
        return self.shape[3] if len(self.shape) == 4 else 1

    @property
    def spacing(self) -> NDArray[np.float64]:
        """Edges of a voxel in mm, in the order of axes that the image has once it is turned to RAS."""
        edges: NDArray[np.float64] = np.linalg.norm(self.image.affine[:3, :3], axis=0)[self._ras()]
        return edges

    @property
    def extent(self) -> NDArray[np.float64]:
        """Edges of the volume in mm, in the same order."""
        edges: NDArray[np.float64] = self.spacing * np.array(self.shape[:3])[self._ras()]
        return edges

    def _ras(self) -> list[int]:
        orientation = nib.io_orientation(self.image.affine)  # type: ignore[no-untyped-call]
        return [int(axis) for axis in np.argsort(orientation[:, 0])]

    def require_resampled(self, spacing: Sequence[float]) -> None:
        """Raise ValueError if resampling to this spacing in mm leaves no voxel, or far too many."""
        edges = self.extent / np.array(spacing)
        if not (edges.min() >= 0.5 and edges.prod() <= LARGEST_VOLUME):
            raise ValueError(
                f"{self.name}: expected 1 to {LARGEST_VOLUME} voxels when resampled to {_by(spacing)} mm, "
                f"received {_by(edges)}, from its own {_by(self.spacing)} mm. Fix its header, or set --spacing"
            )

    def require_grid_near(self, other: NiftiFile) -> None:
        """Raise ValueError unless it has the voxels of the other file, and its affine but for rounding."""
        remedy = f"as {other.name} has. Resample one of them to the other's grid"
        if self.shape[:3] != other.shape[:3]:
            raise ValueError(
                f"{self.name}: expected {other.shape[:3]} voxels, received {self.shape[:3]}, {remedy}"
            )
        if not np.allclose(self.image.affine, other.image.affine, atol=TOLERANCE_MM):
            expected, received = (np.round(file.image.affine[:3], 3).tolist() for file in (other, self))
            raise ValueError(f"{self.name}: expected the affine {expected}, received {received}, {remedy}")

    def require_finite(self) -> None:
        """Raise ValueError if a voxel is NaN or infinite; whole numbers need not be read for that."""
        kept = self.image.dataobj
        if kept.dtype.kind != "f":
            limits = np.iinfo(kept.dtype)
            largest = max(-int(limits.min), int(limits.max)) * abs(float(kept.slope)) + abs(float(kept.inter))
            if largest < float(np.finfo(np.float32).max):
                return
        self.voxels()

    def voxels(self) -> NDArray[Any]:
        """Read the voxels. Raises ValueError if one is NaN or infinite in float32, in which networks compute."""
        data = self._read()
        if data.dtype.kind != "f":
            return data
        count, first = 0, None
        for z in range(data.shape[2]):  # by slices, to save memory
            with np.errstate(over="ignore", invalid="ignore"):
                wrong = np.argwhere(~np.isfinite(data[:, :, z].astype(np.float32)))
            count += len(wrong)
            if len(wrong) and first is None:
                x, y, *channel = wrong[0].tolist()
                first = (x, y, z, *channel)
        if first is not None:
            raise ValueError(
                f"{self.name}: expected finite voxels, received {count} that are not, the first {data[first]} "
                f"at voxel {first}. Replace them, for example by the intensity of air"
            )
        return data


def open_image(paths: Sequence[Path]) -> list[ImageFile]:
    """Open the files of one image: a single one, or one for each channel.

    Raises ValueError that names a file which is damaged, has a voxel that is not finite, or another grid than the
    first.
    """
    files = [ImageFile(path) for path in paths]
    for file in files:
        file.require_grid_near(files[0])
        file.require_finite()
    return files


def _by(edges: Iterable[float]) -> str:
    return " x ".join(f"{edge:.4g}" for edge in edges)


class _Unexpected(Exception):
    """What was expected, and what there is."""

    def __init__(self, expected: str, received: str) -> None:
        super().__init__(f"expected {expected}, received {received}")


def _require_regular(path: Path) -> None:
    found = in_place_of_a_file(path)
    if found is not None:
        raise _Unexpected("a NIfTI file", found)


def _length(path: Path) -> int:
    """How many bytes a file holds, decompressed to its end: nibabel stops before the checksum that is there."""
    ending = path.suffix.lower()
    if ending not in Opener.compress_ext_map:
        return path.stat().st_size
    count = 0
    stream: Any
    with gzip.open(path) if ending == ".gz" else Opener(str(path)) as stream:
        while block := stream.read(_BLOCK):
            count += len(block)
    return count
