"""The fuzz of `fuzz.py`: it runs some cases here, knows all losses and options, and finds what is broken."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fuzz
import fuzz_oracle
from every_loss import LOSSES
from fuzz import FAULTS, LAYOUTS, Case, check, draw_case, laid_out, program, shrink
from fuzz_oracle import ORACLES
from voxloss import formulas
from voxloss.backends import eager, numba_cpu
from voxloss.losses import base, voxelwise

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = sorted(LOSSES)


def test_some_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--cases", "60", "--compiled"]) == 0, capsys.readouterr().out


@pytest.mark.integration
def test_thousands_of_cases(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> None:
    cases = "3000" if request.config.getoption("--thorough") else "1500"
    assert fuzz.main(["--cases", cases, "--seed", "1", "--compiled"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_has_an_oracle_and_every_option_is_drawn(name: str) -> None:
    assert name in ORACLES, f"add {name} to ORACLES of tests/fuzz_oracle.py"
    missing = fuzz.takes(name) - fuzz.OPTIONS.keys() - fuzz.ELSEWHERE - fuzz.NOT_DRAWN
    assert not missing, f"{name}: add {sorted(missing)} to OPTIONS of tests/fuzz.py"


def test_no_option_is_drawn_that_no_loss_has() -> None:
    assert {*fuzz.OPTIONS} <= set().union(*map(fuzz.takes, NAMES))


# What is broken is found, and the case that is printed is small.


def _found(losses: list[str], backends: list[str], cases: int = 400) -> tuple[Case, fuzz.Failure]:
    for number in range(cases):
        case = draw_case(0, number, losses, backends, compiled=True)
        failure = check(case)
        if failure is not None:
            return shrink(case, failure)
    pytest.fail(f"no failure in {cases} cases")


def _scaled(function: Callable[..., Tensor], by: float) -> Callable[..., Tensor]:
    return lambda *args, **arguments: function(*args, **arguments) * by


def _swapped(s: Any, alpha: float, beta: float, *smoothing: float) -> Tensor:
    return _TVERSKY(s, beta, alpha, *smoothing)


_TVERSKY = formulas.tversky


@pytest.mark.parametrize(
    ("loss", "where", "name", "broken"),
    [
        ("MCCLoss", formulas, "matthews", _scaled(formulas.matthews, 1 + 1e-4)),
        ("TverskyLoss", formulas, "tversky", _swapped),
        ("FocalTverskyLoss", formulas, "FOCAL_LINEAR_BELOW", 1e-3),
        ("DiceLoss", base, "annotated_channels", lambda _, batch, channels, __: torch.ones(batch, channels) > 0),
        ("CrossEntropyLoss", voxelwise, "mean", lambda total, count, _: total / count.clamp(min=2)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_wrong_formula_is_found_and_shrunk(
    monkeypatch: pytest.MonkeyPatch, loss: str, where: Any, name: str, broken: Any
) -> None:
    monkeypatch.setattr(where, name, broken)
    case, failure = _found([loss], ["reference"])
    assert failure.kind in ("value", "gradient")
    assert case.input.numel() <= 4
    assert not case.layouts
    assert len(case.options) <= 3, case.options
    assert f"loss = voxloss.{loss}(" in program(case)
    monkeypatch.undo()
    assert check(case) is None


def test_a_wrong_oracle_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ORACLES, "DiceLoss", ORACLES["JaccardLoss"])
    assert _found(["DiceLoss"], ["eager"])[1].kind == "value"


@pytest.mark.parametrize(
    ("dtype", "by"), [(torch.float64, 1 + 1e-8), (torch.float32, 1 + 1e-3), (None, math.nan)]
)
def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None, by: float) -> None:
    backward = eager.region_sums_backward

    def broken(*args: Any, **arguments: Any) -> Tensor:
        gradient = backward(*args, **arguments)
        if dtype in (None, gradient.dtype):
            gradient[..., -1] *= by
        return gradient

    monkeypatch.setattr(eager, "region_sums_backward", broken)
    case, failure = _found(["DiceCELoss"], ["reference", "eager"])
    assert failure.kind.startswith("gradient")
    assert case.backend == "eager"
    assert dtype in (None, case.input.dtype, case.target.dtype)


def test_a_layout_that_one_backend_misreads_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = eager.region_sums

    def broken(input: Tensor, target: Tensor, *args: Any) -> Any:
        sums, valid = forward(input, target, *args)
        return sums * (1.0 if target.is_contiguous() else 1.5), valid

    monkeypatch.setattr(eager, "region_sums", broken)
    case, _ = _found(["DiceLoss"], ["eager"])
    assert set(case.layouts) == {"target"}


@pytest.mark.skipif(not numba_cpu.available()[0], reason="no Numba")
def test_a_block_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = numba_cpu.region_sums

    def broken(input: Tensor, target: Tensor, spec: Any, mask: Tensor | None, *others: Any) -> Any:
        if input[0, 0].numel() > 1024 and input.ndim == 3:
            input, target, mask = (
                input[..., :1024],
                target[..., :1024],
                None if mask is None else mask[..., :1024],
            )
        return forward(input, target, spec, mask)

    monkeypatch.setattr(numba_cpu, "region_sums", broken)
    case, _ = _found(["DiceLoss"], ["numba_cpu"], 2000)
    assert case.input.shape[2:] == (1025,)


@pytest.mark.integration
def test_an_argument_that_is_accepted_though_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("voxloss.operators.inputs.require_valid", lambda *_: None)
    assert _found(["DiceLoss"], ["eager"], 2000)[1].kind == "accepts"


def test_an_error_of_another_kind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr("voxloss.statistics.inputs.require_pair", broken)
    assert _found(["DiceLoss"], ["eager"])[1].kind == "raises RuntimeError: shape mismatch"


# The parts.


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_each_wrong_argument_is_refused(name: str) -> None:
    """And is one for some cases."""
    faults = 0
    for number in range(1000):
        case = draw_case(0, number, NAMES, ["eager"], compiled=True)
        plain = case.but(layouts={}, by_target=False, wrong=None)
        wrong = FAULTS[name](plain) if case.wrong is None else None
        if wrong is not None:
            assert check(wrong.but(wrong=name)) is None, program(wrong)
            faults += 1
            if faults == 3:
                return
    assert faults


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_layout_has_the_same_voxels(layout: str) -> None:
    shape = (2, 3, 4, 5, 6) if layout == "channels_last_3d" else (2, 3, 4, 5)
    tensor = torch.rand(shape)
    tensor[1:] = tensor[:1] if layout == "one sample for all" else tensor[1:]
    found = laid_out(tensor, layout)
    assert torch.equal(found, tensor)
    assert found.stride() != tensor.stride()


def test_a_case_does_not_depend_on_those_before_it() -> None:
    first = [program(draw_case(5, number, NAMES, ["eager"], False)) for number in (3, 4)]
    assert first == [program(draw_case(5, number, NAMES, ["eager"], False)) for number in (3, 4)]
    assert first[0] != first[1]


@pytest.mark.filterwarnings("ignore")  # of which a case may have any, and `check` shows none
def test_a_program_computes_what_its_case_does(capsys: pytest.CaptureFixture[str]) -> None:
    checked = 0
    for number in range(60):
        case = draw_case(6, number, NAMES, ["eager"], False)
        if case.wrong is None and case.input.numel() < 200:
            scope: dict[str, Any] = {}
            exec(program(case), scope)
            for name in ("input", "target", "mask"):
                given = getattr(case, name)
                if given is not None:
                    assert torch.equal(scope[name].detach().nan_to_num(), given.nan_to_num())
                    assert scope[name].stride() == laid_out(given, case.layouts.get(name)).stride()
            expected = fuzz._expected(case).value
            torch.testing.assert_close(scope["value"].double(), expected, rtol=1e-4, atol=1e-4)
            checked += 1
    capsys.readouterr()
    assert checked > 40


def test_the_oracle_imports_nothing_of_the_library() -> None:
    names = {
        getattr(item, "__module__", None) or getattr(item, "__name__", "") for item in vars(fuzz_oracle).values()
    }
    assert not [name for name in names if str(name).split(".")[0] in ("voxloss", "voxloss_verify", "monai")]


# The command.


def test_a_failure_prints_a_program_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ORACLES, "DiceLoss", ORACLES["JaccardLoss"])
    assert fuzz.main(["--loss", "DiceLoss", "--backend", "eager", "--seed", "3", "--cases", "50"]) == 1
    printed, progress = capsys.readouterr()
    assert "import voxloss\n" in printed
    assert "python tests/fuzz.py --seed 3 --first " in printed
    assert "shrinking" in progress


def test_an_interrupt_prints_how_far_it_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Case] = []

    def interrupted(case: Case, _: Any) -> None:
        calls.append(case)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(fuzz, "check", interrupted)
    assert fuzz.main(["--cases", "10", "--first", "5"]) == 130
    assert "after 3 of 10 cases" in (printed := capsys.readouterr().out)
    assert "--first 8 --cases 7" in printed


def test_a_wrong_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fuzz.main(["--cases", "-1"])
    assert "--cases: expected a number ≥ 0, received -1" in capsys.readouterr().err
