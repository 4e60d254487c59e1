"""What the examples that train on CT have in common: their options, and cases as batches."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from monai.data import CacheDataset, DataLoader, load_decathlon_datalist, partition_dataset
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandCropByLabelClassesd,
    RandFlipd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
)
from monai.utils import set_determinism

from voxloss_data import write_ct_set

KEYS = ["image", "label"]


def options(description: str | None) -> argparse.Namespace:
    """The command line, after which every random number follows from --seed."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="imagesTr, labelsTr and dataset.json, as in the Decathlon; else synthetic",
    )
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--patch", type=int, default=32, help="edge of the training patches, in voxels")
    parser.add_argument("--spacing", type=float, nargs=3, default=(1.5, 1.5, 3.0), help="resample to, in mm")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    set_determinism(given.seed)
    return given


def loaders(given: argparse.Namespace) -> tuple[DataLoader, DataLoader, int]:
    """Batches to train and to validate on, and the number of classes with the background.

    An image is float32 from 0 to 1, both it and its label map [B, 1, X, Y, Z]. A fifth of the cases is held out.
    """
    if given.data is None:
        with TemporaryDirectory() as folder:  # CacheDataset reads all of it at once
            return _loaders(write_ct_set(folder), given)
    return _loaders(Path(given.data), given)


def _loaders(folder: Path, given: argparse.Namespace) -> tuple[DataLoader, DataLoader, int]:
    index = folder / "dataset.json"
    if not index.is_file():
        raise SystemExit(f"--data: expected a folder with dataset.json, imagesTr and labelsTr, received {folder}")
    classes = len(json.loads(index.read_text(encoding="utf-8"))["labels"])
    cases = load_decathlon_datalist(index, data_list_key="training")
    training, validation = partition_dataset(cases, ratios=[4, 1], shuffle=True, seed=given.seed)
    load: list[Any] = [
        LoadImaged(KEYS),
        EnsureChannelFirstd(KEYS),
        Orientationd(KEYS, axcodes="RAS", labels=None),
        Spacingd(KEYS, pixdim=given.spacing, mode=("bilinear", "nearest")),
        ScaleIntensityRanged("image", a_min=-160, a_max=240, b_min=0, b_max=1, clip=True),  # soft tissue, in HU
    ]
    size = [given.patch] * 3
    augment: list[Any] = [
        SpatialPadd(KEYS, size),
        RandCropByLabelClassesd(KEYS, "label", size, num_classes=classes, num_samples=classes),
        RandFlipd(KEYS, prob=0.5, spatial_axis=0),
    ]
    train = CacheDataset(training, Compose(load + augment), progress=False)
    validate = CacheDataset(validation, Compose(load), progress=False)
    return DataLoader(train, batch_size=2, shuffle=True), DataLoader(validate, batch_size=1), classes
