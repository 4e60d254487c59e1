"""The kernels of `triton_gpu`: voxels.py's definition, on tiles `[classes, voxels]` that stay in registers.

One program takes every n-th tile of a sample, so that programs that run at the same time read memory side by
side. `sums` and `gradient` hold all classes of a voxel in one tile and read the volume once; `sums_of_many` and
`gradient_of_many` walk over the classes in tiles, with an online softmax, and read it twice and three times.

A voxel outside the volume and one that is ignored are treated alike: they are not `live`, their logit is −∞ (or
their probability 0) and their target 0, so that every term of theirs is 0 by itself; so it is with the classes
that fill a tile up. A voxel of weight 0 is not even loaded: it counts as one outside the volume, but that its
gradient is written. `CONFIG` is known when a kernel is compiled: what is not needed costs nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class KernelConfig(NamedTuple):
    """What a kernel is compiled for. A tuple, as Triton keeps one compiled kernel for each value."""

    activation: str
    sums: tuple[str, ...]
    gamma: float
    chord: float  # ε^(γ−1), the derivative of a power of a logarithm near 0
    labels: bool  # the target is a label map
    regions: tuple[int, ...]  # for each label the channels that it belongs to, as bits; empty if it is one itself
    known: int  # labels
    ignore: str  # "no", "label", "channel" (that one is 1) or "sentinel" (all channels are `index`)
    index: int
    weighted: bool  # there is a mask
    map: str  # "no", "voxel" (one number, of the label's channels) or "channel"
    by_cell: bool  # the sums are those of the cells of a partition
    classes: int
    log_p: bool  # some sum needs it
    log_n: bool
    kink: bool  # soft_intersection is needed
    p_slack: float  # how far outside [0, 1] a prediction may lie, and a target
    g_slack: float
    ranged: bool  # values of each class can be wrong, not only a label
    by_target: bool  # ∂L/∂target is needed
    real: tl.dtype  # what is computed in
    order: tuple[int, ...]  # of the sums in the backward pass
    even: bool  # every program has all its tiles, and these are full
    few: bool  # a vector over voxels for each class, in the place of a tile
    whole: bool  # a tile has all classes of its voxels
    block_c: int  # classes in a tile
    block_v: int  # voxels in a tile
    tiles: int  # tiles in a program
    lanes: int  # of a program
    side_by_side: bool  # neighbouring voxels lie next to each other in memory
    neighbours: int  # of which a thread takes so many, in a tile
    vectors: bool  # they can be loaded several at a time, where there are few classes


INFINITY = tl.constexpr(float("inf"))
LARGEST_LOGIT = tl.constexpr(1e15)  # that of voxels.py
MINUS_INFINITY = tl.constexpr(float("-inf"))
SMALLEST_PROBABILITY = tl.constexpr(2.0**-126)  # those of voxels.py
SMALLEST_LOGARITHM = tl.constexpr(2.0**-23)
LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST_LABEL = tl.constexpr(2.0**63)
ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _across(x, CONFIG: tl.constexpr):
    """Turn a value for each voxel so that it goes with `[classes, voxels]`, or with the voxels of one class."""
    if not CONFIG.few:
        x = x[None, :]
    return x


@triton.jit
def _down(x, CONFIG: tl.constexpr):
    """Turn a value for each class so that it goes with `[classes, voxels]`, or with the voxels of one class."""
    if not CONFIG.few:
        x = x[:, None]
    return x


# --- Masks and targets of voxels ---


@triton.jit
def _from_label_map(target, voxels, stride_v, inside, CONFIG: tl.constexpr):
    """Return the label of each voxel, whether it is live, and whether its label is an error.

    A label that is no class is returned as it is, and may look like a class in 32 bits: it is not live, or it is
    an error. Replacing it here would not compile with Triton < 3.7, for labels of up to 32 bits (its pass that
    removes layout conversions moves the replacement to before the load of the label).
    """
    value = tl.load(target + voxels * stride_v, mask=inside, other=0)
    if value.dtype.is_floating():
        if value.dtype != tl.float64:
            value = value.to(tl.float32)
        value = tl.where(tl.abs(value) < LARGEST_LABEL, value, 0.5)  # NaN as an integer is undefined
        label = value.to(tl.int64)
        fraction = label.to(value.dtype) != value
    else:
        label = value.to(tl.int64)  # a uint8 compared with −1 would wrap around to 255
        fraction = (label < 0) if value.dtype.is_int_unsigned() else (label != label)
    live = inside
    if CONFIG.ignore == "label":
        live = inside & ((label != CONFIG.index) | fraction)
    wrong = live & ((label < 0) | (label >= CONFIG.known) | fraction)
    return label.to(tl.int32), live, wrong


@triton.jit
def _of_regions(label, CONFIG: tl.constexpr):
    """The regions of each label as bits, by comparisons: a table in memory would be one more load per voxel."""
    bits = label & 0
    for k in tl.static_range(tl.constexpr(len(CONFIG.regions))):
        bits = tl.where(label == k, CONFIG.regions[k], bits)
    return bits


@triton.jit
def _from_channels(target, voxels, stride_c, stride_v, inside, CONFIG: tl.constexpr):
    """Return whether each voxel is live, and whether it is half ignored, for one channel per class."""
    live = inside
    wrong = inside & (voxels < 0)  # never
    if CONFIG.ignore == "channel":
        channel = tl.load(
            target + tl.cast(stride_c, tl.int64) * CONFIG.index + voxels * stride_v, mask=inside, other=0
        ).to(CONFIG.real)
        live = inside & (channel != 1)
        wrong = live & (channel != 0)
    elif CONFIG.ignore == "sentinel":
        differs = tl.full((CONFIG.block_v,), 0, tl.int32)
        if CONFIG.few:
            for c in tl.static_range(tl.constexpr(CONFIG.classes)):
                g = _load(target, c, voxels, stride_c, stride_v, inside, 0, CONFIG)
                differs = tl.maximum(differs, (g != CONFIG.index).to(tl.int32))
        else:
            for first in tl.range(0, CONFIG.classes, CONFIG.block_c):
                classes = first + tl.arange(0, CONFIG.block_c)
                g = _load(target, classes, voxels, stride_c, stride_v, inside, 0, CONFIG)
                other = (g != CONFIG.index) & (classes < CONFIG.classes)[:, None]
                differs = tl.maximum(differs, tl.max(other.to(tl.int32), 0))
        live = inside & (differs > 0)
    return live, wrong


@triton.jit
def _look_at_target(target, voxels, stride_c, stride_v, inside, CONFIG: tl.constexpr):
    """Return the class of each voxel, if it has one, whether it is live, and whether it is an error."""
    if CONFIG.labels:
        label, live, wrong = _from_label_map(target, voxels, stride_v, inside, CONFIG)
        if len(CONFIG.regions) > 0:
            label = _of_regions(label, CONFIG)
    else:
        live, wrong = _from_channels(target, voxels, stride_c, stride_v, inside, CONFIG)
        label = live
    return label, live, wrong


@triton.jit
def _look_at(target, mask, voxels, target_c, target_v, mask_v, existing, CONFIG: tl.constexpr):
    """Return what `_look_at_target` does, and the weight of each voxel, and which are inside: not of weight 0."""
    if CONFIG.weighted:
        weight = tl.load(mask + voxels * mask_v, mask=existing, other=0).to(CONFIG.real)
        inside = existing & (weight != 0)
        label, live, wrong = _look_at_target(target, voxels, target_c, target_v, inside, CONFIG)
        wrong = wrong | (existing & (((weight >= 0) & (weight < INFINITY)) == 0))
    else:
        weight = existing
        inside = existing
        label, live, wrong = _look_at_target(target, voxels, target_c, target_v, inside, CONFIG)
    return label, weight, inside, live, wrong


@triton.jit
def _times_weight(x, weight, CONFIG: tl.constexpr):
    if CONFIG.weighted:
        x = x * _across(weight, CONFIG)
    return x


# --- Tiles ---


@triton.jit
def _tile_of_voxels(tile, CONFIG: tl.constexpr):
    """64 bits wide, as all that is multiplied by a stride: a volume may have more than 2³¹ elements.

    Where neighbouring voxels lie side by side, lane after lane shall take voxel after voxel, with all classes.
    Triton would give a thread several neighbours that it can load at once, and the classes to different threads,
    which would then have to exchange what a softmax needs; the hint prevents that: it sets the number of
    neighbours that a thread takes.
    """
    voxels = tile.to(tl.int64) * CONFIG.block_v + tl.arange(0, CONFIG.block_v)
    if CONFIG.side_by_side and not CONFIG.few:
        number: tl.constexpr = CONFIG.neighbours
        voxels = tl.multiple_of(voxels, number)
        if CONFIG.neighbours > 1:
            voxels = tl.max_contiguous(voxels, number)
    return voxels


@triton.jit
def _existing(voxels, count, CONFIG: tl.constexpr):
    if CONFIG.even:
        existing = tl.full((CONFIG.block_v,), 1, tl.int1)
    else:
        existing = voxels < count
    return existing


@triton.jit
def _offsets(classes, voxels, stride_c, stride_v, CONFIG: tl.constexpr):
    rows = tl.cast(classes, tl.int64) * stride_c
    return _down(rows, CONFIG) + _across(voxels * stride_v, CONFIG)


@triton.jit
def _mask(classes, inside, CONFIG: tl.constexpr):
    mask = _across(inside, CONFIG)
    if not CONFIG.few:
        mask = mask & (classes < CONFIG.classes)[:, None]
    return mask


@triton.jit
def _load(pointer, classes, voxels, stride_c, stride_v, inside, FILL: tl.constexpr, CONFIG: tl.constexpr):
    offsets = _offsets(classes, voxels, stride_c, stride_v, CONFIG)
    return tl.load(pointer + offsets, mask=_mask(classes, inside, CONFIG), other=FILL).to(CONFIG.real)


@triton.jit
def _load_input(input, classes, voxels, stride_c, stride_v, inside, live, CONFIG: tl.constexpr):
    if CONFIG.activation == "none":
        z = _load(input, classes, voxels, stride_c, stride_v, inside, 0, CONFIG)
        if CONFIG.ignore != "no":
            z = tl.where(_across(live, CONFIG), z, 0)
    else:
        z = _load(input, classes, voxels, stride_c, stride_v, inside, MINUS_INFINITY, CONFIG)
        z = tl.minimum(z, LARGEST_LOGIT, propagate_nan=ALL)
        if CONFIG.few:
            z = tl.maximum(z, -LARGEST_LOGIT, propagate_nan=ALL)
        else:
            lowest = tl.where(classes < CONFIG.classes, -LARGEST_LOGIT, MINUS_INFINITY).to(CONFIG.real)
            z = tl.maximum(z, lowest[:, None], propagate_nan=ALL)
        if CONFIG.ignore != "no":
            z = tl.where(_across(live, CONFIG), z, MINUS_INFINITY)
    return z


@triton.jit
def _load_target(target, label, classes, voxels, stride_c, stride_v, inside, live, CONFIG: tl.constexpr):
    """Labels are compared here: there is never a one-hot in memory."""
    if CONFIG.labels:
        if len(CONFIG.regions) > 0:
            same = (((_across(label, CONFIG) >> _down(classes, CONFIG)) & 1) != 0) & _across(live, CONFIG)
        else:
            same = (_across(label, CONFIG) == _down(classes, CONFIG)) & _across(live, CONFIG)
        g = tl.where(same, 1.0, 0.0).to(CONFIG.real)
    else:
        g = _load(target, classes, voxels, stride_c, stride_v, inside, 0, CONFIG)
        if CONFIG.ignore != "no":
            g = tl.where(_across(live, CONFIG), g, 0)
    return g


@triton.jit
def _load_map_of_voxels(map, voxels, stride_v, inside, live, CONFIG: tl.constexpr):
    """What a map has for each voxel, 0 where ignored; without such a map it stands for nothing."""
    if CONFIG.map == "voxel":
        m = tl.load(map + voxels * stride_v, mask=inside, other=0).to(CONFIG.real)
        if CONFIG.ignore != "no":
            m = tl.where(live, m, 0)
    else:
        m = inside
    return m


@triton.jit
def _is_not_finite(of_voxel, CONFIG: tl.constexpr):
    if CONFIG.map == "voxel":
        wrong = (of_voxel - of_voxel) != 0
    else:
        wrong = of_voxel & False
    return wrong


@triton.jit
def _load_map(map, g, of_voxel, classes, voxels, stride_c, stride_v, inside, live, CONFIG: tl.constexpr):
    """What a map has for each class; without a map it stands for nothing."""
    if CONFIG.map == "voxel":
        m = _across(of_voxel, CONFIG) * g
    elif CONFIG.map == "channel":
        m = _load(map, classes, voxels, stride_c, stride_v, inside, 0, CONFIG)
        if CONFIG.ignore != "no":
            m = tl.where(_across(live, CONFIG), m, 0)
    else:
        m = g
    return m


@triton.jit
def _out_of_range(p, g, m, CONFIG: tl.constexpr):
    """Where a probability is outside [0, 1] or a map not finite; NaN passes in a prediction alone."""
    if not CONFIG.labels:
        wrong = ((g >= -CONFIG.g_slack) & (g <= 1 + CONFIG.g_slack)) == 0
        if CONFIG.activation == "none":
            wrong = wrong | (p < -CONFIG.p_slack) | (p > 1 + CONFIG.p_slack)
        if CONFIG.map == "channel":
            wrong = wrong | ((m - m) != 0)
    elif CONFIG.activation == "none":
        wrong = (p < -CONFIG.p_slack) | (p > 1 + CONFIG.p_slack)
        if CONFIG.map == "channel":
            wrong = wrong | ((m - m) != 0)
    else:
        wrong = (m - m) != 0
    return wrong


@triton.jit
def _flags(errors, CONFIG: tl.constexpr):
    """Errors as they are kept from tile to tile: those of each class as numbers.

    AMD's compiler would keep booleans in scalar registers, of which there are not enough for so many.
    """
    if CONFIG.ranged and (not CONFIG.labels or CONFIG.map == "channel"):
        errors = errors.to(tl.int32)
    return errors


# --- Activation ---


@triton.jit
def _exp(x, CONFIG: tl.constexpr):
    """exp(x) for x ≤ 0; in float32 2^(x·log₂ e) by an instruction of the GPU, with a relative error below 2⁻²².

    To that adds |x|·2⁻²⁴ of the product's rounding. Results below 2⁻¹²⁶ become 0, in every Triton from 3.4 on
    (ex2.approx.ftz). `tl.exp` is as exact and takes three instructions more for them.
    """
    if CONFIG.real == tl.float64:
        result = tl.exp(x)
    else:
        result = tl.exp2(x * LOG2_E)
    return result


@triton.jit
def _normaliser(z, live, CONFIG: tl.constexpr):
    """Return the largest logit of each voxel, and the sum over its classes of exp(z − largest)."""
    largest = tl.full((CONFIG.block_v,), 0, CONFIG.real)
    total = largest
    if CONFIG.activation == "softmax":
        largest = tl.where(live, tl.max(z, 0), 0)
        total = tl.where(live, tl.sum(_exp(z - largest[None, :], CONFIG), 0), 1)
    return largest, total


@triton.jit
def _normaliser_of_few(z, live, CONFIG: tl.constexpr):
    """As `_normaliser`, of a tuple with the logits of each class."""
    largest = tl.zeros_like(z[0])
    total = largest
    if CONFIG.activation == "softmax":
        largest = z[0]
        for c in tl.static_range(1, tl.constexpr(CONFIG.classes)):
            largest = tl.maximum(largest, z[c])
        largest = tl.where(live, largest, 0)
        for c in tl.static_range(tl.constexpr(CONFIG.classes)):
            total += _exp(z[c] - largest, CONFIG)
        total = tl.where(live, total, 1)
    return largest, total


@triton.jit
def _normaliser_of_many(input, voxels, stride_c, stride_v, inside, live, CONFIG: tl.constexpr):
    """As `_normaliser`, over tiles of classes: what was summed is rescaled whenever a larger logit comes."""
    largest = tl.full((CONFIG.block_v,), MINUS_INFINITY, CONFIG.real)
    total = tl.full((CONFIG.block_v,), 0, CONFIG.real)
    if CONFIG.activation == "softmax":
        for first in tl.range(0, CONFIG.classes, CONFIG.block_c):
            classes = first + tl.arange(0, CONFIG.block_c)
            z = _load_input(input, classes, voxels, stride_c, stride_v, inside, live, CONFIG)
            larger = tl.maximum(largest, tl.max(z, 0))
            shift = tl.where(larger == MINUS_INFINITY, 0, larger)  # nothing but −∞ up to here
            total = total * _exp(largest - shift, CONFIG) + tl.sum(_exp(z - shift[None, :], CONFIG), 0)
            largest = larger
    return tl.where(live, largest, 0), tl.where(live, total, 1)


@triton.jit
def _log1p(e):
    """log(1 + e), also where 1 + e rounds to 1 (Kahan's way; Goldberg 1991, theorem 4)."""
    u = 1 + e
    lost = u == 1
    return tl.where(lost, e, tl.log(u) * (e / tl.where(lost, 1, u - 1)))


@triton.jit
def _log_of_probability(p):
    return tl.log(tl.maximum(p, SMALLEST_PROBABILITY, propagate_nan=ALL))


@triton.jit
def _activate(z, largest, total, CONFIG: tl.constexpr):
    """Return p, log p and log n; a logarithm that no sum needs has no meaning."""
    log_p = z
    log_n = z
    if CONFIG.activation == "softmax":
        below = z - _across(largest, CONFIG)
        p = _exp(below, CONFIG) * _across(1 / total, CONFIG)
        if CONFIG.log_p:
            log_p = below - _across(tl.log(total), CONFIG)
    elif CONFIG.activation == "sigmoid":
        e = tl.exp(-tl.abs(z))
        larger = 1 / (1 + e)
        p = tl.where(z >= 0, larger, e * larger)
        if CONFIG.log_p:
            log_p = tl.minimum(z, 0) - _log1p(e)
        if CONFIG.log_n:
            log_n = tl.minimum(-z, 0) - _log1p(e)
    else:
        p = z
        if CONFIG.log_p:
            log_p = _log_of_probability(p)
        if CONFIG.log_n:
            log_n = _log_of_probability(1 - p)
    return p, log_p, log_n


# --- The terms, and their derivatives: the table of voxels.py ---


@triton.jit
def _power(base, exponent: tl.constexpr):
    """base^exponent; 0 replaces a negative base, and 0 to a negative power does not occur."""
    base = tl.maximum(base, 0, propagate_nan=ALL)
    if exponent == 0:
        result = tl.full(base.shape, 1, base.dtype)
    elif exponent == 1:
        result = base
    elif exponent == 2:
        result = base * base
    else:
        result = tl.where(base == 0, 0, tl.exp2(exponent * tl.log2(tl.where(base == 0, 1, base))))
    return result


@triton.jit
def _power_of_log(log, CONFIG: tl.constexpr):
    """(−log)^γ, near 0 its chord."""
    distance = -log
    power = _power(tl.maximum(distance, SMALLEST_LOGARITHM, propagate_nan=ALL), CONFIG.gamma)
    return tl.where(distance < SMALLEST_LOGARITHM, distance * CONFIG.chord, power)


@triton.jit
def _derivative_of_power(log, CONFIG: tl.constexpr):
    """Its derivative by −log."""
    distance = -log
    power = CONFIG.gamma * _power(tl.maximum(distance, SMALLEST_LOGARITHM, propagate_nan=ALL), CONFIG.gamma - 1)
    return tl.where(distance < SMALLEST_LOGARITHM, CONFIG.chord, power)


@triton.jit
def _times(g, log):
    """g·log with 0·(−∞) = 0."""
    return g * tl.where(g == 0, 0, log)


@triton.jit
def _of_classes(weight, CONFIG: tl.constexpr):
    """A weight of each class, or by cell of each class and voxel, so that it goes with a tile."""
    if not CONFIG.by_cell:
        weight = _down(weight, CONFIG)
    return weight


@triton.jit
def _term(NAME: tl.constexpr, p, g, m, log_p, log_n, live, CONFIG: tl.constexpr):
    """What a voxel adds to a sum."""
    if NAME == "intersection":
        term = p * g
    elif NAME == "soft_intersection":
        term = tl.minimum(p, g, propagate_nan=ALL)
    elif NAME == "prediction":
        term = p
    elif NAME == "prediction_squared":
        term = p * p
    elif NAME == "target":
        term = g
    elif NAME == "target_squared":
        term = g * g
    elif NAME == "cross_entropy":
        term = -_times(g, log_p)
    elif NAME == "cross_entropy_negative":
        term = -_times(1 - g, log_n)
    elif NAME == "focal":
        term = -_times(g, log_p) * _power(1 - p, CONFIG.gamma)
    elif NAME == "focal_negative":
        term = -_times(1 - g, log_n) * _power(p, CONFIG.gamma)
    elif NAME == "log_loss":
        term = tl.where(_across(live, CONFIG), -log_p, 0)
    elif NAME == "log_loss_negative":
        term = tl.where(_across(live, CONFIG), -log_n, 0)
    elif NAME == "log_power":
        term = _times(g, _power_of_log(log_p, CONFIG))
    elif NAME == "log_power_negative":
        term = _times(1 - g, _power_of_log(log_n, CONFIG))
    elif NAME == "false_positives":
        term = p * (1 - g)
    elif NAME == "false_negatives":
        term = (1 - p) * g
    elif NAME == "true_negatives":
        term = tl.where(_across(live, CONFIG), (1 - p) * (1 - g), 0)
    elif NAME == "sensitivity_error":
        term = g * (g - p) * (g - p)
    elif NAME == "specificity_error":
        term = (1 - g) * (g - p) * (g - p)
    elif NAME == "voxels":
        term = tl.where(_across(live, CONFIG), tl.full(p.shape, 1, p.dtype), 0)
    elif NAME == "map_intersection":
        term = p * m
    elif NAME == "map_total":
        term = m
    return term


@triton.jit
def _focal_slope(p, n, log_p, CONFIG: tl.constexpr):
    """n^γ·(1 − γ·p·log p / n), where log p / n tends to −1 as n tends to 0, and p·log p to 0 as p does."""
    derivative = _power(n, CONFIG.gamma)
    if CONFIG.gamma != 0:
        some = n > 0
        ratio = p * tl.maximum(log_p, -1e4, propagate_nan=ALL) / tl.where(some, n, 1)
        derivative = derivative * (1 - CONFIG.gamma * tl.where(some, ratio, -1))
    return derivative


@triton.jit
def _by_prediction(
    NAME: tl.constexpr, weight, p, g, m, log_p, log_n, derivative, kink, by_log_p, by_log_n, CONFIG: tl.constexpr
):
    """Add the derivatives of weight·term by p, by min(p, g), by log p and by log n."""
    if NAME == "intersection":
        derivative += weight * g
    elif NAME == "soft_intersection":
        kink += weight
    elif NAME == "prediction":
        derivative += weight
    elif NAME == "prediction_squared":
        derivative += 2 * weight * p
    elif NAME == "false_positives":
        derivative += weight * (1 - g)
    elif NAME == "cross_entropy":
        by_log_p -= weight * g
    elif NAME == "cross_entropy_negative":
        by_log_n -= weight * (1 - g)
    elif NAME == "focal":
        by_log_p -= weight * g * _focal_slope(p, 1 - p, log_p, CONFIG)
    elif NAME == "focal_negative":
        by_log_n -= weight * (1 - g) * _focal_slope(1 - p, p, log_n, CONFIG)
    elif NAME == "log_loss":
        by_log_p -= weight
    elif NAME == "log_loss_negative":
        by_log_n -= weight
    elif NAME == "log_power":
        by_log_p -= weight * _times(g, _derivative_of_power(log_p, CONFIG))
    elif NAME == "log_power_negative":
        by_log_n -= weight * _times(1 - g, _derivative_of_power(log_n, CONFIG))
    elif NAME == "sensitivity_error":
        derivative += 2 * weight * g * (p - g)
    elif NAME == "specificity_error":
        derivative += 2 * weight * (1 - g) * (p - g)
    elif NAME == "map_intersection":
        derivative += weight * m
    return derivative, kink, by_log_p, by_log_n


@triton.jit
def _by_target(NAME: tl.constexpr, weight, p, g, log_p, log_n, derivative, kink, by_logs, CONFIG: tl.constexpr):
    """Add the derivatives of weight·term by g, by min(p, g), and by the g before a logarithm."""
    if NAME == "intersection":
        derivative += weight * p
    elif NAME == "soft_intersection":
        kink += weight
    elif NAME == "target":
        derivative += weight
    elif NAME == "target_squared":
        derivative += 2 * weight * g
    elif NAME == "false_positives":
        derivative -= weight * p
    elif NAME == "cross_entropy":
        by_logs -= weight * log_p
    elif NAME == "cross_entropy_negative":
        by_logs += weight * log_n
    elif NAME == "focal":
        by_logs -= weight * _power(1 - p, CONFIG.gamma) * log_p
    elif NAME == "focal_negative":
        by_logs += weight * _power(p, CONFIG.gamma) * log_n
    elif NAME == "log_power":
        by_logs += weight * _power_of_log(log_p, CONFIG)
    elif NAME == "log_power_negative":
        by_logs -= weight * _power_of_log(log_n, CONFIG)
    elif NAME == "sensitivity_error":
        derivative += weight * (g - p) * (3 * g - p)
    elif NAME == "specificity_error":
        derivative += weight * (g - p) * (2 - 3 * g + p)
    return derivative, kink, by_logs


@triton.jit
def _with_kink(derivative, kink, own, other):
    """Add the derivative of kink·min(own, other); where the two are equal the sub-gradient nearest to zero."""
    below = derivative + kink
    at = tl.maximum(tl.minimum(derivative, below), 0) + tl.minimum(tl.maximum(derivative, below), 0)
    return tl.where(own < other, below, tl.where(own > other, derivative, at))


@triton.jit
def _derivative_of_target(weights, p, g, log_p, log_n, CONFIG: tl.constexpr):
    """Return ∂L/∂g."""
    derivative = tl.zeros_like(p)
    by_logs = tl.zeros_like(p)
    kink = tl.zeros_like(p)
    for k in tl.static_range(len(CONFIG.sums)):
        derivative, kink, by_logs = _by_target(
            tl.constexpr(CONFIG.sums[CONFIG.order[k]]),
            _of_classes(weights[CONFIG.order[k]], CONFIG),
            p,
            g,
            log_p,
            log_n,
            derivative,
            kink,
            by_logs,
            CONFIG,
        )
    if CONFIG.kink:
        derivative = _with_kink(derivative, kink, g, p)
    return derivative + by_logs


@triton.jit
def _over(by_log, p):
    """∂L/∂p of ∂L/∂log p: 0 from the floor of the logarithm on downwards."""
    return tl.where(p <= SMALLEST_PROBABILITY, 0, by_log / tl.maximum(p, SMALLEST_PROBABILITY, propagate_nan=ALL))


@triton.jit
def _derivative_of_input(weights, p, g, m, log_p, log_n, CONFIG: tl.constexpr):
    """Return ∂L/∂z, or of a softmax q = p·∂L/∂p + ∂L/∂log p, which still lacks −p·Σq."""
    derivative = tl.zeros_like(p)
    by_log_p = tl.zeros_like(p)
    by_log_n = tl.zeros_like(p)
    kink = tl.zeros_like(p)
    for k in tl.static_range(len(CONFIG.sums)):
        derivative, kink, by_log_p, by_log_n = _by_prediction(
            tl.constexpr(CONFIG.sums[CONFIG.order[k]]),
            _of_classes(weights[CONFIG.order[k]], CONFIG),
            p,
            g,
            m,
            log_p,
            log_n,
            derivative,
            kink,
            by_log_p,
            by_log_n,
            CONFIG,
        )
    if CONFIG.kink:
        derivative = _with_kink(derivative, kink, p, g)
    n = 1 - p
    if CONFIG.activation == "none":
        if CONFIG.log_p:
            derivative += _over(by_log_p, p)
        if CONFIG.log_n:
            derivative -= _over(by_log_n, n)
    else:
        derivative = p * derivative
        if CONFIG.log_p:
            derivative += by_log_p
        if CONFIG.activation == "sigmoid":
            derivative = n * derivative
            if CONFIG.log_n:
                derivative -= p * by_log_n
    return derivative


@triton.jit
def _derivative_of(weights, p, g, m, log_p, log_n, CONFIG: tl.constexpr):
    if CONFIG.by_target:
        derivative = _derivative_of_target(weights, p, g, log_p, log_n, CONFIG)
    else:
        derivative = _derivative_of_input(weights, p, g, m, log_p, log_n, CONFIG)
    return derivative


@triton.jit
def _load_weights(weights, item, items, classes, CONFIG: tl.constexpr):
    """Load ∂L/∂sums of one sample: for each sum a vector over the classes, or the number of one class."""
    rows = ()
    for k in tl.static_range(len(CONFIG.sums)):
        row = weights + (k * items + item).to(tl.int64) * CONFIG.classes + classes
        if CONFIG.few:
            value = tl.load(row)
        else:
            value = tl.load(row, mask=classes < CONFIG.classes, other=0)
        rows = rows + (value.to(CONFIG.real),)
    return rows


@triton.jit
def _place_of_sum(partial, row, k, item, items, CONFIG: tl.constexpr):
    return partial + ((tl.cast(row, tl.int64) * len(CONFIG.sums) + k) * items + item) * CONFIG.classes


@triton.jit
def _sum_of_neighbours(x, CONFIG: tl.constexpr):
    """Add up the voxels that a thread has: four side by side, where they are loaded at once."""
    if CONFIG.block_v != CONFIG.lanes:
        if CONFIG.vectors:
            x = tl.sum(tl.reshape(x, (CONFIG.lanes, CONFIG.block_v // CONFIG.lanes)), 1)
        else:
            x = tl.sum(tl.reshape(x, (CONFIG.block_v // CONFIG.lanes, CONFIG.lanes)), 0)
    return x


@triton.jit
def _store_derivative(
    result, derivative, classes, voxels, stride_c, stride_v, existing, live, weight, CONFIG: tl.constexpr
):
    if CONFIG.ignore != "no" or CONFIG.weighted:
        derivative = _times_weight(tl.where(_across(live, CONFIG), derivative, 0), weight, CONFIG)
    offsets = _offsets(classes, voxels, stride_c, stride_v, CONFIG)
    tl.store(result + offsets, derivative, mask=_mask(classes, existing, CONFIG))


@triton.jit
def _weighed_terms(weights, p, g, log_p, log_n, live, weight, classes, existing, CONFIG: tl.constexpr):
    """What each voxel adds to Σ weight·sum in each of some classes; 0 in a class that there is not."""
    total = tl.zeros_like(p)
    for k in tl.static_range(len(CONFIG.sums)):
        term = _term(tl.constexpr(CONFIG.sums[k]), p, g, g, log_p, log_n, live, CONFIG)
        total += _down(weights[k], CONFIG) * term
    return tl.where(_mask(classes, existing & live, CONFIG), _times_weight(total, weight, CONFIG), 0)


# --- Kernels ---

COUNTS = ["items", "chunks"]  # for whose values no kernel is compiled anew


@triton.jit(do_not_specialize=COUNTS)
def sums_of_few(
    input,
    target,
    mask,
    map,
    partial,
    valid,
    items,
    chunks,
    count,
    input_b,
    input_c,
    input_v,
    target_b,
    target_c,
    target_v,
    mask_b,
    mask_v,
    map_b,
    map_c,
    map_v,
    CONFIG: tl.constexpr,
):
    """As `sums`, for few classes: each is a vector over the voxels, so that nothing is exchanged or filled up."""
    item = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    input += item.to(tl.int64) * input_b
    target += item.to(tl.int64) * target_b
    mask += item.to(tl.int64) * mask_b
    map += item.to(tl.int64) * map_b
    wrong = _flags(tl.full((CONFIG.block_v,), 0, tl.int1), CONFIG)
    totals = ()
    for _ in tl.static_range(len(CONFIG.sums) * CONFIG.classes):
        totals = totals + (tl.full((CONFIG.lanes,), 0, CONFIG.real),)
    for step in tl.range(0, CONFIG.tiles):
        voxels = _tile_of_voxels(chunk + step * tl.cast(chunks, tl.int64), CONFIG)
        existing = _existing(voxels, count, CONFIG)
        label, weight, inside, live, bad = _look_at(
            target, mask, voxels, target_c, target_v, mask_v, existing, CONFIG
        )
        of_voxel = _load_map_of_voxels(map, voxels, map_v, inside, live, CONFIG)
        bad = bad | _is_not_finite(of_voxel, CONFIG)
        wrong = wrong | _flags(bad, CONFIG)
        z = ()
        for c in tl.static_range(tl.constexpr(CONFIG.classes)):
            z = z + (_load_input(input, c, voxels, input_c, input_v, inside, live, CONFIG),)
        largest, total = _normaliser_of_few(z, live, CONFIG)
        longer = ()
        for c in tl.static_range(tl.constexpr(CONFIG.classes)):
            g = _load_target(target, label, c, voxels, target_c, target_v, inside, live, CONFIG)
            m = _load_map(map, g, of_voxel, c, voxels, map_c, map_v, inside, live, CONFIG)
            p, log_p, log_n = _activate(z[c], largest, total, CONFIG)
            if CONFIG.ranged:
                wrong = wrong | _flags(_out_of_range(p, g, m, CONFIG), CONFIG)
            for k in tl.static_range(len(CONFIG.sums)):
                term = _term(tl.constexpr(CONFIG.sums[k]), p, g, m, log_p, log_n, live, CONFIG)
                term = _sum_of_neighbours(_times_weight(term, weight, CONFIG), CONFIG)
                longer = longer + (totals[c * len(CONFIG.sums) + k] + term,)
        totals = longer
    for k in tl.static_range(len(CONFIG.sums)):
        place = _place_of_sum(partial, chunk, k, item, items, CONFIG)
        for c in tl.static_range(tl.constexpr(CONFIG.classes)):
            tl.store(place + c, tl.sum(totals[c * len(CONFIG.sums) + k], 0).to(tl.float64))
    tl.store(valid, 0, mask=tl.max(wrong.to(tl.int32), 0) > 0)


@triton.jit(do_not_specialize=COUNTS)
def sums(
    input,
    target,
    mask,
    map,
    partial,
    valid,
    items,
    chunks,
    count,
    input_b,
    input_c,
    input_v,
    target_b,
    target_c,
    target_v,
    mask_b,
    mask_v,
    map_b,
    map_c,
    map_v,
    CONFIG: tl.constexpr,
):
    """Write the sums over some tiles to partial `[chunks, K, items, classes]`, and on an error 0 to `valid`.

    Each element of a tile has totals of its own, of at most 16 addends, and a tree adds them up at the end: so
    threads seldom exchange anything, and no chain of float32 additions is long.
    """
    item = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    input += item.to(tl.int64) * input_b
    target += item.to(tl.int64) * target_b
    mask += item.to(tl.int64) * mask_b
    map += item.to(tl.int64) * map_b
    classes = tl.arange(0, CONFIG.block_c)
    # A label map alone can be wrong once per voxel.
    if not CONFIG.ranged:
        wrong = _flags(tl.full((1, CONFIG.block_v), 0, tl.int1), CONFIG)
    else:
        wrong = _flags(tl.full((CONFIG.block_c, CONFIG.block_v), 0, tl.int1), CONFIG)
    totals = ()
    for _ in tl.static_range(len(CONFIG.sums)):
        totals = totals + (tl.full((CONFIG.block_c, CONFIG.block_v), 0, CONFIG.real),)
    for step in tl.range(0, CONFIG.tiles):
        voxels = _tile_of_voxels(chunk + step * tl.cast(chunks, tl.int64), CONFIG)
        existing = _existing(voxels, count, CONFIG)
        label, weight, inside, live, bad = _look_at(
            target, mask, voxels, target_c, target_v, mask_v, existing, CONFIG
        )
        of_voxel = _load_map_of_voxels(map, voxels, map_v, inside, live, CONFIG)
        bad = bad | _is_not_finite(of_voxel, CONFIG)
        g = _load_target(target, label, classes, voxels, target_c, target_v, inside, live, CONFIG)
        m = _load_map(map, g, of_voxel, classes, voxels, map_c, map_v, inside, live, CONFIG)
        z = _load_input(input, classes, voxels, input_c, input_v, inside, live, CONFIG)
        largest, total = _normaliser(z, live, CONFIG)
        p, log_p, log_n = _activate(z, largest, total, CONFIG)
        wrong = wrong | _flags(bad[None, :], CONFIG)
        if CONFIG.ranged:
            wrong = wrong | _flags(_out_of_range(p, g, m, CONFIG), CONFIG)
        longer = ()
        for k in tl.static_range(len(CONFIG.sums)):
            term = _term(tl.constexpr(CONFIG.sums[k]), p, g, m, log_p, log_n, live, CONFIG)
            longer = longer + (totals[k] + _times_weight(term, weight, CONFIG),)
        totals = longer
    for k in tl.static_range(len(CONFIG.sums)):
        place = _place_of_sum(partial, chunk, k, item, items, CONFIG)
        tl.store(place + classes, tl.sum(totals[k], 1).to(tl.float64), mask=classes < CONFIG.classes)
    # All that find an error write the same: their order does not matter.
    tl.store(valid, 0, mask=tl.max(tl.max(wrong.to(tl.int32), 1), 0) > 0)


@triton.jit(do_not_specialize=COUNTS)
def sums_of_many(
    input,
    target,
    mask,
    map,
    partial,
    valid,
    items,
    chunks,
    count,
    input_b,
    input_c,
    input_v,
    target_b,
    target_c,
    target_v,
    mask_b,
    mask_v,
    map_b,
    map_c,
    map_v,
    CONFIG: tl.constexpr,
):
    """As `sums`, for one tile of voxels and any number of classes."""
    item = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    input += item.to(tl.int64) * input_b
    target += item.to(tl.int64) * target_b
    mask += item.to(tl.int64) * mask_b
    map += item.to(tl.int64) * map_b
    voxels = _tile_of_voxels(chunk, CONFIG)
    existing = _existing(voxels, count, CONFIG)
    label, weight, inside, live, bad = _look_at(
        target, mask, voxels, target_c, target_v, mask_v, existing, CONFIG
    )
    of_voxel = _load_map_of_voxels(map, voxels, map_v, inside, live, CONFIG)
    bad = bad | _is_not_finite(of_voxel, CONFIG)
    largest, total = _normaliser_of_many(input, voxels, input_c, input_v, inside, live, CONFIG)
    wrong = bad.to(tl.int32)
    for first in tl.range(0, CONFIG.classes, CONFIG.block_c):
        classes = first + tl.arange(0, CONFIG.block_c)
        g = _load_target(target, label, classes, voxels, target_c, target_v, inside, live, CONFIG)
        m = _load_map(map, g, of_voxel, classes, voxels, map_c, map_v, inside, live, CONFIG)
        z = _load_input(input, classes, voxels, input_c, input_v, inside, live, CONFIG)
        p, log_p, log_n = _activate(z, largest, total, CONFIG)
        if CONFIG.ranged:
            wrong = tl.maximum(wrong, tl.max(_out_of_range(p, g, m, CONFIG).to(tl.int32), 0))
        for k in tl.static_range(len(CONFIG.sums)):
            term = _term(tl.constexpr(CONFIG.sums[k]), p, g, m, log_p, log_n, live, CONFIG)
            place = _place_of_sum(partial, chunk, k, item, items, CONFIG)
            total_of_term = tl.sum(_times_weight(term, weight, CONFIG), 1)
            tl.store(place + classes, total_of_term, mask=classes < CONFIG.classes)
    tl.store(valid, 0, mask=tl.max(wrong, 0) > 0)


@triton.jit(do_not_specialize=COUNTS)
def terms_of_few(
    input,
    target,
    mask,
    weights,
    result,
    valid,
    items,
    chunks,
    count,
    input_b,
    input_c,
    input_v,
    target_b,
    target_c,
    target_v,
    mask_b,
    mask_v,
    CONFIG: tl.constexpr,
):
    """As `terms`, for few classes: each is a vector over the voxels."""
    item = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    input += item.to(tl.int64) * input_b
    target += item.to(tl.int64) * target_b
    mask += item.to(tl.int64) * mask_b
    result += item.to(tl.int64) * count
    rows = ()
    for c in tl.static_range(tl.constexpr(CONFIG.classes)):
        rows = rows + (_load_weights(weights, item, items, c, CONFIG),)
    wrong = _flags(tl.full((CONFIG.block_v,), 0, tl.int1), CONFIG)
    for step in tl.range(0, CONFIG.tiles):
        voxels = _tile_of_voxels(chunk + step * tl.cast(chunks, tl.int64), CONFIG)
        existing = _existing(voxels, count, CONFIG)
        label, weight, inside, live, bad = _look_at(
            target, mask, voxels, target_c, target_v, mask_v, existing, CONFIG
        )
        wrong = wrong | _flags(bad, CONFIG)
        z = ()
        for c in tl.static_range(tl.constexpr(CONFIG.classes)):
            z = z + (_load_input(input, c, voxels, input_c, input_v, inside, live, CONFIG),)
        largest, total = _normaliser_of_few(z, live, CONFIG)
        found = tl.zeros_like(largest)
        for c in tl.static_range(tl.constexpr(CONFIG.classes)):
            g = _load_target(target, label, c, voxels, target_c, target_v, inside, live, CONFIG)
            p, log_p, log_n = _activate(z[c], largest, total, CONFIG)
            if CONFIG.ranged:
                wrong = wrong | _flags(_out_of_range(p, g, g, CONFIG), CONFIG)
            found += _weighed_terms(rows[c], p, g, log_p, log_n, live, weight, c, existing, CONFIG)
        tl.store(result + voxels, found, mask=existing)
    tl.store(valid, 0, mask=tl.max(wrong.to(tl.int32), 0) > 0)


@triton.jit(do_not_specialize=COUNTS)
def terms(
    input,
    target,
    mask,
    weights,
    result,
    valid,
    items,
    chunks,
    count,
    input_b,
    input_c,
    input_v,
    target_b,
    target_c,
    target_v,
    mask_b,
    mask_v,
    CONFIG: tl.constexpr,
):
    """Write what each voxel adds to Σ weight·sum, `[items, count]`; `weights` are `[K, items, classes]`."""
    item = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    input += item.to(tl.int64) * input_b
    target += item.to(tl.int64) * target_b
    mask += item.to(tl.int64) * mask_b
    result += item.to(tl.int64) * count
    classes = tl.arange(0, CONFIG.block_c)
    rows = _load_weights(weights, item, items, classes, CONFIG)
    wrong = tl.full((CONFIG.block_v,), 0, tl.int32)
    for step in tl.range(0, CONFIG.tiles):
        voxels = _tile_of_voxels(chunk + step * tl.cast(chunks, tl.int64), CONFIG)
        existing = _existing(voxels, count, CONFIG)
        label, weight, inside, live, bad = _look_at(
            target, mask, voxels, target_c, target_v, mask_v, existing, CONFIG
        )
        g = _load_target(target, label, classes, voxels, target_c, target_v, inside, live, CONFIG)
        z = _load_input(input, classes, voxels, input_c, input_v, inside, live, CONFIG)
        largest, total = _normaliser(z, live, CONFIG)
        p, log_p, log_n = _activate(z, largest, total, CONFIG)
        wrong = tl.maximum(wrong, bad.to(tl.int32))
        if CONFIG.ranged:
            wrong = tl.maximum(wrong, tl.max(_out_of_range(p, g, g, CONFIG).to(tl.int32), 0))
        found = tl.sum(_weighed_terms(rows, p, g, log_p, log_n, live, weight, classes, existing, CONFIG), 0)
        tl.store(result + voxels, found, mask=existing)
    tl.store(valid, 0, mask=tl.max(wrong, 0) > 0)


@triton.jit(do_not_specialize=COUNTS)
def terms_of_many(
    input,
    target,
    mask,
    weights,
    result,
    valid,
    items,
    chunks,
    count,
    input_b,
    input_c,
    input_v,
    target_b,
    target_c,
    target_v,
    mask_b,
    mask_v,
    CONFIG: tl.constexpr,
):
    """As `terms`, for one tile of voxels and any number of classes."""
    item = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    input += item.to(tl.int64) * input_b
    target += item.to(tl.int64) * target_b
    mask += item.to(tl.int64) * mask_b
    result += item.to(tl.int64) * count
    voxels = _tile_of_voxels(chunk, CONFIG)
    existing = _existing(voxels, count, CONFIG)
    label, weight, inside, live, bad = _look_at(
        target, mask, voxels, target_c, target_v, mask_v, existing, CONFIG
    )
    largest, total = _normaliser_of_many(input, voxels, input_c, input_v, inside, live, CONFIG)
    wrong = bad.to(tl.int32)
    found = tl.full((CONFIG.block_v,), 0, CONFIG.real)
    for first in tl.range(0, CONFIG.classes, CONFIG.block_c):
        classes = first + tl.arange(0, CONFIG.block_c)
        rows = _load_weights(weights, item, items, classes, CONFIG)
        g = _load_target(target, label, classes, voxels, target_c, target_v, inside, live, CONFIG)
        z = _load_input(input, classes, voxels, input_c, input_v, inside, live, CONFIG)
        p, log_p, log_n = _activate(z, largest, total, CONFIG)
        if CONFIG.ranged:
            wrong = tl.maximum(wrong, tl.max(_out_of_range(p, g, g, CONFIG).to(tl.int32), 0))
        found += tl.sum(_weighed_terms(rows, p, g, log_p, log_n, live, weight, classes, existing, CONFIG), 0)
    tl.store(result + voxels, found, mask=existing)
    tl.store(valid, 0, mask=tl.max(wrong, 0) > 0)


@triton.jit(do_not_specialize=COUNTS)
def gradient_of_few(
    input,
    target,
    mask,
    map,
    weights,
    result,
    items,
    chunks,
    count,
    input_b,
    input_c,
    input_v,
    target_b,
    target_c,
    target_v,
    mask_b,
    mask_v,
    map_b,
    map_c,
    map_v,
    result_b,
    result_c,
    result_v,
    CONFIG: tl.constexpr,
):
    """As `gradient`, for few classes: each is a vector over the voxels."""
    item = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    input += item.to(tl.int64) * input_b
    target += item.to(tl.int64) * target_b
    mask += item.to(tl.int64) * mask_b
    map += item.to(tl.int64) * map_b
    result += item.to(tl.int64) * result_b
    rows = ()
    for c in tl.static_range(tl.constexpr(CONFIG.classes)):
        rows = rows + (_load_weights(weights, item, items, c, CONFIG),)
    for step in tl.range(0, CONFIG.tiles):
        voxels = _tile_of_voxels(chunk + step * tl.cast(chunks, tl.int64), CONFIG)
        existing = _existing(voxels, count, CONFIG)
        label, weight, inside, live, _ = _look_at(
            target, mask, voxels, target_c, target_v, mask_v, existing, CONFIG
        )
        of_voxel = _load_map_of_voxels(map, voxels, map_v, inside, live, CONFIG)
        z = ()
        for c in tl.static_range(tl.constexpr(CONFIG.classes)):
            z = z + (_load_input(input, c, voxels, input_c, input_v, inside, live, CONFIG),)
        largest, total = _normaliser_of_few(z, live, CONFIG)
        predictions = ()
        derivatives = ()
        sum_q = tl.zeros_like(largest)
        for c in tl.static_range(tl.constexpr(CONFIG.classes)):
            g = _load_target(target, label, c, voxels, target_c, target_v, inside, live, CONFIG)
            m = _load_map(map, g, of_voxel, c, voxels, map_c, map_v, inside, live, CONFIG)
            p, log_p, log_n = _activate(z[c], largest, total, CONFIG)
            derivative = _derivative_of(rows[c], p, g, m, log_p, log_n, CONFIG)
            sum_q += derivative
            predictions = predictions + (p,)
            derivatives = derivatives + (derivative,)
        for c in tl.static_range(tl.constexpr(CONFIG.classes)):
            derivative = derivatives[c]
            if CONFIG.activation == "softmax" and not CONFIG.by_target:
                derivative -= predictions[c] * sum_q
            _store_derivative(result, derivative, c, voxels, result_c, result_v, existing, live, weight, CONFIG)


@triton.jit(do_not_specialize=COUNTS)
def gradient(
    input,
    target,
    mask,
    map,
    weights,
    result,
    items,
    chunks,
    count,
    input_b,
    input_c,
    input_v,
    target_b,
    target_c,
    target_v,
    mask_b,
    mask_v,
    map_b,
    map_c,
    map_v,
    result_b,
    result_c,
    result_v,
    CONFIG: tl.constexpr,
):
    """Write ∂L/∂input or ∂L/∂target of some tiles of voxels, from weights = ∂L/∂sums `[K, items, classes]`."""
    item = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    input += item.to(tl.int64) * input_b
    target += item.to(tl.int64) * target_b
    mask += item.to(tl.int64) * mask_b
    map += item.to(tl.int64) * map_b
    result += item.to(tl.int64) * result_b
    classes = tl.arange(0, CONFIG.block_c)
    rows = _load_weights(weights, item, items, classes, CONFIG)
    for step in tl.range(0, CONFIG.tiles):
        voxels = _tile_of_voxels(chunk + step * tl.cast(chunks, tl.int64), CONFIG)
        existing = _existing(voxels, count, CONFIG)
        label, weight, inside, live, _ = _look_at(
            target, mask, voxels, target_c, target_v, mask_v, existing, CONFIG
        )
        of_voxel = _load_map_of_voxels(map, voxels, map_v, inside, live, CONFIG)
        g = _load_target(target, label, classes, voxels, target_c, target_v, inside, live, CONFIG)
        m = _load_map(map, g, of_voxel, classes, voxels, map_c, map_v, inside, live, CONFIG)
        z = _load_input(input, classes, voxels, input_c, input_v, inside, live, CONFIG)
        largest, total = _normaliser(z, live, CONFIG)
        p, log_p, log_n = _activate(z, largest, total, CONFIG)
        derivative = _derivative_of(rows, p, g, m, log_p, log_n, CONFIG)
        if CONFIG.activation == "softmax" and not CONFIG.by_target:
            derivative -= p * tl.sum(derivative, 0)[None, :]
        _store_derivative(result, derivative, classes, voxels, result_c, result_v, existing, live, weight, CONFIG)


@triton.jit(do_not_specialize=COUNTS)
def gradient_of_many(
    input,
    target,
    mask,
    map,
    weights,
    result,
    items,
    chunks,
    count,
    input_b,
    input_c,
    input_v,
    target_b,
    target_c,
    target_v,
    mask_b,
    mask_v,
    map_b,
    map_c,
    map_v,
    result_b,
    result_c,
    result_v,
    CONFIG: tl.constexpr,
):
    """As `gradient`, for one tile of voxels and any number of classes."""
    item = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    input += item.to(tl.int64) * input_b
    target += item.to(tl.int64) * target_b
    mask += item.to(tl.int64) * mask_b
    map += item.to(tl.int64) * map_b
    result += item.to(tl.int64) * result_b
    voxels = _tile_of_voxels(chunk, CONFIG)
    existing = _existing(voxels, count, CONFIG)
    label, weight, inside, live, _ = _look_at(target, mask, voxels, target_c, target_v, mask_v, existing, CONFIG)
    of_voxel = _load_map_of_voxels(map, voxels, map_v, inside, live, CONFIG)
    largest, total = _normaliser_of_many(input, voxels, input_c, input_v, inside, live, CONFIG)
    sum_q = tl.full((CONFIG.block_v,), 0, CONFIG.real)
    if CONFIG.activation == "softmax" and not CONFIG.by_target:
        for first in tl.range(0, CONFIG.classes, CONFIG.block_c):
            classes = first + tl.arange(0, CONFIG.block_c)
            rows = _load_weights(weights, item, items, classes, CONFIG)
            g = _load_target(target, label, classes, voxels, target_c, target_v, inside, live, CONFIG)
            m = _load_map(map, g, of_voxel, classes, voxels, map_c, map_v, inside, live, CONFIG)
            z = _load_input(input, classes, voxels, input_c, input_v, inside, live, CONFIG)
            p, log_p, log_n = _activate(z, largest, total, CONFIG)
            sum_q += tl.sum(_derivative_of(rows, p, g, m, log_p, log_n, CONFIG), 0)
    for first in tl.range(0, CONFIG.classes, CONFIG.block_c):
        classes = first + tl.arange(0, CONFIG.block_c)
        rows = _load_weights(weights, item, items, classes, CONFIG)
        g = _load_target(target, label, classes, voxels, target_c, target_v, inside, live, CONFIG)
        m = _load_map(map, g, of_voxel, classes, voxels, map_c, map_v, inside, live, CONFIG)
        z = _load_input(input, classes, voxels, input_c, input_v, inside, live, CONFIG)
        p, log_p, log_n = _activate(z, largest, total, CONFIG)
        derivative = _derivative_of(rows, p, g, m, log_p, log_n, CONFIG)
        if CONFIG.activation == "softmax" and not CONFIG.by_target:
            derivative -= p * sum_q[None, :]
        _store_derivative(result, derivative, classes, voxels, result_c, result_v, existing, live, weight, CONFIG)


# --- By cell ---

# Each program adds to rows of its own, tile after tile: no atomic addition, whose order would not be fixed. The
# loop is over the cells that a tile has, and neighbours are mostly of one.

NO_CELL = tl.constexpr(2**31 - 1)


@triton.jit
def _load_cells(partition, voxels, stride_v, live):
    """The cell of each voxel, NO_CELL where none counts."""
    cells = tl.load(partition + voxels * stride_v, mask=live, other=0).to(tl.int32)
    return tl.where(live, cells, NO_CELL)


@triton.jit(do_not_specialize=[*COUNTS, "cells"])
def sums_by_cell(
    input,
    target,
    mask,
    map,
    partition,
    partial,
    valid,
    items,
    chunks,
    count,
    cells,
    input_b,
    input_c,
    input_v,
    target_b,
    target_c,
    target_v,
    mask_b,
    mask_v,
    map_b,
    map_c,
    map_v,
    partition_b,
    partition_v,
    CONFIG: tl.constexpr,
):
    """As `sums`, added to partial `[chunks, K, items * cells, classes]`, float64, which is 0 before."""
    item = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    input += item.to(tl.int64) * input_b
    target += item.to(tl.int64) * target_b
    mask += item.to(tl.int64) * mask_b
    map += item.to(tl.int64) * map_b
    partition += item.to(tl.int64) * partition_b
    classes = tl.arange(0, CONFIG.block_c)
    wrong = tl.full((CONFIG.block_v,), 0, tl.int32)
    for step in tl.range(0, CONFIG.tiles):
        voxels = _tile_of_voxels(chunk + step * tl.cast(chunks, tl.int64), CONFIG)
        existing = _existing(voxels, count, CONFIG)
        label, weight, inside, live, bad = _look_at(
            target, mask, voxels, target_c, target_v, mask_v, existing, CONFIG
        )
        of_voxel = _load_map_of_voxels(map, voxels, map_v, inside, live, CONFIG)
        bad = bad | _is_not_finite(of_voxel, CONFIG)
        g = _load_target(target, label, classes, voxels, target_c, target_v, inside, live, CONFIG)
        m = _load_map(map, g, of_voxel, classes, voxels, map_c, map_v, inside, live, CONFIG)
        z = _load_input(input, classes, voxels, input_c, input_v, inside, live, CONFIG)
        largest, total = _normaliser(z, live, CONFIG)
        p, log_p, log_n = _activate(z, largest, total, CONFIG)
        wrong = tl.maximum(wrong, bad.to(tl.int32))
        if CONFIG.ranged:
            wrong = tl.maximum(wrong, tl.max(_out_of_range(p, g, m, CONFIG).to(tl.int32), 0))
        of_cell = _load_cells(partition, voxels, partition_v, live)
        cell = tl.min(of_cell, 0)
        while cell < NO_CELL:
            chosen = (of_cell == cell)[None, :]
            for k in tl.static_range(len(CONFIG.sums)):
                term = _term(tl.constexpr(CONFIG.sums[k]), p, g, m, log_p, log_n, live, CONFIG)
                found = tl.sum(tl.where(chosen, _times_weight(term, weight, CONFIG), 0), 1)
                row = (tl.cast(chunk, tl.int64) * len(CONFIG.sums) + k) * items + item
                place = partial + (row * cells + cell) * CONFIG.classes + classes
                there = classes < CONFIG.classes
                tl.store(place, tl.load(place, mask=there, other=0) + found.to(tl.float64), mask=there)
            tl.debug_barrier()  # another thread may be the one that adds to the same row next
            cell = tl.min(tl.where(of_cell > cell, of_cell, NO_CELL), 0)
    tl.store(valid, 0, mask=tl.max(wrong, 0) > 0)


@triton.jit(do_not_specialize=[*COUNTS, "cells"])
def gradient_by_cell(
    input,
    target,
    mask,
    map,
    partition,
    weights,
    result,
    items,
    chunks,
    count,
    cells,
    input_b,
    input_c,
    input_v,
    target_b,
    target_c,
    target_v,
    mask_b,
    mask_v,
    map_b,
    map_c,
    map_v,
    partition_b,
    partition_v,
    result_b,
    result_c,
    result_v,
    CONFIG: tl.constexpr,
):
    """As `gradient`, from weights = ∂L/∂sums `[K, items * cells, classes]`."""
    item = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    input += item.to(tl.int64) * input_b
    target += item.to(tl.int64) * target_b
    mask += item.to(tl.int64) * mask_b
    map += item.to(tl.int64) * map_b
    partition += item.to(tl.int64) * partition_b
    result += item.to(tl.int64) * result_b
    classes = tl.arange(0, CONFIG.block_c)
    for step in tl.range(0, CONFIG.tiles):
        voxels = _tile_of_voxels(chunk + step * tl.cast(chunks, tl.int64), CONFIG)
        existing = _existing(voxels, count, CONFIG)
        label, weight, inside, live, _ = _look_at(
            target, mask, voxels, target_c, target_v, mask_v, existing, CONFIG
        )
        of_cell = _load_cells(partition, voxels, partition_v, live)
        rows = ()
        for k in tl.static_range(len(CONFIG.sums)):
            row = (tl.cast(k * items + item, tl.int64) * cells + of_cell) * CONFIG.classes
            place = weights + row[None, :] + classes[:, None]
            rows = rows + (tl.load(place, mask=_mask(classes, live, CONFIG), other=0).to(CONFIG.real),)
        of_voxel = _load_map_of_voxels(map, voxels, map_v, inside, live, CONFIG)
        g = _load_target(target, label, classes, voxels, target_c, target_v, inside, live, CONFIG)
        m = _load_map(map, g, of_voxel, classes, voxels, map_c, map_v, inside, live, CONFIG)
        z = _load_input(input, classes, voxels, input_c, input_v, inside, live, CONFIG)
        largest, total = _normaliser(z, live, CONFIG)
        p, log_p, log_n = _activate(z, largest, total, CONFIG)
        derivative = _derivative_of(rows, p, g, m, log_p, log_n, CONFIG)
        if CONFIG.activation == "softmax" and not CONFIG.by_target:
            derivative -= p * tl.sum(derivative, 0)[None, :]
        _store_derivative(result, derivative, classes, voxels, result_c, result_v, existing, live, weight, CONFIG)
