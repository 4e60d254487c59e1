"""The unified focal loss, and its two parts, in which background and foreground differ."""

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
from voxloss.losses.overlap import TverskyLoss
from voxloss.losses.voxelwise import VoxelMean
from voxloss.statistics import PassSums, RegionStatistics

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ModifiedFocalLoss(VoxelMean):
    """The mean over voxels of −δ (1 − p_y)^γ log p_y, y the right class; 1 − δ for the background.

    Yeung et al. 2022. `asymmetric`: (1 − p)^γ for the background only. With a sigmoid each channel is foreground
    and its negatives are background: the mean over voxels and classes of −δ g log p − (1 − δ)(1 − g) p^γ log(1 −
        p).
    """

    def __init__(self, delta: float = 0.6, gamma: float = 0.5, asymmetric: bool = True, **options: Any) -> None:
        super().__init__(**options)
        inputs.require_fraction(delta=delta)
        inputs.require_non_negative(gamma=gamma)
        self.delta = delta
        self.gamma = gamma
        self.asymmetric = asymmetric

    @property
    def pass_gamma(self) -> float:
        """γ."""
        return self.gamma

    def needs(self, binary: bool) -> Sequence[str]:
        """Focal sums, cross entropy, and what the mean is over."""
        names = ["cross_entropy"] if self.asymmetric else ["focal"]
        other = "focal_negative" if binary else "focal"
        return [*names, *([other] if other not in names else []), "voxels"]

    def factors(self, sums: PassSums) -> tuple[Channels, Mapping[str, Tensor | float]]:
        """δ for the foreground, 1 − δ for the background."""
        channels, weight = self.select(sums, "class_weight", "weight")
        rare, common = weight * self.delta, weight * (1 - self.delta)
        if sums.binary:
            return channels, {"cross_entropy" if self.asymmetric else "focal": rare, "focal_negative": common}
        background = channels.is_background(sums.tensor)
        common, rare = common * background, rare * (1 - background)
        if not self.asymmetric:
            return channels, {"focal": common + rare}
        return channels, {"focal": common, "cross_entropy": rare}


class EnhancedTverskyLoss(TverskyLoss):
    """L = (1 − TI)^(1−γ) per class, then the reduction; `asymmetric`: without the power for the background.

    Yeung et al. 2022. The background is channel 0 of mutually exclusive classes (no sigmoid).
    """

    def __init__(self, gamma: float = 0.5, asymmetric: bool = True, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma: expected a number in [0, 1), received {gamma!r}.")
        if gamma:
            inputs.require_score_up_to_one(self.smooth_nr, self.smooth_dr)
        self.gamma = gamma
        self.asymmetric = asymmetric

    def per_class(self, statistics: RegionStatistics, channels: Channels) -> Tensor:  # type: ignore[override]
        """(1 − TI)^(1−γ), of the background perhaps 1 − TI."""
        distance = super().per_class(statistics)
        power = formulas.focal_power(distance, 1 / (1 - self.gamma))
        if not self.asymmetric or channels.background is None:
            return power
        return torch.where(channels.is_background(distance) > 0, distance, power)


class UnifiedFocalLoss(CompoundLoss):
    """L = λ · modified focal loss + (1 − λ) · enhanced Tversky loss, in one pass, for any number of classes.

    Yeung et al. 2022, "Unified Focal loss: Generalising Dice and cross entropy-based losses to handle class
    imbalanced medical image segmentation". With r the foreground and b the background:

    * focal, the mean over voxels: −δ log p where a voxel is r, −(1 − δ)(1 − p)^γ log p where it is b;
    * Tversky, the mean over classes: (1 − TI)^(1−γ) of r, 1 − TI of b, with
      TI = (TP + s_n) / (TP + δ FN + (1 − δ) FP + s_d).

    The exponents are those of the authors' code, γ for the focal and 1 − γ for the Tversky part (the paper has
    them the other way round; at γ = ½ it is the same). `asymmetric=False` treats r and b alike, but for δ. The
    background is channel 0; with a sigmoid or a single channel each channel is foreground.
    It is not a drop-in replacement of `monai.losses.AsymmetricUnifiedFocalLoss` (MONAI 1.6.1), which divides the
    focal part by two, takes probabilities only, uses only the first two classes, and has δ = 0.7 by default.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have; `classes` and `absent` are of Tversky alone,
    `include_background` is of both.

    Args:
        delta: δ in [0, 1], the weight of false negatives and of the foreground.
        gamma: γ in [0, 1).
        lambda_focal: λ in [0, 1].
        asymmetric: whether the powers are of the background (focal) and of the foreground (Tversky) only.
        reduction: "mean" or "sum".
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels; s_n ≤ s_d unless γ = 0.
        weight: a factor ≥ 0 per channel.
    """

    weighted_parts = (("lambda_focal", "focal"), ("lambda_tversky", "focal_tversky"))

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        delta: float = 0.6,
        gamma: float = 0.5,
        lambda_focal: float = 0.5,
        asymmetric: bool = True,
        reduction: LossReduction | str = LossReduction.MEAN,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        *,
        weight: Weight = None,
        soft_label: bool = False,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        inputs.require_fraction(lambda_focal=lambda_focal, delta=delta)
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(include_background=include_background, **pass_options(options), **shared)
        self.focal = ModifiedFocalLoss(
            delta, gamma, asymmetric, include_background=include_background, weight=weight, **shared
        )
        self.focal_tversky = EnhancedTverskyLoss(
            gamma,
            asymmetric,
            include_background=include_background,
            alpha=1 - delta,
            beta=delta,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            **shared,
            **options,
        )
        self.delta = delta
        self.gamma = gamma
        self.lambda_focal = lambda_focal
        self.asymmetric = asymmetric

    @property
    def lambda_tversky(self) -> float:
        """1 − λ."""
        return 1 - self.lambda_focal
