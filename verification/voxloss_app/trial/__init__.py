"""`voxloss trial`: train the same network with several losses on generated volumes, and compare what they find.

One room per job: `tasks` the data and the contenders, `training` the loop, `scores` the metrics, `results` the
numbers, `page` and `picture` what is made of them.
"""

from __future__ import annotations

import logging
import platform
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import voxloss
import voxloss_data.structures
from voxloss_app.exits import ExitCode
from voxloss_app.finished import Finished, digest, interrupted
from voxloss_app.terminal import is_quiet, progress_bar, results_console
from voxloss_app.trial import page, scores, tasks, training
from voxloss_app.trial.picture import file_name, picture_png
from voxloss_app.trial.results import FILE, Trial, load, run_from_json, run_to_json, save, spread
from voxloss_app.trial.scores import projection
from voxloss_app.trial.tasks import BASELINE, TASKS, Task, chosen
from voxloss_app.trial.training import Settings, TrialRun, held_out_volumes, run
from voxloss_data.files import save_bytes, save_text

__all__ = ["Settings", "TrialRequest", "hold_trial"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialRequest:
    """The options of `voxloss trial`; `losses` None means all of the task."""

    task: str
    settings: Settings
    seeds: int
    losses: Sequence[str] | None
    out: Path
    fresh: bool = False


def hold_trial(request: TrialRequest) -> int:
    """Run every loss with every seed, and write trials.json, trials.md and the task's picture to `out`.

    Runs that are finished are kept in a folder beside `out`. What an earlier trial of another task has left in
    trials.json stays. Returns the exit code: 0, or 130 after Ctrl-C, when nothing but finished runs is written.
    Raises ValueError for losses that the task does not have, and for a trials.json that cannot be read.
    """
    task = TASKS[request.task]
    losses = chosen(task, request.losses)
    earlier = [trial for trial in load(request.out / FILE) if trial.task is not task]
    request.out.mkdir(parents=True, exist_ok=True)
    console = results_console()
    kept = Finished(request.out, "trial")
    runs: list[TrialRun] = []
    try:
        runs.extend(_all_runs(request, task, losses, kept, console))
    except KeyboardInterrupt:
        console.print(interrupted(len(runs), len(losses) * request.seeds, "runs", kept))
        return ExitCode.INTERRUPTED
    truth = held_out_volumes(task, request.settings)[0]
    trial = Trial(
        task=task,
        command=_command(request, task, losses),
        versions=_versions(),
        settings=request.settings,
        truth=projection(truth.labels),
        runs=runs,
    )
    order = list(TASKS.values())
    trials = sorted([*earlier, trial], key=lambda each: order.index(each.task))
    save_bytes(request.out / file_name(task), picture_png(trial))
    save(request.out / FILE, trials)
    save_text(request.out / "trials.md", page.render(trials))
    _show(trial, console)
    for name in (FILE, "trials.md", file_name(task)):
        console.print(f"written: {request.out / name}")
    return ExitCode.DONE


def _all_runs(
    request: TrialRequest, task: Task, losses: Sequence[str], kept: Finished, console: Console
) -> Iterator[TrialRun]:
    """Seed by seed, so that an early end leaves whole comparisons."""
    steps = request.settings.steps
    pairs = [(seed, loss) for seed in range(request.seeds) for loss in losses]
    with progress_bar(console) as progress:
        bar = progress.add_task("", total=len(pairs) * steps)
        for number, (seed, loss) in enumerate(pairs):
            title = f"{loss}, seed {seed}"
            progress.update(bar, description=title, completed=number * steps)
            name = f"{task.name}-{loss}-{seed}-{_depends_on(task, loss, seed, request.settings)[:16]}"
            found = None if request.fresh else kept.read(name, run_from_json)
            _LOG.info("%s is %s", title, f"kept in {kept.path(name)}" if found else "trained")
            if found is None:

                def show(step: int, before: int = number * steps) -> None:
                    progress.update(bar, completed=before + step)

                found = run(task, loss, seed, request.settings, show)
                kept.write(name, run_to_json(found))
            if not is_quiet():
                console.print(f"{title}: {_line(task, found)}")
            yield found


def _depends_on(task: Task, loss: str, seed: int, settings: Settings) -> str:
    """A hash of what the numbers of a run depend on."""
    (package,) = map(Path, voxloss.__path__)
    own = [Path(str(module.__file__)) for module in (scores, tasks, training, voxloss_data.structures)]
    facts = [task.name, loss, seed, asdict(settings), _versions()]
    return digest(facts, [*package.rglob("*.py"), *own])


def _versions() -> dict[str, str]:
    return {
        "voxloss": voxloss.__version__,
        "torch": torch.__version__,
        **{name: version(package) for name, package in (("MONAI", "monai"), ("scikit-image", "scikit-image"))},
        "NumPy": version("numpy"),
        "Python": platform.python_version(),
    }


def _command(request: TrialRequest, task: Task, losses: Sequence[str]) -> str:
    settings = request.settings
    words = ["voxloss", "trial", task.name, "--seeds", str(request.seeds), "--steps", str(settings.steps)]
    if losses != [*task.contenders]:
        words += ["--losses", ",".join(losses)]
    if settings.edge != Settings(settings.steps).edge:
        words += ["--edge", str(settings.edge)]
    return shlex.join(words)


def _line(task: Task, found: TrialRun) -> str:
    means = {s: sum(volume[s.key] for volume in found.volumes) / len(found.volumes) for s in task.scores}
    return ", ".join(f"{score.title} {mean:.{score.decimals}f}" for score, mean in means.items())


def _show(trial: Trial, console: Console) -> None:
    scores_table = Table("mean ± SD over seeds", box=None, pad_edge=False)
    differences = Table(f"minus {BASELINE}, paired", box=None, pad_edge=False)
    for score in trial.task.scores:
        heading = f"{score.title} {'↑' if score.higher_is_better else '↓'}"
        scores_table.add_column(heading, justify="right")
        differences.add_column(heading, justify="right")
    for loss in trial.losses:
        scores_table.add_row(loss, *(spread(trial.by_seed(loss, score), score) for score in trial.task.scores))
        if loss != BASELINE:
            cells = [spread(trial.differences(loss, score), score, signed=True) for score in trial.task.scores]
            differences.add_row(loss, *cells)
    console.print()
    console.print(scores_table)
    console.print()
    console.print(differences)
    for loss in trial.losses:
        if loss != BASELINE:
            console.print(f"{loss}: {'; '.join(page.verdict(trial, loss))}")
