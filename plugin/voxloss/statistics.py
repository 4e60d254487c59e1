"""START HERE: the sums over a volume from which every region loss is computed.

logits, target ──one pass──▶ RegionStatistics [B, C] ──formula──▶ score [B, C] ──reduction──▶ loss
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from voxloss import head_operators, inputs, operators
from voxloss.backends.voxels import SUMS_OF_TARGET
from voxloss.channels import of_classes
from voxloss.distributed import Group, Shard, has_ranks, sum_over_ranks
from voxloss.lazy_logits import is_lazy
from voxloss.maps import PassCells
from voxloss.regions import memberships

Activation = Literal["softmax", "sigmoid", "none"] | Callable[[Tensor], Tensor]


class RegionStatistics(NamedTuple):
    """Sums over the voxels, one per sample and class: `[B, C]`, unit voxels, float64.

    With p the prediction and g the target, both in [0, 1]:

    | field | sum | squared | soft_label |
    |---|---|---|---|
    | `intersection` | Σ p·g | Σ p·g | Σ min(p, g) |
    | `prediction` | Σ p | Σ p² | Σ p |
    | `target` | Σ g | Σ g² | Σ g |

    All are additive: over tiles, samples, and processes.
    """

    intersection: Tensor
    prediction: Tensor
    target: Tensor

    @property
    def false_positives(self) -> Tensor:
        """Prediction outside the target: Σp − intersection."""
        return self.prediction - self.intersection

    @property
    def false_negatives(self) -> Tensor:
        """Target outside the prediction: Σg − intersection."""
        return self.target - self.intersection

    def over_batch(self) -> RegionStatistics:
        """The statistics of the whole batch as of one volume, `[1, C]`."""
        return RegionStatistics(*(field.sum(0, keepdim=True) for field in self))

    def of_classes(self, classes: Sequence[int]) -> RegionStatistics:
        """The statistics of some classes only, `[B, len(classes)]`."""
        return RegionStatistics(*(of_classes(field, classes) for field in self))


class PassShape(NamedTuple):
    """What is known of a pass before it is made.

    Attributes:
        channels, binary, ignored_class, annotated: as of `PassSums`.
        tensor: `[]`, with dtype and device of the sums.
    """

    channels: int
    binary: bool
    ignored_class: int | None
    annotated: Tensor | None
    tensor: Tensor


class PassSums:
    """The sums of one pass over the voxels, and what a formula needs to know of the pass.

    Attributes:
        names: of the sums, out of `voxloss.backends.voxels.TERMS`.
        tensor: the sums `[K, B, C]` in the order of the names, unit voxels, float64. Of this rank's part of a
            volume that is spread over a group they are those of the whole volume.
        binary: whether channels are independent of each other (a sigmoid, or a single channel), so that
            cross entropy and focal terms have a negative part as well.
        spatial_axes: how many the input has.
        annotated: bool `[B, C]`, None if every class was annotated in every sample. Other sums are 0.
        every_voxel: whether all voxels count: no mask, no ignored label, nothing that is not annotated.
        label_map: whether the target is one, so that a voxel that counts has exactly one class.
        ignored_class: the class that does not count because its voxels are ignored; a region is none.
    """

    def __init__(
        self,
        names: Sequence[str],
        tensor: Tensor,
        *,
        binary: bool,
        spatial_axes: int,
        annotated: Tensor | None = None,
        every_voxel: bool = False,
        label_map: bool = False,
        ignored_class: int | None = None,
        constant: Collection[str] = (),
        group: Group = None,
        shard: Shard = "batch",
        what: str = "",
        cells: int = 0,
        shares: Tensor | None = None,
    ) -> None:
        """`constant`: the sums that no gradient is wanted of; `cells`: of a partition, `[K, B * cells, C]`.

        `shares`: as of `PassCells`.
        """
        self._by_cell: Tensor | None = None
        if shard == "volume":
            if cells and shares is None:
                raise ValueError('shard: expected "batch", as each rank has cells of its own, received "volume".')
            tensor = sum_over_ranks(tensor, group, what)
        if cells:
            self._by_cell = tensor.view(len(tensor), -1, cells, tensor.shape[2])
            tensor = self._by_cell.sum(2)
        if annotated is not None:
            tensor = tensor.masked_fill(~annotated, 0)
        self.names = tuple(names)
        self.tensor = tensor
        self.binary = binary
        self.spatial_axes = spatial_axes
        self.annotated = annotated
        self.every_voxel = every_voxel
        self.label_map = label_map
        self.ignored_class = ignored_class
        self.alone = shard == "volume" or not has_ranks(group)
        self._constant = constant
        self._shares = shares
        self._group = group
        self._what = what
        self._of_batch: Tensor | None = None
        self._rows: dict[tuple[bool, tuple[int, ...]], dict[str, Tensor]] = {}

    @property
    def channels(self) -> int:
        """C."""
        return self.tensor.shape[2]

    def per_sample(self, name: str, classes: Sequence[int] | None = None) -> Tensor:
        """A sum for each sample of this rank, `[B, C]`, or `[B, len(classes)]`."""
        return self._found(name, False, classes)

    def over_batch(self, name: str, classes: Sequence[int] | None = None) -> Tensor:
        """A sum over the samples, those of all ranks if there are several, `[1, C]`, or `[1, len(classes)]`."""
        return self._found(name, True, classes)

    def for_total(self, name: str, classes: Sequence[int] | None = None) -> Tensor:
        """What remains to be added up over the first axis: `over_batch` where that is known or needed.

        Elsewhere `per_sample`, so that a mean over all voxels costs no sum over the samples of its own.
        """
        return self._found(name, self._of_batch is not None or not self.alone, classes)

    def counts(self, batch: bool) -> Tensor | None:
        """Which classes were annotated, `[B, C]`, or anywhere in the batch, `[1, C]`; None if all were."""
        if self.annotated is None:
            return None
        return self._batch()[-1] > 0 if batch else self.annotated

    def of_cells(self, first: int = 0) -> PassSums:
        """The sums of the cells from the `first` one on, each as a sample.

        From 1 on each is joined with the first cell, number 0, which is that of no component.
        """
        if self._by_cell is None:
            raise ValueError("partition: expected a pass by cell, received one by sample.")
        tensor = self._by_cell
        if first:
            tensor = tensor[:, :, 1:] + tensor[:, :, :1]
        cells = tensor.shape[2]
        annotated = None if self.annotated is None else self.annotated.repeat_interleave(cells, 0)
        return self._of_some(tensor.flatten(1, 2), annotated)

    def of_chosen(self) -> PassSums:
        """The sums of the cells that are chosen, each as far as its share goes; all, if a mask has chosen."""
        if self._by_cell is None or self._shares is None:
            return self
        # Not times 0, which makes NaN of what is infinite in a cell that is not chosen.
        chosen = self._by_cell[:, :, 1:] * self._shares.to(self._by_cell)[:, None]
        found = self._of_some(chosen.sum(2), self.annotated)
        found.alone, found._group, found._what = self.alone, self._group, self._what
        return found

    def _of_some(self, tensor: Tensor, annotated: Tensor | None) -> PassSums:
        """The same sums of some of the voxels, each row of the tensor as a sample."""
        return PassSums(
            self.names,
            tensor,
            binary=self.binary,
            spatial_axes=self.spatial_axes,
            annotated=annotated,
            label_map=self.label_map,
            ignored_class=self.ignored_class,
            constant=self._constant,
        )

    def has_voxels(self) -> Tensor:
        """Which cells have a voxel that counts, bool `[B, cells]`; of the sum `voxels`."""
        assert self._by_cell is not None
        return self._by_cell[self.names.index("voxels"), :, :, 0] > 0

    def over_ranks(self, tensor: Tensor) -> Tensor:
        """Add up a sum over samples over those of all ranks."""
        return tensor if self.alone else sum_over_ranks(tensor, self._group, self._what)

    def _batch(self) -> Tensor:
        if self._of_batch is None:
            rows = self.tensor
            if self.annotated is not None:
                rows = torch.cat([rows, self.annotated[None].to(rows)])
            self._of_batch = self.over_ranks(rows.sum(1, keepdim=True))
        return self._of_batch

    def _found(self, name: str, batch: bool, classes: Sequence[int] | None) -> Tensor:
        """Take the rows apart once for all: on a GPU each view of its own would cost launches in the backward."""
        key = batch, tuple(range(self.channels) if classes is None else classes)
        if key not in self._rows:
            tensor = of_classes(self._batch() if batch else self.tensor, key[1])
            # Not strict: the marks of `counts` come last, and have no name.
            self._rows[key] = dict(zip(self.names, tensor.unbind(), strict=False))
        row = self._rows[key][name]
        return row.detach() if name in self._constant else row


class Volumes(NamedTuple):
    """What a pass goes over: tensors that fit together, and the activation that is left for the pass to apply."""

    input: Tensor  # [B, C, spatial...]
    target: Tensor  # [B, 1, spatial...] or [B, C, spatial...]
    mask: Tensor | None  # [B, 1, spatial...], bool or floating point
    activation: Literal["softmax", "sigmoid", "none"]

    @property
    def binary(self) -> bool:
        """Whether channels are independent of each other; see `PassSums`."""
        return self.activation == "sigmoid" or self.input.shape[1] == 1


def fitting_volumes(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    activation: Activation = "none",
    label_map: bool | None = None,
    regions: int = 0,
) -> Volumes:
    """Check everything about the tensors that does not depend on their voxels, and apply a callable activation.

    Arguments and errors are those of `region_statistics`; `regions` is their number, 0 for none.
    """
    input, target = inputs.plain(input), inputs.plain(target)
    inputs.require_pair(input, target, None if regions else label_map, softmax=activation == "softmax")
    if regions:
        inputs.require_regions(input, target, regions)
    if mask is not None:
        mask = inputs.plain(mask)
        inputs.require_mask(mask, input)
        mask = mask.expand(len(input), *mask.shape[1:])
        if mask.dtype != torch.bool:
            mask = mask.to(torch.promote_types(input.dtype, torch.float32))
    if not isinstance(activation, str):
        shape = input.shape
        input, activation = inputs.plain(activation(input)), "none"
        inputs.require_activated(input, shape)
    elif activation not in ("softmax", "sigmoid", "none"):
        raise ValueError(
            f'activation: expected "softmax", "sigmoid", "none" or a callable, received {activation!r}.'
        )
    inputs.require_reverse_mode(input, target)
    return Volumes(input, target, mask, activation)


def measure(
    volumes: Volumes,
    names: Sequence[str],
    *,
    ignore_index: int | None = None,
    ignored_class: int | None = None,
    backend: str | None = None,
    gamma: float = 0.0,
    annotated: Tensor | None = None,
    group: Group = None,
    shard: Shard = "batch",
    what: str = "",
    inplace: bool = False,
    regions: Sequence[int] = (),
    map: Tensor | None = None,
    map_of_label: bool = False,
    partition: PassCells | None = None,
) -> PassSums:
    """Compute the sums of these names, out of `voxloss.backends.voxels.TERMS`, in one pass.

    `what` is computed from them, as `sum_over_ranks` takes it; `map` as `voxloss.backends.Backend` does.
    """
    input, target, mask, activation = volumes
    numbers, cells, shares = partition or PassCells()
    beside = target, mask, map, numbers
    options = activation, list(names), ignore_index, backend, gamma, list(regions), map_of_label, cells
    if is_lazy(input, target):
        tensor = head_operators.sums_of(input, *beside, *options)
    else:
        inplace = inplace and inputs.may_be_overwritten(input)
        tensor = operators.sums_of(input, *beside, *options, inplace)
    return PassSums(
        names,
        tensor,
        binary=volumes.binary,
        spatial_axes=input.ndim - 2,
        annotated=annotated,
        every_voxel=mask is None and ignore_index is None and annotated is None,
        label_map=target.shape[1] != input.shape[1] and not regions,
        ignored_class=ignored_class,
        constant=() if target.requires_grad else SUMS_OF_TARGET,
        group=group,
        shard=shard,
        what=what,
        cells=cells,
        shares=shares,
    )


def region_sums(squared: bool, soft_label: bool) -> tuple[str, str, str]:
    """Return the names of the sums that are intersection, prediction and target."""
    power = "_squared" if squared else ""
    overlap = "soft_intersection" if soft_label and not squared else "intersection"
    return overlap, f"prediction{power}", f"target{power}"


def region_statistics(
    input: Tensor,
    target: Tensor,
    *,
    activation: Activation = "none",
    label_map: bool | None = None,
    squared: bool = False,
    soft_label: bool = False,
    ignore_index: int | None = None,
    backend: str | None = None,
    mask: Tensor | None = None,
    regions: Sequence[Sequence[int]] | None = None,
) -> RegionStatistics:
    """Sum over the voxels in one pass, differentiably in `input` and in a floating-point one-hot `target`.

    Args:
        input: logits or probabilities `[B, C, spatial...]`, any floating dtype and memory layout.
        target: a label map `[B, 1, spatial...]` with whole numbers 0…C−1 of any dtype, never expanded to a
            one-hot volume; or one channel per class `[B, C, spatial...]` with values in [0, 1] (one-hot,
            multi-label or soft). With C = 1 the single channel is the foreground's mask.
        activation: what makes probabilities of `input`: "softmax" over the channels, "sigmoid", "none" if
            they are probabilities already, or a callable that ends in [0, 1].
        label_map: whether `target` is a label map; None decides by its channels. With C = 1 both are the same.
        squared: sum p² and g² in the place of p and g (Milletari et al. 2016, V-Net).
        soft_label: sum min(p, g) in the place of p·g (Wang et al. 2023), which is right for targets between
            0 and 1 and the same for targets that are 0 or 1. With `squared` p·g is right already.
        ignore_index: voxels to leave out as if they were not there, whatever stands in them: those with this
            label; in a target with one channel per class those whose channel `ignore_index` is 1, or, if
            there is no such channel, those with this value in all channels.
        backend: force one of `voxloss.backends.list_backends()`; None chooses.
        mask: which voxels count, `[B, 1, spatial...]` or `[1, 1, spatial...]`: booleans, or weights w ≥ 0, by
            which each term is multiplied. A voxel of weight 0 is as if it were not there.
        regions: for each channel the labels of a label map that it is made of; see `StatisticsLoss`.

    Returns:
        The sums `[B, C]` in float64 (float32 on a device without it), whatever the dtype of the input.

    Raises:
        TypeError: for something other than tensors, or an input that is not floating point.
        ShapeError: if shapes do not fit together (an AssertionError, as in MONAI, and a ValueError).
        ValueError: for labels that are no class and for probabilities outside [0, 1]. On CUDA these two
            fail as a device-side assertion, so that the host need not wait.
        NotImplementedError: inside torch.func.grad or jvp, and for forward-mode derivatives.
    """
    inputs.require_ignore_index(ignore_index)
    members = memberships(regions, softmax=activation == "softmax", ignore_index=ignore_index)
    volumes = fitting_volumes(
        input, target, mask, activation=activation, label_map=label_map, regions=len(regions or ())
    )
    names = region_sums(squared, soft_label)
    sums = measure(volumes, names, ignore_index=ignore_index, backend=backend, regions=members)
    return RegionStatistics(*(sums.per_sample(name) for name in names))
