"""`voxloss score`: score the files and write the scores as a table, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from voxloss_data.files import save_bytes
from voxloss_verify.label_files import find_cases
from voxloss_verify.score import ClassScore, Result, score_cases

COLUMNS = ("case", "label", "dice", "iou", "tp", "fp", "fn", "prediction_ml", "reference_ml")
# File names are not markup.
PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}


def score_and_show(
    prediction: Path,
    reference: Path,
    labels: Sequence[int] | None,
    ignore: int | None,
    format: str,
    out: Path | None,
    jobs: int,
) -> int:
    """Score two files or two folders and write to `out` or stdout; what could not be scored goes to stderr.

    Returns the exit code: 0 if all could be scored, else 2.
    """
    try:
        cases = find_cases(prediction, reference)
    except ValueError as error:
        print(f"voxloss: {error}", file=sys.stderr)
        return 2
    folders = prediction.is_dir()
    silent = not (folders and sys.stderr.isatty())
    with Progress(console=Console(stderr=True), transient=True, disable=silent) as progress:
        task = progress.add_task("Scoring", total=len(cases))
        results = score_cases(cases, labels, ignore, jobs, lambda: progress.advance(task))
    scored = [result for result in results if result.error is None]
    failed = [result for result in results if result.error is not None]
    if scored and format == "table" and out is None and sys.stdout.isatty():
        show_scores(scored, folders, Console(**PLAIN))
    elif scored:
        text = _text(scored, failed, folders, format)
        if out is None:
            sys.stdout.write(text)
        else:
            save_bytes(out, text.encode())
    for result in failed:
        print(f"voxloss: {result.error}", file=sys.stderr)
    if failed and folders:
        print(f"voxloss: {len(failed)} of {len(results)} cases could not be scored", file=sys.stderr)
    return 2 if failed else 0


def show_scores(scored: list[Result], means: bool, console: Console) -> None:
    """Print a table of all labels, and one of their `means` over the cases."""
    parts: list[Table | str] = [_table(scored)]
    if means:
        title = "\nmean over the cases in whose prediction or reference the label is present"
        parts += [title, _means(scored)]
    console.print(*parts, sep="\n")


def save_csv(scored: list[Result], path: Path) -> None:
    """Write a row for each case and label."""
    save_bytes(path, _csv(scored).encode())


def _text(scored: list[Result], failed: list[Result], means: bool, format: str) -> str:
    if format == "csv":
        return _csv(scored)
    if format == "json":
        return _json(scored, failed)
    # A file has no columns to fit into, and no colours.
    console = Console(file=io.StringIO(), width=10_000, color_system=None, **PLAIN)
    with console.capture() as captured:
        show_scores(scored, means, console)
    return captured.get()


def _table(scored: list[Result]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("case", overflow="fold")
    for heading in ("label", "Dice", "IoU", "TP", "FP", "FN", "prediction ml", "reference ml"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in scored:
        for s in result.scores:
            counts = map(str, (s.tp, s.fp, s.fn))
            volumes = (f"{volume:.3f}" for volume in (s.prediction_ml, s.reference_ml))
            table.add_row(result.case.name, str(s.label), _four(s.dice), _four(s.iou), *counts, *volumes)
        if not result.scores:
            table.add_row(result.case.name, "none")
    return table


def _means(scored: list[Result]) -> Table:
    """Per label, over the cases in whose prediction or reference it is present."""
    by_label: dict[int, list[ClassScore]] = {}
    for result in scored:
        for s in result.scores:
            by_label.setdefault(s.label, []).append(s)
    table = Table(box=None, pad_edge=False)
    for heading in ("label", "cases", "Dice", "IoU"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, scores in sorted(by_label.items()):
        dice = [float(s.dice) for s in scores if s.dice is not None]
        iou = [float(s.iou) for s in scores if s.iou is not None]
        means = (f"{fmean(values):.4f}" if values else "" for values in (dice, iou))
        table.add_row(str(label), str(len(dice)), *means)
    return table


def _csv(scored: list[Result]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for result in scored:
        for s in result.scores:
            ratios = ("" if ratio is None else float(ratio) for ratio in (s.dice, s.iou))
            volumes = (s.prediction_ml, s.reference_ml)
            rows.writerow((result.case.name, s.label, *ratios, s.tp, s.fp, s.fn, *volumes))
    return text.getvalue()


def _json(scored: list[Result], failed: list[Result]) -> str:
    cases = [
        {
            "case": result.case.name,
            "prediction": str(result.case.prediction),
            "reference": str(result.case.reference),
            "classes": [
                {
                    "label": s.label,
                    "dice": _exact(s.dice),
                    "iou": _exact(s.iou),
                    "tp": s.tp,
                    "fp": s.fp,
                    "fn": s.fn,
                    "prediction_ml": s.prediction_ml,
                    "reference_ml": s.reference_ml,
                }
                for s in result.scores
            ],
        }
        for result in scored
    ]
    failures = [{"case": result.case.name, "error": result.error} for result in failed]
    return json.dumps({"cases": cases, "failures": failures}, indent=2) + "\n"


def _exact(ratio: Fraction | None) -> dict[str, str | float] | None:
    return None if ratio is None else {"exact": str(ratio), "float": float(ratio)}


def _four(ratio: Fraction | None) -> str:
    return "" if ratio is None else f"{float(ratio):.4f}"
