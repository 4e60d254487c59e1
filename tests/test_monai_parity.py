"""Where MONAI computes what it documents, values and gradients are the same, for every pair of options."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import monai.losses
import pytest
import torch
from monai.data import MetaTensor
from monai.utils.enums import LossReduction, Weight
from torch import Tensor

import voxloss
from volumes import SHAPES, label_map, logits, one_hot
from voxloss.losses import choices
from voxloss_verify.tolerances import PARITY

PAIRS = [
    (voxloss.DiceLoss, monai.losses.DiceLoss),
    (voxloss.TverskyLoss, monai.losses.TverskyLoss),
    (voxloss.GeneralizedDiceLoss, monai.losses.GeneralizedDiceLoss),
]
COMMON: dict[str, list[Any]] = {
    "activation": ["softmax", "sigmoid", "none", "other_act"],
    "form": ["label map", "float label map", "one-hot", "multi-label", "soft"],
    "shape": list(SHAPES),
    "dtype": [torch.float64, torch.float32],
    "channels": [2, 4],
    "include_background": [True, False],
    "reduction": ["mean", "sum", "none"],
    "batch": [False, True],
    "ignore_index": [None, -1, 255],
}
SMOOTH = {"smooth": [(1e-5, 1e-5), (0, 0), (1, 1), (0.5, 2)]}


def case(
    activation: str,
    form: str,
    shape: str,
    dtype: torch.dtype,
    channels: int,
    include_background: bool,
    smooth: tuple[float, float] = (0, 0),
    ignore_index: int | None = None,
    weight: str | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return input, target and the constructor's arguments."""
    x, labels = (
        logits(channels=channels, spatial=SHAPES[shape]),
        label_map(channels=channels, spatial=SHAPES[shape]),
    )
    for item in labels:  # every class in every sample: absent ones are another test
        item.view(-1)[:channels] = torch.arange(channels)
    target = {
        "label map": labels,
        "float label map": labels.to(dtype),
        "one-hot": one_hot(labels, channels, dtype),
        "multi-label": torch.rand(x.shape).round().to(dtype),
        "soft": torch.rand(x.shape).to(dtype),
    }[form]
    arguments: dict[str, Any] = {
        "softmax": activation == "softmax",
        "sigmoid": activation == "sigmoid",
        "other_act": torch.sigmoid if activation == "other_act" else None,
        "to_onehot_y": form.endswith("label map"),
        "include_background": include_background,
        "smooth_nr": smooth[0],
        "smooth_dr": smooth[1],
        **others,
    }
    if ignore_index is not None and form.endswith("label map"):  # elsewhere MONAI has no sentinel
        target = torch.where(torch.rand(target.shape) < 0.3, ignore_index, target)
        arguments["ignore_index"] = ignore_index
    counted = channels - (not include_background)
    if weight is not None and counted > 1:  # for a single class MONAI drops the weights
        # MONAI keeps numbers in float32, so these are exact in it.
        arguments["weight"] = 0.75 if weight == "one" else [0.25 + c for c in range(counted)]
    return (x.sigmoid() if activation == "none" else x).to(dtype).requires_grad_(), target, arguments


def tolerance(x: Tensor, in_float32: bool = False) -> float:
    """`in_float32`: MONAI takes a part of this sum in float32, also for float64 inputs."""
    return PARITY["float32" if in_float32 else str(x.dtype).removeprefix("torch.")]


def assert_equal(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    x: Tensor,
    target: Tensor,
    arguments: dict[str, Any],
    most: float,
) -> None:
    got, want = ours(**arguments)(x, target), theirs(**arguments)(x, target)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    torch.testing.assert_close(got, want, rtol=most, atol=most)
    weights = torch.linspace(0.5, 1.5, got.numel(), dtype=got.dtype).view_as(got)
    (got_gradient,) = torch.autograd.grad((got * weights).sum(), x)
    (want_gradient,) = torch.autograd.grad((want * weights).sum(), x)
    scale = want_gradient.abs().max()
    torch.testing.assert_close(got_gradient / scale, want_gradient / scale, rtol=0, atol=most)


@pytest.mark.pairwise(
    **COMMON,
    **SMOOTH,
    squared_pred=[False, True],
    jaccard=[False, True],
    soft_label=[False, True],
    weight=[None, "one", "each"],
)
def test_dice_and_jaccard(options: dict[str, Any]) -> None:
    x, target, arguments = case(**options)
    # MONAI's one-hot volume is float32, and so are the root of Σg² and its square.
    most = tolerance(x, in_float32=arguments["squared_pred"] and arguments["to_onehot_y"])
    assert_equal(voxloss.DiceLoss, monai.losses.DiceLoss, x, target, arguments, most)
    if arguments.pop("jaccard"):
        theirs = functools.partial(monai.losses.DiceLoss, jaccard=True)
        assert_equal(voxloss.JaccardLoss, theirs, x, target, arguments, most)


@pytest.mark.pairwise(**COMMON, **SMOOTH, soft_label=[False, True], alpha=[0.5, 0.3, 1], beta=[0.5, 0.7, 0])
def test_tversky(options: dict[str, Any]) -> None:
    x, target, arguments = case(**options)
    assert_equal(voxloss.TverskyLoss, monai.losses.TverskyLoss, x, target, arguments, tolerance(x))


@pytest.mark.pairwise(
    **{name: values for name, values in COMMON.items() if name != "ignore_index"},
    soft_label=[False, True],
    w_type=["square", "simple", "uniform"],
)
def test_generalized_dice_without_smoothing(options: dict[str, Any]) -> None:
    x, target, arguments = case(**options)
    most = tolerance(x, in_float32=options["w_type"] != "uniform")  # MONAI's w is float32
    assert_equal(voxloss.GeneralizedDiceLoss, monai.losses.GeneralizedDiceLoss, x, target, arguments, most)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_constructor_names_order_and_defaults(ours: type, theirs: type) -> None:
    monai_parameters = list(inspect.signature(theirs).parameters.values())
    our_parameters = list(inspect.signature(ours).parameters.values())
    assert [(p.name, p.default) for p in our_parameters[: len(monai_parameters)]] == [
        (p.name, p.default) for p in monai_parameters
    ]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in our_parameters[len(monai_parameters) :])


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_same_errors_from_the_constructor_and_from_shapes(ours: type, theirs: type) -> None:
    x, labels = logits(), label_map()
    for error, call in (
        (ValueError, lambda loss: loss(sigmoid=True, softmax=True)),
        (TypeError, lambda loss: loss(other_act="tanh")),
        (ValueError, lambda loss: loss(reduction="median")),
        (AssertionError, lambda loss: loss(softmax=True)(x, labels)),
        (AssertionError, lambda loss: loss(softmax=True, to_onehot_y=True)(x, one_hot(labels, 4))),
        (AssertionError, lambda loss: loss(softmax=True)(x, one_hot(labels, 4)[..., 1:])),
    ):
        for loss in (ours, theirs):
            with pytest.raises(error):
                call(loss)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("option", ["to_onehot_y", "include_background"])
def test_single_channel_warnings(ours: type, theirs: type, option: str) -> None:
    x, mask = logits(channels=1), label_map(channels=2)
    options: dict[str, Any] = {"sigmoid": True, option: option == "to_onehot_y", "smooth_nr": 0, "smooth_dr": 0}
    with pytest.warns(UserWarning, match=f"single channel prediction, `{option}=") as caught:
        got = ours(**options)(x, mask)
    assert any(warning.filename == __file__ for warning in caught), "the warning should point at the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(got, theirs(**options)(x, mask), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_deep_supervision(ours: type, theirs: type) -> None:
    outputs = [logits(spatial=(8, 8, 8), dtype=torch.float32), logits(spatial=(4, 4, 4), dtype=torch.float32)]
    labels = label_map(spatial=(8, 8, 8)).float()
    options: dict[str, Any] = {"softmax": True, "to_onehot_y": True, "smooth_nr": 0, "smooth_dr": 0}
    got, want = (monai.losses.DeepSupervisionLoss(loss(**options))(outputs, labels) for loss in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_meta_tensors(ours: type, theirs: type) -> None:
    x, labels = MetaTensor(logits()), MetaTensor(label_map().float())
    x.requires_grad_()
    loss = ours(softmax=True, to_onehot_y=True)
    got = loss(x, labels)
    want = loss(x.as_tensor(), labels.as_tensor())
    assert torch.equal(got, want)
    (gradient,) = torch.autograd.grad(got, x)
    torch.testing.assert_close(torch.as_tensor(gradient), torch.autograd.grad(want, x)[0])


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast(ours: type, theirs: type, autocast: torch.dtype, device: str) -> None:
    head = torch.nn.Conv3d(2, 4, 1).to(device)
    image, labels = torch.randn(2, 2, 5, 6, 7, device=device), label_map().to(device)
    loss = ours(softmax=True, to_onehot_y=True)
    with torch.autocast(device, autocast):
        x = head(image)
        assert x.dtype == autocast
        got = loss(x, labels)
    got.backward()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, loss(x.double(), labels).float(), rtol=1e-6, atol=1e-6)
    assert head.weight.grad is not None
    assert head.weight.grad.abs().max() > 0


def test_a_bundle_configuration_names_it_by_its_dotted_path() -> None:
    from monai.bundle import ConfigParser

    config = {"loss": {"_target_": "voxloss.DiceLoss", "softmax": True, "to_onehot_y": True, "classes": [1, 3]}}
    loss = ConfigParser(config).get_parsed_content("loss")
    assert isinstance(loss, voxloss.DiceLoss)
    assert loss(logits(), label_map()).ndim == 0


def test_members_of_monais_enumerations_are_the_words() -> None:
    x, labels = logits(), label_map()
    for member in LossReduction:
        ours = voxloss.DiceLoss(softmax=True, to_onehot_y=True, reduction=member)
        assert ours.reduction == member.value
        assert repr(ours) == repr(voxloss.DiceLoss(softmax=True, to_onehot_y=True, reduction=member.value))
    for weight in Weight:
        loss = voxloss.GeneralizedDiceLoss(softmax=True, to_onehot_y=True, w_type=weight)
        theirs = voxloss.GeneralizedDiceLoss(softmax=True, to_onehot_y=True, w_type=weight.value)
        assert torch.equal(loss(x, labels), theirs(x, labels))
    assert [*map(str, choices.LossReduction)] == [*map(str, LossReduction)]
    assert [*map(str, choices.WeightType)] == [*map(str, Weight)]
