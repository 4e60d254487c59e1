"""What was found as Markdown, as one page of HTML with the picture in it, and as the picture."""

from __future__ import annotations

import base64
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from jinja2 import Environment

from voxloss_app.conformance.losses import LIBRARIES
from voxloss_app.conformance.picture import heat_map_png
from voxloss_app.conformance.results import Row, plain
from voxloss_app.templates import environment
from voxloss_app.theme import DARK, LIGHT
from voxloss_data.files import save_bytes
from voxloss_verify.laws.law import Law
from voxloss_verify.laws.record import Status
from voxloss_verify.laws.setting import PROFILES
from voxloss_verify.request import ProfileName
from voxloss_verify.tolerances import GRADIENT, LOSS

MARKS = {Status.holds.value: "✓", Status.broken.value: "✗", Status.not_applicable.value: "–"}
# Of the rooms of `voxloss_verify.laws`, those with another name here.
GROUPS = {"numerics": "numerics, engines", "engines": "numerics, engines"}


@dataclass(frozen=True)
class Conformance:
    """Everything that the pages tell of."""

    rows: Sequence[Row]
    laws: Sequence[Law]
    versions: Mapping[str, str | None]
    profile: ProfileName
    seed: int


def versions() -> dict[str, str | None]:
    """Of the libraries, None for those that are not installed, and of what the suite is built on."""
    return {
        **{library.name: library.version for library in LIBRARIES},
        "torch": torch.__version__,
        "NumPy": np.__version__,
        "Hypothesis": hypothesis.__version__,
        "Python": platform.python_version(),
    }


def write(out: Path, found: Conformance) -> list[Path]:
    """Write conformance.png, .md and .html to a folder; return their paths."""
    groups = {law.id: _group(law) for law in found.laws}
    headings = {library.name: f"{library.name} {found.versions[library.name]}" for library in LIBRARIES}
    light, dark = (heat_map_png(found.rows, found.laws, headings, groups, theme) for theme in (LIGHT, DARK))
    content = _content(found, groups)
    texts = {
        "conformance.md": _templates(html=False).get_template("conformance.md.j2").render(content),
        "conformance.html": _templates(html=True)
        .get_template("conformance.html.j2")
        .render(content, light=_data_url(light), dark=_data_url(dark)),
    }
    files = {"conformance.png": light, **{name: text.encode() for name, text in texts.items()}}
    for name, data in files.items():
        save_bytes(out / name, data)
    return [out / name for name in files]


def _group(law: Law) -> str:
    room = law.check.__module__.rpartition(".")[2]
    return GROUPS.get(room, room)


def _content(found: Conformance, groups: Mapping[str, str]) -> dict[str, Any]:
    profile = PROFILES[found.profile]
    libraries = [
        {
            "name": library.name,
            "version": found.versions[library.name],
            "rows": [
                {**plain(row), "id": _anchor(row)} for row in found.rows if row.examined.library == library.name
            ],
        }
        for library in LIBRARIES
    ]
    return {
        "command": f"voxloss conformance --profile {found.profile} --seed {found.seed}",
        "profile": found.profile,
        "examples": profile.examples,
        "edges": ", ".join(f"{edge}³" for edge in profile.sizes),
        "compiler": profile.compiler,
        "seed": found.seed,
        "versions": {name: version for name, version in found.versions.items() if version is not None},
        "missing": [name for name, version in found.versions.items() if version is None],
        "libraries": [library for library in libraries if library["rows"]],
        "laws": [
            {
                "id": law.id,
                "name": law.name,
                "group": groups[law.id],
                "statement": law.statement,
                "oracle": law.oracle,
                "tolerance": law.tolerance,
            }
            for law in found.laws
        ],
        "names": {law.id: law.name for law in found.laws},
        "statements": {law.id: law.statement for law in found.laws},
        "counts": {status: sum(row.count(Status(status)) for row in found.rows) for status in MARKS},
        "marks": MARKS,
        "loss_tolerances": LOSS,
        "gradient_tolerances": GRADIENT,
    }


def _anchor(row: Row) -> str:
    words = f"{row.examined.library} {row.examined.name} {row.examined.label}".lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def _templates(html: bool) -> Environment:
    found = environment("conformance", html)
    found.filters["md"] = _markdown
    return found


def _markdown(text: str) -> str:
    """Text as it is, in Markdown and within its tables."""
    return re.sub(r"([\\`*_\[\]<>|~])", r"\\\1", text)


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
