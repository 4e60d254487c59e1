"""Claims that were not declared for a loss: combinations are tried, and the one that fits is taken."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

from voxloss_verify.hints import closest, contradictions, misfit, options, slips_that_fit, tried, usual
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
        but: in words, what would have to be different for it to fit: a declared property, or a slip in the code.
        claimed: what was not declared and differs from the defaults.
    """

    subject: Subject
    fits: bool
    but: str
    claimed: dict[str, Any]

    def __str__(self) -> str:
        if not self.claimed:
            return ""
        claims = options(self.claimed)
        if self.fits:
            return f"Found by trying, not declared: {claims}. With these the formula has the loss's values."
        if self.but:
            return f"Tried, not declared: {claims}. With these only {self.but} keeps the loss from its formula."
        return (
            f"Tried, not declared: {claims}. No combination has the loss's values; this one is nearest. If the "
            "activation or the form of the target (--claim labels=map, indices or one-hot) is another one, "
            "declare it."
        )


def with_form(subject: Subject, declared: Collection[str] = ()) -> Form | None:
    """Return the loss with the claims that fit it best, the `declared` ones unchanged.

    None if it cannot be called in any form.
    """
    shown = _shown(subject, declared)
    if not shown:
        return None

    def found(claimed: dict[str, Any], *, fits: bool = False, but: str = "") -> Form:
        claims = replace(subject.claims, **claimed)
        return Form(replace(subject, claims=claims), fits, but, claimed)

    nearest: tuple[float, dict[str, Any]] = (math.inf, {})
    combinations: list[tuple[dict[str, Any], Claims, Found]] = []

    def misfits() -> Iterator[tuple[float, dict[str, Any]]]:
        nonlocal nearest
        for others, (form, claims, values) in product(usual(subject.claims, declared), shown):
            claimed, claims = {**form, **others}, replace(claims, **others)
            combinations.append((claimed, claims, values))
            off = misfit(claims, values)
            if off < nearest[0]:
                nearest = off, claimed
            yield off, claimed

    fitting = closest(misfits())
    if fitting is not None:
        return found(fitting, fits=True)
    contradicting = contradictions(subject.claims, declared)
    fitting = closest(
        (misfit(replace(claims, **change), values), claimed)
        for claimed, claims, values in combinations
        for change in contradicting
    )
    if fitting is not None:
        return found(fitting, but="a declared property")
    fitting = closest(
        (off, claimed) for claimed, claims, values in combinations for off, _ in slips_that_fit(claims, values)
    )
    if fitting is not None:
        return found(fitting, but="a coding error")
    off, claimed = nearest
    form = {name: value for name, value in claimed.items() if name in ("labels", "activation")}
    return found(form) if math.isfinite(off) else None


def _shown(subject: Subject, declared: Collection[str]) -> list[tuple[dict[str, Any], Claims, Found]]:
    """The forms in which the loss can be called, with what it then returned."""
    choices = {"labels": FORMS, "activation": get_args(Activation)}
    undeclared = {name: values for name, values in choices.items() if name not in declared}
    shown = []
    for chosen in product(*undeclared.values()):
        form = dict(zip(undeclared, chosen, strict=True))
        claims = replace(subject.claims, **form)
        found = tried(replace(subject, claims=claims), cube(claims, 2, claims.dtypes[0], 0))
        if found:
            shown.append((form, claims, found))
    return shown
