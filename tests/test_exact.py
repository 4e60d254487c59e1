"""The value and the gradient that a loss must have: by hand, and by differences of the exact value itself."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any, get_args

import numpy as np
import pytest

from voxloss_verify.oracle import exact
from voxloss_verify.oracle.claims import METRICS, Claims, Family
from voxloss_verify.oracle.sums import Sums
from voxloss_verify.oracle.volumes import Volume


def of(intersection: Any, prediction: Any, target: Any, **others: Any) -> Sums:
    values = [intersection, intersection, prediction, prediction, target, target]
    return replace(Sums(*map(Fraction, values)), **{name: Fraction(value) for name, value in others.items()})


# Two samples of two classes.
ROWS = [[of(1, 2, 4), of(6, 8, 6)], [of(0, 3, 0), of(2, 2, 2)]]


def value(rows: Any = ROWS, **claims: Any) -> Any:
    """The loss, or the list of losses, to compare with; hand-written fractions are themselves rounded."""
    return pytest.approx(exact.of_sums(Claims(**claims), rows, "float64").value, rel=1e-15, abs=1e-16)


def test_dice_by_hand() -> None:
    assert value(family="dice", reduction="none") == [[1 - 2 / 6, 1 - 12 / 14], [1.0, 0.0]]
    assert value(family="dice") == (2 / 3 + 1 / 7 + 1 + 0) / 4
    assert value(family="dice", reduction="sum") == 2 / 3 + 1 / 7 + 1
    assert value(family="dice", offset=0) == (2 / 3 + 1 / 7 + 1 + 0) / 4 - 1
    assert value(ROWS[:1], family="dice", smooth_nr=1, smooth_dr=2, reduction="none") == [
        [1 - 3 / 8, 1 - 13 / 16]
    ]
    assert value(family="dice", batch=True, reduction="none") == [[1 - 2 / 9, 1 - 16 / 18]]
    assert value(family="dice", include_background=False) == (1 / 7 + 0) / 2
    assert value(family="dice", class_weight=(2.0, 0.5)) == (4 / 3 + 1 / 14 + 2) / 4


def test_the_others_by_hand() -> None:
    first = {"rows": ROWS[:1], "reduction": "none"}
    assert value(**first, family="jaccard", smooth_nr=1, smooth_dr=1) == [[1 - 2 / 6, 1 - 7 / 9]]
    tversky = [[1 - 1 / (1 + 0.25 * 1 + 0.5 * 3), 1 - 6 / (6 + 0.25 * 2)]]
    assert value(**first, family="tversky", alpha=0.25, beta=0.5) == tversky
    assert value(**first, family="focal_tversky", gamma=2) == [[math.sqrt(1 - 1 / 3), math.sqrt(1 - 6 / 7)]]
    # w = 1/16 and 1/36; relative to the largest 1 and 16/36, beside a smoothing of 1.
    absolute = 1 - (2 * (1 / 16 + 6 / 36) + 1) / (6 / 16 + 14 / 36 + 1)
    relative = 1 - (2 * (1 + 6 * 16 / 36) + 1) / (6 + 14 * 16 / 36 + 1)
    for scale, wanted in (("absolute", absolute), ("relative", relative)):
        claims = {"family": "generalized_dice", "weight_scale": scale, "smooth_nr": 1, "smooth_dr": 1}
        assert value(**first, **claims) == [[wanted]]


def test_squared_and_soft_sums() -> None:
    row = [[of(1, 2, 4, prediction_squared=1.5, target_squared=3, soft_intersection=1.75)]]
    assert value(row, family="dice", squared=True) == 1 - 2 / 4.5
    assert value(row, family="jaccard", squared=True) == 1 - 1 / 3.5
    assert value(row, family="dice", overlap="min") == 1 - 3.5 / 6


def test_averages_and_absent_classes() -> None:
    micro = [1 - 14 / 20, 1 - 4 / 7]
    assert value(family="dice", average="micro", reduction="none") == [[micro[0]], [micro[1]]]
    losses = [2 / 3, 1 / 7, 0]
    assert value(family="dice", absent="skip") == sum(losses) / 3
    per_item = ((2 / 3 + 1 / 7) / 2 + 0) / 2
    assert value(family="dice", absent="skip per item") == per_item
    assert value(family="dice", absent="perfect") == sum(losses) / 4
    assert value(family="dice", absent="perfect", offset=0) == (sum(losses) - 4) / 4
    nothing = [[of(0, 0, 0), of(0, 3, 0)]]
    assert value(nothing, family="dice", absent="perfect", empty="nan") == 0
    assert value(nothing, family="generalized_dice", absent="perfect") == 0


def test_an_empty_denominator() -> None:
    nothing = [[of(0, 0, 0)]]
    assert value(nothing, family="dice") == 0
    assert value(nothing, family="dice", empty="worst") == 1
    assert value(nothing, family="generalized_dice", empty="worst") == 1
    assert value(nothing, family="dice", smooth_nr=1, smooth_dr=2, empty="worst") == 0.5


def test_the_chord_of_the_power() -> None:
    claims = Claims(family="focal_tversky", gamma=2, linear_below=0.25)
    rows = [[of(7, 8, 7)], [of(3, 4, 4)]]  # 1 − Tversky(½, ½) of 1/15 and of 1/4
    found = exact.of_sums(replace(claims, reduction="none"), rows, "float64").value.ravel().tolist()
    assert found == pytest.approx([1 / 15 / 0.25 * 0.5, 0.5], rel=1e-15)


def test_a_power_may_be_off_by_what_its_argument_may_be() -> None:
    perfect = [[of(1, 1, 1)]]
    steep = exact.of_sums(Claims(family="focal_tversky", gamma=2), perfect, "float32")
    assert steep.tolerance == pytest.approx(1e-3)
    assert exact.of_sums(Claims(family="focal_tversky"), perfect, "float32").tolerance == pytest.approx(1e-6)
    assert exact.of_sums(Claims(family="dice", reduction="sum"), ROWS, "float64").tolerance == pytest.approx(
        4e-12
    )


# Two voxels of two classes, and the label of each: p = ½ for the right one, then ¾.
GIVEN = np.array([[0.5, 0.25], [0.5, 0.75]]).reshape(1, 2, 2)
RIGHT = np.array([0, 1]).reshape(1, 1, 2)
LN2, LN_3_4, LN4 = math.log(2), math.log(4 / 3), math.log(4)


def of_voxels(input: Any = GIVEN, target: Any = RIGHT, **claims: Any) -> Any:
    claims = {"spatial_dims": 1, "labels": "map", **claims}
    found = exact.expected(Claims(**claims), Volume("by hand", input, target))
    return pytest.approx(float(found.value), rel=1e-15)


def test_cross_entropy_by_hand() -> None:
    claims: dict[str, Any] = {"family": "cross_entropy"}
    assert of_voxels(**claims) == (LN2 + LN_3_4) / 2
    assert of_voxels(**claims, reduction="sum") == LN2 + LN_3_4
    assert of_voxels(**claims, class_weight=(1.0, 3.0)) == (LN2 + 3 * LN_3_4) / 4
    assert of_voxels(**claims, include_background=False) == LN_3_4
    smoothed = 0.75 * LN2 + 0.25 * LN2 + 0.75 * LN_3_4 + 0.25 * LN4
    assert of_voxels(**claims, label_smoothing=0.5) == smoothed / 2
    log_odds = np.log(GIVEN[:, 1:] / (1 - GIVEN[:, 1:]))
    for activation, input in (("none", GIVEN), ("softmax", np.log(GIVEN) + 7)):
        assert of_voxels(input, **claims, activation=activation) == (LN2 + LN_3_4) / 2
    for activation, input in (("none", GIVEN[:, 1:]), ("sigmoid", log_odds)):
        one = {**claims, "labels": "one-hot", "activation": activation}
        assert of_voxels(input, RIGHT == 1, **one) == (LN2 + LN_3_4) / 2
        assert of_voxels(input, RIGHT == 1, **one, class_weight=3.0) == 3 * (LN2 + LN_3_4) / 2
        assert of_voxels(input, RIGHT == 1, **one, label_smoothing=0.5) == smoothed / 2
    # Each class a question: the wrong one of a voxel is answered as well as the right one.
    logits = np.log(GIVEN / (1 - GIVEN))
    assert of_voxels(logits, **claims, activation="sigmoid") == (2 * LN2 + 2 * LN_3_4) / 4


def test_focal_loss_by_hand() -> None:
    claims: dict[str, Any] = {"family": "focal", "gamma": 2.0}
    terms = LN2 / 4, LN_3_4 / 16
    assert of_voxels(**claims) == sum(terms) / 2
    assert of_voxels(**claims, mean_over="voxels and classes") == sum(terms) / 4
    assert of_voxels(**claims, balance=0.25) == (0.75 * terms[0] + 0.25 * terms[1]) / 2
    assert of_voxels(**claims, balance=(2.0, 3.0)) == (2 * terms[0] + 3 * terms[1]) / 2
    assert of_voxels(**claims, class_weight=(2.0, 3.0)) == (2 * terms[0] + 3 * terms[1]) / 2
    assert of_voxels(family="focal", gamma=0.0) == (LN2 + LN_3_4) / 2
    sigmoid = {**claims, "activation": "sigmoid", "labels": "one-hot"}
    log_odds = np.log(GIVEN[:, 1:] / (1 - GIVEN[:, 1:]))
    assert of_voxels(log_odds, RIGHT == 1, **sigmoid) == sum(terms) / 2
    assert of_voxels(log_odds, RIGHT == 1, **sigmoid, balance=0.25) == (0.75 * terms[0] + 0.25 * terms[1]) / 2
    twice = np.concatenate([GIVEN, GIVEN[:, :, [0, 0]]]), np.concatenate([RIGHT, RIGHT[:, :, [0, 0]]])
    assert of_voxels(*twice, **claims, reduction="sum") == sum(terms) / 2 + terms[0]


def test_losses_of_all_voxels_by_hand() -> None:
    """p = ½, ¼, ¼, ¾ and g = 1, 0, 0, 1: TP = 1¼, FP = ½, FN = ¾, TN = 1½."""
    p, g = np.array([0.5, 0.25, 0.25, 0.75]).reshape(1, 1, 4), np.array([1.0, 0, 0, 1]).reshape(1, 1, 4)
    shared: dict[str, Any] = {"labels": "one-hot", "soft_labels": True}
    mcc = (1.25 * 1.5 - 0.5 * 0.75) / math.sqrt(1.75 * 2 * 2 * 2.25)
    assert of_voxels(p, g, **shared, family="mcc") == 1 - mcc
    smoothed = (1.25 * 1.5 - 0.5 * 0.75 + 2) / math.sqrt(1.75 * 2 * 2 * 2.25 + 3)
    assert of_voxels(p, g, **shared, family="mcc", smooth_nr=2.0, smooth_dr=3.0) == 1 - smoothed
    assert of_voxels(g, g, **shared, family="mcc", smooth_dr=3.0) == 0
    assert of_voxels(p, 0 * g, **shared, family="mcc") == 1
    errors = (0.25 + 0.0625) / 2, (0.0625 + 0.0625) / 2
    found = of_voxels(p, g, **shared, family="sensitivity_specificity", inside=0.25)
    assert found == 0.25 * errors[0] + 0.75 * errors[1]
    assert of_voxels(p, 0 * g, **shared, family="sensitivity_specificity", inside=0.25) == 0.75 * 0.9375 / 4


def test_powers_of_logarithms_by_hand() -> None:
    claims: dict[str, Any] = {"family": "logarithmic_cross_entropy", "gamma": 0.5}
    assert of_voxels(**claims) == math.sqrt(2) * (math.sqrt(LN2) + math.sqrt(LN_3_4)) / 2
    w = math.sqrt(4 / 1), math.sqrt(4 / 3)
    terms = w[0] * math.sqrt(LN2) + w[1] * math.sqrt(LN_3_4)
    assert of_voxels(**claims, frequencies=(1.0, 3.0)) == terms / 2
    dice = {"family": "logarithmic_dice", "gamma": 0.5, "gamma_as": "gamma", "reduction": "none"}
    assert value(ROWS[:1], **dice) == [[math.sqrt(math.log(3)), math.sqrt(math.log(14 / 12))]]
    near = {**claims, "linear_below": 1.0}  # the chord from 0 to 1 is the line
    assert of_voxels(**near) == math.sqrt(2) * (LN2 + LN_3_4) / 2


def test_the_background_apart_by_hand() -> None:
    focal = of_voxels(family="focal", gamma=2.0, balance=0.75, focused="background")
    assert focal == (0.25 * LN2 / 4 + 0.75 * LN_3_4) / 2
    tversky = {"family": "focal_tversky", "gamma": 0.5, "gamma_as": "1-gamma", "focused": "foreground"}
    assert value(ROWS[:1], **tversky, reduction="none") == [[1 - 2 / 6, math.sqrt(1 - 12 / 14)]]
    x = 1 - (2 * (1 / 16 + 6 / 36)) / (6 / 16 + 14 / 36)
    assert value(ROWS[:1], family="generalized_dice", penalty=2.5) == x / (1 + 2.5 * (1 - x))


def test_a_compound_by_hand() -> None:
    """The properties of the call hold for every part, whatever the part declares."""
    dice = Claims(family="dice", activation="sigmoid", include_background=False, smooth_nr=1.0, smooth_dr=1.0)
    entropy = Claims(family="cross_entropy", reduction="sum", ignore_index=3)
    claims: dict[str, Any] = {"family": "compound", "parts": ((0.5, dice), (2.0, entropy))}
    by_dice = 1 - (2 * 0.75 + 1) / (1.25 + 1 + 1)
    assert of_voxels(**claims) == 0.5 * by_dice + 2 * (LN2 + LN_3_4) / 2
    assert Claims(**claims).counting(2) == [0, 1]
    assert Claims(**claims, ignore_index=1).counting(3) == [0, 1, 2]
    nested = Claims(family="compound", parts=((3.0, Claims(**claims)),), batch=True)
    assert [each.family for each in nested.formulas] == ["dice", "cross_entropy"]


def test_a_formula_of_its_own_by_hand() -> None:
    def misses(sums: Any, weights: Any, counting: Any, channels: Any) -> Any:
        losses = [(t - i) / t for i, _, t in sums]
        return losses, [(-w / t, 0.0, w * i / t**2) for w, (i, _, t) in zip(weights, sums, strict=True)]

    rows = [[of(1, 2, 4), of(6, 8, 6)], [of(0, 3, 1), of(1, 2, 2)]]
    claims = Claims(family="formula", formula=misses, class_weight=(1.0, 2.0))
    assert value(rows, **vars(claims)) == (3 / 4 + 1 + 2 * (0 + 1 / 2)) / 4
    derivatives = exact.sum_derivatives(claims, rows)
    assert [[s.intersection for s in row] for row in derivatives] == [[-1 / 16, -1 / 12], [-1 / 4, -1 / 4]]
    steep = replace(claims, formula=lambda sums, weights, *_: ([100 * i for i, _, _ in sums], []))
    tolerance = exact.of_sums(steep, rows, "float32").tolerance
    assert tolerance == pytest.approx(1.5 * 600e-6)  # Σ w/4 times 1e-6 of the largest loss


@pytest.mark.parametrize("family", ["cross_entropy", "focal"])
@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
def test_means_of_nothing_and_of_sure_predictions_are_finite(family: Any, activation: Any) -> None:
    claims = Claims(family=family, activation=activation, labels="map", ignore_index=9, spatial_dims=1, gamma=0.5)
    sure = np.array([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 2)
    input = sure if activation == "none" else 3e4 * (2 * sure - 1)
    for labels in ([9, 9], [0, 1], [1, 0]):
        volume = Volume("sure", input, np.array(labels).reshape(1, 1, 2))
        wanted, derivatives = exact.expected(claims, volume), exact.gradient(claims, volume)
        assert np.isfinite(wanted.value)
        assert np.isfinite(derivatives).all()
        assert (labels == [1, 0]) == (wanted.value > 1)
        assert labels != [9, 9] or not derivatives.any()


@pytest.mark.parametrize("family", ["dice", "cross_entropy", "focal"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_volume_that_is_repeated(family: Any, reduction: Any) -> None:
    claims = Claims(
        family=family, reduction=reduction, labels="map", spatial_dims=1, gamma=2.0, smooth_dr=1.0, ignore_index=9
    )
    once = Volume("once", np.tile(GIVEN, 2), np.array([0, 1, 9, 0]).reshape(1, 1, 4))
    thrice = Volume("thrice", np.tile(once.input, 3), np.tile(once.target, 3))
    said = once.changed(times=3)
    assert exact.expected(claims, said).value == pytest.approx(exact.expected(claims, thrice).value, rel=1e-15)
    derivatives = exact.gradient(claims, thrice)[..., :4]
    assert exact.gradient(claims, said) == pytest.approx(derivatives, rel=1e-15)
    assert exact.gradient_tolerance(claims, said, "float32") == exact.gradient_tolerance(
        claims, thrice, "float32"
    )


def test_probabilities() -> None:
    logits = np.array([[[0.0, 1e4, -3.0]], [[0.5, -1e4, 2.0]]]).reshape(1, 2, 3)
    p = exact.probabilities(logits, "softmax")[0, 0]
    assert p.tolist() == pytest.approx([1 / (1 + math.exp(0.5)), 1, 1 / (1 + math.exp(5))], rel=1e-15)
    q = exact.probabilities(logits, "sigmoid")[0]
    assert q[0].tolist() == pytest.approx([0.5, 1, 1 / (1 + math.exp(3))], rel=1e-15)
    assert q[1, 1] == 0
    assert exact.probabilities(logits / 1e5, "none").tolist() == (logits / 1e5).tolist()


FAMILIES: list[dict[str, Any]] = [
    {"family": "dice", "smooth_nr": 0.5, "smooth_dr": 2.0},
    {"family": "dice", "squared": True, "batch": True},
    {"family": "jaccard", "include_background": False, "reduction": "sum"},
    {"family": "jaccard", "squared": True, "average": "micro"},
    {"family": "tversky", "alpha": 0.3, "beta": 0.7, "overlap": "min", "class_weight": (1.0, 0.5, 3.0)},
    {"family": "focal_tversky", "alpha": 0.3, "beta": 0.7, "gamma": 4 / 3, "reduction": "none"},
    {"family": "focal_tversky", "gamma": 0.75, "gamma_as": "1-gamma", "absent": "skip per item"},
    {"family": "tversky", "alpha": 0.3, "beta": 0.7, "absent": "perfect"},
    {"family": "generalized_dice", "weight_scale": "relative", "smooth_nr": 1.0, "smooth_dr": 1.0},
    {"family": "generalized_dice", "weight_type": "simple", "class_weight": (1.0, 0.5, 3.0)},
    {"family": "cross_entropy"},
    {"family": "cross_entropy", "class_weight": (1.0, 0.5, 3.0), "label_smoothing": 0.25},
    {"family": "cross_entropy", "reduction": "sum", "classes": (2, 0)},
    {"family": "focal", "gamma": 2.0, "balance": 0.25},
    {"family": "focal", "gamma": 0.5, "balance": 0.25, "focused": "background"},
    {"family": "focal_tversky", "gamma": 0.5, "focused": "foreground", "include_background": True},
    {"family": "log_cosh_dice", "smooth_nr": 0.5, "smooth_dr": 2.0, "batch": True},
    {"family": "logarithmic_dice", "gamma": 0.3, "gamma_as": "gamma", "smooth_nr": 1.0, "smooth_dr": 1.0},
    {"family": "logarithmic_cross_entropy", "gamma": 0.3, "linear_below": 2.0**-23},
    {"family": "logarithmic_cross_entropy", "gamma": 1.5, "frequencies": (4.0, 2.0, 1.0)},
    {"family": "generalized_dice", "weight_scale": "relative", "penalty": 2.5},
    {"family": "mcc", "smooth_nr": 1.0, "smooth_dr": 2.0, "batch": True},
    {"family": "sensitivity_specificity", "inside": 0.2, "class_weight": (1.0, 0.5, 3.0)},
    {"family": "focal", "gamma": 0.5, "class_weight": (1.0, 0.5, 3.0), "mean_over": "voxels and classes"},
    {"family": "focal", "gamma": 0.0, "balance": (0.5, 3.0), "include_background": False, "reduction": "sum"},
    {
        "family": "compound",
        "parts": (
            (0.5, Claims(family="tversky", alpha=0.3, beta=0.7, batch=True)),
            (2.0, Claims(family="focal", gamma=1.5)),
        ),
    },
]


@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
@pytest.mark.parametrize("options", FAMILIES, ids=lambda o: str(Claims(**o)))
def test_the_gradient_is_that_of_the_value(options: dict[str, Any], activation: Any) -> None:
    claims = Claims(activation=activation, **options)
    generator = np.random.default_rng(5)
    input = generator.random((2, 3, 2, 2, 1)) if activation == "none" else generator.normal(size=(2, 3, 2, 2, 1))
    target = np.zeros((2, 1, 2, 2, 1), np.int64)
    target[0, 0, 0], target[1, 0, 1, 0] = 1, 2
    volume = Volume("small", input, target)
    found = exact.gradient(claims, volume)
    step = 2.0**-18
    for voxel in [(0, 0, 0, 0, 0), (0, 1, 1, 0, 0), (1, 2, 1, 0, 0), (1, 1, 0, 1, 0)]:
        ends = []
        for sign in (1, -1):
            moved = input.copy()
            moved[voxel] += sign * step
            ends.append(exact.expected(claims, volume.changed(input=moved)).value.sum())
        assert found[voxel] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-9)


def test_the_gradient_of_every_family_is_compared() -> None:
    """A formula of one's own has its gradient from autograd."""
    assert {options["family"] for options in FAMILIES} >= {*get_args(Family)} - {"formula", *METRICS}


PARTS = ((1.0, Claims(family="dice")), (1.0, Claims(family="cross_entropy", class_weight=(1.0, 3.0))))


@pytest.mark.parametrize("family", ["dice", "cross_entropy", "focal", "compound"])
def test_ignored_voxels_do_not_exist(family: Any) -> None:
    parts = PARTS if family == "compound" else ()
    claims = Claims(family=family, parts=parts, labels="map", ignore_index=9)
    input, target = (
        np.random.default_rng(1).random((1, 2, 4, 1, 1)),
        np.array([0, 9, 1, 0]).reshape(1, 1, 4, 1, 1),
    )
    input[0, :, 1] = np.nan
    with_it = Volume("ignored", input, target)
    without = Volume("deleted", input[:, :, [0, 2, 3]], target[:, :, [0, 2, 3]])
    assert exact.expected(claims, with_it).value == exact.expected(claims, without).value
    derivatives = exact.gradient(claims, with_it)
    assert (derivatives[:, :, 1] == 0).all()
    assert (derivatives[:, :, [0, 2, 3]] == exact.gradient(claims, without)).all()
