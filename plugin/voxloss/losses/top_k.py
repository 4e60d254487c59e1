"""The hardest voxels: cross entropy of the k percent of the batch where it is largest, alone and beside Dice."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from voxloss import inputs
from voxloss.channels import ignored_voxels
from voxloss.distributed import has_ranks, sum_over_ranks
from voxloss.losses.base import Annotated
from voxloss.losses.compound import CompoundLoss
from voxloss.losses.options import RegionOptions, VoxelOptions, Weight, pass_options, shared_options
from voxloss.losses.overlap import DiceLoss
from voxloss.losses.voxelwise import CrossEntropyLoss
from voxloss.maps import PassCells, Target
from voxloss.statistics import PassSums

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TopKLoss(CrossEntropyLoss):
    """The mean of −log p of the right class over the k % of the batch's voxels where it is largest.

    Wu et al. 2016, "Bridging Category-level and Instance-level Semantic Image Segmentation"; nnU-Net has k = 10.
    A first pass computes the cross entropy of each voxel, `[B, 1, spatial...]`, under a sigmoid the mean over the
    channels; of the N voxels that count the max(1, ⌊N k / 100⌋) largest are chosen, and the second pass is
    `CrossEntropyLoss` over these. Where several are equal to the smallest that is chosen, they share what is
    left. k = 100 is cross entropy.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `StatisticsLoss` explains the arguments that all losses
    share, `VoxelOptions` those that torch and MONAI do not have. A mask's weights do not decide which voxels are
    chosen, but how much these count. With a `group` they are the hardest voxels of all ranks.

    Args:
        k: percent, in (0, 100].
        weight, label_smoothing: as of `CrossEntropyLoss`, also in the choice.
    """

    one_pass = False
    unsuitable: ClassVar = {"reduction": "It is a mean over the hardest voxels of the batch."}

    def __init__(
        self,
        k: float = 10.0,
        *,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        weight: Weight = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        **options: Unpack[VoxelOptions],
    ) -> None:
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            weight=weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            **options,
        )
        inputs.require_percent(k=k)
        self.k = k

    def counting(self, input: Tensor, target: Target, mask: Tensor | None, annotated: Annotated) -> Tensor:
        """The hardest voxels."""
        chosen = self.hardest(input, target, mask, annotated)
        return chosen if mask is None else chosen * mask

    def hardest(
        self, input: Tensor, target: Target, mask: Tensor | None = None, annotated: Annotated = None
    ) -> Tensor:
        """Which voxels are chosen, `[B, 1, spatial...]` in [0, 1]: shares of those equal to the last."""
        larger, equal, share = self.choice(input, target, mask, annotated)
        return larger + equal * share.to(torch.promote_types(input.dtype, torch.float32))

    @torch.no_grad()
    def choice(
        self, input: Tensor, target: Target, mask: Tensor | None = None, annotated: Annotated = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which voxels are larger than the last that is chosen, which are equal to it, and the share of these.

        The first two are bool `[B, 1, spatial...]`, the share is `[]`.
        """
        there = None if mask is None else mask > 0
        values = self.each(input, target, there, annotated)
        labels = inputs.plain(target.labels)
        ignored = ignored_voxels(labels, input.shape[1], self.ignore_index, self.regions is not None)
        if ignored is not None:
            there = ~ignored if there is None else there & ~ignored
        if there is not None:
            there = there.expand_as(values)
            values = torch.where(there, values, -torch.inf)
        last, number = (
            self._last_over_ranks(values, there)
            if has_ranks(self.group)
            else _last_of_the_largest(values, there, self.k)
        )
        larger = (values > last) | values.isnan()  # NaN has to reach the loss
        equal = values == last
        found = self._over_ranks(torch.stack([larger.sum(), equal.sum()]).double())
        return larger, equal, (number - found[0]) / found[1].clamp(min=1)

    def _over_ranks(self, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor, self.group, self._what)

    def _last_over_ranks(self, values: Tensor, there: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same of all ranks' values: eight bits after the other, of which each is counted everywhere.

        Numbers ≥ 0 have the order of their bits.
        """
        whole = {4: torch.int32, 8: torch.int64}[values.element_size()]
        bits = (values + 0.0).flatten().view(whole).long()  # + 0, as −0 has other bits than 0
        left = torch.ones_like(bits, dtype=torch.bool) if there is None else there.flatten()
        number = (self._over_ranks(left.sum().double()) * self.k / 100).floor().clamp(min=1)
        last, wanted = bits.new_zeros(()), number
        for shift in range(8 * values.element_size() - 8, -1, -8):
            digits = (bits >> shift) & 255
            counts = torch.zeros(256, dtype=torch.float64, device=bits.device)
            counts = self._over_ranks(counts.scatter_add_(0, digits, left.double()))
            down = counts.flip(0).cumsum(0)  # how many have this digit or a larger one
            above = (down < wanted).sum()
            wanted = wanted - torch.where(above > 0, down.gather(0, (above - 1).clamp(min=0)[None])[0], 0.0)
            last = last | ((255 - above) << shift)
            left = left & (digits == 255 - above)
        return last.to(whole).view(values.dtype), number


def _last_of_the_largest(values: Tensor, there: Tensor | None, k: float) -> tuple[Tensor, Tensor | int]:
    """The smallest of the k % largest values, and how many these are."""
    flat = values.flatten()
    if there is None:
        number = max(1, int(flat.numel() * k / 100))
        return flat.kthvalue(flat.numel() - number + 1).values, number
    count = (there.sum().double() * k / 100).floor().clamp(min=1).long()
    # How many there are is not known before: sorting needs no number, and does not wait for a GPU.
    return flat.sort(descending=True).values.gather(0, count[None] - 1)[0], count


class _TopKOfCells(TopKLoss):
    """The same from a pass over all voxels, by cell of those that are chosen."""

    one_pass = True

    def compute(self, sums: PassSums) -> Tensor:
        """The loss, `[]`."""
        return super().compute(sums.of_chosen())


class DiceTopKLoss(CompoundLoss):
    """L = λ_dice · Dice + λ_top_k · cross entropy of the hardest voxels: `DiceLoss` and `TopKLoss`.

    nnU-Net's `DC_and_topk_loss`, and in Ma et al. 2021, "Loss odyssey in medical image segmentation", among the
    most robust losses on four tasks. Dice is of all voxels. A first pass without a gradient chooses the voxels,
    as in `TopKLoss`; one pass forward and one backward then compute the sums of both losses.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have; `classes` and `absent` are of Dice alone.

    Args:
        k: percent of the voxels of the batch, in (0, 100].
        smooth_nr, smooth_dr: s_n and s_d ≥ 0, in voxels.
        weight: a factor ≥ 0 per channel.
        lambda_dice, lambda_top_k: λ ≥ 0.
    """

    weighted_parts = (("lambda_dice", "dice"), ("lambda_top_k", "top_k"))
    one_pass = False
    unsuitable = TopKLoss.unsuitable

    def __init__(
        self,
        k: float = 10.0,
        *,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Weight = None,
        lambda_dice: float = 1.0,
        lambda_top_k: float = 1.0,
        label_smoothing: float = 0.0,
        soft_label: bool = False,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        inputs.require_share(lambda_dice=lambda_dice, lambda_top_k=lambda_top_k)
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, "mean", ignore_index)
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
        self.top_k = _TopKOfCells(
            k,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            weight=weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            **pass_options(options),
        )
        self.lambda_dice = lambda_dice
        self.lambda_top_k = lambda_top_k

    def _measured(
        self,
        input: Tensor,
        target: Target,
        mask: Tensor | None,
        annotated: Annotated,
        partition: PassCells | None = None,
    ) -> PassSums:
        larger, equal, share = self.top_k.choice(input, target, mask, annotated)
        numbers = 2 * larger.to(torch.int32) + equal
        chosen = PassCells(numbers, 3, torch.stack([share, torch.ones_like(share)]))
        return super()._measured(input, target, mask, annotated, chosen)
