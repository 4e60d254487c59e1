"""`voxloss conformance`: which laws hold for which losses of which library, as Markdown, a page and a picture.

One room per job: `losses` what is examined, `results` their records, `pages` the texts, `picture` the
picture.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from voxloss_app.conformance.losses import LIBRARIES, ExaminedLoss, examined_losses
from voxloss_app.conformance.pages import Conformance, versions, write
from voxloss_app.conformance.results import Row, depends_on, examine, from_json, name_of, to_json
from voxloss_app.exits import ExitCode
from voxloss_app.finished import Finished, interrupted
from voxloss_app.terminal import is_quiet, progress_bar, results_console
from voxloss_verify.laws import LAWS as LOSS_LAWS
from voxloss_verify.laws import METRIC_LAWS
from voxloss_verify.laws.law import Law
from voxloss_verify.laws.record import Status
from voxloss_verify.laws.setting import PROFILES, Setting
from voxloss_verify.request import ProfileName

__all__ = ["build"]

_LOG = logging.getLogger(__name__)

LAWS = (*LOSS_LAWS, *METRIC_LAWS)


def build(out: Path, profile: ProfileName = "quick", seed: int = 0) -> int:
    """Run every check on every loss, and write conformance.md, .html, .json and its picture to `out`.

    Losses that are finished are kept in a folder beside `out`, for the next run to go on. Returns the exit code:
    0; 1 if a loss of voxloss breaks a law, of whatever level, or could not be made; 130 after Ctrl-C, when
    nothing is written.
    """
    console = results_console()
    out.mkdir(parents=True, exist_ok=True)
    losses = examined_losses()
    found = versions()
    keys = {library.name: depends_on(library.name, found, profile, seed) for library in LIBRARIES}
    names = [name_of(examined, keys[examined.library]) for examined in losses]
    kept = Finished(out, "conformance")
    rows: list[Row] = []
    try:
        for row in _examine_all(losses, names, kept, profile, seed, console):
            rows.append(row)
            if not is_quiet():
                console.print(f"{_title(row.examined)}: {_summary(row)}")
    except KeyboardInterrupt:
        console.print(interrupted(len(rows), len(losses), "losses", kept))
        return ExitCode.INTERRUPTED
    kept.keep_only(names)  # not those of other versions, profiles and seeds
    for path in write(out, Conformance(rows, LAWS, found, profile, seed)):
        console.print(f"written: {path}")
    ours = [row for row in rows if row.examined.library == LIBRARIES[0].name]
    failed = any(row.error or row.count(Status.broken) for row in ours)
    return ExitCode.FAILED if failed else ExitCode.DONE


def _examine_all(
    losses: list[ExaminedLoss],
    names: list[str],
    kept: Finished,
    profile: ProfileName,
    seed: int,
    console: Console,
) -> Iterator[Row]:
    """The rows of all losses, those that are kept as they are, with a bar on a terminal."""
    setting = Setting(PROFILES[profile], seed)
    try:
        with progress_bar(console) as progress:
            task = progress.add_task("", total=len(losses) * len(LAWS))
            for number, (examined, name) in enumerate(zip(losses, names, strict=True)):
                row = kept.read(name, partial(from_json, examined))
                _LOG.info("%s is %s", _title(examined), f"kept in {kept.path(name)}" if row else "checked")
                if row is None:
                    row = examine(examined, LAWS, setting, profile, partial(_show, progress, task, examined))
                    kept.write(name, to_json(row))
                progress.update(task, completed=(number + 1) * len(LAWS))
                yield row
    finally:
        setting.ranks.close()


def _show(progress: Progress, task: TaskID, examined: ExaminedLoss, law: Law) -> None:
    progress.update(task, description=f"{_title(examined)}: {law.id} {law.name}", advance=1)


def _title(examined: ExaminedLoss) -> str:
    return f"{examined.library} {examined.name}, {examined.label}"


def _summary(row: Row) -> str:
    if row.error:
        return row.error
    line = f"{row.count(Status.holds)} hold, {row.count(Status.not_applicable)} not applicable"
    broken = [cell.law for cell in row.cells if cell.status == Status.broken.value]
    return f"{line}, {len(broken)} broken: {', '.join(broken)}" if broken else line
