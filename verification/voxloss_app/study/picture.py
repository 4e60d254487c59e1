"""The pictures of a study: curves of pairs of losses, recall against precision; for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from voxloss_app.drawing import dress, png
from voxloss_app.study.contenders import BETAS, MONAI, VOXLOSS, tversky
from voxloss_app.study.results import PRECISION, RECALL, Study
from voxloss_app.theme import BLUE, GREEN, GREY, ORANGE, SKY, THEMES, VERMILION, Theme, on

PARITY, BALANCE = "parity", "balance"
DPI = 130
_MARKS = "DosPvX^*<>hp"
_BESIDE = 3  # more would be too small on a page


def file_name(picture: str, theme: str) -> str:
    """Of a picture, beside the page."""
    return f"evidence-{picture}-{theme}.png"


def pictures(study: Study) -> dict[str, bytes]:
    """By file name; none of what the study has no runs for."""
    drawn = {}
    for name, theme in THEMES.items():
        if study.peers:
            drawn[file_name(PARITY, name)] = png(_parity(study, theme), DPI)
        if study.results:
            drawn[file_name(BALANCE, name)] = png(_balance(study, theme), DPI)
    return drawn


def _parity(study: Study, theme: Theme) -> Figure:
    """For each pair the loss at each step, of the first seed; below it how far apart they are."""
    names = [peer.name for peer in study.peers]
    bands = math.ceil(len(names) / _BESIDE)
    columns = min(len(names), _BESIDE)
    figure = Figure(figsize=(3.3 * columns, 4.2 * bands + 0.4), facecolor=theme.paper, layout="constrained")
    rows = figure.subplots(2 * bands, columns, squeeze=False, sharex=True, height_ratios=(2, 1) * bands)
    colours = {MONAI: on(theme, VERMILION), VOXLOSS: on(theme, BLUE)}
    for number, name in enumerate(names):
        band, column = divmod(number, columns)
        curve, apart = rows[2 * band][column], rows[2 * band + 1][column]
        both = {library: study.runs(name, library)[0].losses for library in (MONAI, VOXLOSS)}
        for library, losses in both.items():
            width = 4.0 if library == MONAI else 1.2
            curve.plot(_smooth(losses), color=colours[library], linewidth=width, label=library)
        differences = [max(abs(a - b), 1e-9) for a, b in zip(*both.values(), strict=False)]
        apart.plot(differences, color=theme.ink, linewidth=0.8)
        apart.set_yscale("log")
        apart.set_ylim(5e-10, 2)
        curve.set_title(name.replace(", ", "\n"), fontsize=11, color=theme.ink)
        apart.set_xlabel("step")
        for axes in (curve, apart):
            dress(axes, theme)
        apart.tick_params(labelbottom=True)
        if column == 0:
            curve.set_ylabel("loss, mean of 20 steps")
            apart.set_ylabel("|difference|")
    for number in range(len(names), bands * columns):
        band, column = divmod(number, columns)
        rows[2 * band][column].remove()
        rows[2 * band + 1][column].remove()
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, labelcolor=theme.ink)
    return figure


def _smooth(losses: Sequence[float], over: int = 20) -> list[float]:
    return [fmean(losses[max(0, i + 1 - over) : i + 1]) for i in range(len(losses))]


def _balance(study: Study, theme: Theme) -> Figure:
    """Each loss by mean precision and recall; those of Tversky with rising β as a line."""
    figure = Figure(figsize=(7.2, 6.2), facecolor=theme.paper, layout="constrained")
    axes = figure.subplots()
    points = dict(_points(study))
    betas = {beta: point for beta in BETAS if (point := points.pop(tversky(beta).name, None)) is not None}
    if betas:
        colour = on(theme, VERMILION)
        axes.plot(*zip(*betas.values(), strict=True), "-o", color=colour, label="TverskyLoss")
        for beta, point in betas.items():
            axes.annotate(
                f"β = {beta:g}", point, (-52, -4), textcoords="offset points", color=colour, fontsize=10
            )
    colours = (BLUE, GREEN, SKY, ORANGE, GREY)
    for number, (name, point) in enumerate(points.items()):
        style: dict[str, Any] = {"marker": _MARKS[number % len(_MARKS)], "linestyle": "none"}
        colour = on(theme, colours[number % len(colours)])
        axes.plot(*point, **style, color=colour, markersize=9, alpha=0.85, label=name)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=theme.ink, fontsize=9)
    axes.margins(x=0.15)
    axes.set_xlabel("precision, mean over runs and classes")
    axes.set_ylabel("recall")
    dress(axes, theme)
    return figure


def _points(study: Study) -> Iterator[tuple[str, tuple[float, float]]]:
    for contender in study.contenders:
        values = [study.values(contender.name, score) for score in (PRECISION, RECALL)]
        if all(values):
            yield contender.name, (fmean(values[0]), fmean(values[1]))
