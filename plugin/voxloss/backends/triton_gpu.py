"""One fused pass over the volume on a GPU, written in Triton; the kernels are in `triton_kernels`.

Forward reads the input once, backward reads it once and writes the gradient once. Nothing is copied to the host
and nothing waits for the device; the sums are added up in a fixed order, so that they have the same bits in every
run. With TRITON_INTERPRET=1 in the environment Triton runs the kernels on the CPU, for checking.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from voxloss.backends import eager
from voxloss.backends.layout import flatten_spatial
from voxloss.backends.voxels import (
    MAPPED,
    NEGATIVE,
    POSITIVE,
    SMALLEST_LOGARITHM,
    PassSpec,
    range_tolerance,
    without_differences,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_TILE = 512  # classes; beyond, a tile has not all classes of a voxel
FEW = 16  # classes, up to which each has a vector of its own
POWERS = ("focal", "focal_negative", "log_power", "log_power_negative")
LANES = 32  # of a warp; on AMD 64, where a thread then has half as much to do
# Of all programs: all run at once on a large GPU. A constant, as the order of summation depends on it.
WARPS = 2048
LARGEST_SUMS = 1 << 26  # bytes of all programs' sums of cells
LONGEST_CHAIN = 16  # float32 additions one after the other


def available() -> tuple[bool, str]:
    """Whether this backend can run here, and on which device."""
    try:
        import triton
    except ImportError as error:
        return False, f"Triton cannot be imported: {error}"
    name = f"Triton {triton.__version__}"
    if interpreted():
        return True, f"{name}, interpreted on the CPU: for checking, very slow"
    if not torch.cuda.is_available():
        return False, f"{name} finds no CUDA or ROCm device"
    return True, f"{name} on {torch.cuda.get_device_name()}"


def takes(device: str, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether it can take such an input, and what it takes."""
    home = "cpu" if interpreted() else "cuda"  # torch calls ROCm's devices cuda as well
    return device == home and dtype in DTYPES, f"a floating-point input on {home!r}"


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU, in the place of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


class Tiling(NamedTuple):
    """How the volume is cut up."""

    form: str  # "few": a vector for each class; "whole": a tile has all classes; "many": some of them
    classes: int  # in a tile
    voxels: int  # in a tile
    warps: int  # of a program
    neighbours: int = 1  # voxels side by side that a thread takes, of whole tiles
    programs: int = WARPS  # at most, over all samples; of many classes as many as there are tiles


def tiling(
    classes: int,
    dtype: torch.dtype,
    sums: int,
    *,
    backward: bool = False,
    side_by_side: bool = True,
    weighted: bool = False,
    by_cell: bool = False,
    powers: bool = False,
    largest: int = LARGEST_TILE,
) -> Tiling:
    """Choose tiles so that a thread has few values to keep, and finds those of a voxel with itself.

    Up to 16 classes, of voxels that lie side by side in memory, a thread takes all classes of four voxels, which
    it can load at once; of two, where the totals or weights of each class and sum, or a mask beside them, leave
    it fewer registers.
    Not so `by_cell`, nor with `powers` that no multiplication makes: these take too many registers for one class
    after another.
    Otherwise a thread takes up to 16 classes of its voxels (fewer in float64, or where the totals of many sums
    fill its registers, or where there is a mask beside cells or beside voxels that lie apart); more are
    shared out among warps, which then exchange two numbers per voxel. Where there are fewer it takes several
    voxels, and in the backward pass, which keeps no totals, pairs of neighbours.
    Programs are small, so that some compute while others wait for memory: one warp where there is nothing to
    exchange, and fewer voxels where there would be more than four; with less to do for each byte there are more
    of them. All this depends on the problem alone, not on the device, and so does the order of the summation.
    Measured on an H200 by `voxloss doctor --gpu --stage 4`, but for the pairs of neighbours; loading the next
    tiles meanwhile, into shared memory, made whole tiles in float32 two to three times slower.
    """
    block = 1 << (classes - 1).bit_length()
    together = side_by_side and dtype.itemsize <= 4
    if classes <= min(FEW, largest) and classes * sums <= 64 and together and not (powers or by_cell):
        warps = 1 if classes > 4 else 2
        voxels = 4 if classes * sums <= (40 if weighted else 48) else 2
        at_once = WARPS if classes > 4 and not backward else 2 * WARPS
        return Tiling("few", classes, voxels * LANES * warps, warps, 1, at_once // warps)
    form = "whole" if block <= largest else "many"
    block = block if form == "whole" else min(largest, 16)
    values = 16 if sums <= 4 else 8 if sums <= 8 else 4 if sums <= 10 else 2
    # Triton 3.4 spills in float64 where there are many classes, or cells; 3.9 with two classes, cells and a mask.
    wide = dtype.itemsize == 8 and (form == "many" or by_cell)
    crowded = wide or (by_cell and weighted and block <= 2) or (not side_by_side and (weighted or block <= 8))
    values = max(1, values * 4 // max(4, dtype.itemsize) // (2 if crowded else 1))
    rows = min(block, values)
    line = LANES * (values // rows)
    warps = block // rows
    while warps > 16 or (warps > 8 and line > 16) or (warps > 4 and line * max(4, dtype.itemsize) > 64):
        warps, line = warps // 2, line // 2
    spare = sums <= 4 and not (powers or weighted or by_cell)  # registers
    pairs = backward and form == "whole" and classes > FEW and together and spare
    line, neighbours = (2 * line, 2) if pairs else (line, 1)
    return Tiling(form, block, line, warps, neighbours, max(1, WARPS // warps))


class Launch(NamedTuple):
    """A kernel and what it is started with."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    def start(self) -> None:
        """Start it on the device of its tensors; do not wait for it."""
        apart = _ONE_AT_A_TIME if interpreted() else nullcontext()
        with apart, torch.cuda.device(self.arguments["input"].get_device()):
            self.kernel[(self.programs,)](**self.arguments, **self.options)


# Triton's interpreter has one state for all threads.
_ONE_AT_A_TIME = Lock()


class _Plan(NamedTuple):
    """What a launch needs and what depends on its tensors' dtypes, shapes and strides alone."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]  # all but tensors
    options: dict[str, Any]
    rows: int  # of the partial sums
    views: bool  # one stride leads from voxel to voxel in every tensor: nothing has to be copied
    in_place: bool  # so it does in a result that is laid out like its tensor


Layout = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]


def region_sums(
    input: Tensor,
    target: Tensor,
    spec: PassSpec,
    mask: Tensor | None = None,
    map: Tensor | None = None,
    partition: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sums `[K, B, C]` and whether every voxel was valid.

    Float32 for a few voxels (float64 for float64 input), float64 from program to program.
    """
    if partition is not None and input.shape[1] > LARGEST_TILE:
        return eager.region_sums(input, target, spec, mask, map, partition)
    launch, partial, valid = forward(input, target, spec, mask=mask, map=map, partition=partition)
    launch.start()
    return partial.sum(0, dtype=torch.float64), valid


def voxel_terms(
    factors: Tensor, input: Tensor, target: Tensor, spec: PassSpec, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what each voxel adds to Σ factor·sum, `[B, 1, spatial...]`, and whether every voxel was valid."""
    launch, result, valid = each(factors, input, target, spec, mask=mask)
    launch.start()
    return result, valid


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
    if partition is not None and input.shape[1] > LARGEST_TILE:
        return eager.region_sums_backward(grad, input, target, spec, wrt, mask, out, map, partition)
    launch, result, written = backward(
        grad, input, target, spec, wrt, mask=mask, out=out, map=map, partition=partition
    )
    launch.start()
    return result if written is result else result.copy_(written)


def forward(
    input: Tensor,
    target: Tensor,
    spec: PassSpec,
    *,
    mask: Tensor | None = None,
    map: Tensor | None = None,
    partition: Tensor | None = None,
    tiles: Tiling | None = None,
) -> tuple[Launch, Tensor, Tensor]:
    """Prepare the forward pass: its launch, the partial sums `[rows, K, B, C]` and the verdict it writes."""
    volumes = {"input": input, "target": target, "mask": mask, "map": map, **_cells(partition)}
    plan = _planned(volumes, spec, "sums", tiles)
    valid = torch.ones((), dtype=torch.bool, device=input.device)
    if partition is not None:
        shape = plan.rows, len(spec.sums), len(input) * spec.cells, input.shape[1]
        partial = torch.zeros(shape, dtype=torch.float64, device=input.device)
        arguments = {**_pointers(volumes, plan), "partial": partial, "valid": valid.view(torch.uint8)}
        return Launch(plan.kernel, plan.programs, {**arguments, **plan.arguments}, plan.options), partial, valid
    partial = torch.empty(
        (plan.rows, len(spec.sums), *input.shape[:2]),
        dtype=torch.float64
        if plan.arguments["CONFIG"].whole
        else torch.promote_types(input.dtype, torch.float32),
        device=input.device,
    )
    arguments = {**_pointers(volumes, plan), "partial": partial, "valid": valid.view(torch.uint8)}
    return Launch(plan.kernel, plan.programs, {**arguments, **plan.arguments}, plan.options), partial, valid


def each(
    factors: Tensor,
    input: Tensor,
    target: Tensor,
    spec: PassSpec,
    *,
    mask: Tensor | None = None,
    tiles: Tiling | None = None,
) -> tuple[Launch, Tensor, Tensor]:
    """Prepare the pass that writes the terms of each voxel: its launch, the terms and the verdict it writes."""
    volumes = {"input": input, "target": target, "mask": mask}
    plan = _planned(volumes, spec, "terms", tiles)
    dtype = torch.promote_types(input.dtype, torch.float32)
    result = torch.empty((len(input), 1, *input.shape[2:]), dtype=dtype, device=input.device)
    valid = torch.ones((), dtype=torch.bool, device=input.device)
    given = {"weights": factors.contiguous(), "result": result, "valid": valid.view(torch.uint8)}
    arguments = {**_pointers(volumes, plan), **given, **plan.arguments}
    return Launch(plan.kernel, plan.programs, arguments, plan.options), result, valid


def backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    spec: PassSpec,
    wrt: str,
    *,
    mask: Tensor | None = None,
    map: Tensor | None = None,
    partition: Tensor | None = None,
    out: Tensor | None = None,
    tiles: Tiling | None = None,
) -> tuple[Launch, Tensor, Tensor]:
    """Prepare the backward pass: its launch, the gradient, and the tensor that the kernel writes.

    That is another one only where the gradient's voxels have no common stride; it is then to be copied.
    """
    grad, spec = without_differences(grad, spec)
    volumes = {"input": input, "target": target, "mask": mask, "map": map, **_cells(partition)}
    plan = _planned(volumes, spec, wrt, tiles, out)
    own = input if wrt == "input" else target
    result = written = torch.empty_like(own) if out is None else out
    if not plan.in_place:
        written = torch.empty_like(own, memory_format=torch.contiguous_format)
    arguments = {**_pointers(volumes, plan, written), "weights": grad.contiguous(), "result": written}
    launch = Launch(plan.kernel, plan.programs, {**arguments, **plan.arguments}, plan.options)
    return launch, result, written


def _cells(partition: Tensor | None) -> dict[str, Tensor | None]:
    return {} if partition is None else {"partition": partition}


def _pointers(
    volumes: Mapping[str, Tensor | None], plan: _Plan, written: Tensor | None = None
) -> dict[str, Tensor]:
    """The volumes as a kernel takes them. Strides are given to it, so that it needs no view."""
    lines = [volume for volume in volumes.values() if volume is not None]
    if not plan.views:
        lines = flatten_spatial(lines if written is None else [written, *lines])[-len(lines) :]
    given = iter([line.view(torch.uint8) if line.dtype == torch.bool else line for line in lines])
    # Nothing reads what stands in the place of a mask or map that is not there.
    return {name: lines[1] if volume is None else next(given) for name, volume in volumes.items()}


def _planned(
    volumes: Mapping[str, Tensor | None],
    spec: PassSpec,
    task: str,
    tiles: Tiling | None,
    out: Tensor | None = None,
) -> _Plan:
    address = 0
    for tensor in volumes.values():
        address |= 0 if tensor is None else tensor.data_ptr()
    return _plan(
        tuple(None if volume is None else _layout(volume) for volume in volumes.values()),
        None if out is None else _layout(out),
        spec._replace(sums=tuple(spec.sums), regions=tuple(spec.regions)),
        task,
        tiles,
        address % 16 == 0,
    )


@lru_cache(maxsize=256)
def _plan(
    layouts: tuple[Layout | None, ...],  # of what a launch reads, in the order of its arguments
    of_result: Layout | None,
    spec: PassSpec,
    task: str,
    tiles: Tiling | None,
    aligned: bool,
) -> _Plan:
    from triton import language

    from voxloss.backends import triton_kernels

    volumes = [_without_memory(layout) for layout in layouts if layout is not None]
    in_place = True
    written = []
    if task in ("input", "target"):
        own = volumes[0] if task == "input" else volumes[1]
        written = [torch.empty_like(own) if of_result is None else _without_memory(of_result)]
        in_place = _is_view(flatten_spatial(written)[0], written[0])
        if not in_place:
            written = [torch.empty_like(own, memory_format=torch.contiguous_format)]
    lines = flatten_spatial([*written, *volumes])
    views = all(map(_is_view, lines[len(written) :], volumes))
    found = iter(lines[len(written) :])
    input, target, mask, *maps = (None if layout is None else next(found) for layout in layouts)
    assert input is not None
    assert target is not None
    own_map = maps[0] if maps and not set(spec.sums).isdisjoint(MAPPED) else None
    by_cell = len(maps) == 2
    items, channels, count = input.shape
    labels = spec.is_label_map(input, target)
    side_by_side = all(line.stride(2) == 1 for line in lines)
    if tiles is None:
        tiles = tiling(
            channels,
            input.dtype,
            len(spec.sums),
            backward=bool(written),
            side_by_side=side_by_side,
            weighted=mask is not None or own_map is not None,
            by_cell=by_cell,
            powers=spec.gamma not in (0, 1, 2) and not set(POWERS).isdisjoint(spec.sums),
        )
    number = -(-count // tiles.voxels)  # of tiles
    chunks, share = number, 1
    if by_cell:
        most = LARGEST_SUMS // (8 * len(spec.sums) * items * spec.cells * channels) if not written else number
        chunks = max(1, min(number, tiles.programs // max(1, items), most))
        share = -(-number // chunks)
        chunks = -(-number // share)
    elif tiles.form != "many":
        # As many programs as run at once, or a multiple of that, so that they all end together.
        at_once = max(1, min(number, tiles.programs // max(1, items)))
        rounds = max(1, -(-number // (at_once * LONGEST_CHAIN)))
        share = max(1, -(-number // (at_once * rounds)))
        share += share > 1 and share % 2  # each number of tiles is compiled by itself
        chunks = -(-number // share)
    ignore = "no"
    if spec.ignore_index is not None:
        is_channel = channels > 1 and 0 <= spec.ignore_index < channels
        ignore = "label" if labels else "channel" if is_channel else "sentinel"
    config = triton_kernels.KernelConfig(
        activation=spec.activation,
        sums=tuple(spec.sums),
        gamma=float(spec.gamma),
        chord=SMALLEST_LOGARITHM ** (float(spec.gamma) - 1),
        labels=labels,
        regions=tuple(spec.regions),
        known=len(spec.regions) or channels,
        ignore=ignore,
        index=spec.ignore_index or 0,
        weighted=mask is not None,
        by_cell=by_cell,
        map="no" if own_map is None else "voxel" if spec.map_of_label else "channel",
        classes=channels,
        log_p=any(name in POSITIVE for name in spec.sums),
        log_n=any(name in NEGATIVE for name in spec.sums),
        kink="soft_intersection" in spec.sums,
        p_slack=range_tolerance(input.dtype),
        g_slack=range_tolerance(target.dtype),
        ranged=not labels or spec.activation == "none" or (own_map is not None and not spec.map_of_label),
        by_target=task == "target",
        real=language.float64 if input.dtype == torch.float64 else language.float32,
        # Those first whose derivative has no target in it: their sum is the same in every voxel.
        order=tuple(sorted(range(len(spec.sums)), key=lambda k: spec.sums[k] != "prediction")),
        even=count == chunks * share * tiles.voxels,
        few=tiles.form == "few",
        whole=tiles.form != "many",
        block_c=tiles.classes,
        block_v=tiles.voxels,
        tiles=share,
        lanes=LANES * tiles.warps,
        side_by_side=side_by_side,
        neighbours=tiles.neighbours,
        vectors=aligned and side_by_side and all(_has_even_strides(line) for line in lines),
    )
    arguments = {
        "items": items,
        "chunks": chunks,
        "count": count,
        **dict(zip(("input_b", "input_c", "input_v"), input.stride(), strict=True)),
        **dict(zip(("target_b", "target_c", "target_v"), target.stride(), strict=True)),
        **dict(zip(("mask_b", "mask_v"), (target if mask is None else mask).stride()[::2], strict=True)),
        "CONFIG": config,
    }
    if by_cell:
        assert maps[1] is not None
        arguments |= {
            "cells": spec.cells,
            **dict(zip(("partition_b", "partition_v"), maps[1].stride()[::2], strict=True)),
        }
    if maps:
        strides = (target if own_map is None else own_map).stride()
        arguments |= dict(zip(("map_b", "map_c", "map_v"), strides, strict=True))
    if written:
        arguments |= dict(zip(("result_b", "result_c", "result_v"), lines[0].stride(), strict=True))
    kernels = {
        "few": (triton_kernels.sums_of_few, triton_kernels.terms_of_few, triton_kernels.gradient_of_few),
        "whole": (triton_kernels.sums, triton_kernels.terms, triton_kernels.gradient),
        "many": (triton_kernels.sums_of_many, triton_kernels.terms_of_many, triton_kernels.gradient_of_many),
    }
    kernel = kernels[tiles.form][("sums", "terms").index(task) if not written else 2]
    if by_cell:
        kernel = triton_kernels.gradient_by_cell if written else triton_kernels.sums_by_cell
    # A product and a sum may be rounded once: faster, and no less exact.
    options = {"num_warps": tiles.warps, "num_stages": 1, "enable_fp_fusion": True}
    return _Plan(kernel, items * chunks, arguments, options, chunks, views, in_place)


def _layout(tensor: Tensor) -> Layout:
    return tensor.dtype, tensor.shape, tensor.stride()


def _without_memory(layout: Layout) -> Tensor:
    dtype, shape, strides = layout
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _is_view(line: Tensor, of: Tensor) -> bool:
    return bool(line.untyped_storage()._cdata == of.untyped_storage()._cdata)


def _has_even_strides(line: Tensor) -> bool:
    """Whether lines of an aligned tensor are aligned, as far as Triton looks."""
    return all(
        stride % 16 == 0 for stride, size in zip(line.stride()[:2], line.shape[:2], strict=True) if size > 1
    )
