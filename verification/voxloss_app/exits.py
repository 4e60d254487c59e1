"""How a command ends: the exit codes, the error that the user can fix, and how it is shown."""

from __future__ import annotations

import sys
from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of `voxloss`, the same for every command."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> ExitCode:  # noqa: D102
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    DONE = 0, "done"
    FAILED = 1, "a check failed"
    REFUSED = 2, "wrong usage, an unusable file or target, or a missing extra"
    FAULT = 70, "an unexpected error (--debug shows where)"
    INTERRUPTED = 130, "interrupted by Ctrl-C"
    CLOSED_PIPE = 141, "the reader of the output closed the pipe"


class Refused(Exception):
    """The request cannot be fulfilled; the message is one line: the expected and received value, and where."""


def complain(message: str) -> None:
    """Write a line to stderr, and one only, whatever the names of files hold."""
    from voxloss_data.text import printable  # it loads nibabel

    print(f"voxloss: {printable(' '.join(message.splitlines()))}", file=sys.stderr)
