"""Metrics of MONAI, torchmetrics, scikit-learn and ours, and wrong ones, against whole numbers of voxels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from monai.metrics import DiceMetric, GeneralizedDiceScore, MeanIoU
from torch import Tensor

from voxloss import OverlapMetric
from voxloss_verify import Claims, check_loss
from voxloss_verify.laws.record import Status
from voxloss_verify.oracle import hard
from voxloss_verify.oracle.volumes import Volume, one_hot
from voxloss_verify.request import Level
from voxloss_verify.subject.functions import claims_of_function
from voxloss_verify.subject.readers import claims_of

pytestmark = pytest.mark.usefixtures("one_thread")

# Law 45 takes a volume of 257³.
LAWS = ["40", "41", "42", "43", "44", "46"]


def broken(of: Any, /, claims: Claims | None = None, laws: list[str] = LAWS, **kwargs: Any) -> dict[str, str]:
    """The laws that are broken, but advice, with the reasons."""
    records = check_loss(of, claims, kwargs=kwargs, laws=laws, derandomize=True)
    return {r.law: r.reason for r in records if r.status is Status.broken and r.level is not Level.interface}


@pytest.mark.sampled(3)
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


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kwargs", [{}, {"include_background": False}, {"ignore_empty": False}], ids=str)
@pytest.mark.parametrize("metric", [DiceMetric, MeanIoU])
def test_monais_hold(metric: Any, kwargs: dict[str, Any]) -> None:
    assert broken(metric, **kwargs) == {}


@pytest.mark.integration
def test_torchmetrics_dice_holds() -> None:
    segmentation = pytest.importorskip("torchmetrics.segmentation")
    for kwargs in ({}, {"average": "none"}, {"include_background": False, "aggregation_level": "global"}):
        assert broken(segmentation.DiceScore, num_classes=3, input_format="index", **kwargs) == {}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("weight_type", ["square", "simple", "uniform"])
def test_monais_generalized_dice_holds(weight_type: str) -> None:
    assert broken(GeneralizedDiceScore, weight_type=weight_type) == {}


@pytest.mark.integration
def test_torchmetrics_generalized_dice() -> None:
    """The weight of a class that a sample's reference lacks is one of other samples of the batch."""
    segmentation = pytest.importorskip("torchmetrics.segmentation")
    metric = segmentation.GeneralizedDiceScore
    labels: dict[str, Any] = {"num_classes": 3, "input_format": "index"}
    assert broken(metric, **labels, weight_type="linear") == {}
    assert {*broken(metric, **labels)} <= {"40", "43", "44"}
    claims = claims_of(metric(**labels))
    assert claims is not None
    alone = labels_of([[0, 0, 1, 2]]), labels_of([[0, 0, 1, 1]])
    assert float(metric(**labels)(*(image[:, 0] for image in alone))) == pytest.approx(_value(claims, *alone))


def labels_of(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows)[:, None, :, None, None]


def _value(claims: Claims, prediction: Tensor, reference: Tensor) -> float:
    masks = one_hot(prediction.numpy(), 3).astype(np.float64)
    return float(hard.value(claims, Volume("by hand", masks, reference.numpy())).squeeze())


def test_generalized_dice_by_hand() -> None:
    """TP 2, 1, 0; P 2, 1, 1; G 2, 2, 0."""
    claims = Claims(family="generalized_dice_metric", labels="map", activation="softmax", reduction="none")
    pair = labels_of([[0, 0, 1, 2]]), labels_of([[0, 0, 1, 1]])
    weight_type: Any
    for weight_type, weights in (("square", (1 / 4, 1 / 4)), ("simple", (1 / 2, 1 / 2)), ("uniform", (1, 1))):
        first, second = weights
        known = replace(claims, weight_type=weight_type)
        numerator = 2 * (2 * first + second)
        below = 4 * first + 3 * second
        assert _value(known, *pair) == pytest.approx(numerator / (below + second))
        assert _value(replace(known, absent="skip"), *pair) == pytest.approx(numerator / below)
    nothing = labels_of([[0, 0]]), labels_of([[0, 0]])
    foreground = replace(claims, include_background=False)
    assert _value(foreground, *nothing) == 1
    assert _value(replace(foreground, empty="worst"), *nothing) == 0


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


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"average": "macro"},
        {"average": "macro", "labels": [0, 1, 2], "zero_division": 1},
        {"average": None, "labels": [1, 2]},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["jaccard_score", "f1_score"])
def test_scikit_learns_hold(name: str, kwargs: dict[str, Any]) -> None:
    assert broken(getattr(sklearn.metrics, name), **kwargs) == {}


@pytest.mark.integration
def test_nnunets_holds() -> None:
    predictions = pytest.importorskip("nnunetv2.evaluation.evaluate_predictions")
    iou = replace_family("iou_metric")
    for kwargs in ({"labels_or_regions": [0, 1, 2]}, {"labels_or_regions": [1, 2], "ignore_label": 3}):
        assert broken(predictions.compute_metrics, **kwargs) == {}
        assert broken(predictions.compute_metrics, iou(kwargs), **kwargs) == {}


def replace_family(family: Any) -> Callable[[dict[str, Any]], Claims]:
    """What nnU-Net's function claims, of its other score."""

    def claims(kwargs: dict[str, Any]) -> Claims:
        function = import_module("nnunetv2.evaluation.evaluate_predictions").compute_metrics
        read = claims_of_function(function, kwargs)
        assert read is not None
        return replace(read, family=family)

    return claims


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"average": "micro"}, "average"),
        ({"average": None}, "labels"),
        ({"average": "macro", "labels": ["a"]}, "labels"),
        ({"pos_label": 2}, "pos_label"),
    ],
)
def test_what_cannot_be_read_off_scikit_learn(kwargs: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        claims_of_function(sklearn.metrics.f1_score, kwargs)


def test_the_script_of_a_counter_example_calls_scikit_learn(capsys: pytest.CaptureFixture[str]) -> None:
    """As the check did, with the reference first."""
    records = check_loss(
        sklearn.metrics.f1_score,
        Claims(**_claims(FOREGROUND), family="dice_metric"),
        laws=["41"],
        derandomize=True,
    )
    (record,) = records
    assert record.counterexample is not None
    exec(record.counterexample.snippet(), {})
    assert "0.0" in capsys.readouterr().out


def test_a_class_without_reference_may_count_as_perfect() -> None:
    def score(p: Tensor, g: Tensor) -> float:
        return dice_of_foreground(p, g) if (g == 1).any() else 1.0

    assert broken(score, replace(FOREGROUND, absent="perfect")) == {}
    assert "41" in broken(dice_of_foreground, replace(FOREGROUND, absent="perfect"))


def test_what_is_no_number_is_compared() -> None:
    """0/0 is declared to be NaN, and is 1."""
    assert "41" in broken(dice_of_foreground, replace(FOREGROUND, empty="nan"))


def _claims(claims: Claims) -> dict[str, Any]:
    return {
        "labels": claims.labels,
        "activation": claims.activation,
        "channels": 2,
        "include_background": False,
        "batch": True,
    }


@pytest.mark.sampled(2)
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


@pytest.mark.integration
def test_float32_does_not_count_beyond_2_24() -> None:
    """A sum in float32, one by one."""

    def counted(p: Tensor, g: Tensor) -> float:
        def voxels(mask: Tensor) -> float:
            return float(np.add.accumulate(mask.flatten().numpy().astype(np.float32))[-1])

        both, total = voxels((p == 1) & (g == 1)), voxels(p == 1) + voxels(g == 1)
        return 2 * both / total if total else 1.0

    assert "45" in broken(counted, FOREGROUND, ["45"])
    assert broken(dice_of_foreground, FOREGROUND, ["45"]) == {}
