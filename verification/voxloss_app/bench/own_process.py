"""A measurement in a process of its own, in which nothing has run before."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

Found = TypeVar("Found")
# Unless the environment has them. The last two are about what the profiler announces.
SETTINGS = {"OMP_WAIT_POLICY": "passive", "KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def apart(run: Callable[[], Found]) -> Found:
    """The result of something in such a process, with `SETTINGS` and as many threads as here."""
    before = dict(os.environ)
    os.environ.update({name: before.get(name, value) for name, value in SETTINGS.items()})
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_with_threads, torch.get_num_threads(), run).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _with_threads(threads: int, run: Callable[[], Found]) -> Found:
    torch.set_num_threads(threads)
    return run()
