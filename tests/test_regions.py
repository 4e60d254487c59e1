"""Regions: a label map and unions of its labels are as one channel per region, in every loss and backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import voxloss
from every_loss import LOSSES, make, value_and_gradient
from test_triton import HOME, compare, sums_for
from volumes import logits
from voxloss.backends import triton_gpu
from voxloss.backends.voxels import PassSpec
from voxloss.metrics import overlap_counts
from voxloss.regions import memberships

NESTED = [[1, 2, 3], [2, 3], [3]]
# Nested; overlapping, with a label in none and the background in one; a single one.
CASES = {"nested": NESTED, "overlapping": [[0, 4], [1, 4], [4, 2], [1]], "single": [[2, 3]]}
CPU = ("reference", "eager", "numba_cpu")


def channels_of(labels: Tensor, regions: list[list[int]]) -> Tensor:
    """What a loader would otherwise make of a label map: one channel per region."""
    return torch.stack([torch.isin(labels[:, 0].long(), torch.tensor(region)) for region in regions], 1)


def data(regions: list[list[int]], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (5, 6, 7)
    x = torch.randn(2, len(regions), *shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(1 + max(map(max, regions)), (2, 1, *shape), generator=generator)


def assert_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LOSSES)
def test_as_one_channel_per_region(name: str, case: str, backend: str) -> None:
    regions = CASES[case]
    x, labels = data(regions)
    options: dict[str, Any] = {}
    if "Skeleton" in name:  # where a label is 0 there is none, and channel 0 of several has none but of regions
        options["classes"] = [c for c, region in enumerate(regions) if 0 not in region]
    loss = make(name, "sigmoid", regions=regions, backend=backend, **options)
    if name in ("CCDiceCELoss", "BlobLoss"):
        options["include_background"] = True
    explicit = make(name, "sigmoid", backend=backend, **options)
    wanted = value_and_gradient(explicit, x, channels_of(labels, regions).double())
    assert_same(value_and_gradient(loss, x, labels), wanted)
    assert wanted[1].any()


OPTIONS: dict[str, dict[str, Any]] = {
    "batch": {"batch": True},
    "classes": {"classes": [0, 2]},
    "weight": {"weight": [0.5, 2.0, 3.0]},
    "absent": {"absent": "skip"},
    "no reduction": {"reduction": "none"},
    "squared": {"squared_pred": True},
    "soft": {"soft_label": True},
}


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("option", OPTIONS)
def test_with_every_option(option: str, backend: str) -> None:
    x, labels = data(NESTED)
    options = OPTIONS[option]
    explicit = voxloss.DiceLoss(sigmoid=True, backend=backend, **options)
    wanted = value_and_gradient(explicit, x, channels_of(labels, NESTED).double())
    loss = voxloss.DiceLoss(sigmoid=True, backend=backend, regions=NESTED, **options)
    assert_same(value_and_gradient(loss, x, labels), wanted)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("name", ["DiceLoss", "DiceCELoss", "FocalLoss", "GeneralizedDiceLoss"])
# 1 is a channel and no label of a region: its channel counts all the same.
@pytest.mark.parametrize("ignored", [255, -1, 1])
def test_ignored_voxels_are_left_out_and_no_region_is(name: str, ignored: int, backend: str) -> None:
    regions = [[2, 3], [3], [4]]
    x, labels = data(regions)
    labels[labels == 1] = 0
    hidden = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    explicit = make(name, "sigmoid", backend=backend)
    wanted = value_and_gradient(explicit, x, channels_of(labels, regions).double(), mask=~hidden)
    loss = make(name, "sigmoid", regions=regions, ignore_index=ignored, backend=backend)
    damaged = x.masked_fill(hidden, torch.nan)
    assert_same(value_and_gradient(loss, damaged, labels.masked_fill(hidden, ignored)), wanted)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("name", ["DiceLoss", "DiceCELoss"])
def test_masks_and_partly_annotated_regions(name: str, backend: str) -> None:
    x, labels = data(NESTED)
    others = {
        "mask": torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)).double(),
        "annotated": [[0, 2], [0, 1, 2]],
    }
    wanted = value_and_gradient(
        make(name, "sigmoid", backend=backend), x, channels_of(labels, NESTED).double(), **others
    )
    loss = make(name, "sigmoid", regions=NESTED, backend=backend)
    assert_same(value_and_gradient(loss, x, labels, **others), wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32, torch.float16])
def test_labels_of_every_dtype_and_layout(dtype: torch.dtype) -> None:
    x, labels = data(NESTED)
    loss = voxloss.DiceLoss(sigmoid=True, regions=NESTED)
    wanted = value_and_gradient(loss, x, labels)
    assert_same(value_and_gradient(loss, x, labels.to(dtype)), wanted)
    moved = labels.to(dtype).transpose(2, 4).contiguous().transpose(2, 4)
    assert_same(value_and_gradient(loss, x.contiguous(memory_format=torch.channels_last_3d), moved), wanted)


@pytest.mark.parametrize("backend", CPU)
def test_labels_that_are_in_no_table_are_errors(backend: str) -> None:
    x, labels = data([[2], [3]])
    loss = voxloss.DiceLoss(sigmoid=True, regions=[[2], [3]], backend=backend)
    loss(x, labels)  # 1 is the background, as 0 is
    for wrong in (4, -1, 2.5):
        bad = labels.double()
        bad[0, 0, 0, 0, 0] = wrong
        message = (
            "whole numbers in a label map" if wrong == 2.5 else r"expected labels 0…3, the largest in a region"
        )
        with pytest.raises(ValueError, match=message):
            loss(x, bad)


def test_second_derivatives_and_one_graph() -> None:
    x, labels = data(NESTED)
    loss = voxloss.DiceCELoss(sigmoid=True, regions=NESTED)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: loss(x, labels[:, :, :2, :2, :2]), leaf[:, :, :2, :2, :2])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(value_and_gradient(compiled, x, labels), value_and_gradient(loss, x, labels))  # type: ignore[arg-type]


@pytest.mark.sampled(4)
@pytest.mark.skipif(not triton_gpu.available()[0], reason=triton_gpu.available()[1])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("regions", [*CASES.values(), [[k, (k + 1) % 21] for k in range(20)]], ids=len)
@pytest.mark.parametrize("ignored", [None, 255])
def test_on_a_gpu(regions: list[list[int]], ignored: int | None) -> None:
    """A vector for each channel, whole tiles, and tiles with some of the channels."""
    channels = len(regions)
    table = memberships(regions, ignore_index=ignored)
    x = logits(2, channels, (9, 11))
    labels = torch.randint(len(table), (2, 1, 9, 11), generator=torch.Generator().manual_seed(0))
    if ignored is not None:
        labels[:, :, :3] = ignored
    names = [
        name
        for name in sums_for("sigmoid")
        if name in ("intersection", "prediction", "cross_entropy", "focal_negative")
    ]
    spec = PassSpec("sigmoid", names, ignored, 2.0, table)
    compare(x, labels, spec)
    compare(x, labels, spec, largest=4)
    labels[0, 0, 8, 10] = len(table)  # is an error
    compare(x, labels, spec)
    assert HOME in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"softmax": True, "regions": NESTED}, ValueError, "expected sigmoid=True, as regions may overlap"),
        ({"include_background": False, "regions": NESTED}, ValueError, "has no channel"),
        ({"regions": []}, ValueError, "expected 1 to 31 lists of labels, received 0"),
        ({"regions": [[1]] * 32}, ValueError, "expected 1 to 31 lists of labels, received 32"),
        ({"regions": [[1], []]}, TypeError, r"expected a list of labels for each channel.*received \[\]"),
        ({"regions": [1, 2]}, TypeError, "expected a list of labels for each channel.*received 1"),
        ({"regions": [["1"]]}, TypeError, "expected whole numbers in a region, received '1'"),
        ({"regions": [[1.0]]}, TypeError, "expected whole numbers in a region, received 1.0"),
        ({"regions": [[True]]}, TypeError, "expected whole numbers in a region, received True"),
        ({"regions": [[-1]]}, ValueError, "expected labels 0 to 1023, received -1"),
        ({"regions": [[1, 1]]}, ValueError, r"expected each label once in a region, received \[1, 1\]"),
        ({"regions": NESTED, "ignore_index": 2}, ValueError, "expected labels that are not ignored, received 2"),
    ],
)
def test_regions_that_make_no_sense(options: dict[str, Any], error: type[Exception], message: str) -> None:
    shared: dict[str, Any] = {} if "softmax" in options else {"sigmoid": True}
    with pytest.raises(error, match=message):
        voxloss.DiceLoss(**shared, **options)
    with pytest.raises(error, match=message):
        voxloss.DiceCELoss(**shared, **options)


def test_tensors_that_do_not_fit() -> None:
    x, labels = data(NESTED)
    loss = voxloss.DiceLoss(sigmoid=True, regions=NESTED)
    with pytest.raises(
        voxloss.ShapeError, match=r"expected 3 channels, one for each of the regions, received \[2, 2, "
    ):
        loss(x[:, :2], labels)
    with pytest.raises(voxloss.ShapeError, match="For a target with one channel per region omit"):
        loss(x, channels_of(labels, NESTED))


def test_no_volume_is_made_for_a_region() -> None:
    """Beside the gradient nothing that grows with the volume."""
    import tracemalloc

    x, labels = data(NESTED, torch.float32)
    loss = voxloss.DiceCELoss(sigmoid=True, regions=NESTED)
    big = x.repeat(1, 1, 8, 8, 8).requires_grad_(), labels.to(torch.uint8).repeat(1, 1, 8, 8, 8)
    loss(*big)  # compiled, and memory of threads
    with torch.profiler.profile(profile_memory=True) as profile:
        loss(*big)
    most = max((abs(event.self_cpu_memory_usage) for event in profile.key_averages()), default=0)
    tracemalloc.start()
    loss(*big)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(most, peak) < big[0].numel() * 4 / 2


def test_repr_and_ranks_know_the_regions() -> None:
    loss = voxloss.DiceLoss(sigmoid=True, regions=NESTED)
    assert "regions=[[1, 2, 3], [2, 3], [3]]" in repr(loss)
    assert loss._what != voxloss.DiceLoss(sigmoid=True, regions=NESTED[::-1])._what


# Where no loss is: statistics and hard scores.


def test_statistics_of_regions() -> None:
    x, labels = data(NESTED)
    got = voxloss.region_statistics(x, labels, activation="sigmoid", regions=NESTED)
    wanted = voxloss.region_statistics(x, channels_of(labels, NESTED).double(), activation="sigmoid")
    torch.testing.assert_close(tuple(got), tuple(wanted), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="regions may overlap"):
        voxloss.region_statistics(x, labels, activation="softmax", regions=NESTED)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ignored", [None, 255])
def test_hard_scores_of_regions(case: str, ignored: int | None) -> None:
    regions = CASES[case]
    x, labels = data(regions)
    predicted = data(regions)[1].flip(2)
    hidden = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    given = labels if ignored is None else labels.masked_fill(hidden, ignored)
    kept = torch.ones_like(hidden) if ignored is None else ~hidden
    g = channels_of(labels, regions) & kept
    for y_pred, sigmoid, p in ((x, True, x > 0), (predicted, False, channels_of(predicted, regions))):
        counts = overlap_counts(y_pred, given, sigmoid=sigmoid, regions=regions, ignore_index=ignored)
        wanted = [mask.flatten(2).sum(2) for mask in (p & g, p & kept, g)]
        assert all(map(torch.equal, counts, wanted))
        metric = voxloss.OverlapMetric(sigmoid=sigmoid, regions=regions, ignore_index=ignored)
        torch.testing.assert_close(metric(y_pred, given), counts.dice(), rtol=0, atol=0)
        assert metric.counts().both.shape[1] == len(regions)


def test_hard_scores_that_no_regions_have() -> None:
    x, labels = data(NESTED)
    with pytest.raises(ValueError, match=r"labels 0 to 3; received 4 at"):
        overlap_counts(x, labels + 1, sigmoid=True, regions=NESTED)
    with pytest.raises(voxloss.ShapeError, match="pass sigmoid=True"):
        overlap_counts(x, labels, regions=NESTED)
    with pytest.raises(voxloss.ShapeError, match=r"label map y \[B, 1"):
        overlap_counts(x, channels_of(labels, NESTED), sigmoid=True, regions=NESTED)
    with pytest.raises(ValueError, match="include_background"):
        voxloss.OverlapMetric(regions=NESTED, include_background=False)
