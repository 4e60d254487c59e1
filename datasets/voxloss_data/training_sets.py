"""Folders of images and their label maps, in the usual layouts: which image belongs to which labels."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from voxloss_data.json_fields import Field
from voxloss_data.nifti_files import ENDINGS, in_place_of_a_file, nifti_files, stem
from voxloss_data.text import printable, quoted

IMAGE_FOLDERS = ("imagesTr", "images", "image")
LABEL_FOLDERS = ("labelsTr", "labels", "label")
# What ends the name of a label map that lies beside its image.
SUFFIXES = ("_label", "_labels", "_seg", "_segmentation", "_mask")
LISTED = 5  # files that a message names


@dataclass(frozen=True)
class Scan:
    """One image, in one file or one per channel, and its label map."""

    name: str
    image: tuple[Path, ...]
    label: Path


@dataclass(frozen=True)
class TrainingSet:
    """The scans of a folder, sorted by name, and the content of its dataset.json."""

    layout: str
    scans: tuple[Scan, ...]
    class_names: dict[int, str] = field(default_factory=dict)  # by label
    modalities: tuple[str, ...] = ()  # by channel, such as "CT"
    ignored: int | None = None  # the label of voxels that nobody looked at
    regions: dict[str, list[int]] = field(default_factory=dict)  # unions of labels that are trained, not classes


def training_set(folder: Path) -> TrainingSet:
    """Find the scans of a folder, in one of four layouts; no voxel is read.

    * Medical Segmentation Decathlon: dataset.json with a list `training` of `image` and `label`;
    * nnU-Net raw data: dataset.json with `channel_names`, imagesTr/NAME_0000.nii.gz, …, labelsTr/NAME.nii.gz;
    * two folders: images/NAME.nii.gz and labels/NAME.nii.gz (or imagesTr and labelsTr);
    * side by side: NAME.nii.gz and NAME_label.nii.gz (or _labels, _seg, _segmentation, _mask).

    Raises ValueError if there is none of them, if dataset.json is damaged, for a file with no partner or two, for
    NAME.nii beside NAME.nii.gz, and for a folder or a broken link of such a name; OSError if a folder cannot be
    read.
    """
    if not os.path.isdir(folder):
        found = "a file" if os.path.exists(folder) else "nothing"
        raise ValueError(f"expected a folder of images and label maps, received {found} at {quoted(folder)}")
    if os.path.lexists(folder / "dataset.json"):
        facts = Field.of_file(folder / "dataset.json")
        if "channel_names" in facts.object():
            return _nnunet(folder, facts)
        if "training" in facts.object():
            return _decathlon(folder, facts)
    images, labels = _first(folder, IMAGE_FOLDERS), _first(folder, LABEL_FOLDERS)
    if images is not None and labels is not None:
        scans = _paired(
            _files(images), _files(labels), "a label map of the same name", "an image of the same name"
        )
        if not scans:
            raise ValueError(f"{quoted(folder)}: expected .nii or .nii.gz files, received none")
        return TrainingSet(f"{images.name}/ and {labels.name}/", scans)
    files = _files(folder)
    if (images or labels) and not files:
        missing = "images (or imagesTr) beside labels" if images is None else "labels (or labelsTr) beside images"
        raise ValueError(f"{quoted(folder)}: expected a folder {missing}, received none")
    return _side_by_side(folder, files)


def unlabelled(paths: Sequence[Path], channels: int = 1) -> list[tuple[str, tuple[Path, ...]]]:
    """Names and files of images: each path is an image, or a folder of them.

    In a folder whose files are all called NAME_0000.nii.gz, NAME_0001.nii.gz, … as nnU-Net has them, those of one
    NAME are the channels of one image. Raises ValueError if there is none, if two have one name, or if channels
    are missing; OSError if a folder cannot be read.
    """
    found: dict[str, tuple[Path, ...]] = {}
    for path in paths:
        for name, image in _images(path, channels).items():
            if name in found:
                both = f"{quoted(found[name][0])} and {quoted(image[0])}"
                raise ValueError(
                    f"expected images of different names, received {quoted(name)} more than once: {both}"
                )
            found[name] = image
    return [*found.items()]


def _images(path: Path, channels: int) -> dict[str, tuple[Path, ...]]:
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise ValueError(f"expected a NIfTI file or a folder of them, received nothing at {quoted(path)}")
        return {stem(path): (path,)}
    files = _files(path)
    if not files:
        raise ValueError(f"{quoted(path)}: expected .nii or .nii.gz files, received none")
    if not all(re.search(r"_[0-9]{4}$", name) for name in files):
        return {name: (file,) for name, file in files.items()}
    images: dict[str, dict[str, Path]] = {}
    for name, file in files.items():
        images.setdefault(name[:-5], {})[name] = file
    for name, image in images.items():
        if [*image] != [f"{name}_{channel:04d}" for channel in range(channels)]:
            ends = "_0000" if channels == 1 else f"_0000 to _{channels - 1:04d}"
            raise ValueError(
                f"{quoted(next(iter(image.values())))}: expected {channels} channels ({ends}), received "
                f"{len(image)} files: {_listed(image.values())}. If each is an image of its own, pass the files "
                "themselves."
            )
    return {name: tuple(image.values()) for name, image in images.items()}


def _decathlon(folder: Path, facts: Field) -> TrainingSet:
    scans = []
    for item in facts.get("training").list():
        image, label = item.get("image"), folder / item.get("label").text()
        channels = image.list() if isinstance(image.value, list) else [image]
        if not channels:
            raise image.error("one or more")
        scans.append(Scan(stem(label), tuple(folder / channel.text() for channel in channels), label))
    scans.sort(key=lambda scan: scan.name)
    modalities = sorted(facts.get("modality", {}).by_number().items())
    return _checked(
        TrainingSet(
            "Decathlon",
            tuple(scans),
            _printable(facts.get("labels", {}).by_number()),
            tuple(name for _, name in modalities),
        ),
        facts,
    )


def _regions(labels: Field) -> dict[str, list[int]]:
    """The labels of each region; none where every label is one number."""
    named = {name: value for name, value in labels.object().items() if name not in ("background", "ignore")}
    if not any(isinstance(value.value, list) for value in named.values()):
        return {}
    return {
        name: [each.whole_number() for each in (value.list() if isinstance(value.value, list) else [value])]
        for name, value in named.items()
    }


def _nnunet(folder: Path, facts: Field) -> TrainingSet:
    """The layout of nnU-Net 2. Where some labels are lists, each is a region, and their numbers have no names."""
    channels, file_ending = facts.get("channel_names"), facts.get("file_ending", ".nii.gz")
    modalities = sorted(channels.by_number().items())
    if not modalities:
        raise channels.error("one or more")
    ending = file_ending.text()
    if not ending.lower().endswith(ENDINGS):
        raise file_ending.error(".nii.gz or .nii")
    labels = facts.get("labels", {})
    regions = _regions(labels)
    if regions:
        names = {label: str(label) for region in regions.values() for label in region}
        ignored = labels.get("ignore").whole_number() if "ignore" in labels.object() else None
    else:
        numbers = {name: value.whole_number() for name, value in labels.object().items()}
        names = labels.distinct(numbers)
        ignored = numbers.get("ignore")
    images, references = (_files(folder / name).values() for name in ("imagesTr", "labelsTr"))
    scans = []
    for label in references:
        if not label.name.endswith(ending):
            raise file_ending.error(f"that of {quoted(label)}")
        name = label.name.removesuffix(ending)
        image = tuple(folder / "imagesTr" / f"{name}_{c:04d}{ending}" for c in range(len(modalities)))
        scans.append(Scan(name, image, label))
    found = _checked(
        TrainingSet(
            "nnU-Net",
            tuple(scans),
            _printable({number: name for number, name in names.items() if number != ignored}),
            tuple(name for _, name in modalities),
            ignored,
            regions,
        ),
        facts,
    )
    unused = [*{*images} - {image for scan in scans for image in scan.image}]
    if unused:
        raise ValueError(
            f"{quoted(min(unused))}: expected a label map in labelsTr and a channel in dataset.json for each "
            f"image, received none for {_listed(unused)}. Move what is not to be trained on elsewhere."
        )
    return found


def _side_by_side(folder: Path, files: dict[str, Path]) -> TrainingSet:
    labels: dict[str, Path] = {}
    for name, path in files.items():
        image = next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), None)
        if image is not None and labels.setdefault(image, path) is not path:
            raise ValueError(
                f"{quoted(path)}: expected one label map for {quoted(image)}, received "
                f"{quoted(labels[image].name)} beside it. Move one of them elsewhere."
            )
    suffixes = f"NAME{SUFFIXES[0]}.nii.gz (or {', '.join(SUFFIXES[1:])})"
    if not labels:
        raise ValueError(
            f"{quoted(folder)}: expected a dataset.json (Decathlon or nnU-Net), folders images and labels, or "
            f"NAME.nii.gz beside {suffixes}, received {len(files)} NIfTI files and none so named"
        )
    images = {name: path for name, path in files.items() if path not in labels.values()}
    partners = f"a label map {suffixes} beside NAME.nii.gz", "an image NAME.nii.gz beside its label map"
    return TrainingSet("side by side", _paired(images, labels, *partners))


def _paired(images: dict[str, Path], labels: dict[str, Path], label: str, image: str) -> tuple[Scan, ...]:
    """The scans, sorted by name; `label` is what an image lacks that has none, `image` what a label map lacks."""
    without = {name: {**images, **labels}[name] for name in sorted(images.keys() ^ labels.keys())}
    for name, path in without.items():
        raise ValueError(
            f"{quoted(path)}: expected {label if name in images else image}, received none. "
            f"Rename or move elsewhere what has no partner: {_listed(without.values())}."
        )
    return tuple(Scan(name, (images[name],), labels[name]) for name in sorted(images))


def _checked(found: TrainingSet, facts: Field) -> TrainingSet:
    if not found.scans:
        raise ValueError(f"{quoted(facts.file)}: expected scans to train on, received none")
    files = [path for scan in found.scans for path in (*scan.image, scan.label)]
    missing = [path for path in files if not os.path.isfile(path)]
    if missing:
        raise ValueError(
            f"{quoted(facts.file)}: expected the file {quoted(missing[0])}, received nothing "
            f"({len(missing)} missing in all)"
        )
    names = [scan.name for scan in found.scans]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"{quoted(facts.file)}: expected label maps of different names, received {quoted(twice[0])} "
            "more than once"
        )
    return found


def _printable(names: dict[int, str]) -> dict[int, str]:
    """They go into tables and files."""
    return {number: printable(name) for number, name in names.items()}


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if os.path.isdir(folder / name)), None)


def _files(folder: Path) -> dict[str, Path]:
    """The NIfTI files of a folder by name, and nothing else that is called so."""
    if not os.path.isdir(folder):
        raise ValueError(f"expected the folder {quoted(folder)}, received nothing")
    files = nifti_files(folder)
    for path in files.values():
        found = in_place_of_a_file(path)
        if found is not None:
            raise ValueError(f"{quoted(path)}: expected a NIfTI file, received {found}. Move it elsewhere.")
    return files


def _listed(paths: Collection[Path]) -> str:
    names = [quoted(path.name) for path in sorted(paths)]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{', '.join(names[:LISTED])}{more}"
