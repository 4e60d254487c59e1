"""Trials of losses: fair training, scores by hand, runs that resume, and a page that agrees with the numbers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from matplotlib import image
from matplotlib.colors import to_rgb

from sources import ROOT
from voxloss_app import trial
from voxloss_app.__main__ import main
from voxloss_app.trial import page, picture, results, scores, training
from voxloss_app.trial.results import Trial, load, spread
from voxloss_app.trial.scores import FALSE, MISSED, RIGHT, scores_of_lesions, scores_of_vessels
from voxloss_app.trial.tasks import BASELINE, LESIONS, TASKS, VESSELS, Task, chosen
from voxloss_app.trial.training import Settings, TrialRun
from voxloss_data import Lesions, VesselTree, vessel_tree

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = ROOT / "docs"
SETTINGS = Settings(steps=3, edge=32, training=2, held_out=1, batch=2)
OTHER = "DiceCESkeletonRecallLoss"


# Scores, on volumes that can be counted by hand.


def tube() -> VesselTree:
    """A vessel of 3 × 3 voxels and its centre line, 20 voxels long."""
    labels, lines = np.zeros((2, 24, 9, 9), np.uint8)
    labels[2:22, 3:6, 3:6] = 1
    lines[2:22, 4, 4] = 1
    return VesselTree(image=np.zeros((24, 9, 9), np.float32), labels=labels, centre_lines=lines)


def mask_of(vessels: VesselTree, *boxes: Any, of: bool = False) -> NDArray[np.bool_]:
    """The vessel with some boxes set."""
    mask = vessels.labels > 0
    for box in boxes:
        mask[box] = of
    return mask


def test_scores_of_vessels_at_their_best_and_of_nothing() -> None:
    vessels = tube()
    best = scores_of_vessels(mask_of(vessels), vessels)
    assert best == {"dice": 1, "centre_line_recall": 1, "cl_dice": 1, "betti_0_error": 0, "pieces": 1}
    nothing = scores_of_vessels(np.zeros((24, 9, 9), bool), vessels)
    assert nothing == {"dice": 0, "centre_line_recall": 0, "cl_dice": 0, "betti_0_error": 1, "pieces": 0}
    assert [*best] == [score.key for score in scores.OF_VESSELS]


def test_a_break_and_a_speck_count_as_what_they_are() -> None:
    vessels = tube()
    broken = scores_of_vessels(mask_of(vessels, np.s_[10:12]), vessels)
    assert (broken["betti_0_error"], broken["pieces"]) == (1, 2)
    assert broken["centre_line_recall"] == 18 / 20
    assert broken["dice"] == 2 * 18 / (18 + 20)
    speck = scores_of_vessels(mask_of(vessels, np.s_[0, 0, 0], of=True), vessels)
    assert (speck["betti_0_error"], speck["pieces"]) == (1, 1)
    # Diagonal neighbours are connected.
    corner = scores_of_vessels(mask_of(vessels, np.s_[1, 2, 2], of=True), vessels)
    assert (corner["betti_0_error"], corner["pieces"]) == (0, 1)


def test_cl_dice_takes_precision_from_one_skeleton_and_sensitivity_from_the_other() -> None:
    target, prediction = np.zeros((2, 20, 9, 9), bool)
    target[:10, 2, 2] = True  # lines of one voxel are their own skeletons
    prediction[:5, 2, 2] = True
    assert scores.cl_dice(prediction, target) == pytest.approx(2 * 1 * 0.5 / 1.5)
    prediction[:15, 7, 7] = True
    assert scores.cl_dice(prediction, target) == pytest.approx(2 * 0.25 * 0.5 / 0.75)
    assert scores.cl_dice(target, prediction) == pytest.approx(2 * 0.5 * 0.25 / 0.75)
    assert scores.cl_dice(~target & False, target) == 0
    # Only the skeletons count, so that thickness does not.
    thick, line = tube().labels > 0, tube().centre_lines > 0
    assert scores.cl_dice(line, thick) == scores.cl_dice(thick, line) == 1


def blobs() -> Lesions:
    """Cubes of 64, 27 and 8 voxels in a row, two voxels from each other."""
    numbers = np.zeros((20, 8, 8), np.int32)
    numbers[1:5, 1:5, 1:5] = 1
    numbers[7:10, 1:4, 1:4] = 2
    numbers[12:14, 1:3, 1:3] = 3
    labels = (numbers > 0).astype(np.uint8)
    return Lesions(image=np.zeros(numbers.shape, np.float32), labels=labels, numbers=numbers)


def test_scores_of_lesions_at_their_best_and_of_nothing() -> None:
    lesions = blobs()
    best = scores_of_lesions(lesions.labels > 0, lesions)
    assert best == {
        "dice": 1,
        "found": 1,
        "false": 0,
        "dice_largest": 1,
        "dice_middle": 1,
        "dice_smallest": 1,
    }
    assert [*best] == [score.key for score in scores.OF_LESIONS]
    nothing = scores_of_lesions(lesions.labels > 1, lesions)
    assert nothing == dict.fromkeys(best, 0)


def test_a_lesion_needs_more_than_a_touch_to_be_found() -> None:
    lesions = blobs()
    prediction = lesions.labels > 0
    prediction[1:5] = False
    prediction[1, 1, 1:5] = True  # IoU 4 / 64
    assert scores_of_lesions(prediction, lesions)["found"] == 2 / 3
    prediction[2, 1, 1:5] = True  # 8 / 64
    found = scores_of_lesions(prediction, lesions)
    assert found["found"] == 1
    assert found["dice_largest"] == 2 * 8 / (8 + 64)
    assert found["dice_middle"] == found["dice_smallest"] == 1


def test_a_component_over_two_lesions_counts_for_both_and_one_over_none_is_false() -> None:
    lesions = blobs()
    prediction = lesions.labels > 0
    prediction[5:7, 2, 2] = True  # a bridge between the first and the second
    found = scores_of_lesions(prediction, lesions)
    assert (found["found"], found["false"]) == (1, 0)
    # One voxel of the bridge is nearer to each.
    assert (found["dice_largest"], found["dice_middle"]) == (2 * 64 / (64 + 65), 2 * 27 / (27 + 28))
    prediction[18, 6, 6] = prediction[16, 6, 6] = True
    found = scores_of_lesions(prediction, lesions)
    assert found["false"] == 2
    assert found["dice_smallest"] == 2 * 8 / (8 + 10), "they are nearest to the third"
    prediction[16:20, 3:8, 3:8] = True
    assert scores_of_lesions(prediction, lesions)["found"] == 1, "what does not touch it leaves it found"
    prediction[12:14] = False
    assert scores_of_lesions(prediction, lesions)["found"] == 2 / 3


def test_marks_and_their_projection() -> None:
    vessels = tube()
    prediction = mask_of(vessels, np.s_[10:12])
    prediction[22, 8, 8] = True  # highest z, last x but one
    marks = scores.marks_of_vessels(prediction, vessels)
    assert {*marks[10:12, 4, 4]} == {MISSED}
    assert marks[22, 8, 8] == FALSE
    assert (marks == RIGHT).sum() == 18 * 9
    rows = scores.unprojected(scores.projection(marks))
    assert rows.shape == (9, 24)
    assert rows[0, 22] == FALSE, "z upwards, x to the right"
    assert {*rows[4, 10:12]} == {MISSED}, "which no voxel in front of it hides"
    assert (rows == RIGHT).sum() == 18 * 3
    lesions = blobs()
    prediction = lesions.labels > 0
    prediction[7:10], prediction[18, 6, 6] = False, True
    marks = scores.marks_of_lesions(prediction, lesions)
    assert ((marks == MISSED) == (lesions.numbers == 2)).all()
    assert np.argwhere(marks == FALSE).tolist() == [[18, 6, 6]]


# Training.


def test_losses_differ_in_nothing_but_the_loss() -> None:
    baseline, other = (
        list(training.batches(VESSELS, VESSELS.contenders[n], 4, SETTINGS)) for n in (BASELINE, OTHER)
    )
    assert len(baseline) == SETTINGS.steps
    for (image_a, target_a), (image_b, target_b) in zip(baseline, other, strict=True):
        assert image_a.shape == (2, 1, 32, 32, 32)
        assert torch.equal(image_a, image_b)
        assert torch.equal(target_a.labels, target_b.labels)
        assert target_a.skeleton is None
        assert target_b.skeleton is not None
        # Cropped and flipped with the labels: the skeleton lies within.
        assert torch.equal(target_b.skeleton, target_b.skeleton * target_b.labels)
        assert target_b.skeleton.any()
    assert not torch.equal(baseline[0][0], baseline[1][0])
    weights = [training.initial_network(seed).state_dict() for seed in (4, 4, 5)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_image_and_labels_are_cropped_and_flipped_together() -> None:
    def make(edge: int, seed: int) -> VesselTree:
        tree = vessel_tree(shape=(edge,) * 3, seed=seed)
        return replace(tree, image=tree.labels.astype(np.float32))

    settings = replace(SETTINGS, edge=40)
    flipped = set()
    for image_patch, target in training.batches(
        replace(VESSELS, make=make), VESSELS.contenders[OTHER], 0, settings
    ):
        assert torch.equal(image_patch, target.labels.float())
        flipped |= {patch.sum((0, 1, 2)).argmax().item() for patch in image_patch}
    assert len(flipped) > 1


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_no_volume_is_in_two_sets(task: Task) -> None:
    drawn: list[int] = []
    spied = replace(task, make=lambda edge, seed: drawn.append(seed))
    training.held_out_volumes(spied, SETTINGS)
    for seed in range(5):
        training.training_volumes(spied, SETTINGS, seed)
    assert sorted(drawn) == list(range(1 + 5 * 2))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("task", "loss"), [(t, loss) for t in TASKS.values() for loss in t.contenders])
def test_a_run_trains_and_scores(task: Task, loss: str) -> None:
    steps: list[int] = []
    state = torch.get_rng_state()
    found = training.run(task, loss, 0, SETTINGS, steps.append)
    assert steps == [1, 2, 3]
    assert (found.loss, found.seed) == (loss, 0)
    (volume,) = found.volumes
    assert {*volume} == {score.key for score in task.scores}
    assert all(np.isfinite(value) for value in volume.values())
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are its own"
    assert training.run(task, loss, 0, SETTINGS) == found
    assert training.run(task, loss, 1, SETTINGS).volumes != found.volumes


def test_training_improves_a_network() -> None:
    """The steps are of a loss that falls: after forty of them a vessel's Dice is several times that of chance."""
    settings = replace(SETTINGS, steps=40)
    (volume,) = training.run(VESSELS, BASELINE, 0, settings).volumes
    assert volume["dice"] > 0.3


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    class Broken(torch.nn.Module):
        def forward(self, logits: torch.Tensor, target: Any) -> torch.Tensor:
            return logits.sum() * float("nan")

    contender = replace(VESSELS.contenders[BASELINE], loss=lambda **_: Broken())
    task = replace(VESSELS, contenders={BASELINE: contender})
    with pytest.raises(ValueError, match=r"step 1: expected a finite loss, received nan"):
        training.run(task, BASELINE, 0, SETTINGS)


def test_the_baseline_always_takes_part() -> None:
    assert chosen(VESSELS, None) == [*VESSELS.contenders]
    assert chosen(VESSELS, [OTHER]) == [BASELINE, OTHER]
    assert chosen(LESIONS, [BASELINE]) == [BASELINE]


# Whole trials.


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit:
        main(["trial", *arguments])
    return int(exit.value.code or 0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One volume each, so that runs take a second."""
    monkeypatch.setattr(trial, "Settings", partial(Settings, training=1, held_out=1, batch=1))


Calls = list[tuple[str, int]]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Which losses and seeds are trained from here on."""
    calls: Calls = []
    original = training.run

    def spy(task: Task, loss: str, seed: int, *others: Any) -> TrialRun:
        calls.append((loss, seed))
        return original(task, loss, seed, *others)

    monkeypatch.setattr(trial, "run", spy)
    return calls


QUICK = ("--steps", "2", "--edge", "32")


@pytest.mark.integration
@pytest.mark.usefixtures("small")
def test_a_trial_writes_everything_once_and_the_same_each_time(
    tmp_path: Path, trained: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "new" / "folder"
    assert command("vessels", *QUICK, "--seeds", "2", "--out", str(first)) == 0
    assert trained == [(loss, seed) for seed in range(2) for loss in VESSELS.contenders]
    assert {path.name for path in first.iterdir()} == {"trials.json", "trials.md", "trials-vessels.png"}
    out = capsys.readouterr().out
    assert re.search(rf"{OTHER} +[+−]0\.\d+ ± ", out)
    before = (first / "trials.json").read_bytes()
    for text in ((first / name).read_text(encoding="utf-8") for name in ("trials.json", "trials.md")):
        assert "voxloss trial vessels --seeds 2 --steps 2 --edge 32" in text
        assert str(tmp_path) not in text
    # What is finished is not trained again, a further seed and other steps are; --fresh trains all.
    trained.clear()
    assert command("vessels", *QUICK, "--seeds", "2", "--out", str(first)) == 0
    assert trained == []
    assert (first / "trials.json").read_bytes() == before
    assert command("vessels", *QUICK, "--seeds", "2", "--fresh", "--out", str(first)) == 0
    assert len(trained) == 4
    assert (first / "trials.json").read_bytes() == before
    trained.clear()
    assert command("vessels", *QUICK, "--seeds", "3", "--losses", BASELINE, "--out", str(first)) == 0
    assert trained == [(BASELINE, 2)]
    assert command("vessels", "--steps", "3", "--edge", "32", "--seeds", "1", "--out", str(first)) == 0
    assert trained[1:] == [(loss, 0) for loss in VESSELS.contenders]


@pytest.mark.usefixtures("small")
def test_ctrl_c_keeps_what_is_finished(
    tmp_path: Path, trained: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    spied: Callable[..., TrialRun] = vars(trial)["run"]

    def interrupted(*given: Any) -> TrialRun:
        if len(trained) == 3:
            raise KeyboardInterrupt
        return spied(*given)

    monkeypatch.setattr(trial, "run", interrupted)
    arguments = ("vessels", *QUICK, "--seeds", "2", "--out", str(out))
    assert command(*arguments) == 130
    assert not list(out.iterdir())
    kept = tmp_path / ".out-trial"
    assert f"3 of 4 runs are finished and kept in {kept}" in capsys.readouterr().out
    assert len(list(kept.glob("*.json"))) == 3
    # One of them is damaged: it and the missing one are trained.
    next(kept.glob(f"vessels-{BASELINE}-1-*.json")).write_text("{", encoding="utf-8")
    trained.clear()
    monkeypatch.setattr(trial, "run", spied)
    assert command(*arguments) == 0
    assert trained == [(BASELINE, 1), (OTHER, 1)]
    assert command("vessels", *QUICK, "--seeds", "2", "--out", str(tmp_path / "unbroken")) == 0
    assert (out / "trials.json").read_bytes() == (tmp_path / "unbroken" / "trials.json").read_bytes()


@pytest.mark.usefixtures("small")
def test_a_trial_of_another_task_stays_on_the_page(tmp_path: Path) -> None:
    for task in ("lesions", "vessels", "lesions"):
        assert command(task, *QUICK, "--seeds", "1", "--losses", BASELINE, "--out", str(tmp_path / "out")) == 0
    found = load(tmp_path / "out" / "trials.json")
    assert [each.task for each in found] == [VESSELS, LESIONS]
    text = (tmp_path / "out" / "trials.md").read_text(encoding="utf-8")
    assert text == page.render(found)
    assert text.index("## Vessels") < text.index("## Lesions")
    assert f"--losses {BASELINE}" in text


def test_a_run_depends_on_settings_versions_and_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def key(task: Task = VESSELS, loss: str = OTHER, seed: int = 0, settings: Settings = SETTINGS) -> str:
        return trial._depends_on(task, loss, seed, settings)

    keys = [key(), key(task=LESIONS), key(loss=BASELINE), key(seed=1), key(settings=replace(SETTINGS, batch=1))]
    monkeypatch.setattr(trial, "version", lambda package: "0")
    keys.append(key())
    changed = tmp_path / "training.py"
    changed.write_text("changed", encoding="utf-8")
    monkeypatch.setattr(training, "__file__", str(changed))
    keys.append(key())
    assert len({*keys}) == len(keys)
    assert key() == keys[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["arteries"], r"'?arteries'?"),
        ([], "Missing argument 'TASK'"),
        (["vessels", "--steps", "0"], "'--steps'.*1"),
        (["vessels", "--seeds", "0"], "'--seeds'.*1"),
        (
            ["vessels", "--losses", "DiceTopKLoss"],
            f"--losses: expected some of {BASELINE}, {OTHER} for vessels, received",
        ),
        (["lesions", "--losses", f"{BASELINE},"], "--losses: expected .* for lesions, received ''"),
        (["vessels", "--edge", "24"], "--edge: expected a multiple of 8 that is at least 32, received 24"),
        (["vessels", "--edge", "36"], "--edge: expected a multiple of 8 that is at least 32, received 36"),
        (["vessels", "--out", "FILE"], "--out: expected a folder, received the file .*FILE"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    assert command(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"voxloss: .*{message}.*\n", err), err
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_without_the_maps_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [*sys.modules]:
        if name.startswith("voxloss_app.trial"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "skimage.measure", None)
    assert command("vessels", "--out", str(tmp_path)) == 2
    expected = r"voxloss: trial needs skimage.measure: pip install 'voxloss\[demo,maps\]'\n"
    assert re.fullmatch(expected, capsys.readouterr().err)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema": 0, "trials": {}}', '{"schema": 1, "trials": {"vessels": {}}}']
)
def test_a_file_of_something_else_is_not_replaced(
    content: str, tmp_path: Path, trained: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trials.json").write_text(content, encoding="utf-8")
    assert command("vessels", *QUICK, "--out", str(tmp_path)) == 2
    assert re.search(
        r"trials\.json: expected trials as this version writes them, received", capsys.readouterr().err
    )
    assert (tmp_path / "trials.json").read_text(encoding="utf-8") == content
    assert trained == []


# What is made of the numbers.


def volume(dice: float, recall: float, error: float) -> dict[str, float]:
    return {"dice": dice, "centre_line_recall": recall, "cl_dice": dice, "betti_0_error": error, "pieces": 1.0}


def a_trial() -> Trial:
    """Three seeds, two held-out volumes; the second seed of one loss is given first."""
    given = {
        BASELINE: [(0.5, 0.6, 4.0), (0.6, 0.7, 6.0), (0.7, 0.8, 8.0)],
        OTHER: [(0.4, 0.9, 3.0), (0.5, 0.8, 2.0), (0.6, 0.8, 7.0)],
    }
    rows = ["0123", "1110"]
    runs = [
        TrialRun(
            loss,
            seed,
            [volume(dice - 0.1, recall, error), volume(dice + 0.1, recall, error)],
            rows if seed == 0 else [],
        )
        for loss, values in given.items()
        for seed, (dice, recall, error) in enumerate(values)
    ]
    return Trial(VESSELS, "voxloss trial vessels", {"torch": "1"}, SETTINGS, rows, runs[::-1])


BY_KEY = {score.key: score for score in VESSELS.scores}


def test_means_and_paired_differences() -> None:
    found = a_trial()
    assert (found.losses, found.seeds) == ([BASELINE, OTHER], [0, 1, 2])
    assert found.by_seed(OTHER, BY_KEY["dice"]) == pytest.approx([0.4, 0.5, 0.6])
    assert found.differences(OTHER, BY_KEY["dice"]) == pytest.approx([-0.1] * 3)
    assert found.differences(OTHER, BY_KEY["betti_0_error"]) == [-1, -4, -1]
    assert spread([0.4, 0.5, 0.6], BY_KEY["dice"]) == "0.500 ± 0.100", "of a sample: n − 1"
    assert spread([-1, -4, -1], BY_KEY["betti_0_error"], signed=True) == "−2.0 ± 1.7"
    assert spread([0.25], BY_KEY["dice"], signed=True) == "+0.250"


def test_the_verdict_knows_which_way_is_better() -> None:
    better, worse, mixed = page.verdict(a_trial(), OTHER)
    assert better == "better in every seed: Betti-0 error"
    assert worse == "worse in every seed: Dice, clDice"
    assert mixed == "no consistent difference: centre-line recall, pieces", "which has a tie"


def test_the_page() -> None:
    text = page.render([a_trial()])
    assert f"| `{BASELINE}` | 0.600 ± 0.100 | 0.700 ± 0.100 | 0.600 ± 0.100 | 6.0 ± 2.0 | 1.0 ± 0.0 |\n" in text
    assert f"| `{OTHER}` | −0.100 ± 0.000 (0 of 3) | +0.133 ± 0.153 (2 of 3) |" in text
    assert "Dice ↑ |" in text
    assert "Betti-0 error ↓ |" in text
    assert "with a probability of 25 %" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_the_numbers_survive_the_file(tmp_path: Path) -> None:
    results.save(tmp_path / "trials.json", [a_trial()])
    assert load(tmp_path / "trials.json") == [a_trial()]
    assert load(tmp_path / "none.json") == []


def test_the_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture.picture_png(a_trial()))
    (tmp_path / "b.png").write_bytes(picture.picture_png(a_trial()))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = image.imread(tmp_path / "a.png")[..., :3]
    assert pixels.shape[1] == 3 * 440, "ground truth and two losses"
    for colour in picture.COLOURS.values():
        assert (np.abs(pixels - to_rgb(colour)).max(-1) < 0.01).sum() > 500, colour


def test_the_colours_differ_in_lightness() -> None:
    luminances = sorted(float(np.dot(to_rgb(c), (0.2126, 0.7152, 0.0722))) for c in picture.COLOURS.values())
    assert all(darker + 0.05 < lighter for darker, lighter in pairwise(luminances))


# What is committed.


def test_the_committed_page_is_that_of_the_committed_numbers() -> None:
    trials = load(DOCS / results.FILE)
    assert [each.task for each in trials] == [*TASKS.values()]
    assert (DOCS / "trials.md").read_text(encoding="utf-8") == page.render(trials), (
        'to make it again: python -c "from pathlib import Path; from voxloss_app.trial import page, results; '
        "Path('docs/trials.md').write_text(page.render(results.load(Path('docs/trials.json'))))\""
    )
    for each in trials:
        assert len(each.seeds) >= 3
        assert {run.loss for run in each.runs} == {*each.losses}
        assert len(each.runs) == len(each.losses) * len(each.seeds)
        assert all(len(run.volumes) == each.settings.held_out for run in each.runs)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_the_committed_pictures_are_small(task: Task) -> None:
    assert (DOCS / picture.file_name(task)).stat().st_size <= 150_000


def test_the_file_is_plain_json() -> None:
    """Without NaN or infinity, which other programs cannot read."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads((DOCS / results.FILE).read_text(encoding="utf-8"), parse_constant=refuse)
