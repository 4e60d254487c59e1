"""Means over voxels, compounds and losses of all voxels keep the laws, in every form that changes the claims."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import voxloss
from every_loss import LOSSES
from voxloss_verify.check import chosen_laws, run_check
from voxloss_verify.laws.record import Status
from voxloss_verify.laws.setting import Profile, Setting
from voxloss_verify.subject.subject import subject_of

pytestmark = pytest.mark.usefixtures("one_thread")

# Those that look at the formula; the others look at tensors, devices and processes.
LAWS = ["2", "3", "11", "12a", "12b", "13a", "13b", "14", "15", "16", "17", "18", "19a", "19c", "19d", "20"]
LAWS += ["21", "22", "23b", "24", "26", "29a", "29b", "30", "31c", "31d"]
LABELS: dict[str, Any] = {"softmax": True, "to_onehot_y": True}
WEIGHT = [1.0, 2.0, 0.5, 4.0]
UNSMOOTHED = {"smooth_nr": 0.0, "smooth_dr": 0.0}
OF_ALL: list[dict[str, Any]] = [
    LABELS,
    {"sigmoid": True},
    {**LABELS, "weight": WEIGHT, "ignore_index": 1},
    {**LABELS, "include_background": False, "ignore_index": 255},
    {**LABELS, "reduction": "sum"},
]
OF_ENTROPY: list[dict[str, Any]] = [
    {**LABELS, "label_smoothing": 0.25, "weight": WEIGHT},
    {"sigmoid": True, "label_smoothing": 0.25},
    {**LABELS, "ignore_index": 1},
    {"to_onehot_y": True},
]
OF_FOCAL: list[dict[str, Any]] = [
    {"gamma": 0.5, "alpha": 0.25, "use_softmax": True, "to_onehot_y": True},
    {"gamma": 0.0, "alpha": 0.25},
    {"alpha": WEIGHT, "to_onehot_y": True},
]
OF_DICE: list[dict[str, Any]] = [
    {**LABELS, **UNSMOOTHED, "batch": True, "include_background": False},
    {"sigmoid": True, **UNSMOOTHED, "lambda_ce": 3.0, "squared_pred": True},
    {**LABELS, "absent": "skip", "classes": [2, 1]},
]


def of_focal(options: dict[str, Any]) -> dict[str, Any]:
    """The same for a loss whose activation is `use_softmax`."""
    others = {name: value for name, value in options.items() if name not in ("softmax", "sigmoid")}
    return {**others, "use_softmax": options.get("softmax", False)}


CASES: list[tuple[type[voxloss.StatisticsLoss], dict[str, Any]]] = [
    *((voxloss.CrossEntropyLoss, options) for options in OF_ALL + OF_ENTROPY),
    *((voxloss.FocalLoss, options) for options in [*map(of_focal, OF_ALL), *OF_FOCAL]),
    *((voxloss.DiceCELoss, options) for options in OF_ALL + OF_DICE),
    *((voxloss.DiceFocalLoss, options) for options in OF_ALL),
    *((voxloss.GeneralizedDiceFocalLoss, options) for options in OF_ALL[:3]),
    *((voxloss.TverskyCELoss, options) for options in OF_ALL[:2]),
    *((voxloss.FocalTverskyCELoss, options) for options in OF_ALL[:2]),
    *((voxloss.MCCLoss, options) for options in OF_ALL),
    (voxloss.MCCLoss, {"smooth_dr": 0.0, "batch": True}),
    *((voxloss.SensitivitySpecificityLoss, options) for options in OF_ALL),
    (voxloss.SensitivitySpecificityLoss, {"r": 0.5, "batch": True}),
    *((voxloss.PenaltyGeneralizedDiceLoss, options) for options in OF_ALL),
    *((voxloss.ComboLoss, options) for options in OF_ALL),
    *((voxloss.ExponentialLogarithmicLoss, options) for options in OF_ALL),
    (voxloss.ExponentialLogarithmicLoss, {**LABELS, "frequencies": WEIGHT, "gamma_ce": 1.0}),
    (voxloss.ExponentialLogarithmicLoss, {"gamma_ce": 0.5, "to_onehot_y": True, "gamma_dice": 2.0}),
    *((voxloss.UnifiedFocalLoss, options) for options in OF_ALL),
    (voxloss.UnifiedFocalLoss, {**LABELS, "gamma": 0.25, "delta": 0.3, "asymmetric": False, "classes": [2, 0]}),
    (voxloss.UnifiedFocalLoss, {"to_onehot_y": True, "gamma": 0.75, "lambda_focal": 0.1}),
]


@pytest.mark.parametrize(("loss", "options"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_every_law_that_is_asked_holds(loss: Any, options: dict[str, Any]) -> None:
    """On drawn volumes."""
    subject = subject_of(loss, kwargs=options)
    setting = Setting(Profile(12, (), "eager"), derandomize=True)
    laws = [law if law.strategy is None else replace(law, given=None) for law in chosen_laws(LAWS)]
    records = [run_check(subject, setting, law) for law in laws]
    assert [f"{record.law}: {record.reason}" for record in records if record.status is Status.broken] == []
    asked = {record.law for record in records if record.status is Status.holds}
    assert asked >= {"13a", "20", "23b", "24", "31d"}


@pytest.mark.parametrize("name", LOSSES)
def test_every_law_can_be_asked_of_every_loss(name: str) -> None:
    """One volume each: nothing that a law does with a loss may fail for another reason than the law."""
    activation = {"use_softmax": True} if name == "FocalLoss" else {"softmax": True}
    subject = subject_of(LOSSES[name], kwargs={"to_onehot_y": True, "ignore_index": 255, **activation})
    setting = Setting(Profile(1, (4,), "eager"), derandomize=True)
    slow = ("1", "2", "3", "4", "5", "24", "25", "28a", "28c", "28d")
    records = [run_check(subject, setting, law) for law in chosen_laws(None) if law.id not in slow]
    assert [f"{record.law}: {record.reason}" for record in records if record.status is Status.broken] == []


@pytest.mark.parametrize(
    ("options", "laws"),
    [
        (LABELS, {"12a", "13b", "18", "19c", "21"}),
        ({"sigmoid": True, **UNSMOOTHED}, {"12a", "12b", "14"}),
        ({**LABELS, "batch": True, "include_background": False, "ignore_index": 255}, {"16", "17", "19a"}),
    ],
)
def test_the_laws_that_a_compound_is_asked(options: dict[str, Any], laws: set[str]) -> None:
    subject = subject_of(voxloss.DiceCELoss, kwargs=options)
    setting = Setting(Profile(1, (), "eager"))
    reasons = {law.id: law.domain(subject, setting) for law in chosen_laws(LAWS)}
    assert {law for law in laws if reasons[law] is not None} == set()
    assert reasons["15"] == "the background counts", "it does in cross entropy"
    assert reasons["22"] == "a law of scores of sums over voxels, not of compound"
