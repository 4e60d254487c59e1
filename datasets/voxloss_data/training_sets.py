"""Folders of images and their label maps, in the layouts that are about: which image belongs to which labels."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMAGE_FOLDERS = ("imagesTr", "images", "image")
LABEL_FOLDERS = ("labelsTr", "labels", "label")
# What ends the name of a label map that lies beside its image.
SUFFIXES = ("_label", "_labels", "_seg", "_segmentation", "_mask")


@dataclass(frozen=True)
class Scan:
    """One image, in one file or one per channel, and its label map."""

    name: str
    image: tuple[Path, ...]
    label: Path


@dataclass(frozen=True)
class TrainingSet:
    """The scans of a folder, sorted by name, and what its dataset.json says."""

    layout: str
    scans: tuple[Scan, ...]
    class_names: dict[int, str] = field(default_factory=dict)  # by label
    modalities: tuple[str, ...] = ()  # by channel, such as "CT"
    ignored: int | None = None  # the label of voxels that nobody looked at


def training_set(folder: Path) -> TrainingSet:
    """Find the scans of a folder, in one of four layouts; no voxel is read.

    * Medical Segmentation Decathlon: dataset.json with a list `training` of `image` and `label`;
    * nnU-Net raw data: dataset.json with `channel_names`, imagesTr/NAME_0000.nii.gz, …, labelsTr/NAME.nii.gz;
    * two folders: images/NAME.nii.gz and labels/NAME.nii.gz (or imagesTr and labelsTr);
    * side by side: NAME.nii.gz and NAME_label.nii.gz (or _labels, _seg, _segmentation, _mask).

    Raises ValueError if there is none of them, or a file without its partner.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise ValueError(f"expected a folder of images and label maps, got {found} at {folder}")
    description = folder / "dataset.json"
    if description.exists():
        try:
            facts = json.loads(description.read_bytes())
        except ValueError as error:
            raise ValueError(f"{description}: expected JSON, got {error}") from error
        if not isinstance(facts, dict):
            raise ValueError(f"{description}: expected an object, got {type(facts).__name__}")
        if "channel_names" in facts:
            return _nnunet(folder, facts)
        if "training" in facts:
            return _decathlon(description, facts)
    images, labels = _first(folder, IMAGE_FOLDERS), _first(folder, LABEL_FOLDERS)
    if images is not None and labels is not None:
        pairs = _paired({_stem(p): p for p in _nifti(images)}, {_stem(p): p for p in _nifti(labels)}, folder)
        return TrainingSet(f"{images.name}/ and {labels.name}/", pairs)
    if (images or labels) and not _nifti(folder):
        missing = "images (or imagesTr) beside labels" if images is None else "labels (or labelsTr) beside images"
        raise ValueError(f"{folder}: expected a folder {missing}, got none")
    return _side_by_side(folder)


def unlabelled(paths: Sequence[Path], channels: int = 1) -> list[tuple[str, tuple[Path, ...]]]:
    """Names and files of images: each path is an image, or a folder of them.

    In a folder whose files are all called NAME_0000.nii.gz, NAME_0001.nii.gz, … as nnU-Net has them, those of one
    NAME are the channels of one image. Raises ValueError if there is none, if two have one name, or if channels
    are missing.
    """
    found: list[tuple[str, tuple[Path, ...]]] = []
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise ValueError(f"expected a NIfTI file or a folder of them, got nothing at {path}")
            found.append((_stem(path), (path,)))
            continue
        files = _nifti(path)
        if not files:
            raise ValueError(f"{path}: expected .nii or .nii.gz files, got none")
        if not all(re.search(r"_\d{4}$", _stem(file)) for file in files):
            found += [(_stem(file), (file,)) for file in files]
            continue
        by_name: dict[str, list[Path]] = {}
        for file in files:
            by_name.setdefault(_stem(file)[:-5], []).append(file)
        for name, image in by_name.items():
            if len(image) != channels:
                raise ValueError(f"{image[0]}: expected {channels} channels, got {len(image)} files")
            found.append((name, tuple(image)))
    names = [name for name, _ in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"expected images of different names, got {twice[0]} more than once")
    return found


def _decathlon(description: Path, facts: dict[str, Any]) -> TrainingSet:
    from monai.data.decathlon_datalist import load_decathlon_datalist  # it loads torch

    try:
        listed = load_decathlon_datalist(description, is_segmentation=True, data_list_key="training")
        scans = []
        for item in listed:
            image = item["image"] if isinstance(item["image"], list) else [item["image"]]
            scans.append(Scan(_stem(Path(item["label"])), tuple(map(Path, image)), Path(item["label"])))
        names = {int(label): str(name) for label, name in facts.get("labels", {}).items()}
        modalities = [name for _, name in sorted(facts.get("modality", {}).items(), key=lambda i: int(i[0]))]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{description}: expected a list `training` of objects with `image` and `label`, `labels` as "
            f'{{"0": "background", …}}, `modality` as {{"0": "CT"}}, got {type(error).__name__}: {error}'
        ) from error
    return _checked(TrainingSet("Decathlon", _sorted(scans), names, tuple(modalities)), description)


def _nnunet(folder: Path, facts: dict[str, Any]) -> TrainingSet:
    """The layout of nnU-Net 2; regions are no classes of a label map."""
    description = folder / "dataset.json"
    labels: dict[str, Any] = facts.get("labels", {})
    regions = sorted(name for name, value in labels.items() if isinstance(value, list))
    if regions:
        raise ValueError(
            f"{description}: expected one whole number for each label, got regions ({', '.join(regions)}). "
            "Train regions with nnU-Net's own commands and nnUNetTrainerVoxloss."
        )
    ending = str(facts.get("file_ending", ".nii.gz"))
    if not ending.lower().endswith((".nii", ".nii.gz")):
        raise ValueError(f"{description}: expected the file_ending .nii.gz or .nii, got {ending!r}")
    channels = [name for _, name in sorted(facts["channel_names"].items(), key=lambda item: int(item[0]))]
    references = sorted(p for p in _nifti(folder / "labelsTr") if p.name.endswith(ending))
    scans = []
    for label in references:
        name = label.name.removesuffix(ending)
        image = tuple(folder / "imagesTr" / f"{name}_{c:04d}{ending}" for c in range(len(channels)))
        scans.append(Scan(name, image, label))
    names = {int(value): name for name, value in labels.items() if name != "ignore"}
    ignored = labels.get("ignore")
    found = TrainingSet(
        "nnU-Net", tuple(scans), names, tuple(map(str, channels)), None if ignored is None else int(ignored)
    )
    return _checked(found, description)


def _side_by_side(folder: Path) -> TrainingSet:
    files = {_stem(path): path for path in _nifti(folder)}
    labels = {}
    for name, path in files.items():
        for suffix in SUFFIXES:
            if name.endswith(suffix):
                labels[name.removesuffix(suffix)] = path
    images = {name: path for name, path in files.items() if path not in labels.values()}
    if not labels:
        raise ValueError(
            f"{folder}: expected a dataset.json (Decathlon or nnU-Net), folders images and labels, or "
            f"NAME.nii.gz beside NAME_label.nii.gz (or {', '.join(SUFFIXES[1:])}), got {len(files)} NIfTI files "
            "and none so named"
        )
    return TrainingSet("side by side", _paired(images, labels, folder))


def _paired(images: dict[str, Path], labels: dict[str, Path], folder: Path) -> tuple[Scan, ...]:
    if not images and not labels:
        raise ValueError(f"{folder}: expected .nii or .nii.gz files, got none")
    lonely = sorted(images.keys() ^ labels.keys())
    if lonely:
        lacking = "a label map" if lonely[0] in images else "an image"
        path = images.get(lonely[0], labels.get(lonely[0]))
        raise ValueError(
            f"{path}: expected {lacking} of the same name, got none ({len(lonely)} such files in all). "
            "Move what has no partner elsewhere."
        )
    return tuple(Scan(name, (images[name],), labels[name]) for name in sorted(images))


def _checked(found: TrainingSet, description: Path) -> TrainingSet:
    if not found.scans:
        raise ValueError(f"{description}: expected scans to train on, got none")
    missing = [path for scan in found.scans for path in (*scan.image, scan.label) if not path.is_file()]
    if missing:
        raise ValueError(
            f"{description}: expected the file {missing[0]}, got nothing ({len(missing)} missing in all)"
        )
    names = [scan.name for scan in found.scans]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{description}: expected label maps of different names, got {twice[0]} more than once")
    return found


def _sorted(scans: list[Scan]) -> tuple[Scan, ...]:
    return tuple(sorted(scans, key=lambda scan: scan.name))


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _nifti(folder: Path) -> list[Path]:
    """Hidden files are not data: other systems' file attributes, half-written files."""
    if not folder.is_dir():
        raise ValueError(f"expected the folder {folder}, got nothing")
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return sorted(path for path in files if path.name.lower().endswith((".nii", ".nii.gz")))


def _stem(path: Path) -> str:
    name = path.name
    for ending in (".nii.gz", ".nii"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return path.stem
