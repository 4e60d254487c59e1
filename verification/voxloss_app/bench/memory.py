"""How much memory something takes at its peak, beyond what was there before."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from voxloss.lazy_logits import LazyLogits


def allocated_peak(run: Callable[[], object], device: str) -> int:
    """The most bytes that torch's allocator has given out at once while something runs."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        run()
    result = recorded.profiler and recorded.profiler.kineto_results
    assert result is not None
    events = sorted((e for e in result.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events), default=0)


def resident_peak(run: Callable[[], object]) -> int | None:
    """The same as Linux sees the process, whoever allocates; None elsewhere.

    Only sizes of many megabytes mean something: what the process has freed it need not have given back.
    """
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before
    except (OSError, KeyError):
        return None


@dataclass
class Lifetime:
    """When a tensor's memory exists, in numbers of operations.

    Attributes:
        operation: the name of the operation that returned it, "" if it was there before.
        size: in bytes.
        made: the number of that operation, counted from 1; 0 if it was there before.
        freed: the number of the last operation during which it exists; None if it still does.
    """

    operation: str
    size: int
    made: int
    freed: int | None = None


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that exist at once; those of meta tensors as if they had memory.

    A storage counts from the operation that returns it until nothing refers to it any more. What an operation
    takes for itself while it runs is not counted. Lazy logits count from the time when they are computed whole.

    Attributes:
        held: bytes of the tensors that were there before.
        peak: the most bytes at once, those among them.
        operations: how many have run.
        lifetimes: of all tensors, in the order in which they were made.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        """`held`: what is there before and counts, such as parameters."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.operations = self._now = 0
        self.lifetimes: list[Lifetime] = []
        self._known: dict[int, Lifetime] = {}
        for tensor in held:
            self._count(tensor, "")
        self.held = self._now

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor that an operation has returned."""
        return max((each.size for each in self.lifetimes if each.made), default=0)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run any operation, and count what it returns."""
        if LazyLogits in types:
            return NotImplemented  # what they do in its place comes here, too
        self.operations += 1
        result = operation(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._count(each, operation.__name__.partition(".")[0])
        return result

    def _count(self, tensor: Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
            return
        lifetime = Lifetime(operation, storage.nbytes(), self.operations)
        self._known[id(storage)] = lifetime
        self.lifetimes.append(lifetime)
        weakref.finalize(storage, self._forget, id(storage)).atexit = False
        self._now += lifetime.size
        self.peak = max(self.peak, self._now)

    def _forget(self, storage: int) -> None:
        lifetime = self._known.pop(storage)
        lifetime.freed = self.operations
        self._now -= lifetime.size


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields[name].split()[0]) * 1024
