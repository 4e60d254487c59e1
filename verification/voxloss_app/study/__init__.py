"""`voxloss study`: train the same network with many losses on real scans, and compare the results.

One room per job: `contenders` the losses, `plan` which runs there are, `run` one of them and its scores, `cost`
time and memory, `results` the numbers and their statistics, `page` and `picture` what is made of them.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from datetime import datetime, timezone
from functools import partial
from statistics import fmean

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from voxloss_app.bench.machine import commit, machine, versions
from voxloss_app.bench.own_process import apart
from voxloss_app.exits import ExitCode, complain
from voxloss_app.finished import Finished, digest, interrupted
from voxloss_app.study import cost, page
from voxloss_app.study.picture import pictures
from voxloss_app.study.plan import StudyPlan, StudyRequest, Task, study_plan
from voxloss_app.study.results import FILE, SCORES, Study, mean_and_sd, result_of
from voxloss_app.study.run import StudyRun, run
from voxloss_app.terminal import is_quiet, progress_bar, results_console
from voxloss_data.files import save_bytes, save_text
from voxloss_verify.subject.devices import chosen_device
from voxloss_verify.workers import workers

__all__ = ["StudyRequest", "hold_study"]

_LOG = logging.getLogger(__name__)
_COLUMNS = (
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("{task.description}"),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


def hold_study(request: StudyRequest) -> int:
    """Do all runs, and write evidence.json, evidence.md and its pictures to `out`.

    Each run that is finished is kept as a file in a folder beside `out`, and is not repeated as long as data,
    settings and the versions of voxloss, torch and MONAI are the same. Returns the exit code: 0; 1 if a run
    failed, such as by a loss that does not stay finite, which the page states; 130 after Ctrl-C, when nothing but
    finished runs is written. Raises ValueError that names the option or the file for what cannot be.
    """
    console = results_console()
    device = str(chosen_device(request.device))
    known = versions()
    with progress_bar(console, *_COLUMNS) as progress:
        bar = progress.add_task("reading scans", total=None)
        plan = study_plan(request, known, lambda done, total: progress.update(bar, completed=done, total=total))
    request.out.mkdir(parents=True, exist_ok=True)
    kept = Finished(request.out, "study")
    found: dict[str, StudyRun] = {}
    try:
        _run_all(request, plan, device, kept, found, console)
        costs = _costs(plan, device, kept, known, request.fresh, console)
    except KeyboardInterrupt:
        console.print(interrupted(len(found), len(plan.tasks), "runs", kept))
        return ExitCode.INTERRUPTED
    with_peer = {peer.name for peer in plan.peers}
    results = [
        result_of(found[task.name], plan.classes, task.contender.name in with_peer and task.fold == 0)
        for task in plan.tasks
    ]
    study = Study(
        command=_command(request),
        date=datetime.now(timezone.utc).date().isoformat(),
        machine=machine(device),
        versions=known,
        commit=commit(),
        facts=plan.facts,
        folds=request.folds,
        results=results,
        costs=costs,
    )
    study.save(request.out / FILE)
    named = pictures(study)
    for name, content in named.items():
        save_bytes(request.out / name, content)
    save_text(request.out / page.FILE, page.render(study))
    _show(study, console)
    for name in (FILE, page.FILE, *named):
        console.print(f"written: {request.out / name}")
    failed = [each for each in results if each.failed is not None]
    for each in failed:
        complain(f"{each.contender.title}, fold {each.fold + 1}, seed {each.seed}: {each.failed}")
    return ExitCode.FAILED if failed else ExitCode.DONE


def _run_all(
    request: StudyRequest,
    plan: StudyPlan,
    device: str,
    kept: Finished,
    found: dict[str, StudyRun],
    console: Console,
) -> None:
    """Fill `found` with all runs, by the names of their tasks; first with what is kept from earlier."""
    for task in () if request.fresh else plan.tasks:
        earlier = kept.read(task.name, StudyRun.from_json)
        if earlier is not None:
            found[task.name] = earlier
    missing = [task for task in plan.tasks if task.name not in found]
    _LOG.info("%d of %d runs are kept in %s", len(found), len(plan.tasks), kept.folder)
    with progress_bar(console, *_COLUMNS) as progress:
        bar = progress.add_task("training", total=len(plan.tasks), completed=len(found))

        def take(task: Task, result: StudyRun) -> None:
            kept.write(task.name, result.to_json())
            found[task.name] = result
            progress.advance(bar)
            _LOG.info("%s: %s", task.title, result.failed or "done")
            if not is_quiet():
                console.print(f"{task.title}: {_line(plan, result)}")

        _each(missing, partial(_run, request, device), request.jobs, take)


def _run(request: StudyRequest, device: str, task: Task) -> StudyRun:
    return run(request.data, task.plan, task.contender, task.fold, device)


def _each(
    tasks: Sequence[Task],
    start: Callable[[Task], StudyRun],
    jobs: int,
    take: Callable[[Task, StudyRun], None],
) -> None:
    """Run the tasks in processes of their own, and take each result as soon as it is there.

    A single one has a process of its own, too: the number of threads is set in it, and its caches end with it.
    """
    if not tasks:
        return
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with workers(min(jobs, len(tasks))) as submit:
            waiting: dict[Future[StudyRun], Task] = {submit(start, task): task for task in tasks}
            for future in as_completed(waiting):
                take(waiting.pop(future), future.result())
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _costs(
    plan: StudyPlan,
    device: str,
    kept: Finished,
    known: dict[str, str | None],
    fresh: bool,
    console: Console,
) -> list[cost.Cost]:
    """Time and memory, when all runs are done and nothing else computes; kept like a run."""
    contenders = [*plan.contenders, *plan.peers]
    facts = [list(map(vars, contenders)), plan.common.digest, known, machine(device)]
    name = f"cost-{digest(facts)[:16]}"
    found = None if fresh else kept.read(name, lambda content: [*map(cost.Cost.from_json, content)])
    if found is None:
        if not is_quiet():
            console.print("measuring time and memory of each loss and of a step; other work would disturb it")
        found = apart(partial(cost.measure, plan.common, contenders, device))
        kept.write(name, [each.to_json() for each in found])
    return found


def _command(request: StudyRequest) -> str:
    usual = StudyRequest(request.data, request.out)
    words = ["voxloss", "study", "--data", request.data.resolve().name]
    if request.losses is not None:
        words += ["--losses", ",".join(request.losses)]
    words += ["--folds", str(request.folds), "--seeds", str(request.seeds), "--epochs", str(request.epochs)]
    for option in ("scans", "width", "batch"):
        value = getattr(request, option)
        words += [] if value == getattr(usual, option) else [f"--{option}", str(value)]
    return shlex.join(words)


def _line(plan: StudyPlan, found: StudyRun) -> str:
    if found.failed is not None:
        return f"failed: {found.failed}"
    result = result_of(found, plan.classes, with_losses=False)
    return ", ".join(f"{score.title} {result.mean(score):.{score.decimals}f}" for score in SCORES)


def _show(study: Study, console: Console) -> None:
    table = Table("mean ± SD over runs", box=None, pad_edge=False)
    for score in SCORES:
        table.add_column(f"{score.title} {'↑' if score.higher_is_better else '↓'}", justify="right")
    for contender in study.contenders:
        values = [study.values(contender.name, score) for score in SCORES]
        table.add_row(contender.name, *map(mean_and_sd, values, SCORES))
    console.print()
    console.print(table)
    if study.costs:
        share = fmean(each.share for each in study.costs)
        console.print(f"the loss takes {share:.0%} of a step on average over the losses")
