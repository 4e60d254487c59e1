"""README and the page of differences are true: their code runs, and every difference has its test."""

from __future__ import annotations

import re

import pytest

import test_monai_differences
from pages import ROOT, local_links, parse_commands, run_python
from voxloss_verify.laws import LAWS, METRIC_LAWS

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order_and_print_what_stands_below(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_python("README.md", capsys) == 1


def test_commands_are_the_command_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_commands("README.md", monkeypatch) >= 3


def test_the_number_of_checks() -> None:
    (numbers,) = re.findall(r"runs (\d+) checks on\s.*, or (\d+) on a metric", README)
    assert tuple(map(int, numbers)) == (len(LAWS), len(METRIC_LAWS))


def test_the_table_of_differences_and_the_tests_are_the_same_list() -> None:
    page = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    table = page.split("| MONAI 1.6.1 | voxloss | severity | test |")[1].split("\n\n")[0]
    named = [
        name.rstrip("…")
        for row in table.splitlines()[2:]
        for name in re.findall(r"`([a-z0-9_]+…?)`", row.split("|")[4])
    ]
    tests = [name.removeprefix("test_") for name in vars(test_monai_differences) if name.startswith("test_")]
    for name in named:
        assert sum(test.startswith(name) for test in tests) == 1, f"differences.md names {name}"
    for test in tests:
        assert sum(test.startswith(name) for name in named) == 1, f"differences.md has no line for {test}"


def test_local_links_lead_somewhere() -> None:
    for page in ("README.md", ".github/CONTRIBUTING.md", "docs/monai.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target, _ in local_links(page):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
        for path in re.findall(r"`((?:plugin|verification|datasets|tests)/[\w./]+)", text):
            assert (ROOT / path.rstrip(".")).exists(), f"{page}: {path}"
