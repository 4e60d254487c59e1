"""The plan of a training run: the request, completed from the scans."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from voxloss_app.names import LOSSES
from voxloss_app.train.rules import LARGEST_LABEL, PLAN, REQUEST
from voxloss_data.files import save_json
from voxloss_data.label_maps import LabelFile
from voxloss_data.nifti import ImageFile, open_image
from voxloss_data.training_sets import Scan, TrainingSet, training_set
from voxloss_verify.request import MAX_CLASSES

FILE = "plan.json"
# Hounsfield units of soft tissue: from fat to contrast agent.
SOFT_TISSUE = (-175.0, 250.0)
# No tissue, in an MRI, is as dark as this in arbitrary units; air, in a CT, is -1000.
DARKEST_MRI = -200.0
LARGEST_PATCH = 96
# What a run that goes on may change: how far it goes, and what it shows on the way.
FREE = ("epochs", "validate_every")
# Arguments of a loss that follow from what is trained.
TAKEN = (
    "softmax",
    "use_softmax",
    "sigmoid",
    "other_act",
    "to_onehot_y",
    "ignore_index",
    "regions",
    "group",
    "shard",
)
START_OVER = "Start over with `voxloss train --fresh`, or in another --out"


@dataclass(frozen=True)
class TrainRequest:
    """The options of `voxloss train`; None is for what follows from the scans."""

    data: Path
    out: Path
    loss: str = "dice-ce"
    loss_kwargs: Mapping[str, Any] = field(default_factory=dict)
    modality: str | None = None
    window: tuple[float, float] | None = None
    spacing: tuple[float, float, float] | None = None
    patch: tuple[int, int, int] | None = None
    width: int = 16
    epochs: int = 100
    patches: int = 4
    batch: int = 2
    learning_rate: float = 1e-3
    validation: float = 0.2
    validate_every: int | None = None
    ignore: int | None = None
    regions: Mapping[str, Sequence[int]] | None = None
    max_classes: int = MAX_CLASSES
    precision: str = "auto"
    workers: int = 0
    cache: float = 1.0
    seed: int = 0
    device: str = "auto"
    fresh: bool = False


@dataclass(frozen=True)
class Plan:
    """All that decides which network comes out; two runs of one plan on one machine give the same.

    Class c is the label `labels[c]` of the files, and the network has a channel for each; or for each of the
    `regions`, unions of labels that may overlap. Voxels with the label `ignored` do not count.
    """

    loss: str
    loss_kwargs: dict[str, Any]
    labels: list[int]
    class_names: list[str]
    regions: dict[str, list[int]] | None
    ignored: int | None
    channels: int
    modality: str
    window: list[float] | None
    spacing: list[float]
    patch: list[int]
    width: int
    depth: int
    epochs: int
    patches: int
    batch: int
    learning_rate: float
    validate_every: int
    precision: str
    workers: int
    seed: int
    training: list[str]
    validation: list[str]

    def save(self, folder: Path) -> None:
        """Write plan.json."""
        save_json(folder / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read plan.json; raises ValueError that names it if it is damaged."""
        path = folder / FILE
        if not path.exists():
            raise ValueError(
                f"expected a folder that `voxloss train` has written, received no {FILE} in {folder}. "
                "Choose another"
            )
        try:
            if not path.is_file():
                raise ValueError("no regular file")
            facts = json.loads(path.read_bytes())
            if not isinstance(facts, dict):
                raise ValueError(f"{type(facts).__name__}, no object")
            plan = cls(**facts)
            for name, rule in PLAN.items():
                rule.require(name, facts[name])
            plan._require_consistent()
        except (TypeError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path}: expected a plan of this version of voxloss, received: {reason}. {START_OVER}"
            ) from error
        return plan

    def _require_consistent(self) -> None:
        step = _step(self.depth)
        for name, expected, holds in (
            ("class_names", f"{len(self.labels)} names", len(self.class_names) == len(self.labels)),
            (
                "regions",
                "some of the labels",
                {*self.labels}.issuperset(label for region in (self.regions or {}).values() for label in region),
            ),
            ("ignored", "none of the labels", self.ignored not in self.labels),
            ("window", "null", self.window is None or self.modality == "ct"),
            ("patch", f"multiples of {step}", not _misfit(self.patch, step)),
            ("validation", "none of the scans that train", not {*self.training} & {*self.validation}),
        ):
            if not holds:
                raise ValueError(f"{name}: expected {expected}, received {getattr(self, name)}")

    @property
    def channel_names(self) -> list[str]:
        """A name for each channel of the network: of a class or of a region."""
        return self.class_names if self.regions is None else [*self.regions]

    @property
    def classes_of_regions(self) -> list[list[int]]:
        """For each region its classes."""
        return [[self.labels.index(label) for label in region] for region in (self.regions or {}).values()]

    @property
    def step_patches(self) -> int:
        """Patches of an optimiser step: a batch, or all of an epoch if they are fewer."""
        return min(self.batch, len(self.training) * self.patches)

    @property
    def epoch_steps(self) -> int:
        """Optimiser steps of an epoch."""
        return len(self.training) * self.patches // self.step_patches

    @property
    def digest(self) -> str:
        """A hash of all but `FREE`."""
        facts = {name: value for name, value in asdict(self).items() if name not in FREE}
        return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def require_same(self, other: Plan, folder: Path) -> None:
        """Raise ValueError unless the other plan, of a run that is to go on, is this one, but for `FREE`."""
        mine, theirs = asdict(self), asdict(other)
        different = [name for name in mine if name not in FREE and mine[name] != theirs[name]]
        if different:
            what = "; ".join(f"{name} was {theirs[name]}, is {mine[name]}" for name in different)
            raise ValueError(
                f"{folder} holds a run with other settings ({what}). Choose another --out, restore the "
                "settings, or start over with --fresh."
            )

    def scans(self, found: TrainingSet) -> tuple[list[Scan], list[Scan]]:
        """The scans that train, and those that validate."""
        by_name = {scan.name: scan for scan in found.scans}
        return [by_name[name] for name in self.training], [by_name[name] for name in self.validation]


@dataclass
class _Seen:
    """The content of the headers and label maps of the scans."""

    channels: int
    images: list[ImageFile]  # of the first channel
    labels: list[int]
    darkest: float | None  # the darkest voxel of the first image, if it decides the modality


def make_plan(request: TrainRequest, advance: Callable[[int, int], object] = lambda done, total: None) -> Plan:
    """Look at the scans and decide.

    `advance` gets how many scans of how many have been read, each to its end. Raises ValueError that names the
    option or the file for what cannot be.
    """
    for name, rule in REQUEST.items():
        if getattr(request, name) is not None:
            rule.require(f"--{name.replace('_', '-')}", getattr(request, name))
    taken = sorted({*request.loss_kwargs} & {*TAKEN})
    if taken:
        raise ValueError(
            f"--loss-kwargs: expected none of {', '.join(TAKEN)}, which are set here, received {taken[0]}"
            + (". Use --ignore LABEL" if taken[0] == "ignore_index" else "")
        )
    found = training_set(request.data)
    seen = _look_at(found, request, advance)
    ignored = found.ignored if request.ignore is None else request.ignore
    regions = dict(found.regions if request.regions is None else request.regions)
    of_regions = {label for region in regions.values() for label in region}
    if ignored in of_regions:
        raise ValueError(f"--regions: expected labels that are not ignored, received {ignored}, as --ignore")
    labels = sorted({*seen.labels, *found.class_names, *of_regions, 0} - {ignored})
    if len(labels) < 2:
        raise ValueError(
            f"{request.data}: expected labels beside 0, received {seen.labels} in {len(found.scans)} files"
        )
    if labels[0] < 0:
        raise ValueError(
            f"{request.data}: expected labels ≥ 0, received {labels[0]}. If it marks voxels without annotation, "
            f"set --ignore {labels[0]}"
        )
    if max(labels) > LARGEST_LABEL:
        raise ValueError(f"{request.data}: expected labels up to {LARGEST_LABEL}, received {max(labels)}")
    modality = request.modality or _modality(found, seen.darkest, request.data)
    spacing = request.spacing or tuple(
        float(v) for v in np.median([image.spacing for image in seen.images], axis=0)
    )
    for image in seen.images:
        image.require_resampled(spacing)
    size = np.median([image.extent / spacing for image in seen.images], axis=0)
    patch = request.patch or tuple(max(16, int(min(edge, LARGEST_PATCH)) // 16 * 16) for edge in size)
    depth = 5 if max(patch) >= 64 else 4
    step = _step(depth)
    if _misfit(patch, step):
        fit = tuple(max(1, round(edge / step)) * step for edge in patch)
        near = (
            f"like {' '.join(map(str, fit))}" if max(fit) > step else f"at least one of them {2 * step} or more"
        )
        raise ValueError(
            f"--patch: expected multiples of {step}, {near}, received {' '.join(map(str, patch))}: the network "
            f"halves a patch {depth - 1} times"
        )
    training, validation = _split(found.scans, request.validation, request.seed)
    return Plan(
        loss=LOSSES[request.loss],
        loss_kwargs=dict(request.loss_kwargs),
        labels=labels,
        class_names=[found.class_names.get(label, str(label)) for label in labels],
        regions={name: list(region) for name, region in regions.items()} or None,
        ignored=ignored,
        channels=seen.channels,
        modality=modality,
        window=list(request.window or SOFT_TISSUE) if modality == "ct" else None,
        spacing=list(spacing),
        patch=list(patch),
        width=request.width,
        depth=depth,
        epochs=request.epochs,
        patches=request.patches,
        batch=request.batch,
        learning_rate=request.learning_rate,
        validate_every=request.validate_every or max(1, request.epochs // 10),
        precision=request.precision,
        workers=request.workers,
        seed=request.seed,
        training=training,
        validation=validation,
    )


def _step(depth: int) -> int:
    """What the edges of a patch are multiples of: the network halves them on each level but the first."""
    return int(2 ** (depth - 1))


def _misfit(patch: Sequence[int], step: int) -> bool:
    """Whether the network cannot halve a patch so often, or is left with one voxel."""
    return any(edge % step for edge in patch) or max(patch) <= step


def _look_at(found: TrainingSet, request: TrainRequest, advance: Callable[[int, int], object]) -> _Seen:
    seen = _Seen(0, [], [], None)
    labels: set[int] = set()
    scans = found.scans
    for done, scan in enumerate(scans, start=1):
        reference = LabelFile(scan.label)
        files = open_image(scan.image)
        for file in files:
            file.require_grid_near(reference)
        if done == 1 and request.modality is None and not found.modalities:
            seen.darkest = float(files[0].voxels().min())
        channels = sum(file.channels for file in files)
        if seen.channels not in (0, channels):
            raise ValueError(
                f"{scan.image[0]}: expected {seen.channels} channels as in {scans[0].image[0]}, received "
                f"{channels}"
            )
        seen.channels = channels
        seen.images.append(files[0])
        own = {*map(int, np.unique(reference.labels()))}
        labels |= own
        if len(labels) > request.max_classes:
            raise ValueError(
                f"{scan.label}: expected a label map, and at most {request.max_classes} labels in all of them, "
                f"received {len(labels)}, as in an image. If they are labels, set --max-classes {len(labels)}"
            )
        known = {0, *found.class_names, found.ignored if request.ignore is None else request.ignore}
        if found.class_names and not own <= known:
            unknown, named = min(own - known), ", ".join(map(str, sorted(found.class_names)))
            raise ValueError(
                f"{scan.label}: expected the labels that dataset.json names, {named}, received {unknown}. "
                f"Add it there, or set --ignore {unknown} to leave out its voxels"
            )
        advance(done, len(scans))
    seen.labels = sorted(labels)
    return seen


def _modality(found: TrainingSet, darkest: float | None, data: Path) -> str:
    kinds = {"ct" if name.strip().lower() == "ct" else "mr" for name in found.modalities}
    if len(kinds) > 1:
        raise ValueError(
            f"{data}: expected channels of one kind, received {', '.join(found.modalities)}. "
            "Set --modality mr to normalise all of them to mean 0 and standard deviation 1."
        )
    return kinds.pop() if darkest is None else "ct" if darkest < DARKEST_MRI else "mr"


def _split(scans: Sequence[Scan], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    names = [scan.name for scan in scans]
    random.Random(seed).shuffle(names)
    count = 0 if fraction == 0 else max(1, round(fraction * len(names)))
    if count >= len(names):
        raise ValueError(
            f"--validation: expected a fraction that leaves scans for training, received {count} of {len(names)} "
            "for validation. --validation 0 trains on all"
        )
    return sorted(names[count:]), sorted(names[:count])
