"""`voxloss doctor`: which backends run on this machine, whether they are right, and which one an input gets."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from voxloss.backends import BACKENDS, ENVIRONMENT_VARIABLE, list_backends, select
from voxloss.backends.voxels import Pass
from voxloss_verify.tolerances import GRADIENT, LOSS

PACKAGES = ("voxloss", "torch", "monai", "numba", "triton", "nibabel")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Finding(NamedTuple):
    """What there is to say of a backend."""

    backend: str
    works: bool | None  # None: it cannot run here
    told: str


class Choice(NamedTuple):
    """What a loss will do with an input."""

    device: str
    dtype: str
    backend: str | None  # None: it is refused
    reason: str


def findings() -> list[Finding]:
    """Run each backend that can run here on a small volume, and compare it with the reference."""
    return [
        Finding(info.name, *_tried(info.name)) if info.available else Finding(info.name, None, info.reason)
        for info in list_backends()
    ]


def _tried(name: str) -> tuple[bool, str]:
    chance = torch.Generator().manual_seed(0)
    device = "cuda" if not BACKENDS[name].takes("cpu", torch.float32)[0] else "cpu"
    x = torch.randn(2, 3, 12, 13, 14, generator=chance)
    labels = torch.randint(3, (2, 1, 12, 13, 14), generator=chance)
    grad = torch.rand(3, 2, 3, dtype=torch.float64, generator=chance)
    job = Pass("softmax", ["intersection", "prediction", "target"], None)
    exact = BACKENDS["reference"].region_sums(x, labels, job)[0]
    slope = BACKENDS["reference"].region_sums_backward(grad, x, labels, job, "input")
    try:
        x, labels, grad = x.to(device), labels.to(device), grad.to(device)
        sums = BACKENDS[name].region_sums(x, labels, job)[0].cpu()
        got = BACKENDS[name].region_sums_backward(grad, x, labels, job, "input").cpu()
    except Exception as error:  # whatever it is, it is what the person has to see
        return False, f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    off = float(((sums - exact).abs() / exact).max()), float((got - slope).abs().max() / slope.abs().max())
    if not (off[0] <= LOSS["float32"] and off[1] <= GRADIENT["float32"]):
        return False, f"wrong: sums are off by {off[0]:.1e}, gradients by {off[1]:.1e} of their size"
    return True, f"equals the reference on {device}; {BACKENDS[name].available()[1]}"


def choice(device: str, dtype: str) -> Choice:
    """What `select` answers for an input of this dtype on this type of device."""
    try:
        return Choice(device, dtype, *select(None, device, DTYPES[dtype]))
    except ValueError as error:
        return Choice(device, dtype, None, str(error))


def show_doctor(device: str | None, dtype: str | None) -> int:
    """Print what was found; return 1 if a backend is wrong or an input would be refused."""
    console = Console(highlight=False)
    console.print(_versions())
    found = findings()
    table = Table("backend", "runs", "", box=None, pad_edge=False)
    for finding in found:
        words = {True: "[green]yes[/]", False: "[bold red]no[/]", None: "[dim]no[/]"}
        table.add_row(finding.backend, words[finding.works], escape(finding.told))
    console.print()
    console.print(table)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if _has_mps() else [])]
    made = [choice(on, of) for on in ([device] if device else devices) for of in ([dtype] if dtype else DTYPES)]
    table = Table("device", "input", "backend", "because", box=None, pad_edge=False)
    for given in made:
        table.add_row(given.device, given.dtype, given.backend or "[bold red]refused[/]", escape(given.reason))
    console.print()
    console.print(table)
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    console.print(
        f"\n{ENVIRONMENT_VARIABLE}={named}"
        if named
        else f"\n{ENVIRONMENT_VARIABLE} is not set; it or backend= names one."
    )
    failed = any(finding.works is False for finding in found) or any(given.backend is None for given in made)
    return int(failed)


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _versions() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    python = f"Python {sys.version.split()[0]} on {platform.system()} {platform.machine()}"
    return f"{', '.join(map(_installed, PACKAGES))}\n{python}, {torch.get_num_threads()} threads, {gpu}"


def _installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"
