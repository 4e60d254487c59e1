"""Processes that work beside this one, and end with it."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def workers(jobs: int) -> Iterator[Callable[..., Future[Any]]]:
    """Give `submit(function, *arguments)`, which runs a function in one of up to `jobs` processes.

    Ctrl-C and any other exception in the block end them at once. The first `submit` has to be in the main thread,
    as it disables SIGINT for the processes that it starts.
    """
    # Not forked: threads, such as that of a progress bar, do not survive a fork.
    executor = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))

    def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        # A worker inherits the disabled SIGINT; this process handles Ctrl-C and ends it.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return executor.submit(function, *arguments)
        finally:
            signal.signal(signal.SIGINT, handler)

    try:
        yield submit
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
