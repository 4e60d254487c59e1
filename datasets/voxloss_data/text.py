"""File names as text: a name may be any bytes, and output is UTF-8 and one line per message."""

from __future__ import annotations

import os

# A path of more characters than twice this would hide the rest of a message.
HALF = 250


def unicode(text: str) -> str:
    r"""Text that UTF-8 can hold: the byte ff of a file name in another encoding becomes \xff."""
    return "".join(_escape(c) if "\ud800" <= c <= "\udfff" else c for c in text)


def printable(text: str) -> str:
    r"""Text in one line of visible characters: what is not Unicode as `unicode` has it, a line break as \n."""
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def shortened(text: str, length: int) -> str:
    """The beginning of a text that is longer than `length`, and how long it is."""
    return text if len(text) <= length else f"{text[:length]}… ({len(text)} characters)"


def quoted(path: str | os.PathLike[str]) -> str:
    """A path as part of a message: printable, not too long, and in quotes where its end would not be seen."""
    text = printable(os.fspath(path))
    if len(text) > 2 * HALF:
        text = f"{text[:HALF]}…{text[-HALF:]}"
    if text == os.fspath(path) and text and not set(" '\",;`").intersection(text):
        return text
    mark = '"' if "'" in text else "'"
    return f"{mark}{text}{mark}"


def _escape(c: str) -> str:
    # Python keeps a byte that is not UTF-8 as a lone surrogate (PEP 383).
    byte = ord(c) - 0xDC00
    return rf"\x{byte:02x}" if 0x80 <= byte <= 0xFF else c.encode("unicode_escape").decode()
