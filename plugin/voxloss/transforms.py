"""Maps of labels for the loader, as MONAI dictionary transforms: `pip install 'voxloss[maps]'`.

    Compose([LoadImaged(["image", "label"]), EnsureChannelFirstd(["image", "label"]), Skeletonized("label"), ...])

Each adds an entry, `label_skeleton` for "label", of the same type as the label (a MetaTensor keeps affine and
applied operations) and in its grid, so that the transforms that follow can treat it as a label. Everything here
is deterministic: `CacheDataset` and `PersistentDataset` compute a map once.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.data.meta_tensor import MetaTensor
from monai.transforms.transform import MapTransform
from monai.utils.enums import TransformBackends
from monai.utils.module import optional_import
from numpy.typing import NDArray
from torch import Tensor

from voxloss.inputs import ShapeError, require_whole

__all__ = ["Componentsd", "NearestComponentd", "SignedDistanced", "Skeletonized"]

Image = NDArray[Any]

# By the number of axes: how many neighbours there are along so many axes at once, at most.
CONNECTIVITIES = {2: {4: 1, 8: 2, 26: 2}, 3: {6: 1, 18: 2, 26: 3}}


class _Mapped(MapTransform):
    """Add a map of each label."""

    backend = [TransformBackends.NUMPY]  # noqa: RUF012 # as MONAI has it
    name: str

    def __init__(self, keys: KeysCollection, ignore_index: int | None, allow_missing_keys: bool) -> None:
        super().__init__(keys, allow_missing_keys)
        self.ignore_index = ignore_index

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the entries and the maps."""
        found = dict(data)
        for key in self.key_iterator(found):
            label = found[key]
            if label.ndim not in (3, 4) or label.shape[0] != 1:
                raise ShapeError(
                    f"{key}: expected a label map [1, spatial...] of two or three axes, received "
                    f"{list(label.shape)}. EnsureChannelFirstd adds the axis of channels."
                )
            values = np.asarray(label.detach().cpu() if isinstance(label, Tensor) else label)[0]
            _require_labels(key, values, self.ignore_index)
            found[f"{key}_{self.name}"] = _like(label, self.map(values, _spacing(label)))
        return found

    def map(self, labels: Image, spacing: Sequence[float]) -> Image:
        """The map, `[channels, spatial...]`, of labels `[spatial...]` in a grid of this spacing."""
        raise NotImplementedError

    def known(self, labels: Image) -> Any:
        """Where a label is not the ignored one; numpy compares with None voxel by voxel, in Python."""
        return True if self.ignore_index is None else labels != self.ignore_index


class Skeletonized(_Mapped):
    """Add `{key}_skeleton`: the labels along the centre lines of the foreground, elsewhere 0.

    For `SkeletonRecallLoss`, as Kirchhoff et al. 2024: the whole foreground is thinned to lines,
    which are thickened to tubes, and each voxel of a tube keeps its label. So a line continues where one class
    ends at another, and a class beside another one may have no line. Every connected component has at least one
    voxel: if thinning removes a component, as scikit-image's does with many that are an even number of voxels
    wide, it is made one voxel narrower first.

    Flipped labels have a flipped skeleton up to single voxels, as thinning depends on the voxel order; cropped
    labels have another one near the border. Compute it from the whole volume, and crop, flip and rotate it with
    the label, by nearest neighbour.

    Args:
        keys: of the labels, `[1, spatial...]`, 0 for the background.
        tube: by how many voxels lines are thickened, along each axis alike: resample first where the spacing
            differs much. 2 in the paper's code.
        ignore_index: a label that is not foreground.
        allow_missing_keys: skip a key that a sample does not have.
    """

    name = "skeleton"

    def __init__(
        self,
        keys: KeysCollection,
        tube: int = 2,
        ignore_index: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, ignore_index, allow_missing_keys)
        require_whole(0, tube=tube)
        self.tube = tube

    def map(self, labels: Image, spacing: Sequence[float]) -> Image:
        """The labels on the tubes; the spacing is not used."""
        morphology = _required("skimage.morphology", "scikit-image")
        inside = (labels != 0) & self.known(labels)
        lines = _centre_lines(inside)
        for _ in range(self.tube):
            lines = morphology.dilation(lines)
        return np.where(lines & inside, labels, 0).astype(labels.dtype)[None]


class SignedDistanced(_Mapped):
    """Add `{key}_distance`: the distance to each class's boundary, `[channels, spatial...]`, negative inside.

    For `BoundaryLoss` (Kervadec et al. 2019). Outside a class it is the distance to the nearest voxel in it,
    inside it is minus the distance to the nearest voxel outside, in the unit of the spacing in a MetaTensor's
    affine, else in voxels. For a class without voxels, or of all voxels, it is 0.

    If the labels are flipped or rotated by right angles, the distance is flipped and rotated alike; a crop has
    other distances, as it lacks the boundaries outside. Compute it from the whole volume, and crop it with the
    label.

    Args:
        keys: of the labels, `[1, spatial...]`.
        channels: the number of classes, 2 or more, of which 0 is the background; or pass `regions` instead.
        regions: the labels of each channel, as for the loss; for a network with one
            channel `[[1]]`, with all labels of its foreground.
        ignore_index: a label that belongs to no class.
        allow_missing_keys: skip a key that a sample does not have.
    """

    name = "distance"

    def __init__(
        self,
        keys: KeysCollection,
        channels: int | None = None,
        regions: Sequence[Sequence[int]] | None = None,
        ignore_index: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, ignore_index, allow_missing_keys)
        if (channels is None) == (regions is None):
            received = "neither" if channels is None else "both"
            raise ValueError(
                f"channels, regions: expected one of them, received {received}. Pass channels=, the number of "
                "classes with the background, or regions=, the labels of each channel."
            )
        if channels is not None and channels < 2:
            raise ValueError(
                f"channels: expected 2 or more, of which 0 is the background, received {channels!r}. For a "
                "network with one channel pass regions=[[1]], with all labels of its foreground."
            )
        self.channels = channels
        self.regions = [[c] for c in range(channels or 0)] if regions is None else [[*each] for each in regions]

    def map(self, labels: Image, spacing: Sequence[float]) -> Image:
        """Distances, float32."""
        edt = _required("edt", "edt").edt
        if self.channels is not None:
            outside = ((labels < 0) | (labels >= self.channels)) & self.known(labels)
            if outside.any():
                raise ValueError(
                    f"label: expected 0…{self.channels - 1}, as channels={self.channels}, received "
                    f"{labels[outside][0]}. Leave a label out with ignore_index."
                )
        found = np.zeros((len(self.regions), *labels.shape), np.float32)
        for distance, region in zip(found, self.regions, strict=True):
            inside = np.isin(labels, region) & self.known(labels)
            if inside.any() and not inside.all():
                outer, inner = (edt(np.ascontiguousarray(part), anisotropy=spacing) for part in (~inside, inside))
                distance[:] = outer - inner
        return found


class Componentsd(_Mapped):
    """Add `{key}_components`: the connected component that each voxel is in, int32 `[1, spatial...]`.

    0 where there is no component, else its number 1 … K, for lesion-wise losses such as blob loss (Kofler et al.
    2022). The components are those of the foreground as a whole, so that two classes that touch share one. They
    are numbered in the order of their first voxels, the last axis fastest.

    The components of flipped labels, or of labels rotated by right angles, are those of the moved map with other
    numbers. The components of a crop are not those of the cropped map: there a component that is cut in two keeps
    one number, and the numbers of components outside of the crop are missing. Make the map from the whole volume,
    then crop, flip and rotate it with the label. Transforms that interpolate need `mode="nearest"` for this map.

    Args:
        keys: of the labels, `[1, spatial...]`, integers or floats, 0 for the background.
        labels: those that are foreground; by default all but 0.
        connectivity: how many neighbours a voxel is connected to. In three axes 6 (faces), 18 (and edges) or 26
            (and corners), in two axes 4 (edges) or 8 (and corners); there 26, the default, means 8.
        ignore_index: a label that is no foreground.
        allow_missing_keys: omit the map of a key that a sample does not have.

    Raises:
        ValueError: for a connectivity that is none of these, or none for the number of axes; for `labels` that
            are empty or contain 0.
    """

    name = "components"

    def __init__(
        self,
        keys: KeysCollection,
        labels: Sequence[int] | None = None,
        connectivity: int = 26,
        ignore_index: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, ignore_index, allow_missing_keys)
        if labels is not None and (not labels or 0 in labels):
            raise ValueError(
                f"labels: expected those of the foreground, at least one and not 0, received {labels!r}."
            )
        if not any(connectivity in ranks for ranks in CONNECTIVITIES.values()):
            raise ValueError(
                "connectivity: expected 6, 18 or 26 for labels of three axes, 4 or 8 for labels of two, "
                f"received {connectivity!r}."
            )
        self.labels = None if labels is None else [*labels]
        self.connectivity = connectivity

    def map(self, labels: Image, spacing: Sequence[float]) -> Image:
        """The components' numbers; the spacing plays no part."""
        ranks = CONNECTIVITIES[labels.ndim]
        if self.connectivity not in ranks:
            raise ValueError(
                f"connectivity: expected {' or '.join(map(str, ranks))} for labels of {labels.ndim} axes, "
                f"received {self.connectivity}."
            )
        ndimage = _required("scipy.ndimage", "scipy")
        inside = labels != 0 if self.labels is None else np.isin(labels, self.labels)
        neighbours = ndimage.generate_binary_structure(labels.ndim, ranks[self.connectivity])
        found: Image
        found, _ = ndimage.label(inside & self.known(labels), neighbours, output=np.int32)
        return found[None]


class NearestComponentd(Componentsd):
    """Add `{key}_nearest`: the connected component nearest to each voxel, int32 `[1, spatial...]`.

    The map divides the volume into one cell around each component, for CC-DiceCE (Bouteille et al. 2025, after
    the CC-Metrics of Jaus et al. 2024). A cell has the number that its component has in `Componentsd`, 1 … K.
    Without a component the map is 0, as are voxels that a later transform pads with 0: they are in no cell.
    Distances are Euclidean, in the unit of the spacing that a MetaTensor's affine has, else in voxels. A voxel at
    equal distance to several components is in the cell of one of them, the same one in every run.

    The cells of flipped labels, or of labels rotated by right angles, are those of the moved map with other
    numbers, except at voxels at equal distance to several components. The cells of a crop are not those of the
    cropped map, where a voxel stays in the cell of a component outside of the crop. Make the map from the whole
    volume, then crop, flip and rotate it with the label. Transforms that interpolate need `mode="nearest"` for
    this map. It takes 24 bytes per voxel of memory while it is made.

    Args:
        keys: of the labels, `[1, spatial...]`, integers or floats, 0 for the background.
        labels: those that are foreground; by default all but 0.
        connectivity: how many neighbours a voxel is connected to, as for `Componentsd`.
        ignore_index: a label that is no foreground.
        allow_missing_keys: omit the map of a key that a sample does not have.

    Raises:
        ValueError: as `Componentsd`.
    """

    name = "nearest"

    def map(self, labels: Image, spacing: Sequence[float]) -> Image:
        """The cells' numbers."""
        found = super().map(labels, spacing)
        if not found.any():
            return found
        ndimage = _required("scipy.ndimage", "scipy")
        nearest = ndimage.distance_transform_edt(
            found[0] == 0, sampling=spacing, return_distances=False, return_indices=True
        )
        cells: Image = found[(slice(None), *nearest)]
        return cells


def _require_labels(key: Hashable, values: Image, ignore_index: int | None) -> None:
    """Check that labels are integers, and not negative but for the ignored one."""
    if values.dtype.kind == "f":
        wrong = ~np.isfinite(values) | (values != np.round(values))
        if wrong.any():
            place = [int(at[0]) for at in np.nonzero(wrong)]
            raise ValueError(
                f"{key}: expected whole numbers in a label map, received {values[tuple(place)]} at {place} "
                f"({int(wrong.sum())} in all). Resample labels with mode='nearest'."
            )
    negative = (values < 0) & (values != (0 if ignore_index is None else ignore_index))
    if negative.any():
        raise ValueError(
            f"{key}: expected labels ≥ 0, received {values[negative][0]} ({int(negative.sum())} in all). "
            "Leave a label out with ignore_index."
        )


def _centre_lines(inside: Image) -> Image:
    """Thin to lines, of which every connected component has one."""
    morphology, ndimage = _required("skimage.morphology", "scikit-image"), _required("scipy.ndimage", "scipy")
    lines: Image = morphology.skeletonize(inside) > 0
    parts, number = ndimage.label(inside, np.ones([3] * inside.ndim))
    for size in (inside.ndim - 1, inside.ndim, 1):  # a tube across, then a block, then a slab
        for axes in combinations(range(inside.ndim), size):
            missing = _without(lines, parts, number)
            if not missing.any():
                return lines
            lines |= morphology.skeletonize(_narrower(missing[parts], axes)) > 0
    missing = _without(lines, parts, number)
    depth = ndimage.distance_transform_edt(missing[parts])
    for place in ndimage.maximum_position(depth, parts, np.flatnonzero(missing)):
        lines[place] = True
    return lines


def _narrower(inside: Image, axes: Sequence[int]) -> Image:
    """Without the first voxel of each run along some axes."""
    for axis in axes:
        before = np.zeros_like(inside)
        np.swapaxes(before, 0, axis)[1:] = np.swapaxes(inside, 0, axis)[:-1]
        inside = inside & before
    return inside


def _without(lines: Image, parts: Image, number: int) -> Image:
    """Which parts 1…number no line goes through."""
    missing: Image = np.bincount(parts[lines], minlength=number + 1) == 0
    missing[0] = False
    return missing


def _required(module: str, package: str) -> Any:
    found, there = optional_import(module)
    if not there:
        raise ImportError(f"the maps of voxloss.transforms need {package}: pip install 'voxloss[maps]'.")
    return found


def _spacing(label: Any) -> tuple[float, ...]:
    """Of a MetaTensor's voxels, else 1."""
    if isinstance(label, MetaTensor):
        return tuple(float(size) for size in label.pixdim[: label.ndim - 1])
    return tuple([1.0] * (label.ndim - 1))


def _like(label: Any, values: Image) -> Any:
    """A map as the label is: an array, a tensor or a MetaTensor with the same history."""
    if not isinstance(label, Tensor):
        return values
    tensor = torch.as_tensor(values, device=label.device)
    if not isinstance(label, MetaTensor):
        return tensor
    return MetaTensor(tensor, meta=dict(label.meta), applied_operations=list(label.applied_operations))
