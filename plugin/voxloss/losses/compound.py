"""Weighted sums of losses over ONE pass: a region loss, and a voxel-wise mean."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

from torch import Tensor

from voxloss import inputs
from voxloss.backends.voxels import TERMS
from voxloss.losses.base import Annotated, LossTerm, StatisticsLoss, loss_dtype
from voxloss.losses.choices import LossReduction, WeightType
from voxloss.losses.options import RegionOptions, Weight, pass_options, shared_options
from voxloss.losses.overlap import DiceLoss, FocalTverskyLoss, GeneralizedDiceLoss, TverskyLoss
from voxloss.losses.voxelwise import CrossEntropyLoss, FocalLoss, times
from voxloss.maps import Maps, Target, with_maps
from voxloss.statistics import PassSums

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CompoundLoss(StatisticsLoss):
    """L = Σ_k λ_k L_k, where all L_k are computed from the sums of the same pass.

    A subclass sets its losses and their λ as attributes in `__init__`, and names these in `weighted_parts`.
    Classes, weights and reductions are options of the parts; the activation, the ignored label, the backend and
    the group are those of the compound. λ is read at every call, so that it may follow a schedule. `with_terms`
    returns the terms as well as their sum.
    """

    def __init__(self, **shared: Any) -> None:
        if shared.get("reduction") == LossReduction.NONE:
            raise ValueError(
                'reduction: expected "mean" or "sum", received "none": a compound has values of regions and of '
                "voxels."
            )
        super().__init__(**shared)

    @property
    @abstractmethod
    def weighted_parts(self) -> Sequence[tuple[str, str]]:
        """The names of the attributes that hold λ_k and L_k, as in `(("lambda_dice", "dice"),)`."""

    def parts(self) -> Sequence[tuple[float, StatisticsLoss]]:
        """λ_k and L_k."""
        return [(getattr(self, factor), getattr(self, part)) for factor, part in self.weighted_parts]

    @property
    def map_name(self) -> str | None:  # type: ignore[override]
        """The map of those parts that need one."""
        found = {part.map_name for _, part in self.parts()} - {None}
        if len(found) > 1:
            raise ValueError(
                f"parts: expected losses that need the same map, received {sorted(map(str, found))}."
            )
        return found.pop() if found else None

    @property
    def by_cell(self) -> bool:  # type: ignore[override]
        """Whether a part needs the sums of each cell."""
        return any(part.by_cell for _, part in self.parts())

    @property
    def cells(self) -> int | None:  # type: ignore[override]
        """The largest number of cells that a part is given."""
        found = [part.cells for _, part in self.parts() if part.cells is not None]
        return max(found) if found else None

    @property
    def pass_gamma(self) -> float | None:
        """The γ of those parts that have one."""
        found = {part.pass_gamma for _, part in self.parts()} - {None}
        if len(found) > 1:
            raise ValueError(
                f"gamma: expected one for all parts of a compound, received {sorted(map(str, found))}."
            )
        return found.pop() if found else None

    def needs(self, binary: bool) -> Sequence[str]:
        """The sums that any part needs."""
        for _, part in self.parts():
            if not part.one_pass:
                raise TypeError(
                    f"parts: expected losses of one pass, received {type(part).__name__}, which needs one of "
                    "its own. Add its value to that of the compound: compound(x, y) + loss(x, y)."
                )
        needed = {name for _, part in self.parts() for name in part.needs(binary)}
        return [name for name in TERMS if name in needed]

    def compute(self, sums: PassSums) -> Tensor:
        """The sum, `[]`."""
        return _total(self._terms(sums))

    def with_terms(
        self,
        input: Tensor,
        target: Tensor | Target,
        mask: Tensor | None = None,
        annotated: Annotated = None,
        **maps: Unpack[Maps],
    ) -> tuple[Tensor, dict[str, LossTerm]]:
        """Return the loss and its terms by the names of its parts."""

        def compute(sums: PassSums) -> tuple[Tensor, list[LossTerm]]:
            terms = self._terms(sums)
            return _total(terms), terms

        total, terms = self.from_pass(compute, input, with_maps(target, maps), mask, annotated)
        dtype = loss_dtype(input)
        names = (part for _, part in self.weighted_parts)
        detached = (LossTerm(*(value.detach().to(dtype) for value in term)) for term in terms)
        return total.to(dtype), dict(zip(names, detached, strict=True))

    def _terms(self, sums: PassSums) -> list[LossTerm]:
        found = ((factor, part.compute(sums)) for factor, part in self.parts())
        return [LossTerm(value, times(factor, value)) for factor, value in found]


def _total(terms: Sequence[LossTerm]) -> Tensor:
    return reduce(add, (term.weighted for term in terms))


class DiceCELoss(CompoundLoss):
    """L = λ_dice · Dice + λ_ce · cross entropy, in one pass: `DiceLoss` and `CrossEntropyLoss`.

    The loss of nnU-Net (Isensee et al. 2021). Arguments as `monai.losses.DiceCELoss`: `include_background`,
    `squared_pred`, `jaccard`, the smoothing and `batch` are those of Dice alone, cross entropy takes all classes;
    `weight` and `reduction` are of both. Cross entropy is that of the activation: of a sigmoid the binary one of
    each channel, where MONAI takes the softmax's; given probabilities are those of one label per voxel.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have; `classes` and `absent` are of Dice alone.

    Args:
        reduction: "mean" or "sum".
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels.
        weight: a factor ≥ 0 per channel.
        lambda_dice, lambda_ce: λ ≥ 0.
        label_smoothing: of cross entropy.
    """

    weighted_parts = (("lambda_dice", "dice"), ("lambda_ce", "cross_entropy"))

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
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
        *,
        soft_label: bool = False,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        inputs.require_share(lambda_dice=lambda_dice, lambda_ce=lambda_ce)
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(include_background=include_background, **pass_options(options), **shared)
        self.dice = DiceLoss(
            include_background=include_background,
            squared_pred=squared_pred,
            jaccard=jaccard,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            **shared,
            **options,
        )
        self.cross_entropy = CrossEntropyLoss(weight=weight, label_smoothing=label_smoothing, **shared)
        self.lambda_dice = lambda_dice
        self.lambda_ce = lambda_ce


class DiceFocalLoss(CompoundLoss):
    """L = λ_dice · Dice + λ_focal · focal loss, in one pass: `DiceLoss` and `FocalLoss`.

    Arguments as `monai.losses.DiceFocalLoss`: `include_background`, `weight` and `reduction` are of both losses.
    The focal loss is that of the activation: of a softmax the one with one term per voxel, where MONAI takes the
    sigmoid's; given probabilities are those of one label per voxel.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have; `classes` and `absent` are of Dice alone.

    Args:
        reduction: "mean" or "sum".
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels.
        gamma, alpha: γ ≥ 0 and α of the focal loss.
        weight: a factor ≥ 0 per channel.
        lambda_dice, lambda_focal: λ ≥ 0.
    """

    weighted_parts = (("lambda_dice", "dice"), ("lambda_focal", "focal"))

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
        gamma: float = 2.0,
        weight: Weight = None,
        lambda_dice: float = 1.0,
        lambda_focal: float = 1.0,
        alpha: float | Sequence[float] | None = None,
        *,
        soft_label: bool = False,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        inputs.require_share(lambda_dice=lambda_dice, lambda_focal=lambda_focal)
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(include_background=include_background, **pass_options(options), **shared)
        self.dice = DiceLoss(
            include_background=include_background,
            squared_pred=squared_pred,
            jaccard=jaccard,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            **shared,
            **options,
        )
        self.focal = FocalLoss(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            gamma=gamma,
            alpha=alpha,
            weight=weight,
            reduction=reduction,
            use_softmax=softmax,
            ignore_index=ignore_index,
        )
        self.lambda_dice = lambda_dice
        self.lambda_focal = lambda_focal


class GeneralizedDiceFocalLoss(CompoundLoss):
    """L = λ_gdl · Generalized Dice + λ_focal · focal loss, in one pass: `GeneralizedDiceLoss` and `FocalLoss`.

    Arguments as `monai.losses.GeneralizedDiceFocalLoss`: `include_background` and `reduction` are of both losses,
    `weight` of the focal loss alone, which is that of the activation as in `DiceFocalLoss`.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have; `classes` and `absent` are of Generalized Dice alone.

    Args:
        w_type: "square", "simple" or "uniform", of Generalized Dice.
        reduction: "mean" or "sum".
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels of the smallest class.
        gamma: γ ≥ 0 of the focal loss.
        weight: a factor ≥ 0 per channel, of the focal loss.
        lambda_gdl, lambda_focal: λ ≥ 0.
    """

    weighted_parts = (("lambda_gdl", "generalized_dice"), ("lambda_focal", "focal"))

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
        gamma: float = 2.0,
        weight: Weight = None,
        lambda_gdl: float = 1.0,
        lambda_focal: float = 1.0,
        *,
        soft_label: bool = False,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        inputs.require_share(lambda_gdl=lambda_gdl, lambda_focal=lambda_focal)
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(include_background=include_background, **pass_options(options), **shared)
        self.generalized_dice = GeneralizedDiceLoss(
            include_background=include_background,
            w_type=w_type,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            soft_label=soft_label,
            **shared,
            **options,
        )
        self.focal = FocalLoss(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            gamma=gamma,
            weight=weight,
            reduction=reduction,
            use_softmax=softmax,
            ignore_index=ignore_index,
        )
        self.lambda_gdl = lambda_gdl
        self.lambda_focal = lambda_focal


class TverskyCELoss(CompoundLoss):
    """L = λ_tversky · Tversky + λ_ce · cross entropy, in one pass: `TverskyLoss` and `CrossEntropyLoss`.

    Arguments as `TverskyLoss` and, from λ on, as `DiceCELoss`.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have; `include_background`, `classes` and `absent` are of
    Tversky alone.

    Args:
        alpha, beta: weights ≥ 0 of false positives and false negatives, not both 0.
        reduction: "mean" or "sum".
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels.
        weight: a factor ≥ 0 per channel.
        lambda_tversky, lambda_ce: λ ≥ 0.
        label_smoothing: of cross entropy.
    """

    weighted_parts = (("lambda_tversky", "tversky"), ("lambda_ce", "cross_entropy"))

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
        weight: Weight = None,
        lambda_tversky: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
        *,
        soft_label: bool = False,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        inputs.require_share(lambda_tversky=lambda_tversky, lambda_ce=lambda_ce)
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(include_background=include_background, **pass_options(options), **shared)
        self.tversky = TverskyLoss(
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
        self.cross_entropy = CrossEntropyLoss(weight=weight, label_smoothing=label_smoothing, **shared)
        self.lambda_tversky = lambda_tversky
        self.lambda_ce = lambda_ce


class FocalTverskyCELoss(CompoundLoss):
    """L = λ_tversky · (1 − TI)^(1/γ) + λ_ce · cross entropy: of `FocalTverskyLoss` and `CrossEntropyLoss`.

    Arguments as `FocalTverskyLoss` and, from λ on, as `DiceCELoss`.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have; `include_background`, `classes` and `absent` are of
    Tversky alone.

    Args:
        alpha, beta: weights ≥ 0 of false positives and false negatives, not both 0.
        gamma: γ > 0 of `FocalTverskyLoss`.
        reduction: "mean" or "sum".
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels; s_n ≤ s_d unless γ = 1.
        weight: a factor ≥ 0 per channel.
        lambda_tversky, lambda_ce: λ ≥ 0.
        label_smoothing: of cross entropy.
    """

    weighted_parts = (("lambda_tversky", "focal_tversky"), ("lambda_ce", "cross_entropy"))

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
        weight: Weight = None,
        lambda_tversky: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
        *,
        soft_label: bool = False,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        inputs.require_share(lambda_tversky=lambda_tversky, lambda_ce=lambda_ce)
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(include_background=include_background, **pass_options(options), **shared)
        self.focal_tversky = FocalTverskyLoss(
            include_background=include_background,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            **shared,
            **options,
        )
        self.cross_entropy = CrossEntropyLoss(weight=weight, label_smoothing=label_smoothing, **shared)
        self.lambda_tversky = lambda_tversky
        self.lambda_ce = lambda_ce


class ComboLoss(CompoundLoss):
    """L = α · weighted cross entropy + (1 − α) · (1 − Dice), in one pass.

    Taghanaki et al. 2019, "Combo loss: Handling input and output imbalance in multi-organ segmentation", with
    −(1 − α) · Dice; here a perfect prediction costs 0. Weighted cross entropy is the mean over voxels and classes
    of −β g log p − (1 − β)(1 − g) log(1 − p); of a softmax, with one right class per voxel, the mean over voxels
    of −β log p_y, and −(1 − β) log p_y where the background is right.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have; `include_background`, `classes` and `absent` are of Dice
    alone.

    Args:
        alpha: α in [0, 1], the share of cross entropy.
        beta: β in [0, 1]; above ½ what is missed costs more than what is predicted wrongly.
        reduction: "mean" or "sum".
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels.
        weight: a factor ≥ 0 per channel.
    """

    weighted_parts = (("alpha", "cross_entropy"), ("lambda_dice", "dice"))

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
        weight: Weight = None,
        *,
        soft_label: bool = False,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        inputs.require_fraction(alpha=alpha, beta=beta)
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(include_background=include_background, **pass_options(options), **shared)
        self.dice = DiceLoss(
            include_background=include_background,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            **shared,
            **options,
        )
        self.cross_entropy = FocalLoss(
            to_onehot_y=to_onehot_y,
            gamma=0.0,
            alpha=beta,
            weight=weight,
            reduction=reduction,
            use_softmax=softmax,
            ignore_index=ignore_index,
        )
        self.alpha = alpha

    @property
    def lambda_dice(self) -> float:
        """1 − α."""
        return 1 - self.alpha
