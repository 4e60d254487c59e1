"""The verdict on correct and on incorrect losses: levels, exit codes, and the words."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import losses_with_slips
import losses_without_flaws
from losses_with_flaws import Imprecise
from losses_with_slips import SLIPS
from test_verify_cli import FLAWS, LOGITS, Verify, in_a_folder, verify  # noqa: F401
from voxloss import DiceLoss
from voxloss_app.verify.verdict import verdict
from voxloss_verify.check import chosen_laws, prepared, run_check
from voxloss_verify.forms import with_form
from voxloss_verify.laws import LAWS
from voxloss_verify.laws.record import Finding, Record, Status
from voxloss_verify.laws.setting import PROFILES, Setting
from voxloss_verify.oracle.claims import Claims, Family, parse_claims
from voxloss_verify.request import Level, VerifyRequest
from voxloss_verify.subject.subject import subject_of
from voxloss_verify.verification import Verification

pytestmark = pytest.mark.usefixtures("one_thread")

RIGHT = Path(losses_without_flaws.__file__)


def arguments(name: str) -> list[str]:
    """What a newcomer would type."""
    family, claims = losses_without_flaws.CLAIMS[name]
    given = [word for key, value in claims.items() for word in ("--claim", f"{key}={json.dumps(value)}")]
    return [f"{RIGHT}:{name}", "--as", family, *given]


# The others run with --thorough: each takes the better part of a minute.
USUAL = ("SoftDiceLoss", "DiceOfTheDtype")


@pytest.mark.integration
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in USUAL else pytest.mark.thorough)
        for name in losses_without_flaws.CLAIMS
    ],
)
def test_a_right_loss_passes(name: str, verify: Verify) -> None:  # noqa: F811
    code, out, _ = verify(*arguments(name), "--level", "formula", "--level", "interface")
    assert code == 0, out
    assert "The formula is that of " in out


@pytest.mark.integration
@pytest.mark.thorough
@pytest.mark.parametrize("name", losses_without_flaws.CLAIMS)
def test_a_right_loss_has_no_numerical_problem(name: str, verify: Verify) -> None:  # noqa: F811
    code, out, _ = verify(*arguments(name), "--level", "numerics")
    assert code == 0, out
    assert "Numerics: no problem" in out


def test_prediction_and_target_of_a_single_channel_are_swapped() -> None:
    """Label 1 is the channel, whether it is declared as a map or as one-hot."""
    claims = Claims(
        family="dice", activation="sigmoid", channels=1, batch=True, smooth_nr=1, smooth_dr=1, labels="map"
    )
    subject = prepared(subject_of(losses_without_flaws.BinaryDice, claims))
    assert run_check(subject, Setting(PROFILES["quick"]), chosen_laws(["9"])[0]).status is Status.holds


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("loss", "family", "claims", "said"), SLIPS, ids=[each[0].__name__ for each in SLIPS])
def test_a_slip_is_named(loss: Any, family: Family, claims: dict[str, Any], said: str) -> None:
    subject = subject_of(loss, Claims(family=family, **claims))
    law = chosen_laws(["24"])[0]
    record = run_check(prepared(subject), Setting(PROFILES["quick"]), law)
    assert record.status is Status.broken
    assert said in record.hint


def test_the_remedy_for_half_precision_is_shown(verify: Verify) -> None:  # noqa: F811
    _, out, _ = verify(f"{FLAWS}:Imprecise", "--kwargs", LOGITS, "--check", "25")
    assert (
        "\n    with the same numbers in float32 it is right: begin the loss with input = input.float()\n" in out
    )


def test_a_loss_that_is_wrong_in_half_precision_alone_gets_the_remedy() -> None:
    smooth = {"smooth_nr": 1e-5, "smooth_dr": 1e-5}
    claims: Any = {"family": "dice", "activation": "softmax", "labels": "map", **smooth}

    def record(loss: Any) -> Record:
        subject = subject_of(loss, Claims(**claims))
        return run_check(prepared(subject), Setting(PROFILES["quick"]), chosen_laws(["25"])[0])

    alone = record(Imprecise(softmax=True, to_onehot_y=True))
    assert "begin the loss with input = input.float()" in alone.hint
    assert alone.hint in alone.reason
    everywhere = record(DiceLoss(softmax=True, to_onehot_y=True, include_background=False))
    assert (everywhere.status, everywhere.hint) == (Status.broken, "")


SWAPPED = [
    f"{Path(losses_with_slips.__file__)}:swapped",
    *("--as", "tversky", "--claim", "alpha=0.3", "--claim", "beta=0.7", "--claim", "smooth_nr=1"),
    *("--claim", "smooth_dr=1", "--claim", "labels=map", "--claim", "activation=softmax"),
]


def test_what_one_cause_explains_is_one_entry(verify: Verify) -> None:  # noqa: F811
    laws = [word for law in ("3", "23b", "24", "25", "31a") for word in ("--check", law)]
    code, out, _ = verify(*SWAPPED, *laws)
    assert code == 1
    lines = out.split("\n\n")[1].splitlines()
    assert lines[0] == (
        "The formula is not that of a Tversky loss with these properties: 2 of 2 formula checks are broken. "
        "It would be right with --claim alpha=0.7 --claim beta=0.3."
    )
    # Half precision is as wrong, for the same reason.
    assert lines[1].startswith(
        "Numerics: no problem of their own (2 checks, 1 more broken by the wrong formula). Interface: 1 finding, "
    )
    assert lines[2] == "check 24, the value: wrong; 2 more checks, probably by the same cause"
    assert lines[3].startswith("    on drawn (labels: ")
    assert lines[4].startswith("    loss: expected 0.")
    assert lines[5].startswith("advice, check 31a, bad labels are errors: expected an error for ")
    assert len(lines) == 6


@pytest.mark.integration
def test_a_broken_invariance_is_named(verify: Verify) -> None:  # noqa: F811
    """It shows that not only the ratio is wrong: here voxels of prediction and target are misaligned."""
    Path("mine.py").write_text(FLIPPED)
    claims = [word for claim in ("labels=map", "activation=softmax") for word in ("--claim", claim)]
    laws = [word for law in ("1", "13a", "13c", "24") for word in ("--check", law)]
    _, out, _ = verify("mine.py:dice", "--as", "dice", *claims, *laws)
    (line,) = [line for line in out.splitlines() if line.startswith("check 24, the value: wrong")]
    assert line.split("; ")[1].startswith("also broken: ")
    assert "13a the order of voxels and samples" in line
    assert "13c the shape of the volume" in line
    assert line.endswith("; 1 more check, probably by the same cause")
    assert "The value is what results if the target is flipped along axis 2." in out
    Path("mine.py").write_text(FLIPPED.replace(".flip(2)", ".flip(2).roll(1, 3)"))
    _, out, _ = verify("mine.py:dice", "--as", "dice", *claims, *laws)
    assert "They depend on the positions of the voxels (check " in out
    assert "search for a permute, reshape or flip" in out
    _, out, _ = verify("mine.py:dice", "--as", "dice", *claims, "--check", "24", "--level", "formula")
    assert "No known coding error and no other properties explain the values: if a --claim is missing, " in out
    assert "Numerics: not checked. Interface: not checked." in out


FLIPPED = """
import torch

def dice(x, y):
    p, g = x.double().softmax(1), torch.zeros_like(x.double()).scatter_(1, y.long(), 1).flip(2)
    axes = (2, 3, 4)
    total = p.sum(axes) + g.sum(axes)
    return (1 - torch.where(total == 0, 1, 2 * (p * g).sum(axes) / total)).mean()
"""


def test_only_advice_is_no_failure_unless_strict(verify: Verify) -> None:  # noqa: F811
    advised = [*arguments("SoftDiceLoss"), "--check", "24", "--check", "31a"]
    code, out, _ = verify(*advised)
    assert code == 0
    assert "Interface: 1 finding, as advice, unless --strict is set." in out
    assert verify(*advised, "--strict")[0] == 1
    assert verify(*advised, "--strict", "--level", "formula")[0] == 0


def test_a_verdict_is_short_whatever_is_broken() -> None:
    """Every law of numerics and of the interface, for a reason of its own: with header and summary 40 lines."""
    subject = subject_of(losses_without_flaws.dice_of_probabilities, Claims(family="dice"))
    request = VerifyRequest(target="mine.py:dice", kwargs={})
    verification = Verification(request, subject, Setting(PROFILES["quick"]), LAWS, {})
    finding = Finding("loss" * 100, 0.1, 0.1 + 1e-9, 1e-12, 1e-9, magnitude=0.1)
    for law in LAWS:
        status = Status.holds if law.level is Level.formula else Status.broken
        verification.records.append(Record(law.id, law.name, status, "why" * 100, 9, finding, level=law.level))
    lines = list(verdict(verification))
    assert lines[0] == "The formula is that of a Dice loss (30 formula checks, 270 volumes)."
    assert (
        lines[1] == "Numerics: 12 problems (12 checks). Interface: 7 findings, as advice, unless --strict is set."
    )
    assert sum(line.startswith("check ") for line in lines) == 8
    assert "and 4 more: check " in "\n".join(lines)
    assert sum(line.startswith("advice, check ") for line in lines) == 7
    assert len(lines) <= 33
    assert max(map(len, lines)) <= 200


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
    if claims.get("channels") != 1:  # of one channel both are the same
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
    assert str(form) == (
        "Tried, not declared: --claim labels=map --claim activation=softmax --claim smooth_nr=1.0 --claim "
        "smooth_dr=1.0. With these only a coding error keeps the loss from its formula."
    )


def test_a_slip_is_named_beside_a_claim_that_was_forgotten() -> None:
    claims = Claims(family="dice", labels="map", activation="softmax")
    subject = subject_of(losses_with_slips.background_before_the_softmax, claims)
    record = run_check(prepared(subject), Setting(PROFILES["quick"]), chosen_laws(["24"])[0])
    assert record.hint == (
        "the value is what results if the background is left out before the softmax, not after it, with "
        "--claim include_background=false --claim smooth_nr=1.0 --claim smooth_dr=1.0"
    )


TVERSKY = """
import torch

def tversky(x, y, alpha=0.3, beta=0.7, s=1e-5):
    p, g = x.softmax(1), torch.zeros_like(x).scatter_(1, y.long(), 1)
    axes = (0, 2, 3, 4)
    tp, fp, fn = (p * g).sum(axes), (p * (1 - g)).sum(axes), ((1 - p) * g).sum(axes)
    return (1 - (tp + s) / (tp + alpha * fp + beta * fn + s))[1:].mean()

def swapped(x, y):
    return tversky(x, y, 0.7, 0.3)
"""
DECLARED = ["--as", "tversky", "--claim", "alpha=0.3", "--claim", "beta=0.7", "--check", "24"]


def test_what_is_not_declared_is_found_beside_what_is(verify: Verify) -> None:  # noqa: F811
    Path("mine.py").write_text(TVERSKY)
    code, out, _ = verify("mine.py:tversky", *DECLARED)
    assert code == 0
    assert (
        "Found by trying, not declared: --claim labels=map --claim activation=softmax --claim batch=true "
        "--claim include_background=false --claim smooth_nr=1e-05 --claim smooth_dr=1e-05. With these the "
        "formula has the loss's values."
    ) in out.replace("\n", " ")


def test_nothing_is_tried_without_a_search(verify: Verify) -> None:  # noqa: F811
    Path("mine.py").write_text(TVERSKY)
    smooth = ["--claim", "smooth_nr=1e-5", "--claim", "smooth_dr=1e-5", "--claim", "include_background=false"]
    target = ["--claim", "labels=map", "--claim", "activation=softmax", "--claim", "batch=false"]
    code, out, _ = verify("mine.py:tversky", *DECLARED, *smooth, *target, "--no-search")
    assert code == 1
    assert re.search("^claims   .* batch=False$", out, flags=re.M), "what is declared, though it is the default"
    assert "Found by trying" not in out
    assert "It would be right with --claim batch=true" in out.replace("\n", " ")


FOCAL_TVERSKY = """
import torch

def infinite(x, y):
    return score(x, y).pow(0.75).mean()

def finite(x, y):
    x = score(x, y)
    return torch.where(x > 0, x, 1).pow(0.75).where(x > 0, x).mean()

def inverted(x, y):
    return score(x, y).pow(4 / 3).mean()

def score(x, y):
    p, g = x.softmax(1), torch.zeros_like(x).scatter_(1, y.long(), 1)
    axes = (2, 3, 4)
    tp, fp, fn = (p * g).sum(axes), (p * (1 - g)).sum(axes), ((1 - p) * g).sum(axes)
    return 1 - (tp + 1e-5) / (tp + 0.3 * fp + 0.7 * fn + 1e-5)
"""


def test_the_remedy_for_an_infinite_derivative_is_one(verify: Verify) -> None:  # noqa: F811
    Path("mine.py").write_text(FOCAL_TVERSKY)
    arguments = [
        "--as",
        "focal_tversky",
        "--profile",
        "quick",
        "--check",
        "23b",
        "--check",
        "24",
        "--check",
        "29c",
    ]
    code, out, _ = verify("mine.py:infinite", *arguments)
    assert code == 1
    assert "--claim gamma=1.3333333333333333. With these the formula has the loss's values." in out.replace(
        "\n", " "
    )
    assert "take the power where x > 0 only, torch.where(x > 0, x, 1).pow(0.75).where(x > 0, x)" in out
    code, out, _ = verify("mine.py:finite", *arguments)
    assert code == 0, out


def test_a_declared_gamma_that_is_taken_the_other_way_round_is_named(verify: Verify) -> None:  # noqa: F811
    Path("mine.py").write_text(FOCAL_TVERSKY)
    claims = ["--claim", "alpha=0.3", "--claim", "beta=0.7", "--claim", "gamma=4/3"]
    code, out, _ = verify("mine.py:inverted", "--as", "focal_tversky", *claims, "--check", "24")
    assert code == 1
    assert "With these only a declared property keeps the loss from its formula." in out.replace("\n", " ")
    assert "It would be right with --claim gamma_as=gamma." in out.replace("\n", " ")


def test_the_search_shows_on_a_terminal(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    Path("mine.py").write_text(TVERSKY)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, out, _ = verify("mine.py:tversky", *DECLARED)
    assert out.index("trying properties that were not declared") < out.index("target   ")


def test_what_is_declared_is_not_changed_to_fit(verify: Verify) -> None:  # noqa: F811
    Path("mine.py").write_text(TVERSKY)
    code, out, _ = verify("mine.py:swapped", *DECLARED)
    out = out.replace("\n", " ")
    assert code == 1
    assert "--claim smooth_dr=1e-05. With these only a declared property keeps the loss from its formula." in out
    assert "It would be right with --claim alpha=0.7 --claim beta=0.3." in out


def test_the_volume_that_is_shown_is_one_where_the_loss_is_wrong(verify: Verify) -> None:  # noqa: F811
    """The smallest volume of a sum that omits an axis has an error that only smoothing makes."""
    Path("mine.py").write_text(TVERSKY.replace("(0, 2, 3, 4)", "(0, 2, 3)"))
    _, out, _ = verify("mine.py:tversky", *DECLARED, "--seed", "0")
    (line,) = [line for line in out.splitlines() if line.startswith("    loss: expected ")]
    off = re.search(r"off by ([\d.e-]+)", line)
    assert off is not None
    assert float(off[1]) > 1e-3


IN_FLOAT32 = """
import torch

def detached(x, y):
    p, g = x.float().softmax(1), torch.zeros_like(x).scatter_(1, y.long(), 1).float()
    axes = (2, 3, 4)
    total = p.detach().sum(axes) + g.sum(axes)
    return (1 - (2 * (p * g).sum(axes) + 1) / (total + 1)).mean()

def of_argmax(x, y):
    p, g = x.float().softmax(1), torch.zeros_like(x).scatter_(1, y.long(), 1).float()
    hard = torch.zeros_like(p).scatter_(1, p.argmax(1, True), 1)
    axes = (2, 3, 4)
    return (1 - (2 * (p * g).sum(axes) + 1) / (hard.sum(axes) + g.sum(axes) + 1)).mean()
"""
SMOOTH = ["--as", "dice", "--claim", "labels=map", "--claim", "activation=softmax", "--claim", "smooth_nr=1"]


def test_a_gradient_that_is_wrong_alone_gets_a_hint(verify: Verify) -> None:  # noqa: F811
    Path("mine.py").write_text(IN_FLOAT32)
    _, out, _ = verify("mine.py:detached", *SMOOTH, "--claim", "smooth_dr=1", "--check", "20", "--check", "24")
    assert "The values are right, the gradient is not: search for detach()" in out


def test_rounding_of_a_wrong_loss_is_no_dependence_on_places(verify: Verify) -> None:  # noqa: F811
    """A loss that is wrong and computes in float32 depends on the order of voxels by rounding alone."""
    Path("mine.py").write_text(IN_FLOAT32)
    checks = ("--check", "13a", "--check", "13c", "--check", "24")
    _, out, _ = verify("mine.py:of_argmax", *SMOOTH, "--claim", "smooth_dr=1", *checks)
    assert "It computes in float32, also for float64 inputs" in out
    assert "No known coding error and no other properties explain the values" in out


@pytest.mark.integration
def test_without_a_fitting_form_the_nearest_is_taken_for_the_formula_alone(verify: Verify) -> None:  # noqa: F811
    Path("mine.py").write_text("def mean(x, y):\n    return 0.3 * x.mean()\n")
    code, out, _ = verify("mine.py:mean", "--as", "dice")
    assert code == 1
    assert "No combination has the loss's values; this one is nearest." in out.replace("\n", " ")
    assert "Numerics: not checked. Interface: not checked." in out
    _, out, _ = verify("mine.py:mean", "--as", "dice", "--check", "31b")
    assert "Interface: 1 finding" in out
