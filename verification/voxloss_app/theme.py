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
THEMES = {"light": LIGHT, "dark": DARK}

# Okabe and Ito 2008, distinct to the colour-blind too; lighter on a dark page, and distinct there as well.
BLUE, SKY, GREEN, ORANGE, VERMILION, GREY = "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#7f8a96"
_ON_DARK = {BLUE: "#3f9be0", SKY: "#bfe3fa", GREEN: "#2bc79a", VERMILION: "#ff7f3f", GREY: "#97a3b0"}


def on(theme: Theme, colour: str) -> str:
    """A colour as it is drawn on this page."""
    return _ON_DARK.get(colour, colour) if theme is DARK else colour
