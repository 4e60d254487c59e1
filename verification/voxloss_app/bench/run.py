"""A whole run: each case in a process of its own, finished ones kept in files, and the pages at the end."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import voxloss
from voxloss_app.bench import goals, page, plot
from voxloss_app.bench.cases import BenchCase, choose, default_cases, full_cases, quick_cases
from voxloss_app.bench.contenders import FLOOR_READS, OURS, contenders_for
from voxloss_app.bench.machine import available_memory, commit, machine, versions
from voxloss_app.bench.measure import Options, failed, needed_beside, skipped
from voxloss_app.bench.results import BenchResult, Run, State, from_json, load_runs, save_runs
from voxloss_app.bench.timing import short
from voxloss_app.exits import ExitCode
from voxloss_app.finished import Finished, digest, interrupted
from voxloss_app.terminal import is_quiet, progress_bar, results_console
from voxloss_verify import tolerances
from voxloss_verify.subject.devices import chosen_device

CASES = {"quick": quick_cases, "default": default_cases, "full": full_cases}
ROUNDS = {"quick": 5, "default": 9, "full": 9}
_LOG = logging.getLogger(__name__)
# Rooms of this package that no figure depends on.
_SHOW = ("goals.py", "gpu_report.py", "gpu_resources.py", "page.py", "plot.py", "run.py")


@dataclass(frozen=True)
class BenchRequest:
    """The request of the command line.

    Attributes:
        extent: "quick", "default" or "full".
        device: "cpu" or "cuda".
        pattern: only cases whose id contains it, with * and ?.
        edge: of every volume, in the place of the case's own.
        rounds: None takes the extent's number.
        threads: None takes torch's number.
        compile: whether torch.compile takes part.
        fresh: measure again what is finished.
        out: where the files go.
        check: a missed goal is a failure.
    """

    extent: str = "default"
    device: str = "cpu"
    pattern: str | None = None
    edge: int | None = None
    rounds: int | None = None
    threads: int | None = None
    seed: int = 0
    compile: bool = True
    fresh: bool = False
    out: Path = Path("out")
    check: bool = False

    @property
    def command(self) -> str:
        """The command line for the same figures."""
        parts = ["voxloss bench"]
        parts += [f"--{self.extent}"] if self.extent != "default" else []
        parts += [f"--device {self.device}"] if self.device != "cpu" else []
        for option in ("edge", "rounds", "threads"):
            value = getattr(self, option)
            parts += [] if value is None else [f"--{option} {value}"]
        parts += [] if self.pattern is None else [f"--only '{self.pattern}'"]
        parts += [f"--seed {self.seed}"] if self.seed else []
        parts += [] if self.compile else ["--no-compile"]
        return " ".join(parts)


def bench(request: BenchRequest) -> int:
    """Measure, and write performance.json, .md and two pictures to `request.out`.

    A run on another device that performance.json has already is kept beside this one. Returns the exit code: 0;
    1 if voxloss was wrong or failed anywhere, or, with `check`, missed a goal; 130 after Ctrl-C, when nothing is
    written and finished cases are kept.

    Raises ValueError for a device that is not there and for a pattern that no case has.
    """
    device = chosen_device(request.device).type
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, received {request.device!r}.")
    cases = choose(CASES[request.extent](device), request.pattern, request.edge)
    if not cases:
        names = ", ".join(case.id for case in choose(CASES[request.extent](device), None, request.edge))
        raise ValueError(
            f"--only: expected a part of a case's name, received {request.pattern!r}. Names: {names}."
        )
    request.out.mkdir(parents=True, exist_ok=True)
    console = results_console()
    options = Options(
        rounds=request.rounds or ROUNDS[request.extent] * (3 if device == "cuda" else 1),
        threads=request.threads or torch.get_num_threads(),
        seed=request.seed,
        compile=request.compile,
        available=0,  # set for each case when it begins
    )
    found, where, revision = versions(), machine(device), commit()
    kept, key = Finished(request.out, "bench"), depends_on(found, where, options)
    results: list[BenchResult] = []
    try:
        for result, is_new in _results(cases, options, kept, key, request.fresh, device, console):
            results.append(result)
            if not is_quiet():
                console.print(f"{result.case.id}{'' if is_new else ' (kept)'}: {summary(result)}")
    except KeyboardInterrupt:
        console.print(interrupted(len(results), len(cases), "cases", kept))
        return ExitCode.INTERRUPTED
    settings = {name: value for name, value in asdict(options).items() if name != "available"}
    settings["floor"] = FLOOR_READS
    settings["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "unset")
    today = datetime.now(timezone.utc).date().isoformat()
    run = Run(device, today, request.command, where, found, revision, settings, results)
    missed = _write(request.out, run, console)
    failed = (request.check and missed) or any(_broken(result) for result in results)
    return ExitCode.FAILED if failed else ExitCode.DONE


def _write(out: Path, run: Run, console: Console) -> bool:
    """Write the files, beside a run on another device if there is one; return whether the run missed a goal."""
    file = out / "performance.json"
    others = [other for other in load_runs(file) if other.device != run.device]
    runs = sorted([run, *others], key=lambda run: run.device)
    save_runs(file, runs)
    for path in (file, page.write(out, runs), *plot.write(out, runs)):
        console.print(f"written: {path}")
    verdicts = [verdict for verdict in goals.judge(runs) if verdict.goal.device == run.device]
    for verdict in verdicts:
        if verdict.shown == goals.NOT_HERE:
            continue
        console.print(f"{page.MARKS[verdict.reached]} {verdict.goal.text}: {verdict.shown}")
    return any(verdict.reached is False for verdict in verdicts)


def summary(result: BenchResult) -> str:
    """A case in a line."""
    if result.state != State.measured.value:
        return f"{result.state}: {result.why}"
    parts = []
    for contender in contenders_for(result.case):
        ratio, time = result.ratio(contender.name), result.time(contender.name)
        measured = result.contenders.get(contender.name)
        if measured is None:
            continue
        if contender.name == OURS and time is not None:
            parts.append(f"{result.backend} {short(1000 * time.median)} ms")
        elif ratio is not None:
            parts.append(f"{contender.title} {short(ratio.median)} ×")
        elif measured.state == State.measured.value and measured.value_error is not None:
            parts.append(f"{contender.title} off by {measured.value_error:.1e}")
        else:
            parts.append(f"{contender.title} {measured}")
    return "; ".join(parts)


def _broken(result: BenchResult) -> bool:
    ours = result.contenders.get(OURS)
    states = (result.state, ours.state if ours is not None else "")
    return bool({State.wrong.value, State.failed.value} & set(states))


def depends_on(found: dict[str, str | None], where: dict[str, str], options: Options) -> str:
    """A hash of versions, machine, options, and the sources that a figure depends on."""
    (library,) = map(Path, voxloss.__path__)
    here = [path for path in Path(__file__).parent.glob("*.py") if path.name not in _SHOW]
    sources = [*library.rglob("*.py"), Path(tolerances.__file__), *here]
    return digest([found, where, asdict(options)], sources)


def _results(
    cases: Sequence[BenchCase],
    options: Options,
    kept: Finished,
    key: str,
    fresh: bool,
    device: str,
    console: Console,
) -> Iterator[tuple[BenchResult, bool]]:
    """The results of all cases, and whether they are new and not kept from an earlier run; with a bar."""
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
    with progress_bar(console, *columns) as progress:
        task = progress.add_task("", total=sum(map(_weight, cases)))
        done = 0.0
        for number, case in enumerate(cases):

            def show(
                share: float, what: str, case: BenchCase = case, done: float = done, number: int = number
            ) -> None:
                text = f"{number + 1}/{len(cases)} {case.id}: {what}"
                progress.update(task, completed=done + share * _weight(case), description=text)

            case = _fitting(case, options.compile, available_memory(device))
            name = f"{case.id}-{key[:16]}"
            result = None if fresh else kept.read(name, from_json)
            is_new = result is None
            if result is None:
                free = replace(options, available=available_memory(device))
                result = _measured_apart(case, free, kept, name, show)
            done += _weight(case)
            yield result, is_new


def _weight(case: BenchCase) -> float:
    """About how many seconds a case takes on two cores."""
    elements = case.logit_bytes / case.torch_dtype.itemsize
    return 15 + elements / 1e6 if case.timed else 5 + elements / 1e7


def _fitting(case: BenchCase, compile: bool, available: int) -> BenchCase:
    """The case with one sample, if two would leave contenders out."""
    most = max(contender.peak(case) for contender in contenders_for(case, compile))
    needed = most * case.logit_bytes + needed_beside(case)
    return case if needed <= available else replace(case, batch=1)


def _measured_apart(
    case: BenchCase, options: Options, kept: Finished, name: str, show: Callable[[float, str], None]
) -> BenchResult:
    """Measure a case in a process of its own, which leaves its result under this name."""
    ours = 1.1 * case.logit_bytes + needed_beside(case)
    if ours > options.available:
        return skipped(case, f"needs about {ours / 2**30:.1f} GiB, {options.available / 2**30:.1f} may be used")
    path = kept.path(name)
    path.unlink(missing_ok=True)
    job = {"case": asdict(case), "options": asdict(options), "result": str(path)}
    threads = str(options.threads)
    environment = {
        "OMP_WAIT_POLICY": "passive",
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "NUMBA_NUM_THREADS": threads,
    }
    command = [sys.executable, "-m", "voxloss_app.bench.job"]
    _LOG.info("%s: %s with %s threads, result in %s", case.id, " ".join(command), threads, path)
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it has ended already, and its exit code is the reason
                process.stdin.write(json.dumps(job))
                process.stdin.close()
            for line in process.stdout:
                _hear(line, show)
        except BaseException:
            process.kill()
            raise
        code = process.wait()
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()]
    if code < 0:
        return failed(case, f"the process was ended by signal {-code}, which for want of memory is 9")
    if code:
        return failed(case, said[-1] if said else f"exit code {code}")
    return kept.read(name, from_json) or failed(case, "no result was left")


def _hear(line: str, show: Callable[[float, str], None]) -> None:
    """A line of a process that measures, if it is its own: libraries print to stdout, too."""
    try:
        progress = json.loads(line)
        show(float(progress["share"]), str(progress["what"]))
    except (ValueError, KeyError, TypeError):
        return
