"""The formulas: identities between them, closed-form gradients, and the ends where they could break."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import voxloss
from voxloss import RegionStatistics, formulas, region_statistics
from voxloss.formulas import FOCAL_LINEAR_BELOW
from voxloss_verify.tolerances import LOSS


@st.composite
def region(draw: st.DrawFn) -> RegionStatistics:
    """Sums that some pair of volumes has: intersection ≤ both."""
    sizes = st.floats(0, 1e7)
    intersection = draw(sizes, label="intersection")
    sums = [intersection, intersection + draw(sizes, label="FP"), intersection + draw(sizes, label="FN")]
    return RegionStatistics(*(torch.tensor([[value]], dtype=torch.float64) for value in sums))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=LOSS["float64"], atol=LOSS["float64"])


smoothing = st.sampled_from([0.0, 1e-5, 0.5, 1.0, 100.0])


@given(region(), smoothing)
def test_dice_and_jaccard_are_functions_of_each_other(s: RegionStatistics, smooth: float) -> None:
    d, j = formulas.dice(s, smooth, smooth), formulas.jaccard(s, smooth, smooth)
    close(d, 2 * j / (1 + j))
    close(j, d / (2 - d))


@given(region(), smoothing)
def test_tversky_contains_dice_and_jaccard(s: RegionStatistics, smooth: float) -> None:
    close(formulas.tversky(s, 0.5, 0.5, smooth / 2, smooth / 2), formulas.dice(s, smooth, smooth))
    close(formulas.tversky(s, 1, 1), formulas.jaccard(s))


@given(region(), st.floats(0, 2), st.floats(0, 2), smoothing)
def test_swapping_the_volumes_swaps_alpha_and_beta(
    s: RegionStatistics, alpha: float, beta: float, smooth: float
) -> None:
    swapped = RegionStatistics(s.intersection, s.target, s.prediction)
    close(
        formulas.tversky(s, alpha, beta, smooth, smooth), formulas.tversky(swapped, beta, alpha, smooth, smooth)
    )
    close(formulas.dice(s, smooth, smooth), formulas.dice(swapped, smooth, smooth))
    close(formulas.jaccard(s, smooth, smooth), formulas.jaccard(swapped, smooth, smooth))


@given(region(), smoothing)
def test_scores_lie_between_0_and_1_and_order(s: RegionStatistics, smooth: float) -> None:
    d, j = formulas.dice(s, smooth, smooth).item(), formulas.jaccard(s, smooth, smooth).item()
    assert 0 <= j <= d <= 1


def test_alpha_weights_false_positives() -> None:
    only_false_positives = RegionStatistics(*(torch.tensor([[v]]) for v in (1.0, 3.0, 1.0)))
    assert formulas.tversky(only_false_positives, alpha=0.5, beta=9.0).item() == 1 / 2
    only_false_negatives = RegionStatistics(*(torch.tensor([[v]]) for v in (1.0, 1.0, 3.0)))
    assert formulas.tversky(only_false_negatives, alpha=9.0, beta=0.5).item() == 1 / 2


def test_gradients_by_every_voxel_have_their_closed_forms() -> None:
    p = torch.rand(1, 1, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    g = torch.rand(p.shape, dtype=torch.float64).round()
    plain, squared = (region_statistics(p, g, squared=power) for power in (False, True))
    a, total = plain.intersection, plain.prediction + plain.target
    d, j, d2 = formulas.dice(plain), formulas.jaccard(plain), formulas.dice(squared)
    for score, closed_form in (
        (d, (2 * g - d) / total),
        (j, (g - j * (1 - g)) / (total - a)),
        (d2, 2 * (g - d2 * p) / (squared.prediction + squared.target)),
    ):
        (gradient,) = torch.autograd.grad(score.sum(), p, retain_graph=True)
        close(gradient, closed_form.detach())


def generalized(target: list[float], intersection: list[float], prediction: list[float]) -> RegionStatistics:
    return RegionStatistics(*(torch.tensor([v], dtype=torch.float64) for v in (intersection, prediction, target)))


@pytest.mark.parametrize(
    ("weight_type", "expected"),
    [
        # T = (100, 10), I = (90, 5), P = (95, 15): weights relative to the smallest class
        ("square", 2 * (90 / 100 + 5) / (195 / 100 + 25)),
        ("simple", 2 * (90 / 10 + 5) / (195 / 10 + 25)),
        ("uniform", 2 * (90 + 5) / (195 + 25)),
    ],
)
def test_generalized_dice_by_hand(weight_type: str, expected: float) -> None:
    s = generalized([100, 10], [90, 5], [95, 15])
    assert formulas.generalized_dice(s, weight_type).item() == pytest.approx(expected, rel=1e-14)


def test_generalized_dice_gives_an_absent_class_the_largest_weight() -> None:
    s = generalized([100, 10, 0], [90, 5, 0], [95, 15, 7])
    expected = 2 * (90 / 100 + 5) / (195 / 100 + 25 + 7)
    assert formulas.generalized_dice(s).item() == pytest.approx(expected, rel=1e-14)
    none_present = generalized([0, 0], [0, 0], [3, 4])
    assert formulas.generalized_dice(none_present, smooth_nr=1, smooth_dr=1).item() == 1 / 8


@pytest.mark.parametrize("gamma", [4 / 3, 2, 3, 1, 0.5])
def test_focal_power_is_the_power_and_stays_finite_at_zero(gamma: float) -> None:
    x = torch.tensor(
        [-1e-16, 0, 1e-300, 1e-9, 0.9 * FOCAL_LINEAR_BELOW, FOCAL_LINEAR_BELOW, 1e-3, 1], dtype=torch.float64
    )
    x.requires_grad_()
    y = formulas.focal_power(x, gamma)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    exact = x.detach().clamp(min=0) ** (1 / gamma)
    above = x.detach() >= FOCAL_LINEAR_BELOW
    close(y.detach()[above], exact[above])
    assert gradient.isfinite().all()
    assert (gradient >= 0).all()
    assert gradient.max() <= max(FOCAL_LINEAR_BELOW ** (1 / gamma - 1), 1 / gamma) * (1 + 1e-9)
    assert y[1] == 0
    assert (y.diff() >= 0).all(), "the power is monotonic across the chord's end"
    largest_gap = 7e-7 if gamma == 4 / 3 else FOCAL_LINEAR_BELOW ** (1 / gamma)
    assert (y.detach() - exact).abs().max() <= largest_gap


def test_nothing_found_where_there_is_nothing_scores_1_with_zero_gradient() -> None:
    empty = torch.zeros(3, 1, 2, dtype=torch.float64, requires_grad=True)
    s = RegionStatistics(*empty)
    for score in (formulas.dice, formulas.jaccard, formulas.tversky, formulas.generalized_dice):
        value = score(s)
        assert (value == 1).all()
        assert torch.autograd.grad(value.sum(), empty)[0].eq(0).all()


def test_the_soft_label_distance_is_a_metric_and_dice_is_none() -> None:
    """Jaccard's distance obeys the triangle inequality, Dice's does not (Wang et al. 2023)."""

    def distance(score: object, p: Tensor, g: Tensor) -> float:
        return 1 - float(score(region_statistics(p, g, soft_label=True)))  # type: ignore[operator]

    a, b, c = (torch.tensor([[row]], dtype=torch.float64) for row in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]))
    assert distance(formulas.dice, a, b) > distance(formulas.dice, a, c) + distance(formulas.dice, c, b)
    for _ in range(50):
        x, y, z = torch.rand(3, 1, 1, 5, dtype=torch.float64)
        direct, detour = distance(formulas.jaccard, x, y), distance(formulas.jaccard, x, z)
        assert direct <= detour + distance(formulas.jaccard, z, y) + 1e-12
        assert math.isclose(distance(formulas.jaccard, x, x), 0, abs_tol=1e-15)


@pytest.mark.parametrize("x", [0.0, 1e-9, 1e-4, 0.3, 0.999, 1.0, 1.001, 5.0, -2.0, 1e4, -1e4])
def test_log_cosh_neither_cancels_nor_overflows(x: float) -> None:
    """x²/2 − x⁴/12 near 0, |x| − log 2 far away, log(cosh x) in between."""
    got = torch.tensor([x], dtype=torch.float64).requires_grad_()
    value = formulas.log_cosh(got)
    exact = (
        x * x / 2 - x**4 / 12
        if abs(x) < 1e-3
        else abs(x) - math.log(2)
        if abs(x) > 100
        else math.log(math.cosh(x))
    )
    assert value.item() == pytest.approx(exact, rel=1e-14)
    (gradient,) = torch.autograd.grad(value.sum(), got)
    assert gradient.item() == pytest.approx(math.tanh(x), rel=1e-12)


def test_asymmetric_similarity_is_f_beta() -> None:
    s = RegionStatistics(*(torch.tensor([[v]], dtype=torch.float64) for v in (5.0, 7.0, 9.0)))
    loss = voxloss.AsymmetricSimilarityLoss(f_beta=1.5, smooth_nr=0, smooth_dr=0)
    wanted = 1 - (1 + 1.5**2) * 5 / ((1 + 1.5**2) * 5 + 1.5**2 * (9 - 5) + (7 - 5))
    assert loss.per_class(s).item() == pytest.approx(wanted, rel=1e-12)
