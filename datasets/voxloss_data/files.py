"""Files appear whole or not at all, and the same content has the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from voxloss_data.text import unicode


def save_nifti(
    path: Path,
    data: NDArray[Any],
    affine: NDArray[np.float64],
    space: str = "scanner",
    description: str = "",
) -> None:
    """Write `data` [X, Y, Z, ...] as NIfTI-1 in its own dtype, atomically.

    `affine` maps voxel indices to mm and becomes both sform and qform, of the NIfTI `space` "scanner" or "mni".
    `description` are up to 79 bytes of the header.
    """
    image: Any = nib.Nifti1Image(data, affine)  # type: ignore[no-untyped-call]
    image.set_sform(affine, code=space)
    image.set_qform(affine, code=space)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode()
    # nibabel gives the gzip header neither a time nor a file name, so equal images are equal bytes.
    with _replacing(path) as temporary:
        image.to_filename(temporary)


def save_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON, atomically."""
    save_text(path, json.dumps(content, indent=2) + "\n")


def save_text(path: Path, content: str) -> None:
    """Write `content` as UTF-8, atomically; what is not Unicode in it, as in names of files, is escaped."""
    save_bytes(path, unicode(content).encode())


def save_bytes(path: Path, content: bytes) -> None:
    """Write `content`, atomically."""
    with _replacing(path) as temporary:
        temporary.write_bytes(content)


def is_same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, which is there."""
    try:
        return one.samefile(other)
    except OSError:
        return False


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it takes the place of `path` if all went well, and is gone if not.

    A link is followed. Raises OSError, of the kind that the system raised, with the name `path`.
    """
    target = Path(os.path.realpath(path))
    # In the same folder, since a rename is atomic within one file system only; with the same suffix, since
    # nibabel reads the format from it; random, since two processes may write the same file. Only the end of the
    # name, which may already be as long as a name can be.
    temporary = target.with_name(f".{uuid4().hex}-{target.name[-50:]}")
    try:
        try:
            yield temporary
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        # A full disk names no file, and nobody knows the temporary one.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
