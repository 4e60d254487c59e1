"""One fused pass over the volume on a GPU, written in Triton; the kernels are in `triton_kernels`.

Forward reads the input once, backward reads it once and writes the gradient once. Nothing is copied to the host
and nothing waits for the device; the sums are added up in a fixed order, so that they have the same bits in every
run. With TRITON_INTERPRET=1 in the environment Triton runs the kernels on the CPU, for checking.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from voxloss.backends.layout import flatten_spatial
from voxloss.backends.voxels import (
    NEGATIVE,
    POSITIVE,
    SMALLEST_LOGARITHM,
    PassSpec,
    range_tolerance,
    without_differences,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_TILE = 512  # classes; beyond, a tile has not all classes of a voxel
LANES = 32  # of a warp; on AMD 64, where a thread then has half as much to do


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

    classes: int  # in a tile
    voxels: int  # in a tile
    tiles: int  # in a program
    warps: int  # of a program
    whole: bool  # a tile has all classes of its voxels


def tiling(
    classes: int, voxels: int, dtype: torch.dtype, sums: int, largest: int = LARGEST_TILE, crowded: bool = False
) -> Tiling:
    """Choose tiles so that a thread has few values to keep, and finds those of a voxel with itself.

    A thread takes up to 16 classes of its voxels (fewer in float64, or where the totals of many sums fill its
    registers, or where it is `crowded` by a mask beside voxels that do not lie next to each other), so up to that
    many the softmax never leaves the thread; more are shared out among warps, which then exchange two numbers per
    voxel. Where there are fewer it takes several voxels.
    Programs are small, so that some compute while others wait for memory: one warp where there is nothing to
    exchange, and fewer voxels where there would be more than four, as long as 64 bytes of a class are read at
    once; more than eight have too few registers each. All this depends on the problem alone, not on the device,
    and so does the order of the summation.
    """
    block = 1 << (classes - 1).bit_length()
    whole = block <= largest
    block = block if whole else min(largest, 16)
    values = 16 if sums <= 4 else 8 if sums <= 8 else 4 if sums <= 10 else 2
    values = max(1, values * 4 // max(4, dtype.itemsize) // (2 if crowded else 1))
    rows = min(block, values)
    line = LANES * (values // rows)
    warps = block // rows
    while warps > 16 or (warps > 8 and line > 16) or (warps > 4 and line * dtype.itemsize > 64):
        warps, line = warps // 2, line // 2
    tiles = 1 << (-(-voxels // line) - 1).bit_length()
    return Tiling(block, line, min(tiles, 16) if whole else 1, warps, whole)


class Launch(NamedTuple):
    """A kernel and what it is started with."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    def start(self) -> None:
        """Start it on the device of its tensors; do not wait for it."""
        with torch.cuda.device(self.arguments["input"].get_device()):
            self.kernel[(self.programs,)](**self.arguments, **self.options)


def region_sums(
    input: Tensor, target: Tensor, spec: PassSpec, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sums `[K, B, C]` and whether every voxel was valid.

    Float32 for a few voxels (float64 for float64 input), float64 from program to program.
    """
    launch, partial, valid = forward(input, target, spec, mask=mask)
    launch.start()
    return partial.sum(0, dtype=torch.float64), valid


def region_sums_backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    spec: PassSpec,
    wrt: str,
    mask: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """∂L/∂input or ∂L/∂target (`wrt`) in that tensor's dtype and layout; p is computed again."""
    launch, result, written = backward(grad, input, target, spec, wrt, mask=mask, out=out)
    launch.start()
    return result if written is result else result.copy_(written)


def forward(
    input: Tensor, target: Tensor, spec: PassSpec, largest: int = LARGEST_TILE, mask: Tensor | None = None
) -> tuple[Launch, Tensor, Tensor]:
    """Prepare the forward pass: its launch, the partial sums `[programs, K, B, C]` and the verdict it writes."""
    from voxloss.backends import triton_kernels

    lines = flatten_spatial([input, target, *([] if mask is None else [mask])])
    _, classes, voxels = lines[0].shape
    crowded = mask is not None and lines[0].stride(2) != 1
    tiles = tiling(classes, voxels, input.dtype, len(spec.sums), largest, crowded)
    chunks = -(-voxels // (tiles.voxels * tiles.tiles))
    partial = torch.empty(
        (chunks, len(spec.sums), *input.shape[:2]),
        dtype=torch.promote_types(input.dtype, torch.float32),
        device=input.device,
    )
    valid = torch.ones((), dtype=torch.bool, device=input.device)
    kernel = triton_kernels.sums if tiles.whole else triton_kernels.sums_of_many
    outputs = {"partial": partial, "valid": valid.view(torch.uint8)}
    return _launch(kernel, input, target, spec, tiles, chunks, lines, outputs), partial, valid


def backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    spec: PassSpec,
    wrt: str,
    largest: int = LARGEST_TILE,
    mask: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Launch, Tensor, Tensor]:
    """Prepare the backward pass: its launch, the gradient, and the tensor that the kernel writes.

    That is another one only where the gradient's voxels have no common stride; it is then to be copied.
    """
    from voxloss.backends import triton_kernels

    grad, spec = without_differences(grad, spec)
    own = input if wrt == "input" else target
    result = written = torch.empty_like(own) if out is None else out
    volumes = [input, target, *([] if mask is None else [mask])]
    lines = flatten_spatial([written, *volumes])
    if lines[0].untyped_storage().data_ptr() != written.untyped_storage().data_ptr():
        written = torch.empty_like(own, memory_format=torch.contiguous_format)
        lines = flatten_spatial([written, *volumes])
    _, classes, voxels = lines[0].shape
    tiles = tiling(classes, voxels, input.dtype, len(spec.sums), largest)
    chunks = -(-voxels // (tiles.voxels * tiles.tiles))
    kernel = triton_kernels.gradient if tiles.whole else triton_kernels.gradient_of_many
    outputs = {"weights": grad.contiguous(), "result": lines[0]}
    launch = _launch(kernel, input, target, spec, tiles, chunks, lines[1:], outputs, wrt == "target")
    strides = dict(zip(("result_b", "result_c", "result_v"), lines[0].stride(), strict=True))
    return launch._replace(arguments={**launch.arguments, **strides}), result, written


def _launch(
    kernel: Any,
    input: Tensor,
    target: Tensor,
    spec: PassSpec,
    tiles: Tiling,
    chunks: int,
    lines: list[Tensor],
    outputs: dict[str, Tensor],
    by_target: bool = False,
) -> Launch:
    from triton import language

    from voxloss.backends.triton_kernels import KernelConfig

    items, channels, count = lines[0].shape
    labels = target.shape[1] != channels
    ignore = "no"
    if spec.ignore_index is not None:
        is_channel = channels > 1 and 0 <= spec.ignore_index < channels
        ignore = "label" if labels else "channel" if is_channel else "sentinel"
    config = KernelConfig(
        activation=spec.activation,
        sums=tuple(spec.sums),
        gamma=float(spec.gamma),
        chord=SMALLEST_LOGARITHM ** (float(spec.gamma) - 1),
        labels=labels,
        ignore=ignore,
        index=spec.ignore_index or 0,
        weighted=len(lines) == 3,
        classes=channels,
        log_p=any(name in POSITIVE for name in spec.sums),
        log_n=any(name in NEGATIVE for name in spec.sums),
        kink="soft_intersection" in spec.sums,
        p_slack=range_tolerance(input.dtype),
        g_slack=range_tolerance(target.dtype),
        by_target=by_target,
        real=language.float64 if input.dtype == torch.float64 else language.float32,
        block_c=tiles.classes,
        block_v=tiles.voxels,
        tiles=tiles.tiles,
        side_by_side=lines[0].stride(2) == 1,
    )
    a, b, *masks = (line.view(torch.uint8) if line.dtype == torch.bool else line for line in lines)
    c = masks[0] if masks else b  # which nothing reads
    arguments = {
        "input": a,
        "target": b,
        "mask": c,
        **outputs,
        "items": items,
        "chunks": chunks,
        "count": count,
        **dict(zip(("input_b", "input_c", "input_v"), a.stride(), strict=True)),
        **dict(zip(("target_b", "target_c", "target_v"), b.stride(), strict=True)),
        **dict(zip(("mask_b", "mask_v"), c.stride()[::2], strict=True)),
        "CONFIG": config,
    }
    # A product and a sum may be rounded once: faster, and no less exact.
    options = {"num_warps": tiles.warps, "num_stages": 1, "enable_fp_fusion": True}
    return Launch(kernel, items * chunks, arguments, options)
