"""How much memory something takes at its peak, beyond what was there before."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


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


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields[name].split()[0]) * 1024
