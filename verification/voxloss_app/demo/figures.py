"""The pictures of the report: slices with the segmentation on them, and the curves of the training run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from voxloss_app.demo.data import CLASSES
from voxloss_app.theme import Theme

# Okabe and Ito 2008, distinct to the colour-blind too; the background has none.
COLOURS = (None, "#56b4e9", "#e69f00", "#009e73")
ERROR = "#ff4d6d"


@dataclass(frozen=True)
class Segmentation:
    """A whole image, and two label maps [X, Y, Z] of its last part along x; RAS, and the affine without rotation.

    Attributes:
        image: voxels that are exactly its minimum are outside of the head.
        affine: of the image, to mm.
    """

    image: NDArray[np.float32]
    reference: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    affine: NDArray[np.float64]

    def whole(self, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Labels on the grid of the image, 0 where there are none."""
        before = self.image.shape[0] - labels.shape[0]
        return np.pad(labels, ((before, 0), (0, 0), (0, 0)))


@dataclass(frozen=True)
class Curves:
    """The loss of each step, and the held-out Dice per class at some of them."""

    losses: Sequence[float]
    dice: Mapping[int, Sequence[float]]


def slices_png(segmentation: Segmentation, theme: Theme) -> bytes:
    """The slices alone."""
    figure = Figure(figsize=(10, 8.1), facecolor=theme.paper, layout="constrained")
    _slices(figure, segmentation, theme)
    return _png(figure)


def curves_png(curves: Curves, theme: Theme) -> bytes:
    """The curves alone, on a transparent ground."""
    figure = Figure(figsize=(12, 3.6), facecolor="none", layout="constrained")
    _curves(figure, curves, theme)
    return _png(figure)


def overview_png(segmentation: Segmentation, curves: Curves, theme: Theme) -> bytes:
    """Slices and curves in one picture."""
    figure = Figure(figsize=(10, 11), facecolor=theme.paper, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[8.1, 2.9])
    for part in (above, below):
        part.set_facecolor(theme.paper)
    _slices(above, segmentation, theme)
    _curves(below, curves, theme)
    return _png(figure)


def _slices(figure: Figure | SubFigure, segmentation: Segmentation, theme: Theme) -> None:
    """A row for each plane: image, ground truth, prediction and errors, all of one size in mm."""
    head = segmentation.image > segmentation.image.min()
    spacing, origin = segmentation.affine.diagonal()[:3], segmentation.affine[:3, 3]
    corners = np.array([[found.min(), found.max() + 1] for found in np.nonzero(head)])
    low, high = origin + spacing * (corners.T - 0.5)  # a voxel's coordinate is its centre
    middle, half = (low + high) / 2, 1.1 * (high - low).max() / 2  # with room for the letters
    before = segmentation.image.shape[0] - segmentation.reference.shape[0]
    centre = [int(c) for c in np.argwhere(segmentation.reference).mean(0).round()]
    centre[0] += before
    rows = figure.subplots(3, 4, squeeze=False)
    for row, (name, axis) in zip(rows, (("axial", 2), ("coronal", 1), ("sagittal", 0)), strict=True):
        _plane(row, name, axis, centre[axis], segmentation, theme)
        across, up = (a for a in range(3) if a != axis)
        for axes in row:
            axes.set_xlim(middle[across] - half, middle[across] + half)
            axes.set_ylim(middle[up] - half, middle[up] + half)
    for axes, title in zip(rows[0], ("T1", "ground truth", "prediction", "errors"), strict=True):
        axes.set_title(title, color=theme.ink, fontsize=12)
    figure.legend(
        handles=[*_legend(), Patch(color=ERROR, label="prediction ≠ ground truth")],
        loc="outside lower center",
        ncols=len(CLASSES),
        frameon=False,
        labelcolor=theme.ink,
        fontsize=11,
    )


def _plane(
    row: Sequence[Axes], name: str, axis: int, index: int, segmentation: Segmentation, theme: Theme
) -> None:
    spacing, origin = segmentation.affine.diagonal()[:3], segmentation.affine[:3, 3]
    across, up = (a for a in range(3) if a != axis)
    extent: list[float] = []
    for a in (across, up):
        first = origin[a] - spacing[a] / 2
        extent += [first, first + spacing[a] * segmentation.image.shape[a]]
    whole = segmentation.image
    image = np.moveaxis(whole, axis, 0)[index].T
    image = np.where(image > whole.min(), image, np.nan)  # nothing is drawn outside of the head
    reference = np.moveaxis(segmentation.whole(segmentation.reference), axis, 0)[index].T
    prediction = np.moveaxis(segmentation.whole(segmentation.prediction), axis, 0)[index].T
    wrong = np.where((prediction != reference)[..., None], to_rgba(ERROR), (0, 0, 0, 0))
    layers = (None, _coloured(reference), _coloured(prediction), wrong)
    shown: dict[str, Any] = {"origin": "lower", "extent": extent, "interpolation": "nearest"}
    for axes, layer in zip(row, layers, strict=True):
        axes.imshow(image, cmap="gray", vmin=whole.min(), vmax=whole.max(), **shown)
        if layer is not None:
            axes.imshow(layer, **shown)
        axes.set_facecolor(theme.paper)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
    lowest, highest = "LPI", "RAS"
    for x, y, letter, horizontal, vertical in (
        (0.02, 0.5, lowest[across], "left", "center"),
        (0.98, 0.5, highest[across], "right", "center"),
        (0.5, 0.01, lowest[up], "center", "bottom"),
        (0.5, 0.99, highest[up], "center", "top"),
    ):
        style: dict[str, Any] = {"ha": horizontal, "va": vertical, "color": theme.ink, "fontsize": 10}
        row[0].text(x, y, letter, transform=row[0].transAxes, **style)
    position = f"{origin[axis] + spacing[axis] * index:+.0f}".replace("-", "−")
    row[0].set_ylabel(f"{name}, {'xyz'[axis]} = {position} mm", color=theme.ink, fontsize=11)


def _coloured(labels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Labels [Y, X] as colours [Y, X, 4]; the background is transparent."""
    table = np.array([to_rgba(colour, 0.6) if colour else (0, 0, 0, 0) for colour in COLOURS])
    return table[labels]


def _legend() -> list[Patch]:
    return [Patch(color=c, label=name) for c, name in zip(COLOURS, CLASSES, strict=True) if c]


def _curves(figure: Figure | SubFigure, curves: Curves, theme: Theme) -> None:
    left, right = figure.subplots(1, 2)
    steps = np.arange(1, len(curves.losses) + 1)
    left.plot(steps, curves.losses, color=theme.ink, alpha=0.2, linewidth=0.6)
    width = max(1, len(steps) // 20)
    smooth = np.convolve(curves.losses, np.ones(width) / width, mode="valid")
    left.plot(np.arange(len(smooth)) + (width + 1) / 2, smooth, color=theme.ink, linewidth=1.8)
    _dress(left, "training loss", theme)
    evaluated = list(curves.dice)
    for label in range(1, len(CLASSES)):
        scores = [dice[label] for dice in curves.dice.values()]
        right.plot(evaluated, scores, color=COLOURS[label], marker="o", markersize=4, linewidth=1.8)
    right.legend(
        handles=_legend(),
        frameon=False,
        labelcolor=theme.ink,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=len(CLASSES),
        borderaxespad=0.2,
        handlelength=1,
    )
    _dress(right, "held-out Dice", theme)
    for axes in (left, right):
        axes.set_ylim(0, 1)


def _dress(axes: Axes, title: str, theme: Theme) -> None:
    axes.set_title(title, color=theme.ink, fontsize=11, loc="left")
    axes.set_xlabel("step", color=theme.ink)
    axes.set_facecolor("none")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=theme.ink, length=0)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", pad_inches=0.15)
    return buffer.getvalue()
