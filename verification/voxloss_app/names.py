"""The losses' names on the command line; light, so that `voxloss --help` need not load torch."""

from __future__ import annotations

LOSSES = {
    "dice": "DiceLoss",
    "jaccard": "JaccardLoss",
    "tversky": "TverskyLoss",
    "focal-tversky": "FocalTverskyLoss",
    "generalized-dice": "GeneralizedDiceLoss",
    "penalty-generalized-dice": "PenaltyGeneralizedDiceLoss",
    "asymmetric-similarity": "AsymmetricSimilarityLoss",
    "log-cosh-dice": "LogCoshDiceLoss",
    "mcc": "MCCLoss",
    "sensitivity-specificity": "SensitivitySpecificityLoss",
    "cross-entropy": "CrossEntropyLoss",
    "focal": "FocalLoss",
    "top-k": "TopKLoss",
    "skeleton-recall": "SkeletonRecallLoss",
    "boundary": "BoundaryLoss",
    "dice-ce": "DiceCELoss",
    "dice-focal": "DiceFocalLoss",
    "dice-top-k": "DiceTopKLoss",
    "dice-ce-skeleton-recall": "DiceCESkeletonRecallLoss",
    "dice-boundary": "DiceBoundaryLoss",
    "cc-dice-ce": "CCDiceCELoss",
    "blob": "BlobLoss",
    "generalized-dice-focal": "GeneralizedDiceFocalLoss",
    "tversky-ce": "TverskyCELoss",
    "focal-tversky-ce": "FocalTverskyCELoss",
    "combo": "ComboLoss",
    "exponential-logarithmic": "ExponentialLogarithmicLoss",
    "unified-focal": "UnifiedFocalLoss",
}

# Those that need a map beside the labels, which the commands that train make none of.
WITH_MAPS = (
    "skeleton-recall",
    "boundary",
    "dice-ce-skeleton-recall",
    "dice-boundary",
    "cc-dice-ce",
    "blob",
)
OF_LABELS = tuple(name for name in LOSSES if name not in WITH_MAPS)


def loss_name(text: str) -> str:
    """The name in `LOSSES` that is meant: dice-ce, dicece, DiceCE and DiceCELoss are one.

    Raises ValueError if there is none.
    """
    squeezed = text.lower().replace("-", "").replace("_", "").removesuffix("loss")
    for name in LOSSES:
        if name.replace("-", "") == squeezed or (name, squeezed) == ("jaccard", "iou"):
            return name
    raise ValueError(f"expected one of {', '.join(LOSSES)}, received {text!r}")
