"""Thin structures: the recall on the target's centre lines, alone and beside Dice and cross entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from voxloss import inputs
from voxloss.losses.choices import LossReduction
from voxloss.losses.compound import CompoundLoss
from voxloss.losses.options import RegionOptions, Weight, pass_options, shared_options
from voxloss.losses.overlap import DiceLoss
from voxloss.losses.region import RegionLoss
from voxloss.losses.voxelwise import CrossEntropyLoss
from voxloss.statistics import RegionStatistics

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SkeletonRecallLoss(RegionLoss):
    """L = 1 − (Σps + s_n) / (Σs + s_d) per foreground class, then the reduction; s is the target's skeleton.

    Kirchhoff et al. 2024, "Skeleton Recall Loss for Connectivity Conserving and Resource Efficient Segmentation
    of Thin Tubular Structures". The skeleton is a map of the target, computed in the loader, for example by
    `voxloss.transforms.Skeletonized`, and passed as `skeleton=` or in a `Target`. A class without one costs
    nothing if s_n = s_d.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`, read for its ignored voxels alone. skeleton: a label map
    `[B, 1, spatial...]`, 0 where there is none, or `[B, C, spatial...]` in [0, 1]. The background, channel 0 of
    several without `regions`, has none. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have.

    Args:
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels.
    """

    map_name = "skeleton"
    keeps_spatial_axes = False
    leaves_background_out = True
    unsuitable: ClassVar = {"include_background": "The background has no skeleton, and never counts."}

    def __init__(
        self,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: LossReduction | str = LossReduction.MEAN,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        *,
        weight: Weight = None,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        foreground = options.get("regions") is None and options.get("classes") is None
        super().__init__(include_background=not foreground, batch=batch, weight=weight, **shared, **options)
        inputs.require_non_negative(smooth_nr=smooth_nr, smooth_dr=smooth_dr)
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)

    @property
    def statistics_sums(self) -> tuple[str, str, str]:
        """Those of the skeleton in the place of the target's."""
        return "map_intersection", "prediction", "map_total"

    def per_class(self, statistics: RegionStatistics) -> Tensor:
        """1 − recall; without a skeleton, and without smoothing, nothing can be missed."""
        found, whole = statistics.intersection + self.smooth_nr, statistics.target + self.smooth_dr
        return 1 - torch.where(whole > 0, found / torch.where(whole > 0, whole, 1.0), 1.0)


class DiceCESkeletonRecallLoss(CompoundLoss):
    """L = λ_dice · Dice + λ_ce · cross entropy + λ_skeleton · recall, in one pass: with `SkeletonRecallLoss`.

    The loss of Kirchhoff et al. 2024 for vessels, roots, roads and nerves, with all λ = 1. Arguments as
    `DiceCELoss`; the skeleton as of `SkeletonRecallLoss`.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`; skeleton: `[B, 1, spatial...]` or `[B, C, spatial...]`. `RegionLoss`
    explains the arguments that all losses share, `RegionOptions` those that MONAI does not have; `classes` and
    `absent` are of Dice and the recall.

    Args:
        reduction: "mean" or "sum".
        smooth_nr, smooth_dr: s_n and s_d ≥ 0 of Dice and of the recall, in voxels.
        weight: a factor ≥ 0 per channel.
        lambda_dice, lambda_ce, lambda_skeleton: λ ≥ 0.
        label_smoothing: of cross entropy.
    """

    weighted_parts = (
        ("lambda_dice", "dice"),
        ("lambda_ce", "cross_entropy"),
        ("lambda_skeleton", "skeleton_recall"),
    )

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
        lambda_ce: float = 1.0,
        lambda_skeleton: float = 1.0,
        label_smoothing: float = 0.0,
        *,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        inputs.require_share(lambda_dice=lambda_dice, lambda_ce=lambda_ce, lambda_skeleton=lambda_skeleton)
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(include_background=include_background, **pass_options(options), **shared)
        region: dict[str, Any] = {"smooth_nr": smooth_nr, "smooth_dr": smooth_dr, "batch": batch}
        self.dice = DiceLoss(include_background=include_background, weight=weight, **region, **shared, **options)
        self.cross_entropy = CrossEntropyLoss(weight=weight, label_smoothing=label_smoothing, **shared)
        self.skeleton_recall = SkeletonRecallLoss(weight=weight, **region, **shared, **options)
        self.lambda_dice, self.lambda_ce, self.lambda_skeleton = lambda_dice, lambda_ce, lambda_skeleton
