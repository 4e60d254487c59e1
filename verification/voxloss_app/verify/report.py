"""What a verification found, for machines (--json) and as one page (--html)."""

from __future__ import annotations

import math
import platform
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch

import voxloss
from voxloss_app.installed import version_of
from voxloss_app.templates import environment
from voxloss_app.verify.cells import Picture, pictures
from voxloss_app.verify.verdict import verdict, worst_first
from voxloss_data.files import save_json, save_text
from voxloss_verify.laws.law import Law
from voxloss_verify.laws.record import LITERAL, CounterExample, Record, Status
from voxloss_verify.oracle.volumes import Volume
from voxloss_verify.subject.devices import device_name
from voxloss_verify.tolerances import GRADIENT, LOSS
from voxloss_verify.verification import Verification


def report(verification: Verification) -> dict[str, Any]:
    """Everything that was found, ready for JSON; NaN and infinities are "NaN", "Infinity", "-Infinity".

    | key | value |
    |---|---|
    | target, kwargs, source | what was requested, and Python that makes it |
    | claims | every field of `Claims` |
    | versions | of voxloss, torch, numpy, hypothesis, python, and of the target's package if it has one |
    | device, device_name | where it ran |
    | profile, seed, derandomize, data | how volumes were drawn, and the names of the user's own |
    | strict | whether findings about the interface count |
    | laws, complete, seconds | how many checks were to be run, whether all were, and how long that took |
    | failed | whether a law that counts is broken, or an expected failure out of date; so far, unless complete |
    | verdict | the lines that the command prints |
    | counts | the number of records by status |
    | xfails | the reasons of the expected failures by law |
    | records | one per check that was run or does not apply, in the order of the laws |

    A record has law, name, level (formula, numerics or interface), because, version (of the check), statement,
    oracle, tolerance, status (a value of `Status`), advice, failed, reason, hint, examples, seconds. It has
    worst, the finding nearest to its tolerance or beyond it, or null: what, where, received, expected, error,
    tolerance, ulp. It has counterexample, or null: message, snippet, files, and of the volume its name, dtype,
    input_shape, target_shape, and input and target as nested lists, each null above 256 numbers; the same of
    other, the volume that it is compared with, or null.
    """
    request, subject = verification.request, verification.subject
    laws = {law.id: law for law in verification.laws}
    counts = Counter(record.status for record in verification.records)
    content = {
        "target": request.target,
        "kwargs": request.kwargs,
        "source": subject.source,
        "claims": asdict(subject.claims),
        "versions": _versions(request.target),
        "device": str(subject.device),
        "device_name": device_name(subject.device),
        "profile": request.profile,
        "strict": request.strict,
        "seed": request.seed,
        "derandomize": request.derandomize,
        "data": [pair.name for pair in verification.setting.data],
        "laws": len(laws),
        "complete": verification.complete,
        "seconds": round(verification.seconds, 3),
        "failed": verification.failed,
        "verdict": list(verdict(verification)),
        "counts": {status.value: counts[status] for status in Status},
        "xfails": verification.xfails,
        "records": [_fields(record, laws[record.law], verification) for record in verification.records],
    }
    return {key: _plain(value) for key, value in content.items()}


def write_json(path: Path, verification: Verification) -> None:
    """Write `report`."""
    save_json(path, report(verification))


def write_html(path: Path, verification: Verification) -> None:
    """Write one page that needs no other file and no network."""
    content = report(verification)
    records = {record["law"]: record for record in content["records"]}
    page = (
        environment("verify")
        .get_template("report.html.j2")
        .render(
            content,
            worst_first=[records[record.law] for record in worst_first(verification)],
            tolerances={"loss": _by_dtype(LOSS), "gradient": _by_dtype(GRADIENT)},
            pictures={
                record.law: _pictures(record.counterexample)
                for record in verification.records
                if record.counterexample is not None
            },
        )
    )
    save_text(path, page)


def _by_dtype(tolerance: Mapping[str, float]) -> str:
    return ", ".join(f"{value:.1g} in {dtype}" for dtype, value in tolerance.items())


def _fields(record: Record, law: Law, verification: Verification) -> dict[str, Any]:
    worst, example = record.worst, record.counterexample
    return {
        "law": record.law,
        "name": record.name,
        "level": record.level.value,
        "because": law.because,
        "version": law.version,
        "statement": law.statement,
        "oracle": law.oracle,
        "tolerance": law.tolerance,
        "status": record.status.value,
        "advice": record.is_advice,
        "failed": verification.fails(record),
        "reason": record.reason,
        "hint": record.hint,
        "examples": record.examples,
        "seconds": round(record.seconds, 3),
        "worst": None
        if worst is None
        else {
            "what": worst.what,
            "where": record.worst_where,
            "received": worst.received,
            "expected": worst.expected,
            "error": worst.error,
            "tolerance": worst.tolerance,
            "ulp": worst.ulp,
        },
        "counterexample": None
        if example is None
        else {
            "message": example.message,
            "snippet": verification.snippet(record),
            **_volume(example.volume),
            "other": None if example.other is None else _volume(example.other),
            "files": verification.files.get(record.law, []),
        },
    }


def _pictures(example: CounterExample) -> list[Picture]:
    other = [] if example.other is None else pictures(example.other, "other ")
    return [*pictures(example.volume), *other]


def _volume(volume: Volume) -> dict[str, Any]:
    input, target = (array.tolist() if array.size <= LITERAL else None for array in (volume.input, volume.target))
    return {
        "name": volume.name,
        "dtype": volume.dtype,
        "input_shape": volume.input.shape,
        "target_shape": volume.target.shape,
        "input": input,
        "target": target,
    }


def _versions(target: str) -> dict[str, str]:
    versions = {
        "voxloss": voxloss.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "hypothesis": hypothesis.__version__,
        "python": platform.python_version(),
    }
    where = target.rpartition(":")[0]
    package = where.partition(".")[0]
    if not where.endswith(".py") and package not in versions:
        version = getattr(sys.modules.get(package), "__version__", None) or version_of(package)
        if version is not None:
            versions[package] = str(version)
    return versions


def _plain(value: Any) -> Any:
    """A value of JSON, which knows neither NaN nor infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
