"""A device as the stages need it: clocks, graphs, the profiler."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from voxloss_app.bench.contenders import Unavailable
from voxloss_app.bench.machine import available_memory
from voxloss_app.bench.timing import seconds, seconds_ahead

# Written before each timed kernel, so that nothing of its input is left in a cache.
_FLUSHED = 1 << 28
_WARM_UPS = 3  # before a graph is captured


class Place:
    """Any device: what needs CUDA is `Unavailable`."""

    def __init__(self, device: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = torch.device(device)
        self._clock = clock

    def synchronize(self) -> None:
        """Wait until the device has done everything; raises if it cannot do anything any more."""

    def available(self) -> int:
        """Bytes that can be allocated."""
        return available_memory(self.device.type)

    def each(self, run: Callable[[], object], times: int) -> list[float]:
        """Seconds that the device takes for each of several runs, with cold caches where it can."""
        found = []
        for _ in range(times):
            start = self._clock()
            run()
            found.append(self._clock() - start)
        return found

    def bound(self, run: Callable[[], object]) -> float:
        """Seconds of a step that begins when the device is idle."""
        return self.each(run, 1)[0]

    def ahead(self, run: Callable[[], object], steps: int) -> float:
        """Seconds of one of many steps that the device is given at once."""
        return sum(self.each(run, steps)) / steps

    def graph(self, run: Callable[[], object]) -> Callable[[], object]:
        """Capture what a function does in a graph; a function that replays it."""
        raise Unavailable("needs CUDA graphs")

    def no_waiting(self) -> AbstractContextManager[None]:
        """A context in which the host raises where it would wait for the device."""
        raise Unavailable("only CUDA reports where the host waits")

    def kernels(self, run: Callable[[], object]) -> int:
        """How many kernels the device runs for it, copies and fills of memory included."""
        raise Unavailable("needs the profiler of CUDA")


class Gpu(Place):
    """A CUDA device, or one of ROCm, which torch calls so as well."""

    def __init__(self, device: str = "cuda") -> None:
        super().__init__(device)
        self._scratch: torch.Tensor | None = None

    def synchronize(self) -> None:  # noqa: D102
        torch.cuda.synchronize(self.device)

    def available(self) -> int:  # noqa: D102
        torch.cuda.empty_cache()  # what torch keeps for later can be had, too
        return super().available()

    def each(self, run: Callable[[], object], times: int) -> list[float]:  # noqa: D102
        if self._scratch is None:
            self._scratch = torch.empty(_FLUSHED, dtype=torch.uint8, device=self.device)
        events = []
        self.synchronize()
        for _ in range(times):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            # While the device writes this, the host is ahead again: its own time is not in the kernel's.
            self._scratch.zero_()
            start.record()
            run()
            end.record()
            events.append((start, end))
        self.synchronize()
        return [float(start.elapsed_time(end)) / 1000 for start, end in events]

    def bound(self, run: Callable[[], object]) -> float:  # noqa: D102
        return seconds(run, "cuda")

    def ahead(self, run: Callable[[], object], steps: int) -> float:  # noqa: D102
        return seconds_ahead(run, steps)

    def graph(self, run: Callable[[], object]) -> Callable[[], object]:  # noqa: D102
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # as torch's manual has it: what is made once is made before the capture
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        return captured.replay

    @contextmanager
    def no_waiting(self) -> Iterator[None]:  # noqa: D102
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def kernels(self, run: Callable[[], object]) -> int:  # noqa: D102
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            run()
            self.synchronize()
        events = recorded.events() or []
        return sum(
            event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
            for event in events
        )


def copy_speed(place: Place, size: int, times: int = 10) -> float:
    """Bytes per second of a copy, read and written; the median of several."""
    source = torch.ones(size // 4, device=place.device)
    sink = torch.empty_like(source)
    sink.copy_(source)
    return 2 * source.nbytes / median(place.each(lambda: sink.copy_(source), times))


def median(values: list[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]
