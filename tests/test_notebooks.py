"""The notebooks run as they are, and what is committed of them is what they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
# Bytes of one notebook, and of all.
SMALL, ALL_SMALL = 500_000, 2_000_000


def read(folder: Path, name: str) -> Any:
    return nbformat.read(folder / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]


def execute(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`notebooks/execute.py`, with as little training and as few measurements as there can be."""
    return subprocess.run(
        [sys.executable, str(NOTEBOOKS / "execute.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "VOXLOSS_STEPS": "1", "VOXLOSS_SEEDS": "2", "VOXLOSS_ROUNDS": "1"},
    )


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cell: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_there_are_five() -> None:
    assert [name[0] for name in NAMES] == list("12345")
    assert sum((NOTEBOOKS / f"{name}.ipynb").stat().st_size for name in NAMES) < ALL_SMALL


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name[0] == "1" else pytest.mark.thorough) for name in NAMES]
)
def test_executed_anew_it_prints_what_is_committed(name: str, tmp_path: Path) -> None:
    run = execute(name, "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr
    committed, fresh = code(read(NOTEBOOKS, name)), code(read(tmp_path, name))
    assert [cell.id for cell in committed] == [cell.id for cell in fresh]
    for one, other in zip(committed, fresh, strict=True):
        assert pictures(one) == pictures(other), one.id
        if "measured" not in one.metadata.get("tags", []):
            assert printed(one) == printed(other), one.id


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_is_clean(name: str) -> None:
    """Complete, small, and silent about where and when it was made."""
    path = NOTEBOOKS / f"{name}.ipynb"
    notebook = read(NOTEBOOKS, name)
    nbformat.validate(notebook)
    assert path.stat().st_size < SMALL
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info == {"name": "python"}
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(map(pictures, cells)) >= 1
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, cell.id
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data"), cell.id
            assert output.get("name", "stdout") == "stdout", cell.id
            assert set(output.get("data", {})) <= {"image/png", "text/plain"}, cell.id
        assert not re.search(r"(?<![\w.])/\w+/|[A-Z]:\\|\bfile:", printed(cell)), cell.id


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for cell in read(NOTEBOOKS, name).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", cell.source):
                assert (NOTEBOOKS / target).exists(), target


@pytest.mark.integration
def test_a_cell_that_fails_is_an_error_and_leaves_no_notebook(tmp_path: Path) -> None:
    (tmp_path / "execute.py").write_bytes((NOTEBOOKS / "execute.py").read_bytes())
    cell = nbformat.v4.new_code_cell("1 / 0")  # type: ignore[no-untyped-call]
    broken = nbformat.v4.new_notebook(cells=[cell])  # type: ignore[no-untyped-call]
    before = nbformat.writes(broken)  # type: ignore[no-untyped-call]
    (tmp_path / "broken.ipynb").write_text(before, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "execute.py"), "broken"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    assert "ZeroDivisionError" in run.stderr
    assert (tmp_path / "broken.ipynb").read_text(encoding="utf-8") == before


def test_a_name_that_is_none_says_which_there_are() -> None:
    run = execute("6_boundary")
    assert run.returncode == 2
    assert "1_dice_and_iou" in run.stderr
    assert "received 6_boundary" in run.stderr
