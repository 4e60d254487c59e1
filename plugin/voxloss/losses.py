"""The losses as modules, with MONAI's argument names, order and defaults; each is a formula and its arguments.

Every class takes, after MONAI's own arguments and by keyword only, the `RegionOptions` below.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, TypedDict

import torch
from monai.utils.enums import LossReduction
from monai.utils.enums import Weight as WeightType
from torch import Tensor
from torch.nn.modules.loss import _Loss

from voxloss import formulas, inputs
from voxloss.backends import select
from voxloss.reduction import (
    Absent,
    class_weights,
    reduce,
    require_absent,
    require_classes,
    require_weight,
    select_classes,
)
from voxloss.statistics import Activation, RegionStatistics, region_statistics

if TYPE_CHECKING:
    from typing_extensions import Unpack

Weight = Sequence[float] | float | Tensor | None


class RegionOptions(TypedDict, total=False):
    """Keyword arguments of every loss that MONAI's losses do not have.

    * `classes`: the channels that count, say the rare ones; the softmax still runs over all channels.
    * `absent`: "count" (MONAI's way) lets a class without a target voxel count with its smoothed score;
      "skip" leaves it out of the sum and the mean: per item, or per batch with `batch=True`.
    * `backend`: force one of `voxloss.backends.list_backends()`; None chooses.
    """

    classes: Sequence[int] | None
    absent: Absent
    backend: str | None


class RegionLoss(_Loss, ABC):
    """A formula of `RegionStatistics` as a loss: a subclass says what a class costs in `per_class`.

    Args:
        include_background: False leaves channel 0 out (after the softmax, which runs over all channels).
        to_onehot_y: the target is a label map `[B, 1, spatial...]`; it is never expanded in memory.
        sigmoid, softmax, other_act: what makes probabilities of the input; at most one. Without any of them
            the input has to be probabilities. `other_act` is a callable that ends in [0, 1].
        squared_pred: Σp² and Σg² in the denominators.
        reduction: "mean" or "sum" over items and classes, or "none".
        batch: sum over the items before the formula, as if the batch were one volume.
        weight: a factor ≥ 0 for the loss of each class: one number, one per channel, or one per class that
            counts. The mean is not divided by it, as in MONAI.
        soft_label: the target holds values between 0 and 1; Σ min(p, g) takes the place of Σ p·g.
        ignore_index: voxels of this label are left out as if they were not there, and so is the class.
        classes, absent, backend: see `RegionOptions`.

    `forward(input, target)`: input `[B, C, spatial...]`, target `[B, 1, spatial...]` with `to_onehot_y`,
    otherwise `[B, C, spatial...]`. The loss is float32 for float32 and half-precision inputs and float64 for
    float64; the gradient has the input's dtype and layout.

    Raises:
        ValueError, TypeError: for arguments and tensors that make no sense; the message says what was
            expected, what came and the remedy.
        ShapeError: (an AssertionError, as in MONAI, and a ValueError) where input and target do not fit.
    """

    # Without reduction MONAI's Dice losses return [B, C, 1, 1, 1], its Tversky loss [B, C].
    keeps_spatial_axes: ClassVar[bool] = True

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
    ) -> None:
        super().__init__(reduction=LossReduction(reduction).value)
        if other_act is not None and not callable(other_act):
            raise TypeError(f"other_act must be None or callable but is {type(other_act).__name__}.")
        if sigmoid + softmax + (other_act is not None) > 1:
            raise ValueError(
                "Incompatible values: more than 1 of [sigmoid=True, softmax=True, other_act is not None]."
            )
        class_weight = None if weight is None else torch.as_tensor(weight)
        require_weight(class_weight)
        require_classes(classes, include_background)
        require_absent(absent)
        select(backend)
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.other_act = other_act
        self.squared_pred = squared_pred
        self.batch = batch
        self.soft_label = soft_label
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index
        self.classes = classes
        self.absent = absent
        self.backend = backend

    @property
    def activation(self) -> Activation:
        """What `region_statistics` is told to make probabilities with."""
        if self.other_act is not None:
            return self.other_act
        return "softmax" if self.softmax else "sigmoid" if self.sigmoid else "none"

    @abstractmethod
    def per_class(self, statistics: RegionStatistics) -> Tensor:
        """The loss of each item and class, `[B, C]`, from the statistics `[B, C]`."""

    def terms(
        self, statistics: RegionStatistics, weight: Tensor | None, present: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what is to be reduced, one term per item and class, and which of the terms count.

        `weight`: `[]` or `[C]`; `present`: bool `[B, C]`, or None where absent classes count.
        """
        loss = self.per_class(statistics)
        return loss if weight is None else loss * weight, present

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss: `[]`, or without reduction one value per item (unless `batch`) and class."""
        statistics = region_statistics(
            input,
            target,
            activation=self.activation,
            label_map=self.to_onehot_y,
            squared=self.squared_pred,
            soft_label=self.soft_label,
            ignore_index=self.ignore_index,
            backend=self.backend,
        )
        channels = input.shape[1]
        inputs.warn_if_single(channels, self.to_onehot_y, self.include_background)
        chosen, counting = select_classes(channels, self.classes, self.include_background, self.ignore_index)
        weight = self.class_weight
        if weight is not None:
            weight = class_weights(weight.to(statistics.target), channels, chosen, counting)
        if self.batch:
            statistics = statistics.over_batch()
        statistics = statistics.of_classes(counting)
        present = statistics.target > 0 if self.absent == "skip" else None
        loss = reduce(*self.terms(statistics, weight, present), self.reduction)
        if self.reduction == "none":
            loss = loss[0] if self.batch else loss
            if self.keeps_spatial_axes:
                loss = loss.reshape(*loss.shape, *[1] * (input.ndim - 2))
        return loss.to(torch.promote_types(input.dtype, torch.float32))


class DiceLoss(RegionLoss):
    """L = 1 − (2 Σpg + s_n) / (Σp + Σg + s_d) per class, then the reduction.

    Drozdzal et al. 2016, "The Importance of Skip Connections in Biomedical Image Segmentation". With
    `squared_pred` the denominator is Σp² + Σg² + s_d (Milletari et al. 2016, "V-Net"); with `jaccard` the loss
    is that of `JaccardLoss`. Arguments as `monai.losses.DiceLoss`, then `RegionOptions`; see `RegionLoss`.

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
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            squared_pred=squared_pred,
            reduction=reduction,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            ignore_index=ignore_index,
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
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            squared_pred=squared_pred,
            reduction=reduction,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            ignore_index=ignore_index,
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
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            reduction=reduction,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            ignore_index=ignore_index,
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

    Abraham & Khan 2019, "A Novel Focal Tversky Loss Function with Improved Attention U-Net for Lesion
    Segmentation": γ = 4/3, weight 0.7 for false negatives (which they call α, here `beta`) and 0.3 for false
    positives. Libraries disagree on the exponent: one that raises 1 − TI to the power g is this loss with
    γ = 1/g; Yeung et al. 2022 raise it to 1 − g, γ = 1/(1 − g); and some take the power after the mean over the
    classes, which is another loss. γ = 1 is `TverskyLoss`. See `voxloss.formulas.focal_power` for the slope at
    a perfect prediction.

    Args:
        alpha, beta: weights ≥ 0 of false positives and false negatives, not both 0.
        gamma: γ > 0; above 1 the loss stays steep for classes that are already good.
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels.
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
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            alpha=alpha,
            beta=beta,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            reduction=reduction,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            ignore_index=ignore_index,
            **options,
        )
        inputs.require_positive(gamma=gamma)
        self.gamma = gamma

    def per_class(self, statistics: RegionStatistics) -> Tensor:
        """(1 − TI)^(1/γ)."""
        return formulas.focal_power(super().per_class(statistics), self.gamma)


class GeneralizedDiceLoss(RegionLoss):
    """L = 1 − (2 Σ_c w_c TP_c + s_n) / (Σ_c w_c (Σp_c + Σg_c) + s_d) over the classes, then the mean over items.

    Sudre et al. 2017, "Generalised Dice overlap as a deep learning loss function for highly unbalanced
    segmentations". w_c = 1/(Σg_c)², 1/Σg_c or 1, relative to the largest finite one of the item, so that the
    loss does not depend on the size of the volume; a class absent from the target has that largest weight, so
    that false positives cost. Arguments as `monai.losses.GeneralizedDiceLoss`. Without reduction: one value per
    item, or one with `batch`.

    Args:
        w_type: "square", "simple" or "uniform".
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
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            reduction=reduction,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            ignore_index=ignore_index,
            **options,
        )
        inputs.require_non_negative(smooth_nr=smooth_nr, smooth_dr=smooth_dr)
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        self.w_type = WeightType(w_type)

    def per_class(self, statistics: RegionStatistics, weight: Tensor | None = None) -> Tensor:
        """1 − GD, one value per item for all of its classes, `[B, 1]`."""
        return 1 - formulas.generalized_dice(
            statistics, self.w_type.value, self.smooth_nr, self.smooth_dr, weight
        )

    def terms(
        self, statistics: RegionStatistics, weight: Tensor | None, present: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One term per item; the class weights and absent classes enter through w_c."""
        if present is not None:
            weight = present.to(statistics.target) * (1.0 if weight is None else weight)
            present = present.any(1, keepdim=True)
        return self.per_class(statistics, weight), present
