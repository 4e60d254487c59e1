"""The form of tensors and the activation of a loss for which none is claimed: all are tried, and the best taken."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from voxloss_verify.hints import SMOOTHINGS, misfit, options, tried
from voxloss_verify.laws.sources import cube
from voxloss_verify.oracle.claims import Claims
from voxloss_verify.subject.subject import Subject

LABELS = ("map", "indices", "one-hot")
ACTIVATIONS = ("softmax", "sigmoid", "none")


@dataclass(frozen=True)
class Form:
    """What was found.

    Attributes:
        subject: the loss with the claims of the form that was taken.
        labels, activation: that form.
        fits: whether the value is that of the formula in this form, with `others` claimed as well, as options.
    """

    subject: Subject
    labels: str
    activation: str
    fits: bool
    others: str

    def __str__(self) -> str:
        taken = f"--claim labels={self.labels} --claim activation={self.activation}"
        if not self.fits:
            return f"No --claim was given. No form that was tried fits; this one is nearest: {taken}."
        if not self.others:
            return f"No --claim was given. Of the forms that were tried this one fits: {taken}."
        return f"No --claim was given. Of the forms that were tried this one fits, with {self.others}: {taken}."


def with_form(subject: Subject) -> Form | None:
    """Return the loss with the form that fits best; None if it cannot be called in any."""
    best: tuple[float, int, Claims, dict[str, Any]] | None = None
    for labels, activation in product(LABELS, ACTIVATIONS):
        claims = replace(subject.claims, labels=labels, activation=activation)
        candidate = replace(subject, claims=claims)
        found = tried(candidate, cube(claims, 2, claims.dtypes[0], 0))
        for others in _others(claims) if found else ():
            off = misfit(replace(claims, **others), found)
            fits = off <= 1
            # What fits with the fewest other claims, else what is nearest.
            if best is None or (not fits, len(others) if fits else 0, off) < (best[0] > 1, best[1], best[0]):
                best = off, len(others) if fits else 0, claims, others
    if best is None or not math.isfinite(best[0]):
        return None
    off, _, claims, others = best
    fits = off <= 1
    said = options(others) if fits else ""
    return Form(replace(subject, claims=claims), claims.labels, claims.activation, fits, said)


def _others(claims: Claims) -> Iterator[dict[str, Any]]:
    """Other claims, without which a form may not be seen to fit."""
    smooth: list[dict[str, Any]] = [{}]
    smooth += [{"smooth_nr": s, "smooth_dr": s} for s in SMOOTHINGS if s]
    smooth += [{"smooth_dr": s} for s in SMOOTHINGS if s]
    switches: list[dict[str, Any]] = [{}, {"batch": True}, {"include_background": False}]
    switches += [{"squared": True}, {"offset": 0}, {"batch": True, "include_background": False}]
    for switch, smoothing in product(switches, smooth):
        yield {**switch, **smoothing}
