"""pytest --voxloss-target: one test per law, in whoever's test suite, and no trace of it in the others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import losses_with_flaws
from voxloss_verify.laws import LAWS
from voxloss_verify.pytest_plugin import LEVELS
from voxloss_verify.request import Level, VerifyRequest
from voxloss_verify.subject.ranks import Ranks
from voxloss_verify.verification import Verification

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("one_thread")

FLAWS = Path(losses_with_flaws.__file__)
LOGITS = '{"softmax": true, "to_onehot_y": true}'
Verify = Callable[..., pytest.RunResult]


@pytest.fixture(scope="module", autouse=True)
def loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """All that a nested pytest loads: pytester forgets the rest, and torch does not bear being loaded twice."""
    folder = tmp_path_factory.mktemp("counter-examples")
    laws = ("1", "4", "20", "25")
    request = VerifyRequest(
        target="voxloss:DiceLoss", kwargs={}, profile="quick", laws=laws, counterexamples=folder
    )
    verification = Verification.of(request)
    for law in verification.laws:
        verification.run_check(law)
    verification.close()


@pytest.fixture
def verify(pytester: pytest.Pytester) -> Verify:
    """Run pytest on a loss, quickly, in an empty folder and in this process."""

    def run(target: str, *arguments: str) -> pytest.RunResult:
        options = ["--voxloss-target", target, "--voxloss-profile", "quick", "--voxloss-kwargs", LOGITS]
        return pytester.runpytest_inprocess(*options, "-p", "no:xdist", "-ra", *arguments)

    return run


def lines(result: pytest.RunResult, start: str) -> list[str]:
    return [line for line in result.outlines if line.startswith(start)]


@pytest.mark.integration
def test_one_test_per_law(verify: Verify) -> None:
    result = verify("voxloss:DiceLoss", "--collect-only", "-q")
    laws = lines(result, "voxloss::check_")
    assert len(laws) == len(LAWS)
    assert laws[0] == "voxloss::check_01_shifted_boxes_and_nested_cubes"
    assert laws == sorted(laws)
    assert result.ret == 0


@pytest.mark.integration
def test_laws_that_hold_without_any_test_file(verify: Verify) -> None:
    result = verify("voxloss:DiceLoss", "-k", "check_01 or check_04", "--voxloss-seed", "5")
    result.assert_outcomes(passed=2, deselected=len(LAWS) - 2)
    assert result.ret == 0
    (header,) = lines(result, "voxloss: ")
    assert header.startswith("voxloss: voxloss:DiceLoss, claims family=dice ")
    assert header.endswith(", on cpu, profile quick, seed 5")


@pytest.mark.integration
def test_beside_other_tests_and_under_strict_rules(verify: Verify, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_theirs="def test_theirs(): pass")
    pytester.makeini("[pytest]\naddopts = --strict-markers --strict-config\nfilterwarnings = error\n")
    result = verify(f"{FLAWS}:Warns", "-k", "check_01 or check_20 or theirs")
    result.assert_outcomes(passed=3, deselected=len(LAWS) - 2)


def test_a_law_by_its_name(verify: Verify, pytester: pytest.Pytester) -> None:
    """As a summary prints it."""
    pytester.makepyfile(test_theirs="def test_theirs(): assert False")
    result = verify("voxloss:DiceLoss", "voxloss::check_04_ramp", "-v")
    result.assert_outcomes(passed=1)
    assert lines(result, "voxloss::check_04_ramp PASSED")
    assert len(lines(verify("voxloss:DiceLoss", "voxloss", "--collect-only", "-q"), "voxloss::")) > 30
    result = verify("voxloss:DiceLoss", "voxloss::check_99")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: not found: voxloss::check_99" in result.errlines


def test_a_broken_law_fails_with_what_it_showed_and_no_traceback(verify: Verify) -> None:
    result = verify(f"{FLAWS}:Off", "-k", "check_25_")
    result.assert_outcomes(failed=1, deselected=len(LAWS) - 1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    start = next(i for i, line in enumerate(result.outlines) if " check 25: half precision" in line)
    end = next(i for i, line in enumerate(result.outlines) if "short test summary" in line)
    message, empty, *snippet = result.outlines[start + 1 : end]
    assert message.startswith("loss: expected ")
    assert (empty, snippet[0]) == ("", "import torch")
    (script,) = Path("voxloss-counterexamples").glob("*losses_with_flaws.py-Off-*/check_25.py")
    assert script.read_text().splitlines() == snippet[: snippet.index("")]
    assert f"written: {script}" in snippet
    assert lines(result, "FAILED voxloss::check_25_half_precision - Failed: loss: ")
    assert not any("Traceback" in line or "pytest_plugin" in line for line in result.outlines)


def test_the_folder_for_counter_examples(verify: Verify) -> None:
    verify(f"{FLAWS}:Off", "-k", "check_25_", "--voxloss-counterexamples", "some/where")
    assert len([*Path("some/where").glob("*-Off-*/check_25.py")]) == 1
    assert not Path("voxloss-counterexamples").exists()


def test_what_is_not_claimed_is_skipped(verify: Verify) -> None:
    result = verify(f"{FLAWS}:Off", "-k", "check_25_", "--voxloss-claim", 'dtypes=["float32"]')
    result.assert_outcomes(skipped=1, deselected=len(LAWS) - 1)
    assert any(line.endswith(": no half-precision dtype is declared") for line in lines(result, "SKIPPED [1]"))


def test_claims(verify: Verify) -> None:
    only = ["-k", "check_01", "--voxloss-kwargs", "{}"]
    verify(f"{FLAWS}:plain_dice", *only, "--voxloss-as", "dice").assert_outcomes(
        passed=1, deselected=len(LAWS) - 1
    )
    claims = ["--voxloss-claim", "family=tversky", "--voxloss-claim", "alpha=0.1"]
    verify(f"{FLAWS}:plain_dice", *only, *claims).assert_outcomes(failed=1, deselected=len(LAWS) - 1)


OVER_THE_BATCH = """
import torch

class Dice(torch.nn.Module):
    def __init__(self, softmax, to_onehot_y):
        super().__init__()

    def forward(self, x, y):
        p, g = x.softmax(1), torch.zeros_like(x).scatter_(1, y.long(), 1)
        axes = (0, 2, 3, 4)
        return (1 - (2 * (p * g).sum(axes) + 1) / (p.sum(axes) + g.sum(axes) + 1)).mean()
"""


@pytest.mark.integration
def test_without_a_search_defaults_hold(verify: Verify, pytester: pytest.Pytester) -> None:
    pytester.path.joinpath("over_the_batch.py").write_text(OVER_THE_BATCH)
    declared = ("labels=map", "activation=softmax", "smooth_nr=1", "smooth_dr=1")
    claims = [word for claim in declared for word in ("--voxloss-claim", claim)]
    arguments = ["over_the_batch.py:Dice", "--voxloss-as", "dice", *claims, "-k", "check_24"]
    assert verify(*arguments).ret == 0
    result = verify(*arguments, "--voxloss-no-search")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*it would be right with --claim batch=true*"])


def test_expected_failures(verify: Verify, pytester: pytest.Pytester) -> None:
    pytester.path.joinpath("x.toml").write_text('[xfail]\n"25" = "it is imprecise"\n')
    imprecise = [f"{FLAWS}:Imprecise", "-k", "check_01 or check_25_", "--voxloss-xfails", "x.toml"]
    result = verify(*imprecise)
    result.assert_outcomes(passed=1, xfailed=1, deselected=len(LAWS) - 2)
    assert result.ret == 0
    assert lines(result, "XFAIL voxloss::check_25_half_precision - it is imprecise")
    assert not Path("voxloss-counterexamples").exists()
    result = verify(*imprecise, "--runxfail")
    result.assert_outcomes(passed=1, failed=1, deselected=len(LAWS) - 2)


def test_expected_failures_that_are_none(verify: Verify, pytester: pytest.Pytester) -> None:
    pytester.path.joinpath("x.toml").write_text('[xfail]\n"1" = "boxes"\n"25" = "it is imprecise"\n')
    imprecise = [f"{FLAWS}:Imprecise", "-k", "check_01 or check_25_", "--voxloss-xfails", "x.toml"]
    result = verify(*imprecise, "--voxloss-claim", 'dtypes=["float32"]')
    result.assert_outcomes(failed=1, xpassed=1, deselected=len(LAWS) - 2)
    assert lines(result, "XPASS voxloss::check_01_shifted_boxes_and_nested_cubes - boxes")
    assert (
        "not applicable, no half-precision dtype is declared; but expected to be broken: it is imprecise"
        in result.outlines
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere:Loss"], "voxloss: nowhere cannot be imported: ModuleNotFoundError: *"),
        (
            [f"{FLAWS}:Fussy", "--voxloss-kwargs", "{}"],
            "voxloss: *:Fussy() cannot be made: ValueError: size 3 is odd",
        ),
        (
            [f"{FLAWS}:Raises", "--voxloss-kwargs", "{}", "--voxloss-as", "dice"],
            "voxloss: *RuntimeError: out of luck*",
        ),
        (["voxloss:DiceLoss", "--voxloss-kwargs", "{"], "--voxloss-kwargs: expected a JSON object like *"),
        (["voxloss:DiceLoss", "--voxloss-claim", "alfa=1"], "voxloss: *claim 'alfa': expected one of *"),
        (["voxloss:DiceLoss", "--voxloss-device", "toaster"], "voxloss: --voxloss-device: expected *'toaster'*"),
        (["voxloss:DiceLoss", "--voxloss-seed", "-1"], "--voxloss-seed: expected a whole number *, received -1*"),
        (["voxloss:DiceLoss", "--voxloss-xfails", "x.toml"], "voxloss: x.toml: expected one table *"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, verify: Verify, pytester: pytest.Pytester
) -> None:
    pytester.path.joinpath("x.toml").touch()
    result = verify(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line]
    pytest.LineMatcher([line]).fnmatch_lines([f"ERROR: {message}"])
    assert not any("Traceback" in line for line in result.outlines)


def test_without_the_extra(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "voxloss_verify.verification")
    monkeypatch.setitem(sys.modules, "voxloss_verify.check", None)
    assert "ERROR: --voxloss-target needs voxloss_verify.check: pip install 'voxloss[verify]'" in (
        verify("voxloss:DiceLoss").errlines
    )


def test_processes_end_with_the_session(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Ranks] = []
    monkeypatch.setattr(Ranks, "close", lambda ranks: closed.append(ranks))
    verify("voxloss:DiceLoss", "-k", "check_01 or check_04")
    assert len(closed) == 1


@pytest.mark.integration
@pytest.mark.thorough
def test_with_xdist(pytester: pytest.Pytester) -> None:
    options = ["--voxloss-kwargs", LOGITS, "--voxloss-profile", "quick", "-n", "1", "-k", "check_01 or check_25_"]
    result = pytester.runpytest_inprocess("--voxloss-target", f"{FLAWS}:Imprecise", *options)
    result.assert_outcomes(passed=1, failed=1)
    assert any(line.startswith("loss: expected ") for line in result.outlines)
    result = pytester.runpytest_inprocess("--voxloss-target", "nowhere:Loss", *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert len([line for line in result.errlines if line]) == 1


# Without the options.


def test_without_a_target_nothing_changes(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_theirs(): pass")
    result = pytester.runpytest_inprocess("--strict-config", "--strict-markers", "-W", "error", "-p", "no:xdist")
    result.assert_outcomes(passed=1)
    assert lines(result, "voxloss") == []
    assert (
        pytester.runpytest_inprocess("-k", "absent", "-p", "no:xdist").ret == pytest.ExitCode.NO_TESTS_COLLECTED
    )


def test_the_plugin_is_light() -> None:
    code = """
import sys
import pytest
before = set(sys.modules)
import voxloss_verify.pytest_plugin
loaded = {name for name in set(sys.modules) - before}
ours = {name for name in loaded if name.split(".")[0].startswith("voxloss")}
assert ours == {"voxloss_verify", "voxloss_verify.pytest_plugin"}, ours
heavy = {"torch", "monai", "hypothesis", "numpy", "nibabel", "typer", "rich", "jinja2"}
assert not heavy & {name.split(".")[0] for name in loaded}, loaded
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_strictly_an_expected_failure_must_fail(verify: Verify, pytester: pytest.Pytester) -> None:
    pytester.path.joinpath("x.toml").write_text('[xfail]\n"1" = "boxes"\n')
    result = verify("voxloss:DiceLoss", "-k", "check_01", "--voxloss-xfails", "x.toml", "--voxloss-strict")
    result.assert_outcomes(failed=1, deselected=len(LAWS) - 1)


def test_there_is_a_marker_for_every_level() -> None:
    assert [level.value for level in Level] == [*LEVELS]


@pytest.mark.integration
def test_levels_are_markers_and_advice_is_no_failure(pytester: pytest.Pytester) -> None:
    """In a process of its own: some of these laws load what torch does not bear being loaded twice."""
    plain = ["--voxloss-target", f"{FLAWS}:plain_dice", "--voxloss-as", "dice", "--voxloss-profile", "quick"]
    only = ["-m", "voxloss_interface", "-k", "check_24 or check_29 or check_31", "-ra", "--strict-markers"]
    result = pytester.runpytest_subprocess(*plain, *only, timeout=120)
    result.assert_outcomes(xfailed=4, skipped=1, deselected=len(LAWS) - 5)
    assert lines(result, "XFAIL voxloss::check_31a_bad_labels_are_errors - advice: expected an error for ")
    result = pytester.runpytest_subprocess(*plain, *only, "--voxloss-strict", timeout=120)
    result.assert_outcomes(failed=4, skipped=1, deselected=len(LAWS) - 5)
