"""Cross entropy and focal sums: equal to torch's and MONAI's losses, finite where logarithms are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.losses import FocalLoss
from torch import Tensor

from volumes import label_map, logits, one_hot
from voxloss import operators
from voxloss.backends import BACKENDS

BINARY = {
    "cross_entropy": ["cross_entropy", "cross_entropy_negative"],
    "focal": ["focal", "focal_negative"],
}


def sums(x: Tensor, target: Tensor, activation: str, names: list[str], **options: object) -> Tensor:
    given = {"ignore_index": None, "backend": "reference", "gamma": 2.0, "regions": (), **options}
    mask = given.pop("mask", None)
    tensors = x, target, mask, None, None
    result: Tensor = operators.region_sums(*tensors, activation, names, *given.values(), False, 0)
    return result


def one_hot_of(labels: Tensor, form: str) -> Tensor:
    g = one_hot(labels, 4)
    return 0.9 * g + 0.025 if form == "smoothed" else g


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def same(got: Tensor, expected: Tensor, *leaves: Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-12, check_dtype=False)
    weights = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got)
    for leaf in leaves:
        a, b = (torch.autograd.grad((v * weights).sum(), leaf, retain_graph=True)[0] for v in (got, expected))
        torch.testing.assert_close(a, b, rtol=10 * rtol, atol=rtol)


@pytest.mark.parametrize("form", ["label map", "one-hot", "smoothed"])
def test_cross_entropy_of_a_softmax_is_torchs(form: str, backend: str) -> None:
    x, labels = logits(channels=4).requires_grad_(), label_map(channels=4)
    g = one_hot_of(labels, form)
    target = labels if form == "label map" else g
    expected = -(g * F.log_softmax(x, 1)).flatten(2).sum(-1)
    same(sums(x, target, "softmax", ["cross_entropy"], backend=backend)[0], expected, x)
    if form != "smoothed":
        torch.testing.assert_close(expected.sum(), F.cross_entropy(x, labels[:, 0], reduction="sum"))


@pytest.mark.parametrize("form", ["label map", "one-hot", "smoothed"])
@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_binary_cross_entropy_is_torchs(form: str, activation: str, backend: str) -> None:
    x, labels = logits(channels=4), label_map(channels=4)
    x = (x.sigmoid() if activation == "none" else x).requires_grad_()
    g = one_hot_of(labels, form)
    torchs = F.binary_cross_entropy if activation == "none" else F.binary_cross_entropy_with_logits
    got = sums(x, labels if form == "label map" else g, activation, BINARY["cross_entropy"], backend=backend)
    same(got.sum(0), torchs(x, g, reduction="none").flatten(2).sum(-1), x)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("ignore_index", [None, 2, 255])
@pytest.mark.parametrize("form", ["label map", "one-hot"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_log_losses_and_voxels(activation: str, form: str, ignore_index: int | None, backend: str) -> None:
    """What label smoothing adds, and what a mean is over; ignored voxels have no part in either."""
    x, labels = logits(channels=4), label_map(channels=4)
    x = x.sigmoid() if activation == "none" else x
    kept = torch.ones_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        labels[:, :, ::2, 1] = ignore_index
        kept = labels != ignore_index
    g = one_hot(labels.clamp(max=3), 4)
    if ignore_index == 255:
        g = torch.where(kept, g, 255.0)
    poisoned = torch.where(kept, x, torch.nan)
    x, poisoned = x.requires_grad_(), poisoned.detach().requires_grad_()
    p = {"softmax": x.softmax(1), "sigmoid": x.sigmoid(), "none": x}[activation]
    names = ["log_loss", "voxels"] + (["log_loss_negative"] if activation != "softmax" else [])
    target = labels if form == "label map" else g
    got = sums(poisoned, target, activation, names, ignore_index=ignore_index, backend=backend)
    expected = [-p.log(), torch.ones_like(p), -(1 - p).log()][: len(names)]
    wanted = torch.stack([(each * kept).flatten(2).sum(-1) for each in expected])
    torch.testing.assert_close(got, wanted, check_dtype=False)
    weights = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got)
    (by_ours,) = torch.autograd.grad((got * weights).sum(), poisoned)
    (by_torch,) = torch.autograd.grad((wanted * weights).sum(), x)
    torch.testing.assert_close(by_ours, by_torch)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_focal_sums_are_monais(activation: str, gamma: float, backend: str) -> None:
    x, labels = logits(channels=4).requires_grad_(), label_map(channels=4)
    theirs = FocalLoss(to_onehot_y=True, gamma=gamma, use_softmax=activation == "softmax", reduction="none")
    names = ["focal"] if activation == "softmax" else BINARY["focal"]
    got = sums(x, labels, activation, names, gamma=gamma, backend=backend).sum(0)
    same(got, theirs(x, labels).flatten(2).sum(-1), x, rtol=1e-6)  # MONAI casts to float32


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_finite_where_a_probability_rounds_to_0_or_1(
    activation: str, gamma: float, dtype: torch.dtype, backend: str
) -> None:
    """1 − p and p are 0 here, and their logarithms and negative powers in the derivatives infinite."""
    values = [0.0, 1.0] if activation == "none" else [-1e4, 1e4, -60.0, 60.0, -torch.inf, torch.inf]
    x = torch.tensor(values, dtype=dtype).repeat(2).view(1, 1, -1)
    other = x.flip(-1)
    other[..., -1] = x[..., -1]  # the same for both channels: infinite for a logit
    x = torch.cat([x, other], 1).requires_grad_()
    labels = (torch.arange(x.shape[-1]) >= len(values)).long().view(1, 1, -1)
    names = ["cross_entropy", "focal"]
    if activation != "softmax":
        names += ["cross_entropy_negative", "focal_negative"]
    if activation != "none" or gamma <= 1:  # above, its gradient at a probability of 0 is none in float32
        names += ["log_power"] if activation == "softmax" else ["log_power", "log_power_negative"]
    got = sums(x, labels, activation, names, gamma=gamma, backend=backend)
    expected = sums(x.double(), labels, activation, names, gamma=gamma)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-12)
    (gradient,) = torch.autograd.grad(got.sum(), x)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    assert torch.isfinite(gradient.float()).all()
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
    )


@pytest.mark.sampled(4)
@pytest.mark.parametrize("gamma", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_powers_of_logarithms_and_squared_errors_are_what_they_say(
    activation: str, gamma: float, backend: str
) -> None:
    x, g = logits(channels=4), logits(channels=4).softmax(1).requires_grad_()
    x = (x.sigmoid() if activation == "none" else x).requires_grad_()
    p = {"softmax": x.softmax(1), "sigmoid": x.sigmoid(), "none": x}[activation]
    expected = {
        "log_power": g * (-p.log()) ** gamma,
        "sensitivity_error": g * (g - p) ** 2,
        "specificity_error": (1 - g) * (g - p) ** 2,
        "log_power_negative": (1 - g) * (-(1 - p).log()) ** gamma,
    }
    names = list(expected)[: 3 if activation == "softmax" else 4]
    got = sums(x, g, activation, names, gamma=gamma, backend=backend)
    same(got, torch.stack([expected[name].flatten(2).sum(-1) for name in names]), x, g)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_an_ignored_voxel_adds_nothing(activation: str, backend: str) -> None:
    x, labels = logits(channels=4), label_map(channels=4)
    labels[:, :, 0] = 255
    x[:, :, 0] = float("nan")
    names = BINARY["focal"] + BINARY["cross_entropy"] if activation == "sigmoid" else ["focal", "cross_entropy"]
    got = sums(x, labels, activation, names, ignore_index=255, backend=backend)
    same(got, sums(x[:, :, 1:], labels[:, :, 1:], activation, names))


def test_what_a_pass_cannot_do_is_refused() -> None:
    x, labels = logits(channels=4), label_map(channels=4)
    with pytest.raises(ValueError, match="binary losses"):
        sums(x, labels, "softmax", ["focal_negative"])
    with pytest.raises(ValueError, match=r"names out of .*\['dice'\]"):
        sums(x, labels, "softmax", ["dice"])
    with pytest.raises(ValueError, match="gamma: expected a finite number"):
        sums(x, labels, "softmax", ["focal"], gamma=-1.0)
