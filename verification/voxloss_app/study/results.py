"""The numbers of a study, as a file from which page and pictures are made, and what is computed from them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from voxloss_app.study.contenders import BASELINE, MONAI, VOXLOSS, Contender, chosen
from voxloss_app.study.cost import Cost
from voxloss_app.study.run import Structure, StudyRun
from voxloss_data.files import save_text

FILE = "evidence.json"
SCHEMA = 1


@dataclass(frozen=True)
class Score:
    """A measure of one class in one scan, None where it is undefined.

    Attributes:
        key: in evidence.json.
        definition: of TP, FP and FN in voxels.
    """

    key: str
    title: str
    decimals: int
    definition: str
    of: Callable[[Structure], float | None]
    higher_is_better: bool = True


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


DICE = Score("dice", "Dice", 3, "2 TP / (2 TP + FP + FN)", lambda s: _share(2 * s.tp, 2 * s.tp + s.fp + s.fn))
IOU = Score("iou", "IoU", 3, "TP / (TP + FP + FN)", lambda s: _share(s.tp, s.tp + s.fp + s.fn))
PRECISION = Score("precision", "precision", 3, "TP / (TP + FP)", lambda s: _share(s.tp, s.tp + s.fp))
RECALL = Score("recall", "recall", 3, "TP / (TP + FN)", lambda s: _share(s.tp, s.tp + s.fn))
HD95 = Score(
    "hd95",
    "HD95, mm",
    2,
    "the 95th percentile of the Hausdorff distance, MONAI's `compute_hausdorff_distance(percentile=95)`, where "
    "both prediction and reference have the class",
    lambda s: s.hd95,
    higher_is_better=False,
)
SCORES = (DICE, IOU, PRECISION, RECALL, HD95)
MISSED = "missed"


@dataclass(frozen=True)
class Result:
    """What one run adds to a study.

    Attributes:
        by_class: by the name of a foreground class, the mean over the held-out scans of each score that is
            defined there, by its key, and the number of scans in which the class was there and nothing of it was
            found. Empty if the run failed.
        losses: at each step; only of runs that are compared step by step.
    """

    contender: Contender
    fold: int
    seed: int
    by_class: Mapping[str, Mapping[str, float]]
    losses: Sequence[float] = ()
    failed: str | None = None

    def mean(self, score: Score) -> float:
        """The mean over the classes; NaN of a run that failed."""
        values = [of_class[score.key] for of_class in self.by_class.values() if score.key in of_class]
        return fmean(values) if values else math.nan


def result_of(run: StudyRun, classes: Sequence[str], with_losses: bool) -> Result:
    """The means of a run."""
    by_class: dict[str, dict[str, float]] = {}
    for number, name in enumerate(classes if run.failed is None else ()):
        structures = [found[number] for found in run.scans.values()]
        by_class[name] = {}
        for score in SCORES:
            values = [value for each in structures if (value := score.of(each)) is not None]
            if values:
                by_class[name][score.key] = fmean(values)
        by_class[name][MISSED] = sum(each.tp == 0 < each.fn for each in structures)
    return Result(
        run.contender, run.fold, run.seed, by_class, tuple(run.losses) if with_losses else (), run.failed
    )


@dataclass(frozen=True)
class Interval:
    """A mean, its standard deviation over runs, and half the width of its 95 % confidence interval."""

    mean: float
    deviation: float
    half: float

    @property
    def differs(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half


@dataclass(frozen=True)
class Study:
    """All runs of a study.

    Attributes:
        command: that repeats it.
        facts: about the data and the network, by name.
        folds: of the cross-validation; the fraction of the scans that is held out is one over it.
    """

    command: str
    date: str
    machine: Mapping[str, str]
    versions: Mapping[str, str | None]
    commit: str | None
    facts: Mapping[str, Any]
    folds: int
    results: Sequence[Result]
    costs: Sequence[Cost]

    @property
    def contenders(self) -> list[Contender]:
        """Ours, in the order of the table."""
        there = {each.contender.name for each in self.results if each.contender.library == VOXLOSS}
        return [each for each in chosen(None) if each.name in there]

    @property
    def peers(self) -> list[Contender]:
        """MONAI's, in the order of their runs."""
        found = {r.contender.name: r.contender for r in self.results if r.contender.library == MONAI}
        return [*found.values()]

    @property
    def seeds(self) -> list[int]:
        """In rising order."""
        return sorted({each.seed for each in self.results})

    def runs(self, name: str, library: str = VOXLOSS) -> list[Result]:
        """Those of a contender, by seed and fold."""
        found = [r for r in self.results if (r.contender.name, r.contender.library) == (name, library)]
        return sorted(found, key=lambda r: (r.seed, r.fold))

    def values(self, name: str, score: Score, library: str = VOXLOSS) -> list[float]:
        """The mean over classes, of each run that did not fail."""
        return [value for r in self.runs(name, library) if not math.isnan(value := r.mean(score))]

    def difference(
        self, name: str, score: Score, other: str = BASELINE, library: str = VOXLOSS, other_library: str = VOXLOSS
    ) -> Interval | None:
        """Of the runs with the same fold and seed; None of fewer than two.

        The runs share scans, so that the standard error is that of Nadeau and Bengio 2003 (Machine Learning 52,
        eq. 8): σ² (1/n + held-out scans / training scans) in place of σ²/n.
        """
        theirs = {(r.seed, r.fold): r.mean(score) for r in self.runs(other, other_library)}
        pairs = [(r.mean(score), theirs.get((r.seed, r.fold), math.nan)) for r in self.runs(name, library)]
        differences = [own - its for own, its in pairs if not math.isnan(own - its)]
        if len(differences) < 2:
            return None
        deviation, n = stdev(differences), len(differences)
        error = deviation * math.sqrt(1 / n + 1 / (self.folds - 1))
        return Interval(fmean(differences), deviation, float(student.ppf(0.975, n - 1)) * error)

    def by_class(self, name: str, of_class: str, key: str, library: str = VOXLOSS) -> list[float]:
        """A score of one class, of each run that did not fail."""
        runs = [r.by_class[of_class] for r in self.runs(name, library) if r.failed is None]
        return [scores[key] for scores in runs if key in scores]

    def save(self, path: Path) -> None:
        """Write evidence.json, atomically: a line for each run."""
        facts = {name: value for name, value in vars(self).items() if name not in ("results", "costs")}
        lists = {
            "results": [{**vars(result), "contender": vars(result.contender)} for result in self.results],
            "costs": [cost.to_json() for cost in self.costs],
        }
        lines = [
            f"{json.dumps(name)}: {json.dumps(value)}" for name, value in ({"schema": SCHEMA} | facts).items()
        ]
        lines += [f"{json.dumps(name)}: [\n{_lines(rows)}\n]" for name, rows in lists.items()]
        save_text(path, "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> Study:
        """Read evidence.json. Raises ValueError that names it if it is damaged or of another version."""
        try:
            content = json.loads(path.read_bytes())
            if content.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            results = [*map(_result, content.pop("results"))]
            costs = [*map(Cost.from_json, content.pop("costs"))]
            return cls(results=results, costs=costs, **content)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{path}: expected a study as this version writes it, received {reason}. Repeat `voxloss study`"
            ) from error


def mean_and_sd(values: Sequence[float], score: Score) -> str:
    """Mean ± standard deviation (n − 1); of one value its number, of none a dash."""
    if not values:
        return "–"
    mean = f"{fmean(values):.{score.decimals}f}"
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.{score.decimals}f}"


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return ",\n".join(map(json.dumps, rows))


def _result(content: dict[str, Any]) -> Result:
    return Result(**{**content, "contender": Contender(**content["contender"])})
