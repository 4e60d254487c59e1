"""Every loss keeps the laws, in every configuration that changes the claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

import pytest

import voxloss
from every_loss import LOSSES
from voxloss_verify.check import chosen_laws, run_checks
from voxloss_verify.configurations import CONFIGURATIONS, LABELS, UNSMOOTHED
from voxloss_verify.laws.record import Status
from voxloss_verify.laws.setting import Profile, Setting
from voxloss_verify.subject.subject import subject_of

pytestmark = pytest.mark.usefixtures("one_thread")

# Those that look at the formula; the others look at tensors, devices and processes.
LAWS = ["2", "3", "11", "12a", "12b", "13a", "13b", "14", "15", "16", "17", "18", "19a", "19c", "19d", "20"]
LAWS += ["21", "22", "23b", "24", "26", "29a", "29b", "30", "31c", "31d"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The first configuration of each loss; all of them with --thorough."""
    if "configuration" in metafunc.fixturenames:
        every = [[(name, label) for label in each] for name, each in CONFIGURATIONS.items()]
        chosen = every if metafunc.config.getoption("--thorough") else [each[:1] for each in every]
        rows = [row for each in chosen for row in each]
        metafunc.parametrize("configuration", rows, ids=lambda row: f"{row[0]} {row[1]}")


@pytest.mark.sampled(4)
def test_every_law_that_applies_holds(configuration: tuple[str, str], request: pytest.FixtureRequest) -> None:
    """On drawn volumes."""
    examples = 12 if request.config.getoption("--thorough") else 6
    name, label = configuration
    subject = subject_of(LOSSES[name], kwargs=CONFIGURATIONS[name][label])
    setting = Setting(Profile(examples, (), "eager"), derandomize=True)
    laws = [law if law.strategy is None else replace(law, given=None) for law in chosen_laws(LAWS)]
    records = list(run_checks(subject, setting, laws))
    assert [f"{record.law}: {record.reason}" for record in records if record.status is Status.broken] == []
    held = {record.law for record in records if record.status is Status.holds}
    assert held >= {"13a", "20", "23b", "24", "31d"}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_law_can_be_checked_on_every_loss(name: str) -> None:
    """One volume each: nothing that a law does with a loss may fail for another reason than the law."""
    own: dict[str, Any] = {"use_softmax": True} if name == "FocalLoss" else {"softmax": True}
    if "cells" in signature(LOSSES[name]).parameters:  # of cells with ignored voxels Dice alone is declared
        own |= {"lambda_ce": 0}
    subject = subject_of(LOSSES[name], kwargs={"to_onehot_y": True, "ignore_index": 255, **own})
    setting = Setting(Profile(1, (4,), "eager"), derandomize=True)
    slow = ("1", "2", "3", "4", "5", "24", "25", "28a", "28c", "28d")
    laws = [law for law in chosen_laws(None) if law.id not in slow]
    records = list(run_checks(subject, setting, laws))
    assert [f"{record.law}: {record.reason}" for record in records if record.status is Status.broken] == []


@pytest.mark.parametrize(
    ("options", "laws"),
    [
        (LABELS, {"12a", "13b", "18", "19c", "21"}),
        ({"sigmoid": True, **UNSMOOTHED}, {"12a", "12b", "14"}),
        ({**LABELS, "batch": True, "include_background": False, "ignore_index": 255}, {"16", "17", "19a"}),
    ],
)
def test_the_laws_that_apply_to_a_compound(options: Mapping[str, Any], laws: set[str]) -> None:
    subject = subject_of(voxloss.DiceCELoss, kwargs=options)
    setting = Setting(Profile(1, (), "eager"))
    reasons = {law.id: law.domain(subject, setting) for law in chosen_laws(LAWS)}
    assert {law for law in laws if reasons[law] is not None} == set()
    assert reasons["15"] == "the background counts", "it does in cross entropy"
    assert reasons["22"] == "a check of scores of sums over voxels, not of compound"


@pytest.mark.parametrize("loss", [voxloss.BoundaryLoss, voxloss.DiceBoundaryLoss])
def test_padding_is_no_check_of_a_mean_over_all_voxels(loss: type[voxloss.StatisticsLoss]) -> None:
    """Added voxels of background are counted in the mean of the distance, and make it smaller."""
    setting = Setting(Profile(1, (), "eager"))
    (padding,) = chosen_laws(["15"])
    subject = subject_of(loss, kwargs={**LABELS, "include_background": False})
    assert padding.domain(subject, setting) == "the formula counts the voxels, of which padding adds some"
    alone = subject_of(voxloss.DiceLoss, kwargs={**LABELS, "include_background": False})
    assert padding.domain(alone, setting) is None
