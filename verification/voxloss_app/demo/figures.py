"""The pictures of the report: slices with the segmentation on them, and the curves of the training."""

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
from voxloss_app.theme import DARK, Theme

# Okabe and Ito 2008, distinct to the colour-blind too; the background has none.
COLOURS = (None, "#56b4e9", "#e69f00", "#009e73")
ERROR = "#ff4d6d"


@dataclass(frozen=True)
class Segmentation:
    """An image and two label maps [X, Y, Z] in RAS orientation, and the affine to mm, without rotation."""

    image: NDArray[np.float32]
    reference: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    affine: NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """The loss of each step, and the held-out Dice per class at some of them."""

    losses: Sequence[float]
    dice: Mapping[int, Sequence[float]]


def slices_png(segmentation: Segmentation) -> bytes:
    """The slices alone, on black in any theme, as radiologists have them."""
    figure = Figure(figsize=(12, 6.6), facecolor=DARK.paper, layout="constrained")
    _slices(figure, segmentation)
    return _png(figure)


def curves_png(curves: Curves, theme: Theme) -> bytes:
    """The curves alone, on a transparent ground."""
    figure = Figure(figsize=(12, 3.6), facecolor="none", layout="constrained")
    _curves(figure, curves, theme)
    return _png(figure)


def overview_png(segmentation: Segmentation, curves: Curves) -> bytes:
    """Slices and curves in one picture."""
    figure = Figure(figsize=(12, 9.8), facecolor=DARK.paper, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[6.6, 3.2])
    for part in (above, below):
        part.set_facecolor(DARK.paper)
    _slices(above, segmentation)
    _curves(below, curves, DARK)
    return _png(figure)


def _slices(figure: Figure | SubFigure, segmentation: Segmentation) -> None:
    """Axial and coronal above, sagittal below; each as T1, ground truth, prediction and errors."""
    above, below = figure.subfigures(2, 1, height_ratios=[117, 95])
    axial, coronal = above.subfigures(1, 2)
    centre = [int(c) for c in np.argwhere(segmentation.reference).mean(0).round()]
    for part, name, axis in ((axial, "Axial", 2), (coronal, "Coronal", 1), (below, "Sagittal", 0)):
        part.set_facecolor(DARK.paper)
        _plane(part, name, axis, centre[axis], segmentation)
    above.set_facecolor(DARK.paper)
    figure.legend(
        handles=[*_legend(), Patch(color=ERROR, label="prediction ≠ ground truth")],
        loc="outside lower center",
        ncols=len(CLASSES),
        frameon=False,
        labelcolor=DARK.ink,
    )


def _plane(figure: SubFigure, name: str, axis: int, index: int, segmentation: Segmentation) -> None:
    spacing, origin = segmentation.affine.diagonal()[:3], segmentation.affine[:3, 3]
    across, up = (a for a in range(3) if a != axis)
    extent: list[float] = []
    for a in (across, up):
        first = origin[a] - spacing[a] / 2  # a voxel's coordinate is its centre
        extent += [first, first + spacing[a] * segmentation.reference.shape[a]]
    image = np.moveaxis(segmentation.image, axis, 0)[index].T
    reference = np.moveaxis(segmentation.reference, axis, 0)[index].T
    prediction = np.moveaxis(segmentation.prediction, axis, 0)[index].T
    wrong = np.where((prediction != reference)[..., None], to_rgba(ERROR), (0, 0, 0, 0))
    layers = {"T1": None, "truth": _coloured(reference), "prediction": _coloured(prediction), "mistakes": wrong}
    for axes, (title, layer) in zip(figure.subplots(1, len(layers)), layers.items(), strict=True):
        shown: dict[str, Any] = {"origin": "lower", "extent": extent, "interpolation": "nearest"}
        axes.imshow(image, cmap="gray", **shown)
        if layer is not None:
            axes.imshow(layer, **shown)
        axes.set_axis_off()
        axes.set_title(title, color=DARK.ink, fontsize=9)
    low, high = "LPI", "RAS"
    first_axes = figure.axes[0]
    for x, y, letter, horizontal, vertical in (
        (0.02, 0.5, low[across], "left", "center"),
        (0.98, 0.5, high[across], "right", "center"),
        (0.5, 0.02, low[up], "center", "bottom"),
        (0.5, 0.98, high[up], "center", "top"),
    ):
        style: dict[str, Any] = {"ha": horizontal, "va": vertical, "color": DARK.ink, "fontsize": 8}
        first_axes.text(x, y, letter, transform=first_axes.transAxes, **style)
    position = f"{origin[axis] + spacing[axis] * index:+.0f}".replace("-", "−")
    figure.suptitle(f"{name}, {'xyz'[axis]} = {position} mm", color=DARK.ink, fontsize=11)


def _coloured(labels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Labels [Y, X] as colours [Y, X, 4]; the background is transparent."""
    table = np.array([to_rgba(colour, 0.6) if colour else (0, 0, 0, 0) for colour in COLOURS])
    return table[labels]


def _legend() -> list[Patch]:
    return [Patch(color=c, label=name) for c, name in zip(COLOURS, CLASSES, strict=True) if c]


def _curves(figure: Figure | SubFigure, curves: Curves, theme: Theme) -> None:
    left, right = figure.subplots(1, 2)
    steps = np.arange(1, len(curves.losses) + 1)
    left.plot(steps, curves.losses, color=theme.ink, alpha=0.35, linewidth=0.8)
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
