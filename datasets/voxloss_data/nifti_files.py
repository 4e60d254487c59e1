"""The NIfTI files of a folder, by name."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from voxloss_data.text import quoted

ENDINGS = (".nii.gz", ".nii")


def stem(path: Path) -> str:
    """The name without its ending; .gz alone is no ending of an image."""
    for ending in ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.stem


def in_place_of_a_file(path: Path) -> str | None:
    """What a path leads to instead of a regular file, in words; None if it leads to one."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if path.is_symlink():
            return "a broken link"
        if isinstance(error, FileNotFoundError):
            return "nothing: it does not exist"
        raise
    if stat.S_ISREG(mode):
        return None
    return "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"


def nifti_files(folder: Path) -> dict[str, Path]:
    """What a folder has that is called NAME.nii or NAME.nii.gz, by NAME, sorted.

    Hidden files are not data: other systems' file attributes, half-written files. Raises ValueError if two have
    one NAME, OSError if the folder cannot be read.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.lower().endswith(ENDINGS):
            continue
        other = found.setdefault(stem(path), path)
        if other is not path:
            raise ValueError(
                f"{quoted(path)}: expected one file of the name {quoted(stem(path))}, received "
                f"{quoted(other.name)} beside it. Move one of them elsewhere."
            )
    return found
