"""The colours of pictures, on a light and on a dark page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """Colours of lines and letters, of the grid, and of the page."""

    ink: str
    grid: str
    paper: str


LIGHT = Theme(ink="#1d2733", grid="#d9dee5", paper="#ffffff")
DARK = Theme(ink="#e8edf3", grid="#38424f", paper="#0e1116")
