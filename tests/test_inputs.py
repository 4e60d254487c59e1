"""Every bad input raises an error: expected and received value, where, and the remedy; nothing is changed."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import voxloss
from volumes import label_map, logits, one_hot
from voxloss import DiceLoss, ShapeError, region_statistics
from voxloss.inputs import _DEVICE_MESSAGE

SOFTMAX: dict[str, Any] = {"softmax": True, "to_onehot_y": True}


def changed(tensor: Tensor, value: float, index: tuple[int, ...]) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


BAD_TENSORS: dict[str, tuple[dict[str, Any], Any, Any, type[Exception], str]] = {
    "input no tensor": (
        SOFTMAX,
        [1.0],
        label_map(),
        TypeError,
        "received list.*DeepSupervisionLoss",
    ),
    "target no tensor": (
        SOFTMAX,
        logits(),
        None,
        TypeError,
        "target: expected a torch.Tensor, received NoneType",
    ),
    "integer input": (
        SOFTMAX,
        label_map(),
        label_map(),
        TypeError,
        r"received torch.int64\. Convert it with input.float",
    ),
    "input and target swapped": (
        SOFTMAX,
        label_map(),
        logits(),
        TypeError,
        r"received torch.int64\. .* call loss\(input, target\), not loss\(target, input\)",
    ),
    "complex target": (
        {},
        logits(),
        logits().to(torch.complex64),
        TypeError,
        "target: expected labels or probabilities",
    ),
    "no spatial axis": (
        SOFTMAX,
        logits()[..., 0, 0, 0],
        label_map()[..., 0, 0, 0],
        ShapeError,
        r"received \[2, 4\]",
    ),
    "stacked outputs": (
        SOFTMAX,
        torch.stack([logits()] * 2, 1),
        label_map(),
        ShapeError,
        r"torch\.unbind\(input, 1\)",
    ),
    "no channel axis": (SOFTMAX, logits(), label_map()[:, 0], ShapeError, r"target\.unsqueeze\(1\)"),
    "no voxel": (SOFTMAX, logits()[..., :0], label_map()[..., :0], ShapeError, "at least one voxel"),
    "no sample": (SOFTMAX, logits()[:0], label_map()[:0], ShapeError, "at least one voxel, class and sample"),
    "wrong batch": (SOFTMAX, logits(), label_map()[:1], ShapeError, "expected 2 samples, as input .* unsqueeze"),
    "wrong size": (SOFTMAX, logits(), label_map()[..., 1:], ShapeError, "spatial sizes, .* must be equal"),
    "wrong channels": (SOFTMAX, logits(), logits()[:, :3], ShapeError, "one channel .a label map. or 4"),
    "one-hot for a label map": (SOFTMAX, logits(), one_hot(label_map(), 4), ShapeError, "omit to_onehot_y"),
    "label map for one-hot": ({"softmax": True}, logits(), label_map(), ShapeError, "set to_onehot_y=True"),
    "one channel, softmax": (SOFTMAX, logits(channels=1), label_map(), ValueError, "set sigmoid=True"),
    "label too large": (
        SOFTMAX,
        logits(),
        changed(label_map(), 4, (1, 0, 2, 3, 4)),
        ValueError,
        r"labels 0…3, as input has 4 channels; received 4 at \[1, 0, 2, 3, 4\] \(1 in all\)",
    ),
    "label negative": (SOFTMAX, logits(), changed(label_map(), -1, (0, 0, 0, 0, 0)), ValueError, "ignore_index"),
    "label not whole": (
        SOFTMAX,
        logits(),
        changed(label_map().float(), 1.5, (0, 0, 0, 0, 0)),
        ValueError,
        r"whole numbers in a label map; received 1.5 at \[0, 0, 0, 0, 0\]",
    ),
    "label not whole, beside an ignored one": (
        {**SOFTMAX, "ignore_index": 1},
        logits(),
        changed(label_map().float(), 1.5, (0, 0, 0, 0, 0)),
        ValueError,
        r"whole numbers in a label map; received 1.5 at \[0, 0, 0, 0, 0\] \(1 in all\)",
    ),
    "label NaN": (
        SOFTMAX,
        logits(),
        changed(label_map().float(), math.nan, (0, 0, 0, 0, 0)),
        ValueError,
        "whole",
    ),
    "target above 1": (
        {"softmax": True},
        logits(),
        changed(one_hot(label_map(), 4), 1.059, (0, 2, 0, 0, 1)),
        ValueError,
        r"values in \[0, 1\], one channel per class; received 1.059 at \[0, 2, 0, 0, 1\] .* target.clamp\(0, 1\)",
    ),
    "labels for one output": (
        {"sigmoid": True, "to_onehot_y": True},
        logits(channels=1),
        changed(label_map(), 3, (0, 0, 0, 0, 0)),
        ValueError,
        r"One channel is a mask of the foreground: pass \(target > 0\)",
    ),
    "mask of 255": ({"softmax": True}, logits(), 255 * one_hot(label_map(), 4), ValueError, "by 1/255"),
    "target NaN": (
        {"softmax": True},
        logits(),
        changed(one_hot(label_map(), 4), math.nan, (0, 2, 0, 0, 1)),
        ValueError,
        "received nan",
    ),
    "logits, no activation": (
        {"to_onehot_y": True},
        logits(),
        label_map(),
        ValueError,
        "set softmax=True or sigmoid",
    ),
    "activation not in [0, 1]": (
        {"other_act": torch.tanh, "to_onehot_y": True},
        logits(),
        label_map(),
        ValueError,
        "other_act must return values in",
    ),
    "activation of another shape": (
        {"other_act": torch.sum, "to_onehot_y": True},
        logits(),
        label_map(),
        ShapeError,
        r"other_act: expected a floating-point tensor \[2, 4, 5, 6, 7\]",
    ),
    "half-ignored soft voxel": (
        {"softmax": True, "ignore_index": 1},
        logits(),
        changed(one_hot(label_map(), 4), 0.5, (0, 1, 0, 0, 0)),
        ValueError,
        "0 or 1 in the ignored channel 1; received 0.5",
    ),
    "class out of range": (SOFTMAX | {"classes": [4]}, logits(), label_map(), ValueError, "0…3"),
    "every class ignored": (
        SOFTMAX | {"classes": [2], "ignore_index": 2},
        logits(),
        label_map(),
        ValueError,
        "no class is left",
    ),
    "too few weights": (
        SOFTMAX | {"weight": [1, 2]},
        logits(),
        label_map(),
        ValueError,
        "4 .one per channel., received 2",
    ),
    "too many weights": (
        SOFTMAX | {"weight": [1, 2], "include_background": False},
        logits(),
        label_map(),
        ValueError,
        r"4 \(one per channel\) or 3 \(one per class that counts\), received 2",
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_bad_tensors(name: str, backend: str) -> None:
    options, input, target, error, message = BAD_TENSORS[name]
    copies = [t.clone() if isinstance(t, Tensor) else t for t in (input, target)]
    loss = DiceLoss(**options, backend=backend)
    with pytest.raises(error, match=message):
        loss(input, target)
    for before, after in zip(copies, (input, target), strict=True):
        if isinstance(before, Tensor):
            assert torch.equal(before.nan_to_num(7), after.nan_to_num(7))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"smooth_nr": -1e-5}, ValueError, "smooth_nr: expected a finite number ≥ 0, received -1e-05"),
        ({"smooth_dr": math.nan}, ValueError, "smooth_dr"),
        ({"weight": [1, -1]}, ValueError, "no less than 0"),
        ({"weight": [1, math.inf]}, ValueError, "all finite"),
        ({"weight": [[1.0]]}, ValueError, "one number or one per class"),
        ({"classes": []}, ValueError, "distinct channel numbers"),
        ({"classes": [1, 1]}, ValueError, "distinct channel numbers"),
        ({"classes": [-1]}, ValueError, "distinct channel numbers"),
        ({"classes": [0, 1], "include_background": False}, ValueError, "Remove 0 from classes"),
        ({"absent": "ignore"}, ValueError, r"absent: expected one of \('count', 'skip'\), received 'ignore'"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
        ({"sigmoid": True, "other_act": torch.tanh}, ValueError, "Incompatible values"),
        ({"other_act": 3}, TypeError, "callable but is int"),
        (
            {"reduction": "avg"},
            ValueError,
            r"reduction: expected one of \['none', 'mean', 'sum'\], received 'avg'",
        ),
        ({"classes": 2}, ValueError, "classes: expected a list of distinct channel numbers"),
        ({"classes": ["liver"]}, ValueError, "classes: expected a list of distinct channel numbers"),
        ({"ignore_index": "255"}, TypeError, "ignore_index: expected an int or None, received '255'"),
        ({"ignore_index": 2.5}, TypeError, "ignore_index: expected an int"),
        ({"ignore_index": True}, TypeError, "ignore_index: expected an int"),
        ({"smooth_nr": "1"}, ValueError, "smooth_nr: expected a finite number ≥ 0, received '1'"),
        ({"sofmax": True}, TypeError, "sofmax"),
        ({"softmax": "yes"}, TypeError, "softmax: expected True or False, received 'yes'"),
        ({"include_background": [1]}, TypeError, r"include_background: expected True or False, received \[1\]"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DiceLoss(**arguments)


@pytest.mark.parametrize(
    ("loss", "arguments", "message"),
    [
        (voxloss.TverskyLoss, {"alpha": -0.1}, "alpha: expected a finite number ≥ 0, received -0.1"),
        (voxloss.TverskyLoss, {"beta": math.inf}, "beta"),
        (voxloss.TverskyLoss, {"alpha": 0, "beta": 0}, "alpha . beta: expected a finite number > 0"),
        (voxloss.FocalTverskyLoss, {"gamma": 0}, "gamma: expected a finite number > 0, received 0"),
        (voxloss.JaccardLoss, {"smooth_nr": -1}, "smooth_nr"),
        (voxloss.GeneralizedDiceLoss, {"smooth_dr": -1}, "smooth_dr"),
        (
            voxloss.GeneralizedDiceLoss,
            {"w_type": "cubic"},
            r"w_type: expected one of \['square'.*received 'cubic'",
        ),
    ],
    ids=str,
)
def test_bad_arguments_of_the_others(loss: type, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(**arguments)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match='activation: expected "softmax"'):
        region_statistics(logits(), label_map(), activation="relu")  # type: ignore[arg-type]


def test_devices_must_agree() -> None:
    with pytest.raises(ValueError, match=r"expected on the input's device cpu, received meta. Move it with"):
        DiceLoss(**SOFTMAX)(logits(), label_map().to("meta"))


def test_tensors_without_memory_have_a_loss_without_a_value() -> None:
    """As torch's losses, to count memory and operations."""
    x = logits().to("meta").requires_grad_()
    loss = DiceLoss(**SOFTMAX)(x, label_map().to("meta"))
    assert loss.shape == ()
    loss.backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_rounding_of_half_precision_probabilities_is_no_error() -> None:
    p = torch.full((1, 2, 4), 1.0078125, dtype=torch.bfloat16)
    assert DiceLoss()(p, torch.ones(1, 2, 4)).isfinite()
    with pytest.raises(ValueError, match=r"received 1.0078125"):
        DiceLoss()(p.float(), torch.ones(1, 2, 4))


@pytest.mark.parametrize("options", [{"softmax": True}, {}], ids=str)
def test_nan_predictions_reach_the_loss(options: dict[str, Any]) -> None:
    """GradScaler detects NaN and Inf; an error would end a training run that can continue."""
    p = changed(logits().softmax(1), math.nan, (0, 0, 0, 0, 0))
    assert DiceLoss(**options, to_onehot_y=True)(p, label_map()).isnan()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8,
        torch.uint16,
        torch.uint64,
        torch.int16,
        pytest.param(torch.float16, marks=pytest.mark.integration),
    ],
    ids=str,
)
def test_a_bad_label_is_named_in_every_dtype(dtype: torch.dtype) -> None:
    for labels in (label_map(), one_hot(label_map(), 4)):
        loss = DiceLoss(softmax=True, to_onehot_y=labels.shape[1] == 1)
        with pytest.raises(ValueError, match=r"received 7(\.0)? at \[1, 0, 2, 3, 4\]"):
            loss(logits(), changed(labels, 7, (1, 0, 2, 3, 4)).to(dtype))


HUGE: dict[str, tuple[float, torch.dtype, int]] = {
    "uint64 of -1": (2**64 - 1, torch.uint64, -1),
    "uint64 of the smallest int64": (2**63 + 1, torch.uint64, -(2**63) + 1),
    "float beside the largest int64": (2**63, torch.float64, 2**63 - 1),
    "float32 beside the largest int64": (2**63, torch.float32, 2**63 - 1),
    "float beside the smallest int64": (-(2**63), torch.float64, -(2**63) + 1),
    "int64 beside a label that floats take for it": (2**53 + 1, torch.int64, 2**53),
    "infinity": (math.inf, torch.float32, 2**63 - 1),
    "float16 infinity": (-math.inf, torch.float16, 255),
    "not a number": (math.nan, torch.float32, 255),
}


@pytest.mark.parametrize("backend", ["reference", "eager", "numba_cpu", "triton_gpu"])
@pytest.mark.parametrize("what", HUGE)
def test_a_label_is_ignored_only_if_it_is_that_number(what: str, backend: str) -> None:
    """And the label is named: neither the input nor the number that an integer of it would be."""
    label, dtype, ignored = HUGE[what]
    labels = label_map().to(dtype)
    labels[1, 0, 2, 3, 4] = torch.tensor(label, dtype=dtype)
    got = re.escape(str(labels[1, 0, 2, 3, 4].item()))
    with pytest.raises(
        ValueError, match=rf"^target: expected .*; received {got} at \[1, 0, 2, 3, 4\] \(1 in all\)"
    ):
        region_statistics(logits(), labels, activation="softmax", ignore_index=ignored, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "eager", "numba_cpu", "triton_gpu"])
@pytest.mark.parametrize(
    ("label", "dtype"),
    [(2**62, torch.float32), (-(2**62), torch.float64), (2**63 - 1, torch.int64), (2**63 - 1, torch.uint64)],
    ids=str,
)
def test_the_largest_labels_can_be_ignored(label: int, dtype: torch.dtype, backend: str) -> None:
    labels = label_map()
    labels[1, 0, 2, 3, 4] = label
    found = region_statistics(
        logits(), labels.to(dtype), activation="softmax", ignore_index=label, backend=backend
    )
    assert found.target.sum() == labels.numel() - 1


@pytest.mark.parametrize("ignore_index", [2**63, -(2**63), 10**400])
def test_an_ignored_label_fits_into_int64(ignore_index: int) -> None:
    for call in (
        lambda: DiceLoss(ignore_index=ignore_index),
        lambda: region_statistics(logits(), label_map(), activation="softmax", ignore_index=ignore_index),
    ):
        with pytest.raises(
            ValueError, match=f"ignore_index: expected an int between .*, received {ignore_index}"
        ):
            call()


@pytest.mark.cuda
def test_a_bad_label_on_cuda_fails_without_waiting_for_the_device() -> None:
    import subprocess
    import sys

    code = (
        "import torch, voxloss\n"
        "x = torch.randn(1, 3, 8, 8, 8, device='cuda'); y = torch.full((1, 1, 8, 8, 8), 5, device='cuda')\n"
        "torch.cuda.set_sync_debug_mode('error')\n"
        "loss = voxloss.DiceLoss(softmax=True, to_onehot_y=True)(x, y)\n"
        "torch.cuda.set_sync_debug_mode('default')\n"
        "torch.cuda.synchronize()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    # On a device that is faster than the host, whatever is launched next raises.
    assert run.returncode != 0
    assert "called a synchronizing" not in run.stderr
    assert _DEVICE_MESSAGE[:60] in run.stderr
