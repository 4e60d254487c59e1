"""Finished parts of a long run, kept in files beside its output, so that the next run resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from voxloss_data.files import save_json

T = TypeVar("T")


class Finished:
    """JSON content by name, as files in a folder beside `out` that git is to leave alone."""

    def __init__(self, out: Path, command: str) -> None:
        self.folder = out.resolve().with_name(f".{out.resolve().name}-{command}")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ".gitignore").write_text("*\n")

    def path(self, name: str) -> Path:
        """Where the content of this name is kept."""
        return self.folder / f"{name}.json"

    def read(self, name: str, from_json: Callable[[Any], T]) -> T | None:
        """What is made of the content of this name, None if there is none."""
        try:
            return from_json(json.loads(self.path(name).read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):  # none, or damaged
            return None

    def write(self, name: str, content: object) -> None:
        """Keep content, in the place of what had its name."""
        save_json(self.path(name), content)

    def keep_only(self, names: Iterable[str]) -> None:
        """Remove the files of all other names."""
        for path in {*self.folder.glob("*.json")} - {*map(self.path, names)}:
            path.unlink(missing_ok=True)


def digest(facts: object, sources: Iterable[Path] = ()) -> str:
    """A hash of plain data and source files, for the names of what is true only while these stay the same."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for path in sorted(sources):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def interrupted(done: int, total: int, what: str, kept: Finished) -> str:
    """The message after Ctrl-C."""
    found = f"{done} of {total} {what} are finished and kept in {kept.folder}"
    return f"interrupted: {found}; repeat the command to resume"
