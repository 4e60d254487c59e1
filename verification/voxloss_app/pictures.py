"""The pictures of the pages, for light and dark ones: from synthetic slices and what the losses do on them.

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
import PIL.Image
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from voxloss import (
    CCDiceCELoss,
    CrossEntropyLoss,
    DiceBoundaryLoss,
    DiceCELoss,
    DiceCESkeletonRecallLoss,
    DiceLoss,
    FocalLoss,
    JaccardLoss,
    StatisticsLoss,
    TverskyLoss,
)
from voxloss.transforms import NearestComponentd, SignedDistanced, Skeletonized
from voxloss_app.bench.one_pass import one_pass
from voxloss_app.theme import BLUE, DARK, LIGHT, ORANGE, SKY, THEMES, VERMILION, Theme, on
from voxloss_data.files import save_bytes

Image = NDArray[Any]

# Distinct to the colour-blind too. 0 of the diverging ones is the page, so that no gradient is nothing to see.
_DIVERGING = {
    LIGHT: ("#35106b", "#8a76b8", LIGHT.paper, "#e08214", "#7f3b08"),
    DARK: ("#d3c7ff", "#7d62d6", DARK.paper, "#b8650f", "#ffc46b"),
}
_PREDICTED = {LIGHT: "#a9b2bc", DARK: "#55606d"}
_TINTS = {  # of areas that touch
    LIGHT: ("#dbe7f0", "#f7e6c4", "#e4e4e4", "#f3d3c0", "#d5ece4", "#eadcec"),
    DARK: ("#1f3d52", "#4f3f14", "#3b3f45", "#552f1b", "#17463a", "#452e4d"),
}
# In inches and points: letters are readable where a page of a telephone's width shows the picture.
_WIDTH, _TITLE, _TEXT = 5.2, 11.5, 10.5
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
    y, x = np.mgrid[4:68, 1:75].astype(float)
    angle = np.arctan2(y - 36, x - 38)
    radius = np.hypot(x - 38, y - 36)
    labels = np.zeros(x.shape, np.uint8)
    labels[radius < 28 + 3 * np.cos(2 * angle)] = 1
    labels[np.hypot(x - 41, y - 33) < 16 + 2 * np.sin(4 * angle)] = 3
    labels[np.hypot(x - 43, y - 32) < 9] = 2
    return labels


# Centres, x and y, and the probability of the organ there.
_SPOTS = {
    "missed, p = 0.3": (36.0, 25.0, 0.3),
    "missed, p = 0.02": (36.0, 47.0, 0.02),
    "false positive, p = 0.7": (98.0, 16.0, 0.7),
    "false positive, p = 0.98": (98.0, 56.0, 0.98),
}


def errors() -> tuple[Image, Image, dict[str, Image]]:
    """Labels of an organ, logits with four errors of one size, and where these are.

    Of the two missed and the two false parts one is uncertain and one is not. So is the edge of the organ.
    """
    y, x = np.mgrid[:72, :112].astype(float)
    deep = 24 * (1 - np.hypot((x - 46) / 32, (y - 36) / 24))
    logits = np.clip(deep, -3, 3)
    found = {name: np.hypot(x - a, y - b) < 6 for name, (a, b, _) in _SPOTS.items()}
    for name, (_, _, p) in _SPOTS.items():
        logits[found[name]] = np.log(p / (1 - p))
    return (deep > 0).astype(np.uint8), logits, found


def overlap_and_voxelwise() -> dict[str, StatisticsLoss]:
    """The losses whose gradients are drawn side by side; those of overlap are of the organ alone."""
    of_voxels: Any = {"to_onehot_y": True}
    return {
        "DiceLoss": DiceLoss(**_OPTIONS),
        "JaccardLoss": JaccardLoss(**_OPTIONS),
        "TverskyLoss, α = 0.1, β = 0.9": TverskyLoss(alpha=0.1, beta=0.9, **_OPTIONS),
        "CrossEntropyLoss": CrossEntropyLoss(softmax=True, **of_voxels),
        "FocalLoss, γ = 2": FocalLoss(use_softmax=True, gamma=2.0, **of_voxels),
        "DiceCELoss": DiceCELoss(**_OPTIONS),
    }


def push(loss: StatisticsLoss, labels: Image, logits: Image, **maps: Image) -> Image:
    """−∂L/∂z of the foreground's logit z, `[Y, X]`: positive where a step raises it."""
    both = torch.as_tensor(np.stack([np.zeros_like(logits), logits]))[None].requires_grad_()
    given: Any = {name: torch.as_tensor(found)[None] for name, found in maps.items()}
    (gradient,) = torch.autograd.grad(loss(both, torch.as_tensor(labels)[None, None], **given), both)
    return (-gradient[0, 1]).numpy()


def gradients(theme: Theme) -> Figure:
    """A prediction with four errors, and the gradient of each loss, each on a scale of its own."""
    labels, logits, _ = errors()
    found = {name: push(loss, labels, logits) for name, loss in overlap_and_voxelwise().items()}
    layout = ConstrainedLayoutEngine(h_pad=0.05, w_pad=0.05, hspace=0.02, wspace=0.02)
    figure = Figure(figsize=(_WIDTH, 8.0), facecolor=theme.paper, layout=layout)
    top, below = figure.subfigures(2, 1, height_ratios=(1, 3), facecolor=theme.paper)
    first = top.subplots()
    _panel(first, "prediction", theme)
    _prediction(first, labels, logits, theme)
    _spots(first, theme)
    panels = list(below.subplots(len(found) // 2, 2).flat)
    for axes, (name, each) in zip(panels, found.items(), strict=True):
        _panel(axes, name, theme)
        shown = _push(axes, labels, logits, each / np.abs(each).max(), 1.0, theme)
    _bar(below, shown, panels, "−∂L/∂z, relative to the largest of the panel", theme)
    return figure


def thin_structures(theme: Theme) -> Figure:
    """A vessel with a broken branch, its skeleton, and the gradients with and without skeleton recall."""
    labels, logits = vessel()
    skeleton = Skeletonized("label")({"label": labels[None]})["label_skeleton"]
    without = push(DiceCELoss(**_OPTIONS), labels, logits)
    beside = push(DiceCESkeletonRecallLoss(**_OPTIONS), labels, logits, skeleton=skeleton)
    figure, panels = _four(
        ("labels and skeleton", "prediction", "DiceCELoss", "DiceCESkeletonRecallLoss"), 4.6, theme
    )
    _classes(panels[0], labels + (skeleton[0] > 0), {"vessel": SKY, "skeleton": BLUE}, theme)
    _prediction(panels[1], labels, logits, theme)
    _pushes(figure, panels[2:], labels, logits, (without, beside), theme)
    return figure


def many_lesions(theme: Theme) -> Figure:
    """Lesions, the cell around each, and the gradients of Dice with cross entropy without and with cells."""
    labels, logits = lesions()
    cells = NearestComponentd("label")({"label": labels[None]})["label_nearest"]
    without = push(DiceCELoss(**_OPTIONS), labels, logits)
    by_cell = push(CCDiceCELoss(**_OPTIONS), labels, logits, partition=cells)
    figure, panels = _four(("prediction", "cells", "DiceCELoss", "CCDiceCELoss"), 5.2, theme)
    _prediction(panels[0], labels, logits, theme)
    panels[1].imshow(cells[0], cmap=ListedColormap(_TINTS[theme]))
    panels[1].contour(labels, [0.5], colors=on(theme, BLUE), linewidths=1.2)
    _legend(panels[1], [Patch(color=_TINTS[theme][0], label="nearest to one lesion")], theme)
    _pushes(figure, panels[2:], labels, logits, (without, by_cell), theme)
    return figure


def boundary(theme: Theme) -> Figure:
    """An organ, its signed distance, and the gradients of Dice with and without the boundary loss."""
    labels, logits = organ()
    distance = SignedDistanced("label", channels=2)({"label": labels[None]})["label_distance"]
    without = push(DiceLoss(**_OPTIONS), labels, logits)
    beside = push(DiceBoundaryLoss(**_OPTIONS, lambda_boundary=0.2), labels, logits, distance=distance)
    titles = ("prediction", "signed distance φ", "DiceLoss", "DiceBoundaryLoss, λ = 0.2")
    figure, panels = _four(titles, 5.4, theme)
    _prediction(panels[0], labels, logits, theme)
    most = float(np.abs(distance[1]).max())
    shown = panels[1].imshow(distance[1], cmap=_diverging(theme), vmin=-most, vmax=most)
    panels[1].contour(labels, [0.5], colors=theme.ink, linewidths=1)
    _bar(figure, shown, [panels[1]], "voxels", theme)
    _pushes(figure, panels[2:], labels, logits, (without, beside), theme)
    return figure


def nested_regions(theme: Theme) -> Figure:
    """A label map, and the three regions that it stands for."""
    labels = tumour()
    regions = {"whole tumour": [1, 2, 3], "tumour core": [2, 3], "enhancing tumour": [3]}
    titles = [f"channel {channel}: {region}" for channel, region in enumerate(regions)]
    figure, panels = _four(("label map", *titles), 5.2, theme)
    _classes(panels[0], labels, {"1": SKY, "2": ORANGE, "3": VERMILION}, theme)
    for axes, region in zip(panels[1:], regions.values(), strict=True):
        name = "labels " + ", ".join(map(str, region)) if len(region) > 1 else f"label {region[0]}"
        _classes(axes, np.isin(labels, region).astype(np.uint8), {name: BLUE}, theme)
    return figure


PICTURES: Mapping[str, Callable[[Theme], Figure]] = {
    "gradients": gradients,
    "thin-structures": thin_structures,
    "many-lesions": many_lesions,
    "boundary": boundary,
    "nested-regions": nested_regions,
    "one-pass": one_pass,
}


def png(name: str, theme: Theme) -> bytes:
    """Draw one of `PICTURES`."""
    drawn, buffer = io.BytesIO(), io.BytesIO()
    PICTURES[name](theme).savefig(drawn, format="png", dpi=140)
    # A palette makes it a third as large. Nothing of the metadata is kept, and so not the version of matplotlib.
    few = PIL.Image.open(drawn).convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE)
    few.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the pictures into a folder."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the pages, light and dark.")
    parser.add_argument("out", type=Path, help="the folder that they are saved to")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        for page, theme in THEMES.items():
            save_bytes(out / f"{name}-{page}.png", png(name, theme))
    return 0


def _from_segment(x: Image, y: Image, a: tuple[float, float], b: tuple[float, float]) -> Image:
    """The distance of each voxel to the segment from a to b."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = np.clip(((x - a[0]) * dx + (y - a[1]) * dy) / (dx**2 + dy**2), 0, 1)
    return np.hypot(x - a[0] - along * dx, y - a[1] - along * dy)


def _four(titles: Sequence[str], height: float, theme: Theme) -> tuple[Figure, list[Axes]]:
    """Two rows of two panels: more beside each other would be too small on a narrow page."""
    figure = Figure(figsize=(_WIDTH, height), facecolor=theme.paper, layout="compressed")
    panels = list(figure.subplots(2, 2).flat)
    for axes, title in zip(panels, titles, strict=True):
        _panel(axes, title, theme)
    return figure, panels


def _panel(axes: Axes, title: str, theme: Theme) -> None:
    axes.set_title(title, fontsize=_TITLE, color=theme.ink)
    axes.set_facecolor(theme.paper)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(theme.grid)


def _classes(axes: Axes, shown: Image, colours: Mapping[str, str], theme: Theme) -> None:
    """A label map, 0 in the page's colour, with the names of the others below it."""
    axes.imshow(shown, cmap=ListedColormap([theme.paper, *colours.values()]), vmin=0, vmax=len(colours))
    _legend(axes, [Patch(color=colour, label=name) for name, colour in colours.items()], theme)


def _prediction(axes: Axes, labels: Image, logits: Image, theme: Theme) -> None:
    """Probabilities in grey, and the outline of the labels."""
    shades = LinearSegmentedColormap.from_list("predicted", [theme.paper, _PREDICTED[theme]])
    axes.imshow(1 / (1 + np.exp(-logits)), cmap=shades, vmin=0, vmax=1)
    axes.contour(labels, [0.5], colors=on(theme, BLUE), linewidths=1.2)
    outline = Line2D([], [], color=on(theme, BLUE), linewidth=1.2, label="labels")
    _legend(axes, [Patch(color=_PREDICTED[theme], label="predicted"), outline], theme)


def _spots(axes: Axes, theme: Theme) -> None:
    """The names of the errors, on the left and on the right of the panel, with an arrow to each."""
    right = axes.get_xlim()[1]
    for name, (x, y, _) in _SPOTS.items():
        on_the_left = x < right / 2
        axes.annotate(
            name.replace(", ", ",\n"),
            (x, y),
            (-4 if on_the_left else right + 4, y),
            in_layout=False,  # beside the panel is room
            ha="right" if on_the_left else "left",
            va="center",
            fontsize=_TEXT,
            color=theme.ink,
            arrowprops={"arrowstyle": "-|>", "color": theme.ink, "linewidth": 0.8},
        )


def _pushes(
    figure: Figure, panels: Sequence[Axes], labels: Image, logits: Image, found: Sequence[Image], theme: Theme
) -> None:
    """Gradients on one scale."""
    most = 1e3 * max(float(np.abs(each).max()) for each in found)
    for axes, each in zip(panels, found, strict=True):
        shown = _push(axes, labels, logits, 1e3 * each, most, theme)
    _bar(figure, shown, panels, "−∂L/∂z × 1000", theme)


def _push(axes: Axes, labels: Image, logits: Image, each: Image, most: float, theme: Theme) -> Any:
    """A gradient, and the outlines of the labels and, dashed, of the prediction."""
    shown = axes.imshow(each, cmap=_diverging(theme), vmin=-most, vmax=most)
    axes.contour(labels, [0.5], colors=theme.ink, linewidths=1)
    axes.contour(logits, [0], colors=theme.ink, linewidths=0.8, linestyles="dashed")
    return shown


def _diverging(theme: Theme) -> LinearSegmentedColormap:
    """In few steps, so that the palette has them all; an odd number, so that 0 is the page."""
    return LinearSegmentedColormap.from_list("purple to orange", _DIVERGING[theme], N=61)


def _bar(figure: Figure, shown: Any, panels: Sequence[Axes], label: str, theme: Theme) -> None:
    bar = figure.colorbar(shown, ax=list(panels), location="bottom", shrink=0.8, aspect=30)
    bar.set_label(label, fontsize=_TEXT, color=theme.ink)
    bar.ax.locator_params(nbins=5)
    bar.ax.tick_params(labelsize=_TEXT - 1, colors=theme.ink)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _legend(axes: Axes, handles: Sequence[Patch | Line2D], theme: Theme) -> None:
    axes.legend(
        handles=list(handles),
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        ncols=len(handles),
        frameon=False,
        fontsize=_TEXT,
        labelcolor=theme.ink,
        handlelength=1.2,
        columnspacing=1.2,
    )


if __name__ == "__main__":
    sys.exit(main())
