"""One picture of a run: ratios and memory by classes, and time by voxels against the floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from voxloss_app.bench.contenders import FLOOR, OURS
from voxloss_app.bench.results import BenchResult, Run
from voxloss_app.drawing import png
from voxloss_app.theme import LIGHT
from voxloss_data.files import save_bytes

# Okabe and Ito 2008, distinct to the colour-blind too; and every line has a mark of its own.
_STYLES = {
    OURS: ("voxloss", "#0072b2", "o"),
    "eager": ("voxloss, eager", "#56b4e9", "v"),
    "monai": ("MONAI", "#d55e00", "s"),
    "monai_compiled": ("MONAI, compiled", "#e69f00", "D"),
    "plain_compiled": ("plain torch, compiled", "#009e73", "^"),
    FLOOR: ("floor", "#7f7f7f", "x"),
}


def write(out: Path, runs: Sequence[Run]) -> Path:
    """Draw a row for each run into performance.png; return its path."""
    figure = Figure(figsize=(13, 4.1 * len(runs)), facecolor=LIGHT.paper, layout="constrained")
    for run, row in zip(runs, figure.subplots(len(runs), 3, squeeze=False), strict=True):
        _draw(run, list(row))
    named: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named.update(zip(labels, handles, strict=True))
    labels = [label for label, _, _ in _STYLES.values() if label in named]
    if labels:
        handles = [named[label] for label in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    path = out / "performance.png"
    save_bytes(path, png(figure, dpi=130))
    return path


def _draw(run: Run, row: Sequence[Axes]) -> None:
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
    _lines(row[0], by_classes, _ratio_to_ours)
    row[0].axhline(1, color=LIGHT.ink, linewidth=0.8)
    _name(row[0], f"{title}, {edge}³", "classes", "time over voxloss's")
    _lines(row[1], by_classes, BenchResult.peak)
    _name(row[1], "peak memory beyond the inputs", "classes", "in sizes of the logits")
    _lines(row[2], {size**3: result for size, result in growth.items()}, _voxel_time)
    _name(row[2], "growth with the volume, C = 14", "voxels per sample", "ns per voxel")
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
    axes: Axes, results: dict[int, BenchResult], figure: Callable[[BenchResult, str], float | None]
) -> None:
    for name, (label, colour, mark) in _STYLES.items():
        points = [(x, y) for x, r in sorted(results.items()) if (y := figure(r, name)) is not None]
        if points:
            width = 2.4 if name == OURS else 1.4
            axes.plot(*zip(*points, strict=True), color=colour, marker=mark, linewidth=width, label=label)


def _name(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10.5, color=LIGHT.ink)
    axes.set_xlabel(x, color=LIGHT.ink)
    axes.set_ylabel(y, color=LIGHT.ink)
    axes.grid(color=LIGHT.grid, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
