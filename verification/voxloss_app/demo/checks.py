"""The value of every loss that voxloss ships, against the oracle, on phantoms and on the demo's own volume.

To have a new loss checked, enter it in `OPTIONS` and in `subject/readers.py`; until then it counts as failed.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import nn

import voxloss
from voxloss.losses import overlap
from voxloss_data import Phantom, all_phantoms, write_phantoms
from voxloss_verify.laws.sources import closed_form_sums
from voxloss_verify.oracle import exact
from voxloss_verify.oracle.sums import Image, Sums, label_sums, sums
from voxloss_verify.oracle.volumes import CERTAIN, Volume
from voxloss_verify.subject.readers import claims_of
from voxloss_verify.tolerances import LOSS

DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Case:
    """A prediction and a target, and their sums per class, background first.

    `input` [C, X, Y, Z] holds probabilities, or logits where `softmax`; `target` [1, X, Y, Z] labels, or
    [C, X, Y, Z] probabilities.
    """

    name: str
    input: Image
    target: Image
    sums: Sequence[Sums]
    softmax: bool = False


@dataclass(frozen=True)
class Record:
    """One loss on one case. `got` is None, and `note` says why, if there is no value to compare."""

    loss: str
    options: str
    case: str
    dtype: str
    expected: float | None
    got: float | None
    tolerance: float
    note: str = ""

    @property
    def error(self) -> float:
        """|got − expected|; infinite if one of them is missing."""
        if self.got is None or self.expected is None:
            return float("inf")
        return abs(self.got - self.expected)

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance; False for NaN."""
        return self.error <= self.tolerance


_EXACT = {"smooth_nr": 0.0, "smooth_dr": 0.0}
_UNEQUAL = {"smooth_nr": 0.5, "smooth_dr": 2.0}
_COMMON: list[dict[str, Any]] = [{}, _EXACT, _UNEQUAL, {"soft_label": True}]
_SQUARED = {"squared_pred": True}

# The arguments to check each loss with, beside its form of input and target.
OPTIONS: dict[str, Sequence[Mapping[str, Any]]] = {
    "DiceLoss": [*_COMMON, _SQUARED, {"jaccard": True}, {"jaccard": True, "squared_pred": True}],
    "JaccardLoss": [*_COMMON, _SQUARED],
    "TverskyLoss": [*_COMMON, {"alpha": 0.3, "beta": 0.7}],
    "LogCoshDiceLoss": [*_COMMON, _SQUARED],
    "AsymmetricSimilarityLoss": [*_COMMON, {"f_beta": 3.0}],
    "FocalTverskyLoss": [*_COMMON, {"gamma": 1.0}, {"gamma": 2.0}],
    "GeneralizedDiceLoss": [
        *_COMMON,
        {"w_type": "simple"},
        {"w_type": "uniform"},
        {**_EXACT, "w_type": "simple"},
    ],
    "CrossEntropyLoss": [{}, {"label_smoothing": 0.1}, {"weight": 0.5}],
    "FocalLoss": [{}, {"gamma": 0.5, "alpha": 0.25}, {"use_softmax": True}, {"use_softmax": True, "gamma": 1.0}],
    "DiceCELoss": [{}, {**_UNEQUAL, "lambda_dice": 0.5, "lambda_ce": 2.0}, {"label_smoothing": 0.1}],
    "DiceFocalLoss": [{}, {"gamma": 0.5, "lambda_focal": 0.5}],
    "GeneralizedDiceFocalLoss": [{}, {"w_type": "simple", "lambda_gdl": 2.0}],
    "TverskyCELoss": [{}, {"alpha": 0.3, "beta": 0.7, "lambda_tversky": 2.0}],
    "FocalTverskyCELoss": [{}, {"gamma": 2.0, "label_smoothing": 0.1}],
    "PenaltyGeneralizedDiceLoss": [{}, {"k": 0.0, "w_type": "simple"}],
    "MCCLoss": [{}, {"smooth_nr": 1.0, "smooth_dr": 2.0}],
    "SensitivitySpecificityLoss": [{}, {"r": 0.5}],
    "ComboLoss": [{}, {"alpha": 0.2, "beta": 0.7}],
    "ExponentialLogarithmicLoss": [{}, {"gamma_dice": 1.0, "gamma_ce": 0.5}],
    "UnifiedFocalLoss": [{}, {"delta": 0.7, "gamma": 0.25, "asymmetric": False}],
}


def shipped_losses() -> list[type[nn.Module]]:
    """Every loss class that voxloss defines and offers, each once, by name."""
    offered = {**vars(overlap), **vars(voxloss)}.values()
    losses = {
        item
        for item in offered
        if inspect.isclass(item)
        and issubclass(item, nn.Module)
        and item.__module__.startswith("voxloss.")
        and not inspect.isabstract(item)
    }
    return sorted(losses, key=lambda loss: loss.__name__)


def phantom_cases() -> list[Case]:
    """Every phantom as its NIfTI files hold it, with the sums of its closed form; spheres are counted."""
    phantoms = all_phantoms()
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        *paths, _ = write_phantoms(folder, phantoms)
        for phantom, *files in zip(phantoms, paths[::2], paths[1::2], strict=True):
            prediction, reference = map(_read, files)
            if isinstance(phantom, Phantom):
                sums = closed_form_sums(phantom)
            else:
                sums = label_sums(prediction, reference, 2)
            p = prediction.astype(np.float32)
            cases.append(Case(phantom.name, np.stack([1 - p, p]), reference[None], sums))
    return cases


def volume_cases(prediction: Image, labels: Image, probabilities: Image) -> list[Case]:
    """A predicted label map against the labels, and soft values as prediction, as target and as both.

    `prediction` and `labels` are [X, Y, Z] with the classes 0 … C − 1, `probabilities` [C, X, Y, Z] in [0, 1].
    """
    channels = np.arange(len(probabilities))[:, None, None, None]
    predicted, wanted = ((image[None] == channels).astype(np.uint8) for image in (prediction, labels))

    def case(name: str, p: Image, g: Image, input: Image, target: Image, softmax: bool = False) -> Case:
        return Case(name, input, target, [sums(*pair) for pair in zip(p, g, strict=True)], softmax)

    soft, hard = probabilities, predicted.astype(np.float32)
    label_map = labels[None]
    return [
        case("predicted labels vs labels", predicted, wanted, CERTAIN * hard, label_map, softmax=True),
        case("probabilities vs labels", soft, wanted, soft, label_map),
        case("predicted labels vs probabilities", hard, soft, hard, soft),
        case("probabilities vs themselves", soft, soft, soft, soft),
    ]


def check_losses(
    cases: Iterable[Case], losses: Sequence[type[nn.Module]] | None = None, device: str | torch.device = "cpu"
) -> Iterator[Record]:
    """Compare each of `losses` (None: all that voxloss ships) with its oracle, with and without background.

    A class is looked up in `OPTIONS` by its name or that of a base class; one that is not there gets a record
    that does not hold, and so does a loss that raises.
    """
    losses = shipped_losses() if losses is None else losses
    for loss in losses:
        if _options(loss) is None:
            note = "no options in voxloss_app.demo.checks.OPTIONS"
            yield Record(loss.__name__, "", "all", "", None, None, 0.0, note)
    for case, dtype in product(cases, DTYPES):
        input = torch.from_numpy(case.input)[None].to(device, dtype)
        target = torch.from_numpy(case.target)[None].to(device)
        for loss in losses:
            if _options(loss) is not None:
                yield from _check(loss, case, input, target)


def _options(loss: type[nn.Module]) -> Sequence[Mapping[str, Any]] | None:
    return next((OPTIONS[kind.__name__] for kind in loss.__mro__ if kind.__name__ in OPTIONS), None)


def _check(loss: type[nn.Module], case: Case, input: torch.Tensor, target: torch.Tensor) -> Iterator[Record]:
    dtype = str(input.dtype).removeprefix("torch.")
    form = {"softmax": case.softmax, "to_onehot_y": target.shape[1] == 1}
    if "use_softmax" in inspect.signature(loss).parameters:
        if not case.softmax:
            return  # it takes logits only
        form.pop("softmax")
    labels = case.target.astype(np.int64) if form["to_onehot_y"] else case.target.astype(np.float64)
    volume = Volume(case.name, case.input[None], labels[None], dtype, sums=[case.sums])
    for options, background in product(_options(loss) or (), (True, False)):
        expected, got, tolerance, note = None, None, LOSS[dtype], ""
        try:
            made = loss(include_background=background, **form, **options)
            claims = claims_of(made, {"include_background": background, **options})
            if claims is None:
                raise TypeError("voxloss_verify.subject.readers does not know it")
            wanted = exact.expected(claims, volume)
            expected, tolerance = float(wanted.value), wanted.tolerance
            got = float(made(input, target))
        except Exception as error:  # any loss may be given, and the others are still to be checked
            note = f"{type(error).__name__}: {error}"
        shown = options if background else {"include_background": False, **options}
        yield Record(loss.__name__, _named(shown), case.name, dtype, expected, got, tolerance, note)


def _named(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in options.items())


def _read(path: Path) -> Image:
    image: Any = nib.load(path)
    return np.asanyarray(image.dataobj)
