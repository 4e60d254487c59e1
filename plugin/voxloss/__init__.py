"""Region losses for 3D segmentation that are exact, and drop-in for MONAI's.

    logits, target ──one pass──▶ RegionStatistics [B, C] ──formula──▶ score [B, C] ──reduction──▶ loss

Every loss is a small formula over a few sums per class, and the sums come from one pass over the volume.
Start reading in `voxloss.statistics`.
"""

from voxloss import formulas
from voxloss.compound import (
    ComboLoss,
    CompoundLoss,
    DiceCELoss,
    DiceFocalLoss,
    FocalTverskyCELoss,
    GeneralizedDiceFocalLoss,
    TverskyCELoss,
)
from voxloss.confusion import MCCLoss, SensitivitySpecificityLoss
from voxloss.exponential_logarithmic import ExponentialLogarithmicLoss
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
from voxloss.unified_focal import UnifiedFocalLoss
from voxloss.variants import AsymmetricSimilarityLoss, LogCoshDiceLoss, PenaltyGeneralizedDiceLoss
from voxloss.voxel_losses import CrossEntropyLoss, FocalLoss

__version__ = "0.1.0"

__all__ = [
    "AsymmetricSimilarityLoss",
    "ComboLoss",
    "CompoundLoss",
    "CrossEntropyLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "ExponentialLogarithmicLoss",
    "FocalLoss",
    "FocalTverskyCELoss",
    "FocalTverskyLoss",
    "GeneralizedDiceFocalLoss",
    "GeneralizedDiceLoss",
    "IoULoss",
    "JaccardLoss",
    "LogCoshDiceLoss",
    "MCCLoss",
    "PenaltyGeneralizedDiceLoss",
    "RegionLoss",
    "RegionOptions",
    "RegionStatistics",
    "SensitivitySpecificityLoss",
    "ShapeError",
    "StatisticsLoss",
    "TverskyCELoss",
    "TverskyLoss",
    "UnifiedFocalLoss",
    "formulas",
    "region_statistics",
]
