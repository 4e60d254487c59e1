"""Boundaries: what is predicted times its distance to the target's boundary, alone and beside Dice."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from voxloss import inputs
from voxloss.channels import of_classes
from voxloss.losses.base import StatisticsLoss
from voxloss.losses.choices import LossReduction
from voxloss.losses.compound import CompoundLoss
from voxloss.losses.options import RegionOptions, VoxelOptions, Weight, pass_options, shared_options
from voxloss.losses.overlap import DiceLoss
from voxloss.reduction import class_weights, factors_of_classes, reduce, require_classes, select_classes
from voxloss.statistics import PassSums

if TYPE_CHECKING:
    from typing_extensions import Unpack

Schedule = Literal["constant", "increase", "rebalance"]


class BoundaryLoss(StatisticsLoss):
    """L = mean over samples, classes and voxels of φ·p; φ is the signed distance to the target's boundary.

    Kervadec et al. 2019, "Boundary loss for highly unbalanced segmentation". φ is negative inside of the target,
    so that the loss falls with what is predicted there, and rises with the distance of what is predicted outside.
    Combine it with a region loss: `DiceBoundaryLoss`. The distance is a map of the target, computed in the
    loader, for example by `voxloss.transforms.SignedDistanced`, and passed as `distance=` or in a `Target`. Other
    values make it a weight map per class.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`, read for its ignored voxels alone. distance:
    `[B, C, spatial...]`, or `[B, 1, spatial...]` for all classes, in any unit. `StatisticsLoss` explains the
    arguments that all losses share, `VoxelOptions` those that MONAI does not have.

    Args:
        reduction: "mean", "sum" over samples and classes, or "none", `[B, C]`.
        weight: a factor ≥ 0 per channel.
    """

    map_name = "distance"

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: LossReduction | str = LossReduction.MEAN,
        *,
        weight: Weight = None,
        ignore_index: int | None = None,
        **options: Unpack[VoxelOptions],
    ) -> None:
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        classes = options.get("classes")
        super().__init__(include_background=include_background, **shared, **pass_options(options))
        require_classes(classes, include_background)
        self.register_buffer("class_weight", factors_of_classes(weight))
        self.classes = classes

    def needs(self, binary: bool) -> Sequence[str]:
        """Σφp, and the number of voxels."""
        return "map_intersection", "voxels"

    def compute(self, sums: PassSums) -> Tensor:
        """The loss: `[]`, or `[B, C]` without reduction."""
        total = sums.channels
        chosen, counting = select_classes(total, self.classes, self.include_background, sums.ignored_class)
        voxels = sums.per_sample("voxels", counting)
        loss = sums.per_sample("map_intersection", counting) / torch.where(voxels > 0, voxels, 1.0)
        weight = self.following("class_weight", sums.tensor)
        if weight is not None:
            loss = loss * class_weights(weight, total, chosen, counting)
        counts = sums.counts(False)
        counts = None if counts is None else of_classes(counts, counting)
        return reduce(loss, counts, self.reduction, None if sums.alone else sums.over_ranks)


class DiceBoundaryLoss(CompoundLoss):
    """L = λ_dice · Dice + λ_boundary · boundary loss, in one pass: `DiceLoss` and `BoundaryLoss`.

    Kervadec et al. 2019 begin with Dice almost alone, and have two schedules: "increase",
    λ_boundary = e · step beside a constant Dice, and "rebalance", λ_dice = max(step, 1 − e · step) and
    λ_boundary = 1 − λ_dice. Call `at_epoch(e)` at the start of each epoch e = 1, 2, …. Arguments as `DiceLoss`;
    the distance as of `BoundaryLoss`.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`; distance: `[B, C, spatial...]` or `[B, 1, spatial...]`. `RegionLoss`
    explains the arguments that all losses share, `RegionOptions` those that MONAI does not have.

    Args:
        reduction: "mean" or "sum".
        smooth_nr, smooth_dr: s_n and s_d ≥ 0 of Dice, in voxels.
        weight: a factor ≥ 0 per channel.
        lambda_dice, lambda_boundary: λ ≥ 0; a schedule sets its own.
        schedule: "constant", "increase" or "rebalance".
        step: by how much per epoch, in [0, 1]; 0.01 in the paper.
    """

    weighted_parts = (("lambda_dice", "dice"), ("lambda_boundary", "boundary"))

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: LossReduction | str = LossReduction.MEAN,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Weight = None,
        lambda_dice: float = 1.0,
        lambda_boundary: float = 0.01,
        *,
        schedule: Schedule = "constant",
        step: float = 0.01,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        inputs.require_share(lambda_dice=lambda_dice, lambda_boundary=lambda_boundary)
        inputs.require_fraction(step=step)
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule: expected one of {get_args(Schedule)}, received {schedule!r}.")
        if LossReduction(str(reduction)) is LossReduction.NONE:
            raise ValueError('reduction: expected "mean" or "sum", received "none".')
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(include_background=include_background, **pass_options(options), **shared)
        self.dice = DiceLoss(
            include_background=include_background,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight,
            **shared,
            **options,
        )
        self.boundary = BoundaryLoss(
            include_background=include_background,
            weight=weight,
            classes=options.get("classes"),
            **shared,
            **pass_options(options),
        )
        self.lambda_dice, self.lambda_boundary = lambda_dice, lambda_boundary
        self.schedule, self.step = schedule, step
        self.at_epoch(1)
        self._is_scheduled = schedule == "constant"

    def at_epoch(self, epoch: int) -> None:
        """Set the λ of an epoch, 1 for the first.

        Raises:
            ValueError: for an epoch before the first.
        """
        inputs.require_whole(1, epoch=epoch)
        self._is_scheduled = True
        if self.schedule == "increase":
            self.lambda_boundary = epoch * self.step
        elif self.schedule == "rebalance":
            self.lambda_dice = max(self.step, 1 - epoch * self.step)
            self.lambda_boundary = 1 - self.lambda_dice

    def _measured(self, *given: Any) -> PassSums:
        if not (self._is_scheduled or torch.compiler.is_compiling()):
            self._is_scheduled = True
            message = f"schedule={self.schedule!r}: call at_epoch(e) at the start of each epoch e = 1, 2, …"
            warnings.warn(
                f"DiceBoundaryLoss, {message}; until then the weights are those of epoch 1.", stacklevel=6
            )
        return super()._measured(*given)
