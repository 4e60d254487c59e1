"""Scores of a prediction of thin or of many structures, for one volume, and what a picture marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from skimage.measure import label
from skimage.morphology import skeletonize

from voxloss_data.structures import Lesions, VesselTree
from voxloss_verify.oracle.sums import dice, label_sums

Mask = NDArray[np.bool_]
# What a picture marks, the stronger the higher.
RIGHT, FALSE, MISSED = 1, 2, 3
FOUND_IOU = 0.1


@dataclass(frozen=True)
class Score:
    """A number per volume: its key in the JSON, its heading, what it is, and whether more of it is better."""

    key: str
    title: str
    definition: str
    higher_is_better: bool = True
    decimals: int = 3


_DICE = Score("dice", "Dice", "of all voxels of a volume")

OF_VESSELS = (
    _DICE,
    Score(
        "centre_line_recall",
        "centre-line recall",
        "share of the voxels of the exact centre lines that are predicted",
    ),
    Score(
        "cl_dice",
        "clDice",
        "harmonic mean of the share of the prediction's skeleton in the target and of the target's skeleton in "
        "the prediction (Shit et al. 2021), with scikit-image's skeletons",
    ),
    Score(
        "betti_0_error",
        "Betti-0 error",
        "absolute difference of the numbers of connected components in the prediction and in the target",
        higher_is_better=False,
        decimals=1,
    ),
    Score(
        "pieces",
        "pieces",
        "components of the prediction that overlap the target, which is one component",
        higher_is_better=False,
        decimals=1,
    ),
)

OF_LESIONS = (
    _DICE,
    Score(
        "found",
        "lesions found",
        f"share of the lesions with IoU > {FOUND_IOU} between the lesion and all predicted components that "
        "overlap it, among the voxels nearer to it than to another lesion",
    ),
    Score(
        "false",
        "false lesions",
        "components of the prediction that overlap no lesion",
        higher_is_better=False,
        decimals=1,
    ),
    *(
        Score(
            f"dice_{third}",
            f"Dice of the {third} third",
            f"mean over the {third} third of the lesions of the Dice among the voxels nearer to this lesion than "
            "to another (CC-Dice, Jaus et al. 2024)",
        )
        for third in ("largest", "middle", "smallest")
    ),
)


def scores_of_vessels(prediction: Mask, vessels: VesselTree) -> dict[str, float]:
    """Those in `OF_VESSELS`, of a prediction [X, Y, Z]."""
    target = vessels.labels > 0
    _, components = _components(target)
    predicted, pieces = _components(prediction)
    return {
        "dice": _dice(prediction, target),
        "centre_line_recall": _share(vessels.centre_lines > 0, prediction),
        "cl_dice": cl_dice(prediction, target),
        "betti_0_error": float(abs(pieces - components)),
        "pieces": float(len(np.unique(predicted[target & prediction]))),
    }


def cl_dice(prediction: Mask, target: Mask) -> float:
    """2PS / (P + S); P: share of the prediction's skeleton in the target, S: of the target's in it."""
    precision = _share(_skeleton(prediction), target)
    sensitivity = _share(_skeleton(target), prediction)
    both = precision + sensitivity
    return 2 * precision * sensitivity / both if both else 0.0


def scores_of_lesions(prediction: Mask, lesions: Lesions) -> dict[str, float]:
    """Those in `OF_LESIONS`, of a prediction [X, Y, Z]."""
    of_lesion = _Overlaps(prediction, lesions)
    hit = of_lesion.inside.sum(1)
    near = of_lesion.near.sum(1)
    touching = (of_lesion.near * (of_lesion.inside > 0)).sum(1)
    iou = hit / (of_lesion.sizes + touching - hit)
    own_dice = 2 * hit / (of_lesion.sizes + near)
    # By falling size, as they are numbered.
    largest, middle, smallest = (float(part.mean()) if len(part) else 0.0 for part in np.array_split(own_dice, 3))
    return {
        "dice": _dice(prediction, lesions.labels > 0),
        "found": float((iou > FOUND_IOU).mean()),
        "false": float((of_lesion.inside.sum(0) == 0).sum()),
        "dice_largest": largest,
        "dice_middle": middle,
        "dice_smallest": smallest,
    }


def marks_of_vessels(prediction: Mask, vessels: VesselTree) -> NDArray[np.uint8]:
    """What is predicted, components of it that overlap no vessel, and centre lines that are missed."""
    components, _ = _components(prediction)
    true = np.unique(components[vessels.labels > 0])
    marks = np.where(np.isin(components, true), RIGHT, FALSE).astype(np.uint8) * prediction
    marks[(vessels.centre_lines > 0) & ~prediction] = MISSED
    return marks


def marks_of_lesions(prediction: Mask, lesions: Lesions) -> NDArray[np.uint8]:
    """What is predicted, components of it that overlap no lesion, and lesions of which no voxel is predicted."""
    components, _ = _components(prediction)
    true = np.unique(components[lesions.labels > 0])
    marks = np.where(np.isin(components, true), RIGHT, FALSE).astype(np.uint8) * prediction
    hit = np.unique(lesions.numbers[prediction])
    marks[(lesions.labels > 0) & ~np.isin(lesions.numbers, hit)] = MISSED
    return marks


class _Overlaps:
    """Voxels of each lesion [L], and of each predicted component in it and nearest to it [L, components]."""

    def __init__(self, prediction: Mask, lesions: Lesions) -> None:
        components, count = _components(prediction)
        nearest = distance_transform_edt(lesions.numbers == 0, return_distances=False, return_indices=True)
        partition = lesions.numbers[tuple(nearest)]
        self.sizes = np.bincount(lesions.numbers.ravel())[1:]
        shape = (len(self.sizes), count)
        self.inside = _pairs(lesions.numbers, components, shape)
        self.near = _pairs(partition, components, shape)


def _pairs(rows: NDArray[np.int32], columns: NDArray[np.int64], shape: tuple[int, int]) -> NDArray[np.int64]:
    """How many voxels have each pair of numbers ≥ 1."""
    both = (rows > 0) & (columns > 0)
    flat = (rows[both] - 1) * shape[1] + columns[both] - 1
    return np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape)


def _components(mask: Mask) -> tuple[NDArray[np.int64], int]:
    """The 26-connected components, numbered from 1, and how many there are."""
    numbers, count = label(mask, connectivity=3, return_num=True)  # type: ignore[no-untyped-call]
    return numbers, int(count)


def _skeleton(mask: Mask) -> Mask:
    lines: Mask = skeletonize(mask) > 0  # type: ignore[no-untyped-call]
    return lines


def _share(of: Mask, among: Mask) -> float:
    """0 of nothing."""
    return float((of & among).sum() / max(1, of.sum()))


def _dice(prediction: Mask, target: Mask) -> float:
    _, foreground = label_sums(prediction.astype(np.uint8), target.astype(np.uint8), 2)
    return float(dice(foreground))


def projection(marks: NDArray[np.uint8]) -> list[str]:
    """The strongest mark along y, as a line of digits for each z, from the highest, with x from left to right."""
    seen = marks.max(1).T[::-1]
    return ["".join(map(str, row)) for row in seen.tolist()]


def unprojected(rows: Sequence[str]) -> NDArray[np.uint8]:
    """The picture [Z, X] that `projection` wrote."""
    return np.array([[int(mark) for mark in row] for row in rows], np.uint8)
