"""README is true: its code runs, says what its comments say, and every line of its table has its test."""

from __future__ import annotations

import re
import shlex
from fractions import Fraction
from pathlib import Path

import pytest

import test_monai_differences
from voxloss_verify import kill_matrix, verify_table  # noqa: F401  # to be replaced
from voxloss_verify.__main__ import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order_and_print_what_stands_below(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {"__name__": "readme"}
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```\n(.*?)```)?", README, flags=re.S)
    assert len(blocks) == 5
    for block, printed in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
        found = " ".join(line.strip() for line in capsys.readouterr().out.splitlines())
        if "print(" in block:
            assert found.split() == printed.split()


def test_commands_are_the_command_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options that do not exist and targets that cannot be parsed end with 2; nothing runs here."""
    commands = re.findall(r"^voxloss (.*?)(?: +#.*)?$", README, flags=re.M)
    assert len(commands) >= 4
    ran: list[object] = []

    def run(*given: object) -> int:
        ran.append(given)
        return 0

    for where in ("verify_table.verify_and_show", "kill_matrix.run_mutants"):
        monkeypatch.setattr(f"voxloss_verify.{where}", run)
    for command in commands:
        with pytest.raises(SystemExit) as left:
            main(shlex.split(command))
        assert left.value.code == 0, command
    assert len(ran) == len(commands)


def test_comments_give_the_values() -> None:
    lines = re.findall(r"^(\S.*?) +# (Fraction\(.*\))$", README, flags=re.M)
    assert len(lines) == 2
    namespace: dict[str, object] = {}
    exec("from voxloss_data import ramp, shifted_boxes", namespace)
    for expression, value in lines:
        assert eval(expression, namespace) == eval(value, {"Fraction": Fraction})


def test_the_table_of_differences_and_the_tests_are_the_same_list() -> None:
    table = README.split("| MONAI 1.6.1 | voxloss | test |")[1].split("\n\n")[0]
    named = [
        name.rstrip("…")
        for row in table.splitlines()[2:]
        for name in re.findall(r"`([a-z0-9_]+…?)`", row.split("|")[3])
    ]
    tests = [name.removeprefix("test_") for name in vars(test_monai_differences) if name.startswith("test_")]
    for name in named:
        assert sum(test.startswith(name) for test in tests) == 1, f"README names {name}"
    for test in tests:
        assert sum(test.startswith(name) for name in named) == 1, f"README has no line for {test}"


def test_local_links_lead_somewhere() -> None:
    for page in ("README.md", ".github/CONTRIBUTING.md", "docs/monai.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
        for path in re.findall(r"`((?:plugin|verification|datasets|tests)/[\w./]+)", text):
            assert (ROOT / path.rstrip(".")).exists(), f"{page}: {path}"
