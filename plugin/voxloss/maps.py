"""Maps that the loader computes beside the labels, and a tuple of labels and maps for training loops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from voxloss.channels import ignored_voxels
from voxloss.inputs import ShapeError, did_you_mean, plain


class Target(NamedTuple):
    """Labels and maps instead of a target, for loops that call `loss(output, target)`.

    A loss takes the maps that it needs and ignores the others, so that one loader serves all losses. With keyword
    arguments, `loss(output, labels, skeleton=skeleton)`, the tuple is not needed. The maps are made in the
    loader, by the transforms of `voxloss.transforms`. MONAI's `DeepSupervisionLoss` resizes them with the labels,
    by the nearest voxel; nnU-Net's wrapper takes a list with one for each output.

    Attributes:
        labels: the target of every loss, a label map `[B, 1, spatial...]` or `[B, C, spatial...]`.
        skeleton: where the centre lines of the classes run, in the form of the labels: as a label map, 0 where
            there is none; or `[B, C, spatial...]` with 1 on the lines.
        distance: the signed distance φ to each class's boundary, negative inside, `[B, C, spatial...]`, or
            `[B, 1, spatial...]` for all classes.
        partition: the number of the cell that each voxel is in, whole numbers ≥ 0, `[B, 1, spatial...]`, 0 for
            none: of the component that is nearest to the voxel, or that the voxel is part of.
    """

    labels: Tensor
    skeleton: Tensor | None = None
    distance: Tensor | None = None
    partition: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """That of the labels."""
        return self.labels.shape

    @property
    def device(self) -> torch.device:
        """That of the labels."""
        return self.labels.device

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Target:
        """Resize labels and maps alike, which MONAI's `DeepSupervisionLoss` does with a target."""
        if function is not F.interpolate or not args or not isinstance(args[0], Target):
            raise TypeError(f"Target: expected as the target of a loss, received as that of {function.__name__}.")
        target, *others = args
        volumes: Any = [each if each is None else _resized(each, *others, **(kwargs or {})) for each in target]
        return Target(*volumes)


def _resized(volume: Tensor, *how: Any, **arguments: Any) -> Tensor:
    """As torch resizes floating-point numbers; labels come back as what they were."""
    if volume.is_floating_point():
        return F.interpolate(volume, *how, **arguments)
    return F.interpolate(volume.double(), *how, **arguments).to(volume.dtype)


class Maps(TypedDict, total=False):
    """The maps as keyword arguments of a call; `Target` explains them."""

    skeleton: Tensor | None
    distance: Tensor | None
    partition: Tensor | None


MOST_CELLS = 1 << 16  # unless the loss has an argument cells=

MADE_BY = {
    "skeleton": "Skeletonized",
    "distance": "SignedDistanced",
    "partition": "NearestComponentd, or for BlobLoss Componentsd",
}


def with_maps(target: Tensor | Target, maps: Maps) -> Target:
    """Collect what a call was given.

    Raises:
        TypeError: for a keyword that is no map.
        ValueError: if a map was given twice.
    """
    for name in maps:
        if name not in MADE_BY:
            expected = ", ".join(MADE_BY)
            raise TypeError(f"expected maps among {expected}, received {name}=.{did_you_mean(name, MADE_BY)}")
    if not isinstance(target, Target):
        return Target(target, **maps)
    for name, value in maps.items():
        if value is not None and getattr(target, name) is not None:
            raise ValueError(f"{name}: expected it in the target or as a keyword argument, received both.")
    both = {**target._asdict(), **{name: value for name, value in maps.items() if value is not None}}
    return Target(**both)


class PassMap(NamedTuple):
    """A map as a pass takes it: the m of `voxloss.backends.voxels`.

    Attributes:
        values: `[B, C, spatial...]`, or `[B, 1, spatial...]` if `of_label`.
        of_label: whether it holds for the channels of the voxel's label alone.
    """

    values: Tensor | None = None
    of_label: bool = False


def pass_map(
    name: str | None, input: Tensor, target: Target, mask: Tensor | None, ignore_index: int | None, regions: bool
) -> PassMap:
    """The map of this name as the pass takes it, checked where voxels count; nothing if the sums need none.

    Args:
        regions: whether the labels are those of regions.
    """
    if name is None:
        return PassMap()
    given = _require_map(name, target, input, mask)
    channels = input.shape[1]
    if name == "distance":
        return PassMap(given.expand(-1, channels, *given.shape[2:]))
    labels = plain(target.labels)
    ignored = _ignored(labels, channels, mask, ignore_index, regions)
    if given.shape[1] == channels and not (channels == 1 and regions):
        if given.dtype != torch.bool:
            message = "skeleton: expected values in [0, 1], one channel per class"
            _require_all((given >= 0) & (given <= 1), ignored, given, message, _MOVED)
        return PassMap(given)
    if labels.shape[1] != 1:  # rare, and a one-hot in memory, as the labels are
        classes = torch.arange(channels, device=given.device).view(1, -1, *[1] * (given.ndim - 2))
        return PassMap((given == classes) & (classes != 0))
    there = given != 0
    message = "skeleton: expected 0 or the label of the voxel"
    _require_all(~there | (given == labels), ignored, given, message, _MOVED)
    return PassMap(there, of_label=True)


class PassCells(NamedTuple):
    """A partition as a pass takes it.

    Attributes:
        numbers: the cell of each voxel, int32 `[B, 1, spatial...]`.
        cells: how many there are.
        shares: of cells that mean the same in all samples, how much of those from 1 on is chosen, `[cells - 1]`;
            of cell 0 nothing is.
    """

    numbers: Tensor | None = None
    cells: int = 0
    shares: Tensor | None = None


def pass_cells(
    cells: int | None,
    input: Tensor,
    target: Target,
    mask: Tensor | None,
    ignore_index: int | None,
    regions: bool,
) -> PassCells:
    """The partition as the pass takes it, checked where voxels count."""
    given = _require_map("partition", target, input, mask)
    if given.shape[1] != 1:
        raise ShapeError(f"partition: expected one channel, received {list(given.shape)}.")
    ignored = _ignored(plain(target.labels), input.shape[1], mask, ignore_index, regions)
    given = given if ignored is None else given.masked_fill(ignored, 0)
    numbers = given.to(torch.int32)  # as the transforms make it
    given_cells = cells is not None
    if cells is None:
        if torch.compiler.is_compiling():
            raise ValueError(
                "cells: expected an upper limit of the number of cells, as torch.compile cannot read a partition."
            )
        cells = 1 + int(numbers.max().clamp(min=0)) if numbers.numel() else 1
        if cells > MOST_CELLS:
            raise ValueError(
                f"partition: expected numbers below {MOST_CELLS}, as each has sums of its own, received "
                f"{cells - 1}. Number the cells of a volume from 1 on, as voxloss.transforms do, or pass cells=."
            )
    fits = numbers >= 0
    if given_cells:
        fits = fits & (numbers < cells)
    known = f"0…{cells - 1}" if given_cells else "≥ 0"
    message = f"partition: expected whole numbers {known}, one per cell"
    if given.dtype != torch.int32:
        _require_all(numbers == given, None, given, message, _MOVED)
    _require_all(fits, None, given, message, "Raise cells=, or omit it." if given_cells else _MOVED)
    # Under torch.compile nothing is checked, and the pass uses the numbers as indices into memory.
    return PassCells(numbers.clamp(0, cells - 1) if torch.compiler.is_compiling() else numbers, cells)


def _ignored(
    labels: Tensor, channels: int, mask: Tensor | None, ignore_index: int | None, regions: bool
) -> Tensor | None:
    """Where no voxel counts, bool `[B, 1, spatial...]`, whatever a map has there."""
    ignored = ignored_voxels(labels, channels, ignore_index, regions)
    if mask is None:
        return ignored
    return mask == 0 if ignored is None else ignored | (mask == 0)


def _require_map(name: str, target: Target, input: Tensor, mask: Tensor | None) -> Tensor:
    """Check a map's type, shape and device, without reading a voxel."""
    found: Tensor | None = getattr(target, name)
    if found is None:
        others = [other for other in MADE_BY if getattr(target, other) is not None]
        of_mask = "" if mask is None else " A third argument without a name is a mask, and no map."
        raise ValueError(
            f"{name}: expected a map [B, C or 1, spatial...] beside the labels, received "
            f"{', '.join(others) or 'none'}.{of_mask} Compute it in the loader with "
            f"voxloss.transforms.{MADE_BY[name]}, and pass it as {name}=... or in the target "
            f"voxloss.Target(labels, {name}=...)."
        )
    if not isinstance(found, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, received {type(found).__name__}.")
    if found.is_complex():
        raise TypeError(f"{name}: expected real numbers, received {found.dtype}.")
    found = plain(found)
    if found.device != input.device:
        raise ValueError(
            f"{name}: expected on the input's device {input.device}, received {found.device}. "
            f"Move it with {name}.to(input.device)."
        )
    items, channels, *spatial = input.shape
    # Not with `in`, which torch.compile cannot trace if shapes are dynamic.
    own = found.ndim > 1 and (found.shape[1] == 1 or found.shape[1] == channels)
    elsewhere = found.ndim != input.ndim or found.shape[0] != items or [*found.shape[2:]] != spatial
    if elsewhere or not own:
        expected = ", ".join(map(str, [items, f"1 or {channels}" if channels > 1 else 1, *spatial]))
        remedy = (
            "Crop, flip and rotate it with the labels"
            if elsewhere
            else "Make it with a channel for each of the network's, or with one for all"
        )
        raise ShapeError(
            f"{name}: expected [{expected}], as input is {list(input.shape)}, received {list(found.shape)}. "
            f"{remedy}."
        )
    if found.requires_grad:
        raise ValueError(f"{name}: expected a map without requires_grad. Pass {name}.detach().")
    return found


def _require_all(holds: Tensor, ignored: Tensor | None, given: Tensor, message: str, remedy: str) -> None:
    """Raise ValueError unless it holds where voxels count; on CUDA the device fails, later."""
    holds = holds if ignored is None else holds | ignored
    if holds.device.type == "cuda":
        torch._assert_async(holds.all(), f"voxloss: {message}. {remedy}")
    elif holds.device.type != "meta" and not torch.compiler.is_compiling() and not holds.all():
        place = [int(each) for each in (~holds).nonzero()[0]]
        value = given[tuple(place)].item()
        raise ValueError(f"{message}, received {value} at {place} ({int((~holds).sum())} in all). {remedy}")


# What maps of labels want of the transforms that come after them.
_MOVED = (
    "Make it with voxloss.transforms, and crop, flip and resample it with the labels, by the nearest voxel "
    "(mode='nearest')."
)
