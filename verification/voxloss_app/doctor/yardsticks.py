"""Stage 1: what the device is, and how fast it copies, reads, and does next to nothing."""

from __future__ import annotations

import re
import shutil
import subprocess

import torch

from voxloss_app.doctor.notes import Notes, Sizes
from voxloss_app.doctor.place import Place, copy_speed, median

_QUERIED = {
    "driver": "driver_version",
    "SM clock, MHz": "clocks.sm",
    "SM clock at most, MHz": "clocks.max.sm",
    "memory clock, MHz": "clocks.mem",
    "power limit, W": "power.limit",
    "temperature, °C": "temperature.gpu",
}
_TIMES = 20


def yardsticks(place: Place, sizes: Sizes, notes: Notes) -> None:
    """Facts about the device, and its speeds."""
    if place.device.type == "cuda":
        _describe(place, notes)
    notes.progress(0.1, "copy and sum")
    gib = f"{sizes.copied / 2**30:g} GiB"
    name = f"copy of {gib}, read and written"
    notes.attempt(
        name, lambda: notes.row(case=name, value=copy_speed(place, sizes.copied, _TIMES) / 1e9, unit="GB/s")
    )
    summed = f"sum of {gib}, read"

    def read() -> None:
        values = torch.ones(sizes.copied // 4, device=place.device)
        values.sum()
        taken = median(place.each(lambda: values.sum(), _TIMES))
        notes.row(case=summed, value=values.nbytes / taken / 1e9, unit="GB/s")

    notes.attempt(summed, read)
    notes.progress(0.6, "tiny operations")
    tiny = torch.ones(16, dtype=torch.float64, device=place.device)

    def several() -> None:
        for _ in range(sizes.operations):
            tiny.mul_(1.0)

    def eager() -> None:
        place.ahead(several, 1)
        notes.row(
            case="tiny float64 operation", value=1e6 * place.ahead(several, 3) / sizes.operations, unit="µs"
        )

    def in_graph() -> None:
        replay = place.graph(several)
        taken = place.ahead(replay, 3) / sizes.operations
        notes.row(case="tiny float64 operation in a graph", value=1e6 * taken, unit="µs")

    notes.attempt("tiny float64 operation", eager)
    notes.attempt("tiny float64 operation in a graph", in_graph)


def _describe(place: Place, notes: Notes) -> None:
    properties = torch.cuda.get_device_properties(place.device)
    notes.fact("GPU", properties.name)
    notes.fact("compute capability", f"{properties.major}.{properties.minor}")
    notes.fact("multiprocessors", properties.multi_processor_count)
    notes.fact("memory, GiB", round(properties.total_memory / 2**30, 1))
    notes.fact("devices", torch.cuda.device_count())
    uuid = getattr(properties, "uuid", None)
    for name, value in nvidia_smi(None if uuid is None else f"GPU-{uuid}").items():
        notes.fact(name, value)


def nvidia_smi(device: str | None) -> dict[str, str]:
    """What nvidia-smi reads of a device, or why it does not."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"nvidia-smi": "not found"}
    command = [program, f"--query-gpu={','.join(_QUERIED.values())}", "--format=csv,noheader,nounits"]
    if device is not None:
        command += [f"--id={device}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"nvidia-smi": f"{type(error).__name__}"}
    found = re.split(r",\s*", done.stdout.partition("\n")[0].strip())
    if done.returncode or len(found) != len(_QUERIED):
        return {"nvidia-smi": f"exit code {done.returncode}"}
    return dict(zip(_QUERIED, found, strict=True))
