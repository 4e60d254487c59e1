"""Functions of scikit-learn and nnU-Net that score label maps: how they are called, and what they claim.

They take the reference first, and it flattened or as a file, which `subject_of` makes of a volume's label maps.
Neither library is imported but to call its functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from torch import Tensor

from voxloss_data.files import save_nifti
from voxloss_verify.oracle.claims import Claims, Family

_FAMILIES: dict[str, Family] = {
    "jaccard_score": "iou_metric",
    "f1_score": "dice_metric",
    "compute_metrics": "dice_metric",
}


@dataclass(frozen=True)
class Flattened:
    """A function of scikit-learn, which takes (reference, prediction) of one axis."""

    function: Callable[..., Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, prediction: Tensor, reference: Tensor) -> Any:
        """Call the function with all voxels of the batch."""
        return self.function(reference.flatten().numpy(), prediction.flatten().numpy(), **self.kwargs)


@dataclass(frozen=True)
class OfFiles:
    """nnU-Net's `compute_metrics`, which takes the files of two label maps and what reads them."""

    function: Callable[..., Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, prediction: Tensor, reference: Tensor) -> dict[str, list[list[float]]]:
        """Write each sample as NIfTI, and return Dice and IoU as `[B, C]`."""
        from nnunetv2.imageio.nibabel_reader_writer import NibabelIO

        found: dict[str, list[list[float]]] = {"Dice": [], "IoU": []}
        with TemporaryDirectory() as folder:
            files = [str(Path(folder) / f"{name}.nii") for name in ("reference", "prediction")]
            for images in zip(reference, prediction, strict=True):
                for file, image in zip(files, images, strict=True):
                    # The axes in the order in which it has them after reading.
                    labels = image[0].numpy().astype(np.int16).transpose()
                    save_nifti(Path(file), labels, np.eye(4))
                by_class = self.function(*files, NibabelIO(), **self.kwargs)["metrics"]
                for name, rows in found.items():
                    rows.append([float(scores[name]) for scores in by_class.values()])
        return found


def adapted(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> Flattened | OfFiles | None:
    """What calls a function of a known library with (prediction, reference); None for any other function."""
    library = _library(function)
    if library == "sklearn":
        return Flattened(function, kwargs)
    return OfFiles(function, kwargs) if (library, _name(function)) == ("nnunetv2", "compute_metrics") else None


def claims_of_function(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> Claims | None:
    """What a function of a known library claims with these arguments; None for any other function.

    Raises ValueError for arguments that cannot be declared.
    """
    if _name(function) not in _FAMILIES or _library(function) not in ("sklearn", "nnunetv2"):
        return None
    return (_sklearn if _library(function) == "sklearn" else _nnunet)(_FAMILIES[_name(function)], kwargs)


def _library(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__module__", "")).partition(".")[0]


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", ""))


def _sklearn(family: Family, kwargs: Mapping[str, Any]) -> Claims:
    unknown = sorted({*kwargs} - {"average", "labels", "zero_division"})
    if unknown:
        raise ValueError(f"properties cannot be read from {', '.join(unknown)}: give them.")
    average = kwargs.get("average", "binary")
    if average not in ("binary", "macro", None):
        raise ValueError(
            f"properties cannot be read from average={average!r}: expected 'binary', 'macro' or None."
        )
    claims: dict[str, Any] = {"family": family, "empty": _empty(kwargs.get("zero_division", "warn")), **_MAPS}
    if average == "binary":
        return Claims(**claims, channels=2, include_background=False)
    if kwargs.get("labels") is not None:
        claims |= _of_labels("labels", kwargs["labels"])
    elif average == "macro":
        claims["empty"] = "nan"  # the labels are those that are in one of the images
    else:
        raise ValueError(
            "properties cannot be read from average=None without labels, whose scores depend on the images."
        )
    if average is None:
        claims |= {"reduction": "none", "unreduced": "C"}
    return Claims(**claims, mean_without_nan="over all")


def _empty(zero_division: Any) -> Literal["perfect", "worst", "nan"]:
    if zero_division == "warn":
        return "worst"
    if math.isnan(zero_division):
        return "nan"
    return "perfect" if zero_division else "worst"


# Of all voxels of the batch.
_MAPS: dict[str, Any] = {"labels": "map", "activation": "softmax", "batch": True}


def _nnunet(family: Family, kwargs: Mapping[str, Any]) -> Claims:
    of_labels = _of_labels("labels_or_regions", kwargs.get("labels_or_regions"))
    claims: dict[str, Any] = {**_MAPS, "batch": False, "reduction": "none", "empty": "nan", **of_labels}
    return Claims(family=family, ignore_index=kwargs.get("ignore_label"), **claims)


def _of_labels(name: str, labels: Any) -> dict[str, Any]:
    """The claims of the classes that have a score each."""
    if not isinstance(labels, Sequence) or not labels or not all(isinstance(c, int) and c >= 0 for c in labels):
        raise ValueError(
            f"properties cannot be read from {name}: expected numbers of classes, as [0, 1, 2], received "
            f"{labels!r}."
        )
    return {"channels": max(2, *(c + 1 for c in labels)), "classes": tuple(labels)}
