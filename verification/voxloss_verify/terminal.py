"""What the commands that take long share: where results and bar go, and the exit code after Ctrl-C."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

INTERRUPTED = 130


def results_console() -> Console:
    """Of stdout, with colours if that is a terminal."""
    terminal = sys.stdout.isatty()
    return Console(
        # A file has no colours, even if the environment asks for them.
        color_system="auto" if terminal else None,
        force_terminal=None if terminal else False,
        # What losses and libraries say is not markup, and lines are the terminal's to wrap: they may be selected
        # and pasted.
        markup=False,
        highlight=False,
        emoji=False,
        soft_wrap=True,
    )


def progress_bar(console: Console, *columns: ProgressColumn) -> Progress:
    """A bar that is erased in the end; without `columns`, of what can be counted.

    It is on the console of the results, which then stand above it; on stderr, if they go to a file; and nowhere,
    if neither is a terminal.
    """
    counted = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    terminal = console if sys.stdout.isatty() else Console(stderr=True)
    silent = not (sys.stdout.isatty() or sys.stderr.isatty())
    return Progress(*(columns or counted), console=terminal, transient=True, disable=silent)
