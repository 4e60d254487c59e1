"""The pass: right sums, for every way in which labels, layouts and ignored voxels come."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import voxloss
from volumes import exact_statistics, label_map, logits, one_hot
from voxloss import region_statistics
from voxloss.backends import eager, voxels
from voxloss_verify.tolerances import GRADIENT, LOSS

BACKENDS = list(voxloss.backends.BACKENDS)
INTEGERS = [
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def value_and_gradient(input: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = input.detach().requires_grad_()
    sums = torch.stack(list(region_statistics(leaf, target, **options)))
    weights = torch.linspace(-1, 1, sums.numel(), dtype=sums.dtype).view_as(sums)
    return sums.detach(), torch.autograd.grad((sums * weights).sum(), leaf)[0]


@st.composite
def dyadic_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor, int | None]:
    """Probabilities and targets in eighths, so that float64 sums are exact; sometimes with ignored voxels."""
    channels = draw(st.integers(2, 4), label="channels")
    shape = (draw(st.integers(1, 2)), channels, *draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    count = math.prod(shape)
    eighths = st.lists(st.integers(0, 8), min_size=count, max_size=count)
    p = torch.tensor(draw(eighths, label="8p"), dtype=torch.float64).view(shape) / 8
    ignore_index = draw(st.sampled_from([None, -1, 1, 255]), label="ignore_index")
    if draw(st.booleans(), label="soft target"):
        g = torch.tensor(draw(eighths, label="8g"), dtype=torch.float64).view(shape) / 8
        return p, g, None
    classes = [*range(channels), *([] if ignore_index is None else [ignore_index])]
    voxel_count = count // channels
    drawn = draw(st.lists(st.sampled_from(classes), min_size=voxel_count, max_size=voxel_count), label="labels")
    return p, torch.tensor(drawn).view(shape[0], 1, *shape[2:]), ignore_index


@pytest.mark.parametrize("backend", BACKENDS)
@given(pair=dyadic_pairs(), squared=st.booleans(), soft_label=st.booleans())
def test_sums_equal_exact_arithmetic(
    backend: str, pair: tuple[Tensor, Tensor, int | None], squared: bool, soft_label: bool
) -> None:
    p, target, ignore_index = pair
    got = region_statistics(
        p, target, squared=squared, soft_label=soft_label, ignore_index=ignore_index, backend=backend
    )
    keep = torch.ones_like(p[:, :1], dtype=torch.bool)
    g = target
    if target.shape[1] == 1:
        keep = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
        g = one_hot(target, p.shape[1])
    expected = exact_statistics(p, g, keep, squared=squared, soft_label=soft_label)
    for name, field in got._asdict().items():
        assert field.tolist() == [[float(v) for v in row] for row in expected[name]], name


@pytest.mark.sampled(4)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none", torch.sigmoid])
@pytest.mark.parametrize("soft_label", [False, True])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("ignore_index", [None, 2, -7])
@pytest.mark.parametrize("block", [1, 7, 60, 10**6])
def test_eager_equals_reference(
    monkeypatch: pytest.MonkeyPatch,
    poisoned_empty: None,
    activation: Any,
    soft_label: bool,
    squared: bool,
    ignore_index: int | None,
    block: int,
) -> None:
    monkeypatch.setattr(eager, "CPU_BLOCK", block)
    x, labels = logits(spatial=(3, 4, 2)), label_map(spatial=(3, 4, 2))
    if activation == "none":
        x = x.sigmoid()
    labels[0, 0, 0] = -7 if ignore_index == -7 else 2
    options = {
        "activation": activation,
        "soft_label": soft_label,
        "squared": squared,
        "ignore_index": ignore_index,
    }
    sums, gradient = value_and_gradient(x, labels, backend="eager", **options)
    expected, expected_gradient = value_and_gradient(x, labels, backend="reference", **options)
    torch.testing.assert_close(sums, expected, rtol=1e-14, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "dtype",
    [
        # Each pair of floating-point dtypes has kernels of its own, which take Numba seconds.
        pytest.param(dtype, marks=pytest.mark.integration if dtype in FLOATS[1:] else ())
        for dtype in (torch.bool, *INTEGERS, *FLOATS)
    ],
    ids=str,
)
def test_label_dtype_does_not_matter(dtype: torch.dtype) -> None:
    channels = 2 if dtype == torch.bool else 4
    x, labels = logits(channels=channels), label_map(channels=channels)
    expected = value_and_gradient(x, one_hot(labels, channels), activation="softmax")
    for target in (labels.to(dtype), one_hot(labels, channels).to(dtype)):
        for got, want in zip(value_and_gradient(x, target, activation="softmax"), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["channels_last", "slice", "transposed", "flipped stride", "expanded"])
def test_memory_layout_does_not_matter(backend: str, form: str, poisoned_empty: None) -> None:
    if form == "channels_last":
        x = logits().to(memory_format=torch.channels_last_3d)
        labels = label_map().to(memory_format=torch.channels_last_3d)
    elif form == "slice":
        x, labels = (
            logits(spatial=(9, 8, 10))[..., 2:7, ::2, 1:8],
            label_map(spatial=(9, 8, 10))[..., 2:7, ::2, 1:8],
        )
    elif form == "transposed":
        x, labels = logits().transpose(2, 4), label_map().transpose(2, 4)
    elif form == "flipped stride":
        x, labels = logits().permute(0, 1, 4, 2, 3), label_map().permute(0, 1, 4, 2, 3)
    else:
        x = logits(items=1).expand(3, -1, -1, -1, -1)
        labels = label_map(items=1).expand(3, -1, -1, -1, -1)
    sums, gradient = value_and_gradient(x, labels, activation="softmax", backend=backend)
    want, want_gradient = value_and_gradient(
        x.contiguous(), labels.contiguous(), activation="softmax", backend=backend
    )
    torch.testing.assert_close(sums, want, rtol=1e-13, atol=0)
    # Neighbours and strided voxels have vectors of other lengths, and are rounded apart in the last bit.
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-13, atol=1e-16)
    if form == "channels_last":
        assert gradient.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("form", ["label map", "label map, a class", "one-hot, a class", "one-hot, a sentinel"])
@pytest.mark.parametrize("under", [math.nan, math.inf, -1e30])
def test_an_ignored_voxel_is_a_deleted_voxel(backend: str, activation: Any, form: str, under: float) -> None:
    x, labels = logits(items=1, spatial=(40,)), label_map(items=1, spatial=(40,))
    if activation == "none":
        x = x.sigmoid()
    ignored = torch.rand(40) < 0.4
    x[..., ignored] = under
    keep = ~ignored
    ignore_index = 255
    if form.endswith("a class"):
        labels[..., labels[0, 0] == 2] = 1
        ignore_index = 2
    target = labels.clone()
    target[..., ignored] = ignore_index
    if form.startswith("one-hot"):
        target = one_hot(labels, 4)
        target[..., ignored] = 255 if ignore_index == 255 else one_hot(torch.full((1, 1, 1), 2), 4)
    sums, gradient = value_and_gradient(
        x, target, activation=activation, ignore_index=ignore_index, backend=backend
    )
    want, want_gradient = value_and_gradient(x[..., keep], labels[..., keep], activation=activation)
    torch.testing.assert_close(sums, want, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient[..., keep], want_gradient, rtol=1e-13, atol=0)
    assert gradient[..., ignored].eq(0).all()


def test_an_empty_multi_label_voxel_is_not_ignored() -> None:
    p, g = torch.full((1, 2, 3), 0.5), torch.tensor([[[1.0, 0, 0], [0, 0, 1]]])
    assert region_statistics(p, g, ignore_index=-1).prediction.tolist() == [[1.5, 1.5]]


def test_a_uint8_label_255_is_not_minus_one() -> None:
    target = torch.tensor([[[0, 1, 255]]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="labels 0…1"):
        region_statistics(torch.rand(1, 2, 3), target, ignore_index=-1)
    assert region_statistics(torch.rand(1, 2, 3), target, ignore_index=255).target.tolist() == [[1, 1]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_low_precision_inputs_are_summed_in_high_precision(
    dtype: torch.dtype, activation: Any, device: str
) -> None:
    x = logits(items=1, channels=3, spatial=(64, 64, 64), dtype=dtype).to(device)
    labels = label_map(items=1, channels=3, spatial=(64, 64, 64)).to(device)
    sums, gradient = value_and_gradient(x.cpu(), labels.cpu(), activation=activation, backend="reference")
    got = region_statistics(x.requires_grad_(), labels, activation=activation)
    weights = torch.linspace(-1, 1, 9, dtype=torch.float64, device=device).view(3, 1, 3)
    (got_gradient,) = torch.autograd.grad((torch.stack(list(got)) * weights).sum(), x)
    assert got_gradient.dtype == dtype
    relative = (torch.stack(list(got)).cpu() - sums).abs() / sums
    name = str(dtype).removeprefix("torch.")
    assert relative.max() < LOSS[name]
    assert (got_gradient.cpu() - gradient).abs().max() <= GRADIENT[name] * gradient.abs().max()


def test_gradient_by_a_soft_target() -> None:
    p, g = logits().softmax(1), logits().softmax(1).requires_grad_()
    for squared in (False, True):
        statistics = region_statistics(p, g, squared=squared)
        (gradient,) = torch.autograd.grad(statistics.intersection.sum() + 3 * statistics.target.sum(), g)
        torch.testing.assert_close(gradient, p + (6 * g if squared else 3))
    g32 = g.detach().float().requires_grad_()
    (gradient,) = torch.autograd.grad(region_statistics(p, g32, soft_label=True).intersection.sum(), g32)
    torch.testing.assert_close(gradient, (g32 < p).float())


def test_over_batch_is_the_items_side_by_side() -> None:
    x, labels = logits(), label_map()
    batch = region_statistics(x, labels, activation="softmax").over_batch()
    side_by_side = region_statistics(
        torch.cat([*x], 1)[None], torch.cat([*labels], 1)[None], activation="softmax"
    )
    for got, want in zip(batch, side_by_side, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


def test_of_classes_and_errors() -> None:
    statistics = region_statistics(logits(), label_map(), activation="softmax")
    picked = statistics.of_classes([3, 1])
    assert picked.target.tolist() == statistics.target[:, [3, 1]].tolist()
    torch.testing.assert_close(picked.false_positives + picked.intersection, picked.prediction)
    torch.testing.assert_close(picked.false_negatives + picked.intersection, picked.target)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 60))
def test_boxes_cover_every_voxel_once(shape: list[int], most: int) -> None:
    count = torch.zeros(shape)
    order = torch.arange(math.prod(shape)).view(shape)
    last = -1
    for box in eager.boxes(shape, most):
        count[box] += 1
        assert count[box].numel() <= most
        assert order[box].min() == last + 1
        last = int(order[box].max())
    assert count.eq(1).all()


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest new tensors had."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.sizes.append(tensor.numel())
        return result


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("form", ["label map", "one-hot"])
def test_temporary_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, layout: str, form: str) -> None:
    monkeypatch.setattr(eager, "CPU_BLOCK", 2048)
    x, target = logits(spatial=(16, 20, 24)), label_map(spatial=(16, 20, 24))
    if form == "one-hot":
        target = one_hot(target, 4)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last_3d)
    elif layout == "slice":
        x, target = x[..., 1:15, 2:19, ::2], target[..., 1:15, 2:19, ::2]
    spec = voxels.PassSpec("softmax", ["intersection", "prediction", "target"], None)
    with LargestTensor() as forward:
        eager.region_sums(x, target, spec)
    assert max(forward.sizes) <= 2048
    grad = torch.ones(3, *x.shape[:2], dtype=torch.float64)
    with LargestTensor() as backward:
        eager.region_sums_backward(grad, x, target, spec, "input")
    assert sorted(backward.sizes)[-2] <= 2048 < sorted(backward.sizes)[-1] == x.numel()


@pytest.mark.parametrize("batch", [False, True])
def test_nothing_but_the_inputs_is_saved_for_backward(batch: bool) -> None:
    x, labels = logits().requires_grad_(), label_map()
    saved: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    loss = voxloss.FocalTverskyLoss(softmax=True, to_onehot_y=True, include_background=False, batch=batch)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        loss(x, labels)
    large = {t.data_ptr() for t in saved if t.numel() >= labels.numel()}
    assert large == {x.data_ptr(), labels.data_ptr()}
