"""The numbers of trials, as a file from which table, page and pictures are made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from voxloss_app.trial.scores import Score
from voxloss_app.trial.tasks import BASELINE, TASKS, Task
from voxloss_app.trial.training import Settings, TrialRun
from voxloss_data.files import save_json

FILE = "trials.json"
SCHEMA = 1


@dataclass(frozen=True)
class Trial:
    """All losses and seeds on one task.

    Attributes:
        command: that repeats it.
        truth: ground truth of the first held-out volume as `scores.projection` has it.
    """

    task: Task
    command: str
    versions: Mapping[str, str]
    settings: Settings
    truth: Sequence[str]
    runs: Sequence[TrialRun]

    @property
    def losses(self) -> list[str]:
        """In the order of the task's table."""
        found = {run.loss for run in self.runs}
        return [loss for loss in self.task.contenders if loss in found]

    @property
    def seeds(self) -> list[int]:
        """In rising order."""
        return sorted({run.seed for run in self.runs})

    def by_seed(self, loss: str, score: Score) -> list[float]:
        """The mean over the held-out volumes, for each seed."""
        runs = {run.seed: run for run in self.runs if run.loss == loss}
        return [fmean(volume[score.key] for volume in runs[seed].volumes) for seed in self.seeds]

    def differences(self, loss: str, score: Score) -> list[float]:
        """Loss minus baseline for each seed: the same data, initial weights and batches."""
        pairs = zip(self.by_seed(loss, score), self.by_seed(BASELINE, score), strict=True)
        return [own - other for own, other in pairs]

    def better(self, loss: str, score: Score) -> int:
        """In how many seeds the loss is better than the baseline."""
        sign = 1 if score.higher_is_better else -1
        return sum(sign * difference > 0 for difference in self.differences(loss, score))

    def worse(self, loss: str, score: Score) -> int:
        """In how many seeds the loss is worse than the baseline."""
        sign = 1 if score.higher_is_better else -1
        return sum(sign * difference < 0 for difference in self.differences(loss, score))


def spread(values: Sequence[float], score: Score, signed: bool = False) -> str:
    """Mean ± standard deviation (n − 1) over the seeds; of one seed its number."""
    mean = f"{fmean(values):{'+' if signed else ''}.{score.decimals}f}".replace("-", "−")
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.{score.decimals}f}"


def run_to_json(run: TrialRun) -> dict[str, Any]:
    """A run as plain data."""
    return asdict(run)


def run_from_json(content: Mapping[str, Any]) -> TrialRun:
    """A run from plain data. Raises KeyError or TypeError if it is not what `run_to_json` wrote."""
    return TrialRun(**content)


def load(path: Path) -> list[Trial]:
    """The trials in a file, in the order of `TASKS`; none if there is no file.

    Raises ValueError if it is damaged, or of another version of voxloss.
    """
    try:
        content = json.loads(path.read_bytes())
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}")
        return [_from_json(TASKS[name], content["trials"][name]) for name in TASKS if name in content["trials"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path}: expected trials as this version writes them, received {reason}. Move the file away"
        ) from error


def save(path: Path, trials: Sequence[Trial]) -> None:
    """Write trials, atomically."""
    save_json(path, {"schema": SCHEMA, "trials": {trial.task.name: _to_json(trial) for trial in trials}})


def _to_json(trial: Trial) -> dict[str, Any]:
    return {
        "command": trial.command,
        "versions": dict(trial.versions),
        "settings": asdict(trial.settings),
        "truth": list(trial.truth),
        "runs": [run_to_json(run) for run in trial.runs],
    }


def _from_json(task: Task, content: Mapping[str, Any]) -> Trial:
    return Trial(
        task=task,
        command=content["command"],
        versions=content["versions"],
        settings=Settings(**content["settings"]),
        truth=content["truth"],
        runs=[run_from_json(run) for run in content["runs"]],
    )
