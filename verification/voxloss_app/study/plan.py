"""What a study runs: its request, the splits of the scans, and one line per run."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from voxloss_app.finished import digest
from voxloss_app.study.contenders import Contender, chosen, peers_of
from voxloss_app.train.plan import Plan, TrainRequest, make_plan
from voxloss_data.json_fields import Field
from voxloss_data.training_sets import training_set

# What the network comes out of is the plan; these versions change what it computes.
OF_RESULTS = ("voxloss", "torch", "MONAI")


@dataclass(frozen=True)
class StudyRequest:
    """The options of `voxloss study`.

    Attributes:
        losses: names as on the command line; None: all that need labels only.
        folds: of the cross-validation, at least 2.
        scans: use so many of them; None: all.
        jobs: processes, each with one run at a time.
    """

    data: Path
    out: Path
    losses: Sequence[str] | None = None
    folds: int = 3
    seeds: int = 3
    epochs: int = 5
    scans: int | None = None
    width: int = 16
    batch: int = 2
    jobs: int = 1
    device: str = "cpu"
    fresh: bool = False


@dataclass(frozen=True)
class Task:
    """One run that is to be done, and the name under which it is kept."""

    contender: Contender
    fold: int
    plan: Plan
    name: str

    @property
    def title(self) -> str:
        """On the terminal."""
        return f"{self.contender.title}, fold {self.fold + 1}, seed {self.plan.seed}"


@dataclass(frozen=True)
class StudyPlan:
    """All runs, in their order, and what they have in common.

    Attributes:
        common: the plan of the network; its scans are those of no fold.
        facts: about data and network, for the page.
    """

    common: Plan
    contenders: Sequence[Contender]
    peers: Sequence[Contender]
    tasks: Sequence[Task]
    facts: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        """The names of the foreground classes."""
        return self.common.class_names[1:]


def study_plan(
    request: StudyRequest,
    versions: dict[str, str | None],
    advance: Callable[[int, int], object] = lambda done, total: None,
) -> StudyPlan:
    """Look at the scans, and list the runs seed by seed and fold by fold: an early end leaves comparisons.

    MONAI's losses run on the first fold only: what they are compared for is the same on any. Raises ValueError
    that names the option or the file for what cannot be.
    """
    try:
        contenders = chosen(request.losses)
    except ValueError as error:
        raise ValueError(f"--losses: {error}") from error
    common = make_plan(
        TrainRequest(
            data=request.data,
            out=request.out,
            validation=0,
            epochs=request.epochs,
            width=request.width,
            batch=request.batch,
        ),
        advance,
    )
    if common.regions is not None or common.ignored is not None:
        what = "regions" if common.regions is not None else f"the ignored label {common.ignored}"
        raise ValueError(
            f"--data: expected label maps of mutually exclusive classes, as not all losses have {what}, received "
            f"a dataset.json with {what}. Use a copy of the folder without that entry"
        )
    names = sorted(common.training)
    random.Random(0).shuffle(names)
    names = names[: request.scans]
    if len(names) < request.folds:
        raise ValueError(f"--folds: expected at most the number of scans, {len(names)}, received {request.folds}")
    peers = peers_of(contenders)
    tasks = []
    content = _content(request.data, names)
    for seed in range(request.seeds):
        for fold in range(request.folds):
            held_out = sorted(names[fold :: request.folds])
            training = sorted({*names} - {*held_out})
            plan = replace(common, seed=seed, training=training, validation=held_out)
            for contender in [*contenders, *(peers if fold == 0 else ())]:
                facts = [vars(contender), asdict(plan), request.device, content]
                depends_on = digest([facts, {name: versions.get(name) for name in OF_RESULTS}])[:16]
                words = "".join(c if c.isalnum() else "-" for c in f"{contender.library}-{contender.name}")
                tasks.append(Task(contender, fold, plan, f"{words}-{fold}-{seed}-{depends_on}"))
    return StudyPlan(common, contenders, peers, tasks, _facts(request, tasks[0].plan, len(names)))


def _content(data: Path, names: Sequence[str]) -> list[Any]:
    """The sizes of the files: other scans under the same names should not pass for these."""
    found = {scan.name: scan for scan in training_set(data).scans}
    return [[path.stat().st_size for path in (*found[name].image, found[name].label)] for name in sorted(names)]


def _facts(request: StudyRequest, first: Plan, scans: int) -> dict[str, Any]:
    description = request.data / "dataset.json"
    fields = Field.of_file(description).object() if description.exists() else {}
    known = {key: fields[key].text() for key in ("name", "description", "licence", "license") if key in fields}
    return {
        "data": known.get("name", request.data.resolve().name),
        "description": known.get("description", ""),
        "licence": known.get("licence", known.get("license", "")),
        "scans": scans,
        "classes": first.class_names[1:],
        "channels": first.channels,
        "spacing": first.spacing,
        "patch": first.patch,
        "batch": first.batch,
        "width": first.width,
        "depth": first.depth,
        "epochs": first.epochs,
        "steps": first.epochs * first.epoch_steps,
        "learning_rate": first.learning_rate,
    }
