"""The boundary loss: beside the formula, MONAI's on the same maps, and what is given and missing."""

from __future__ import annotations

from typing import Any

import monai.losses
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from derivatives import derivatives_hold
from every_loss import value_and_gradient
from voxloss import DiceLoss
from voxloss.losses.boundary import BoundaryLoss, DiceBoundaryLoss
from voxloss.maps import Target

MAP: dict[str, Any] = {"softmax": True, "to_onehot_y": True}


def data(channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 5, 6, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(channels, (2, 1, 5, 6, 7), generator=generator)
    return x, labels, 9 * torch.randn(2, channels, 5, 6, 7, generator=generator, dtype=torch.float64)


def test_a_schedule_begins_with_the_first_epoch() -> None:
    loss = DiceBoundaryLoss(**MAP, schedule="rebalance", step=0.25)
    assert (loss.lambda_dice, loss.lambda_boundary) == (0.75, 0.25)
    for epoch in (0, 1.5, "1"):
        with pytest.raises(ValueError, match=f"epoch: expected a whole number ≥ 1, received {epoch!r}"):
            loss.at_epoch(epoch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"step: expected a number in \[0, 1\], received 2"):
        DiceBoundaryLoss(**MAP, schedule="rebalance", step=2)


@pytest.mark.parametrize("backend", ["reference", "eager", "numba_cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_mean_of_distance_times_prediction(activation: str, dtype: torch.dtype, backend: str) -> None:
    x, labels, distance = data()
    leaf = x.clone().requires_grad_()
    p = leaf.softmax(1) if activation == "softmax" else leaf.sigmoid()
    value = (distance * p)[:, 1:].mean()
    wanted = value.detach(), torch.autograd.grad(value, leaf)[0]
    options: dict[str, Any] = {activation: True, "to_onehot_y": True, "include_background": False}
    loss = BoundaryLoss(**options, backend=backend)
    found = value_and_gradient(loss, x.to(dtype), labels, distance=distance.to(dtype))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
    found = value_and_gradient(loss, x.to(dtype), Target(labels, distance=distance.to(dtype)))  # type: ignore[arg-type]
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=tolerance, atol=1e-6)


def test_one_map_for_all_classes() -> None:
    x, labels, distance = data()
    loss, one = BoundaryLoss(**MAP), distance[:, :1]
    torch.testing.assert_close(
        value_and_gradient(loss, x, labels, distance=one),
        value_and_gradient(loss, x, labels, distance=one.repeat(1, 3, 1, 1, 1)),
    )
    # Σ_c p = 1: a constant has no gradient under a softmax, and its mean over the classes is a third.
    value, gradient = value_and_gradient(loss, x, labels, distance=torch.ones_like(one))
    assert float(value) == pytest.approx(1 / 3)
    assert gradient.abs().max() < 1e-12


def test_monais_on_its_own_maps() -> None:
    kind = getattr(monai.losses, "BoundaryLoss", None)
    if kind is None:
        pytest.skip("this MONAI has none")
    x, labels, _ = data()
    theirs = kind(**MAP, include_background=False)
    distance = theirs.compute_distance_map(F.one_hot(labels[:, 0], 3).movedim(-1, 1))
    ours = BoundaryLoss(**MAP, include_background=False)
    torch.testing.assert_close(ours(x, labels, distance=distance), theirs(x, labels))
    sums = BoundaryLoss(**MAP, reduction="none")(x, labels, distance=distance)
    torch.testing.assert_close(sums, kind(**MAP, reduction="none")(x, labels))


def test_ignored_voxels_and_masks() -> None:
    x, labels, distance = data()
    hidden = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    kept = ~hidden.expand_as(x)
    per = [(distance[b, c] * x[b].softmax(0)[c])[kept[b, c]].mean() for b in range(2) for c in range(3)]
    wanted = torch.stack(per).mean()
    damaged, marked = x.masked_fill(hidden, torch.nan), labels.masked_fill(hidden, 255)
    far = distance.masked_fill(hidden, torch.nan)
    found = BoundaryLoss(**MAP, ignore_index=255)(damaged, marked, distance=far)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(BoundaryLoss(**MAP)(damaged, labels, ~hidden, distance=far), wanted)


def test_schedules() -> None:
    x, labels, distance = data()
    dice = DiceLoss(**MAP)(x, labels)
    far = BoundaryLoss(**MAP)(x, labels, distance=distance)
    for schedule, factors in {
        "constant": {1: (1.0, 0.01), 50: (1.0, 0.01)},
        "increase": {1: (1.0, 0.01), 50: (1.0, 0.5)},
        "rebalance": {1: (0.99, 0.01), 50: (0.5, 0.5), 200: (0.01, 0.99)},
    }.items():
        loss = DiceBoundaryLoss(**MAP, schedule=schedule)  # type: ignore[arg-type]
        for epoch, (a, b) in factors.items():
            loss.at_epoch(epoch)
            torch.testing.assert_close(loss(x, labels, distance=distance), a * dice + b * far)
    with pytest.raises(ValueError, match="schedule: expected one of"):
        DiceBoundaryLoss(**MAP, schedule="linear")  # type: ignore[arg-type]


def test_a_schedule_that_nobody_follows_warns_once(recwarn: pytest.WarningsRecorder) -> None:
    x, labels, distance = data()
    loss = DiceBoundaryLoss(**MAP, schedule="increase")
    loss(x, labels, distance=distance)
    loss(x, labels, distance=distance)
    assert [str(each.message)[:60] for each in recwarn] == [
        "DiceBoundaryLoss, schedule='increase': call at_epoch(e) at th"[:60]
    ]
    assert recwarn[0].filename == __file__
    other = DiceBoundaryLoss(**MAP, schedule="increase")
    other.at_epoch(2)
    other(x, labels, distance=distance)
    DiceBoundaryLoss(**MAP)(x, labels, distance=distance)
    assert len(recwarn) == 1


@pytest.mark.integration
def test_second_derivatives_and_one_graph() -> None:
    x, labels, distance = (tensor[..., :2, :2, :2] for tensor in data())
    loss = DiceBoundaryLoss(**MAP)
    assert derivatives_hold(lambda z: loss(z, labels, distance=distance), x.clone().requires_grad_())
    compiled: Any = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_gradient(compiled, x, labels, distance=distance),
        value_and_gradient(loss, x, labels, distance=distance),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: None, "distance: expected a map .* with voxloss\\.transforms\\.SignedDistanced"),
        (
            lambda d: d[:, :2],
            "distance: expected .* received \\[2, 2, 5, 6, 7\\]\\. Make it with a channel for each",
        ),
        (lambda d: d * 1j, "distance: expected real numbers, received torch\\.complex128"),
        (lambda d: torch.where(d > 20, torch.nan, d), "distance: expected finite numbers"),
        (lambda d: torch.where(d > 20, torch.inf, d), "distance: expected finite numbers"),
    ],
)
def test_a_distance_that_is_wrong_is_named(change: Any, message: str) -> None:
    x, labels, distance = data()
    with pytest.raises((ValueError, TypeError), match=message):
        BoundaryLoss(**MAP)(x, labels, distance=change(distance))
