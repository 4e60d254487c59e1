"""The laws, in the order of their numbers."""

from __future__ import annotations

from voxloss_verify.laws import (  # noqa: F401  # each enters its laws
    bounds,
    conventions,
    engines,
    gradients,
    identities,
    invariances,
    numerics,
    phantoms,
)
from voxloss_verify.laws.law import LAWS as _ENTERED


def _number(id: str) -> tuple[int, str]:
    digits = id.rstrip("abcdefgh")
    return int(digits), id[len(digits) :]


LAWS = sorted(_ENTERED, key=lambda law: _number(law.id))
