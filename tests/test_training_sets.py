"""Folders of images and label maps: every layout gives the same scans, and what is amiss is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
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


def test_nnunet_regions(tmp_path: Path) -> None:
    found = training_set(nnunet(tmp_path, labels={"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}))
    assert found.regions == {"whole": [1, 2], "core": [2]}
    assert found.class_names == {1: "1", 2: "2"}
    assert found.ignored == 3
    assert training_set(nnunet(tmp_path)).regions == {}
    with pytest.raises(ValueError, match=r"labels\.whole\[1\]: expected a whole number from 0, received \"a\""):
        training_set(nnunet(tmp_path, labels={"background": 0, "whole": [1, "a"]}))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("images/b.nii.gz", r"labels/b\.nii\.gz: expected an image of the same name"),
        (
            "labels/a.nii.gz",
            r"images/a\.nii\.gz: expected a label map of the same name, received none\. .*: a\.nii\.gz\.$",
        ),
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
    with pytest.raises(ValueError, match="received nothing at"):
        training_set(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="received a file at"):
        training_set(empty(tmp_path / "file.nii.gz"))
    with pytest.raises(ValueError, match=r"1 NIfTI files and none so named"):
        training_set(tmp_path)


NESTED = "[" * 100_000
NNUNET: dict[str, object] = {"channel_names": {"0": "CT"}}
SCAN = {"image": "imagesTr/ct_000.nii.gz", "label": "labelsTr/ct_000.nii.gz"}
LONG = "x" * 5000
DAMAGED: list[tuple[str | bytes | dict[str, object], str]] = [
    ("{", "expected JSON, received JSONDecodeError"),
    (NESTED, "expected JSON, received RecursionError"),
    ('{"training": ' + NESTED, "expected JSON, received RecursionError"),
    ('{"training": [' + "9" * 5000 + "]}", "expected JSON, received ValueError"),
    (
        '{"labels": {"1": "a", "1": "b"}, "training": []}',
        'expected JSON, received ValueError: the key "1" more than once',
    ),
    ('{"name": "é"}'.encode("latin1"), "expected JSON, received UnicodeDecodeError"),
    ("[]", "expected an object, received an empty list"),
    ("NaN", "expected an object, received NaN"),
    ({"training": {}}, "training: expected a list, received an empty object"),
    ({"training": None}, "training: expected a list, received null"),
    ({"training": []}, "expected scans to train on, received none"),
    ({"training": ["x"]}, r'training\[0\]: expected an object, received "x"'),
    ({"training": [SCAN, {"image": "x"}]}, r"training\[1\]: expected the key label, received image$"),
    ({"training": [{}]}, r"training\[0\]: expected the key image, received none$"),
    ({"training": [{**SCAN, "image": []}]}, r"training\[0\].image: expected one or more, received an empty list"),
    ({"training": [{**SCAN, "image": [1]}]}, r"training\[0\].image\[0\]: expected a text, received 1"),
    ({"training": [{**SCAN, "image": ""}]}, r'training\[0\].image: expected a text, received ""'),
    ({"training": [{**SCAN, "label": ["a"]}]}, r"training\[0\].label: expected a text, received a list"),
    ({"training": [{**SCAN, "label": True}]}, r"training\[0\].label: expected a text, received true"),
    ({"training": [{**SCAN, "label": LONG}]}, r"expected the file '.*/x+…x+', received nothing \(1 missing"),
    ({"training": [{**SCAN, "image": "a\0b"}]}, r"expected the file .*/a\\x00b', received nothing \(1 missing"),
    (
        {"training": [{**SCAN, "image": "a\ud800"}]},
        r"expected the file .*/a\\ud800', received nothing \(1 missing",
    ),
    ({"training": [SCAN, SCAN]}, "expected label maps of different names, received ct_000 more than once"),
    ({"labels": None}, "labels: expected an object, received null"),
    ({"labels": ["background"]}, "labels: expected an object, received a list"),
    ({"labels": {"zero": "x"}}, 'labels: expected whole numbers from 0, received "zero"'),
    ({"labels": {"-1": "x"}}, 'labels: expected whole numbers from 0, received "-1"'),
    ({"labels": {LONG: "x"}}, r'labels: expected whole numbers from 0, received "x+… \(5002 characters\)$'),
    ({"labels": {"1": "a", "01": "b"}}, "labels: expected each number once, received 1 for 1, 01"),
    ({"labels": {"1": None}}, "labels.1: expected a text, received null"),
    ({"modality": []}, "modality: expected an object, received an empty list"),
    ({"modality": {"0": 1}}, "modality.0: expected a text, received 1"),
    ({"modality": {"x": "CT"}}, 'modality: expected whole numbers from 0, received "x"'),
    ({"channel_names": None}, "channel_names: expected an object, received null"),
    ({"channel_names": {}}, "channel_names: expected one or more, received an empty object"),
    ({**NNUNET, "labels": []}, "labels: expected an object, received an empty list"),
    (
        {**NNUNET, "labels": {"x": "one"}},
        'labels.x: expected a whole number from 0, received "one"',
    ),
    ({**NNUNET, "labels": {"x": 1.7}}, r"labels.x: expected a whole number from 0, received 1\.7"),
    ({**NNUNET, "labels": {"x": True}}, "labels.x: expected a whole number from 0, received true"),
    ({**NNUNET, "labels": {"x": -1}}, "labels.x: expected a whole number from 0, received -1"),
    ({**NNUNET, "labels": {"x": 10**99}}, r"labels.x: expected a whole number .*\(100 char"),
    ({**NNUNET, "labels": {"x": float("nan")}}, "labels.x: expected a whole number .*NaN"),
    ({**NNUNET, "labels": {"x": {}}}, "labels.x: expected a whole number .*an empty object"),
    (
        {**NNUNET, "labels": {"a\nb": 1, "c": 1}},
        r"expected each number once, received 1 for a\\nb, c",
    ),
    ({**NNUNET, "labels": {"ignore": 1, "c": 1}}, "received 1 for ignore, c"),
    ({**NNUNET, "file_ending": []}, "file_ending: expected a text, received an empty list"),
    ({**NNUNET, "file_ending": ".png"}, r'file_ending: expected .nii.gz or .nii, received ".png"'),
]


@pytest.mark.parametrize(("content", "said"), DAMAGED, ids=[said for _, said in DAMAGED])
def test_a_damaged_description_names_itself_and_the_key(
    content: str | bytes | dict[str, object], said: str, decathlon: Path
) -> None:
    description = decathlon / "dataset.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(description.read_bytes()), **content})
    description.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=said) as raised:
        training_set(decathlon)
    message = str(raised.value)
    assert message.startswith(f"{description}: ")
    assert message.isprintable(), "a line"
    assert len(message) < 5000


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_what_is_odd_in_a_description_and_yet_clear(encoding: str, decathlon: Path) -> None:
    """Other encodings of Unicode, numbers as texts and floats, nonsense in keys that no one reads."""
    scans = training_set(decathlon).scans
    facts = {
        "numTraining": float("nan"),
        "labels": {"00": "nothing", "2": "Läsion\t", "1": "organ"},
        "training": [
            {"image": [str(scan.image[0])], "label": str(scan.label), "fold": 1} for scan in scans[::-1]
        ],
    }
    (decathlon / "dataset.json").write_text(json.dumps(facts, ensure_ascii=False), encoding=encoding)
    found = training_set(decathlon)
    assert found.scans == scans
    assert found.class_names == {0: "nothing", 1: "organ", 2: r"Läsion\t"}
    assert found.modalities == ()
    assert training_set(nnunet(decathlon / "nnu", labels={"a": 1.0, "b": "2"})).class_names == {1: "a", 2: "b"}


def test_a_description_that_cannot_be_read(decathlon: Path) -> None:
    (decathlon / "dataset.json").unlink()
    (decathlon / "dataset.json").mkdir()
    with pytest.raises(ValueError, match=r"dataset\.json: expected JSON, received IsADirectoryError"):
        training_set(decathlon)


def test_a_listed_file_that_is_not_there(decathlon: Path) -> None:
    (decathlon / "imagesTr" / "ct_001.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"ct_001\.nii\.gz, received nothing \(1 missing in all\)"):
        training_set(decathlon)


def two_folders(folder: Path) -> Path:
    for kind in ("images", "labels"):
        for name in "ab":
            empty(folder / kind / f"{name}.nii.gz")
    return folder


def flat(folder: Path) -> Path:
    for name in "ab":
        empty(folder / f"{name}.nii.gz")
        empty(folder / f"{name}_label.nii.gz")
    return folder


def looped(path: Path) -> Path:
    path.symlink_to(path)
    return path


def folder_at(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("layout", "add", "name", "said"),
    [
        (two_folders, empty, "images/a.nii", r"a\.nii\.gz: expected one file of the name a, received a\.nii "),
        (two_folders, empty, "labels/a.NII", r"a\.nii\.gz: expected one file of the name a, received a\.NII "),
        (
            two_folders,
            empty,
            "labels/b c.nii",
            r"'.*/labels/b c\.nii': expected an image of the same name, received none",
        ),
        (
            two_folders,
            folder_at,
            "images/c.nii.gz",
            r"images/c\.nii\.gz: expected a NIfTI file, received a folder",
        ),
        (
            two_folders,
            looped,
            "labels/c.nii.gz",
            r"labels/c\.nii\.gz: expected a NIfTI file, received a broken link",
        ),
        (two_folders, empty, "labels/.c.nii.gz", None),
        (two_folders, looped, "imagesTr", None),
        (flat, empty, "a.nii", r"a\.nii\.gz: expected one file of the name a, received a\.nii "),
        (
            flat,
            empty,
            "a_seg.nii",
            r"a_seg\.nii: expected one label map for a, received a_label\.nii\.gz beside it",
        ),
        (
            flat,
            empty,
            "a_pred.nii",
            r"a_pred\.nii: expected a label map NAME_label.* partner: a_pred\.nii",
        ),
        (
            flat,
            empty,
            "c_mask.nii",
            r"c_mask\.nii: expected an image NAME\.nii\.gz beside its label map",
        ),
        (flat, looped, "c.nii", r"c\.nii: expected a NIfTI file, received a broken link"),
        (flat, empty, "._a.nii", None),
        (
            nnunet,
            empty,
            "imagesTr/c_0000.nii.gz",
            r"c_0000\.nii\.gz: expected a label map in labelsTr and a channel",
        ),
        (
            nnunet,
            empty,
            "imagesTr/a_0002.nii.gz",
            r"expected a label map .*, received none for a_0002\.nii\.gz\.",
        ),
        (
            nnunet,
            empty,
            "labelsTr/c.nii",
            r'file_ending: expected that of .*/labelsTr/c\.nii, received "\.nii\.gz"',
        ),
        (nnunet, empty, "labelsTr/a.nii", r"a\.nii\.gz: expected one file of the name a, received a\.nii "),
        (nnunet, looped, "labelsTr/c.nii.gz", r"c\.nii\.gz: expected a NIfTI file, received a broken link"),
    ],
)
def test_one_file_too_many(
    layout: Callable[[Path], Path], add: Callable[[Path], Path], name: str, said: str | None, tmp_path: Path
) -> None:
    """It is neither left out silently nor taken for another, unless it is hidden."""
    folder = layout(tmp_path)
    add(folder / name)
    if said is None:
        assert [scan.name for scan in training_set(folder).scans] == ["a", "b"]
        return
    with pytest.raises(ValueError, match=said) as raised:
        training_set(folder)
    assert str(raised.value).isprintable()


def test_many_files_without_partners_are_counted(tmp_path: Path) -> None:
    for name in "abcdefg":
        empty(flat(tmp_path) / f"{name}_pred.nii.gz")
    said = r"partner: a_pred\.nii\.gz, b_pred\.nii\.gz, .*, e_pred\.nii\.gz and 2 more\."
    with pytest.raises(ValueError, match=said):
        training_set(tmp_path)


@pytest.mark.parametrize(
    ("names", "channels", "said"),
    [
        (("a.nii", "a.nii.gz"), 1, r"a\.nii\.gz: expected one file of the name a, received a\.nii "),
        (
            ("a_0000.nii", "a_0002.nii"),
            2,
            r"2 channels \(_0000 to _0001\), received 2 files: a_0000\.nii, a_0002",
        ),
        (("a_0001.nii",), 1, r"1 channels \(_0000\), received 1 files: a_0001\.nii"),
    ],
)
def test_images_to_predict_that_are_not_clear(
    names: tuple[str, ...], channels: int, said: str, tmp_path: Path
) -> None:
    for name in names:
        empty(tmp_path / name)
    with pytest.raises(ValueError, match=said):
        unlabelled([tmp_path], channels)


def test_images_to_predict(tmp_path: Path) -> None:
    single = empty(tmp_path / "one.nii.gz")
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        empty(tmp_path / "many" / f"{name}.nii.gz")
    found = unlabelled([single, tmp_path / "many"], channels=2)
    assert [name for name, _ in found] == ["one", "a", "b"]
    assert [path.name for path in found[2][1]] == ["b_0000.nii.gz", "b_0001.nii.gz"]
    with pytest.raises(ValueError, match=r"1 channels \(_0000\), received 2 files: a_0000\.nii\.gz, a_0001\."):
        unlabelled([tmp_path / "many"], channels=1)
    with pytest.raises(ValueError, match=r"received one more than once: .*one\.nii\.gz and .*one\.nii\.gz"):
        unlabelled([single, single])
    with pytest.raises(ValueError, match="received nothing at"):
        unlabelled([tmp_path / "nowhere"])
