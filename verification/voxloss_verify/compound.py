"""What cross entropy, focal loss and compounds must return: the exact values of a compound's parts, added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from voxloss_verify import entropy, exact
from voxloss_verify.claims import claims_of
from voxloss_verify.entropy import VoxelTerms
from voxloss_verify.exact import Expected
from voxloss_verify.oracle import Image, Sums
from voxloss_verify.tolerances import LOSS
from voxloss_verify.volumes import one_hot


def expected(loss: Any, input: Image, target: Image, sums: Sequence[Sums], dtype: str) -> Expected | None:
    """Read a loss off its instance and return its exact value for one item `[C, ...]`; None if it cannot be read.

    No voxel is ignored. `target` is a label map `[1, ...]` or has one channel per class; `sums` are its sums with
    the probabilities.
    """
    channels = len(input)
    g = target if len(target) == channels else one_hot(target[None], channels)[0]
    activation = "softmax" if loss.softmax else "sigmoid" if loss.sigmoid else "none"
    return _expected(loss, input[None], np.asarray(g)[None], sums, dtype, activation)


# The λ and the loss of each part, by their names: what `parts` says of itself is what is to be checked.
_PARTS = {
    "DiceCELoss": {"lambda_dice": "dice", "lambda_ce": "cross_entropy"},
    "DiceFocalLoss": {"lambda_dice": "dice", "lambda_focal": "focal"},
    "GeneralizedDiceFocalLoss": {"lambda_gdl": "generalized_dice", "lambda_focal": "focal"},
    "TverskyCELoss": {"lambda_tversky": "tversky", "lambda_ce": "cross_entropy"},
    "FocalTverskyCELoss": {"lambda_tversky": "focal_tversky", "lambda_ce": "cross_entropy"},
}


def _expected(
    loss: Any, input: Image, target: Image, sums: Sequence[Sums], dtype: str, activation: str
) -> Expected | None:
    """`activation` is the pass's: a part is told nothing of it."""
    names = {kind.__name__ for kind in type(loss).__mro__ if kind.__module__.startswith("voxloss.")}
    parts = next((_PARTS[name] for name in names if name in _PARTS), None)
    if parts is not None:
        found = []
        for factor, part in parts.items():
            wanted = _expected(getattr(loss, part), input, target, sums, dtype, activation)
            if wanted is None:
                return None
            found.append((getattr(loss, factor), wanted))
        value = np.asarray(sum(factor * wanted.value for factor, wanted in found))
        return Expected(value, sum(factor * wanted.tolerance for factor, wanted in found))
    if names & {"CrossEntropyLoss", "FocalLoss"}:
        binary = activation == "sigmoid" or len(sums) == 1
        kept = np.ones((1, *input.shape[2:]), bool)
        value = np.asarray(entropy.mean(_terms(loss, len(sums), activation, binary), input, target, kept))
        return Expected(value, LOSS[dtype] * max(1.0, float(value)))
    claims = claims_of(loss)
    return None if claims is None else exact.of_sums(claims, [sums], dtype)


def _terms(loss: Any, channels: int, activation: str, binary: bool) -> VoxelTerms:
    counting = list(range(channels))
    if loss.classes is not None:
        counting = list(loss.classes)
    elif not loss.include_background and channels > 1:
        counting = counting[1:]
    there, missing = _balance(getattr(loss, "alpha", None), counting, channels, binary)
    return VoxelTerms(
        activation=activation,
        binary=binary,
        counting=counting,
        weights=_of_classes(loss.class_weight, counting, channels),
        smoothing=getattr(loss, "label_smoothing", 0.0),
        gamma=getattr(loss, "gamma", None),
        there=there,
        missing=missing,
    )


def _of_classes(factors: Any, counting: Sequence[int], channels: int) -> list[float]:
    """One factor for each class that counts, of none, one, one per channel, or one per class that counts."""
    values = 1.0 if factors is None else factors.tolist()
    if isinstance(values, float | int):
        return [float(values)] * len(counting)
    return [float(values[c]) for c in counting] if len(values) == channels else [float(v) for v in values]


def _balance(
    alpha: Any, counting: Sequence[int], channels: int, binary: bool
) -> tuple[list[float] | None, list[float] | None]:
    if alpha is None:
        return None, None
    there = _of_classes(alpha, counting, channels)
    if alpha.ndim:
        return there, None
    if binary:
        return there, [1 - factor for factor in there]
    return [1 - factor if c == 0 else factor for c, factor in zip(counting, there, strict=True)], None
