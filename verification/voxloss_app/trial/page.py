"""trials.md, from the results alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from voxloss_app.templates import environment
from voxloss_app.trial.picture import file_name
from voxloss_app.trial.results import Trial, spread
from voxloss_app.trial.tasks import BASELINE
from voxloss_app.trial.training import CHANNELS


def render(trials: Sequence[Trial]) -> str:
    """The page about some trials."""
    return (
        environment("trial", html=False)
        .get_template("trials.md.j2")
        .render(trials=[_trial(trial) for trial in trials], baseline=BASELINE)
    )


def _trial(trial: Trial) -> dict[str, Any]:
    seeds = len(trial.seeds)
    return {
        "title": trial.task.title,
        "data": trial.task.data,
        "command": trial.command,
        "versions": trial.versions,
        "settings": asdict(trial.settings),
        "channels": ", ".join(map(str, CHANNELS)),
        "seeds": seeds,
        "scores": trial.task.scores,
        "picture": file_name(trial.task),
        "losses": [
            {"name": loss, "cells": [spread(trial.by_seed(loss, score), score) for score in trial.task.scores]}
            for loss in trial.losses
        ],
        "others": [
            {
                "name": loss,
                "cells": [
                    f"{spread(trial.differences(loss, score), score, signed=True)} "
                    f"({trial.better(loss, score)} of {seeds})"
                    for score in trial.task.scores
                ],
                "verdict": "; ".join(verdict(trial, loss)),
            }
            for loss in trial.losses
            if loss != BASELINE
        ],
        "by_chance": f"{100 * 2 ** (1 - seeds):.2g} %",
    }


def verdict(trial: Trial, loss: str) -> Iterator[str]:
    """In which scores a loss is better or worse than the baseline in every seed, and in which it is neither."""
    seeds = len(trial.seeds)
    better, worse, mixed = [], [], []
    for score in trial.task.scores:
        if trial.better(loss, score) == seeds:
            better.append(score.title)
        elif trial.worse(loss, score) == seeds:
            worse.append(score.title)
        else:
            mixed.append(score.title)
    yield from (
        f"{text}: {', '.join(titles) or 'none'}"
        for text, titles in (
            ("better in every seed", better),
            ("worse in every seed", worse),
            ("no consistent difference", mixed),
        )
    )
