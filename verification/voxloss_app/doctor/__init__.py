"""`voxloss doctor`: which backends run on this machine, whether they are right, and which one an input gets.

With --gpu it examines a GPU: `gpu` runs the `stages` one after the other, each by `job` in a process of its own:
`yardsticks`, `right`, `properties`, `kernels`, `steps`, `suite`. They take a `place`, which is the device with
its clocks, sizes, and `notes` to write into.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
from typing import NamedTuple

import torch
from rich.table import Table
from rich.text import Text

from voxloss.backends import BACKENDS, ENVIRONMENT_VARIABLE, list_backends, select
from voxloss.backends.voxels import PassSpec
from voxloss.head import FEWEST_LOGITS, FEWEST_VOXELS
from voxloss_app.exits import ExitCode, Refused
from voxloss_app.installed import named
from voxloss_app.terminal import results_console
from voxloss_verify.tolerances import GRADIENT, LOSS

_LOG = logging.getLogger(__name__)

PACKAGES = ("voxloss", "torch", "monai", "numba", "triton", "nibabel")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Finding(NamedTuple):
    """The results of a backend."""

    backend: str
    works: bool | None  # None: it cannot run here
    message: str


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
    spec = PassSpec("softmax", ["intersection", "prediction", "target"], None)
    exact = BACKENDS["reference"].region_sums(x, labels, spec)[0]
    derivative = BACKENDS["reference"].region_sums_backward(grad, x, labels, spec, "input")
    _LOG.info("trying %s on %s", name, device)
    try:
        x, labels, grad = x.to(device), labels.to(device), grad.to(device)
        sums = BACKENDS[name].region_sums(x, labels, spec)[0].cpu()
        received = BACKENDS[name].region_sums_backward(grad, x, labels, spec, "input").cpu()
    except Exception as error:  # whatever it is, it is what the person has to see
        return False, f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    off = (
        float(((sums - exact).abs() / exact).max()),
        float((received - derivative).abs().max() / derivative.abs().max()),
    )
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
    """Print what was found; return the exit code, that of a failure if a backend is wrong or an input refused.

    Raises Refused for a device that torch does not know.
    """
    devices = _devices(device)
    console = results_console()
    console.print(_versions())
    found = findings()
    table = Table("backend", "runs", "", box=None, pad_edge=False)
    for finding in found:
        words = {True: Text("yes", "green"), False: Text("no", "bold red"), None: Text("no", "dim")}
        table.add_row(finding.backend, words[finding.works], finding.message)
    console.print()
    console.print(table)
    made = [choice(on, of) for on in devices for of in ([dtype] if dtype else DTYPES)]
    table = Table("device", "input", "backend", "because", box=None, pad_edge=False)
    for given in made:
        backend = Text("refused", "bold red") if given.backend is None else given.backend
        table.add_row(given.device, given.dtype, backend, given.reason)
    console.print()
    console.print(table)
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    console.print(
        f"\n{ENVIRONMENT_VARIABLE}={named}"
        if named
        else f"\n{ENVIRONMENT_VARIABLE} is not set; it or backend= names one."
    )
    console.print(
        f"fuse_head: on a CPU logits are lazy for samples of at least {FEWEST_VOXELS} voxels or {FEWEST_LOGITS} "
        "logits, in channels_last_3d only with at least as many classes as features; on a GPU with at least as "
        "many classes as features. always=True overrides this rule."
    )
    failed = any(finding.works is False for finding in found) or any(given.backend is None for given in made)
    return ExitCode.FAILED if failed else ExitCode.DONE


def _devices(name: str | None) -> list[str]:
    """The types of device whose inputs are shown: those of this machine, or that of a name."""
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name is None:
        return [device for device, here in has.items() if here]
    if name == "auto":
        return ["cuda" if has["cuda"] else "cpu"]
    try:
        return [torch.device(name).type]
    except RuntimeError as error:
        raise Refused(
            f"--device: expected auto or a device like cpu, cuda, cuda:1 or mps, received {name!r}"
        ) from error


def _versions() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    python = f"Python {sys.version.split()[0]} on {platform.system()} {platform.machine()}"
    return f"{', '.join(map(named, PACKAGES))}\n{python}, {torch.get_num_threads()} threads, {gpu}"
