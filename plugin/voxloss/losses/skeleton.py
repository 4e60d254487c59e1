"""Thin structures: how much of the target's centre lines is found, alone and beside Dice and cross entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from monai.utils.enums import LossReduction
from torch import Tensor

from voxloss import inputs
from voxloss.channels import ignored_voxels
from voxloss.losses.base import Annotated, Over
from voxloss.losses.compound import DiceCELoss, LossOfSeveralPasses
from voxloss.losses.options import RegionOptions, Weight, pass_options, shared_options
from voxloss.losses.region import RegionLoss
from voxloss.maps import Target, require_all, require_map
from voxloss.statistics import RegionStatistics

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SkeletonRecallLoss(RegionLoss):
    """L = 1 − (Σps + s_n) / (Σs + s_d) per foreground class, then the reduction; s is the target's skeleton.

    Kirchhoff et al. 2024, "Skeleton Recall Loss for Connectivity Conserving and Resource Efficient Segmentation
    of Thin Tubular Structures". The skeleton is a map of the target, made in the loader, for example by
    `voxloss.transforms.Skeletonized`, and given as `skeleton=` or in a `Target`. A class without one costs
    nothing if s_n = s_d.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`; of it the ignored voxels are left out. skeleton: a label map
    `[B, 1, spatial...]`, 0 where there is none, or `[B, C, spatial...]` in [0, 1]. The background, channel 0 of
    several without `regions`, has none. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have.

    Args:
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels.
    """

    one_pass = False

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

    def over(self, input: Tensor, target: Target, mask: Tensor | None, annotated: Annotated) -> Over:
        """The skeleton in the place of the labels."""
        skeleton = inputs.plain(require_map("skeleton", target.skeleton, input))
        labels, channels = inputs.plain(target.labels), input.shape[1]
        is_map = skeleton.shape[1] == 1 and (channels > 1 or self.regions is not None)
        inputs.require_pair(inputs.plain(input), labels, None, softmax=self.activation == "softmax")
        ignored = ignored_voxels(labels, channels, self.ignore_index, self.regions is not None)
        if ignored is not None:
            mask = ~ignored if mask is None else mask * ~ignored
        if is_map and labels.shape[1] == 1:
            fits = (skeleton == 0) | (skeleton == labels)
            fits = fits if ignored is None else fits | ignored
            require_all(fits, "skeleton: expected 0 or the label of the voxel, as it is the target's.")
        elif skeleton.dtype != torch.bool:
            fits = ((skeleton >= 0) & (skeleton <= 1)) | (False if ignored is None else ignored)
            require_all(fits, "skeleton: expected values in [0, 1], one channel per class.")
        return Over(skeleton, mask, is_map, self._memberships if is_map else (), None)

    def per_class(self, statistics: RegionStatistics) -> Tensor:
        """1 − recall."""
        return 1 - (statistics.intersection + self.smooth_nr) / _divisor(statistics.target + self.smooth_dr)


def _divisor(denominator: Tensor) -> Tensor:
    """Without a skeleton, and without smoothing, nothing can be missed: 0/1."""
    return torch.where(denominator > 0, denominator, 1.0)


class DiceCESkeletonRecallLoss(LossOfSeveralPasses):
    """L = λ_dice · Dice + λ_ce · cross entropy + λ_skeleton · recall: `DiceCELoss` and `SkeletonRecallLoss`.

    The loss of Kirchhoff et al. 2024 for vessels, roots, roads and nerves, with all λ = 1. Arguments as
    `DiceCELoss` but for `inplace`; the skeleton as of `SkeletonRecallLoss`. Two passes forward and two backward.

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

    weighted_parts = (("_one", "dice_ce"), ("lambda_skeleton", "skeleton_recall"))
    _one = 1.0

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
        inputs.require_share(lambda_skeleton=lambda_skeleton)
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(include_background=include_background, **pass_options(options), **shared)
        self.dice_ce = DiceCELoss(
            include_background=include_background,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight,
            lambda_dice=lambda_dice,
            lambda_ce=lambda_ce,
            label_smoothing=label_smoothing,
            **shared,
            **options,
        )
        self.skeleton_recall = SkeletonRecallLoss(
            smooth_nr=smooth_nr, smooth_dr=smooth_dr, batch=batch, weight=weight, **shared, **options
        )
        self.lambda_skeleton = lambda_skeleton
