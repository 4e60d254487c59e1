"""README and the page of differences are true: their code runs, and every difference has its test."""

from __future__ import annotations

import json
import re

import pytest

import test_monai_differences
from pages import ROOT, local_links, parse_commands, run_python
from voxloss_app.bench.cases import BenchCase
from voxloss_app.bench.results import load_runs
from voxloss_verify.laws import LAWS, METRIC_LAWS

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order_and_print_what_stands_below(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_python("README.md", capsys) == 1


def test_commands_are_the_command_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_commands("README.md", monkeypatch) >= 3


def test_the_number_of_checks() -> None:
    (numbers,) = re.findall(r"runs (\d+) checks on\s.*, or (\d+) on a metric", README)
    assert tuple(map(int, numbers)) == (len(LAWS), len(METRIC_LAWS))


def _row(table: str, begin: str) -> list[str]:
    """The cells of the row of a page that begins like this."""
    (row,) = re.findall(rf"^\| {re.escape(begin)}.*", table, re.M)
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_figures_are_those_of_the_pages() -> None:
    (run,) = (run for run in load_runs(ROOT / "docs" / "performance.json") if run.device == "cpu")
    cases = {each.case: each for each in run.results}
    many, two = (cases[BenchCase("dice_ce", "softmax", channels, 96)] for channels in (14, 2))
    ratios = [found.median for each in (many, two) if (found := each.ratio("monai"))]
    assert _row(README, "Dice + cross entropy alone, forward")[1:] == [f"{ratios[0]:.1f} ×", "1 ×"]
    assert f"DiceCE is {ratios[1]:.1f} times as fast as MONAI's on a CPU" in README
    sizes = [f"{many.peak(name):.1f}" for name in ("monai", "voxloss")]
    assert _row(README, "the same: peak memory")[1:] == sizes

    rows = json.loads((ROOT / "docs" / "head.json").read_bytes())["memory"]["rows"]
    counted = {
        (row["case"]["network"], row["case"]["loss"]): f"{row['counted'] / 2**30:.1f} GiB"
        for row in rows
        if (row["case"]["channels"], row["case"]["edge"]) == (118, 128)
    }
    step = [counted["DynUNet", "MONAI"], f"{counted['DynUNet', 'voxloss, fused']} with `fuse_head`"]
    cells = _row(README, "training step of a DynUNet with 118 classes")[1:]
    assert [cell.partition(":")[0] for cell in cells] == step
    classes = (ROOT / "docs" / "many-classes.md").read_text(encoding="utf-8")
    for network, name in (("DynUNet", "MONAI's DynUNet |"), ("PlainConvUNet", "nnU-Net's PlainConvUNet with")):
        shown = {cell.strip("*") for cell in _row(classes, name)[1:] if cell}
        assert shown == {counted[key] for key in counted if key[0] == network}

    conformance = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    broken = [" of ".join(_row(conformance, library)[2:0:-1]) for library in ("MONAI 1.6.1", "voxloss 0.1.0")]
    assert _row(README, "configurations of its losses that break")[1:] == broken


def test_the_table_of_differences_and_the_tests_are_the_same_list() -> None:
    page = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    table = page.split("| MONAI 1.6.1 | voxloss | severity | test |")[1].split("\n\n")[0]
    named = [
        name.rstrip("…")
        for row in table.splitlines()[2:]
        for name in re.findall(r"`([a-z0-9_]+…?)`", row.split("|")[4])
    ]
    tests = [name.removeprefix("test_") for name in vars(test_monai_differences) if name.startswith("test_")]
    for name in named:
        assert sum(test.startswith(name) for test in tests) == 1, f"differences.md names {name}"
    for test in tests:
        assert sum(test.startswith(name) for name in named) == 1, f"differences.md has no line for {test}"


def test_local_links_lead_somewhere() -> None:
    for page in ("README.md", ".github/CONTRIBUTING.md", "docs/monai.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target, _ in local_links(page):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
        for path in re.findall(r"`((?:plugin|verification|datasets|tests)/[\w./]+)", text):
            assert (ROOT / path.rstrip(".")).exists(), f"{page}: {path}"
