"""The properties that are read from the libraries' losses, and those that a user may declare."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import monai.losses
import pytest
import torch

import voxloss
from every_loss import LOSSES, make
from voxloss_verify.oracle.claims import Claims, parse_claims
from voxloss_verify.subject.readers import claims_of


def test_of_dice() -> None:
    for library in (voxloss, monai.losses):
        claims = claims_of(
            library.DiceLoss(
                include_background=False, to_onehot_y=True, softmax=True, smooth_nr=0.5, smooth_dr=2.0, batch=True
            )
        )
        assert claims is not None
        assert (claims.family, claims.activation, claims.labels) == ("dice", "softmax", "map")
        assert (claims.smooth_nr, claims.smooth_dr, claims.batch) == (0.5, 2.0, True)
        assert (claims.include_background, claims.squared, claims.soft_labels) == (False, False, False)
        assert claims.unreduced == "C 1 1 1"


def test_of_jaccard_half_the_smoothing_as_it_stands_beside_twice_tp() -> None:
    for loss in (
        voxloss.JaccardLoss(smooth_nr=1.0, smooth_dr=3.0),
        voxloss.DiceLoss(jaccard=True, smooth_nr=1.0, smooth_dr=3.0),
        monai.losses.DiceLoss(jaccard=True, smooth_nr=1.0, smooth_dr=3.0),
    ):
        claims = claims_of(loss)
        assert claims is not None
        assert (claims.family, claims.smooth_nr, claims.smooth_dr) == ("jaccard", 0.5, 1.5)


def test_of_tversky_and_focal_tversky() -> None:
    for library in (voxloss, monai.losses):
        claims = claims_of(library.TverskyLoss(alpha=0.3, beta=0.7, reduction="none"))
        assert claims is not None
        assert (claims.family, claims.alpha, claims.beta) == ("tversky", 0.3, 0.7)
        assert (claims.reduction, claims.unreduced) == ("none", "B C")
    claims = claims_of(voxloss.FocalTverskyLoss(gamma=2.0, classes=[1, 3], absent="skip"))
    assert claims is not None
    assert (claims.family, claims.exponent, claims.linear_below) == ("focal_tversky", 0.5, 2.0**-23)
    assert (claims.classes, claims.absent) == ((1, 3), "skip")


def test_of_generalized_dice() -> None:
    ours = claims_of(voxloss.GeneralizedDiceLoss(w_type="simple", weight=[1.0, 2.0]))
    theirs = claims_of(monai.losses.GeneralizedDiceLoss(w_type="simple"))
    assert ours is not None
    assert theirs is not None
    assert (ours.weight_type, ours.weight_scale, ours.class_weight) == ("simple", "relative", (1.0, 2.0))
    assert (theirs.weight_type, theirs.weight_scale, theirs.class_weight) == ("simple", "absolute", None)


def test_overlap_of_soft_labels() -> None:
    for options, overlap in (
        ({}, "product"),
        ({"soft_label": True}, "min"),
        ({"soft_label": True, "squared_pred": True}, "product"),
    ):
        for library in (voxloss, monai.losses):
            claims = claims_of(library.DiceLoss(**options))
            assert claims is not None
            assert claims.overlap == overlap


def read(loss: Any) -> Claims:
    claims = claims_of(loss)
    assert claims is not None
    return claims


def test_of_cross_entropy() -> None:
    claims = read(
        voxloss.CrossEntropyLoss(softmax=True, to_onehot_y=True, weight=[1.0, 3.0], label_smoothing=0.25)
    )
    wanted = Claims(family="cross_entropy", class_weight=(1.0, 3.0), label_smoothing=0.25, activation="softmax")
    assert claims == replace(wanted, labels="map")
    claims = read(voxloss.CrossEntropyLoss(sigmoid=True, classes=[3, 1], reduction="sum", ignore_index=255))
    wanted = Claims(
        family="cross_entropy", activation="sigmoid", classes=(3, 1), reduction="sum", ignore_index=255
    )
    assert claims == replace(wanted, soft_labels=True)


@pytest.mark.parametrize("library", [voxloss, monai.losses])
def test_of_focal_loss(library: Any) -> None:
    claims = read(library.FocalLoss(to_onehot_y=True, gamma=0.5, alpha=0.25, weight=[1.0, 3.0], use_softmax=True))
    assert (claims.family, claims.activation, claims.labels) == ("focal", "softmax", "map")
    assert (claims.gamma, claims.balance, claims.class_weight) == (0.5, 0.25, (1.0, 3.0))
    assert claims.mean_over == ("voxels" if library is voxloss else "voxels and classes")
    claims = read(library.FocalLoss(include_background=False, alpha=[2.0, 3.0]))
    assert (claims.activation, claims.include_background, claims.balance) == ("sigmoid", False, (2.0, 3.0))


@pytest.mark.parametrize(
    ("name", "families", "factors"),
    [
        ("DiceCELoss", ("dice", "cross_entropy"), {"lambda_dice": 0.5, "lambda_ce": 2.0}),
        ("DiceFocalLoss", ("dice", "focal"), {"lambda_dice": 0.5, "lambda_focal": 2.0}),
        ("GeneralizedDiceFocalLoss", ("generalized_dice", "focal"), {"lambda_gdl": 0.5, "lambda_focal": 2.0}),
        ("TverskyCELoss", ("tversky", "cross_entropy"), {"lambda_tversky": 0.5, "lambda_ce": 2.0}),
        ("FocalTverskyCELoss", ("focal_tversky", "cross_entropy"), {"lambda_tversky": 0.5, "lambda_ce": 2.0}),
    ],
)
def test_of_compounds(name: str, families: tuple[str, str], factors: dict[str, float]) -> None:
    forms: tuple[dict[str, Any], ...] = ({"softmax": True, "to_onehot_y": True}, {"sigmoid": True})
    # MONAI has none of Tversky.
    makers = [getattr(library, name) for library in (voxloss, monai.losses) if hasattr(library, name)]
    for maker, form in product(makers, forms):
        claims = read(maker(**form, **factors, include_background=False, batch=True))
        assert [factor for factor, _ in claims.parts] == [0.5, 2.0]
        assert tuple(part.family for _, part in claims.parts) == families
        activation, labels = ("softmax", "map") if "softmax" in form else ("sigmoid", "one-hot")
        for each in (claims, *claims.formulas):
            assert (each.activation, each.labels, each.soft_labels) == (activation, labels, labels == "one-hot")
        region, by_voxel = claims.formulas
        assert (region.batch, region.include_background) == (True, False)
        # Cross entropy takes all classes, focal loss those of Dice.
        assert by_voxel.include_background == (families[1] == "cross_entropy")


def test_what_concerns_the_call_is_shared_by_all_parts() -> None:
    claims = read(voxloss.TverskyCELoss(softmax=True, ignore_index=2, alpha=0.3, beta=0.7, label_smoothing=0.25))
    assert [each.ignore_index for each in claims.formulas] == [2, 2]
    assert (claims.formulas[0].beta, claims.formulas[1].label_smoothing) == (0.7, 0.25)
    assert (claims.counting(4), claims.formulas[0].counting(4)) == ([0, 1, 2, 3], [0, 1, 3])


def test_weights_of_a_compound_are_one_per_channel() -> None:
    claims = read(
        voxloss.DiceCELoss(
            softmax=True, to_onehot_y=True, include_background=False, weight=[1.0, 2.0, 3.0, 4.0], ignore_index=1
        )
    )
    assert claims.fixed_channels == 4
    assert [each.weights(4) for each in claims.formulas] == [[3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]
    ours = read(voxloss.DiceFocalLoss(include_background=False, weight=[1.0, 2.0, 3.0], alpha=[4.0, 5.0, 6.0]))
    assert ours.fixed_channels == 3
    assert [each.weights(3) for each in ours.formulas] == [[2.0, 3.0], [2.0, 3.0]]
    assert ours.formulas[1].balances(3) == [(5.0, 1.0), (6.0, 1.0)]
    theirs = read(monai.losses.DiceCELoss(include_background=False, weight=torch.tensor([1.0, 2.0, 3.0])))
    assert theirs.fixed_channels == 3
    assert [each.weights(3) for each in theirs.formulas] == [[2.0, 3.0], [1.0, 2.0, 3.0]]


def test_a_weight_of_the_class_that_is_ignored() -> None:
    ours = read(voxloss.DiceLoss(softmax=True, to_onehot_y=True, weight=[1.0, 2.0, 3.0], ignore_index=1))
    assert (ours.fixed_channels, ours.weights(3)) == (3, [1.0, 3.0])
    entropy = read(voxloss.CrossEntropyLoss(softmax=True, weight=[1.0, 2.0, 3.0], ignore_index=1))
    assert (entropy.fixed_channels, entropy.weights(3)) == (3, [1.0, 2.0, 3.0])


def test_processes_that_share_are_claimed() -> None:
    for maker in (voxloss.DiceLoss, voxloss.DiceCELoss, voxloss.CrossEntropyLoss, voxloss.FocalLoss):
        assert read(maker(group="world")).shard_kinds == ("equal batch", "unequal batch")
        assert read(maker(group="world", shard="volume")).shard_kinds == ("volume",)


def test_a_mean_over_voxels_may_be_split_where_every_item_has_as_many() -> None:
    labels: dict[str, Any] = {"softmax": True, "to_onehot_y": True}
    equal: tuple[str, ...] = ("equal batch",)
    for loss, kinds in (
        (voxloss.CrossEntropyLoss(**labels), equal),
        (voxloss.CrossEntropyLoss(**labels, weight=3.0), equal),
        (voxloss.CrossEntropyLoss(**labels, weight=[1.0, 3.0]), ()),
        (voxloss.CrossEntropyLoss(**labels, include_background=False), ()),
        (voxloss.CrossEntropyLoss(**labels, ignore_index=255), ()),
        (voxloss.CrossEntropyLoss(**labels, reduction="sum"), ()),
        (voxloss.CrossEntropyLoss(softmax=True), ()),
        (voxloss.CrossEntropyLoss(sigmoid=True, weight=[1.0, 3.0]), equal),
        (voxloss.FocalLoss(use_softmax=True, weight=[1.0, 3.0]), equal),
        (voxloss.FocalLoss(reduction="sum"), ()),
        (voxloss.DiceCELoss(**labels), equal),
        (voxloss.DiceCELoss(**labels, batch=True), ()),
        (voxloss.DiceCELoss(softmax=True), ()),
    ):
        assert read(loss).shard_kinds == kinds, loss


class SquareRootDice(voxloss.RegionLoss):
    def per_class(self, statistics: voxloss.RegionStatistics) -> torch.Tensor:
        return 1 - voxloss.formulas.dice(statistics, smooth_nr=1, smooth_dr=1).sqrt()


class OfAllClasses(SquareRootDice):
    def terms(self, statistics: Any, extra_sums: Any, weight: Any, counts: Any) -> Any:
        return self.per_class(statistics).mean(1, keepdim=True), None


def test_a_formula_of_ones_own() -> None:
    claims = read(
        SquareRootDice(softmax=True, include_background=False, squared_pred=True, batch=True, absent="skip")
    )
    assert (claims.family, claims.activation, claims.squared) == ("formula", "softmax", True)
    assert (claims.include_background, claims.batch, claims.absent) == (False, True, "skip")
    assert claims.unreduced == "C 1 1 1"
    assert str(claims.formula) == "SquareRootDice.per_class"
    assert claims_of(OfAllClasses()) is None
    for family in ("dice", "tversky"):
        assert parse_claims([f"family={family}"], start=claims).formula is None


def test_claims_in_words() -> None:
    claims = read(voxloss.DiceCELoss(softmax=True, smooth_nr=0.0, smooth_dr=1.0, lambda_ce=0.5))
    assert str(claims) == (
        "family=compound parts=1·(family=dice smooth_dr=1.0 unreduced=B C 1 1 1) + 0.5·(family=cross_entropy) "
        "activation=softmax soft_labels=True"
    )


def test_a_subclass_is_read_like_its_base_and_others_are_not_known() -> None:
    class Own(voxloss.DiceLoss):
        pass

    assert claims_of(Own()) == claims_of(voxloss.DiceLoss())
    assert claims_of(torch.nn.CrossEntropyLoss()) is None


def test_an_argument_that_a_constructor_drops() -> None:
    with pytest.raises(ValueError, match="squared_pred=True was given, and the instance has squared_pred=False"):
        claims_of(voxloss.DiceLoss(), {"squared_pred": True})


def test_counting_and_channels() -> None:
    claims = Claims(family="dice", include_background=False, ignore_index=2, class_weight=(1.0, 2.0))
    assert claims.counting(4) == [1, 3]
    assert claims.counting(1) == [0]
    assert claims.fixed_channels == 4
    assert claims.weights(4) == [1.0, 2.0]
    assert Claims(family="dice", classes=(3, 1)).counting(5) == [3, 1]
    with pytest.raises(ValueError, match="expected 1 numbers, one per class that counts"):
        claims.weights(2)


def test_shards_follow_from_a_mean_over_items_unless_they_are_named() -> None:
    assert Claims(family="dice").shard_kinds == ("equal batch",)
    for other in ({"batch": True}, {"reduction": "sum"}, {"absent": "skip"}):
        options: dict[str, Any] = other
        assert Claims(family="dice", **options).shard_kinds == ()
    assert Claims(family="dice", batch=True, shards=("volume",)).shard_kinds == ("volume",)


@pytest.mark.parametrize(
    ("convention", "exponent"), [("1/gamma", 0.25), ("gamma", 4.0), ("1-gamma", -3.0)], ids=lambda c: str(c)
)
def test_gamma_conventions(convention: Any, exponent: float) -> None:
    assert Claims(family="focal_tversky", gamma=4, gamma_as=convention).exponent == exponent


def test_parsing() -> None:
    claims = parse_claims(["alpha=0.25", "batch=true", "classes=[1, 2]", "activation=softmax"], family="tversky")
    assert claims == Claims(family="tversky", alpha=0.25, batch=True, classes=(1, 2), activation="softmax")
    assert parse_claims(["alpha=.25", "batch=True"], family="tversky").alpha == 0.25
    assert parse_claims(["gamma=4/3"], family="focal_tversky").gamma == 4 / 3
    for dtypes in ("dtypes=float32,float16", 'dtypes=["float32", "float16"]'):
        assert parse_claims([dtypes], family="dice").dtypes == ("float32", "float16")
    assert parse_claims(["dtypes=float32"], family="dice").dtypes == ("float32",)
    assert parse_claims(["family=jaccard"], start=claims).family == "jaccard"
    assert parse_claims([], start=claims, family="focal_tversky").family == "focal_tversky"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["alpha"], "expected name=value like alpha=0.3, received 'alpha'"),
        (["alfa=1"], "claim 'alfa': expected one of family, smooth_nr"),
        (["alpha=much"], "claim alpha: expected a number, received 'much'"),
        (["alpha=-1"], "claim alpha: expected a number ≥ 0, received -1"),
        (["batch=1"], "claim batch: expected true or false, received 1"),
        (["reduction=average"], "claim reduction: expected one of mean, sum, none, received 'average'"),
        (["classes=[1, true]"], "claim classes: expected a list, each a whole number or null"),
        (["smooth_nr=Infinity"], "claim smooth_nr: expected a number ≥ 0, received inf"),
        (["gamma=0"], "claim gamma: expected a number other than 0, received 0"),
        (["gamma=1/0"], "claim gamma: expected a number, received '1/0'"),
        (["gamma=2"], "claim gamma: expected with the family focal_tversky or focal"),
        (
            ["family=dice", "beta=0.7"],
            "claim beta: expected with the family tversky or focal_tversky, received it",
        ),
        (["dtypes=[]"], "claim dtypes: expected some of float64, float32, float16, bfloat16, received []"),
        (
            ['dtypes=["int8"]'],
            "claim dtypes: expected some of float64, float32, float16, bfloat16, received ['int8']",
        ),
        (["channels=0"], "claim channels: expected a number ≥ 1, received 0"),
        (["unreduced=B x C"], "claim unreduced: expected letters B, C and numbers"),
        (["family=cross_section"], "claim family: expected one of dice, jaccard"),
        (["label_smoothing=2"], "claim label_smoothing: expected a number in [0, 1], received 2"),
        (["family=focal", "gamma=-1"], "claim gamma: expected a number ≥ 0, received -1"),
        (
            ["family=focal", "reduction=none"],
            'claim reduction: expected "mean" or "sum" of focal, received "none"',
        ),
        (["family=compound"], "claim parts: a compound has some, no other family has"),
        (["family=formula"], "claim formula: expected one of the family of that name only, received formula"),
        (["parts=[]"], "claim 'parts': expected one of family, smooth_nr"),
    ],
)
def test_what_cannot_be_claimed(pairs: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="claim") as raised:
        parse_claims(pairs, start=Claims(family="dice"))
    assert message in str(raised.value)


def test_a_loss_without_a_family() -> None:
    with pytest.raises(ValueError, match="Set --as to one of dice"):
        parse_claims(["alpha=1"])


@pytest.mark.parametrize("name", LOSSES)
def test_every_shipped_loss_is_read(name: str) -> None:
    """Without a reader no check would run on a loss."""
    claims = read(make(name, "softmax", to_onehot_y=True, group="world"))
    assert all(each.family != "formula" or claims.map == "distance" for each in claims.formulas)
    assert (claims.activation, claims.labels) == ("softmax", "map")
    assert claims.shard_kinds == ("equal batch", "unequal batch")


def test_a_loss_by_cell_is_read_where_a_sample_is_one_cell_and_all_weigh_alike() -> None:
    cells: dict[str, Any] = {"softmax": True, "to_onehot_y": True}
    claims = read(voxloss.BlobLoss(**cells, lambda_dice=0.5))
    assert [factor for factor, _ in claims.parts] == [2.0, 1.0]
    for _, part in claims.parts:
        assert [(f, each.family) for f, each in part.parts] == [(0.5, "dice"), (1.0, "cross_entropy")]
    assert (claims.map, claims.compiles) == ("components", False)
    claims = read(voxloss.CCDiceCELoss(**cells, ignore_index=255, weight=[1.0, 2.0], lambda_ce=0.0, cells=9))
    assert [each.family for each in claims.formulas] == ["dice"]
    assert (claims.map, claims.compiles) == ("nearest", True)
    for own in ({"ignore_index": 255}, {"weight": [1.0, 2.0]}, {"absent": "skip"}, {"to_onehot_y": False}):
        with pytest.raises(ValueError, match="properties cannot be read from a mean over cells"):
            read(voxloss.CCDiceCELoss(**{**cells, **own}))
    of_lines = voxloss.CellwiseLoss(voxloss.SkeletonRecallLoss(**cells))
    with pytest.raises(ValueError, match="properties cannot be read from a loss of two maps"):
        read(of_lines)
    assert read(voxloss.CellwiseLoss(voxloss.DiceLoss(**cells))).is_mean_of_items


def test_a_compound_of_ones_own() -> None:
    class Two(voxloss.CompoundLoss):
        weighted_parts = (("lambda_first", "first"), ("lambda_second", "second"))

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.first, self.second = SquareRootDice(**options), voxloss.CrossEntropyLoss(**options)
            self.lambda_first, self.lambda_second = 0.5, 2.0

    claims = read(Two(softmax=True, to_onehot_y=True, ignore_index=255))
    assert [(factor, part.family) for factor, part in claims.parts] == [(0.5, "formula"), (2.0, "cross_entropy")]
    assert all(each.ignore_index == 255 and each.labels == "map" for each in claims.formulas)


def test_a_formula_of_further_sums() -> None:
    class Rate(voxloss.RegionLoss):
        extra_sums = ("voxels", "sensitivity_error")

        def per_class(self, statistics: Any, voxels: Any, sensitivity_error: Any) -> Any:
            return (statistics.prediction + sensitivity_error) / voxels

    claims = read(Rate(softmax=True))
    assert claims.formula is not None
    losses, derivatives = claims.formula([[1.0, 2.0, 3.0, 10.0, 0.5]], [1.0], [0], 1)
    assert losses == [0.25]
    assert derivatives == [[0, 0.1, 0, pytest.approx(-0.025), 0.1]]

    class Logarithmic(voxloss.RegionLoss):
        extra_sums = ("log_loss",)

        def per_class(self, statistics: Any, log_loss: Any) -> Any:
            return log_loss / statistics.target

    with pytest.raises(ValueError, match="properties cannot be read from a formula of"):
        claims_of(Logarithmic())
