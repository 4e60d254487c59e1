"""`voxloss score`: score the files and write the scores as a table, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from statistics import fmean

from rich.console import RenderableType
from rich.table import Table

from voxloss_app.exits import ExitCode, Refused, complain
from voxloss_app.score.scores import ClassScore, PairScores, Regions, score_pairs
from voxloss_app.terminal import as_text, progress_bar, results_console
from voxloss_data.files import is_same_file, save_text
from voxloss_data.label_maps import find_pairs
from voxloss_data.text import printable, quoted, unicode

COLUMNS = ("case", "label", "dice", "iou", "tp", "fp", "fn", "prediction_ml", "reference_ml")

_LOG = logging.getLogger(__name__)


def score_and_show(
    prediction: Path,
    reference: Path,
    labels: Sequence[int] | None,
    ignore: int | None,
    format: str,
    out: Path | None,
    jobs: int,
    regions: Regions | None = None,
) -> int:
    """Score two files or two folders and write to `out` or stdout; what could not be scored goes to stderr.

    Returns the exit code: that of a refusal, if anything could not be scored. Raises Refused if there is nothing
    to score.
    """
    try:
        cases = find_pairs(prediction, reference)
    except ValueError as error:
        raise Refused(str(error)) from error
    scored_files = [path for case in cases for path in (case.prediction, case.reference)]
    if out is not None and any(is_same_file(out, path) for path in scored_files):
        raise Refused(f"--out: expected a file that is not scored, received {quoted(out)}")
    folders = prediction.is_dir()
    _LOG.info("scoring %d cases in %d processes", len(cases), min(jobs, len(cases)))
    with progress_bar(results_console()) as progress:
        task = progress.add_task("", total=len(cases), visible=folders)
        results = score_pairs(cases, labels, ignore, jobs, lambda: progress.advance(task), regions)
    scored = [result for result in results if result.error is None]
    failed = [result for result in results if result.error is not None]
    if scored:
        _write(scored, failed, folders, format, out)
    present = {s.label for result in scored for s in result.scores if s.tp + s.fp + s.fn}
    for name in [*(regions or labels or ())] if scored else ():
        if name not in present:
            kind = "region" if regions else "label"
            complain(f"{kind} {name}: no voxel in any of the scored files")
    for result in failed:
        complain(str(result.error))
    if failed and folders:
        complain(f"{len(failed)} of {len(results)} cases could not be scored")
    return ExitCode.REFUSED if failed else ExitCode.DONE


def tables(scored: list[PairScores], means: bool) -> list[RenderableType]:
    """All scores, and their `means` over the cases if they are wanted."""
    parts: list[RenderableType] = [_table(scored)]
    if means:
        title = "\nmean over the cases in whose prediction or reference the label is present"
        parts += [title, _means(scored)]
    return parts


def save_csv(scored: list[PairScores], path: Path) -> None:
    """Write a row for each case and label."""
    save_text(path, _csv(scored))


def _write(
    scored: list[PairScores], failed: list[PairScores], folders: bool, format: str, out: Path | None
) -> None:
    if format == "table":
        if out is None:
            results_console().print(*tables(scored, folders), sep="\n")
            return
        text = as_text(*tables(scored, folders))
    else:
        text = _csv(scored) if format == "csv" else _json(scored, failed)
    if out is None:
        sys.stdout.write(text)
    else:
        save_text(out, text)


def _table(scored: list[PairScores]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("case", overflow="fold")
    for heading in ("label", "Dice", "IoU", "TP", "FP", "FN", "prediction ml", "reference ml"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in scored:
        name = printable(result.case.name)
        for s in result.scores:
            counts = map(str, (s.tp, s.fp, s.fn))
            volumes = (f"{volume:.3f}" for volume in (s.prediction_ml, s.reference_ml))
            table.add_row(name, str(s.label), _four(s.dice), _four(s.iou), *counts, *volumes)
        if not result.scores:
            table.add_row(name, "none")
    return table


def _means(scored: list[PairScores]) -> Table:
    """Per label, over the cases in whose prediction or reference it is present."""
    by_label: dict[int | str, list[ClassScore]] = {}
    for result in scored:
        for s in result.scores:
            by_label.setdefault(s.label, []).append(s)
    table = Table(box=None, pad_edge=False)
    for heading in ("label", "cases", "Dice", "IoU"):
        table.add_column(heading, justify="right", no_wrap=True)
    of_regions = any(isinstance(label, str) for label in by_label)
    for label, scores in by_label.items() if of_regions else sorted(by_label.items()):
        dice = [float(s.dice) for s in scores if s.dice is not None]
        iou = [float(s.iou) for s in scores if s.iou is not None]
        means = (f"{fmean(values):.4f}" if values else "" for values in (dice, iou))
        table.add_row(str(label), str(len(dice)), *means)
    return table


def _csv(scored: list[PairScores]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for result in scored:
        name = unicode(result.case.name).replace("\r", r"\r")  # csv quotes a line feed, but not this
        for s in result.scores:
            ratios = ("" if ratio is None else float(ratio) for ratio in (s.dice, s.iou))
            volumes = (s.prediction_ml, s.reference_ml)
            rows.writerow((name, s.label, *ratios, s.tp, s.fp, s.fn, *volumes))
    return text.getvalue()


def _json(scored: list[PairScores], failed: list[PairScores]) -> str:
    cases = [
        {
            "case": unicode(result.case.name),
            "prediction": unicode(str(result.case.prediction)),
            "reference": unicode(str(result.case.reference)),
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
    failures = [{"case": unicode(result.case.name), "error": result.error} for result in failed]
    return json.dumps({"cases": cases, "failures": failures}, indent=2) + "\n"


def _exact(ratio: Fraction | None) -> dict[str, str | float] | None:
    return None if ratio is None else {"exact": str(ratio), "float": float(ratio)}


def _four(ratio: Fraction | None) -> str:
    return "" if ratio is None else f"{float(ratio):.4f}"
