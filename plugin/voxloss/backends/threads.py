"""Threads in each of which torch computes alone, for work that is made of many small operations.

An operation of torch on a CPU spreads over threads and waits for the last of them. Where other programs use the
cores as well, such as the workers of a data loader, a thousand small operations wait a thousand times. Here each
thread of Python computes its operations alone; torch, BLAS and Numba release the interpreter meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import torch


def in_each_thread(work: Callable[[], None], most: int) -> None:
    """Call `work` in as many threads as torch has, at most so many; if that is one, in this thread."""
    threads = min(torch.get_num_threads(), most) if _counts_by_thread() else 1
    if threads == 1:
        work()
        return

    def detached() -> None:
        with torch.no_grad():  # a new thread has torch's defaults
            work()

    try:
        running = [_pool(torch.get_num_threads()).submit(detached) for _ in range(threads)]
    except RuntimeError:  # the main thread has ended, or there are no more threads
        running = []
    for each in running:
        each.result()
    work()  # nothing is left, unless no thread could be had


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    started = Barrier(threads)

    def start() -> None:
        torch.get_num_threads()  # else the first operation sets what follows to torch's number
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="voxloss-head")
    for each in [pool.submit(start) for _ in range(threads)]:
        each.result()
    torch.set_num_threads(threads)  # that of threads which have not begun yet
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


@cache
def _counts_by_thread() -> bool:
    """Whether torch's number of threads is one of each thread, as with OpenMP, and not of the process."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
