"""The losses as modules, with MONAI's argument names, order and defaults; each is a formula and its arguments.

Every class takes, after MONAI's own arguments and by keyword only, the `RegionOptions` of `options.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from voxloss import formulas, inputs
from voxloss.losses.choices import LossReduction, WeightType
from voxloss.losses.options import RegionOptions, Weight, shared_options
from voxloss.losses.region import RegionLoss
from voxloss.statistics import RegionStatistics

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DiceLoss(RegionLoss):
    """L = 1 − (2 Σpg + s_n) / (Σp + Σg + s_d) per class, then the reduction.

    Drozdzal et al. 2016, "The Importance of Skip Connections in Biomedical Image Segmentation". With
    `squared_pred` the denominator is Σp² + Σg² + s_d (Milletari et al. 2016, "V-Net"); with `jaccard` the loss
    is that of `JaccardLoss`. Arguments as `monai.losses.DiceLoss`.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have.

    Args:
        jaccard: the loss of `JaccardLoss`.
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: LossReduction | str = LossReduction.MEAN,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Weight = None,
        soft_label: bool = False,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(
            include_background=include_background,
            squared_pred=squared_pred,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            **shared,
            **options,
        )
        inputs.require_non_negative(smooth_nr=smooth_nr, smooth_dr=smooth_dr)
        self.jaccard = jaccard
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)

    def per_class(self, statistics: RegionStatistics) -> Tensor:
        """1 − Dice, or 1 − IoU with `jaccard`."""
        score = formulas.jaccard if self.jaccard else formulas.dice
        return 1 - score(statistics, self.smooth_nr, self.smooth_dr)


class JaccardLoss(RegionLoss):
    """L = 1 − (2 Σpg + s_n) / (2(Σp + Σg − Σpg) + s_d) per class, then the reduction: 1 − IoU at s = 0.

    Rahman & Wang 2016, "Optimizing Intersection-Over-Union in Deep Neural Networks for Image Segmentation". The
    smoothing stands beside 2 Σpg as in `monai.losses.DiceLoss(jaccard=True)`, so that per class
    Dice = 2·IoU/(1 + IoU) for every s_n = s_d. Arguments as `DiceLoss`'s without `jaccard`.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have.

    Args:
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        squared_pred: bool = False,
        reduction: LossReduction | str = LossReduction.MEAN,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Weight = None,
        soft_label: bool = False,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(
            include_background=include_background,
            squared_pred=squared_pred,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            **shared,
            **options,
        )
        inputs.require_non_negative(smooth_nr=smooth_nr, smooth_dr=smooth_dr)
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)

    def per_class(self, statistics: RegionStatistics) -> Tensor:
        """1 − IoU."""
        return 1 - formulas.jaccard(statistics, self.smooth_nr, self.smooth_dr)


IoULoss = JaccardLoss


class TverskyLoss(RegionLoss):
    """L = 1 − (TP + s_n) / (TP + α FP + β FN + s_d) per class, then the reduction.

    TP = Σpg, FP = Σp − TP, FN = Σg − TP; α weights false positives and β false negatives (Salehi et al. 2017,
    "Tversky loss function for image segmentation using 3D fully convolutional deep networks", who recommend
    α = 0.3, β = 0.7; the defaults are MONAI's ½, ½, which is the Dice loss with twice the smoothing). Abraham &
    Khan and Yeung et al. name the weight of false negatives first. Arguments as `monai.losses.TverskyLoss`.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have.

    Args:
        alpha, beta: weights ≥ 0 of false positives and false negatives, not both 0.
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels.
    """

    keeps_spatial_axes = False

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
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
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(
            include_background=include_background,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            **shared,
            **options,
        )
        inputs.require_non_negative(alpha=alpha, beta=beta, smooth_nr=smooth_nr, smooth_dr=smooth_dr)
        inputs.require_positive(**{"alpha + beta": alpha + beta})
        self.alpha = alpha
        self.beta = beta
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)

    def per_class(self, statistics: RegionStatistics) -> Tensor:
        """1 − TI."""
        return 1 - formulas.tversky(statistics, self.alpha, self.beta, self.smooth_nr, self.smooth_dr)


class FocalTverskyLoss(TverskyLoss):
    """L = (1 − TI)^(1/γ) per class, then the reduction, TI the Tversky index of `TverskyLoss`.

    γ > 1 increases the gradient of classes that are nearly right and decreases that of classes that are badly
    wrong, contrary to γ in focal loss: compared with `TverskyLoss` by factors of 1.33 at 1 − TI = 0.1 and 0.77 at
    0.9 for γ = 4/3. For more weight on classes that are badly wrong set γ < 1.

    Abraham & Khan 2019, "A Novel Focal Tversky Loss Function with Improved Attention U-Net for Lesion
    Segmentation": γ = 4/3, weight 0.7 for false negatives (which they call α, here `beta`) and 0.3 for false
    positives. Libraries disagree on the exponent: one that raises 1 − TI to the power g is this loss with
    γ = 1/g; Yeung et al. 2022 raise it to 1 − g, γ = 1/(1 − g); and some take the power after the mean over the
    classes, which is another loss. γ = 1 is `TverskyLoss`. See `voxloss.formulas.focal_power` for the derivative
    at a perfect prediction.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have.

    Args:
        alpha, beta: weights ≥ 0 of false positives and false negatives, not both 0.
        gamma: γ > 0; above 1 nearly right classes have larger gradients, below 1 smaller ones.
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels; s_n ≤ s_d unless γ = 1.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 4 / 3,
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
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(
            include_background=include_background,
            alpha=alpha,
            beta=beta,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            **shared,
            **options,
        )
        inputs.require_positive(gamma=gamma)
        if gamma != 1:
            inputs.require_score_up_to_one(smooth_nr, smooth_dr)
        self.gamma = gamma

    def per_class(self, statistics: RegionStatistics) -> Tensor:
        """(1 − TI)^(1/γ)."""
        return formulas.focal_power(super().per_class(statistics), self.gamma)


class GeneralizedDiceLoss(RegionLoss):
    """L = 1 − (2 Σ_c w_c TP_c + s_n) / (Σ_c w_c (Σp_c + Σg_c) + s_d) over the classes, then the mean over
    samples.

    Sudre et al. 2017, "Generalised Dice overlap as a deep learning loss function for highly unbalanced
    segmentations". w_c = 1/(Σg_c)², 1/Σg_c or 1, relative to the largest finite one of the sample, so that the
    loss does not depend on the size of the volume; a class absent from the target has that largest weight, so
    that false positives cost. With 1/(Σg_c)² the smallest class dominates. Arguments as
    `monai.losses.GeneralizedDiceLoss`.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have.

    Args:
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
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            **shared,
            **options,
        )
        inputs.require_non_negative(smooth_nr=smooth_nr, smooth_dr=smooth_dr)
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        if w_type not in list(WeightType):
            raise ValueError(f"w_type: expected one of {[w.value for w in WeightType]}, received {w_type!r}.")
        self.w_type = WeightType(str(w_type))

    def per_class(self, statistics: RegionStatistics, weight: Tensor | None = None) -> Tensor:
        """1 − GD, one value per sample for all of its classes, `[B, 1]`."""
        return 1 - formulas.generalized_dice(
            statistics, self.w_type.value, self.smooth_nr, self.smooth_dr, weight
        )

    def terms(
        self,
        statistics: RegionStatistics,
        arguments: Mapping[str, Any],
        weight: Tensor | None,
        counts: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """One term per sample; the class weights, and which classes count, enter through w_c."""
        if counts is not None:
            weight = counts.to(statistics.target) * (1.0 if weight is None else weight)
            counts = counts.any(1, keepdim=True)
        return self.per_class(statistics, weight), counts
