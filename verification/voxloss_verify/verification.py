"""One verification: a loss made ready, the laws to check, and the records as they come."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from voxloss_verify import xfails
from voxloss_verify.check import called, chosen_laws, prepared, run_check
from voxloss_verify.forms import Form, with_form
from voxloss_verify.laws.law import Law
from voxloss_verify.laws.record import Record, Status, forget
from voxloss_verify.laws.setting import PROFILES, Setting
from voxloss_verify.laws.sources import read_pairs
from voxloss_verify.oracle.claims import METRICS, Claims, parse_claims
from voxloss_verify.request import Level, VerifyRequest
from voxloss_verify.subject.devices import chosen_device
from voxloss_verify.subject.metric import as_metric, is_metric
from voxloss_verify.subject.subject import Subject, said, subject_of

_LOG = logging.getLogger(__name__)

# Value and gradient: a loss that breaks one of these laws breaks others, too.
ELEMENTARY = ("24", "20")


@dataclass
class Verification:
    """What was requested, the loss that was found, and the records so far.

    Attributes:
        form: the properties that were not declared and were found by trying.
        records: of the checks run so far, in the light of `xfails`, the expected failures.
        files: of each broken law, those of its counter-example.
        unwritten: of each broken law without files, the reason.
    """

    request: VerifyRequest
    subject: Subject
    setting: Setting
    laws: Sequence[Law]
    xfails: Mapping[str, str]
    form: Form | None = None
    records: list[Record] = field(default_factory=list)
    files: dict[str, list[Path]] = field(default_factory=dict)
    unwritten: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        request: VerifyRequest,
        prefix: str = "--",
        search: AbstractContextManager[object] | None = None,
    ) -> Verification:
        """Find the loss, call it once, and read the files; `close` the result.

        Raises ValueError, in one line, for whatever is not as it should be; `prefix` begins the names of options.
        Within `search` properties that were not declared are tried, which can take 20 seconds.
        """
        family = None if request.family is None else request.family.replace("-", "_")
        if family not in METRICS:
            chosen_laws(request.laws)  # before anything that takes long
        expected = {} if request.xfails is None else xfails.read_xfails(request.xfails)
        device = chosen_device(request.device, f"{prefix}device")
        data = () if request.data is None else read_pairs(*request.data)
        is_read = True

        def change(read: Claims | None) -> Claims:
            nonlocal is_read
            is_read = read is not None
            return parse_claims(request.claims, read, family)

        try:
            subject = subject_of(request.target, kwargs=request.kwargs, device=device, change=change)
            subject = as_metric(subject)
            declared = request.declared
            form = None
            if request.search and not (is_read or is_metric(subject.claims)):
                with search or nullcontext():
                    form = with_form(subject, declared)
            subject = prepared(subject if form is None else form.subject)
        except ValueError:
            raise
        except (Exception, SystemExit) as error:  # a script that exits with 0 when it is imported must not pass
            raise ValueError(f"{request.target} cannot be loaded or called: {said(error)}") from error
        levels = request.levels
        if form is not None and not (form.fits or form.but or declared or levels or request.laws):
            # Not known what the loss is: its numerics would be compared with a guess.
            levels = (Level.formula,)
        laws = [
            law
            for law in chosen_laws(request.laws, is_metric(subject.claims))
            if not levels or law.level in levels
        ]
        if not laws:
            wanted = ", ".join(level.value for level in levels)
            raise ValueError(f"expected checks of level {wanted}, received {', '.join(request.laws or ())}.")
        setting = Setting(PROFILES[request.profile], request.seed, request.derandomize, data=data)
        return cls(request, subject, setting, laws, expected, form)

    def close(self) -> None:
        """End the processes that laws have started."""
        self.setting.ranks.close()

    @property
    def claims(self) -> str:
        """The family of the loss, and the properties that differ from the defaults or are declared."""
        differing = str(self.subject.claims)
        shown = {word.partition("=")[0] for word in differing.split()}
        others = sorted(self.request.declared - shown)
        return " ".join([differing, *(f"{name}={getattr(self.subject.claims, name)}" for name in others)])

    @property
    def complete(self) -> bool:
        """Whether every check has been run."""
        return len(self.records) == len(self.laws)

    @property
    def seconds(self) -> float:
        """Spent on checks so far."""
        return sum(record.seconds for record in self.records)

    @property
    def failed(self) -> bool:
        """Whether a law is broken where that is more than advice, or an expected failure is out of date."""
        return any(self.fails(record) for record in self.records)

    def fails(self, record: Record) -> bool:
        """Whether this record makes it fail."""
        return xfails.fails(record, self.xfails, self.request.strict)

    def run_check(self, law: Law) -> Record:
        """Run the check of a law, keep its record, and write the counter-example if it is broken."""
        _LOG.info("running check %s, %s", law.id, law.name)
        record = xfails.apply(run_check(self.subject, self.setting, law), self.xfails)
        self.records.append(record)
        forget(self.request.folder, law.id)
        if record.status is Status.broken and record.counterexample is not None:
            try:
                self.files[law.id] = record.counterexample.save(self.request.folder)
            except OSError as error:  # the law is broken all the same
                self.unwritten[law.id] = str(error)
        return record

    def snippet(self, record: Record) -> str:
        """Python that shows the broken law of a record; empty if it has no counter-example."""
        if record.counterexample is None:
            return ""
        return record.counterexample.snippet(self.request.folder if record.law in self.files else None)

    def explanation(self, record: Record) -> str:
        """Of a broken law what it showed, Python that shows it again, and the files."""
        lines = [record.reason]
        if record.counterexample is not None:
            if record.reason.startswith("raised"):
                lines.append(called(self.subject, record.counterexample.volume))
            lines += ["", self.snippet(record), ""]
        lines += [f"written: {path}" for path in self.files.get(record.law, ())]
        if record.law in self.unwritten:
            lines.append(f"not written: {self.unwritten[record.law]}")
        return "\n".join(lines).rstrip()
