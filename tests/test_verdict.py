"""What the judge says of right losses and of wrong ones: levels, exit codes, and the verdict in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import losses_without_flaws
from losses_with_slips import SLIPS
from test_verify_cli import FLAWS, LOGITS, Verify, in_a_folder, verify  # noqa: F401
from voxloss_verify.check import chosen_laws, prepared, run_check
from voxloss_verify.forms import with_form
from voxloss_verify.laws.record import Status
from voxloss_verify.laws.setting import PROFILES, Setting
from voxloss_verify.oracle.claims import Claims, Family, parse_claims
from voxloss_verify.subject.subject import subject_of

pytestmark = pytest.mark.usefixtures("one_thread")

RIGHT = Path(losses_without_flaws.__file__)


def arguments(name: str) -> list[str]:
    """What a newcomer would type."""
    family, claims = losses_without_flaws.CLAIMS[name]
    given = [word for key, value in claims.items() for word in ("--claim", f"{key}={json.dumps(value)}")]
    return [f"{RIGHT}:{name}", "--as", family, *given]


# Two in the quick tier, one that computes in float32 and one that computes in its dtype.
QUICK = ("SoftDiceLoss", "DiceOfTheDtype")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.integration)
        for name in losses_without_flaws.CLAIMS
    ],
)
def test_a_right_loss_passes(name: str, verify: Verify) -> None:  # noqa: F811
    code, out, _ = verify(*arguments(name), "--level", "formula", "--level", "interface")
    assert code == 0, out
    assert "The formula is that of " in out


@pytest.mark.integration
@pytest.mark.parametrize("name", losses_without_flaws.CLAIMS)
def test_a_right_loss_has_no_numerical_problem(name: str, verify: Verify) -> None:  # noqa: F811
    code, out, _ = verify(*arguments(name), "--level", "numerics")
    assert code == 0, out
    assert "Numerics: no problem" in out


@pytest.mark.parametrize(("loss", "family", "claims", "said"), SLIPS, ids=[each[0].__name__ for each in SLIPS])
def test_a_slip_is_named(loss: Any, family: Family, claims: dict[str, Any], said: str) -> None:
    subject = subject_of(loss, Claims(family=family, **claims))
    law = chosen_laws(["24"])[0]
    record = run_check(prepared(subject), Setting(PROFILES["quick"]), law)
    assert record.status is Status.broken
    assert said in record.hint


@pytest.mark.parametrize("name", losses_without_flaws.CLAIMS)
def test_the_form_of_the_tensors_is_found(name: str) -> None:
    family, claims = losses_without_flaws.CLAIMS[name]
    kept = {
        key: value for key, value in claims.items() if key in ("alpha", "beta", "gamma", "channels", "dtypes")
    }
    pairs = [f"{key}={json.dumps(value)}" for key, value in kept.items()]
    declared = parse_claims(pairs, None, family.replace("-", "_"))
    subject = subject_of(getattr(losses_without_flaws, name), declared)
    form = with_form(subject)
    assert form is not None
    assert form.fits
    found = form.subject.claims
    assert found.labels == claims.get("labels", "one-hot")
    assert found.activation == claims.get("activation", "none")
    assert found.smooth_dr == claims.get("smooth_dr", 0)
    assert found.include_background == claims.get("include_background", True)
    assert found.batch == claims.get("batch", False)


def test_a_form_that_would_fit_but_for_a_slip_is_taken() -> None:
    form = with_form(subject_of(SLIPS[0][0], Claims(family="dice")))
    assert form is not None
    assert not form.fits
    assert (form.subject.claims.labels, form.subject.claims.activation) == ("map", "softmax")
    assert "this one would, but for a slip: --claim labels=map --claim activation=softmax" in str(form)


def test_without_a_fitting_form_the_nearest_is_taken() -> None:
    form = with_form(subject_of(lambda x, y: 0.3 * x.mean(), Claims(family="dice")))
    assert form is not None
    assert not form.fits
    assert "nearest" in str(form)
