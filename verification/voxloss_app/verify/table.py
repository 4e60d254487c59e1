"""`voxloss verify`: run the checks, show the verdict (verbosely every record as it comes), write the reports."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from voxloss_app.exits import ExitCode, Refused
from voxloss_app.terminal import is_quiet, is_verbose, progress_bar, results_console
from voxloss_app.verify.report import write_html, write_json
from voxloss_app.verify.verdict import causes, verdict
from voxloss_verify.laws.record import Record, Status
from voxloss_verify.request import Level, VerifyRequest
from voxloss_verify.subject.devices import device_name
from voxloss_verify.verification import Verification

STYLES = {
    Status.holds: "green",
    Status.broken: "bold red",
    Status.not_applicable: "dim",
    Status.expected: "yellow",
    Status.unexpected: "yellow",
}
# Of the lines of the verdict.
_STARTS = {"check ": "bold red", "warning": "yellow", "advice": "yellow"}


def verify_and_show(request: VerifyRequest, html: Path | None, json: Path | None) -> int:
    """Verify a loss, print the records, and write the requested reports, even if interrupted.

    Returns the exit code. Raises Refused if the loss could not be loaded or called.
    """
    console = results_console()
    search = progress_bar(console, SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    search.add_task("trying properties that were not declared", total=None)
    try:
        verification = Verification.of(request, search=search)
    except ValueError as error:
        raise Refused(str(error)) from error
    interrupted = False
    try:
        if not is_quiet():
            _show_header(console, verification)
        _run_all(console, verification)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        verification.close()
    _show_summary(console, verification)
    if json is not None:
        write_json(json, verification)
    if html is not None:
        write_html(html, verification)
    for path in (json, html):
        if path is not None:
            console.print(f"report: {path}")
    if interrupted:
        return ExitCode.INTERRUPTED
    return ExitCode.FAILED if verification.failed else ExitCode.DONE


def _run_all(console: Console, verification: Verification) -> None:
    names = max(len(law.name) for law in verification.laws)
    words = max(len(status.value) for status in Status if verification.xfails or not _needs_xfails(status))
    heading = ("check", "name", "status", "examples", "worst error", "ULP", "seconds", "where")
    row = f"{{:<4}} {{:<{names}}}  {{:<{words}}}  {{:>8}}  {{:>11}}  {{:>8}}  {{:>7}}  {{}}"
    if is_verbose():
        console.print(f"\n{row.format(*heading)}")
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(verification.laws))
        for law in verification.laws:
            progress.update(task, description=f"{law.id} {law.name}", refresh=True)
            record = verification.run_check(law)
            if is_verbose():
                line = Text(row.format(*_cells(record)).rstrip())
                start = 5 + names + 2
                line.stylize(STYLES[record.status], start, start + len(record.status.value))
                console.print(line)
            progress.advance(task)


def _needs_xfails(status: Status) -> bool:
    return status in (Status.expected, Status.unexpected)


def _cells(record: Record) -> tuple[str, ...]:
    worst = record.worst
    if record.status is Status.not_applicable:
        return (record.law, record.name, record.status.value, "", "", "", "", record.reason)
    where = "" if worst is None else f"{record.worst_where}: {worst.what}"
    if worst is None and record.status is Status.broken:
        where = record.reason
    if _needs_xfails(record.status):
        where = f"{where} ({record.reason})"
    return (
        record.law,
        record.name,
        record.status.value,
        str(record.examples),
        "" if worst is None else f"{worst.error:.1e}" if worst.error else "0",
        "" if worst is None or worst.ulp is None else f"{worst.ulp:.3g}",
        f"{record.seconds:.1f}",
        where,
    )


def _show_header(console: Console, verification: Verification) -> None:
    request, subject = verification.request, verification.subject
    profile = verification.setting.profile
    drawn = "derandomized" if request.derandomize else f"seed {request.seed}"
    edges = ", ".join(f"{edge}³" for edge in profile.sizes)
    own = [pair.name for pair in verification.setting.data]
    lines = {
        "target": request.target,
        "source": "; ".join(line.removeprefix("loss = ") for line in subject.source.splitlines()),
        "claims": verification.claims,
        "device": f"{subject.device} ({device_name(subject.device)}), torch {torch.__version__}",
        "profile": f"{request.profile}: {profile.examples} drawn volumes per check, cubes of {edges}; {drawn}",
        "data": ", ".join(["phantoms", "MNI152 brain", *own]),
    }
    for key, value in lines.items():
        console.print(f"{key:<8} {value}")


def _show_summary(console: Console, verification: Verification) -> None:
    if is_verbose():
        for record in verification.records:
            if record.status is Status.broken:
                title = f"{record.law} {record.name}: broken"
                console.print(Text(f"\n{title}", style="bold red"))
                console.print(verification.explanation(record))
    console.print("")
    for line in verdict(verification):
        style = next((style for start, style in _STARTS.items() if line.startswith(start)), "")
        console.print(Text(line, style=style))
    console.print(f"\n{summary(verification)}")
    if verification.files and not is_verbose():
        console.print(
            f"counter-examples: {verification.request.folder}, with a script for each, such as "
            f"{_first_script(verification)}; --verbose shows them"
        )


def _first_script(verification: Verification) -> str:
    """Of the check that the verdict begins with."""
    shown = [group[0].law for group in causes(verification)]
    law = next(law for law in (*shown, *verification.files) if law in verification.files)
    return verification.files[law][-1].name


# A formula check that is broken by rounding alone counts as one of the numerics, even if these are not checked.
_OF_LEVEL = {
    Level.formula: "of the formula",
    Level.numerics: "of the numerics",
    Level.interface: "of the interface",
}


def summary(verification: Verification) -> str:
    """How many laws hold and how many do not, in one line."""
    counts = Counter(record.status for record in verification.records)
    parts = [f"{counts[Status.holds]} {'holds' if counts[Status.holds] == 1 else 'hold'}"]
    others = (Status.broken, Status.unexpected, Status.expected, Status.not_applicable)
    levels = Counter(record.level for record in verification.records if record.status is Status.broken)
    by_level = ", ".join(f"{levels[level]} {words}" for level, words in _OF_LEVEL.items() if levels[level])
    for status in others:
        if counts[status]:
            of_levels = f" ({by_level})" if status is Status.broken else ""
            parts.append(f"{counts[status]} {status.value}{of_levels}")
    line = f"{', '.join(parts)} in {verification.seconds:.0f} s"
    stale = [
        r.law for r in verification.records if r.status is Status.not_applicable and r.law in verification.xfails
    ]
    if stale:
        line += f"; expected to be broken, but not applicable: {', '.join(stale)}"
    left = len(verification.laws) - len(verification.records)
    return (
        line if not left else f"{line}; interrupted, {left} of {len(verification.laws)} checks were not reached"
    )
