"""The eager path for a label map on a CPU, held to the reference: every sum, large logits, bad labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from volumes import label_map, logits
from voxloss.backends import by_label, eager, reference
from voxloss.backends.voxels import PassSpec

_SUMS = sorted(by_label.SUMS)


def _spec(activation: str, name: str, gamma: float = 2.0) -> PassSpec:
    if activation == "softmax" and name.endswith("_negative"):
        pytest.skip("a sum of binary losses")
    return PassSpec(activation, [name], None, gamma)


def _equal(x: Tensor, labels: Tensor, spec: PassSpec, rtol: float) -> None:
    assert by_label.takes(x, labels, None, spec)
    sums, valid = eager.region_sums(x, labels, spec)
    expected, _ = reference.region_sums(x.double(), labels, spec)
    assert valid
    torch.testing.assert_close(sums, expected, rtol=rtol, atol=0)
    grad = torch.arange(1, 1 + expected.numel()).view(expected.shape) / 7
    gradient = eager.region_sums_backward(grad, x, labels, spec, "input")
    wanted = reference.region_sums_backward(grad.double(), x.double(), labels, spec, "input")
    torch.testing.assert_close(gradient.double(), wanted, rtol=rtol, atol=rtol * float(grad.max()))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("channels", [2, 5])
@pytest.mark.parametrize("name", _SUMS)
def test_every_sum(activation: str, channels: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "CPU_BLOCK", 1000)
    x, labels = logits(channels=channels, spatial=(5, 6, 7)), label_map(channels=channels, spatial=(5, 6, 7))
    _equal(x.double(), labels, _spec(activation, name), 1e-12)
    _equal(x.bfloat16(), labels, _spec(activation, name), 1e-2)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", _SUMS)
@pytest.mark.parametrize("size", [30.0, 300.0, float("inf")])
def test_large_logits(activation: str, name: str, size: float) -> None:
    x, labels = logits(channels=3), label_map(channels=3)
    x = torch.where(x > 1, size, torch.where(x < -1, -size, x)).float()
    for gamma in (0.5, 2.0):
        _equal(x, labels, _spec(activation, name, gamma), 1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [-1, 3, 0.5, float("nan")])
def test_what_is_no_class(dtype: torch.dtype, value: float) -> None:
    if not dtype.is_floating_point and not float(value).is_integer():
        pytest.skip("no such integer")
    x, labels = logits(channels=3), label_map(channels=3).to(dtype)
    spec = PassSpec("softmax", ["intersection", "prediction", "target"], None)
    assert eager.region_sums(x, labels, spec)[1]
    labels[-1, 0, -1, -1, -1] = value
    assert not eager.region_sums(x, labels, spec)[1]
