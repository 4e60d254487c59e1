"""What the demo found, as numbers (metrics.json), as one page (report.html) and as a picture (report.png)."""

from __future__ import annotations

import base64
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch

import voxloss
from voxloss_app.demo import figures
from voxloss_app.demo.checks import ValueCheck
from voxloss_app.demo.data import CLASSES
from voxloss_app.demo.settings import Settings
from voxloss_app.demo.training import Training, mean_foreground
from voxloss_app.names import LOSSES
from voxloss_app.templates import environment
from voxloss_app.theme import DARK, LIGHT
from voxloss_data.files import save_bytes, save_json, save_text
from voxloss_verify.oracle.sums import dice, jaccard, label_sums
from voxloss_verify.subject.devices import device_name


@dataclass(frozen=True)
class Results:
    """The content of the report."""

    settings: Settings
    training: Training
    image: Any  # a MetaTensor [1, X, Y, Z]: both hemispheres
    checks: Sequence[ValueCheck]
    checked: bool  # False if the checks were interrupted
    seconds: float  # of the training


def metrics(results: Results) -> dict[str, Any]:
    """Every number of the report, ready for JSON; the page shows no other."""
    settings, training = results.settings, results.training
    counts = label_sums(training.prediction, training.labels, len(CLASSES))
    by_class = [dice(s) for s in counts]
    worst = worst_by_loss(results.checks)
    return {
        "settings": {
            "loss": settings.loss,
            "class": LOSSES[settings.loss],
            "steps": settings.steps,
            "device": str(settings.device),
            "seed": settings.seed,
            "command": settings.command,
        },
        "versions": {
            "voxloss": voxloss.__version__,
            "torch": torch.__version__,
            "monai": monai.__version__,
            "python": platform.python_version(),
            "device": device_name(settings.device),
            "threads": torch.get_num_threads(),
        },
        "training": {
            "steps_done": len(training.losses),
            "interrupted": training.interrupted,
            "seconds": round(results.seconds, 1),
            "loss": training.losses,
            "dice": {
                step: dict(zip(CLASSES, map(float, scores), strict=True))
                for step, scores in training.dice.items()
            },
        },
        "held_out": {
            "mean_foreground_dice": float(mean_foreground(by_class)),
            "classes": [
                {
                    "name": name,
                    "dice": float(dice(s)),
                    "dice_exact": _exact(dice(s)),
                    "iou": float(jaccard(s)),
                    "iou_exact": _exact(jaccard(s)),
                    "true_voxels": int(s.target),
                    "predicted_voxels": int(s.prediction),
                }
                for name, s in zip(CLASSES, counts, strict=True)
            ],
        },
        "checks": {
            "complete": results.checked,
            "count": len(results.checks),
            "failed": sum(not check.holds for check in results.checks),
            "losses": worst,
            "records": [check_fields(check) for check in results.checks],
        },
    }


def worst_by_loss(checks: Iterable[ValueCheck]) -> list[dict[str, Any]]:
    """Per loss and dtype: how many cases, how many failed, and the one with the largest error."""

    def key(check: ValueCheck) -> tuple[str, str]:
        return check.loss, check.dtype

    rows = []
    for (loss, dtype), group in groupby(sorted(checks, key=key), key):
        cases = list(group)
        worst = max(cases, key=lambda check: (not check.holds, check.error))
        rows.append(
            {
                "loss": loss,
                "dtype": dtype,
                "count": len(cases),
                "failed": sum(not check.holds for check in cases),
                "worst": check_fields(worst),
            }
        )
    return rows


def check_fields(check: ValueCheck) -> dict[str, Any]:
    """A check for JSON, which knows neither NaN nor infinity."""
    worst = check.record.worst
    fields = {
        "loss": check.loss,
        "configuration": check.configuration,
        "case": check.volume,
        "dtype": check.dtype,
        "expected": None if worst is None else worst.expected,
        "received": None if worst is None else worst.received,
        "tolerance": check.tolerance,
        "error": check.error,
        "holds": check.holds,
        "note": check.record.reason,
    }
    return {
        key: None if isinstance(value, float) and not np.isfinite(value) else value
        for key, value in fields.items()
    }


def write_report(results: Results) -> Path:
    """Write metrics.json, report.png and report.html to the folder; return the path of the page."""
    settings, training = results.settings, results.training
    numbers = metrics(results)
    segmentation = figures.Segmentation(
        image=results.image[0].numpy(),
        reference=training.labels,
        prediction=training.prediction,
        affine=results.image.affine.numpy(),
    )
    curves = figures.Curves(
        training.losses, {step: [float(score) for score in scores] for step, scores in training.dice.items()}
    )
    page = (
        environment("demo")
        .get_template("report.html.j2")
        .render(
            numbers,
            colours=figures.COLOURS,
            slices={
                "light": _data_url(figures.slices_png(segmentation, LIGHT)),
                "dark": _data_url(figures.slices_png(segmentation, DARK)),
            },
            curves={
                "light": _data_url(figures.curves_png(curves, LIGHT)),
                "dark": _data_url(figures.curves_png(curves, DARK)),
            },
        )
    )
    save_json(settings.out / "metrics.json", numbers)
    save_bytes(settings.out / "report.png", figures.overview_png(segmentation, curves, LIGHT))
    path = settings.out / "report.html"
    save_text(path, page)
    return path


def _exact(score: Fraction) -> str:
    return f"{score.numerator}/{score.denominator}"


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
