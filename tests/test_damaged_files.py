"""Every command names a damaged file in one line, be it of a scan or of a run, and waits for nobody."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from test_train import command, two_scans
from voxloss_app.train import Plan, TrainRequest, make_plan, train_and_score
from voxloss_app.train.checkpoint import Checkpoint, Epoch
from voxloss_app.train.lock import locked
from voxloss_app.train.loop import Training
from voxloss_app.train.prediction import predicted_classes
from voxloss_app.train.volumes import batches, training_patches
from voxloss_data import write_ct_set
from voxloss_data.files import save_nifti
from voxloss_data.training_sets import training_set

# A label map, and an image as well: 0, 1 and 2.
GOOD = np.arange(16**3).reshape(16, 16, 16).astype(np.uint8) % 3
CPU = torch.device("cpu")


def save(path: Path, data: Any, affine: Any = None) -> None:
    path.unlink(missing_ok=True)
    nib.Nifti1Image(data, np.eye(4) if affine is None else affine).to_filename(path)  # type: ignore[no-untyped-call]


def content() -> bytearray:
    return bytearray(nib.Nifti1Image(GOOD, np.eye(4)).to_bytes())  # type: ignore[no-untyped-call]


def with_value(value: float) -> Any:
    data = GOOD.astype(np.float32)
    data[3, 4, 5] = value
    return data


def with_shape(*shape: int) -> bytearray:
    """Another shape in the header."""
    changed = content()
    changed[40:56] = np.array([len(shape), *shape, *[1] * (7 - len(shape))], "<i2").tobytes()
    return changed


def with_affine(row: float) -> bytearray:
    """The third row of the affine is all this."""
    changed = content()
    changed[312:328] = np.full(4, row, "<f4").tobytes()
    return changed


def scaled(slope: float) -> bytearray:
    """Whole numbers that are to be multiplied."""
    changed = content()
    changed[112:116] = np.array([slope], "<f4").tobytes()
    return changed


def flipped(path: Path, level: int, at: int) -> None:
    stored = bytearray(gzip.compress(content(), level))
    stored[at] ^= 1
    path.write_bytes(stored)


def other_format(path: Path) -> None:
    data = gzip.compress(nib.MGHImage(GOOD, np.eye(4, dtype=np.float32)).to_bytes())  # type: ignore[no-untyped-call]
    path.write_bytes(data)


def folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").touch()


RGB = np.zeros((16, 16, 16), [("R", "u1"), ("G", "u1"), ("B", "u1")])
# What makes the file, and what the message has of it.
Maker = Callable[[Path], object]
DAMAGED: dict[str, tuple[str, Maker, str]] = {
    "a flipped bit, in the checksum alone": (
        ".nii.gz",
        lambda p: flipped(p, 0, -20),
        "BadGzipFile: CRC",
    ),
    "a flipped bit in what is compressed": (".nii.gz", lambda p: flipped(p, 9, 100), "whole NIfTI file"),
    "truncated": (".nii.gz", lambda p: p.write_bytes(gzip.compress(content())[:-30]), "EOFError"),
    "truncated, not compressed": (
        ".nii",
        lambda p: p.write_bytes(content()[:-1]),
        "4448 bytes, as .* received 4447",
    ),
    "truncated before it was compressed": (
        ".nii.gz",
        lambda p: p.write_bytes(gzip.compress(content()[:-1])),
        "4448 bytes, as .* received 4447",
    ),
    "a part of the header": (".nii", lambda p: p.write_bytes(content()[:200]), "whole NIfTI file"),
    "empty": (".nii", lambda p: p.touch(), "whole NIfTI file"),
    "empty, compressed": (".nii.gz", lambda p: p.touch(), "whole NIfTI file"),
    "text": (".nii", lambda p: p.write_text("no image"), "whole NIfTI file"),
    "text, compressed": (".nii.gz", lambda p: p.write_text("no image"), "BadGzipFile"),
    "another format": (".nii.gz", other_format, "expected a "),
    "compressed, called .nii": (
        ".nii",
        lambda p: p.write_bytes(gzip.compress(content())),
        "whole NIfTI file",
    ),
    "not compressed, called .nii.gz": (".nii.gz", lambda p: p.write_bytes(content()), "BadGzipFile"),
    "a header of 32 TB": (".nii", lambda p: p.write_bytes(with_shape(*[32767] * 3)), "of 35181150962015 bytes"),
    "a header of 32 TB, compressed": (
        ".nii.gz",
        lambda p: p.write_bytes(gzip.compress(with_shape(*[32767] * 3))),
        "of 35181150962015 bytes",
    ),
    "negative edges": (".nii", lambda p: p.write_bytes(with_shape(16, -16, 16)), "expected"),
    "no voxels": (".nii", lambda p: p.write_bytes(with_shape(16, 0, 16)), "expected voxels along each axis"),
    "2D": (".nii", lambda p: save(p, GOOD[0]), r"expected 3 dimensions.*, received 2: \(16, 16\)"),
    "5D": (".nii", lambda p: save(p, np.stack([GOOD] * 2, -1)[..., None, :]), "received 5: "),
    "complex": (".nii", lambda p: save(p, GOOD.astype(np.complex64)), "received the dtype complex64"),
    "RGB": (".nii", lambda p: save(p, RGB), "received the dtype RGB"),
    "NaN": (".nii", lambda p: save(p, with_value(np.nan)), r"nan.* at voxel \(3, 4, 5\)"),
    "infinite": (".nii.gz", lambda p: save(p, with_value(-np.inf)), r"-inf.* at voxel \(3, 4, 5\)"),
    "flat voxels": (".nii", lambda p: p.write_bytes(with_affine(0)), "voxels of some volume"),
    "voxels without a place": (".nii", lambda p: p.write_bytes(with_affine(np.nan)), "voxels of some volume"),
    "a folder": (".nii.gz", folder, ""),
    "a pipe": (".nii.gz", lambda p: os.mkfifo(p), "a pipe, a socket or a device"),
    "a link to nowhere": (".nii.gz", lambda p: p.symlink_to("nowhere"), "a broken link|received nothing at"),
}
FOR_LABELS = {
    "an axis of length 1": (".nii", lambda p: save(p, GOOD[..., None]), r"numpy\.squeeze"),
    "soft": (".nii", lambda p: save(p, with_value(0.5)), r"whole numbers, received 0\.5 at voxel \(3, 4, 5\)"),
}
FOR_IMAGES = {
    "NaN in a channel": (
        ".nii",
        lambda p: save(p, np.stack([GOOD.astype(np.float32), with_value(np.nan)], -1)),
        r"received 1 that are not, the first nan at voxel \(3, 4, 5, 1\)",
    ),
    "scaled beyond float32": (".nii", lambda p: p.write_bytes(scaled(3e38)), "finite voxels, received"),
    "too large for float32": (
        ".nii",
        lambda p: save(p, with_value(1).astype(float) * 1e39),
        "finite voxels, received",
    ),
}
ROLES = {
    "train, image": DAMAGED | FOR_IMAGES,
    "train, label": DAMAGED | FOR_LABELS,
    "predict": DAMAGED | FOR_IMAGES,
    "score": DAMAGED | FOR_LABELS,
    "verify": DAMAGED | FOR_LABELS,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `voxloss train` writes, of a network that has learnt nothing."""
    out = tmp_path_factory.mktemp("run")
    for kind in ("images", "labels"):
        (out / "data" / kind).mkdir(parents=True)
        save_nifti(out / "data" / kind / "a.nii", GOOD, np.eye(4))
    request = TrainRequest(out / "data", out, patch=(16, 16, 16), width=2, epochs=1, validation=0, modality="mr")
    plan = make_plan(request)
    plan.save(out)
    Checkpoint.of(Training(plan, out, CPU).steps, [Epoch(0.5, 0.001)]).save(out)
    return out


def arguments(role: str, folders: Path, path: Path, run: Path) -> list[object]:
    """A command that reads the file at this path, beside good ones."""
    if role.startswith("train"):
        return ["train", "--data", folders, "--out", folders / "out", "--validation", "0"]
    if role == "predict":
        return ["predict", run, path, "--out", folders / "out"]
    good = folders / "labels" / "b.nii"
    pair = [path.parent, good.parent] if path.is_dir() else [path, good]
    return ["score", *pair] if role == "score" else ["verify", "voxloss:DiceLoss", "--data", *pair]


@contextmanager
def woken(path: Path) -> Iterator[None]:
    """Whoever waits for what is written to a pipe gets the end of it after seconds, and the test fails."""

    def wake() -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    waker = threading.Timer(5, wake)
    if path.is_fifo():
        waker.start()
    yield
    waited = waker.finished.is_set()
    waker.cancel()
    assert not waited


@pytest.mark.parametrize(("role", "what"), [(role, what) for role, cases in ROLES.items() for what in cases])
def test_a_damaged_file_is_named_in_one_line(
    role: str, what: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ending, make, said = ROLES[role][what]
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        save_nifti(tmp_path / kind / "b.nii", GOOD, np.eye(4))
        if kind != ("labels" if role == "train, label" else "images"):
            save_nifti(tmp_path / kind / f"a{ending}", GOOD, np.eye(4))
    path = tmp_path / ("labels" if role == "train, label" else "images") / f"a{ending}"
    if what == "a pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("no pipes in the folders of this system")
    make(path)
    with woken(path):
        code = command(*arguments(role, tmp_path, path, run))
    error = capsys.readouterr().err
    line, *others = error.splitlines()
    assert code == 2, error
    assert line.startswith("voxloss: ")
    assert str(path) in line
    assert "expected" in line
    assert re.search(said, line), line
    summaries = ["cases could not be scored"] if role == "score" and path.is_dir() else []
    assert len(others) == len(summaries), error
    assert not [*(tmp_path / "out").glob("*.nii*")]
    assert not (tmp_path / "out" / "plan.json").exists()


def copy_of(run: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("plan.json", "checkpoint.pt"):
        shutil.copy(run / name, folder / name)
    return folder


def train(run: Path, out: Path, *more: object) -> int:
    """With the options of `run`."""
    options = ["--patch", 16, 16, 16, "--width", 2, "--validation", 0, "--modality", "mr", "--device", "cpu"]
    return command("train", "--data", run / "data", "--out", out, *options, *(more or ("--epochs", 1)))


def test_predict_goes_on_with_the_other_images(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for name in "abc":
        save_nifti(images / f"{name}.nii.gz", GOOD, np.eye(4))
    flipped(images / "b.nii.gz", 0, -20)
    assert command("predict", run, images, "--out", out) == 2
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"voxloss: {images / 'b.nii.gz'}: expected a whole NIfTI file")
    assert last == "voxloss: 1 of 3 images could not be predicted"
    assert {path.name for path in out.iterdir()} == {"a.nii.gz", "c.nii.gz"}


def test_a_single_channel_may_be_an_axis_of_its_own(run: Path, tmp_path: Path) -> None:
    for name, data in (("three", GOOD), ("four", GOOD[..., None])):
        save(tmp_path / f"{name}.nii", data)
        assert command("predict", run, tmp_path / f"{name}.nii", "--out", tmp_path / "out") == 0
    found = [(tmp_path / "out" / f"{name}.nii.gz").read_bytes() for name in ("three", "four")]
    assert found[0] == found[1]


@pytest.mark.parametrize("names", [("p.hdr", "p.img"), ("p.nii.bz2", "p.nii.bz2")])
def test_other_containers_of_nifti_are_read_and_checked(
    names: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header, data = (tmp_path / name for name in names)
    kind: Any = nib.Nifti1Pair if header != data else nib.Nifti1Image
    kind(GOOD, np.eye(4)).to_filename(header)
    save(tmp_path / "g.nii", GOOD)
    assert command("score", header, tmp_path / "g.nii") == 0
    data.write_bytes(data.read_bytes()[:-9])
    assert command("score", header, tmp_path / "g.nii") == 2
    assert f"{header}: expected a whole NIfTI file" in capsys.readouterr().err


@pytest.mark.parametrize("spacing", [1e-4, 1e8])
def test_a_spacing_that_makes_no_volume_or_too_large_a_one_is_named(
    spacing: float, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a header in metres or nanometres among others in mm."""
    data = two_scans(tmp_path / "data", [1])
    for kind in ("", "_label"):
        shutil.copy(data / f"a{kind}.nii.gz", data / f"c{kind}.nii.gz")
        save(data / f"b{kind}.nii.gz", GOOD % 2, np.diag([spacing, 1, 1, 1]))
    with pytest.raises(
        ValueError, match=r"b\.nii\.gz: expected 1 to 2147483648 voxels when resampled to 1 x 1 x 1"
    ):
        make_plan(TrainRequest(data, tmp_path))
    save(data / "b.nii.gz", GOOD, np.eye(4) * [spacing, spacing, spacing, 1])
    assert command("predict", run, data / "b.nii.gz", "--out", tmp_path / "out") == 2
    assert "b.nii.gz: expected 1 to 2147483648 voxels" in capsys.readouterr().err


def test_a_name_with_a_line_break_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a\nb 'c\udcff.nii"
    path.write_text("text")
    assert command("predict", run, path, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_channels_of_an_image_lie_on_one_grid(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = copy_of(run, tmp_path / "run")
    plan = replace(Plan.load(two), channels=2)
    plan.save(two)
    Checkpoint.of(Training(plan, tmp_path / "new", CPU).steps, [Epoch(0.5, 0.001)]).save(two)
    (tmp_path / "images").mkdir()
    for channel, data in enumerate((GOOD, GOOD[1:])):
        save_nifti(tmp_path / "images" / f"a_000{channel}.nii", data, np.eye(4))
    assert command("predict", two, tmp_path / "images", "--out", tmp_path / "out") == 2
    assert re.search(
        r"a_0001\.nii: expected \(16, 16, 16\) voxels, received \(15, 16, 16\), as .*a_0000\.nii has",
        capsys.readouterr().err,
    )


def test_held_out_scans_that_were_damaged_meanwhile_are_named_and_the_others_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = two_scans(tmp_path / "data", [1])
    for kind in ("", "_label"):
        shutil.copy(data / f"a{kind}.nii.gz", data / f"c{kind}.nii.gz")
    request = TrainRequest(
        data, tmp_path / "out", patch=(16, 16, 32), width=2, epochs=1, patches=1, validation=0.67
    )
    held_out = make_plan(request).validation
    saved = Checkpoint.save

    def damage(self: Checkpoint, folder: Path) -> None:
        saved(self, folder)
        flipped(data / f"{held_out[0]}.nii.gz", 0, -20)

    monkeypatch.setattr(Checkpoint, "save", damage)
    assert train_and_score(replace(request, device="cpu")) == 2
    first, last = capsys.readouterr().err.splitlines()
    assert f"{held_out[0]}.nii.gz: expected a whole NIfTI file" in first
    assert last == "voxloss: 1 of 2 images could not be predicted"
    rows = (tmp_path / "out" / "scores.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == [held_out[1]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_scan_that_is_damaged_after_the_plan_is_named(workers: int, tmp_path: Path) -> None:
    data = two_scans(tmp_path / "data", [1])
    plan = replace(make_plan(TrainRequest(data, tmp_path, patch=(16, 16, 32), validation=0)), workers=workers)
    patches = training_patches(plan.scans(training_set(data))[0], plan, cache=0)
    for name in "ab":
        path = data / f"{name}.nii.gz"
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"^[^\n]*data/[ab]\.nii\.gz: expected a whole NIfTI file[^\n]*$"):
        next(batches(patches, plan))


@pytest.mark.integration
def test_what_no_transform_can_bring_to_the_grid_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = two_scans(tmp_path / "data", [1])
    plan = make_plan(TrainRequest(data, tmp_path, patch=(16, 16, 32), validation=0))

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("out of memory")

    monkeypatch.setattr("monai.transforms.Spacing.__call__", fail)
    message = (
        r"b\.nii\.gz, .*b_label\.nii\.gz: expected what fits on the network's grid, received MemoryError: out of"
    )
    with pytest.raises(ValueError, match=message):
        training_patches(plan.scans(training_set(data))[0][1:], plan, cache=1)
    with pytest.raises(ValueError, match=r"b\.nii\.gz: expected what fits"):
        predicted_classes(torch.nn.Identity(), [data / "b.nii.gz"], plan, CPU)


@pytest.mark.integration
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_no_label_map(value: float, run: Path) -> None:
    """As of a network that overflows in float16."""

    class Overflow(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.full((len(image), 3, *image.shape[2:]), value)

    with pytest.raises(ValueError, match=r"a\.nii: expected finite outputs of the network"):
        predicted_classes(Overflow(), [run / "data" / "images" / "a.nii"], Plan.load(run), CPU)


def test_an_image_in_the_place_of_a_label_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = two_scans(tmp_path / "data", [1])
    save_nifti(data / "b_label.nii.gz", np.arange(16**3, dtype=np.int16).reshape(16, 16, 16), np.eye(4))
    request = TrainRequest(data, tmp_path, patch=(16, 16, 32))
    with pytest.raises(
        ValueError, match=r"b_label\.nii\.gz: expected a label map, .*received 4096.*--max-classes"
    ):
        make_plan(request)
    assert len(make_plan(replace(request, max_classes=4096)).labels) == 4096
    pair = data / "a_label.nii.gz", data / "b_label.nii.gz"
    assert command("verify", "voxloss:DiceLoss", "--data", *pair) == 2
    assert "at most 256 labels" in capsys.readouterr().err


def test_labels_that_float32_does_not_hold(tmp_path: Path) -> None:
    data = two_scans(tmp_path / "data", [1])
    save_nifti(data / "b_label.nii.gz", GOOD.astype(np.int32) * (2**24 + 1), np.eye(4))
    with pytest.raises(ValueError, match="expected labels up to 16777216, received 33554434"):
        make_plan(TrainRequest(data, tmp_path, patch=(16, 16, 32)))


@pytest.mark.parametrize(
    ("labels", "hinted"), [([1, 2, 255], True), ([255], False), ([1, 3, 255], False), ([1, 254], False)]
)
def test_255_beside_small_labels_may_be_meant_to_be_ignored(
    labels: list[int],
    hinted: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("voxloss_app.train.run._train", lambda *_: None)
    data = two_scans(tmp_path / "data", labels)
    request = TrainRequest(data, tmp_path / "out", patch=(16, 16, 32), validation=0, device="cpu")
    assert train_and_score(request) == 0
    assert ("--ignore 255" in capsys.readouterr().out) is hinted
    if hinted:
        assert train_and_score(replace(request, ignore=255, out=tmp_path / "ignored")) == 0
        assert "--ignore 255" not in capsys.readouterr().out


# The folder of a run.


def changed(run: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    change(content)
    torch.save(content, folder / "checkpoint.pt")


def first(tensors: dict[str, Any]) -> Any:
    return next(iter(tensors.values()))


def flip_in_a_weight(path: Path) -> None:
    """A bit of the largest member, which is read without its checksum."""
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda found: found.file_size)
    damaged = bytearray(path.read_bytes())
    damaged[member.header_offset + 200 + member.file_size // 2] ^= 1
    path.write_bytes(damaged)


def of_plan(run: Path, folder: Path, **others: Any) -> None:
    plan = replace(Plan.load(run), **others)
    Checkpoint.of(Training(plan, folder / "new", CPU).steps, [Epoch(0.5, 0.001)]).save(folder)


def pipe(folder: Path) -> None:
    (folder / "checkpoint.pt").unlink()
    os.mkfifo(folder / "checkpoint.pt")


CHECKPOINTS: dict[str, Callable[[Path, Path], object]] = {
    "empty": lambda run, folder: (folder / "checkpoint.pt").write_bytes(b""),
    "truncated": lambda run, folder: (folder / "checkpoint.pt").write_bytes(
        (run / "checkpoint.pt").read_bytes()[:-100]
    ),
    "a pipe": lambda run, folder: pipe(folder),
    "a tensor": lambda run, folder: torch.save(torch.zeros(1), folder / "checkpoint.pt"),
    "of another network": lambda run, folder: of_plan(run, folder, width=3),
    "an empty network": lambda run, folder: changed(run, folder, lambda c: c.update(network={})),
    "a list for a network": lambda run, folder: changed(run, folder, lambda c: c.update(network=[])),
    "no optimiser": lambda run, folder: changed(run, folder, lambda c: c.pop("optimiser")),
    "no epochs": lambda run, folder: changed(run, folder, lambda c: c.pop("epochs")),
    "text for a loss": lambda run, folder: changed(run, folder, lambda c: c["epochs"][0].update(loss="0.5")),
    "a flipped bit in a weight": lambda run, folder: flip_in_a_weight(folder / "checkpoint.pt"),
    "of another seed": lambda run, folder: of_plan(run, folder, seed=1, training=["b"], validation=["a"]),
    "NaN in a weight": lambda run, folder: changed(run, folder, lambda c: first(c["network"]).fill_(np.nan)),
}
FOR_TRAINING: dict[str, Callable[[Path, Path], object]] = {
    "an empty optimiser": lambda run, folder: changed(run, folder, lambda c: c.update(optimiser={})),
    "moments of another shape": lambda run, folder: changed(
        run,
        folder,
        lambda c: c["optimiser"].update(state={0: {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}}),
    ),
}


@pytest.mark.parametrize("what", CHECKPOINTS | FOR_TRAINING)
def test_a_damaged_checkpoint_is_one_line(
    what: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = copy_of(run, tmp_path / "run")
    (CHECKPOINTS | FOR_TRAINING)[what](run, damaged)
    codes = [train(run, damaged, "--epochs", 2)]
    if what in CHECKPOINTS:
        codes.append(command("predict", damaged, run / "data" / "images", "--out", tmp_path / "out"))
    lines = capsys.readouterr().err.splitlines()
    assert codes == [2] * len(codes), lines
    assert len(lines) == len(codes), lines
    for line in lines:
        assert line.startswith(f"voxloss: {damaged / 'checkpoint.pt'}: expected a checkpoint of `voxloss train`")
        assert line.endswith("--fresh`, or in another --out")


PLANS: dict[str, tuple[object, str]] = {
    "patch": ([0, 0, 0], "patch: expected three whole numbers from 1, received [0, 0, 0]"),
    "patch ": ([20, 16, 16], "patch: expected multiples of 8, received [20, 16, 16]"),
    "patch  ": ("16", "patch: expected three whole numbers"),
    "labels": ([], "labels: expected two whole numbers or more, from 0 up, received []"),
    "labels ": ([0, 1, 1], "labels: expected"),
    "class_names": (["background"], "class_names: expected 3 names"),
    "regions": ({"whole": [0]}, "regions: expected null, or lists of labels from 1 by name"),
    "regions ": ({"whole": [9]}, "regions: expected some of the labels, received {'whole': [9]}"),
    "channels": (0, "channels: expected a whole number from 1, received 0"),
    "spacing": ([0, 1, 1], "spacing: expected three positive numbers"),
    "spacing ": ([float("nan"), 1, 1], "spacing: expected three positive numbers"),
    "window": ([1], "window: expected two numbers"),
    "modality": ("pet", "modality: expected ct or mr, received 'pet'"),
    "depth": (0, "depth: expected a whole number from 4 to 5"),
    "width": (1.5, "width: expected a whole number from 1, received 1.5"),
    "width ": (2**62, "checkpoint.pt: expected"),
    "width  ": (True, "width: expected a whole number from 1, received True"),
    "loss": ("dise", "loss: expected the name of a loss"),
    "batch": (None, "batch: expected"),
    "precision": ("int8", "precision: expected one of"),
    "ignored": (1, "ignored: expected none of the labels, received 1"),
    "unknown": (1, "unknown"),
}


@pytest.mark.parametrize("what", PLANS)
def test_an_edited_plan_is_one_line(
    what: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited = copy_of(run, tmp_path / "run")
    plan = json.loads((edited / "plan.json").read_bytes())
    value, said = PLANS[what]
    (edited / "plan.json").write_text(json.dumps({**plan, what.strip(): value}))
    assert command("predict", edited, run / "data" / "images", "--out", tmp_path / "out") == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith(f"voxloss: {edited}")
    assert said in line
    assert "--fresh" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", "[" * 10_000, None])
def test_a_plan_that_is_none(
    content: str | None, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = copy_of(run, tmp_path / "run")
    (damaged / "plan.json").unlink()
    if content is not None:
        (damaged / "plan.json").write_text(content)
    assert command("predict", damaged, run / "data" / "images", "--out", tmp_path / "out") == 2
    assert train(run, damaged) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("plan.json" in line and str(damaged) in line for line in lines)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--spacing", 0, 1, 1], "--spacing: expected three positive numbers, received (0.0, 1.0, 1.0)"),
        (["--spacing", "nan", 1, 1], "--spacing"),
        (["--patch", 0, 0, 0], "--patch: expected three whole numbers from 1"),
        (["--patch", -16, 16, 16], "--patch"),
        (["--window", 5, 1], "--window: expected two numbers, the lower one first"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--validation", "nan"], "--validation"),
    ],
)
def test_options_that_no_training_can_have(
    options: list[object], said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("train", "--data", run / "data", "--out", tmp_path / "out", *options) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert said in line


def test_an_unfinished_network_predicts_and_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = copy_of(run, tmp_path / "run")
    replace(Plan.load(run), epochs=3).save(unfinished)
    assert command("predict", unfinished, run / "data" / "images", "--out", tmp_path / "out") == 0
    assert "the network is unfinished, after 1 of 3 epochs" in capsys.readouterr().err
    assert command("predict", run, run / "data" / "images", "--out", tmp_path / "out") == 0
    assert capsys.readouterr().err == ""


def test_weights_that_become_nan_at_the_last_step_are_not_kept(run: Path, tmp_path: Path) -> None:
    plan = replace(Plan.load(run), patches=1, batch=1)
    training = Training(plan, tmp_path, CPU)
    weight = next(training.network.parameters())
    weight.register_hook(lambda gradient: gradient * np.nan)  # type: ignore[no-untyped-call]
    scans, _ = plan.scans(training_set(run / "data"))
    with pytest.raises(ValueError, match="step 1: expected finite weights, received NaN"):
        training.run(scans, [], 1.0, lambda *_: None, lambda _: None)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.integration
def test_more_epochs_continue_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = two_scans(tmp_path / "data", [1]), tmp_path / "out"
    request = TrainRequest(data, out, patch=(16, 16, 32), width=2, epochs=1, validation=0.5, device="cpu")
    assert train_and_score(request) == 0
    (held_out,) = (out / "predictions").iterdir()
    earlier = held_out.read_bytes()
    assert train_and_score(replace(request, epochs=20)) == 0
    shown = capsys.readouterr().out
    assert "1 before, 20 now" in shown
    assert "resuming after epoch 1 of 20" in shown
    state = Checkpoint.load(out, CPU)
    assert state is not None
    rates = [epoch.learning_rate for epoch in state.epochs]
    assert len(rates) == 20
    assert rates[1] > 0.9 * request.learning_rate, "the schedule is that of the new end"
    assert held_out.read_bytes() != earlier, "another network predicts anew"
    with pytest.raises(ValueError, match=r"--epochs: expected 20 or more, .*out, received 19\. .*--fresh"):
        train_and_score(replace(request, epochs=19))
    assert Plan.load(out).epochs == 20


def test_an_interrupted_continuation_keeps_what_the_earlier_network_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = two_scans(tmp_path / "data", [1]), tmp_path / "out"
    request = TrainRequest(data, out, patch=(16, 16, 32), width=2, epochs=1, validation=0.5, device="cpu")
    assert train_and_score(request) == 0
    kept = [*(out / "predictions").iterdir(), out / "scores.csv"]
    before = [path.read_bytes() for path in kept]

    def interrupt(*given: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("voxloss_app.train.loop.training_patches", interrupt)
        assert train_and_score(replace(request, epochs=2)) == 130
    assert [path.read_bytes() for path in kept] == before
    assert train_and_score(replace(request, epochs=2)) == 0
    assert all(path.read_bytes() != old for path, old in zip(kept[:-1], before[:-1], strict=True))


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="the names of files are Unicode there")
def test_a_folder_whose_name_is_not_unicode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9sultat"))
    data = two_scans(tmp_path / "data", [1])
    options = [
        "--patch",
        "16",
        "16",
        "32",
        "--width",
        "2",
        "--epochs",
        "1",
        "--validation",
        "0.5",
        "--device",
        "cpu",
    ]
    assert command("train", "--data", data, "--out", out, *options) == 0
    assert (out / "scores.csv").exists()
    assert "no TensorBoard: it needs a folder whose name is UTF-8" in capsys.readouterr().out


def test_labels_that_the_description_does_not_name(tmp_path: Path) -> None:
    """An image in the place of a label map, or a label that was forgotten."""
    data = write_ct_set(tmp_path / "ct", cases=2, shape=(16, 16, 16))
    path = data / "labelsTr" / "ct_001.nii.gz"
    labels = np.asarray(nib.load(path).dataobj).copy()  # type: ignore[attr-defined]
    labels[0, 0, 0] = 7
    save_nifti(path, labels, nib.load(path).affine)  # type: ignore[attr-defined]
    request = TrainRequest(data, tmp_path / "out", patch=(16, 16, 32))
    expected = f"{path}: expected the labels that dataset.json names, 0, 1, 2, received 7. .* --ignore 7"
    with pytest.raises(ValueError, match=expected):
        make_plan(request)
    assert make_plan(replace(request, ignore=7)).labels == [0, 1, 2]


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "to_onehot_y", "ignore_index", "other_act"])
def test_arguments_of_a_loss_that_follow_from_the_scans(name: str, tmp_path: Path) -> None:
    data = two_scans(tmp_path / "data", [1])
    with pytest.raises(
        ValueError, match=f"--loss-kwargs: expected none of .*, which are set here, received {name}"
    ):
        make_plan(TrainRequest(data, tmp_path, loss_kwargs={name: None}))


def test_a_second_run_in_a_folder_is_refused_while_the_first_lives(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("voxloss_app.train.lock.WAIT", 0)
    for out in (copy_of(run, tmp_path / "run"), tmp_path / "new"):
        out.mkdir(exist_ok=True)
        with locked(out):
            for fresh in ([], ["--fresh"]):
                assert train(run, out, "--epochs", 1, *fresh) == 2
                line = capsys.readouterr().err
                assert line.count("\n") == 1
                assert f"received {out}, where another `voxloss train` is running" in line
    out = tmp_path / "run"
    with locked(out):
        assert command("predict", out, run / "data" / "images", "--out", tmp_path / "out") == 0
    assert (out / "checkpoint.pt").exists()
    assert train(run, out) == 0


@pytest.mark.integration
@pytest.mark.thorough
def test_the_folder_of_a_killed_run_is_free_at_once(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from voxloss_app.train.lock import locked\n"
    code += "with locked(Path(sys.argv[1])):\n    print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ValueError, match="another `voxloss train` is running"), locked(tmp_path):
            pass
        process.kill()
    with locked(tmp_path):
        pass
