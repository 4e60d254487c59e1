"""The Triton kernels: in the interpreter on a CPU, or on a GPU, equal to the reference; compiled ahead of time.

Layouts, labels, ignored voxels and derivatives that concern every backend are in test_statistics.py,
test_operators.py and test_entropy_sums.py; here is what only tiles and compilers can get wrong.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from volumes import label_map, logits, one_hot
from voxloss import operators
from voxloss.backends import reference, select, triton_gpu
from voxloss.backends.triton_gpu import LANES, Tiling, tiling
from voxloss.backends.voxels import MAPPED, NEGATIVE, TERMS, PassSpec
from voxloss_verify.tolerances import GRADIENT, LOSS

DICE = ["intersection", "prediction", "target"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WHOLE = [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64]
HOME = "cpu" if triton_gpu.interpreted() else "cuda"

pytestmark = [
    pytest.mark.skipif(not triton_gpu.available()[0], reason=triton_gpu.available()[1]),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, in the interpreter: −∞ − (−∞), 1/0
]


def sums_for(activation: str) -> list[str]:
    without = MAPPED if activation != "softmax" else (*MAPPED, *NEGATIVE)
    return [name for name in TERMS if name not in without]


def prediction(classes: int, spatial: tuple[int, ...], activation: str, items: int = 2) -> Tensor:
    x = logits(items, classes, spatial)
    return x.sigmoid() if activation == "none" else x


def compare(
    x: Tensor,
    target: Tensor,
    spec: PassSpec,
    largest: int = triton_gpu.LARGEST_TILE,
    wrt: str = "input",
    mask: Tensor | None = None,
    given: Tensor | None = None,
    cells: Tensor | None = None,
) -> None:
    """Hold sums, verdict and gradient against those of the reference; tiles have `largest` classes at most.

    Few classes are computed in whole tiles as well as by a vector for each.
    """
    name = str(x.dtype).removeprefix("torch.")
    there, own_map, numbers = (None if tensor is None else tensor.to(HOME) for tensor in (mask, given, cells))
    wanted, wanted_valid = reference.region_sums(x, target, spec, mask, given, cells)
    scale = wanted.abs().amax(-1, keepdim=True).clamp(min=1)
    grad = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted)
    wanted_gradient = reference.region_sums_backward(
        grad, x.double(), target, spec, wrt, mask, map=given, partition=cells
    )
    for tiles in tilings(x, spec, largest) if cells is None else [None]:
        more: dict[str, Any] = {"mask": there, "map": own_map, "partition": numbers, "tiles": tiles}
        launch, partial, valid = triton_gpu.forward(x.to(HOME), target.to(HOME), spec, **more)
        launch.start()
        got = partial.sum(0, dtype=torch.float64).cpu()
        assert ((got - wanted).abs() <= LOSS[name] * scale).all()
        assert bool(valid) == bool(wanted_valid)
        launch, result, written = triton_gpu.backward(
            grad.to(HOME), x.to(HOME), target.to(HOME), spec, wrt, **more
        )
        launch.start()
        gradient = (result if written is result else result.copy_(written)).cpu().double()
        assert ((gradient - wanted_gradient).abs() <= GRADIENT[name] * wanted_gradient.abs().max()).all()


def tilings(x: Tensor, spec: PassSpec, largest: int) -> list[Tiling | None]:
    """What is chosen for the problem, and for few classes vectors; or tiles of `largest` classes at most."""
    classes = x.shape[1]
    whole = tiling(classes, x.dtype, len(spec.sums), side_by_side=False, largest=largest)
    if largest < triton_gpu.LARGEST_TILE:
        return [whole]
    return [whole, Tiling("few", classes, 64, 1)] if classes <= triton_gpu.FEW else [None]


SIZES = [
    (1, 1),
    (1, 700),
    (2, 63),
    (3, 64),
    (5, 129),
    (14, 65),
    (16, 1),
    (17, 33),
    (40, 520),
    (118, 40),
    (220, 17),
]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_number_of_classes_and_voxels(size: tuple[int, int], activation: str, poisoned_empty: None) -> None:
    """Tiles that are not full, programs that are not, and samples with programs of their own."""
    classes, voxels = size
    if classes == 1 and activation == "softmax":
        pytest.skip("a softmax over one class is 1")
    x, labels = prediction(classes, (voxels,), activation), label_map(2, classes, (voxels,))
    compare(x, labels, PassSpec(activation, sums_for(activation), None))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("form", ["label map", "label map, ignore", "channels", "channel ignored", "sentinel"])
def test_classes_in_several_tiles(activation: str, form: str, poisoned_empty: None) -> None:
    """An online softmax, also where the first classes have no probability at all."""
    x, target = prediction(11, (5, 9), activation), label_map(2, 11, (5, 9))
    if activation == "softmax":
        x[:, :5, 0] = -math.inf  # the first tile, whole
        x[:, 9:, 1] = -math.inf
        x[:, :, 2] *= 1e3
    ignore_index = 255 if form in ("label map, ignore", "sentinel") else 2 if form == "channel ignored" else None
    hidden = torch.rand(2, 1, 5, 9) < 0.3
    if form == "label map, ignore":
        target[hidden] = 255
    elif form != "label map":
        target = one_hot(target, 11)
        if form == "sentinel":
            target = target.masked_fill(hidden, 255)
    if ignore_index is not None:
        x = x.masked_fill(hidden, math.nan) if form != "channel ignored" else x
    names = (
        [name for name in sums_for(activation) if name in DICE]
        if activation == "softmax"
        else sums_for(activation)
    )
    compare(x, target, PassSpec(activation, names, ignore_index, 1.5), largest=4)


@pytest.mark.sampled(4)
@pytest.mark.pairwise(
    largest=[512, 4],
    activation=["softmax", "sigmoid", "none"],
    form=["label map, ignore", "channel ignored", "sentinel"],
    weights=[torch.bool, torch.float32, torch.float64],
)
def test_masks(options: dict[str, Any], poisoned_empty: None) -> None:
    """A voxel of weight 0, whatever is there, is one that is ignored; an ignored one may have a weight."""
    largest, activation, form, weights = options.values()
    x, target = prediction(11, (5, 9), activation), label_map(2, 11, (5, 9))
    mask = (torch.rand(2, 1, 5, 9) > 0.3) * torch.rand(2, 1, 5, 9).add(0.5)
    hidden = torch.rand(2, 1, 5, 9) < 0.3
    if form == "label map, ignore":
        target = target.masked_fill(hidden, 255).masked_fill(mask == 0, 11)
    else:
        target = one_hot(target, 11)
        target = target.masked_fill(hidden, 255) if form == "sentinel" else target
        target = target.masked_fill(mask == 0, math.nan)
    x = x.masked_fill(mask == 0, math.nan)
    spec = PassSpec(activation, sums_for(activation), 2 if form == "channel ignored" else 255, 0.5)
    compare(x, target, spec, largest, mask=mask.to(weights))
    if form != "label map, ignore":
        compare(x, target, spec, largest, "target", mask.to(weights))


@pytest.mark.sampled(6)
@pytest.mark.pairwise(
    largest=[512, 4],
    activation=["softmax", "sigmoid", "none"],
    form=["label map", "label map, ignore", "soft"],
    map=["of the label", "of each channel"],
    masked=[False, True],
    dtype=[torch.bool, torch.uint8, torch.float32, torch.float64],
)
def test_maps(options: dict[str, Any], poisoned_empty: None) -> None:
    largest, activation, form, kind, masked, dtype = options.values()
    x, target = prediction(11, (5, 9), activation), label_map(2, 11, (5, 9))
    of_label = kind == "of the label" and form != "soft"
    given = 2 * torch.randn(2, 1 if of_label else 11, 5, 9)
    given = given.abs() if dtype in (torch.bool, torch.uint8) else given
    given = given.to(dtype)
    if form == "label map, ignore":
        hidden = torch.rand(2, 1, 5, 9) < 0.3
        target, x = target.masked_fill(hidden, 255), x.masked_fill(hidden, math.nan)
        given = given.masked_fill(hidden, math.nan) if dtype.is_floating_point else given
    elif form == "soft":
        target = logits(2, 11, (5, 9)).softmax(1)
    mask = (torch.rand(2, 1, 5, 9) > 0.3) * torch.rand(2, 1, 5, 9).add(0.5) if masked else None
    sums = [*sums_for(activation)[:6], *MAPPED]
    compare(x, target, PassSpec(activation, sums, 255, 2.0, (), of_label), largest, mask=mask, given=given)


@pytest.mark.sampled(2)
@pytest.mark.pairwise(
    channels=[1, 3, 40],
    activation=["softmax", "sigmoid", "none"],
    form=["label map", "label map, ignore", "soft"],
    masked=[False, True],
    mapped=[False, True],
    dtype=[torch.float64, torch.float32, torch.bfloat16],
)
def test_cells(options: dict[str, Any], poisoned_empty: None) -> None:
    """Cells in runs and alone, some of them in one sample only, over tiles that are not full."""
    channels, activation, form, masked, mapped, dtype = options.values()
    if channels == 1 and activation == "softmax":
        pytest.skip("a softmax over one class is 1")
    x, target = prediction(channels, (4, 70), activation).to(dtype), label_map(2, channels, (4, 70))
    cells = torch.randint(7, (2, 1, 4, 7)).repeat_interleave(10, -1)
    cells[0][cells[0] == 3] = 4
    cells[1, ..., 5] = 6
    hidden = torch.rand(2, 1, 4, 70) < 0.3
    if form == "label map, ignore":
        target, x = target.masked_fill(hidden, 255), x.masked_fill(hidden, math.nan)
    elif form == "soft":
        target = logits(2, channels, (4, 70)).sigmoid()
    mask = (torch.rand(2, 1, 4, 70) > 0.3) * torch.rand(2, 1, 4, 70).add(0.5) if masked else None
    given = torch.randn(2, channels, 4, 70) if mapped else None
    sums = [*sums_for(activation)[:8], *(MAPPED if mapped else ())]
    spec = PassSpec(activation, sums, 255, 2.0, (), False, 7)
    compare(x, target, spec, mask=mask, given=given, cells=cells)


@pytest.mark.integration
def test_cross_entropy_and_focal_over_tiles_of_classes() -> None:
    x, labels = logits(2, 11, (5, 9)), label_map(2, 11, (5, 9))
    for gamma in (0.0, 0.5, 1.0, 2.0):
        compare(x, labels, PassSpec("softmax", sums_for("softmax"), None, gamma), largest=4)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("largest", [512, 2])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("wrt", ["input", "target"])
def test_soft_targets(activation: str, wrt: str, largest: int) -> None:
    x, g = prediction(5, (4, 11), activation), logits(2, 5, (4, 11)).softmax(1)
    compare(x, g, PassSpec(activation, sums_for(activation), None, 1.5), largest, wrt)
    ignored = g.clone()
    ignored[:, :, 1, :3] = -1
    compare(x, ignored, PassSpec(activation, sums_for(activation), -1), largest, wrt)


@pytest.mark.parametrize("largest", [512, 2])
def test_the_kink_where_prediction_and_target_are_equal(largest: int) -> None:
    p = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    x, g = (t.reshape(1, 1, 16).repeat(1, 3, 1) for t in torch.meshgrid(p, p, indexing="ij"))
    for names in (["soft_intersection", "prediction", "target"], ["prediction", "target", "soft_intersection"]):
        for wrt in ("input", "target"):
            compare(x, g, PassSpec("none", names, None), largest, wrt)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("form", ["label map", "soft"])
def test_input_dtypes(dtype: torch.dtype, activation: str, form: str) -> None:
    x = prediction(6, (7, 50), activation).to(dtype)
    target = label_map(2, 6, (7, 50)) if form == "label map" else logits(2, 6, (7, 50)).softmax(1).to(dtype)
    compare(x, target, PassSpec(activation, ["soft_intersection", "prediction_squared", "cross_entropy"], None))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.bool, *WHOLE, *DTYPES], ids=str)
@pytest.mark.parametrize("form", ["label map", "one-hot"])
def test_target_dtypes(dtype: torch.dtype, form: str) -> None:
    classes = 2 if dtype == torch.bool else 5
    x, target = logits(2, classes, (40,)), label_map(2, classes, (40,))
    if form == "one-hot":
        target = one_hot(target, classes)
    compare(x, target.to(dtype), PassSpec("softmax", DICE, None))


def verdict(x: Tensor, target: Tensor, activation: str, ignore_index: int | None, largest: int) -> bool:
    spec = PassSpec(activation, DICE, ignore_index)
    wanted = bool(reference.region_sums(x, target, spec)[1])
    for tiles in tilings(x, spec, largest):
        launch, _, valid = triton_gpu.forward(x.to(HOME), target.to(HOME), spec, tiles=tiles)
        launch.start()
        assert bool(valid) == wanted
    return wanted


LABELS_AND_VERDICTS = [
    ([3, 0], torch.int64, None, False),
    ([-1, 0], torch.int64, None, False),
    ([-1, 0], torch.int64, -1, True),
    ([255, 0], torch.uint8, -1, False),  # not −1
    ([255, 0], torch.uint8, 255, True),
    ([65535, 0], torch.uint16, 65535, True),
    ([2**40, 0], torch.int64, None, False),
    ([2**40, 0], torch.int64, 2**40, True),
    ([1.5, 0], torch.float32, None, False),
    ([1.5, 0], torch.float32, 1, False),  # a fraction that truncates to the ignored label
    ([257.0, 0], torch.bfloat16, 257, False),  # bfloat16 rounds it to 256
    ([256.0, 0], torch.bfloat16, 256, True),
    ([math.nan, 0], torch.float16, None, False),
    ([math.nan, 0], torch.float16, 0, False),
    ([math.inf, 0], torch.float64, None, False),
    ([-0.0, 2], torch.float64, None, True),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("largest", [512, 2])
@pytest.mark.parametrize("case", LABELS_AND_VERDICTS, ids=str)
def test_labels_that_are_no_class_are_flagged(
    case: tuple[list[float], torch.dtype, int | None, bool], largest: int
) -> None:
    labels, dtype, ignore_index, valid = case
    target = torch.zeros(2, 1, 150, dtype=dtype)
    target[1, 0, -2:] = torch.tensor(labels).to(dtype)
    assert verdict(logits(2, 3, (150,)), target, "softmax", ignore_index, largest) is valid


@pytest.mark.parametrize("largest", [512, 2])
@pytest.mark.parametrize(
    ("value", "ignore_index", "valid"),
    [
        (1.5, None, False),
        (-0.5, None, False),
        (1.0005, None, True),
        (math.nan, None, False),
        (0.5, 2, False),  # ignored by half
        (0.5, 1, True),
        (255.0, 255, False),  # in one channel only
    ],
)
def test_targets_out_of_range_are_flagged(
    value: float, ignore_index: int | None, valid: bool, largest: int
) -> None:
    target = torch.zeros(2, 3, 150)
    target[1, 2, -1] = value
    assert verdict(logits(2, 3, (150,)), target, "sigmoid", ignore_index, largest) is valid


@pytest.mark.parametrize("largest", [512, 2])
@pytest.mark.parametrize(
    ("value", "dtype", "valid"),
    [
        (1.5, torch.float32, False),
        (-0.002, torch.float32, False),
        (1.0005, torch.float32, True),
        (1.005, torch.float16, True),
        (math.nan, torch.float32, True),  # to be seen in the loss
        (math.inf, torch.float32, False),
    ],
)
@pytest.mark.parametrize("form", ["label map", "one-hot"])
def test_probabilities_out_of_range_are_flagged(
    value: float, dtype: torch.dtype, valid: bool, form: str, largest: int
) -> None:
    x, target = torch.full((2, 3, 150), 0.5, dtype=dtype), label_map(2, 3, (150,))
    x[1, 2, -1] = value
    if form == "one-hot":
        target = one_hot(target, 3)
    assert verdict(x, target, "none", None, largest) is valid


@pytest.mark.parametrize("form", ["contiguous", "channels last", "rotated", "every second", "between"])
def test_a_gradient_is_laid_out_as_its_tensor(form: str, poisoned_empty: None) -> None:
    x, target = logits(2, 4, (6, 5, 8)), logits(2, 4, (6, 5, 8)).softmax(1)
    if form == "channels last":
        x = x.to(memory_format=torch.channels_last_3d)
    elif form == "rotated":
        x = x.permute(0, 1, 4, 2, 3)
        target = target.permute(0, 1, 4, 2, 3).contiguous()
    elif form == "every second":
        x, target = x[..., ::2, :], target[..., ::2, :]
    elif form == "between":  # the channels lie between the spatial axes: no common stride
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    for wrt, own in (("input", x), ("target", target)):
        compare(x, target, PassSpec("softmax", DICE, None), wrt=wrt)
        grad = torch.ones(3, 2, 4, dtype=torch.float64, device=HOME)
        got = triton_gpu.region_sums_backward(
            grad, x.to(HOME), target.to(HOME), PassSpec("softmax", DICE, None), wrt
        )
        assert got.stride() == torch.empty_like(own).stride()


def test_nothing_is_copied_where_one_stride_leads_from_voxel_to_voxel() -> None:
    x, labels = logits(3, 4, (4, 5, 6)), label_map(3, 4, (4, 5, 6))
    layouts = [
        (x, labels),
        tuple(t.to(memory_format=torch.channels_last_3d) for t in (x, labels)),
        (x[::2], labels[::2]),
        (x[:1].expand(3, -1, -1, -1, -1), labels[:1].expand(3, -1, -1, -1, -1)),
        (x.transpose(2, 4), labels.transpose(2, 4)),
    ]
    for (a, b), dtype in product(layouts, (torch.bool, torch.float32)):
        mask = torch.empty_like(b, dtype=dtype)
        for launch, *_ in (
            triton_gpu.forward(a, b, PassSpec("softmax", DICE, None), mask=mask),
            triton_gpu.backward(torch.ones(3, 3, 4), a, b, PassSpec("softmax", DICE, None), "input", mask=mask),
        ):
            assert launch.arguments["input"].data_ptr() == a.data_ptr()
            assert launch.arguments["target"].data_ptr() == b.data_ptr()
            assert launch.arguments["mask"].data_ptr() == mask.data_ptr()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_every_run(dtype: torch.dtype) -> None:
    x, labels = logits(2, 4, (3000,), dtype).to(HOME), label_map(2, 4, (3000,)).to(HOME)
    spec = PassSpec("softmax", [*DICE, "focal"], None)
    first, _ = triton_gpu.region_sums(x, labels, spec)
    gradient = triton_gpu.region_sums_backward(first, x, labels, spec, "input")
    for _ in range(2):
        assert torch.equal(triton_gpu.region_sums(x, labels, spec)[0], first)
        assert torch.equal(triton_gpu.region_sums_backward(first, x, labels, spec, "input"), gradient)


def test_sums_come_in_the_order_asked_for_and_one_may_come_twice() -> None:
    x, labels = logits(2, 3, (50,)).to(HOME), label_map(2, 3, (50,)).to(HOME)
    together = triton_gpu.region_sums(x, labels, PassSpec("softmax", DICE, None))[0]
    for order in ([2, 0, 1], [1], [0, 0, 2]):
        got = triton_gpu.region_sums(x, labels, PassSpec("softmax", [DICE[k] for k in order], None))[0]
        assert torch.equal(got, together[order])


def test_float32_sums_are_as_exact_as_the_law_asks() -> None:
    """Equal addends round all the same way, the worst case for long chains: here 16 long, then a tree."""
    x = torch.full((1, 2, 64, 64, 8), 0.1)
    x[:, 1] = 0.7
    sums, _ = triton_gpu.region_sums(
        x.to(HOME), torch.ones(1, 1, 64, 64, 8).to(HOME), PassSpec("none", DICE, None)
    )
    wanted = x.double().flatten(2).sum(-1)
    assert ((sums[1].cpu() - wanted).abs() <= 2e-7 * wanted).all()
    assert sums[2].tolist() == [[0, 64 * 64 * 8]]


def test_programs_are_added_up_in_float64() -> None:
    x, labels = logits(2, 3, (9000,), torch.float32).to(HOME), label_map(2, 3, (9000,)).to(HOME)
    spec = PassSpec("softmax", DICE, None)
    launch, partial, _ = triton_gpu.forward(x, labels, spec)
    launch.start()
    assert len(partial) > 4
    assert partial.dtype == torch.float64
    assert torch.equal(triton_gpu.region_sums(x, labels, spec)[0], partial.sum(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_small_loss_of_a_sure_prediction_is_exact(dtype: torch.dtype) -> None:
    """Where 1 + exp(−|z|) rounds to 1, or nearly."""
    x = torch.linspace(-80, -12, 40).view(1, 1, -1).to(dtype)
    for sign, name in ((1, "cross_entropy_negative"), (-1, "cross_entropy")):
        target = torch.full_like(x, float(sign < 0))
        for voxel in range(40):
            z, g = sign * x[..., voxel : voxel + 1], target[..., voxel : voxel + 1]
            got, _ = triton_gpu.region_sums(z.to(HOME), g.to(HOME), PassSpec("sigmoid", [name], None))
            wanted, _ = reference.region_sums(z, g, PassSpec("sigmoid", [name], None))
            torch.testing.assert_close(got.cpu(), wanted, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)


def test_infinite_logits_behave_as_torchs() -> None:
    x, labels = logits(1, 3, (4,)), torch.tensor([[[0, 1, 2, 0]]])
    x[0, :, 0] = -math.inf  # no softmax
    x[0, 1, 1] = math.inf
    x[0, 2, 3] = -math.inf
    for largest, voxel in product((512, 2), range(4)):
        one, label = x[..., voxel : voxel + 1], labels[..., voxel : voxel + 1]
        spec = PassSpec("softmax", ["prediction", "cross_entropy"], None)
        wanted, _ = reference.region_sums(one, label, spec)
        for tiles in tilings(one, spec, largest):
            launch, partial, _ = triton_gpu.forward(one.to(HOME), label.to(HOME), spec, tiles=tiles)
            launch.start()
            torch.testing.assert_close(partial.sum(0).cpu(), wanted, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("largest", [512, 2])
@pytest.mark.parametrize("ignore_index", [None, 2])
def test_a_volume_may_have_more_than_two_to_the_31_elements(largest: int, ignore_index: int | None) -> None:
    """Two strides lead beyond them; in 32 bits they would lead back, to zeros. Hardly a page of it is touched."""
    far = 2**30 + 3
    try:
        memory = torch.empty(2**31 + 2 * far + 40, dtype=torch.uint8, device=HOME)
    except RuntimeError:
        pytest.skip("no room for it")
    target = memory.as_strided((1, 3, 40), (0, far, 1), 2**31)
    target.copy_(one_hot(label_map(1, 3, (40,)), 3))
    memory[2**31 + 2 * far - 2**32 :][:40] = 0
    x, spec = logits(1, 3, (40,)), PassSpec("softmax", DICE, ignore_index)
    for tiles in tilings(x, spec, largest):
        launch, partial, valid = triton_gpu.forward(x.to(HOME), target, spec, tiles=tiles)
        launch.start()
        assert valid
        assert (
            partial.sum(0).cpu() - reference.region_sums(x, target.cpu().clone(), spec)[0]
        ).abs().max() < 1e-12


@pytest.mark.parametrize("largest", [512, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_tiles_fit_into_registers(dtype: torch.dtype, largest: int) -> None:
    for classes, sums, together in product([1, 2, 3, 14, 33, 118, 512, 513, 5000], [1, 4, 10], [True, False]):
        tile = tiling(classes, dtype, sums, side_by_side=together, largest=largest)
        assert (tile.form == "many") == (classes > largest)
        least, most = (1, largest) if tile.form == "many" else (classes, 2 * classes)
        assert least <= tile.classes <= most
        assert 1 <= tile.warps <= 16
        for power in (tile.voxels, tile.warps, tile.classes if tile.form != "few" else 1):
            assert power & (power - 1) == 0
        values = tile.classes * tile.voxels / (tile.warps * LANES)
        totals = classes * sums if tile.form == "few" else values * sums
        assert (values + totals) * dtype.itemsize / 4 <= 120 or values <= 16 / (dtype.itemsize / 4)


@pytest.mark.parametrize("edge", [1, 31, 96, 97, 128, 160, 256])
@pytest.mark.parametrize("items", [1, 2, 5, 3000])
@pytest.mark.parametrize("classes", [2, 14, 118, 600])
def test_programs_take_every_tile_once_and_fill_the_device(classes: int, items: int, edge: int) -> None:
    shape = (edge, edge, edge)
    x = torch.empty(items, classes, *shape, device="meta")
    labels = torch.empty(items, 1, *shape, dtype=torch.uint8, device="meta")
    launch, partial, _ = triton_gpu.forward(x, labels, PassSpec("softmax", DICE, None))
    config, chunks = launch.arguments["CONFIG"], launch.arguments["chunks"]
    assert launch.programs == items * chunks == items * len(partial)
    assert config.tiles <= triton_gpu.LONGEST_CHAIN
    taken = chunks * config.tiles * config.block_v
    assert 0 <= taken - edge**3 < max(2, chunks // 8) * config.block_v * config.tiles
    assert config.even == (taken == edge**3)
    if classes == 14 and edge >= 128 and items == 2:
        assert launch.programs % 2048 in range(2048 * 3 // 4, 2048) or launch.programs % 2048 == 0


def test_a_launch_is_prepared_once_for_equal_problems() -> None:
    triton_gpu._plan.cache_clear()
    x, labels = logits(2, 3, (50,)).to(HOME), label_map(2, 3, (50,)).to(HOME)
    for sums, moved in ((DICE, x), (tuple(DICE), x.clone()), (DICE[:2], x), (DICE, x.float())):
        triton_gpu.region_sums(moved, labels, PassSpec("softmax", sums, None))
    assert triton_gpu._plan.cache_info()[:2] == (1, 3)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("names", [DICE, [*DICE, "cross_entropy"]], ids=["Dice", "DiceCE"])
@pytest.mark.parametrize("classes", [2, 13])
@pytest.mark.parametrize("spatial", [(16, 4, 5), (7, 5, 9)], ids=str)
def test_few_classes_are_added_up_in_the_thread(
    classes: int, spatial: tuple[int, ...], names: list[str], poisoned_empty: None
) -> None:
    """Neighbours that are loaded at once, where lines are aligned, and voxels 32 apart where they are not."""
    x, labels = logits(2, classes, spatial, torch.float32), label_map(2, classes, spatial)
    spec = PassSpec("softmax", names, None)
    launch, *_ = triton_gpu.forward(x.to(HOME), labels.to(HOME), spec)
    assert launch.arguments["CONFIG"].few
    assert launch.arguments["CONFIG"].vectors == (spatial == (16, 4, 5))
    got, valid = triton_gpu.region_sums(x.to(HOME), labels.to(HOME), spec)
    wanted, _ = reference.region_sums(x, labels, spec)
    assert valid
    assert ((got.cpu() - wanted).abs() <= LOSS["float32"] * wanted.abs().amax(-1, keepdim=True)).all()
    gradient = triton_gpu.region_sums_backward(got, x.to(HOME), labels.to(HOME), spec, "input")
    wanted_gradient = reference.region_sums_backward(got.cpu(), x.double(), labels, spec, "input")
    error = (gradient.cpu() - wanted_gradient).abs().max()
    assert error <= GRADIENT["float32"] * wanted_gradient.abs().max()


def test_it_is_chosen_on_cuda_and_never_on_the_cpu() -> None:
    assert select(device="cpu")[0] != "triton_gpu"
    if HOME == "cuda":
        assert select(device="cuda")[0] == "triton_gpu"
    else:
        assert select(device="cuda")[0] == "eager"
        assert select("triton_gpu") == ("triton_gpu", "named by backend")
    assert not triton_gpu.takes("mps", torch.float32)[0]
    assert not triton_gpu.takes(HOME, torch.float8_e4m3fn)[0]


def test_the_operator_refuses_a_bad_label() -> None:
    if HOME == "cuda":
        pytest.skip("there it is an assertion on the device, which ends the process")
    labels = torch.tensor([[[0, 7]]])
    options = "softmax", DICE, None, "triton_gpu", 0.0, (), False, 0
    with pytest.raises(ValueError, match="labels 0…2"):
        operators.region_sums(logits(1, 3, (2,)), labels, None, None, None, *options)


def run(code: str, **environment: str) -> str:
    """Run Python in a process that does not interpret kernels, and return what it prints."""
    others = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**others, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.integration
def test_triton_is_imported_when_it_is_asked_for() -> None:
    assert run("import sys, voxloss; print('triton' in sys.modules)") == "False\n"


@pytest.mark.integration
def test_without_triton_it_says_what_is_missing() -> None:
    code = "import sys; sys.modules['triton'] = None\nfrom voxloss.backends import triton_gpu, select\n"
    code += "print(triton_gpu.available(), select(device='cuda'))"
    assert "(False, 'Triton cannot be imported" in run(code)
    assert "eager" in run(code)


def bundled(vendor: str) -> bool:
    """Whether Triton can compile for a vendor's GPUs here: this needs no GPU, but what is in Triton's wheel."""
    try:
        from triton.backends import backends
    except ImportError:
        return False
    return vendor in backends


@pytest.mark.integration
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.thorough) for part in (1, 2, 3))])
def test_compiled_for_an_h100_nothing_spills_and_everything_fits(part: int) -> None:
    """Labels and soft targets, 1 to 600 classes, every sum, each dtype, forward and backward.

    With the Triton that is installed; with the oldest and the newest, test_triton_versions.py.
    """
    if not bundled("nvidia"):
        pytest.skip("this Triton does not compile for NVIDIA")
    code = f"""
from voxloss_app.bench.gpu_resources import CASES, resources
for case in CASES[{part}::4]:
    for line in resources(case):
        print(*line[3:], line.kernel, line.case)
"""
    lines = [line.split(maxsplit=4) for line in run(code).splitlines()]
    assert len(lines) >= 20
    for warps, registers, spills, shared, kernel in lines:
        assert spills == "0", kernel
        assert int(registers) * 32 * int(warps) <= 65536, kernel
        assert int(shared) <= 48 * 1024, kernel


@pytest.mark.integration
@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_compiled_with_a_mask_nothing_spills(dtype: str) -> None:
    if not bundled("nvidia"):
        pytest.skip("this Triton does not compile for NVIDIA")
    code = f"""
from functools import partial
import torch
from voxloss.backends import triton_gpu
from voxloss_app.bench.gpu_resources import CASES, resources
mask = torch.empty(2, 1, 128, 128, 128, dtype=torch.{dtype}, device="meta")
triton_gpu.forward, triton_gpu.backward = (
    partial(prepare, mask=mask) for prepare in (triton_gpu.forward, triton_gpu.backward)
)
for case in CASES:
    if case.classes in (14, 118, 512, 600):
        for line in resources(case):
            assert line.spills == 0, line
            assert line.registers * 32 * line.warps <= 65536, line
            print(line)
"""
    assert len(run(code).splitlines()) > 40


@pytest.mark.integration
def test_a_spill_is_noticed() -> None:
    """Four warps for 512 classes leave a thread 64 values and their totals."""
    if not bundled("nvidia"):
        pytest.skip("this Triton does not compile for NVIDIA")
    code = """
from voxloss_app.bench import gpu_resources
from voxloss.backends import triton_gpu
chosen = triton_gpu.tiling
triton_gpu.tiling = lambda *problem, **more: chosen(*problem, **more)._replace(warps=2)
case = next(case for case in gpu_resources.CASES if case.classes == 512)
print(max(line.spills for line in gpu_resources.resources(case)) > 0)
"""
    assert run(code) == "True\n"


@pytest.mark.integration
@pytest.mark.thorough
def test_compiled_for_an_mi300_nothing_spills() -> None:
    if not bundled("amd"):
        pytest.skip("this Triton does not compile for AMD")
    code = """
from voxloss_app.bench.gpu_resources import CASES, resources
for case in CASES:
    if case.classes in (14, 118) and case.dtype.itemsize == 4:
        for line in resources(case, "gfx942"):
            assert line.spills == 0, line
            print(line)
"""
    assert len(run(code).splitlines()) > 20


@pytest.mark.integration
def test_a_thread_has_all_classes_of_its_voxels_and_loads_four_at_once() -> None:
    """So does a softmax of up to 16 classes exchange nothing; the layouts are those of the whole pass."""
    if not bundled("nvidia"):
        pytest.skip("this Triton does not compile for NVIDIA")
    code = """
import re
from voxloss_app.bench.gpu_resources import CASES, compiled, launches
case = next(case for case in CASES if case.classes == 14)
asm = [compiled(launch).asm for launch in launches(case)][1]
ptx = asm["ptx"]
print("shfl" in ptx, "bar.sync" in ptx, ptx.count("ld.global.v4"), "convert_layout" in asm["ttgir"])
"""
    assert run(code) == "False False 14 False\n"


@pytest.mark.integration
def test_a_launch_is_what_triton_takes() -> None:
    """Up to the driver: arguments are bound, specialised and compiled as for a launch on a GPU."""
    if not bundled("nvidia"):
        pytest.skip("this Triton does not compile for NVIDIA")
    code = """
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from voxloss_app.bench.gpu_resources import CASES, launches
driver.set_active(SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
))
for launch in launches(next(case for case in CASES if case.classes == 118)):
    first = launch.kernel.warmup(**launch.arguments, **launch.options, grid=(launch.programs,))
    again = launch.kernel.warmup(**launch.arguments, **launch.options, grid=(launch.programs,))
    print(first.metadata.name, first is again, "cubin" in first.asm)
"""
    assert run(code) == "sums True True\ngradient True True\n"
