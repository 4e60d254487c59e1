"""What the classes add to the formulas: which classes count and how much, the batch, the reduction, precision."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import voxloss
from volumes import label_map, logits, one_hot
from voxloss import (
    AsymmetricSimilarityLoss,
    DiceLoss,
    FocalTverskyLoss,
    GeneralizedDiceLoss,
    JaccardLoss,
    LogCoshDiceLoss,
    RegionLoss,
    RegionStatistics,
    TverskyLoss,
    formulas,
    region_statistics,
)
from voxloss.backends import select
from voxloss.formulas import focal_power
from voxloss_verify.tolerances import GRADIENT, LOSS

LOSSES = [
    DiceLoss,
    JaccardLoss,
    TverskyLoss,
    FocalTverskyLoss,
    LogCoshDiceLoss,
    AsymmetricSimilarityLoss,
    GeneralizedDiceLoss,
]
PER_CLASS = LOSSES[:-1]
MAP: dict[str, Any] = {"softmax": True, "to_onehot_y": True}


def per_class(loss: type[RegionLoss], x: Tensor, labels: Tensor, **options: Any) -> Tensor:
    unreduced: Tensor = loss(**MAP, reduction="none", **options)(x, labels)
    return unreduced.flatten(1)


def test_iou_is_jaccard() -> None:
    assert voxloss.IoULoss is JaccardLoss


@pytest.mark.parametrize("loss", PER_CLASS)
def test_classes_and_background(loss: type[RegionLoss]) -> None:
    # torch computes several powers or logarithms at once; their last bits can depend on the numbers beside them.
    rounded = loss in (FocalTverskyLoss, voxloss.LogCoshDiceLoss)
    same = partial(torch.testing.assert_close, rtol=1e-15 if rounded else 0, atol=0)
    x, labels = logits(channels=5), label_map(channels=5)
    every = per_class(loss, x, labels)
    assert every.shape == (2, 5)
    same(per_class(loss, x, labels, include_background=False), every[:, 1:])
    picked = every[:, [4, 2]]
    same(per_class(loss, x, labels, classes=[4, 2]), picked)
    torch.testing.assert_close(loss(**MAP, classes=[4, 2])(x, labels), picked.mean())
    weighted = picked * torch.tensor([3, 0.5])
    same(per_class(loss, x, labels, classes=[4, 2], weight=[3.0, 0.5]), weighted)
    same(per_class(loss, x, labels, classes=[4, 2], weight=[9, 9, 0.5, 9, 3.0]), weighted)


@pytest.mark.parametrize("loss", PER_CLASS)
def test_an_ignored_class_has_no_part_in_the_mean(loss: type[RegionLoss]) -> None:
    """Neither as a class nor, at its voxels, as an error of the others."""
    x, labels = logits(items=1, spatial=(40,)), label_map(items=1, spatial=(40,))
    kept = labels[0, 0] != 2
    expected = per_class(loss, x[..., kept], labels[..., kept], classes=[0, 1, 3]).mean()
    torch.testing.assert_close(loss(**MAP, ignore_index=2)(x, labels), expected)


def test_excluding_the_background_is_dropping_its_channel_after_the_softmax() -> None:
    x, labels = logits(), label_map()
    p, g = x.softmax(1), one_hot(labels, 4)
    for loss in LOSSES:
        torch.testing.assert_close(loss(**MAP, include_background=False)(x, labels), loss()(p[:, 1:], g[:, 1:]))


@pytest.mark.parametrize("loss", LOSSES)
def test_batch_is_the_items_side_by_side(loss: type[RegionLoss]) -> None:
    x, labels = logits(), label_map()
    side_by_side = torch.cat([*x], 1)[None], torch.cat([*labels], 1)[None]
    torch.testing.assert_close(loss(**MAP, batch=True)(x, labels), loss(**MAP)(*side_by_side))


@pytest.mark.parametrize("loss", PER_CLASS)
def test_absent_classes(loss: type[RegionLoss]) -> None:
    x, labels = logits(channels=4), label_map(channels=4)
    labels[0][labels[0] == 3] = 1
    every = per_class(loss, x, labels)
    present = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(per_class(loss, x, labels, absent="skip"), every * present)
    for reduction, expected in (("mean", every[present].mean()), ("sum", every[present].sum())):
        torch.testing.assert_close(loss(**MAP, absent="skip", reduction=reduction)(x, labels), expected)
    joined = loss(**MAP, absent="skip", batch=True)(x, labels)
    assert torch.equal(joined, loss(**MAP, batch=True)(x, labels)), "present somewhere in the batch"


@pytest.mark.parametrize("loss", LOSSES)
def test_every_class_absent(loss: type[RegionLoss]) -> None:
    x, labels = logits().requires_grad_(), torch.zeros(2, 1, 5, 6, 7, dtype=torch.long)
    value = loss(**MAP, absent="skip", include_background=False)(x, labels)
    assert value == 0
    assert torch.autograd.grad(value, x)[0].eq(0).all()


def test_generalized_dice_weights_and_absent_classes() -> None:
    x, labels = logits(items=3, channels=3), label_map(items=3, channels=3)
    labels[0][labels[0] == 2] = 1
    labels[2] = 0
    p, g = x.softmax(1).flatten(2), one_hot(labels, 3).flatten(2)
    tp, total, size = (p * g).sum(2), (p + g).sum(2), g.sum(2)
    w = torch.where(size > 0, size, math.inf) ** -2 * torch.tensor([1.0, 2.0, 5.0])
    expected = 1 - 2 * (w * tp)[:, 1:].sum(1) / (w * total)[:, 1:].sum(1)
    options: dict[str, Any] = {
        "include_background": False,
        "smooth_nr": 0,
        "smooth_dr": 0,
        "weight": [2.0, 5.0],
        "absent": "skip",
    }
    got = GeneralizedDiceLoss(**MAP, **options)(x, labels)
    torch.testing.assert_close(got, expected[:2].mean(), msg="the third sample has no class that counts")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("batch", [False, True])
def test_shape_without_reduction(loss: type[RegionLoss], batch: bool) -> None:
    x, labels = logits(items=3), label_map(items=3)
    got = loss(**MAP, reduction="none", batch=batch)(x, labels).shape
    classes = 1 if loss is GeneralizedDiceLoss else 4
    ones = () if issubclass(loss, TverskyLoss) else (1, 1, 1)
    assert got == (*(() if batch else (3,)), classes, *ones)


@pytest.mark.parametrize("loss", LOSSES)
def test_class_permutation_with_the_weights_along(loss: type[RegionLoss]) -> None:
    x, labels = logits(), label_map()
    order = torch.tensor([2, 0, 3, 1])
    weight = torch.tensor([0.1, 1, 2, 3], dtype=torch.float64)
    permuted = loss(softmax=True, weight=weight[order])(x[:, order], one_hot(labels, 4)[:, order])
    torch.testing.assert_close(permuted, loss(**MAP, weight=weight)(x, labels))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", ["perfect", "opposite", "one voxel", "full", "extreme"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"smooth_nr": 0, "smooth_dr": 0}, {"soft_label": True}], ids=str)
def test_value_and_gradient_are_finite_at_the_ends(
    loss: type[RegionLoss], case: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    labels = label_map()
    if case == "one voxel":
        labels = torch.ones(1, 1, 1, 1, 1, dtype=torch.long)
    elif case == "full":
        labels = torch.ones_like(labels)
    p = one_hot(labels, 4, dtype)
    p = 1 - p if case == "opposite" else p
    # Probabilities of exactly 0 beside a smoothing of 1e-5 have gradients of 1e5 and more, beyond float16, where
    # Inf has to stay Inf for GradScaler to see. Logits have no such gradients.
    for activated in (True, False) if dtype in (torch.float64, torch.float32) else (True,):
        x = p * ({"extreme": 1e4}.get(case, 30) if activated else 1)
        x.requires_grad_()
        value = loss(softmax=activated, to_onehot_y=True, **options)(x, labels)
        (gradient,) = torch.autograd.grad(value, x)
        assert value.isfinite()
        assert gradient.isfinite().all()
        if case == "perfect":
            assert value < 1e-6


@pytest.mark.parametrize("loss", PER_CLASS)
def test_repairing_a_voxel_lowers_the_loss(loss: type[RegionLoss]) -> None:
    labels = label_map(channels=2)
    wrong = labels.clone()
    wrong[0, 0, :2] = 1 - wrong[0, 0, :2]
    before = loss(to_onehot_y=True)(one_hot(wrong, 2), labels)
    wrong[0, 0, 0, 0, 0] = labels[0, 0, 0, 0, 0]
    assert loss(to_onehot_y=True)(one_hot(wrong, 2), labels) < before


@pytest.mark.parametrize("loss", LOSSES)
def test_softmax_gradients_sum_to_zero_over_the_classes(loss: type[RegionLoss]) -> None:
    x, labels = logits().requires_grad_(), label_map()
    (gradient,) = torch.autograd.grad(loss(**MAP, include_background=False)(x, labels), x)
    assert gradient.sum(1).abs().max() < 1e-15
    shifted = loss(**MAP, include_background=False)(x + 7 * torch.randn(2, 1, 5, 6, 7), labels)
    torch.testing.assert_close(shifted, loss(**MAP, include_background=False)(x, labels))


@pytest.mark.parametrize("loss", LOSSES)
def test_soft_labels_are_zero_and_stationary_at_the_target(loss: type[RegionLoss]) -> None:
    g = logits().softmax(1)
    p = g.clone().requires_grad_()
    value = loss(soft_label=True)(p, g)
    assert abs(value) <= LOSS["float64"]
    assert torch.autograd.grad(value, p)[0].abs().max() == 0
    moved = (g + 0.01 * torch.randn_like(g)).clamp(0, 1)
    assert loss(soft_label=True)(moved, g) > 0


def test_focal_tversky_takes_the_power_per_class_before_the_mean() -> None:
    x, labels = logits(), label_map()
    options: dict[str, Any] = {"alpha": 0.2, "beta": 0.9, "smooth_nr": 1e-3, "smooth_dr": 1e-3}
    plain = per_class(TverskyLoss, x, labels, **options)
    focal = FocalTverskyLoss(**MAP, gamma=1.7, **options)(x, labels)
    torch.testing.assert_close(focal, (plain ** (1 / 1.7)).mean())
    torch.testing.assert_close(
        FocalTverskyLoss(**MAP, gamma=1, **options)(x, labels), TverskyLoss(**MAP, **options)(x, labels)
    )


def test_focal_tversky_defaults_are_abraham_and_khans() -> None:
    s = RegionStatistics(*(torch.tensor([[v]], dtype=torch.float64) for v in (5.0, 7.0, 9.0)))
    expected = (1 - (5 + 1e-5) / (5 + 0.3 * 2 + 0.7 * 4 + 1e-5)) ** 0.75
    assert FocalTverskyLoss().per_class(s).item() == pytest.approx(expected, rel=1e-12)
    assert focal_power(torch.tensor(0.5), 4 / 3).item() == pytest.approx(0.5**0.75)


SIZES = [64, 128]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"squared_pred": True}, {"soft_label": True}, {"jaccard": True}], ids=str
)
def test_accuracy_at_real_size(size: int, dtype: torch.dtype, options: dict[str, Any], device: str) -> None:
    """Against float64 on the rounded inputs, which is itself held to exact arithmetic in test_statistics.py."""
    x = (torch.randn(1, 2, size, size, size) * 3).to(dtype).to(device)
    labels = (torch.rand(1, 1, size, size, size) < 0.01).long().to(device)
    loss, reference = (DiceLoss(**MAP, **options, backend=backend) for backend in (None, "reference"))
    leaf, exact_leaf = x.clone().requires_grad_(), x.double().requires_grad_()
    value, exact = loss(leaf, labels), reference(exact_leaf, labels)
    name = str(dtype).removeprefix("torch.")
    assert value.dtype == torch.float32
    assert abs(value.double() - exact) <= LOSS[name]
    (gradient,), (exact_gradient,) = torch.autograd.grad(value, leaf), torch.autograd.grad(exact, exact_leaf)
    error = (gradient.double() - exact_gradient).abs().max() / exact_gradient.abs().max()
    if dtype == torch.float16:  # true gradients of 1/size³ are float16 subnormals, in steps of 2⁻²⁴
        error = ((gradient.double() - exact_gradient).abs() - 2.0**-25).clamp(
            min=0
        ).max() / exact_gradient.abs().max()
    assert error <= GRADIENT[name]
    assert gradient.abs().max() > 0 or exact_gradient.abs().max() < 2.0**-25


class HalfDice(RegionLoss):
    """What a user writes for a loss of their own."""

    def per_class(self, statistics: RegionStatistics) -> Tensor:
        return (1 - formulas.dice(statistics)) / 2


def test_a_loss_of_ones_own_gets_every_option() -> None:
    x, labels = logits(), label_map()
    options: dict[str, Any] = {**MAP, "include_background": False, "batch": True, "weight": [1.0, 2.0, 3.0]}
    dice = DiceLoss(**options, smooth_nr=0, smooth_dr=0)
    torch.testing.assert_close(HalfDice(**options)(x, labels), dice(x, labels) / 2)


class Unnamed(RegionLoss):
    """An error: `extra_sums` does not name the sum."""

    def per_class(self, statistics: RegionStatistics, voxels: Tensor) -> Tensor:
        return statistics.target / voxels


class Untaken(HalfDice):
    """An error: the formula does not take the sum."""

    extra_sums = ("voxels",)


def test_a_formula_takes_the_sums_that_its_class_names() -> None:
    message = r"Unnamed.per_class: expected .*\['statistics'\].* received .*Set extra_sums = \('voxels',\) in the"
    with pytest.raises(TypeError, match=message):
        Unnamed(**MAP)
    message = r"per_class: expected .*\['statistics', 'voxels'\].*, received .*Add voxels to its arguments"
    with pytest.raises(TypeError, match=message):
        Untaken(**MAP)


def test_a_weight_too_few_says_that_the_background_has_one() -> None:
    options: dict[str, Any] = {**MAP, "include_background": False, "weight": [1.0, 2.0, 3.0]}
    DiceLoss(**options)(logits(), label_map())
    with pytest.raises(
        ValueError,
        match=r"4 \(one per channel\), received 3\. If channel 0 is the background, it has a weight, too",
    ):
        voxloss.DiceCELoss(**options)(logits(), label_map())


class MeanDice(RegionLoss):
    """An error: the mean belongs to the reduction."""

    def per_class(self, statistics: RegionStatistics) -> Tensor:
        return 1 - formulas.dice(statistics).mean(1)


def test_a_formula_of_the_wrong_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"per_class: expected .* \[2, 4\] as the statistics, received \[2\]"):
        MeanDice(**MAP)(logits(), label_map())


def test_the_representation_shows_what_was_asked_for() -> None:
    loss = DiceLoss(**MAP, include_background=False, weight=[1, 2], classes=[1, 3], smooth_nr=1)
    shown = repr(loss)
    assert shown.startswith("DiceLoss(")
    for part in (
        "softmax=True",
        "include_background=False",
        "weight=[1.0, 2.0]",
        "classes=[1, 3]",
        "smooth_nr=1.0",
    ):
        assert part in shown
    assert repr(TverskyLoss()) == "TverskyLoss()"


@pytest.mark.parametrize("loss", LOSSES)
def test_one_pass_forward_and_one_backward(loss: type[RegionLoss], passes: list[tuple[str, str]]) -> None:
    x, labels = logits().requires_grad_(), label_map()
    loss(**MAP)(x, labels).backward()
    backend, _ = select()
    assert passes == [(backend, "region_sums"), (backend, "region_sums_backward")]


def test_region_statistics_is_what_a_loss_sums() -> None:
    x, labels = logits(), label_map()
    s = region_statistics(x, labels, activation="softmax")
    torch.testing.assert_close(DiceLoss(**MAP)(x, labels), (1 - formulas.dice(s, 1e-5, 1e-5)).mean())


class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which operators ran."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.operators.add(function.name())
        return function(*arguments, **(options or {}))


def test_classes_are_chosen_without_an_index_tensor() -> None:
    """A list of numbers would be copied to a GPU, which a CUDA graph does not take."""
    x, labels = logits().requires_grad_(), label_map()
    for options in ({"include_background": False}, {"classes": [3, 1]}, {"ignore_index": 2}):
        for loss in (
            DiceLoss(**MAP, **options, weight=[1.0, 2.0, 3.0, 4.0]),
            voxloss.DiceFocalLoss(**MAP, **options),
            voxloss.FocalLoss(to_onehot_y=True, alpha=0.3, **options),
        ):
            with Seen() as seen:
                loss(x, labels).backward()
            assert not {name for name in seen.operators if "index" in name}, loss


def test_the_loss_has_the_dtype_of_the_input_and_not_of_its_activation() -> None:
    x, target = torch.rand(1, 2, 3, 4, 5), torch.eye(2)[torch.randint(2, (1, 3, 4, 5))].movedim(-1, 1)
    assert DiceLoss(other_act=torch.Tensor.double)(x, target).dtype == torch.float32
