"""Claims for a loss of which nothing is declared: the forms of tensors are tried, and the best is taken."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

from voxloss_verify.hints import misfit, options, slip_of, tried, usual
from voxloss_verify.laws.sources import cube
from voxloss_verify.oracle.claims import Activation, Claims, Labels
from voxloss_verify.oracle.volumes import Volume
from voxloss_verify.subject.subject import Outcome, Subject

# Of the target; what regions there are would have to be guessed.
FORMS: tuple[Labels, ...] = ("map", "indices", "one-hot")
Found = list[tuple[Volume, Outcome]]


@dataclass(frozen=True)
class Form:
    """What was found.

    Attributes:
        subject: the loss, with the claims that it is judged by.
        fits: whether its value is that of the formula with these claims.
        slip: in words, if it would be, but for a slip.
        declared: what differs from the defaults.
    """

    subject: Subject
    fits: bool
    slip: str
    claimed: dict[str, Any]

    def __str__(self) -> str:
        if self.fits:
            how = (
                "Of the combinations that were tried this one gives its values, and the loss is verified with it"
            )
        elif self.slip:
            how = "No combination that was tried gives its values; this one would, but for a slip"
        else:
            how = "No combination that was tried gives its values; this one is nearest"
        return f"No --claim was given. {how}: {options(self.claimed)}"


def with_form(subject: Subject) -> Form | None:
    """Return the loss with the claims that fit it best; None if it cannot be called in any form."""
    shown = _shown(subject)
    if not shown:
        return None
    nearest: tuple[float, dict[str, Any]] = (math.inf, {})
    changes = usual(subject.claims)
    for others in changes:
        for form, claims, found in shown:
            off = misfit(replace(claims, **others), found)
            if off <= 1:
                return _form(subject, {**form, **others}, fits=True)
            if off < nearest[0]:
                nearest = off, form
    for others in changes:
        for form, claims, found in shown:
            slip = slip_of(replace(claims, **others), found)
            if slip:
                return _form(subject, {**form, **others}, slip=slip)
    off, form = nearest
    return _form(subject, form) if math.isfinite(off) else None


def _form(subject: Subject, claimed: dict[str, Any], *, fits: bool = False, slip: str = "") -> Form:
    return Form(replace(subject, claims=replace(subject.claims, **claimed)), fits, slip, claimed)


def _shown(subject: Subject) -> list[tuple[dict[str, Any], Claims, Found]]:
    """The forms in which the loss can be called, with what it then returned."""
    shown = []
    for labels, activation in product(FORMS, get_args(Activation)):
        form = {"labels": labels, "activation": activation}
        claims = replace(subject.claims, **form)
        found = tried(replace(subject, claims=claims), cube(claims, 2, claims.dtypes[0], 0))
        if found:
            shown.append((form, claims, found))
    return shown
