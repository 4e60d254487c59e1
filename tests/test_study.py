"""Studies of losses: fair runs, statistics by hand, what is kept, and a page that agrees with the numbers."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from matplotlib import image

from sources import ROOT
from voxloss_app import study
from voxloss_app.__main__ import main
from voxloss_app.bench.machine import versions
from voxloss_app.study import page, plan
from voxloss_app.study.contenders import (
    BASELINE,
    BETAS,
    MONAI,
    PEERS,
    VOXLOSS,
    Contender,
    chosen,
    peers_of,
    tversky,
)
from voxloss_app.study.cost import Cost
from voxloss_app.study.picture import pictures
from voxloss_app.study.plan import StudyRequest, Task, study_plan
from voxloss_app.study.results import DICE, FILE, HD95, MISSED, SCORES, Result, Study, result_of
from voxloss_app.study.run import Structure, StudyRun, hausdorff_95, run
from voxloss_data.ct import write_ct_set

DOCS = ROOT / "docs"
LABELS = ["background", "liver", "kidney"]
Take = Callable[[Task, StudyRun], None]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ct_set(
        tmp_path_factory.mktemp("scans"), cases=4, test_cases=0, shape=(40, 36, 24), spacing=(2, 2, 3)
    )


def request_of(data: Path, out: Path, **changes: Any) -> StudyRequest:
    small = StudyRequest(data, out, losses=["dice", "dice-ce"], folds=2, seeds=1, epochs=1, width=2)
    return replace(small, **changes)


def planned(data: Path, **changes: Any) -> plan.StudyPlan:
    return study_plan(request_of(data, Path("out"), **changes), {"torch": "1"})


# What is run.


def test_the_losses_are_those_that_need_labels_only_and_tversky_is_a_row_of_them() -> None:
    everything = chosen(None)
    assert everything[0].name == BASELINE
    assert len({each.name for each in everything}) == len(everything)
    assert not {"BoundaryLoss", "BlobLoss"} & {each.loss for each in everything}
    assert [each.arguments["beta"] for each in everything if each.loss == "TverskyLoss"] == [*BETAS]
    for each in everything:
        alpha, beta = (each.arguments.get(name, 0.5) for name in ("alpha", "beta"))
        assert alpha + beta == pytest.approx(1)
    assert [each.name for each in chosen(["jaccard"])] == [BASELINE, "JaccardLoss"]
    assert peers_of(everything) == [*PEERS]
    assert [each.name for each in peers_of(chosen(["jaccard"]))] == [BASELINE]
    with pytest.raises(ValueError, match="expected losses that need labels only, received 'boundary'"):
        chosen(["boundary"])


@pytest.mark.parametrize("contender", [*chosen(None), *PEERS], ids=lambda each: each.title)
def test_every_contender_is_a_loss_of_logits_and_a_label_map(contender: Contender) -> None:
    logits = torch.randn(2, 3, 6, 6, 6, requires_grad=True)
    contender.criterion()(logits, torch.randint(3, (2, 1, 6, 6, 6)).float()).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() > 0


def test_each_scan_is_held_out_once_and_never_trains_then(scans: Path) -> None:
    found = planned(scans, seeds=2)
    for seed in range(2):
        of_seed = [task for task in found.tasks if task.plan.seed == seed and task.contender.name == BASELINE]
        ours = [task for task in of_seed if task.contender.library == VOXLOSS]
        assert sorted(name for task in ours for name in task.plan.validation) == sorted(found.common.training)
        for task in ours:
            assert not {*task.plan.training} & {*task.plan.validation}
            assert len(task.plan.training) + len(task.plan.validation) == 4
    theirs = [task for task in found.tasks if task.contender.library == MONAI]
    assert {(task.fold, task.plan.seed) for task in theirs} == {(0, 0), (0, 1)}
    assert {task.contender.name for task in theirs} == {"DiceCELoss", "DiceLoss"}
    assert len(planned(scans, scans=3).tasks[0].plan.validation) == 2


def test_a_run_is_kept_under_a_name_of_all_that_it_depends_on(scans: Path, tmp_path: Path) -> None:
    def names(**changes: Any) -> set[str]:
        return {task.name for task in planned(scans, **changes).tasks}

    usual = names()
    assert len(usual) == len(planned(scans).tasks)
    assert usual < names(seeds=2), "more seeds are more runs, beside those that are there"
    assert usual < names(losses=["dice", "jaccard"])
    for changes in ({"epochs": 2}, {"width": 4}, {"batch": 1}, {"scans": 3}, {"folds": 3}, {"device": "cuda"}):
        assert not usual & names(**changes), changes
    other = study_plan(request_of(scans, Path("out")), {"torch": "2"})
    assert not usual & {task.name for task in other.tasks}
    data = write_ct_set(tmp_path / "other", cases=4, test_cases=0, shape=(40, 36, 28), spacing=(2, 2, 3))
    assert not usual & {task.name for task in planned(data).tasks}


def test_what_cannot_be_studied_names_the_option(scans: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--folds: expected at most the number of scans, 4, received 5"):
        planned(scans, folds=5)
    with pytest.raises(ValueError, match=r"--losses: expected one of .*, received 'dise'"):
        planned(scans, losses=["dise"])
    data = write_ct_set(tmp_path / "ignored", cases=2, test_cases=0, shape=(32, 32, 24), spacing=(2, 2, 3))
    facts = json.loads((data / "dataset.json").read_text())
    facts["channel_names"] = {"0": "CT"}  # as nnU-Net has it, with an ignored label
    facts["labels"] = {"background": 0, "organ": 1, "lesion": 2, "ignore": 3}
    facts["file_ending"] = ".nii.gz"
    (data / "dataset.json").write_text(json.dumps(facts))
    for path in (data / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace(".nii.gz", "_0000.nii.gz")))
    with pytest.raises(ValueError, match=r"--data: expected label maps of mutually exclusive classes"):
        planned(data)


# One run.


def test_a_run_is_the_same_each_time_and_another_one_with_another_seed(scans: Path) -> None:
    first, *_ = planned(scans).tasks
    found = run(scans, first.plan, first.contender, 0, "cpu")
    assert found == run(scans, first.plan, first.contender, 0, "cpu")
    assert StudyRun.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert len(found.losses) == 4
    assert {*found.scans} == {*first.plan.validation}
    other = run(scans, replace(first.plan, seed=1), first.contender, 0, "cpu")
    assert other.losses != found.losses


def test_ours_and_monais_start_from_the_same_network_and_batch(scans: Path) -> None:
    tasks = planned(scans, losses=["dice", "tversky", "generalized-dice", "dice-focal"]).tasks
    first = {(task.contender.library, task.contender.name): task for task in tasks if task.fold == 0}

    def loss(library: str, name: str) -> float:
        task = first[library, name]
        return run(scans, task.plan, task.contender, 0, "cpu").losses[0]

    for name in ("DiceCELoss", "DiceLoss", "TverskyLoss, β = 0.7"):
        assert loss(MONAI, name) == pytest.approx(loss(VOXLOSS, name), abs=page.SAME)
    for name in page.DEPARTS:
        assert abs(loss(MONAI, name) - loss(VOXLOSS, name)) > page.SAME, f"{name}: why does the page explain it?"


def test_a_loss_that_is_not_finite_is_a_run_that_failed(scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Diverges(torch.nn.Module):
        def forward(self, logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return logits.sum() * math.nan

    monkeypatch.setattr(Contender, "criterion", lambda self: Diverges())
    first, *_ = planned(scans).tasks
    found = run(scans, first.plan, first.contender, 0, "cpu")
    assert found.failed == "the loss was nan at step 1"
    assert (found.losses, found.scans) == ([], {})
    assert result_of(found, LABELS[1:], True).by_class == {}


def test_distances_are_in_mm_and_undefined_where_a_side_is_empty() -> None:
    reference, prediction = np.zeros((2, 12, 12, 12), np.int64)
    reference[2:8, 2:8, 2:8] = 1
    prediction[2:8, 2:8, 2:8] = 1
    assert hausdorff_95(prediction, reference, 3, [1.0, 1.0, 1.0]) == [0.0, None]
    prediction[8:10, 2:8, 2:8] = 1  # two voxels further along the first axis
    assert hausdorff_95(prediction, reference, 3, [1.0, 1.0, 1.0]) == [2.0, None]
    assert hausdorff_95(prediction, reference, 3, [2.5, 1.0, 1.0]) == [5.0, None]
    reference[0, 0, 0] = 2
    assert hausdorff_95(prediction, reference, 3, [1.0, 1.0, 1.0]) == [2.0, None]


# Statistics.


def test_scores_of_a_structure_by_hand() -> None:
    of = Structure(tp=6, fp=2, fn=4, hd95=3.5)
    assert [score.of(of) for score in SCORES] == [12 / 18, 6 / 12, 6 / 8, 6 / 10, 3.5]
    nothing = Structure(tp=0, fp=0, fn=4, hd95=None)
    assert [score.of(nothing) for score in SCORES] == [0, 0, None, 0, None]
    assert DICE.of(Structure(0, 0, 0, None)) is None


def test_means_leave_out_what_is_undefined_and_count_what_was_missed() -> None:
    found = {
        "a": [Structure(6, 2, 4, 3.5), Structure(0, 0, 4, None)],
        "b": [Structure(1, 0, 0, 0.5), Structure(0, 3, 4, 9.0)],
    }
    made = result_of(StudyRun(Contender(BASELINE), 0, 0, [1.0, 0.5], found), LABELS[1:], with_losses=False)
    assert made.losses == ()
    liver, kidney = made.by_class["liver"], made.by_class["kidney"]
    assert liver["dice"] == pytest.approx((12 / 18 + 1) / 2)
    assert (liver["hd95"], liver[MISSED]) == (2.0, 0)
    assert (kidney["precision"], kidney["hd95"], kidney[MISSED]) == (0, 9.0, 2)
    assert made.mean(HD95) == (2.0 + 9.0) / 2
    assert math.isnan(Result(Contender(BASELINE), 0, 0, {}, (), "the loss was nan").mean(DICE))


def a_result(name: str, fold: int, seed: int, dice: float, library: str = VOXLOSS, **changes: Any) -> Result:
    scores = {"dice": dice, "iou": dice / (2 - dice), "precision": dice, "recall": dice, "hd95": 2.0, MISSED: 0}
    contender = next((each for each in chosen(None) if each.name == name), Contender(name))
    made = Result(replace(contender, library=library), fold, seed, {"liver": scores, "kidney": scores})
    return replace(made, **changes)


def a_study(found: Sequence[Result], folds: int = 3) -> Study:
    facts = {
        "data": "Two_organs",
        "description": "",
        "licence": "",
        "scans": 9,
        "classes": LABELS[1:],
        "channels": 1,
        "spacing": [1.0, 1.0, 2.5],
        "patch": [32, 32, 16],
        "batch": 2,
        "width": 16,
        "depth": 4,
        "epochs": 5,
        "steps": 60,
        "learning_rate": 1e-3,
    }
    costs = [
        Cost(Contender(BASELINE, library=library), [time, time], [10.0, 10.0], 2**20, 2**24)
        for library, time in ((VOXLOSS, 1.0), (MONAI, 3.0))
    ]
    command = "voxloss study --data Two_organs"
    return Study(command, "2026-01-01", {"cores": "2"}, {"torch": "2"}, None, facts, folds, found, costs)


def test_differences_are_paired_by_fold_and_seed_with_the_corrected_interval() -> None:
    cells = [(fold, seed) for seed in range(2) for fold in range(3)]
    base = [0.70, 0.72, 0.74, 0.71, 0.73, 0.75]
    own = [0.71, 0.72, 0.76, 0.72, 0.72, 0.78]
    found = [a_result(BASELINE, fold, seed, dice) for (fold, seed), dice in zip(cells, base, strict=True)]
    found += [a_result("DiceLoss", fold, seed, dice) for (fold, seed), dice in zip(cells, own, strict=True)][::-1]
    differences = [a - b for a, b in zip(own, base, strict=True)]
    of = a_study(found).difference("DiceLoss", DICE)
    assert of is not None
    assert of.mean == pytest.approx(fmean(differences))
    assert of.deviation == pytest.approx(stdev(differences))
    # t(0.975, 5) = 2.5706; a third is held out, so that held out / training = 1/2.
    assert of.half == pytest.approx(2.570582 * stdev(differences) * math.sqrt(1 / 6 + 1 / 2), rel=1e-5)
    assert not of.differs
    failed = [replace(each, by_class={}, failed="nan") if each.fold else each for each in found]
    assert len(a_study(failed).values("DiceLoss", DICE)) == 2
    assert a_study(found[:1]).difference("DiceLoss", DICE) is None


# The page.


def many_results() -> list[Result]:
    found = []
    for seed in range(2):
        for fold in range(3):
            base = 0.8 + 0.01 * fold + 0.001 * seed
            found.append(a_result(BASELINE, fold, seed, base))
            found.append(a_result("JaccardLoss", fold, seed, base + 0.02 + 0.0001 * fold))
            found.append(a_result("DiceLoss", fold, seed, base + 0.002 * (fold - 1)))
            found += [a_result(tversky(beta).name, fold, seed, base - 0.1 * beta) for beta in BETAS]
        losses = (1.0, 0.9 - 0.01 * seed, 0.8)
        for library, shift in ((MONAI, 0.0), (VOXLOSS, 2e-7)):
            of = [each for each in found if (each.contender.name, each.fold, each.seed) == (BASELINE, 0, seed)]
            if library == MONAI:
                found.append(a_result(BASELINE, 0, seed, 0.8, MONAI, losses=losses))
            else:
                found[found.index(of[0])] = replace(of[0], losses=tuple(each + shift for each in losses))
    return found


def test_the_page_says_what_the_numbers_do() -> None:
    of = a_study(many_results())
    text = page.render(of)
    first = text.splitlines()[2]
    assert first == (
        "**On Two_organs (9 scans), 1 of 6 losses end within 0.01 of the Dice of `DiceCELoss`, and among them "
        "the choice hardly matters; the others: `TverskyLoss, β = 0.9` (−0.090), `TverskyLoss, β = 0.7` (−0.070)"
        ", `TverskyLoss, β = 0.5` (−0.050), `TverskyLoss, β = 0.3` (−0.030), `JaccardLoss` (+0.020). "
        "Better by more than the 95 % confidence interval: 1, worse: 4; the best is `JaccardLoss` (+0.020).**"
    )
    assert re.search(r"^\| `JaccardLoss` \| 0\.831 ± 0\.009 \|", text, re.M)
    assert re.search(r"^\| `JaccardLoss` \| \*\*\+0\.020 ± 0\.000\*\* \|", text, re.M)
    assert re.search(r"^\| `DiceCELoss` \| 2\.0e-07 \| 2\.0e-07 \| 2\.0e-07 \| 0\.800 ± 0\.000 \|", text, re.M)
    assert "`DiceCELoss` is another formula" not in text
    assert re.search(r"\| 10\.0 % \|.*\| 3 × \| 1 × \|", text)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    near = [each for each in many_results() if each.contender.name in (BASELINE, "DiceLoss")]
    assert "hardly matters for Dice: 1 of 1 losses end within 0.01" in page.render(a_study(near))
    few = [each for each in near if each.seed == 0 and each.fold < 2]
    assert "**Preliminary: on Two_organs (9 scans), 2 runs per loss of 60 steps, which" in page.render(
        a_study(few)
    )


def test_a_pair_that_departs_is_explained_and_a_failed_run_is_stated() -> None:
    name = "GeneralizedDiceLoss"
    pair = [
        a_result(name, 0, seed, 0.8, library, losses=(1.0 if library == VOXLOSS else 0.5, 0.4))
        for seed in range(2)
        for library in (VOXLOSS, MONAI)
    ]
    broken = replace(pair[0], seed=3, by_class={}, losses=(), failed="the loss was nan at step 7")
    text = page.render(a_study([a_result(BASELINE, 0, 0, 0.8), *pair, broken]))
    assert f"`{name}` is another formula: MONAI's smoothing term outweighs" in text
    assert "fold 1, seed 3, failed: the loss was nan at step 7." in text


def test_pictures_are_light_and_dark() -> None:
    drawn = pictures(a_study(many_results()))
    assert {*drawn} == {
        f"evidence-{name}-{theme}.png" for name in ("parity", "balance") for theme in ("light", "dark")
    }
    for name, content in drawn.items():
        pixels = image.imread(BytesIO(content))
        assert (pixels[0, 0, :3].mean() > 0.5) == ("light" in name), name
    without = [each for each in many_results() if each.contender.library == VOXLOSS]
    assert {*pictures(a_study(without))} == {"evidence-balance-light.png", "evidence-balance-dark.png"}


def test_a_study_is_a_file_and_back(tmp_path: Path) -> None:
    of = a_study(many_results())
    of.save(tmp_path / FILE)
    assert page.render(Study.load(tmp_path / FILE)) == page.render(of)
    lines = (tmp_path / FILE).read_text().splitlines()
    assert sum(line.startswith('{"contender"') for line in lines) == len(of.results) + len(of.costs)
    (tmp_path / FILE).write_text('{"schema": 0}')
    with pytest.raises(ValueError, match=r"evidence\.json: expected a study as this version writes it, received"):
        Study.load(tmp_path / FILE)


def test_the_committed_page_is_that_of_the_committed_figures() -> None:
    found = Study.load(DOCS / FILE)
    assert (DOCS / page.FILE).read_text(encoding="utf-8") == page.render(found)


# The command.


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main(["study", *map(str, arguments)])
    return int(left.value.code or 0)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs from here on, which do not train; costs are not measured."""
    names: list[str] = []

    def in_place(
        tasks: Sequence[Task],
        start: Callable[[Task], StudyRun],
        jobs: int,
        take: Callable[[Task, StudyRun], None],
    ) -> None:
        for number, task in enumerate(tasks):
            if "interrupted" in names and number == 2:
                names.remove("interrupted")
                raise KeyboardInterrupt
            names.append(task.name)
            structures = [Structure(5 + task.fold, task.plan.seed, 2, 1.0) for _ in task.plan.labels[1:]]
            scans = dict.fromkeys(task.plan.validation, structures)
            take(task, StudyRun(task.contender, task.fold, task.plan.seed, [1.0, 0.5], scans))

    monkeypatch.setattr(study, "_each", in_place)
    monkeypatch.setattr(study, "apart", lambda measure: [])
    return names


def test_a_study_runs_what_is_missing_and_writes_everything(
    scans: Path, tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ["--data", scans, "--losses", "dice", "--folds", 2, "--epochs", 1, "--width", 2, "--out", out]
    ran.append("interrupted")
    assert command(*given, "--seeds", 1) == 130
    assert "interrupted: 2 of 6 runs are finished and kept in" in capsys.readouterr().out
    assert not (out / FILE).exists()
    first = [*ran]
    assert command(*given, "--seeds", 1) == 0
    assert len(ran) == len({*ran}) == 6
    assert ran[:2] == first
    assert {path.name for path in out.iterdir()} == {FILE, page.FILE, *pictures(Study.load(out / FILE))}
    assert len([*(tmp_path / ".out-study").glob("voxloss-*.json")]) == 4
    before = (out / FILE).read_bytes()
    assert command(*given, "--seeds", 1) == 0
    assert (len(ran), (out / FILE).read_bytes()) == (6, before)
    assert command(*given, "--seeds", 2, "--jobs", 3) == 0
    assert len(ran) == len({*ran}) == 12
    assert len(Study.load(out / FILE).results) == 12
    assert command(*given, "--seeds", 1, "--fresh") == 0
    assert len(ran) == 18
    assert f"--data {scans.name} --losses dice --folds 2 --seeds 1 --epochs 1 --width 2" in (
        out / page.FILE
    ).read_text(encoding="utf-8")


def test_a_failed_run_is_exit_code_1(
    scans: Path,
    tmp_path: Path,
    ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = study._each

    def failing(tasks: Sequence[Task], start: Any, jobs: int, take: Take) -> None:
        def spoilt(task: Task, found: StudyRun) -> None:
            take(task, replace(found, scans={}, failed="no") if task.contender.name == "DiceLoss" else found)

        original(tasks, start, jobs, spoilt)

    monkeypatch.setattr(study, "_each", failing)
    given = [
        "--data",
        scans,
        "--losses",
        "dice",
        "--folds",
        2,
        "--seeds",
        1,
        "--epochs",
        1,
        "--out",
        tmp_path / "out",
    ]
    assert command(*given) == 1
    assert "voxloss DiceLoss(), fold 1, seed 0: no" in capsys.readouterr().err
    assert "failed: no." in (tmp_path / "out" / page.FILE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--data"),
        (["--data", "nowhere"], "expected a folder of images and label maps, received nothing at nowhere"),
        (["--data", "nowhere", "--folds", "1"], "--folds"),
    ],
)
def test_wrong_command_lines(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.integration
@pytest.mark.thorough
def test_processes_run_what_is_missing_after_ctrl_c_and_find_the_same(scans: Path, tmp_path: Path) -> None:
    def start(jobs: int) -> subprocess.Popen[str]:
        given = ["--data", str(scans), "--losses", "dice-ce", "--folds", "2", "--seeds", "1", "--epochs", "1"]
        words = [sys.executable, "-m", "voxloss_app", "study", *given, "--width", "2", "--jobs", str(jobs)]
        return subprocess.Popen([*words, "--out", str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)

    alone = start(1)
    assert alone.stdout is not None
    while "fold 1" not in alone.stdout.readline():
        pass
    alone.send_signal(signal.SIGINT)
    assert "of 3 runs are finished" in alone.communicate(timeout=120)[0]
    assert alone.returncode == 130
    both = start(2)
    both.communicate(timeout=400)
    assert both.returncode == 0
    found = Study.load(tmp_path / "out" / FILE)
    tasks = study_plan(request_of(scans, tmp_path, losses=["dice-ce"]), versions()).tasks
    for task in (tasks[0], tasks[-1]):  # the first is of the interrupted run, the last of two at once
        here = run(scans, task.plan, task.contender, task.fold, "cpu")
        (result,) = (r for r in found.runs(task.contender.name, task.contender.library) if r.fold == task.fold)
        assert result.by_class == result_of(here, found.facts["classes"], with_losses=False).by_class
    assert {cost.contender.name for cost in found.costs} == {BASELINE}
    for cost in found.costs:
        assert len(cost.loss_times) == len(cost.step_times) > 0
        assert 0 < cost.loss_peak < cost.step_peak
