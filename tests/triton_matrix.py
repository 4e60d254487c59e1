"""Compile the GPU kernels ahead of time with the oldest and the newest Triton; no GPU is needed.

    python tests/triton_matrix.py                     # every pair of options, and the whole of what once failed
    python tests/triton_matrix.py --cases thorough    # and 500 random combinations
    python tests/triton_matrix.py --cases all --part 1/8 --triton 3.6.0

Every kernel has to compile for sm_90, fit on it and spill no registers. Each Triton is installed by pip into a
folder of its own in the user's cache, where the next run finds it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from allpairspy import AllPairs
from platformdirs import user_cache_path

from voxloss.backends import triton_gpu
from voxloss.backends.voxels import MAPPED, NEGATIVE, TERMS, PassSpec
from voxloss_app.bench.gpu_resources import compiled, measured

# torch 2.8, the oldest that voxloss supports, brings Triton 3.4.0; for Python 3.14 torch 2.9 and Triton 3.5.0.
OLDEST = "3.4.0" if sys.version_info < (3, 14) else "3.5.0"
NEWEST = "3.9.0"

# What a program may have of an SM, of registers and of bytes without a request for more.
REGISTERS, SHARED = 1 << 16, 48 << 10

DICE = ("intersection", "prediction", "target")
EVERYTHING = tuple(name for name in TERMS if name not in MAPPED)
# Activation, sums, gamma, and whether the target has one channel per class.
LOSSES: dict[str, tuple[str, tuple[str, ...], float, bool]] = {
    "Dice": ("softmax", DICE, 2.0, False),
    "DiceCE": ("softmax", (*DICE, "cross_entropy"), 2.0, False),
    "focal 1.5": ("softmax", (*DICE, "focal"), 1.5, False),
    "soft labels": ("softmax", ("soft_intersection", "prediction", "target"), 2.0, True),
    "sigmoid": ("sigmoid", (*DICE, "focal", "focal_negative"), 2.0, True),
    "sigmoid, labels": ("sigmoid", (*DICE, "cross_entropy", "cross_entropy_negative"), 2.0, False),
    "probabilities": ("none", (*DICE, "cross_entropy"), 2.0, False),
    "everything": ("softmax", tuple(name for name in EVERYTHING if name not in NEGATIVE), 1.5, True),
    "everything, sigmoid": ("sigmoid", EVERYTHING, 1.5, True),
}
WHOLE = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
OPTIONS: dict[str, Sequence[object]] = {
    "classes": (14, 2, 5, 17, 118, 600),
    "target": (*WHOLE, "float16", "bfloat16", "float32", "float64"),
    "ignore": (None, -1, 255),
    "input": ("float32", "bfloat16", "float16", "float64"),
    "mask": (None, "bool", "float32"),
    "map": (None, "bool of the label", "float32 of each channel"),
    "cells": (0, 7),
    "layout": ("contiguous", "channels last", "transposed"),
    "loss": tuple(LOSSES),
    "pass": ("forward", "backward by the input", "backward by the target"),
}
Case = dict[str, object]


def cases(choice: str) -> Iterator[Case]:
    """Every combination of options, or the whole of what once failed, every pair, and perhaps random ones."""
    values = list(OPTIONS.values())
    rows = product(*values) if choice == "all" else _selected(values, 500 if choice == "thorough" else 0)
    return (dict(zip(OPTIONS, row, strict=True)) for row in rows)


def _selected(values: list[Sequence[object]], random_ones: int) -> Iterator[Sequence[object]]:
    # Of few classes, as tiles and as vectors.
    for (classes, layout), target, ignore in product(((5, "channels last"), (2, "contiguous")), WHOLE, (-1, 255)):
        yield [classes, target, ignore, "float32", None, None, 0, layout, "Dice", "forward"]
    yield from AllPairs(values)
    chance = random.Random(0)
    for _ in range(random_ones):
        yield [chance.choice(choices) for choices in values]


def laid_out(channels: int, dtype: str, layout: str) -> torch.Tensor:
    """A volume without memory."""
    shape = (2, channels, 64, 64, 64)
    tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    if layout == "channels last":
        return tensor.contiguous(memory_format=torch.channels_last_3d)
    return tensor.transpose(2, 4) if layout == "transposed" else tensor


def launch_of(case: Case) -> triton_gpu.Launch:
    """The launch of a case; by the input, where the target has no gradient."""
    classes, layout, ignore = int(str(case["classes"])), str(case["layout"]), case["ignore"]
    activation, sums, gamma, one_hot = LOSSES[str(case["loss"])]
    dtype, _, kind = str(case["map"] or "").partition(" ")
    of_label = kind == "of the label" and not one_hot
    sums = (*sums, *MAPPED) if kind else sums
    # Of all sums at once, by cell and in float64, Triton 3.4 spills 16 bytes.
    is_all = str(case["loss"]).startswith("everything") and case["input"] == "float64"
    cells = 0 if classes > triton_gpu.LARGEST_TILE or is_all else int(str(case["cells"]))
    spec = PassSpec(activation, sums, None if ignore is None else int(str(ignore)), gamma, (), of_label, cells)
    input = laid_out(classes, str(case["input"]), layout)
    own_map = laid_out(1 if of_label else classes, dtype, layout) if kind else None
    partition = laid_out(1, "int64", layout) if cells else None
    mask = None if case["mask"] is None else laid_out(1, str(case["mask"]), layout)
    maps: dict[str, Any] = {"mask": mask, "map": own_map, "partition": partition}
    target = laid_out(classes if one_hot else 1, str(case["target"]), layout)
    if case["pass"] == "forward":
        return triton_gpu.forward(input, target, spec, **maps)[0]
    grad = torch.empty((len(sums), 2 * max(1, cells), classes), dtype=torch.float64, device="meta")
    by_target = case["pass"] == "backward by the target" and one_hot and target.is_floating_point()
    wrt = "target" if by_target else "input"
    return triton_gpu.backward(grad, input, target, spec, wrt, **maps)[0]


def compile_all(chosen: Iterable[Case]) -> int:
    """Compile with the Triton that Python finds; print each failure and, at the end, the counts as JSON."""
    import triton

    kernels = failures = 0
    for case in chosen:
        kernels += 1
        try:
            launch = launch_of(case)
            registers, spills, shared = measured(compiled(launch))
        except Exception as error:  # whatever a compiler raises
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            problem = f"spills {spills} bytes" if spills else ""
            if registers * 32 * launch.options["num_warps"] > REGISTERS or shared > SHARED:
                problem += f"{registers} registers of a thread and {shared} bytes do not fit"
        if problem:
            failures += 1
            print(f"{case}: {problem}", flush=True)
    used = os.times()
    seconds = round(used.user + used.system + used.children_user + used.children_system)
    report = {"triton": triton.__version__, "kernels": kernels, "failures": failures, "CPU seconds": seconds}
    print(json.dumps(report))
    return failures


def unsupported() -> str:
    """Why Triton's wheels cannot be had for this machine; empty if they can."""
    machine = f"{platform.system()} {platform.machine()}"
    return "" if machine == "Linux x86_64" else f"Triton's wheels are for Linux x86_64, this is {machine}"


def environment(version: str) -> Path:
    """The folder with this version of Triton and nothing else; installed if it is not there yet."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folder = user_cache_path("voxloss") / "triton" / f"{version}-{python}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # It gets its name when it is complete, so that an interrupted installation is not taken for one.
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
        try:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
            done = subprocess.run(
                [*pip, "--target", unfinished, f"triton=={version}"], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"pip cannot install triton=={version}:\n{done.stdout}{done.stderr}")
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.is_dir():  # another process was faster
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def run_with(version: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run Python with this version of Triton in place of the one that is installed; its cache is thrown away."""
    path = os.pathsep.join([str(environment(version)), *(entry for entry in sys.path if entry)])
    with tempfile.TemporaryDirectory() as cache:
        others = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run(
            [sys.executable, *command],
            env={**others, "PYTHONPATH": path, "TRITON_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the compiler's dumps; what matters is in the exception
            text=True,
            check=False,
        )


def main() -> int:
    """The command; returns 1 if a case fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=("pairs", "thorough", "all"), default="pairs", help="which")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every N-th case, from the I-th on")
    parser.add_argument(
        "--triton", nargs="*", default=[OLDEST, NEWEST], metavar="VERSION", help="versions to test"
    )
    parser.add_argument("--here", action="store_true", help="test the Triton that is installed beside voxloss")
    arguments = parser.parse_args()
    if arguments.here:
        first, step = map(int, arguments.part.split("/"))
        return int(compile_all(islice(cases(arguments.cases), first - 1, None, step)) > 0)
    if unsupported():
        print(unsupported(), file=sys.stderr)
        return 2
    failed = 0
    for version in arguments.triton:
        done = run_with(version, [__file__, "--here", "--cases", arguments.cases, "--part", arguments.part])
        print(done.stdout, end="", flush=True)
        failed |= done.returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
