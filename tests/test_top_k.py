"""The hardest voxels: cross entropy of the k % where it is largest, beside torch's and nnU-Net's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import voxloss
from every_loss import value_and_gradient
from voxloss import CrossEntropyLoss, DiceLoss, DiceTopKLoss, TopKLoss
from voxloss.maps import Target
from voxloss_app.bench.memory import allocated_peak

MAP: dict[str, Any] = {"softmax": True, "to_onehot_y": True}


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 5, 6, 7, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (2, 1, 5, 6, 7), generator=generator)


def by_torch(x: Tensor, labels: Tensor, k: float) -> Tensor:
    each = F.cross_entropy(x, labels[:, 0], reduction="none").flatten()
    return each.topk(max(1, int(each.numel() * k / 100))).values.mean()


@pytest.mark.parametrize("backend", ["reference", "eager", "numba_cpu"])
@pytest.mark.parametrize("k", [0.01, 1, 10, 33.3, 100])
def test_the_mean_of_the_largest_values(k: float, backend: str) -> None:
    x, labels = data()
    leaf = x.clone().requires_grad_()
    value = by_torch(leaf, labels, k)
    wanted = value.detach(), torch.autograd.grad(value, leaf)[0]
    found = value_and_gradient(TopKLoss(k, backend=backend, **MAP), x, labels)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_nnunets() -> None:
    topk = pytest.importorskip("nnunetv2.training.loss.robust_ce_loss").TopKLoss(k=10)
    compound = pytest.importorskip("nnunetv2.training.loss.compound_losses").DC_and_topk_loss(
        {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}, {"k": 10}
    )
    x, labels = (tensor.float() for tensor in data())
    torch.testing.assert_close(TopKLoss(10, **MAP)(x, labels), topk(x, labels))
    ours = DiceTopKLoss(10, **MAP, batch=True, include_background=False)
    torch.testing.assert_close(ours(x, labels), compound(x, labels) + 1, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ignored", [255, 1])
def test_ignored_voxels_are_as_if_they_were_not_there(ignored: int) -> None:
    x, labels = data()
    hidden = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    labels = torch.where(labels == ignored, 0, labels)
    kept = ~hidden.flatten()
    left = x.movedim(1, -1).reshape(-1, 3)[kept].T[None], labels.flatten()[kept][None, None]
    wanted = TopKLoss(20, **MAP)(left[0][..., None], left[1][..., None])
    damaged = x.masked_fill(hidden, torch.nan)
    loss = TopKLoss(20, ignore_index=ignored, **MAP)
    torch.testing.assert_close(loss(damaged, labels.masked_fill(hidden, ignored)), wanted)
    torch.testing.assert_close(TopKLoss(20, **MAP)(damaged, labels, ~hidden), wanted)


def test_equal_values_share_what_is_left() -> None:
    """No voxel is preferred to another: the gradient does not depend on their order."""
    x, labels = torch.zeros(1, 2, 4, 5, 5), torch.zeros(1, 1, 4, 5, 5).long()
    _, gradient = value_and_gradient(TopKLoss(10, **MAP), x, labels)
    torch.testing.assert_close(gradient, gradient[..., :1, :1, :1].expand_as(gradient))
    chosen = TopKLoss(10, **MAP).hardest(x, Target(labels))
    assert chosen.sum() == pytest.approx(10)


def test_a_nan_reaches_the_loss() -> None:
    x, labels = data()
    x[0, 0, 0, 0, 0] = torch.nan
    assert TopKLoss(1, **MAP)(x, labels).isnan()
    _, terms = DiceTopKLoss(1, **MAP).with_terms(x, labels)
    assert terms["top_k"].value.isnan()


def test_all_of_them_is_cross_entropy() -> None:
    x, labels = data()
    weight = [1.0, 2.0, 0.5]
    wanted = value_and_gradient(CrossEntropyLoss(**MAP, weight=weight), x, labels)
    found = value_and_gradient(TopKLoss(100, **MAP, weight=weight), x, labels)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_the_weighted_sum_beside_dice() -> None:
    x, labels = data()
    loss = DiceTopKLoss(10, **MAP, lambda_dice=0.5, lambda_top_k=2.0)
    total, terms = loss.with_terms(x, labels)
    dice, top_k = DiceLoss(**MAP)(x, labels), TopKLoss(10, **MAP)(x, labels)
    torch.testing.assert_close(total, 0.5 * dice + 2 * top_k)
    assert [name for name, _ in terms.items()] == ["dice", "top_k"]
    torch.testing.assert_close(terms["top_k"].value, top_k)
    assert loss(x, labels) == total


@pytest.mark.parametrize("backend", ["reference", "eager", "numba_cpu"])
@pytest.mark.parametrize("given", ["plain", "equal", "weights", "mask", "ignored", "annotated"])
def test_beside_dice_the_same_voxels_are_chosen(given: str, backend: str) -> None:
    """What is chosen by cells, of all voxels' pass, is what is chosen by a mask."""
    x, labels = data()
    options: dict[str, Any] = {**MAP, "backend": backend}
    call: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(1)
    if given == "equal":
        x = x.round().clamp(-1, 1)
    elif given == "weights":
        options |= {"weight": [1.0, 2.0, 0.5], "label_smoothing": 0.1}
    elif given == "mask":
        weights = torch.rand(labels.shape, generator=generator, dtype=torch.float64)
        call = {"mask": weights * (weights > 0.3)}
    elif given == "ignored":
        options |= {"ignore_index": 255}
        labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.3, 255)
    elif given == "annotated":
        call = {"annotated": torch.tensor([[True, True, False], [True, True, True]])}
    wanted = value_and_gradient(TopKLoss(20, **options), x, labels, **call)
    found = value_and_gradient(DiceTopKLoss(20, lambda_dice=0.0, **options), x, labels, **call)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    both = value_and_gradient(DiceTopKLoss(20, **options), x, labels, **call)
    options.pop("label_smoothing", None)
    dice = value_and_gradient(DiceLoss(**options), x, labels, **call)
    torch.testing.assert_close(both[0], dice[0] + wanted[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(both[1], dice[1] + wanted[1], rtol=1e-10, atol=1e-12)


def test_one_gradient_is_all_the_memory() -> None:
    """And two numbers per voxel at most; the gradients of two passes would be added up."""
    x = torch.randn(1, 14, 32, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = x.detach().argmax(1, keepdim=True)
    loss = DiceTopKLoss(10, **MAP, backend="numba_cpu")
    loss(x, labels).backward()  # compiled
    x.grad = None
    peak = allocated_peak(lambda: loss(x, labels).backward(), "cpu")
    assert 1 <= peak / (4 * x.numel()) < 1.25


@pytest.mark.parametrize("ignored", [None, 255])
def test_one_graph(ignored: int | None) -> None:
    x, labels = data()
    if ignored is not None:
        labels[:, :, 0] = ignored
    loss = TopKLoss(10, ignore_index=ignored, **MAP)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    wanted = value_and_gradient(loss, x, labels)
    for one, other in zip(value_and_gradient(compiled, x, labels), wanted, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("k", [0, -1, 101, float("nan"), "10"])
def test_a_share_that_is_none(k: Any) -> None:
    with pytest.raises(ValueError, match=r"k: expected a percentage above 0 and up to 100"):
        TopKLoss(k)


def test_a_compound_of_one_pass_refuses_it() -> None:
    class Both(voxloss.CompoundLoss):
        weighted_parts = (("factor", "dice"), ("factor", "hardest"))

        def __init__(self) -> None:
            super().__init__(**MAP)
            self.factor, self.dice, self.hardest = 1.0, DiceLoss(**MAP), TopKLoss(**MAP)

    with pytest.raises(TypeError, match=r"parts: expected losses of one pass, received TopKLoss"):
        Both()(*data())


def test_a_mask_of_one_item_is_that_of_all() -> None:
    x, labels = data()
    mask = torch.rand(1, *labels.shape[1:], generator=torch.Generator().manual_seed(1)) > 0.4
    found = value_and_gradient(TopKLoss(20, **MAP), x, labels, mask=mask)
    torch.testing.assert_close(
        found, value_and_gradient(TopKLoss(20, **MAP), x, labels, mask=mask.expand_as(labels))
    )


def test_the_share_of_equal_voxels_is_that_of_float64() -> None:
    x, labels = torch.zeros(1, 2, 30, dtype=torch.float64), torch.zeros(1, 1, 30, dtype=torch.long)
    _, gradient = value_and_gradient(TopKLoss(50, **MAP), x[..., :7], labels[..., :7])
    torch.testing.assert_close(gradient[0, 1], torch.full((7,), 0.5 / 7, dtype=torch.float64), rtol=1e-15, atol=0)
