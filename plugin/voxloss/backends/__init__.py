"""Engines that make the pass over the voxels, and the choice between them.

A backend is a module with three functions: `available()`, `region_sums(input, target, job)` and
`region_sums_backward(grad, input, target, job, wrt)`, where `job` is a `voxels.Pass`. To add one, write the
module and enter it in `BACKENDS`; nothing else changes.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from voxloss.backends import eager, reference
from voxloss.backends.voxels import Pass


class Backend(Protocol):
    """What a backend's module offers."""

    def available(self) -> tuple[bool, str]:
        """Whether it can run here, and why or why not."""
        ...

    def region_sums(self, input: Tensor, target: Tensor, job: Pass) -> tuple[Tensor, Tensor]:
        """Return the sums `[K, B, C]` and a `[]` bool: every voxel that counts was valid."""
        ...

    def region_sums_backward(self, grad: Tensor, input: Tensor, target: Tensor, job: Pass, wrt: str) -> Tensor:
        """Return ∂L/∂input or ∂L/∂target as `torch.empty_like` of that tensor lays it out."""
        ...


BACKENDS: dict[str, Backend] = {"reference": reference, "eager": eager}


class BackendInfo(NamedTuple):
    """One line of `list_backends()`."""

    name: str
    available: bool
    reason: str


def list_backends() -> list[BackendInfo]:
    """Every backend, whether it can run here, and why."""
    return [BackendInfo(name, *backend.available()) for name, backend in BACKENDS.items()]


def select(requested: str | None = None) -> tuple[str, str]:
    """Return the backend that will be used and the reason; an explicit choice never falls back.

    Raises:
        ValueError: if the requested backend is unknown or cannot run here.
    """
    if requested is None:
        return "eager", "runs on every device"
    if requested not in BACKENDS:
        raise ValueError(
            f"backend: expected one of {sorted(BACKENDS)} or None, got {requested!r}. "
            "Leave it None to have one chosen."
        )
    available, reason = BACKENDS[requested].available()
    if not available:
        raise ValueError(f"backend={requested!r} cannot run here: {reason}.")
    return requested, "requested"
