"""One run in a folder at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

FILE = ".lock"
WAIT = 6.0  # seconds in which the workers of a run that was killed notice it


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the operating system lets go of it whatever ends the process.

    Raises ValueError if another one holds it.
    """
    lock = FileLock(folder / FILE, timeout=WAIT)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"--out: expected a folder that no other run uses, received {folder}, where another `voxloss train` "
            "is running. Wait for it to end, or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()
