"""The demo end to end with few steps: what it trains on, what it writes, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import Any

import monai
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor

pytest.importorskip("nilearn")

from matplotlib.figure import Figure
from numpy.typing import NDArray

import voxloss
from voxloss_app import demo
from voxloss_app.__main__ import main
from voxloss_app.demo import data, figures, report, training
from voxloss_app.demo.checks import ACCURACY, ValueCheck, check_losses, on_phantoms
from voxloss_app.theme import DARK, LIGHT, Theme
from voxloss_data import BrainMRI, all_phantoms, brain_mri
from voxloss_verify.configurations import CONFIGURATIONS
from voxloss_verify.laws.law import close
from voxloss_verify.laws.record import Finding, Record, Status

STEPS = 3

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("VOXLOSS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def brain(cache: Path) -> BrainMRI:
    return brain_mri(cache=cache)


@dataclass(frozen=True)
class Run:
    """A finished demo: its exit code and what it left."""

    code: int
    out: Path

    @property
    def page(self) -> str:
        return (self.out / "report.html").read_text(encoding="utf-8")

    @property
    def numbers(self) -> Any:
        return json.loads((self.out / "metrics.json").read_text(encoding="utf-8"))


def run_demo(out: Path, steps: int = STEPS, *others: str) -> Run:
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--steps", str(steps), "--device", "cpu", "--out", str(out), *others])
    return Run(int(exit.value.code or 0), out)


@pytest.fixture(scope="module")
def finished(brain: BrainMRI, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        if not request.config.getoption("--thorough"):
            patch.setattr(demo, "on_phantoms", lambda: on_phantoms(all_phantoms()[::8]))
            for name, each in [*CONFIGURATIONS.items()]:  # of the first loss all, which have every form
                if name != "DiceLoss":
                    patch.setitem(CONFIGURATIONS, name, dict(islice(each.items(), 1)))
        return run_demo(tmp_path_factory.mktemp("demo") / "new folder")


@pytest.fixture
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check on one phantom only."""

    def check(*_: object) -> Iterator[ValueCheck]:
        return check_losses([on_phantoms(all_phantoms()[:1])])

    monkeypatch.setattr(demo, "_check", check)


# What is written.


@pytest.mark.integration
def test_a_run_leaves_three_files_and_succeeds(finished: Run) -> None:
    assert finished.code == 0
    assert {path.name for path in finished.out.iterdir()} == {"report.html", "report.png", "metrics.json"}
    assert (finished.out / "report.png").read_bytes().startswith(b"\x89PNG")


class Page(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data")]


@pytest.mark.integration
def test_the_page_needs_nothing_else(finished: Run) -> None:
    page = Page(finished.page)
    assert len(page.links) == 4  # slices and curves, light and dark
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert page.tags.isdisjoint({"script", "link", "iframe"})
    style = finished.page.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "://" not in finished.page
    assert "Interrupted" not in finished.page


@pytest.mark.integration
def test_the_page_names_every_loss_class_and_version(finished: Run) -> None:
    for name in CONFIGURATIONS:
        assert finished.page.count(f">{name}</th>") == 2, "once in float32, once in float64"
    for name in BrainMRI.class_names:
        assert f"</span>{name}</th>" in finished.page
    for version in (voxloss.__version__, torch.__version__, monai.__version__, sys.version.split()[0]):
        assert f"<td>{version}</td>" in finished.page
    command = ["voxloss", "demo", "--loss", "dice", "--steps", str(STEPS), "--device", "cpu", "--seed", "0"]
    [shown] = re.findall(r"<pre>(.*)</pre>", finished.page)
    assert shlex.split(shown.replace("&#39;", "'")) == [*command, "--out", str(finished.out)]


@pytest.mark.integration
def test_the_page_shows_the_numbers(finished: Run) -> None:
    numbers = finished.numbers
    rows = dict(re.findall(r'<th scope="row">(?:<span[^>]*></span>)?([^<]+)</th>(.*?)</tr>', finished.page))
    for row in numbers["held_out"]["classes"]:
        cells = re.findall(r"<td[^>]*>([^<]*)</td>", rows[row["name"]])
        assert cells == [
            f"{row['dice']:.4f}",
            f"{row['iou']:.4f}",
            row["dice_exact"],
            str(row["true_voxels"]),
            str(row["predicted_voxels"]),
        ]
    assert f"<b>{numbers['held_out']['mean_foreground_dice']:.3f}</b>" in finished.page
    assert f"{numbers['checks']['count']} / {numbers['checks']['count']}</b>" in finished.page


@pytest.mark.integration
def test_the_numbers_agree_with_each_other(finished: Run, brain: BrainMRI) -> None:
    numbers = finished.numbers
    classes = numbers["held_out"]["classes"]
    truth = data.held_out_volume(brain)["label"].numpy()
    assert [row["true_voxels"] for row in classes] == np.bincount(truth.astype(int).ravel()).tolist()
    assert sum(row["predicted_voxels"] for row in classes) == truth.size
    for row in classes:
        assert row["dice"] == float(Fraction(row["dice_exact"]))
        assert row["iou"] == float(Fraction(row["iou_exact"]))
        assert Fraction(row["dice_exact"]) == 2 * Fraction(row["iou_exact"]) / (1 + Fraction(row["iou_exact"]))
        assert numbers["training"]["dice"][str(STEPS)][row["name"]] == row["dice"]
    mean = float(np.mean([row["dice"] for row in classes[1:]]))
    assert numbers["held_out"]["mean_foreground_dice"] == pytest.approx(mean, abs=1e-15)
    assert len(numbers["training"]["loss"]) == numbers["training"]["steps_done"] == STEPS


@pytest.mark.integration
def test_the_summary_of_the_checks_agrees_with_the_records(finished: Run) -> None:
    checks = finished.numbers["checks"]
    records = checks["records"]
    assert checks["count"] == len(records) == sum(row["count"] for row in checks["losses"])
    assert checks["failed"] == 0
    assert {record["case"] for record in records} > {
        "predicted labels vs labels",
        "probabilities vs labels",
        "predicted labels vs probabilities",
        "probabilities vs themselves",
    }
    for row in checks["losses"]:
        errors = [r["error"] for r in records if (r["loss"], r["dtype"]) == (row["loss"], row["dtype"])]
        assert len(errors) == row["count"]
        # The exponential logarithmic Dice is steep near Dice 1: its tolerance is wide, its error is not.
        assert row["worst"]["tolerance"] < 1e-3 or row["loss"] == "ExponentialLogarithmicLoss", "of a sum"
        assert max(errors) == row["worst"]["error"] <= min(row["worst"]["tolerance"], 1e-5)


# What trains and what is held out.


def world_x(volume: Any) -> Any:
    """World x in mm of every voxel of a MetaTensor [C, X, Y, Z]."""
    indices = np.indices(volume.shape[1:]).reshape(3, -1)
    return volume.affine.numpy()[0, :3] @ indices + volume.affine.numpy()[0, 3]


def test_the_hemispheres_share_no_voxel_and_leave_none_out(brain: BrainMRI) -> None:
    keys = ["image", "label"]
    files = {"image": brain.image, "label": brain.labels}
    left, right = (data._load(keys, side)(files) for side in ("left", "right"))
    whole = monai.transforms.LoadImage()(brain.labels)
    for key in keys:
        assert world_x(left[key]).max() < 0 <= world_x(right[key]).min()
    joined = np.concatenate([left["label"][0].numpy(), right["label"][0].numpy()])
    assert (joined == whole.numpy()).all()
    held_out = data.held_out_volume(brain)
    assert all(world_x(held_out[key]).min() >= 0 for key in ("image", "label", "probabilities"))


def test_every_patch_is_from_the_left(brain: BrainMRI) -> None:
    seen = set()
    for batch in data.training_batches(brain, 6):
        for patch in monai.data.decollate_batch(batch):
            assert patch["image"].shape == patch["label"].shape == (1, *data.PATCH)
            for key in ("image", "label"):
                assert world_x(patch[key]).max() < 0
            seen |= set(patch["label"].unique().tolist())
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("flip", [1, -1])
def test_a_hemisphere_is_found_by_the_affine(flip: int) -> None:
    affine = np.diag([2.0 * flip, 3, 4, 1])
    affine[0, 3] = -5.0 * flip
    volume = MetaTensor(torch.arange(7).view(1, 7, 1, 1).expand(1, 7, 2, 2), affine=torch.from_numpy(affine))
    left, right = (data.hemisphere(volume, side) for side in ("left", "right"))
    assert left[0, :, 0, 0].tolist() == ([0, 1, 2] if flip == 1 else [3, 4, 5, 6])
    assert right[0, :, 0, 0].tolist() == ([3, 4, 5, 6] if flip == 1 else [0, 1, 2])
    assert world_x(left).max() < 0 <= world_x(right).min()


def test_a_hemisphere_of_a_rotated_image_is_refused() -> None:
    affine = torch.tensor([[0, 2.0, 0, -5], [2, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
    with pytest.raises(ValueError, match="x along the first axis"):
        data.hemisphere(MetaTensor(torch.zeros(1, 4, 4, 4), affine=affine), "left")


# How it trains.


def trained(brain: BrainMRI, steps: int = 2, seed: int = 0, loss: str = "dice") -> training.Training:
    return training.train(brain, data.held_out_volume(brain), loss, steps, seed, torch.device("cpu"))


@pytest.mark.integration
def test_the_same_seed_gives_the_same_numbers(brain: BrainMRI) -> None:
    first, again, other = trained(brain), trained(brain), trained(brain, seed=1)
    assert first.losses == again.losses
    assert first.dice == again.dice
    assert (first.prediction == again.prediction).all()
    assert first.losses != other.losses


@pytest.mark.integration
@pytest.mark.parametrize("loss", ["jaccard", "tversky", "focal-tversky", "generalized-dice"])
def test_every_loss_trains(loss: str, brain: BrainMRI, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    forward = voxloss.RegionLoss.forward

    def spied(self: voxloss.RegionLoss, input: Tensor, target: Tensor) -> Tensor:
        used.append(type(self).__name__)
        return forward(self, input, target)

    monkeypatch.setattr(voxloss.RegionLoss, "forward", spied)
    losses = trained(brain, 6, loss=loss).losses
    assert used == [loss.title().replace("-", "") + "Loss"] * 6
    assert losses[-1] < losses[0]


# How it ends.


def interrupt_at(step: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGINT to this process, `times` times, while the loss of that step is computed."""
    forward = voxloss.DiceLoss.forward
    calls: list[int] = []

    def forward_and_interrupt(self: voxloss.DiceLoss, input: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return forward(self, input, target)

    monkeypatch.setattr(voxloss.DiceLoss, "forward", forward_and_interrupt)


@pytest.mark.integration
@pytest.mark.usefixtures("brain", "quick_checks")
def test_an_interrupted_run_reports_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = signal.getsignal(signal.SIGINT)
    interrupt_at(2, 1, monkeypatch)
    run = run_demo(tmp_path, 50)
    assert run.code == 130
    assert "Interrupted at step 2 of 50" in run.page
    assert run.numbers["training"]["interrupted"] is True
    assert len(run.numbers["training"]["loss"]) == run.numbers["training"]["steps_done"] == 2
    assert list(run.numbers["training"]["dice"]) == ["2"]
    assert (run.numbers["checks"]["count"], run.numbers["checks"]["complete"]) == (0, False)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.usefixtures("brain", "quick_checks")
def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = signal.getsignal(signal.SIGINT)
    interrupt_at(2, 2, monkeypatch)
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--steps", "50", "--device", "cpu", "--out", str(tmp_path)])
    assert exit.value.code == 130
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.integration
@pytest.mark.usefixtures("brain")
def test_ctrl_c_during_the_checks_loses_neither_the_training_nor_the_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*_: object) -> Iterator[ValueCheck]:
        yield next(check_losses([on_phantoms(all_phantoms()[:1])]))
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_check", check)
    run = run_demo(tmp_path, 1)
    assert run.code == 130
    assert run.numbers["training"]["steps_done"] == 1
    assert (run.numbers["checks"]["count"], run.numbers["checks"]["complete"]) == (1, False)
    assert "The checks were interrupted: 1 of them were made" in run.page


@pytest.mark.integration
@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to one process")
def test_a_real_ctrl_c(brain: BrainMRI, tmp_path: Path) -> None:
    """In a process of its own, which reports when it trains."""
    code = f"""
import voxloss
from voxloss_app import demo
from voxloss_app.demo.checks import check_losses, on_phantoms
from voxloss_app.__main__ import main
forward = voxloss.DiceLoss.forward
def said(*arguments):
    print("training", flush=True)
    return forward(*arguments)
voxloss.DiceLoss.forward = said
demo._check = lambda *_: check_losses([on_phantoms()])
main(["demo", "--steps", "1000", "--device", "cpu", "--out", {str(tmp_path)!r}])
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while "training" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    run = Run(process.returncode, tmp_path)
    assert run.code == 130, errors
    assert "Traceback" not in errors
    assert re.search(r"Interrupted at step \d+ of 1000", run.page)


@pytest.mark.integration
@pytest.mark.usefixtures("brain", "quick_checks")
def test_a_failed_check_is_shown_and_fails_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    per_class = voxloss.JaccardLoss.per_class

    def halved(self: voxloss.JaccardLoss, statistics: voxloss.RegionStatistics) -> Tensor:
        factor = 2 if type(self) is voxloss.JaccardLoss else 1
        return per_class(self, statistics._replace(intersection=statistics.intersection / factor))

    monkeypatch.setattr(voxloss.JaccardLoss, "per_class", halved)
    run = run_demo(tmp_path, 1)
    assert run.code == 1
    failed = run.numbers["checks"]["failed"]
    assert failed > 0
    assert {row["loss"] for row in run.numbers["checks"]["losses"] if row["failed"]} == {"JaccardLoss"}
    count = run.numbers["checks"]["count"]
    assert f'<b class="bad">{count - failed} / {count}</b>' in run.page
    assert re.search(r">JaccardLoss</th>.*?>\d+ failed<", run.page)
    assert re.search(r"JaccardLoss\s+float32\s+\d+\s+\d+ failed", capsys.readouterr().out)


def test_records_without_a_value_are_written_as_json() -> None:
    def check(status: Status, worst: Finding | None, reason: str = "") -> ValueCheck:
        record = Record(ACCURACY.id, ACCURACY.name, status, reason, worst=worst)
        return ValueCheck("DiceLoss", "softmax", record, "ramp", "float32")

    good = check(Status.holds, close("loss", 0.5, 0.5, 1e-6))
    nan = check(Status.broken, close("loss", float("nan"), 0.5, 1e-6), "why")
    for bad in (nan, check(Status.broken, None, "why")):
        [row] = report.worst_by_loss([good, bad, good])
        assert (row["count"], row["failed"]) == (3, 1)
        assert row["worst"]["error"] is None
        assert row["worst"]["note"] == "why"
        json.dumps(row, allow_nan=False)


@pytest.mark.integration
@pytest.mark.usefixtures("brain", "quick_checks")
def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old report stays as it was if a new one cannot be finished."""
    old = tmp_path / "report.html"
    old.write_text("old")
    replace: Callable[..., None] = os.replace

    def full_disk(source: Path, target: Path) -> None:
        if Path(target).name == "report.html":
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    assert run_demo(tmp_path, 1).code == 2
    assert old.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} <= {"report.html", "report.png", "metrics.json"}


# The pictures.


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_slices_are_drawn_in_mm_and_the_right_way_up(theme: Theme) -> None:
    """A head of 6 × 5 × 4 voxels of 1 × 2 × 3 mm, marked at one place, within a ground of nothing."""
    image = np.zeros((10, 5, 4), np.float32)
    image[2:8] = 1
    image[7, 2, 3] = 2
    reference = np.ones((3, 5, 4), np.uint8)  # of the voxels from 7 on
    prediction = reference.copy()
    prediction[0, 2, 3] = 2
    affine = np.diag([1.0, 2, 3, 1])
    affine[:3, 3] = 10, -4, 0
    figure = Figure()
    figures._slices(figure, figures.Segmentation(image, reference, prediction, affine), theme)
    rows = [figure.axes[4 * row : 4 * row + 4] for row in range(3)]
    assert [axes.get_title() for axes in rows[0]] == ["T1", "ground truth", "prediction", "errors"]
    assert [row[0].get_ylabel() for row in rows] == [
        "axial, z = +6 mm",
        "coronal, y = +0 mm",
        "sagittal, x = +18 mm",
    ]
    coronal = rows[1]
    [drawn] = coronal[0].get_images()
    assert tuple(drawn.get_extent()) == (9.5, 19.5, -1.5, 10.5)
    assert drawn.origin == "lower"
    shown: NDArray[Any] = np.ma.filled(np.ma.asarray(drawn.get_array()), np.nan)
    assert shown[3, 7] == 2, "superior is up, right is to the right"
    assert np.isnan(shown[:, 0]).all(), "nothing is drawn outside of the head"
    assert coronal[0].get_aspect() == 1.0
    letters = {text.get_text(): text.get_position() for text in coronal[0].texts}
    assert letters["R"][0] > letters["L"][0]
    assert letters["S"][1] > letters["I"][1]
    truth, found, wrong = (np.asarray(axes.get_images()[1].get_array()) for axes in coronal[1:])
    assert not truth[:, :7].any(), "the part that was trained on has no labels"
    assert truth[3, 7].tolist() != found[3, 7].tolist()
    assert np.argwhere(wrong[..., 3]).tolist() == [[3, 7]]
    widths = [float(np.ptp(axes.get_xlim())) for row in rows for axes in row]
    heights = [float(np.ptp(axes.get_ylim())) for row in rows for axes in row]
    assert [*widths, *heights] == pytest.approx([13.2] * 24), (
        "one size for all, a little more than the longest side"
    )
