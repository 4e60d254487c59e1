"""Trainers of nnU-Net v2 whose loss is voxloss's; everything else is nnU-Net's own.

    nnUNetv2_train DATASET 3d_fullres FOLD -tr nnUNetTrainerVoxloss

What `nnUNetTrainer` configures is kept: `batch_dice` of the plans, Dice without background and with 1e-5 of
smoothing, a softmax for labels and a sigmoid for regions, the weights of deep supervision, and −1 as the loss of
a perfect prediction. On the same tensors value and gradient of `nnUNetTrainerVoxloss` are those of
`nnUNetTrainer`, except for:

* A voxel with the ignore label is equivalent to a deleted voxel. nnU-Net multiplies it by 0, and NaN · 0 is NaN.
* Regions with an ignore label: binary cross entropy is the mean over voxels and regions, as it is without an
  ignore label. nnU-Net divides the sum over voxels and regions by the number of voxels, so that with R regions it
  counts R times as much beside Dice, even if no voxel is ignored.
* Distributed training: the loss is that of one process with the whole batch. So is nnU-Net's Dice with
  `batch_dice`; all else it averages over the processes, each with a mean of its own, which differs if they have
  different numbers of samples or of voxels that are not ignored.
* Regions stay labels: the loaders do not expand them to a channel each (`ConvertSegmentationToRegionsTransform`),
  and what they send to the device is the label map. Only validation, which counts by channel, makes the channels,
  on the device.
* nnU-Net compiles its Dice on CUDA. Here nothing is compiled: loss and gradient are a pass each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from voxloss import DiceCELoss, DiceTopKLoss, FocalTverskyCELoss, TverskyCELoss
from voxloss.distributed import Group
from voxloss.integrations.nnunet.heads import fuse_segmentation_layers
from voxloss.integrations.nnunet.scale import NNUNetScale, is_by_channel
from voxloss.integrations.nnunet.skeleton import SkeletonScale, with_skeleton
from voxloss.losses.base import StatisticsLoss
from voxloss.losses.skeleton import DiceCESkeletonRecallLoss

__all__ = [
    "nnUNetTrainerVoxloss",
    "nnUNetTrainerVoxlossFocalTversky",
    "nnUNetTrainerVoxlossFused",
    "nnUNetTrainerVoxlossSkeletonRecall",
    "nnUNetTrainerVoxlossTopK",
    "nnUNetTrainerVoxlossTversky",
]


class Configured(TypedDict):
    """What nnU-Net has configured, as arguments of a compound loss."""

    include_background: bool
    to_onehot_y: bool
    sigmoid: bool
    softmax: bool
    smooth_nr: float
    smooth_dr: float
    batch: bool
    ignore_index: int | None
    group: Group
    regions: list[list[int]] | None


class nnUNetTrainerVoxloss(nnUNetTrainer):  # type: ignore[misc] # nnU-Net is untyped
    """Dice + cross entropy, nnU-Net's default loss.

    For another loss override `region_loss`.
    """

    scale: type[NNUNetScale] = NNUNetScale
    loss: Any

    def initialize(self) -> None:
        """nnU-Net's, and log the loss, which nnU-Net's log does not name."""
        super().initialize()
        scaled = self.loss.loss if isinstance(self.loss, DeepSupervisionWrapper) else self.loss
        self.print_to_log_file(f"Loss: {' '.join(str(scaled.loss).split())}, minus 1")

    def region_loss(self, **configured: Any) -> StatisticsLoss:
        """Return the loss, 0 at a perfect prediction; `configured` are the arguments that nnU-Net decides."""
        return DiceCELoss(**configured)

    @staticmethod
    def get_training_transforms(*arguments: Any, regions: Any = None, **others: Any) -> Any:
        """nnU-Net's, without those that make channels of regions."""
        return nnUNetTrainer.get_training_transforms(*arguments, regions=None, **others)

    @staticmethod
    def get_validation_transforms(*arguments: Any, regions: Any = None, **others: Any) -> Any:
        """nnU-Net's, without those that make channels of regions."""
        return nnUNetTrainer.get_validation_transforms(*arguments, regions=None, **others)

    def validation_step(self, batch: dict[str, Any]) -> Any:
        """nnU-Net's, which counts by channel."""
        if self.label_manager.has_regions:
            batch = {**batch, "target": _at_each_output(self._channels_of, batch["target"])}
        return super().validation_step(batch)

    def _channels_of(self, target: Any) -> Any:
        """Of a label map on the device one channel for each region, and one of what is ignored."""
        target = target.to(self.device, non_blocking=True)
        if is_by_channel(target):  # a trainer of one's own has them made
            return target
        labels = self.label_manager
        ignored = [] if labels.ignore_label is None else [[labels.ignore_label]]
        regions = [torch.tensor(region, device=target.device) for region in [*_regions(labels), *ignored]]
        return torch.cat([torch.isin(target, region.to(target.dtype)) for region in regions], 1)

    def _build_loss(self) -> Any:
        labels = self.label_manager
        configured: Configured = {
            "include_background": labels.has_regions,
            "to_onehot_y": not labels.has_regions,
            "sigmoid": labels.has_regions,
            "softmax": not labels.has_regions,
            "smooth_nr": 1e-5,
            "smooth_dr": 1e-5,
            "batch": self.configuration_manager.batch_dice,
            "ignore_index": labels.ignore_label,
            "group": "world" if self.is_ddp else None,
            "regions": _regions(labels) if labels.has_regions else None,
        }
        by_channel = None
        if labels.has_regions:
            by_channel = self.region_loss(**{**configured, "regions": None, "ignore_index": None})
        ignored_last = labels.ignore_label is not None
        loss = self.scale(self.region_loss(**configured), by_channel, ignored_last)
        built = super()._build_loss()
        if not isinstance(built, DeepSupervisionWrapper):
            return loss
        built.loss = loss  # the weights of the outputs stay nnU-Net's
        return built


def _at_each_output(function: Callable[[Any], Any], target: Any) -> Any:
    """With deep supervision there is a target for each output of the network."""
    return [function(each) for each in target] if isinstance(target, list) else function(target)


def _regions(labels: Any) -> list[list[int]]:
    """The labels of each region, of what nnU-Net knows as one label or several."""
    return [
        [int(region)] if isinstance(region, int) else [*map(int, region)] for region in labels.foreground_regions
    ]


class nnUNetTrainerVoxlossFused(nnUNetTrainerVoxloss):
    """Dice + cross entropy of logits that are never in memory while training, for many classes.

    The network's segmentation layers, one for each output of deep supervision, become fused heads
    (`voxloss.fuse_head`). Where that pays, the loss computes their logits tile by tile, forward and backward.
    Loss, gradients, parameters and their names are those of `nnUNetTrainerVoxloss`. In validation and prediction
    the logits are ordinary ones.

    Where nnU-Net compiles the network (on CUDA, unless nnUNet_compile=f), all but these layers is compiled, as
    one graph. A network without `decoder.seg_layers` is an error, and so is a compiled one whose decoder is not
    of nnU-Net's dynamic_network_architectures.
    """

    network: Any
    is_ddp: bool

    def initialize(self) -> None:
        """nnU-Net's, and fuse the segmentation layers of the network that it built."""
        super().initialize()
        self.fuse()

    def fuse(self) -> None:
        """Fuse the segmentation layers, and log those whose logits are not in memory in training."""
        heads = fuse_segmentation_layers(self.network.module if self.is_ddp else self.network)
        scales = self._get_deep_supervision_scales() or [[1] * len(heads[0].weight.shape[2:])]
        for head, scale in zip(heads, scales, strict=False):
            classes, features = head.weight.shape[:2]
            shape = [round(n * s) for n, s in zip(self.configuration_manager.patch_size, scale, strict=True)]
            fused = head.pays(head.weight.new_empty(1).expand(1, features, *shape))
            what = "never in memory while training" if fused else "whole, as their tiles would not pay"
            self.print_to_log_file(f"Logits of {shape}, {classes} classes of {features} features: {what}")


class nnUNetTrainerVoxlossTversky(nnUNetTrainerVoxloss):
    """Tversky + cross entropy: a false negative costs more than a false positive (α = 0.3, β = 0.7)."""

    def region_loss(self, **configured: Any) -> StatisticsLoss:
        """Return the loss, 0 at a perfect prediction."""
        return TverskyCELoss(alpha=0.3, beta=0.7, **configured)


class nnUNetTrainerVoxlossFocalTversky(nnUNetTrainerVoxloss):
    """Focal Tversky + cross entropy: (1 − TI)^(3/4) has larger gradients for nearly right classes (γ = 4/3)."""

    def region_loss(self, **configured: Any) -> StatisticsLoss:
        """Return the loss, 0 at a perfect prediction."""
        return FocalTverskyCELoss(alpha=0.3, beta=0.7, gamma=4 / 3, **configured)


class nnUNetTrainerVoxlossTopK(nnUNetTrainerVoxloss):
    """Dice + cross entropy of the 10 % of the voxels of a batch where it is largest."""

    def region_loss(self, **configured: Any) -> StatisticsLoss:
        """Return the loss, 0 at a perfect prediction."""
        return DiceTopKLoss(k=10, **configured)


class nnUNetTrainerVoxlossSkeletonRecall(nnUNetTrainerVoxloss):
    """Dice + cross entropy + skeleton recall, for thin structures: Kirchhoff et al. 2024, with all λ = 1.

    The loaders append the skeleton to the labels, so that a target has two channels, and need scikit-image.
    """

    scale = SkeletonScale
    loss: Any

    def region_loss(self, **configured: Any) -> StatisticsLoss:
        """Return the loss, 0 at a perfect prediction."""
        return DiceCESkeletonRecallLoss(**configured)

    @staticmethod
    def get_training_transforms(*arguments: Any, ignore_label: int | None = None, **others: Any) -> Any:
        """Those of `nnUNetTrainerVoxloss`, with the skeleton."""
        made = nnUNetTrainerVoxloss.get_training_transforms(*arguments, ignore_label=ignore_label, **others)
        return with_skeleton(made, ignore_label)

    @staticmethod
    def get_validation_transforms(*arguments: Any, ignore_label: int | None = None, **others: Any) -> Any:
        """Those of `nnUNetTrainerVoxloss`, with the skeleton."""
        made = nnUNetTrainerVoxloss.get_validation_transforms(*arguments, ignore_label=ignore_label, **others)
        return with_skeleton(made, ignore_label)

    def validation_step(self, batch: dict[str, Any]) -> Any:
        """nnU-Net's, which gives the loss what it counts: here the loss takes the skeleton, too."""
        loss = self.loss
        both = _at_each_output(lambda each: each.to(self.device, non_blocking=True), batch["target"])
        self.loss = lambda output, _: loss(output, both)
        try:
            return super().validation_step({**batch, "target": _at_each_output(lambda each: each[:, :1], both)})
        finally:
            self.loss = loss
