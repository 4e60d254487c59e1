"""Powers of logarithms, of Dice and of the probability of the right class, and their sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from voxloss import formulas, inputs
from voxloss.channels import Channels
from voxloss.losses.choices import LossReduction
from voxloss.losses.compound import CompoundLoss
from voxloss.losses.options import RegionOptions, Weight, pass_options, shared_options
from voxloss.losses.overlap import DiceLoss
from voxloss.losses.voxelwise import VoxelMean
from voxloss.statistics import PassSums, RegionStatistics

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LogarithmicDiceLoss(DiceLoss):
    """L = (−log Dice)^γ per class, then the reduction; Wong et al. 2018, γ = 0.3. All else as `DiceLoss`."""

    def __init__(self, gamma: float = 0.3, **options: Any) -> None:
        super().__init__(**options)
        inputs.require_positive(gamma=gamma, smooth_nr=self.smooth_nr)
        inputs.require_score_up_to_one(self.smooth_nr, self.smooth_dr)
        self.gamma = gamma

    def per_class(self, statistics: RegionStatistics) -> Tensor:
        """(−log Dice)^γ."""
        dice = 1 - super().per_class(statistics)
        return formulas.focal_power(-dice.log(), 1 / self.gamma)


class LogarithmicCrossEntropyLoss(VoxelMean):
    """The mean over voxels of w_y (−log p_y)^γ, y the right class, w_c = √(Σ_k f_k / f_c); Wong et al. 2018.

    With a sigmoid the mean over voxels and classes, in which the negatives of a channel are a class of their own.

    Args:
        gamma: γ > 0.
        frequencies: f_c > 0, one per channel or per class that counts: how many voxels of a class there are. For
            a sigmoid the fraction of positive voxels. None: as many as in the batch.
    """

    frequencies: Tensor | None

    def __init__(
        self, gamma: float = 0.3, frequencies: Sequence[float] | Tensor | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        inputs.require_positive(gamma=gamma)
        self.gamma = gamma
        found = None if frequencies is None else torch.as_tensor(frequencies, dtype=torch.float64)
        if found is not None and (found.ndim != 1 or not bool(((found > 0) & found.isfinite()).all())):
            raise ValueError(f"frequencies: expected one finite number > 0 per class, received {frequencies!r}.")
        self.register_buffer("frequencies", found, persistent=False)

    @property
    def pass_gamma(self) -> float:
        """γ."""
        return self.gamma

    def needs(self, binary: bool) -> Sequence[str]:
        """The powers, and what the mean and the frequencies are of."""
        names = ["log_power", "log_power_negative"] if binary else ["log_power"]
        return [*names, "target", "voxels"]

    def factors(self, sums: PassSums) -> tuple[Channels, Mapping[str, Tensor | float]]:
        """w of what is there, and of what is not."""
        channels, weight = self.select(sums, "class_weight", "weight")
        if self.frequencies is not None:
            _, there = self.select(sums, "frequencies", "frequencies")
            assert isinstance(there, Tensor)
            total = 1.0 if sums.binary else self.frequencies.sum()
        elif sums.binary:
            there, total = (sums.over_batch(name, channels.numbers).detach() for name in ("target", "voxels"))
        else:
            there = sums.over_batch("target", channels.numbers).detach()
            total = sums.over_batch("target").detach().sum()
        factors: dict[str, Tensor | float] = {"log_power": weight * _root(total, there)}
        if sums.binary:
            factors["log_power_negative"] = weight * _root(total, total - there)
        return channels, factors


def _root(total: Tensor | float, part: Tensor) -> Tensor:
    """√(total / part); 0 for no part."""
    none = part <= 0
    return (total / part.masked_fill(none, 1)).masked_fill(none, 0).sqrt()


class ExponentialLogarithmicLoss(CompoundLoss):
    """L = λ_dice · mean_c (−log Dice_c)^γ_dice + λ_ce · mean_x w_y (−log p_y)^γ_ce, in one pass.

    Wong et al. 2018, "3D Segmentation with Exponential Logarithmic Loss for Highly Unbalanced Object Sizes", with
    y the right class of a voxel, f_c how many voxels of class c there are and w_c = √(Σ_k f_k / f_c): small
    classes, and what is nearly right already, keep a derivative. With a sigmoid the second term is the mean over
    voxels and classes of √(1/f_c) g (−log p)^γ + √(1/(1 − f_c)) (1 − g)(−log(1 − p))^γ, with f_c a share of the
    voxels. Below 2⁻²³ a linear segment replaces a power, so that a perfect prediction has a finite derivative.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have; `include_background`, `classes` and `absent` are of Dice
    alone.

    Args:
        reduction: "mean" or "sum".
        smooth_nr, smooth_dr: s_n > 0 and s_d ≥ s_n, in voxels; without s_n the loss of a missed class is
            infinite.
        lambda_dice, lambda_ce: λ ≥ 0.
        gamma_dice, gamma_ce: γ > 0.
        frequencies: f_c > 0 of the training set, one per channel: how many voxels of a class there are, or for a
            sigmoid their share of the voxels. None: as many as in the batch.
        weight: an additional factor ≥ 0 per channel.
    """

    weighted_parts = (("lambda_dice", "dice"), ("lambda_ce", "cross_entropy"))

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: LossReduction | str = LossReduction.MEAN,
        smooth_nr: float = 1.0,
        smooth_dr: float = 1.0,
        batch: bool = False,
        lambda_dice: float = 0.8,
        lambda_ce: float = 0.2,
        gamma_dice: float = 0.3,
        gamma_ce: float = 0.3,
        frequencies: Sequence[float] | Tensor | None = None,
        *,
        weight: Weight = None,
        soft_label: bool = False,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        inputs.require_share(lambda_dice=lambda_dice, lambda_ce=lambda_ce)
        inputs.require_positive(gamma_dice=gamma_dice, gamma_ce=gamma_ce)
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(include_background=include_background, **pass_options(options), **shared)
        self.dice = LogarithmicDiceLoss(
            gamma_dice,
            include_background=include_background,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            **shared,
            **options,
        )
        self.cross_entropy = LogarithmicCrossEntropyLoss(gamma_ce, frequencies, weight=weight, **shared)
        self.lambda_dice = lambda_dice
        self.lambda_ce = lambda_ce
