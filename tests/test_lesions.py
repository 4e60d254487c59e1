"""Losses by cell: beside a loop over cells with plain formulas, and what a partition must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import voxloss
from derivatives import derivatives_hold
from every_loss import value_and_gradient
from voxloss.losses.lesions import BlobLoss, CCDiceCELoss, CellwiseLoss
from voxloss.maps import Target
from voxloss.statistics import PassSums

MAP: dict[str, Any] = {"softmax": True, "to_onehot_y": True}
S = 1e-5


def data(channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels, and cells: 4 in the first sample, 2 in the second, one of the first without a voxel."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 6, 7, 40, generator=generator, dtype=torch.float64)
    labels = torch.randint(channels, (2, 1, 6, 7, 40), generator=generator)
    runs = torch.randint(0, 4, (2, 1, 6, 7, 5), generator=generator)
    runs[0][runs[0] == 2] = 4
    runs[1] %= 2
    return x, labels, runs.repeat_interleave(8, -1)


def dice_ce(p: Tensor, g: Tensor, inside: Tensor) -> Tensor:
    """Dice of the foreground and cross entropy of one sample `[C, ...]`, of the voxels inside."""
    p, g = p[:, inside], g[:, inside]
    dice = (2 * (p * g).sum(1) + S) / (p.sum(1) + g.sum(1) + S)
    entropy: Tensor = -(g * p.log()).sum() / g.sum()
    region: Tensor = 1 - dice[1:].mean()
    return region + entropy


def by_a_loop(x: Tensor, labels: Tensor, cells: Tensor, inside: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The mean over the cells of each sample, then over samples; number 0 is none."""
    p, g = x.softmax(1), F.one_hot(labels[:, 0], x.shape[1]).movedim(-1, 1).to(x)
    found = []
    for b in range(len(x)):
        numbers = sorted({*cells[b].flatten().tolist()} - {0})
        if numbers:
            found.append(torch.stack([dice_ce(p[b], g[b], inside(cells[b, 0], k)) for k in numbers]).mean())
    return torch.stack(found).mean()


def of_whole(x: Tensor, labels: Tensor) -> Tensor:
    found: Tensor = voxloss.DiceCELoss(**MAP, include_background=False)(x, labels)
    return found


BACKENDS = ["reference", "eager", "numba_cpu"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_cell_is_a_sample(backend: str) -> None:
    x, labels, cells = data()
    leaf = x.clone().requires_grad_()
    value = by_a_loop(leaf, labels, cells, lambda numbers, k: numbers == k)
    wanted = value.detach(), torch.autograd.grad(value, leaf)[0]
    loss = CCDiceCELoss(**MAP, backend=backend)
    torch.testing.assert_close(
        value_and_gradient(loss, x, labels, partition=cells), wanted, rtol=1e-10, atol=1e-12
    )
    given = Target(labels, partition=cells)
    torch.testing.assert_close(value_and_gradient(loss, x, given), wanted, rtol=1e-10, atol=1e-12)  # type: ignore[arg-type]
    both = CCDiceCELoss(**MAP, backend=backend, lambda_lesion=0.5, lambda_global=2.0)
    whole = of_whole(x, labels)
    torch.testing.assert_close(both(x, labels, partition=cells), 0.5 * wanted[0] + 2 * whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_component_with_what_is_in_none(backend: str) -> None:
    x, labels, cells = data()
    leaf = x.clone().requires_grad_()
    blobs = by_a_loop(leaf, labels, cells, lambda numbers, k: (numbers == k) | (numbers == 0))
    value = 2 * of_whole(leaf, labels) + blobs
    wanted = value.detach(), torch.autograd.grad(value, leaf)[0]
    loss = BlobLoss(**MAP, backend=backend)
    torch.testing.assert_close(
        value_and_gradient(loss, x, labels, partition=cells), wanted, rtol=1e-10, atol=1e-12
    )
    cells[1] = 0  # a sample without components
    blobs = by_a_loop(x[:1], labels[:1], cells[:1], lambda numbers, k: (numbers == k) | (numbers == 0))
    torch.testing.assert_close(loss(x, labels, partition=cells), 2 * of_whole(x, labels) + blobs)
    torch.testing.assert_close(loss(x, labels, partition=0 * cells), 2 * of_whole(x, labels))


def test_one_cell_is_no_partition() -> None:
    x, labels, cells = data()
    for part in (
        voxloss.TverskyLoss(**MAP, alpha=0.3, beta=0.7),
        voxloss.GeneralizedDiceLoss(**MAP),
        voxloss.MCCLoss(**MAP),
        voxloss.CrossEntropyLoss(**MAP, weight=[1.0, 2.0, 3.0], label_smoothing=0.1),
        voxloss.DiceLoss(**MAP, absent="skip", weight=[1.0, 2.0, 3.0]),
    ):
        wanted = [value_and_gradient(part, x[b : b + 1], labels[b : b + 1]) for b in range(2)]
        value, gradient = value_and_gradient(CellwiseLoss(part), x, labels, partition=0 * cells)
        torch.testing.assert_close(value, (wanted[0][0] + wanted[1][0]) / 2)
        torch.testing.assert_close(gradient, torch.cat([each for _, each in wanted]) / 2)


def test_cells_are_the_samples_of_a_batch() -> None:
    """A sample of two halves, each a cell, is a batch of these halves."""
    x, labels, _ = data()
    halves = [torch.cat(torch.split(tensor[:1], 20, -1)) for tensor in (x, labels)]
    cells = 1 + (torch.arange(40) >= 20).long().expand(1, 1, 6, 7, 40)
    for part in (voxloss.DiceLoss(**MAP), voxloss.FocalTverskyLoss(**MAP)):
        wanted = part(*halves)
        torch.testing.assert_close(CellwiseLoss(part)(x[:1], labels[:1], partition=cells), wanted)


@pytest.mark.parametrize("backend", ["eager", "numba_cpu"])
def test_ignored_voxels_masks_and_regions(backend: str) -> None:
    x, labels, cells = data()
    hidden = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    junk = torch.where(hidden, -7, cells)
    loss = CCDiceCELoss(**MAP, backend=backend)
    wanted = value_and_gradient(
        CCDiceCELoss(**MAP, backend="reference"), x, labels, mask=~hidden, partition=cells
    )
    damaged = x.masked_fill(hidden, torch.nan)
    torch.testing.assert_close(value_and_gradient(loss, damaged, labels, mask=~hidden, partition=junk), wanted)
    marked = labels.masked_fill(hidden, 255)
    ignoring = CCDiceCELoss(**MAP, ignore_index=255, backend=backend)
    torch.testing.assert_close(value_and_gradient(ignoring, damaged, marked, partition=junk), wanted)
    large = cells.masked_fill(hidden, 2**40)  # of as many cells there would be no sums
    torch.testing.assert_close(value_and_gradient(ignoring, damaged, marked, partition=large), wanted)
    regions = [[1, 2], [2]]
    channels = torch.cat([torch.isin(labels, torch.tensor(region)) for region in regions], 1).double()
    by_channels = CCDiceCELoss(sigmoid=True, include_background=True)
    by_label = CCDiceCELoss(sigmoid=True, regions=regions, backend=backend)
    torch.testing.assert_close(
        value_and_gradient(by_label, x[:, :2], labels, partition=cells),
        value_and_gradient(by_channels, x[:, :2], channels, partition=cells),
    )


def test_one_pass_and_one_graph(passes: list[tuple[str, str]]) -> None:
    x, labels, cells = data()
    loss = BlobLoss(**MAP, cells=5)
    value, gradient = value_and_gradient(loss, x, labels, partition=cells)
    assert [name for _, name in passes] == ["region_sums", "region_sums_backward"]
    compiled: Any = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradient(compiled, x, labels, partition=cells), (value, gradient))
    total, terms = loss.with_terms(x, labels, partition=cells)
    assert [*terms] == ["whole", "lesions"]
    torch.testing.assert_close(sum(term.weighted for term in terms.values()), total)


def test_second_derivatives() -> None:
    x, labels, cells = (tensor[:, :, :2, :2, 6:10] for tensor in data())
    loss = CCDiceCELoss(**MAP, lambda_global=1.0)
    assert derivatives_hold(lambda z: loss(z, labels, partition=cells), x.clone().requires_grad_())


def test_a_missed_lesion_costs_the_same_whatever_its_size() -> None:
    """What cells are for; Dice of the whole hardly sees the small one."""
    labels = torch.zeros(1, 1, 16, 16, 32, dtype=torch.int64)
    labels[..., 2:14, 2:14, 2:14] = 1
    labels[..., 7:9, 7:9, 24:26] = 1
    cells = 1 + (torch.arange(32) >= 19).long().expand(1, 1, 16, 16, 32)

    def missing(columns: slice) -> Tensor:
        found = labels.clone()
        found[..., columns] = 0
        return 20.0 * F.one_hot(found[:, 0], 2).movedim(-1, 1).double()

    by_cell = CellwiseLoss(voxloss.DiceLoss(**MAP, include_background=False))
    large, small = (by_cell(missing(c), labels, partition=cells) for c in (slice(19), slice(19, 32)))
    torch.testing.assert_close(large, small, rtol=1e-4, atol=0)
    torch.testing.assert_close(small, torch.tensor(0.5, dtype=torch.float64), rtol=1e-4, atol=0)
    assert voxloss.DiceLoss(**MAP, include_background=False)(missing(slice(19, 32)), labels) < 0.01


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda c: None, {}, r"partition: expected a map .* voxloss\.transforms\.NearestComponentd"),
        (
            lambda c: c - 1,
            {},
            r"partition: expected whole numbers ≥ 0, one per cell, received -1 at \[.*mode='nearest'",
        ),
        (lambda c: c + 0.5, {}, r"partition: expected whole numbers"),
        (
            lambda c: c,
            {"cells": 3},
            r"partition: expected whole numbers 0…2, .* received [34] at .* Raise cells=",
        ),
        (
            lambda c: c.expand(-1, 3, -1, -1, -1),
            {},
            r"partition: expected one channel, received \[2, 3, 6, 7, 40\]",
        ),
        (lambda c: c[..., 1:], {}, r"partition: expected \[2, 1 or 3, 6, 7, 40\], .* Crop, flip"),
        (
            lambda c: c * 40_000,
            {},
            r"partition: expected numbers below 65536, .* received 160000\. Number the cells",
        ),
    ],
)
def test_a_partition_that_is_wrong_is_named(change: Any, options: dict[str, Any], message: str) -> None:
    x, labels, cells = data()
    with pytest.raises((ValueError, TypeError), match=message):
        CCDiceCELoss(**MAP, **options)(x, labels, partition=change(cells))


def test_what_cannot_be_by_cell_is_named() -> None:
    for other, received in (
        (voxloss.FocalLoss(), r"voxloss\.losses\.voxelwise\.FocalLoss\.$"),
        (torch.nn.CrossEntropyLoss(), r"torch\.nn\.modules\.loss\.CrossEntropyLoss\.$"),
        (voxloss.DiceCELoss(), r"DiceCELoss\. CCDiceCELoss and BlobLoss are"),
        (voxloss.DiceLoss, "the class DiceLoss and no instance of it"),
    ):
        with pytest.raises(TypeError, match=f"expected a region loss or CrossEntropyLoss of voxloss.*{received}"):
            CellwiseLoss(other)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"expected one over all voxels, received .*TopKLoss, .* CrossEntropyLoss"
    ):
        CellwiseLoss(voxloss.TopKLoss(**MAP))
    for options in ({"batch": True}, {"reduction": "sum"}):
        with pytest.raises(ValueError, match='loss: expected batch=False and reduction="mean"'):
            CellwiseLoss(voxloss.DiceLoss(**MAP, **options))
    with pytest.raises(TypeError, match=r"'batch'\. Cells are those of a sample"):
        CCDiceCELoss(**MAP, batch=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match='shard: expected "batch"'):
        PassSums(["voxels"], torch.zeros(1, 2, 3), binary=False, spatial_axes=3, shard="volume", cells=2)
    with pytest.raises(ValueError, match='shard: expected "batch"'):
        CellwiseLoss(voxloss.DiceLoss(**MAP, shard="volume", group="world"))
    for cells in (0, 2.5, True, "4"):
        with pytest.raises(ValueError, match=f"cells: expected a whole number ≥ 1, received {cells!r}"):
            CellwiseLoss(voxloss.DiceLoss(**MAP), cells=cells)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["CCDiceCELoss", "BlobLoss", "SkeletonRecallLoss"])
def test_one_channel_warns_of_what_was_asked_for_alone(name: str, recwarn: pytest.WarningsRecorder) -> None:
    """They leave the background out by themselves."""
    x, labels, cells = data()
    target = Target(labels.clamp(max=1), skeleton=labels.clamp(max=1), partition=cells)
    getattr(voxloss, name)(sigmoid=True)(x[:, :1], target)
    assert not recwarn.list
    if name != "SkeletonRecallLoss":
        with pytest.warns(UserWarning, match="`include_background=False` ignored"):
            getattr(voxloss, name)(sigmoid=True, include_background=False)(x[:, :1], target)


def test_voxels_that_were_padded_are_in_no_cell() -> None:
    x, labels, cells = data()
    loss = CCDiceCELoss(**MAP)
    padded = (F.pad(each, (3, 0, 0, 2)) for each in (x, labels, cells + 1))
    torch.testing.assert_close(
        loss(next(padded), Target(next(padded), partition=next(padded))), loss(x, labels, partition=cells + 1)
    )
