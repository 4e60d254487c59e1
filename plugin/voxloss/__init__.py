"""Region losses for 3D segmentation, exact and with the arguments of MONAI's losses.

    logits, target ──one pass──▶ RegionStatistics [B, C] ──formula──▶ score [B, C] ──reduction──▶ loss

Every loss is a small formula over a few sums per class, and one pass over the volume computes the sums.
Start reading in `voxloss.statistics`.
"""

from typing import TYPE_CHECKING, Any

from voxloss import formulas
from voxloss.head import FusedHead, fuse_head
from voxloss.inputs import ShapeError
from voxloss.lazy_logits import LazyLogits
from voxloss.losses.base import LossTerm, StatisticsLoss
from voxloss.losses.boundary import BoundaryLoss, DiceBoundaryLoss
from voxloss.losses.compound import (
    ComboLoss,
    CompoundLoss,
    DiceCELoss,
    DiceFocalLoss,
    FocalTverskyCELoss,
    GeneralizedDiceFocalLoss,
    TverskyCELoss,
)
from voxloss.losses.confusion import MCCLoss, SensitivitySpecificityLoss
from voxloss.losses.exponential_logarithmic import ExponentialLogarithmicLoss
from voxloss.losses.lesions import BlobLoss, CCDiceCELoss, CellwiseLoss
from voxloss.losses.options import RegionOptions, VoxelOptions
from voxloss.losses.overlap import (
    DiceLoss,
    FocalTverskyLoss,
    GeneralizedDiceLoss,
    IoULoss,
    JaccardLoss,
    TverskyLoss,
)
from voxloss.losses.overlap_variants import AsymmetricSimilarityLoss, LogCoshDiceLoss, PenaltyGeneralizedDiceLoss
from voxloss.losses.region import RegionLoss
from voxloss.losses.skeleton import DiceCESkeletonRecallLoss, SkeletonRecallLoss
from voxloss.losses.top_k import DiceTopKLoss, TopKLoss
from voxloss.losses.unified_focal import UnifiedFocalLoss
from voxloss.losses.voxelwise import CrossEntropyLoss, FocalLoss
from voxloss.maps import Target
from voxloss.metrics import OverlapMetric
from voxloss.statistics import RegionStatistics, region_statistics

if TYPE_CHECKING:
    from voxloss.inference import SlidingWindowLabels, fused_argmax

__version__ = "0.1.0"

__all__ = [
    "AsymmetricSimilarityLoss",
    "BlobLoss",
    "BoundaryLoss",
    "CCDiceCELoss",
    "CellwiseLoss",
    "ComboLoss",
    "CompoundLoss",
    "CrossEntropyLoss",
    "DiceBoundaryLoss",
    "DiceCELoss",
    "DiceCESkeletonRecallLoss",
    "DiceFocalLoss",
    "DiceLoss",
    "DiceTopKLoss",
    "ExponentialLogarithmicLoss",
    "FocalLoss",
    "FocalTverskyCELoss",
    "FocalTverskyLoss",
    "FusedHead",
    "GeneralizedDiceFocalLoss",
    "GeneralizedDiceLoss",
    "IoULoss",
    "JaccardLoss",
    "LazyLogits",
    "LogCoshDiceLoss",
    "LossTerm",
    "MCCLoss",
    "OverlapMetric",
    "PenaltyGeneralizedDiceLoss",
    "RegionLoss",
    "RegionOptions",
    "RegionStatistics",
    "SensitivitySpecificityLoss",
    "ShapeError",
    "SkeletonRecallLoss",
    "SlidingWindowLabels",
    "StatisticsLoss",
    "Target",
    "TopKLoss",
    "TverskyCELoss",
    "TverskyLoss",
    "UnifiedFocalLoss",
    "VoxelOptions",
    "formulas",
    "fuse_head",
    "fused_argmax",
    "region_statistics",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import what builds on MONAI at its first use: importing MONAI takes longer than importing torch."""
    if name in ("SlidingWindowLabels", "fused_argmax"):
        from voxloss import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
