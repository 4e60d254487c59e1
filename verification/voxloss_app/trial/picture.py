"""The picture of a trial: maximum-intensity projections of one held-out volume and of each loss's prediction."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from voxloss_app.drawing import png
from voxloss_app.theme import LIGHT
from voxloss_app.trial.results import Trial
from voxloss_app.trial.scores import FALSE, MISSED, RIGHT, unprojected
from voxloss_app.trial.tasks import Task

# Okabe and Ito 2008, distinct to the colour-blind too, and of different lightness.
COLOURS = {0: LIGHT.paper, RIGHT: "#9fb0c3", FALSE: "#0072b2", MISSED: "#d55e00"}


def file_name(task: Task) -> str:
    """Of a task's picture, beside the page."""
    return f"trials-{task.name}.png"


def picture_png(trial: Trial) -> bytes:
    """Ground truth and each loss with the first seed, side by side; x to the right, z upwards."""
    pictures = {run.loss: run.picture for run in trial.runs if run.picture}
    shown = {"ground truth": trial.truth, **{loss: pictures[loss] for loss in trial.losses}}
    figure = Figure(figsize=(4 * len(shown), 4.7), facecolor=LIGHT.paper, layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        _show(axes, title, rows)
    names = {RIGHT: "ground truth, prediction", FALSE: trial.task.false, MISSED: trial.task.missed}
    figure.legend(
        handles=[Patch(color=COLOURS[mark], label=name) for mark, name in names.items()],
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
        labelcolor=LIGHT.ink,
    )
    return png(figure, dpi=110)


def _show(axes: Axes, title: str, rows: Sequence[str]) -> None:
    axes.imshow(
        unprojected(rows),
        cmap=ListedColormap([COLOURS[mark] for mark in sorted(COLOURS)]),
        vmin=0,
        vmax=len(COLOURS) - 1,
        interpolation="nearest",
    )
    axes.set_title(title, color=LIGHT.ink, fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(LIGHT.grid)
