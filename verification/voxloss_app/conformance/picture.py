"""The picture: losses × ten groups of checks, by the worst that is broken in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from voxloss_app.conformance.results import Cell, Row
from voxloss_app.drawing import png
from voxloss_app.theme import DARK, LIGHT, Theme
from voxloss_verify.laws.record import Status
from voxloss_verify.request import Level

# Okabe and Ito 2008, distinct to the colour-blind too; the worse, the darker, with a sign in what fails a loss.
HOLDS, WRONG, INACCURATE, ADVICE = "#009e73", "#a63c06", "#e69f00", "#f4e3a1"
_NOT_APPLICABLE = {LIGHT: "#e9edf1", DARK: "#232a33"}
_STATES = ("holds", "formula broken", "numerics broken", "interface: advice", "not applicable")

# In inches: a cell, the names on the left, the heading above the cells, the legend below.
_WIDE, _HIGH, _NAMES, _HEADING, _LEGEND = 0.42, 0.165, 3.05, 1.35, 0.4


@dataclass(frozen=True)
class _Line:
    """A line of the picture: the heading of a library, or one of its losses."""

    text: str
    row: Row | None = None


def heat_map_png(rows: Sequence[Row], headings: dict[str, str], groups: dict[str, str], theme: Theme) -> bytes:
    """Draw the rows under the heading of their library; a cell is the worst of its group of laws."""
    names = list(dict.fromkeys(groups.values()))
    lines: list[_Line] = []
    for library, own in groupby(rows, lambda row: row.examined.library):
        lines.append(_Line(headings[library]))
        lines += [_Line(f"{row.examined.name}  {row.examined.label}", row) for row in own]
    width = max(_NAMES + _WIDE * (len(names) + 2), 8.0)
    height = _HEADING + _HIGH * len(lines) + _LEGEND
    figure = Figure(figsize=(width, height), facecolor=theme.paper)
    box = (_NAMES / width, _LEGEND / height, _WIDE * len(names) / width, _HIGH * len(lines) / height)
    axes = figure.add_axes(box)
    _draw_cells(axes, lines, names, groups, theme)
    _name_lines(axes, lines, theme)
    for x, name in enumerate(names):
        axes.text(x, -0.8, name, color=theme.ink, fontsize=8.5, rotation=45, ha="left", va="bottom")
    figure.legend(
        handles=[Patch(color=c, label=s) for c, s in zip(_colours(theme), _STATES, strict=True)],
        loc="lower left",
        bbox_to_anchor=(0.02, 0),
        ncols=len(_STATES),
        frameon=False,
        labelcolor=theme.ink,
        fontsize=9,
        borderaxespad=0,
    )
    return png(figure, dpi=110)


def _colours(theme: Theme) -> tuple[str, ...]:
    return HOLDS, WRONG, INACCURATE, ADVICE, _NOT_APPLICABLE[theme]


def _state(cells: Sequence[Cell]) -> int:
    """The worst of some laws."""
    severities = {cell.severity for cell in cells}
    for state, level in ((1, Level.formula), (2, Level.numerics), (3, Level.interface)):
        if level.value in severities:
            return state
    return 0 if any(cell.status == Status.holds.value for cell in cells) else 4


def _draw_cells(
    axes: Axes, lines: Sequence[_Line], names: Sequence[str], groups: dict[str, str], theme: Theme
) -> None:
    shown = np.full((len(lines), len(names)), np.nan)
    for y, line in enumerate(lines):
        for x, name in enumerate(names if line.row and line.row.cells else ()):
            assert line.row is not None
            state = _state([cell for cell in line.row.cells if groups[cell.law] == name])
            shown[y, x] = state
            if state in (1, 2):
                axes.text(x, y, "×", color="#ffffff", fontsize=9, ha="center", va="center_baseline")
    axes.pcolormesh(
        np.arange(len(names) + 1) - 0.5,
        np.arange(len(lines) + 1) - 0.5,
        np.ma.masked_invalid(shown),
        cmap=ListedColormap(_colours(theme)),
        vmin=0,
        vmax=len(_STATES) - 1,
        edgecolors=theme.paper,
        linewidth=1.2,
    )
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_axis_off()


def _name_lines(axes: Axes, lines: Sequence[_Line], theme: Theme) -> None:
    left = -0.5 - (_NAMES - 0.1) / _WIDE
    for y, line in enumerate(lines):
        if line.row is None:
            axes.text(left, y, line.text, color=theme.ink, fontsize=9.5, fontweight="bold", va="center_baseline")
            continue
        axes.text(left + 0.25, y, line.text, color=theme.ink, fontsize=8.5, va="center_baseline")
        if line.row.error:
            axes.text(
                0, y, "could not be constructed or called", color=theme.ink, fontsize=8.5, va="center_baseline"
            )
