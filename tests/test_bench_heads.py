"""The benchmark of fused heads: what is compared before it is timed, memory by classes, pages."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib")

from matplotlib import image

import voxloss
from test_bench import ROOT, command, garbage_stays  # noqa: F401
from voxloss.backends import tiled
from voxloss_app.bench import (
    head,
    head_memory,
    head_picture,
    head_time,
)
from voxloss_app.bench.own_process import apart
from voxloss_app.bench.timing import ratios
from voxloss_app.theme import THEMES

pytestmark = pytest.mark.usefixtures("one_thread")

STEP = head_memory.StepCase("DynUNet", head_memory.MONAI, 60, 32, 1, (8, 16, 16))


def _counted_steps() -> dict[str, head_memory.StepMemory]:
    losses = (head_memory.MONAI, head_memory.UNFUSED, head_memory.FUSED, head_memory.NO_CLASSES)
    return {loss: head_memory.count(replace(STEP, loss=loss)) for loss in losses}


def test_a_step_with_lazy_logits_takes_what_the_network_takes() -> None:
    logits = 4 * 60 * 32**3
    found = _counted_steps()
    monai, ours, fused, alone = (each.counted or 0 for each in found.values())
    assert monai > ours + 2 * logits
    assert ours > fused + logits
    assert fused == pytest.approx(alone, rel=0.05)
    assert [each.largest == logits for each in found.values()] == [True, True, False, False]
    assert [each.tiles > 0 for each in found.values()] == [False, False, True, False]
    whole = head_memory.measure(replace(STEP, loss=head_memory.MONAI))
    assert whole.counted == monai
    assert whole.allocated is not None
    assert monai <= whole.allocated < monai + 3 * logits  # with what a convolution takes for itself


def test_a_compiled_loss_counts_as_one_that_takes_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as MONAI's is MONAI's; with as little as ours the peak is that of ours."""
    counted = {loss: each.counted or 0 for loss, each in _counted_steps().items()}
    for peak, same in ((5.0, head_memory.MONAI), (1.0, head_memory.UNFUSED)):
        monkeypatch.setattr(head_memory, "compiled_peak", lambda channels, peak=peak: peak)
        found = head_memory.count(replace(STEP, loss=head_memory.COMPILED))
        assert found.counted == pytest.approx(counted[same], rel=0.01)
        assert found.largest is None

    def fails(channels: int) -> float:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(head_memory, "compiled_peak", fails)
    assert head_memory.count(replace(STEP, loss=head_memory.COMPILED)).why == "RuntimeError: no compiler"


@pytest.mark.integration
@pytest.mark.thorough
def test_what_a_compiled_loss_takes_is_measured() -> None:
    assert 3 < head_memory.compiled_peak(5) < 4.5


@pytest.mark.parametrize("spoil", ["input.logits()", "input * 1", "input.softmax(1)"])
def test_lazy_logits_that_are_computed_whole_are_counted(spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing but the lazy logits themselves keeps them."""
    lazy = head_memory.count(replace(STEP, loss=head_memory.FUSED))
    original = head_memory._loss

    def spoilt(name: str) -> Any:
        loss = original(name)

        def run(input: Tensor, labels: Tensor) -> Tensor:
            eval(spoil, {"input": input})
            return loss(input, labels)

        return run

    monkeypatch.setattr(head_memory, "_loss", spoilt)
    found = head_memory.count(replace(STEP, loss=head_memory.FUSED))
    assert found.largest == 4 * 60 * 32**3
    assert (found.counted or 0) >= (lazy.counted or 0) + found.largest


def test_heads_on_meta_tensors() -> None:
    """torch has no autocast for them, and raises an error."""
    network = voxloss.fuse_head(nn.Sequential(nn.Conv3d(2, 5, 1)).to("meta"), always=True)
    features = torch.empty(1, 2, 4, 4, 4, device="meta")
    assert type(network(features)).__name__ == "LazyLogits"
    assert network(features).softmax(1).shape == (1, 5, 4, 4, 4)
    assert type(network.eval()(features)) is Tensor


def test_what_is_not_installed_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dynamic_network_architectures.architectures.unet", None)
    found = head_memory.count(head_memory.StepCase("PlainConvUNet", head_memory.MONAI))
    assert (found.counted, found.why) == (
        None,
        "dynamic_network_architectures.architectures.unet is not installed",
    )


@pytest.mark.usefixtures("garbage_stays")
@pytest.mark.parametrize("loss", [head_time.DICE_CE, head_time.CROSS_ENTROPY])
def test_heads_are_compared_then_timed_in_the_same_rounds(loss: str) -> None:
    found = head_time.measure(head_time.HeadCase(loss, 5, 4, 16), rounds=2, seed=0)
    names = {name for name, each in head_time.CONTENDERS.items() if loss in each.losses}
    assert set(found.contenders) == names
    for name, each in found.contenders.items():
        if each.why == "needs torch 2.13":
            continue
        assert (each.state, each.why) == ("measured", "")
        exact = name == "fused, float64"
        assert len(each.times) == (0 if exact else 2)
        assert (each.value_error or 0) < (1e-12 if exact else 1e-6)
        assert max(each.gradient_error or 0, each.weight_error or 0) < (1e-10 if exact else 1e-5)
    ours, fused = (found.contenders[name].times for name in (head_time.UNFUSED, head_time.FUSED))
    assert found.ratio(head_time.UNFUSED, head_time.FUSED) == ratios(ours, fused)
    assert head_time.from_json(found.to_json()) == found


@pytest.mark.usefixtures("garbage_stays")
def test_a_fused_head_with_a_wrong_gradient_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = tiled.region_sums_backward

    def spoilt(*given: Any, **options: Any) -> Any:
        found = original(*given, **options)
        assert found.bias is not None
        return found._replace(bias=found.bias * 1.001)

    monkeypatch.setattr(tiled, "region_sums_backward", spoilt)
    found = head_time.measure(head_time.HeadCase(head_time.DICE_CE, 5, 4, 16), rounds=1, seed=0)
    states = {name: each.state for name, each in found.contenders.items()}
    assert {name for name, state in states.items() if state == "wrong"} == {n for n in states if "fused" in n}
    assert found.contenders[head_time.FUSED].why.startswith("gradient by weights off by ")
    assert found.ratio(head_time.UNFUSED, head_time.FUSED) is None
    assert head._is_broken(_head_part([found.to_json()]))


def _head_part(rows: list[dict[str, Any]]) -> head.Part:
    settings = {"rounds": 2, "threads": 1, "seed": 0, "OMP_WAIT_POLICY": "passive"}
    return head.Part("2026-01-31", "voxloss bench --head", {"processor": "made_up"}, {}, "abc", settings, rows)


def test_memory_by_classes_is_a_table_and_a_picture() -> None:
    gib = 2**30
    usual = head_memory.StepCase("DynUNet", head_memory.MONAI)
    counted = [
        head_memory.StepMemory(replace(usual, loss=loss, channels=channels), counted=channels * gib, largest=gib)
        for loss in (head_memory.MONAI, head_memory.FUSED)
        for channels in (2, 14, 118)
    ]
    other = head_memory.StepMemory(replace(usual, edge=64, channels=3), counted=gib, largest=gib)
    found = [*counted, other, head_memory.StepMemory(replace(usual, loss=head_memory.NNUNET), why="not here")]
    classes = head.by_classes(found)
    assert classes == {
        loss: {c: c * gib for c in (2, 14, 118)} for loss in (head_memory.MONAI, head_memory.FUSED)
    }
    first, *others = head._memory_grids([each.to_json() for each in found])
    assert first.headings == ["loss", "C = 2", "C = 14", "C = 118"]
    assert first.rows == [["MONAI", "2.00", "14.00", "118.00"], ["voxloss, fused", "2.00", "14.00", "118.00"]]
    assert sorted(re.findall(r"C = \d+", " ".join(grid.title for grid in others)), key=len) == [
        "C = 3",
        "C = 118",
    ]
    light, dark = (image.imread(BytesIO(head_picture.memory_png(classes, theme))) for theme in THEMES.values())
    assert light[0, 0, :3].tolist() == [1, 1, 1]
    assert dark[0, 0, :3].max() < 0.1
    assert light.shape == dark.shape


def _head_times(channels: int, slower: float) -> dict[str, Any]:
    def measured(times: list[float]) -> head_time.HeadMeasurement:
        return head_time.HeadMeasurement("measured", times=times, peak=1 << 20, value_error=1e-8)

    found = {name: measured([slower, 3 * slower]) for name in head_time.CONTENDERS}
    found[head_time.FUSED] = found[head_time.FUSED_LAST] = measured([1.0, 3.0])
    return head_time.HeadTimes(head_time.HeadCase(head_time.DICE_CE, channels), found).to_json()


def test_goals_of_heads() -> None:
    def goals(channels: int, slower: float) -> list[str]:
        (grid,) = head._time_grids([_head_times(channels, slower)])
        column = grid.headings.index("goal")
        return [row[column] for row in grid.rows if row[column]]

    assert goals(118, 2.5) == ["≥ 5 × ✗", "≥ 2 × ✓"]
    assert goals(42, 1.2) == ["≥ 3 × ✗", "≥ 1.3 × ✗"]
    assert goals(14, 0.96) == goals(2, 1.0) == ["≥ 0.952 × ✓"]
    assert goals(5, 0.9) == ["≥ 0.952 × ✗"]
    assert goals(60, 9.0) == []


@pytest.mark.integration
def test_heads_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part that is not measured again is kept, as it was, with its command."""
    monkeypatch.setattr(head, "apart", lambda run: run())
    monkeypatch.setattr(head_memory, "cases", lambda classes: [STEP, replace(STEP, loss=head_memory.FUSED)])
    monkeypatch.setattr(head_memory, "cpu_cases", lambda channels: [replace(STEP, edge=16)])
    assert command("--head", "--only", "memory", "--out", str(tmp_path)) == 0
    assert "Not measured yet" in (tmp_path / "head.md").read_text("utf-8")
    memory = head.load(tmp_path / "head.json")["memory"]
    sizes = ["--classes", "3", "--features", "4", "--edge", "16", "--rounds", "1"]
    assert command("--head", *sizes, "--only", "time", "--out", str(tmp_path)) == 0
    parts = head.load(tmp_path / "head.json")
    assert parts["memory"] == memory
    with monkeypatch.context() as patch:
        # Rows of the same source, machine and versions are kept.
        patch.setattr(head_memory, "count", lambda case: pytest.fail("counted again"))
        assert command("--head", "--only", "memory", "--out", str(tmp_path)) == 0
        assert head.load(tmp_path / "head.json")["memory"].rows == memory.rows
        assert command("--head", "--only", "memory", "--fresh", "--out", str(tmp_path)) != 0
    with monkeypatch.context() as patch:
        counts = iter([head_memory.count(STEP)])

        def interrupted(case: head_memory.StepCase) -> head_memory.StepMemory:
            for found in counts:
                return found
            raise KeyboardInterrupt

        patch.setattr(head_memory, "count", interrupted)
        capsys.readouterr()
        assert command("--head", "--only", "memory", "--fresh", "--out", str(tmp_path)) == 130
        assert "interrupted: 1 of 3 cases are finished and kept in" in capsys.readouterr().out
    assert parts["time"].command == (
        "voxloss bench --head --classes 3 --features 4 --edge 16 --rounds 1 --only 'time'"
    )
    text = (tmp_path / "head.md").read_text("utf-8")
    assert text == head.render(parts)
    assert "Convolution 1×1×1 and Dice + cross entropy, forward and backward, F = 4, 16³, B = 1" in text
    assert re.search(r"^\| 3 \| fused \| [\d.]+ \([\d.]+–[\d.]+\) \|", text, re.M)
    assert re.search(r"^\| voxloss, fused \| 0\.\d\d \| 0\.06 \| 0\.\d\d \|$", text, re.M)
    assert "Peak memory of a training step: DynUNet, C = 60, 16³, B = 1, float32, filters 8 16 16" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    (tmp_path / "head.json").write_text('{"schema": 0}')
    assert head.load(tmp_path / "head.json") == {}
    capsys.readouterr()
    assert command("--head", "--only", "nonsense") == 2
    assert "--only: expected time or memory with --head, received 'nonsense'." in capsys.readouterr().err


def test_memory_of_chosen_numbers_of_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For one number there is no table by classes, and no picture; without any they are the default ones."""

    def count(case: head_memory.StepCase) -> head_memory.StepMemory:
        return head_memory.StepMemory(case, counted=case.channels << 30, largest=1 << 30)

    def run(*classes: int) -> dict[str, set[int]]:
        chosen = [part for each in classes for part in ("--classes", str(each))]
        assert command("--head", "--only", "memory", *chosen, "--out", str(tmp_path)) == 0
        memory = head.load(tmp_path / "head.json")["memory"]
        assert memory.command == " ".join(["voxloss bench --head", *chosen, "--only 'memory'"])
        found: dict[str, set[int]] = {}
        for step in map(head_memory.from_json, memory.rows):
            found.setdefault("CPU" if step.case.edge == 64 else step.case.network, set()).add(step.case.channels)
        return found

    monkeypatch.setattr(head, "apart", lambda run: run())
    monkeypatch.setattr(head_memory, "count", count)
    monkeypatch.setattr(head_memory, "measure", count)
    assert run(60) == {"DynUNet": {60}, "PlainConvUNet": {60}, "CPU": {60}}
    assert "DynUNet, C = 60, voxloss, fused\n" in capsys.readouterr().out
    text = (tmp_path / "head.md").read_text("utf-8")
    assert "| voxloss, fused | 60.00 |" in text
    assert "by classes" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"head.json", "head.md"}
    assert run(60, 14) == {"DynUNet": {14, 60}, "PlainConvUNet": {60}, "CPU": {60}}
    out = capsys.readouterr().out
    assert "DynUNet, C = 14, voxloss, fused\n" in out
    assert "DynUNet, C = 60, voxloss, fused\n" not in out  # kept from the first run
    assert "| loss | C = 14 | C = 60 |" in (tmp_path / "head.md").read_text("utf-8")
    assert len([*tmp_path.glob("head-memory-*.png")]) == 2
    (tmp_path / "head.json").unlink()
    assert run() == {"DynUNet": {2, 14, 42, 80, 118}, "PlainConvUNet": {118}, "CPU": {118}}


@pytest.mark.integration
def test_a_case_has_a_process_of_its_own() -> None:
    assert apart(os.getpid) != os.getpid()
    assert apart(torch.get_num_threads) == torch.get_num_threads() == 1
    assert apart(partial(os.getenv, "OMP_WAIT_POLICY")) == os.environ.get("OMP_WAIT_POLICY", "passive")


def test_the_committed_page_of_heads_is_that_of_the_committed_figures() -> None:
    docs = ROOT / "docs"
    assert (docs / "head.md").read_text(encoding="utf-8") == head.render(head.load(docs / "head.json"))
