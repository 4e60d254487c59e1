"""`voxloss verify --mutants`: the matrix of mutation testing, printed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from voxloss_app.exits import ExitCode
from voxloss_app.terminal import progress_bar, results_console
from voxloss_verify.laws.record import Status
from voxloss_verify.laws.setting import PROFILES
from voxloss_verify.mutants.kill_matrix import JOBS, PROFILE, KillMatrix, Trial, chance_of_missing, kill_matrix
from voxloss_verify.mutants.mutants import CANNOT

# Cells of the matrix, and how they are printed.
INTENDED, KILLED, HELD, MISSED, NOT_APPLICABLE = "●", "×", "·", "!", " "
STYLES = {INTENDED: "bold green", KILLED: "green", HELD: "dim", MISSED: "bold red", NOT_APPLICABLE: ""}


def run_mutants(
    profile: str = "quick", seed: int = 0, laws: Sequence[str] | None = None, jobs: int = JOBS
) -> int:
    """Run all checks, or those of these ids, on mutants and on correct losses; print a matrix and a verdict.

    Returns the exit code: 0 if every mutant is detected by the checks for its error, every check
    detects a mutant or has a reason not to, and all checks hold for the correct losses; else 1, and 130 after
    Ctrl-C. With some of the checks, only the mutants that these should detect are tried. With more than one job,
    call it from the main thread.

    Raises:
        ValueError: for a profile or law that does not exist.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile: expected one of {', '.join(PROFILES)}, received {profile!r}.")
    console = results_console()
    try:
        with progress_bar(console) as bar:
            task = bar.add_task("")

            def progress(trial: Trial, done: int, total: int) -> None:
                bar.update(task, completed=done, total=total, description=str(trial.specimen))

            chosen = PROFILE if profile == "quick" else PROFILES[profile]
            matrix = kill_matrix(chosen, seed, laws, jobs, progress)
    except KeyboardInterrupt:
        print("interrupted: the mutation testing is incomplete", file=sys.stderr)
        return ExitCode.INTERRUPTED
    show(matrix, console)
    return ExitCode.FAILED if matrix.faults else ExitCode.DONE


def show(matrix: KillMatrix, console: Console) -> None:
    """Print the matrix, what its columns are, and the verdict."""
    numbers = range(1, len(matrix.mutants) + 1)
    for digit in (10, 1):
        cells = "".join(_spaced(n, str(n // digit % 10) if n >= digit else " ") for n in numbers)
        console.print(f"{'' if digit == 10 else 'id':<4} {cells}")
    for law in matrix.laws:
        line = Text(f"{law.id:<4} ")
        for number, mutant in enumerate(matrix.mutants, 1):
            cell = _cell(mutant, law.id)
            line.append(_spaced(number, cell), style=STYLES[cell])
        count = sum(mutant.records[law.id].status is Status.broken for mutant in matrix.mutants)
        line.append(f"  {count:>2}  {law.name}")
        console.print(line)
    meaning = {
        INTENDED: "detected by its check",
        KILLED: "caught",
        HELD: "not caught",
        MISSED: "not detected by its check",
    }
    console.print(f"\n{', '.join(f'{cell} {words}' for cell, words in meaning.items())}, blank: not applicable")
    for number, mutant in enumerate(matrix.mutants, 1):
        loss, killers = mutant.specimen.loss.__name__, ", ".join(mutant.specimen.killers)
        console.print(f"{number:>4} {loss:<26} {killers:<8} {mutant.specimen.flaw}")
    console.print("")
    for id in (law for law in matrix.idle if law in CANNOT):
        console.print(f"check {id} detected no mutant: {CANNOT[id]}")
    for fault in matrix.faults:
        console.print(Text(fault, style="bold red"))
    advised = [mutant.specimen.loss.__name__ for mutant in matrix.mutants if mutant.is_advised_only]
    if advised:
        console.print(f"right for every valid input, so that only advice concerns them: {', '.join(advised)}")
    for said in _rarest(matrix):
        console.print(said)
    caught = sum(bool(mutant.broken) and not mutant.missed for mutant in matrix.mutants)
    kept = sum(not control.broken for control in matrix.controls)
    console.print(
        f"{caught} of {len(matrix.mutants)} mutants detected as expected, all checks hold for {kept} of "
        f"{len(matrix.controls)} correct losses, {len(matrix.laws) - len(matrix.idle)} of {len(matrix.laws)} "
        f"checks detected a mutant, in {matrix.seconds:.0f} s",
    )


def _rarest(matrix: KillMatrix) -> Iterator[str]:
    """How likely it is that drawn volumes miss the flaw that they show most rarely."""
    most = matrix.profile.examples
    easiest = [(record, mutant) for mutant in matrix.mutants if (record := mutant.easiest) is not None]
    drawn = [each for each in easiest if each[0].examples <= most]
    others = [mutant.specimen.loss.__name__ for record, mutant in easiest if record.examples > most]
    if others:
        yield f"shown by given volumes only, which every profile has: {', '.join(others)}"
    if drawn:
        record, mutant = max(drawn, key=lambda each: each[0].examples)
        chances = ", ".join(
            f"{chance_of_missing(record.examples, profile.examples):.1g} ({name}, {profile.examples} volumes)"
            for name, profile in PROFILES.items()
        )
        name = mutant.specimen.loss.__name__
        yield (
            f"the rarest of the others, {name}, was first seen on volume {record.examples} of "
            f"check {record.law}: "
            f"drawn volumes miss it with a probability of about {chances}"
        )


def _spaced(number: int, cell: str) -> str:
    """A cell, after a space at each tenth."""
    return f" {cell}" if number % 10 == 1 and number > 1 else cell


def _cell(trial: Trial, law: str) -> str:
    """How the record of a law is printed."""
    status, intended = trial.records[law].status, law in trial.specimen.killers
    if status is Status.broken:
        return INTENDED if intended else KILLED
    return MISSED if intended else HELD if status is Status.holds else NOT_APPLICABLE
