"""The configurations in which the demo, `voxloss conformance` and the tests check each loss of voxloss.

A new loss needs an entry here. The table holds names and arguments only; reading it loads neither voxloss nor
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Arguments = Mapping[str, Any]

LABELS: Arguments = {"softmax": True, "to_onehot_y": True}
UNSMOOTHED: Arguments = {"smooth_nr": 0.0, "smooth_dr": 0.0}
# As many as the brain MRI has classes.
WEIGHT = [1.0, 1.0, 2.0, 4.0]

# Arguments that libraries have in common, under the names that the pages of conformance give them. Without
# activation the input is probabilities, the target one channel per class.
SHARED: Mapping[str, Arguments] = {
    "softmax": LABELS,
    "sigmoid": {"sigmoid": True},
    "probabilities, s = 0": UNSMOOTHED,
    "softmax, s = 0": {**LABELS, **UNSMOOTHED},
    "squared": {**LABELS, "squared_pred": True},
    "jaccard": {**LABELS, "jaccard": True},
    "batch": {**LABELS, "batch": True},
    "soft labels": {"soft_label": True},
    "ignore 255": {**LABELS, "ignore_index": 255},
    "no background": {**LABELS, "include_background": False},
    "class weights": {**LABELS, "weight": WEIGHT},
    "soft labels, s = 0": {"soft_label": True, **UNSMOOTHED},
}
# Of these, by the kind of loss, those that touch its own formula.
REGION = ("softmax", "sigmoid", "softmax, s = 0", "batch", "soft labels", "ignore 255", "no background")
ALL_VOXELS = ("softmax", "sigmoid", "batch", "ignore 255")
VOXELWISE = ("softmax", "sigmoid", "ignore 255", "no background", "class weights")
COMPOUND = ("softmax", "sigmoid", "batch", "ignore 255", "no background", "class weights")
# The activation of focal loss has another name, and is a sigmoid if it is not a softmax.
FOCAL: Mapping[str, Arguments] = {
    "softmax": {"to_onehot_y": True, "use_softmax": True},
    "sigmoid": {"to_onehot_y": True},
    "ignore 255": {"to_onehot_y": True, "use_softmax": True, "ignore_index": 255},
    "no background": {"to_onehot_y": True, "use_softmax": True, "include_background": False},
    "class weights": {"to_onehot_y": True, "use_softmax": True, "weight": WEIGHT},
}


def shared(*labels: str, **own: Any) -> dict[str, Arguments]:
    """The shared configurations of these labels, none for all, each with a loss's own arguments."""
    return {label: {**SHARED[label], **own} for label in labels or SHARED}


def _own(*each: Arguments) -> dict[str, Arguments]:
    """Configurations that are labelled by their arguments."""
    return {", ".join(f"{name}={value}" for name, value in arguments.items()): arguments for arguments in each}


_UNEQUAL = {**LABELS, "smooth_nr": 0.5, "smooth_dr": 2.0}
_IGNORED_CLASS = {**LABELS, "weight": WEIGHT, "ignore_index": 1}
_FOREGROUND = {**LABELS, "include_background": False, "ignore_index": 255}
_SUM = {**LABELS, "reduction": "sum"}
# Every choice of regions is that of a label, so that every target can be given.
_REGIONS = {"sigmoid": True, "regions": [[1, 3], [2, 3]]}

# Of each class its configurations by their labels; the first stands for the others where there is little time.
CONFIGURATIONS: Mapping[str, Mapping[str, Arguments]] = {
    "DiceLoss": {
        **shared(),
        **_own(
            _UNEQUAL,
            {**LABELS, "jaccard": True, "squared_pred": True},
            {"include_background": False, "squared_pred": True},
            {"include_background": False, "soft_label": True},
            _REGIONS,
        ),
    },
    "JaccardLoss": {
        **shared("softmax", "softmax, s = 0", "soft labels, s = 0"),
        **_own(_UNEQUAL, {"include_background": False}, {**LABELS, "squared_pred": True}),
    },
    "TverskyLoss": {
        **shared(*REGION, alpha=0.3, beta=0.7),
        **_own(_UNEQUAL, {"include_background": False, "soft_label": True, "alpha": 0.3, "beta": 0.7}),
    },
    "FocalTverskyLoss": {
        **shared("softmax", "sigmoid", "soft labels", "ignore 255"),
        **_own(
            _UNEQUAL,
            {**LABELS, "include_background": False, "gamma": 1.0},
            {**LABELS, "gamma": 2.0, **UNSMOOTHED},
        ),
    },
    "GeneralizedDiceLoss": {
        **shared(*REGION),
        **_own(
            _UNEQUAL,
            {**LABELS, "w_type": "simple"},
            {**LABELS, "w_type": "uniform"},
            {"include_background": False, **UNSMOOTHED, "w_type": "simple"},
        ),
    },
    "LogCoshDiceLoss": {
        **shared("softmax"),
        **_own(
            _UNEQUAL,
            {**LABELS, **UNSMOOTHED},
            {"soft_label": True},
            {**LABELS, "squared_pred": True, "include_background": False},
        ),
    },
    "AsymmetricSimilarityLoss": {
        **shared("softmax"),
        **_own(
            {**_UNEQUAL, "f_beta": 3.0},
            {**LABELS, **UNSMOOTHED, "f_beta": 3.0, "include_background": False},
            {"soft_label": True},
        ),
    },
    "PenaltyGeneralizedDiceLoss": {
        **shared("softmax", "sigmoid"),
        **_own(_IGNORED_CLASS, _FOREGROUND, _SUM, {**LABELS, "k": 0.0, "w_type": "simple"}),
    },
    "MCCLoss": {
        **shared(*ALL_VOXELS),
        **_own(
            _IGNORED_CLASS,
            _FOREGROUND,
            _SUM,
            {"smooth_dr": 0.0, "batch": True},
            {**LABELS, "smooth_nr": 1.0, "smooth_dr": 2.0},
        ),
    },
    "SensitivitySpecificityLoss": {
        **shared(*ALL_VOXELS),
        **_own(_IGNORED_CLASS, _FOREGROUND, _SUM, {"r": 0.5, "batch": True}),
    },
    "CrossEntropyLoss": {
        **shared(*VOXELWISE),
        **_own(
            _IGNORED_CLASS,
            _FOREGROUND,
            _SUM,
            {**LABELS, "label_smoothing": 0.25, "weight": WEIGHT},
            {"sigmoid": True, "label_smoothing": 0.25},
            {**LABELS, "ignore_index": 1},
            {**LABELS, "weight": 0.5},
            {"to_onehot_y": True},
        ),
    },
    "FocalLoss": {
        **FOCAL,
        **_own(
            {"to_onehot_y": True, "use_softmax": True, "weight": WEIGHT, "ignore_index": 1},
            {"to_onehot_y": True, "use_softmax": True, "include_background": False, "ignore_index": 255},
            {"to_onehot_y": True, "use_softmax": True, "reduction": "sum"},
            {"to_onehot_y": True, "use_softmax": True, "gamma": 0.5, "alpha": 0.25},
            {"to_onehot_y": True, "use_softmax": True, "gamma": 1.0},
            {"gamma": 0.0, "alpha": 0.25},
            {"alpha": WEIGHT, "to_onehot_y": True},
            {"regions": _REGIONS["regions"]},
        ),
    },
    "DiceCELoss": {
        **shared(*COMPOUND),
        **_own(
            _IGNORED_CLASS,
            _FOREGROUND,
            _SUM,
            {**LABELS, **UNSMOOTHED, "batch": True, "include_background": False},
            {"sigmoid": True, **UNSMOOTHED, "lambda_ce": 3.0, "squared_pred": True},
            {**_UNEQUAL, "lambda_dice": 0.5, "lambda_ce": 2.0},
            {**LABELS, "label_smoothing": 0.1},
            {**LABELS, "absent": "skip", "classes": [2, 1]},
            {**_REGIONS, "batch": True},
        ),
    },
    "TopKLoss": {
        **shared("softmax", "sigmoid", "ignore 255"),
        **_own(
            _IGNORED_CLASS,
            {**LABELS, "k": 40.0, "weight": WEIGHT},
            {"k": 25.0, "label_smoothing": 0.1},
            {**_REGIONS, "k": 50.0},
        ),
    },
    "DiceTopKLoss": {
        **shared("softmax", "sigmoid", "ignore 255"),
        **_own(
            {**LABELS, **UNSMOOTHED, "k": 30.0, "batch": True, "include_background": False, "lambda_top_k": 0.5}
        ),
    },
    "SkeletonRecallLoss": {
        **shared("softmax", "sigmoid", "softmax, s = 0", "batch", "ignore 255", "class weights"),
        **_own(_UNEQUAL, _IGNORED_CLASS, {}, {**_REGIONS, "batch": True}, {**LABELS, "classes": [3, 1]}),
    },
    "DiceCESkeletonRecallLoss": {
        **shared("softmax", "sigmoid", "batch", "ignore 255", "no background"),
        **_own(
            _IGNORED_CLASS,
            _SUM,
            {**LABELS, **UNSMOOTHED, "lambda_skeleton": 0.5, "lambda_dice": 2.0, "label_smoothing": 0.1},
            _REGIONS,
        ),
    },
    "BoundaryLoss": {
        **shared("softmax", "sigmoid", "ignore 255", "no background", "class weights"),
        **_own(_IGNORED_CLASS, _SUM, {}, _REGIONS, {**LABELS, "classes": [2, 0]}),
    },
    "DiceBoundaryLoss": {
        **shared("softmax", "sigmoid", "batch", "ignore 255", "no background"),
        **_own(
            _IGNORED_CLASS,
            _SUM,
            {**LABELS, "schedule": "rebalance", "step": 0.25},
            {**_REGIONS, "lambda_boundary": 0.5},
        ),
    },
    **{
        name: {
            # A mean over samples of means over voxels, which is declared of samples of as many voxels that count.
            **shared("softmax", "sigmoid"),
            **shared("softmax, s = 0", "ignore 255", "class weights", lambda_ce=0.0),
            **_own(
                {**LABELS, "include_background": True, "cells": 2},
                {**LABELS, "lambda_lesion": 0.5, "lambda_global": 3.0, "label_smoothing": 0.1},
                {**LABELS, "lambda_dice": 0.25, "lambda_ce": 2.0, "lambda_global": 0.5},
                {**LABELS, "classes": [2, 1]},
                {**_REGIONS, "include_background": True},
                {"lambda_ce": 0.0, "lambda_global": 1.0},
            ),
        }
        for name in ("CCDiceCELoss", "BlobLoss")
    },
    "DiceFocalLoss": {
        **shared(*COMPOUND),
        **_own(_IGNORED_CLASS, _FOREGROUND, _SUM, {**LABELS, "gamma": 0.5, "lambda_focal": 0.5}),
    },
    "GeneralizedDiceFocalLoss": {
        **shared(*COMPOUND),
        **_own(_IGNORED_CLASS, {**LABELS, "w_type": "simple", "lambda_gdl": 2.0}),
    },
    "TverskyCELoss": {
        **shared(*COMPOUND, alpha=0.3, beta=0.7),
        **_own({**LABELS, "alpha": 0.3, "beta": 0.7, "lambda_tversky": 2.0}),
    },
    "FocalTverskyCELoss": {
        **shared(*COMPOUND),
        **_own({**LABELS, "gamma": 2.0, "label_smoothing": 0.1}),
    },
    "ComboLoss": {
        **shared("softmax", "sigmoid", "ignore 255"),
        **_own(_IGNORED_CLASS, _FOREGROUND, _SUM, {**LABELS, "alpha": 0.2, "beta": 0.7}),
    },
    "ExponentialLogarithmicLoss": {
        **shared("softmax", "sigmoid", "ignore 255"),
        **_own(
            _IGNORED_CLASS,
            _FOREGROUND,
            _SUM,
            {**LABELS, "frequencies": WEIGHT, "gamma_ce": 1.0},
            {**LABELS, "gamma_dice": 1.0, "gamma_ce": 0.5},
            {"to_onehot_y": True, "gamma_ce": 0.5, "gamma_dice": 2.0},
        ),
    },
    "UnifiedFocalLoss": {
        **shared("softmax", "sigmoid", "ignore 255"),
        **_own(
            _IGNORED_CLASS,
            _FOREGROUND,
            _SUM,
            {**LABELS, "gamma": 0.25, "delta": 0.3, "asymmetric": False, "classes": [2, 0]},
            {**LABELS, "gamma": 0.25, "delta": 0.7, "asymmetric": False},
            {"to_onehot_y": True, "gamma": 0.75, "lambda_focal": 0.1},
        ),
    },
}
