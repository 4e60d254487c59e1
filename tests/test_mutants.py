"""The laws accept correct losses, catch wrong ones, and it would be noticed if they did not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

import voxloss
from voxloss.backends import BACKENDS, eager
from voxloss_app.verify.mutants import run_mutants
from voxloss_verify import check
from voxloss_verify.check import chosen_laws, run_check
from voxloss_verify.laws import (
    LAWS,
    bounds,
    conventions,
    engines,
    gradients,
    identities,
    invariances,
    law,
    numerics,
    phantoms,
)
from voxloss_verify.laws.record import Finding, Record, Status
from voxloss_verify.laws.setting import Setting
from voxloss_verify.mutants import kill_matrix
from voxloss_verify.mutants.kill_matrix import PROFILE, chance_of_missing, run_all
from voxloss_verify.mutants.mutants import (
    CANNOT,
    CONTROLS,
    MUTANTS,
    SOFTMAX,
    FactorTwoDropped,
    InTheDtypeOfTheInput,
    LabelsClipped,
    Specimen,
)
from voxloss_verify.mutants.textbook import Textbook
from voxloss_verify.subject.ranks import Ranks
from voxloss_verify.subject.subject import subject_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def setting(two_ranks: Ranks) -> Setting:
    return Setting(PROFILE, shrink=False, ranks=two_ranks)


def broken(records: dict[str, Record]) -> dict[str, str]:
    return {id: record.reason for id, record in records.items() if record.status is Status.broken}


# A region and cross entropy, labels, ignored voxels: most laws apply to it.
ALWAYS = ["TextbookCompound(softmax, to_onehot_y, ignore_index=255, lambda_region=0.5, lambda_voxels=2.0)"]


def tier(place: int, control: Specimen) -> tuple[pytest.MarkDecorator, ...]:
    """One always, of the others every 32nd: each takes a quarter of a minute."""
    return () if place % 32 == 1 or str(control) in ALWAYS else (pytest.mark.thorough,)


@pytest.mark.integration
@pytest.mark.parametrize(
    "control",
    [
        pytest.param(control, id=str(control), marks=tier(place, control))
        for place, control in enumerate(CONTROLS)
    ],
)
def test_a_correct_loss_keeps_every_law(control: Specimen, setting: Setting) -> None:
    assert broken(run_all(control, setting)) == {}


@pytest.mark.integration
def test_every_law_has_a_correct_loss_that_keeps_it(setting: Setting) -> None:
    """Of the others only the first that a law speaks of, so that no law goes without a correct loss."""
    always = [control.subject() for control in CONTROLS if str(control) in ALWAYS]
    assert len(always) == len(ALWAYS)
    run = set()
    for each in LAWS:
        if all(each.domain(subject, setting) is not None for subject in always):
            for control in CONTROLS:
                if each.domain(control.subject(), setting) is None:
                    assert broken(run_all(control, setting, [each.id])) == {}
                    run.add(each.id)
                    break
    assert {"8", "12b", "16", "19d", "28d"} <= run


# Of large volumes, which take their time.
LARGE = ("RunningSum",)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(mutant, id=name, marks=pytest.mark.integration if name in LARGE else ())
        for mutant in MUTANTS
        for name in [mutant.loss.__name__]
    ],
)
def test_a_wrong_loss_is_caught_by_the_laws_that_speak_of_its_mistake(mutant: Specimen, setting: Setting) -> None:
    assert set(broken(run_all(mutant, setting, mutant.killers))) == set(mutant.killers)


def test_every_law_catches_a_wrong_loss_or_has_a_reason_not_to() -> None:
    useful = {id for mutant in MUTANTS for id in mutant.killers}
    assert useful | CANNOT.keys() == {each.id for each in LAWS}
    assert not useful & CANNOT.keys()


def test_many_laws_apply_to_every_control(setting: Setting) -> None:
    """A control that claims next to nothing would keep all laws, too."""
    for control in CONTROLS:
        subject = control.subject()
        applicable = [each.id for each in LAWS if each.domain(subject, setting) is None]
        assert len(applicable) >= 28, control


def test_the_page_counts_the_incorrect_losses() -> None:
    page = Path(__file__).parents[1] / "docs" / "verification.md"
    assert f"# {len(MUTANTS)} incorrect losses" in page.read_text(encoding="utf-8")


def test_law_26_with_fewer_elements(monkeypatch: pytest.MonkeyPatch, setting: Setting) -> None:
    """On the CPU, past the 65504 that float16 can count to."""
    monkeypatch.setattr(engines, "ELEMENTS", 2**18)
    (huge,) = chosen_laws(["26"])

    def verdicts(loss: type[Textbook]) -> list[bool]:
        assert huge.given is not None
        subject = Specimen(loss, SOFTMAX).subject()
        return [f.holds for volume in huge.given(subject, setting) for f in huge.check(subject, volume, setting)]

    assert all(verdicts(Textbook))
    assert not all(verdicts(FactorTwoDropped))
    assert not all(verdicts(InTheDtypeOfTheInput))


@pytest.mark.integration
def test_law_28b_catches_a_wrong_backend(monkeypatch: pytest.MonkeyPatch, setting: Setting) -> None:
    def region_sums(*spec: Any) -> tuple[Tensor, Tensor]:
        sums, valid = eager.region_sums(*spec)
        return sums * 1.001, valid

    def region_sums_backward(*spec: Any, **arguments: Any) -> Tensor:
        return eager.region_sums_backward(*spec, **arguments) * 1.001

    def statuses() -> Status:
        subject = subject_of(voxloss.DiceLoss, kwargs={**SOFTMAX, "smooth_nr": 1, "smooth_dr": 1})
        return run_check(subject, setting, chosen_laws(["28b"])[0]).status

    parts = {"available": eager.available, "takes": eager.takes, "region_sums": eager.region_sums}
    parts["region_sums_backward"] = eager.region_sums_backward
    for changed, status in (
        ({}, Status.holds),
        ({"region_sums": region_sums}, Status.broken),
        ({"region_sums_backward": region_sums_backward}, Status.broken),
    ):
        monkeypatch.setitem(BACKENDS, "other", SimpleNamespace(**{**parts, **changed}))
        assert statuses() is status


def close_enough(what: str, *_: Any, **__: Any) -> Finding:
    return Finding(what, 0.0, 0.0, 1.0, 0.0)


# One law for each comparison, and a mutant that it alone should catch.
@pytest.mark.sampled(3)
@pytest.mark.parametrize(("comparison", "law_id"), [("close", "16"), ("is_true", "27b"), ("close_value", "1")])
def test_a_comparison_that_always_holds_is_noticed(
    comparison: str, law_id: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_mutants(laws=[law_id], jobs=1) == 0
    for module in (
        law,
        bounds,
        conventions,
        engines,
        gradients,
        identities,
        invariances,
        numerics,
        phantoms,
    ):
        monkeypatch.setattr(module, comparison, close_enough, raising=False)
    capsys.readouterr()
    assert run_mutants(laws=[law_id], jobs=1) == 1
    out = capsys.readouterr().out
    assert "is not detected" in out
    assert f"check {law_id} detected no mutant: no reason given" in out


def test_a_check_that_raises_catches_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def examined(*_: object) -> Record:
        raise ZeroDivisionError

    monkeypatch.setattr(check, "_examined", examined)
    monkeypatch.setattr(kill_matrix, "CONTROLS", [])
    monkeypatch.setattr(kill_matrix, "MUTANTS", [Specimen(FactorTwoDropped, SOFTMAX, ("1",))])
    assert run_mutants(laws=["1"], jobs=1) == 1
    reason = "the check could not be run: ZeroDivisionError"
    assert f"mutant 1 FactorTwoDropped, check 1: {reason}" in capsys.readouterr().out


def test_a_finding_that_always_holds_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Finding, "holds", True)
    assert run_mutants(laws=["16"], jobs=1) == 1


def test_a_correct_loss_that_breaks_a_law_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kill_matrix, "CONTROLS", [Specimen(LabelsClipped, SOFTMAX)])
    assert run_mutants(laws=["31a"], jobs=1) == 1
    assert "control LabelsClipped(softmax, to_onehot_y) broke check 31a: " in capsys.readouterr().out


def test_a_law_that_catches_nothing_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_mutants(laws=["26"], jobs=1) == 0
    assert "check 26 detected no mutant: more than 2³¹ elements" in capsys.readouterr().out
    monkeypatch.setattr(kill_matrix, "CANNOT", {})
    assert run_mutants(laws=["26"], jobs=1) == 1
    assert "check 26 detected no mutant: no reason given" in capsys.readouterr().out


def test_a_mutant_to_which_its_law_does_not_apply_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kill_matrix, "MUTANTS", [Specimen(FactorTwoDropped, SOFTMAX, ("8", "31d"))])
    assert run_mutants(laws=["8", "31d"], jobs=1) == 1
    out = capsys.readouterr().out
    assert "mutant 1 FactorTwoDropped is not detected by check 8: not applicable, a check of focal_tversky" in out
    assert "mutant 1 FactorTwoDropped is not detected by check 31d: it holds" in out


def test_a_wrong_value_that_only_advice_catches_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kill_matrix, "MUTANTS", [Specimen(LabelsClipped, SOFTMAX, ("31a",))])
    assert run_mutants(laws=["31a"], jobs=1) == 0
    assert "so that only advice concerns them: LabelsClipped" in capsys.readouterr().out
    monkeypatch.setattr(kill_matrix, "MUTANTS", [Specimen(LabelsClipped, SOFTMAX, ("31a", "1"))])
    assert run_mutants(laws=["31a"], jobs=1) == 1
    assert "mutant 1 LabelsClipped would pass: only advice is against it" in capsys.readouterr().out


def test_the_chance_of_missing_a_rare_flaw() -> None:
    assert chance_of_missing(1, 30) == 0
    assert chance_of_missing(10, 30) == pytest.approx(0.9**30)
    assert chance_of_missing(10, 150) < chance_of_missing(10, 30) < chance_of_missing(20, 30)


@pytest.mark.integration
@pytest.mark.thorough
def test_two_processes_find_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for jobs in (1, 2):
        assert run_mutants(laws=["27b", "28a"], jobs=jobs) == 0
        outputs.append(capsys.readouterr().out.splitlines()[:-1])  # the last line has the time
    assert outputs[0] == outputs[1]


def test_ctrl_c_proves_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kill_matrix, "run_all", interrupted)
    assert run_mutants(laws=["1"], jobs=1) == 130
    assert capsys.readouterr().err == "interrupted: the mutation testing is incomplete\n"


def test_what_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="profile: expected one of quick, default, thorough, received 'fast'"):
        run_mutants("fast")
    with pytest.raises(ValueError, match=r"checks: expected ids of .*, received 99"):
        run_mutants(laws=["99"])
