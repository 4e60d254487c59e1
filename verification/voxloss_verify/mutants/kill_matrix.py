"""Which law catches which wrong loss: the suite's own proof, `voxloss verify --mutants`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.text import Text

from voxloss_verify.check import ask_law, chosen_laws
from voxloss_verify.exits import ExitCode
from voxloss_verify.laws.law import Law
from voxloss_verify.laws.record import Record, Status
from voxloss_verify.laws.setting import PROFILES, Profile, Setting
from voxloss_verify.mutants.mutants import CANNOT, CONTROLS, MUTANTS, Specimen
from voxloss_verify.terminal import progress_bar, results_console

# What is enough for the mistakes at hand; in cubes of these sizes, that of rounding shows as well.
PROFILE = replace(PROFILES["quick"], examples=20, sizes=(32, 48))
# Workers would each start processes of their own for these.
WITH_PROCESSES = ("28a",)
JOBS = min(4, os.cpu_count() or 1)

# Cells of the matrix, and how they are printed.
INTENDED, KILLED, HELD, MISSED, NOT_ASKED = "●", "×", "·", "!", " "
STYLES = {INTENDED: "bold green", KILLED: "green", HELD: "dim", MISSED: "bold red", NOT_ASKED: ""}


@dataclass(frozen=True)
class Trial:
    """A loss and what came of each law, by its id."""

    specimen: Specimen
    records: Mapping[str, Record]

    @property
    def broken(self) -> list[Record]:
        """The records of the laws that caught it."""
        return [record for record in self.records.values() if record.status is Status.broken]

    @property
    def missed(self) -> list[Record]:
        """The records of those that should have and did not."""
        asked = [self.records[law] for law in self.specimen.killers if law in self.records]
        return [record for record in asked if record.status is not Status.broken]

    def cell(self, law: str) -> str:
        """How the law's record is printed."""
        status, intended = self.records[law].status, law in self.specimen.killers
        if status is Status.broken:
            return INTENDED if intended else KILLED
        return MISSED if intended else HELD if status is Status.holds else NOT_ASKED


@dataclass(frozen=True)
class KillMatrix:
    """All trials, and what they prove."""

    laws: Sequence[Law]
    controls: Sequence[Trial]
    mutants: Sequence[Trial]
    seconds: float

    @property
    def idle(self) -> list[str]:
        """The laws that caught no wrong loss."""
        useful = {record.law for mutant in self.mutants for record in mutant.broken}
        return [law.id for law in self.laws if law.id not in useful]

    @property
    def faults(self) -> list[str]:
        """What is wrong with the suite, one line each."""
        found = []
        for number, mutant in enumerate(self.mutants, 1):
            name = f"{number} {mutant.specimen.loss.__name__}"
            if not mutant.broken:
                found.append(f"mutant {name} is alive")
            for record in mutant.missed:
                because = f"not asked, {record.reason}" if record.status is Status.not_asked else "it holds"
                found.append(f"mutant {name} is not caught by law {record.law}: {because}")
        found += [f"law {law} caught no mutant: no reason given" for law in self.idle if law not in CANNOT]
        for control in self.controls:
            found += [f"control {control.specimen} broke law {r.law}: {r.reason}" for r in control.broken]
        return found


def run_mutants(
    profile: str = "quick", seed: int = 0, laws: Sequence[str] | None = None, jobs: int = JOBS
) -> int:
    """Ask wrong losses and correct ones all laws, or those of these ids; print a matrix and a verdict.

    Returns the exit code: 0 if every wrong loss is caught by the laws that speak of its mistake, every law
    catches one or has a reason not to, and the correct losses keep all laws; else 1, and 130 after Ctrl-C. With
    some of the laws, only the mutants that these should catch are tried. Raises ValueError for a profile or law
    that does not exist. With more than one job, call it from the main thread.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile: expected one of {', '.join(PROFILES)}, got {profile!r}.")
    console = results_console()
    chosen = chosen_laws(laws)
    try:
        matrix = kill_matrix(PROFILE if profile == "quick" else PROFILES[profile], seed, chosen, jobs, console)
    except KeyboardInterrupt:
        print("interrupted: nothing is proved", file=sys.stderr)
        return ExitCode.INTERRUPTED
    show(matrix, console)
    return ExitCode.FAILED if matrix.faults else ExitCode.DONE


def kill_matrix(profile: Profile, seed: int, laws: Sequence[Law], jobs: int, console: Console) -> KillMatrix:
    """Try the correct losses, and the wrong ones that these laws should catch; progress goes to a terminal."""
    ids = {law.id for law in laws}
    specimens = [*CONTROLS, *(mutant for mutant in MUTANTS if ids & set(mutant.killers))]
    start = time.perf_counter()
    trials = []
    with (
        progress_bar(console) as progress,
        closing(_trials(specimens, laws, profile, seed, jobs)) as ready,
    ):
        task = progress.add_task("", total=len(specimens))
        for trial in ready:
            trials.append(trial)
            progress.update(task, advance=1, description=str(trial.specimen))
    controls = [trial for trial in trials if not trial.specimen.killers]
    mutants = [trial for trial in trials if trial.specimen.killers]
    return KillMatrix(laws, controls, mutants, time.perf_counter() - start)


def _trials(
    specimens: Sequence[Specimen], laws: Sequence[Law], profile: Profile, seed: int, jobs: int
) -> Generator[Trial]:
    """In the order of the specimens."""
    here = [law.id for law in laws if jobs <= 1 or law.id in WITH_PROCESSES]
    there = [law.id for law in laws if law.id not in here]
    setting = Setting(profile, seed, shrink=False)
    # Not forked: threads, such as that of a progress bar, do not survive a fork.
    executor = ProcessPoolExecutor(max(1, jobs), multiprocessing.get_context("spawn"))
    try:
        # The workers inherit deafness to Ctrl-C; this process hears it and ends them.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if there else None
        try:
            tasks = [executor.submit(_ask_there, each, profile, seed, there) for each in specimens if there]
        finally:
            if there:
                signal.signal(signal.SIGINT, handler)
        for k, specimen in enumerate(specimens):
            records = ask_all(specimen, setting, here) | (tasks[k].result() if there else {})
            yield Trial(specimen, {law.id: records[law.id] for law in laws})
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
        setting.ranks.close()


def ask_all(specimen: Specimen, setting: Setting, laws: Sequence[str] | None = None) -> dict[str, Record]:
    """Ask a loss the laws of these ids, None for all; the records by id."""
    subject = specimen.subject()
    # Without the counter-examples, which may be large and are not shown.
    return {law.id: replace(ask_law(subject, setting, law), counterexample=None) for law in chosen_laws(laws)}


def _ask_there(specimen: Specimen, profile: Profile, seed: int, laws: Sequence[str]) -> dict[str, Record]:
    """The same in a worker."""
    torch.set_num_threads(1)  # there are as many workers as cores
    return ask_all(specimen, Setting(profile, seed, shrink=False), laws)


def show(matrix: KillMatrix, console: Console) -> None:
    """Print the matrix, what its columns are, and the verdict."""
    numbers = range(1, len(matrix.mutants) + 1)
    for digit in (10, 1):
        cells = "".join(_spaced(n, str(n // digit % 10) if n >= digit else " ") for n in numbers)
        console.print(f"{'' if digit == 10 else 'law':<4} {cells}")
    for law in matrix.laws:
        line = Text(f"{law.id:<4} ")
        for number, mutant in enumerate(matrix.mutants, 1):
            cell = mutant.cell(law.id)
            line.append(_spaced(number, cell), style=STYLES[cell])
        count = sum(mutant.records[law.id].status is Status.broken for mutant in matrix.mutants)
        line.append(f"  {count:>2}  {law.name}")
        console.print(line)
    meaning = {
        INTENDED: "caught by its law",
        KILLED: "caught",
        HELD: "not caught",
        MISSED: "not caught by its law",
    }
    console.print(f"\n{', '.join(f'{cell} {words}' for cell, words in meaning.items())}, blank: not asked")
    for number, mutant in enumerate(matrix.mutants, 1):
        loss, killers = mutant.specimen.loss.__name__, ", ".join(mutant.specimen.killers)
        console.print(f"{number:>4} {loss:<26} {killers:<8} {mutant.specimen.mistake}")
    console.print("")
    for id in (law for law in matrix.idle if law in CANNOT):
        console.print(f"law {id} caught no mutant: {CANNOT[id]}")
    for fault in matrix.faults:
        console.print(Text(fault, style="bold red"))
    caught = sum(bool(mutant.broken) and not mutant.missed for mutant in matrix.mutants)
    kept = sum(not control.broken for control in matrix.controls)
    console.print(
        f"{caught} of {len(matrix.mutants)} wrong losses caught as they should be, "
        f"{kept} of {len(matrix.controls)} correct ones keep all laws, "
        f"{len(matrix.laws) - len(matrix.idle)} of {len(matrix.laws)} laws caught one, in {matrix.seconds:.0f} s",
    )


def _spaced(number: int, cell: str) -> str:
    """A cell, after a space at each tenth."""
    return f" {cell}" if number % 10 == 1 and number > 1 else cell
