"""A skeleton on its way through nnU-Net: the loader appends it to the labels, the loss takes the two apart."""

from __future__ import annotations

from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import SegOnlyTransform
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from torch import Tensor

from voxloss.inputs import ShapeError
from voxloss.integrations.nnunet.scale import NNUNetScale
from voxloss.maps import Target
from voxloss.transforms import Skeletonized


class AppendSkeleton(SegOnlyTransform):  # type: ignore[misc] # batchgeneratorsv2 is untyped
    """Labels `[1, spatial...]` to `[2, spatial...]`: the labels and, by `Skeletonized`, their skeleton.

    As a channel of the segmentation the skeleton is downsampled, collated and sent to the device with the labels,
    by nnU-Net's own code; nearest neighbours on one grid keep it a subset of them.

    Args:
        ignore_label: a label that has no skeleton.
    """

    def __init__(self, ignore_label: int | None = None) -> None:
        super().__init__()
        self.skeletonized = Skeletonized("labels", ignore_index=ignore_label)

    def _apply_to_segmentation(self, segmentation: Tensor, **parameters: Any) -> Tensor:
        found = self.skeletonized({"labels": segmentation})
        return torch.cat([segmentation, found["labels_skeleton"]])


def with_skeleton(pipeline: Any, ignore_label: int | None) -> Any:
    """Insert `AppendSkeleton` into nnU-Net's transforms: last of all, but before labels are downsampled."""
    steps = pipeline.transforms
    downsampling = (place for place, step in enumerate(steps) if isinstance(step, DownsampleSegForDSTransform))
    steps.insert(next(downsampling, len(steps)), AppendSkeleton(ignore_label))
    return pipeline


class SkeletonScale(NNUNetScale):
    """`NNUNetScale` of a loss that takes a skeleton.

    `forward(net_output, target)`: logits `[B, C, spatial...]`, and `[B, 2, spatial...]`, the labels and their
    skeleton, as `AppendSkeleton` makes them.
    """

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Return the loss, `[]`."""
        if target.shape[1] != 2:
            raise ShapeError(
                "target: expected [B, 2, spatial...], the labels and their skeleton, received "
                f"{list(target.shape)}. A trainer with transforms of its own passes them through "
                "voxloss.integrations.nnunet.skeleton.with_skeleton."
            )
        value: Tensor = self.loss(net_output, Target(target[:, :1], skeleton=target[:, 1:]))
        return value - 1
