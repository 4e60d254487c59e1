"""A small set of labelled CT volumes to train on, made from nothing but numbers.

Each case is a body of soft tissue in air, with one organ in it and one lesion in the organ. Where they lie and
how large they are differs from case to case. Intensities are in Hounsfield units and overlap by noise alone, so
that a small network learns the set in a few dozen steps.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxloss_data.files import save_json, save_nifti
from voxloss_data.geometry import Spacing, Triple, flipped_affine, require_integers

AIR, SOFT_TISSUE, ORGAN, LESION = -1000, 40, 120, 200
NOISE = 20.0  # standard deviation, in HU
LOWEST = -1024  # what CT scanners store for anything below


def write_ct_set(
    folder: str | PathLike[str],
    cases: int = 6,
    *,
    test_cases: int = 2,
    shape: Triple = (64, 64, 32),
    spacing: Spacing = (1.5, 1.5, 3.0),
    seed: int = 0,
) -> Path:
    """Write labelled CT volumes as the Medical Segmentation Decathlon lays them out, and return the folder.

    imagesTr and labelsTr get `cases` volumes ct_000.nii.gz, ct_001.nii.gz, …, imagesTs the next `test_cases`
    without labels, and dataset.json lists them. Images are int16 in HU, label maps uint8: 0 background, 1 organ
    (an ellipsoid), 2 lesion (a ball inside the organ). `shape` is [X, Y, Z] in voxels, `spacing` in mm; the
    affine flips x and moves the origin.

    A case depends on `seed`, its number, `shape` and `spacing` alone, so ct_006 without labels is the ct_006 that
    a larger set has with them. The same arguments give the same bytes, and files are written atomically. Files of
    another, larger set that lie in the folder stay there, but dataset.json does not list them. Raises ValueError
    for fewer than one case, fewer than 8 voxels along an axis, a negative seed or a spacing that is not positive,
    NotADirectoryError if `folder` is a file.
    """
    folder = Path(folder)
    require_integers("cases", (cases,), 1, at_least=1)
    require_integers("test_cases", (test_cases,), 1, at_least=0)
    require_integers("shape", shape, at_least=8)
    require_integers("seed", (seed,), 1, at_least=0)
    affine = flipped_affine(spacing)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"expected a folder to write CT volumes to, received the file {folder}")
    images, labels, tests = (folder / name for name in ("imagesTr", "labelsTr", "imagesTs"))
    for needed in (images, labels, *([tests] if test_cases else [])):
        needed.mkdir(parents=True, exist_ok=True)

    names = [f"ct_{case:03d}.nii.gz" for case in range(cases + test_cases)]
    for case, name in enumerate(names):
        image, label_map = _case(shape, spacing, np.random.default_rng([seed, case]))
        save_nifti((images if case < cases else tests) / name, image, affine)
        if case < cases:
            save_nifti(labels / name, label_map, affine)
    description = {
        "name": "Synthetic CT",
        "description": "An organ and a lesion in it, of ellipsoids and noise",
        "licence": "Apache-2.0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "organ", "2": "lesion"},
        "numTraining": cases,
        "numTest": test_cases,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names[:cases]],
        "test": [f"./imagesTs/{name}" for name in names[cases:]],
    }
    # Last, since a set is whole once this file lists it.
    save_json(folder / "dataset.json", description)
    return folder


def _case(
    shape: Triple, spacing: Spacing, generator: np.random.Generator
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Image in HU and label map, [X, Y, Z]."""
    extent = np.multiply(shape, spacing)  # all lengths in mm, so that a ball is round
    position = np.moveaxis(np.indices(shape), 0, -1) * np.array(spacing) - (extent - spacing) / 2

    semi_axes = generator.uniform(0.22, 0.28, 3) * extent
    centre = generator.uniform(-0.05, 0.05, 3) * extent
    radius = generator.uniform(0.10, 0.12) * extent.min()
    direction = generator.standard_normal(3)
    # With its semi-axes as units the organ is a ball of radius 1, the lesion within one of radius / shortest.
    reach = generator.uniform(0.2, 0.8) * (1 - radius / semi_axes.min())
    offset = reach * semi_axes * direction / np.linalg.norm(direction)
    voxel = np.argmin(np.square(position - (centre + offset)).sum(-1))
    lesion_centre = position.reshape(-1, 3)[voxel]  # on a voxel: no lesion is too small to be seen

    body = np.square(position[..., :2] / (0.45 * extent[:2])).sum(-1) <= 1
    organ = np.square((position - centre) / semi_axes).sum(-1) <= 1
    lesion = np.square(position - lesion_centre).sum(-1) <= radius**2
    labels = np.where(lesion, 2, organ).astype(np.uint8)
    image = np.where(body, float(SOFT_TISSUE), float(AIR))
    image[organ] = ORGAN
    image[lesion] = LESION
    image += NOISE * generator.standard_normal(shape)
    return np.maximum(np.rint(image), LOWEST).astype(np.int16), labels
