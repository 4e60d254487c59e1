"""Regions of labels by name, as the command line takes them: `{"whole": [1, 2, 3], "core": [2, 3]}`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

EXAMPLE = '{"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}'


def parse_regions(text: str) -> dict[str, list[int]]:
    """Read a JSON object of names and lists of labels, or a list of such lists, which are named like 1+2+3.

    Raises:
        ValueError: for other text, and for a name or a region that is there twice.
    """
    try:
        given = json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON like '{EXAMPLE}', received {text!r}: {error}.") from None
    if isinstance(given, list) and all(_are_labels(labels) for labels in given):
        given = _distinct([("+".join(map(str, labels)), labels) for labels in given])
    if not isinstance(given, dict) or not given or not all(map(_are_labels, given.values())):
        raise ValueError(
            f"expected a name and a list of whole numbers from 0 for each region, like '{EXAMPLE}', "
            f"received {text!r}."
        )
    return given


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"expected each region once, received {name!r} {names.count(name)} times.")
    return dict(pairs)


def _are_labels(labels: object) -> bool:
    if not isinstance(labels, Sequence) or isinstance(labels, str) or not labels:
        return False
    whole = all(isinstance(label, int) and not isinstance(label, bool) and label >= 0 for label in labels)
    return whole and len({*labels}) == len(labels)
