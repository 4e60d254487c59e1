"""What is read off the libraries' losses, and what a user may say."""

from __future__ import annotations

from typing import Any

import monai.losses
import pytest
import torch

import voxloss
from voxloss_verify.claims import Claims, parse_claims
from voxloss_verify.readers import claims_of


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
    assert parse_claims(["alpha=.25", "batch=True"], family="dice").alpha == 0.25
    for dtypes in ("dtypes=float32,float16", 'dtypes=["float32", "float16"]'):
        assert parse_claims([dtypes], family="dice").dtypes == ("float32", "float16")
    assert parse_claims(["dtypes=float32"], family="dice").dtypes == ("float32",)
    assert parse_claims(["family=jaccard"], start=claims).family == "jaccard"
    assert parse_claims([], start=claims, family="focal_tversky").family == "focal_tversky"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["alpha"], "expected name=value like alpha=0.3, got 'alpha'"),
        (["alfa=1"], "claim 'alfa': expected one of family, smooth_nr"),
        (["alpha=much"], "claim alpha: expected a number, got 'much'"),
        (["alpha=-1"], "claim alpha: expected a number ≥ 0, got -1"),
        (["batch=1"], "claim batch: expected true or false, got 1"),
        (["reduction=average"], "claim reduction: expected one of mean, sum, none, got 'average'"),
        (["classes=[1, true]"], "claim classes: expected a list, each a whole number or null"),
        (["smooth_nr=Infinity"], "claim smooth_nr: expected a number ≥ 0, got inf"),
        (["gamma=0"], "claim gamma: expected a number other than 0, got 0"),
        (["dtypes=[]"], "claim dtypes: expected some of float64, float32, float16, bfloat16, got []"),
        (['dtypes=["int8"]'], "claim dtypes: expected some of float64, float32, float16, bfloat16, got ['int8']"),
        (["channels=0"], "claim channels: expected a number ≥ 1, got 0"),
        (["unreduced=B x C"], "claim unreduced: expected letters B, C and numbers"),
        (["family=cross_section"], "claim family: expected one of dice, jaccard"),
        (["label_smoothing=2"], "claim label_smoothing: expected a number in [0, 1], got 2"),
        (["family=focal", "gamma=-1"], "claim gamma: expected a number ≥ 0, got -1"),
        (["family=focal", "reduction=none"], 'claim reduction: expected "mean" or "sum" of focal, got "none"'),
        (["family=compound"], "claim parts: expected some of a compound, none of others, got compound"),
        (["family=formula"], "claim formula: expected one of the family of that name only, got formula"),
        (["parts=[]"], "claim 'parts': expected one of family, smooth_nr"),
    ],
)
def test_what_cannot_be_claimed(pairs: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="claim") as raised:
        parse_claims(pairs, start=Claims(family="dice"))
    assert message in str(raised.value)


def test_a_loss_without_a_family() -> None:
    with pytest.raises(ValueError, match="say --as with one of dice"):
        parse_claims(["alpha=1"])
