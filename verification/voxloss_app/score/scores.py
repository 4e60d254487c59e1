"""Score predicted label maps against references, from NIfTI files, by exact counts per class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

from voxloss_data.label_maps import LabelFile, LabelMapPair
from voxloss_data.text import printable, quoted
from voxloss_verify.oracle.sums import pair_counts
from voxloss_verify.workers import workers

Regions = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class ClassScore:
    """The overlap of prediction and reference in one class: counts in voxels, volumes in ml (1000 mm³).

    `label` is that of the class, or the name of a region.
    """

    label: int | str
    tp: int
    fp: int
    fn: int
    voxel_ml: float

    @property
    def dice(self) -> Fraction | None:
        """Dice = 2 TP / (2 TP + FP + FN); None if the class is in neither image."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> Fraction | None:
        """IoU = TP / (TP + FP + FN); None if the class is in neither image."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def prediction_ml(self) -> float:
        """Volume of the class in the prediction: TP + FP voxels."""
        return (self.tp + self.fp) * self.voxel_ml

    @property
    def reference_ml(self) -> float:
        """Volume of the class in the reference: TP + FN voxels."""
        return (self.tp + self.fn) * self.voxel_ml


@dataclass(frozen=True)
class PairScores:
    """The scores of a case, or the error, in one line."""

    case: LabelMapPair
    scores: list[ClassScore]
    error: str | None = None


def score_pair(
    prediction_path: str | os.PathLike[str],
    reference_path: str | os.PathLike[str],
    labels: Sequence[int] | None = None,
    ignore: int | None = None,
    regions: Regions | None = None,
) -> list[ClassScore]:
    """Count a predicted label map against its reference, both 3D NIfTI on the same grid.

    `labels` are the classes to score, by default all that occur in either image, without 0; or `regions`, each
    the union of its labels. A voxel whose reference is `ignore` counts as deleted, from both images.

    Raises ValueError that names the file if one cannot be read, is not 3D, has labels that are not whole numbers
    or are above those of all regions, which is an error in a loss, too; or if the shapes differ or the corners of
    the two volumes are more than `label_maps.TOLERANCE_MM` apart.
    """
    prediction, reference = LabelFile(Path(prediction_path)), LabelFile(Path(reference_path))
    prediction.require_grid_of(reference)
    counts = {
        (int(p), int(g)): voxels
        for (p, g), voxels in pair_counts(prediction.labels(), reference.labels()).items()
        if g != ignore
    }
    predicted: Counter[int] = Counter()
    wanted: Counter[int] = Counter()
    for (p, g), voxels in counts.items():
        predicted[p] += voxels
        wanted[g] += voxels
    found = sorted((predicted.keys() | wanted.keys()) - {0}) if labels is None else labels
    if regions is not None:
        _require_known(predicted, prediction_path, regions)
        _require_known(wanted, reference_path, regions)
    classes: list[tuple[int | str, Sequence[int]]] = [*(regions or {}).items()] or [(c, (c,)) for c in found]
    scores = []
    for name, members in classes:
        tp = sum(counts.get((p, g), 0) for p in members for g in members)
        p, g = (sum(of[label] for label in members) for of in (predicted, wanted))
        scores.append(ClassScore(name, tp, p - tp, g - tp, reference.voxel_ml))
    return scores


def _require_known(counts: Counter[int], path: str | os.PathLike[str], regions: Regions) -> None:
    largest = max(max(members) for members in regions.values())
    above = sorted(label for label, voxels in counts.items() if voxels and label > largest)
    if above:
        raise ValueError(
            f"{quoted(Path(path))}: expected labels 0…{largest}, the largest in a region, received {above[0]}. "
            f"Add it to a region, or leave out the voxels that have it in the reference: --ignore {above[0]}"
        )


def score_pairs(
    cases: Sequence[LabelMapPair],
    labels: Sequence[int] | None = None,
    ignore: int | None = None,
    jobs: int = 1,
    advance: Callable[[], object] = lambda: None,
    regions: Regions | None = None,
) -> list[PairScores]:
    """Score all cases, in their order, with up to `jobs` processes; `advance` is called after each.

    What cannot be scored is a result with an error. With more than one job, call it from the main thread.
    """
    score = partial(_score, labels=labels, ignore=ignore, regions=regions)
    results = []
    jobs = min(jobs, len(cases))
    if jobs <= 1:
        for case in cases:
            results.append(score(case))
            advance()
        return results
    with workers(jobs) as submit:
        futures = [submit(score, case) for case in cases]
        for case, future in zip(cases, futures, strict=True):
            try:
                results.append(future.result())
            except BrokenProcessPool:
                error = f"{quoted(case.prediction)}: a process died, perhaps for want of memory; try fewer jobs"
                results.append(PairScores(case, [], error))
            advance()
    return results


def _score(
    case: LabelMapPair, labels: Sequence[int] | None, ignore: int | None, regions: Regions | None
) -> PairScores:
    try:
        return PairScores(case, score_pair(case.prediction, case.reference, labels, ignore, regions))
    except ValueError as error:
        return PairScores(case, [], printable(str(error)))


def _ratio(numerator: int, denominator: int) -> Fraction | None:
    return Fraction(numerator, denominator) if denominator else None
