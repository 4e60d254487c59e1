"""What the commands share on a terminal: where results, bar and log go, and how much of them."""

from __future__ import annotations

import io
import logging
import sys
from enum import Enum

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn


class Verbosity(Enum):
    """How much a command prints."""

    quiet = "results and errors"
    normal = "and progress"
    verbose = "and, in the place of bars, a log on stderr"


_verbosity = Verbosity.normal
_LOGS = [logging.getLogger(package) for package in ("voxloss_app", "voxloss_verify")]


def set_verbosity(verbosity: Verbosity) -> None:
    """Set how much commands print from now on."""
    global _verbosity
    _verbosity = verbosity
    for log in _LOGS:
        for handler in [*log.handlers]:
            log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
        if verbosity is Verbosity.verbose:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("{asctime} {name}: {message}", "%H:%M:%S", style="{"))
            log.addHandler(handler)
            log.setLevel(logging.INFO)


def is_quiet() -> bool:
    """Whether only results and errors are wanted."""
    return _verbosity is Verbosity.quiet


def is_verbose() -> bool:
    """Whether everything is wanted."""
    return _verbosity is Verbosity.verbose


def results_console() -> Console:
    """Of stdout, with colours if that is a terminal."""
    return _console(sys.stdout.isatty(), None)


def as_text(*parts: RenderableType) -> str:
    """What the results console would write to a file."""
    text = io.StringIO()
    _console(False, text).print(*parts, sep="\n")
    return text.getvalue()


def _console(terminal: bool, file: io.StringIO | None) -> Console:
    return Console(
        file=file,
        # A file has no colours, even if the environment requests them, and no columns to fit into.
        color_system="auto" if terminal else None,
        force_terminal=None if terminal else False,
        width=None if terminal else 10_000,
        # Texts of losses, libraries and file names are not markup, and the terminal wraps the lines, so that they
        # can be selected and pasted.
        markup=False,
        highlight=False,
        emoji=False,
        soft_wrap=True,
    )


def progress_console(console: Console) -> Console:
    """Where progress is shown: with the results, which then stand above it, or on stderr if they go to a file."""
    return console if sys.stdout.isatty() else Console(stderr=True)


def shows_progress() -> bool:
    """Whether there is a terminal for progress bars, and they are wanted; a log replaces them."""
    return _verbosity is Verbosity.normal and (sys.stdout.isatty() or sys.stderr.isatty())


def progress_bar(console: Console, *columns: ProgressColumn) -> Progress:
    """A bar that is erased in the end; without `columns`, of what can be counted."""
    counted = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(
        *(columns or counted),
        console=progress_console(console),
        transient=True,
        disable=not shows_progress(),
    )
