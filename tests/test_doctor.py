"""`voxloss doctor`: shows which backends run, tests them, and agrees with the losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import voxloss
from voxloss.backends import BACKENDS, eager
from voxloss.head import FEWEST_LOGITS, FEWEST_VOXELS
from voxloss_app.cli import app
from voxloss_app.doctor import choice, findings
from voxloss_app.doctor.gpu import GpuRequest


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "300"})


def test_the_rule_of_fused_heads_is_stated() -> None:
    (line,) = [line for line in doctor().output.splitlines() if line.startswith("fuse_head: ")]
    assert f"at least {FEWEST_VOXELS} voxels or {FEWEST_LOGITS} logits" in line


def test_every_backend_is_tried_and_every_choice_shown() -> None:
    result = doctor()
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    for name in BACKENDS:
        assert any(line.startswith(name) for line in lines)
    assert sum("equals the reference" in line for line in lines) == sum(
        b.available()[0] for b in BACKENDS.values()
    )
    assert any(line.split()[:3] == ["cpu", "bfloat16", "numba_cpu"] for line in lines)
    assert f"torch {torch.__version__.partition('+')[0]}" in lines[0]


def test_the_choice_shown_is_the_one_made(passes: list[tuple[str, str]]) -> None:
    loss = voxloss.DiceLoss(softmax=True, to_onehot_y=True)
    loss(torch.randn(1, 2, 3, dtype=torch.float64), torch.zeros(1, 1, 3))
    assert [name for name, _ in passes] == [choice("cpu", "float64").backend]


def test_a_backend_that_is_wrong_or_fails_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    right = eager.region_sums
    monkeypatch.setattr(eager, "region_sums", lambda *args: (1.001 * right(*args)[0], right(*args)[1]))
    assert {f.backend: f.works for f in findings()}["eager"] is False
    result = doctor()
    assert result.exit_code == 1
    assert "wrong: sums are off by 1.0e-03" in result.output

    def fail(*_: object) -> None:
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(eager, "region_sums", fail)
    assert "fails: RuntimeError: out of luck" in doctor().output


def test_an_input_that_the_named_backend_cannot_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXLOSS_BACKEND", "numba_cpu")
    result = doctor("--device", "cuda", "--dtype", "float16")
    assert result.exit_code == 1
    assert "refused" in result.output
    assert "VOXLOSS_BACKEND=numba_cpu" in result.output
    assert doctor("--device", "cpu").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "2"], "--stage: expected --gpu beside it"),
        (["--out", "elsewhere"], "--out: expected --gpu beside it"),
        (["--gpu", "--device", "cpu"], "--gpu: expected neither --dtype nor --device beside it"),
        (["--gpu", "--dtype", "float16"], "--gpu: expected neither --dtype nor --device beside it"),
        (["--gpu", "--stage", "7"], "--stage"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(arguments: list[str], message: str) -> None:
    result = doctor(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_the_stages_of_the_gpu_are_those_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[GpuRequest] = []

    def examine(request: GpuRequest) -> int:
        asked.append(request)
        return 0

    monkeypatch.setattr("voxloss_app.doctor.gpu.examine_gpu", examine)
    assert doctor("--gpu", "--stage", "4", "--stage", "2", "--stage", "4", "--out", "gpu").exit_code == 0
    assert doctor("--gpu", "--minutes", "1.5").exit_code == 0
    assert asked == [GpuRequest(Path("gpu"), [2, 4]), GpuRequest(Path("out"), [], seconds=90)]


def test_without_numba_the_reason_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["numba_cpu"], "_INSTALLED", False)
    result = doctor()
    assert result.exit_code == 0
    assert "pip install numba" in result.output
    assert choice("cpu", "float32").backend == "eager"
