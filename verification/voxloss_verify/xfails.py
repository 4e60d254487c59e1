"""Expected failures: laws that a loss is known to break, each with the reason, in a TOML file.

    [xfail]
    "25" = "sums overflow in half precision"

A law that breaks as expected is no failure. One that does not apply is: the file is out of date. One that holds
after all is a warning, as other volumes may break it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from voxloss_verify.laws import LAWS, METRIC_LAWS
from voxloss_verify.laws.record import Record, Status

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_xfails(path: Path) -> dict[str, str]:
    """The reasons by law. Raises ValueError that names the file and what is wrong with it."""
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: expected a TOML file, received {error.strerror or error}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ValueError(f"{path}: expected a TOML file, received {' '.join(str(error).split())}") from error
    table = content.get("xfail")
    if not isinstance(table, dict) or len(content) > 1:
        raise ValueError(
            f"{path}: expected one table [xfail] of checks and reasons, received "
            f"{', '.join(content) or 'nothing'}"
        )
    known = [law.id for law in (*LAWS, *METRIC_LAWS)]
    for law, reason in table.items():
        if law not in known:
            raise ValueError(f"{path}: expected checks of {', '.join(known)}, received {law!r}")
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(f"{path}: expected a reason in words for check {law}, received {reason!r}")
    return {law: " ".join(reason.split()) for law, reason in table.items()}


def apply(record: Record, xfails: Mapping[str, str]) -> Record:
    """The record in the light of what is expected to fail."""
    why = xfails.get(record.law)
    if why is None:
        return record
    if record.status is Status.broken:
        return replace(record, status=Status.expected, reason=why)
    if record.status is Status.holds:
        return replace(record, status=Status.unexpected, reason=f"expected to be broken: {why}")
    return replace(record, reason=f"{record.reason}; but expected to be broken: {why}")


def fails(record: Record, xfails: Mapping[str, str], strict: bool = False) -> bool:
    """Whether a record makes the verification fail: its law is broken, or an expected failure does not apply.

    If one is `strict`, advice does so, too, and an expected failure that holds: on other volumes it may not.
    """
    if record.is_advice or record.status is Status.unexpected:
        return strict
    return record.status.fails or (record.status is Status.not_applicable and record.law in xfails)
