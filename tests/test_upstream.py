"""The issue texts for MONAI: each reproduction prints what its text shows."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from sources import ROOT

PAGES = sorted(path for path in (ROOT / "docs" / "upstream").glob("*.md") if path.stem != "index")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_reproduction_prints_what_is_shown(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code, shown = re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL)[:2]
    assert "voxloss" not in text
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == shown


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "upstream" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES] == sorted(re.findall(r"\]\(([\w-]+\.md)\)", index))
    assert len(PAGES) == 5
