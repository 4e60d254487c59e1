"""A target with maps in the wrappers of others: deep supervision, and what it is not for."""

from __future__ import annotations

from typing import Any

import monai.losses
import pytest
import torch
import torch.nn.functional as F

import voxloss
from volumes import label_map, logits
from voxloss import BlobLoss, DiceBoundaryLoss, DiceCESkeletonRecallLoss, DiceLoss, StatisticsLoss, Target
from voxloss_app.bench.memory import allocated_peak

MAP: dict[str, Any] = {"softmax": True, "to_onehot_y": True}
LABELS = label_map(spatial=(8, 8, 8))
LINES = torch.where(torch.rand(LABELS.shape, generator=torch.Generator().manual_seed(0)) < 0.5, LABELS, 0)
DISTANCE = logits(spatial=(8, 8, 8), dtype=torch.float32)
CELLS = (torch.arange(8) // 3).int().expand(LABELS.shape).contiguous()
LOSSES: list[StatisticsLoss] = [
    DiceCESkeletonRecallLoss(**MAP),
    DiceBoundaryLoss(**MAP),
    BlobLoss(**MAP),
    DiceLoss(**MAP),
]


def halved(target: Target) -> Any:
    """Each second voxel, as `nearest-exact` takes them."""
    volumes: Any = [None if each is None else each[..., 1::2, 1::2, 1::2] for each in target]
    return Target(*volumes)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_deep_supervision_of_monai_resizes_maps_with_the_labels(dtype: torch.dtype, loss: StatisticsLoss) -> None:
    outputs = [logits(spatial=(edge, edge, edge), dtype=torch.float32) for edge in (8, 4)]
    target: Any = Target(LABELS.to(dtype), LINES.to(dtype), DISTANCE, CELLS)
    found = monai.losses.DeepSupervisionLoss(loss)(outputs, target)
    torch.testing.assert_close(found, loss(outputs[0], target) + 0.5 * loss(outputs[1], halved(target)))


def test_maps_keep_their_kind_when_they_are_resized() -> None:
    target: Any = Target(LABELS.to(torch.uint8), LINES, None, CELLS)
    found: Any = F.interpolate(target, (4, 4, 4), mode="nearest-exact")
    assert isinstance(found, Target)
    assert found.distance is None
    for one, other in zip(found, halved(target), strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other))


def test_deep_supervision_of_nnunet_takes_a_list() -> None:
    nnunet = pytest.importorskip("nnunetv2.training.loss.deep_supervision")
    outputs = [logits(spatial=(edge, edge, edge), dtype=torch.float32) for edge in (8, 4)]
    target = Target(LABELS, LINES, DISTANCE, CELLS)
    loss = DiceCESkeletonRecallLoss(**MAP)
    found = nnunet.DeepSupervisionWrapper(loss, [1.0, 0.5])(outputs, [target, halved(target)])
    torch.testing.assert_close(found, loss(outputs[0], target) + 0.5 * loss(outputs[1], halved(target)))


def test_a_target_with_maps_is_no_tensor() -> None:
    target: Any = Target(LABELS, LINES)
    with pytest.raises(TypeError, match="Target: expected as the target of a loss, received as that of sum"):
        torch.sum(target)


@pytest.mark.parametrize(
    "name",
    [
        "SkeletonRecallLoss",
        "DiceCESkeletonRecallLoss",
        "BoundaryLoss",
        "DiceBoundaryLoss",
        "CCDiceCELoss",
        "BlobLoss",
        "TopKLoss",
        "DiceTopKLoss",
    ],
)
def test_memory_is_that_of_the_gradient(name: str) -> None:
    """Beside the map, which the loader made: a copy of a label map in float32 would be half as large again."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 14, 32, 32, 32, generator=random).requires_grad_()
    labels = torch.randint(14, (1, 1, 32, 32, 32), generator=random).to(torch.uint8)
    target = Target(
        labels,
        skeleton=labels,
        distance=torch.randn(logits.shape, generator=random),
        partition=torch.ones_like(labels, dtype=torch.int32),
    )
    mask = labels > 1
    loss = getattr(voxloss, name)(softmax=True, to_onehot_y=True, backend="numba_cpu")
    loss(logits, target, mask).backward()  # compiled
    logits.grad = None
    peak = allocated_peak(lambda: loss(logits, target, mask).backward(), "cpu")
    of_top_k = 1 / 14 if "TopK" in name else 0.0  # cross entropy of each voxel
    assert 1 <= peak / (4 * logits.numel()) < 1.1 + of_top_k
