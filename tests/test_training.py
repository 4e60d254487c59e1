"""A network in half precision learns as in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import voxloss
from every_loss import value_and_gradient
from volumes import one_hot
from voxloss_verify.tolerances import GRADIENT, LOSS

STEPS = 200


def volumes(generator: torch.Generator, edge: int = 12) -> tuple[Tensor, Tensor]:
    """Two noisy boxes of two classes on a background."""
    labels = torch.zeros(2, 1, edge, edge, edge, dtype=torch.long)
    labels[0, 0, 1:5, 2:7, 3:9], labels[0, 0, 7:9, 8:11, 2:5] = 1, 2
    labels[1, 0, 4:10, 1:5, 1:4], labels[1, 0, 2:6, 7:10, 7:11] = 1, 2
    return labels + 0.3 * torch.randn(labels.shape, generator=generator), labels


def train(loss: nn.Module, half: bool) -> Tensor:
    """The loss of each step."""
    generator = torch.Generator().manual_seed(0)
    image, labels = volumes(generator)
    network = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 3, 3, padding=1))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    curve = []
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = loss(network(image), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        curve.append(value.detach())
    return torch.stack(curve)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "make",
    [voxloss.DiceLoss, voxloss.DiceCELoss, voxloss.FocalTverskyLoss, voxloss.ExponentialLogarithmicLoss],
    ids=lambda make: make.__name__,
)
def test_bfloat16_training_follows_float32(make: Any, one_thread: None) -> None:
    full, half = (train(make(softmax=True, to_onehot_y=True), half) for half in (False, True))
    assert full[-1] < 0.3 * full[0]
    assert half.isfinite().all()
    # Where a loss falls steeply, a step sooner or later is a large difference for a moment.
    assert (half - full).abs().mean() < 0.05 * full[0]
    assert (half - full)[-20:].abs().max() < 0.02 * full[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_at_160_cubed(dtype: torch.dtype) -> None:
    """Four million voxels, more than float16 can count to."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(1, 1, 160, 160, 160, dtype=torch.uint8)
    labels[..., 20:150, 10:90, 5:130] = 1
    x = (4 * one_hot(labels, 2, torch.float32) + torch.randn(1, 2, 160, 160, 160, generator=generator)).to(dtype)
    loss = voxloss.DiceCELoss(softmax=True, to_onehot_y=True)
    value, gradient = value_and_gradient(loss, x, labels)
    exact, by_exact = value_and_gradient(loss, x.double(), labels)
    name = str(dtype).removeprefix("torch.")
    assert abs(value.double() - exact) < LOSS[name]
    assert gradient.any()
    assert (gradient.double() - by_exact).abs().max() < GRADIENT[name] * by_exact.abs().max() + 2.0**-24
