"""Training from a folder of scans: what is decided, what comes out, and that a killed run loses nothing."""

from __future__ import annotations

import csv
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import Dataset, MetaTensor
from monai.transforms import Compose
from scipy.ndimage import binary_dilation, binary_erosion

from voxloss_app.__main__ import main
from voxloss_app.names import OF_LABELS
from voxloss_app.train import Plan, TrainRequest, make_plan, predict_and_write, train_and_score
from voxloss_app.train.checkpoint import Checkpoint
from voxloss_app.train.loop import Training, validation_dice
from voxloss_app.train.network import Steps, loss_of
from voxloss_app.train.prediction import class_of_regions, predicted_classes, write_prediction
from voxloss_app.train.volumes import IGNORED, batches, image_transforms, item, labelled, training_patches
from voxloss_data.ct import write_ct_set
from voxloss_data.files import save_nifti
from voxloss_data.training_sets import Scan, training_set

CPU = torch.device("cpu")
EPOCHS = 4


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ct_set(
        tmp_path_factory.mktemp("ct"), cases=5, test_cases=1, shape=(40, 36, 24), spacing=(2, 2, 3)
    )


def request_of(ct: Path, out: Path, **changes: Any) -> TrainRequest:
    small = TrainRequest(
        data=ct, out=out, width=4, patch=(16, 16, 24), epochs=EPOCHS, patches=2, validate_every=2, device="cpu"
    )
    return replace(small, **changes)


@pytest.fixture(scope="module")
def unbroken(ct: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    assert train_and_score(request_of(ct, out, learning_rate=1e-2)) == 0
    return out


def curves(run: Path) -> list[dict[str, str]]:
    return [*csv.DictReader((run / "curves.csv").read_text().splitlines())]


def array(path: Path) -> Any:
    image: Any = nib.load(path)
    return np.asanyarray(image.dataobj)


def test_it_learns(unbroken: Path) -> None:
    losses = [float(row["loss"]) for row in curves(unbroken)]
    assert len(losses) == EPOCHS
    assert losses[-1] < losses[0] - 0.2
    dice = [row["dice organ"] for row in curves(unbroken)]
    assert [bool(text) for text in dice] == [False, True, False, True]
    assert float(dice[-1]) > 0.1


def test_the_curves_show_dice_of_the_scans_that_are_not_trained_on(ct: Path, unbroken: Path) -> None:
    plan = Plan.load(unbroken)
    trained = Training(plan, unbroken, CPU)

    def found(scans: Sequence[Scan]) -> list[float | None]:
        volumes: Any = Dataset([item(scan) for scan in scans], Compose(labelled(plan)))
        return validation_dice(trained.network, volumes, plan, CPU)

    training, validation = plan.scans(training_set(ct))
    assert trained.epochs[-1].dice == pytest.approx(found(validation))
    assert trained.epochs[-1].dice != pytest.approx(found(training))


def test_predictions_lie_on_the_images_grid_and_are_scored(ct: Path, unbroken: Path) -> None:
    plan = Plan.load(unbroken)
    (name,) = plan.validation
    predicted: Any = nib.load(unbroken / "predictions" / f"{name}.nii.gz")
    image: Any = nib.load(ct / "imagesTr" / f"{name}.nii.gz")
    assert predicted.shape == image.shape
    assert np.array_equal(predicted.affine, image.affine)
    labels = array(unbroken / "predictions" / f"{name}.nii.gz")
    assert labels.dtype == np.uint8
    wanted = array(ct / "labelsTr" / f"{name}.nii.gz")
    rows = [*csv.DictReader((unbroken / "scores.csv").read_text().splitlines())]
    assert [(row["case"], row["label"]) for row in rows] == [(name, "1"), (name, "2")]
    assert int(rows[0]["tp"]) == int(((labels == 1) & (wanted == 1)).sum())


def test_regions_are_trained_predicted_and_scored(ct: Path, tmp_path: Path) -> None:
    regions = {"whole": [1, 2], "lesion": [2]}
    out = tmp_path / "run"
    assert train_and_score(request_of(ct, out, learning_rate=1e-2, regions=regions)) == 0
    plan = Plan.load(out)
    assert (plan.regions, plan.channel_names, plan.classes_of_regions) == (regions, [*regions], [[1, 2], [2]])
    losses = [float(row["loss"]) for row in curves(out)]
    assert losses[-1] < losses[0] - 0.2
    assert float(curves(out)[-1]["dice whole"]) > 0.1
    (name,) = plan.validation
    labels, wanted = (array(folder / f"{name}.nii.gz") for folder in (out / "predictions", ct / "labelsTr"))
    assert {*np.unique(labels)} <= {0, 1, 2}
    rows = [*csv.DictReader((out / "scores.csv").read_text().splitlines())]
    assert [row["label"] for row in rows] == ["whole", "lesion"]
    assert int(rows[0]["tp"]) == int(((labels > 0) & (wanted > 0)).sum())


def test_the_label_of_a_choice_of_regions(ct: Path, tmp_path: Path) -> None:
    plan = make_plan(request_of(ct, tmp_path, regions={"a": [1, 2], "b": [2]}))
    assert [class_of_regions(plan, bits) for bits in range(4)] == [0, 1, 2, 2]
    # 3 and 4 are in no region that 1 and 2 are in.
    plan = replace(plan, labels=[0, 1, 2, 3, 4], regions={"a": [1, 2], "b": [2], "c": [3, 4], "d": [4]})
    assert [class_of_regions(plan, bits) for bits in (0b0001, 0b0010, 0b0101, 0b1000, 0b1100)] == [1, 2, 3, 4, 4]


def test_a_label_in_no_region_is_background(ct: Path, tmp_path: Path) -> None:
    """Also one above all that are in one."""
    plan = make_plan(request_of(ct, tmp_path, regions={"organ": [1]}))
    assert plan.labels == [0, 1, 2]
    scan = training_set(ct).scans[0]
    label = Compose(labelled(plan))(item(scan))["label"]
    assert {*np.unique(label)} == {0, 1}
    loss_of(plan)(torch.zeros(1, 1, *label.shape[1:]), label[None].as_tensor())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"regions": {"all": [0, 1]}},
            r"--regions: expected lists of labels from 1 by name, as 0 is the background",
        ),
        (
            {"regions": {"whole": [1, 2]}, "ignore": 2},
            r"--regions: expected labels that are not ignored, received 2, as --ignore",
        ),
        (
            {"regions": {"a": [1]}, "loss_kwargs": {"regions": [[1]]}},
            r"--loss-kwargs: expected none of .*, received regions",
        ),
        (
            {"regions": {"a": [1]}, "loss_kwargs": {"include_background": False}},
            r"--loss-kwargs: include_background",
        ),
    ],
)
def test_regions_that_cannot_be(ct: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        loss_of(make_plan(request_of(ct, tmp_path, **changes)))


@pytest.mark.integration
def test_a_killed_run_goes_on_and_ends_the_same(ct: Path, unbroken: Path, tmp_path: Path) -> None:
    """Killed as the operating system kills: nothing can be tidied up."""
    out = tmp_path / "killed"
    code = (
        "import sys; from test_train import request_of, train_and_score; from pathlib import Path\n"
        "train_and_score(request_of(Path(sys.argv[1]), Path(sys.argv[2]), learning_rate=1e-2))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", code, str(ct), str(out)], env=environment)
    try:
        deadline = time.monotonic() + 240
        while not (out / "curves.csv").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    state = Checkpoint.load(out, CPU)
    assert state is not None
    assert len(state.epochs) >= 1
    assert train_and_score(request_of(ct, out, learning_rate=1e-2)) == 0
    assert curves(out) == curves(unbroken)
    ended, expected = Checkpoint.load(out, CPU), Checkpoint.load(unbroken, CPU)
    assert ended is not None
    assert expected is not None
    for name, tensor in expected.network.items():
        assert torch.equal(ended.network[name], tensor), name
    (name,) = Plan.load(out).validation
    files = [run / "predictions" / f"{name}.nii.gz" for run in (out, unbroken)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_other_settings_do_not_go_on_with_a_run(ct: Path, unbroken: Path) -> None:
    with pytest.raises(ValueError, match=r"learning_rate was 0.01, is 0.001\).*--fresh"):
        train_and_score(request_of(ct, unbroken))


def test_fresh_starts_over_and_touches_no_folder_that_is_not_a_run(ct: Path, tmp_path: Path) -> None:
    mine = tmp_path / "predictions" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("kept")
    request = request_of(ct, tmp_path, epochs=1, patches=1, validation=0, fresh=True)
    assert train_and_score(request) == 0
    assert mine.exists()
    first = Checkpoint.load(tmp_path, CPU)
    with pytest.raises(ValueError, match="--loss-kwargs"):
        train_and_score(replace(request, loss_kwargs={"gama": 2}))
    assert Checkpoint.load(tmp_path, CPU) is not None  # what cannot start takes nothing away
    assert train_and_score(replace(request, seed=1)) == 0
    second = Checkpoint.load(tmp_path, CPU)
    assert first is not None
    assert second is not None
    assert [e.loss for e in first.epochs] != [e.loss for e in second.epochs]


def test_ctrl_c_says_where_to_go_on(
    ct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = Checkpoint.save

    def interrupted(self: Checkpoint, folder: Path) -> None:
        saved(self, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", interrupted)
    assert train_and_score(request_of(ct, tmp_path, patches=1)) == 130
    assert "the last whole epoch is kept" in capsys.readouterr().out
    state = Checkpoint.load(tmp_path, CPU)
    assert state is not None
    assert len(state.epochs) == 1


def test_a_damaged_checkpoint_is_named(ct: Path, tmp_path: Path) -> None:
    request = request_of(ct, tmp_path, validation=0)
    make_plan(request).save(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: expected a checkpoint.*--fresh"):
        train_and_score(request)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"network": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="expected a checkpoint"):
        Checkpoint.load(tmp_path, CPU)
    assert not (tmp_path / "ran").exists()


def test_predicting_further_images(
    ct: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (name,) = Plan.load(unbroken).validation
    image = ct / "imagesTr" / f"{name}.nii.gz"
    assert predict_and_write(unbroken, [image, ct / "imagesTs"], tmp_path, "cpu", False) == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.nii.gz", "ct_005.nii.gz"}
    again = tmp_path / f"{name}.nii.gz"
    content = again.read_bytes()
    assert content == (unbroken / "predictions" / f"{name}.nii.gz").read_bytes()
    written = again.stat().st_mtime_ns
    assert predict_and_write(unbroken, [image], tmp_path, "cpu", False) == 0
    assert "1 of 1 were there already" in capsys.readouterr().out
    assert again.stat().st_mtime_ns == written
    assert predict_and_write(unbroken, [image], tmp_path, "cpu", True) == 0
    assert again.stat().st_mtime_ns > written
    of_another = nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4))  # type: ignore[no-untyped-call]
    of_another.header["descrip"] = b"voxloss prediction by network 0123456789abcdef"
    of_another.to_filename(again)
    assert predict_and_write(unbroken, [image], tmp_path, "cpu", False) == 0
    assert again.read_bytes() == content, "what another network has predicted is replaced"
    assert "already" not in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(ValueError, match="expected a folder that `voxloss train` has written"):
        predict_and_write(tmp_path, [image], tmp_path / "out", "cpu", False)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("content", [b"mine", b""])
def test_predictions_do_not_replace_label_maps_of_others(
    content: bytes, fresh: bool, ct: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor are those taken for finished predictions; the other images are predicted."""
    label_map, mine = ct / "labelsTr" / "ct_000.nii.gz", tmp_path / "ct_000.nii.gz"
    mine.write_bytes(content or label_map.read_bytes())
    before = mine.read_bytes()
    images = [ct / "imagesTr" / f"ct_00{i}.nii.gz" for i in (0, 1)]
    assert predict_and_write(unbroken, images, tmp_path, "cpu", fresh) == 2
    assert f"{mine}: expected a prediction, received another file" in capsys.readouterr().err
    assert mine.read_bytes() == before
    assert (tmp_path / "ct_001.nii.gz").exists()


@pytest.mark.parametrize("fresh", [False, True])
def test_predictions_do_not_replace_the_images(fresh: bool, ct: Path, unbroken: Path, tmp_path: Path) -> None:
    """Nor are images taken for finished predictions."""
    shutil.copytree(ct / "imagesTs", tmp_path / "scans")
    before = {path: path.read_bytes() for path in (tmp_path / "scans").iterdir()}
    (tmp_path / "link").symlink_to("scans")
    for out in ("scans", "link"):
        with pytest.raises(ValueError, match="--out: expected another folder than that of the images, received "):
            predict_and_write(unbroken, [tmp_path / "scans"], tmp_path / out, "cpu", fresh)
    assert {path: path.read_bytes() for path in (tmp_path / "scans").iterdir()} == before


class LargestInput(torch.nn.Module):
    """Its likeliest class is 1 where the image is bright."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.5 - image, image - 0.5], 1)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAL", "PIR"])
def test_whatever_the_orientation_and_spacing_a_voxel_is_predicted_where_it_is(axes: str, tmp_path: Path) -> None:
    """Resampled and brought back, a threshold is what it is on the file's own grid, but for borders."""
    image = np.full((24, 20, 16), -1000, np.int16)
    image[4:12, 10:18, 2:8] = 100
    orientation: Any = nib.orientations.axcodes2ornt(tuple(axes))  # type: ignore[no-untyped-call]
    affine = np.zeros((4, 4))
    for axis, (world, flip) in enumerate(orientation):
        affine[int(world), axis] = flip * (1.5, 2.0, 3.0)[axis]
    affine[:, 3] = (10, -20, 30, 1)
    save_nifti(tmp_path / "image.nii.gz", image, affine)
    save_nifti(tmp_path / "image_label.nii.gz", (image > 0).astype(np.uint8), affine)
    request = TrainRequest(tmp_path, tmp_path / "out", spacing=(1.0, 1.0, 1.0), patch=(32, 32, 32), validation=0)
    plan = make_plan(request)
    seen: Any = image_transforms(plan)({"image": str(tmp_path / "image.nii.gz")})["image"]
    assert seen.affine[:3, :3].numpy() == pytest.approx(np.eye(3))
    predicted = predicted_classes(LargestInput(), [tmp_path / "image.nii.gz"], plan, CPU)
    assert predicted.shape == image.shape
    box = image > 0
    assert (predicted[binary_erosion(box)] == 1).all()
    assert (predicted[~binary_dilation(box)] == 0).all()


def two_scans(folder: Path, labels: list[int], image: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name in "ab":
        values = np.zeros((16, 16, 16), np.int16)
        values[2:14:2] = np.resize(labels, (6, 16, 16))
        save_nifti(folder / f"{name}_label.nii.gz", values, np.eye(4))
        save_nifti(folder / f"{name}.nii.gz", values * 10 if image is None else image, np.eye(4))
    return folder


def test_labels_with_gaps_are_classes_and_come_back_as_labels(tmp_path: Path) -> None:
    data = two_scans(tmp_path / "data", [3, 117, 300])
    request = TrainRequest(
        data, tmp_path / "out", patch=(16, 16, 16), width=2, epochs=1, patches=1, validation=0.5
    )
    plan = make_plan(replace(request, spacing=(1.0, 1.0, 1.0)))
    assert plan.labels == [0, 3, 117, 300]

    class Answer(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.zeros_like(image)] * 3 + [torch.ones_like(image)], 1)

    write_prediction(Answer(), [data / "a.nii.gz"], tmp_path / "p.nii.gz", plan, CPU, "an answer")
    found = array(tmp_path / "p.nii.gz")
    assert found.dtype == np.uint16
    assert (found == 300).all()


def test_ignored_voxels_are_no_class_and_teach_nothing(tmp_path: Path) -> None:
    data = two_scans(tmp_path / "data", [1, 1, 9])
    plan = make_plan(TrainRequest(data, tmp_path, ignore=9, patch=(32, 16, 16)))
    assert (plan.labels, plan.ignored) == ([0, 1], 9)
    patches = training_patches(plan.scans(training_set(data))[0], plan, 1.0)
    (batch,) = batches(patches, replace(plan, batch=len(patches)))
    label = batch["label"]
    assert set(label.unique().tolist()) == {IGNORED, 0.0, 1.0}
    logits = torch.zeros(len(label), 2, *label.shape[2:], requires_grad=True)
    loss_of(plan)(logits, label).backward()
    assert logits.grad is not None
    outside = (label == IGNORED).expand_as(logits)
    assert not logits.grad[outside].any()
    assert logits.grad[~outside].any()


@pytest.mark.parametrize(("darkest", "modality", "window"), [(-1000, "ct", [-175.0, 250.0]), (0, "mr", None)])
def test_the_modality_follows_from_the_darkest_voxel(
    tmp_path: Path, darkest: int, modality: str, window: list[float] | None
) -> None:
    image = np.linspace(darkest, 1000, 16**3).reshape(16, 16, 16).astype(np.float32)
    plan = make_plan(TrainRequest(two_scans(tmp_path / "data", [1], image), tmp_path, patch=(16, 16, 32)))
    assert (plan.modality, plan.window) == (modality, window)


def test_the_grid_follows_from_the_scans(ct: Path, tmp_path: Path) -> None:
    plan = make_plan(TrainRequest(ct, tmp_path))
    assert plan.spacing == pytest.approx([2, 2, 3])
    assert plan.patch == [32, 32, 16]
    assert plan.class_names == ["background", "organ", "lesion"]
    assert len(plan.training) == 4
    assert len(plan.validation) == 1
    assert not {*plan.training} & {*plan.validation}
    assert make_plan(TrainRequest(ct, tmp_path)) == plan
    assert make_plan(TrainRequest(ct, tmp_path, seed=3)).validation != plan.validation


def test_an_image_on_another_grid_than_its_labels_is_named(ct: Path, tmp_path: Path) -> None:
    data = two_scans(tmp_path / "data", [1])
    save_nifti(data / "b.nii.gz", np.zeros((16, 16, 16), np.int16), np.diag([2, 1, 1, 1.0]))
    with pytest.raises(ValueError, match=r"b\.nii\.gz: expected the affine .*, received .*b_label\.nii\.gz has"):
        make_plan(TrainRequest(data, tmp_path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch": (20, 16, 16)}, "--patch: expected multiples of 8, like 16 16 16, received 20 16 16"),
        ({"patch": (8, 8, 8)}, "at least one of them 16 or more, received 8 8 8"),
        (
            {"validation": 0.9},
            "--validation: expected a fraction that leaves scans for training, received 2 of 2",
        ),
        ({"loss_kwargs": {"gama": 2}, "patch": (16, 16, 16)}, "--loss-kwargs: .*gama"),
        ({"loss_kwargs": {"weight": [1, 2, 3]}, "patch": (16, 16, 16)}, "--loss-kwargs: .*weight"),
    ],
)
def test_what_cannot_be_says_which_option(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    data = two_scans(tmp_path / "data", [1])
    with pytest.raises(ValueError, match=said):
        train_and_score(TrainRequest(data, tmp_path / "out", **{"validation": 0.5, "device": "cpu", **changes}))
    assert not (tmp_path / "out").exists()  # nothing that the corrected command would have to go on with


def test_negative_labels_are_asked_about(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--ignore -1"):
        make_plan(TrainRequest(two_scans(tmp_path / "data", [-1, 1]), tmp_path))


@pytest.mark.integration
def test_mixed_precision_trains(ct: Path, tmp_path: Path) -> None:
    assert train_and_score(request_of(ct, tmp_path, precision="bfloat16", epochs=2, validation=0)) == 0
    losses = [float(row["loss"]) for row in curves(tmp_path)]
    assert losses[-1] < losses[0]


class VoxelByVoxel(torch.nn.Linear):
    """A network without a convolution: torch's in bfloat16 on a CPU has a NaN in a gradient now and then."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def test_a_gradient_that_is_not_finite_is_left_out(ct: Path, tmp_path: Path) -> None:
    """In mixed precision. Clipping by the norm would spread it to all weights."""
    plan = make_plan(request_of(ct, tmp_path, precision="bfloat16"))
    network = VoxelByVoxel(plan.channels, len(plan.channel_names))
    steps = Steps(plan, network, loss_of(plan), CPU, total=2)
    weight, *others = network.parameters()
    hook = weight.register_hook(lambda gradient: gradient * math.nan)  # type: ignore[no-untyped-call]
    before = [parameter.detach().clone() for parameter in (weight, *others)]
    image, label = torch.randn(1, plan.channels, *plan.patch), torch.zeros(1, 1, *plan.patch)
    steps.take(image, label, 0)
    assert all(map(torch.equal, before, (weight, *others)))
    hook.remove()
    steps.take(image, label, 1)
    assert not torch.equal(before[0], weight)
    assert weight.isfinite().all()


def test_tensorboard_has_the_numbers_of_the_curves(unbroken: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(unbroken / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    rows = curves(unbroken)
    assert [step for step, _ in found] == [*range(1, EPOCHS + 1)]
    assert [value for _, value in found] == pytest.approx([float(row["loss"]) for row in rows])


def test_a_loss_that_is_no_number_ends_the_run_and_not_the_checkpoint(ct: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a finite loss, received nan. Try a lower --learning-rate"):
        train_and_score(request_of(ct, tmp_path, learning_rate=1e30, validation=0))
    state = Checkpoint.load(tmp_path, CPU)
    assert state is None or all(math.isfinite(epoch.loss) for epoch in state.epochs)


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([*map(str, arguments)])
    code = left.value.code
    assert isinstance(code, int)
    return code


def test_the_commands_train_and_predict(
    ct: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the options of `request_of`, the command line makes the plan that Python makes."""
    options = ["--width", 4, "--patch", 16, 16, 24, "--epochs", EPOCHS, "--patches", 2, "--validate-every", 2]
    given = [*options, "--learning-rate", 0.01, "--device", "cpu"]
    assert command("train", "--data", ct, "--loss", "DiceCE", "--out", unbroken, *given) == 0
    shown = capsys.readouterr().out
    assert f"all {EPOCHS} epochs are done" in shown
    assert "DiceCELoss" in shown
    assert command("predict", unbroken, ct / "imagesTs", "--out", tmp_path / "found", "--quiet") == 0
    assert (tmp_path / "found" / "ct_005.nii.gz").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "--data"),
        (
            ["train", "--data", "nowhere"],
            "expected a folder of images and label maps, received nothing at nowhere",
        ),
        (["train", "--data", "nowhere", "--loss", "dise"], "received 'dise'"),
        (["train", "--data", "nowhere", "--loss-kwargs", "{"], "--loss-kwargs"),
        (["train", "--data", "nowhere", "--precision", "int8"], "int8"),
        (["predict", "nowhere", "image.nii.gz"], "expected a folder that `voxloss train` has written"),
    ],
)
def test_wrong_command_lines_end_with_2_and_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", OF_LABELS)
def test_every_loss_trains_on_logits_and_a_label_map_with_ignored_voxels(name: str, tmp_path: Path) -> None:
    data = two_scans(tmp_path / "data", [1, 2, 9])
    plan = make_plan(TrainRequest(data, tmp_path, loss=name, ignore=9, patch=(32, 16, 16)))
    logits = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    label = torch.arange(64.0).reshape(1, 1, 4, 4, 4) % 4 - 1
    loss_of(plan)(logits, label).backward()
    assert logits.grad is not None
    taught = logits.grad.abs().sum(1, keepdim=True) > 0
    if name == "top-k":  # a tenth of the 48 voxels that count
        assert taught.sum() == 4
        assert not taught[label == IGNORED].any()
        return
    assert torch.equal(taught, label != IGNORED)


def test_validation_does_not_count_ignored_voxels(tmp_path: Path) -> None:
    plan = make_plan(TrainRequest(two_scans(tmp_path / "data", [1, 9]), tmp_path, ignore=9, patch=(16, 16, 32)))
    image = torch.zeros(1, 16, 16, 16)
    image[:, :8] = 1
    label = image.clone()
    label[:, 4:12] = IGNORED  # half of what is right, and all of what would be wrong
    wanted = MetaTensor(torch.where(label == IGNORED, label, image))
    volumes: Any = Dataset([{"image": MetaTensor(image), "label": wanted}])
    assert validation_dice(LargestInput(), volumes, plan, CPU) == [1.0, 1.0]
    wanted[:, 0] = 0
    background, foreground = validation_dice(LargestInput(), volumes, plan, CPU)
    assert foreground == pytest.approx(2 * 3 / (4 + 3))
    assert background == pytest.approx(2 * 4 / (4 + 5))
