"""Where losses run, by name."""

from __future__ import annotations

import platform

import torch


def chosen_device(name: str, option: str = "--device") -> torch.device:
    """The device of this name; "auto" is CUDA if there is any.

    Raises ValueError that names the option, for a device that this torch cannot use.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
            raise ValueError("no such device")
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{option}: expected auto, cpu, or a device that this torch can use, received {name!r} ({reason}). "
            "auto chooses one."
        ) from error
    return device


def device_name(device: torch.device) -> str:
    """What the device is called by its maker, of a CPU its architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
