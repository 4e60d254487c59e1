"""Skeleton recall: beside the formula over channels, and what is given and missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor

import voxloss
from derivatives import derivatives_hold
from every_loss import value_and_gradient
from voxloss.losses.skeleton import DiceCESkeletonRecallLoss, SkeletonRecallLoss
from voxloss.maps import Target

MAP: dict[str, Any] = {"softmax": True, "to_onehot_y": True}


def data(channels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels, and some of these as a skeleton."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 5, 6, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(channels, (2, 1, 5, 6, 7), generator=generator)
    lines = torch.rand(labels.shape, generator=generator) < 0.2
    return x, labels, torch.where(lines, labels, 0)


def by_channels(p: Tensor, skeleton: Tensor, smooth: float = 1e-5, batch: bool = False) -> Tensor:
    """The formula of the paper, on a skeleton of one channel per class."""
    axes = [*([0] if batch else []), 2, 3, 4]
    recall = ((p * skeleton).sum(axes) + smooth) / (skeleton.sum(axes) + smooth)
    return (1 - recall).mean()


@pytest.mark.parametrize("backend", ["reference", "eager", "numba_cpu"])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("form", ["map", "channels"])
def test_the_formula_of_the_paper(form: str, batch: bool, backend: str) -> None:
    x, labels, skeleton = data()
    channels = F.one_hot(skeleton[:, 0], 4).movedim(-1, 1).double()
    leaf = x.clone().requires_grad_()
    value = by_channels(leaf.softmax(1)[:, 1:], channels[:, 1:], batch=batch)
    wanted = value.detach(), torch.autograd.grad(value, leaf)[0]
    loss = SkeletonRecallLoss(**MAP, batch=batch, backend=backend)
    found = value_and_gradient(loss, x, labels, skeleton=skeleton if form == "map" else channels)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_as_a_tuple_in_the_targets_place() -> None:
    x, labels, skeleton = data()
    loss = DiceCESkeletonRecallLoss(**MAP)
    by_name = value_and_gradient(loss, x, labels, skeleton=skeleton)
    torch.testing.assert_close(value_and_gradient(loss, x, Target(labels, skeleton)), by_name)  # type: ignore[arg-type]
    meta = Target(MetaTensor(labels), skeleton=MetaTensor(skeleton))
    torch.testing.assert_close(value_and_gradient(loss, x, meta), by_name)  # type: ignore[arg-type]
    compiled: Any = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradient(compiled, x, labels, skeleton=skeleton), by_name)
    # Other losses leave it.
    dice = voxloss.DiceLoss(**MAP)
    assert torch.equal(dice(x, Target(labels, skeleton)), dice(x, labels))
    with pytest.raises(
        ValueError, match="skeleton: expected it in the target or as a keyword argument, received both"
    ):
        loss(x, Target(labels, skeleton), skeleton=skeleton)


def test_the_sum_of_its_parts() -> None:
    x, labels, skeleton = data()
    loss = DiceCESkeletonRecallLoss(
        **MAP, include_background=False, batch=True, lambda_skeleton=0.5, lambda_ce=2.0
    )
    value, terms = loss.with_terms(x, labels, skeleton=skeleton)
    dice = voxloss.DiceLoss(**MAP, include_background=False, batch=True)(x, labels)
    ce = voxloss.CrossEntropyLoss(**MAP)(x, labels)
    recall = SkeletonRecallLoss(**MAP, batch=True)(x, labels, skeleton=skeleton)
    torch.testing.assert_close(value, dice + 2 * ce + 0.5 * recall)
    assert [*terms] == ["dice", "cross_entropy", "skeleton_recall"]
    assert float(terms["cross_entropy"].weighted) == pytest.approx(2 * float(ce))
    assert float(terms["skeleton_recall"].weighted) == pytest.approx(0.5 * float(recall))


@pytest.mark.parametrize("ignored", [255, 2])
def test_ignored_voxels_and_masks(ignored: int) -> None:
    x, labels, skeleton = data()
    hidden = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    labels = torch.where(labels == ignored, 0, labels)
    skeleton = torch.where(skeleton == ignored, 0, skeleton)
    damaged, marked = x.masked_fill(hidden, torch.nan), labels.masked_fill(hidden, ignored)
    classes = [1, 3] if ignored == 2 else [1, 2, 3]
    wanted = value_and_gradient(
        SkeletonRecallLoss(**MAP, classes=classes), x, labels, skeleton=torch.where(hidden, 0, skeleton)
    )
    found = value_and_gradient(
        SkeletonRecallLoss(**MAP, ignore_index=ignored), damaged, marked, skeleton=skeleton
    )
    torch.testing.assert_close(found, wanted)
    loss = SkeletonRecallLoss(**MAP, classes=classes)
    torch.testing.assert_close(value_and_gradient(loss, damaged, labels, mask=~hidden, skeleton=skeleton), wanted)


def test_regions() -> None:
    x, labels, skeleton = data(3)
    regions = [[1, 2], [2]]
    loss = SkeletonRecallLoss(sigmoid=True, regions=regions)
    lines = torch.cat([torch.isin(skeleton, torch.tensor(region)) for region in regions], 1)
    leaf = x[:, :2].clone().requires_grad_()
    value = by_channels(leaf.sigmoid(), lines.double())
    wanted = value.detach(), torch.autograd.grad(value, leaf)[0]
    torch.testing.assert_close(value_and_gradient(loss, x[:, :2], labels, skeleton=skeleton), wanted)
    torch.testing.assert_close(value_and_gradient(loss, x[:, :2], labels, skeleton=lines), wanted)


def test_second_derivatives() -> None:
    x, labels, skeleton = data(3)
    x, labels, skeleton = (tensor[..., :2, :2, :2] for tensor in (x, labels, skeleton))
    loss = DiceCESkeletonRecallLoss(**MAP)
    assert derivatives_hold(lambda z: loss(z, labels, skeleton=skeleton), x.clone().requires_grad_())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: None,
            r"skeleton: expected a map .* Compute it in the loader with voxloss\.transforms\.Skeletonized",
        ),
        (
            lambda s: s[..., :-1],
            r"skeleton: expected \[2, 1 or \d, 5, 6, 7\], as input is .* received \[2, 1, 5, 6, 6\]",
        ),
        (lambda s: s[:, 0], r"skeleton: expected \[2, 1 or \d, 5, 6, 7\]"),
        (lambda s: s.tolist(), r"skeleton: expected a torch\.Tensor, received list"),
        (lambda s: s.to("meta"), r"skeleton: expected on the input's device cpu, received meta"),
        (
            lambda s: s.roll(1),
            r"skeleton: expected 0 or the label of the voxel, received \d at \[.* Make it with voxloss\.transf",
        ),
        (lambda s: s + 4.0 * torch.nan, r"skeleton: expected 0 or the label of the voxel"),
        (lambda s: s.expand(-1, 4, -1, -1, -1) * 2.0, r"skeleton: expected values in \[0, 1\]"),
    ],
)
def test_a_skeleton_that_is_wrong_is_named(change: Any, message: str) -> None:
    x, labels, skeleton = data()
    with pytest.raises((ValueError, TypeError), match=message):
        SkeletonRecallLoss(**MAP)(x, labels, skeleton=change(skeleton))


def test_a_skeleton_in_another_place_is_named() -> None:
    x, labels, skeleton = data()
    loss = SkeletonRecallLoss(**MAP)
    with pytest.raises(ValueError, match=r"received none\. A third argument without a name is a mask"):
        loss(x, labels, skeleton)
    with pytest.raises(ValueError, match=r"skeleton: expected a map .*, received distance, partition\."):
        loss(x, labels, distance=skeleton, partition=skeleton)
    with pytest.raises(TypeError, match=r"received skelton=\. Did you mean 'skeleton'\?"):
        loss(x, labels, skelton=skeleton)
    with pytest.raises(TypeError, match=r"'include_background'\. The background has no skeleton"):
        SkeletonRecallLoss(**MAP, include_background=False)  # type: ignore[call-arg]
