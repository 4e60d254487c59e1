"""The options that several commands have and that mean the same in each, and checks before torch is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

DEVICES = ("auto", "cpu", "cuda", "mps")


class Profile(str, Enum):
    """How much is tried."""

    quick = "quick"
    default = "default"
    thorough = "thorough"


def starting(choices: Sequence[str], incomplete: str) -> list[str]:
    """What a shell offers."""
    return [choice for choice in choices if choice.startswith(incomplete)]


def _devices(incomplete: str) -> list[str]:
    return starting(DEVICES, incomplete)


def _seed(seed: int) -> int:
    if not 0 <= seed < 2**32:
        raise typer.BadParameter(f"expected a number from 0 to {2**32 - 1}, got {seed}.")
    return seed


DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1, mps; auto is CUDA if there is any.",
        autocompletion=_devices,
    ),
]
ProfileOption = Annotated[
    Profile,
    typer.Option("--profile", metavar="NAME", help="How much is tried: quick, default or thorough."),
]
SeedOption = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="NUMBER",
        callback=_seed,
        help="Of all that is random: the same seed, the same numbers on a CPU.",
    ),
]
FolderOption = Annotated[
    Path, typer.Option("--out", metavar="FOLDER", help="Where the files go; made if need be.")
]
FileOption = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Where the output goes, by default to stdout.")
]


ResumeOption = Annotated[
    bool, typer.Option("--resume/--fresh", help="Keep what an earlier run with the same --out has finished.")
]
IgnoreOption = Annotated[
    int | None,
    typer.Option("--ignore", metavar="LABEL", help="Leave out the voxels with this label in the reference."),
]


def require_folder(option: str, path: Path) -> None:
    """Refuse what is a file."""
    if path.exists() and not path.is_dir():
        raise typer.BadParameter(f"{option}: expected a folder, got the file {path}.")


def require_writable(option: str, path: Path | None) -> None:
    """Refuse a file that cannot be made."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise typer.BadParameter(f"{option}: expected a file in a folder that exists, got {path}.")


@contextmanager
def needs_extra(command: str, extra: str = "verify") -> Iterator[None]:
    """Say which extra a command needs that cannot be imported without it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{command} needs {error.name}: pip install 'voxloss[{extra}]'", name=error.name
        ) from error
