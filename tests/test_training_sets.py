"""Folders of images and label maps: every layout gives the same scans, and what is amiss is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from voxloss_data.ct import write_ct_set
from voxloss_data.files import save_json, save_nifti
from voxloss_data.training_sets import training_set, unlabelled

NAMES = ["ct_000", "ct_001", "ct_002"]


@pytest.fixture
def decathlon(tmp_path: Path) -> Path:
    return write_ct_set(tmp_path / "ct", cases=3, test_cases=1, shape=(8, 8, 8))


def empty(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_nifti(path, np.zeros((2, 2, 2), np.uint8), np.eye(4))
    return path


def test_decathlon(decathlon: Path) -> None:
    found = training_set(decathlon)
    assert found.layout == "Decathlon"
    assert [scan.name for scan in found.scans] == NAMES
    assert all(scan.image == (decathlon / "imagesTr" / scan.label.name,) for scan in found.scans)
    assert all(scan.label.parent == decathlon / "labelsTr" for scan in found.scans)
    assert found.class_names == {0: "background", 1: "organ", 2: "lesion"}
    assert found.modalities == ("CT",)


def test_two_folders_are_the_same_without_names(decathlon: Path) -> None:
    scans = training_set(decathlon).scans
    (decathlon / "dataset.json").unlink()
    found = training_set(decathlon)
    assert found.scans == scans
    assert (found.class_names, found.modalities, found.ignored) == ({}, (), None)


def test_side_by_side(decathlon: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for scan, suffix in zip(training_set(decathlon).scans, ("_label", "_seg", "_mask"), strict=True):
        shutil.copy(scan.image[0], flat / f"{scan.name}.nii.gz")
        shutil.copy(scan.label, flat / f"{scan.name}{suffix}.nii.gz")
    (flat / "._ct_000.nii.gz").write_bytes(b"attributes of another system")
    found = training_set(flat)
    assert [scan.name for scan in found.scans] == NAMES
    assert [scan.label.name for scan in found.scans] == [
        "ct_000_label.nii.gz",
        "ct_001_seg.nii.gz",
        "ct_002_mask.nii.gz",
    ]


def nnunet(folder: Path, **changes: object) -> Path:
    for name in ("b", "a"):
        empty(folder / "labelsTr" / f"{name}.nii.gz")
        for channel in range(2):
            empty(folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz")
    facts: dict[str, object] = {
        "channel_names": {"1": "T2", "0": "T1"},
        "labels": {"background": 0, "cord": 1, "ignore": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    save_json(folder / "dataset.json", {**facts, **changes})
    return folder


def test_nnunet_channels_names_and_ignore_label(tmp_path: Path) -> None:
    found = training_set(nnunet(tmp_path))
    assert [scan.name for scan in found.scans] == ["a", "b"]
    assert [path.name for path in found.scans[0].image] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert found.modalities == ("T1", "T2")
    assert found.class_names == {0: "background", 1: "cord"}
    assert found.ignored == 2


def test_nnunet_regions_are_for_nnunet(tmp_path: Path) -> None:
    folder = nnunet(tmp_path, labels={"background": 0, "whole": [1, 2], "core": 2})
    with pytest.raises(ValueError, match=r"regions \(whole\).*nnUNetTrainerVoxloss"):
        training_set(folder)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("images/b.nii.gz", r"labels/b\.nii\.gz: expected an image of the same name"),
        ("labels/a.nii.gz", r"images/a\.nii\.gz: expected a label map of the same name, got none \(1 such"),
    ],
)
def test_a_file_without_its_partner(tmp_path: Path, broken: str, said: str) -> None:
    for kind in ("images", "labels"):
        for name in "abc":
            empty(tmp_path / kind / f"{name}.nii.gz")
    (tmp_path / broken).unlink()
    with pytest.raises(ValueError, match=said):
        training_set(tmp_path)


def test_what_is_no_training_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got nothing at"):
        training_set(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="got a file at"):
        training_set(empty(tmp_path / "file.nii.gz"))
    with pytest.raises(ValueError, match=r"1 NIfTI files and none so named"):
        training_set(tmp_path)


def test_a_damaged_description_names_itself(decathlon: Path) -> None:
    description = decathlon / "dataset.json"
    facts = json.loads(description.read_bytes())
    for content, said in [
        ("{", "expected JSON"),
        ("[]", "expected an object, got list"),
        (json.dumps({**facts, "training": [{"image": "x"}]}), "`image` and `label`"),
        (json.dumps({**facts, "labels": {"zero": "background"}}), "`labels` as"),
        (json.dumps({**facts, "training": []}), "expected scans to train on, got none"),
    ]:
        description.write_text(content)
        with pytest.raises(ValueError, match=said) as raised:
            training_set(decathlon)
        assert str(raised.value).startswith(str(description))


def test_a_listed_file_that_is_not_there(decathlon: Path) -> None:
    (decathlon / "imagesTr" / "ct_001.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"ct_001\.nii\.gz, got nothing \(1 missing in all\)"):
        training_set(decathlon)


def test_images_to_predict(tmp_path: Path) -> None:
    single = empty(tmp_path / "one.nii.gz")
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        empty(tmp_path / "many" / f"{name}.nii.gz")
    found = unlabelled([single, tmp_path / "many"], channels=2)
    assert [name for name, _ in found] == ["one", "a", "b"]
    assert [path.name for path in found[2][1]] == ["b_0000.nii.gz", "b_0001.nii.gz"]
    with pytest.raises(ValueError, match="expected 1 channels, got 2 files"):
        unlabelled([tmp_path / "many"], channels=1)
    with pytest.raises(ValueError, match="got one more than once"):
        unlabelled([single, single])
    with pytest.raises(ValueError, match="got nothing at"):
        unlabelled([tmp_path / "nowhere"])
