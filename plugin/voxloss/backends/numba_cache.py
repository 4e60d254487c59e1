"""Numba's cache on disk, with a checksum: what is damaged is compiled anew.

Numba unpickles what it finds, machine code included, and fails on it or executes it. Here each file ends with the
SHA-256 of what it holds and of what it was compiled from; a file with another one is as good as none.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

_LOGGER = logging.getLogger("voxloss")


def compiled_from(folder: Path) -> bytes:
    """A digest of Numba's version and of the two files that the kernels are of; Numba looks at one of them.

    A frozen program has no sources: there Numba looks at the program.
    """
    found = sha256(numba.__version__.encode())
    for name in ("numba_kernels.py", "voxels.py"):
        with suppress(OSError):
            found.update((folder / name).read_bytes())
    return found.digest()


_COMPILED_FROM = compiled_from(Path(__file__).parent)


class KernelCache(FunctionCache):
    """The cache of one compiled function. Raises RuntimeError if there is no folder for it."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self._cache_file = _SealedFile(
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=self._impl.locator.get_source_stamp(),
        )


class _SealedFile(IndexDataCacheFile):
    """An index and its data files. What follows the end of a pickle is not read with it."""

    def _load_index(self) -> dict[Any, str]:
        found: dict[Any, str] = super()._load_index() if self._is_sound(self._index_path) else {}
        return found

    def _load_data(self, name: str) -> Any:
        if not self._is_sound(self._data_path(name)):
            raise FileNotFoundError(name)  # for which Numba compiles
        return super()._load_data(name)

    @contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[IO[bytes]]:
        content = io.BytesIO()
        yield content
        with super()._open_for_write(filepath) as file:
            file.write(content.getvalue() + sha256(content.getvalue()).digest() + _COMPILED_FROM)

    def _is_sound(self, path: str) -> bool:
        try:
            file = Path(path).read_bytes()
        except OSError:
            return False
        length = len(_COMPILED_FROM)
        content, seal, compiled_from = file[: -2 * length], file[-2 * length : -length], file[-length:]
        if sha256(content).digest() != seal:
            _report_damage(self._cache_path, Path(path).name)
            return False
        return compiled_from == _COMPILED_FROM


@cache
def _report_damage(folder: str, name: str) -> None:
    _LOGGER.warning(
        "voxloss: %s in the cache of the fused CPU pass, %s, is damaged or outdated: compiling anew.",
        name,
        folder,
    )
