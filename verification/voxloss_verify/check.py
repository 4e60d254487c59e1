"""Run the checks of all laws on a loss: `check_loss`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Flaky

from voxloss_verify.hints import hint, hint_of_a_power, hint_of_half_precision
from voxloss_verify.laws import LAWS, METRIC_LAWS
from voxloss_verify.laws.law import Law
from voxloss_verify.laws.record import CounterExample, Finding, Record, Status
from voxloss_verify.laws.setting import PROFILES, Setting
from voxloss_verify.laws.sources import LabelPair, cube
from voxloss_verify.oracle import exact
from voxloss_verify.oracle.claims import Claims
from voxloss_verify.oracle.volumes import Volume, as_given
from voxloss_verify.precision import with_precision
from voxloss_verify.request import Level, ProfileName
from voxloss_verify.subject.metric import Metric, as_metric, is_metric
from voxloss_verify.subject.subject import Raised, Subject, TargetError, said, subject_of

# The law about finite gradients, also for an empty target.
FINITE = "23b"


class Broken(Exception):
    """A law does not hold on a volume."""

    def __init__(self, volume: Volume, finding: Finding, message: str, raised: str = "") -> None:
        super().__init__(message)
        self.volume, self.finding, self.message, self.raised = volume, finding, message, raised


def check_loss(
    loss: str | Callable[..., Any],
    claims: Claims | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    profile: ProfileName = "quick",
    seed: int = 0,
    derandomize: bool = False,
    data: Sequence[LabelPair] = (),
    laws: Sequence[str] | None = None,
) -> Iterator[Record]:
    """Run every check on a loss and yield a record of each, in the order of the laws.

    Args:
        loss: "module:Name", "file.py:Name", a class, an instance or a function (input, target) -> Tensor.
        claims: the declared properties; None reads them from an instance of a class in
            `subject.readers`: of voxloss, MONAI, nnU-Net, kornia, SMP, torchmetrics.
        kwargs: the arguments of a class.
        device: where the loss runs.
        profile: "quick", "default" or "thorough": how many volumes are drawn, and how large the given ones are.
        seed: of all random volumes. `derandomize`: let Hypothesis choose them from each law alone.
        data: additional label maps, from `voxloss_verify.laws.sources.read_pairs`.
        laws: the ids of the checks to run, None for all.

    Raises:
        TargetError: if the loss cannot be loaded, constructed or called, or if its properties are not known.
        ValueError: for a law or profile that does not exist.
    """
    subject = as_metric(subject_of(loss, claims, kwargs=kwargs, device=device))
    if profile not in PROFILES:
        raise ValueError(f"profile: expected one of {', '.join(PROFILES)}, received {profile!r}.")
    setting = Setting(PROFILES[profile], seed, derandomize, data=data)
    try:
        yield from run_checks(subject, setting, chosen_laws(laws, is_metric(subject.claims)))
    finally:
        setting.ranks.close()


def chosen_laws(ids: Sequence[str] | None, of_metrics: bool = False) -> list[Law]:
    """The laws with these ids, in their own order; None chooses all.

    31, which is no law's id, is all of 31a, 31b, ….
    """
    laws = METRIC_LAWS if of_metrics else LAWS
    if ids is None:
        return list(laws)
    exact = {law.id for law in laws}
    unknown = sorted(map(str, set(ids) - exact - {str(law.number) for law in laws}))
    if unknown:
        raise ValueError(
            f"checks: expected ids of {', '.join(law.id for law in laws)}, received {', '.join(unknown)}."
        )
    wholes = set(ids) - exact
    return [law for law in laws if law.id in ids or str(law.number) in wholes]


def run_checks(subject: Subject, setting: Setting, laws: Iterable[Law]) -> Iterator[Record]:
    """Run the checks of these laws, after one call that shows that the loss can be called at all.

    A law is taken from `laws` only when the record before it has been used.

    Raises:
        TargetError: if the loss cannot be called.
    """
    subject = prepared(subject)
    for law in laws:
        yield run_check(subject, setting, law)


def prepared(subject: Subject) -> Subject:
    """Call the loss once on an easy volume, and find out what it computes in.

    Raises TargetError, with the claims that decided the form of the tensors, if it raises.
    """
    volume = cube(subject.claims, 4, subject.claims.dtypes[0], 0)
    try:
        subject.value(volume)
    except Raised as error:
        raise TargetError(f"{subject.name} {error}; {called(subject, volume)}.") from error
    return subject if is_metric(subject.claims) else with_precision(subject)


def called(subject: Subject, volume: Volume) -> str:
    """What a loss was given, and the claims that decided so: for one that raised."""
    claims = subject.claims
    target = {
        "map": "labels [B, 1, ...]",
        "indices": "labels [B, ...]",
        "regions": "labels [B, 1, ...]",
        "one-hot": "one channel per class",
    }
    return (
        f"it was called with {volume.dtype} {list(volume.input.shape)} "
        f"({'logits' if claims.activation != 'none' else 'probabilities'}: claim activation={claims.activation}) "
        f"and a target of {target[claims.labels]} (claim labels={claims.labels})"
    )


def run_check(subject: Subject, setting: Setting, law: Law) -> Record:
    """Run the check of one law; an exception inside the law becomes a record without a finding."""
    start = time.perf_counter()
    try:
        record = _examined(subject, setting, law)
    except Exception as error:  # what a loss returns may be so odd that a law fails on it: the others are run
        reason = f"the check could not be run: {said(error)}"
        record = Record(law.id, law.name, Status.broken, reason, level=law.level)
    return replace(record, seconds=time.perf_counter() - start)


def _examined(subject: Subject, setting: Setting, law: Law) -> Record:
    reason = law.domain(subject, setting)
    if reason is not None:
        return Record(law.id, law.name, Status.not_applicable, reason, level=law.level)
    examiner = _Examiner(subject, setting, law)
    broken = examiner.examine_all()
    record = Record(
        law.id,
        law.name,
        Status.holds,
        examples=examiner.examples,
        worst=examiner.worst,
        worst_where=examiner.worst_where,
        level=law.level,
    )
    if broken is not None:
        shown, indices = broken.volume, subject.claims.labels == "indices"
        shown = shown.changed(target=as_given(subject.claims, shown.target))
        if isinstance(subject, Metric):
            given = (tensor.numpy() for tensor in subject.tensors(shown))
            shown, indices = shown.changed(**dict(zip(("input", "target"), given, strict=True))), False
        example = CounterExample(
            law.id,
            shown,
            broken.message,
            subject.source,
            broken.finding.code or law.code,
            broken.finding.other,
            indices,
            broken.finding.other_gradient,
            isinstance(subject, Metric),
        )
        why = _hint(subject, law, broken.volume) if setting.hints else ""
        record = replace(
            record,
            status=Status.broken,
            reason=broken.message + (f"; {why}" if why else ""),
            hint=why,
            raised=broken.raised,
            worst=broken.finding,
            worst_where=str(broken.volume),
            counterexample=example,
            level=law.level if examiner.wrong is not None or law.level is not Level.formula else Level.numerics,
        )
    elif not examiner.examples:
        reason = "no volume that fits what is declared has anything to compare"
        record = replace(record, status=Status.not_applicable, reason=reason)
    return record


def _hint(subject: Subject, law: Law, wrong: Volume) -> str:
    """Where the value itself is wrong, perhaps only the claims are, or the slip is a known one."""
    if law.id == "24":
        return hint(subject, wrong)
    if law.id == "25":
        return hint_of_half_precision(subject, wrong)
    return hint_of_a_power(subject.claims) if law.id == FINITE else ""


class _Examiner:
    """Tries volumes, remembers the finding nearest to its tolerance."""

    def __init__(self, subject: Subject, setting: Setting, law: Law) -> None:
        self.subject, self.setting, self.law = subject, setting, law
        self.examples = 0
        self.worst: Finding | None = None
        self.worst_where = ""
        # The last that is more than inaccurate, which the smallest volume may not be.
        self.wrong: Broken | None = None

    def examine_all(self) -> Broken | None:
        """Try drawn volumes first, as only they shrink, then given ones; return the first that breaks the law."""
        try:
            self._examine_drawn()
            for volume in self.law.given(self.subject, self.setting) if self.law.given else ():
                self.examine(volume)
        except Broken as broken:
            if self.law.level is Level.formula and not broken.finding.is_wrong:
                return self._wrong() or self.wrong or broken
            return broken
        return None

    def examine(self, volume: Volume) -> None:
        """Raise `Broken` if the law does not hold on a volume."""
        claims = self.subject.claims
        said_once = claims.may_be_nan and not is_metric(claims) and self.law.id != FINITE
        if said_once and np.isnan(exact.expected(claims, volume).value).any():
            return  # NaN is declared; that the score should be a number is reported once
        compared = False
        try:
            for finding in self.law.check(self.subject, volume, self.setting):
                # A volume on which a law compares nothing is no example of it.
                self.examples += not compared
                compared = True
                # A statement that is true has no error to report.
                if finding.tolerance and (self.worst is None or _badness(finding) > _badness(self.worst)):
                    self.worst, self.worst_where = finding, str(volume)
                if not finding.holds:
                    broken = Broken(finding.volume or volume, finding, str(finding))
                    self.wrong = broken if finding.is_wrong else self.wrong
                    raise broken
        except Raised as error:
            self.examples += not compared
            finding = Finding(str(error), None, None, 0.0, float("inf"))
            self.wrong = Broken(volume, finding, str(error), str(error))
            raise self.wrong from error

    def _examine_drawn(self) -> None:
        if self.law.strategy is None:
            return
        last: Broken | None = None

        def examine(volume: Volume) -> None:
            nonlocal last
            try:
                self.examine(volume)
            except Broken as broken:
                last = broken
                raise

        try:
            self._draw(examine, shrink=self.setting.shrink)
        except Flaky as error:
            assert last is not None
            message = f"{last.message}, and not each time it was tried"
            raise Broken(last.volume, last.finding, message, last.raised) from error

    def _wrong(self) -> Broken | None:
        """The smallest volume on which the law is worse than inaccurate: that of all may be a mild one."""
        found: Broken | None = None

        def examine(volume: Volume) -> None:
            nonlocal found
            try:
                self.examine(volume)
            except Broken as broken:
                if broken.finding.is_wrong:
                    found = broken
                    raise

        counted = self.examples
        with suppress(Broken, Flaky):
            if self.law.strategy is not None:
                self._draw(examine, shrink=self.setting.shrink)
            for volume in self.law.given(self.subject, self.setting) if self.law.given else ():
                examine(volume)
        self.examples = counted
        return found

    def _draw(self, examine: Callable[[Volume], None], *, shrink: bool) -> None:
        assert self.law.strategy is not None
        run = settings(
            max_examples=self.setting.profile.examples,
            deadline=None,
            database=None,
            derandomize=self.setting.derandomize,
            phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
            verbosity=hypothesis.Verbosity.quiet,
        )(given(self.law.strategy(self.subject.claims))(examine))
        if not self.setting.derandomize:
            run = hypothesis.seed(self.setting.seed)(run)
        run()


def _badness(finding: Finding) -> float:
    """The error in tolerances."""
    if finding.tolerance:
        return finding.error / finding.tolerance
    return 0.0 if finding.error == 0 else float("inf")
