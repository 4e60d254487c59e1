"""The verdict on a loss in words: its formula, and the broken checks, the worst first."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from voxloss_verify.laws.record import Record, Status
from voxloss_verify.oracle.claims import Family
from voxloss_verify.request import Level
from voxloss_verify.verification import ELEMENTARY, Verification

# So many are shown in three lines each; of the others there are the ids.
SHOWN = 8
LONGEST = 200

# Those of places: prediction and target do not meet voxel by voxel.
OF_PLACES = ("13a", "13c")
_OF_THE_GRADIENT = (
    "The values are right, the gradient is not: search for detach(), no_grad(), argmax or rounding in the "
    "loss, or for a backward of its own."
)
# Invariances: a loss that breaks one does not only take another ratio.
TELLING = ("13a", "13b", "13c", "15", "16b", "18", "19a", "19c")

KINDS: dict[Family, str] = {
    "dice": "a Dice loss",
    "jaccard": "an IoU (Jaccard) loss",
    "tversky": "a Tversky loss",
    "focal_tversky": "a Focal Tversky loss",
    "log_cosh_dice": "a log-cosh Dice loss",
    "logarithmic_dice": "a logarithmic Dice loss",
    "generalized_dice": "a Generalized Dice loss",
    "mcc": "a loss of Matthews' correlation",
    "sensitivity_specificity": "a loss of sensitivity and specificity",
    "cross_entropy": "a cross entropy",
    "focal": "a focal loss",
    "logarithmic_cross_entropy": "a logarithmic cross entropy",
    "compound": "the sum of losses",
    "formula": "the loss's own",
    "dice_metric": "a Dice metric",
    "iou_metric": "an IoU (Jaccard) metric",
    "generalized_dice_metric": "a Generalized Dice metric",
}


def verdict(verification: Verification) -> Iterator[str]:
    """The lines, at most forty."""
    records = verification.records
    if verification.form is not None and str(verification.form):
        yield str(verification.form)
    yield _formula(verification)
    if verification.subject.claims.precision == "float32":
        yield "It computes in float32, also for float64 inputs: these are judged at the resolution of float32."
    groups = causes(verification)
    yield f"{_numerics(verification, groups)} {_interface(verification)}"
    for group in groups[:SHOWN]:
        yield from _shown(group)
    if len(groups) > SHOWN:
        yield f"and {len(groups) - SHOWN} more: check {', '.join(group[0].law for group in groups[SHOWN:])}"
    for record in records:
        if record.status is Status.unexpected:
            yield _cut(f"warning, check {record.law}, {record.name}: holds here, {record.reason}")
    for record in records:
        if record.is_advice:
            yield _cut(f"advice, check {record.law}, {record.name}: {record.reason}")


def causes(verification: Verification) -> list[list[Record]]:
    """Broken checks that count, worst first, those that one cause may explain together."""
    broken = [r for r in verification.records if r.status is Status.broken and not r.is_advice]
    formula = {law.id for law in verification.laws if law.level is Level.formula}
    return list(_grouped(sorted(broken, key=_rank), formula))


def worst_first(verification: Verification) -> list[Record]:
    """All records: broken ones that count as in `causes`, then the others in their order."""
    broken = [record for group in causes(verification) for record in group]
    return [*broken, *(record for record in verification.records if record not in broken)]


def _formula(verification: Verification) -> str:
    run = _run(verification, Level.formula)
    broken = [r for r in run if r.status is Status.broken and r.level is Level.formula]
    kind = KINDS[verification.subject.claims.family]
    if not run:
        return f"Whether the formula is that of {kind} was not checked."
    if not broken:
        volumes = sum(record.examples for record in run)
        checks = _counted(len(run), "formula check")
        return f"The formula is that of {kind} ({checks}, {_counted(volumes, 'volume')})."
    values_hold = any(record.law == ELEMENTARY[0] and record.status is Status.holds for record in run)
    explanation = _explanation(broken, values_hold)
    verb = "is" if len(broken) == 1 else "are"
    checks = f"{len(broken)} of {_counted(len(run), 'formula check')} {verb} broken"
    return f"The formula is not that of {kind} with these properties: {checks}. {explanation}".rstrip()


def _explanation(broken: Sequence[Record], values_hold: bool) -> str:
    """A slip or other claims that explain a wrong value; else where to look."""
    hint = next((record.hint for record in broken if record.hint), "")
    if hint:
        return f"{hint[0].upper()}{hint[1:]}."
    laws = {record.law for record in broken}
    value, gradient = ELEMENTARY
    if value not in laws:
        return _OF_THE_GRADIENT if gradient in laws and values_hold else ""
    places = [record.law for record in broken if record.law in OF_PLACES]
    if not places:
        return (
            "No known coding error and no other properties explain the values: if a --claim is missing, for "
            "example of labels, activation, include_background, batch, smooth_nr and smooth_dr, or alpha, beta "
            "and gamma, add it."
        )
    checks = ", ".join(places)
    return (
        "No known coding error explains the values. They depend on the positions of the voxels "
        f"(check {checks}): search for a permute, reshape or flip of prediction or target. If the loss takes its "
        "target in another form than the declared one, declare that (--claim labels=map, indices or one-hot)."
    )


def _numerics(verification: Verification, groups: Sequence[Sequence[Record]]) -> str:
    """Problems of their own, apart from those that a wrong formula explains."""
    run = _run(verification, Level.numerics)
    if not run:
        return "Numerics: not checked."
    own = sum(len(group) for group in groups if group[0].level is Level.numerics)
    explained = sum(record.status is Status.broken for record in run) - own
    also = f", {explained} more broken by the wrong formula" if explained > 0 else ""
    problems = _counted(own, "problem") if own else "no problem of their own" if also else "no problem"
    return f"Numerics: {problems} ({_counted(len(run), 'check')}{also})."


def _interface(verification: Verification) -> str:
    if not _run(verification, Level.interface):
        return "Interface: not checked."
    found = sum(record.is_advice for record in verification.records)
    if not found:
        return "Interface: no finding."
    meaning = "with --strict" if verification.request.strict else "as advice, unless --strict is set"
    return f"Interface: {_counted(found, 'finding')}, {meaning}."


def _run(verification: Verification, level: Level) -> list[Record]:
    """The records of the laws of a level that apply."""
    levels = {law.id: law.level for law in verification.laws}
    applied = (r for r in verification.records if r.status is not Status.not_applicable)
    return [record for record in applied if levels[record.law] is level]


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _rank(record: Record) -> tuple[bool, int, float]:
    """Wrong before inaccurate, what others follow from before these, and by how far it is off."""
    first = ELEMENTARY.index(record.law) if record.law in ELEMENTARY else len(ELEMENTARY)
    off = record.worst.error / (record.worst.magnitude or 1) if record.worst is not None else float("inf")
    return record.level is not Level.formula, first, -off


def _grouped(broken: Sequence[Record], formula: Collection[str]) -> Iterator[list[Record]]:
    """Records that one cause may explain, the one to look at first in each: a wrong value, the same exception.

    `formula`: the ids of the laws of the formula.
    """
    left = list(broken)
    while left:
        first, *others = left
        same = [record for record in others if _explains(first, record, formula)]
        yield [first, *same]
        left = [record for record in others if record not in same]


def _explains(first: Record, record: Record, formula: Collection[str]) -> bool:
    if first.raised or record.raised:
        return first.raised == record.raised
    if first.law not in ELEMENTARY or first.level is not Level.formula:
        return False
    if record.law in formula:  # also where it is only inaccurate
        return True
    worst = record.worst
    return worst is not None and worst.expected is not None and worst.is_wrong


def _shown(group: Sequence[Record]) -> Iterator[str]:
    record, *others = group
    worst = record.worst
    how = _how(record)
    yield _cut(f"check {record.law}, {record.name}: {how}{_also(others)}")
    if record.worst_where:
        yield _cut(f"    on {record.worst_where}")
    yield _cut(f"    {record.worst if worst is not None else record.reason}")
    if record.hint and record.level is not Level.formula:
        yield _cut(f"    {record.hint}")


def _also(others: Sequence[Record]) -> str:
    """What the same cause may break; by name the laws that another ratio of the same sums would not break."""
    telling = [f"{record.law} {record.name}" for record in others if record.law in TELLING]
    rest = len(others) - len(telling)
    also = f"; also broken: {', '.join(telling)}" if telling else ""
    return f"{also}; {_counted(rest, 'more check')}, probably by the same cause" if rest else also


def _how(record: Record) -> str:
    if record.could_not_be_run:
        return "could not be run"
    if record.raised:
        return "raises"
    if record.worst is None or record.worst.expected is None:
        return "wrong" if record.level is Level.formula else "broken"
    return "wrong" if record.level is Level.formula or record.worst.is_wrong else "inaccurate"


def _cut(line: str) -> str:
    """At most `LONGEST` characters, of a list whole entries."""
    if len(line) <= LONGEST:
        return line
    whole = line[: LONGEST - 3].rpartition("; ")[0]
    return f"{whole}; …" if len(whole) > LONGEST // 2 else f"{line[: LONGEST - 1]}…"
