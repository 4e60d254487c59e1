"""JSON that people write: its values are checked where they are read, and an error names the file and the key."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxloss_data.text import printable, quoted, shortened

_SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class Field:
    """A value of a JSON file; `key` is where it stands, such as training[3].image, empty for the whole file.

    Every method raises ValueError, in one line, if the value is not what it reads.
    """

    file: Path
    key: str
    value: Any

    @classmethod
    def of_file(cls, path: Path) -> Field:
        """Read a file, in any encoding of Unicode; two values for one key are an error."""
        try:
            return cls(path, "", json.loads(path.read_bytes(), object_pairs_hook=_distinct))
        except (OSError, ValueError, RecursionError) as error:
            reason = shortened(f"{type(error).__name__}: {error}", 4 * _SHOWN)
            raise ValueError(f"{quoted(path)}: expected JSON, received {printable(reason)}") from error

    def object(self) -> dict[str, Field]:
        """The values of an object, by key."""
        if not isinstance(self.value, dict):
            raise self.error("an object")
        below = f"{self.key}." if self.key else ""
        return {key: Field(self.file, f"{below}{key}", value) for key, value in self.value.items()}

    def get(self, key: str, *default: Any) -> Field:
        """One value of an object, or the `default` if there is one; if not, the key must be there."""
        fields = self.object()
        if key not in fields and not default:
            raise self.error(f"the key {key}", shortened(", ".join(fields), _SHOWN) or "none")
        return fields.get(key, Field(self.file, key, *default)) if default else fields[key]

    def list(self) -> list[Field]:
        """The values of a list."""
        if not isinstance(self.value, list):
            raise self.error("a list")
        return [Field(self.file, f"{self.key}[{i}]", value) for i, value in enumerate(self.value)]

    def text(self) -> str:
        """A text that is not empty."""
        if not isinstance(self.value, str) or not self.value:
            raise self.error("a text")
        return self.value

    def whole_number(self) -> int:
        """A whole number from 0 to what an int64 can hold about, be it 2, 2.0 or "2"."""
        number = _whole(self.value)
        if number is None:
            raise self.error("a whole number from 0")
        return number

    def by_number(self) -> dict[int, str]:
        """The texts of an object like {"0": "background", "1": "organ"}."""
        numbers = {key: _whole(key) for key in self.object()}
        wrong = [key for key, number in numbers.items() if number is None]
        if wrong:
            raise self.error("whole numbers from 0", _shown(wrong[0]))
        found = self.distinct({key: number for key, number in numbers.items() if number is not None})
        return {number: self.get(key).text() for number, key in found.items()}

    def distinct(self, numbers: Mapping[str, int]) -> dict[int, str]:
        """The keys by number, each of which must be there once."""
        keys: dict[int, list[str]] = {}
        for key, number in numbers.items():
            keys.setdefault(number, []).append(key)
        for number, same in keys.items():
            if len(same) > 1:
                raise self.error("each number once", f"{number} for {shortened(', '.join(same), _SHOWN)}")
        return {number: same[0] for number, same in keys.items()}

    def error(self, expected: str, received: str | None = None) -> ValueError:
        """The error to raise for this value: what was expected, and what is in its place."""
        where = f"{shortened(self.key, _SHOWN)}: " if self.key else ""
        found = f"{where}expected {expected}, received {_shown(self.value) if received is None else received}"
        return ValueError(f"{quoted(self.file)}: {printable(found)}")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {_shown(twice)} more than once in an object")
    return found


def _whole(value: Any) -> int | None:
    text = value if isinstance(value, str) else json.dumps(value) if isinstance(value, int | float) else ""
    return int(text.removesuffix(".0")) if re.fullmatch(r"[0-9]{1,18}(\.0)?", text) else None


def _shown(value: Any) -> str:
    """A value of any size and depth as a few words."""
    if isinstance(value, dict | list):
        kind = "object" if isinstance(value, dict) else "list"
        return f"an empty {kind}" if not value else "an object" if kind == "object" else "a list"
    return shortened(json.dumps(value, ensure_ascii=False), _SHOWN)
