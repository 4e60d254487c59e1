"""Region losses for 3D segmentation that are exact, and drop-in for MONAI's.

    logits, target ──one pass──▶ RegionStatistics [B, C] ──formula──▶ score [B, C] ──reduction──▶ loss

Every loss is a small formula over a few sums per class, and the sums come from one pass over the volume.
Start reading in `voxloss.statistics`.
"""

from voxloss import formulas
from voxloss.compound import (
    CompoundLoss,
    DiceCELoss,
    DiceFocalLoss,
    FocalTverskyCELoss,
    GeneralizedDiceFocalLoss,
    TverskyCELoss,
)
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
from voxloss.statistics_loss import StatisticsLoss
from voxloss.variants import AsymmetricSimilarityLoss, LogCoshDiceLoss
from voxloss.voxel_losses import CrossEntropyLoss, FocalLoss

__version__ = "0.1.0"

__all__ = [
    "AsymmetricSimilarityLoss",
    "CompoundLoss",
    "CrossEntropyLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "FocalLoss",
    "FocalTverskyCELoss",
    "FocalTverskyLoss",
    "GeneralizedDiceFocalLoss",
    "GeneralizedDiceLoss",
    "IoULoss",
    "JaccardLoss",
    "LogCoshDiceLoss",
    "RegionLoss",
    "RegionOptions",
    "RegionStatistics",
    "ShapeError",
    "StatisticsLoss",
    "TverskyCELoss",
    "TverskyLoss",
    "formulas",
    "region_statistics",
]
