"""Region losses for 3D segmentation that are exact, and drop-in for MONAI's.

    logits, target ──one pass──▶ RegionStatistics [B, C] ──formula──▶ score [B, C] ──reduction──▶ loss

Every loss is a small formula over a few sums per class, and the sums come from one pass over the volume.
Start reading in `voxloss.statistics`.
"""

from voxloss import formulas
from voxloss.inputs import ShapeError
from voxloss.losses import (
    DiceLoss,
    FocalTverskyLoss,
    GeneralizedDiceLoss,
    IoULoss,
    JaccardLoss,
    TverskyLoss,
)
from voxloss.region_loss import RegionLoss, RegionOptions
from voxloss.statistics import RegionStatistics, region_statistics

__version__ = "0.1.0"

__all__ = [
    "DiceLoss",
    "FocalTverskyLoss",
    "GeneralizedDiceLoss",
    "IoULoss",
    "JaccardLoss",
    "RegionLoss",
    "RegionOptions",
    "RegionStatistics",
    "ShapeError",
    "TverskyLoss",
    "formulas",
    "region_statistics",
]
