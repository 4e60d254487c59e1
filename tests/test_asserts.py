"""What `make check` finds of asserts that cannot fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from asserts_that_cannot_fail import found_in
from sources import ROOT


@pytest.mark.parametrize(
    "test",
    [
        "abs(a) < 1 if b else 1e-15",
        "(x > 0 for x in a)",
        "lambda: a == b",
        "[a == b]",
        "{a: b}",
        "{a}",
        "True",
        "1e-15",
        "a == b or (x for x in a)",
        "a == b and 1e-15",
    ],
)
def test_an_assert_that_cannot_fail_is_found(test: str) -> None:
    assert [line for line, _ in found_in(f"def f(a, b):\n    assert {test}, 'why'")] == [2]


@pytest.mark.parametrize(
    "test",
    [
        "abs(a) < (1 if b else 1e-15)",
        "all(x > 0 for x in a)",
        "a == [b]",
        "a == b or a == 2",
        "not a",
        "False",
        "[x for x in a]",
    ],
)
def test_an_assert_that_can_fail_is_not(test: str) -> None:
    assert not list(found_in(f"def f(a, b):\n    assert {test}"))


@pytest.mark.skipif(shutil.which("ruff", path=str(Path(sys.executable).parent)) is None, reason="no ruff")
@pytest.mark.parametrize(
    ("test", "rule"),
    [
        ("(a == b, 'why')", "F631"),
        ("'a == b'", "PLW0129"),
        ("1 == 1", "PLR0133"),
        ("a == a", "PLR0124"),
        ("a == b or 'why'", "SIM222"),
    ],
)
def test_ruff_finds_the_others(test: str, rule: str) -> None:
    """Its rules are enabled in pyproject.toml."""
    ruff = Path(sys.executable).with_name("ruff")
    command = [str(ruff), "check", "--output-format=concise", "--stdin-filename=tests/test_x.py", "-"]
    source = f"def f(a: int, b: int) -> None:\n    assert {test}\n"
    run = subprocess.run(command, input=source, capture_output=True, text=True, cwd=ROOT, check=False)
    assert f": {rule} " in run.stdout, run.stdout + run.stderr
