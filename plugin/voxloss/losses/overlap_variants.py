"""Losses derived from Dice, Generalized Dice or Tversky; the formulas are in `formulas`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from voxloss import formulas, inputs
from voxloss.losses.choices import LossReduction, WeightType
from voxloss.losses.options import RegionOptions, Weight, shared_options
from voxloss.losses.overlap import DiceLoss, GeneralizedDiceLoss, TverskyLoss
from voxloss.statistics import RegionStatistics

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LogCoshDiceLoss(DiceLoss):
    """L = log cosh(1 − Dice) per class, then the reduction.

    Jadon 2020, "A survey of loss functions for semantic segmentation". Nearly x²/2 for a small Dice loss x, so
    that nearly right classes hardly count: the opposite of `FocalTverskyLoss`. At most log cosh 1 = .434
    where Dice is between 0 and 1. Arguments as `DiceLoss`.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have.

    Args:
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels.
    """

    def per_class(self, statistics: RegionStatistics) -> Tensor:
        """Log cosh of 1 − Dice, or of 1 − IoU with `jaccard`."""
        return formulas.log_cosh(super().per_class(statistics), up_to_one=self.smooth_nr <= self.smooth_dr)


class AsymmetricSimilarityLoss(TverskyLoss):
    """L = 1 − F_β, F_β = ((1 + β²) TP + s) / ((1 + β²) TP + β² FN + FP + s) per class, then the reduction.

    Hashemi et al. 2019, "Asymmetric Loss Functions and Deep Densely-Connected Networks for Highly-Imbalanced
    Medical Image Segmentation", with β = 1.5: false negatives count β² times as much as false positives. It is
    the Tversky loss with α = 1/(1 + β²) for false positives, β²/(1 + β²) for false negatives, and s in units of
    1 + β².

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have.

    Args:
        f_beta: β > 0; 1 is the Dice loss.
        smooth_nr, smooth_dr: s ≥ 0 of numerator and denominator, in units of 1 + β² voxels.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        f_beta: float = 1.5,
        reduction: LossReduction | str = LossReduction.MEAN,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
        ignore_index: int | None = None,
        *,
        weight: Weight = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        inputs.require_positive(f_beta=f_beta)
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(
            include_background=include_background,
            alpha=1 / (1 + f_beta**2),
            beta=f_beta**2 / (1 + f_beta**2),
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            soft_label=soft_label,
            weight=weight,
            **shared,
            **options,
        )
        self.f_beta = f_beta


class PenaltyGeneralizedDiceLoss(GeneralizedDiceLoss):
    """L = x / (1 + k(1 − x)), x the loss of `GeneralizedDiceLoss`, per sample, then the mean.

    Yang et al. 2019, "Major Vessel Segmentation on X-ray Coronary Angiography using Deep Networks with a Novel
    Penalty Loss Function", k = 2.5: the gradient is multiplied by 1 + k for a completely wrong prediction, and
    divided by 1 + k for a nearly right one. The penalty is applied to the loss, as is usual; applied to the
    *coefficient*, 1 − (1 − x) / (1 + kx), it would do the opposite. k = 0 is `GeneralizedDiceLoss`.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have.

    Args:
        k: k ≥ 0.
        w_type: "square", "simple" or "uniform".
        reduction: "mean" or "sum" over samples, or "none": one value per sample, or one with `batch`.
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels of the smallest class.
        weight: factors ≥ 0 on w_c.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        k: float = 2.5,
        w_type: WeightType | str = WeightType.SQUARE,
        reduction: LossReduction | str = LossReduction.MEAN,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
        *,
        weight: Weight = None,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(
            include_background=include_background,
            w_type=w_type,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            soft_label=soft_label,
            weight=weight,
            **shared,
            **options,
        )
        inputs.require_non_negative(k=k)
        self.k = k

    def per_class(self, statistics: RegionStatistics, weight: Tensor | None = None) -> Tensor:
        """The penalty of 1 − GD, one value per sample for all of its classes, `[B, 1]`."""
        return formulas.penalty(super().per_class(statistics, weight), self.k)
