"""The source files of the packages, and what they import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The packages, from the lowest floor upwards, and the folder that each stands in.
ROOMS = {
    "voxloss_data": "datasets",
    "voxloss": "plugin",
    "voxloss_verify": "verification",
    "voxloss_app": "verification",
}


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """The dotted name and the file of every module of a package."""
    root = ROOT / ROOMS[package]
    for path in sorted((root / package).rglob("*.py")):
        yield ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"), path


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it; of `from a import b` both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(str(node.module))
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names
