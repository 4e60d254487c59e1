"""Find words that the prose avoids, with the field's term for each: `python tests/words.py`, in `make check`.

It reads pages, notebooks, templates, and the docstrings, comments and texts of Python files. Code in backticks,
equations and code blocks (except comments) is skipped, and so is a string without a space, which is a key or a
name.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from sources import ROOT

# Of a file's text all but the prose is replaced by this, so that the positions stay, and no phrase spans code.
CODE = "\0"

FILES = (
    "README.md",
    "CHANGELOG.md",
    "Makefile",
    "mkdocs.yml",
    "pyproject.toml",
    ".github/*.md",
    "docs/**/*.md",
    "docs/*.py",
    "notebooks/*",
    "plugin/**/*.py",
    "verification/**/*.py",
    "verification/**/*.j2",
    "datasets/**/*.py",
    "examples/**/*.py",
    "examples/**/*.md",
    "tests/*.py",
)
# Written by commands; the words come from templates and Python files, which are read.
GENERATED = ("docs/conformance.md", "docs/evidence.md", "docs/performance.md", "docs/trials.md")
# This file and its test name the words.
THESE = ("tests/words.py", "tests/test_words.py")
SUFFIXES = (".py", ".md", ".ipynb", ".j2", ".yml", ".toml", "")


class Word(NamedTuple):
    """What is not written, what is written instead, and the files that it concerns."""

    pattern: str
    instead: str
    files: str = ""


WORDS = (
    Word(r"laws?", "check", r"\.(md|ipynb|j2|yml)$|^plugin/|/cli/"),
    Word(r"(is|are|was|were) (not )?claimed|claims to be", "declared"),
    Word(r"what (a|the|this|each) (loss|metric) says of itself", "declared properties"),
    Word(r"slopes?", "gradient, derivative"),
    Word(r"weigh(s|ed|ing)?", "weight, count"),
    Word(r"items?", "sample (of the batch), entry (of a list)"),
    Word(r"mistakes?", "error, false positive, false negative"),
    Word(r"(?<!ground\s)(?<!ground-)truths?", "ground truth, reference"),
    Word(
        r"a training(?! "
        r"(run|runs|step|loop|set|pipeline|script|scan|image|patch|metric|network|epoch|example)\b)|trainings",
        "training run",
    ),
    Word(r"several processes", "distributed training"),
    Word(r"(loss|losses|entropy|terms?) over voxels|(?<=#\s)over voxels", "voxel-wise"),
    Word(r"one answer of (many|several)|exclusive answers", "mutually exclusive classes (softmax)"),
    Word(r"yes[- ]or[- ]no|(binary|own) questions?|question of its own", "independent binary channels (sigmoid)"),
    Word(r"told|tells?|telling", "configured; shows, states"),
    Word(r"(asks?|asked|asking)", "checks, requests, requires"),
    Word(r"(says?|said|saying)", "states, shows; set or pass (an option)"),
    Word(r"hears?|heard|dares?", "receives"),
    Word(r"focusing", "gamma"),
    Word(r"wobbles?", "value tolerance"),
    Word(r"steepest", "gradient scale"),
    Word(r"got|what came", "received"),
    Word(r"nothing to find|nothing (is |was )?found", "empty target, empty prediction"),
    Word(r"what is not there", "true negatives"),
    Word(r"(nothing|what) is to be found", "empty target"),
    Word(r"wrong loss(es)?", "incorrect loss, mutant"),
    Word(r"lets? .{0,30}\bloose", "mutation testing"),
    Word(r"kills?|killed|killing", "detects", r"mutant|kill_matrix|\.(md|ipynb|j2)$|/cli/"),
    Word(
        r"(who|what|whoever|whatever) is wrong( \w+)? (gets|has) no time",
        "incorrect implementations are not timed",
    ),
    Word(r"(leave|leaves|leaving|left) (it|them|that|this|one) away|left away", "omit"),
    Word(r"gives? way to", "is replaced by"),
    Word(r"in silence", "silently"),
    Word(r"generalised dice(?! overlap)", "Generalized Dice, as in the API"),
)


class Exempt(NamedTuple):
    """A use that stays: the words with what surrounds them, in these files, and why."""

    pattern: str
    files: str
    reason: str


EXCEPTIONS = (
    Exempt(r"skip per item", r"\.py$", "a value of `Claims.absent`, which is part of the API"),
    Exempt(r"with slope 2", r"test_score\.py$", "scl_slope and scl_inter of a NIfTI header"),
    Exempt(r"^\s*truth: |\n\s+truth: ", r"trial/results\.py$", "the name of an attribute"),
    Exempt(r"\n\s+said: ", r"slips\.py$", "the name of an attribute"),
    Exempt(r"def said|= said", r"test_demo\.py$", "a function in the source of a program"),
    Exempt(r"focal term over voxels", r"migration\.md$", "an average over voxels, not a kind of loss"),
)


def prose_of_markdown(text: str) -> str:
    """A page without its code; of blocks of code the comments stay."""

    def blank(found: re.Match[str]) -> str:
        return re.sub(r"\S", CODE, found[0])

    def comments(found: re.Match[str]) -> str:
        return "".join(
            re.sub(r"\S", CODE, code) + sign.replace("#", " ") + comment
            for line in found[0].splitlines(keepends=True)
            for code, sign, comment in [re.fullmatch(r"(.*?)((?:(?<=\s)|^)#+ |$)(.*\n?)", line, re.S).groups()]  # type: ignore[union-attr]
        )

    text = re.sub(r"^```.*?^```$", comments, text, flags=re.S | re.M)
    for code in (
        r"`[^`\n]+`",
        r"\$\$.*?\$\$",
        r"\$[^$\n]+\$",
        r"\]\([^)\s]*\)",
        r"<!--.*?-->",
        r"<[^<>\n]+>",
        r"\{[{%#].*?[}%#]\}",
    ):
        text = re.sub(code, blank, text, flags=re.S)
    return text


def prose_of_python(source: str) -> str:
    """Docstrings, comments and texts of a program, where they stand; adjacent strings are one text."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    prose = [c if c.isspace() else CODE for c in source]
    tokens = [*tokenize.generate_tokens(io.StringIO(source).readline)]
    code = [token for token in tokens if token.type not in (tokenize.NL, tokenize.COMMENT)]
    adjacent = {
        string.start
        for one, other in pairwise(code)
        if one.type == other.type == tokenize.STRING
        for string in (one, other)
    }
    for token in tokens:
        kind = tokenize.tok_name[token.type]
        if kind not in ("COMMENT", "STRING", "FSTRING_MIDDLE"):
            continue
        first, text = starts[token.start[0] - 1] + token.start[1], token.string
        if kind == "COMMENT":
            text = re.sub(r"#:?", lambda mark: " " * len(mark[0]), text, count=1)
            text = CODE * len(text) if re.match(r"\s*(type: ignore|noqa)", text) else text
        elif kind == "STRING":
            mark = re.match(r"(\w*)('''|\"\"\"|'|\")", text)
            assert mark
            inner = text[len(mark[0]) : -len(mark[2])]
            if token.start not in adjacent and not re.search(r"\s", inner.strip()):
                inner = CODE * len(inner)
            while "f" in mark[1].lower() and re.search(r"\{[^{}]*\}", inner):  # fields, the innermost first
                inner = re.sub(r"\{[^{}]*\}", lambda field: CODE * len(field[0]), inner)
            text = " " * len(mark[0]) + inner + " " * len(mark[2])
        text = re.sub(r"`[^`\n]+`", lambda code: CODE * len(code[0]), text)
        text = re.sub(r"\\n", "  ", text)
        prose[first : first + len(text)] = text
    return "".join(prose)


def prose(path: Path) -> Iterator[tuple[str, str]]:
    """The prose of a file, or of each cell of a notebook, with a prefix of its line numbers."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        for number, cell in enumerate(json.loads(text)["cells"]):
            source = "".join(cell["source"])
            yield (
                f"cell {number}:",
                (prose_of_markdown if cell["cell_type"] == "markdown" else prose_of_python)(source),
            )
    elif path.suffix == ".py":
        yield "", prose_of_python(text)
    else:
        yield "", prose_of_markdown(text)


def spaced(pattern: str) -> str:
    """The pattern with any white space, as a line may end between two words."""
    return pattern.replace(" ", r"\s+")


@cache
def words_of(name: str) -> re.Pattern[str]:
    """One pattern for all words that concern a file, each a group that is named after its number."""
    each = (f"(?P<w{i}>{spaced(word.pattern)})" for i, word in enumerate(WORDS) if re.search(word.files, name))
    return re.compile(rf"\b(?:{'|'.join(each)})\b", flags=re.I)


def found_in(text: str, name: str) -> Iterator[tuple[int, str, str]]:
    """Line, words and replacement of each finding in prose of a file of this name."""
    exceptions = [case for case in EXCEPTIONS if re.search(case.files, name)]
    for found in words_of(name).finditer(text):
        if not any(is_covered(found, case) for case in exceptions):
            number = int(str(found.lastgroup)[1:])
            yield text.count("\n", 0, found.start()) + 1, " ".join(found[0].split()), WORDS[number].instead


def is_covered(found: re.Match[str], case: Exempt) -> bool:
    """Whether an exception applies: its pattern includes the words that were found."""
    around = max(0, found.start() - 80)
    covers = re.finditer(spaced(case.pattern), found.string[around : found.end() + 80], flags=re.I)
    return any(
        around + cover.start() <= found.start() and found.end() <= around + cover.end() for cover in covers
    )


def files() -> Iterator[Path]:
    """The files that are read, once each."""
    for path in sorted({path for pattern in FILES for path in ROOT.glob(pattern)}):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and path.suffix in SUFFIXES and name not in (*GENERATED, *THESE):
            yield path


def main() -> int:
    """Print each finding as `file:line: words: replacement`; 1 if there are any."""
    found = [
        f"{name}:{prefix}{line}: {words!r}: {instead}"
        for path in files()
        for name in [path.relative_to(ROOT).as_posix()]
        for prefix, text in prose(path)
        for line, words, instead in sorted(found_in(text, name))
    ]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
