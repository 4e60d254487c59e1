"""What a run ran on: hardware, versions, commit. Nothing that names a host, a user or a folder."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import voxloss

_PACKAGES = {
    "voxloss": "voxloss",
    "torch": "torch",
    "MONAI": "monai",
    "NumPy": "numpy",
    "Numba": "numba",
    "Triton": "triton",
    "nnU-Net": "nnunetv2",
}


def machine(device: str) -> dict[str, str]:
    """Processor, memory and system; on CUDA the GPU as well."""
    found = {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "caches": _caches(),
        "memory": f"{_total_memory() / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["CUDA"] = str(torch.version.cuda)
    return found


def versions() -> dict[str, str | None]:
    """Of what is measured and of what it is built on; None for what is not installed."""
    found: dict[str, str | None] = {name: _version(package) for name, package in _PACKAGES.items()}
    found["voxloss"] = voxloss.__version__
    found["torch"] = torch.__version__
    found["Python"] = platform.python_version()
    return found


def commit() -> str | None:
    """The commit of the checkout that voxloss is imported from, "+" after it if files differ; None elsewhere."""
    folder = Path(voxloss.__file__).parent
    try:
        revision = _git(folder, "rev-parse", "--short=12", "HEAD")
        tracked = _git(folder, "ls-files", "__init__.py")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ".")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{revision}{'+' if changed else ''}" if tracked else None


def available_memory(device: str) -> int:
    """Bytes that could be allocated now; of a CPU 60 % of what is available, as others want some, too."""
    if device == "cuda":
        return int(0.9 * torch.cuda.mem_get_info()[0])
    return int(0.6 * min(_meminfo("MemAvailable"), _within_group()))


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    fields = _fields(Path("/proc/cpuinfo"))
    return fields.get("model name") or platform.processor() or platform.machine()


def _caches() -> str:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = size
    return ", ".join(f"{level} {size}" for level, size in found.items()) or "unknown"


def _total_memory() -> int:
    return min(_meminfo("MemTotal"), _group_limit())


def _meminfo(name: str) -> int:
    value = _fields(Path("/proc/meminfo")).get(name)
    if value is not None:
        return int(value.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _within_group() -> int:
    try:
        return _group_limit() - int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return _group_limit()


def _group_limit() -> int:
    """The limit of a container's memory."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # none, or "max"
        return 1 << 62


def _fields(path: Path) -> Mapping[str, str]:
    """The first value of each `name: value` of a file; none if it is not there."""
    found: dict[str, Any] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found
