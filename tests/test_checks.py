"""The checks of the demo: every loss against the oracle, and broken losses, which they catch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import voxloss
from voxloss import RegionStatistics
from voxloss.statistics import PassSums
from voxloss_app.demo.checks import DTYPES, Source, check_losses, on_labels, on_phantoms
from voxloss_data import all_phantoms
from voxloss_verify.configurations import CONFIGURATIONS
from voxloss_verify.laws.record import Status

pytestmark = pytest.mark.usefixtures("one_thread")

PHANTOMS = [phantom for phantom in all_phantoms() if phantom.name.startswith(("nested", "constant", "ramp"))]


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    """A few phantoms and a small volume in which the prediction misses class 3."""
    generator = np.random.default_rng(7)
    probabilities = generator.dirichlet([1, 0.3, 0.3, 0.3], size=(9, 8, 7)).astype(np.float32)
    labels = probabilities.argmax(-1).astype(np.uint8)
    prediction = np.where(generator.random(labels.shape) < 0.7, labels, 1).astype(np.uint8)
    prediction[prediction == 3] = 2
    return [on_phantoms(PHANTOMS), on_labels(prediction, labels, np.moveaxis(probabilities, -1, 0))]


@pytest.mark.integration
def test_every_loss_holds_on_every_volume(sources: list[Source]) -> None:
    checks = list(check_losses(sources))
    assert [check for check in checks if not check.holds] == []
    assert {check.record.law for check in checks} == {"24"}
    found = Counter((check.loss, check.configuration, check.dtype) for check in checks)
    for loss, each in CONFIGURATIONS.items():
        for label, arguments in each.items():
            volumes = len(PHANTOMS) + (2 if "to_onehot_y" in arguments else 4)
            if "regions" in arguments:  # two, and the brain has four classes
                volumes = len(PHANTOMS)
            if arguments.get("ignore_index") == 1:  # the phantoms and label maps use it
                volumes = 0
            assert found[loss, label, "float32"] == found[loss, label, "float64"] == volumes, (loss, label)


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
    def forward(self, input: Tensor, target: Any, *_: Any, **__: Any) -> Tensor:
        return super().forward(input, target) * math.nan


class SlightlyOff(voxloss.DiceLoss):
    def forward(self, input: Tensor, target: Any, *_: Any, **__: Any) -> Tensor:
        return super().forward(input, target) + 2e-6


# Their instances do not have the arguments that they were given.
REFUSED = (BackgroundStaysIn, SoftLabelIgnored, SquaresForgotten)


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
def test_broken_losses_are_caught(broken: type[voxloss.StatisticsLoss], sources: list[Source]) -> None:
    checks = list(check_losses(sources, [broken]))
    wrong = [check for check in checks if not check.holds]
    assert {check.dtype for check in wrong} == set(DTYPES) or broken in REFUSED
    if broken not in REFUSED:
        assert all(check.record.worst is not None for check in checks), "it failed to run, and so proves nothing"


def test_a_loss_that_raises_fails_and_the_others_go_on(
    sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object) -> Tensor:
        raise RuntimeError("out of order")

    monkeypatch.setattr(voxloss.JaccardLoss, "forward", forward)
    checks = list(check_losses(sources[:1], [voxloss.JaccardLoss, voxloss.LogCoshDiceLoss]))
    wrong = [check for check in checks if not check.holds]
    assert {check.loss for check in wrong} == {"JaccardLoss"}
    assert {check.record.status for check in wrong} == {Status.broken}
    assert all("raised RuntimeError: out of order; it was called with" in check.record.reason for check in wrong)
    assert [check.error for check in wrong] == [math.inf] * len(CONFIGURATIONS["JaccardLoss"])
    assert any(check.loss == "LogCoshDiceLoss" and check.holds for check in checks)
