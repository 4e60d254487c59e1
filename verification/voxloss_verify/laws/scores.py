"""Laws 40–48, of metrics: Dice and IoU of hard label maps are ratios of whole numbers of voxels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from hypothesis.strategies import SearchStrategy

from voxloss_verify.laws.law import METRIC_LAWS, close, is_true, law
from voxloss_verify.laws.record import Finding
from voxloss_verify.laws.setting import Setting
from voxloss_verify.oracle import hard
from voxloss_verify.oracle.claims import Claims
from voxloss_verify.oracle.generated import volumes
from voxloss_verify.oracle.sums import Image
from voxloss_verify.oracle.volumes import Volume, certain, one_hot, target_for
from voxloss_verify.request import Level
from voxloss_verify.subject.metric import Metric
from voxloss_verify.subject.subject import Outcome, Raised, Subject


def _drawn(claims: Claims) -> SearchStrategy[Volume]:
    return volumes(claims, prediction="hard", dtypes=("float64",), ignored=True)


def _equals(what: str, found: Outcome, wanted: Image) -> Finding:
    return close(what, found.value, wanted, hard.TOLERANCE[found.dtype], found.dtype)


@law(
    "40",
    "the score from counts",
    level=Level.formula,
    because="the declared ratio of whole numbers",
    oracle="TP, P and G as whole numbers, the score as a fraction",
    tolerance="rounding of the returned dtype",
    strategy=_drawn,
    entered=METRIC_LAWS,
)
def score(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Dice = 2 TP / (P + G), IoU = TP / (P + G − TP), Generalized Dice = 2 Σ w TP / Σ w (P + G)."""
    yield _equals("score", subject.value(volume), hard.value(subject.claims, volume))


@law(
    "41",
    "empty prediction, empty reference",
    level=Level.formula,
    because="what is declared where the formula has 0 in its denominator, or the reference is empty",
    oracle="the policy that is declared",
    tolerance="rounding of the returned dtype",
    given=lambda subject, setting: _empties(subject.claims),
    entered=METRIC_LAWS,
)
def empties(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """A class in neither image, in the prediction only, in the reference only."""
    yield _equals("score", subject.value(volume), hard.value(subject.claims, volume))


def _empties(claims: Claims) -> Iterator[Volume]:
    channels = claims.fixed_channels or max(3, claims.named_channels)
    last = channels - 1
    shape = (1, 1, *[2] * claims.spatial_dims)
    for in_prediction, in_reference in product((False, True), repeat=2):
        labels = []
        for present, at in ((in_prediction, 0), (in_reference, -1)):
            image = np.zeros(shape, np.int64)
            if present:
                image.flat[at] = last
            labels.append(image)
        where = {(False, False): "neither image", (True, False): "the prediction only"}
        where |= {(False, True): "the reference only", (True, True): "both images, nowhere at once"}
        yield _volume(claims, f"a class in {where[in_prediction, in_reference]}", labels[0], labels[1], channels)


def _volume(claims: Claims, name: str, prediction: Image, reference: Image, channels: int) -> Volume:
    input = certain(claims, one_hot(prediction, channels))
    return Volume(name, input.astype(np.float64), target_for(claims, reference, channels))


@law(
    "42",
    "symmetry",
    level=Level.formula,
    because="prediction and reference have the same place in the ratio",
    oracle="the score with prediction and reference swapped",
    tolerance="rounding of the returned dtype",
    domain=lambda subject, setting: (
        "its weights are those of the reference"
        if subject.claims.family == "generalized_dice_metric"
        else "a class without reference is treated apart"
        if subject.claims.absent != "count"
        else "the ignored label is one of the reference"
        if subject.claims.ignore_index is not None
        else None
    ),
    strategy=_drawn,
    entered=METRIC_LAWS,
)
def symmetry(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Swapping prediction and reference does not change the score."""
    assert isinstance(subject, Metric)
    prediction, reference = subject.tensors(volume)
    swapped = subject.scores(reference, prediction)
    yield _equals("score, swapped", swapped, subject.value(volume).value)


@law(
    "43",
    "the order of voxels and classes",
    level=Level.formula,
    because="a count does not depend on the order of what is counted",
    oracle="the score of the original",
    tolerance="rounding of the returned dtype",
    strategy=_drawn,
    entered=METRIC_LAWS,
)
def order(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Flips do not change the score; permuted classes have permuted scores."""
    first = subject.value(volume)
    for axis in range(2, volume.input.ndim):
        moved = volume.changed(input=np.flip(volume.input, axis), target=np.flip(volume.target, axis))
        yield replace(
            _equals(f"score, flipped along axis {axis}", subject.value(moved), first.value), volume=moved
        )
    claims = subject.claims
    counting = [c for c in claims.counting(volume.channels) if c != claims.ignore_index]
    if len(counting) < 2:
        return
    swap = list(range(volume.channels))
    swap[counting[0]], swap[counting[1]] = counting[1], counting[0]
    if volume.is_one_hot:
        target = volume.target[:, swap]
    else:
        target = volume.target.copy()
        for old, new in ((counting[0], counting[1]), (counting[1], counting[0])):
            target[volume.target == old] = new
    moved = volume.changed(input=volume.input[:, swap], target=target)
    finding = _equals("score, two classes swapped", subject.value(moved), hard.value(claims, moved))
    yield replace(finding, volume=moved)


@law(
    "44",
    "calls add up",
    level=Level.numerics,
    because="how the parts of a data set are added up is the implementation's",
    oracle="the score of all samples in one batch",
    tolerance="rounding of the returned dtype",
    domain=lambda subject, setting: None if hasattr(subject.loss, "reset") else "a function has no memory",
    strategy=lambda claims: volumes(claims, prediction="hard", dtypes=("float64",), samples=3).filter(
        lambda volume: len(volume.input) > 1
    ),
    entered=METRIC_LAWS,
)
def calls(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """One sample per call, or all in one, give the same score; reset() discards all samples."""
    assert isinstance(subject, Metric)
    prediction, reference = subject.tensors(volume)
    parts = [(prediction[at : at + 1], reference[at : at + 1]) for at in range(len(prediction))]
    whole = subject.value(volume)
    yield _equals("score, one sample per call", subject.scores(*parts[0], *parts[1:]), whole.value)
    yield _equals("score, after a reset", subject.value(volume), whole.value)


def _large(subject: Subject, setting: Setting) -> Iterator[Volume]:
    """More voxels than float32 counts one by one, in few different rows."""
    claims = subject.claims
    channels = claims.fixed_channels or max(2, claims.named_channels)
    edge = max(setting.profile.sizes)
    side = edge if edge > 256 else 257
    spatial = (
        (side,) * claims.spatial_dims
        if claims.spatial_dims == 3
        else (*[1] * (claims.spatial_dims - 1), 2**24 + 3)
    )
    labels = np.zeros((1, 1, *spatial), np.int8)
    labels[:, :, 1:] = channels - 1 if claims.spatial_dims == 3 else labels[:, :, 1:]
    prediction = labels.copy()
    prediction.flat[-1] = 0
    yield _volume(claims, f"{side}³ voxels, nearly all of one class", prediction, labels, channels)


@law(
    "45",
    "more than 2²⁴ voxels",
    level=Level.numerics,
    because="float32 does not count beyond 2²⁴, the formula does",
    oracle="TP, P and G as whole numbers",
    tolerance="rounding of the returned dtype",
    domain=lambda subject, setting: None if subject.claims.spatial_dims == 3 else "of volumes only",
    given=_large,
    entered=METRIC_LAWS,
)
def large(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """257³ voxels, of which one is wrong."""
    yield _equals("score", subject.value(volume), hard.value(subject.claims, volume))


@law(
    "46",
    "inputs are not changed",
    level=Level.numerics,
    because="a metric reads its arguments: only an implementation can write to them",
    oracle="copies of prediction and reference",
    tolerance="0",
    strategy=_drawn,
    entered=METRIC_LAWS,
)
def unchanged(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Prediction and reference are the same after the call."""
    assert isinstance(subject, Metric)
    prediction, reference = subject.tensors(volume)
    before = prediction.clone(), reference.clone()
    subject.scores(prediction, reference)
    same = torch.equal(prediction, before[0]) and torch.equal(reference, before[1])
    yield is_true("prediction and reference as before", same)


@law(
    "47",
    "bad labels are errors",
    level=Level.interface,
    because="valid input is not affected",
    oracle="an exception",
    tolerance="0",
    domain=lambda subject, setting: "masks have no labels" if subject.claims.labels == "one-hot" else None,
    given=lambda subject, setting: list(_empties(subject.claims))[-1:],
    entered=METRIC_LAWS,
)
def bad_labels(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """A label that is no class, in the prediction or in the reference."""
    assert isinstance(subject, Metric)
    for image in (0, 1):
        for label in (volume.channels, -1):
            if label == subject.claims.ignore_index:
                continue
            tensors = [tensor.clone() for tensor in subject.tensors(volume)]
            tensors[image].view(-1)[0] = label
            name = ("prediction", "reference")[image]
            yield is_true(f"an error for label {label} in the {name}", _raises(subject, *tensors))


@law(
    "48",
    "shapes that do not fit are errors",
    level=Level.interface,
    because="valid input is not affected",
    oracle="an exception",
    tolerance="0",
    given=lambda subject, setting: list(_empties(subject.claims))[-1:],
    entered=METRIC_LAWS,
)
def bad_shapes(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """A reference of another size."""
    assert isinstance(subject, Metric)
    prediction, reference = subject.tensors(volume)
    yield is_true("an error for a cropped reference", _raises(subject, prediction, reference[..., 1:]))


def _raises(subject: Metric, prediction: torch.Tensor, reference: torch.Tensor) -> bool:
    try:
        subject.scores(prediction, reference)
    except Raised:
        return True
    return False
