"""What the pictures of the pages have in common: how axes look on a page, and the file."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from voxloss_app.theme import Theme


def png(figure: Figure, dpi: int) -> bytes:
    """The file, without the version of matplotlib, which the picture does not depend on."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def dress(axes: Axes, theme: Theme) -> None:
    """Give axes the colours of a page, with a light grid and no frame above and to the right."""
    axes.set_facecolor(theme.paper)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.tick_params(colors=theme.ink)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(theme.grid)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.ink)
