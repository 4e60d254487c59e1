"""Losses that make something further of Dice or Tversky; thin, as the formulas are in `formulas`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from monai.utils.enums import LossReduction
from torch import Tensor

from voxloss import formulas, inputs
from voxloss.losses import DiceLoss, TverskyLoss
from voxloss.region_loss import RegionOptions
from voxloss.statistics import RegionStatistics
from voxloss.statistics_loss import Weight

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LogCoshDiceLoss(DiceLoss):
    """L = log cosh(1 − Dice) per class, then the reduction.

    Jadon 2020, "A survey of loss functions for semantic segmentation". Nearly x²/2 for a small Dice loss x, so
    that classes that are almost right hardly count: the opposite of `FocalTverskyLoss`. At most log cosh 1 = .434
    where Dice is between 0 and 1. Arguments as `DiceLoss`.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have.

    Args:
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels.
    """

    def per_class(self, statistics: RegionStatistics) -> Tensor:
        """Log cosh of 1 − Dice, or of 1 − IoU with `jaccard`."""
        return formulas.log_cosh(super().per_class(statistics))


class AsymmetricSimilarityLoss(TverskyLoss):
    """L = 1 − F_β, F_β = ((1 + β²) TP + s) / ((1 + β²) TP + β² FN + FP + s) per class, then the reduction.

    Hashemi et al. 2019, "Asymmetric Loss Functions and Deep Densely-Connected Networks for Highly-Imbalanced
    Medical Image Segmentation", with β = 1.5: false negatives weigh β² times as much as false positives. It is
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
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            alpha=1 / (1 + f_beta**2),
            beta=f_beta**2 / (1 + f_beta**2),
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            soft_label=soft_label,
            ignore_index=ignore_index,
            weight=weight,
            **options,
        )
        self.f_beta = f_beta
