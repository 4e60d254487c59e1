"""pytest --voxloss-target: one test per law, beside those that are there. Without the option it loads nothing."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from voxloss_verify.laws.law import Law
    from voxloss_verify.verification import Verification

# How the ids of these tests begin; they are in no file.
ROOT = "voxloss"
# Those of `request.Level`, which is not loaded without the option.
LEVELS = ("formula", "numerics", "interface")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `voxloss verify` that apply to tests."""
    group = parser.getgroup("voxloss", "verification of a loss, a test per check (see voxloss verify --help)")
    add = group.addoption
    add("--voxloss-target", metavar="TARGET", help="module:Name or file.py:Name of the loss")
    add("--voxloss-kwargs", metavar="JSON", help="the arguments of the class")
    add("--voxloss-as", metavar="FAMILY", help="declared family: dice, jaccard, tversky, …")
    add(
        "--voxloss-claim",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="declared property; may be repeated",
    )
    add(
        "--voxloss-no-search",
        action="store_true",
        help="try nothing that is not declared: the default holds",
    )
    add(
        "--voxloss-xfails",
        metavar="FILE",
        type=Path,
        help="expected failures: TOML, [xfail] with a reason per check",
    )
    add(
        "--voxloss-profile",
        choices=["quick", "default", "thorough"],
        default="default",
        help="extent of the checks (default: %(default)s)",
    )
    add(
        "--voxloss-strict",
        action="store_true",
        help="fail for findings about the interface, which are advice otherwise, and xfail",
    )
    add("--voxloss-device", metavar="NAME", default="cpu", help="cpu, cuda, …, auto (default: %(default)s)")
    add("--voxloss-seed", metavar="N", type=int, default=0, help="random seed (default: %(default)s)")
    add(
        "--voxloss-counterexamples",
        metavar="FOLDER",
        type=Path,
        help="folder for the counter-examples of broken checks (default: voxloss-counterexamples)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Prepare for the laws, if there is a loss; -m voxloss_formula chooses a level of them."""
    for level in LEVELS:
        config.addinivalue_line("markers", f"voxloss_{level}: a check of a loss whose level is {level}")
    if config.getoption("voxloss_target") is not None:
        config.pluginmanager.register(_Laws(config), "voxloss-laws")


class _Laws:
    """The hooks of a session that verifies a loss."""

    def __init__(self, config: pytest.Config) -> None:
        self.verification: Verification | None = None
        # pytest would look for a file of that name.
        self.chosen = [arg for arg in config.args if arg.partition("::")[0] == ROOT]
        config.args[:] = [arg for arg in config.args if arg not in self.chosen]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        # Not while collecting: under xdist only workers do that, and the main process reports errors.
        self.verification = _prepared(session.config)
        unknown = {*self.chosen} - {ROOT} - {f"{ROOT}::{_name(law)}" for law in self.verification.laws}
        if unknown:
            raise pytest.UsageError(f"not found: {', '.join(sorted(unknown))}")

    def pytest_report_header(self) -> str:
        assert self.verification is not None
        request, subject = self.verification.request, self.verification.subject
        return (
            f"voxloss: {request.target}, claims {self.verification.claims}, on {subject.device}, "
            f"profile {request.profile}, seed {request.seed}"
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        assert self.verification is not None
        laws = _LawCollector.from_parent(session, name=ROOT, nodeid=ROOT, verification=self.verification)
        everything = not self.chosen or ROOT in self.chosen
        items.extend(item for item in session.genitems(laws) if everything or item.nodeid in self.chosen)

    def pytest_sessionfinish(self) -> None:
        if self.verification is not None:
            self.verification.close()


class _LawCollector(pytest.Collector):
    """All laws."""

    def __init__(self, *, verification: Verification, **node: Any) -> None:
        super().__init__(**node)
        self.verification = verification

    def collect(self) -> Iterator[_LawItem]:
        """One test for each, in their order."""
        for law in self.verification.laws:
            yield _LawItem.from_parent(self, name=_name(law), law=law, verification=self.verification)


class _LawItem(pytest.Item):
    """Runs the check of one law."""

    def __init__(self, *, law: Law, verification: Verification, **node: Any) -> None:
        super().__init__(**node)
        self.law, self.verification = law, verification
        self.add_marker(f"voxloss_{law.level.value}")
        why = verification.xfails.get(law.id)
        if why is not None:
            # `runtest` reports expected failures itself: this is for checks that pass.
            self.add_marker(pytest.mark.xfail(reason=why, raises=(), strict=verification.request.strict))

    def runtest(self) -> None:
        """Pass, skip, xfail or fail according to the record."""
        from voxloss_verify.laws.record import Status

        with warnings.catch_warnings():
            # The user's filters may make errors of those of torch; the loss is to be judged by its values.
            warnings.simplefilter("ignore")
            record = self.verification.run_check(self.law)
        if record.is_advice and not self.verification.fails(record):
            pytest.xfail(f"advice: {record.reason}")
        if record.status is Status.broken:
            pytest.fail(self.verification.explanation(record), pytrace=False)
        if record.status is not Status.unexpected and self.verification.fails(record):
            pytest.fail(f"{record.status.value}, {record.reason}", pytrace=False)
        if record.status is Status.expected:
            pytest.xfail(record.reason)
        if record.status is Status.not_applicable:
            pytest.skip(record.reason)

    def reportinfo(self) -> tuple[Path, None, str]:
        """The headline of a failure."""
        return self.path, None, f"check {self.law.id}: {self.law.name}"


def _name(law: Law) -> str:
    words = re.sub(r"\W+", "_", law.name).strip("_").lower()
    return f"check_{law.number:02}{law.part}_{words}"


def _prepared(config: pytest.Config) -> Verification:
    try:
        from voxloss_verify.request import COUNTEREXAMPLES, VerifyRequest, parse_kwargs
        from voxloss_verify.verification import Verification
    except ImportError as error:
        raise pytest.UsageError(f"--voxloss-target needs {error.name}: pip install 'voxloss[verify]'") from error
    option = config.getoption
    try:
        kwargs = parse_kwargs(option("voxloss_kwargs"))
    except ValueError as error:
        raise pytest.UsageError(f"--voxloss-kwargs: {error}") from error
    seed = option("voxloss_seed")
    if not 0 <= seed < 2**32:
        raise pytest.UsageError(f"--voxloss-seed: expected a whole number from 0 to 2³² − 1, received {seed}.")
    request = VerifyRequest(
        target=option("voxloss_target"),
        kwargs=kwargs,
        family=option("voxloss_as"),
        claims=option("voxloss_claim"),
        search=not option("voxloss_no_search"),
        device=option("voxloss_device"),
        profile=option("voxloss_profile"),
        seed=seed,
        strict=option("voxloss_strict"),
        # With --runxfail nothing is expected to fail.
        xfails=None if option("runxfail") else option("voxloss_xfails"),
        counterexamples=option("voxloss_counterexamples") or COUNTEREXAMPLES,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Verification.of(request, prefix="--voxloss-")
    except ValueError as error:
        raise pytest.UsageError(f"voxloss: {error}") from error
