"""`voxloss doctor --gpu`: six stages in ten minutes, each in a process of its own; a table and a file."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import torch
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from voxloss.backends import triton_gpu
from voxloss_app.bench import gpu_report
from voxloss_app.bench.gpu_report import GpuReport, StageReport
from voxloss_app.bench.machine import commit, machine, versions
from voxloss_app.doctor.notes import Sizes
from voxloss_app.doctor.stages import STAGES, TOTAL, Stage
from voxloss_app.exits import ExitCode, Refused
from voxloss_app.terminal import is_quiet, progress_bar, results_console

_LOG = logging.getLogger(__name__)
# Of a stage's time: how much its kernels may be compiled for beforehand, and when it is to end by itself.
_COMPILED, _SOFT = 0.45, 0.92
_COMPILERS = 12  # processes at most; each has a context on the device
_NO_STAGE = "not requested"

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class GpuRequest:
    """The request of the command line: the numbers of the stages, none for all; how long they may take."""

    out: Path
    stages: Sequence[int] = ()
    device: str = "cuda"
    seconds: float = TOTAL
    sizes: Sizes = field(default_factory=Sizes)

    @property
    def command(self) -> str:
        """The command line, without its folder."""
        limit = [] if self.seconds >= TOTAL else [f"--minutes {self.seconds / 60:g}"]
        return " ".join(["voxloss doctor --gpu", *(f"--stage {number}" for number in self.stages), *limit])


def examine_gpu(request: GpuRequest) -> int:
    """Run the stages, write gpu.json after each, print the table; return the exit code.

    That is 1 if a stage found something wrong or ended in an error, 130 after Ctrl-C. An earlier gpu.json is
    renamed, whatever it holds; of the same machine and versions the stages that are not run again stay.

    Raises Refused where there is no GPU, or no Triton for it.
    """
    require_gpu(request.device)
    request.out.mkdir(parents=True, exist_ok=True)
    console = results_console()
    path = request.out / gpu_report.FILE
    earlier = gpu_report.load(path)
    kept = keep_earlier(path)
    if kept is not None and not is_quiet():
        console.print(f"kept: {kept}")
    chosen = sorted({*request.stages}) or range(1, len(STAGES) + 1)
    longer = request.seconds / sum(STAGES[number - 1].seconds for number in chosen)
    report = GpuReport(
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        request.command,
        commit(),
        {**versions(), "CUDA": torch.version.cuda, "ROCm": torch.version.hip},
        machine("cuda" if torch.device(request.device).type == "cuda" else "cpu"),
        [
            StageReport(number, stage.name, budget=longer * stage.seconds if number in chosen else 0.0)
            for number, stage in enumerate(STAGES, 1)
        ],
    )
    for stage in report.stages:
        if stage.number in chosen:
            stage.date, stage.commit = report.date, report.commit
        else:
            stage.why = _NO_STAGE
    if earlier is not None and (earlier.machine, earlier.versions) == (report.machine, report.versions):
        known = {stage.number: stage for stage in earlier.stages}
        report.stages = [
            stage if stage.number in chosen else known.get(stage.number, stage) for stage in report.stages
        ]
    gpu_report.save(path, report)
    interrupted = False
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with progress_bar(console, *columns) as progress:
        task = progress.add_task("", total=sum(stage.budget for stage in report.stages if stage.number in chosen))
        done = 0.0
        for stage in (stage for stage in report.stages if stage.number in chosen):

            def show(share: float, what: str, stage: StageReport = stage, done: float = done) -> None:
                text = f"{stage.number}/{len(STAGES)} {stage.name}: {what}"
                progress.update(task, completed=done + share * stage.budget, description=text)

            try:
                _run(stage, request, show)
            except KeyboardInterrupt:
                stage.ended("interrupted by Ctrl-C")
                interrupted = True
            gpu_report.save(path, report)
            done += stage.budget
            if interrupted:
                break
    report.complete = not interrupted and all(
        stage.state != gpu_report.StageState.not_run.value for stage in report.stages
    )
    gpu_report.save(path, report)
    console.print(table(report))
    console.print(f"written: {path}")
    if interrupted:
        return ExitCode.INTERRUPTED
    is_bad = any(stage.is_bad for stage in report.stages if stage.number in chosen)
    return ExitCode.FAILED if is_bad else ExitCode.DONE


def require_gpu(device: str) -> None:
    """Refuse a machine on which there is nothing to examine."""
    if torch.device(device).type != "cuda":
        return
    if not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip
        remedy = (
            "install a torch that is built for CUDA or ROCm"
            if build is None
            else "see whether nvidia-smi finds it, and what CUDA_VISIBLE_DEVICES is"
        )
        built = "the CPU alone" if build is None else f"CUDA or ROCm {build}"
        raise Refused(
            f"--gpu: expected a CUDA or ROCm device, found none (torch {torch.__version__}, built for {built}): "
            f"{remedy}"
        )
    available, reason = triton_gpu.available()
    if triton_gpu.interpreted():
        raise Refused("--gpu: expected kernels that are compiled, found TRITON_INTERPRET set: unset it")
    if not available:
        raise Refused(f"--gpu: expected Triton, which torch's builds for CUDA bring: {reason}")


def keep_earlier(path: Path) -> Path | None:
    """Rename an earlier report after the time at which it was written; its new path, None if there is none."""
    try:
        written = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
    except FileNotFoundError:
        return None
    stem = f"{path.stem}-{written:%Y%m%dT%H%M%S}"
    number = 1
    while (kept := path.with_name(f"{stem}{f'-{number}' if number > 1 else ''}{path.suffix}")).exists():
        number += 1
    return path.rename(kept)


def table(report: GpuReport) -> Table:
    """All that was found, a line each."""
    found = Table("stage", "case", "result", box=None, pad_edge=False)
    for line in gpu_report.lines(report):
        found.add_row(*line)
    return found


def _run(report: StageReport, request: GpuRequest, show: Progress) -> None:
    """One stage, whatever becomes of its process."""
    began, stage = time.time(), STAGES[report.number - 1]
    deadline = began + report.budget
    _LOG.info("stage %s, %s: %.0f s at most", report.number, stage.name, report.budget)

    def take(event: dict[str, Any]) -> None:
        if "progress" in event:
            show(*event["progress"])
        report.take(event)

    why = ""
    try:
        job = {"stage": report.number, "device": request.device, "sizes": asdict(request.sizes)}
        if stage.launches is not None and not triton_gpu.interpreted():
            counts = _compile(stage, job, began + _COMPILED * report.budget, show)
            report.facts["compiled beforehand"] = f"{counts[True]} launches, {counts[False]} fail"
        soft = {"deadline": began + _SOFT * report.budget, "part": None}
        why = _listen([{**job, **soft}], deadline, take)
    finally:
        report.seconds = time.time() - began
    report.ended(why)


def _compile(stage: Stage, job: dict[str, Any], deadline: float, show: Progress) -> Counter[bool]:
    """Compile in parallel processes what the stage will launch; the stage compiles the rest."""
    counts: Counter[bool] = Counter()

    def take(event: dict[str, Any]) -> None:
        counts[event["compiled"]] += 1
        show(0, f"{counts.total()} launches are compiled, in {parts} processes")

    parts = max(1, min(_COMPILERS, (os.cpu_count() or 1) * 3 // 4))
    more = {"deadline": deadline - 2, "parts": parts}
    _listen([{**job, **more, "part": part} for part in range(parts)], deadline, take)
    return counts


def _listen(jobs: Sequence[dict[str, Any]], deadline: float, take: Callable[[dict[str, Any]], None]) -> str:
    """Run jobs, each in a process, and take what they send; return why one of them came to no good end."""
    heard: queue.Queue[str | None] = queue.Queue()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        processes = []
        try:
            for job in jobs:
                processes.append(_started(job, errors))
                out = processes[-1].stdout
                assert out is not None
                threading.Thread(target=_hear, args=(out, heard), daemon=True).start()
            open_ends = len(processes)
            while open_ends:
                try:
                    line = heard.get(timeout=max(0.01, deadline - time.time()))
                except queue.Empty:
                    return "it did not end in its time"
                if line is None:
                    open_ends -= 1
                else:
                    _enter(line, take)
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                _kill(process)
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()]
    return next((_ended(code, said) for code in codes if code), "")


def _started(job: dict[str, Any], errors: IO[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "voxloss_app.doctor.job"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,  # so that what it has started ends with it
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended already, and its exit code is the reason
        process.stdin.write(json.dumps(job))
        process.stdin.close()
    return process


def _hear(out: IO[str], heard: queue.Queue[str | None]) -> None:
    for line in out:
        heard.put(line)
    heard.put(None)


def _enter(line: str, take: Callable[[dict[str, Any]], None]) -> None:
    with suppress(ValueError, KeyError, TypeError, AttributeError):  # a line that no stage has sent
        take(json.loads(line))


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()


def _ended(code: int, said: Sequence[str]) -> str:
    by = f"ended by signal {-code}" if code < 0 else f"ended with {code}"
    text = f"its process {by}: {said[-1]}" if said else f"its process {by}"
    return text.replace(str(Path.home()), "~")
