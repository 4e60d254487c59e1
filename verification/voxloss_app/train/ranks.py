"""Distributed training: the ranks, one for each process that torchrun started, and what they exchange.

Rank 0 makes the plan, writes all files and shows progress. Each rank takes its share of every batch. With the
gradients' mean over the ranks and the loss's `group="world"`, a step is that of one process with the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from voxloss_app.exits import ExitCode
from voxloss_verify.subject.devices import chosen_device

T = TypeVar("T")

# How long the ranks may wait for each other outside of steps: reading and validating volumes can take hours. This
# is no time in which a failure goes unnoticed, as torchrun ends all processes when one has ended with an error.
_PATIENCE = timedelta(days=30)
# How long an error may take to be announced before another rank's, which follows from it.
_ANNOUNCED = timedelta(seconds=2)
_FAILED = "voxloss: the rank that failed first"

# Of all ranks, over gloo; None is the default group.
_patient: Any = None


@contextmanager
def joined(device: str) -> Iterator[torch.device]:
    """Train with the other processes that torchrun started; gives this one's device.

    Under torchrun, `cuda` is the GPU of the process's LOCAL_RANK. A process that torchrun did not start is alone,
    and one that is in a process group stays in it.

    If a rank fails, all do; the first one raises its error, and the others SystemExit. Raises ValueError for a
    device that the ranks cannot have.
    """
    global _patient
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield chosen_device(device)
        return
    if dist.is_initialized():
        yield _own_device(device)
        return
    store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    try:
        own = _own_device(device)
        backend = "nccl" if own.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        _patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
        yield own
        wait()
    except Exception as error:
        if not _is_first_to_fail(store, rank, error):
            raise SystemExit(ExitCode.FAULT) from error
        raise
    # Not after an error: it could wait for ranks that have gone.
    dist.destroy_process_group()
    _patient = None


def rank() -> int:
    """The number of this process, 0 if it is alone."""
    return dist.get_rank() if _has_ranks() else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _has_ranks() else 1


def require_shares(batch: int, whence: str = "") -> None:
    """Raise ValueError that names --batch unless all ranks can have equal shares of it."""
    if batch % size():
        fit = batch // size() * size() or size()
        raise ValueError(
            f"--batch: expected a multiple of {size()}, the number of processes, received {batch}{whence}. Set "
            f"--batch {fit}, or start another number of processes"
        )


def share(batch: Sequence[T]) -> Sequence[T]:
    """This rank's part of a batch."""
    own = len(batch) // size()
    return batch[rank() * own : (rank() + 1) * own]


def shared(value: T) -> T:
    """What rank 0 has for `value`, on every rank."""
    if not _has_ranks():
        return value
    box = [value]
    dist.broadcast_object_list(box, group=_patient)
    return box[0]


def gathered(values: Sequence[T]) -> list[T]:
    """The values of all ranks, on every rank."""
    if not _has_ranks():
        return [*values]
    parts: list[Any] = [None] * size()
    dist.all_gather_object(parts, values, group=_patient)
    return [value for part in parts for value in part]


def wait() -> None:
    """Return when all ranks are here."""
    if _has_ranks():
        dist.barrier(group=_patient)


def averaging(network: nn.Module) -> nn.Module:
    """The network, with gradients that are the mean over the ranks."""
    return DistributedDataParallel(network) if _has_ranks() else network


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized()


def _own_device(name: str) -> torch.device:
    device, here = chosen_device(name), int(os.environ["LOCAL_WORLD_SIZE"])
    if device.type == "cpu":
        return device
    if device != torch.device("cuda"):
        raise ValueError(
            f"--device: expected auto, cuda or cpu, as each process has a GPU of its own, received {name!r}. Set "
            "CUDA_VISIBLE_DEVICES to choose among the GPUs"
        )
    found = torch.cuda.device_count()
    if found < here:
        raise ValueError(
            f"--device: expected a GPU for each of {here} processes, received {found}. Set --nproc-per-node "
            f"{found}, or --device cpu"
        )
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own


def _is_first_to_fail(store: Any, rank: int, error: Exception) -> bool:
    """Whether no other rank has failed before, which would be why this one does."""
    try:
        if isinstance(error, RuntimeError):  # what a collective raises if another rank has gone
            with suppress(RuntimeError):
                store.wait([_FAILED], _ANNOUNCED)
        first: bytes = store.compare_set(_FAILED, "", str(rank))
    except RuntimeError:  # torchrun has gone, and the store with it
        return True
    return first == str(rank).encode()
