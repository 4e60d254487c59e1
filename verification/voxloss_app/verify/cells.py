"""A slice of a volume as coloured cells, for a page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxloss_verify.oracle.volumes import Volume

# A slice has at most so many cells along an axis, of larger volumes every n-th voxel; and a volume with more
# slices than that shows the middle one.
CELLS, SLICES = 40, 4
# How wide a picture and its largest cell are, in CSS pixels; a cell of so many has room for its number.
_WIDTH, _LARGEST, _ROOM = 320, 36, 30
# From the least to the greatest value; in between they are mixed.
_PALE, _DEEP = (226, 235, 243), (13, 71, 128)
_NOT_FINITE = "#c2183c"


@dataclass(frozen=True)
class Cell:
    """A square at `x`, `y`; `text` is empty if there is no room for it."""

    x: int
    y: int
    colour: str
    ink: str
    value: str
    text: str


@dataclass(frozen=True)
class Picture:
    """One channel of one sample; the slices stand side by side."""

    title: str
    width: int
    height: int
    size: int
    cells: list[Cell]


def pictures(volume: Volume, prefix: str = "") -> Iterator[Picture]:
    """Input and target, channel by channel; the colours of each span its least and greatest value."""
    for name, array in ((f"{prefix}input", volume.input), (f"{prefix}target", volume.target)):
        values = np.asarray(array, np.float64)
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        for item, channels in enumerate(values):
            for channel, image in enumerate(channels):
                title = (
                    f"{name}, sample {item}, channel {channel}" if len(channels) > 1 else f"{name}, sample {item}"
                )
                yield _picture(title, image, low, high)


def _picture(title: str, image: NDArray[np.float64], low: float, high: float) -> Picture:
    grid: NDArray[Any] = image.reshape(*[1] * (2 - image.ndim), *image.shape)
    grid = grid.reshape(*grid.shape, *[1] * (3 - grid.ndim))
    if grid.shape[2] > SLICES:
        middle = grid.shape[2] // 2
        title += f", slice {middle} of {grid.shape[2]}"
        grid = grid[..., middle : middle + 1]
    step = -(-max(grid.shape[:2]) // CELLS)
    if step > 1:
        title += f", one voxel in {step} along each axis"
        grid = grid[::step, ::step]
    rows, columns, slices = grid.shape
    size = max(4, min(_LARGEST, _WIDTH // (columns * slices)))
    cells = []
    for (row, column, z), value in np.ndenumerate(grid):
        share = (value - low) / (high - low) if high > low else 0.0
        colour, dark = _NOT_FINITE, True
        if np.isfinite(value):
            mixed = (round(a + share * (b - a)) for a, b in zip(_PALE, _DEEP, strict=True))
            colour, dark = "#{:02x}{:02x}{:02x}".format(*mixed), share > 0.5
        cells.append(
            Cell(
                x=(column + z * columns) * size + z * size // 2,
                y=row * size,
                colour=colour,
                ink="#ffffff" if dark else "#1d2733",
                value=f"{value:.9g}",
                text=f"{value:.3g}" if size >= _ROOM else "",
            )
        )
    return Picture(title, columns * slices * size + (slices - 1) * size // 2, rows * size, size, cells)
