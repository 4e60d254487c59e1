"""What a request and a plan may hold: other values would fail in torch or MONAI, late and in their words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from voxloss_app.names import LOSSES

LARGEST_LABEL = 2**24  # the transforms hold labels as float32
PRECISIONS = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Rule:
    """What is expected, in words, and whether a value is that."""

    expected: str
    holds: Callable[[Any], bool]

    def require(self, name: str, value: Any) -> None:
        """Raise ValueError with this name unless a value is what is expected."""
        if not self.holds(value):
            raise ValueError(f"{name}: expected {self.expected}, received {value!r}")


def _is_whole(value: Any, low: float, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and low <= value <= high


def _is_list(value: Any, of: Callable[[Any], bool], lengths: range | None = None) -> bool:
    return isinstance(value, (list, tuple)) and all(map(of, value)) and (lengths is None or len(value) in lengths)


def _is_window(value: Any) -> bool:
    return value is None or (_is_list(value, _is_number, range(2, 3)) and value[0] < value[1])


def _are_labels(value: Any) -> bool:
    whole = _is_list(value, lambda label: _is_whole(label, 0, LARGEST_LABEL))
    return whole and len(value) > 1 and value[0] == 0 and list(value) == sorted(set(value))


def _are_names(value: Any) -> bool:
    return _is_list(value, lambda name: isinstance(name, str))


def _are_regions(value: Any) -> bool:
    if value is None:
        return True
    named = isinstance(value, dict) and len(value) > 0 and _are_names([*value])
    return named and all(
        _is_list(labels, lambda label: _is_whole(label, 1, LARGEST_LABEL)) and len({*labels}) == len(labels) > 0
        for labels in value.values()
    )


def _whole(low: int, high: float = math.inf) -> Rule:
    text = f"a whole number from {low}" + ("" if high == math.inf else f" to {high}")
    return Rule(text, lambda value: _is_whole(value, low, high))


_THREE = range(3, 4)
_FRACTION = Rule("a number from 0 to 1", lambda value: _is_number(value, 0, 1))
_SHARED = {
    "loss_kwargs": Rule("an object", lambda value: isinstance(value, dict)),
    "modality": Rule("ct or mr", lambda value: value in ("ct", "mr")),
    "window": Rule("two numbers, the lower one first", _is_window),
    "spacing": Rule(
        "three positive numbers", lambda value: _is_list(value, lambda v: _is_number(v) and v > 0, _THREE)
    ),
    "patch": Rule("three whole numbers from 1", lambda value: _is_list(value, lambda v: _is_whole(v, 1), _THREE)),
    "width": _whole(1),
    "epochs": _whole(1),
    "patches": _whole(1),
    "batch": _whole(1),
    "learning_rate": Rule("a number from 0", lambda value: _is_number(value, 0)),
    "validate_every": _whole(1),
    "precision": Rule(f"one of {', '.join(PRECISIONS)}", lambda value: value in PRECISIONS),
    "workers": _whole(0),
    "seed": _whole(0, 2**32 - 1),
}
REQUEST = {
    **_SHARED,
    "regions": Rule("lists of labels from 1 by name, as 0 is the background", _are_regions),
    "validation": _FRACTION,
    "cache": _FRACTION,
    "max_classes": _whole(2),
}
PLAN = {
    **_SHARED,
    "loss": Rule("the name of a loss", lambda value: value in [*LOSSES.values()]),
    "labels": Rule("two whole numbers or more, from 0 up", _are_labels),
    "class_names": Rule("names", _are_names),
    "regions": Rule("null, or lists of labels from 1 by name", _are_regions),
    "ignored": Rule("a whole number or null", lambda value: value is None or _is_whole(value, -math.inf)),
    "channels": _whole(1),
    "depth": _whole(4, 5),
    "training": Rule("names", lambda value: _are_names(value) and len(value) > 0),
    "validation": Rule("names", _are_names),
}
