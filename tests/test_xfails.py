"""Expected failures: the file, and what it makes of the records."""

from __future__ import annotations

from pathlib import Path

import pytest

from voxloss_verify.laws.record import Record, Status
from voxloss_verify.xfails import apply, fails, read_xfails

WHY = {"25": "sums overflow"}


def record(status: Status, law: str = "25") -> Record:
    return Record(law, "half precision", status, "as it was", examples=3)


def test_reasons_by_law(tmp_path: Path) -> None:
    path = tmp_path / "xfails.toml"
    path.write_text('[xfail]\n"25" = "sums ∑\\n  overflow "\n1 = "boxes"\n', encoding="utf-8")
    assert read_xfails(path) == {"25": "sums ∑ overflow", "1": "boxes"}
    path.write_text("[xfail]\n")
    assert read_xfails(path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"expected a TOML file, received No such file"),
        (b"[xfail", r"expected a TOML file, received Expected"),
        (b"\xff\xfe", r"expected a TOML file, received 'utf-8'"),
        (b"", r"expected one table \[xfail\] of checks and reasons, received nothing"),
        (b'25 = "why"', r"expected one table \[xfail\] of checks and reasons, received 25"),
        (b'xfail = "25"', r"expected one table \[xfail\]"),
        (b'[xfails]\n25 = "why"', r"expected one table \[xfail\] of checks and reasons, received xfails"),
        (
            b'[xfail]\n25 = "why"\n[also]\n',
            r"expected one table \[xfail\] of checks and reasons, received xfail, also",
        ),
        (b'[xfail]\n99 = "why"', r"expected checks of 1, 2, .*, received '99'"),
        (b"[xfail]\n25 = true", r"expected a reason in words for check 25, received True"),
        (b'[xfail]\n25 = " "', r"expected a reason in words for check 25, received ' '"),
    ],
)
def test_a_bad_file_is_one_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "xfails.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_xfails(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a TOML file, received"):
        read_xfails(tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "reason", "failed"),
    [
        (Status.broken, Status.expected, "sums overflow", False),
        (Status.holds, Status.unexpected, "expected to be broken: sums overflow", False),
        (
            Status.not_applicable,
            Status.not_applicable,
            "as it was; but expected to be broken: sums overflow",
            True,
        ),
    ],
)
def test_records_of_expected_failures(before: Status, after: Status, reason: str, failed: bool) -> None:
    applied = apply(record(before), WHY)
    assert (applied.status, applied.reason, applied.examples) == (after, reason, 3)
    assert fails(applied, WHY) is failed
    assert fails(applied, WHY, strict=True) is (failed or after is Status.unexpected)


@pytest.mark.parametrize(
    ("status", "failed"), [(Status.broken, True), (Status.holds, False), (Status.not_applicable, False)]
)
def test_other_records_stay_as_they_are(status: Status, failed: bool) -> None:
    other = record(status, law="1")
    assert apply(other, WHY) is other
    assert fails(other, WHY) is failed
