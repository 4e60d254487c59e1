"""Huge pages for a fresh tensor: page by page of 4 KiB, the first touch costs more than the whole pass."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

from torch import Tensor

SMALLEST = 4 << 20  # bytes; two huge pages


@cache
def _madvise() -> Any:
    """The C library's madvise, or None where there is none or no huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)


def advise(tensor: Tensor) -> None:
    """Ask for huge pages under a tensor on the CPU that nothing has been written to yet.

    It is advice: where the system does not take it, nothing happens.
    """
    size = tensor.untyped_storage().nbytes()
    madvise = _madvise()
    if madvise is None or size < SMALLEST:
        return
    start = tensor.untyped_storage().data_ptr()
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = (start + size - first) // mmap.PAGESIZE
    madvise(ctypes.c_void_p(first), ctypes.c_size_t(pages * mmap.PAGESIZE), ctypes.c_int(mmap.MADV_HUGEPAGE))
