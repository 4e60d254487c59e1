"""One run of a study: a network, trained with one loss on one split with one seed, and its held-out scores."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance
from monai.utils import set_determinism
from numpy.typing import NDArray
from torch import nn

from voxloss_app.study.contenders import Contender
from voxloss_app.train.network import Steps, network_of
from voxloss_app.train.plan import Plan
from voxloss_app.train.prediction import predicted_classes
from voxloss_app.train.volumes import ScanDataset, batches, training_patches
from voxloss_data.label_maps import LabelFile
from voxloss_data.nifti import open_image
from voxloss_data.training_sets import Scan, training_set
from voxloss_verify.oracle.sums import label_sums
from voxloss_verify.threads import torch_threads


@dataclass(frozen=True)
class Structure:
    """One class in one held-out scan: voxels, and the 95th percentile of the Hausdorff distance in mm.

    Attributes:
        hd95: None if the class is missing in the prediction or in the reference.
    """

    tp: int
    fp: int
    fn: int
    hd95: float | None


@dataclass(frozen=True)
class StudyRun:
    """What a run has found.

    Attributes:
        losses: at each step, before the weights change.
        scans: by the name of a held-out scan, a `Structure` for each foreground class.
        failed: why there are no scores; None if there are.
    """

    contender: Contender
    fold: int
    seed: int
    losses: list[float]
    scans: Mapping[str, list[Structure]]
    failed: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        scans = {
            name: [[each.tp, each.fp, each.fn, each.hd95] for each in found] for name, found in self.scans.items()
        }
        return {**vars(self), "contender": vars(self.contender), "scans": scans}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> StudyRun:
        """From plain data. Raises KeyError or TypeError if it is not what `to_json` wrote."""
        scans = {name: [Structure(*each) for each in found] for name, found in content["scans"].items()}
        return cls(**{**content, "contender": Contender(**content["contender"]), "scans": scans})


@torch_threads(1)
def run(data: Path, plan: Plan, contender: Contender, fold: int, device: str) -> StudyRun:
    """Train on the plan's training scans, predict its validation scans on their own grids, and score them.

    Weights, order and random crops follow from the plan's seed, so that all contenders start from the same
    network and see the same batches. On a CPU one thread computes: the numbers do not depend on how many runs
    there are at once. A loss that does not stay finite is a run that failed.
    """
    training, held_out = plan.scans(_scans(data))
    # The patches are the same for any seed; what is random about them follows from torch's seed.
    patches = _patches(tuple(training), _Frozen(replace(plan, seed=0)))
    losses: list[float] = []

    def found(scans: Mapping[str, list[Structure]], failed: str | None = None) -> StudyRun:
        return StudyRun(contender, fold, plan.seed, losses, scans, failed)

    set_determinism(plan.seed)
    place = torch.device(device)
    network = network_of(plan).to(place)
    steps = Steps(plan, network, contender.criterion(), place, plan.epochs * plan.epoch_steps)
    for epoch in range(plan.epochs):
        set_determinism(plan.seed + 1 + epoch)
        for batch in batches(patches, plan):
            loss = float(steps.take(batch["image"].to(place), batch["label"].to(place), len(losses)))
            if not math.isfinite(loss):
                return found({}, f"the loss was {loss} at step {len(losses) + 1}")
            losses.append(loss)
    try:
        return found({scan.name: _scored(network, scan, plan, place) for scan in held_out})
    except ValueError as error:
        return found({}, str(error))


@dataclass(frozen=True, eq=False)
class _Frozen:
    """A plan as the key of a cache."""

    plan: Plan

    def __hash__(self) -> int:
        return hash(self.plan.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self.plan.digest == other.plan.digest


@lru_cache(maxsize=1)
def _scans(data: Path) -> Any:
    return training_set(data)


@lru_cache(maxsize=1)  # runs of one fold follow each other
def _patches(training: tuple[Scan, ...], frozen: _Frozen) -> ScanDataset:
    return training_patches(training, frozen.plan, cache=1.0)


def _scored(network: nn.Module, scan: Scan, plan: Plan, device: torch.device) -> list[Structure]:
    prediction = predicted_classes(network, scan.image, plan, device)
    labels = LabelFile(scan.label).labels()
    reference = np.zeros(labels.shape, np.int64)
    for c, label in enumerate(plan.labels):
        reference[labels == label] = c
    spacing = [float(edge) for edge in open_image(scan.image)[0].spacing]
    sums = label_sums(prediction, reference, len(plan.labels))
    distances = hausdorff_95(prediction, reference, len(plan.labels), spacing)
    return [
        Structure(
            int(of.intersection), int(of.prediction - of.intersection), int(of.target - of.intersection), hd
        )
        for of, hd in zip(sums[1:], distances, strict=True)
    ]


def hausdorff_95(
    prediction: NDArray[np.int64], reference: NDArray[np.int64], classes: int, spacing: list[float]
) -> list[float | None]:
    """MONAI's distance in mm for each foreground class; None where either side has none of it."""
    sides = [
        torch.nn.functional.one_hot(torch.from_numpy(side), classes).movedim(-1, 0)[None]
        for side in (prediction, reference)
    ]
    there = [bool(p.any() and g.any()) for p, g in zip(sides[0][0, 1:], sides[1][0, 1:], strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class that is not there
        found = compute_hausdorff_distance(sides[0], sides[1], percentile=95, spacing=spacing)[0].tolist()
    return [float(distance) if defined else None for distance, defined in zip(found, there, strict=True)]
