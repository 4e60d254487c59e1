"""The picture of a training step's memory by the number of classes, for a light and a dark page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from voxloss_app.bench.head_memory import COMPILED, FUSED, MONAI, NNUNET, NO_CLASSES, UNFUSED
from voxloss_app.drawing import dress, png
from voxloss_app.theme import BLUE, GREEN, GREY, ORANGE, SKY, VERMILION, Theme, on

# In the order in which they end, so that names do not cross.
_STYLES = {
    NNUNET: (ORANGE, "D", "nnU-Net's Dice + CE"),
    MONAI: (VERMILION, "s", "MONAI's Dice + CE"),
    COMPILED: (SKY, "v", "MONAI's, compiled"),
    UNFUSED: (BLUE, "o", "voxloss"),
    FUSED: (GREEN, "^", "voxloss, fuse_head"),
    NO_CLASSES: (GREY, "", "the network alone"),
}


def memory_png(classes: Mapping[str, Mapping[int, int]], theme: Theme) -> bytes:
    """Draw GiB against the number of classes, a line for each loss."""
    figure = Figure(figsize=(7.6, 4.2), facecolor=theme.paper, layout="constrained")
    axes = figure.subplots()
    for loss, (colour, mark, name) in _STYLES.items():
        points = sorted(classes.get(loss, {}).items())
        if points:
            x, y = [c for c, _ in points], [size / 2**30 for _, size in points]
            style: dict[str, Any] = {"linestyle": "--"} if loss == NO_CLASSES else {"marker": mark}
            width = 3.0 if loss == FUSED else 2.0
            axes.plot(x, y, color=on(theme, colour), linewidth=width, label=f"{name}: {y[-1]:.1f} GiB", **style)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("classes", fontsize=12)
    axes.set_ylabel("GiB of a training step", fontsize=12)
    axes.tick_params(labelsize=11)
    dress(axes, theme)
    if axes.lines:
        legend = axes.legend(
            frameon=False,
            fontsize=11,
            labelcolor=theme.ink,
            loc="lower left",
            title=f"with {max(max(counted) for counted in classes.values())} classes",
            title_fontsize=11,
        )
        legend.get_title().set_color(theme.ink)
    return png(figure, dpi=140)
