"""Generated vessels and lesions: their documented geometry, counted in the arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("skimage")

from scipy.ndimage import distance_transform_edt
from skimage.measure import euler_number, label
from skimage.morphology import skeletonize

from voxloss_data import Lesions, VesselTree, many_lesions, structures, vessel_tree

SHAPE = (64, 48, 56)  # axes that are mixed up show


def components(mask: NDArray[Any], connectivity: int) -> int:
    return int(label(mask, connectivity=connectivity).max())  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module", params=range(4))
def vessels(request: pytest.FixtureRequest) -> VesselTree:
    return vessel_tree(shape=SHAPE, seed=request.param)


@pytest.fixture(scope="module", params=range(4))
def lesions(request: pytest.FixtureRequest) -> Lesions:
    return many_lesions(shape=SHAPE, count=40, seed=request.param)


def test_centre_lines_run_connected_inside_the_vessels(vessels: VesselTree) -> None:
    lines, inside = vessels.centre_lines > 0, vessels.labels > 0
    assert (lines <= inside).all()
    assert components(lines, 3) == 1
    assert components(inside, 3) == 1
    # And along them: from each voxel of a vessel it is at most the stem's radius, and half a voxel's diagonal.
    from_line = distance_transform_edt(~lines)[inside]
    assert from_line.max() <= 3 + np.sqrt(3) / 2
    # They are lines: thinning takes corners and ends off, and leaves most of them.
    thinned = skeletonize(lines).sum()  # type: ignore[no-untyped-call]
    assert 0.6 <= thinned / lines.sum() <= 1


def test_vessels_branch_without_loops(vessels: VesselTree) -> None:
    inside = vessels.labels > 0
    # Components − tunnels + cavities; at a joint, branches may touch by corners.
    assert components(inside, 1) == 1
    assert euler_number(inside, connectivity=1) == 1  # type: ignore[no-untyped-call]
    thin = skeletonize(inside) > 0  # type: ignore[no-untyped-call]
    neighbours = sum(
        np.roll(thin, np.array(shift) - 1, axis=(0, 1, 2)).astype(int) for shift in np.ndindex(3, 3, 3)
    )
    ends = (thin & (neighbours == 2)).sum()  # itself and one more
    assert ends >= 6, "fewer than four bifurcations"


def test_vessels_are_thin_and_become_thinner(vessels: VesselTree) -> None:
    inside = vessels.labels > 0
    widths = distance_transform_edt(inside)[vessels.centre_lines > 0]
    assert 2.5 <= widths.max() <= 4.5, "the stem has a radius of 3 voxels; at joints there is a little more"
    assert (widths <= 2).mean() > 0.6, "and most branches two thirds of it or less"
    assert distance_transform_edt(inside)[..., 4:8].max() >= 2.5, "the stem begins at low z"


def test_the_stem_splits_as_murray_has_it() -> None:
    _, radii = structures._grow((64, 64, 64), 3.0, np.random.default_rng(0))
    found = np.unique(radii)
    assert found.max() == 3
    assert found.min() >= 1
    cubes = found**3
    assert np.abs(cubes[:, None] + cubes - 27).min() < 1e-9


def test_nothing_is_cut_off_by_the_border(vessels: VesselTree, lesions: Lesions) -> None:
    for axis in range(3):
        assert not vessels.labels.take((0, -1), axis).any()
    for number in (1, 2, 3):  # the largest, which would be cut off first: as voxels around a centre they are even
        voxels = np.argwhere(lesions.numbers == number)
        extent = voxels.max(0) - voxels.min(0)
        assert (np.abs(voxels.mean(0) - voxels.min(0) - extent / 2) < 0.5).all()


def test_lesions_do_not_touch(lesions: Lesions) -> None:
    assert ((lesions.numbers > 0) == lesions.labels).all()
    assert lesions.numbers.max() == 40
    assert components(lesions.labels, 3) == 40
    for number in range(1, 41):
        assert components(lesions.numbers == number, 1) == 1


def test_sizes_of_lesions_are_log_uniform_and_fall() -> None:
    sizes = [np.bincount(many_lesions(seed=seed).numbers.ravel())[1:] for seed in range(5)]
    for each in sizes:
        assert len(each) == 60
        assert (np.diff(each) <= 0).all()
    together = np.concatenate(sizes)
    assert together.min() >= 4
    assert together.max() <= 2000
    edges = np.exp(np.linspace(np.log(3.5), np.log(2000.5), 5))
    quarters = np.histogram(together, edges)[0]
    assert (np.abs(quarters - 75) < 30).all(), quarters  # four standard deviations


def test_lesions_of_one_size_have_it_exactly() -> None:
    for size in (1, 7, 500):
        found = many_lesions(count=6, sizes=(size, size))
        assert np.bincount(found.numbers.ravel())[1:].tolist() == [size] * 6


@pytest.mark.parametrize("make", [vessel_tree, many_lesions])
def test_images_show_structures_in_noise(make: Callable[..., Any]) -> None:
    found = make(seed=1)
    assert found.image.dtype == np.float32
    inside = found.labels > 0
    contrast = found.image[inside].mean() - found.image[~inside].mean()
    assert 0.4 < contrast < 1.1
    # No threshold finds them: the voxels of both kinds overlap.
    assert (found.image[~inside] > np.median(found.image[inside])).sum() > 0.3 * inside.sum()
    # The background is uneven: its octants differ by far more than noise does.
    octants = [
        found.image[box][~inside[box]].mean()
        for corner in np.ndindex(2, 2, 2)
        for box in [tuple(slice(32 * c, 32 * c + 32) for c in corner)]
    ]
    assert np.std(octants) > 0.02


@pytest.mark.parametrize("make", [vessel_tree, many_lesions])
def test_a_seed_gives_the_same_arrays_and_another_one_others(make: Callable[..., Any]) -> None:
    once, again, other = (make(seed=seed) for seed in (3, 3, 4))
    for name in vars(once):
        assert (getattr(once, name) == getattr(again, name)).all()
        assert (getattr(once, name) != getattr(other, name)).any()


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_volumes(seed: int) -> None:
    vessels = vessel_tree(shape=(16, 16, 16), seed=seed)
    assert components(vessels.labels, 3) == components(vessels.centre_lines, 3) == 1
    assert components(many_lesions(shape=(16, 16, 16), count=2, sizes=(4, 60), seed=seed).labels, 3) == 2


def test_a_stem_is_always_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structures, "BRANCH", (2.0, 3.0))  # too short for a branch
    assert 3 <= vessel_tree().centre_lines.sum() <= 7


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (vessel_tree, {"shape": (64, 64, 15)}, "shape: expected 3 integers ≥ 16, received"),
        (vessel_tree, {"radius": 0.9}, "radius: expected a number from 1 to 3 voxels, received 0.9"),
        (vessel_tree, {"radius": 3.5}, "from 1 to 3 voxels, received 3.5"),
        (vessel_tree, {"radius": float("nan")}, "received nan"),
        (vessel_tree, {"seed": -1}, "seed: expected 1 integers ≥ 0"),
        (many_lesions, {"shape": (64, 64)}, "shape: expected 3 integers"),
        (many_lesions, {"count": 0}, "count: expected 1 integers ≥ 1"),
        (many_lesions, {"sizes": (0, 5)}, "sizes: expected 2 integers ≥ 1"),
        (many_lesions, {"sizes": (6, 5)}, r"sizes: expected the smaller one first, received \(6, 5\)"),
        (
            many_lesions,
            {"shape": (16, 16, 16), "sizes": (900, 1000)},
            "count: expected no more .*[0-9] were placed",
        ),
        (many_lesions, {"shape": (16, 16, 16), "sizes": (9000, 9000), "count": 1}, "0 were placed"),
        (many_lesions, {"seed": -1}, "seed: expected 1 integers ≥ 0"),
    ],
)
def test_bad_arguments(make: Callable[..., Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)
