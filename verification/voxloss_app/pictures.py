"""The pictures of docs/choose.md, drawn from small synthetic slices and from the gradients of the losses on them.

    python -m voxloss_app.pictures docs/assets

It needs `voxloss[demo,maps]`, takes seconds, and draws the same bytes again with the same versions.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from voxloss import (
    CCDiceCELoss,
    DiceBoundaryLoss,
    DiceCELoss,
    DiceCESkeletonRecallLoss,
    DiceLoss,
    StatisticsLoss,
)
from voxloss.transforms import NearestComponentd, SignedDistanced, Skeletonized
from voxloss_app.theme import LIGHT
from voxloss_data.files import save_bytes

Image = NDArray[Any]

# Okabe and Ito 2008, distinct to the colour-blind too, and so is matplotlib's PuOr.
_GREY, _SKY, _BLUE, _ORANGE, _VERMILION = "#a9b2bc", "#56b4e9", "#0072b2", "#e69f00", "#d55e00"
_DIVERGING = "PuOr_r"
_TINTS = "#dbe7f0", "#f7e6c4", "#e4e4e4", "#f3d3c0", "#d5ece4", "#eadcec"  # of areas that touch
_OPTIONS: dict[str, Any] = {"softmax": True, "to_onehot_y": True, "include_background": False}


def vessel() -> tuple[Image, Image]:
    """Labels of a trunk with two branches, and logits: one branch is broken, and the trunk's edge is missed."""
    y, x = np.mgrid[:72, :120].astype(float)

    def depth(trunk: float) -> Image:
        """How deep inside the nearest vessel, in voxels; negative outside of all."""
        branches = (((4, 36), (64, 36), trunk), ((64, 36), (114, 12), 2.2), ((64, 36), (114, 60), 2.2))
        deep: Image = np.maximum.reduce([radius - _from_segment(x, y, a, b) for a, b, radius in branches])
        return deep

    logits = np.clip(3 * depth(6.0), -4, 4)
    gap = (x > 82) & (x < 96) & (y < 36)
    return (depth(8.0) > 0).astype(np.uint8), np.where(gap, np.minimum(logits, -1.5), logits)


def organ() -> tuple[Image, Image]:
    """Labels of an organ, and logits with two false positives of one size: at the boundary and far from it."""
    y, x = np.mgrid[:80, :112].astype(float)
    inside = ((x - 40) / 27) ** 2 + ((y - 40) / 22) ** 2 < 1
    inside |= (x - 58) ** 2 + (y - 26) ** 2 < 13**2
    wrong = [(x - a) ** 2 + (y - b) ** 2 < 5.5**2 for a, b in ((67, 51), (98, 66))]
    return inside.astype(np.uint8), np.where(inside | wrong[0] | wrong[1], 3.0, -3.0)


def lesions() -> tuple[Image, Image]:
    """Labels of a large lesion and five small ones, and logits that miss a small one and the large one's rim."""
    y, x = np.mgrid[:80, :112].astype(float)

    def depth(radius: float) -> Image:
        """How deep inside the nearest lesion, in voxels, where the first has this radius; negative outside."""
        spots = ((36, 44, radius), (92, 18, 4.0), (74, 64, 5.0), (98, 52, 3.5), (66, 12, 3.0), (14, 12, 3.0))
        deep: Image = np.maximum.reduce([r - np.hypot(x - a, y - b) for a, b, r in spots])
        return deep

    logits = np.clip(3 * depth(19.0), -4, 4)
    missed = np.hypot(x - 98, y - 52) < 8
    return (depth(22.0) > 0).astype(np.uint8), np.where(missed, np.minimum(logits, -1.5), logits)


def tumour() -> Image:
    """Labels of a slice as BraTS has them, renumbered: 1 oedema, 2 necrosis, 3 enhancing tumour."""
    y, x = np.mgrid[:72, :80].astype(float)
    angle = np.arctan2(y - 36, x - 38)
    radius = np.hypot(x - 38, y - 36)
    labels = np.zeros(x.shape, np.uint8)
    labels[radius < 28 + 3 * np.cos(2 * angle)] = 1
    labels[np.hypot(x - 41, y - 33) < 16 + 2 * np.sin(4 * angle)] = 3
    labels[np.hypot(x - 43, y - 32) < 9] = 2
    return labels


def push(loss: StatisticsLoss, labels: Image, logits: Image, **maps: Image) -> Image:
    """−∂L/∂z of the foreground's logit z, `[Y, X]`: positive where a step raises it."""
    both = torch.as_tensor(np.stack([np.zeros_like(logits), logits]))[None].requires_grad_()
    given: Any = {name: torch.as_tensor(found)[None] for name, found in maps.items()}
    (gradient,) = torch.autograd.grad(loss(both, torch.as_tensor(labels)[None, None], **given), both)
    return (-gradient[0, 1]).numpy()


def thin_structures() -> Figure:
    """A vessel with a broken branch, its skeleton, and the gradients with and without skeleton recall."""
    labels, logits = vessel()
    skeleton = Skeletonized("label")({"label": labels[None]})["label_skeleton"]
    without = push(DiceCELoss(**_OPTIONS), labels, logits)
    beside = push(DiceCESkeletonRecallLoss(**_OPTIONS), labels, logits, skeleton=skeleton)
    figure, row = _row("labels and skeleton", "prediction", "DiceCELoss", "DiceCESkeletonRecallLoss")
    _classes(row[0], labels + (skeleton[0] > 0), {"vessel": _SKY, "skeleton": _BLUE})
    _prediction(row[1], labels, logits, "vessel")
    _pushes(figure, row[2:], labels, logits, without, beside)
    return figure


def many_lesions() -> Figure:
    """Lesions, the cell around each, and the gradients of Dice with cross entropy without and with cells."""
    labels, logits = lesions()
    cells = NearestComponentd("label")({"label": labels[None]})["label_nearest"]
    without = push(DiceCELoss(**_OPTIONS), labels, logits)
    by_cell = push(CCDiceCELoss(**_OPTIONS), labels, logits, partition=cells)
    figure, row = _row("prediction", "cells", "DiceCELoss", "CCDiceCELoss")
    _prediction(row[0], labels, logits, "lesions")
    row[1].imshow(cells[0], cmap=ListedColormap(_TINTS))
    row[1].contour(labels, [0.5], colors=_BLUE, linewidths=1)
    _legend(row[1], [Patch(color=_TINTS[0], label="nearest to one lesion")])
    _pushes(figure, row[2:], labels, logits, without, by_cell)
    return figure


def boundary() -> Figure:
    """An organ, its signed distance, and the gradients of Dice with and without the boundary loss."""
    labels, logits = organ()
    distance = SignedDistanced("label", channels=2)({"label": labels[None]})["label_distance"]
    without = push(DiceLoss(**_OPTIONS), labels, logits)
    beside = push(DiceBoundaryLoss(**_OPTIONS, lambda_boundary=0.2), labels, logits, distance=distance)
    figure, row = _row("prediction", "signed distance φ", "DiceLoss", "DiceBoundaryLoss, λ = 0.2")
    _prediction(row[0], labels, logits, "organ")
    most = float(np.abs(distance[1]).max())
    shown = row[1].imshow(distance[1], cmap=_DIVERGING, vmin=-most, vmax=most)
    row[1].contour(labels, [0.5], colors=LIGHT.ink, linewidths=1)
    _bar(figure, shown, [row[1]], "voxels")
    _pushes(figure, row[2:], labels, logits, without, beside)
    return figure


def nested_regions() -> Figure:
    """A label map, and the three regions that it stands for."""
    labels = tumour()
    regions = {"whole tumour": [1, 2, 3], "tumour core": [2, 3], "enhancing tumour": [3]}
    titles = [f"channel {channel}: {region}" for channel, region in enumerate(regions.values())]
    figure, row = _row("label map", *titles)
    _classes(row[0], labels, {"1": _SKY, "2": _ORANGE, "3": _VERMILION})
    for axes, (name, region) in zip(row[1:], regions.items(), strict=True):
        _classes(axes, np.isin(labels, region).astype(np.uint8), {name: _BLUE})
    return figure


PICTURES: Mapping[str, Callable[[], Figure]] = {
    "thin-structures": thin_structures,
    "many-lesions": many_lesions,
    "boundary": boundary,
    "nested-regions": nested_regions,
}


def png(name: str) -> bytes:
    """Draw one of `PICTURES`."""
    buffer = io.BytesIO()
    # Without the version of matplotlib, which the picture does not depend on.
    PICTURES[name]().savefig(buffer, format="png", dpi=92, metadata={"Software": None})
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the pictures into a folder."""
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/choose.md.")
    parser.add_argument("out", type=Path, help="the folder that they are saved to")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        save_bytes(out / f"{name}.png", png(name))
    return 0


def _from_segment(x: Image, y: Image, a: tuple[float, float], b: tuple[float, float]) -> Image:
    """The distance of each voxel to the segment from a to b."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = np.clip(((x - a[0]) * dx + (y - a[1]) * dy) / (dx**2 + dy**2), 0, 1)
    return np.hypot(x - a[0] - along * dx, y - a[1] - along * dy)


def _row(*titles: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(3.1 * len(titles), 3.2), facecolor=LIGHT.paper, layout="compressed")
    row = list(figure.subplots(1, len(titles)))
    for axes, title in zip(row, titles, strict=True):
        axes.set_title(title, fontsize=10.5, color=LIGHT.ink)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(LIGHT.grid)
    return figure, row


def _classes(axes: Axes, shown: Image, colours: Mapping[str, str]) -> None:
    """A label map, 0 in the page's colour, with the names of the others below it."""
    axes.imshow(shown, cmap=ListedColormap([LIGHT.paper, *colours.values()]), vmin=0, vmax=len(colours))
    _legend(axes, [Patch(color=colour, label=name) for name, colour in colours.items()])


def _prediction(axes: Axes, labels: Image, logits: Image, name: str) -> None:
    """Probabilities in grey, and the outline of the labels."""
    shades = LinearSegmentedColormap.from_list("predicted", [LIGHT.paper, _GREY])
    axes.imshow(1 / (1 + np.exp(-logits)), cmap=shades, vmin=0, vmax=1)
    axes.contour(labels, [0.5], colors=_BLUE, linewidths=1)
    outline = Line2D([], [], color=_BLUE, linewidth=1, label=f"{name} in the labels")
    _legend(axes, [Patch(color=_GREY, label="predicted"), outline])


def _pushes(figure: Figure, row: Sequence[Axes], labels: Image, logits: Image, *found: Image) -> None:
    """Gradients on one scale, and the outlines of the labels and, dashed, of the prediction."""
    most = 1e3 * max(float(np.abs(each).max()) for each in found)
    for axes, each in zip(row, found, strict=True):
        shown = axes.imshow(1e3 * each, cmap=_DIVERGING, vmin=-most, vmax=most)
        axes.contour(labels, [0.5], colors=LIGHT.ink, linewidths=0.8)
        axes.contour(logits, [0], colors=LIGHT.ink, linewidths=0.6, linestyles="dashed")
    _bar(figure, shown, row, "−∂L/∂z × 1000")


def _bar(figure: Figure, shown: Any, row: Sequence[Axes], label: str) -> None:
    bar = figure.colorbar(shown, ax=list(row), location="bottom", shrink=0.8, aspect=30)
    bar.set_label(label, fontsize=9, color=LIGHT.ink)
    bar.ax.tick_params(labelsize=8, colors=LIGHT.ink)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _legend(axes: Axes, handles: Sequence[Patch | Line2D]) -> None:
    axes.legend(
        handles=list(handles),
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        labelcolor=LIGHT.ink,
        handlelength=1.2,
        columnspacing=1.2,
    )


if __name__ == "__main__":
    sys.exit(main())
