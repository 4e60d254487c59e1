"""Cross entropy, focal loss and the compounds: torch's and MONAI's where these are right, all over ONE pass."""

from __future__ import annotations

import inspect
import math
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import monai.losses
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import voxloss
from derivatives import derivatives_hold
from every_loss import LOSSES, make
from test_monai_parity import assert_equal
from volumes import SHAPES, label_map, logits, one_hot
from voxloss import CrossEntropyLoss, DiceCELoss, DiceFocalLoss, FocalLoss, StatisticsLoss
from voxloss.backends import BACKENDS
from voxloss_verify.subject.maps import MapOfTarget
from voxloss_verify.subject.readers import map_of
from voxloss_verify.tolerances import PARITY

COMPOUNDS = [
    voxloss.DiceCELoss,
    voxloss.DiceFocalLoss,
    voxloss.GeneralizedDiceFocalLoss,
    voxloss.TverskyCELoss,
    voxloss.FocalTverskyCELoss,
]
MONAIS: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (voxloss.DiceCELoss, monai.losses.DiceCELoss),
    (voxloss.DiceFocalLoss, monai.losses.DiceFocalLoss),
    (voxloss.GeneralizedDiceFocalLoss, monai.losses.GeneralizedDiceFocalLoss),
    (voxloss.FocalLoss, monai.losses.FocalLoss),
]
MAP: dict[str, Any] = {"softmax": True, "to_onehot_y": True}
WEIGHT = torch.tensor([0.3, 1.3, 2.3, 3.3], dtype=torch.float64)


def every_loss(activation: str = "softmax", **options: Any) -> list[StatisticsLoss]:
    """One of each, with the same options."""
    shared = {activation: True, **options}
    focal = FocalLoss(use_softmax=activation == "softmax", **options)
    return [CrossEntropyLoss(label_smoothing=0.2, **shared), focal, *(loss(**shared) for loss in COMPOUNDS)]


def value_and_gradient(loss: Any, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    value = loss(x, target)
    return value, torch.autograd.grad(value, x)[0]


def same(ours: Any, theirs: Any, x: Tensor, target: Tensor, most: float = PARITY["float64"]) -> None:
    got, want = value_and_gradient(ours, x, target), value_and_gradient(theirs, x, target)
    torch.testing.assert_close(got[0], want[0], rtol=most, atol=most, check_dtype=False)
    scale = want[1].abs().max()
    torch.testing.assert_close(got[1] / scale, want[1] / scale, rtol=0, atol=most)


# Torch's losses.


@pytest.mark.pairwise(
    form=["label map", "one-hot", "soft"],
    shape=list(SHAPES),
    weight=[None, "each"],
    ignore_index=[None, 2, -100],
    label_smoothing=[0.0, 0.1, 1.0],
    reduction=["mean", "sum"],
)
def test_cross_entropy_of_a_softmax_is_torchs(options: dict[str, Any]) -> None:
    form, ignore_index, weight = (options.pop(name) for name in ("form", "ignore_index", "weight"))
    spatial = SHAPES[options.pop("shape")]
    x, labels = logits(spatial=spatial), label_map(spatial=spatial)
    target = labels
    if form == "soft":
        target = torch.rand(x.shape, dtype=x.dtype)
        target = target / target.sum(1, keepdim=True)
        ignore_index = weight = None  # torch has no sentinel here, and another mean
    elif form == "one-hot":
        target = one_hot(labels, 4)
        ignore_index = weight = None
    elif ignore_index is not None:
        target = torch.where(torch.rand(labels.shape) < 0.3, ignore_index, labels)
    if weight is not None:
        options["weight"] = WEIGHT
    ours = CrossEntropyLoss(softmax=True, to_onehot_y=form == "label map", ignore_index=ignore_index, **options)

    def torchs(x: Tensor, target: Tensor) -> Tensor:
        given = {} if ignore_index is None else {"ignore_index": ignore_index}
        return F.cross_entropy(x, target[:, 0] if form == "label map" else target, **given, **options)

    same(ours, torchs, x, target)


@pytest.mark.pairwise(
    form=["label map", "multi-label", "soft"],
    channels=[1, 3],
    weight=[None, "each"],
    label_smoothing=[0.0, 0.3],
    reduction=["mean", "sum"],
)
def test_cross_entropy_of_a_sigmoid_is_torchs(options: dict[str, Any]) -> None:
    channels, smoothing, reduction = (options[name] for name in ("channels", "label_smoothing", "reduction"))
    x, labels = logits(channels=channels), label_map(channels=max(2, channels))
    is_map = options["form"] == "label map" and channels > 1
    target = {"label map": labels, "soft": torch.rand(x.shape, dtype=x.dtype)}.get(
        options["form"], torch.rand(x.shape).round()
    )
    weight = None if options["weight"] is None else WEIGHT[:channels]

    def torchs(x: Tensor, target: Tensor) -> Tensor:
        g = one_hot(target, channels) if is_map else target.to(x)
        factors = None if weight is None else weight.view(1, -1, 1, 1, 1)
        g = (1 - smoothing) * g + smoothing / 2
        return F.binary_cross_entropy_with_logits(x, g, factors, reduction=reduction)

    ours = CrossEntropyLoss(
        sigmoid=True, to_onehot_y=is_map, weight=weight, label_smoothing=smoothing, reduction=reduction
    )
    same(ours, torchs, x, target)


def test_a_label_map_and_its_one_hot_have_the_same_weighted_mean() -> None:
    """Torch divides the one by the sum of the weights, and the other by the number of voxels."""
    x, labels = logits(), label_map()
    g = one_hot(labels, 4)
    torchs = [F.cross_entropy(x, target, WEIGHT) for target in (labels[:, 0], g)]
    assert not torch.isclose(torchs[0], torchs[1])
    for target, is_map in ((labels, True), (g, False)):
        got = CrossEntropyLoss(softmax=True, weight=WEIGHT, to_onehot_y=is_map)(x, target)
        torch.testing.assert_close(got, torchs[0])


# MONAI's.


@pytest.mark.pairwise(
    form=["label map", "float label map", "one-hot", "soft"],
    shape=list(SHAPES),
    dtype=[torch.float64, torch.float32],
    channels=[2, 4],
    include_background=[True, False],
    squared_pred=[False, True],
    jaccard=[False, True],
    reduction=["mean", "sum"],
    smooth=[(1e-5, 1e-5), (0.5, 2)],
    batch=[False, True],
    weight=[None, "each"],
    lambda_dice=[1.0, 0.3],
    lambda_ce=[1.0, 0.0, 2.0],
    label_smoothing=[0.0, 0.2],
)
def test_dice_ce(options: dict[str, Any]) -> None:
    form, dtype, channels = (options.pop(name) for name in ("form", "dtype", "channels"))
    spatial, (smooth_nr, smooth_dr) = SHAPES[options.pop("shape")], options.pop("smooth")
    x = logits(channels=channels, spatial=spatial, dtype=dtype).requires_grad_()
    labels = label_map(channels=channels, spatial=spatial)
    for item in labels:
        item.view(-1)[:channels] = torch.arange(channels)
    soft = torch.rand(x.shape, dtype=dtype)
    is_map = form.endswith("label map")
    target = {
        "label map": labels,
        "float label map": labels.to(dtype),
        "one-hot": one_hot(labels, channels, dtype),
        "soft": soft / soft.sum(1, keepdim=True),
    }[form]
    # One-hot with weights is in `test_a_label_map_and_its_one_hot…`; one class left, and MONAI drops its weight.
    weighted = options.pop("weight") and is_map and channels - (not options["include_background"]) > 1
    arguments = {
        "softmax": True,
        "to_onehot_y": is_map,
        "smooth_nr": smooth_nr,
        "smooth_dr": smooth_dr,
        **options,
        **({"weight": WEIGHT[:channels].to(dtype)} if weighted else {}),
    }
    in_float32 = options["squared_pred"] and is_map  # MONAI's one-hot volume is
    most = PARITY["float32" if in_float32 or dtype == torch.float32 else "float64"]
    assert_equal(voxloss.DiceCELoss, monai.losses.DiceCELoss, x, target, arguments, most)


def test_dice_ce_of_a_single_channel() -> None:
    x, mask = logits(channels=1), label_map(channels=2)
    same(DiceCELoss(sigmoid=True), monai.losses.DiceCELoss(sigmoid=True), x, mask)


@pytest.mark.pairwise(
    form=["label map", "float label map", "one-hot", "multi-label", "soft"],
    channels=[2, 4],
    include_background=[True, False],
    squared_pred=[False, True],
    jaccard=[False, True],
    reduction=["mean", "sum"],
    batch=[False, True],
    gamma=[0.0, 1.0, 2.0, 2.7],
    weight=[None, "each"],
    lambda_dice=[1.0, 0.3],
    lambda_focal=[1.0, 2.0],
    alpha=[None, 0.25],
)
def test_dice_focal_of_a_sigmoid(options: dict[str, Any]) -> None:
    form, channels = options.pop("form"), options.pop("channels")
    x, labels = logits(channels=channels).requires_grad_(), label_map(channels=channels)
    is_map = form.endswith("label map")
    target = {
        "label map": labels,
        "float label map": labels.double(),
        "one-hot": one_hot(labels, channels),
        "multi-label": torch.rand(x.shape).round(),
        "soft": torch.rand(x.shape),
    }[form]
    if form == "soft":
        options.update(gamma=0.0, alpha=None)  # in between MONAI's factors are those of no label
    counted = channels - (not options["include_background"])
    weight = options.pop("weight")
    arguments = {"sigmoid": True, "to_onehot_y": is_map, **options}
    if weight and counted > 1:
        arguments["weight"] = WEIGHT[:counted].tolist()
    assert_equal(voxloss.DiceFocalLoss, monai.losses.DiceFocalLoss, x, target, arguments, PARITY["float32"])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("w_type", ["square", "simple", "uniform"])
def test_generalized_dice_focal_without_smoothing(reduction: str, w_type: str) -> None:
    x, labels = logits(), label_map()
    options: dict[str, Any] = {
        "sigmoid": True,
        "to_onehot_y": True,
        "smooth_nr": 0,
        "smooth_dr": 0,
        "weight": [1, 2, 3, 4],
        "gamma": 1.5,
        "lambda_gdl": 0.7,
        "lambda_focal": 1.3,
        "reduction": reduction,
        "w_type": w_type,
    }
    theirs = monai.losses.GeneralizedDiceFocalLoss(**options)
    same(voxloss.GeneralizedDiceFocalLoss(**options), theirs, x, labels, PARITY["float32"])


@pytest.mark.pairwise(
    form=["label map", "one-hot", "multi-label", "soft"],
    use_softmax=[False, True],
    include_background=[True, False],
    gamma=[0.0, 0.5, 2.0],
    alpha=[None, 0.25, "each"],
    weight=[None, 0.7, "each"],
    reduction=["mean", "sum"],
    ignore_index=[None, -1],
)
def test_focal(options: dict[str, Any]) -> None:
    form, ignore_index = options.pop("form"), options.pop("ignore_index")
    x, labels = logits(), label_map()
    target = {
        "label map": labels,
        "one-hot": one_hot(labels, 4),
        "multi-label": torch.rand(x.shape).round(),
        "soft": torch.rand(x.shape),
    }[form]
    if options["use_softmax"]:
        options["include_background"] = True  # without it MONAI's softmax runs over the other channels only
    counted = 4 - (not options["include_background"])
    for name in ("alpha", "weight"):
        if options[name] == "each":
            options[name] = [0.2 + 0.1 * c for c in range(counted)]
    if form == "soft" and not options["use_softmax"]:
        options.update(gamma=0.0, alpha=None)  # in between MONAI's factors are those of no label
    # With ignored voxels MONAI's mean is not over classes.
    factor = 1 / 4 if options["use_softmax"] and options["reduction"] == "mean" else 1.0
    arguments = {"to_onehot_y": form == "label map", **options}
    if ignore_index is not None and form == "label map" and options["reduction"] == "mean":
        target = torch.where(torch.rand(labels.shape) < 0.3, ignore_index, labels)
        arguments["ignore_index"] = ignore_index
        factor = 1.0 if options["use_softmax"] else float(counted)
    same(
        lambda x, t: factor * FocalLoss(**arguments)(x, t),
        monai.losses.FocalLoss(**arguments),
        x,
        target,
        PARITY["float32"],
    )


@pytest.mark.parametrize(("ours", "theirs"), MONAIS)
def test_constructor_names_order_and_defaults(ours: type, theirs: type) -> None:
    monais, own = (list(inspect.signature(loss).parameters.values()) for loss in (theirs, ours))
    assert [(p.name, p.default) for p in own[: len(monais)]] == [(p.name, p.default) for p in monais]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in own[len(monais) :])


@pytest.mark.parametrize("loss", COMPOUNDS)
def test_deep_supervision(loss: type) -> None:
    outputs = [logits(spatial=(8, 8, 8), dtype=torch.float32), logits(spatial=(4, 4, 4), dtype=torch.float32)]
    labels = label_map(spatial=(8, 8, 8)).float()
    got = monai.losses.DeepSupervisionLoss(loss(**MAP))(outputs, labels)
    small = F.interpolate(labels, scale_factor=0.5, mode="nearest-exact")
    torch.testing.assert_close(got, loss(**MAP)(outputs[0], labels) + 0.5 * loss(**MAP)(outputs[1], small))


# Compounds.


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_sum_of_its_parts_in_one_pass(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: Counter[str] = Counter()
    backend = BACKENDS["eager"]
    for name in ("region_sums", "region_sums_backward"):
        monkeypatch.setattr(backend, name, _counted(passes, name, getattr(backend, name)))
    x, labels = logits(), label_map()
    for loss in every_loss(activation, to_onehot_y=True, backend="eager"):
        passes.clear()
        value, gradient = value_and_gradient(loss, x, labels)
        assert passes == {"region_sums": 1, "region_sums_backward": 1}
        if not isinstance(loss, voxloss.CompoundLoss):
            continue
        apart = [(factor, *value_and_gradient(_alone(part, loss), x, labels)) for factor, part in loss.parts()]
        torch.testing.assert_close(value, sum(factor * v for factor, v, _ in apart))
        torch.testing.assert_close(gradient, sum(factor * g for factor, _, g in apart))


def _counted(passes: Counter[str], name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*arguments: Any, **more: Any) -> Any:
        passes[name] += 1
        return own(*arguments, **more)

    return counted


def _alone(part: StatisticsLoss, whole: StatisticsLoss) -> StatisticsLoss:
    assert part.activation == whole.activation
    assert part.to_onehot_y == whole.to_onehot_y
    return part


def test_lambdas_may_follow_a_schedule() -> None:
    x, labels = logits(), label_map()
    loss = DiceCELoss(**MAP, lambda_dice=0.0)
    alone = CrossEntropyLoss(**MAP)(x, labels)
    torch.testing.assert_close(loss(x, labels), alone)
    loss.lambda_ce = 0.25
    torch.testing.assert_close(loss(x, labels), alone / 4)


def test_one_gamma_for_a_pass() -> None:
    class Two(voxloss.CompoundLoss):
        weighted_parts = (("one", "first"), ("one", "second"))

        def __init__(self) -> None:
            super().__init__(sigmoid=True)
            self.first, self.second, self.one = FocalLoss(gamma=1.0), FocalLoss(gamma=2.0), 1.0

    x = logits()
    with pytest.raises(
        ValueError, match=r"gamma: expected one for all parts of a compound, received \['1.0', '2.0'\]"
    ):
        Two()(x, one_hot(label_map(), 4))


# What holds of all of them.


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("ignore_index", [1, -1, 255])
def test_an_ignored_voxel_is_a_deleted_one(activation: str, ignore_index: int) -> None:
    x, labels = logits(spatial=(40,)), label_map(spatial=(40,))
    labels[..., 25:] = torch.where(labels[..., 25:] == 1, 0, labels[..., 25:])
    labels[..., :25] = ignore_index
    poisoned = x.clone()
    poisoned[..., :25] = math.nan
    for loss in every_loss(activation, to_onehot_y=True, ignore_index=ignore_index, weight=[1.0, 2.0, 3.0, 4.0]):
        value, gradient = value_and_gradient(loss, poisoned, labels)
        want, want_gradient = value_and_gradient(loss, x[..., 25:], labels[..., 25:])
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(gradient[..., 25:], want_gradient)
        assert gradient[..., :25].abs().max() == 0


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_label_map_is_its_one_hot(activation: str) -> None:
    x, labels = logits(), label_map()
    g = one_hot(labels, 4)
    options: dict[str, Any] = {"weight": [1.0, 2.0, 3.0, 4.0], "include_background": True}
    for a, b in zip(
        every_loss(activation, to_onehot_y=True, **options), every_loss(activation, **options), strict=True
    ):
        (va, ga), (vb, gb) = value_and_gradient(a, x, labels), value_and_gradient(b, x, g)
        torch.testing.assert_close(va, vb)
        torch.testing.assert_close(ga, gb)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("backend", ["eager", "numba_cpu"])
def test_gradients(activation: str, backend: str) -> None:
    x, labels = logits(items=1, channels=3, spatial=(2, 3, 2)).requires_grad_(), label_map(1, 3, (2, 3, 2))
    for loss in every_loss(activation, to_onehot_y=True, backend=backend):
        assert derivatives_hold(lambda x, loss=loss: loss(x, labels), (x,))


def test_nothing_that_counts_is_a_loss_of_zero() -> None:
    x = logits()
    labels = torch.full((2, 1, 5, 6, 7), 255)
    for loss in every_loss(to_onehot_y=True, ignore_index=255):
        if isinstance(loss, voxloss.CompoundLoss):
            continue  # the region part of an empty volume is the smoothing's
        value, gradient = value_and_gradient(loss, x, labels)
        assert value == 0
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", ["1e4", "largest"])
def test_extreme_logits_in_the_right_place_cost_nothing(dtype: torch.dtype, size: str) -> None:
    labels = label_map(channels=3)
    x = torch.where(one_hot(labels, 3) > 0, torch.finfo(dtype).max if size == "largest" else 1e4, -1e4).to(dtype)
    for activation in ("softmax", "sigmoid"):
        for loss in every_loss(activation, to_onehot_y=True):
            if isinstance(loss, CrossEntropyLoss):
                continue  # label smoothing forbids certainty
            value, gradient = value_and_gradient(loss, x, labels)
            assert value < 1e-4
            assert gradient.isfinite().all()


@pytest.mark.integration
def test_one_graph() -> None:
    x, labels = logits(dtype=torch.float32), label_map()
    for loss in every_loss(to_onehot_y=True, weight=[1.0, 2.0, 3.0, 4.0]):
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        same(compiled, loss, x, labels, 1e-6)


def test_state_and_copies() -> None:
    loss = DiceFocalLoss(**MAP, weight=[1.0, 2.0, 3.0, 4.0], alpha=0.3)
    assert set(loss.state_dict()) == {"dice.class_weight", "focal.class_weight"}
    x, labels = logits(), label_map()
    assert torch.equal(pickle.loads(pickle.dumps(loss))(x, labels), loss(x, labels))
    assert "lambda_ce=0.5" in repr(DiceCELoss(lambda_ce=0.5))
    assert repr(FocalLoss(alpha=0.25)) == "FocalLoss(alpha=0.25)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiceCELoss(lambda_ce=-1), r"lambda_ce should be no less than 0\.0"),
        (lambda: DiceFocalLoss(lambda_focal=-1), r"lambda_focal should be no less than 0\.0"),
        (lambda: DiceFocalLoss(gamma=-1), "gamma: expected a finite number ≥ 0, received -1"),
        (lambda: FocalLoss(alpha=1.5), r"alpha: expected a number in \[0, 1\], received 1.5"),
        (lambda: FocalLoss(alpha=[0.5, -1]), "`alpha` should be no less than 0"),
        (lambda: DiceCELoss(label_smoothing=2), r"label_smoothing: expected a number in \[0, 1\], received 2"),
        (lambda: DiceCELoss(reduction="none"), 'reduction: expected "mean" or "sum"'),
        (lambda: _called(FocalLoss(alpha=[0.1, 0.2])), "alpha: expected a single value or 4"),
        (lambda: _called(CrossEntropyLoss(sigmoid=True, weight=[1, 2])), "weight: expected a single value or 4"),
    ],
)
def test_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def _called(loss: StatisticsLoss) -> Tensor:
    value: Tensor = loss(logits(), one_hot(label_map(), 4))
    return value


@pytest.mark.parametrize("form", ["label map", "one-hot"])
@pytest.mark.parametrize("shift", [1e3, 1e5, -1e5])
def test_a_constant_added_to_the_logits_is_taken_off_before_anything_is_added(form: str, shift: float) -> None:
    """z − (max + log Σ) would lose the logarithm beside a large maximum."""
    x, labels = (torch.randint(-8, 8, (1, 4, 9, 9, 9)) / 2).float(), label_map(1, 4, (9, 9, 9))
    target = labels if form == "label map" else one_hot(labels, 4, torch.float32)
    for name in ("CrossEntropyLoss", "FocalLoss"):
        loss = make(name, "softmax", to_onehot_y=form == "label map")
        one, other = (loss(z, target) for z in (x, x + shift))
        torch.testing.assert_close(other, one, rtol=1e-6, atol=0)


# Terms for a log.


def test_a_loss_that_is_no_compound_has_no_terms() -> None:
    loss, x, labels = voxloss.DiceLoss(**MAP), logits(dtype=torch.float16), label_map()
    value, terms = loss.with_terms(x, labels)
    assert torch.equal(value, loss(x, labels))
    assert value.dtype == torch.float32
    assert terms == {}


ALL_COMPOUNDS = [name for name, loss in LOSSES.items() if issubclass(loss, voxloss.CompoundLoss)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL_COMPOUNDS)
def test_terms_are_the_parts_of_the_same_pass(
    name: str, dtype: torch.dtype, passes: list[tuple[str, str]]
) -> None:
    loss = make(name, "softmax", to_onehot_y=True)
    assert isinstance(loss, voxloss.CompoundLoss)
    for factor, number in zip((f for f, _ in loss.weighted_parts), (0.25, 0.75, 0.5), strict=False):
        if isinstance(vars(loss).get(factor), float):  # UnifiedFocalLoss has one of the two
            setattr(loss, factor, number)
    x, labels = logits(dtype=dtype), label_map()
    mask, annotated = torch.rand(2, 1, *x.shape[2:]) > 0.2, [[0, 1, 2, 3], [1, 2]]
    x.requires_grad_()
    given: Any = labels
    map_name = map_of(loss)
    if map_name is not None:  # no hooks are called
        _, given = MapOfTarget(map_name)(loss, (x.detach(), labels))
    total, terms = loss.with_terms(x, given, mask, annotated)
    choosing = [("numba_cpu", "voxel_terms")] if name == "DiceTopKLoss" else []  # its voxels
    assert passes == [*choosing, ("numba_cpu", "region_sums")]
    plain = loss(x, given, mask, annotated)
    assert torch.equal(total, plain)
    assert torch.equal(*(torch.autograd.grad(each, x)[0] for each in (total, plain)))
    assert total.dtype == torch.promote_types(dtype, torch.float32)
    assert list(terms) == [part for _, part in loss.weighted_parts]
    for (factor, part), (_, alone) in zip(loss.weighted_parts, loss.parts(), strict=True):
        term = terms[part]
        assert not any(each.requires_grad for each in term)
        torch.testing.assert_close(term.value, alone(x, given, mask, annotated).detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(term.weighted, getattr(loss, factor) * term.value, rtol=1e-6, atol=0)
        assert term.value.dtype == total.dtype
    torch.testing.assert_close(sum(term.weighted for term in terms.values()), total.detach(), rtol=1e-6, atol=0)
