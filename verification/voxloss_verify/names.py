"""The losses' names on the command line; light, so that `voxloss --help` need not load torch."""

from __future__ import annotations

LOSSES = {
    "dice": "DiceLoss",
    "jaccard": "JaccardLoss",
    "tversky": "TverskyLoss",
    "focal-tversky": "FocalTverskyLoss",
    "generalized-dice": "GeneralizedDiceLoss",
}
