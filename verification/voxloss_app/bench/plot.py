"""The picture of a run: ratios and memory by classes, and time by voxels against the floor; for both pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from voxloss_app.bench.contenders import FLOOR, OURS
from voxloss_app.bench.results import BenchResult, Run
from voxloss_app.drawing import dress, png
from voxloss_app.theme import BLUE, GREEN, GREY, ORANGE, SKY, THEMES, VERMILION, Theme, on
from voxloss_data.files import save_bytes

# Every line has a mark of its own, too.
_STYLES = {
    OURS: ("voxloss", BLUE, "o"),
    "eager": ("voxloss, eager", SKY, "v"),
    "monai": ("MONAI", VERMILION, "s"),
    "monai_compiled": ("MONAI, compiled", ORANGE, "D"),
    "plain_compiled": ("plain torch, compiled", GREEN, "^"),
    FLOOR: ("floor", GREY, "x"),
}


def write(out: Path, runs: Sequence[Run]) -> list[Path]:
    """Draw a row for each run, for a light and a dark page; return the paths."""
    paths = [out / f"performance-{name}.png" for name in THEMES]
    for path, theme in zip(paths, THEMES.values(), strict=True):
        save_bytes(path, performance_png(runs, theme))
    return paths


def performance_png(runs: Sequence[Run], theme: Theme) -> bytes:
    """The picture for one page."""
    figure = Figure(figsize=(13, 4.1 * len(runs)), facecolor=theme.paper, layout="constrained")
    for run, row in zip(runs, figure.subplots(len(runs), 3, squeeze=False), strict=True):
        _draw(run, list(row), theme)
    named: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named.update(zip(labels, handles, strict=True))
    labels = [label for label, _, _ in _STYLES.values() if label in named]
    if labels:
        handles = [named[label] for label in labels]
        ncols = len(labels)
        figure.legend(
            handles, labels, loc="outside lower center", ncols=ncols, frameon=False, labelcolor=theme.ink
        )
    return png(figure, dpi=130)


def _draw(run: Run, row: Sequence[Axes], theme: Theme) -> None:
    of_dice = [
        result
        for result in run.results
        if (result.case.family, result.case.activation, result.case.dtype) == ("dice", "softmax", "float32")
        and result.case.timed
        and not result.case.one_hot
        and result.case.label_dtype == "int64"
    ]
    edge = _commonest([result.case.edge for result in of_dice])
    by_classes = {r.case.channels: r for r in of_dice if r.case.edge == edge}
    growth = {r.case.edge: r for r in of_dice if r.case.channels == 14}
    title = f"Dice from a label map, float32, {run.device.upper()}"
    _lines(row[0], by_classes, _ratio_to_ours, theme)
    row[0].axhline(1, color=theme.ink, linewidth=0.8)
    _name(row[0], f"{title}, {edge}³", "classes", "time over voxloss's", theme)
    _lines(row[1], by_classes, BenchResult.peak, theme)
    _name(row[1], "peak memory beyond the inputs", "classes", "in sizes of the logits", theme)
    _lines(row[2], {size**3: result for size, result in growth.items()}, _voxel_time, theme)
    _name(row[2], "growth with the volume, C = 14", "voxels per sample", "ns per voxel", theme)
    for axes, ticks in ((row[0], by_classes), (row[1], by_classes)):
        axes.set_xscale("log")
        axes.set_xticks(list(ticks), [str(channels) for channels in ticks], minor=False)
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
    row[2].set_xscale("log")
    row[2].set_yscale("log")
    row[2].set_xticks([size**3 for size in growth], [f"{size}³" for size in growth])
    row[2].minorticks_off()


def _commonest(edges: Sequence[int]) -> int:
    return max(edges, key=lambda edge: (edges.count(edge), edge), default=0)


def _ratio_to_ours(result: BenchResult, name: str) -> float | None:
    ratio = result.ratio(name) if name != OURS else None
    return ratio.median if ratio else None


def _voxel_time(result: BenchResult, name: str) -> float | None:
    time = result.time(name)
    return 1e9 * time.median / (result.case.batch * result.case.edge**3) if time else None


def _lines(
    axes: Axes,
    results: dict[int, BenchResult],
    figure: Callable[[BenchResult, str], float | None],
    theme: Theme,
) -> None:
    for name, (label, colour, mark) in _STYLES.items():
        points = [(x, y) for x, r in sorted(results.items()) if (y := figure(r, name)) is not None]
        if points:
            width = 2.4 if name == OURS else 1.4
            style: dict[str, Any] = {"color": on(theme, colour), "marker": mark, "linewidth": width}
            axes.plot(*zip(*points, strict=True), label=label, **style)


def _name(axes: Axes, title: str, x: str, y: str, theme: Theme) -> None:
    axes.set_title(title, fontsize=10.5, color=theme.ink)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    dress(axes, theme)
