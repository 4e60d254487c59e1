"""Metrics of MONAI, torchmetrics, scikit-learn and ours, and wrong ones, against whole numbers of voxels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, MeanIoU
from torch import Tensor

from voxloss import OverlapMetric
from voxloss_verify import Claims, check_loss
from voxloss_verify.laws.record import Level, Status

pytestmark = pytest.mark.usefixtures("one_thread")

# Law 45 takes a volume of 257³.
LAWS = ["40", "41", "42", "43", "44", "46"]


def broken(of: Any, /, claims: Claims | None = None, laws: list[str] = LAWS, **kwargs: Any) -> dict[str, str]:
    """The laws that are broken, but advice, with the reasons."""
    records = check_loss(of, claims, kwargs=kwargs, laws=laws, derandomize=True)
    return {r.law: r.reason for r in records if r.status is Status.broken and r.level is not Level.interface}


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_classes": 3},
        {"include_background": False, "ignore_empty": False, "num_classes": 3},
        {"metric": "iou", "ignore_index": 255, "num_classes": 4},
        {"sigmoid": True, "ignore_empty": False, "empty": 0.0},
    ],
    ids=str,
)
def test_ours_hold(kwargs: dict[str, Any]) -> None:
    assert broken(OverlapMetric, **kwargs) == {}


@pytest.mark.parametrize("kwargs", [{}, {"include_background": False}, {"ignore_empty": False}], ids=str)
@pytest.mark.parametrize("metric", [DiceMetric, MeanIoU])
def test_monais_hold(metric: Any, kwargs: dict[str, Any]) -> None:
    assert broken(metric, **kwargs) == {}


def test_torchmetrics_dice_holds() -> None:
    segmentation = pytest.importorskip("torchmetrics.segmentation")
    for kwargs in ({}, {"average": "none"}, {"include_background": False, "aggregation_level": "global"}):
        assert broken(segmentation.DiceScore, num_classes=3, input_format="index", **kwargs) == {}


def dice_of_foreground(prediction: Tensor, reference: Tensor) -> float:
    """A function of label maps, as people write them."""
    p, g = prediction == 1, reference == 1
    total = int(p.sum() + g.sum())
    return 2 * int((p & g).sum()) / total if total else 1.0


FOREGROUND = Claims(
    family="dice_metric", labels="map", activation="softmax", channels=2, include_background=False, batch=True
)


def test_a_function_holds() -> None:
    assert broken(dice_of_foreground, FOREGROUND) == {}


def test_scikit_learns_holds() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    assert (
        broken(metrics.jaccard_score, Claims(**{**_claims(FOREGROUND), "family": "iou_metric", "empty": "worst"}))
        == {}
    )


def _claims(claims: Claims) -> dict[str, Any]:
    return {
        "labels": claims.labels,
        "activation": claims.activation,
        "channels": 2,
        "include_background": False,
        "batch": True,
    }


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (lambda p, g: 1.0 - dice_of_foreground(p, g), "40"),
        (lambda p, g: dice_of_foreground(p, g) / (2 - dice_of_foreground(p, g)), "40"),
        (lambda p, g: float("nan") if not (g == 1).any() else dice_of_foreground(p, g), "41"),
        (lambda p, g: 0.0 if not ((p == 1) | (g == 1)).any() else dice_of_foreground(p, g), "41"),
        (lambda p, g: dice_of_foreground(p, g) * (1 if (p == 1).sum() >= (g == 1).sum() else 0.9), "42"),
        (lambda p, g: dice_of_foreground(p[..., :-1], g[..., :-1]), "43"),
        (lambda p, g: dice_of_foreground(p.zero_(), g), "46"),
    ],
)
def test_a_wrong_metric_is_caught(wrong: Any, law: str) -> None:
    assert law in broken(wrong, FOREGROUND)


class Forgetful:
    """Keeps what was counted before the reset."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []
        self.resets = 0

    def __call__(self, prediction: Tensor, reference: Tensor) -> Tensor:
        scores = torch.tensor([[dice_of_foreground(p, g)] for p, g in zip(prediction, reference, strict=True)])
        self.held.append(scores)
        return scores

    def aggregate(self) -> Tensor:
        return torch.cat(self.held).mean()

    def reset(self) -> None:
        self.resets += 1


def test_a_metric_that_does_not_forget_is_caught() -> None:
    by_item = Claims(**{**_claims(FOREGROUND), "family": "dice_metric", "batch": False})
    assert "44" in broken(Forgetful(), by_item)


def test_float32_does_not_count_beyond_2_24() -> None:
    """A sum in float32, one by one."""

    def counted(p: Tensor, g: Tensor) -> float:
        def voxels(mask: Tensor) -> float:
            return float(np.add.accumulate(mask.flatten().numpy().astype(np.float32))[-1])

        both, total = voxels((p == 1) & (g == 1)), voxels(p == 1) + voxels(g == 1)
        return 2 * both / total if total else 1.0

    assert "45" in broken(counted, FOREGROUND, ["45"])
    assert broken(dice_of_foreground, FOREGROUND, ["45"]) == {}
