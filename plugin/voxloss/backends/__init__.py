"""The implementations of the pass over the voxels, and their selection.

A backend is a module with the functions of `Backend`. To add one, write the module and enter it in `BACKENDS`;
to select it automatically, enter it in `_FASTEST` as well. Nothing else changes.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from voxloss.backends import eager, numba_cpu, reference, triton_gpu
from voxloss.backends.voxels import PassSpec

ENVIRONMENT_VARIABLE = "VOXLOSS_BACKEND"
_LOGGER = logging.getLogger("voxloss")


class Backend(Protocol):
    """What a backend's module offers."""

    def available(self) -> tuple[bool, str]:
        """Whether it can run on this machine, and why or why not."""
        ...

    def takes(self, device: str, dtype: torch.dtype) -> tuple[bool, str]:
        """Whether it can take an input of this type of device and dtype, and what it takes."""
        ...

    def region_sums(
        self,
        input: Tensor,
        target: Tensor,
        spec: PassSpec,
        mask: Tensor | None = None,
        map: Tensor | None = None,
        partition: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the sums `[K, B, C]` and a `[]` bool: every voxel that counts was valid.

        `mask` `[B, 1, spatial...]`, floating point or bool, has the voxels' weights; `map` is the m of
        `voxels.MAPPED`, `[B, C, spatial...]`, or `[B, 1, spatial...]` if `spec.map_of_label`. `partition`
        `[B, 1, spatial...]`, int32 in [0, cells), has the cell of each voxel; then the sums are those of the
        cells, `[K, B * cells, C]`, one after the other for each sample.
        """
        ...

    def voxel_terms(
        self, factors: Tensor, input: Tensor, target: Tensor, spec: PassSpec, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what each voxel adds to Σ factor·sum, `[B, 1, spatial...]`, and whether all were valid.

        `factors` `[K, B, C]` are on the CPU for a CPU; the sums are out of `voxels.EACH`.
        """
        ...

    def region_sums_backward(
        self,
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
        """Return ∂L/∂input or ∂L/∂target as `torch.empty_like` of that tensor lays it out.

        It is written to `out` if that is given: to the input itself, for a derivative by it.
        """
        ...


BACKENDS: dict[str, Backend] = {
    "reference": reference,
    "eager": eager,
    "numba_cpu": numba_cpu,
    "triton_gpu": triton_gpu,
}
_FASTEST = {"cpu": "numba_cpu", "cuda": "triton_gpu"}  # by type of device; torch calls ROCm's cuda as well


class BackendInfo(NamedTuple):
    """One line of `list_backends()`."""

    name: str
    available: bool
    reason: str


def list_backends() -> list[BackendInfo]:
    """Every backend, whether it can run on this machine, and why."""
    return [BackendInfo(name, *backend.available()) for name, backend in BACKENDS.items()]


def select(
    requested: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """Return the backend that will be used for an input of this type of device and dtype, and the reason.

    Args:
        requested: a name out of `list_backends()`, which never falls back to another; None takes the one that
            the environment variable `VOXLOSS_BACKEND` names, or else the fastest that can run.
        device: the type of the input's device, "cpu", "cuda", …
        dtype: the dtype of the input.

    Raises:
        ValueError: if a backend was named that is unknown, cannot run here or cannot take such an input.
    """
    named, by = (requested, "backend") if requested is not None else (_from_environment(), ENVIRONMENT_VARIABLE)
    if named is not None:
        require_backend(named, by)
        takes, reason = BACKENDS[named].takes(device, dtype)
        if not takes:
            raise ValueError(
                f"{by}={named!r}: expected {reason}, received {dtype} on {device!r}. "
                f"Omit {by} for automatic selection."
            )
        return named, f"named by {by}"
    fastest = _FASTEST.get(device)
    if fastest is None:
        return "eager", f"runs on every device; there is no fused pass for {device!r}"
    can, reason = BACKENDS[fastest].available()
    takes, taken = BACKENDS[fastest].takes(device, dtype)
    if can and takes:
        return fastest, reason
    return "eager", f"{fastest} takes {taken} only" if can else f"{fastest} cannot run here: {reason}"


def backend_for(requested: str | None, device: str, dtype: torch.dtype) -> Backend:
    """Return the backend that `select` chooses; log once if a CPU gets the eager one only for want of Numba.

    For use inside an operator: torch.compile cannot trace the inspection of a machine.
    """
    return BACKENDS[_chosen(requested, _from_environment(), device, dtype)]


@cache
def _chosen(requested: str | None, by_default: str | None, device: str, dtype: torch.dtype) -> str:
    name, _ = select(requested, device, dtype)
    if name == "eager" and device == "cpu" and requested is None and by_default is None:
        available, reason = numba_cpu.available()
        if not available and numba_cpu.takes(device, dtype)[0]:
            _recommend(reason)
    return name


@cache
def _recommend(reason: str) -> None:
    _LOGGER.warning(
        "voxloss: the eager backend runs on this CPU. The fused pass is several times faster: %s.", reason
    )


def require_backend(name: str | None, by: str = "backend") -> None:
    """Check that a backend is known and can run on this machine.

    Raises:
        ValueError: with the names there are, or with what is missing.
    """
    if name is None:
        return
    if name not in BACKENDS:
        raise ValueError(
            f"{by}: expected one of {sorted(BACKENDS)} or None, received {name!r}. Omit it for automatic "
            "selection."
        )
    available, reason = BACKENDS[name].available()
    if not available:
        raise ValueError(f"{by}={name!r} cannot run here: {reason}.")


def _from_environment() -> str | None:
    return os.environ.get(ENVIRONMENT_VARIABLE) or None
