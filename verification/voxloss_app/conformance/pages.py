"""What was found as Markdown, as one page of HTML with the picture in it, and as the picture."""

from __future__ import annotations

import base64
import json
import math
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from jinja2 import Environment

from voxloss_app.conformance.losses import LIBRARIES
from voxloss_app.conformance.picture import heat_map_png
from voxloss_app.conformance.results import Cell, Row, plain
from voxloss_app.templates import environment
from voxloss_app.theme import DARK, LIGHT
from voxloss_data.files import save_bytes
from voxloss_verify.laws import METRIC_LAWS
from voxloss_verify.laws.law import Law
from voxloss_verify.laws.record import WRONG, Status
from voxloss_verify.laws.setting import PROFILES
from voxloss_verify.request import Level, ProfileName
from voxloss_verify.tolerances import GRADIENT, LOSS
from voxloss_verify.verification import ELEMENTARY

# What is checked, in ten groups, by the numbers of the laws or their ids.
GROUPS: dict[str, tuple[str, ...]] = {
    "values": ("1", "2", "3", "4", "5", "24", "40", "45"),
    "identities": ("6", "7", "8", "9", "10"),
    "bounds": ("11", "12"),
    "invariances": ("13", "14", "15", "16", "17", "18", "19", "42", "43"),
    "gradients": ("20", "21", "22", "23"),
    "half precision, size": ("25", "26"),
    "determinism, backends": ("27", "28b", "28d", "44", "46"),
    "processes, compiler": ("28a", "28c"),
    "empty, NaN, shape": ("29", "30", "41"),
    "bad input": ("31", "47", "48"),
}
# In Markdown; the others are on the page.
MOST_FINDINGS = 60
# Where a finding is described for its library's developers.
_SIGMOID = "[issue text](upstream/dice-ce-sigmoid.md)"
UPSTREAM: dict[tuple[str, str, str], str] = {
    ("MONAI", "DiceCELoss", "24"): _SIGMOID,
    ("MONAI", "DiceFocalLoss", "24"): _SIGMOID,
    ("MONAI", "GeneralizedDiceLoss", "24"): "[issue text](upstream/generalized-dice-no-foreground.md)",
}

_OF_METRICS = {law.id for law in METRIC_LAWS}

MARKS = {Status.holds.value: "✓", Status.broken.value: "✗", Status.not_applicable.value: "–"}


@dataclass(frozen=True)
class Conformance:
    """The content of the pages."""

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
    """Write the picture, conformance.md, .html and .json to a folder; return their paths."""
    groups = {law.id: _group(law) for law in found.laws}
    headings = {library.name: f"{library.name} {found.versions[library.name]}" for library in LIBRARIES}
    light, dark = (heat_map_png(found.rows, headings, groups, theme) for theme in (LIGHT, DARK))
    content = _content(found, groups)
    texts = {
        "conformance.md": _templates(html=False).get_template("conformance.md.j2").render(content),
        "conformance.html": _templates(html=True)
        .get_template("conformance.html.j2")
        .render(content, light=_data_url(light), dark=_data_url(dark)),
    }
    data = {"versions": found.versions, "profile": found.profile, "seed": found.seed}
    rows = [{"library": row.examined.library, **plain(row)} for row in found.rows]
    texts["conformance.json"] = json.dumps({**data, "rows": rows}, indent=1, ensure_ascii=False) + "\n"
    files = {
        "conformance-light.png": light,
        "conformance-dark.png": dark,
        **{name: text.encode() for name, text in texts.items()},
    }
    for name, content_of_file in files.items():
        save_bytes(out / name, content_of_file)
    return [out / name for name in files]


def _group(law: Law) -> str:
    return next(group for group, ids in GROUPS.items() if law.id in ids or str(law.number) in ids)


@dataclass(frozen=True)
class Finding:
    """One broken law of a class, in one configuration or several, and what the same cause may break."""

    library: str
    name: str
    labels: Sequence[str]
    cell: Cell
    also: Sequence[str]
    upstream: str


def findings(rows: Sequence[Row], level: Level) -> list[Finding]:
    """The broken laws of a level, the worst first: of each class and law the configuration that is furthest off.

    Where the value or the gradient itself is wrong, the other laws of the formula follow from that, and in half
    precision it is as wrong.
    """
    found: dict[tuple[str, str, str], list[tuple[Row, Cell, list[str]]]] = {}
    for row in rows:
        cells = row.broken(level)
        first = next((cell for id in ELEMENTARY for cell in cells if cell.law == id), None)
        if level is Level.formula and first is not None:
            also = [cell.law for cell in cells if cell is not first]
            chosen = [(first, also)]
        else:
            wrong = level is Level.numerics and any(cell.law in ELEMENTARY for cell in row.broken(Level.formula))
            chosen = [(cell, []) for cell in cells if not (wrong and cell.size is not None and cell.size > WRONG)]
        for cell, also in chosen:
            found.setdefault((row.examined.library, row.examined.name, cell.law), []).append((row, cell, also))
    merged = []
    for (library, name, law), each in found.items():
        _, worst, _ = max(each, key=lambda entry: _rank(entry[1]))
        others = sorted(
            {id for _, _, also in each for id in also}, key=lambda id: (int(re.sub(r"\D", "", id)), id)
        )
        labels = [row.examined.label for row, _, _ in each]
        merged.append(Finding(library, name, labels, worst, others, UPSTREAM.get((library, name, law), "")))
    return sorted(merged, key=lambda finding: _rank(finding.cell), reverse=True)


def _rank(cell: Cell) -> float:
    return math.inf if cell.size is None else cell.size


def _content(found: Conformance, groups: Mapping[str, str]) -> dict[str, Any]:
    profile = PROFILES[found.profile]
    rows = [{**plain(row), "library": row.examined.library, "id": _anchor(row)} for row in found.rows]
    libraries = [
        {
            "name": library.name,
            "version": found.versions[library.name],
            "rows": (own := [row for row in rows if row["library"] == library.name]),
            "tables": list(_tables(own, found.laws)),
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
        "summary": [
            {
                "name": library.name,
                "version": found.versions[library.name],
                "losses": len(of_it),
                **{level.value: sum(bool(row.broken(level)) for row in of_it) for level in Level},
                "clean": sum(not row.error and not row.broken(*Level) for row in of_it),
                "held": sum(row.count(Status.holds) for row in of_it),
                "checks": sum(row.count(Status.holds) + row.count(Status.broken) for row in of_it),
            }
            for library in LIBRARIES
            if (of_it := [row for row in found.rows if row.examined.library == library.name])
        ],
        "groups": [
            {"name": name, "laws": [law for law in found.laws if groups[law.id] == name]} for name in GROUPS
        ],
        "findings": {level.value: findings(found.rows, level) for level in (Level.formula, Level.numerics)},
        "most": MOST_FINDINGS,
        "laws": [
            {
                "id": law.id,
                "name": law.name,
                "group": groups[law.id],
                "statement": law.statement,
                "oracle": law.oracle,
                "tolerance": law.tolerance,
                "level": law.level.value,
                "because": law.because,
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


def _tables(rows: Sequence[Mapping[str, Any]], laws: Sequence[Law]) -> Iterator[dict[str, Any]]:
    """Losses and metrics apart, as other laws speak of them; what could not be made stands with the losses."""
    kinds: dict[bool, list[Mapping[str, Any]]] = {False: [], True: []}
    for row in rows:
        kinds[any(cell["law"] in _OF_METRICS for cell in row["cells"])].append(row)
    for of_metrics, own in kinds.items():
        if own:
            yield {
                "kind": "metric" if of_metrics else "loss",
                "rows": own,
                "laws": [law for law in laws if (law.id in _OF_METRICS) is of_metrics],
            }


def _anchor(row: Row) -> str:
    words = f"{row.examined.library} {row.examined.name} {row.examined.label}".lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def _templates(html: bool) -> Environment:
    found = environment("conformance", html)
    found.filters["md"] = _markdown
    found.filters["short"] = _short
    return found


def _short(text: str) -> str:
    """At most some 160 characters, for a table."""
    return text if len(text) <= 160 else f"{text[:159]}…"


def _markdown(text: str) -> str:
    """Text as it is, in Markdown and within its tables."""
    return re.sub(r"([\\`*_\[\]<>|~])", r"\\\1", text)


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
