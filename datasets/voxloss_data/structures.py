"""Generated vessels and lesions to train on, with exact centre lines and exact numbers of the lesions.

The contrast and the background of an image vary smoothly, and its noise is so strong that a small network finds
the structures imperfectly. Intensities have no unit: the background is 0 and a structure 1 on average. Shapes and
positions are in voxels, arrays [X, Y, Z].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxloss_data.geometry import Triple, require_integers

THINNEST = 1.0  # a tube of a smaller radius could miss the voxels of its own centre line
THICKEST = 3.0  # to which the lengths of branches are fit
STEP = 0.5  # between points of a centre line, so that their voxels are neighbours
BRANCH = (8.0, 15.0)  # lengths
ANGLE = (25.0, 50.0)  # degrees between a branch and each of its two children
ATTEMPTS = 12  # at a branch that keeps away from all others
PLACES = 20_000  # that are tried for a lesion
NOISE = 0.4  # standard deviation
BIAS = 0.4  # largest deviation of the background from 0
FADING = 0.4  # largest deviation of the contrast from that of a structure


@dataclass(frozen=True, eq=False, kw_only=True)
class VesselTree:
    """A tree of thin tubes: `image` float32, `labels` and `centre_lines` uint8 {0, 1}, all [X, Y, Z].

    The tubes are drawn around the centre lines, which are one 26-connected component, and so is the tree.
    """

    image: NDArray[np.float32]
    labels: NDArray[np.uint8]
    centre_lines: NDArray[np.uint8]


@dataclass(frozen=True, eq=False, kw_only=True)
class Lesions:
    """Blobs that do not touch: `image` float32, `labels` uint8 {0, 1} and `numbers` int32, all [X, Y, Z].

    `numbers` is 0 in the background and i in the i-th largest lesion. Each lesion is 6-connected, and no voxel of
    one is a neighbour of another's, corners included.
    """

    image: NDArray[np.float32]
    labels: NDArray[np.uint8]
    numbers: NDArray[np.int32]


def vessel_tree(*, shape: Triple = (64, 64, 64), radius: float = 3.0, seed: int = 0) -> VesselTree:
    """A tree that enters at low z and branches until its tubes are thinner than a radius of 1 voxel.

    A branch of radius r splits into two with r³ = r₁³ + r₂³ (Murray 1926). One that would come near another is
    omitted, one that would leave the volume ends there. `radius` is that of the stem. The same arguments give the
    same arrays. Raises ValueError unless `shape` has at least 16 voxels along each axis, 1 ≤ radius ≤ 3 and
    `seed` ≥ 0.
    """
    require_integers("shape", shape, at_least=16)
    require_integers("seed", (seed,), 1, at_least=0)
    if not THINNEST <= radius <= THICKEST:
        raise ValueError(f"radius: expected a number from {THINNEST:g} to {THICKEST:g} voxels, received {radius}")
    generator = np.random.default_rng([seed, *shape])
    points, radii = _grow(shape, radius, generator)
    centre_lines = np.zeros(shape, np.uint8)
    centre_lines[tuple(np.rint(points).astype(int).T)] = 1
    labels = np.zeros(shape, np.uint8)
    for point, reach in zip(points, radii, strict=True):
        _add_ball(labels, point, float(reach))
    image = _image(labels.astype(np.float64), generator)
    return VesselTree(image=image, labels=labels, centre_lines=centre_lines)


def many_lesions(
    *,
    shape: Triple = (64, 64, 64),
    count: int = 60,
    sizes: tuple[int, int] = (4, 2000),
    seed: int = 0,
) -> Lesions:
    """Ellipsoids whose volumes are log-uniform from `sizes[0]` to `sizes[1]` voxels, each exact to the voxel.

    The contrast differs from lesion to lesion. The same arguments give the same arrays. Raises ValueError unless
    `shape` has at least 16 voxels along each axis, count ≥ 1, 1 ≤ sizes[0] ≤ sizes[1] and `seed` ≥ 0, and if
    there is no room for so many lesions.
    """
    require_integers("shape", shape, at_least=16)
    require_integers("count", (count,), 1, at_least=1)
    require_integers("sizes", sizes, 2, at_least=1)
    require_integers("seed", (seed,), 1, at_least=0)
    smallest, largest = sizes
    if smallest > largest:
        raise ValueError(f"sizes: expected the smaller one first, received {sizes}")
    generator = np.random.default_rng([seed, *shape])
    volumes = np.rint(np.exp(generator.uniform(math.log(smallest), math.log(largest), count))).astype(int)
    numbers = np.zeros(shape, np.int32)
    contrast = np.zeros(shape)
    free = np.ones(shape, bool)  # of lesions and of the voxels around them
    for number, volume in enumerate(sorted(volumes.tolist(), reverse=True), start=1):  # small ones fit in gaps
        blob = _ellipsoid(volume, generator)
        voxels = _place(blob, free, generator)
        if voxels is None:
            raise ValueError(
                f"count: expected no more lesions than there is room for, received {count} of up to {largest} "
                f"voxels in {shape}, of which {number - 1} were placed. Lower count or sizes, or enlarge shape"
            )
        numbers[tuple(voxels.T)] = number
        contrast[tuple(voxels.T)] = generator.uniform(0.7, 1.3)
        for around in np.ndindex(3, 3, 3):
            beside = np.clip(voxels + np.array(around) - 1, 0, np.array(shape) - 1)
            free[tuple(beside.T)] = False
    labels = (numbers > 0).astype(np.uint8)
    return Lesions(image=_image(contrast, generator), labels=labels, numbers=numbers)


def _grow(
    shape: Triple, radius: float, generator: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points [N, 3] of all centre lines, and the radius of the tube at each."""
    start = np.array([*(generator.uniform(0.4, 0.6, 2) * shape[:2]), radius + 1])
    points, radii = np.empty((0, 3)), np.empty(0)
    growing = [(start, np.array([0.0, 0.0, 1.0]), radius, 0.0)]  # start, direction, radius, radius of the parent
    while growing:
        start, direction, own, parent = growing.pop(0)
        for _ in range(ATTEMPTS):
            branch = _branch(start, _bent(direction, generator) if parent else direction, own, shape, generator)
            apart = branch[np.linalg.norm(branch - start, axis=1) > 2 * parent + 2]
            gaps = np.linalg.norm(apart[:, None] - points, axis=2) - radii - own
            # However short the stem: without it there would be nothing.
            if not parent or (len(branch) * STEP >= 2 * own + 2 and (gaps >= 2).all()):
                break
        else:
            continue
        points, radii = np.concatenate([points, branch]), np.concatenate([radii, np.full(len(branch), own)])
        share = generator.uniform(0.35, 0.65)
        onward = branch[-1] - branch[-3]
        for part in (share, 1 - share):
            thinner = own * part ** (1 / 3)
            if thinner >= THINNEST:
                growing.append((branch[-1], onward / np.linalg.norm(onward), thinner, own))
    return points, radii


def _branch(
    start: NDArray[np.float64],
    direction: NDArray[np.float64],
    radius: float,
    shape: Triple,
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """A slightly winding line of points [N, 3], which ends where its tube would leave the volume."""
    steps = round(generator.uniform(*BRANCH) / STEP)
    turns = np.cumsum(0.08 * generator.standard_normal((steps, 3)), axis=0)
    directions = direction + turns
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    line = start + np.concatenate([np.zeros((1, 3)), np.cumsum(STEP * directions, axis=0)])
    inside = ((line >= radius + 0.5) & (line <= np.array(shape) - 1.5 - radius)).all(axis=1)
    kept: NDArray[np.float64] = line if inside.all() else line[: int(inside.argmin())]
    return kept


def _bent(direction: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """A unit vector at an angle to this one."""
    angle = math.radians(generator.uniform(*ANGLE))
    across = np.cross(direction, generator.standard_normal(3))
    bent: NDArray[np.float64] = math.cos(angle) * direction + math.sin(angle) * across / np.linalg.norm(across)
    return bent


def _add_ball(labels: NDArray[np.uint8], centre: NDArray[np.float64], radius: float) -> None:
    low, high = np.floor(centre - radius).astype(int), np.ceil(centre + radius).astype(int) + 1
    box = tuple(slice(max(0, a), b) for a, b in zip(low.tolist(), high.tolist(), strict=True))
    grid = np.moveaxis(np.mgrid[box], 0, -1)
    labels[box] |= (np.square(grid - centre).sum(-1) <= radius**2).astype(np.uint8)


def _ellipsoid(volume: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """So many voxels [volume, 3] around 0, those nearest to it in units of three semi-axes.

    A step along an axis towards 0 makes that distance smaller, so each voxel has a neighbour inside: 6-connected.
    """
    axes = np.exp(generator.uniform(-0.4, 0.4, 3))
    axes *= (volume / (4 / 3 * math.pi * axes.prod())) ** (1 / 3)
    reach = (axes + 3).astype(int)
    grid = np.moveaxis(np.indices(tuple(2 * reach + 1)), 0, -1).reshape(-1, 3) - reach
    distances = np.square(grid / axes).sum(-1)
    found: NDArray[np.int64] = grid[np.argsort(distances, kind="stable")[:volume]]
    return found


def _place(
    blob: NDArray[np.int64], free: NDArray[np.bool_], generator: np.random.Generator
) -> NDArray[np.int64] | None:
    """The voxels of the blob at a place that is free, None if none is found."""
    low, high = -blob.min(0), np.array(free.shape) - blob.max(0)
    if (low >= high).any():
        return None
    centres = generator.integers(low, high, (PLACES, 3))
    for centre in centres[free[tuple(centres.T)]]:
        voxels: NDArray[np.int64] = blob + centre
        if free[tuple(voxels.T)].all():
            return voxels
    return None


def _image(contrast: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float32]:
    """Blur the boundaries, make contrast and background uneven, and add noise."""
    for axis in range(3):
        padded = np.pad(contrast, [(int(a == axis),) * 2 for a in range(3)], mode="edge")
        before, here, after = (padded.take(range(i, i + contrast.shape[axis]), axis) for i in range(3))
        contrast = (before + 2 * here + after) / 4
    fading, bias = (_smooth(contrast.shape, generator) for _ in range(2))
    noise = NOISE * generator.standard_normal(contrast.shape)
    return (contrast * (1 + FADING * fading) + BIAS * bias + noise).astype(np.float32)


def _smooth(shape: Sequence[int], generator: np.random.Generator) -> NDArray[np.float64]:
    """A sum of the three longest cosine waves along each axis, scaled to a largest magnitude of 1."""
    waves = [np.cos(np.pi * np.outer((np.arange(n) + 0.5) / n, np.arange(3))) for n in shape]
    field = np.einsum("abc,xa,yb,zc->xyz", generator.standard_normal((3, 3, 3)), *waves)
    scaled: NDArray[np.float64] = field / np.abs(field).max()
    return scaled
