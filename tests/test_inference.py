"""Labels of many classes: equal to the argmax of logits, of which there is never a whole volume in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.data.meta_tensor import MetaTensor
from monai.inferers.inferer import Inferer, SlidingWindowInferer
from torch import Tensor, nn

from test_statistics import LargestTensor
from voxloss import FusedHead, LazyLogits, ShapeError, SlidingWindowLabels, fuse_head, fused_argmax
from voxloss.backends import tiled
from voxloss.inference import _Volume

FEATURES, CHANNELS = 5, 7
CONVOLUTIONS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
LAYERS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of each sample, of which the last is smaller; their operations are seen in this thread."""
    monkeypatch.setattr(tiled, "ROW", 64)
    monkeypatch.setattr(tiled, "CPU_TILE", 1)
    monkeypatch.setattr(tiled, "in_each_thread", lambda work, most: work())


def logits_of(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As a convolution computes them."""
    axes = features.ndim - 2
    return CONVOLUTIONS[axes](features, weight.reshape(*weight.shape, *[1] * axes), bias)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "axes reversed": lambda x: (
        x.permute(0, 1, *range(x.ndim - 1, 1, -1)).contiguous().permute(0, 1, *range(x.ndim - 1, 1, -1))
    ),
    "every other voxel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", [(150,), (9, 20), (5, 6, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_argmax_of_the_convolution(
    dtype: torch.dtype, spatial: tuple[int, ...], layout: str, bias: bool
) -> None:
    """Of small whole numbers, which are exact in every dtype, and of which many are equal."""
    features = LAYOUTS[layout](torch.randint(-2, 3, (2, FEATURES, *spatial)).to(dtype))
    weight = torch.randint(-1, 2, (CHANNELS, FEATURES)).to(dtype)
    shift = torch.randint(-1, 2, (CHANNELS,)).to(dtype) if bias else None
    logits = logits_of(features.double(), weight.double(), None if shift is None else shift.double())
    labels = fused_argmax(features, weight, shift)
    assert isinstance(labels, Tensor)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, logits.argmax(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_probability_is_the_largest_of_the_softmax(dtype: torch.dtype) -> None:
    features, weight, bias = (torch.randn(shape).to(dtype) for shape in ((2, 5, 6, 7, 8), (9, 5), (9,)))
    labels, probability = fused_argmax(features, weight, bias, return_probability=True)
    expected = logits_of(features.double(), weight.double(), bias.double()).softmax(1)
    tolerance = {torch.float16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    assert probability.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(probability.double(), expected.gather(1, labels.long()), atol=tolerance)
    assert torch.allclose(probability.double(), expected.amax(1, keepdim=True), atol=tolerance)


def test_it_takes_the_parameters_of_a_convolution_and_leaves_no_graph() -> None:
    layer, features = nn.Conv3d(FEATURES, CHANNELS, 1), torch.randn(1, FEATURES, 4, 5, 6)
    labels, probability = fused_argmax(features, layer.weight, layer.bias, return_probability=True)
    assert torch.equal(labels, layer(features).argmax(1, keepdim=True))
    assert not probability.requires_grad


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(256, torch.uint8), (257, torch.int16), (1 << 15, torch.int16), ((1 << 15) + 1, torch.int32)],
)
def test_labels_are_as_small_as_the_number_of_classes_allows(channels: int, dtype: torch.dtype) -> None:
    weight = torch.arange(channels, dtype=torch.float64)[:, None]
    labels = fused_argmax(torch.ones(1, 1, 3, dtype=torch.float64), weight)
    assert isinstance(labels, Tensor)
    assert labels.dtype == dtype
    assert labels.eq(channels - 1).all()


def test_nan_counts_as_the_largest_as_in_torch() -> None:
    weight = torch.tensor([[1.0], [float("nan")], [2.0]])
    assert fused_argmax(torch.ones(1, 1, 3), weight).eq(1).all()  # type: ignore[union-attr]


def test_autocast_changes_nothing() -> None:
    features, weight = torch.randn(1, FEATURES, 50), torch.randn(CHANNELS, FEATURES)
    _, expected = fused_argmax(features, weight, return_probability=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = fused_argmax(features, weight, return_probability=True)
    assert torch.equal(found, expected)


def network(
    axes: int = 3, channels: int = 13, dtype: torch.dtype = torch.float64, *, fused: bool = False
) -> nn.Sequential:
    """Of which windows matter, as its kernel sees their edges."""
    layers = LAYERS[axes](1, FEATURES, 3, padding=1), nn.Tanh(), LAYERS[axes](FEATURES, channels, 1)
    made = nn.Sequential(*layers).to(dtype).eval()
    return fuse_head(made) if fused else made


WINDOWS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "no overlap": ((16, 24, 16), {"roi_size": 8, "overlap": 0}),
    "a quarter": ((20, 13, 17), {"roi_size": (8, 8, 12), "overlap": 0.25, "sw_batch_size": 3}),
    "a half, gaussian": ((20, 13, 17), {"roi_size": 8, "overlap": 0.5, "mode": "gaussian", "sw_batch_size": 4}),
    "three quarters": ((9, 24), {"roi_size": (8, 8), "overlap": (0.75, 0.3), "mode": "gaussian"}),
    "larger than the image": ((5, 20, 7), {"roi_size": 8, "overlap": 0.5, "padding_mode": "reflect"}),
    "padded with a value": ((5, 5), {"roi_size": (8, 4), "cval": 2.0, "sigma_scale": 0.2, "mode": "gaussian"}),
    "the whole image": ((9, 8, 7), {"roi_size": (-1, -1, 4), "sw_batch_size": 2}),
    "one axis": ((40,), {"roi_size": (16,), "overlap": 0.6}),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", WINDOWS)
def test_labels_are_those_of_monai(case: str, fused: bool) -> None:
    size, options = WINDOWS[case]
    image, net = torch.randn(2, 1, *size, dtype=torch.float64), network(len(size), fused=fused)
    logits: Any = SlidingWindowInferer(**options)(image, net)
    labels, probability = SlidingWindowLabels(**options, return_probability=True)(image, net)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, logits.argmax(1, keepdim=True))
    assert torch.allclose(probability, logits.softmax(1).amax(1, keepdim=True), atol=1e-12, rtol=0)


def test_the_average_is_more_exact_than_the_logits_in_half_precision() -> None:
    """Sums are float32 or better: autocast's logits are rounded, their mean is not."""
    image, net = torch.randn(1, 1, 12, 12, 12), network(dtype=torch.float32, fused=True)
    inferer = SlidingWindowLabels(8, overlap=0.5, return_probability=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, probability = inferer(image, net)
    _, expected = inferer(image, net)
    assert probability.dtype == torch.float32
    assert torch.allclose(probability, expected, atol=1e-2)


def test_a_fused_head_is_applied_to_means_and_never_in_a_window() -> None:
    """No tensor has the size of a window's logits; the largest are those of voxels that are finished at once."""
    image, window, channels = torch.randn(1, 1, 16, 16, 48), 8, 400
    net = network(channels=channels, dtype=torch.float32, fused=True)
    with LargestTensor() as seen:
        labels = SlidingWindowLabels(window, overlap=0.5)(image, net)
    assert isinstance(labels, Tensor)
    finished = channels * (window // 2) ** 3
    assert max(seen.sizes) <= max(FEATURES * window**3, image.numel(), finished) < channels * window**3 / 5
    with LargestTensor() as seen:
        SlidingWindowLabels(window, overlap=0.5)(image, network(channels=channels, dtype=torch.float32))
    assert max(seen.sizes) == channels * window**3 < channels * image.numel() / 10


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_sums_are_those_of_voxels_that_wait_for_a_window(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the windows along the longest axis, not the volume."""
    waiting: list[int] = []
    add = _Volume.add

    def counted(volume: _Volume, *given: Any) -> None:
        add(volume, *given)
        waiting.append(sum(sums.values[0].numel() for sums in volume._sums.values()))

    monkeypatch.setattr(_Volume, "add", counted)
    size = [16, 16, 16]
    size[axis] = 96
    SlidingWindowLabels(8, overlap=0.5)(torch.randn(1, 1, *size), network(dtype=torch.float32, fused=True))
    assert waiting[-1] == 0
    assert max(waiting) <= 4 * 16 * 16 + 8 * 4 * 16 + 8 * 8 * 4


def test_with_fewer_classes_than_features_logits_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[Tensor] = []
    net = network(channels=FEATURES, dtype=torch.float32, fused=True)
    SlidingWindowLabels(8)(torch.randn(1, 1, 8, 8, 8), lambda window: outputs.append(net(window)) or outputs[-1])  # type: ignore[func-returns-value]
    assert not isinstance(outputs[0], LazyLogits)


def test_what_follows_a_fused_head_is_not_lost() -> None:
    image = torch.randn(1, 1, 12, 12, 12, dtype=torch.float64)
    net = network(fused=True)

    def reversed_classes(window: Tensor) -> Tensor:
        found: Tensor = net(window)
        return found.flip(1)

    expected: Any = SlidingWindowInferer(8)(image, reversed_classes)
    assert torch.equal(SlidingWindowLabels(8)(image, reversed_classes), expected.argmax(1, keepdim=True))  # type: ignore[arg-type]


def test_afterwards_the_head_is_a_convolution_again() -> None:
    net = network(fused=True)

    def fails(window: Tensor) -> Tensor:
        assert isinstance(net(window), LazyLogits)
        raise KeyError("of the network")

    with pytest.raises(KeyError):
        SlidingWindowLabels(8)(torch.randn(1, 1, 8, 8, 8, dtype=torch.float64), fails)
    assert isinstance(net[-1], FusedHead)
    assert not isinstance(net(torch.randn(1, 1, 8, 8, 8, dtype=torch.float64)), LazyLogits)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_in_inference_mode_and_with_gradients(mode: Callable[[], Any]) -> None:
    image, net = torch.randn(1, 1, 12, 12, 12, dtype=torch.float64), network(fused=True)
    expected = net(image).argmax(1, keepdim=True)
    with mode():
        labels, probability = SlidingWindowLabels(-1, return_probability=True)(image, net)
        assert torch.equal(labels, expected)
    assert not probability.requires_grad


def test_it_is_an_inferer_that_keeps_metadata_and_passes_arguments_on() -> None:
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    image = MetaTensor(torch.randn(1, 1, 12, 12, 12, dtype=torch.float64), affine=affine)
    net = network()
    inferer = SlidingWindowLabels(8)
    labels = inferer(image, lambda window, scale, shift: net(window) * scale + shift, -1, shift=0)
    assert isinstance(inferer, Inferer)
    assert isinstance(labels, MetaTensor)
    assert torch.equal(labels.affine, image.affine)
    expected: Any = SlidingWindowInferer(8)(image.as_tensor(), net)
    assert torch.equal(labels.as_tensor(), expected.argmin(1, keepdim=True))


ARGUMENTS = torch.ones(1, 2, 3, 3), torch.ones(4, 2), torch.ones(4)


@pytest.mark.parametrize(
    ("number", "value", "error", "message"),
    [
        (
            0,
            torch.ones(1, 2, 3, 3).int(),
            TypeError,
            "features: .* floating-point .* received torch.int32.*float",
        ),
        (0, torch.ones(2, 3), ShapeError, r"features: expected \[B, F, .* received \[2, 3\].*unsqueeze"),
        (0, torch.ones(1, 2, 0), ShapeError, r"features: expected .* received \[1, 2, 0\]"),
        (1, torch.ones(4, 3), ShapeError, r"weight: expected \[C, 2\] .* received \[4, 3\].*convolution"),
        (1, torch.ones(4, 2, 3, 3), ShapeError, r"weight: expected \[C, 2\] .* received \[4, 2, 3, 3\]"),
        (1, torch.ones(4), ShapeError, r"weight: expected \[C, 2\] .* received \[4\]"),
        (
            1,
            torch.ones(4, 2).half(),
            TypeError,
            "weight: expected torch.float32 .* received torch.float16.*to",
        ),
        (2, torch.ones(3), ShapeError, r"bias: expected \[4\] or None, received \[3\]"),
        (2, torch.ones(4).double(), TypeError, "bias: expected torch.float32 on cpu .* received torch.float64"),
    ],
)
def test_wrong_parameters_are_errors(number: int, value: Tensor, error: type[Exception], message: str) -> None:
    given = [*ARGUMENTS]
    given[number] = value
    with pytest.raises(error, match=message):
        fused_argmax(*given)


IMAGE = torch.ones(1, 1, 8, 8)


@pytest.mark.parametrize(
    ("image", "returned", "error", "message"),
    [
        (
            IMAGE[0, 0],
            lambda x: x,
            ShapeError,
            r"inputs: expected \[B, .* received \[8, 8\].*unsqueeze",
        ),
        (IMAGE[..., None], lambda x: x, ShapeError, r"axes of roi_size, \(4, 4\), received \[1, 1, 8, 8, 1\]"),
        (IMAGE, lambda x: (x, x), TypeError, r"network: expected one tensor .* received tuple.*lambda"),
        (IMAGE, lambda x: F.avg_pool2d(x, 2), ShapeError, r"logits \[1, C, 4, 4\], .* received \[1, 1, 2, 2\]"),
        (IMAGE, lambda x: x, ShapeError, r"at least two classes .* received \[1, 1, 4, 4\].*threshold"),
    ],
)
def test_images_and_outputs_that_do_not_fit_are_errors(
    image: Tensor, returned: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SlidingWindowLabels((4, 4))(image, returned)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1}, "overlap: expected at least 0 and less than 1, received 1"),
        ({"overlap": (0.5, -0.1)}, "overlap: .* received"),
        ({"sw_batch_size": 0}, "sw_batch_size: expected at least 1, received 0"),
        ({"mode": "sum"}, 'mode: expected "constant" or "gaussian", received .sum.'),
    ],
)
def test_wrong_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlidingWindowLabels(8, **options)
