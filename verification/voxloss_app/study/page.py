"""evidence.md, from the results alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from voxloss_app.bench.page import markdown
from voxloss_app.bench.timing import ratios, short, spread
from voxloss_app.study.contenders import BASELINE, MONAI, VOXLOSS
from voxloss_app.study.picture import BALANCE, PARITY, file_name
from voxloss_app.study.results import (
    DICE,
    HD95,
    IOU,
    MISSED,
    PRECISION,
    RECALL,
    SCORES,
    Interval,
    Score,
    Study,
    mean_and_sd,
)
from voxloss_app.templates import environment
from voxloss_app.theme import THEMES

FILE = "evidence.md"
# A difference of Dice that a reader would call one; the limit of what the first line counts.
NOTABLE = 0.01
# Of each loss; of fewer the first line compares nothing.
FEWEST_RUNS = 3
# Both libraries in float32: what one formula may differ by before the networks do.
SAME = 1e-5
# Why a pair is not one formula, as docs/differences.md has it.
DEPARTS = {
    "GeneralizedDiceLoss": "MONAI's smoothing term outweighs its class weights 1/g², so that the loss depends on "
    "the size of the patch; voxloss scales the weights by the largest finite one",
    "DiceFocalLoss": "with softmax=True MONAI's focal term takes the sigmoid of each logit, that of voxloss "
    "the softmax",
}


def render(study: Study) -> str:
    """The page."""
    templates = environment("study", html=False)
    templates.filters["md"] = markdown
    return templates.get_template("evidence.md.j2").render(
        study=study,
        facts=study.facts,
        first=_first_line(study),
        scores=SCORES,
        compared=(DICE, IOU, PRECISION, RECALL, HD95),
        rows=[*_rows(study)],
        differences=[*_differences(study)],
        seed_question=_dice_or_iou(study),
        parity=[*_parity(study)],
        costs=[*_costs(study)],
        baseline=BASELINE,
        runs=len(study.results),
        failed=[each for each in study.results if each.failed is not None],
        pictures={name: {theme: file_name(name, theme) for theme in THEMES} for name in (PARITY, BALANCE)},
        notable=NOTABLE,
    )


def _first_line(study: Study) -> str:
    """How much the choice of the loss matters, in a sentence."""
    found = {}
    for contender in study.contenders:
        if contender.name != BASELINE and (difference := study.difference(contender.name, DICE)) is not None:
            found[contender.name] = difference
    data = f"{study.facts['data']} ({study.facts['scans']} scans)"
    runs = min((len(study.runs(contender.name)) for contender in study.contenders), default=0)
    if not found or runs < FEWEST_RUNS:
        return (
            f"Preliminary: on {data}, {runs} run{'s' if runs != 1 else ''} per loss of {study.facts['steps']} "
            "steps, which is too little to compare losses."
        )
    far = sorted((each.mean, name) for name, each in found.items() if abs(each.mean) >= NOTABLE)
    within = f"of {len(found)} losses end within {NOTABLE} of the Dice of `{BASELINE}`"
    if far:
        others = ", ".join(f"`{name}` ({_signed(mean)})" for mean, name in far)
        says = f"{len(found) - len(far)} {within}, and among them the choice hardly matters; the others: {others}"
    else:
        says = f"the choice of the loss hardly matters for Dice: {len(found)} {within}"
    better = sum(each.differs and each.mean > 0 for each in found.values())
    worse = sum(each.differs and each.mean < 0 for each in found.values())
    highest, best = max((each.mean, name) for name, each in found.items())
    return (
        f"On {data}, {says}. Better by more than the 95 % confidence interval: {better}, worse: {worse}; "
        f"the best is `{best}` ({_signed(highest)})."
    )


def _signed(difference: float, decimals: int = 3) -> str:
    return f"{difference:+.{decimals}f}".replace("-", "−")


def _rows(study: Study) -> Iterator[dict[str, Any]]:
    classes = study.facts["classes"]
    for contender in study.contenders:
        name = contender.name
        runs = study.runs(name)
        missed = sum(int(r.by_class[c][MISSED]) for r in runs if r.failed is None for c in classes)
        yield {
            "name": name,
            "runs": sum(r.failed is None for r in runs),
            "cells": [mean_and_sd(study.values(name, score), score) for score in SCORES],
            "by_class": [mean_and_sd(study.by_class(name, c, DICE.key), DICE) for c in classes],
            "missed": missed,
        }


def _differences(study: Study) -> Iterator[dict[str, Any]]:
    for contender in study.contenders:
        if contender.name != BASELINE:
            found = [(score, study.difference(contender.name, score)) for score in SCORES]
            yield {"name": contender.name, "cells": [_interval(each, score) for score, each in found]}


def _interval(found: Interval | None, score: Score) -> str:
    if found is None:
        return "–"
    text = f"{_signed(found.mean, score.decimals)} ± {found.half:.{score.decimals}f}"
    return f"**{text}**" if found.differs else text


def _dice_or_iou(study: Study) -> dict[str, Any] | None:
    names = {contender.name for contender in study.contenders}
    if not {"DiceLoss", "JaccardLoss"} <= names:
        return None
    rows = [
        {"name": name, "cells": [mean_and_sd(study.values(name, score), score) for score in (DICE, IOU)]}
        for name in ("DiceLoss", "JaccardLoss", BASELINE)
    ]
    found = {score: study.difference("JaccardLoss", score, "DiceLoss") for score in (DICE, IOU)}
    cells = [_interval(each, score) for score, each in found.items()]
    differs = [each.differs and each.mean > 0 for each in found.values() if each is not None]
    worse = [each.differs and each.mean < 0 for each in found.values() if each is not None]
    verdict = (
        "No difference is outside its interval: at equal budget, the loss that is named like the score is "
        "not the better one for it."
        if not any(differs + worse)
        else "Differences outside their intervals are bold."
    )
    return {"rows": rows, "difference": cells, "verdict": verdict}


def _parity(study: Study) -> Iterator[dict[str, Any]]:
    for peer in study.peers:
        name = peer.name
        ours = {(r.fold, r.seed): r for r in study.runs(name)}
        pairs = [(r, ours[r.fold, r.seed]) for r in study.runs(name, MONAI) if (r.fold, r.seed) in ours]
        apart = [[abs(a - b) for a, b in zip(r.losses, own.losses, strict=False)] for r, own in pairs]
        apart = [each for each in apart if each]
        final = study.difference(name, DICE, name, VOXLOSS, MONAI)
        first = max((each[0] for each in apart), default=0.0)
        of_fold = [own.mean(DICE) for _, own in pairs if own.failed is None]
        yield {
            "name": name,
            "first": f"{first:.1e}",
            "ten": f"{max((max(each[:10]) for each in apart), default=0.0):.1e}",
            "all": f"{max((max(each) for each in apart), default=0.0):.1e}",
            "monai": mean_and_sd(study.values(name, DICE, MONAI), DICE),
            "voxloss": mean_and_sd(of_fold, DICE),
            "difference": _interval(final, DICE),
            "why": DEPARTS.get(name, "not known") if first > SAME else "",
        }


def _costs(study: Study) -> Iterator[dict[str, Any]]:
    ours = {each.contender.name: each for each in study.costs if each.contender.library == VOXLOSS}
    theirs = {each.contender.name: each for each in study.costs if each.contender.library == MONAI}
    for name, own in ours.items():
        peer = theirs.get(name)
        times, steps = spread(own.loss_times), spread(own.step_times)
        yield {
            "name": name,
            "loss": f"{short(1e3 * times.median)} ({short(1e3 * times.low)}–{short(1e3 * times.high)})",
            "step": f"{short(1e3 * steps.median)} ({short(1e3 * steps.low)}–{short(1e3 * steps.high)})",
            "share": f"{own.share:.1%}".replace("%", " %"),
            "loss_peak": f"{own.loss_peak / 2**20:.1f}",
            "step_peak": f"{own.step_peak / 2**20:.0f}",
            "monai": "" if peer is None else f"{short(ratios(peer.loss_times, own.loss_times).median)} ×",
            "monai_step": "" if peer is None else f"{short(ratios(peer.step_times, own.step_times).median)} ×",
            "monai_peak": "" if peer is None else f"{peer.loss_peak / 2**20:.1f}",
        }
