"""What the Triton kernels take of a GPU, as compiled: registers, spills, shared memory. No GPU is needed.

    python -m voxloss_app.bench.gpu_resources           # NVIDIA H100 and H200, sm_90
    python -m voxloss_app.bench.gpu_resources gfx942    # AMD MI300

A kernel that spills keeps values in memory for which there were not registers enough, and so reads and writes
more than the volume: that must not be. The launches are voxloss's own, over volumes that are never allocated.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from voxloss.backends import triton_gpu
from voxloss.backends.triton_gpu import Launch
from voxloss.backends.voxels import MAPPED, NEGATIVE, TERMS, PassSpec

DICE = ("intersection", "prediction", "target")
SOFT = ("soft_intersection", "prediction", "target")
FOCAL = ("focal", "focal_negative")
EVERYTHING = tuple(name for name in TERMS if name not in MAPPED)
EVERYTHING_OF_SOFTMAX = tuple(name for name in EVERYTHING if name not in NEGATIVE)


class KernelCase(NamedTuple):
    """A pass, and the tensors that it is made over."""

    name: str
    classes: int
    dtype: torch.dtype
    spec: PassSpec
    target: torch.dtype | None = None  # of one channel per class; None: a label map of bytes
    memory_format: torch.memory_format = torch.contiguous_format
    map: torch.dtype | None = None  # of the label, or of each class, according to `spec`


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
    *(
        KernelCase(
            "Dice, cross entropy, skeleton",
            classes,
            torch.float32,
            PassSpec("softmax", (*DICE, "cross_entropy", *MAPPED), None, map_of_label=True),
            map=torch.uint8,
        )
        for classes in (2, 14, 118)
    ),
    KernelCase(
        "Dice, distance",
        14,
        torch.float32,
        PassSpec("softmax", (*DICE, "map_intersection", "voxels"), None),
        map=torch.float32,
    ),
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
    programs: int | None = None  # that an SM runs at once
    in_flight: float | None = None  # KB that these have requested from memory before they wait for it
    instructions: float | None = None  # of the main loop, per element of the input


def launches(case: KernelCase, side: int = 128) -> Iterator[Launch]:
    """The launches of a case, forward and backward, over a volume without memory."""
    shape = (2, case.classes, side, side, side)
    input = torch.empty(shape, dtype=case.dtype, device="meta", memory_format=case.memory_format)
    channels = 1 if case.target is None else case.classes
    target = torch.empty((2, channels, *shape[2:]), dtype=case.target or torch.uint8, device="meta")
    grad = torch.empty((len(case.spec.sums), *shape[:2]), dtype=torch.float64, device="meta")
    of_map = (2, 1 if case.spec.map_of_label else case.classes, *shape[2:])
    own_map = None if case.map is None else torch.empty(of_map, dtype=case.map, device="meta")
    yield triton_gpu.forward(input, target, case.spec, map=own_map)[0]
    yield triton_gpu.backward(grad, input, target, case.spec, "input", map=own_map)[0]
    if target.is_floating_point() and case.target is not None:
        yield triton_gpu.backward(grad, input, target, case.spec, "target", map=own_map)[0]


def resources(case: KernelCase, architecture: int | str = 90) -> list[Resources]:
    """Compile a case's kernels for an NVIDIA architecture (90) or one of AMD's ("gfx942"); read the report."""
    return [resources_of(launch, f"{case.name}, C = {case.classes}", architecture) for launch in launches(case)]


def resources_of(launch: Launch, described: str, architecture: int | str = 90) -> Resources:
    """Compile the kernel of a launch, and read what it takes."""
    config, warps = launch.arguments["CONFIG"], launch.options["num_warps"]
    kernel = compiled(launch, architecture)
    registers, spills, shared = measured(kernel)
    name = launch.kernel.__name__ + (" by target" if config.by_target else "")
    found = Resources(name, described, f"{config.block_c} × {config.block_v}", warps, registers, spills, shared)
    if "cubin" not in kernel.asm:
        return found
    loop = main_loop(_cuobjdump("-sass", kernel.asm["cubin"]))
    programs = programs_of_an_sm(registers, shared, warps)
    loaded = 32 * warps * bytes_before_a_wait(loop)
    elements = config.block_v * (config.classes if config.whole else config.block_c)
    return found._replace(
        programs=programs,
        in_flight=round(programs * loaded / 1024, 1),
        instructions=round(len(loop) * 32 * warps / elements, 1),
    )


def programs_of_an_sm(registers: int, shared: int, warps: int) -> int:
    """How many programs an SM of sm_90 has room for: 64 K registers, 227 KB, 2048 threads, 32 programs."""
    of_a_warp = -(-registers * 32 // 256) * 256  # registers are given out in units of 256 to a warp
    return min(65536 // (of_a_warp * warps), 227 * 1024 // (shared + 1024), 64 // warps, 32)


def main_loop(sass: str) -> list[str]:
    """The instructions of the longest loop that has no other within it and loads something."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    places = [int(address, 16) for address, _ in found]
    code = [instruction.strip() for _, instruction in found]
    loops = []
    for place, instruction in zip(places, code, strict=True):
        back = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", instruction)
        if back and int(back[1], 16) < place:
            loops.append((int(back[1], 16), place))
    inner = [
        [line for at, line in zip(places, code, strict=True) if first <= at <= last]
        for first, last in loops
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
    ]
    return max((loop for loop in inner if any("LDG" in line for line in loop)), key=len)


def bytes_before_a_wait(loop: list[str]) -> int:
    """The most bytes that a thread has requested and not yet used, somewhere in a loop."""
    most = 0
    pending: dict[str, int] = {}  # by register, those of a load in one entry each, the first with its bytes
    for line in loop:
        line = re.sub(r"^@!?U?P\d+\s+", "", line)
        operation, _, operands = line.partition(" ")
        registers = re.findall(r"\bR(\d+)\b", operands)
        is_load = operation.startswith("LDG.")
        used = registers[1:] if is_load else registers
        if any(register in pending for register in used):
            # Loads return in order, or nearly: what was requested before has come.
            last = max(index for index, register in enumerate(pending) if register in used)
            pending = dict(list(pending.items())[last + 1 :])
        if is_load:
            width, first = _width(line), int(registers[0])
            pending |= {str(first + n): 0 for n in range(1, -(-width // 4))}
            pending[str(first)] = width
        most = max(most, sum(pending.values()))
    return most


def _width(load: str) -> int:
    operation = load.split(" ", 2)[1 if load.startswith("@") else 0]
    for width, ending in ((16, ".128"), (8, ".64"), (2, "16"), (1, "8")):
        if re.search(rf"(?<=\.)[US]?{ending.lstrip('.')}(?=\.|$)", operation):
            return width
    return 4


def compiled(launch: Launch, architecture: int | str = 90) -> Any:
    """Compile a launch's kernel as it would be launched; no GPU is needed, and Triton's cache is used."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia = isinstance(architecture, int)
    target = GPUTarget("cuda", architecture, 32) if nvidia else GPUTarget("hip", architecture, 64)
    source = ASTSource(launch.kernel, *_specialised(launch))
    return triton.compile(source, target=target, options=launch.options)


def measured(kernel: Any) -> tuple[int, int, int]:
    """Registers of a thread, what it spills (bytes on NVIDIA, registers on AMD), shared bytes of a program."""
    if "amdgcn" in kernel.asm:
        report = kernel.asm["amdgcn"]
        registers = _numbers(r"\.vgpr_count:\s*(\d+)", report)
        spills = _numbers(r"\.[sv]gpr_spill_count:\s*(\d+)", report)
    else:
        report = _cuobjdump("-res-usage", kernel.asm["cubin"])
        registers = _numbers(r"REG:(\d+)", report)
        spills = _numbers(r"STACK:(\d+)", report)  # nothing else is kept there
    return max(registers), max(spills), kernel.metadata.shared


def _cuobjdump(option: str, cubin: bytes) -> str:
    """What NVIDIA's tool, which is in Triton's wheel, reports about a compiled kernel."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run([program, option, file], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option} failed: {done.stderr}")
    return done.stdout


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
        as_it_is = launch.kernel.params[position].do_not_specialize
        if isinstance(value, (Tensor, int)) and (as_it_is or not (isinstance(value, int) and value == 1)):
            signature[name] = mangle_type(value)
            if isinstance(value, Tensor) or (value % 16 == 0 and not as_it_is):
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
    columns = "{:<28}{:<38}{:>10}{:>7}{:>11}{:>8}{:>8}{!s:>10}{!s:>14}{!s:>14}"
    print(columns.format(*Resources._fields[:-3], "programs", "KB in flight", "instructions"))
    spilt = False
    for case in CASES:
        for line in resources(case, architecture):
            print(columns.format(*line), flush=True)
            spilt |= line.spills > 0
    return int(spilt)


if __name__ == "__main__":
    sys.exit(main())
