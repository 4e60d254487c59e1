"""The pass over logits that are never whole: those of a 1×1×1 convolution, computed tile by tile.

The sums are additive over voxels. So the logits z = W f + b of some thousand voxels are computed from their
features, any backend sums them, and the next tile takes their memory. The backward pass computes them again and
makes of their gradient what autograd would: ∂L/∂f = Wᵀ ∂L/∂z, ∂L/∂W = Σ ∂L/∂z fᵀ, ∂L/∂b = Σ ∂L/∂z over voxels.

On a CPU each thread has a tile of its own in its own cache, and waits for the others once, at the end. The tiles
are added up in their order, so the result is the same for any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from voxloss.backends import Backend
from voxloss.backends.layout import flatten_spatial
from voxloss.backends.threads import in_each_thread
from voxloss.backends.voxels import PassSpec

# Bytes of a tile's logits. On a CPU they stay in the cache; on a GPU each tile costs the host some launches.
CPU_TILE, DEVICE_TILE = 1 << 21, 1 << 26
# Voxels of a tile are a multiple of this, so that the fused pass works on full rows.
ROW = 1 << 10
# Threads, each with the memory of a tile.
MOST_THREADS = 32


class Head(NamedTuple):
    """A 1×1×1 convolution and its input.

    Attributes:
        features: f, `[B, F, spatial...]`.
        weight: W, `[C, F]`.
        bias: b, `[C]`.
        dtype: that of the logits.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    def logits(self) -> Tensor:
        """All of them, `[B, C, spatial...]`."""
        spatial = self.features.ndim - 2
        kernel = self.weight.reshape(*self.weight.shape, *[1] * spatial).to(self.dtype)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[spatial - 1]
        return convolution(self.features.to(self.dtype), kernel, bias)


class HeadGradient(NamedTuple):
    """∂L/∂features, ∂L/∂weight and ∂L/∂bias, in dtype and layout of these; None for what is not wanted."""

    features: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def region_sums(
    head: Head,
    target: Tensor,
    spec: PassSpec,
    backend: Backend,
    mask: Tensor | None = None,
    map: Tensor | None = None,
    partition: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sums `[K, B, C]`, or `[K, B * cells, C]`, and whether every voxel was valid."""
    device, cells, channels = head.features.device, max(1, spec.cells), len(head.weight)
    total = torch.zeros((len(spec.sums), len(head.features), cells, channels), dtype=_wide(device), device=device)
    all_valid = torch.ones((), dtype=torch.bool, device=device)

    def sums_of(tile: _Tile, product: _Product) -> _Add:
        features, labels, *others = tile.volumes
        logits = product.logits(features)
        sums, valid = backend.region_sums(logits[None], labels[None], spec, *_batched(others))

        def add() -> None:
            total[:, tile.sample] += sums.view(len(sums), cells, channels)
            all_valid.logical_and_(valid)

        return add

    _walk(head, _Volumes([head.features, target], [mask, map, partition]), sums_of)
    return total.flatten(1, 2), all_valid


def voxel_terms(
    factors: Tensor, head: Head, target: Tensor, spec: PassSpec, backend: Backend, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what each voxel adds to Σ factor·sum, `[B, 1, spatial...]`, and whether every voxel was valid."""
    device = head.features.device
    shape = len(head.features), 1, *head.features.shape[2:]
    result = torch.empty(shape, dtype=_exact(head.dtype), device=device)
    all_valid = torch.ones((), dtype=torch.bool, device=device)

    def terms_of(tile: _Tile, product: _Product) -> _Add:
        written, features, labels, weights = tile.volumes
        logits, rows = product.logits(features), factors[:, tile.sample, None]
        terms, valid = backend.voxel_terms(rows, logits[None], labels[None], spec, *_batched([weights]))
        written.copy_(terms[0])
        return lambda: all_valid.logical_and_(valid)

    _walk(head, _Volumes([result, head.features, target], [mask]), terms_of)
    return result, all_valid


def region_sums_backward(
    grad: Tensor,
    head: Head,
    target: Tensor,
    spec: PassSpec,
    backend: Backend,
    wanted: Sequence[bool],
    mask: Tensor | None = None,
    map: Tensor | None = None,
    partition: Tensor | None = None,
) -> HeadGradient:
    """The gradient from grad = ∂L/∂sums, `[K, B * cells, C]`; `wanted` of features, weight and bias.

    Besides ∂L/∂f it takes the memory of a tile for each thread; the tile's gradient is written over its logits.
    ∂L/∂W and ∂L/∂b are summed in float32 within a tile and in float64 over the tiles.
    """
    device, exact = head.features.device, _exact(head.dtype)
    by_sample = grad.view(len(grad), len(head.features), -1, grad.shape[2])
    by_features = _in_lines(head.features)
    by_weight = torch.zeros(head.weight.shape, dtype=_wide(device), device=device)
    by_bias = torch.zeros(len(head.weight), dtype=_wide(device), device=device)

    def gradient_of(tile: _Tile, product: _Product) -> _Add:
        written, features, labels, *others = tile.volumes
        gradient = product.logits(features)
        weights, *maps = _batched(others)
        logits, rows = gradient[None], by_sample[:, tile.sample]
        backend.region_sums_backward(rows, logits, labels[None], spec, "input", weights, logits, *maps)
        if wanted[0]:
            product.by_features(gradient, written)
        of_weight = gradient.to(exact) @ features.to(exact).t() if wanted[1] else by_weight.new_zeros(())
        of_bias = gradient.sum(1, dtype=exact) if wanted[2] else by_bias.new_zeros(())

        def add() -> None:
            by_weight.add_(of_weight)
            by_bias.add_(of_bias)

        return add

    volumes = _Volumes([by_features, head.features, target], [mask, map, partition])
    _walk(head, volumes, gradient_of)
    if by_features.stride() != torch.empty_like(head.features).stride():
        by_features = torch.empty_like(head.features).copy_(by_features)
    found = by_features, by_weight.to(head.weight.dtype), by_bias.to(head.weight.dtype)
    return HeadGradient(*(each if want else None for each, want in zip(found, wanted, strict=True)))


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Products in the dtype of the logits, and sums of products in float32."""
    device = tensor.device.type
    available = torch.amp.is_autocast_available(device)  # not for meta tensors
    return torch.autocast(device, enabled=False) if available else nullcontext()


def largest_classes(head: Head, probability: bool) -> tuple[Tensor, Tensor | None]:
    """Return the class of each voxel's largest logit, and its softmax if wanted, `[B, 1, spatial...]`."""
    like = head.features[:, :1]  # voxels in the order of the features
    labels = torch.empty_like(like, dtype=label_dtype(len(head.weight)))
    found = torch.empty_like(like, dtype=_exact(head.dtype)) if probability else None

    def classes_of(tile: _Tile, product: _Product) -> _Add:
        labels, features, *found = tile.volumes
        write_largest(product.logits(features), labels[0], *(each[0] for each in found if each is not None))
        return _nothing

    # With a voxel's logits side by side torch finds the largest in a third of the time.
    with without_autocast(head.features):
        _walk(head, _Volumes([labels, head.features], [found]), classes_of, by_voxel=True)
    return labels, found


def write_largest(logits: Tensor, labels: Tensor, probability: Tensor | None = None) -> None:
    """Write the first class of the largest logit, `[C, ...]`, and its softmax, 1 / Σ exp(z − max z)."""
    largest, classes = logits.max(0)
    labels.copy_(classes)
    if probability is not None:
        exact = logits.to(probability.dtype)
        probability.copy_((exact - largest).exp_().sum(0).reciprocal_())


def label_dtype(channels: int) -> torch.dtype:
    """The smallest that has every class: uint8, int16 or int32."""
    return torch.uint8 if channels <= 1 << 8 else torch.int16 if channels <= 1 << 15 else torch.int32


_Add = Callable[[], object]


def _nothing() -> None:
    """Nothing to add up."""


class _Tile(NamedTuple):
    """Some voxels of a sample: what the volumes have there, `[channels, voxels]`."""

    sample: int
    volumes: list[Any]  # Tensor, or None for what there is not


class _Volumes:
    """Volumes `[B, channels, spatial...]`, some of them None, as lines of voxels in one order, the first's."""

    def __init__(self, present: Sequence[Tensor], optional: Sequence[Tensor | None]) -> None:
        every = [*present, *optional]
        lines = iter(flatten_spatial([each for each in every if each is not None]))
        self._lines = [None if each is None else next(lines) for each in every]
        self.voxels = present[0][0, 0].numel()

    def tile(self, sample: int, start: int, stop: int) -> _Tile:
        return _Tile(sample, [None if each is None else each[sample, :, start:stop] for each in self._lines])


class _Product:
    """The matrix products of a head, tile by tile `[channels, voxels]`."""

    def __init__(self, head: Head, voxels: int, by_voxel: bool) -> None:
        self._weight = head.weight.to(head.dtype)
        self._bias = None if head.bias is None else head.bias.to(head.dtype)[:, None]
        shape = len(head.weight), voxels
        self._memory = self._weight.new_empty(shape[::-1]).t() if by_voxel else self._weight.new_empty(shape)

    def logits(self, features: Tensor) -> Tensor:
        """W f + b, in the memory of the tile before."""
        features = features.to(self._weight.dtype)
        out = self._memory[:, : features.shape[1]]
        if self._bias is None:
            return torch.mm(self._weight, features, out=out)
        return torch.addmm(self._bias, self._weight, features, out=out)

    def by_features(self, gradient: Tensor, out: Tensor) -> None:
        """Write Wᵀ ∂L/∂z."""
        if out.dtype == gradient.dtype:
            torch.mm(self._weight.t(), gradient, out=out)
        else:
            out.copy_(self._weight.t() @ gradient)


def _walk(head: Head, volumes: _Volumes, work: Callable[[_Tile, _Product], _Add], by_voxel: bool = False) -> None:
    """Call `work` for each tile, in any order, and what it returns in that of the tiles.

    `by_voxel`: in memory a tile's logits are those of one voxel after another, not of one class.
    """
    on_cpu = head.features.device.type == "cpu"
    row = len(head.weight) * head.dtype.itemsize * ROW
    size = min(volumes.voxels, ROW * max(1, (CPU_TILE if on_cpu else DEVICE_TILE) // row))
    places = [(sample, at) for sample in range(len(head.features)) for at in range(0, volumes.voxels, size)]
    todo, ready, done, lock = iter(enumerate(places)), dict[int, _Add](), 0, Lock()

    def take() -> None:
        nonlocal done
        product = _Product(head, size, by_voxel)
        for number, (sample, start) in todo:
            add = work(volumes.tile(sample, start, min(start + size, volumes.voxels)), product)
            with lock:
                ready[number] = add
                while done in ready:
                    ready.pop(done)()
                    done += 1

    in_each_thread(take, min(MOST_THREADS, len(places)) if on_cpu else 1)


def _batched(tiles: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if tile is None else tile[None] for tile in tiles]


def _in_lines(features: Tensor) -> Tensor:
    """Memory for as many, whose voxels lie in a line that can be written to."""
    like = torch.empty_like(features)
    shares = flatten_spatial([like])[0].data_ptr() == like.data_ptr()
    return like if shares else torch.empty(features.shape, dtype=features.dtype, device=features.device)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
