"""The picture: losses × laws, holds, broken or not applicable."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from voxloss_app.conformance.results import Row
from voxloss_app.theme import DARK, LIGHT, Theme
from voxloss_verify.laws.law import Law
from voxloss_verify.laws.record import Status

# Okabe and Ito 2008, distinct to the colour-blind too; and broken laws have a cross.
HOLDS, BROKEN = "#009e73", "#d55e00"
_NOT_APPLICABLE = {LIGHT: "#e9edf1", DARK: "#232a33"}
_STATES = (Status.holds, Status.broken, Status.not_applicable)

# In inches: a cell, the names on the left, the heading above the cells, the legend below.
_CELL, _NAMES, _HEADING, _LEGEND = 0.165, 3.05, 0.75, 0.4


@dataclass(frozen=True)
class _Line:
    """A line of the picture: the heading of a library, or one of its losses."""

    text: str
    row: Row | None = None


def heat_map_png(
    rows: Sequence[Row], laws: Sequence[Law], headings: dict[str, str], groups: dict[str, str], theme: Theme
) -> bytes:
    """Draw the rows under the heading of their library, and the laws under that of their group."""
    lines: list[_Line] = []
    for library, own in groupby(rows, lambda row: row.examined.library):
        lines.append(_Line(headings[library]))
        lines += [_Line(f"{row.examined.name}  {row.examined.label}", row) for row in own]
    width, height = _NAMES + _CELL * (len(laws) + 1), _HEADING + _CELL * len(lines) + _LEGEND
    figure = Figure(figsize=(width, height), facecolor=theme.paper)
    axes = figure.add_axes(
        (_NAMES / width, _LEGEND / height, _CELL * len(laws) / width, _CELL * len(lines) / height)
    )
    _draw_cells(axes, lines, laws, theme)
    _name_lines(axes, lines, theme)
    _name_laws(axes, laws, groups, theme)
    figure.legend(
        handles=[Patch(color=c, label=s.value) for c, s in zip(_colours(theme), _STATES, strict=True)],
        loc="lower left",
        bbox_to_anchor=(_NAMES / width, 0),
        ncols=len(_STATES),
        frameon=False,
        labelcolor=theme.ink,
        fontsize=9,
        borderaxespad=0,
    )
    buffer = io.BytesIO()
    # Without the version of matplotlib, which the picture does not depend on.
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _colours(theme: Theme) -> tuple[str, str, str]:
    return HOLDS, BROKEN, _NOT_APPLICABLE[theme]


def _draw_cells(axes: Axes, lines: Sequence[_Line], laws: Sequence[Law], theme: Theme) -> None:
    values = [status.value for status in _STATES]
    shown = np.full((len(lines), len(laws)), np.nan)
    for y, line in enumerate(lines):
        for x, cell in enumerate(line.row.cells if line.row else ()):
            shown[y, x] = values.index(cell.status)
            if cell.status == Status.broken.value:
                axes.text(x, y, "×", color="#ffffff", fontsize=9, ha="center", va="center_baseline")
    axes.pcolormesh(
        np.arange(len(laws) + 1) - 0.5,
        np.arange(len(lines) + 1) - 0.5,
        np.ma.masked_invalid(shown),
        cmap=ListedColormap(_colours(theme)),
        vmin=0,
        vmax=len(_STATES) - 1,
        edgecolors=theme.paper,
        linewidth=1.2,
    )
    axes.set_xlim(-0.5, len(laws) - 0.5)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_axis_off()


def _name_lines(axes: Axes, lines: Sequence[_Line], theme: Theme) -> None:
    left = -0.5 - _NAMES / _CELL + 0.6
    for y, line in enumerate(lines):
        if line.row is None:
            axes.text(left, y, line.text, color=theme.ink, fontsize=9.5, fontweight="bold", va="center_baseline")
            continue
        axes.text(left + 0.6, y, line.text, color=theme.ink, fontsize=8.5, va="center_baseline")
        if line.row.error:
            axes.text(0, y, "could not be made or called", color=theme.ink, fontsize=8.5, va="center_baseline")


def _name_laws(axes: Axes, laws: Sequence[Law], groups: dict[str, str], theme: Theme) -> None:
    for x, law in enumerate(laws):
        axes.text(x, -0.8, law.id, color=theme.ink, fontsize=8.5, rotation=90, ha="center", va="bottom")
    start = 0
    for group, own in groupby(laws, lambda law: groups[law.id]):
        end = start + len(list(own))
        axes.plot((start - 0.35, end - 0.65), (-2.75, -2.75), color=theme.ink, linewidth=1, clip_on=False)
        axes.text((start + end - 1) / 2, -3.1, group, color=theme.ink, fontsize=8.5, ha="center", va="bottom")
        start = end
