"""Options that several commands share, and checks before torch is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated

import typer

from voxloss_app.regions import parse_regions

DEVICES = ("auto", "cpu", "cuda", "mps")


class Profile(str, Enum):
    """Extent of the verification."""

    quick = "quick"
    default = "default"
    thorough = "thorough"


def starting(choices: Sequence[str], incomplete: str) -> list[str]:
    """The completions that a shell offers."""
    return [choice for choice in choices if choice.startswith(incomplete)]


def _devices(incomplete: str) -> list[str]:
    return starting(DEVICES, incomplete)


def _seed(seed: int) -> int:
    if not 0 <= seed < 2**32:
        raise typer.BadParameter(f"expected a number from 0 to {2**32 - 1}, received {seed}.")
    return seed


DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Device: cpu, cuda, cuda:1, mps; auto is CUDA if available.",
        autocompletion=_devices,
    ),
]
ProfileOption = Annotated[
    Profile,
    typer.Option("--profile", metavar="NAME", help="Extent of the checks: quick, default or thorough."),
]
SeedOption = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="NUMBER",
        callback=_seed,
        help="Random seed (reproducible on CPU).",
    ),
]
FolderOption = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Output folder; created if missing.")]
FileOption = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Output file; by default stdout.")]


EdgeOption = Annotated[
    int | None,
    typer.Option("--edge", metavar="VOXELS", min=2, help="Edge length of every volume, for quick trials."),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume/--fresh", help="Keep finished results of an earlier run with this --out.")
]
IgnoreOption = Annotated[
    int | None,
    typer.Option("--ignore", metavar="LABEL", help="Leave out the voxels with this label in the reference."),
]


RegionsOption = Annotated[
    str | None,
    typer.Option("--regions", metavar="JSON", help="Regions by name, instead of single labels."),
]


def regions_given(text: str | None) -> dict[str, list[int]] | None:
    """The value of --regions."""
    try:
        return None if text is None else parse_regions(text)
    except ValueError as error:
        raise typer.BadParameter(f"--regions: {error}") from error


def require_folder(option: str, path: Path) -> None:
    """Reject a folder that is a file, or that cannot be created or written to."""
    with _refused(option, "a folder", path):
        if path.is_file():
            raise typer.BadParameter(f"{option}: expected a folder, received the file {_quoted(path)}.")
        _require_room(next(place for place in (path, *path.parents) if _exists(place)))


def require_writable(option: str, path: Path | None) -> None:
    """Reject a file that cannot be created or replaced."""
    if path is None:
        return
    with _refused(option, "a file", path):
        if not path.parent.is_dir() or (_exists(path) and not path.is_file()):
            raise typer.BadParameter(
                f"{option}: expected a file in a folder that exists, received {_quoted(path)}."
            )
        _require_room(Path(os.path.realpath(path)).parent)  # a link is followed


@contextmanager
def _refused(option: str, kind: str, path: Path) -> Iterator[None]:
    """Report an error of the operating system as one of the option."""
    try:
        yield
    except OSError as error:
        expected = f"{kind} that can be written, received {_quoted(path)}"
        raise typer.BadParameter(f"{option}: expected {expected} ({error.strerror}).") from error


def _exists(path: Path) -> bool:
    """`Path.exists` hides more errors, or fewer, as the version of Python has it."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _require_room(folder: Path) -> None:
    """Raise OSError unless a file can be created in the folder; permissions alone do not show it."""
    with TemporaryFile(dir=folder):
        pass


def _quoted(path: Path) -> str:
    from voxloss_data.text import quoted  # it loads nibabel

    return quoted(path)


@contextmanager
def needs_extra(command: str, extra: str = "verify") -> Iterator[None]:
    """Name the extra that a command needs if an import fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{command} needs {error.name}: pip install 'voxloss[{extra}]'", name=error.name
        ) from error
