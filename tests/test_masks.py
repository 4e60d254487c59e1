"""A mask leaves voxels out or weights them, in every loss; classes that are not annotated do not count."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor

import voxloss
from every_loss import LOSSES, make, value_and_gradient
from volumes import label_map, logits, one_hot

C = 4


def pair(activation: str, form: str) -> tuple[Tensor, Tensor]:
    x, labels = logits(channels=C), label_map(channels=C)
    x = x.sigmoid() if activation == "none" else x
    if form == "label map":
        return x, labels
    return x, one_hot(labels, C) if form == "one-hot" else 0.9 * one_hot(labels, C) + 0.025


def activations(name: str) -> list[str]:
    return ["softmax", "sigmoid"] if name == "FocalLoss" else ["softmax", "sigmoid", "none"]


# Each pair of dtypes has kernels of its own, which take Numba ten seconds.
KINDS = [torch.uint8, torch.int64, torch.float32, pytest.param(torch.int16, marks=pytest.mark.integration)]
CASES = [(name, activation) for name in LOSSES for activation in activations(name)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", ["label map", "one-hot", "soft"])
@pytest.mark.parametrize(("name", "activation"), CASES)
def test_a_masked_voxel_is_a_deleted_one(name: str, activation: str, form: str) -> None:
    x, target = pair(activation, form)
    loss = make(name, activation, to_onehot_y=form == "label map")
    mask = torch.ones(2, 1, *x.shape[2:], dtype=torch.bool)
    mask[:, :, 1:3] = False
    expected, gradient = value_and_gradient(loss, x[:, :, [0, 3, 4]], target[:, :, [0, 3, 4]])
    hidden = torch.where(mask, x, torch.nan)
    spoiled = torch.where(mask, target, 77)
    for given in (mask, mask.double(), mask[:1], mask.to(torch.uint8)):
        got, by_hidden = value_and_gradient(loss, hidden, spoiled, mask=given)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(by_hidden[:, :, [0, 3, 4]], gradient)
        assert not by_hidden[:, :, 1:3].any()


# Of k % of the voxels several count for more than one with a weight, which does not decide whether it is chosen.
BY_WEIGHT = [(name, activation) for name, activation in CASES if "TopK" not in name]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", ["label map", "one-hot", "soft"])
@pytest.mark.parametrize(("name", "activation"), BY_WEIGHT)
def test_a_weight_of_three_is_the_voxel_three_times(name: str, activation: str, form: str) -> None:
    x, target = pair(activation, form)
    loss = make(name, activation, to_onehot_y=form == "label map")
    times = torch.tensor([1, 3, 0, 2, 1])
    expected, _ = value_and_gradient(loss, x.repeat_interleave(times, 2), target.repeat_interleave(times, 2))
    weights = times.double().view(1, 1, -1, 1, 1).expand(2, 1, *x.shape[2:])
    got, gradient = value_and_gradient(loss, x, target, mask=weights)
    torch.testing.assert_close(got, expected)
    leaf = x.clone().requires_grad_()
    copies = leaf.repeat_interleave(times, 2)
    (wanted,) = torch.autograd.grad(loss(copies, target.repeat_interleave(times, 2)), leaf)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ignore_index", [0, 255])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_beside_an_ignored_label(kind: torch.dtype, name: str, ignore_index: int) -> None:
    x, labels = pair("softmax", "label map")
    labels[:, :, 0, :3] = ignore_index
    loss = make(name, "softmax", to_onehot_y=True, ignore_index=ignore_index)
    mask = torch.rand(labels.shape) > 0.4
    expected = value_and_gradient(loss, x, torch.where(mask, labels, ignore_index))
    for given in (mask, mask.float()):
        got = value_and_gradient(loss, x, labels.to(kind), mask=given)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", [*KINDS, torch.bool, pytest.param(torch.int8, marks=pytest.mark.integration)])
def test_a_mask_for_any_dtype_of_labels(kind: torch.dtype) -> None:
    """The label that stands for a masked voxel must not be one that the dtype cannot hold."""
    x, labels = logits(channels=2), label_map(channels=2)
    loss = voxloss.DiceCELoss(softmax=True, to_onehot_y=True)
    mask = torch.rand(labels.shape) > 0.4
    expected = loss(x, labels, mask.double())
    torch.testing.assert_close(loss(x, labels.to(kind), mask), expected)


def test_masks_of_metadata_and_in_one_graph() -> None:
    x, labels = pair("softmax", "label map")
    loss = voxloss.DiceCELoss(softmax=True, to_onehot_y=True)
    mask = torch.rand(labels.shape)
    expected = loss(x, labels, mask)
    torch.testing.assert_close(loss(x, labels, MetaTensor(mask)), expected)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, labels, mask), expected)
    torch.testing.assert_close(compiled(x, labels, mask > 0.5), loss(x, labels, mask > 0.5))


def test_a_volume_that_is_masked_whole_costs_nothing() -> None:
    x, labels = pair("softmax", "label map")
    for name in LOSSES:
        value, gradient = value_and_gradient(
            make(name, "softmax", to_onehot_y=True), x, labels, mask=torch.zeros(labels.shape, dtype=torch.bool)
        )
        assert value == 0, name
        assert not gradient.any(), name


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.ones(2, 5, 6, 7),
            "mask: expected [2, 1, 5, 6, 7], as input is [2, 4, 5, 6, 7], received [2, 5, 6, 7]",
        ),
        (torch.ones(2, 4, 5, 6, 7), "mask: expected [2, 1, 5, 6, 7]"),
        (torch.ones(3, 1, 5, 6, 7), "or one sample for all, received [3, 1, 5, 6, 7]"),
        (
            -torch.ones(2, 1, 5, 6, 7),
            "expected finite weights ≥ 0; received -1.0 at [0, 0, 0, 0, 0] (420 in all)",
        ),
        (torch.full((2, 1, 5, 6, 7), torch.nan), "mask: expected finite weights ≥ 0; received nan"),
        (torch.ones(2, 1, 5, 6, 7, requires_grad=True), "mask: expected weights without requires_grad"),
        (torch.ones(2, 1, 5, 6, 7, dtype=torch.complex64), "mask: expected booleans or weights"),
        ([1, 0], "mask: expected a torch.Tensor or None, received list"),
        (torch.ones(2, 5, 6, 7), "add one with mask.unsqueeze(1)"),
    ],
)
def test_what_is_no_mask_is_refused(mask: Any, message: str) -> None:
    x, labels = pair("softmax", "label map")
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        voxloss.DiceLoss(softmax=True, to_onehot_y=True)(x, labels, mask)


# Partially labelled data.

ANNOTATED = [[0, 1, 2, 3], [1, 3]]
WHICH = torch.tensor([[c in chosen for c in range(C)] for chosen in ANNOTATED])


@pytest.mark.parametrize("name", [n for n in LOSSES if issubclass(LOSSES[n], voxloss.RegionLoss)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_class_that_nobody_annotated_has_no_term(name: str, reduction: str) -> None:
    if "Generalized" in name:
        pytest.skip("one term for all classes, see below")
    x, labels = pair("softmax", "label map")
    loss = make(name, "softmax", to_onehot_y=True, reduction=reduction)
    terms = make(name, "softmax", to_onehot_y=True, reduction="none")(x, labels).flatten(1)
    which = WHICH[:, C - terms.shape[1] :]  # of the skeleton without the background
    chosen = terms.where(which, 0)
    expected = {"none": chosen, "sum": chosen.sum(), "mean": chosen.sum() / which.sum()}[reduction]
    for given in (ANNOTATED, WHICH):
        got, gradient = value_and_gradient(loss, x, labels, annotated=given)
        torch.testing.assert_close(got.reshape(expected.shape), expected)
    without = loss(x.requires_grad_(), labels, annotated=[[], [1, 3]])
    assert not torch.autograd.grad(without.sum(), x)[0][0].any()
    assert gradient[1].any()


@pytest.mark.parametrize("name", ["GeneralizedDiceLoss", "PenaltyGeneralizedDiceLoss"])
def test_generalized_dice_of_the_classes_that_were_annotated(name: str) -> None:
    x, labels = pair("softmax", "label map")
    options = {"to_onehot_y": True, "absent": "skip"}
    each = [
        make(name, "softmax", classes=chosen, **options)(x[b : b + 1], labels[b : b + 1])
        for b, chosen in enumerate(ANNOTATED)
    ]
    got = make(name, "softmax", to_onehot_y=True)(x, labels, annotated=ANNOTATED)
    torch.testing.assert_close(got, (each[0] + each[1]) / 2)


def test_a_batch_sums_a_class_over_the_items_where_it_was_annotated() -> None:
    x, labels = pair("softmax", "label map")
    loss = voxloss.DiceLoss(softmax=True, to_onehot_y=True, batch=True)
    got = loss(x, labels, annotated=ANNOTATED)
    both = voxloss.DiceLoss(softmax=True, to_onehot_y=True, batch=True, classes=[1, 3])(x, labels)
    first = voxloss.DiceLoss(softmax=True, to_onehot_y=True, classes=[0, 2])(x[:1], labels[:1])
    torch.testing.assert_close(got, (both + first) / 2)
    nowhere = loss(x, labels, annotated=[[1], [1, 3]])
    one = voxloss.DiceLoss(softmax=True, to_onehot_y=True, batch=True, classes=[1])(x, labels)
    other = voxloss.DiceLoss(softmax=True, to_onehot_y=True, classes=[3])(x[1:], labels[1:])
    torch.testing.assert_close(nowhere, (one + other) / 2)


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "FocalLoss"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_mean_is_over_voxels_of_classes_that_were_annotated(name: str, activation: str) -> None:
    x, labels = pair(activation, "label map")
    loss = make(name, activation, to_onehot_y=True)
    got = value_and_gradient(loss, x, labels, annotated=ANNOTATED)
    if activation == "softmax":
        there = WHICH.gather(1, labels.flatten(1)).view(labels.shape)
        expected = value_and_gradient(loss, x, labels, mask=there)
    else:
        # Each binary channel by itself: as many means over voxels as there are channels.
        leaf = x.clone().requires_grad_()
        every = [
            make(name, activation, to_onehot_y=True, classes=[c])(leaf[b : b + 1], labels[b : b + 1])
            for b, chosen in enumerate(ANNOTATED)
            for c in chosen
        ]
        value = torch.stack(every).mean()
        expected = value.detach(), torch.autograd.grad(value, leaf)[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("annotated", "message"),
    [
        ([[0, 1]], "annotated: expected a list of channels for each of 2 samples"),
        ([[0, 1], [4]], "expected channel numbers 0…3, as input has 4 channels, received [4] for sample 1"),
        (
            [1, 3],
            "expected a list of channels for each of 2 samples, like [[0, 1], [0, 1]], received [1, 3]",
        ),
        (torch.ones(2, 3, dtype=torch.bool), "annotated: expected a bool tensor [2, 4]"),
        (torch.ones(2, 4), "annotated: expected a bool tensor [2, 4]"),
    ],
)
def test_what_names_no_channels_is_refused(annotated: Any, message: str) -> None:
    x, labels = pair("softmax", "label map")
    with pytest.raises(ValueError, match=re.escape(message)):
        voxloss.DiceLoss(softmax=True, to_onehot_y=True)(x, labels, annotated=annotated)
