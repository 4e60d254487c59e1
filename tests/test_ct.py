"""The synthetic CT set: what is in its files, and that it is the same every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist

from voxloss_data import write_ct_set

SHAPE = (32, 28, 20)


def read(path: str | Path) -> tuple[np.ndarray[Any, Any], Any]:
    image: Any = nib.load(path)
    return np.asanyarray(image.dataobj), image


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ct_set(tmp_path_factory.mktemp("ct") / "new" / "folder", 4, test_cases=1, shape=SHAPE)


def test_monai_reads_the_list(ct: Path) -> None:
    training = load_decathlon_datalist(ct / "dataset.json", is_segmentation=True, data_list_key="training")
    test = load_decathlon_datalist(ct / "dataset.json", is_segmentation=True, data_list_key="test")
    listed = [case[key] for case in training for key in ("image", "label")] + [case["image"] for case in test]
    assert sorted(map(Path, listed)) == sorted(ct.rglob("*.nii.gz"))
    assert len(training) == 4
    assert len(test) == 1
    content = json.loads((ct / "dataset.json").read_text(encoding="utf-8"))
    assert (content["numTraining"], content["numTest"], content["modality"]) == (4, 1, {"0": "CT"})
    assert content["labels"] == {"0": "background", "1": "organ", "2": "lesion"}


def test_intensities_and_geometry(ct: Path) -> None:
    for path in sorted((ct / "imagesTr").iterdir()):
        (image, nifti), (labels, reference) = read(path), read(ct / "labelsTr" / path.name)
        assert (image.dtype, labels.dtype, image.shape, labels.shape) == (np.int16, np.uint8, SHAPE, SHAPE)
        assert np.unique(labels).tolist() == [0, 1, 2]
        assert (nifti.affine == reference.affine).all()
        assert nifti.header.get_zooms() == (1.5, 1.5, 3.0)
        assert np.linalg.det(nifti.affine) < 0
        assert nifti.affine[:3, 3].all(), "an affine without a translation hides errors"
        air, soft_tissue = image[0, 0], image[(image > -500) & (labels == 0)]
        for values, hu in ((air, -1000), (soft_tissue, 40), (image[labels == 1], 120), (image[labels == 2], 200)):
            assert np.median(values) == pytest.approx(hu, abs=12)
            assert 10 < values.std() < 25
        assert image.min() >= -1024


def test_the_lesion_is_a_small_ball_inside_the_large_organ(tmp_path: Path) -> None:
    write_ct_set(tmp_path, 12, test_cases=0)
    assert not (tmp_path / "imagesTs").exists()
    for path in sorted((tmp_path / "labelsTr").iterdir()):
        labels, nifti = read(path)
        lesion, organ = labels == 2, labels > 0
        share = organ.mean()
        assert 0.03 < share < 0.12
        assert 0.002 < lesion.mean() < 0.15 * share
        for axis in range(3):
            for step in (-1, 1):
                assert organ[np.roll(lesion, step, axis)].all(), f"the lesion of {path.name} reaches the rim"
        # A ball in mm: nothing outside is nearer to its centre than anything inside.
        world = np.moveaxis(np.indices(labels.shape), 0, -1) @ nifti.affine[:3, :3].T
        distance = np.linalg.norm(world - world[lesion].mean(0), axis=-1)
        assert distance[lesion].max() < distance[~lesion].min()
        assert lesion.sum() > 300


def test_the_same_arguments_give_the_same_bytes(ct: Path, tmp_path: Path) -> None:
    again = files(write_ct_set(tmp_path / "a", 4, test_cases=1, shape=SHAPE))
    assert again == files(ct)
    other = files(write_ct_set(tmp_path / "b", 4, test_cases=1, shape=SHAPE, seed=1))
    assert not [name for name in other if name.endswith(".nii.gz") and other[name] == again[name]]


def test_a_case_depends_on_its_number_and_not_on_how_many_there_are(ct: Path, tmp_path: Path) -> None:
    more, fewer = files(write_ct_set(tmp_path, 5, test_cases=0, shape=SHAPE)), files(ct)
    for name in fewer:
        if name.endswith(".nii.gz"):
            assert more[name.replace("imagesTs", "imagesTr")] == fewer[name]
    assert len({content for name, content in more.items() if name.startswith("labelsTr")}) == 5


@pytest.mark.parametrize("shape", [(8, 8, 8), (64, 8, 8), (9, 40, 11)])
def test_every_class_is_in_the_smallest_volumes(shape: tuple[int, int, int], tmp_path: Path) -> None:
    write_ct_set(tmp_path, 20, test_cases=0, shape=shape, spacing=(0.7, 1.0, 5.0))
    for path in (tmp_path / "labelsTr").iterdir():
        assert np.unique(read(path)[0]).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cases": 0}, "cases: expected 1 integers ≥ 1, received"),
        ({"test_cases": -1}, "test_cases: expected 1 integers ≥ 0"),
        ({"shape": (32, 32)}, "shape: expected 3 integers ≥ 8"),
        ({"shape": (32, 32, 7)}, "shape: expected 3 integers ≥ 8"),
        ({"seed": -1}, "seed: expected 1 integers ≥ 0"),
        ({"spacing": (1, 1, 0)}, "three positive numbers in mm"),
    ],
)
def test_bad_arguments_write_nothing(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_ct_set(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError, match=r"expected a folder .* received the file .*file"):
        write_ct_set(file)
