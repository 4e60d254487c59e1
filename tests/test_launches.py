"""What a loss makes a device do beside its two passes: counted without one, on tensors that have no memory.

A pass over a volume takes some 100 µs on a GPU and any other operation some 2 µs of its own, so dozens of them
would be seen. What waits for the device would be seen even more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import voxloss
from every_loss import LOSSES, make
from voxloss import channels

C = 14
MAP: dict[str, Any] = {"softmax": True, "to_onehot_y": True}

# Of these nothing is launched.
FREE = {
    *("alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty", "permute"),
    *("promote_types", "select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
    *("_reshape_alias", "_unsafe_view"),
}
TWICE = {"select_backward", "slice_backward"}  # zeros, and a copy into them


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what reaches the device, but for voxloss's own operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        space, name = function._schema.name.split("::")
        if space == "aten" and name not in FREE:
            self.names += [name] * (2 if name in TWICE else 1)
        tensors = [given for given in (*args, result) if isinstance(given, Tensor)]
        from_host = name in ("_to_copy", "copy_") and len({tensor.device for tensor in tensors}) > 1
        if from_host or name in ("_local_scalar_dense", "nonzero", "lift_fresh"):
            self.waits.append(name)
        return result


def step(loss: voxloss.StatisticsLoss, device: str = "meta", **arguments: Any) -> Operations:
    """Forward and backward of a loss, from a map of labels."""
    input = torch.zeros(2, C, 4, 4, 4, device=device, requires_grad=True)
    target = torch.zeros(2, 1, 4, 4, 4, dtype=torch.uint8, device=device)
    operations = Operations()
    with operations:
        loss(input, target, **arguments).backward()
    return operations


def launches(loss: voxloss.StatisticsLoss) -> int:
    """Without those of a first call."""
    step(loss)
    return len(step(loss).names)


WEIGHT = [1.0 + c for c in range(C)]
MOST: dict[str, tuple[Callable[[], voxloss.StatisticsLoss], int]] = {
    "Dice": (lambda: voxloss.DiceLoss(**MAP), 20),
    "Dice, batch": (lambda: voxloss.DiceLoss(**MAP, batch=True), 21),
    "Dice, no background": (lambda: voxloss.DiceLoss(**MAP, include_background=False), 22),
    "Dice, weights": (lambda: voxloss.DiceLoss(**MAP, weight=WEIGHT), 22),
    "Dice, a class ignored": (lambda: voxloss.DiceLoss(**MAP, ignore_index=3), 26),
    "Dice, absent classes skipped": (lambda: voxloss.DiceLoss(**MAP, absent="skip"), 28),
    "Dice, no smoothing": (lambda: voxloss.DiceLoss(**MAP, smooth_nr=0, smooth_dr=0), 23),
    "IoU": (lambda: voxloss.JaccardLoss(**MAP), 25),
    "Tversky": (lambda: voxloss.TverskyLoss(**MAP), 26),
    "focal Tversky": (lambda: voxloss.FocalTverskyLoss(**MAP), 38),
    "Generalized Dice": (lambda: voxloss.GeneralizedDiceLoss(**MAP), 33),
    "log cosh": (lambda: voxloss.LogCoshDiceLoss(**MAP), 34),
    "Matthews": (lambda: voxloss.MCCLoss(**MAP), 60),
    "sensitivity": (lambda: voxloss.SensitivitySpecificityLoss(**MAP), 26),
    "cross entropy": (lambda: voxloss.CrossEntropyLoss(**MAP), 9),
    "focal": (lambda: voxloss.FocalLoss(to_onehot_y=True, use_softmax=True), 9),
    "focal, sigmoid": (lambda: voxloss.FocalLoss(to_onehot_y=True), 10),
    "Dice CE": (lambda: voxloss.DiceCELoss(**MAP), 25),
    "Dice CE, batch": (lambda: voxloss.DiceCELoss(**MAP, batch=True), 26),
    "Dice CE, no background": (lambda: voxloss.DiceCELoss(**MAP, include_background=False), 33),
    "Dice focal": (lambda: voxloss.DiceFocalLoss(**MAP), 26),
    "unified focal": (lambda: voxloss.UnifiedFocalLoss(**MAP), 69),
}


@pytest.mark.parametrize("name", MOST)
def test_few_operations_beside_the_passes(name: str) -> None:
    loss, most = MOST[name]
    assert launches(loss()) <= most


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits_for_the_device(name: str, activation: str) -> None:
    """Nor would a CUDA graph capture it: a number read from the device, or a copy from the host's memory."""
    loss = make(name, activation, to_onehot_y=True)
    assert len(step(loss).waits) == len(list(loss.buffers()))  # which follow the input once
    assert step(loss).waits == []


@pytest.mark.parametrize(
    "make_loss",
    [
        lambda weight: voxloss.DiceCELoss(**MAP, weight=weight),
        lambda weight: voxloss.GeneralizedDiceLoss(**MAP, weight=weight, include_background=False),
        lambda weight: voxloss.DiceFocalLoss(**MAP, weight=weight, alpha=weight),
        lambda weight: voxloss.FocalLoss(to_onehot_y=True, alpha=0.25, weight=weight),
        lambda weight: voxloss.ExponentialLogarithmicLoss(**MAP, frequencies=weight),
    ],
)
def test_factors_of_classes_follow_the_input_once(
    make_loss: Callable[[list[float]], voxloss.StatisticsLoss],
) -> None:
    """Of a module that was not moved to the device; what it saves stays the same."""
    loss = make_loss(WEIGHT)
    saved = list(loss.state_dict())
    first, later = step(loss), step(loss)
    assert set(first.waits) == {"_to_copy"}
    assert later.waits == []
    assert {buffer.device.type for buffer in loss.buffers()} == {"meta"}
    assert list(loss.state_dict()) == saved


def test_annotated_channels_are_copied_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "_MARKS", {})
    loss = voxloss.DiceLoss(**MAP)
    assert step(loss, "cpu", annotated=[[0, 1], [0, 2, 5]]).waits == ["lift_fresh"] * 2
    assert step(loss, "cpu", annotated=[(0, 2, 5), [0, 1]]).waits == []
    assert step(loss, "cpu", annotated=[[0, 1], [0, 3]]).waits == ["lift_fresh"]
    monkeypatch.setattr(channels, "_MOST_MARKS", 3)
    step(loss, "cpu", annotated=[[0, 4], [0, 5]])
    assert len(channels._MARKS) == 2


def on_cuda() -> tuple[Tensor, Tensor]:
    input = torch.randn(2, C, 16, 16, 16, device="cuda", requires_grad=True)
    return input, torch.randint(C, (2, 1, 16, 16, 16), dtype=torch.uint8, device="cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("name", LOSSES)
def test_on_a_gpu_nothing_waits_for_it(name: str) -> None:
    loss, (input, target) = make(name, "softmax", to_onehot_y=True), on_cuda()
    loss(input, target, None, [[0, 1], [0, 2, 5]]).backward()  # compiled; buffers and marks are there
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(input, target).backward()
        loss(input, target, None, [[0, 2, 5], [0, 1]]).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("name", LOSSES)
def test_on_a_gpu_a_graph_captures_it(name: str) -> None:
    """And computes with what stands in its inputs when it is replayed."""
    loss, (input, target) = make(name, "softmax", to_onehot_y=True), on_cuda()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(loss(input, target), input)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(input, target)
        (gradient,) = torch.autograd.grad(value, input)
    others = on_cuda()
    with torch.no_grad():
        input.copy_(others[0])
        target.copy_(others[1])
    graph.replay()
    wanted = loss(input, target)
    (by_input,) = torch.autograd.grad(wanted, input)
    assert torch.equal(value, wanted)
    assert torch.equal(gradient, by_input)
