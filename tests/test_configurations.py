"""Every loss of voxloss is in the table of configurations, in the readers, in the names and on the pages."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import voxloss
from every_loss import LOSSES
from pages import ROOT
from voxloss_app import names
from voxloss_app.conformance.losses import LIBRARIES
from voxloss_verify.configurations import CONFIGURATIONS, SHARED
from voxloss_verify.subject.readers import READERS
from voxloss_verify.subject.subject import subject_of

# By the names of the classes; IoULoss is another name of one.
CLASSES = {kind.__name__: kind for kind in LOSSES.values()}
# The pages that list every loss.
PAGES = ("README.md", "docs/formulas.md", "docs/api/losses.md")


def test_every_loss_is_in_the_table() -> None:
    assert {*CONFIGURATIONS} == {*CLASSES}, "see voxloss_verify/configurations.py"
    for name, each in CONFIGURATIONS.items():
        assert {*each} & {*SHARED}, f"{name}: nothing to compare with other libraries"
        made = [sorted(arguments.items(), key=str) for arguments in each.values()]
        assert all(made.count(arguments) == 1 for arguments in made), name


def test_every_loss_has_a_reader() -> None:
    """Of its own, as that of a base class would read another formula off it; a compound is read by its parts."""
    names = [name for name, kind in CLASSES.items() if not issubclass(kind, voxloss.CompoundLoss)]
    missing = [name for name in names if ("voxloss", name) not in READERS]
    assert missing == [], "enter them in READERS of voxloss_verify/subject/readers.py"


@pytest.mark.parametrize("name", CLASSES)
def test_the_claims_of_every_configuration_are_read(name: str) -> None:
    for arguments in CONFIGURATIONS[name].values():
        subject = subject_of(CLASSES[name], kwargs=arguments)
        assert subject.claims.reduction == arguments.get("reduction", "mean")


def test_every_loss_has_a_name_on_the_command_line() -> None:
    assert {*CLASSES} - {*names.LOSSES.values()} == set(), "see voxloss_app/names.py"
    assert sorted(names.LOSSES.values()) == sorted(CLASSES)


@pytest.mark.parametrize("page", PAGES)
def test_every_loss_is_on_the_pages(page: str) -> None:
    words = {*re.findall(r"\w+", (ROOT / page).read_text(encoding="utf-8"))}
    assert {*CLASSES} - words == set(), f"see {page}"


def test_every_loss_is_compared_with_other_libraries() -> None:
    assert {examined.name for examined in LIBRARIES[0].losses()} == {*CLASSES}


def test_a_loss_that_is_nowhere_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLASSES, "NewLoss", CLASSES["DiceLoss"])
    checks = (test_every_loss_is_in_the_table, test_every_loss_has_a_reader)
    others = (test_every_loss_has_a_name_on_the_command_line, test_every_loss_is_compared_with_other_libraries)
    for check in (*checks, *others):
        with pytest.raises(AssertionError, match="NewLoss"):
            check()
    for page in PAGES:
        with pytest.raises(AssertionError, match="NewLoss"):
            test_every_loss_is_on_the_pages(page)


def test_the_table_is_light() -> None:
    code = (
        "import sys, voxloss_verify.configurations;"
        "sys.exit(not {'torch', 'voxloss', 'numpy'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
