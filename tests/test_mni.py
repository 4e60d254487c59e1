"""The MNI152 brain: what its files hold, and that a damaged cache never goes unnoticed."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from voxloss_data import BrainMRI, brain_mri, mni

pytest.importorskip("nilearn")

# Resampling is what takes the time; tests that repair again and again share its result.
VOLUMES = functools.cache(mni._volumes)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the 2 mm brain; copy it before changing anything."""
    cache = tmp_path_factory.mktemp("cache")
    brain_mri(2, cache)
    return cache


@pytest.fixture
def cache(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "cache"))


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(resolution: int) -> None:
        raise AssertionError("rebuilt")

    monkeypatch.setattr(mni, "_volumes", build)


def data(path: Path) -> np.ndarray[Any, Any]:
    image: Any = nib.load(path)
    return np.asanyarray(image.dataobj)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_share_one_grid(built: Path) -> None:
    brain = brain_mri(cache=built)
    for path, shape, dtype in (
        (brain.image, (99, 117, 95), np.float32),
        (brain.labels, (99, 117, 95), np.uint8),
        (brain.probabilities, (99, 117, 95, 4), np.float32),
    ):
        image: Any = nib.load(path)
        assert image.shape == shape
        assert image.get_data_dtype() == dtype
        assert image.header.get_xyzt_units()[0] == "mm"
        assert image.header.get_zooms()[:3] == (2, 2, 2)
        for affine, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
            assert code == 4, "NIfTI's code for MNI152 space"
            assert (np.diag(affine) == [2, 2, 2, 1]).all()
            assert affine[:3, 3].tolist() == [-98, -134, -72]


def test_probabilities_and_labels_agree(built: Path) -> None:
    brain = brain_mri(cache=built)
    labels, probabilities = data(brain.labels), data(brain.probabilities)
    assert (np.bincount(labels.ravel(), minlength=4) > 0).all()
    assert labels.max() == 3
    assert BrainMRI.class_names == ("background", "CSF", "grey matter", "white matter")
    assert probabilities.min() >= 0
    assert np.abs(probabilities.sum(-1, dtype=np.float64) - 1).max() < 2e-7
    assert (probabilities.argmax(-1) == labels).all()


def test_classes_follow_the_templates(built: Path) -> None:
    """The rule again, in float64 and per class, from the templates themselves."""
    from nilearn import datasets

    brain = brain_mri(cache=built)
    labels, probabilities, t1 = data(brain.labels), data(brain.probabilities), data(brain.image)
    grey = datasets.load_mni152_gm_template(resolution=2).get_fdata()
    white = datasets.load_mni152_wm_template(resolution=2).get_fdata()
    inside = datasets.load_mni152_brain_mask(resolution=2).get_fdata() == 1
    fluid = np.clip(1 - grey - white, 0, 1)
    assert (t1 == datasets.load_mni152_template(resolution=2).get_fdata()).all()
    assert (t1[inside] > 0).all()
    assert ((labels > 0) == inside).all()
    for index, expected in enumerate((~inside, fluid * inside, grey * inside, white * inside)):
        assert np.abs(probabilities[..., index] - expected).max() < 2e-7
    tissues = np.stack([fluid, grey, white])
    likeliest, second = np.sort(tissues, axis=0)[[-1, -2]]
    clear = inside & (likeliest - second > 1e-6)  # at a tie rounding decides, and either class is right
    assert (inside & ~clear).mean() < 1e-3
    assert (labels == 1 + tissues.argmax(0))[clear].all()
    # White matter is brighter than grey matter, and that than fluid, in any T1.
    assert t1[labels == 3].mean() > t1[labels == 2].mean() > t1[labels == 1].mean()


@pytest.mark.usefixtures("no_build")
def test_a_valid_cache_is_used_as_it_is(cache: Path) -> None:
    before = contents(cache)
    brain = brain_mri(2, cache)
    assert all(path.is_file() for path in (brain.image, brain.labels, brain.probabilities))
    assert contents(cache) == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, Path.unlink])
@pytest.mark.parametrize(
    "file", ["t1.nii.gz", "labels.nii.gz", "probabilities.nii.gz", "manifest.json"], ids=lambda file: file[:2]
)
def test_damage_is_found_and_repaired(
    cache: Path, file: str, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mni, "_volumes", VOLUMES)
    before = contents(cache)
    damage(cache / "mni152_2mm" / file)
    brain_mri(2, cache)
    assert contents(cache) == before


@pytest.mark.integration
@pytest.mark.parametrize("attribute", ["voxloss_data.mni.FORMAT", "nilearn.__version__"])
def test_another_format_or_nilearn_rebuilds(cache: Path, attribute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    build = mni._volumes

    def counted(resolution: int) -> Any:
        calls.append(resolution)
        return build(resolution)

    monkeypatch.setattr(mni, "_volumes", counted)
    monkeypatch.setattr(attribute, "another")
    brain_mri(2, cache)
    brain_mri(2, cache)
    assert calls == [2]


@pytest.mark.integration
def test_resolutions_do_not_share_a_folder(cache: Path) -> None:
    before = contents(cache)
    fine: Any = nib.load(brain_mri(1, cache).image)
    assert fine.shape == (197, 233, 189)
    assert {file: content for file, content in contents(cache).items() if "2mm" in file} == before


def test_a_crash_before_the_manifest_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mni, "save_json", crash)
        with pytest.raises(KeyboardInterrupt):
            brain_mri(2, tmp_path)
    monkeypatch.setattr(mni, "_volumes", crash)
    with pytest.raises(KeyboardInterrupt):
        brain_mri(2, tmp_path)


@pytest.mark.integration
def test_two_processes_may_build_at_the_same_time(built: Path, tmp_path: Path) -> None:
    code = "import sys, voxloss_data; voxloss_data.brain_mri(2, sys.argv[1])"
    builders = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [builder.wait() for builder in builders] == [0, 0]
    assert contents(tmp_path) == contents(built)


@pytest.mark.usefixtures("no_build")
def test_where_the_cache_is(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(cache) if name == "voxloss" else name)
    monkeypatch.delenv("VOXLOSS_CACHE", raising=False)
    assert brain_mri().image.is_relative_to(cache)
    other = shutil.copytree(cache, tmp_path / "other")
    monkeypatch.setenv("VOXLOSS_CACHE", str(other))
    assert brain_mri().image.is_relative_to(other)
    assert brain_mri(cache=str(cache)).image.is_relative_to(cache)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match=r"cannot write the cache folder .*file.*set VOXLOSS_CACHE") as caught:
        brain_mri(2, file)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("resolution", [0, 3, 1.5, "2"])
def test_another_resolution(resolution: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"1 or 2 mm, received {resolution}"):
        brain_mri(resolution, tmp_path)


@pytest.mark.parametrize("module", ["nilearn", "nilearn.datasets", "platformdirs"])
def test_without_the_demo_extra(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VOXLOSS_CACHE", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module}: pip install 'voxloss\[demo\]'"):
        brain_mri(2, None if module == "platformdirs" else tmp_path)
