"""Mutation testing: which law detects which mutant. `voxloss verify --mutants` prints it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from voxloss_verify.check import chosen_laws, run_checks
from voxloss_verify.laws.law import Law
from voxloss_verify.laws.record import Record, Status
from voxloss_verify.laws.setting import PROFILES, Profile, Setting
from voxloss_verify.mutants.mutants import CANNOT, CONTROLS, MUTANTS, Specimen
from voxloss_verify.workers import workers

# Enough for these mutants; cubes of these sizes show rounding errors as well.
PROFILE = replace(PROFILES["quick"], examples=20, sizes=(32, 48))
# Workers would each start processes of their own for these.
WITH_PROCESSES = ("28a",)
JOBS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Trial:
    """A loss and the record of each check, by its law's id."""

    specimen: Specimen
    records: Mapping[str, Record]

    @property
    def broken(self) -> list[Record]:
        """The records of the laws that caught it."""
        return [record for record in self.records.values() if record.status is Status.broken]

    @property
    def is_advised_only(self) -> bool:
        """Whether nothing but advice is against it."""
        return bool(self.broken) and all(record.is_advice for record in self.broken)

    @property
    def easiest(self) -> Record | None:
        """Of the laws that detected it, the one that needed the fewest volumes."""
        return min(self.broken, key=lambda record: record.examples, default=None)

    @property
    def missed(self) -> list[Record]:
        """The records of those that should have and did not."""
        run = [self.records[law] for law in self.specimen.killers if law in self.records]
        return [record for record in run if record.status is not Status.broken]


def chance_of_missing(examples: int, drawn: int) -> float:
    """The probability that so many drawn volumes miss a flaw that volume number `examples` was the first to show.

    As if one volume in `examples` showed it, the estimate of largest likelihood of a geometric distribution.
    """
    return (1 - 1 / max(1, examples)) ** drawn


@dataclass(frozen=True)
class KillMatrix:
    """All trials, and what they prove."""

    laws: Sequence[Law]
    controls: Sequence[Trial]
    mutants: Sequence[Trial]
    profile: Profile
    seconds: float

    @property
    def idle(self) -> list[str]:
        """The laws that detected no mutant."""
        useful = {record.law for mutant in self.mutants for record in mutant.broken}
        return [law.id for law in self.laws if law.id not in useful]

    @property
    def faults(self) -> list[str]:
        """What is wrong with the suite, one line each."""
        found = []
        for number, mutant in enumerate(self.mutants, 1):
            name = f"{number} {mutant.specimen.loss.__name__}"
            if not mutant.broken:
                found.append(f"mutant {name} is not detected")
            if mutant.is_advised_only and not mutant.specimen.is_of_the_interface:
                found.append(f"mutant {name} would pass: only advice is against it")
            # An error of a check proves nothing about the loss.
            raised = [record for record in mutant.broken if record.could_not_be_run]
            found += [f"mutant {name}, check {record.law}: {record.reason}" for record in raised]
            for record in mutant.missed:
                applies = record.status is not Status.not_applicable
                because = "it holds" if applies else f"{record.status.value}, {record.reason}"
                found.append(f"mutant {name} is not detected by check {record.law}: {because}")
        found += [f"check {law} detected no mutant: no reason given" for law in self.idle if law not in CANNOT]
        for control in self.controls:
            found += [f"control {control.specimen} broke check {r.law}: {r.reason}" for r in control.broken]
        return found


def kill_matrix(
    profile: Profile = PROFILE,
    seed: int = 0,
    laws: Sequence[str] | None = None,
    jobs: int = JOBS,
    progress: Callable[[Trial, int, int], None] = lambda trial, done, total: None,
) -> KillMatrix:
    """Run the checks of these ids, None for all, on the correct losses and on the mutants they should detect.

    `progress` is called after each loss with its trial, the number of losses done and their total. With more than
    one job, call it from the main thread.

    Raises:
        ValueError: for a law that does not exist.
    """
    chosen = chosen_laws(laws)
    ids = {law.id for law in chosen}
    specimens = [*CONTROLS, *(mutant for mutant in MUTANTS if ids & set(mutant.killers))]
    start = time.perf_counter()
    trials = []
    with closing(_trials(specimens, chosen, profile, seed, jobs)) as ready:
        for trial in ready:
            trials.append(trial)
            progress(trial, len(trials), len(specimens))
    controls = [trial for trial in trials if not trial.specimen.killers]
    mutants = [trial for trial in trials if trial.specimen.killers]
    return KillMatrix(chosen, controls, mutants, profile, time.perf_counter() - start)


def _trials(
    specimens: Sequence[Specimen], laws: Sequence[Law], profile: Profile, seed: int, jobs: int
) -> Generator[Trial]:
    """In the order of the specimens."""
    here = [law.id for law in laws if jobs <= 1 or law.id in WITH_PROCESSES]
    there = [law.id for law in laws if law.id not in here]
    setting = Setting(profile, seed, shrink=False, hints=False)
    try:
        with workers(max(1, jobs)) as submit:
            tasks = [submit(_run_there, each, profile, seed, there) for each in specimens if there]
            for k, specimen in enumerate(specimens):
                records = run_all(specimen, setting, here) | (tasks[k].result() if there else {})
                yield Trial(specimen, {law.id: records[law.id] for law in laws})
    finally:
        setting.ranks.close()


def run_all(specimen: Specimen, setting: Setting, laws: Sequence[str] | None = None) -> dict[str, Record]:
    """Run the checks of these ids, None for all, on a loss; the records by id."""
    records = run_checks(specimen.subject(), setting, chosen_laws(laws))
    # Without the counter-examples, which may be large and are not shown.
    return {record.law: replace(record, counterexample=None) for record in records}


def _run_there(specimen: Specimen, profile: Profile, seed: int, laws: Sequence[str]) -> dict[str, Record]:
    """The same in a worker."""
    torch.set_num_threads(1)  # there are as many workers as cores
    return run_all(specimen, Setting(profile, seed, shrink=False, hints=False), laws)
