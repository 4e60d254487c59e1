"""The MNI152 brain: a T1 image, its tissue classes and their probabilities, from nilearn's bundled templates.

Templates: ICBM 152 nonlinear symmetric 2009a (Fonov et al. 2011). Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from voxloss_data.files import save_json, save_nifti

# Raise it when the content of the files changes, so that older caches are rebuilt.
FORMAT = 1
CACHE_VARIABLE = "VOXLOSS_CACHE"


@dataclass(frozen=True)
class BrainMRI:
    """NIfTI files of one brain, [X, Y, Z] on one grid, whose affine maps to MNI152 mm.

    `image` is the T1 (float32, 0 to 1), `labels` the class of each voxel (uint8, an index of `class_names`) and
    `probabilities` [X, Y, Z, 4] that of each class (float32, sum 1); the label is their argmax.
    """

    class_names: ClassVar[tuple[str, ...]] = ("background", "CSF", "grey matter", "white matter")

    image: Path
    labels: Path
    probabilities: Path


def brain_mri(resolution: int = 2, cache: str | PathLike[str] | None = None) -> BrainMRI:
    """Return the MNI152 brain at `resolution` 1 or 2 mm, built on the first call and cached.

    With the probabilities g of grey and w of white matter, CSF is what is left, c = clip(1 − g − w, 0, 1).
    Outside of the brain mask a voxel is background; inside, it belongs to the likeliest of (c, g, w).

    The cache is the folder `cache`, else that in $VOXLOSS_CACHE, else the user's cache folder. Files that are
    missing, damaged or from another version of nilearn are rebuilt; processes may do so at the same time.
    Raises ValueError for another resolution, OSError if the cache cannot be written, and ImportError without
    the extra: pip install 'voxloss[demo]'.
    """
    if resolution not in (1, 2):
        raise ValueError(f"expected a resolution of 1 or 2 mm, received {resolution}")
    folder = _cache_folder(cache) / f"mni152_{resolution}mm"
    brain = BrainMRI(
        image=folder / "t1.nii.gz",
        labels=folder / "labels.nii.gz",
        probabilities=folder / "probabilities.nii.gz",
    )
    if not _is_valid(brain, resolution):
        t1, probabilities, affine = _volumes(resolution)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_nifti(brain.image, t1, affine, "mni")
            # From the float32 probabilities, so that the two files agree in every voxel, near-ties included.
            save_nifti(brain.labels, probabilities.argmax(-1).astype(np.uint8), affine, "mni")
            save_nifti(brain.probabilities, probabilities, affine, "mni")
            # Last, since files count only with a manifest that fits them. Each file is replaced whole, and every
            # process writes the same bytes, so builders at work at the same time do each other no harm.
            save_json(_manifest_path(brain), _manifest(brain, resolution))
        except OSError as error:
            raise OSError(
                f"cannot write the cache folder {folder} ({error}); set {CACHE_VARIABLE} to another folder"
            ) from error
    return brain


def _volumes(resolution: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """T1 [X, Y, Z], class probabilities [X, Y, Z, 4] and their affine."""
    datasets = _demo_module("nilearn.datasets")
    template = datasets.load_mni152_template(resolution=resolution)
    grey = datasets.load_mni152_gm_template(resolution=resolution).get_fdata(dtype=np.float32)
    white = datasets.load_mni152_wm_template(resolution=resolution).get_fdata(dtype=np.float32)
    mask = datasets.load_mni152_brain_mask(resolution=resolution).get_fdata(dtype=np.float32) > 0

    probabilities = np.stack([np.zeros_like(grey), np.clip(1 - grey - white, 0, 1), grey, white], -1)
    # 1 but for rounding; the division also holds up if resampling should push g + w above 1.
    probabilities /= probabilities.sum(-1, keepdims=True)
    probabilities[~mask] = 1, 0, 0, 0
    return template.get_fdata(dtype=np.float32), probabilities, template.affine


def _is_valid(brain: BrainMRI, resolution: int) -> bool:
    try:
        return bool(json.loads(_manifest_path(brain).read_bytes()) == _manifest(brain, resolution))
    except (OSError, ValueError):  # missing or unreadable; not JSON
        return False


def _manifest_path(brain: BrainMRI) -> Path:
    return brain.image.with_name("manifest.json")


def _manifest(brain: BrainMRI, resolution: int) -> dict[str, Any]:
    """Describe the files as they are on disk now, and what they are made from."""
    return {
        "format": FORMAT,
        "nilearn": _demo_module("nilearn").__version__,
        "resolution_mm": resolution,
        "sha256": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (brain.image, brain.labels, brain.probabilities)
        },
    }


def _cache_folder(cache: str | PathLike[str] | None) -> Path:
    chosen = cache or os.environ.get(CACHE_VARIABLE) or _demo_module("platformdirs").user_cache_dir("voxloss")
    return Path(chosen).expanduser()


def _demo_module(name: str) -> Any:
    """Import a module that only the demo needs."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"brain_mri needs {name}: pip install 'voxloss[demo]'") from error
