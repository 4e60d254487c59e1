"""The less usual losses against other witnesses: MONAI, scikit-learn, plain torch; every loss at the edges."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import monai.losses
import pytest
import torch
import torch.nn.functional as F
from monai.losses.unified_focal_loss import AsymmetricFocalLoss, AsymmetricFocalTverskyLoss
from sklearn.metrics import matthews_corrcoef, recall_score
from torch import Tensor

import voxloss
from derivatives import derivatives_hold
from every_loss import LOSSES, make, value_and_gradient
from volumes import label_map, logits, one_hot
from voxloss.backends import select
from voxloss.losses.exponential_logarithmic import LogarithmicCrossEntropyLoss
from voxloss_verify.tolerances import GRADIENT, LOSS, PARITY

MAP: dict[str, Any] = {"softmax": True, "to_onehot_y": True}
BOX = (2, 3, 4)


def same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], x: Tensor, target: Tensor) -> None:
    """The same value and gradient."""
    values, gradients = [], []
    for loss in (ours, theirs):
        leaf = x.detach().clone().requires_grad_()
        values.append(loss(leaf, target))
        gradients.append(torch.autograd.grad(values[-1].sum(), leaf)[0])
    torch.testing.assert_close(*values, rtol=PARITY["float64"], atol=1e-14)
    torch.testing.assert_close(*gradients, rtol=PARITY["float64"], atol=1e-14)


# Matthews' correlation coefficient.


@pytest.mark.pairwise(
    form=["label map", "one-hot"],
    activation=["softmax", "sigmoid"],
    include_background=[True, False],
    reduction=["mean", "sum", "none"],
    batch=[True, False],
    smooth_nr=[0.0, 1.0],
    smooth_dr=[1e-5, 1.0],
)
def test_mcc_is_monais(options: dict[str, Any]) -> None:
    form, activation = options.pop("form"), options.pop("activation")
    x, labels = logits(), label_map()
    shared = {**options, activation: True, "to_onehot_y": form == "label map"}
    target = labels if form == "label map" else one_hot(labels, 4)
    same(voxloss.MCCLoss(**shared), monai.losses.MCCLoss(**shared), x, target)


def test_mcc_takes_monais_arguments() -> None:
    monais, own = (
        list(inspect.signature(loss).parameters.values()) for loss in (monai.losses.MCCLoss, voxloss.MCCLoss)
    )
    assert [(p.name, p.default) for p in own[: len(monais)]] == [(p.name, p.default) for p in monais]


@pytest.mark.parametrize("smooth_dr", [0.0, 1e-5])
def test_mcc_of_masks_is_scikit_learns(smooth_dr: float) -> None:
    p, g = torch.rand(2, 1, *BOX) > 0.3, torch.rand(2, 1, *BOX) > 0.4
    got = voxloss.MCCLoss(reduction="none", smooth_dr=smooth_dr)(p.double(), g.double())
    for b in range(2):
        wanted = 1 - matthews_corrcoef(g[b].flatten(), p[b].flatten())
        assert abs(got[b].item() - wanted) < (1e-6 if smooth_dr else 1e-15)


@pytest.mark.parametrize("smooth_dr", [0.0, 1e-5])
@pytest.mark.parametrize(("p", "g"), [(0, 0), (1, 1), (0, 1), (1, 0), (0.25, 0), (0, 0.5)])
def test_mcc_of_nothing_and_of_all(p: float, g: float, smooth_dr: float) -> None:
    """Perfect is 0 also where there is nothing to correlate; else the root of 0 leaves no correlation."""
    x = torch.full((1, 1, *BOX), float(p), dtype=torch.float64)
    target = (torch.arange(24).view(1, 1, *BOX) < 24 * g).double()
    value, gradient = value_and_gradient(voxloss.MCCLoss(smooth_dr=smooth_dr), x, target)
    assert value == (0 if p == g and p in (0, 1) else 1)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("share", [1e-1, 1e-3, 1e-5])
def test_mcc_of_a_class_that_is_nearly_all_or_nearly_nothing(share: float) -> None:
    """N·TP − Σp·Σg cancels; float32 sums of 64³ voxels leave enough of it."""
    generator = torch.Generator().manual_seed(0)
    g = torch.rand(1, 1, 64, 64, 64, generator=generator) < share
    g = torch.cat([~g, g], 1)
    z = 6 * (g.float() - 0.5) + torch.randn(g.shape, generator=generator)
    loss = voxloss.MCCLoss(softmax=True, reduction="none")
    exact = voxloss.MCCLoss(softmax=True, reduction="none", backend="reference")
    assert (loss(z, g.float()).double() - exact(z.double(), g.double())).abs().max() < LOSS["float32"]


@pytest.mark.parametrize("backend", ["reference", "eager", "numba_cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_mcc_of_a_class_that_is_absent_has_no_gradient(dtype: torch.dtype, backend: str) -> None:
    """∂L/∂TN is N/√s_d there, ∂L/∂TP and ∂L/∂FN are 0: the one must leave no rounding error to the others."""
    x, labels = logits(1, 3, (24, 24, 24), dtype), torch.zeros(1, 1, 24, 24, 24, dtype=torch.int64)
    _, gradient = value_and_gradient(voxloss.MCCLoss(**MAP, backend=backend), x, labels)
    assert not gradient.any()


# Sensitivity and specificity.


@pytest.mark.parametrize("r", [0.0, 0.05, 1.0])
def test_squared_errors_inside_and_outside(r: float) -> None:
    x, g = logits().sigmoid(), logits().sigmoid()
    loss = voxloss.SensitivitySpecificityLoss(r=r, reduction="none")

    def plain(p: Tensor, g: Tensor) -> Tensor:
        inside = ((g - p) ** 2 * g).sum(BOX) / g.sum(BOX)
        outside = ((g - p) ** 2 * (1 - g)).sum(BOX) / (1 - g).sum(BOX)
        return r * inside + (1 - r) * outside

    same(loss, plain, x, g)
    same(lambda g, p: loss(p, g), lambda g, p: plain(p, g), g, x)


def test_sensitivity_and_specificity_of_masks_are_scikit_learns() -> None:
    p, g = torch.rand(1, 1, *BOX) > 0.3, torch.rand(1, 1, *BOX) > 0.4
    got = voxloss.SensitivitySpecificityLoss(r=0.25)(p.double(), g.double())
    sensitivity, specificity = (recall_score(g.flatten(), p.flatten(), pos_label=label) for label in (1, 0))
    assert abs(got.item() - (0.25 * (1 - sensitivity) + 0.75 * (1 - specificity))) < 1e-15


def test_an_error_over_no_voxels_is_none() -> None:
    x = torch.full((1, 1, *BOX), 0.25, dtype=torch.float64)
    loss = voxloss.SensitivitySpecificityLoss(r=0.2)
    for target, wanted in ((torch.zeros_like(x), 0.8 * 0.25**2), (torch.ones_like(x), 0.2 * 0.75**2)):
        value, gradient = value_and_gradient(loss, x, target)
        torch.testing.assert_close(value.item(), wanted)
        assert gradient.isfinite().all()


# Penalty Generalized Dice.


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("k", [0.0, 2.5])
def test_penalty(k: float, reduction: str) -> None:
    shared = {**MAP, "w_type": "simple"}
    each = voxloss.GeneralizedDiceLoss(**shared, reduction="none")

    def plain(x: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = each(x, labels)
        loss = loss / (1 + k * (1 - loss))
        return loss.mean() if reduction == "mean" else loss

    same(voxloss.PenaltyGeneralizedDiceLoss(**shared, k=k, reduction=reduction), plain, logits(), label_map())


def test_the_penalty_pushes_what_is_wrong_and_not_what_is_right() -> None:
    x = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    y = voxloss.formulas.penalty(x, 2.5)
    assert y.tolist() == [0, 1]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.tensor([1 / 3.5, 3.5]).double())


# Exponential logarithmic.


@pytest.mark.parametrize("frequencies", [None, [4.0, 3.0, 2.0, 1.0]])
@pytest.mark.parametrize(("gamma_dice", "gamma_ce"), [(0.3, 0.3), (1.0, 0.5), (2.0, 1.5)])
def test_exponential_logarithmic(gamma_dice: float, gamma_ce: float, frequencies: list[float] | None) -> None:
    x, labels = logits(), label_map()
    ours = voxloss.ExponentialLogarithmicLoss(
        **MAP, gamma_dice=gamma_dice, gamma_ce=gamma_ce, frequencies=frequencies
    )

    def plain(x: Tensor, labels: Tensor) -> Tensor:
        g, log_p = one_hot(labels, 4), F.log_softmax(x, 1)
        p = log_p.exp()
        dice = (2 * (p * g).sum(BOX) + 1) / ((p + g).sum(BOX) + 1)
        f = g.sum((0, *BOX)) if frequencies is None else torch.tensor(frequencies, dtype=torch.float64)
        w = (f.sum() / f).sqrt().view(1, 4, 1, 1, 1)
        entropy = (w * g * (-log_p) ** gamma_ce).sum(1).mean()
        return 0.8 * ((-dice.log()) ** gamma_dice).mean() + 0.2 * entropy

    same(ours, plain, x, labels)


@pytest.mark.parametrize("frequencies", [None, [0.1, 0.2, 0.3, 0.4]])
def test_powers_of_binary_logarithms(frequencies: list[float] | None) -> None:
    x, labels = logits(), label_map()
    ours = LogarithmicCrossEntropyLoss(0.3, frequencies, sigmoid=True, to_onehot_y=True)

    def plain(x: Tensor, labels: Tensor) -> Tensor:
        g = one_hot(labels, 4)
        f = g.mean((0, *BOX)) if frequencies is None else torch.tensor(frequencies, dtype=torch.float64)
        f = f.view(1, 4, 1, 1, 1)
        yes, no = (-F.logsigmoid(x)) ** 0.3 / f.sqrt(), (-F.logsigmoid(-x)) ** 0.3 / (1 - f).sqrt()
        return (g * yes + (1 - g) * no).mean()

    same(ours, plain, x, labels)


def test_a_class_without_voxels_has_no_frequency() -> None:
    x, labels = logits(), label_map(channels=3)
    value, gradient = value_and_gradient(voxloss.ExponentialLogarithmicLoss(**MAP), x, labels)
    assert value.isfinite()
    assert gradient.isfinite().all()


# Combo.


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.2, 0.7), (0.0, 0.5), (1.0, 1.0)])
def test_combo(alpha: float, beta: float) -> None:
    x, labels = logits(), label_map()
    dice: dict[str, Any] = {name: make("DiceLoss", name, to_onehot_y=True) for name in ("sigmoid", "softmax")}

    def binary(x: Tensor, labels: Tensor) -> Tensor:
        g = one_hot(labels, 4)
        entropy = -(beta * g * F.logsigmoid(x) + (1 - beta) * (1 - g) * F.logsigmoid(-x)).mean()
        mixed: Tensor = alpha * entropy + (1 - alpha) * dice["sigmoid"](x, labels)
        return mixed

    def categorical(x: Tensor, labels: Tensor) -> Tensor:
        share = torch.where(labels == 0, 1 - beta, torch.tensor(beta, dtype=torch.float64))
        entropy = -(share * F.log_softmax(x, 1).gather(1, labels)).mean()
        mixed: Tensor = alpha * entropy + (1 - alpha) * dice["softmax"](x, labels)
        return mixed

    same(voxloss.ComboLoss(sigmoid=True, to_onehot_y=True, alpha=alpha, beta=beta), binary, x, labels)
    same(voxloss.ComboLoss(**MAP, alpha=alpha, beta=beta), categorical, x, labels)


# Unified focal.


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("delta", [0.6, 0.3])
def test_unified_focal_of_two_classes_is_monais_but_for_its_mean_over_classes(delta: float, gamma: float) -> None:
    x, labels = logits(channels=2), label_map(channels=2)
    shared: Any = {"to_onehot_y": True, "delta": delta, "gamma": gamma}
    focal, tversky = (kind(**shared) for kind in (AsymmetricFocalLoss, AsymmetricFocalTverskyLoss))

    def theirs(x: Tensor, labels: Tensor) -> Tensor:
        p = x.softmax(1)
        mixed: Tensor = 0.25 * 2 * focal(p, labels) + 0.75 * tversky(p, labels)
        return mixed

    ours = voxloss.UnifiedFocalLoss(
        **MAP, delta=delta, gamma=gamma, lambda_focal=0.25, smooth_nr=1e-7, smooth_dr=1e-7
    )
    same(ours, theirs, x, labels)


@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_unified_focal_of_many_classes(activation: str, asymmetric: bool) -> None:
    x, labels = logits(), label_map()
    delta, gamma = 0.7, 0.25
    shared = {"to_onehot_y": True, "delta": delta, "gamma": gamma, "asymmetric": asymmetric}
    ours = make("UnifiedFocalLoss", activation, **shared)

    def plain(x: Tensor, labels: Tensor) -> Tensor:
        g = one_hot(labels, 4)
        background = torch.tensor([activation == "softmax", False, False, False]).view(1, 4, 1, 1, 1)
        p, log_p = (
            (x.softmax(1), F.log_softmax(x, 1)) if activation == "softmax" else (x.sigmoid(), F.logsigmoid(x))
        )
        focus = torch.where(background, 1 - delta, torch.tensor(delta, dtype=torch.float64))
        power = (1 - p) ** gamma
        power = power if not asymmetric else torch.where(background, power, 1.0)
        voxels = -(focus * g * power * log_p).sum(1)
        if activation == "sigmoid":
            voxels = (voxels - ((1 - delta) * (1 - g) * p**gamma * F.logsigmoid(-x)).sum(1)) / 4
        tp, fp, fn = ((part).sum(BOX) for part in (p * g, p * (1 - g), (1 - p) * g))
        distance = 1 - (tp + 1e-5) / (tp + delta * fn + (1 - delta) * fp + 1e-5)
        steep = distance ** (1 - gamma)
        terms = torch.where(background.flatten(), distance, steep) if asymmetric else steep
        return 0.5 * voxels.mean() + 0.5 * terms.mean()

    same(ours, plain, x, labels)


@pytest.mark.parametrize(
    "options",
    [
        {"include_background": False},
        {"classes": [2, 0]},
        {"classes": [0]},
        {"classes": [1, 0], "ignore_index": 1},
        {"ignore_index": 0},
    ],
    ids=str,
)
def test_the_background_of_the_unified_focal_loss_is_found(options: dict[str, Any]) -> None:
    x, labels = logits(), label_map()
    part = voxloss.UnifiedFocalLoss(**MAP, **options).focal_tversky
    shared: dict[str, Any] = {**MAP, "alpha": 0.4, "beta": 0.6, "reduction": "none"}
    plain = voxloss.TverskyLoss(**shared, **options)(x, labels)
    steep = plain.sqrt()
    chosen = [c for c in options.get("classes", []) if c != options.get("ignore_index")]
    if 0 in chosen:
        steep[:, chosen.index(0)] = plain[:, chosen.index(0)]
    torch.testing.assert_close(part(x, labels), steep.mean())


# Every loss.


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_gradients(name: str, activation: str) -> None:
    if name == "FocalLoss" and activation == "none":
        pytest.skip("it takes logits")
    x, labels = logits(items=2, channels=3, spatial=(2, 3)), label_map(2, 3, (2, 3))
    x = (x.sigmoid() if activation == "none" else x).requires_grad_()
    loss = make(name, activation, to_onehot_y=True)
    assert derivatives_hold(lambda x: loss(x, labels), (x,))


@pytest.mark.parametrize("name", LOSSES)
def test_one_pass_forward_and_one_backward(name: str, passes: list[tuple[str, str]]) -> None:
    x, labels = logits().requires_grad_(), label_map()
    make(name, "softmax", to_onehot_y=True)(x, labels).backward()
    backend, _ = select()
    expected = {
        # One chooses the voxels, and has no gradient.
        "TopKLoss": ["voxel_terms", "region_sums", "region_sums_backward"],
        "DiceTopKLoss": ["voxel_terms", "region_sums", "region_sums_backward"],
    }.get(name, ["region_sums", "region_sums_backward"])
    assert passes == [(backend, each) for each in expected]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", LOSSES)
def test_compiles_copies_and_goes_into_deep_supervision(name: str) -> None:
    x, labels = logits(dtype=torch.float32, spatial=(8, 8, 8)), label_map(spatial=(8, 8, 8))
    loss = make(name, "softmax", to_onehot_y=True)
    value, gradient = value_and_gradient(loss, x, labels)
    torch.compiler.reset()
    compiled: Any = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for other in (compiled, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(value_and_gradient(other, x, labels), (value, gradient))
    supervised = monai.losses.DeepSupervisionLoss(loss)
    small = x[..., ::2, ::2, ::2]
    low = F.interpolate(labels.float(), scale_factor=0.5, mode="nearest-exact")
    torch.testing.assert_close(supervised([x, small], labels.float()), value + 0.5 * loss(small, low))
    assert repr(loss).startswith(f"{type(loss).__name__}(")


@pytest.mark.parametrize("name", LOSSES)
def test_goes_into_nnunets_deep_supervision(name: str) -> None:
    nnunet = pytest.importorskip("nnunetv2.training.loss.deep_supervision")
    x, labels = logits(dtype=torch.float32, spatial=(8, 8, 8)), label_map(spatial=(8, 8, 8))
    small, low = x[..., ::2, ::2, ::2], labels[..., ::2, ::2, ::2]
    loss = make(name, "softmax", to_onehot_y=True)
    wrapped = nnunet.DeepSupervisionWrapper(loss, [1.0, 0.5])
    torch.testing.assert_close(wrapped([x, small], [labels, low]), loss(x, labels) + 0.5 * loss(small, low))


@pytest.mark.sampled(4)
@pytest.mark.filterwarnings("ignore:single channel prediction")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_finite_at_every_edge(name: str, dtype: str) -> None:
    """Certain, wrong and infinite logits, one voxel, 200 classes, all of one class."""
    kind = getattr(torch, dtype)
    for activation in ("softmax", "sigmoid"):
        loss = make(name, activation, to_onehot_y=True)
        for channels, spatial in ((1, (2, 3, 4)), (2, (1, 1, 1)), (3, (2, 3, 4)), (200, (2, 3, 4))):
            if channels == 1 and activation == "softmax":
                continue
            labels = label_map(2, max(2, channels), spatial)
            right = one_hot(labels, channels, kind) if channels > 1 else labels.to(kind)
            for size in (1e4, torch.inf):
                for x in (
                    torch.where(right > 0, size, -size),
                    torch.where(right > 0, -size, size),
                    torch.where(right > 0, size, 0.0),
                    torch.where(right > 0, -size, 0.0),
                    torch.full(right.shape, -size),
                    torch.full(right.shape, size),
                ):
                    for target in (labels, torch.zeros_like(labels)):
                        value, gradient = value_and_gradient(loss, x.to(kind), target)
                        assert value.isfinite(), (activation, channels, size)
                        assert gradient.isfinite().all(), (activation, channels, size)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_perfect_prediction_costs_nothing_and_stays(name: str, dtype: str) -> None:
    labels = label_map(channels=3)
    x = torch.where(one_hot(labels, 3) > 0, 1e4, -1e4).to(getattr(torch, dtype))
    for activation in ("softmax", "sigmoid"):
        loss = make(name, activation, to_onehot_y=True)
        value, gradient = value_and_gradient(loss, x, labels)
        assert value.abs() < 1e-6 or loss.map_name == "distance"  # whose mean is negative inside
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_are_those_numbers(name: str) -> None:
    x, labels = logits(spatial=(17, 9, 8)), label_map(spatial=(17, 9, 8))
    loss = make(name, "softmax", to_onehot_y=True)
    for dtype in ("float16", "bfloat16"):
        half = x.to(getattr(torch, dtype))
        value, gradient = value_and_gradient(loss, half, labels)
        exact, by_exact = value_and_gradient(loss, half.double(), labels)
        assert (value.double() - exact).abs() < LOSS[dtype] * exact.abs().clamp(min=1)
        assert (gradient.double() - by_exact).abs().max() < GRADIENT[dtype] * by_exact.abs().max() + 2.0**-24


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: voxloss.MCCLoss(smooth_dr=-1), "smooth_dr: expected a finite number ≥ 0, received -1"),
        (lambda: voxloss.SensitivitySpecificityLoss(r=2), "r: expected a number in [0, 1], received 2"),
        (lambda: voxloss.PenaltyGeneralizedDiceLoss(k=-1), "k: expected a finite number ≥ 0, received -1"),
        (
            lambda: voxloss.ExponentialLogarithmicLoss(gamma_ce=0),
            "gamma_ce: expected a finite number > 0, received 0",
        ),
        (lambda: voxloss.ExponentialLogarithmicLoss(smooth_nr=0), "smooth_nr: expected a finite number > 0"),
        (
            lambda: voxloss.ExponentialLogarithmicLoss(frequencies=[1, 0]),
            "frequencies: expected one finite number > 0 per class, received [1, 0]",
        ),
        (
            lambda: voxloss.ExponentialLogarithmicLoss(**MAP, frequencies=[1, 2])(logits(), label_map()),
            "frequencies: expected a single value or 4 (one per channel), received 2",
        ),
        (lambda: voxloss.ComboLoss(alpha=2), "alpha: expected a number in [0, 1], received 2"),
        (lambda: voxloss.UnifiedFocalLoss(gamma=1), "gamma: expected a number in [0, 1), received 1"),
        (lambda: voxloss.UnifiedFocalLoss(delta=-0.1), "delta: expected a number in [0, 1], received -0.1"),
    ],
)
def test_errors(make_it: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_it()


# Factors of the classes are numbers of the loss, not of the network's dtype.

FACTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "frequencies": ("ExponentialLogarithmicLoss", {"frequencies": [1e6, 2e5, 1e-9, 7.0]}),
    "weight": ("DiceCELoss", {"weight": [0.1, 0.2, 0.3, 0.7]}),
    "one weight": ("MCCLoss", {"weight": 0.1}),
    "weight of voxels": ("CrossEntropyLoss", {"weight": [0.1, 0.2, 0.3, 1e5]}),
    "alpha": ("FocalLoss", {"alpha": [0.1, 0.2, 1e-9, 0.7]}),
}


@pytest.mark.parametrize("convert", ["half", "bfloat16", "float", "double"])
@pytest.mark.parametrize("what", FACTORS)
def test_a_dtype_that_a_network_is_converted_to_leaves_the_loss_as_it_is(what: str, convert: str) -> None:
    name, factors = FACTORS[what]
    x, labels = logits(), label_map()
    expected = value_and_gradient(make(name, "softmax", to_onehot_y=True, **factors), x, labels)
    network = torch.nn.Sequential(make(name, "softmax", to_onehot_y=True, **factors), torch.nn.Linear(1, 1))
    getattr(network, convert)()
    converted: Any = network[0]
    assert all(map(torch.equal, value_and_gradient(converted, x, labels), expected))


def test_numbers_are_not_rounded_to_float32() -> None:
    x, labels = logits(), label_map()
    once, thrice = (
        voxloss.DiceLoss(**MAP, weight=[w, w, w, w], reduction="sum")(x, labels).item() for w in (0.1, 0.3)
    )
    assert once == pytest.approx(0.1 * voxloss.DiceLoss(**MAP, reduction="sum")(x, labels).item(), rel=1e-15)
    assert thrice == pytest.approx(3 * once, rel=1e-15)


def test_factors_move_to_a_device_and_to_one_without_float64() -> None:
    loss = voxloss.DiceCELoss(**MAP, weight=[0.1, 0.2, 0.3, 0.7]).to("meta")
    assert {(buffer.device.type, buffer.dtype) for buffer in loss.buffers()} == {("meta", torch.float64)}

    def to_mps(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it"
            )
        return tensor.to("meta")

    loss = voxloss.DiceCELoss(**MAP, weight=[0.1, 0.2, 0.3, 0.7])._apply(to_mps)
    assert {(buffer.device.type, buffer.dtype) for buffer in loss.buffers()} == {("meta", torch.float32)}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("MCCLoss", "squared_pred"),
        ("SensitivitySpecificityLoss", "soft_label"),
        ("TverskyLoss", "squared_pred"),
        ("AsymmetricSimilarityLoss", "alpha"),
        ("UnifiedFocalLoss", "squared_pred"),
        ("DiceCELoss", "squared"),
        ("CrossEntropyLoss", "absent"),
        ("FocalLoss", "softmax"),
    ],
)
def test_an_option_that_means_nothing_is_refused(name: str, option: str) -> None:
    """Also one that a base class knows: what is accepted has an effect."""
    loss: Any = LOSSES[name]
    with pytest.raises(TypeError, match=rf"{name} received an unexpected keyword argument '{option}'\..* Beside"):
        loss(**{option: True})


# Soft labels.


def test_raters_that_add_up_to_more_than_one() -> None:
    """Resampled probabilities do, up to 1.059 for a spinal cord: the error names value, position and remedy."""
    g = one_hot(label_map(channels=2), 2)
    g[0, 1, 2, 3, 4] = 1.059
    with pytest.raises(
        ValueError, match=r"values in \[0, 1\].* received 1\.059 at \[0, 1, 2, 3, 4\].*target\.clamp\(0, 1\)"
    ):
        voxloss.DiceCELoss(softmax=True, soft_label=True)(logits(channels=2), g)
    assert voxloss.DiceCELoss(softmax=True, soft_label=True)(logits(channels=2), g.clamp(0, 1)).isfinite()
