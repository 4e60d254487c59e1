"""The module around a formula: arguments, classes, weights, batch and reduction, the same for every loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from voxloss import inputs
from voxloss.channels import Channels, of_classes
from voxloss.distributed import Group, Shard
from voxloss.losses.base import StatisticsLoss
from voxloss.losses.choices import LossReduction
from voxloss.losses.options import Regions, Weight
from voxloss.reduction import (
    Absent,
    class_weights,
    factors_of_classes,
    reduce,
    require_absent,
    require_classes,
    select_classes,
)
from voxloss.statistics import PassSums, RegionStatistics, region_sums


class RegionLoss(StatisticsLoss):
    """A formula of `RegionStatistics` as a loss: a subclass defines in `per_class` what a class costs.

    Args:
        include_background: False leaves channel 0 out (after the softmax, which runs over all channels).
        to_onehot_y: the target is a label map `[B, 1, spatial...]`; it is never expanded in memory.
        sigmoid, softmax, other_act: the activation of the input; at most one. Without any of them
            the input has to be probabilities. `other_act` is a callable that returns values in [0, 1].
        squared_pred: Σp² and Σg² in the denominators.
        reduction: "mean" or "sum" over samples and classes, or "none": one value per sample and class, 0 for what
            `absent` or `annotated` leaves out. A mean over nothing is 0.
        batch: sum over the samples before the formula, as if the batch were one volume.
        weight: a factor ≥ 0 for the loss of each class: one number, one per channel, or one per class that was
            chosen (by `classes`, or without the background), the ignored one included. The mean is not divided by
            it, as in MONAI.
        soft_label: the target holds values between 0 and 1; Σ min(p, g) replaces Σ p·g.
        ignore_index: voxels of this label are left out, as if deleted, and so is the class.
        classes, absent, backend, group, shard, regions: see `RegionOptions`.

    `forward(input, target, mask=None, annotated=None)`: input `[B, C, spatial...]`, target `[B, 1, spatial...]`
    with `to_onehot_y`, otherwise `[B, C, spatial...]`; a mask `[B, 1, spatial...]` of booleans or weights; for
    partially labelled data the channels that were annotated for each sample. The loss is float32 for float32 and
    half-precision inputs and float64 for float64; the gradient has the input's dtype and layout.

    Raises:
        ValueError, TypeError: for invalid arguments and tensors; the message names the expected and the
            received value, and a remedy.
        ShapeError: (an AssertionError, as in MONAI, and a ValueError) if input and target do not match.
    """

    # Without reduction MONAI's Dice losses return [B, C, 1, 1, 1], its Tversky loss [B, C].
    keeps_spatial_axes: ClassVar[bool] = True

    # Sums of `voxloss.backends.voxels.TERMS` that `per_class` takes beside the three, as arguments of that name.
    extra_sums: ClassVar[tuple[str, ...]] = ()

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        squared_pred: bool = False,
        reduction: LossReduction | str = LossReduction.MEAN,
        batch: bool = False,
        weight: Weight = None,
        soft_label: bool = False,
        ignore_index: int | None = None,
        classes: Sequence[int] | None = None,
        absent: Absent = "count",
        backend: str | None = None,
        group: Group = None,
        shard: Shard = "batch",
        inplace: bool = False,
        regions: Regions = None,
    ) -> None:
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            reduction=reduction,
            ignore_index=ignore_index,
            backend=backend,
            group=group,
            shard=shard,
            inplace=inplace,
            regions=regions,
        )
        self._takes_channels = inputs.require_arguments(self.per_class, self.extra_sums)
        require_classes(classes, include_background)
        require_absent(absent)
        self.squared_pred = squared_pred
        self.batch = batch
        self.soft_label = soft_label
        self.register_buffer("class_weight", factors_of_classes(weight))
        self.classes = classes
        self.absent = absent

    @abstractmethod
    def per_class(self, statistics: RegionStatistics, *args: Any, **arguments: Any) -> Tensor:
        """The loss of each sample and class, `[B, C]`, from the statistics and the `extra_sums`, all `[B, C]`.

        A formula that treats the background in its own way takes an argument `channels` as well: the `Channels`
        that the columns belong to.
        """

    def terms(
        self,
        statistics: RegionStatistics,
        arguments: Mapping[str, Any],
        weight: Tensor | None,
        counts: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what is to be reduced, one term per sample and class, and which of the terms count.

        `arguments`: those of `per_class` beside the statistics; `weight`: `[]` or `[C]`; `counts`: which classes
        do, bool `[B, C]`, or None where all of them do.
        """
        loss = self.per_class(statistics, **arguments)
        inputs.require_per_class(loss, statistics.target.shape)
        return loss if weight is None else loss * weight, counts

    @property
    def statistics_sums(self) -> tuple[str, str, str]:
        """The sums that are intersection, prediction and target."""
        return region_sums(self.squared_pred, self.soft_label)

    def needs(self, binary: bool) -> Sequence[str]:
        """Intersection, prediction and target, and the `extra_sums`."""
        three = self.statistics_sums
        return *three, *(name for name in self.extra_sums if name not in three)

    def compute(self, sums: PassSums) -> Tensor:
        """The loss: `[]`, or without reduction one value per sample (unless `batch`) and class."""
        # Of a batch all ranks have the same terms already.
        over_ranks = None if self.batch or sums.alone else sums.over_ranks
        loss = reduce(*self.of_samples(sums, self.batch), self.reduction, over_ranks)
        if self.reduction == "none":
            loss = loss[0] if self.batch else loss
            if self.keeps_spatial_axes:
                loss = loss.reshape(*loss.shape, *[1] * sums.spatial_axes)
        return loss

    def of_samples(self, sums: PassSums, batch: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return the terms of each sample, or of the batch, and class, `[B, C]`, and which of them count."""
        total = sums.channels
        chosen, counting = select_classes(total, self.classes, self.include_background, sums.ignored_class)
        found = sums.over_batch if batch else sums.per_sample
        statistics = RegionStatistics(*(found(name, counting) for name in self.statistics_sums))
        arguments: dict[str, Any] = {name: found(name, counting) for name in self.extra_sums}
        if self._takes_channels:
            arguments["channels"] = Channels(counting, total, sums.binary)
        weight = self.following("class_weight", sums.tensor)
        if weight is not None:
            weight = class_weights(weight, total, chosen, counting)
        counts = sums.counts(batch)
        counts = None if counts is None else of_classes(counts, counting)
        if self.absent == "skip":
            counts = (statistics.target > 0) & (True if counts is None else counts)
        return self.terms(statistics, arguments, weight, counts)
