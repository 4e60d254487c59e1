"""Labels of a whole volume from a network with many classes, without a volume of floats for each class.

Sliding windows overlap, and what counts is the mean of their logits, weighted by importance m: z̄ = Σ m z / Σ m.
Two facts make it small. A voxel is finished when its last window has been: then its class is known, and its sums
are forgotten. And a last convolution of kernel size 1 is linear: z̄ = W f̄ + b, so that the features f can be
averaged in the place of the logits, which are many more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers.inferer import Inferer
from monai.utils.enums import BlendMode, PytorchPadMode
from monai.utils.misc import ensure_tuple_rep, fall_back_tuple
from monai.utils.type_conversion import convert_to_dst_type
from torch import Tensor

from voxloss.backends.tiled import Head, label_dtype, largest_classes, write_largest
from voxloss.head import lazy_at_inference
from voxloss.inputs import ShapeError, plain
from voxloss.lazy_logits import LazyLogits

__all__ = ["SlidingWindowLabels", "fused_argmax"]


@torch.no_grad()
def fused_argmax(
    features: Tensor, weight: Tensor, bias: Tensor | None = None, *, return_probability: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The class of the largest logit, of logits z = W f + b that are computed tile by tile and never whole.

    $$z_k = \max_c z_c, \qquad p_k = \frac{e^{z_k}}{\sum_c e^{z_c}}$$

    It is `convolution(features).argmax(1, keepdim=True)` of a 1×1×1 convolution: the first of equal ones.
    Logits have the dtype of the features, also under autocast.

    Args:
        features: f, `[B, F, spatial...]` with one to three spatial axes, in any memory layout.
        weight: W, `[C, F]`, or `[C, F, 1...]` as the convolution has it.
        bias: b, `[C]`, or None.
        return_probability: whether the softmax of that logit is returned as well.

    Returns:
        Labels `[B, 1, spatial...]`: uint8 up to 256 classes, int16 up to 32768, else int32. With
        `return_probability` also p_k `[B, 1, spatial...]`, in float32 or, for float64 features, float64.

    Raises:
        TypeError: for features that are not floating point, or weights of another dtype or device.
        ShapeError: for shapes that do not fit together.
    """
    features, weight = plain(features), plain(weight)
    bias = None if bias is None else plain(bias)
    _require_head(features, weight, bias)
    head = Head(features, weight.flatten(1), bias, features.dtype)
    labels, probability = largest_classes(head, return_probability)
    return labels if probability is None else (labels, probability)


class SlidingWindowLabels(Inferer):
    """Labels from overlapping windows, as `SlidingWindowInferer(...)(...).argmax(1, keepdim=True)` finds them.

    The logits of overlapping windows are averaged as by MONAI's `SlidingWindowInferer`, with the same windows and
    importance. But C volumes of floats never exist: a voxel's sums last from its first window to its last. If the
    network ends in a `FusedHead` (`fuse_head`) with more classes than features, the features are averaged, as the
    head is linear; its logits are computed once, tile by tile, and not for each window. Any other network works,
    too; then sums of logits are kept.

    For classes that exclude each other: a network of sigmoids needs `SlidingWindowInferer` and a threshold. The
    arguments are MONAI's, with its defaults; `progress`, `cache_roi_weight_map`, `cpu_thresh`, `buffer_steps`,
    `buffer_dim` and `with_coord` are missing.

    ```python
    inferer = SlidingWindowLabels(roi_size=(96, 96, 96), sw_batch_size=4, overlap=0.5, mode="gaussian")
    labels = inferer(image, network.eval())
    ```

    Args:
        roi_size: size of a window, one number or one for each axis; that of the image where it is not positive.
        sw_batch_size: windows in a batch of the network.
        overlap: of neighbouring windows, as a fraction of their size.
        mode: "constant", or "gaussian": importance falls towards a window's edges.
        sigma_scale: standard deviation of the Gaussian, as a fraction of the window's size.
        padding_mode: of images smaller than a window, as `torch.nn.functional.pad` has it.
        cval: padding value of "constant".
        sw_device: where windows are computed; by default where the input is.
        device: where sums and labels are; by default where the input is.
        return_probability: return the softmax's largest probability, as well.
    """

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        sw_batch_size: int = 1,
        overlap: Sequence[float] | float = 0.25,
        mode: BlendMode | str = BlendMode.CONSTANT,
        sigma_scale: Sequence[float] | float = 0.125,
        padding_mode: PytorchPadMode | str = PytorchPadMode.CONSTANT,
        cval: float = 0.0,
        sw_device: torch.device | str | None = None,
        device: torch.device | str | None = None,
        *,
        return_probability: bool = False,
    ) -> None:
        super().__init__()
        overlaps = overlap if isinstance(overlap, Sequence) else [overlap]
        if not all(0 <= each < 1 for each in overlaps):
            raise ValueError(f"overlap: expected at least 0 and less than 1, received {overlap}.")
        if sw_batch_size < 1:
            raise ValueError(f"sw_batch_size: expected at least 1, received {sw_batch_size}.")
        self.roi_size = roi_size
        self.sw_batch_size = sw_batch_size
        self.overlap = overlap
        if mode not in [*BlendMode]:
            raise ValueError(f'mode: expected "constant" or "gaussian", received {mode!r}.')
        self.mode = BlendMode(mode)
        self.sigma_scale = sigma_scale
        self.padding_mode = PytorchPadMode(padding_mode)
        self.cval = cval
        self.sw_device = sw_device
        self.device = device
        self.return_probability = return_probability

    @torch.no_grad()
    def __call__(
        self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return labels `[B, 1, spatial...]` of an image `[B, channels, spatial...]`; p_k as well if wanted.

        Further arguments are the network's. dtypes as of `fused_argmax`; a MetaTensor keeps its metadata.

        Raises:
            ShapeError: if the image has other axes than `roi_size`, or outputs have another size than windows.
            TypeError: if the network returns anything but one tensor.
        """
        image = plain(inputs)
        if image.ndim < 3 or (isinstance(self.roi_size, Sequence) and len(self.roi_size) != image.ndim - 2):
            raise ShapeError(
                f"inputs: expected [B, channels, spatial...] with the axes of roi_size, {self.roi_size}, "
                f"received {list(image.shape)}. A single image needs unsqueeze(0)."
            )
        size = image.shape[2:]
        roi = fall_back_tuple(self.roi_size, size)
        before = [max(window - edge, 0) // 2 for window, edge in zip(roi, size, strict=True)]
        image = self._padded(image, roi, before)
        device = torch.device(self.device or image.device)
        exact = torch.promote_types(image.dtype, torch.float32)
        importance = compute_importance_map(roi, self.mode, self.sigma_scale, device, exact)
        windows = _windows(image.shape, roi, ensure_tuple_rep(self.overlap, len(roi)))
        volume = _Volume((len(image), 1, *image.shape[2:]), self.return_probability, device)
        for at in range(0, len(windows), self.sw_batch_size):
            batch = windows[at : at + self.sw_batch_size]
            crops = torch.stack([image[window.sample][(slice(None), *window.where)] for window in batch])
            with lazy_at_inference():
                output = network(crops.to(self.sw_device or image.device), *args, **kwargs)
            volume.add(batch, *_parts(output, crops), importance)
            del output  # before the next one
        inside = tuple(slice(start, start + edge) for start, edge in zip(before, size, strict=True))
        found: list[Any] = [
            convert_to_dst_type(each[(slice(None), slice(None), *inside)], inputs, each.dtype, device=device)[0]
            for each in volume.found
        ]
        return (found[0], found[1]) if self.return_probability else found[0]

    def _padded(self, image: Tensor, roi: Sequence[int], before: Sequence[int]) -> Tensor:
        """The image at least as large as a window."""
        pads = [
            (start, max(window - edge, 0) - start)
            for start, window, edge in zip(before, roi, image.shape[2:], strict=True)
        ]
        if not any(map(sum, pads)):
            return image
        return F.pad(image, [*itertools.chain(*reversed(pads))], self.padding_mode.value, self.cval)


class _Piece(NamedTuple):
    """Voxels between neighbouring ends of windows along an axis, and how many windows have them."""

    start: int
    stop: int
    windows: int


class _Window(NamedTuple):
    """Where a window of a sample is, and its pieces along each axis."""

    sample: int
    where: tuple[slice, ...]
    pieces: list[list[_Piece]]


@dataclass
class _Sums:
    """Σ m x and Σ m of a cell's voxels over the windows so far, and how many windows are left."""

    values: Tensor
    importance: Tensor
    left: int


class _Volume:
    """Labels of the voxels whose windows have all been, and sums of those that wait for one.

    A cell, which is a piece along each axis, has the same windows for all its voxels.
    """

    def __init__(self, shape: Sequence[int], probability: bool, device: torch.device) -> None:
        self._shape, self._probability, self._device = shape, probability, device
        self._sums: dict[tuple[int, ...], _Sums] = {}
        self.found: list[Tensor] = []

    def add(self, windows: Sequence[_Window], values: Tensor, head: Head | None, importance: Tensor) -> None:
        """Take what the network found, `[windows, channels, window]`: logits, or the features of a head."""
        dtype = torch.promote_types(values.dtype, torch.float32)  # of the sums
        if head is not None:
            bias = None if head.bias is None else head.bias.to(self._device, dtype)
            head = Head(head.features, head.weight.to(self._device, dtype), bias, dtype)
        for window, of_window in zip(windows, values, strict=True):
            self._add(window, of_window.to(self._device, dtype), head, importance.to(dtype))

    def _add(self, window: _Window, values: Tensor, head: Head | None, importance: Tensor) -> None:
        """A window, `[channels, window]`."""
        if not self.found:
            self._allocate(values, len(values) if head is None else len(head.weight))
        for cell in itertools.product(*window.pieces):
            of_window = tuple(
                slice(piece.start - axis.start, piece.stop - axis.start)
                for piece, axis in zip(cell, window.where, strict=True)
            )
            key = window.sample, *(piece.start for piece in cell)
            windows = math.prod(piece.windows for piece in cell)
            mean = self._mean(key, windows, values[(slice(None), *of_window)], importance[of_window])
            if mean is not None:
                where = tuple(slice(piece.start, piece.stop) for piece in cell)
                self._finish([each[window.sample, 0][where] for each in self.found], mean, head)

    def _allocate(self, values: Tensor, channels: int) -> None:
        dtypes = [label_dtype(channels), values.dtype][: 2 if self._probability else 1]
        self.found = [torch.empty(self._shape, dtype=dtype, device=self._device) for dtype in dtypes]

    def _mean(self, key: tuple[int, ...], windows: int, values: Tensor, importance: Tensor) -> Tensor | None:
        """Σ m x / Σ m if that was a cell's last window; None if it was not."""
        if windows == 1:
            return values
        sums = self._sums.get(key)
        if sums is None:
            self._sums[key] = _Sums(values * importance, importance.clone(), windows - 1)
            return None
        sums.values.addcmul_(values, importance)
        sums.importance.add_(importance)
        sums.left -= 1
        return None if sums.left else self._sums.pop(key).values.div_(sums.importance)

    def _finish(self, written: list[Tensor], mean: Tensor, head: Head | None) -> None:
        """Write a cell's labels, and probabilities if wanted."""
        if head is None:
            write_largest(mean, *written)
            return
        found = largest_classes(head._replace(features=mean[None]), self._probability)
        for to, each in zip(written, found, strict=False):
            if each is not None:
                to.copy_(each[0, 0])


def _windows(shape: Sequence[int], roi: Sequence[int], overlap: Sequence[float]) -> list[_Window]:
    """Those of MONAI's SlidingWindowInferer, sample by sample, the longest axis last of all to move on.

    So the voxels that wait for their next window are the fewest.
    """
    samples, _, *size = shape
    axes = [_pieces(*each) for each in zip(size, roi, overlap, strict=True)]
    order = sorted(range(len(size)), key=lambda axis: -size[axis])
    starts = sorted(itertools.product(*axes), key=lambda start: [start[axis] for axis in order])
    return [
        _Window(
            sample,
            tuple(slice(at, at + edge) for at, edge in zip(start, roi, strict=True)),
            [pieces[at] for pieces, at in zip(axes, start, strict=True)],
        )
        for sample in range(samples)
        for start in starts
    ]


def _pieces(size: int, roi: int, overlap: float) -> dict[int, list[_Piece]]:
    """Of each window along an axis, by its start: the pieces that the ends of all windows cut it into."""
    interval = max(1, int(roi * (1 - overlap)))
    starts = [where[0].start for where in dense_patch_slices((size,), (roi,), (interval,))]
    ends = sorted({*starts, *(start + roi for start in starts)})
    pieces = [
        _Piece(start, stop, sum(at <= start < at + roi for at in starts))
        for start, stop in itertools.pairwise(ends)
    ]
    return {at: [piece for piece in pieces if at <= piece.start < at + roi] for at in starts}


def _parts(output: Any, crops: Tensor) -> tuple[Tensor, Head | None]:
    """What is averaged, `[windows, channels, window]`: logits, or the features of a head to apply afterwards."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"network: expected one tensor of logits, received {type(output).__name__}. Pass the "
            "one that counts: inferer(image, lambda window: network(window)[0])."
        )
    if output.ndim != crops.ndim or len(output) != len(crops) or output.shape[2:] != crops.shape[2:]:
        raise ShapeError(
            f"network: expected logits [{len(crops)}, C, {', '.join(map(str, crops.shape[2:]))}], as its windows "
            f"{list(crops.shape)}, received {list(output.shape)}. Resample in the network, as in "
            "lambda window: F.interpolate(network(window), size=window.shape[2:])."
        )
    if output.shape[1] < 2:
        raise ShapeError(
            f"network: expected logits of at least two classes that exclude each other, received "
            f"{list(output.shape)}. For a binary channel take MONAI's SlidingWindowInferer and a threshold."
        )
    if isinstance(output, LazyLogits) and output.is_current():
        return output.parts.features, output.parts
    return plain(output), None


def _require_head(features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if not features.is_floating_point():
        raise TypeError(
            f"features: expected a floating-point tensor, received {features.dtype}. Convert it with "
            "features.float()."
        )
    if features.ndim not in (3, 4, 5) or not features.numel():
        raise ShapeError(
            f"features: expected [B, F, spatial...] with one to three spatial axes, received "
            f"{list(features.shape)}. A single sample needs unsqueeze(0)."
        )
    if weight.ndim < 2 or not len(weight) or weight[0].numel() != features.shape[1]:
        raise ShapeError(
            f"weight: expected [C, {features.shape[1]}] for features {list(features.shape)}, received "
            f"{list(weight.shape)}. It is that of the convolution of kernel size 1 that takes these features."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(
            f"bias: expected [{len(weight)}] or None, received {list(bias.shape)}. It is that of the convolution "
            "that weight is of."
        )
    for name, each in (("weight", weight), ("bias", bias)):
        if each is not None and (each.dtype, each.device) != (features.dtype, features.device):
            raise TypeError(
                f"{name}: expected {features.dtype} on {features.device} as the features, received {each.dtype} "
                f"on {each.device}. Convert it with {name}.to(features)."
            )
