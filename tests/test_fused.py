"""A fused pass equals the reference, for any specification and memory layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from volumes import label_map, logits, one_hot
from voxloss.backends import BACKENDS, numba_cpu, reference
from voxloss.backends.voxels import MAPPED, NEGATIVE, POSITIVE, TERMS, PassSpec
from voxloss_verify.tolerances import GRADIENT, LOSS

# numpy's, in Triton's interpreter: ∞ − ∞
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

_NAMES = [name for name in BACKENDS if name not in ("reference", "eager")]
CPU = [name for name in _NAMES if BACKENDS[name].takes("cpu", torch.float32)[0]]
FUSED = [pytest.param(name, marks=pytest.mark.skipif(name not in CPU, reason="no CPU")) for name in _NAMES]
CHANNELS = 5
SPATIAL = (4, 5, 7)
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SUMS = [
    ["intersection", "prediction", "target"],
    ["target", "soft_intersection", "prediction_squared", "target_squared"],
    ["cross_entropy", "cross_entropy_negative", "prediction"],
    ["focal", "focal_negative", "intersection"],
    ["log_power", "log_power_negative", "voxels"],
    ["sensitivity_error", "specificity_error"],
    ["map_total", "intersection", "map_intersection", "voxels"],
    sorted(TERMS),
]
WITHOUT_MAPS = [name for name in TERMS if name not in MAPPED]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last_3d),
    "transposed": lambda x: x.transpose(2, 4),
    "cropped": lambda x: torch.nn.functional.pad(x, (1, 2, 0, 1, 3, 0))[..., 3:, :-1, 1:-2],
    "one channel of two": lambda x: torch.stack([x, x], 2)[:, :, 0],
    "samples last": lambda x: x.permute(2, 3, 0, 1, 4).contiguous().permute(2, 3, 0, 1, 4),
}
MASK_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "transposed": lambda x: x.transpose(2, 4).contiguous().transpose(2, 4),  # so that the shape stays
    "one for all samples": lambda x: x[:1].expand(x.shape),
    "one for all columns": lambda x: x[..., :1].expand(x.shape),
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small volume has several parts and blocks, and rests of both; memory to work in begins as NaN."""
    monkeypatch.setattr(numba_cpu, "PART", 48)
    monkeypatch.setattr(numba_cpu, "WIDTH", 32)
    scratch = numba_cpu._scratch

    def poisoned(*given: Any) -> Any:
        memory = scratch(*given)
        blocks, rows, labels = memory.rows
        for array in (*blocks, rows):
            array.fill(np.nan)
        for array in (memory.target, memory.order, labels):
            if array is not None:
                array.fill(-9)
        return memory

    monkeypatch.setattr(numba_cpu, "_scratch", poisoned)


def volumes(options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, PassSpec]:
    """An input with NaN where ignored or of weight 0, a target, a mask, a map, and the spec; in float64."""
    channels = options["channels"]
    # Few classes are often as good as sure, and a p that rounds to 1 is where min(p, 1) has two derivatives.
    x = (3 if channels == CHANNELS else 1) * logits(channels=channels, spatial=SPATIAL)
    labels = label_map(channels=channels, spatial=SPATIAL)
    if options["activation"] == "none":
        x = x.sigmoid()
        with_logarithms = {*POSITIVE, *NEGATIVE} & {*options["sums"]}
        # Without logarithms p = g somewhere: there min(p, g) has two. A logarithm's is infinite at p = 0.
        x = x.clamp(0.02, 0.98) if with_logarithms else (8 * x).round() / 8
    last = channels - 1
    ignore_index = {"nothing": None, "a class": last, "another value": 255}[options["ignored"]]
    target = labels if options["form"] == "label map" else one_hot(labels, channels)
    if options["form"] == "soft":
        target = 0.875 * target + 0.125 * (torch.rand_like(target) > 0.5)
    if ignore_index is not None:
        ignored = labels == last
        if options["form"] == "label map":
            target = labels.masked_fill(ignored, ignore_index)
        elif options["ignored"] == "another value":
            target = target.masked_fill(ignored, 255)
        else:
            target[:, last:] = ignored.to(target)
        x = x.masked_fill(ignored, torch.nan)
    of_label = options.get("map") == "of the label" and options["form"] == "label map"
    given = torch.randn(x.shape[0], 1 if of_label else channels, *SPATIAL, dtype=torch.float64)
    if ignore_index is not None:
        given = given.masked_fill(ignored, torch.inf)
    mask = None
    if options["masked"] != "not":
        mask = 2 * torch.rand(x.shape[0], 1, *SPATIAL)
        mask = mask.where(mask > 0.5, 0)
        mask = MASK_LAYOUTS[options["mask_layout"]](mask if options["masked"] == "by weights" else mask > 0)
        x = x.masked_fill(mask == 0, torch.nan)
        target = target.masked_fill(mask == 0, 77)  # neither a class nor a probability
        given = given.masked_fill(mask == 0, torch.nan)
    names = [name for name in options["sums"] if options["activation"] != "softmax" or name not in NEGATIVE]
    needed = not set(names).isdisjoint(MAPPED)
    spec = PassSpec(options["activation"], names, ignore_index, options["gamma"], (), of_label and needed)
    return x, target, mask, given if needed else None, spec


def assert_equal_passes(
    backend: str,
    x: Tensor,
    target: Tensor,
    spec: PassSpec,
    mask: Tensor | None = None,
    given: Tensor | None = None,
) -> None:
    name = str(x.dtype).removeprefix("torch.")
    sums, valid = BACKENDS[backend].region_sums(x, target, spec, mask, given)
    expected, _ = reference.region_sums(x.double(), target, spec, mask, given)
    assert valid
    assert sums.shape == expected.shape
    size = expected.abs().clamp(min=1)
    if given is not None:  # whose addends have both signs: rounding is relative to what was added, not to the sum
        size = torch.maximum(size, reference.region_sums(x.double(), target, spec, mask, given.abs())[0])
    assert ((sums - expected).abs() / size).max() <= LOSS[name]
    grad = torch.randn(expected.shape, dtype=torch.float64)
    for wrt, like in (("input", x), ("target", target)):
        if wrt == "target" and not (target.shape[1] == x.shape[1] and target.is_floating_point()):
            continue
        gradient = BACKENDS[backend].region_sums_backward(grad, x, target, spec, wrt, mask, map=given)
        same = (x.double(), target) if wrt == "input" else (x.double(), target.double())
        expected = reference.region_sums_backward(grad, *same, spec, wrt, mask, map=given)
        assert gradient.dtype == like.dtype
        assert gradient.stride() == torch.empty_like(like).stride()
        tolerance = GRADIENT[str(like.dtype).removeprefix("torch.")] + GRADIENT[name]
        assert (gradient.double() - expected).abs().max() <= tolerance * expected.abs().max(), wrt


# Each pair of dtypes has kernels of its own, which take Numba ten seconds.
@pytest.mark.parametrize(
    "wide",
    [False, pytest.param(True, marks=pytest.mark.thorough)],
    ids=["target as precise as input", "wider"],
)
@pytest.mark.pairwise(
    backend=CPU,
    channels=[2, 3, CHANNELS],
    form=["label map", "one-hot", "soft"],
    activation=["softmax", "sigmoid", "none"],
    sums=SUMS,
    gamma=[0.0, 0.5, 1.0, 2.0, 3.7],
    ignored=["nothing", "a class", "another value"],
    dtype=FLOATS,
    layout=list(LAYOUTS),
    target_layout=list(LAYOUTS),
    masked=["not", "by booleans", "by weights"],
    mask_layout=list(MASK_LAYOUTS),
    map=["of the label", "of each channel"],
    map_layout=list(LAYOUTS),
)
def test_equal_to_the_reference(options: dict[str, Any], wide: bool, poisoned_empty: None) -> None:
    x, target, mask, given, spec = volumes(options)
    if options["form"] != "label map" and options["dtype"] != torch.float64 and not wide:
        target = target.float()
    x = LAYOUTS[options["layout"]](x.to(options["dtype"]))
    target = LAYOUTS[options["target_layout"]](target)
    if options["layout"] == "transposed":
        mask = None if mask is None else mask.transpose(2, 4)
    if (options["layout"] == "transposed") != (options["target_layout"] == "transposed"):
        target = target.transpose(2, 4)
    if given is not None:  # float32 is what loaders make
        given = MASK_LAYOUTS[options["map_layout"]](given.float() if options["dtype"] != torch.float64 else given)
        given = given.transpose(2, 4) if options["layout"] == "transposed" else given
    before = [x.clone(), target.clone()]
    assert_equal_passes(options["backend"], x, target, spec, mask, given)
    torch.testing.assert_close([x, target], before, rtol=0, atol=0, equal_nan=True)


KNOWN_BY_LABEL = [
    ["intersection", "prediction", "target"],
    ["soft_intersection", "prediction_squared", "target_squared"],
    ["cross_entropy", "cross_entropy_negative", "prediction", "intersection", "target"],
    ["focal", "focal_negative", "prediction_squared"],
    ["voxels", "focal", "cross_entropy", "soft_intersection"],
    ["map_total", "map_intersection", "focal", "prediction", "intersection"],
]


@pytest.mark.parametrize("backend", ["eager", *CPU])
@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("sums", KNOWN_BY_LABEL, ids=" ".join)
@pytest.mark.parametrize("ignored", ["nothing", "another value"])
def test_every_sum_of_few_classes(ignored: str, sums: list[str], channels: int, backend: str) -> None:
    """Each with each: pairs of options alone would leave out many a sum of two classes."""
    options = {"form": "label map", "activation": "softmax", "masked": "not", "gamma": 2.0, "map": "of the label"}
    x, target, _, given, spec = volumes({**options, "ignored": ignored, "sums": sums, "channels": channels})
    assert_equal_passes(backend, x.float(), target, spec, given=given)


@pytest.mark.pairwise(
    backend=["eager", *CPU],
    channels=[2, 3, 4],
    activation=["softmax", "sigmoid"],
    sums=KNOWN_BY_LABEL,
    gamma=[0.0, 0.5, 2.0],
    ignored=["nothing", "a class", "another value"],
    dtype=FLOATS,
    layout=["contiguous", "channels last"],
    masked=["not", "by booleans"],
    map=["of the label", "of each channel"],
)
def test_label_maps_of_few_classes(options: dict[str, Any], poisoned_empty: None) -> None:
    """What needs only the probability of the label has code of its own, and so do two and three classes."""
    options = {**options, "form": "label map", "mask_layout": "contiguous"}
    x, target, mask, given, spec = volumes(options)
    x = LAYOUTS[options["layout"]](x.to(options["dtype"]))
    assert_equal_passes(options["backend"], x, target, spec, mask, given)


# Differences of logits: of p = 1e-30, of the smallest p that float32 has, and of none.
GAPS = [0.0, 1e-4, 1.0, 17.0, 30.0, 69.0, 85.0, 500.0, 3e4, 1e9]


@pytest.mark.parametrize("backend", ["eager", "numba_cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [2, 3])
def test_small_probabilities_are_right_to_the_last_digits(
    channels: int, dtype: torch.dtype, backend: str
) -> None:
    """One voxel in each sample, so that nothing is lost in a sum."""
    gaps = torch.tensor([*GAPS, *(-gap for gap in GAPS)], dtype=dtype)
    x = torch.zeros(len(gaps), channels, 1, dtype=dtype)
    x[:, 0, 0] = gaps
    few = 16 * torch.finfo(dtype).eps
    for label in range(channels):
        target = torch.full((len(gaps), 1, 1), label)
        names = ["prediction", "intersection", "cross_entropy"]
        sums, _ = BACKENDS[backend].region_sums(x, target, PassSpec("softmax", names, None))
        expected, _ = reference.region_sums(x.double(), target, PassSpec("softmax", names, None))
        # The reference's own logarithm is such a difference; −log p = log(1 + Σ exp(z − z of the label)).
        others = [c for c in range(channels) if c != label]
        away = x[:, others, 0].double() - x[:, label].double()
        top = away.amax(1).clamp(min=0)
        far = (away - top[:, None]).exp().sum(1)
        logs = torch.where(top > 0, top + (far + (-top).exp() - 1).log1p(), far.log1p())
        expected_logs = torch.zeros(len(gaps), channels).double()
        expected_logs[:, label] = logs
        tiny = torch.finfo(dtype).tiny
        torch.testing.assert_close(sums[:2], expected[:2], rtol=few, atol=tiny)
        # Without the fused pass for two classes, the logarithm is a difference: exact to the digits of 1.
        exact = channels == 2 and backend == "numba_cpu"
        torch.testing.assert_close(sums[2], expected_logs[:, :channels], rtol=few, atol=tiny if exact else few)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_sure_predictions_of_two_classes(dtype: torch.dtype) -> None:
    """Of −log p the derivative by a logit is ∓(1 − p), also where 1 − p is 1e-30."""
    gaps = torch.tensor(GAPS[:-4], dtype=dtype)
    x = torch.stack([gaps, torch.zeros_like(gaps)], 0)[None]
    target = torch.zeros(1, 1, len(gaps))
    spec = PassSpec("softmax", ["cross_entropy"], None)
    gradient = numba_cpu.region_sums_backward(torch.ones(1, 1, 2).double(), x, target, spec, "input")
    wrong = (-gaps.double()).sigmoid().to(dtype)
    few = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient[0], torch.stack([-wrong, wrong]), rtol=few, atol=0)


@pytest.mark.parametrize("backend", ["eager", *CPU])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_a_nan_among_few_classes_reaches_the_sums_and_the_gradient(channels: int, backend: str) -> None:
    x, labels = (
        logits(channels=channels, spatial=(50,), dtype=torch.float32),
        label_map(channels=channels, spatial=(50,)),
    )
    names = ["intersection", "prediction", "cross_entropy"]
    spec = PassSpec("softmax", names, None)
    for channel in range(channels):
        broken = x.clone()
        broken[1, channel, 40] = torch.nan
        sums, valid = BACKENDS[backend].region_sums(broken, labels, spec)
        assert valid
        assert sums[:, 0].isfinite().all()
        assert sums[1, 1].isnan().all(), "every probability of the voxel"
        grad = torch.ones_like(sums)
        gradient = BACKENDS[backend].region_sums_backward(grad, broken, labels, spec, "input")
        assert gradient[1, :, 40].isnan().all()
        gradient[1, :, 40] = 0
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("channels", [1, 2, 17, 118, 200])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_any_number_of_channels(channels: int, activation: str, backend: str) -> None:
    if channels == 1 and activation == "softmax":
        pytest.skip("no softmax over one channel")
    x = logits(channels=channels, spatial=(5, 13), dtype=torch.float32)
    labels = label_map(channels=max(channels, 2), spatial=(5, 13))
    names = ["intersection", "prediction", "target", "cross_entropy"]
    assert_equal_passes(backend, x, labels, PassSpec(activation, names, None))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("shape", [(1,), (1, 1, 1), (31,), (48,), (49,), (2, 24), (97,)])
def test_any_number_of_voxels(shape: tuple[int, ...], backend: str) -> None:
    x, labels = logits(spatial=shape, dtype=torch.float32), label_map(spatial=shape)
    assert_equal_passes(backend, x, labels, PassSpec("softmax", ["intersection", "prediction", "target"], None))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_a_nan_that_counts_reaches_the_sums_and_the_gradient(
    activation: str, dtype: torch.dtype, backend: str
) -> None:
    x, labels = logits(spatial=(50,), dtype=dtype), label_map(spatial=(50,))
    x = x.sigmoid() if activation == "none" else x
    x[1, 2, 40] = torch.nan
    names = ["intersection", "prediction", "target", "cross_entropy"]
    spec = PassSpec(activation, names, None)
    sums, valid = BACKENDS[backend].region_sums(x, labels, spec)
    assert valid
    assert sums[:, 0].isfinite().all()
    assert sums[1, 1, 2].isnan()
    gradient = BACKENDS[backend].region_sums_backward(torch.ones(4, 2, 4).double(), x, labels, spec, "input")
    assert gradient[1, 2, 40].isnan()
    gradient[1, :, 40] = 0
    assert gradient.isfinite().all()


@pytest.mark.pairwise(
    backend=["reference", "eager", *CPU],
    activation=["softmax", "sigmoid", "none"],
    form=["label map", "soft"],
    dtype=[torch.float64, torch.float32],
    asked=[["prediction", "intersection", "cross_entropy", "voxels"], WITHOUT_MAPS],
)
def test_a_voxel_of_weight_k_counts_k_times(options: dict[str, Any]) -> None:
    backend, activation, form, dtype, asked = options.values()
    x, labels = logits(channels=CHANNELS, spatial=(40,), dtype=dtype), label_map(channels=CHANNELS, spatial=(40,))
    x = x.sigmoid() if activation == "none" else x
    target = labels if form == "label map" else logits(channels=CHANNELS, spatial=(40,), dtype=dtype).softmax(1)
    times = torch.arange(40) % 4
    spec = PassSpec(activation, [n for n in asked if activation != "softmax" or n not in NEGATIVE], None, 1.5)
    mask = times.to(dtype).expand(2, 1, 40)
    pass_over = BACKENDS[backend]
    sums, valid = pass_over.region_sums(x, target, spec, mask)
    repeated = [volume.repeat_interleave(times, -1) for volume in (x, target)]
    expected, _ = pass_over.region_sums(repeated[0], repeated[1], spec)
    assert valid
    few = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(sums, expected, rtol=few, atol=few)
    assert (sums[-1] == times.sum()).all(), "voxels"
    grad = torch.randn(expected.shape, dtype=torch.float64)
    for wrt in ["input", "target"] if form == "soft" else ["input"]:
        gradient = pass_over.region_sums_backward(grad, x, target, spec, wrt, mask)
        once = pass_over.region_sums_backward(grad, x, target, spec, wrt)
        torch.testing.assert_close(gradient, times * once, rtol=few, atol=few)


@pytest.mark.parametrize("backend", ["reference", "eager", *FUSED])
@pytest.mark.parametrize("form", ["label map", "one-hot", "one-hot, a class ignored"])
@pytest.mark.parametrize("activation", ["softmax", "none"])
@pytest.mark.parametrize(
    ("weight", "valid"),
    [(0.0, True), (2.5, True), (-1.0, False), (torch.nan, False), (torch.inf, False), (-torch.inf, False)],
)
def test_weights_that_are_negative_or_not_finite_are_seen(
    weight: float, valid: bool, activation: str, form: str, backend: str
) -> None:
    x, target = torch.full((2, 3, 40), 0.5), torch.zeros(2, 1, 40)
    target = target if form == "label map" else one_hot(target, 3)
    spec = PassSpec(activation, ["prediction"], 1 if form == "one-hot, a class ignored" else None)
    mask = torch.ones(2, 1, 40)
    mask[1, 0, 39] = weight
    assert BACKENDS[backend].region_sums(x, target, spec, mask)[1].item() is valid
    # Where a voxel has no weight, nobody looks what it is.
    x[1, :, 39], target[1, :, 39] = 7, 7
    assert BACKENDS[backend].region_sums(x, target, spec, mask)[1].item() is (weight == 0)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_nan_under_a_weight_reaches_the_loss_and_under_none_it_does_not(
    weight: float, activation: str, backend: str
) -> None:
    x, labels, mask = logits(spatial=(50,)), label_map(spatial=(50,)), torch.ones(2, 1, 50).double()
    x = x.sigmoid() if activation == "none" else x
    x[1, 2, 40], mask[1, 0, 40] = torch.nan, weight
    names = [name for name in WITHOUT_MAPS if activation != "softmax" or name not in NEGATIVE]
    spec = PassSpec(activation, names, None)
    sums, valid = BACKENDS[backend].region_sums(x, labels, spec, mask)
    assert valid
    assert sums[:, 0].isfinite().all()
    assert sums[names.index("prediction"), 1, 2].isnan() == (weight != 0)
    gradient = BACKENDS[backend].region_sums_backward(torch.ones_like(sums), x, labels, spec, "input", mask)
    assert gradient[1, 2, 40].isnan() == (weight != 0)
    assert weight or gradient[1, 2, 40] == 0
    gradient[1, :, 40] = 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(
    ("target", "ignore_index", "valid"),
    [
        (torch.tensor([0, 1, 3]), None, True),
        (torch.tensor([0, 1, 4]), None, False),
        (torch.tensor([0, -1, 3]), None, False),
        (torch.tensor([0, -1, 3]), -1, True),
        (torch.tensor([0, 255, 3], dtype=torch.uint8), -1, False),
        (torch.tensor([0, 255, 3], dtype=torch.uint8), 255, True),
        (torch.tensor([0, 0.5, 3]), None, False),
        (torch.tensor([0, 0.5, 3]), 0, False),
        (torch.tensor([0, torch.nan, 3]), None, False),
        (torch.tensor([0, torch.inf, 3]), None, False),
        (torch.tensor([0, 2**32 + 1, 3]), None, False),
        pytest.param(torch.tensor([0, 3, 5], dtype=torch.bfloat16), None, False, marks=pytest.mark.integration),
        pytest.param(torch.tensor([0, 3, 5], dtype=torch.float16), 5, True, marks=pytest.mark.integration),
    ],
    ids=str,
)
def test_labels_that_are_no_class_are_seen(
    target: Tensor, ignore_index: int | None, valid: bool, backend: str
) -> None:
    spec = PassSpec("softmax", ["intersection"], ignore_index)
    assert BACKENDS[backend].region_sums(torch.randn(1, 4, 3), target.view(1, 1, 3), spec)[1].item() is valid


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(
    ("voxel", "ignore_index", "valid"),
    [
        ([0, 0.3, 0.7], None, True),
        ([0, 1.0005, 0], None, True),
        ([0, 1.1, 0], None, False),
        ([0, -0.1, 0], None, False),
        ([0, torch.nan, 0], None, False),
        ([torch.nan, 1, 0], 1, True),
        ([0, 0.5, 0], 1, False),
        ([7, 7, 7], 7, True),
        ([7, 7, 0], 7, False),
        ([-1, -1, -1], -1, True),
    ],
)
def test_targets_that_are_no_probabilities_are_seen(
    voxel: list[float], ignore_index: int | None, valid: bool, backend: str
) -> None:
    target = torch.eye(3)
    target[:, 1] = torch.tensor(voxel)
    if ignore_index == 1 and target[1, 0] != 1:
        target[1, 0], target[1, 2] = 0, 0
    spec = PassSpec("softmax", ["intersection"], ignore_index)
    assert BACKENDS[backend].region_sums(torch.randn(1, 3, 3), target[None], spec)[1].item() is valid


@pytest.mark.parametrize("backend", ["reference", "eager", *FUSED])
@pytest.mark.parametrize(
    ("p", "valid"), [(1.0005, True), (1.1, False), (-0.0005, True), (-0.1, False), (torch.nan, True)]
)
@pytest.mark.parametrize("other", [0.5, torch.nan])
def test_predictions_that_are_no_probabilities_are_seen(
    p: float, valid: bool, other: float, backend: str
) -> None:
    x, spec = torch.full((1, 2, 40), 0.5), PassSpec("none", ["prediction"], None)
    x[0, 1, 39], x[0, 0, 2] = p, other
    assert BACKENDS[backend].region_sums(x, torch.zeros(1, 1, 40), spec)[1].item() is valid


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64], ids=str)
def test_one_hot_targets_of_whole_numbers_in_every_layout(dtype: torch.dtype, layout: str) -> None:
    """They are read part by part: each voxel in its place, whatever strides lead to it."""
    x, target = (
        logits(channels=CHANNELS, spatial=SPATIAL),
        one_hot(label_map(channels=CHANNELS, spatial=SPATIAL), CHANNELS),
    )
    target = target.to(dtype)
    laid_out = LAYOUTS[layout](target)
    if laid_out.shape != target.shape:  # cropped or transposed: so is the input
        x = LAYOUTS[layout](x)
    assert_equal_passes("numba_cpu", x, laid_out, PassSpec("softmax", SUMS[0], None, 2.0))


@pytest.mark.parametrize("backend", ["reference", "eager", *FUSED])
@pytest.mark.parametrize("activation", ["softmax", "none"])
@pytest.mark.parametrize("of_label", [True, False])
@pytest.mark.parametrize(("value", "valid"), [(-3e38, True), (torch.nan, False), (torch.inf, False)])
def test_a_map_that_is_not_finite_is_seen(
    value: float, valid: bool, of_label: bool, activation: str, backend: str
) -> None:
    x, labels = torch.full((2, 3, 40), 0.5), torch.zeros(2, 1, 40)
    given = torch.ones(2, 1 if of_label else 3, 40)
    given[1, -1, 39] = value
    spec = PassSpec(activation, ["map_total"], 1, 0.0, (), of_label)
    assert BACKENDS[backend].region_sums(x, labels, spec, None, given)[1].item() is valid
    labels[1, :, 39] = 1  # ignored
    assert BACKENDS[backend].region_sums(x, labels, spec, None, given)[1].item()
