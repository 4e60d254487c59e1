"""The words that `make check` finds in prose."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import words
from sources import ROOT
from words import CODE, EXCEPTIONS, GENERATED, THESE, WORDS, found_in, prose, words_of

# An example for each entry of WORDS, in its order.
EXAMPLES = (
    "31 laws hold",
    "this is declared to be",
    "what a loss says of itself",
    "a steep slope",
    "false negatives weigh more",
    "the mean over items",
    "a small mistake",
    "prediction and truth",
    "in a training. Then",
    "several processes",
    "losses over voxels",
    "one answer of many",
    "a yes-or-no question",
    "what it was told",
    "asked for",
    "nobody said so",
    "it hears Ctrl-C",
    "the focusing parameter",
    "the wobble of a value",
    "the steepest gradient",
    "expected 1, got 2",
    "nothing to find",
    "with what is not there",
    "nothing is to be found",
    "a wrong loss",
    "lets wrong values loose",
    "which check kills which",
    "whoever is wrong gets no time",
    "Leave it away",
    "the power gives way to its chord",
    "ignored in silence",
    "Generalised Dice",
)


def lines(text: str, name: str = "docs/page.md") -> list[tuple[int, str]]:
    return [(line, found) for line, found, _ in found_in(text, name)]


@pytest.mark.parametrize(("word", "example"), [*zip(WORDS, EXAMPLES, strict=True)], ids=lambda x: str(x)[:30])
def test_each_word_is_found(word: words.Word, example: str) -> None:
    found = [*found_in(f"Right.\n{example.replace('declared', 'claimed')}", "docs/mutants.md")]
    assert (2, word.instead) in [(line, instead) for line, _, instead in found]


@pytest.mark.parametrize(
    "text",
    [
        "ground truth",
        "a training run and a training set",
        "the mean over voxels",
        "Generalised Dice overlap as a deep learning loss",
        "weights, weighted, gotten, itemised, lawn",
    ],
)
def test_the_terms_of_the_field_are_not(text: str) -> None:
    assert not lines(text)


def test_laws_are_words_of_pages_and_of_the_library_only() -> None:
    assert lines("a law", "README.md")
    assert lines("a law", "plugin/voxloss/inputs.py")
    assert not lines("a law", "verification/voxloss_verify/laws/law.py")


def test_prose_of_a_page_is_what_is_no_code(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "An item, `item`, $item$ [text](item.md) <item> several\nprocesses\n"
        "```python\nitem = 'item'  # got it\n# a slope\n```\n{{ item }} mistake\n",
        encoding="utf-8",
    )
    ((_, text),) = prose(page)
    assert lines(text) == [(1, "item"), (1, "several processes"), (4, "got"), (5, "slope"), (7, "mistake")]


def test_prose_of_a_program_is_its_docstrings_comments_and_texts(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        '"""An item, `slope`."""\n'
        "item = {'item': 'got'}  # a mistake\n"
        'raise ValueError(\n    f\'expected {item[0]}, got {", ".join(f"{item}" for item in item)}, several \'\n'
        "    'processes'\n)\n"
        "call('several ', 'processes')  # type: ignore[item]\n",
        encoding="utf-8",
    )
    ((_, text),) = prose(program)
    assert lines(text) == [(1, "item"), (2, "mistake"), (4, "got"), (4, "several processes")]
    assert len(text) == len(program.read_text(encoding="utf-8"))
    assert CODE in text


def test_a_notebook_is_read_by_cell(tmp_path: Path) -> None:
    notebook = tmp_path / "book.ipynb"
    cells = [
        {"cell_type": "markdown", "source": ["Right.\n", "A slope."]},
        {"cell_type": "code", "source": ["slope = 1  # a slope"]},
    ]
    notebook.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    found = [(prefix, *line) for prefix, text in prose(notebook) for line in lines(text)]
    assert found == [("cell 0:", 2, "slope"), ("cell 1:", 1, "slope")]


def test_every_exception_is_needed_and_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "EXCEPTIONS", ())
    texts = [(str(path.relative_to(ROOT)), text) for path in words.files() for _, text in prose(path)]
    for case in EXCEPTIONS:
        assert case.reason
        assert any(
            words.is_covered(found, case)
            for name, text in texts
            if re.search(case.files, name)
            for found in words_of(name).finditer(text)
        ), case


def test_every_page_and_module_is_read() -> None:
    read = {path.relative_to(ROOT).as_posix() for path in words.files()}
    for folder in ("docs", "notebooks", "plugin", "verification", "datasets", "examples", "tests", ".github"):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in (".py", ".md", ".j2", ".ipynb") and name not in (*GENERATED, *THESE):
                assert name in read
    assert {"README.md", "CHANGELOG.md", "mkdocs.yml"} <= read


def test_findings_are_lines_and_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(words, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("Right.\nA mistake.\n", encoding="utf-8")
    assert words.main() == 1
    assert capsys.readouterr().out == "README.md:2: 'mistake': error, false positive, false negative\n"
    (tmp_path / "README.md").write_text("Right.\n", encoding="utf-8")
    assert words.main() == 0
    assert not capsys.readouterr().out
