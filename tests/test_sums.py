"""The oracle's sums and scores against scikit-learn, closed forms, and values by hand."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score

from voxloss_data import Phantom, all_phantoms
from voxloss_verify.oracle.sums import Sums, dice, generalized_dice, jaccard, label_sums, sums, tversky


def masks(seed: int, classes: int = 4) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=(2, 11, 7, 5))
    return labels[0], labels[1]


def of(intersection: Any, prediction: Any, target: Any, **others: Any) -> Sums:
    values: dict[str, Any] = {
        "intersection": intersection,
        "soft_intersection": intersection,
        "prediction": prediction,
        "prediction_squared": prediction,
        "target": target,
        "target_squared": target,
        **others,
    }
    return Sums(**{name: Fraction(value) for name, value in values.items()})


@pytest.mark.parametrize("seed", range(3))
def test_counts_agree_with_scikit_learn(seed: int) -> None:
    prediction, target = masks(seed)
    counted = label_sums(prediction, target, 4)
    for score, witness in ((dice, f1_score), (jaccard, jaccard_score)):
        expected = witness(target.ravel(), prediction.ravel(), average=None)
        assert np.abs([float(score(s)) for s in counted] - expected).max() < 1e-15


def test_scores_by_hand() -> None:
    s = of(3, 5, 4, prediction_squared=Fraction(9, 2), target_squared=4)
    assert dice(s) == Fraction(6, 9)
    assert dice(s, 1, 2) == Fraction(7, 11)
    assert dice(s, squared=True) == Fraction(6, Fraction(17, 2))
    assert jaccard(s) == Fraction(3, 6)
    assert jaccard(s, 1, 2) == Fraction(7, 14)
    assert jaccard(s, squared=True) == 3 / (Fraction(17, 2) - 3)
    assert tversky(s, 0.25, 0.75) == 3 / (3 + Fraction(1, 4) * 2 + Fraction(3, 4) * 1)
    assert tversky(s, 0.5, 0.5, 1, 2) == Fraction(4, Fraction(13, 2))
    empty = of(0, 0, 0)
    assert dice(empty) == jaccard(empty) == tversky(empty) == 1


def test_generalized_dice_by_hand() -> None:
    rare, common = of(1, 2, 2), of(6, 8, 8)
    # Weights 1 and (2/8)², 1 and 2/8, 1 and 1.
    assert generalized_dice([rare, common]) == (2 * (1 + Fraction(6, 16))) / (4 + Fraction(16, 16))
    assert generalized_dice([rare, common], "simple") == (2 * (1 + Fraction(6, 4))) / (4 + Fraction(16, 4))
    assert generalized_dice([rare, common], "uniform", 1, 2) == Fraction(14 + 1, 20 + 2)
    absent = of(0, 5, 0)
    assert generalized_dice([absent, common]) == Fraction(12, 5 + 16)
    assert generalized_dice([absent, absent]) == 0
    assert generalized_dice([of(0, 0, 0)]) == 1


@pytest.mark.parametrize("phantom", [p for p in all_phantoms() if isinstance(p, Phantom)], ids=lambda p: p.name)
def test_sums_of_the_phantoms_are_their_closed_forms(phantom: Phantom) -> None:
    a, p, p2, q = (
        phantom.intersection,
        phantom.prediction_sum,
        phantom.prediction_squared_sum,
        phantom.target_sum,
    )
    found = sums(phantom.prediction, phantom.reference)
    assert found == Sums(a, a, p, p2, q, q)
    assert dice(found) == phantom.dice
    assert jaccard(found) == phantom.jaccard
    assert dice(found, squared=True) == phantom.dice_squared
    assert jaccard(found, squared=True) == phantom.jaccard_squared
    if a + p + q:
        assert tversky(found, 0.3, 0.7) == phantom.tversky(0.3, 0.7)


def test_soft_sums_by_hand() -> None:
    p, g = np.array([0.25, 1, 0, 0.5]), np.array([0.5, 0.75, 1, 0.5])
    assert sums(p, g) == Sums(*map(Fraction, (1.125, 1.5, 1.75, 1.3125, 2.75, 2.0625)))


def test_large_volumes_are_summed_like_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    p, g = np.random.default_rng(3).random((2, 15, 15, 15)).astype(np.float32)
    small = sums(p, g)
    monkeypatch.setattr("voxloss_verify.oracle.sums.SMALL", 0)
    for name, value in vars(sums(p, g)).items():
        assert abs(value / getattr(small, name) - 1) <= Fraction(1, 2**53), name


def test_the_oracle_refuses_what_it_cannot_count() -> None:
    with pytest.raises(ValueError, match="one shape"):
        sums(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="label map"):
        sums(np.array([0, 2]), np.array([0, 1]))


def test_the_oracle_knows_neither_torch_nor_voxloss() -> None:
    code = "import sys, voxloss_verify.oracle.sums; sys.exit(not {'torch', 'voxloss'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
