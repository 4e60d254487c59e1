"""Laws 1–5: phantoms, whose scores follow from geometry, through NIfTI files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache

import numpy as np
from hypothesis import strategies as st

from voxloss_data import Phantom, SpherePhantom
from voxloss_data import phantoms as make
from voxloss_verify.laws.law import close_value, is_true, law, unlabelled
from voxloss_verify.laws.record import Finding
from voxloss_verify.laws.setting import Setting
from voxloss_verify.laws.sources import phantom_volume, phantom_volumes
from voxloss_verify.oracle.claims import Claims
from voxloss_verify.oracle.volumes import Volume
from voxloss_verify.request import Level
from voxloss_verify.subject.subject import Subject

CLOSED_FORM = "the closed form, from the parameters of the phantom"


def _through_files(*named: str) -> Callable[[Subject, Setting], Iterator[Volume]]:
    """The phantoms whose names begin so, as NIfTI files hold them."""

    def volumes(subject: Subject, setting: Setting) -> Iterator[Volume]:
        chosen = [phantom for phantom in _all_phantoms() if phantom.name.startswith(named)]
        for dtype in _dtypes(subject.claims):
            yield from phantom_volumes(subject.claims, chosen, dtype)

    return volumes


@cache
def _all_phantoms() -> list[Phantom | SpherePhantom]:
    return make.all_phantoms()


def _dtypes(claims: Claims) -> list[str]:
    return [dtype for dtype in ("float32", "float64") if dtype in claims.dtypes]


def _drawn(phantoms: st.SearchStrategy[Phantom]) -> Callable[[Claims], st.SearchStrategy[Volume]]:
    def strategy(claims: Claims) -> st.SearchStrategy[Volume]:
        return st.builds(
            lambda phantom, dtype: phantom_volume(claims, phantom, dtype),
            phantoms,
            st.sampled_from(_dtypes(claims)),
        )

    return strategy


def _edges(most: int) -> st.SearchStrategy[tuple[int, int, int]]:
    return st.tuples(*[st.integers(1, most)] * 3)


@law(
    "1",
    "shifted boxes and nested cubes",
    level=Level.formula,
    because="a closed form of the score that is declared",
    oracle=CLOSED_FORM,
    domain=lambda subject, setting: unlabelled(subject),
    strategy=_drawn(
        st.builds(make.shifted_boxes, size=_edges(4), shift=st.tuples(*[st.integers(-4, 4)] * 3))
        | st.integers(1, 4).flatmap(
            lambda inner: st.builds(make.nested_cubes, inner=st.just(inner), outer=st.integers(inner, 6))
        )
    ),
    given=_through_files("shifted_boxes", "nested_cubes"),
)
def boxes(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Boxes shifted by t: D = Π(1 − |t_k|/L_k)₊, J = D/(2 − D). Nested cubes: D = 2a³/(a³ + b³), J = (a/b)³."""
    yield close_value("loss", subject, subject.value(volume), volume)


@law(
    "2",
    "checkerboards and half-volumes",
    level=Level.formula,
    because="a closed form of the score that is declared",
    oracle=CLOSED_FORM,
    domain=lambda subject, setting: unlabelled(subject),
    strategy=_drawn(
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)).flatmap(
            lambda n: st.sampled_from([make.checkerboard, make.inverse_checkerboards, make.half_volumes]).map(
                lambda phantom: phantom(shape=(2 * n[0], 2 * n[1], n[2]))
            )
        )
    ),
    given=_through_files("checkerboard", "inverse_checkerboards", "half_volumes"),
)
def boards(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """A checkerboard against ones: D = 2/3, J = 1/2; against its inverse 0; orthogonal halves: 1/2 and 1/3."""
    yield close_value("loss", subject, subject.value(volume), volume)


@law(
    "3",
    "constant probability",
    level=Level.formula,
    because="a closed form of the score that is declared",
    oracle=CLOSED_FORM,
    domain=lambda subject, setting: unlabelled(subject),
    strategy=_drawn(
        st.builds(
            make.constant,
            probability=st.integers(1, 15).map(lambda n: Fraction(n, 16)),
            fraction=st.integers(1, 4).map(lambda n: Fraction(n, 4)),
            shape=st.tuples(st.just(4), st.integers(1, 3), st.integers(1, 3)),
        )
    ),
    given=_through_files("constant"),
)
def constants(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """p everywhere against a mask of fraction q: D = 2pq/(p + q), squared 2pq/(p² + q), J = pq/(p + q − pq)."""
    yield close_value("loss", subject, subject.value(volume), volume)


@law(
    "4",
    "ramp",
    level=Level.formula,
    because="a closed form of the score that is declared",
    oracle=CLOSED_FORM,
    domain=lambda subject, setting: unlabelled(subject),
    strategy=_drawn(
        st.builds(
            make.ramp,
            n=st.integers(1, 5).map(lambda k: 2**k),
            cross_section=st.tuples(*[st.integers(1, 3)] * 2),
        )
    ),
    given=_through_files("ramp"),
)
def ramps(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """p = (i + ½)/n against the upper half: D = 3/4, J = 3/5, squared D = (3/4)/(5/6 − 1/(12n²))."""
    yield close_value("loss", subject, subject.value(volume), volume)


@law(
    "5",
    "spheres",
    level=Level.formula,
    because="the lattice count of the score that is declared",
    oracle="integer counts, themselves enclosed by the continuum's closed form",
    domain=lambda subject, setting: unlabelled(subject),
    given=_through_files("spheres"),
)
def spheres(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Equal spheres at distance d: D = 1 − 3d/(4R) + d³/(16R³), on the lattice V_lens(R∓δ)/V(R±δ) encloses it."""
    assert volume.sums is not None
    phantom = next(p for p in _all_phantoms() if p.name == volume.name)
    assert isinstance(phantom, SpherePhantom)
    low, high = phantom.dice_bounds
    s = volume.sums[0][min(1, volume.channels - 1)]
    dice = float(2 * s.intersection / (s.prediction + s.target))
    yield is_true(f"the lattice's Dice in {low:.4f} … {high:.4f}", low <= dice <= high, dice)
    # The affine of the file, not that of the phantom, must give the balls their volumes in mm³.
    voxel = abs(float(np.linalg.det(volume.affine[:3, :3])))
    ball = 4 / 3 * np.pi * phantom.radius_mm**3
    found = float(s.target) * voxel
    yield is_true(f"a ball of {ball:.0f} mm³ to 10 %", abs(found / ball - 1) < 0.1, found)
    yield close_value("loss", subject, subject.value(volume), volume)
