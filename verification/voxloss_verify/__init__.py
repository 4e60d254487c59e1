"""The judge: property checks of a loss against exact arithmetic that shares no code with it.

Start reading in `check`. Exports are loaded at first use, as pytest imports this package at every start, for its
plugin.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from voxloss_verify.check import check_loss
    from voxloss_verify.laws.record import Record, Status
    from voxloss_verify.oracle.claims import Claims

__all__ = ["Claims", "Record", "Status", "check_loss"]

if not TYPE_CHECKING:  # else any name would be known to type checkers
    _MODULES = {
        "Claims": "oracle.claims",
        "Record": "laws.record",
        "Status": "laws.record",
        "check_loss": "check",
    }

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

    def __dir__():
        return sorted({*globals(), *__all__})
