"""The oracle against other witnesses, the losses against the oracle, and broken losses against both."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from copy import copy
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score
from torch import Tensor, nn

import voxloss
from voxloss import RegionStatistics
from voxloss.losses import overlap
from voxloss.statistics import PassSums
from voxloss_app.demo import checks
from voxloss_app.demo.checks import Case, Record, check_losses, phantom_cases, shipped_losses, volume_cases
from voxloss_data import Phantom, all_phantoms
from voxloss_verify.oracle.sums import Sums, dice, generalized_dice, jaccard, label_sums, sums, tversky

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """All phantoms and a small volume in which the prediction misses class 3."""
    generator = np.random.default_rng(7)
    probabilities = generator.dirichlet([1, 0.3, 0.3, 0.3], size=(9, 8, 7)).astype(np.float32)
    labels = probabilities.argmax(-1).astype(np.uint8)
    prediction = np.where(generator.random(labels.shape) < 0.7, labels, 1).astype(np.uint8)
    prediction[prediction == 3] = 2
    return [*phantom_cases(), *volume_cases(prediction, labels, np.moveaxis(probabilities, -1, 0))]


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


# The oracle.


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


# The losses.


def test_every_shipped_loss_holds_on_every_case(cases: list[Case]) -> None:
    records = list(check_losses(cases))
    assert [record for record in records if not record.holds] == []
    assert (
        {record.loss for record in records} == {loss.__name__ for loss in shipped_losses()} == set(checks.OPTIONS)
    )
    of_logits = sum(case.softmax for case in cases)  # there is no focal loss of probabilities by itself
    per_loss = {
        name: 2 * 2 * len(options) * (of_logits if name == "FocalLoss" else len(cases))
        for name, options in checks.OPTIONS.items()
    }
    for name, count in per_loss.items():
        assert sum(record.loss == name for record in records) == count
    assert {record.case for record in records} == {case.name for case in cases}
    assert {record.dtype for record in records} == {"float32", "float64"}


def test_shipped_losses_are_found() -> None:
    found = shipped_losses()
    assert {voxloss.DiceLoss, voxloss.JaccardLoss, voxloss.TverskyLoss} < set(found)
    assert {voxloss.FocalTverskyLoss, voxloss.GeneralizedDiceLoss} < set(found)
    assert voxloss.RegionLoss not in found
    assert len(found) == len(set(found))


class FactorDropped(voxloss.DiceLoss):
    def per_class(self, statistics: RegionStatistics) -> Tensor:
        return super().per_class(statistics._replace(intersection=statistics.intersection / 2))


class LogCoshAfterTheMean(voxloss.LogCoshDiceLoss):
    def per_class(self, statistics: RegionStatistics) -> Tensor:
        mean = voxloss.DiceLoss.per_class(self, statistics).mean(1, keepdim=True)
        return voxloss.formulas.log_cosh(mean).expand_as(statistics.target)


class BetaNotSquared(voxloss.AsymmetricSimilarityLoss):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.alpha, self.beta = 1 / (1 + self.f_beta), self.f_beta / (1 + self.f_beta)


class SmoothingForgotten(voxloss.CrossEntropyLoss):
    def compute(self, sums: PassSums) -> Tensor:
        return voxloss.CrossEntropyLoss(softmax=True).compute(sums)


class DividedByClasses(voxloss.FocalLoss):
    def compute(self, sums: PassSums) -> Tensor:
        return super().compute(sums) / sums.channels


class NegativesForgotten(voxloss.FocalLoss):
    def compute(self, sums: PassSums) -> Tensor:
        sums = copy(sums)
        sums.binary = False
        return super().compute(sums)


class LambdaForgotten(voxloss.DiceCELoss):
    def parts(self) -> Sequence[tuple[float, voxloss.StatisticsLoss]]:
        return [(1.0, self.dice), (self.lambda_ce, self.cross_entropy)]


class AlphaBetaSwapped(voxloss.TverskyLoss):
    def per_class(self, statistics: RegionStatistics) -> Tensor:
        swapped = statistics._replace(prediction=statistics.target, target=statistics.prediction)
        return super().per_class(swapped)


class PowerAfterTheMean(voxloss.FocalTverskyLoss):
    def per_class(self, statistics: RegionStatistics) -> Tensor:
        distance = voxloss.TverskyLoss.per_class(self, statistics).mean(1, keepdim=True)
        return (distance.clamp(min=0) ** (1 / self.gamma)).expand_as(statistics.target)


class SmoothInOnePlaceOnly(voxloss.JaccardLoss):
    def per_class(self, statistics: RegionStatistics) -> Tensor:
        self.smooth_dr = 0.0
        return super().per_class(statistics)


class BackgroundStaysIn(voxloss.DiceLoss):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "include_background": True})


class SoftLabelIgnored(voxloss.TverskyLoss):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "soft_label": False})


class SquaresForgotten(voxloss.DiceLoss):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "squared_pred": False})


class WeightsNotRelative(voxloss.GeneralizedDiceLoss):
    """MONAI's: w ≈ 1/g² drowns in the smoothing."""

    def terms(self, statistics: RegionStatistics, *_: Any) -> tuple[Tensor, None]:
        largest = statistics.target.amin(1, keepdim=True) ** 2
        w = 1 / statistics.target.clamp(min=1) ** 2
        loss = 1 - (2 * (w * statistics.intersection).sum(1) + self.smooth_nr) / (
            (w * (statistics.prediction + statistics.target)).sum(1) + self.smooth_dr
        )
        return loss[:, None] + 0 * largest, None


class Nothing(voxloss.DiceLoss):
    def forward(self, input: Tensor, target: Tensor, *_: Any, **__: Any) -> Tensor:
        return super().forward(input, target) * math.nan


class SlightlyOff(voxloss.DiceLoss):
    def forward(self, input: Tensor, target: Tensor, *_: Any, **__: Any) -> Tensor:
        return super().forward(input, target) + 2e-6


@pytest.mark.parametrize(
    "broken",
    [
        FactorDropped,
        AlphaBetaSwapped,
        PowerAfterTheMean,
        SmoothInOnePlaceOnly,
        BackgroundStaysIn,
        SoftLabelIgnored,
        SquaresForgotten,
        WeightsNotRelative,
        Nothing,
        SlightlyOff,
        LogCoshAfterTheMean,
        BetaNotSquared,
        SmoothingForgotten,
        DividedByClasses,
        NegativesForgotten,
        LambdaForgotten,
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_broken_losses_are_caught(broken: type[voxloss.StatisticsLoss], dtype: str, cases: list[Case]) -> None:
    records = list(check_losses(cases, [broken]))
    assert any(not record.holds for record in records if record.dtype == dtype)
    if broken not in (BackgroundStaysIn, SoftLabelIgnored, SquaresForgotten):  # what they say gives them away
        assert all(record.got is not None for record in records), "it failed to run, and so proves nothing"


def test_a_loss_without_an_oracle_fails(cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = type("NewLoss", (nn.Module,), {"__module__": "voxloss.losses.overlap"})
    monkeypatch.setattr(overlap, "NewLoss", unknown, raising=False)
    assert unknown in shipped_losses()
    failed = [record for record in check_losses(cases[:1]) if not record.holds]
    assert [(record.loss, record.note) for record in failed] == [
        ("NewLoss", "no options in voxloss_app.demo.checks.OPTIONS")
    ]


def test_a_loss_that_raises_fails_and_the_others_go_on(
    cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object) -> Tensor:
        raise RuntimeError("out of order")

    monkeypatch.setattr(voxloss.JaccardLoss, "forward", forward)
    records = list(check_losses(cases[:1]))
    assert {record.loss for record in records if not record.holds} == {"JaccardLoss"}
    assert {record.note for record in records if not record.holds} == {"RuntimeError: out of order"}
    assert any(record.loss == "TverskyLoss" and record.holds for record in records)


@pytest.mark.parametrize(
    ("got", "holds"), [(0.5, True), (0.5 + 9e-7, True), (0.5 - 2e-6, False), (math.nan, False), (None, False)]
)
def test_a_record_holds_within_its_tolerance(got: float | None, holds: bool) -> None:
    assert Record("DiceLoss", "", "case", "float32", 0.5, got, 1e-6).holds is holds
