"""What the Triton kernels take of a GPU, by their compiler: registers, spills, shared memory. No GPU is needed.

    python -m voxloss_app.bench.gpu_resources           # NVIDIA H100 and H200, sm_90
    python -m voxloss_app.bench.gpu_resources gfx942    # AMD MI300

A kernel that spills keeps values in memory for which there were not registers enough, and so reads and writes
more than the volume: that must not be. The launches are voxloss's own, over volumes that are never allocated.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from voxloss.backends import triton_gpu
from voxloss.backends.triton_gpu import Launch
from voxloss.backends.voxels import NEGATIVE, TERMS, PassSpec

DICE = ("intersection", "prediction", "target")
SOFT = ("soft_intersection", "prediction", "target")
FOCAL = ("focal", "focal_negative")
EVERYTHING = tuple(TERMS)
EVERYTHING_OF_SOFTMAX = tuple(name for name in TERMS if name not in NEGATIVE)


class KernelCase(NamedTuple):
    """A pass, and the tensors that it is made over."""

    name: str
    classes: int
    dtype: torch.dtype
    spec: PassSpec
    target: torch.dtype | None = None  # of one channel per class; None: a label map of bytes
    memory_format: torch.memory_format = torch.contiguous_format


CASES = [
    *(
        KernelCase(name, classes, dtype, PassSpec("softmax", DICE, None))
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float64", torch.float64))
        for classes in (2, 4, 14, 32, 64, 118, 256, 512, 600)
    ),
    KernelCase("channels last", 14, torch.float32, PassSpec("softmax", DICE, None), None, torch.channels_last_3d),
    KernelCase("Dice, ignore", 118, torch.float32, PassSpec("softmax", DICE, 255)),
    KernelCase("Dice, cross entropy", 14, torch.float32, PassSpec("softmax", (*DICE, "cross_entropy"), None)),
    KernelCase("Dice, cross entropy", 118, torch.float32, PassSpec("softmax", (*DICE, "cross_entropy"), None)),
    KernelCase("Dice, focal 1.5", 118, torch.float32, PassSpec("softmax", (*DICE, "focal"), None, 1.5)),
    KernelCase("soft labels", 14, torch.float32, PassSpec("softmax", SOFT, None), torch.float32),
    KernelCase("soft labels", 118, torch.bfloat16, PassSpec("softmax", SOFT, None), torch.bfloat16),
    KernelCase("sigmoid, one-hot", 1, torch.float32, PassSpec("sigmoid", DICE, None), torch.uint8),
    KernelCase("sigmoid, one-hot", 3, torch.bfloat16, PassSpec("sigmoid", DICE, None), torch.float32),
    KernelCase(
        "sigmoid, Dice, focal 2", 3, torch.float32, PassSpec("sigmoid", (*DICE, *FOCAL), None), torch.float32
    ),
    KernelCase("sigmoid, focal 1.5", 14, torch.float32, PassSpec("sigmoid", FOCAL, None, 1.5), torch.float32),
    KernelCase("probabilities", 14, torch.float32, PassSpec("none", DICE, None), torch.float32),
    KernelCase("everything", 118, torch.float32, PassSpec("softmax", EVERYTHING_OF_SOFTMAX, 255, 1.5)),
    KernelCase("everything, sigmoid", 14, torch.float32, PassSpec("sigmoid", EVERYTHING, 0, 1.5), torch.float32),
    KernelCase(
        "everything, sigmoid", 118, torch.float64, PassSpec("sigmoid", EVERYTHING, 255, 1.5), torch.float64
    ),
]


class Resources(NamedTuple):
    """What one compiled kernel takes."""

    kernel: str
    case: str
    tile: str
    warps: int
    registers: int  # of a thread
    spills: int  # bytes on NVIDIA, registers on AMD
    shared: int  # bytes of a program


def launches(case: KernelCase, side: int = 128) -> Iterator[Launch]:
    """The launches of a case, forward and backward, over a volume without memory."""
    shape = (2, case.classes, side, side, side)
    input = torch.empty(shape, dtype=case.dtype, device="meta", memory_format=case.memory_format)
    channels = 1 if case.target is None else case.classes
    target = torch.empty((2, channels, *shape[2:]), dtype=case.target or torch.uint8, device="meta")
    grad = torch.empty((len(case.spec.sums), *shape[:2]), dtype=torch.float64, device="meta")
    yield triton_gpu.forward(input, target, case.spec)[0]
    yield triton_gpu.backward(grad, input, target, case.spec, "input")[0]
    if target.is_floating_point() and case.target is not None:
        yield triton_gpu.backward(grad, input, target, case.spec, "target")[0]


def resources(case: KernelCase, architecture: int | str = 90) -> list[Resources]:
    """Compile a case's kernels for an NVIDIA architecture (90) or one of AMD's ("gfx942"); read the report."""
    found = []
    for launch in launches(case):
        config = launch.arguments["CONFIG"]
        registers, spills, shared = _measured(*compiled(launch, architecture))
        name = launch.kernel.__name__ + (" by target" if config.by_target else "")
        described = f"{case.name}, C = {case.classes}"
        tile = f"{config.block_c} × {config.block_v}"
        found.append(Resources(name, described, tile, launch.options["num_warps"], registers, spills, shared))
    return found


def compiled(launch: Launch, architecture: int | str = 90) -> tuple[Any, str]:
    """Compile a launch's kernel as it would be launched, and return it with what ptxas said."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia = isinstance(architecture, int)
    target = GPUTarget("cuda", architecture, 32) if nvidia else GPUTarget("hip", architecture, 64)
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True  # a kernel out of the cache says nothing
        knobs.nvidia.dump_ptxas_log = True
        source = ASTSource(launch.kernel, *_specialised(launch))
        return triton.compile(source, target=target, options=launch.options), log.getvalue()


def _measured(kernel: Any, log: str) -> tuple[int, int, int]:
    if "amdgcn" in kernel.asm:
        report = kernel.asm["amdgcn"]
        registers = _numbers(r"\.vgpr_count:\s*(\d+)", report)
        spills = _numbers(r"\.[sv]gpr_spill_count:\s*(\d+)", report)
    else:
        registers = _numbers(r"Used (\d+) registers", log)
        spills = _numbers(r"(\d+) bytes spill (?:stores|loads)", log)
    return max(registers), max(spills), kernel.metadata.shared


def _numbers(pattern: str, text: str) -> list[int]:
    found = [int(number) for number in re.findall(pattern, text)]
    if not found:
        raise RuntimeError(f"the compiler's report has no {pattern!r}:\n{text[:2000]}")
    return found


def _specialised(launch: Launch) -> tuple[dict[str, str], dict[str, object], dict[tuple[int, ...], object]]:
    """Signature, constants and alignments, as Triton derives them from the arguments of a launch."""
    from triton.runtime.jit import mangle_type

    signature: dict[str, str] = {}
    constants: dict[str, object] = {}
    aligned: dict[tuple[int, ...], object] = {}
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if isinstance(value, (Tensor, int)) and not (isinstance(value, int) and value == 1):
            signature[name] = mangle_type(value)
            if isinstance(value, Tensor) or value % 16 == 0:
                aligned[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[name] = value
    return signature, constants, aligned


def main() -> int:
    """Print the table; return 1 if a kernel spills."""
    if triton_gpu.interpreted():
        print("TRITON_INTERPRET is set: nothing is compiled. Unset it.", file=sys.stderr)
        return 2
    architecture: int | str = sys.argv[1] if len(sys.argv) > 1 else 90
    columns = "{:<28}{:<38}{:>10}{:>7}{:>11}{:>8}{:>8}"
    print(columns.format("kernel", "case", "tile", "warps", "registers", "spills", "shared"))
    spilt = False
    for case in CASES:
        for line in resources(case, architecture):
            print(columns.format(*line), flush=True)
            spilt |= line.spills > 0
    return int(spilt)


if __name__ == "__main__":
    sys.exit(main())
