"""Pairs of prediction and reference whose overlap follows from geometry alone.

p is the prediction, g the reference, and the sums run over voxels:

    a = Σ p·g    P = Σ p    P₂ = Σ p²    Q = Σ g = Σ g²

Each phantom gives a, P, P₂ and Q from its parameters, as exact fractions; the arrays are never counted, so
that a count of them is an independent check.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxloss_data.files import save_json, save_nifti
from voxloss_data.geometry import Spacing, Triple, flipped_affine, require_integers

Rational = float | Fraction

# Anisotropic, as clinical volumes are, and exact in the float32 that NIfTI stores.
SPACING: Spacing = (0.75, 0.75, 2.5)


@dataclass(frozen=True, eq=False, kw_only=True)
class ImagePair:
    """A prediction, its reference, and where they lie in space.

    `prediction` is float32 [X, Y, Z] in [0, 1], `reference` uint8 {0, 1} of the same shape, and `affine`
    (float64, 4x4) maps voxel indices to mm.
    """

    name: str
    prediction: NDArray[np.float32]
    reference: NDArray[np.uint8]
    affine: NDArray[np.float64]

    @property
    def spacing(self) -> Spacing:
        """Distance between neighbouring voxels along each axis, in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return x, y, z


@dataclass(frozen=True, eq=False, kw_only=True)
class Phantom(ImagePair):
    """A pair whose sums are known exactly, in voxels, and all of its scores (without smoothing) with them."""

    intersection: Fraction
    prediction_sum: Fraction
    prediction_squared_sum: Fraction
    target_sum: Fraction

    @property
    def dice(self) -> Fraction:
        """D = 2a / (P + Q)."""
        return 2 * self.intersection / (self.prediction_sum + self.target_sum)

    @property
    def jaccard(self) -> Fraction:
        """J = a / (P + Q − a), the intersection over union."""
        return self.intersection / (self.prediction_sum + self.target_sum - self.intersection)

    @property
    def dice_squared(self) -> Fraction:
        """D₂ = 2a / (P₂ + Q)."""
        return 2 * self.intersection / (self.prediction_squared_sum + self.target_sum)

    @property
    def jaccard_squared(self) -> Fraction:
        """J₂ = a / (P₂ + Q − a)."""
        return self.intersection / (self.prediction_squared_sum + self.target_sum - self.intersection)

    def tversky(self, alpha: Rational, beta: Rational) -> Fraction:
        """T = a / (a + α(P − a) + β(Q − a)); α weights false positives, β false negatives.

        A float counts as the dyadic rational that it is. Raises ZeroDivisionError where the denominator is 0.
        """
        a = self.intersection
        false_positives, false_negatives = self.prediction_sum - a, self.target_sum - a
        return a / (a + Fraction(alpha) * false_positives + Fraction(beta) * false_negatives)


@dataclass(frozen=True, eq=False, kw_only=True)
class SpherePhantom(ImagePair):
    """Two equal balls on a lattice: the scores in the continuum, and an interval for those on the lattice.

    A voxel belongs to a ball if its centre does, and reaches no farther than δ, half its diagonal, from there.
    So the voxels of a ball B(R) cover B(R − δ) and stay within B(R + δ), and those of the lens do likewise:

        V_lens(R − δ) / V(R + δ)  ≤  D  ≤  V_lens(R + δ) / V(R − δ)
    """

    radius_mm: float
    distance_mm: float

    @property
    def dice_continuum(self) -> float:
        """D = 1 − 3d/(4R) + d³/(16R³) for d < 2R, else 0."""
        return _lens(self.radius_mm, self.distance_mm) / self.radius_mm**3

    @property
    def dice_bounds(self) -> tuple[float, float]:
        """Lower and upper bound of the Dice of the voxels."""
        delta = math.hypot(*self.spacing) / 2
        inner, outer = self.radius_mm - delta, self.radius_mm + delta
        lower = _lens(inner, self.distance_mm) / outer**3
        upper = _lens(outer, self.distance_mm) / inner**3
        return lower, min(upper, 1.0)

    @property
    def jaccard_bounds(self) -> tuple[float, float]:
        """Lower and upper bound of the IoU of the voxels, J = D / (2 − D), which grows with D."""
        lower, upper = self.dice_bounds
        return lower / (2 - lower), upper / (2 - upper)


def shifted_boxes(
    *, size: Triple = (12, 10, 8), shift: Triple = (3, -2, 1), spacing: Spacing = SPACING
) -> Phantom:
    """Two equal boxes, one `shift` away from the other: D = Π(1 − |t_k|/L_k)₊, J = D/(2 − D).

    `size` L and `shift` t are in voxels, `spacing` in mm. Raises ValueError unless L_k ≥ 1 and t_k are integers.
    """
    require_integers("size", size, at_least=1)
    require_integers("shift", shift)
    shape = [length + abs(t) + 2 for length, t in zip(size, shift, strict=True)]
    # One voxel of background all around; a negative shift moves the reference to the left of the prediction.
    here = [1 + max(0, -t) for t in shift]
    there = [start + t for start, t in zip(here, shift, strict=True)]
    overlap = math.prod(max(0, length - abs(t)) for length, t in zip(size, shift, strict=True))
    return _hard(
        f"shifted_boxes_{_join(size)}_by_{'_'.join(map(str, shift))}",
        _box(shape, here, size),
        _box(shape, there, size),
        spacing,
        intersection=overlap,
        prediction_sum=math.prod(size),
        target_sum=math.prod(size),
    )


def nested_cubes(*, inner: int = 8, outer: int = 16, spacing: Spacing = SPACING) -> Phantom:
    """Predict a cube inside the reference cube: D = 2a³/(a³ + b³), J = (a/b)³.

    `inner` a and `outer` b are the edges in voxels, `spacing` is in mm. Raises ValueError unless 1 ≤ a ≤ b.
    """
    require_integers("inner, outer", (inner, outer), 2, at_least=1)
    if inner > outer:
        raise ValueError(f"expected inner ≤ outer, received inner={inner}, outer={outer}")
    shape = [outer + 2] * 3
    return _hard(
        f"nested_cubes_{inner}_in_{outer}",
        _box(shape, [1 + (outer - inner) // 2] * 3, [inner] * 3),
        _box(shape, [1] * 3, [outer] * 3),
        spacing,
        intersection=inner**3,
        prediction_sum=inner**3,
        target_sum=outer**3,
    )


def checkerboard(*, shape: Triple = (8, 6, 4), spacing: Spacing = SPACING) -> Phantom:
    """Predict every other voxel where the reference is everywhere: D = 2/3, J = 1/2.

    `shape` is in voxels, `spacing` in mm. Raises ValueError unless the number of voxels is even.
    """
    board, half = _board(shape)
    return _hard(
        f"checkerboard_{_join(shape)}",
        board,
        np.ones_like(board),
        spacing,
        intersection=half,
        prediction_sum=half,
        target_sum=2 * half,
    )


def inverse_checkerboards(*, shape: Triple = (8, 6, 4), spacing: Spacing = SPACING) -> Phantom:
    """Predict every voxel that the reference is not: D = J = 0.

    `shape` is in voxels, `spacing` in mm. Raises ValueError unless the number of voxels is even.
    """
    board, half = _board(shape)
    return _hard(
        f"inverse_checkerboards_{_join(shape)}",
        board,
        1 - board,
        spacing,
        intersection=0,
        prediction_sum=half,
        target_sum=half,
    )


def half_volumes(*, shape: Triple = (8, 6, 5), spacing: Spacing = SPACING) -> Phantom:
    """Predict the first half along x, reference the first half along y: D = 1/2, J = 1/3.

    `shape` is in voxels, `spacing` in mm. Raises ValueError unless X and Y are even.
    """
    require_integers("shape", shape, at_least=1)
    x, y, z = shape
    if x % 2 or y % 2:
        raise ValueError(f"expected an even number of voxels along x and y, received shape={shape}")
    return _hard(
        f"half_volumes_{_join(shape)}",
        _box(shape, (0, 0, 0), (x // 2, y, z)),
        _box(shape, (0, 0, 0), (x, y // 2, z)),
        spacing,
        intersection=x * y * z // 4,
        prediction_sum=x * y * z // 2,
        target_sum=x * y * z // 2,
    )


def constant(
    *,
    probability: Rational = Fraction(1, 4),
    fraction: Rational = Fraction(1, 2),
    shape: Triple = (8, 6, 4),
    spacing: Spacing = SPACING,
) -> Phantom:
    """Predict p everywhere, where the reference fills the fraction q along x: D = 2pq/(p + q).

    J = pq/(p + q − pq), D₂ = 2pq/(p² + q), T = pq/(pq + αp(1 − q) + β(1 − p)q). `shape` is in voxels, `spacing`
    in mm. Raises ValueError unless `probability` is in [0, 1] and exact in float32 (as 1/4 is and 1/10 is not),
    and `fraction` is in (0, 1] and fills a whole number of the X slices.
    """
    require_integers("shape", shape, at_least=1)
    x, y, z = shape
    if not 0 <= probability <= 1 or Fraction(float(np.float32(float(probability)))) != probability:
        raise ValueError(f"expected a probability in [0, 1] that float32 holds exactly, received {probability}")
    if not 0 < fraction <= 1 or (Fraction(fraction) * x).denominator != 1:
        raise ValueError(
            f"expected a fraction in (0, 1] that fills a whole number of {x} slices, received {fraction}"
        )
    p, q, voxels = Fraction(probability), Fraction(fraction), x * y * z
    return Phantom(
        name=f"constant_p{_dashed(p)}_q{_dashed(q)}_{_join(shape)}",
        prediction=np.full(shape, float(p), np.float32),
        reference=_box(shape, (0, 0, 0), (int(q * x), y, z)),
        affine=flipped_affine(spacing),
        intersection=p * q * voxels,
        prediction_sum=p * voxels,
        prediction_squared_sum=p * p * voxels,
        target_sum=q * voxels,
    )


def ramp(*, n: int = 16, cross_section: tuple[int, int] = (4, 3), spacing: Spacing = SPACING) -> Phantom:
    """Predict (i + ½)/n along x, reference the upper half: D = 3/4, J = 3/5, D₂ = (3/4)/(5/6 − 1/(12n²)).

    `n` and `cross_section` [Y, Z] are in voxels, `spacing` in mm. Raises ValueError unless n is a power of two
    from 2 to 2²³, which keeps every probability exact in float32.
    """
    require_integers("n, cross_section", (n, *cross_section), at_least=1)
    if not 2 <= n <= 2**23 or n & (n - 1):
        raise ValueError(f"expected n to be a power of two from 2 to 2**23, received {n}")
    shape = (n, *cross_section)
    rows = math.prod(cross_section)
    probabilities = ((np.arange(n) + 0.5) / n).astype(np.float32)
    return Phantom(
        name=f"ramp_{_join(shape)}",
        prediction=np.broadcast_to(probabilities[:, None, None], shape).copy(),
        reference=_box(shape, (n // 2, 0, 0), (n // 2, *cross_section)),
        affine=flipped_affine(spacing),
        intersection=rows * Fraction(3 * n, 8),
        prediction_sum=rows * Fraction(n, 2),
        prediction_squared_sum=rows * (Fraction(n, 3) - Fraction(1, 12 * n)),
        target_sum=rows * Fraction(n, 2),
    )


def spheres(
    *, radius_mm: float = 12.0, distance_mm: float = 7.0, spacing: Spacing = (0.75, 0.75, 1.5)
) -> SpherePhantom:
    """Two balls of radius R at distance d, in mm: D = 1 − 3d/(4R) + d³/(16R³) in the continuum.

    They lie apart along (1, 2, 2)/3, so that every axis and its spacing (mm) counts. Raises ValueError unless
    d ≥ 0 and R exceeds half a voxel's diagonal, below which the bounds give no information.
    """
    affine = flipped_affine(spacing)
    if not math.hypot(*spacing) / 2 < radius_mm < math.inf:
        raise ValueError(
            f"expected a radius above half of the voxel diagonal {spacing} mm, received {radius_mm} mm"
        )
    if not 0 <= distance_mm < math.inf:
        raise ValueError(f"expected a distance of 0 mm or more, received {distance_mm} mm")
    offset = distance_mm / 2 * np.array([1, 2, 2]) / 3
    reach = ((radius_mm + offset) / spacing).astype(int) + 1
    voxels = np.moveaxis(np.indices(tuple(2 * reach + 1)), 0, -1) - reach
    # Through the affine, so that a wrong spacing, flip or axis order shows in the overlap.
    world = voxels @ affine[:3, :3].T
    one, other = (np.square(world - centre).sum(-1) <= radius_mm**2 for centre in (-offset, offset))
    return SpherePhantom(
        name=f"spheres_r{radius_mm:g}mm_d{distance_mm:g}mm",
        prediction=one.astype(np.float32),
        reference=other.astype(np.uint8),
        affine=affine,
        radius_mm=radius_mm,
        distance_mm=distance_mm,
    )


def all_phantoms() -> list[Phantom | SpherePhantom]:
    """Every phantom once, with the variants that distinguish losses: perfect, disjoint, touching, rare, full."""
    return [
        shifted_boxes(),
        shifted_boxes(shift=(0, 0, 0)),
        shifted_boxes(shift=(12, 0, 0)),
        shifted_boxes(shift=(-1, 11, 2)),
        nested_cubes(),
        nested_cubes(inner=1, outer=16),
        checkerboard(),
        inverse_checkerboards(),
        half_volumes(),
        constant(),
        constant(probability=Fraction(1, 1024), fraction=Fraction(1, 8)),
        constant(probability=1, fraction=1),
        ramp(),
        spheres(),
        spheres(radius_mm=8.0, distance_mm=12.0),
    ]


def write_phantoms(
    folder: str | PathLike[str], phantoms: Iterable[Phantom | SpherePhantom] | None = None
) -> list[Path]:
    """Write predictions/NAME.nii.gz and references/NAME.nii.gz for each phantom, then phantoms.json.

    Label maps are uint8. A prediction of other values than zeros and ones is float32, and lies with its reference
    in folders of the same names below soft: so all files of two folders can be compared as label maps.
    phantoms.json lists the files, the spacing in mm and the closed forms: exact as "3/4" and as a float, or as
    bounds for spheres. Files are written atomically and the same phantoms give the same bytes. Returns the paths,
    phantoms.json last; `phantoms=None` means `all_phantoms()`. Raises NotADirectoryError if `folder` is a file,
    and ValueError if two phantoms share a name.
    """
    folder = Path(folder)
    phantoms = all_phantoms() if phantoms is None else list(phantoms)
    names = [phantom.name for phantom in phantoms]
    if len(set(names)) < len(names):
        raise ValueError(f"expected phantoms of different names, received {sorted(names)}")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"expected a folder to write phantoms to, received the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)

    paths: list[Path] = []
    entries: list[dict[str, Any]] = []
    for phantom in phantoms:
        hard = bool(np.isin(phantom.prediction, (0, 1)).all())
        images = {
            "prediction": phantom.prediction.astype(np.uint8 if hard else np.float32),
            "reference": phantom.reference,
        }
        files = {
            role: folder / ("" if hard else "soft") / f"{role}s" / f"{phantom.name}.nii.gz" for role in images
        }
        for role, path in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_nifti(path, images[role], phantom.affine)
        paths += files.values()
        entries.append(
            {
                "name": phantom.name,
                **{role: path.relative_to(folder).as_posix() for role, path in files.items()},
                "spacing_mm": phantom.spacing,
                **_closed_forms(phantom),
            }
        )
    index = folder / "phantoms.json"
    save_json(index, entries)
    return [*paths, index]


def _closed_forms(phantom: Phantom | SpherePhantom) -> dict[str, Any]:
    if isinstance(phantom, SpherePhantom):
        names = ("radius_mm", "distance_mm", "dice_continuum", "dice_bounds", "jaccard_bounds")
        return {name: getattr(phantom, name) for name in names}
    sums = ("intersection", "prediction_sum", "prediction_squared_sum", "target_sum")
    scores = ("dice", "jaccard", "dice_squared", "jaccard_squared")
    values: dict[str, Fraction] = {name: getattr(phantom, name) for name in sums + scores}
    return {name: {"exact": str(value), "float": float(value)} for name, value in values.items()}


def _hard(
    name: str,
    prediction: NDArray[np.uint8],
    reference: NDArray[np.uint8],
    spacing: Spacing,
    *,
    intersection: int,
    prediction_sum: int,
    target_sum: int,
) -> Phantom:
    """Build a phantom of zeros and ones, where p² = p."""
    return Phantom(
        name=name,
        prediction=prediction.astype(np.float32),
        reference=reference,
        affine=flipped_affine(spacing),
        intersection=Fraction(intersection),
        prediction_sum=Fraction(prediction_sum),
        prediction_squared_sum=Fraction(prediction_sum),
        target_sum=Fraction(target_sum),
    )


def _box(shape: Iterable[int], start: Iterable[int], size: Iterable[int]) -> NDArray[np.uint8]:
    box = np.zeros(tuple(shape), np.uint8)
    box[tuple(slice(s, s + length) for s, length in zip(start, size, strict=True))] = 1
    return box


def _board(shape: Triple) -> tuple[NDArray[np.uint8], int]:
    """Ones where i + j + k is even, and half the number of voxels."""
    require_integers("shape", shape, at_least=1)
    voxels = math.prod(shape)
    if voxels % 2:
        raise ValueError(f"expected an even number of voxels along at least one axis, received shape={shape}")
    return (1 - np.indices(shape).sum(0) % 2).astype(np.uint8), voxels // 2


def _lens(radius: float, distance: float) -> float:
    """Volume that two balls of `radius` at `distance` share, in units of 4π/3."""
    if distance >= 2 * radius:
        return 0.0
    return radius**3 - 3 * distance * radius**2 / 4 + distance**3 / 16


def _join(values: Iterable[int]) -> str:
    return "x".join(map(str, values))


def _dashed(value: Fraction) -> str:
    return str(value).replace("/", "-")
