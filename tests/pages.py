"""What README and the pages of the site have in common: their code runs, their commands and links exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from voxloss_app.__main__ import main

ROOT = Path(__file__).parent.parent
# Where the work of a command begins; by then its options have been parsed.
WORK = (
    "bench.head.compare",
    "bench.maps.compare",
    "bench.run.bench",
    "conformance.build",
    "demo.run_demo",
    "doctor.gpu.examine_gpu",
    "doctor.show_doctor",
    "verify.mutants.run_mutants",
    "phantoms.write_and_show",
    "score.table.score_and_show",
    "study.hold_study",
    "train.predict_and_write",
    "train.train_and_score",
    "trial.hold_trial",
    "verify.table.verify_and_show",
)


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block; a line that ends with a backslash goes on in the next."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M)
    return [(kind, re.sub(r" \\\n +", " ", block)) for kind, block in found]


def python_blocks(text: str) -> list[tuple[str, str]]:
    """Each block of Python, and its output on the page: the plain block right below it."""
    return re.findall(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```)?", text, flags=re.S | re.M)


def run_python(page: str, capsys: pytest.CaptureFixture[str]) -> int:
    """Run a page's blocks in order in one namespace, compare what they print, and return how many there are."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    found = python_blocks((ROOT / page).read_text(encoding="utf-8"))
    for block, printed in found:
        exec(compile(block, page, "exec"), namespace)
        assert capsys.readouterr().out.split() == printed.split(), f"{page}:\n{block}"
    return len(found)


def commands(text: str) -> list[str]:
    """The arguments of each line that is a command line of voxloss."""
    plain = "".join(block for kind, block in blocks(text) if not kind)
    return re.findall(r"^voxloss (.*?)(?: +#.*)?$", plain, flags=re.M)


def parse_commands(page: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let each command line get as far as its work, and return how many there are.

    Options that do not exist and arguments that cannot be parsed end with 2.
    """
    ran: list[object] = []

    def run(*given: object) -> int:
        ran.append(given)
        return 0

    for where in WORK:
        monkeypatch.setattr(f"voxloss_app.{where}", run)
    lines = commands((ROOT / page).read_text(encoding="utf-8"))
    for line in lines:
        with pytest.raises(SystemExit) as left:
            main(shlex.split(line))
        assert not left.value.code, f"{page}: voxloss {line}"
    assert len(ran) == len(lines), page
    return len(lines)


def local_links(page: str) -> list[tuple[str, str]]:
    """The files that a page links to, with the places in them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text)
