"""The fused pass on the CPU: which thread walks which voxels, and how the parts are added up.

The loops themselves are in `numba_kernels`, which is imported, and Numba with it, at the first call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxloss.backends.layout import flatten_spatial
from voxloss.backends.voxels import MAPPED, TERMS, PassSpec, range_tolerance, without_differences

# Voxels of a sample that are summed by themselves, at least; see `_part`.
PART = 1 << 15
# Bytes for the sums of all parts of a sample, where there are many cells.
LARGEST_SUMS = 1 << 25
# Voxels that are worked on at once: with some hundred channels they still fit into the second cache.
WIDTH = 1024

_INSTALLED = find_spec("numba") is not None
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Scratch(NamedTuple):
    """Memory for one thread to work in."""

    target: Any  # of a part; None where the kernels take it as it lies in memory
    order: NDArray[Any]  # of a part's voxels, sorted by cell
    bounds: NDArray[Any]  # where each cell begins in it
    rows: Any  # as the kernels take them


Walk = Callable[[int, int, int, int, _Scratch], None]


def available() -> tuple[bool, str]:
    """Whether Numba is installed."""
    if not _INSTALLED:
        return False, "Numba is not installed; pip install numba"
    return True, "one fused pass on the CPU, compiled by Numba"


def takes(device: str, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether it can take such an input."""
    return device == "cpu" and dtype in _DTYPES, "a float16, bfloat16, float32 or float64 input on the CPU"


def region_sums(
    input: Tensor,
    target: Tensor,
    spec: PassSpec,
    mask: Tensor | None = None,
    map: Tensor | None = None,
    partition: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sums `[K, B, C]` and whether every voxel was valid.

    Rows of up to 1024 voxels are summed in float32 (float64 for float64 input), the rows and parts in float64.
    """
    items, channels, *_ = input.shape
    *flat, numbers = flatten_spatial(
        [input, target, _beside(mask, input), _beside(map, input), _numbers(partition, input)]
    )
    inputs, targets = (_Samples(tensor) for tensor in flat[:2])
    masks, maps = (_Beside(tensor, input) for tensor in flat[2:])
    config = _config(input, target, spec, mask)
    target_of = _target_of(targets, target, channels, config, spec)
    part = _part(inputs.voxels, channels, spec.cells)
    parts, cells = -(-inputs.voxels // part), max(1, spec.cells)
    sums = np.zeros((items, parts, cells, len(TERMS), channels))
    valid = np.zeros((items, parts), dtype=bool)

    def walk(item: int, part: int, start: int, stop: int, scratch: _Scratch) -> None:
        beside = masks.part(item, start, stop), maps.part(item, start, stop)
        given = inputs[item], target_of(item, start, stop, scratch), *beside
        voxels = start, *_in_order(numbers[item, 0, start:stop], scratch)
        valid[item, part] = _kernels().forward(*given, *voxels, config, *scratch.rows, sums[item, part])

    _in_parallel(walk, inputs.voxels, input, target, spec)
    rows = [list(TERMS).index(name) for name in spec.sums]
    total = sums.sum(1)[:, :, rows].reshape(items * cells, len(rows), channels)
    return torch.from_numpy(total.swapaxes(0, 1).copy()), torch.tensor(bool(valid.all()))


def voxel_terms(
    factors: Tensor, input: Tensor, target: Tensor, spec: PassSpec, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what each voxel adds to Σ factor·sum, `[B, 1, spatial...]`, and whether every voxel was valid."""
    items, channels, *_ = input.shape
    result = torch.empty((items, 1, *input.shape[2:]), dtype=torch.promote_types(input.dtype, torch.float32))
    flat = flatten_spatial([result, input, target, _beside(mask, input)])
    results, inputs, targets = (_Samples(tensor) for tensor in flat[:3])
    masks = _Beside(flat[3], input)
    config = _config(input, target, spec, mask)
    target_of = _target_of(targets, target, channels, config, spec)
    valid = np.zeros((items, -(-inputs.voxels // _part(inputs.voxels, channels, 0))), dtype=bool)
    weights = np.zeros((items, len(TERMS), channels), _precision(input))
    for name, row in zip(spec.sums, factors, strict=True):
        weights[:, list(TERMS).index(name)] += row.detach().numpy()

    def walk(item: int, part: int, start: int, stop: int, scratch: _Scratch) -> None:
        target = target_of(item, start, stop, scratch)
        given = inputs[item], target, masks.part(item, start, stop), start, stop, config
        valid[item, part] = _kernels().each(*given, *scratch.rows, weights[item], results[item])

    _in_parallel(walk, inputs.voxels, input, target, spec)
    return result, torch.tensor(bool(valid.all()))


def region_sums_backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    spec: PassSpec,
    wrt: str,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    map: Tensor | None = None,
    partition: Tensor | None = None,
) -> Tensor:
    """∂L/∂input or ∂L/∂target (`wrt`) in that tensor's dtype and layout; p is computed again."""
    grad, spec = without_differences(grad, spec)
    items, channels, *_ = input.shape
    like = input if wrt == "input" else target
    result = written = torch.empty_like(like) if out is None else out
    if flatten_spatial([written])[0].untyped_storage().data_ptr() != written.untyped_storage().data_ptr():
        # Axes in an order that no single stride can follow: the kernel writes elsewhere.
        written = torch.empty(like.shape, dtype=like.dtype)
    *flat, numbers = flatten_spatial(
        [written, input, target, _beside(mask, input), _beside(map, input), _numbers(partition, input)]
    )
    results, inputs, targets = (_Samples(tensor) for tensor in flat[:3])
    masks, maps = (_Beside(tensor, input) for tensor in flat[3:])
    config, by_target = _config(input, target, spec, mask), wrt == "target"
    target_of = _target_of(targets, target, channels, config, spec)
    cells = max(1, spec.cells)
    weights = np.zeros((items, cells, len(TERMS), channels), _precision(input))
    for name, row in zip(spec.sums, grad, strict=True):
        weights[:, :, list(TERMS).index(name)] += row.detach().view(items, cells, channels).numpy()

    def walk(item: int, part: int, start: int, stop: int, scratch: _Scratch) -> None:
        beside = masks.part(item, start, stop), maps.part(item, start, stop)
        given = inputs[item], target_of(item, start, stop, scratch), *beside
        voxels = start, *_in_order(numbers[item, 0, start:stop], scratch)
        _kernels().backward(*given, *voxels, config, *scratch.rows, weights[item], by_target, results[item])

    _in_parallel(walk, inputs.voxels, input, target, spec)
    return result if result is written else result.copy_(written)


class _Samples:
    """A tensor `[B, channels, N]` as memory and, for each sample, how it lies there."""

    def __init__(self, flat: Tensor) -> None:
        self.voxels = flat.shape[2]
        self._strides = flat.stride()
        self._kind = _kind(flat.dtype)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(flat.shape, self._strides, strict=True))
        line = flat.detach().as_strided((extent,), (1,))
        if flat.dtype in (torch.float16, torch.bfloat16):
            self._memory = line.view(torch.int16).numpy().view(np.uint16)
        else:
            self._memory = (line.view(torch.uint8) if flat.dtype == torch.bool else line).numpy()

    def __getitem__(self, item: int) -> tuple[NDArray[Any], Any]:
        per_item, per_channel, per_voxel = self._strides
        return self._memory, _kernels().Lines(item * per_item, per_channel, per_voxel, self._kind)


class _Beside:
    """A mask or map `[B, channels, N]`; the kernels take it in the dtype of the rows, a part at a time."""

    def __init__(self, flat: Tensor, input: Tensor) -> None:
        self._samples, self._values, self._dtype = _Samples(flat), flat.detach().numpy(), _precision(input)

    def part(self, item: int, start: int, stop: int) -> tuple[NDArray[Any], Any]:
        if self._values.dtype == self._dtype:
            return self._samples[item]
        values = self._values[item, :, start:stop].astype(self._dtype, order="C")
        return values.reshape(-1), _kernels().Lines(-start, stop - start, 1, _kernels().NATIVE)


def _target_of(
    targets: _Samples, target: Tensor, channels: int, config: Any, spec: PassSpec
) -> Callable[[int, int, int, _Scratch], Any]:
    """Return what gives the kernels the target of a part of a sample: whole numbers of any dtype as one."""
    kernels = _kernels()
    table, known = np.array(spec.regions, np.int32), len(spec.regions) or channels

    def labels_of(item: int, start: int, stop: int, scratch: _Scratch) -> Any:
        of_map = targets[item], start, stop - start, known
        kernels.read_labels(*of_map, config.ignores, config.ignore_index, scratch.target)
        if config.regions:
            kernels.look_up(stop - start, table, scratch.target)
        return scratch.target, kernels.Lines(-start, 0, 1, kernels.NATIVE)

    def values_of(item: int, start: int, stop: int, scratch: _Scratch) -> Any:
        width = len(scratch.target) // channels
        kernels.read_channels(targets[item], start, stop - start, channels, width, scratch.target)
        return scratch.target, kernels.Lines(-start, width, 1, kernels.NATIVE)

    if config.is_map:
        return labels_of
    return (lambda item, start, stop, scratch: targets[item]) if target.is_floating_point() else values_of


def _part(voxels: int, channels: int, cells: int) -> int:
    """Voxels of a sample that are summed by themselves.

    More of few channels, as threads wait for the interpreter from part to part, unless few parts were left; and
    of many cells, of which each part has sums. It is the same for any number of threads and samples, so that the
    result is, too.
    """
    part = PART * max(1, min(4, 8 // channels, voxels // (8 * PART)))
    sums = 8 * len(TERMS) * channels * cells  # bytes
    return max(part, -(-voxels * sums // LARGEST_SUMS)) if cells else part


def _in_parallel(walk: Walk, voxels: int, input: Tensor, target: Tensor, spec: PassSpec) -> None:
    """Call `walk(item, part, start, stop, scratch)` for all voxels, by as many threads as torch has."""
    items, channels, *_ = input.shape
    part = _part(voxels, channels, spec.cells)
    parts = [(item, start) for item in range(items) for start in range(0, voxels, part)]
    todo = iter(parts)

    def take() -> None:
        scratch = _scratch(input, target, part, spec)
        for item, start in todo:
            walk(item, start // part, start, min(voxels, start + part), scratch)

    helpers = min(torch.get_num_threads(), len(parts)) - 1
    helping: list[Future[None]] = []
    with suppress(RuntimeError):  # the main thread has ended, or there are no more threads: fewer do all the work
        helping.extend(_pool(torch.get_num_threads()).submit(take) for _ in range(helpers))
    take()
    for helper in helping:
        helper.result()


# Python's threads and not Numba's: the kernels let the interpreter go on, so these are as parallel; they follow
# torch.set_num_threads, several of them may run passes at once, and a forked process starts its own.
@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="voxloss")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


@cache
def _kernels() -> Any:
    from voxloss.backends import numba_kernels

    return numba_kernels


def _scratch(input: Tensor, target: Tensor, part: int, spec: PassSpec) -> _Scratch:
    """Memory for one thread: blocks of logits, of exponentials and of a target; rows; labels."""
    precision = _precision(input)
    blocks = tuple(np.empty((tensor.shape[1], WIDTH), precision) for tensor in (input, input, target))
    rows = np.empty((_kernels().ROWS, WIDTH), precision)
    return _Scratch(
        _part_of(target, input, part, spec),
        np.empty(part if spec.cells else 0, np.int32),
        np.zeros(spec.cells + 2, np.int64),
        (blocks, rows, np.empty((2, WIDTH), np.int32)),
    )


def _in_order(numbers: Tensor, scratch: _Scratch) -> tuple[NDArray[Any], NDArray[Any]]:
    """The order to walk a part's voxels in, empty without a partition, and where each cell begins."""
    if len(scratch.order):
        _kernels().sort_by_cell(np.ascontiguousarray(numbers.numpy()), scratch.order, scratch.bounds)
    else:
        scratch.bounds[1] = len(numbers)
    return scratch.order, scratch.bounds


def _part_of(target: Tensor, input: Tensor, voxels: int, spec: PassSpec) -> NDArray[Any] | None:
    """Memory for the target of so many voxels; None where the kernels take it as it lies in memory."""
    if spec.is_label_map(input, target):
        return np.empty(voxels, np.int32)
    return None if target.is_floating_point() else np.empty(voxels * target.shape[1], _precision(input))


def _beside(given: Tensor | None, input: Tensor) -> Tensor:
    """A mask or map in a dtype that NumPy has; without one a number, which the kernels do not read."""
    if given is None:
        dtype = torch.promote_types(input.dtype, torch.float32)
        return torch.ones((), dtype=dtype).expand(len(input), 1, *input.shape[2:])
    return given.float() if given.dtype == torch.bfloat16 else given


def _numbers(partition: Tensor | None, input: Tensor) -> Tensor:
    """The cells, int32; without a partition a number, which the kernels do not read."""
    if partition is None:
        return torch.zeros((), dtype=torch.int32).expand(len(input), 1, *input.shape[2:])
    return partition.to(torch.int32)


def _config(input: Tensor, target: Tensor, spec: PassSpec, mask: Tensor | None) -> Any:
    return _kernels().KernelConfig(
        activation=("softmax", "sigmoid", "none").index(spec.activation),
        is_map=spec.is_label_map(input, target),
        regions=bool(spec.regions),
        sums=tuple(name in spec.sums for name in TERMS),
        gamma=float(spec.gamma),
        ignores=spec.ignore_index is not None,
        ignore_index=spec.ignore_index or 0,
        slack=range_tolerance(input.dtype),
        target_slack=range_tolerance(target.dtype),
        masked=mask is not None,
        weighted=mask is not None and mask.dtype != torch.bool,
        mapped=not set(spec.sums).isdisjoint(MAPPED),
        map_of_label=spec.map_of_label,
    )


def _precision(input: Tensor) -> type[np.floating[Any]]:
    return np.float64 if input.dtype == torch.float64 else np.float32


def _kind(dtype: torch.dtype) -> int:
    kernels = _kernels()
    return int({torch.float16: kernels.HALF, torch.bfloat16: kernels.BFLOAT16}.get(dtype, kernels.NATIVE))
