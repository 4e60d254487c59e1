"""Every command that reads NIfTI names a damaged file in one line, whatever is wrong with it, and never waits."""

from __future__ import annotations

import gzip
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from voxloss_app.__main__ import main
from voxloss_app.train import TrainRequest, make_plan
from voxloss_app.train.checkpoint import Checkpoint, Epoch
from voxloss_app.train.loop import Training
from voxloss_data.files import save_nifti

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
        "4448 bytes, as .* got 4447",
    ),
    "truncated before it was compressed": (
        ".nii.gz",
        lambda p: p.write_bytes(gzip.compress(content()[:-1])),
        "4448 bytes, as .* got 4447",
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
    "2D": (".nii", lambda p: save(p, GOOD[0]), r"expected 3 dimensions.*, got 2: \(16, 16\)"),
    "5D": (".nii", lambda p: save(p, np.stack([GOOD] * 2, -1)[..., None, :]), "got 5: "),
    "complex": (".nii", lambda p: save(p, GOOD.astype(np.complex64)), "got the dtype complex64"),
    "RGB": (".nii", lambda p: save(p, RGB), "got the dtype RGB"),
    "NaN": (".nii", lambda p: save(p, with_value(np.nan)), r"nan.* at voxel \(3, 4, 5\)"),
    "infinite": (".nii.gz", lambda p: save(p, with_value(-np.inf)), r"-inf.* at voxel \(3, 4, 5\)"),
    "flat voxels": (".nii", lambda p: p.write_bytes(with_affine(0)), "voxels of some volume"),
    "voxels without a place": (".nii", lambda p: p.write_bytes(with_affine(np.nan)), "voxels of some volume"),
    "a folder": (".nii.gz", folder, ""),
    "a pipe": (".nii.gz", lambda p: os.mkfifo(p), "a pipe, a socket or a device"),
    "a link to nowhere": (".nii.gz", lambda p: p.symlink_to("nowhere"), "does not exist|got nothing at"),
}
FOR_LABELS = {
    "an axis of length 1": (".nii", lambda p: save(p, GOOD[..., None]), r"numpy\.squeeze"),
    "soft": (".nii", lambda p: save(p, with_value(0.5)), r"whole numbers, got 0\.5 at voxel \(3, 4, 5\)"),
}
FOR_IMAGES = {
    "too large for float32": (
        ".nii",
        lambda p: save(p, with_value(1).astype(float) * 1e39),
        "finite voxels, got",
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


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([*map(str, arguments)])
    assert isinstance(left.value.code, int)
    return left.value.code


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
