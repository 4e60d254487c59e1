"""Score predicted label maps against references, from NIfTI files, by exact counts per class."""

from __future__ import annotations

import gzip
import math
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from voxloss_verify.oracle import pair_counts

# How far apart corresponding corners of two volumes may lie, in mm. Headers hold float32, which is good to 1e-4.
TOLERANCE_MM = 1e-3

_MM_PER_UNIT = {"meter": 1e3, "micron": 1e-3}  # most tools write mm, or no unit and mean mm


@dataclass(frozen=True)
class ClassScore:
    """The overlap of prediction and reference in one class: counts in voxels, volumes in ml (1000 mm³)."""

    label: int
    tp: int
    fp: int
    fn: int
    voxel_ml: float

    @property
    def dice(self) -> Fraction | None:
        """Dice = 2 TP / (2 TP + FP + FN); None if the class is in neither image."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> Fraction | None:
        """IoU = TP / (TP + FP + FN); None if the class is in neither image."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def prediction_ml(self) -> float:
        """Volume of the class in the prediction: TP + FP voxels."""
        return (self.tp + self.fp) * self.voxel_ml

    @property
    def reference_ml(self) -> float:
        """Volume of the class in the reference: TP + FN voxels."""
        return (self.tp + self.fn) * self.voxel_ml


@dataclass(frozen=True)
class Case:
    """A prediction and its reference."""

    name: str
    prediction: Path
    reference: Path


@dataclass(frozen=True)
class Result:
    """The scores of a case, or else the error that says why there are none."""

    case: Case
    scores: list[ClassScore]
    error: str | None = None


def score_pair(
    prediction_path: str | os.PathLike[str],
    reference_path: str | os.PathLike[str],
    labels: Sequence[int] | None = None,
    ignore: int | None = None,
) -> list[ClassScore]:
    """Count a predicted label map against its reference, both 3D NIfTI on the same grid.

    `labels` are the classes to score, by default all that occur in either image, without 0. A voxel whose
    reference is `ignore` counts as deleted, from both images. Raises ValueError that names the file if one cannot
    be read, is not 3D, holds labels that are not whole numbers, or if the shapes differ or the corners of the two
    volumes are more than `TOLERANCE_MM` apart.
    """
    prediction, reference = _Volume(Path(prediction_path)), _Volume(Path(reference_path))
    prediction.require_grid_of(reference)
    counts = {
        (int(p), int(g)): voxels
        for (p, g), voxels in pair_counts(prediction.labels(), reference.labels()).items()
        if g != ignore
    }
    predicted: Counter[int] = Counter()
    wanted: Counter[int] = Counter()
    for (p, g), voxels in counts.items():
        predicted[p] += voxels
        wanted[g] += voxels
    scores = []
    for label in sorted((predicted.keys() | wanted.keys()) - {0}) if labels is None else labels:
        tp = counts.get((label, label), 0)
        scores.append(ClassScore(label, tp, predicted[label] - tp, wanted[label] - tp, reference.voxel_ml))
    return scores


def find_cases(prediction: Path, reference: Path) -> list[Case]:
    """Pair two files, or the NIfTI files of two folders by name, sorted; a partner may turn out to be missing.

    Raises ValueError if one is a file and the other a folder, or if there is nothing to score.
    """
    if not prediction.is_dir() and not reference.is_dir():
        return [Case(prediction.name, prediction, reference)]
    for path in (prediction, reference):
        if not path.is_dir():
            found = "a file" if path.exists() else "nothing"
            raise ValueError(f"expected two files or two folders, got {found} at {path}")
    names = sorted(_nifti_names(prediction) | _nifti_names(reference))
    if not names:
        raise ValueError(f"expected .nii or .nii.gz files in {prediction} and {reference}, got none")
    return [Case(name, prediction / name, reference / name) for name in names]


def score_cases(
    cases: Sequence[Case],
    labels: Sequence[int] | None = None,
    ignore: int | None = None,
    jobs: int = 1,
    advance: Callable[[], object] = lambda: None,
) -> list[Result]:
    """Score all cases, in their order, with up to `jobs` processes; `advance` is called after each.

    What cannot be scored is a result with an error. With more than one job, call it from the main thread.
    """
    score = partial(_score, labels=labels, ignore=ignore)
    results = []
    jobs = min(jobs, len(cases))
    if jobs <= 1:
        for case in cases:
            results.append(score(case))
            advance()
        return results
    # Not forked: threads, such as that of a progress bar, do not survive a fork.
    executor = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    try:
        # The workers inherit deafness to Ctrl-C; this process hears it and ends them.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            futures = [executor.submit(score, case) for case in cases]
        finally:
            signal.signal(signal.SIGINT, handler)
        for case, future in zip(cases, futures, strict=True):
            try:
                results.append(future.result())
            except BrokenProcessPool:
                error = f"{case.prediction}: a process died, perhaps for want of memory; try fewer jobs"
                results.append(Result(case, [], error))
            advance()
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
    return results


def _score(case: Case, labels: Sequence[int] | None, ignore: int | None) -> Result:
    try:
        return Result(case, score_pair(case.prediction, case.reference, labels, ignore))
    except ValueError as error:
        return Result(case, [], str(error))


class _Volume:
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

    def require_grid_of(self, other: _Volume) -> None:
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
                    wrong = np.argwhere(np.mod(data[:, :, z], 1) != 0)
                if len(wrong):
                    x, y = wrong[0].tolist()
                    where, value = (x, y, z), data[x, y, z]
                    raise ValueError(f"{self.path}: expected whole numbers, got {value} at voxel {where}")
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


def _nifti_names(folder: Path) -> set[str]:
    """Hidden files are not data: other systems' file attributes, half-written files."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return {name for name in names if name.lower().endswith((".nii", ".nii.gz"))}


def _ratio(numerator: int, denominator: int) -> Fraction | None:
    return Fraction(numerator, denominator) if denominator else None
