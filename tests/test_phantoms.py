"""Phantoms: the closed forms against exact counts, against the laws, and through NIfTI."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, jaccard_score

from voxloss_data import (
    ImagePair,
    Phantom,
    SpherePhantom,
    all_phantoms,
    checkerboard,
    constant,
    half_volumes,
    inverse_checkerboards,
    nested_cubes,
    ramp,
    shifted_boxes,
    spheres,
    write_phantoms,
)

EXACT = [phantom for phantom in all_phantoms() if isinstance(phantom, Phantom)]
HARD = [phantom for phantom in EXACT if set(np.unique(phantom.prediction)) <= {0, 1}]
SPHERES = [
    spheres(),
    spheres(radius_mm=8, distance_mm=0),
    spheres(radius_mm=9, distance_mm=17, spacing=(0.5, 1.1, 3)),
    spheres(radius_mm=6, distance_mm=14, spacing=(1.3, 0.8, 0.7)),
    spheres(radius_mm=14, distance_mm=9, spacing=(2, 0.7, 1)),
    spheres(radius_mm=2, distance_mm=1, spacing=(2, 2, 2)),
]


def name(phantom: ImagePair) -> str:
    return phantom.name


def total(values: np.ndarray[Any, Any]) -> Fraction:
    """Sum without rounding: every float is a dyadic rational."""
    unique, counts = np.unique(values, return_counts=True)
    return sum((Fraction(float(v)) * int(n) for v, n in zip(unique, counts, strict=True)), Fraction(0))


def assert_counted(phantom: Phantom) -> None:
    p, g = phantom.prediction.astype(np.float64), phantom.reference
    assert phantom.prediction.dtype == np.float32
    assert phantom.reference.dtype == np.uint8
    assert p.shape == g.shape
    assert p.min() >= 0
    assert p.max() <= 1
    assert set(np.unique(g)) <= {0, 1}
    # Squares of float32 are exact in float64, and so are products with 0 and 1.
    sums = total(p * g), total(p), total(p * p), total(g)
    assert sums == (
        phantom.intersection,
        phantom.prediction_sum,
        phantom.prediction_squared_sum,
        phantom.target_sum,
    )
    a, P, P2, Q = sums
    assert phantom.dice == 2 * a / (P + Q)
    assert phantom.jaccard == a / (P + Q - a)
    assert phantom.dice_squared == 2 * a / (P2 + Q)
    assert phantom.jaccard_squared == a / (P2 + Q - a)
    false_positives, false_negatives = total(p * (1 - g)), total((1 - p) * g)
    expected = a / (a + Fraction(3, 10) * false_positives + Fraction(7, 10) * false_negatives)
    assert phantom.tversky(Fraction(3, 10), Fraction(7, 10)) == expected
    for score in (phantom.dice, phantom.dice_squared, phantom.jaccard, phantom.tversky(0.25, 0.5)):
        assert isinstance(score, Fraction)


@pytest.mark.parametrize("phantom", EXACT, ids=name)
def test_closed_forms_equal_the_counts(phantom: Phantom) -> None:
    assert_counted(phantom)


@pytest.mark.parametrize("phantom", HARD, ids=name)
def test_hard_phantoms_agree_with_scikit_learn(phantom: Phantom) -> None:
    p, g = phantom.prediction.astype(int).ravel(), phantom.reference.ravel()
    assert f1_score(g, p) == pytest.approx(float(phantom.dice), rel=1e-14)
    assert jaccard_score(g, p) == pytest.approx(float(phantom.jaccard), rel=1e-14)


size = st.tuples(*[st.integers(1, 7)] * 3)
shift = st.tuples(*[st.integers(-8, 8)] * 3)


@settings(deadline=None)
@given(size, shift)
def test_shifted_boxes_follow_the_law(size: tuple[int, int, int], shift: tuple[int, int, int]) -> None:
    phantom = shifted_boxes(size=size, shift=shift)
    dice = Fraction(1)
    for length, t in zip(size, shift, strict=True):
        dice *= max(Fraction(0), 1 - Fraction(abs(t), length))
    assert phantom.dice == dice
    assert phantom.jaccard == dice / (2 - dice)
    assert_counted(phantom)


def test_the_reference_is_shifted_and_not_the_prediction() -> None:
    phantom = shifted_boxes(size=(3, 3, 3), shift=(2, -1, 0))
    moved = np.argwhere(phantom.reference).min(0) - np.argwhere(phantom.prediction).min(0)
    assert moved.tolist() == [2, -1, 0]
    for image in (phantom.prediction, phantom.reference):
        assert not any(image.take((0, -1), axis).any() for axis in range(3)), "no background around the box"


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 8))
def test_nested_cubes_follow_the_law(inner: int, wall: int) -> None:
    a, b = inner, inner + wall
    phantom = nested_cubes(inner=a, outer=b)
    assert phantom.dice == Fraction(2 * a**3, a**3 + b**3)
    assert phantom.jaccard == Fraction(a, b) ** 3
    # All of the prediction is right, so only β counts.
    assert phantom.tversky(5, 1) == Fraction(a, b) ** 3
    assert_counted(phantom)


@settings(deadline=None)
@given(st.integers(0, 256), st.integers(1, 8))
def test_constant_follows_the_law(numerator: int, slices: int) -> None:
    p, q = Fraction(numerator, 256), Fraction(slices, 8)
    phantom = constant(probability=p, fraction=q)
    assert phantom.dice == 2 * p * q / (p + q)
    assert phantom.dice_squared == 2 * p * q / (p * p + q)
    assert phantom.jaccard == p * q / (p + q - p * q)
    alpha, beta = Fraction(1, 3), Fraction(3, 2)
    false_positives, false_negatives = p * (1 - q), (1 - p) * q
    assert phantom.tversky(alpha, beta) * (p * q + alpha * false_positives + beta * false_negatives) == p * q
    assert_counted(phantom)


@pytest.mark.parametrize("n", [2, 4, 32, 1024])
def test_ramp_follows_the_law(n: int) -> None:
    phantom = ramp(n=n, cross_section=(2, 3))
    assert phantom.dice == Fraction(3, 4)
    assert phantom.jaccard == Fraction(3, 5)
    assert phantom.dice_squared == Fraction(3, 4) / (Fraction(5, 6) - Fraction(1, 12 * n * n))
    assert_counted(phantom)


@pytest.mark.parametrize("shape", [(2, 2, 1), (4, 6, 3), (6, 2, 8)])
def test_boards_and_halves_follow_the_law(shape: tuple[int, int, int]) -> None:
    expected: list[tuple[Callable[..., Phantom], Fraction, Fraction]] = [
        (checkerboard, Fraction(2, 3), Fraction(1, 2)),
        (inverse_checkerboards, Fraction(0), Fraction(0)),
        (half_volumes, Fraction(1, 2), Fraction(1, 3)),
    ]
    for make, dice, jaccard in expected:
        phantom = make(shape=shape)
        assert (phantom.dice, phantom.jaccard) == (dice, jaccard)
        assert_counted(phantom)


def test_a_checkerboard_alternates_along_every_axis() -> None:
    board = checkerboard(shape=(4, 6, 3)).prediction
    for axis in range(3):
        assert (np.diff(board, axis=axis) != 0).all()


def test_tversky_of_nothing_right_and_nothing_weighted_is_undefined() -> None:
    with pytest.raises(ZeroDivisionError):
        inverse_checkerboards().tversky(0, 0)


def test_all_phantoms_are_small_and_have_names_of_their_own() -> None:
    phantoms = all_phantoms()
    assert len({phantom.name for phantom in phantoms}) == len(phantoms)
    assert {type(phantom) for phantom in phantoms} == {Phantom, SpherePhantom}
    assert max(phantom.prediction.size for phantom in phantoms) <= 32**3
    assert min(phantom.dice for phantom in EXACT) == 0
    assert max(phantom.dice for phantom in EXACT) == 1


def read(path: Path) -> tuple[np.ndarray[Any, Any], Any]:
    image: Any = nib.load(path)
    return np.asanyarray(image.dataobj), image


@pytest.mark.parametrize("phantom", SPHERES, ids=lambda s: f"{s.name}_{s.spacing}")
def test_spheres_are_enclosed_after_a_round_trip(phantom: SpherePhantom, tmp_path: Path) -> None:
    first, second, _ = write_phantoms(tmp_path, [phantom])
    (p, image), (g, _) = read(first), read(second)
    p, g = p.astype(bool), g.astype(bool)
    overlap, both, union = int((p & g).sum()), int(p.sum()) + int(g.sum()), int((p | g).sum())
    R, d = phantom.radius_mm, phantom.distance_mm
    for bounds, score in (
        (phantom.dice_bounds, 2 * overlap / both),
        (phantom.jaccard_bounds, overlap / union),
    ):
        assert bounds[0] <= score <= bounds[1] <= 1

    # Volume and distance in mm, from the header of the file.
    voxel = float(np.prod(image.header.get_zooms()))
    delta = float(np.linalg.norm(image.header.get_zooms())) / 2
    for ball in (p, g):
        volume = voxel * int(ball.sum())
        assert 4 / 3 * math.pi * (R - delta) ** 3 <= volume <= 4 / 3 * math.pi * (R + delta) ** 3
        assert not any(ball.take((0, -1), axis).any() for axis in range(3)), "ball is cut off"
    centres = [image.affine[:3, :3] @ np.argwhere(ball).mean(0) for ball in (p, g)]
    assert centres[1] - centres[0] == pytest.approx(d * np.array([1, 2, 2]) / 3, abs=delta / 2)

    # The law, written with volumes of balls and caps instead of ratios.
    def lens(r: float) -> float:
        return 2 * math.pi * (r - d / 2) ** 2 * (2 * r + d / 2) / 3 if d < 2 * r else 0.0

    def ball_volume(r: float) -> float:
        return 4 / 3 * math.pi * r**3

    low = lens(R - delta) / ball_volume(R + delta)
    high = min(1.0, lens(R + delta) / ball_volume(R - delta))
    assert phantom.dice_bounds == pytest.approx((low, high), rel=1e-6)
    assert phantom.dice_continuum == pytest.approx(lens(R) / ball_volume(R), rel=1e-12)
    assert low <= phantom.dice_continuum <= high
    assert phantom.jaccard_bounds == pytest.approx((low / (2 - low), high / (2 - high)), rel=1e-6)


def test_spheres_on_a_fine_lattice_near_the_continuum() -> None:
    phantom = spheres(radius_mm=10, distance_mm=5, spacing=(0.4, 0.5, 0.3))
    p, g = phantom.prediction > 0, phantom.reference > 0
    assert phantom.dice_continuum == 1 - 3 / 8 + 1 / 128
    assert f1_score(g.ravel(), p.ravel()) == pytest.approx(phantom.dice_continuum, abs=2e-3)


def test_files_read_back_as_they_were_written(tmp_path: Path) -> None:
    phantoms = all_phantoms()
    paths = write_phantoms(tmp_path / "new" / "folder", phantoms)
    folder = tmp_path / "new" / "folder"
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert sorted(paths) == sorted(written), "a file too many or too few"
    for phantom in phantoms:
        soft = len(np.unique(phantom.prediction)) > 2 or "constant_p1-" in phantom.name
        for role, array, dtype in (
            ("prediction", phantom.prediction, np.float32 if soft else np.uint8),
            ("reference", phantom.reference, np.uint8),
        ):
            data, image = read(folder / ("soft" if soft else "") / f"{role}s" / f"{phantom.name}.nii.gz")
            assert data.dtype == dtype
            assert (data == array).all()
            assert image.header.get_xyzt_units()[0] == "mm"
            assert image.header.get_zooms() == phantom.spacing
            for affine, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
                assert code == 1
                assert affine == pytest.approx(phantom.affine, abs=1e-5)
            assert np.linalg.det(image.affine) < 0
            assert image.affine[:3, 3].all(), "an affine without a translation hides errors"


def test_spacing_reaches_the_file(tmp_path: Path) -> None:
    spacing = (0.8, 0.9, 3.3)
    makers: list[Callable[..., Phantom]] = [
        shifted_boxes,
        nested_cubes,
        checkerboard,
        inverse_checkerboards,
        half_volumes,
        constant,
        ramp,
    ]
    for make in makers:
        phantom = make(spacing=spacing)
        assert phantom.spacing == spacing
        path, *_ = write_phantoms(tmp_path, [phantom])
        assert read(path)[1].header.get_zooms() == pytest.approx(spacing, rel=1e-6)


def test_json_holds_the_closed_forms(tmp_path: Path) -> None:
    phantoms: list[Phantom | SpherePhantom] = [half_volumes(), ramp(n=4), spheres()]
    entries = json.loads(write_phantoms(tmp_path, phantoms)[-1].read_text(encoding="utf-8"))
    half, inclined, balls = entries
    assert half["dice"] == {"exact": "1/2", "float": 0.5}
    assert half["jaccard"] == {"exact": "1/3", "float": 1 / 3}
    assert half["target_sum"] == {"exact": "120", "float": 120.0}
    assert inclined["dice_squared"] == {"exact": "48/53", "float": 48 / 53}
    assert inclined["jaccard_squared"] == {"exact": "24/29", "float": 24 / 29}
    assert balls["dice_bounds"] == list(spheres().dice_bounds)
    assert balls["jaccard_bounds"] == list(spheres().jaccard_bounds)
    assert balls["dice_continuum"] == spheres().dice_continuum
    for entry, phantom in zip(entries, phantoms, strict=True):
        assert entry["name"] == phantom.name
        assert entry["spacing_mm"] == list(phantom.spacing)
        for role in ("prediction", "reference"):
            assert (tmp_path / entry[role]).is_file()
            assert role in entry[role]


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    once, twice = write_phantoms(tmp_path / "a"), write_phantoms(tmp_path / "b")
    before = [path.read_bytes() for path in once]
    assert before == [path.read_bytes() for path in twice]
    assert before == [path.read_bytes() for path in write_phantoms(tmp_path / "a")]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_phantoms(tmp_path, [half_volumes()])
    before = {path: path.read_bytes() for path in paths}

    def fail_halfway(self: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(nib.Nifti1Image, "to_filename", fail_halfway)
    with pytest.raises(OSError, match="disk full"):
        write_phantoms(tmp_path, [half_volumes()])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError, match=r"expected a folder .* received the file .*file"):
        write_phantoms(file)


def test_two_phantoms_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="different names"):
        write_phantoms(tmp_path, [ramp(), ramp()])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (shifted_boxes, {"size": (4, 0, 4)}, "size: expected 3 integers ≥ 1, received"),
        (shifted_boxes, {"size": (4, 4)}, "size: expected 3 integers"),
        (shifted_boxes, {"shift": (0.5, 0, 0)}, "shift: expected 3 integers, received"),
        (nested_cubes, {"inner": 5, "outer": 4}, "expected inner ≤ outer, received inner=5, outer=4"),
        (nested_cubes, {"inner": 0}, "expected 2 integers ≥ 1"),
        (checkerboard, {"shape": (3, 3, 3)}, "expected an even number"),
        (inverse_checkerboards, {"shape": (3, 3, 3)}, "expected an even number"),
        (half_volumes, {"shape": (4, 3, 2)}, "expected an even number"),
        (half_volumes, {"shape": (3, 4, 2)}, "expected an even number"),
        (constant, {"probability": 0.1}, "exactly, received 0.1"),
        (constant, {"probability": Fraction(1, 3)}, "exactly, received 1/3"),
        (constant, {"probability": 1.5}, r"\[0, 1\]"),
        (constant, {"probability": math.nan}, "received nan"),
        (constant, {"fraction": 0}, "received 0"),
        (constant, {"fraction": Fraction(1, 3)}, "whole number of 8 slices, received 1/3"),
        (ramp, {"n": 12}, "power of two"),
        (ramp, {"n": 1}, "power of two"),
        (ramp, {"cross_section": (4, 0)}, "expected 3 integers ≥ 1"),
        (ramp, {"spacing": (1, 1, 0)}, "three positive numbers in mm"),
        (ramp, {"spacing": (1, 1)}, "three positive numbers in mm"),
        (spheres, {"radius_mm": 0.5}, "above half of the voxel diagonal"),
        (spheres, {"radius_mm": math.nan}, "above half of the voxel diagonal"),
        (spheres, {"distance_mm": -1}, "distance of 0 mm or more, received -1"),
    ],
)
def test_bad_parameters(make: Callable[..., ImagePair], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_the_package_stands_alone() -> None:
    code = (
        "import sys, voxloss_data; voxloss_data.all_phantoms();"
        "print({'torch', 'voxloss', 'voxloss_verify', 'nilearn', 'platformdirs'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
