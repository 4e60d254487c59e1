"""Where the suite's volumes come from: drawn, phantoms, files, large ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings

from voxloss_data import ramp, spheres
from voxloss_data.files import save_nifti
from voxloss_verify.laws.sources import (
    LabelPair,
    cube,
    mri_pair,
    phantom_volume,
    phantom_volumes,
    read_pairs,
    volume_of,
)
from voxloss_verify.oracle import exact
from voxloss_verify.oracle.claims import Claims
from voxloss_verify.oracle.generated import volumes
from voxloss_verify.oracle.sums import dice, sums
from voxloss_verify.oracle.volumes import CERTAIN, Volume, certain, from_probabilities, one_hot

SOFTMAX = Claims(family="dice", activation="softmax", labels="map")
PLAIN = Claims(family="dice", soft_labels=True)
IGNORING = Claims(family="dice", activation="softmax", labels="map", ignore_index=255)
ONLY_FIND = settings(
    max_examples=2000,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

Property = Callable[[Volume], Any]


@pytest.mark.parametrize(
    ("claims", "wanted"),
    [
        (SOFTMAX, lambda v: not v.target.any() and v.target.size > 2),
        (SOFTMAX, lambda v: v.target.all() and len(np.unique(v.target)) == 1 and v.target.size > 2),
        (SOFTMAX, lambda v: (v.target != 0).sum() == 1 and v.target.size > 8),
        (SOFTMAX, lambda v: v.channels == 4 and len(np.unique(v.target)) == 3),
        (SOFTMAX, lambda v: abs(v.input).max() > 8000),
        (SOFTMAX, lambda v: (v.input == certain(SOFTMAX, one_hot(v.target, v.channels))).all()),
        (SOFTMAX, lambda v: v.dtype == "float64"),
        (SOFTMAX, lambda v: len(v.input) == 2),
        (IGNORING, lambda v: (v.target == 255).any() and (v.target != 255).any()),
        (IGNORING, lambda v: (v.target == 255).all()),
        (PLAIN, lambda v: v.target.dtype.kind == "f" and ((v.target > 0) & (v.target < 1)).any()),
        (PLAIN, lambda v: v.target.dtype == bool and (v.target.sum(1) > 1).any()),
        (PLAIN, lambda v: v.channels == 1),
        (PLAIN, lambda v: len(np.unique(v.input)) == 1 and v.input.size > 8),
    ],
    ids=[
        *("empty", "full", "single voxel", "absent class", "extreme logits", "perfect", "float64", "two samples"),
        *("some ignored", "all ignored", "soft target", "overlapping classes", "one channel", "constant"),
    ],
)
def test_the_cases_on_purpose_are_drawn(claims: Claims, wanted: Property) -> None:
    find(volumes(claims), lambda volume: bool(wanted(volume)), settings=ONLY_FIND)


ALL = ("float64", "float32", "float16", "bfloat16")


@pytest.mark.parametrize(
    "claims",
    [SOFTMAX, PLAIN, IGNORING, Claims(family="dice", activation="sigmoid", soft_labels=True, spatial_dims=2)],
    ids=["softmax", "probabilities", "ignoring", "sigmoid"],
)
def test_drawn_volumes_are_what_the_claims_allow(claims: Claims) -> None:
    @settings(max_examples=200, database=None, suppress_health_check=list(HealthCheck), deadline=None)
    @hypothesis.seed(3)
    @given(volumes(claims, dtypes=ALL))
    def check(volume: Volume) -> None:
        assert volume.input.ndim == claims.spatial_dims + 2
        assert volume.input.shape[2:] == volume.target.shape[2:]
        # What the loss is given is what the oracle sums.
        for array in (volume.input, volume.target):
            if array.dtype.kind == "f":
                kept = torch.from_numpy(array).to(getattr(torch, volume.dtype)).double().numpy()
                assert (kept == array.astype(np.float64)).all()
        if volume.is_one_hot:
            assert volume.target.min() >= 0
            assert volume.target.max() <= 1
        else:
            assert set(np.unique(volume.target)) <= {*range(volume.channels), claims.ignore_index}
        if claims.activation == "none":
            assert volume.input.min() >= 0
            assert volume.input.max() <= 1

    check()


NAMED: dict[str, Property] = {
    "labels: empty,": lambda v: not (v.target if not v.is_one_hot else v.target[:, 1:]).any(),
    "labels: full,": lambda v: len(np.unique(v.target)) == 1,
    "labels: random with ignored voxels,": lambda v: (v.target == 2).any(),
    "prediction: extreme": lambda v: set(np.unique(abs(v.input))) <= {0, 88, 8192},
    "prediction: constant": lambda v: len(np.unique(v.input)) == 1,
    "prediction: hard": lambda v: set(np.unique(v.input)) <= {0, CERTAIN},
}


@pytest.mark.parametrize("draws", NAMED)
def test_the_name_of_a_volume_tells_its_draws(draws: str) -> None:
    claims = Claims(family="dice", activation="softmax", labels="map", channels=3)
    claims = replace(claims, ignore_index=2) if "ignored" in draws else claims
    found = find(
        volumes(claims), lambda volume: draws in volume.name and volume.input.size > 24, settings=ONLY_FIND
    )
    assert NAMED[draws](found)


@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
def test_certain_inputs_are_hard_predictions(activation: Any) -> None:
    claims = Claims(family="dice", activation=activation)
    masks = one_hot(np.array([0, 1, 2, 1]).reshape(1, 1, 4), 3)
    p = exact.probabilities(certain(claims, masks).astype(np.float16), activation)
    assert (p == masks).all()


@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
def test_probabilities_come_back(activation: Any) -> None:
    claims = Claims(family="dice", activation=activation)
    p = np.array([[0.25, 1.0, 0.0], [0.75, 0.0, 1.0]]).reshape(1, 2, 3)
    found = exact.probabilities(from_probabilities(claims, p, "float64"), activation)
    assert abs(found - p).max() < 1e-15


@pytest.mark.parametrize("phantom", [ramp(), spheres(radius_mm=4.0, distance_mm=3.0)], ids=["ramp", "spheres"])
def test_phantoms_have_the_sums_of_their_arrays(phantom: Any) -> None:
    claims = Claims(family="dice", channels=3)
    (through_files,) = phantom_volumes(claims, [phantom], "float64")
    for volume in (through_files, phantom_volume(claims, phantom, "float64")):
        assert volume.sums is not None
        for channel in range(3):
            counted = sums(volume.input[0, channel], volume.target[0, channel].astype(np.float64))
            for name, found in vars(counted).items():
                assert found == pytest.approx(getattr(volume.sums[0][channel], name), rel=1e-15), name
        assert np.allclose(volume.affine, phantom.affine)


def test_label_maps_of_the_user(tmp_path: Path) -> None:
    affine = np.diag([0.5, 0.5, 2.0, 1.0])
    reference = np.zeros((4, 3, 2), np.uint8)
    reference[0], reference[1] = 7, 117
    prediction = np.roll(reference, 1, 0)
    for folder, labels in (("p", prediction), ("g", reference)):
        (tmp_path / folder).mkdir()
        for name in ("a.nii.gz", "b.nii.gz"):
            save_nifti(tmp_path / folder / name, labels, affine)
    pairs = read_pairs(tmp_path / "p", tmp_path / "g")
    assert [(pair.name, pair.classes) for pair in pairs] == [("a.nii.gz", 3), ("b.nii.gz", 3)]
    volume = volume_of(SOFTMAX, pairs[0], "float32")
    assert volume is not None
    assert np.unique(volume.target).tolist() == [0, 1, 2]
    rows = exact.region_sums(SOFTMAX, volume)[0]
    counts = [(int(s.intersection), int(s.prediction), int(s.target)) for s in rows]
    assert counts == [(6, 12, 12), (0, 6, 6), (0, 6, 6)]
    assert (volume.affine == affine).all()
    assert volume_of(Claims(family="dice", channels=2), pairs[0], "float32") is None
    flat = volume_of(Claims(family="dice", spatial_dims=2), pairs[0], "float32")
    assert flat is not None
    assert flat.input.shape == (1, 3, 4, 6)
    with pytest.raises(ValueError, match="expected two files or two folders"):
        read_pairs(tmp_path / "p", tmp_path / "nowhere")


def test_the_mri_has_soft_predictions_of_its_labels(tmp_path: Path) -> None:
    pair = mri_pair()
    assert pair.classes == 4
    assert pair.probabilities is not None
    volume = volume_of(PLAIN, pair, "float16")
    assert volume is not None
    found = [float(dice(s)) for s in exact.region_sums(PLAIN, volume)[0]]
    assert all(0.3 < d < 1 for d in found), "one voxel off, and neither perfect nor lost"


def test_cubes_have_rare_classes_and_the_same_seed_gives_the_same() -> None:
    claims = Claims(family="dice", activation="softmax", labels="map", channels=3)
    volume = cube(claims, 20, "float32", 1)
    shares = np.bincount(volume.target.ravel()) / volume.target.size
    assert 0 < shares[1:].max() < 0.02
    assert volume is cube(claims, 20, "float32", 1)
    assert (volume.input != cube(claims, 20, "float32", 2).input).any()
    assert volume.input.shape == (1, 3, 20, 20, 20)


def test_hard_predictions_without_probabilities() -> None:
    labels = np.array([0, 1, 1, 0]).reshape(4, 1, 1)
    pair = LabelPair("pair", labels[::-1], labels, 2, np.eye(4))
    volume = volume_of(SOFTMAX, pair, "float32")
    assert volume is not None
    assert exact.region_sums(SOFTMAX, volume)[0][1].intersection == Fraction(2)
