"""Volumes from outside: phantoms and a real MRI through their files, label maps of the user's, and large ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from voxloss_data import Phantom, SpherePhantom, brain_mri, write_phantoms
from voxloss_data.label_maps import LabelFile, find_pairs
from voxloss_verify.oracle.claims import Claims, Labels
from voxloss_verify.oracle.sums import Image, Sums, label_sums
from voxloss_verify.oracle.volumes import STORED, Volume, certain, from_probabilities, one_hot, target_for
from voxloss_verify.request import MAX_CLASSES


@dataclass(frozen=True, eq=False)
class LabelPair:
    """A prediction and its reference [X, Y, Z], with the classes 0 … `classes` − 1, and the affine to mm.

    `probabilities` [C, X, Y, Z], if there are any, are a soft prediction in the place of the hard one.
    """

    name: str
    prediction: Image
    reference: Image
    classes: int
    affine: NDArray[np.float64]
    probabilities: Image | None = None


def read_pairs(prediction: Path, reference: Path) -> list[LabelPair]:
    """Read a pair of NIfTI label maps, or two folders of them with the same names.

    The labels that occur become the classes 0, 1, 2, …, in their order. Raises ValueError that names the file.
    """
    pairs = []
    for case in find_pairs(prediction, reference):
        files = LabelFile(case.prediction), LabelFile(case.reference)
        files[0].require_grid_of(files[1])
        p, g = (file.labels() for file in files)
        known = np.unique(np.concatenate([np.unique(p), np.unique(g), [0]]))
        if len(known) > MAX_CLASSES:
            raise ValueError(
                f"{case.prediction}: expected a label map, and at most {MAX_CLASSES} labels in it and "
                f"{case.reference}, received {len(known)}, as in an image"
            )
        p, g = (np.searchsorted(known, labels).astype(np.int64) for labels in (p, g))
        affine = np.vstack([files[1].affine, [0, 0, 0, 1]])
        pairs.append(LabelPair(case.name, p, g, max(2, len(known)), affine))
    return pairs


@cache
def mri_pair() -> LabelPair:
    """The MNI152 brain, 2 mm: its tissue probabilities, one voxel off, against its labels."""
    files = brain_mri(2)
    labels: Any = nib.load(files.labels)
    soft: Any = nib.load(files.probabilities)
    reference = np.asarray(labels.dataobj).astype(np.int64)
    p = np.roll(np.moveaxis(np.asarray(soft.dataobj, np.float32), -1, 0), 1, axis=1)
    return LabelPair("MNI152 brain", p.argmax(0), reference, len(p), np.asarray(labels.affine), p)


def volume_of(claims: Claims, pair: LabelPair, dtype: str) -> Volume | None:
    """The pair as a loss is given it; None if it has another number of channels than the loss takes."""
    channels = pair.classes
    if claims.fixed_channels is not None:
        if channels > max(2, claims.fixed_channels):
            return None
        channels = claims.fixed_channels
    if claims.named_channels > channels:
        return None
    return _volume_of(pair, claims.activation, _drawn(claims), channels, claims.spatial_dims, dtype)


@cache
def _volume_of(
    pair: LabelPair, activation: Any, labels: Any, channels: int, spatial_dims: Any, dtype: str
) -> Volume:
    # Shared like `_cube`, and for the same reason; of the claims only what shapes the tensors.
    claims = Claims(family="dice", activation=activation, labels=labels, spatial_dims=spatial_dims)
    spatial = _spatial(claims, pair.reference.shape)
    wanted = pair.reference.reshape(1, 1, *spatial)
    if pair.probabilities is None:
        hard = one_hot(pair.prediction.reshape(1, 1, *spatial), channels)
        input = certain(claims, hard).astype(STORED[dtype])
    else:
        p = np.zeros((1, max(2, channels), *spatial), np.float32)
        p[:, : pair.classes] = pair.probabilities.reshape(1, pair.classes, *spatial)
        p = p[:, -channels:]
        input = rounded(from_probabilities(claims, p, dtype), dtype)
    return Volume(pair.name, input, target_for(claims, wanted, channels), dtype, pair.affine)


def rounded(values: Image, dtype: str) -> Image:
    """Values that `dtype` holds; those of bfloat16 are float32 with its last 16 bits 0."""
    values = values.astype(STORED[dtype])
    if dtype == "bfloat16":
        values = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return values


def phantom_volumes(claims: Claims, phantoms: Sequence[Phantom | SpherePhantom], dtype: str) -> Iterator[Volume]:
    """Phantoms as their NIfTI files hold them, with the sums of their closed forms; spheres are counted."""
    with tempfile.TemporaryDirectory() as folder:
        *paths, _ = write_phantoms(folder, phantoms)
        for phantom, *files in zip(phantoms, paths[::2], paths[1::2], strict=True):
            yield phantom_volume(claims, phantom, dtype, files)


def phantom_volume(
    claims: Claims,
    phantom: Phantom | SpherePhantom,
    dtype: str,
    files: Sequence[Path] = (),
) -> Volume:
    """A phantom as class 1, all else as class 0, from its `files` if there are any; the others empty.

    Of one channel that is class 1.
    """
    p, g, affine = phantom.prediction, phantom.reference, phantom.affine
    if files:
        images: list[Any] = [nib.load(path) for path in files]
        p, g = (np.asarray(image.dataobj) for image in images)
        affine = images[0].affine
    channels = claims.fixed_channels or max(2, claims.named_channels)
    p = p.astype(np.float64)
    shares = np.stack([1 - p, p, *[np.zeros_like(p)] * (channels - 2)])[-channels:]
    spatial = _spatial(claims, g.shape)
    input = from_probabilities(claims, shares.reshape(1, channels, *spatial), dtype)
    labels = g.astype(np.int64).reshape(1, 1, *spatial)
    if isinstance(phantom, Phantom):
        sums = closed_form_sums(phantom)
        nothing = Sums(*[0 * sums[0].target] * 6)
        rows = [[*sums, *[nothing] * (channels - 2)][-channels:]]
    else:
        rows = [label_sums(p.astype(np.int64), g, max(2, channels))[-channels:]]
    return Volume(phantom.name, input, target_for(claims, labels, channels), dtype, affine, rows)


def closed_form_sums(phantom: Phantom) -> list[Sums]:
    """Of background 1 − p, 1 − g and foreground p, g; as g is 0 or 1, min(p, g) = p·g and g² = g."""
    a, p, p2, q = (
        phantom.intersection,
        phantom.prediction_sum,
        phantom.prediction_squared_sum,
        phantom.target_sum,
    )
    n = phantom.reference.size
    outside = n - p - q + a
    return [
        Sums(outside, outside, n - p, n - 2 * p + p2, n - q, n - q),
        Sums(a, a, p, p2, q, q),
    ]


def _drawn(claims: Claims) -> Labels:
    """The form of a target before it becomes what the loss is given."""
    return "one-hot" if claims.has_channels else claims.labels


def cube(claims: Claims, edge: int, dtype: str, seed: int) -> Volume:
    """A cube of `edge`³ voxels (in fewer axes: as many), rare classes, logits that favour the ground truth."""
    return _cube(
        claims.activation,
        _drawn(claims),
        claims.soft_labels,
        claims.fixed_channels or max(2, claims.named_channels),
        _spatial(claims, (edge,) * 3),
        dtype,
        seed,
    )


@cache
def _cube(
    activation: str, labels: str, soft: bool, channels: int, spatial: tuple[int, ...], dtype: str, seed: int
) -> Volume:
    # Shared by all losses that are tried in one run: the exact sums of a large volume cost seconds.
    generator = np.random.default_rng([seed, *spatial])
    classes = max(2, channels)
    shares = np.full(classes, 0.01)
    shares[0] = 1 - 0.01 * (classes - 1)
    wanted = generator.choice(classes, size=(1, 1, *spatial), p=shares)
    x = generator.standard_normal((1, channels, *spatial), np.float32)
    mask = one_hot(wanted, channels)
    input: Image
    if activation == "none":
        input = np.clip(np.abs(x) / 8 + mask * np.float32(0.5), 0, 1)
    else:
        input = 2 * x + 3 * mask.astype(np.float32)
    target: Image = mask if labels == "one-hot" else wanted
    if soft and labels == "one-hot":
        values: Image = np.abs(target - generator.random(target.shape, np.float32) / 4)
        if activation == "softmax":
            values = values / values.sum(1, keepdims=True)
        target = rounded(values, dtype)
    edges = "x".join(map(str, spatial))
    return Volume(f"random {edges}", rounded(input, dtype), target, dtype)


def _spatial(claims: Claims, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Three axes as the loss takes them; sums over voxels do not change by joining the last ones."""
    axes = claims.spatial_dims
    return (*shape[: axes - 1], int(np.prod(shape[axes - 1 :])))
