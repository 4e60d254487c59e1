"""The independent witness for cross entropy and focal loss: logarithms and sums in extended precision.

This module uses neither torch nor voxloss. Shapes are `[B, C, ...]`; the target has one channel per class.
Mutually exclusive classes have a term for positives; independent binary channels also have one for negatives.
With n = 1 − p these are −g n^γ log p and −(1 − g) p^γ log n, and with γ = 0 those of cross entropy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxloss_verify.oracle.claims import FOCAL, Claims

Image = NDArray[Any]

# Of a probability that is given as such; log 2⁻¹²⁶ = −87.3.
SMALLEST = 2.0**-126
# Of two voxels whose losses are as close as this, another rounding may choose the other one.
_NEAR = 1e-3
# Volumes of up to so many numbers are computed in extended precision, where the machine has it.
EXTENDED = 2**20


@dataclass(frozen=True)
class Voxels:
    """p, n = 1 − p, their logarithms, and the target, `[B, C, ...]`; in voxels that do not count p = ½, g = 0.

    Attributes:
        counted: how much each voxel counts, `[B, ...]`: of the hardest those that are chosen, and in shares those
            that are equal to the last of them.
        is_clear: whether no rounding could choose others.
    """

    p: Image
    n: Image
    log_p: Image
    log_n: Image
    g: Image
    counted: Image
    is_clear: bool = True


def value(claims: Claims, input: Image, target: Image, valid_mask: NDArray[np.bool_], times: int = 1) -> float:
    """The loss; `valid_mask` [B, ...] are the voxels that count, each of them so many `times`."""
    v = _counted(claims, _voxels(claims, input, target, valid_mask), valid_mask, times)
    divisors = _divisors(claims, v, times)
    total = 0.0
    for terms in _terms(claims, v, valid_mask):
        sums = (v.counted * np.where(v.counted > 0, terms, 0)).reshape(len(input), -1).sum(1, dtype=np.longdouble)
        total -= times * float((sums / divisors).sum())
    return total


def _terms(claims: Claims, v: Voxels, valid_mask: NDArray[np.bool_]) -> Iterator[Image]:
    """What the voxels add to −L, before it is divided, `[B, ...]` of each channel that counts."""
    channels = v.p.shape[1]
    shares = _shares(claims, v.g, channels, int(valid_mask.sum()))
    for k, c in enumerate(claims.counting(channels)):
        there, missing = (share[:, k] for share in shares)
        p, n, log_p, log_n = (each[:, c] for each in (v.p, v.n, v.log_p, v.log_n))
        terms = _product(there * n ** _focus_there(claims, c, channels), _log(claims, log_p)[0])
        if claims.is_binary(channels):
            terms = terms + _product(missing * p ** _focus(claims), _log(claims, log_n)[0])
        yield terms


def _counted(claims: Claims, v: Voxels, valid_mask: NDArray[np.bool_], times: int) -> Voxels:
    """Choose the hardest voxels, where these alone are declared, each of which is there so many times."""
    if claims.hardest == 100:
        return v
    hard = np.where(valid_mask, -sum(_terms(claims, v, valid_mask)), -np.inf)
    number = max(1, int(valid_mask.sum()) * times * claims.hardest // 100) / times
    last = np.sort(hard, axis=None)[::-1][math.ceil(number) - 1]
    equal = hard == last
    share = (number - (hard > last).sum()) / max(1, equal.sum())
    counted = np.where(hard > last, 1, np.where(equal & valid_mask, share, 0)).astype(v.p.dtype)
    with np.errstate(invalid="ignore"):
        near = valid_mask & (abs(hard - last) <= _NEAR * max(1, abs(last)))
    return replace(v, counted=counted, is_clear=bool((counted[near] == 1).all()))


def value_tolerance(
    claims: Claims, input: Image, target: Image, valid_mask: NDArray[np.bool_], times: int, rounding: float
) -> float:
    """How far the loss may be off if each logarithm may be, by `rounding`: more than that only of a power."""
    if claims.family != "logarithmic_cross_entropy":
        return rounding
    channels = input.shape[1]
    v = _voxels(claims, input, target, valid_mask)
    shares = _shares(claims, v.g, channels, int(valid_mask.sum()))
    divisors = _divisors(claims, v, times).reshape(-1, *[1] * (v.p.ndim - 2))
    total = 0.0
    for k, c in enumerate(claims.counting(channels)):
        for share, log in ((shares[0][:, k], v.log_p[:, c]), (shares[1][:, k], v.log_n[:, c])):
            here, near, far = (_log(claims, x)[0] for x in (log, np.minimum(log + rounding, 0), log - rounding))
            off = share * np.maximum(abs(near - here), abs(far - here)) / divisors
            total += times * float(np.where(valid_mask, off, 0).sum())
            if not claims.is_binary(channels):
                break
    return max(rounding, total)


def gradient(claims: Claims, input: Image, target: Image, valid_mask: NDArray[np.bool_], times: int = 1) -> Image:
    """∂L/∂input, by way of u = ∂L/∂log p and v = ∂L/∂log n, which are finite where p or n is 0."""
    found = _counted(claims, _voxels(claims, input, target, valid_mask), valid_mask, times)
    u, v = _derivatives(claims, found, valid_mask, times)
    p, n = found.p, found.n
    if claims.activation == "softmax":
        by_input = u - p * u.sum(1, keepdims=True)
    elif claims.activation == "sigmoid":
        by_input = u * n - v * p
    else:
        by_input = np.where(p > SMALLEST, u / np.maximum(p, SMALLEST), 0)
        by_input -= np.where(n > SMALLEST, v / np.maximum(n, SMALLEST), 0)
    return np.asarray(by_input, np.float64)


def gradient_scale(
    claims: Claims, input: Image, target: Image, valid_mask: NDArray[np.bool_], times: int = 1
) -> float:
    """The largest addend of ∂L/∂input, before anything cancels; infinite where rounding chooses other voxels."""
    found = _counted(claims, _voxels(claims, input, target, valid_mask), valid_mask, times)
    if not found.is_clear:
        return math.inf
    if claims.activation == "none":
        return float(abs(gradient(claims, input, target, valid_mask, times)).max())
    u, v = _derivatives(claims, found, valid_mask, times)
    return float(max(abs(u).max(), abs(v).max()))


def _derivatives(claims: Claims, found: Voxels, valid_mask: NDArray[np.bool_], times: int) -> tuple[Image, Image]:
    """∂L/∂log p and ∂L/∂log n of every voxel; 0 in voxels that do not count."""
    channels = found.p.shape[1]
    shares = _shares(claims, found.g, channels, int(valid_mask.sum()))
    divisors = _divisors(claims, found, times).reshape(-1, *[1] * (found.p.ndim - 2))
    u, v = np.zeros_like(found.p), np.zeros_like(found.p)
    for k, c in enumerate(claims.counting(channels)):
        p, n, log_p, log_n = (each[:, c] for each in (found.p, found.n, found.log_p, found.log_n))
        there = _focused(p, n, log_p, _focus_there(claims, c, channels)) * _log(claims, log_p)[1]
        u[:, c] = found.counted * np.where(valid_mask, -shares[0][:, k] * there / divisors, 0)
        if claims.is_binary(channels):
            missing = _focused(n, p, log_n, _focus(claims)) * _log(claims, log_n)[1]
            v[:, c] = found.counted * np.where(valid_mask, -shares[1][:, k] * missing / divisors, 0)
    return u, v


def _focus(claims: Claims) -> float:
    """γ of focal loss for what is missing, which is background."""
    return claims.gamma if claims.family == "focal" else 0.0


def _focus_there(claims: Claims, channel: int, channels: int) -> float:
    """γ of focal loss for what is there."""
    return _focus(claims) if claims.has_power(channel, channels) else 0.0


def _log(claims: Claims, log: Image) -> tuple[Image, Image]:
    """What stands for a logarithm, −(−log)^γ where a power of it is declared, and the derivative."""
    if claims.family != "logarithmic_cross_entropy":
        return log, np.ones_like(log)
    near, gamma = claims.linear_below, claims.gamma
    derivative, safe = (near ** (gamma - 1) if near else 0.0), np.maximum(-log, near or 1e-300)
    power = np.where(-log < near, -log * derivative, safe**gamma)
    return -power, np.where(-log < near, derivative, gamma * safe ** (gamma - 1))


def _focused(own: Image, other: Image, log: Image, gamma: float) -> Image:
    """The derivative of q^γ·log by log, for q the `other` probability: q^γ·(1 − γ·own·log / q)."""
    # own·log / q tends to −1 as q tends to 0.
    ratio = np.where(other > 0, own * np.maximum(log, -1e6) / np.where(other > 0, other, 1), -1)
    return np.asarray(other**gamma * (1 - gamma * ratio))


def _voxels(claims: Claims, input: Image, target: Image, valid_mask: NDArray[np.bool_]) -> Voxels:
    inside = valid_mask[:, None]
    x = np.asarray(input, np.longdouble if input.size <= EXTENDED else np.float64)
    g = np.where(inside, target, 0).astype(x.dtype)
    counted = valid_mask.astype(x.dtype)
    if claims.activation == "softmax":
        x = np.where(inside, x, 0)
        x = x - x.max(1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
        p, n = np.exp(log_p), np.maximum(-np.expm1(log_p), 0)
        return Voxels(p, n, log_p, np.zeros_like(p), g, counted)
    if claims.activation == "sigmoid":
        x = np.where(inside, x, 0)
        log_p, log_n = (np.negative(np.logaddexp(0, y)) for y in (np.negative(x), x))
        return Voxels(np.exp(log_p), np.exp(log_n), log_p, log_n, g, counted)
    p = np.where(inside, x, 0.5)
    log_p, log_n = (np.log(np.maximum(q, SMALLEST)) for q in (p, 1 - p))
    return Voxels(p, 1 - p, log_p, log_n, g, counted)


def _shares(claims: Claims, g: Image, channels: int, voxels: int) -> tuple[Image, Image]:
    """What log p and log n are multiplied with in each channel that counts, but for the focus."""
    there, missing = g[:, claims.counting(channels)], 1 - g[:, claims.counting(channels)]
    per_class = (1, -1, *[1] * (g.ndim - 2))
    if claims.family in FOCAL:
        yes, no = np.array(claims.balances(channels), g.dtype).T.reshape(2, *per_class)
        there, missing = yes * there, no * missing
    else:
        even = claims.label_smoothing / (2 if claims.is_binary(channels) else channels)
        there, missing = (((1 - claims.label_smoothing) * share + even) for share in (there, missing))
    weights = np.array(claims.weights(channels), g.dtype).reshape(per_class)
    rare, common = (factor.reshape(per_class) for factor in _by_frequency(claims, g, voxels))
    return weights * rare * there, weights * common * missing


def _by_frequency(claims: Claims, g: Image, voxels: int) -> tuple[Image, Image]:
    """√(Σf/f_c) of the channels that count; of binary channels √(1/f) and √(1/(1 − f))."""
    channels = g.shape[1]
    counting, ones = claims.counting(channels), np.ones(len(claims.counting(channels)), g.dtype)
    if claims.family != "logarithmic_cross_entropy":
        return ones, ones
    binary = claims.is_binary(channels)
    if claims.frequencies is None:
        f = np.moveaxis(g, 1, 0).reshape(channels, -1).sum(1)
        f, total = (f / max(voxels, 1), 1.0) if binary else (f, f.sum())
    else:
        f = np.array(claims.frequencies, g.dtype)
        total = 1.0 if binary else f.sum()
    f = f[counting]
    with np.errstate(divide="ignore", invalid="ignore"):
        rare, common = (np.where(part > 0, np.sqrt(total / part), 0) for part in (f, total - f))
    return rare, common


def _divisors(claims: Claims, v: Voxels, times: int) -> Image:
    """What the terms of each sample are divided by, `[B]`; infinite where there is nothing to divide."""
    channels = v.g.shape[1]
    counting = claims.counting(channels)
    voxels = v.counted.reshape(len(v.g), -1).sum(1)
    if claims.reduction == "sum":
        below = voxels if claims.family in FOCAL else np.full_like(voxels, 1 / times)
    elif claims.is_binary(channels) or (claims.family in FOCAL and claims.mean_over == "voxels and classes"):
        below = np.full_like(voxels, voxels.sum() * len(counting))
    elif claims.family in FOCAL:
        below = np.full_like(voxels, voxels.sum())
    else:
        there = v.g[:, counting] * v.counted[:, None]
        of_classes = np.moveaxis(there, 1, 0).reshape(len(counting), -1).sum(1, dtype=np.longdouble)
        below = np.full_like(voxels, (np.array(claims.weights(channels)) * of_classes).sum())
    return np.where(below == 0, np.inf, times * below)


def _product(share: Image, log: Image) -> Image:
    """share·log, where 0·(−∞) is 0."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(share == 0, 0, share * log))
