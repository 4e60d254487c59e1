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
    scores,
)
from voxloss_verify.laws.law import LAWS as _ENTERED
from voxloss_verify.laws.law import METRIC_LAWS as METRIC_LAWS

LAWS = sorted(_ENTERED, key=lambda law: (law.number, law.part))
