"""The MNI152 brain as an ordinary MONAI pipeline: the left hemisphere trains, the right one is held out."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from monai.data import CacheDataset, DataLoader
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Lambdad,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandBiasFieldd,
    RandCropByLabelClassesd,
    RandGaussianNoised,
    RandRotate90d,
    RandScaleIntensityd,
    SpatialCrop,
)

from voxloss_data import BrainMRI

Side = Literal["left", "right"]

CLASSES = BrainMRI.class_names
PATCH = (48, 48, 48)
PATCHES_PER_STEP = 2
AXES = ((0, 1), (1, 2), (0, 2))
IMAGE_AND_LABEL = ["image", "label"]
SEGMENTED = [*IMAGE_AND_LABEL, "probabilities"]


def hemisphere(volume: Any, side: Side) -> Any:
    """Crop a MetaTensor [C, X, Y, Z] to the voxels with x < 0 mm (left) or x ≥ 0 mm (right), by its affine.

    Raises ValueError unless x depends on the first axis alone, as in an image in RAS orientation.
    """
    to_world = volume.affine
    if bool(to_world[0, 1:3].abs().max() > 1e-6):
        raise ValueError(f"expected x along the first axis, received the affine {to_world.tolist()}")
    x = to_world[0, 0] * torch.arange(volume.shape[1]) + to_world[0, 3]
    inside = ((x < 0) == (side == "left")).nonzero().flatten()
    first, last = int(inside[0]), int(inside[-1])
    return SpatialCrop(roi_start=(first, 0, 0), roi_end=(last + 1, *volume.shape[2:]))(volume)


def training_batches(brain: BrainMRI, steps: int) -> DataLoader:
    """One batch of patches of the left hemisphere per step: image and label [2, 1, 48, 48, 48]."""
    augmented = Compose(
        [
            _load(IMAGE_AND_LABEL, "left"),
            RandCropByLabelClassesd(
                IMAGE_AND_LABEL,
                "label",
                spatial_size=PATCH,
                num_classes=len(CLASSES),
                ratios=[0, 1, 1, 1],
                num_samples=PATCHES_PER_STEP,
            ),
            # Quarter turns, but no flips: a flip along x would show the network the very volume that is held
            # out, since this template is its own mirror image.
            *(RandRotate90d(IMAGE_AND_LABEL, prob=0.5, max_k=3, spatial_axes=axes) for axes in AXES),
            RandBiasFieldd("image", coeff_range=(0, 0.1), prob=0.5),
            RandScaleIntensityd("image", factors=0.1, prob=0.5),
            RandGaussianNoised("image", std=0.1, prob=0.5),
        ]
    )
    # The same volume for every step; hashing keeps one copy of it in the cache.
    volumes = [{"image": brain.image, "label": brain.labels}] * steps
    return DataLoader(CacheDataset(volumes, augmented, hash_as_key=True, progress=False), batch_size=1)


def held_out_volume(brain: BrainMRI) -> dict[str, Any]:
    """The right hemisphere: MetaTensors image and label [1, X, Y, Z], and probabilities [4, X, Y, Z]."""
    volume: dict[str, Any] = _load(SEGMENTED, "right")(
        {"image": brain.image, "label": brain.labels, "probabilities": brain.probabilities}
    )
    return volume


def whole_image(brain: BrainMRI) -> Any:
    """Both hemispheres: a MetaTensor [1, X, Y, Z]."""
    return _load(["image"], None)({"image": brain.image})["image"]


def _load(keys: list[str], side: Side | None) -> Compose:
    return Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            Orientationd(keys, axcodes="RAS", labels=None),
            *([] if side is None else [Lambdad(keys, partial(hemisphere, side=side))]),
            NormalizeIntensityd("image"),
        ]
    )
