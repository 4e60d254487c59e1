"""MONAI's transforms from files to what the network sees: RAS, one spacing, normalised by modality."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, DataLoader
from monai.transforms import (
    ClassesToIndicesd,
    Compose,
    DeleteItemsd,
    EnsureChannelFirstd,
    LoadImaged,
    MapLabelValued,
    NormalizeIntensityd,
    Orientationd,
    RandAffined,
    RandCropByLabelClassesd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
    ToTensord,
)
from monai.utils.misc import MAX_SEED
from torch.utils.data import Dataset

from voxloss_app.train.plan import Plan
from voxloss_app.train.ranks import share
from voxloss_data.label_maps import LabelFile
from voxloss_data.nifti import open_image
from voxloss_data.training_sets import Scan

IGNORED = -1  # the class of voxels that do not count
BOTH = ["image", "label"]
# Where patches may be centred, at most so many voxels of each class: all of them would take more memory than the
# volume itself.
CENTRES = 10_000


def image_transforms(plan: Plan) -> Compose:
    """From the files of `image` to a MetaTensor [channels, X, Y, Z]; its inverse brings class maps back."""
    return Compose([*_load(["image"]), *_grid(["image"], plan), _normalised(plan)])


def labelled(plan: Plan) -> list[Any]:
    """From the files of `image` and `label` to MetaTensors on the network's grid; labels are classes."""
    known = [plan.ignored] * (plan.ignored is not None) + plan.labels
    # What is in no region is background, also a label above all that are in one, which a loss would refuse.
    inside = {c for region in plan.classes_of_regions for c in region}
    own = [c if plan.regions is None or c in inside else 0 for c in range(len(plan.labels))]
    classes = [IGNORED] * (plan.ignored is not None) + own
    return [
        *_load(BOTH),
        MapLabelValued("label", known, classes, dtype=np.float32),
        *_grid(BOTH, plan),
        _normalised(plan),
    ]


def training_patches(scans: Sequence[Scan], plan: Plan, cache: float) -> ScanDataset:
    """One patch of each scan, `plan.patches` times; a part `cache` of the scans is kept in memory."""
    classes = len(plan.labels)
    random_part = [
        # As likely around a voxel of one class as of any other that the scan has.
        RandCropByLabelClassesd(
            BOTH,
            "label",
            spatial_size=plan.patch,
            num_classes=classes,
            indices_key="label_cls_indices",
            warn=False,
        ),
        DeleteItemsd("label_cls_indices"),
        # No flips: they would make a left kidney of a right one.
        RandAffined(
            BOTH,
            prob=0.2,
            rotate_range=(0.26,) * 3,
            scale_range=(0.2,) * 3,
            mode=("bilinear", "nearest"),
            padding_mode="border",
        ),
        RandScaleIntensityd("image", factors=0.1, prob=0.5),
        RandShiftIntensityd("image", offsets=0.1, prob=0.5),
        RandGaussianNoised("image", std=0.05, prob=0.2),
        ToTensord(BOTH, track_meta=False),
    ]
    steps = [
        *labelled(plan),
        SpatialPadd("image", plan.patch),
        SpatialPadd("label", plan.patch, constant_values=IGNORED if plan.ignored is not None else 0),
        ClassesToIndicesd("label", num_classes=classes, max_samples_per_class=CENTRES),
    ]
    items = [item(scan) for scan in scans] * plan.patches
    return ScanDataset(
        items,
        Compose([*steps, *random_part]),
        cache_rate=cache,
        hash_as_key=True,
        progress=False,
        num_workers=None,
    )


def validation_volumes(scans: Sequence[Scan], plan: Plan, cache: float) -> ScanDataset:
    """Whole scans on the network's grid; a part `cache` of them is kept in memory."""
    return ScanDataset([item(scan) for scan in scans], Compose(labelled(plan)), cache_rate=cache, progress=False)


def batches(patches: ScanDataset, plan: Plan) -> Iterator[dict[str, Any]]:
    """One epoch, this rank's share of each batch, with a size, an order and random transforms that follow from
    torch's seed at this moment, whatever the numbers of ranks and workers.
    """
    count = len(patches)
    size = min(plan.batch, count)
    loader = DataLoader(
        _Epoch(patches),
        num_workers=plan.workers,
        batch_sampler=[share(range(first, first + size)) for first in range(0, count - size + 1, size)],
        worker_init_fn=_deaf_worker,
    )
    try:
        yield from loader
    except ValueError as error:  # that of a worker begins with its traceback
        raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from error


class _Epoch(Dataset[Any]):
    """All patches in random order, each with a seed of its own, as other ranks and workers draw the others."""

    def __init__(self, patches: ScanDataset) -> None:
        self.patches = patches
        self.order = torch.randperm(len(patches)).tolist()
        self.seeds = torch.randint(MAX_SEED, (len(patches),)).tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Any:
        transform: Any = self.patches.transform
        transform.set_random_state(self.seeds[place])
        return self.patches[self.order[place]]


class ScanDataset(CacheDataset):
    """MONAI's dataset, with errors that name the file: it may have changed since the plan was made."""

    def _load_cache_item(self, idx: int) -> Any:
        return self._named(super()._load_cache_item, idx)

    def _transform(self, index: int) -> Any:
        return self._named(super()._transform, index)

    def _named(self, transform: Callable[[int], Any], index: int) -> Any:
        try:
            return transform(index)
        except Exception as error:
            found: Any = self.data[index]
            image, label = np.atleast_1d(found["image"]).tolist(), found["label"]
            open_image([Path(path) for path in image])
            LabelFile(Path(label)).labels()
            raise unfit([*image, label], error) from error


def unfit(paths: Sequence[str | Path], error: Exception) -> ValueError:
    """What to raise for whole files that MONAI's transforms fail on."""
    reason: BaseException = error
    while reason.__cause__ is not None:
        reason = reason.__cause__
    text = " ".join(f"{type(reason).__name__}: {reason}".split())
    return ValueError(f"{', '.join(map(str, paths))}: expected what fits on the network's grid, received {text}")


def item(scan: Scan) -> dict[str, Any]:
    """What the transforms load."""
    return {"image": files(scan.image), "label": str(scan.label)}


def files(image: Sequence[Path]) -> str | list[str]:
    """As MONAI takes one file, or one per channel."""
    return str(image[0]) if len(image) == 1 else [str(path) for path in image]


def _load(keys: list[str]) -> list[Any]:
    # Its readers for other formats, if they are installed, are for other files.
    return [LoadImaged(keys, reader="NibabelReader"), EnsureChannelFirstd(keys)]


def _grid(keys: list[str], plan: Plan) -> list[Any]:
    modes = {"image": "bilinear", "label": "nearest"}
    return [
        Orientationd(keys, axcodes="RAS", labels=None),
        Spacingd(keys, pixdim=plan.spacing, mode=[modes[key] for key in keys]),
    ]


def _normalised(plan: Plan) -> Any:
    if plan.window is not None:
        low, high = plan.window
        return ScaleIntensityRanged("image", a_min=low, a_max=high, b_min=0, b_max=1, clip=True)
    return NormalizeIntensityd("image", nonzero=True, channel_wise=True)


def _deaf_worker(_: int) -> None:
    """Ctrl-C is for the process that ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
