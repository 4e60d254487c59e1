"""Hard Dice and IoU: against integer counts, against MONAI's metrics, and what they reject."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.metrics import DiceMetric, MeanIoU
from torch import Tensor

from volumes import label_map, logits, one_hot
from voxloss import OverlapMetric, ShapeError, Target
from voxloss.metrics import overlap_counts
from voxloss_verify.subject.ranks import Ranks


def counted(predicted: Tensor, reference: Tensor, channels: int, ignored: int | None = None) -> list[Any]:
    """TP, P and G of each sample and class, one voxel after another."""
    found = np.zeros((3, len(predicted), channels), int)
    for b in range(len(predicted)):
        for p, g in zip(predicted[b].flatten().tolist(), reference[b].flatten().tolist(), strict=True):
            if g == ignored:
                continue
            found[0, b, p] += p == g
            found[1, b, p] += 1
            found[2, b, g] += 1
    return list(found)


@given(st.integers(1, 3), st.integers(2, 5), st.integers(0, 2**16), st.sampled_from([None, 1, 255]))
def test_counts_are_those_of_counting(items: int, channels: int, seed: int, ignored: int | None) -> None:
    chance = torch.Generator().manual_seed(seed)
    scores = torch.randint(3, (items, channels, 3, 2, 4), generator=chance).float()  # with ties
    labels = torch.randint(channels, (items, 1, 3, 2, 4), generator=chance)
    if ignored is not None:
        labels[torch.rand(labels.shape, generator=chance) < 0.3] = ignored
    first = (scores == scores.amax(1, keepdim=True)).int().argmax(1, keepdim=True)
    wanted = counted(first, labels, channels, ignored)
    for y_pred in (scores, scores.double(), scores.bfloat16(), first, one_hot(first, channels)):
        counts = overlap_counts(y_pred, labels, num_classes=channels, ignore_index=ignored)
        for got, expected in zip(counts, wanted, strict=True):
            assert got.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "reduction", ["none", "mean", "sum", "mean_batch", "sum_batch", "mean_channel", "sum_channel"]
)
@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("ignore_empty", [True, False])
@pytest.mark.parametrize(("metric", "theirs"), [("dice", DiceMetric), ("iou", MeanIoU)])
def test_scores_are_those_of_monai(
    reduction: Any, include_background: bool, ignore_empty: bool, metric: Any, theirs: Any
) -> None:
    options = {"reduction": reduction, "include_background": include_background, "ignore_empty": ignore_empty}
    ours, monai = OverlapMetric(**options, metric=metric, get_not_nans=True), theirs(**options, get_not_nans=True)
    for seed in range(3):
        torch.manual_seed(seed)
        x, labels = logits(), label_map()
        labels[labels == 3] = 0  # no reference has class 3
        x[0, 2:] = -100  # nor has a prediction classes 2 and 3
        labels[0][labels[0] == 2] = 1
        hard = one_hot(x.argmax(1, keepdim=True), 4)
        torch.testing.assert_close(ours(x, labels), monai(hard, one_hot(labels, 4)).double(), equal_nan=True)
    for got, wanted in zip(ours.aggregate(), monai.aggregate(), strict=True):
        torch.testing.assert_close(got.double().reshape(-1), wanted.double().reshape(-1), equal_nan=True)
    ours.reset()
    with pytest.raises(ValueError, match="at least one call"):
        ours.aggregate()


@pytest.mark.parametrize("sigmoid", [False, True])
def test_logits_may_require_a_gradient(sigmoid: bool) -> None:
    """As logits do while the network trains."""
    x = logits()
    y = one_hot(label_map(), 4) if sigmoid else label_map()
    wanted = OverlapMetric(sigmoid=sigmoid)(x, y)
    scores = OverlapMetric(sigmoid=sigmoid)(x.requires_grad_(), y)
    torch.testing.assert_close(scores, wanted, equal_nan=True)
    assert not scores.requires_grad


def test_a_data_set_is_one_volume() -> None:
    metric = OverlapMetric(reduction="dataset", ignore_empty=False)
    pairs = [(logits(), label_map()) for _ in range(3)]
    for x, labels in pairs:
        metric(x, labels)
    x, labels = (torch.cat([image for pair in pairs for image in pair[at]], -1)[None] for at in (0, 1))
    wanted = OverlapMetric(reduction="none", ignore_empty=False)(x, labels)
    torch.testing.assert_close(metric.aggregate(), wanted[0], rtol=0, atol=0)
    torch.testing.assert_close(metric.aggregate("dataset_mean"), wanted.mean(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("empty", [0.0, 1.0, math.nan])
def test_an_empty_class_has_the_score_that_was_chosen(empty: float) -> None:
    labels = torch.zeros(1, 1, 2, 2, 2, dtype=torch.int64)
    metric = OverlapMetric(ignore_empty=False, empty=empty, num_classes=3)
    np.testing.assert_equal(metric(labels, labels)[0].tolist(), [1.0, empty, empty])
    found = labels.clone()
    found[..., 0] = 1  # predicted where there is none
    np.testing.assert_equal(metric(found, labels)[0, 1:].tolist(), [0.0, empty])


def test_independent_channels() -> None:
    x, target = logits(channels=2), (torch.rand(2, 2, 5, 6, 7) > 0.5).double()
    counts = overlap_counts(x, target, sigmoid=True, threshold=0.7)
    p = x.sigmoid() > 0.7
    assert counts.both.tolist() == (p & (target == 1)).sum((2, 3, 4)).tolist()
    assert counts.predicted.tolist() == p.sum((2, 3, 4)).tolist()
    assert counts.reference.tolist() == target.sum((2, 3, 4)).tolist()


def test_the_first_of_independent_channels_is_left_out_like_a_background() -> None:
    """As MONAI's metrics and the losses do; of a single channel it is not."""
    x, target = logits(channels=2), (torch.rand(2, 2, 5, 6, 7) > 0.5).double()
    every = OverlapMetric(sigmoid=True)(x, target)
    metric = OverlapMetric(include_background=False, sigmoid=True)
    assert metric(x, target).tolist() == every[:, 1:].tolist()
    metric.reset()
    assert metric(x[:, :1], target[:, :1]).tolist() == every[:, :1].tolist()


def test_ignored_voxels_of_independent_channels() -> None:
    """Those of the channel `ignore_index`, which has no score then; without one those of that value."""
    x, target = logits(channels=3), (torch.rand(2, 3, 5, 6, 7) > 0.5).double()
    ignored = target[:, 1:2] == 1
    got = overlap_counts(x, target, sigmoid=True, ignore_index=1)
    p, g = ((mask & ~ignored).sum((2, 3, 4)) for mask in (x > 0, target == 1))
    assert (got.predicted.tolist(), got.reference.tolist()) == (p.tolist(), g.tolist())
    assert OverlapMetric(sigmoid=True, ignore_index=1)(x, target).shape == (2, 2)
    by_value = overlap_counts(x, target.masked_fill(ignored, 255), sigmoid=True, ignore_index=255)
    assert [column.tolist() for column in by_value] == [column.tolist() for column in got]


def test_nothing_to_reduce_is_an_error() -> None:
    for method in ("aggregate", "counts", "get_buffer"):
        with pytest.raises(ValueError, match="expected at least one call"):
            getattr(OverlapMetric(), method)()


@pytest.mark.parametrize(
    ("y_pred", "y", "options", "said"),
    [
        (torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 3), {}, "spatial axes"),
        (torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2), {}, "at least one spatial axis"),
        (torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 2, 2), {}, "one number of classes"),
        (
            torch.zeros(1, 3, 2, 2),
            torch.full((1, 1, 2, 2), 255, dtype=torch.uint8),
            {"ignore_index": -1},
            r"0 to 2, or -1 \(ignored\); received 255 .* -1 stored as uint8 is 255",
        ),
        (torch.zeros(1, 1, 2, 2, dtype=torch.long), torch.full((1, 3, 2, 2), 7.0), {}, "the prediction first"),
        (torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2), {}, r"y.unsqueeze\(1\)"),
        (torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), {}, "num_classes"),
        (
            torch.zeros(1, 3, 2, 2),
            torch.full((1, 1, 2, 2), 3),
            {},
            r"labels 0 to 2; received 3 at \[0, 0, 0, 0\] \(4 in all\). Pass ignore_index",
        ),
        (
            torch.zeros(1, 3, 2, 2),
            torch.full((1, 1, 2, 2), 0.5),
            {},
            r"labels 0 to 2; received 0.5 at \[0, 0, 0, 0\]",
        ),
        (
            torch.full((1, 3, 2, 2), torch.nan),
            torch.zeros(1, 1, 2, 2),
            {},
            r"numbers; received nan at \[0, 0, 0, 0\] \(12 in all\)",
        ),
        (
            torch.zeros(1, 3, 2, 2),
            torch.full((1, 3, 2, 2), 0.5),
            {},
            "0 and 1 .*; received 0.5 at .* pass a label map",
        ),
        (torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), {"sigmoid": True, "threshold": 1.0}, "threshold"),
        (torch.full((1, 2, 2, 2), torch.nan), torch.zeros(1, 2, 2, 2), {"sigmoid": True}, "received nan at"),
    ],
)
def test_what_is_rejected(y_pred: Tensor, y: Tensor, options: dict[str, Any], said: str) -> None:
    with pytest.raises((ShapeError, ValueError), match=said):
        overlap_counts(y_pred, y, **options)


def test_a_decollated_batch_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"y: expected a torch.Tensor .*, received list. Stack .* torch.stack"):
        OverlapMetric()(logits(), [*label_map()])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"y: expected a torch.Tensor .*, received Target. Pass target\.labels\."):
        OverlapMetric()(logits(), Target(label_map()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"metric": "jaccard"}, "metric: .* Jaccard is 'iou'"), ({"reduction": "median"}, "reduction")],
)
def test_bad_arguments(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        OverlapMetric(**options)


def test_batches_with_other_classes_are_an_error() -> None:
    metric = OverlapMetric()
    metric(logits(), label_map())
    with pytest.raises(ValueError, match="4 classes, as before, received 3"):
        metric(logits(channels=3), label_map(channels=3))


def _of_a_rank(rank: int, world_size: int) -> list[float]:
    torch.manual_seed(7)
    x, labels = logits(items=3), label_map(items=3)
    metric = OverlapMetric(reduction="mean_batch", group="world")
    for item in range(3):
        if item % world_size == rank:  # rank 0 has two samples, rank 1 one
            metric(x[item : item + 1], labels[item : item + 1])
    result = metric.aggregate()
    assert isinstance(result, Tensor)
    return list(result.tolist())


@pytest.mark.integration
def test_two_ranks_have_the_scores_of_one(two_ranks: Ranks) -> None:
    one = _of_a_rank(0, 1)
    for found in two_ranks.run(_of_a_rank, [(0, 2), (1, 2)]):
        np.testing.assert_allclose(found, one, rtol=0, atol=1e-15)
