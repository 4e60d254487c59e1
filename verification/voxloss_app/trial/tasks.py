"""What is tried: data, scores and contenders. A new contender is a line in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from voxloss import BlobLoss, CCDiceCELoss, DiceCELoss, DiceCESkeletonRecallLoss, DiceTopKLoss
from voxloss.transforms import Componentsd, NearestComponentd, Skeletonized
from voxloss_app.trial import scores
from voxloss_app.trial.scores import Mask, Score
from voxloss_data.structures import Lesions, VesselTree, many_lesions, vessel_tree

BASELINE = "DiceCELoss"


@dataclass(frozen=True)
class Contender:
    """A loss, with `softmax` and `to_onehot_y`, and the maps of a `Target` that it needs.

    Attributes:
        maps: by the attribute of `Target`, the transform that adds it to a sample with a `label`.
    """

    loss: Callable[..., nn.Module]
    maps: Mapping[str, Any] = field(default_factory=dict)

    def criterion(self) -> nn.Module:
        """The loss, with no other argument: each as it comes."""
        return self.loss(softmax=True, to_onehot_y=True)


@dataclass(frozen=True)
class Task:
    """Volumes to segment, the losses that are compared on them, and the scores.

    Attributes:
        make: a volume from its edge in voxels and its seed, with `image` and `labels`.
        measure: the numbers of `scores`, from a prediction and the volume.
        marks: what a picture shows of them, see `scores.projection`.
        missed, false: what the picture's marks stand for.
    """

    name: str
    title: str
    data: str
    contenders: Mapping[str, Contender]
    scores: Sequence[Score]
    make: Callable[[int, int], Any]
    measure: Callable[[Mask, Any], dict[str, float]]
    marks: Callable[[Mask, Any], NDArray[np.uint8]]
    missed: str
    false: str


def _vessels(edge: int, seed: int) -> VesselTree:
    return vessel_tree(shape=(edge,) * 3, seed=seed)


def _lesions(edge: int, seed: int) -> Lesions:
    # As dense in a volume of any size.
    return many_lesions(shape=(edge,) * 3, count=max(3, round(60 * (edge / 64) ** 3)), seed=seed)


VESSELS = Task(
    name="vessels",
    title="Vessels",
    data="a branching tree of tubes with a radius of 1 to 3 voxels (`voxloss_data.vessel_tree`)",
    contenders={
        BASELINE: Contender(DiceCELoss),
        "DiceCESkeletonRecallLoss": Contender(DiceCESkeletonRecallLoss, {"skeleton": Skeletonized("label")}),
    },
    scores=scores.OF_VESSELS,
    make=_vessels,
    measure=scores.scores_of_vessels,
    marks=scores.marks_of_vessels,
    missed="missed centre line",
    false="component outside of the vessels",
)

LESIONS = Task(
    name="lesions",
    title="Lesions",
    data="60 lesions per 64³ voxels, of log-uniform volumes from 4 to 2000 voxels (`voxloss_data.many_lesions`)",
    contenders={
        BASELINE: Contender(DiceCELoss),
        "DiceTopKLoss": Contender(DiceTopKLoss),
        "CCDiceCELoss": Contender(CCDiceCELoss, {"partition": NearestComponentd("label")}),
        "BlobLoss": Contender(BlobLoss, {"partition": Componentsd("label")}),
    },
    scores=scores.OF_LESIONS,
    make=_lesions,
    measure=scores.scores_of_lesions,
    marks=scores.marks_of_lesions,
    missed="lesion without a predicted voxel",
    false="component outside of the lesions",
)

TASKS = {task.name: task for task in (VESSELS, LESIONS)}


def chosen(task: Task, losses: Sequence[str] | None) -> list[str]:
    """The contenders of these names, in the order of the table, always with the baseline; None: all.

    Raises ValueError for a name that the task does not have.
    """
    for name in losses or ():
        if name not in task.contenders:
            raise ValueError(
                f"--losses: expected some of {', '.join(task.contenders)} for {task.name}, received {name!r}"
            )
    return [name for name in task.contenders if losses is None or name in losses or name == BASELINE]
