"""Losses of all four entries of a confusion matrix: what is neither in the target nor predicted counts as well.

They need more sums than intersection, prediction and target, and name them in `extra_sums`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from voxloss import formulas, inputs
from voxloss.losses.choices import LossReduction
from voxloss.losses.options import RegionOptions, Weight, shared_options
from voxloss.losses.region import RegionLoss
from voxloss.statistics import RegionStatistics

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MCCLoss(RegionLoss):
    """L = 1 − (TP·TN − FP·FN + s_n) / √((TP + FP)(TP + FN)(TN + FP)(TN + FN) + s_d) per class, reduced.

    Abhishek & Hamarneh 2021, "Matthews Correlation Coefficient Loss for Deep Convolutional Networks", with
    FP = Σ p(1 − g), FN = Σ (1 − p)g and TN = Σ (1 − p)(1 − g). In [0, 2]; 0 where nothing is wrong. Arguments as
    `monai.losses.MCCLoss`.

    A class that is absent from the target costs 1 for any prediction of it, without a derivative: `absent="skip"`
    leaves it out.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have.

    Args:
        smooth_nr: s_n ≥ 0, in voxels².
        smooth_dr: s_d ≥ 0, in voxels⁴; it keeps the derivative finite where nothing is predicted.
    """

    keeps_spatial_axes = False
    extra_sums = ("false_positives", "false_negatives", "true_negatives")

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: LossReduction | str = LossReduction.MEAN,
        smooth_nr: float = 0.0,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        *,
        weight: Weight = None,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(include_background=include_background, batch=batch, weight=weight, **shared, **options)
        inputs.require_non_negative(smooth_nr=smooth_nr, smooth_dr=smooth_dr)
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)

    def per_class(
        self,
        statistics: RegionStatistics,
        false_positives: Tensor,
        false_negatives: Tensor,
        true_negatives: Tensor,
    ) -> Tensor:
        """1 − MCC."""
        entries = statistics.intersection, false_positives, false_negatives, true_negatives
        return 1 - formulas.matthews(*entries, self.smooth_nr, self.smooth_dr)


class SensitivitySpecificityLoss(RegionLoss):
    """L = r · Σ g(g − p)² / Σg + (1 − r) · Σ (1 − g)(g − p)² / Σ(1 − g) per class, then the reduction.

    Brosch et al. 2015, "Deep Convolutional Encoder Networks for Multiple Sclerosis Lesion Segmentation", r = .05:
    the squared errors where the target is, and where it is not, each over its own voxels.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have.

    Args:
        r: in [0, 1], the share of the error inside of the target.
    """

    keeps_spatial_axes = False
    extra_sums = ("sensitivity_error", "specificity_error", "voxels")

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        r: float = 0.05,
        reduction: LossReduction | str = LossReduction.MEAN,
        batch: bool = False,
        *,
        weight: Weight = None,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(include_background=include_background, batch=batch, weight=weight, **shared, **options)
        inputs.require_fraction(r=r)
        self.r = r

    def per_class(
        self,
        statistics: RegionStatistics,
        sensitivity_error: Tensor,
        specificity_error: Tensor,
        voxels: Tensor,
    ) -> Tensor:
        """The two errors, with r and 1 − r."""
        return formulas.sensitivity_specificity(
            sensitivity_error, specificity_error, statistics.target, voxels, self.r
        )
