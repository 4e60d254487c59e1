"""Many lesions: a loss of each cell of a partition, so that a small lesion counts as much as a large one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from voxloss import inputs
from voxloss.losses.base import StatisticsLoss
from voxloss.losses.choices import LossReduction
from voxloss.losses.compound import CompoundLoss, DiceCELoss
from voxloss.losses.options import RegionOptions, SharedOptions, Weight, pass_options, shared_options
from voxloss.losses.region import RegionLoss
from voxloss.losses.voxelwise import CrossEntropyLoss
from voxloss.statistics import PassSums

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CellwiseLoss(StatisticsLoss):
    """L = mean over samples of the mean over their cells of a loss, each cell as a sample of its own.

    For any formula over sums per class, and for cross entropy, on the cells of a `partition`, one per lesion. The
    sums of all cells come from one pass. The partition is a map of the target, computed in the loader, and passed
    as `partition=` or in a `Target`. Number 0 is no cell: such voxels, as of an image that was padded, do not
    count, unless the whole sample is 0. That is a sample without lesions: one cell, where everything that is
    predicted is a false positive. A class that is absent from a cell counts as one that is absent from a sample
    does in the loss; `absent="skip"` of a region loss leaves it out.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`; partition: `[B, 1, spatial...]`, whole numbers ≥ 0, of
    `voxloss.transforms.NearestComponentd`; with `joined`, of `voxloss.transforms.Componentsd`. The activation,
    the ignored label, the classes and the weights are those of `loss`.

    Args:
        loss: a region loss or `CrossEntropyLoss`.
        joined: the cells are components, each joined with the voxels of number 0, which are in none; a sample
            without a component has no part in the mean.
        cells: a number above all in a partition, such as 1 + the largest number of components. None looks it up,
            which on a GPU waits for the device, and is not possible in torch.compile.
    """

    by_cell = True

    def __init__(
        self, loss: RegionLoss | CrossEntropyLoss, joined: bool = False, cells: int | None = None
    ) -> None:
        if not isinstance(loss, RegionLoss | CrossEntropyLoss):
            remedy = (
                " CCDiceCELoss and BlobLoss are Dice and cross entropy by cell. For others make a CompoundLoss "
                "with a CellwiseLoss for each part."
                if isinstance(loss, CompoundLoss)
                else ""
            )
            raise TypeError(
                "loss: expected a region loss or CrossEntropyLoss of voxloss, received "
                f"{_described(loss)}.{remedy}"
            )
        if not loss.one_pass:
            raise TypeError(
                f"loss: expected one over all voxels, received {_described(loss)}, which chooses some. "
                "Pass a CrossEntropyLoss."
            )
        if getattr(loss, "batch", False) or loss.reduction != "mean":
            raise ValueError(
                f'loss: expected batch=False and reduction="mean", as each cell is a sample, received {loss}.'
            )
        if loss.shard == "volume":
            raise ValueError('shard: expected "batch", as each rank has cells of its own, received "volume".')
        if cells is not None:
            inputs.require_whole(1, cells=cells)
        super().__init__(
            include_background=loss.include_background,
            to_onehot_y=loss.to_onehot_y,
            sigmoid=loss.sigmoid,
            softmax=loss.softmax,
            other_act=loss.other_act,
            ignore_index=loss.ignore_index,
            backend=loss.backend,
            group=loss.group,
            shard=loss.shard,
            inplace=loss.inplace,
            regions=loss.regions,
        )
        self.loss = loss
        self.joined = joined
        self.cells = cells

    @property
    def pass_gamma(self) -> float | None:
        """That of the loss."""
        return self.loss.pass_gamma

    @property
    def map_name(self) -> str | None:  # type: ignore[override]
        """That of the loss."""
        return self.loss.map_name

    def needs(self, binary: bool) -> Sequence[str]:
        """The sums of the loss, and the number of voxels."""
        names = self.loss.needs(binary)
        return names if "voxels" in names else [*names, "voxels"]

    def compute(self, sums: PassSums) -> Tensor:
        """The loss, `[]`."""
        each = sums.of_cells(1 if self.joined else 0)
        there = sums.has_voxels()
        if self.joined:
            there = there[:, 1:]
        else:  # number 0 is a cell where there is no other one
            there = torch.cat([there[:, :1] & ~there[:, 1:].any(1, keepdim=True), there[:, 1:]], 1)
        loss, counts = self.loss.of_samples(each)
        counted = there.reshape(-1, 1).expand_as(loss)
        counted = counted if counts is None else counted & counts
        # The mean over the classes of a cell, over the cells of a sample, over the samples.
        found = torch.where(counted, loss, 0.0).sum(1) / counted.sum(1).clamp(min=1)
        found, some = found.view(there.shape), counted.any(1).view(there.shape)
        of_sample = torch.where(some, found, 0.0).sum(1) / some.sum(1).clamp(min=1)
        both = torch.stack([of_sample.sum(), some.any(1).sum().to(of_sample)])
        total, number = (both if sums.alone else sums.over_ranks(both)).unbind()
        return total / number.clamp(min=1)


def _described(loss: object) -> str:
    if isinstance(loss, type):
        return f"the class {loss.__name__} and no instance of it"
    return f"{type(loss).__module__}.{type(loss).__name__}"


class _DiceCEOfCells(CompoundLoss):
    """λ_dice · Dice + λ_ce · cross entropy, each the mean over cells."""

    weighted_parts = (("lambda_dice", "dice"), ("lambda_ce", "cross_entropy"))

    def __init__(self, whole: DiceCELoss, joined: bool, cells: int | None, **shared: Any) -> None:
        super().__init__(**shared)
        self.lambda_dice, self.lambda_ce = whole.lambda_dice, whole.lambda_ce
        self.dice = CellwiseLoss(whole.dice, joined, cells)
        self.cross_entropy = CellwiseLoss(whole.cross_entropy, joined, cells)


class _Lesionwise(CompoundLoss):
    """λ_global · DiceCE of whole samples + λ_lesion · DiceCE of cells."""

    weighted_parts = (("lambda_global", "whole"), ("lambda_lesion", "lesions"))
    unsuitable: ClassVar = {
        "batch": "Cells are those of a sample, each with sums of its own.",
        "reduction": "It is a mean over cells and samples.",
    }
    _joined: bool

    def __init__(
        self,
        lambda_global: float,
        lambda_lesion: float,
        cells: int | None,
        shared: SharedOptions,
        options: RegionOptions,
        include_background: bool | None,
        **of_whole: Any,
    ) -> None:
        inputs.require_share(lambda_global=lambda_global, lambda_lesion=lambda_lesion)
        self.leaves_background_out = include_background is None
        if include_background is None:
            include_background = options.get("regions") is not None
        own = {"include_background": include_background, **pass_options(options), **shared}
        super().__init__(**own)
        self.lambda_global, self.lambda_lesion = lambda_global, lambda_lesion
        self.whole = DiceCELoss(include_background=include_background, **of_whole, **shared, **options)
        self.lesions = _DiceCEOfCells(self.whole, self._joined, cells, **own)


class CCDiceCELoss(_Lesionwise):
    """L = λ_lesion · mean over cells of L₀ + λ_global · L₀ of whole samples; L₀ = λ_dice Dice + λ_ce CE.

    Bouteille et al. 2025, "Learning to Look Closer: A New Instance-Wise Loss for Small Cerebral Lesion
    Segmentation" (arXiv 2511.17146), after the metric of Jaus et al. 2024, "Every Component Counts". A cell is
    what is nearest to one lesion: a missed lesion has the same Dice whatever its size, and a false positive
    counts against the lesion next to it. The mean is over the cells of a sample, then over the samples; a sample
    without lesions is one cell. All sums come from one pass. `CellwiseLoss` explains the partition. The terms of
    `with_terms` are "lesions" and "whole".

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`; partition: `[B, 1, spatial...]`, of
    `voxloss.transforms.NearestComponentd`. `RegionLoss` explains the arguments that all losses share,
    `RegionOptions` those that MONAI does not have; `classes` and `absent` are of Dice alone.

    Args:
        include_background: of Dice. None: False, as nearly all of a cell is background; True with `regions`,
            which have no background.
        smooth_nr, smooth_dr: s_n and s_d ≥ 0 of Dice, in voxels.
        weight: a factor ≥ 0 per channel.
        lambda_dice, lambda_ce, lambda_lesion, lambda_global: λ ≥ 0.
        label_smoothing: of cross entropy.
        cells: as of `CellwiseLoss`.
    """

    _joined = False

    def __init__(
        self,
        include_background: bool | None = None,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        weight: Weight = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        lambda_lesion: float = 1.0,
        lambda_global: float = 0.0,
        label_smoothing: float = 0.0,
        *,
        cells: int | None = None,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        super().__init__(
            lambda_global,
            lambda_lesion,
            cells,
            shared_options(to_onehot_y, sigmoid, softmax, other_act, LossReduction.MEAN, ignore_index),
            options,
            include_background=include_background,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            weight=weight,
            lambda_dice=lambda_dice,
            lambda_ce=lambda_ce,
            label_smoothing=label_smoothing,
        )


class BlobLoss(_Lesionwise):
    """L = λ_global · L₀ of whole samples + λ_lesion · mean over components of L₀; L₀ = λ_dice Dice + λ_ce CE.

    Kofler et al. 2022, "blob loss: instance imbalance aware loss functions for semantic segmentation", with 2 and
    1 for λ. L₀ of a component is that of the voxels of the component and of all voxels in none, so that false
    positives count in each of them. The mean is over the components of a sample, then over the samples that have
    one. All sums come from one pass. `CellwiseLoss` explains the partition.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`; partition: `[B, 1, spatial...]`, of
    `voxloss.transforms.Componentsd`. `RegionLoss` explains the arguments that all losses share, `RegionOptions`
    those that MONAI does not have; `classes` and `absent` are of Dice alone.

    Args:
        include_background: of Dice; None as in `CCDiceCELoss`.
        smooth_nr, smooth_dr: s_n and s_d ≥ 0 of Dice, in voxels.
        weight: a factor ≥ 0 per channel.
        lambda_dice, lambda_ce, lambda_global, lambda_lesion: λ ≥ 0.
        label_smoothing: of cross entropy.
        cells: as of `CellwiseLoss`.
    """

    _joined = True

    def __init__(
        self,
        include_background: bool | None = None,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        weight: Weight = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        lambda_global: float = 2.0,
        lambda_lesion: float = 1.0,
        label_smoothing: float = 0.0,
        *,
        cells: int | None = None,
        ignore_index: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        super().__init__(
            lambda_global,
            lambda_lesion,
            cells,
            shared_options(to_onehot_y, sigmoid, softmax, other_act, LossReduction.MEAN, ignore_index),
            options,
            include_background=include_background,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            weight=weight,
            lambda_dice=lambda_dice,
            lambda_ce=lambda_ce,
            label_smoothing=label_smoothing,
        )
