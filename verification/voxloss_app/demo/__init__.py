"""`voxloss demo`: train on a real brain MRI, check every loss, write a report.

One room per job: `settings` the options, `data` the MONAI pipeline, `training` the loop, `figures` the
pictures, `report` the files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from voxloss_app.demo.checks import ValueCheck, check_losses, on_labels, on_phantoms
from voxloss_app.demo.data import held_out_volume, whole_image
from voxloss_app.demo.report import Results, metrics, write_report
from voxloss_app.demo.settings import Settings
from voxloss_app.demo.training import Training, train
from voxloss_app.exits import ExitCode
from voxloss_app.terminal import progress_bar, progress_console, results_console, shows_progress
from voxloss_data import brain_mri

__all__ = ["Settings", "run_demo"]

_LOG = logging.getLogger(__name__)


def run_demo(settings: Settings) -> int:
    """Train, check and report according to `settings`; return the exit code.

    0 if every check holds, 1 if one does not, 130 if the training was interrupted. Raises ImportError without
    the extra: pip install 'voxloss[demo]'.
    """
    console = results_console()
    brain = brain_mri()
    _LOG.info("training on %s, of the files in %s", settings.device, brain.image.parent)
    held_out = held_out_volume(brain)
    start = perf_counter()
    with _progress(console) as progress:
        task = progress.add_task("training", total=settings.steps, loss="", dice="")

        def show(loss: float, dice: Fraction | None) -> None:
            found = "" if dice is None else f"held-out Dice {float(dice):.3f}"
            progress.update(task, advance=1, loss=f"loss {loss:.3f}", dice=found)

        training = train(brain, held_out, settings.loss, settings.steps, settings.seed, settings.device, show)
    seconds = perf_counter() - start
    if training.interrupted:
        done = len(training.losses)
        console.print(f"Interrupted at step {done} of {settings.steps}; reporting what there is.")
    checks: list[ValueCheck] = []
    checked = False
    with progress_console(console).status("checking every loss") if shows_progress() else nullcontext():
        try:
            if not training.interrupted:  # who wants to stop does not want to wait for minutes
                _LOG.info("trained, checking every loss")
                checks.extend(_check(training, held_out, settings))
                checked = True
        except KeyboardInterrupt:
            console.print(f"Interrupted after {len(checks)} checks; reporting what there is.")
        results = Results(settings, training, whole_image(brain), checks, checked, seconds)
        path = write_report(results)
    _show(console, metrics(results), path)
    if training.interrupted or not checked:
        return ExitCode.INTERRUPTED
    return ExitCode.DONE if all(check.holds for check in checks) else ExitCode.FAILED


def _check(training: Training, held_out: dict[str, Any], settings: Settings) -> Iterator[ValueCheck]:
    probabilities = held_out["probabilities"].numpy()
    sources = [on_phantoms(), on_labels(training.prediction, training.labels, probabilities)]
    return check_losses(sources, device=settings.device)


def _progress(console: Console) -> Progress:
    return progress_bar(
        console,
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[dice]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


def _show(console: Console, numbers: dict[str, Any], path: Path) -> None:
    scores = Table("held-out hemisphere", box=None, pad_edge=False)
    for heading in ("Dice", "IoU"):
        scores.add_column(heading, justify="right")
    for row in numbers["held_out"]["classes"]:
        scores.add_row(row["name"], f"{row['dice']:.4f}", f"{row['iou']:.4f}")
    scores.add_row("mean of foreground", f"{numbers['held_out']['mean_foreground_dice']:.4f}", "")
    checks = Table("checks against the exact value", box=None, pad_edge=False)
    for heading in ("dtype", "cases", "result", "worst error"):
        checks.add_column(heading, justify="right")
    for row in numbers["checks"]["losses"]:
        error = row["worst"]["error"]
        checks.add_row(
            row["loss"],
            row["dtype"],
            str(row["count"]),
            f"{row['failed']} failed" if row["failed"] else "passed",
            row["worst"]["note"] or "none" if error is None else f"{error:.1e}",
        )
    for table in (scores, checks):
        console.print()
        console.print(table)
    console.print(f"\nreport: {path}")
