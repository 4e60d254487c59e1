"""Files appear whole or not at all, and an error names the path that the caller gave."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from voxloss_data.files import save_bytes, save_json, save_nifti, save_text

NOISE = np.random.default_rng(0).integers(256, size=(32, 32, 32), dtype=np.uint8)
SAVE: dict[str, Callable[[Path], None]] = {
    "x.csv": partial(save_bytes, content=NOISE.tobytes()),
    "x.json": partial(save_json, content=NOISE.ravel().tolist()),
    "x.nii": partial(save_nifti, data=NOISE, affine=np.eye(4)),
    "x.nii.gz": partial(save_nifti, data=NOISE, affine=np.eye(4)),
}


@pytest.mark.parametrize("name", SAVE)
def test_a_write_that_fails_names_the_file_and_leaves_the_old_one(name: str, tmp_path: Path) -> None:
    """A real failure, of a limit on the size of files, which like a full disk names no file."""
    resource = pytest.importorskip("resource")
    path = tmp_path / name
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError) as raised:
            SAVE[name](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path))
    assert str(raised.value).endswith(f"File too large: {str(path)!r}")
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/hidden"), PermissionError, "Permission denied"),
        (OSError("the library's own words"), OSError, "the library's own words"),
    ],
)
def test_an_error_keeps_its_kind_and_words(
    error: OSError, kind: type[OSError], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    path = tmp_path / "x.csv"
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError) as raised:
        save_bytes(path, b"")
    found = raised.value
    assert type(found) is kind
    assert (found.errno, found.strerror, found.filename) == (error.errno, said, str(path))
    assert found.__cause__ is error


@pytest.mark.parametrize("name", SAVE)
def test_a_folder_that_is_a_file_or_not_there(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / name, tmp_path / "nowhere" / name):
        with pytest.raises(OSError) as raised:
            SAVE[name](path)
        assert raised.value.filename == str(path)


def test_a_name_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / f"{'é' * 120}.nii.gz"
    with suppress(OSError):  # a file system may allow less
        path.touch()
    if not path.exists():
        pytest.skip("no names of 247 bytes here")
    SAVE["x.nii.gz"](path)
    assert np.array_equal(np.asanyarray(nib.load(path).dataobj), NOISE)  # type: ignore[attr-defined]


def test_a_link_is_followed(tmp_path: Path) -> None:
    """Not replaced by a file; /dev/stdout is one, too."""
    (tmp_path / "elsewhere").mkdir()
    link, path = tmp_path / "x.csv", tmp_path / "elsewhere" / "y.csv"
    link.symlink_to(path)
    for content in (b"new", b"newer"):
        save_bytes(link, content)
        assert link.is_symlink()
        assert path.read_bytes() == content


def test_text_that_is_not_unicode_is_escaped(tmp_path: Path) -> None:
    """As the name of a file is; line breaks stay what they are."""
    save_text(tmp_path / "x.txt", "é\udcff\ud800\r\n")
    assert (tmp_path / "x.txt").read_bytes() == "é\\xff\\ud800\r\n".encode()
