"""The value of every loss of voxloss against the oracle, on phantoms and on the demo's own volume.

This is law 24 of the judge, on given volumes alone. A new loss is checked once it has an entry in
`voxloss_verify.configurations`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

import voxloss
from voxloss_data import Phantom, SpherePhantom, all_phantoms
from voxloss_verify.check import chosen_laws, run_checks
from voxloss_verify.configurations import CONFIGURATIONS
from voxloss_verify.laws.law import Law, unlabelled
from voxloss_verify.laws.record import Record, Status
from voxloss_verify.laws.setting import PROFILES, Setting
from voxloss_verify.laws.sources import LabelPair, phantom_volumes, rounded, volume_of
from voxloss_verify.oracle.claims import Claims
from voxloss_verify.oracle.sums import Image
from voxloss_verify.oracle.volumes import Volume
from voxloss_verify.subject.subject import TargetError, subject_of

DTYPES = ("float32", "float64")
(ACCURACY,) = chosen_laws(["24"])

# The volumes in a dtype, in the form that a loss with these claims takes.
Source = Callable[[Claims, str], Sequence[Volume]]


@dataclass(frozen=True)
class ValueCheck:
    """The judge's record of a loss on a volume; without `volume` and `dtype` the loss could not be called."""

    loss: str
    configuration: str
    record: Record
    volume: str = ""
    dtype: str = ""

    @property
    def holds(self) -> bool:
        """Whether the value is right."""
        return self.record.status is Status.holds

    @property
    def error(self) -> float:
        """The distance from the exact value, relative to that if it is above 1; infinite if there is no value."""
        return float("inf") if self.record.worst is None else self.record.worst.error / self._scale

    @property
    def tolerance(self) -> float:
        """How large the error may be."""
        return 0.0 if self.record.worst is None else self.record.worst.tolerance / self._scale

    @property
    def _scale(self) -> float:
        """A sum over millions of voxels is as exact as a mean, and its error is millions of times as large."""
        worst = self.record.worst
        return 1.0 if worst is None or worst.expected is None else max(1.0, abs(worst.expected))


def on_phantoms(phantoms: Sequence[Phantom | SpherePhantom] | None = None) -> Source:
    """Phantoms, None for all, as their NIfTI files hold them, with the sums of their closed forms."""
    chosen = tuple(all_phantoms() if phantoms is None else phantoms)
    return _once_per_form(lambda claims, dtype: list(phantom_volumes(claims, chosen, dtype)))


def on_labels(prediction: Image, labels: Image, probabilities: Image) -> Source:
    """A predicted label map against the labels, and soft values as prediction, as target and as both.

    `prediction` and `labels` are [X, Y, Z] with the classes 0 … C − 1, `probabilities` [C, X, Y, Z] in [0, 1].
    Losses that take a label map get no soft target.
    """
    predicted, wanted = prediction.astype(np.int64), labels.astype(np.int64)
    hard = LabelPair("predicted labels vs labels", predicted, wanted, len(probabilities), np.eye(4))
    soft = replace(hard, name="probabilities vs labels", probabilities=probabilities)

    def volumes(claims: Claims, dtype: str) -> list[Volume]:
        found = [volume for pair in (hard, soft) if (volume := volume_of(claims, pair, dtype)) is not None]
        if claims.labels == "one-hot":
            target = rounded(probabilities, dtype)[None]
            names = ("predicted labels vs probabilities", "probabilities vs themselves")
            found += [volume.changed(name=name, target=target) for name, volume in zip(names, found, strict=True)]
        return found

    return _once_per_form(volumes)


def _once_per_form(source: Source) -> Source:
    """The same volumes for all losses that take them in the same form: their exact sums are computed once."""
    kept = cache(source)

    def volumes(claims: Claims, dtype: str) -> Sequence[Volume]:
        form = Claims(
            family="dice",
            activation=claims.activation,
            labels=claims.labels,
            regions=claims.regions,
            channels=claims.fixed_channels,
            classes=(claims.named_channels - 1,) if claims.named_channels else None,
        )
        return kept(form, dtype)

    return volumes


def check_losses(
    sources: Sequence[Source],
    losses: Sequence[type[nn.Module]] | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[ValueCheck]:
    """Compare losses, None for all of voxloss, with their exact values in every configuration and dtype.

    A class is looked up in the table of configurations by its name or that of a base class. One that cannot be
    made or called in a configuration gets one check of that, which does not hold.
    """
    setting = Setting(PROFILES["quick"], hints=False)
    for loss in [getattr(voxloss, name) for name in CONFIGURATIONS] if losses is None else losses:
        for label, arguments in _configurations(loss).items():
            yield from _check(loss, label, arguments, sources, setting, device)


def _configurations(loss: type[nn.Module]) -> Mapping[str, Mapping[str, Any]]:
    return next(CONFIGURATIONS[kind.__name__] for kind in loss.__mro__ if kind.__name__ in CONFIGURATIONS)


def _check(
    loss: type[nn.Module],
    label: str,
    arguments: Mapping[str, Any],
    sources: Sequence[Source],
    setting: Setting,
    device: str | torch.device,
) -> Iterator[ValueCheck]:
    try:
        subject = subject_of(loss, kwargs=arguments, device=device)
        volumes = [each for dtype in DTYPES for source in sources for each in source(subject.claims, dtype)]
        records = run_checks(subject, setting, map(_accuracy_on, volumes))
        for volume, record in zip(volumes, records, strict=True):
            if record.status is not Status.not_applicable:
                yield ValueCheck(loss.__name__, label, record, volume.name, volume.dtype)
    except TargetError as error:
        record = Record(ACCURACY.id, ACCURACY.name, Status.broken, str(error))
        yield ValueCheck(loss.__name__, label, record)


def _accuracy_on(volume: Volume) -> Law:
    """Law 24 on one volume, and not of losses that ignore one of its labels."""
    return replace(
        ACCURACY,
        strategy=None,
        given=lambda subject, setting: [volume],
        domain=lambda subject, setting: unlabelled(subject),
    )
