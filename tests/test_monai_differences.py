"""Where voxloss differs from MONAI on purpose: each line of docs/differences.md, shown on both sides.

If a MONAI release mends one of these, its half of the test fails: take the line out of that page then.
"""

from __future__ import annotations

import math
from typing import Any

import monai.losses
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import voxloss
from volumes import label_map, logits, one_hot
from voxloss_verify.tolerances import LOSS


def value_and_gradient(loss: Any, x: Tensor, target: Tensor) -> tuple[float, Tensor]:
    x = x.detach().requires_grad_()
    value = loss(x, target)
    return value.item(), torch.autograd.grad(value, x)[0]


def wrong_half(size: int) -> tuple[Tensor, Tensor]:
    """A half-full volume, predicted the other way round."""
    labels = torch.zeros(1, 1, size, size, size)
    labels[:, :, : size // 2] = 1
    return one_hot(1 - labels, 2, torch.float32), labels


def test_generalized_dice_does_not_depend_on_the_volume_size() -> None:
    monai_loss, our_loss = (
        module.GeneralizedDiceLoss(to_onehot_y=True, include_background=False)
        for module in (monai.losses, voxloss)
    )
    theirs = [monai_loss(*wrong_half(size)).item() for size in (32, 64, 128)]
    ours = [our_loss(*wrong_half(size)).item() for size in (32, 64, 128)]
    assert [round(value, 2) for value in theirs] == [0.92, 0.6, 0.16]
    assert ours == pytest.approx([1, 1, 1], abs=LOSS["float32"])


def test_generalized_dice_without_any_foreground_counts_false_positives() -> None:
    p = torch.full((1, 3, 8, 8, 8), 1 / 3)
    labels = torch.zeros(1, 1, 8, 8, 8)
    options: dict[str, Any] = {"include_background": False, "to_onehot_y": True}
    value, gradient = value_and_gradient(monai.losses.GeneralizedDiceLoss(**options), p, labels)
    assert value == 0
    assert gradient.abs().max() == 0
    value, gradient = value_and_gradient(voxloss.GeneralizedDiceLoss(**options), p, labels)
    assert value == pytest.approx(1, abs=1e-4)
    assert (gradient[:, 1:] > 0).all()


def test_generalized_dice_weights_in_full_precision() -> None:
    x, labels = logits(), label_map()
    labels.fill_(3).view(2, -1)[:, : 3 + 7 + 11] = torch.tensor([0] * 3 + [1] * 7 + [2] * 11)
    options: dict[str, Any] = {"softmax": True, "to_onehot_y": True, "smooth_nr": 0, "smooth_dr": 0}
    p, g = x.softmax(1).flatten(2), one_hot(labels, 4).flatten(2)
    weights = g.sum(2) ** -2
    exact = 1 - 2 * (weights * (p * g).sum(2)).sum(1) / (weights * (p + g).sum(2)).sum(1)
    theirs, ours = (module.GeneralizedDiceLoss(**options)(x, labels) for module in (monai.losses, voxloss))
    assert abs(ours - exact.mean()) < LOSS["float64"] < abs(theirs - exact.mean())


@pytest.mark.parametrize("name", ["DiceLoss", "TverskyLoss", "GeneralizedDiceLoss"])
@pytest.mark.parametrize("size", [64, 160])
def test_half_precision_inputs_of_real_size(name: str, size: int) -> None:
    labels = torch.zeros(1, 1, size, size, size, dtype=torch.float16)
    labels[..., : size // 2, :, :] = 1
    x = (6 * one_hot(labels, 2, torch.float16) - 3).requires_grad_()
    options: dict[str, Any] = {"softmax": True, "smooth_nr": 1e-5, "smooth_dr": 1e-5}
    target = one_hot(labels, 2, torch.float16)  # as under autocast with a target of the network's dtype
    value, gradient = value_and_gradient(getattr(monai.losses, name)(**options), x, target)
    assert not math.isfinite(value) or gradient.abs().max() == 0 or not gradient.isfinite().all()
    value, gradient = value_and_gradient(getattr(voxloss, name)(**options), x, target)
    assert value == pytest.approx(1 / (1 + math.e**6), abs=LOSS["float16"])
    assert gradient.isfinite().all()


def test_sums_inside_autocast_on_the_cpu() -> None:
    x, labels = logits(dtype=torch.bfloat16), label_map()  # a network's
    options: dict[str, Any] = {"softmax": True, "to_onehot_y": True}
    exact = voxloss.DiceLoss(**options)(x.double(), labels).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert x.softmax(1).sum().dtype == torch.bfloat16
        theirs, ours = (module.DiceLoss(**options)(x, labels).item() for module in (monai.losses, voxloss))
    assert ours == pytest.approx(exact, abs=LOSS["float32"])
    assert abs(theirs - exact) > 2e-5


@pytest.mark.parametrize("options", [{"soft_label": True}, {"squared_pred": True}], ids=str)
def test_soft_labels_and_squared_denominators_in_float32(options: dict[str, Any]) -> None:
    p = torch.rand(1, 1, 257, 257, 257) if "squared_pred" in options else torch.full((1, 1, 257, 257, 257), 0.25)
    g = torch.zeros_like(p)
    g[..., :64, :, :] = 1
    inside, total = p[..., :64, :, :].double().sum(), p.double().sum()
    if "squared_pred" in options:
        total = p.double().square().sum()
    exact = 1 - 2 * inside / (total + 64 * 257 * 257)
    theirs, ours = (abs(module.DiceLoss(**options)(p, g) - exact) for module in (monai.losses, voxloss))
    assert ours < LOSS["float32"]
    assert theirs > 10 * LOSS["float32"]


def test_a_perfect_soft_prediction_is_stationary_whatever_alpha_and_beta() -> None:
    g = torch.rand(1, 1, 6, 6, 6, dtype=torch.float64)
    options: dict[str, Any] = {"alpha": 0.3, "beta": 0.7, "soft_label": True}
    _, gradient = value_and_gradient(monai.losses.TverskyLoss(**options), g, g)
    assert gradient.abs().max() > 1e-4
    _, gradient = value_and_gradient(voxloss.TverskyLoss(**options), g, g)
    assert gradient.abs().max() == 0


def test_absent_classes_can_be_left_out() -> None:
    labels = label_map(channels=3)
    p = one_hot(labels, 8, torch.float32).clamp(0.001, 0.999)  # nearly perfect; classes 3…7 are absent
    theirs = monai.losses.DiceLoss(to_onehot_y=True)(p, labels)
    assert theirs > 0.6
    torch.testing.assert_close(voxloss.DiceLoss(to_onehot_y=True)(p, labels), theirs)
    assert voxloss.DiceLoss(to_onehot_y=True, absent="skip")(p, labels) < 0.01


def test_nan_under_an_ignored_voxel_does_not_spread() -> None:
    x, labels = logits(), label_map()
    x[0, :, 0, 0, 0], labels[0, 0, 0, 0, 0] = math.nan, -1
    options: dict[str, Any] = {"softmax": True, "to_onehot_y": True, "ignore_index": -1}
    assert monai.losses.DiceLoss(**options)(x, labels).isnan()
    value, gradient = value_and_gradient(voxloss.DiceLoss(**options), x, labels)
    assert math.isfinite(value)
    assert gradient.isfinite().all()


def test_the_background_of_a_multi_label_target_is_not_ignored() -> None:
    g = torch.zeros(1, 2, 4, 4)
    g[:, 0, :2] = 1
    p = torch.full_like(g, 0.5)
    assert monai.losses.DiceLoss(ignore_index=-1)(p, g) != monai.losses.DiceLoss()(p, g)
    assert voxloss.DiceLoss(ignore_index=-1)(p, g) == voxloss.DiceLoss()(p, g)


def test_an_ignored_class_does_not_enter_the_mean() -> None:
    x, labels = logits(), label_map()
    options: dict[str, Any] = {"softmax": True, "to_onehot_y": True, "ignore_index": 2}
    theirs = monai.losses.DiceLoss(**options, reduction="none")(x, labels)
    assert theirs.shape[1] == 4
    assert (theirs[:, 2] > 0.999).all()
    torch.testing.assert_close(voxloss.DiceLoss(**options)(x, labels), theirs[:, [0, 1, 3]].mean())


def test_ignore_index_for_generalized_dice() -> None:
    x, labels = logits(items=1, spatial=(50,)), label_map(items=1, spatial=(50,))
    labels[..., :10] = 255
    with pytest.raises(TypeError):
        monai.losses.GeneralizedDiceLoss(**{"ignore_index": 255})  # type: ignore[arg-type]
    loss = voxloss.GeneralizedDiceLoss(softmax=True, to_onehot_y=True, ignore_index=255)
    torch.testing.assert_close(loss(x, labels), loss(x[..., 10:], labels[..., 10:]))


def test_a_weight_of_a_single_class_counts() -> None:
    x, mask = logits(channels=1), label_map(channels=2)
    for module, factor in ((monai.losses, 1), (voxloss, 3)):
        weighted, plain = (module.DiceLoss(sigmoid=True, weight=weight)(x, mask) for weight in (3.0, None))
        torch.testing.assert_close(weighted, factor * plain)


def test_a_scalar_weight_fits_every_number_of_classes() -> None:
    calls = [(logits(channels=c), label_map(channels=c)) for c in (3, 4)]
    options: dict[str, Any] = {"softmax": True, "to_onehot_y": True, "weight": 2.0}
    theirs, ours = (module.DiceLoss(**options) for module in (monai.losses, voxloss))
    theirs(*calls[0])
    with pytest.raises(ValueError, match="length of the `weight`"):
        theirs(*calls[1])
    assert ours(*calls[0]).isfinite()
    assert ours(*calls[1]).isfinite()


def test_weights_per_channel_or_per_counted_class() -> None:
    x, labels = logits(), label_map()
    options: dict[str, Any] = {"softmax": True, "to_onehot_y": True, "include_background": False}
    with pytest.raises(ValueError, match="length of the `weight`"):
        monai.losses.DiceLoss(**options, weight=[9, 1, 2, 3])(x, labels)
    per_channel, per_class = (voxloss.DiceLoss(**options, weight=w)(x, labels) for w in ([9, 1, 2, 3], [1, 2, 3]))
    assert per_channel == per_class


def test_softmax_over_one_channel_is_an_error() -> None:
    x, mask = logits(channels=1), label_map(channels=2)
    with pytest.warns(UserWarning, match="`softmax=True` ignored"):
        assert monai.losses.DiceLoss(softmax=True)(x, mask) == monai.losses.DiceLoss()(x, mask)
    with pytest.raises(ValueError, match=r"set sigmoid=True"):
        voxloss.DiceLoss(softmax=True)(x, mask)


@pytest.mark.parametrize(
    ("options", "x", "target"),
    [
        ({}, 5 * torch.ones(1, 2, 4), torch.ones(1, 2, 4)),
        ({"other_act": torch.tanh}, -torch.ones(1, 2, 4), torch.ones(1, 2, 4)),
        ({}, torch.rand(1, 2, 4), 2 * torch.ones(1, 2, 4)),
        ({"softmax": True, "to_onehot_y": True}, torch.rand(1, 2, 4), torch.full((1, 1, 4), 1.9)),
        ({"softmax": True}, torch.rand(1, 2, 0), torch.rand(1, 2, 0)),
        ({"smooth_nr": -1}, torch.rand(1, 2, 4), torch.ones(1, 2, 4)),
    ],
    ids=["logits without activation", "tanh", "target 2", "label 1.9", "no voxel", "negative smoothing"],
)
def test_what_makes_no_sense_is_an_error(options: dict[str, Any], x: Tensor, target: Tensor) -> None:
    monai.losses.DiceLoss(**options)(x, target)
    with pytest.raises(ValueError, match="expected"):
        voxloss.DiceLoss(**options)(x, target)


def test_negative_alpha_is_an_error() -> None:
    monai.losses.TverskyLoss(alpha=-1)
    with pytest.raises(ValueError, match="alpha: expected a finite number ≥ 0, received -1"):
        voxloss.TverskyLoss(alpha=-1)


def test_a_uint8_255_is_not_minus_one() -> None:
    x, labels = logits(channels=2), label_map(channels=2).to(torch.uint8)
    labels[0, 0, 0, 0, 0] = 255
    options: dict[str, Any] = {"softmax": True, "to_onehot_y": True, "ignore_index": -1}
    with pytest.raises(RuntimeError, match="out of bounds"):
        monai.losses.DiceLoss(softmax=True, to_onehot_y=True)(x, labels)
    monai.losses.DiceLoss(**options)(x, labels)
    with pytest.raises(ValueError, match=r"received 255 at \[0, 0, 0, 0, 0\]"):
        voxloss.DiceLoss(**options)(x, labels)


def test_an_empty_target_and_an_empty_prediction_without_smoothing() -> None:
    empty = torch.zeros(1, 1, 4, 4, 4)
    options: dict[str, Any] = {"smooth_nr": 0, "smooth_dr": 0}
    assert monai.losses.DiceLoss(**options)(empty, empty).isnan()
    value, gradient = value_and_gradient(voxloss.DiceLoss(**options), empty, empty)
    assert value == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("name", ["DiceLoss", "TverskyLoss", "GeneralizedDiceLoss"])
def test_compiles_to_one_graph(name: str) -> None:
    x, labels = logits(), label_map()
    for module in (monai.losses, voxloss):
        torch.compiler.reset()
        loss = getattr(module, name)(softmax=True, to_onehot_y=True)
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        if module is voxloss:
            assert compiled(x, labels) == loss(x, labels)
        else:
            with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
                compiled(x, labels)


def test_compounds_take_the_activation_that_is_set() -> None:
    x, labels = logits(), label_map()
    g = one_hot(labels, 4)
    alone: dict[str, Any] = {"to_onehot_y": True, "lambda_dice": 0.0}
    binary = F.binary_cross_entropy_with_logits(x, g)
    torch.testing.assert_close(monai.losses.DiceCELoss(sigmoid=True, **alone)(x, labels), F.cross_entropy(x, g))
    torch.testing.assert_close(voxloss.DiceCELoss(sigmoid=True, **alone)(x, labels), binary)
    p = (x.softmax(1) * g).sum(1)
    softmax, sigmoid = -((1 - p) ** 2 * p.log()).mean(), monai.losses.FocalLoss()(x, g)
    theirs = monai.losses.DiceFocalLoss(softmax=True, **alone)(x, labels)
    torch.testing.assert_close(theirs, sigmoid, check_dtype=False)
    torch.testing.assert_close(voxloss.DiceFocalLoss(softmax=True, **alone)(x, labels), softmax)


def test_the_mean_of_a_focal_loss_is_over_voxels() -> None:
    x, labels = logits(), label_map()
    options: dict[str, Any] = {"to_onehot_y": True, "gamma": 0.0}
    entropy = F.cross_entropy(x, labels[:, 0]).float()
    theirs, ours = (m.FocalLoss(use_softmax=True, **options)(x, labels) for m in (monai.losses, voxloss))
    torch.testing.assert_close(theirs, entropy / 4)
    torch.testing.assert_close(ours.float(), entropy)
    # An index that no voxel has changes nothing.
    theirs, ours = (
        m.FocalLoss(**options, ignore_index=255)(x, labels) / m.FocalLoss(**options)(x, labels)
        for m in (monai.losses, voxloss)
    )
    assert theirs.item() == pytest.approx(4)
    assert ours.item() == pytest.approx(1)


def test_a_focal_loss_without_background_has_a_softmax_over_all_channels() -> None:
    x, labels = logits(), label_map()
    options: dict[str, Any] = {
        "to_onehot_y": True,
        "use_softmax": True,
        "include_background": False,
        "gamma": 0.0,
    }
    theirs, ours = (m.FocalLoss(**options, reduction="sum")(x, labels).double() for m in (monai.losses, voxloss))
    g = one_hot(labels, 4)[:, 1:]
    for value, log_p in ((theirs, x[:, 1:].log_softmax(1)), (ours, x.log_softmax(1)[:, 1:])):
        torch.testing.assert_close(value, -(g * log_p).flatten(2).mean(2).sum(), rtol=1e-6, atol=1e-6)


def test_focal_terms_of_soft_labels() -> None:
    """Of g = ½ as much as of what is there and of what is not."""
    x, g = logits(channels=1), torch.full((2, 1, 5, 6, 7), 0.5)
    halves = [(voxloss.FocalLoss()(x, torch.full_like(g, value))).double() for value in (0.0, 1.0)]
    theirs, ours = (m.FocalLoss()(x, g).double() for m in (monai.losses, voxloss))
    torch.testing.assert_close(ours, sum(halves) / 2)
    assert abs(theirs - ours) > 0.1 * ours


@pytest.mark.parametrize("name", ["DiceCELoss", "DiceFocalLoss", "GeneralizedDiceFocalLoss"])
def test_ignore_index_for_compounds(name: str) -> None:
    x, labels = logits(spatial=(50,)), label_map(spatial=(50,))
    labels[..., :10] = 255
    with pytest.raises(TypeError):
        getattr(monai.losses, name)(ignore_index=255)
    loss = getattr(voxloss, name)(softmax=True, to_onehot_y=True, ignore_index=255)
    torch.testing.assert_close(loss(x, labels), loss(x[..., 10:], labels[..., 10:]))


def test_weighted_cross_entropy_of_a_label_map_and_of_its_one_hot() -> None:
    x, labels = logits(), label_map()
    options: dict[str, Any] = {"softmax": True, "weight": torch.tensor([1.0, 2.0, 3.0, 4.0]).double()}
    for module, is_same in ((monai.losses, False), (voxloss, True)):
        of_map = module.DiceCELoss(to_onehot_y=True, **options)(x, labels)
        of_one_hot = module.DiceCELoss(**options)(x, one_hot(labels, 4))
        assert torch.isclose(of_map, of_one_hot) == is_same


def test_a_masked_voxel_is_no_background() -> None:
    """MONAI multiplies input and target by the mask: its label becomes 0, which is that of the background."""
    x, labels = logits(spatial=(50,)), label_map(spatial=(50,))
    mask = torch.ones_like(labels)
    mask[..., :25] = 0
    deleted = voxloss.DiceLoss(softmax=True, to_onehot_y=True)(x[..., 25:], labels[..., 25:])
    theirs = monai.losses.MaskedDiceLoss(softmax=True, to_onehot_y=True)(x, labels, mask)
    torch.testing.assert_close(voxloss.DiceLoss(softmax=True, to_onehot_y=True)(x, labels, mask), deleted)
    assert abs(theirs - deleted) > 0.02


def test_the_unified_focal_loss_of_more_than_two_classes() -> None:
    p, labels = logits().softmax(1).requires_grad_(), label_map()
    theirs = monai.losses.AsymmetricUnifiedFocalLoss(to_onehot_y=True, num_classes=4)
    for loss, some in ((theirs, False), (voxloss.UnifiedFocalLoss(to_onehot_y=True), True)):
        (gradient,) = torch.autograd.grad(loss(p, labels), p)
        assert gradient[:, :2].any()
        assert gradient[:, 2:].any() == some
