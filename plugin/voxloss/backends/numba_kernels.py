"""The fused pass on the CPU: the loops, compiled by Numba, over blocks of voxels that stay in the cache.

`forward` and `backward` go through a part of one sample, cell by cell of a partition, and block by block: load,
activate, then fill rows with p, g, log p, log n, and add up the requested sums, or write the derivative. The
terms and their derivatives are those of the table in `voxels`; n is 1 − p.

The configuration is read once per row of voxels, not once per voxel. So one compiled function for each pair of
dtypes serves every loss, with one pair for label maps of all dtypes and one for other targets of whole numbers
(`read_labels`, `read_channels`), and each innermost loop is plain enough for LLVM to make vector instructions of
it. For that every constant in it has the rows' dtype: Numba takes float32 and a bare 1 to float64.

All that is compiled stands in this one file; `numba_cache` names it and the one that its constants come from.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import event
from numba.extending import intrinsic, overload

from voxloss.backends.numba_cache import KernelCache
from voxloss.backends.voxels import LARGEST_LOGIT, SMALLEST_LOGARITHM, SMALLEST_PROBABILITY, TERMS

_LOGGER = logging.getLogger("voxloss")

SOFTMAX, SIGMOID, NONE = range(3)
NATIVE, HALF, BFLOAT16 = range(3)  # what a 16-bit element is

# Rows of `KernelConfig.sums`, of the sums and of their gradients.
SUMS = tuple(TERMS)  # in this order:
INTERSECTION, SOFT_INTERSECTION, PREDICTION, PREDICTION_SQUARED, TARGET, TARGET_SQUARED = range(6)
CROSS_ENTROPY, CROSS_ENTROPY_NEGATIVE, FOCAL, FOCAL_NEGATIVE, LOG_LOSS, LOG_LOSS_NEGATIVE = range(6, 12)
LOG_POWER, LOG_POWER_NEGATIVE = range(12, 14)
FALSE_POSITIVES, FALSE_NEGATIVES, TRUE_NEGATIVES, SENSITIVITY_ERROR, SPECIFICITY_ERROR, VOXELS = range(14, 20)
MAP_INTERSECTION, MAP_TOTAL = range(20, 22)

# Rows of voxels to work in: p, n, the target, …; SCALE is 1/Σ exp(z − max).
P, N, G, LOG_P, LOG_N, FOCUS, OWN, MAXIMUM, SCALE, LOG_SUM, DOT, EXP, WEIGHT = range(13)
MAP, OF_VOXEL = range(13, 15)  # m of a channel; where the map has one number per voxel, this number
ROWS = 15

IGNORED, NO_CLASS = -1, -2  # in place of a label


class Lines(NamedTuple):
    """How a sample `[channels, voxels]` lies in a one-dimensional array of memory."""

    first: int
    per_channel: int
    per_voxel: int
    kind: int  # of its elements


class KernelConfig(NamedTuple):
    """`voxels.PassSpec` in numbers, as the kernels take it."""

    activation: int
    is_map: bool  # the target is a label map
    regions: bool  # a label is in channel c if its bit c is set
    sums: tuple[bool, ...]  # for each of the SUMS
    gamma: float
    ignores: bool
    ignore_index: int
    slack: float  # how far outside [0, 1] a prediction may be
    target_slack: float
    masked: bool  # voxels of weight 0 are ignored
    weighted: bool  # there may be other weights than 0 and 1
    mapped: bool  # a sum needs the map
    map_of_label: bool


class _Notice(event.Listener):
    """States what the first call with two dtypes waits for."""

    said = ""

    def on_start(self, event: event.Event) -> None:
        """A function is being compiled: it was not found in the cache."""
        compiling = event.data["dispatcher"]
        if compiling.py_func.__module__ != __name__ or compiling.py_func.__name__ not in ("forward", "backward"):
            return
        (input, _), (target, _) = event.data["args"][:2]
        # Both half-precision dtypes come as one of integers, and so do labels.
        dtypes = [str(each.dtype).replace("uint16", "float16/bfloat16") for each in (input, target)]
        targets = "label maps" if dtypes[1] == "int32" else f"one-hot targets in {dtypes[1]}"
        said = f"logits in {dtypes[0]} and {targets}"
        if said == self.said:  # backward comes after forward
            return
        self.said = said
        _LOGGER.warning(
            "voxloss: compiling the fused CPU pass for %s, which takes 10 to 60 seconds; %s",
            said,
            "this happens once, the result is cached on disk."
            if compiling.stats.cache_path
            else "set NUMBA_CACHE_DIR to a folder that can be written to, or every process has to.",
        )

    def on_end(self, event: event.Event) -> None:
        """Nothing to state."""


event.register("numba:compile", _Notice())


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function, and keep the result on disk unless no folder can be written to.

    Sums may be re-ordered, which vector instructions need. NaN and infinity keep their meaning: they have to
    reach the loss, where GradScaler looks for them.
    """
    dispatcher: Any = njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})(function)
    with suppress(RuntimeError):  # "no locator available": a read-only installation and no home
        dispatcher._cache = KernelCache(function)
    return dispatcher


# Elementary functions: in float32 polynomials, which become vector instructions, in float64 those of libm.


def _exp(x: float) -> float:
    """e^x for x ≤ 0."""
    raise NotImplementedError


def _log(x: float) -> float:
    """Log x for x ≥ 2⁻¹²⁶, finite."""
    raise NotImplementedError


def _log1p(x: float) -> float:
    """log(1 + x) for 0 ≤ x ≤ 1."""
    raise NotImplementedError


_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# What is added to it is rounded to an integer, which the lowest bits then hold, with 64 added: 2^(n + 64) is a
# normal number also where 2^n is none.
_ROUND = np.float32((3 << 22) + 64)
_DOWN_64 = np.float32(2.0**-64)
_LOWEST = np.float32(-104.0)  # from there on e^x is 0
_INLINE: Any = {"forceinline": True}
# Rounding on purpose is not to be re-ordered away.
_IN_ORDER: Any = {"fastmath": {"contract"}, "forceinline": True}


@overload(_exp, jit_options=_IN_ORDER)
def _exp_of(x):
    if x != types.float32:
        return lambda x: math.exp(x)

    def exp32(x):
        # x = n·log 2 + r with |r| ≤ log(2)/2; e^r is 1 + r + r² times the polynomial that equals (e^r − 1 − r)/r²
        # at five Chebyshev points.
        x = _LOWEST if x < _LOWEST else x
        nothing = x - x  # or NaN, which the bits below may lose
        y = x * _LOG2_E + _ROUND
        n = y - _ROUND
        r = x - n * _LN2_HIGH - n * _LN2_LOW
        q = np.float32(1.392628358e-03)
        q = q * r + np.float32(8.363229922e-03)
        q = q * r + np.float32(4.166654861e-02)
        q = q * r + np.float32(1.666657682e-01)
        q = q * r + np.float32(5.000000103e-01)
        q = q * r + np.float32(1)
        e = q * r + np.float32(1)
        bits = np.float32(e).view(np.int32) + (np.float32(y).view(np.int32) << np.int32(23))
        return np.int32(bits).view(np.float32) * _DOWN_64 + nothing

    return exp32


@overload(_log, jit_options=_IN_ORDER)
def _log_of(x):
    if x != types.float32:
        return lambda x: math.log(x)

    def log32(x):
        # x = 2^n·m with √½ ≤ m < √2; log m is the polynomial of Cephes' logf.
        bits = np.float32(x).view(np.int32)
        n = np.float32((bits - np.int32(0x3F3504F3)) >> np.int32(23))
        m = np.int32(bits - (np.int32(n) << np.int32(23))).view(np.float32)
        r = m - np.float32(1)
        q = np.float32(7.0376836292e-2)
        q = q * r - np.float32(1.1514610310e-1)
        q = q * r + np.float32(1.1676998740e-1)
        q = q * r - np.float32(1.2420140846e-1)
        q = q * r + np.float32(1.4249322787e-1)
        q = q * r - np.float32(1.6668057665e-1)
        q = q * r + np.float32(2.0000714765e-1)
        q = q * r - np.float32(2.4999993993e-1)
        q = q * r + np.float32(3.3333331174e-1)
        square = r * r
        low = q * r * square + n * _LN2_LOW - np.float32(0.5) * square
        result = low + r + n * _LN2_HIGH
        return result if x == x else x

    return log32


@overload(_log1p, jit_options=_IN_ORDER)
def _log1p_of(x):
    if x != types.float32:
        return lambda x: math.log1p(x)

    def log1p32(x):
        # x times the polynomial that equals log(1 + x)/x at ten Chebyshev points of [0, 1].
        q = np.float32(-3.176057053e-03)
        q = q * x + np.float32(1.954252744e-02)
        q = q * x - np.float32(5.637361321e-02)
        q = q * x + np.float32(1.054362384e-01)
        q = q * x - np.float32(1.526966710e-01)
        q = q * x + np.float32(1.966327427e-01)
        q = q * x - np.float32(2.495161627e-01)
        q = q * x + np.float32(3.332971050e-01)
        q = q * x - np.float32(4.999989265e-01)
        q = q * x + np.float32(9.999999947e-01)
        return q * x

    return log1p32


def _answer(z: float) -> tuple[float, float, float]:
    """p = 1/(1 + exp(−z)), 1 − p, and exp(−|z|); neither of the first two is a difference."""
    raise NotImplementedError


@overload(_answer, jit_options=_INLINE)
def _answer_of(z):
    def answer(z):
        small = _exp(-abs(z))
        larger = type(z)(1) / (type(z)(1) + small)
        smaller = small * larger
        return (smaller, larger, small) if z < type(z)(0) else (larger, smaller, small)

    return answer


def _log_softmax(z: float, maximum: float, log_sum: float) -> float:
    """(z − maximum) − log Σ exp(z − maximum)."""
    raise NotImplementedError


@overload(_log_softmax, jit_options=_IN_ORDER)
def _log_softmax_of(z, maximum, log_sum):
    return lambda z, maximum, log_sum: (z - maximum) - log_sum


def _mixed(inside: float, outside: float, g: float) -> float:
    """inside·g + outside·(1 − g); of a g that is 0 or 1, one of the two and nothing of the other."""
    raise NotImplementedError


@overload(_mixed, jit_options=_IN_ORDER)
def _mixed_of(inside, outside, g):
    if g == types.float64:
        return lambda inside, outside, g: inside * g + outside * (1 - g)
    return lambda inside, outside, g: inside * g + outside * (np.float32(1) - g)


# Elements of 16 bits: Numba has no arithmetic for them, so they come and go as integers.


def _widen(x: Any, kind: int) -> float:
    """The number that an element holds."""
    raise NotImplementedError


def _narrow(x: float, kind: int, like: Any) -> Any:
    """A number as an element of the array `like`, rounded to nearest, ties to even."""
    raise NotImplementedError


_HALF_SCALE = np.float32(2.0**112)  # between the exponents' offsets of float16 and float32


@overload(_widen, jit_options=_INLINE)
def _widen_of(x, kind):
    if x not in (types.int16, types.uint16):
        return lambda x, kind: x

    def widen(x, kind):
        bits = np.uint32(np.uint16(x))
        if kind == BFLOAT16:
            return np.uint32(bits << np.uint32(16)).view(np.float32)
        if kind == HALF:
            magnitude = np.uint32(bits & np.uint32(0x7FFF)) << np.uint32(13)
            if magnitude >= np.uint32(0x7C00 << 13):
                magnitude = np.uint32(magnitude | np.uint32(0x7F800000))
                value = np.uint32(magnitude).view(np.float32)
            else:
                value = np.uint32(magnitude).view(np.float32) * _HALF_SCALE
            return -value if bits & np.uint32(0x8000) else value
        return np.float32(x)

    return widen


@overload(_narrow, jit_options=_IN_ORDER)
def _narrow_of(x, kind, like):
    if like.dtype != types.uint16:
        return lambda x, kind, like: x

    def narrow(x, kind, like):
        bits = np.float32(x).view(np.uint32)
        sign = np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000)
        magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
        if kind == BFLOAT16:
            if magnitude > np.uint32(0x7F800000):
                return np.uint16(sign | np.uint32(0x7FC0))
            odd = np.uint32(magnitude >> np.uint32(16)) & np.uint32(1)
            return np.uint16(sign | np.uint32(np.uint32(magnitude + np.uint32(0x7FFF) + odd) >> np.uint32(16)))
        if magnitude > np.uint32(0x7F800000):
            return np.uint16(sign | np.uint32(0x7E00))
        if magnitude >= np.uint32(0x477FF000):  # 65520, from where on float16 rounds to infinity
            return np.uint16(sign | np.uint32(0x7C00))
        if magnitude < np.uint32(0x38800000):
            # Below 2⁻¹⁴ float16 counts in steps of 2⁻²⁴, as float32 does in [½, 1).
            steps = np.uint32(magnitude).view(np.float32) + np.float32(0.5)
            return np.uint16(sign | np.uint32(np.float32(steps).view(np.uint32) - np.uint32(0x3F000000)))
        odd = np.uint32(magnitude >> np.uint32(13)) & np.uint32(1)
        rounded = np.uint32(magnitude + np.uint32(0xFFF) + odd - np.uint32(0x38000000))
        return np.uint16(sign | np.uint32(rounded >> np.uint32(13)))

    return narrow


# Labels of any dtype become int32 before the pass, other whole numbers what the rows are: fewer functions are
# compiled.


def _whole(x: Any) -> tuple[int, bool]:
    """A number as int64, and whether that is the same number."""
    raise NotImplementedError


@overload(_whole, jit_options=_INLINE)
def _whole_of(x):
    if isinstance(x, types.Float):

        def whole(x):
            fits = abs(x) < 2.0**63  # NaN does not; outside, the integer is undefined
            label = np.int64(x if fits else 0)
            return label, fits & (label == x)

        return whole
    if x == types.uint64:
        return lambda x: (np.int64(x), np.int64(x) >= 0)
    return lambda x: (np.int64(x), True)


@compiled
def read_labels(item, start, count, channels, ignores, ignore_index, labels):
    """Write the labels of the voxels from `start` on as int32: classes, IGNORED or NO_CLASS."""
    memory, lines = item
    first = lines.first + start * lines.per_voxel
    if lines.per_voxel == 1:
        _read_line(memory[first : first + count], lines.kind, count, channels, ignores, ignore_index, labels)
    else:
        _read_line(memory[first :: lines.per_voxel], lines.kind, count, channels, ignores, ignore_index, labels)


@compiled
def _read_line(line, kind, count, channels, ignores, ignore_index, labels):
    for v in range(count):
        label, whole = _whole(_widen(line[v], kind))
        known = label if whole & (label >= 0) & (label < channels) else NO_CLASS
        labels[v] = IGNORED if ignores & whole & (label == ignore_index) else known


@compiled
def look_up(count, table, labels):
    """Write for each label what the table has, the regions that it belongs to as bits."""
    for v in range(count):
        labels[v] = table[labels[v]] if labels[v] >= 0 else labels[v]


@compiled
def read_channels(item, start, count, channels, width, values):
    """Write a target of whole numbers, one channel per class, as `width` numbers for each channel."""
    memory, lines = item
    for c in range(channels):
        first = lines.first + c * lines.per_channel + start * lines.per_voxel
        row = values[c * width : c * width + count]
        if lines.per_voxel == 1:
            line = memory[first : first + count]
            for v in range(count):
                row[v] = line[v]
        else:
            for v in range(count):
                row[v] = memory[first + v * lines.per_voxel]


# The voxels of a cell may be anywhere in a part. They are sorted, and those of a row are loaded and stored one by
# one, at `offsets`, so that rows are long and all that happens in between is the same as for neighbours. What is
# known to be within an array is an unsigned index: Numba looks whether others count from the end.


@compiled
def sort_by_cell(numbers, order, bounds):
    """Write a part's voxels in the order of their cells, and where each cell begins: `bounds` [cells + 2]."""
    for k in range(len(bounds)):
        bounds[k] = 0
    for v in range(len(numbers)):
        bounds[np.uintp(numbers[v] + 2)] += 1
    for k in range(2, len(bounds)):
        bounds[k] += bounds[k - 1]
    for v in range(len(numbers)):
        cell = np.uintp(numbers[v] + 1)
        place = bounds[cell]
        order[np.uintp(place)] = v
        bounds[cell] = place + 1


@compiled
def _row_of(start, order, first, count):
    """Where a row of a part's voxels begins, and their offsets from there: none if they are neighbours."""
    if len(order) == 0:
        return start + first, order
    offsets = order[first : first + count]
    if count > 0 and offsets[count - 1] - offsets[0] == count - 1:
        return start + offsets[0], order[:0]
    return start, offsets


# From memory into a block [channels, voxels], and back. A sample is (memory, lines): memory has one dimension and
# is walked by strides, so that no layout needs code of its own.


def _within(x: float, largest: float) -> float:
    """The number in [−largest, largest] that is nearest to x; NaN stays."""
    raise NotImplementedError


@overload(_within, jit_options=_INLINE)
def _within_of(x, largest):
    def within(x, largest):
        x = largest if x > largest else x
        return -largest if x < -largest else x

    return within


@intrinsic
def _larger(typing_context, x, y):
    """The larger of two numbers; of one and NaN, the number.

    Where the result takes the place of a number in memory, that is x: of `y if y > x else x` LLVM makes a masked
    store, which AMD's processors take ten times longer for than for a whole one.
    """

    def code(context, builder, signature, arguments):
        kind = arguments[0].type
        maximum = builder.module.declare_intrinsic("llvm.maxnum", [kind], ir.FunctionType(kind, [kind, kind]))
        return builder.call(maximum, arguments)

    return x(x, x), code


@intrinsic
def _fetch(typing_context, memory, index):
    """Have the line of the cache that an element is in brought there, and do not wait for it."""

    def code(context, builder, signature, arguments):
        array = context.make_array(memory)(context, builder, arguments[0])
        pointer = builder.bitcast(builder.gep(array.data, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(fetch, [pointer, number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.none(memory, types.intp), code


@compiled
def _fetch_row(item, start, offsets, count, channels):
    """Fetch the voxels of the next row: a row of 1024 is a page or more, where processors stop fetching ahead."""
    memory, lines = item
    if len(offsets):
        for c in range(channels):
            first = lines.first + c * lines.per_channel + start * lines.per_voxel
            for v in range(0, count, 8):  # most neighbours of a cell share a line
                _fetch(memory, first + offsets[v] * lines.per_voxel)
        return
    if lines.per_voxel != 1:
        return
    step = 64 // memory.itemsize
    for c in range(channels):
        first = lines.first + c * lines.per_channel + start
        for v in range(0, count, step):
            _fetch(memory, first + v)


@compiled
def _load(item, start, offsets, count, largest, block):
    """Fill a block; what is further from 0 than `largest` becomes that."""
    memory, lines = item
    for c in range(block.shape[0]):
        first = lines.first + c * lines.per_channel + start * lines.per_voxel
        if len(offsets):
            for v in range(count):
                place = np.uintp(first + offsets[v] * lines.per_voxel)
                block[c, v] = _within(_widen(memory[place], lines.kind), largest)
        elif lines.per_voxel == 1:
            line = memory[first : first + count]
            for v in range(count):
                block[c, v] = _within(_widen(line[v], lines.kind), largest)
        else:
            for v in range(count):
                block[c, v] = _within(_widen(memory[first + v * lines.per_voxel], lines.kind), largest)


@compiled
def _store(block, start, offsets, count, item):
    memory, lines = item
    for c in range(block.shape[0]):
        first = lines.first + c * lines.per_channel + start * lines.per_voxel
        if len(offsets):
            for v in range(count):
                memory[np.uintp(first + offsets[v] * lines.per_voxel)] = _narrow(block[c, v], lines.kind, memory)
        elif lines.per_voxel == 1:
            line = memory[first : first + count]
            for v in range(count):
                line[v] = _narrow(block[c, v], lines.kind, memory)
        else:
            for v in range(count):
                memory[first + v * lines.per_voxel] = _narrow(block[c, v], lines.kind, memory)


@compiled
def _load_row(item, c, start, offsets, count, row):
    """Fill a row with one channel of a map or a mask."""
    memory, lines = item
    first = lines.first + c * lines.per_channel + start * lines.per_voxel
    if len(offsets):
        for v in range(count):
            row[v] = memory[np.uintp(first + offsets[v] * lines.per_voxel)]
    elif lines.per_voxel == 1:
        line = memory[first : first + count]
        for v in range(count):
            row[v] = line[v]
    else:
        for v in range(count):
            row[v] = memory[first + v * lines.per_voxel]


@compiled
def _load_weights(item, start, offsets, count, weight):
    """Return whether all are finite and ≥ 0."""
    valid, infinite = True, weight.dtype.type(np.inf)
    _load_row(item, 0, start, offsets, count, weight)
    for v in range(count):
        valid &= (weight[v] >= 0) & (weight[v] < infinite)
    return valid


@compiled
def _load_map(item, c, start, offsets, count, all_count, labels, row):
    """Fill a row with what the map has for channel c, 0 where ignored; return whether all is finite."""
    zero, finite = row.dtype.type(0), True
    _load_row(item, c, start, offsets, count, row)
    if not all_count:
        for v in range(count):
            row[v] = zero if labels[v] == IGNORED else row[v]
    for v in range(count):
        finite &= row[v] - row[v] == zero
    return finite


@compiled
def _load_labels(item, start, offsets, count, config, weight, labels):
    """Write labels, IGNORED where they are; return whether all that count are classes, and whether all count."""
    memory, lines = item
    first = lines.first + start
    if len(offsets):
        for v in range(count):
            labels[v] = memory[np.uintp(first + offsets[v])]
        return _mark_ignored(labels, count, config, weight, labels)
    return _mark_ignored(memory[first : first + count], count, config, weight, labels)


@compiled
def _mark_ignored(found, count, config, weight, labels):
    lowest = np.int32(0)
    if config.masked:
        for v in range(count):
            label = np.int32(IGNORED) if weight[v] == 0 else found[v]
            lowest = label if label < lowest else lowest
            labels[v] = label
    else:
        for v in range(count):
            label = found[v]
            lowest = label if label < lowest else lowest
            labels[v] = label
    if lowest == NO_CLASS:
        for v in range(count):
            labels[v] = IGNORED if labels[v] == NO_CLASS else labels[v]
    return lowest != NO_CLASS, lowest == 0


@compiled
def _find_ignored(target, count, config, weight, labels):
    """The same for targets with one channel per class: labels only show which voxels are ignored."""
    channels, ignore_index = target.shape[0], config.ignore_index
    lowest, highest = target.dtype.type(-config.target_slack), target.dtype.type(1 + config.target_slack)
    named = config.ignores and channels > 1 and 0 <= ignore_index < channels
    all_count = True
    for v in range(count):
        labels[v] = IGNORED if config.ignores else 0
    if named:
        for v in range(count):
            labels[v] = IGNORED if target[ignore_index, v] == 1 else 0
    elif config.ignores:
        for c in range(channels):
            for v in range(count):
                labels[v] = labels[v] if target[c, v] == ignore_index else 0
    if config.masked:
        for v in range(count):
            labels[v] = IGNORED if weight[v] == 0 else labels[v]
    if config.ignores or config.masked:
        for v in range(count):
            all_count &= labels[v] != IGNORED
    outside = np.int32(0)
    if named:
        for v in range(count):
            in_part = (target[ignore_index, v] != 0) & (labels[v] != IGNORED)
            outside += np.int32(1) if in_part else np.int32(0)
    for c in range(channels):
        for v in range(count):
            inside = (target[c, v] >= lowest) & (target[c, v] <= highest)
            outside += np.int32(0) if inside | (labels[v] == IGNORED) else np.int32(1)
    return outside == 0, all_count


@compiled
def _of_channel(c, count, regions, labels):
    """Return labels that are c exactly where a voxel is in channel c; those of regions follow from the bits."""
    if not regions:
        return labels[0]
    given, here, label, bit = labels[0], labels[1], np.int32(c), np.int32(c)
    for v in range(count):
        inside = (given[v] >> bit) & np.int32(1)
        here[v] = IGNORED if given[v] == IGNORED else label if inside else NO_CLASS
    return here


@compiled
def _clear(block, count, labels):
    zero = block.dtype.type(0)
    for c in range(block.shape[0]):
        for v in range(count):
            block[c, v] = zero if labels[v] == IGNORED else block[c, v]


@compiled
def _map_of_channel(item, c, start, offsets, count, config, all_count, labels, rows):
    """Fill the row MAP for channel c, from the row G or from memory; return whether all is finite."""
    if config.map_of_label:
        for v in range(count):
            rows[MAP, v] = rows[OF_VOXEL, v] * rows[G, v]
        return True
    return _load_map(item, c, start, offsets, count, all_count, labels, rows[MAP])


# What a row of voxels holds, adds to the sums, and gets as its derivative.


@compiled
def _softmax(block, count, with_logs, all_count, labels, rows):
    """Take z to exp(z − max); fill the rows MAXIMUM, SCALE = 1/Σ exp(z − max) and LOG_SUM = −log SCALE."""
    maximum, scale, log_sum = rows[MAXIMUM], rows[SCALE], rows[LOG_SUM]
    zero, one = scale.dtype.type(0), scale.dtype.type(1)
    if block.shape[0] == 3:
        _three_exponentials(block[0], block[1], block[2], count, maximum, scale)
    else:
        for v in range(count):
            maximum[v] = block[0, v]
        for c in range(1, block.shape[0]):
            logits = block[c]
            for v in range(count):
                maximum[v] = _larger(maximum[v], logits[v])
        for v in range(count):
            scale[v] = zero
        for c in range(block.shape[0]):
            exps = block[c]
            for v in range(count):
                exps[v] = _exp(exps[v] - maximum[v])
                scale[v] += exps[v]
    for v in range(count):
        scale[v] = one / scale[v]
    if with_logs:
        for v in range(count):
            log_sum[v] = -_log(scale[v])
    if not all_count:
        for v in range(count):
            scale[v] = zero if labels[v] == IGNORED else scale[v]


@compiled
def _three_exponentials(first, second, third, count, maximum, total):
    """Take three rows z to exp(z − max), and fill the rows of the maximum and the sum, in one loop."""
    for v in range(count):
        x, y, z = first[v], second[v], third[v]
        largest = _larger(_larger(x, y), z)
        x, y, z = _exp(x - largest), _exp(y - largest), _exp(z - largest)
        first[v], second[v], third[v], maximum[v], total[v] = x, y, z, largest, x + y + z


@compiled
def _fill(c, count, activation, with_logs, all_count, block, logits, labels, target, is_map, rows):
    """Fill the rows P, N, G and, with logarithms, LOG_P and LOG_N, for channel c; all 0 where ignored."""
    p, n, g, log_p, log_n = rows[P], rows[N], rows[G], rows[LOG_P], rows[LOG_N]
    zero, one, tiny = p.dtype.type(0), p.dtype.type(1), p.dtype.type(SMALLEST_PROBABILITY)
    if is_map:
        label = np.int32(c)
        for v in range(count):
            g[v] = one if labels[v] == label else zero
    else:
        for v in range(count):
            g[v] = target[c, v]
    if activation == SOFTMAX:
        for v in range(count):
            p[v] = block[c, v] * rows[SCALE, v]
            n[v] = one - p[v]
        if with_logs:
            for v in range(count):
                log_p[v] = _log_softmax(logits[c, v], rows[MAXIMUM, v], rows[LOG_SUM, v])
    elif activation == SIGMOID:
        # t = exp(−|z|) and the larger one of p and n, 1/(1 + t), give all four without cancellation.
        t = rows[EXP]
        for v in range(count):
            t[v] = _exp(-abs(block[c, v]))
        for v in range(count):
            larger = one / (one + t[v])
            smaller = t[v] * larger
            p[v] = smaller if block[c, v] < 0 else larger
            n[v] = larger if block[c, v] < 0 else smaller
        if with_logs:
            for v in range(count):
                log_larger = -_log1p(t[v])
                log_smaller = log_larger - abs(block[c, v])
                log_p[v] = log_smaller if block[c, v] < 0 else log_larger
                log_n[v] = log_larger if block[c, v] < 0 else log_smaller
    else:
        for v in range(count):
            p[v] = block[c, v]
            n[v] = one - p[v]
        if with_logs:
            for v in range(count):
                log_p[v] = _log(tiny if p[v] < tiny else p[v])
                log_n[v] = _log(tiny if n[v] < tiny else n[v])
    if not all_count:
        for row in (P, N, G, LOG_P, LOG_N):
            for v in range(count):
                rows[row, v] = zero if labels[v] == IGNORED else rows[row, v]


@compiled
def _focus(base, count, gamma, rows):
    """Fill the row FOCUS with base^γ."""
    focus = rows[FOCUS]
    zero, tiny = focus.dtype.type(0), focus.dtype.type(SMALLEST_PROBABILITY)
    if gamma == 0:
        for v in range(count):
            focus[v] = 1
    elif gamma == 1:
        for v in range(count):
            focus[v] = zero if base[v] < zero else base[v]
    elif gamma == 2:
        for v in range(count):
            focus[v] = base[v] * base[v]
    else:
        for v in range(count):
            power = _exp(gamma * _log(tiny if base[v] < tiny else base[v]))
            focus[v] = zero if base[v] <= zero else power


@compiled
def _power_of_log(log, count, gamma, derived, rows):
    """Fill the row FOCUS with (−log)^γ, near 0 its chord; if `derived`, with the derivative of that by −log."""
    focus = rows[FOCUS]
    one, small = focus.dtype.type(1), focus.dtype.type(SMALLEST_LOGARITHM)
    largest = focus.dtype.type(np.finfo(focus.dtype).max)
    chord = focus.dtype.type(SMALLEST_LOGARITHM ** (np.float64(gamma) - 1))
    exponent, factor = (gamma - one, gamma) if derived else (gamma, one)
    unbounded = gamma > 0 and not derived
    for v in range(count):
        distance = -log[v]
        finite = largest if distance > largest else distance
        y = exponent * _log(small if finite < small else finite)
        e = _exp(-abs(y))
        power = factor * (one / e if y > 0 else e)
        power = distance if unbounded & (distance > largest) else power
        focus[v] = (chord if derived else distance * chord) if distance < small else power


def _times(x: float, weight: Any, v: int) -> float:
    """A term of voxel v times its weight; `weight` is a row, or None where all are 1."""
    raise NotImplementedError


@overload(_times, jit_options=_INLINE)
def _times_of(x, weight, v):
    if isinstance(weight, types.NoneType):
        return lambda x, weight, v: x
    return lambda x, weight, v: x * weight[v]


@compiled
def _add(c, count, sums, gamma, rows, weight, out):
    """Add the sums of channel c; of those that share a loop also some that were not requested."""
    p, g, n, log_p, log_n, focus = rows[P], rows[G], rows[N], rows[LOG_P], rows[LOG_N], rows[FOCUS]
    zero, one = p.dtype.type(0), p.dtype.type(1)
    if sums[INTERSECTION] or sums[PREDICTION] or sums[TARGET]:
        intersection, prediction, target = zero, zero, zero
        for v in range(count):
            intersection += _times(p[v] * g[v], weight, v)
            prediction += _times(p[v], weight, v)
            target += _times(g[v], weight, v)
        out[INTERSECTION, c] += intersection
        out[PREDICTION, c] += prediction
        out[TARGET, c] += target
    if sums[PREDICTION_SQUARED] or sums[TARGET_SQUARED]:
        prediction, target = zero, zero
        for v in range(count):
            prediction += _times(p[v] * p[v], weight, v)
            target += _times(g[v] * g[v], weight, v)
        out[PREDICTION_SQUARED, c] += prediction
        out[TARGET_SQUARED, c] += target
    if sums[SOFT_INTERSECTION]:
        total = zero
        for v in range(count):
            total += _times(g[v] if g[v] < p[v] else p[v], weight, v)
        out[SOFT_INTERSECTION, c] += total
    if sums[LOG_LOSS]:
        total = zero
        for v in range(count):
            total -= _times(log_p[v], weight, v)
        out[LOG_LOSS, c] += total
    if sums[LOG_LOSS_NEGATIVE]:
        total = zero
        for v in range(count):
            total -= _times(log_n[v], weight, v)
        out[LOG_LOSS_NEGATIVE, c] += total
    # 0·(−∞) is 0 here.
    if sums[CROSS_ENTROPY]:
        total = zero
        for v in range(count):
            total -= zero if g[v] == zero else _times(g[v] * log_p[v], weight, v)
        out[CROSS_ENTROPY, c] += total
    if sums[CROSS_ENTROPY_NEGATIVE]:
        total = zero
        for v in range(count):
            total -= zero if g[v] == one else _times((one - g[v]) * log_n[v], weight, v)
        out[CROSS_ENTROPY_NEGATIVE, c] += total
    if sums[FOCAL]:
        _focus(n, count, gamma, rows)
        total = zero
        for v in range(count):
            total -= zero if g[v] == zero else _times(g[v] * log_p[v] * focus[v], weight, v)
        out[FOCAL, c] += total
    if sums[FOCAL_NEGATIVE]:
        _focus(p, count, gamma, rows)
        total = zero
        for v in range(count):
            total -= zero if g[v] == one else _times((one - g[v]) * log_n[v] * focus[v], weight, v)
        out[FOCAL_NEGATIVE, c] += total
    if sums[LOG_POWER]:
        _power_of_log(log_p, count, gamma, False, rows)
        total = zero
        for v in range(count):
            total += zero if g[v] == zero else _times(g[v] * focus[v], weight, v)
        out[LOG_POWER, c] += total
    if sums[LOG_POWER_NEGATIVE]:
        _power_of_log(log_n, count, gamma, False, rows)
        total = zero
        for v in range(count):
            total += zero if g[v] == one else _times((one - g[v]) * focus[v], weight, v)
        out[LOG_POWER_NEGATIVE, c] += total
    if sums[FALSE_POSITIVES] or sums[FALSE_NEGATIVES] or sums[TRUE_NEGATIVES]:
        false_positives, false_negatives, true_negatives = zero, zero, zero
        for v in range(count):
            false_positives += _times(p[v] * (one - g[v]), weight, v)
            false_negatives += _times(n[v] * g[v], weight, v)
            true_negatives += _times(n[v] * (one - g[v]), weight, v)
        out[FALSE_POSITIVES, c] += false_positives
        out[FALSE_NEGATIVES, c] += false_negatives
        out[TRUE_NEGATIVES, c] += true_negatives
    if sums[SENSITIVITY_ERROR] or sums[SPECIFICITY_ERROR]:
        inside, outside = zero, zero
        for v in range(count):
            squared = _times((g[v] - p[v]) ** 2, weight, v)
            inside += g[v] * squared
            outside += (one - g[v]) * squared
        out[SENSITIVITY_ERROR, c] += inside
        out[SPECIFICITY_ERROR, c] += outside
    if sums[MAP_INTERSECTION] or sums[MAP_TOTAL]:
        m = rows[MAP]
        intersection, total = zero, zero
        for v in range(count):
            intersection += _times(p[v] * m[v], weight, v)
            total += _times(m[v], weight, v)
        out[MAP_INTERSECTION, c] += intersection
        out[MAP_TOTAL, c] += total


@compiled
def _by_own(count, activation, kink, constant, squared, inside, outside, soft, own, other, n, derivative):
    """Fill `derivative` with that of constant·own + squared·own² + (inside·other + outside·(1 − other))·own.

    `own` is p or g, and `soft` the factor of min(own, other). By p the derivative is multiplied on: by p for a
    softmax, whose derivative is q, and by p·n for a sigmoid.
    """
    twice = squared + squared
    zero = own.dtype.type(0)
    for v in range(count):
        by_own = constant + twice * own[v] + _mixed(inside, outside, other[v])
        if kink:
            above, below = by_own, by_own + soft
            # At p = g the sub-gradient that is nearest to zero; see `voxels`.
            at = max(min(above, below), zero) + min(max(above, below), zero)
            by_own = below if own[v] < other[v] else (above if own[v] > other[v] else at)
        if activation == SOFTMAX:
            by_own *= own[v]
        elif activation == SIGMOID:
            by_own *= own[v] * n[v]
        derivative[v] = by_own


@compiled
def _add_by_log(
    count, activation, gamma, cross_entropy, focal, log_loss, negative, p, n, g, log_p, rows, derivative
):
    """Add the derivative of −(g·(cross_entropy + focal·n^γ) + log_loss)·log p.

    If `negative`, of the terms with 1 − g in the place of g; p and n are given in each other's place, and
    `log_loss` with the other sign.
    """
    focus = rows[FOCUS]
    floor = p.dtype.type(-1e4)  # of log p; p·log p is 0 there
    tiny = p.dtype.type(SMALLEST_PROBABILITY)
    zero, one = p.dtype.type(0), p.dtype.type(1)
    constant, factor = (-one, one) if negative else (zero, one)  # −(1 − g), or g
    if focal == 0:  # the logarithms need not be there
        for v in range(count):
            by_log = (constant + factor * g[v]) * cross_entropy + log_loss
            if activation == SIGMOID:
                derivative[v] -= by_log * n[v]
            elif activation == SOFTMAX:
                derivative[v] -= by_log
            else:
                derivative[v] -= zero if p[v] <= tiny else by_log / p[v]
        return
    _focus(n, count, gamma, rows)
    for v in range(count):
        power = focal * focus[v]
        share = constant + factor * g[v]
        log = floor if log_p[v] < floor else log_p[v]
        if activation == SIGMOID:
            derivative[v] -= (
                share * (cross_entropy * n[v] + power * (n[v] - gamma * p[v] * log)) + log_loss * n[v]
            )
        else:
            ratio = -one if n[v] <= zero else p[v] * log / n[v]  # its limit
            by_log = share * (cross_entropy + power * (one - gamma * ratio)) + log_loss
            given = zero if p[v] <= tiny else by_log / p[v]
            derivative[v] -= by_log if activation == SOFTMAX else given


@compiled
def _add_by_power(count, activation, factor, negative, p, n, g, rows, derivative):
    """Add the derivative of factor·g·(−log p)^γ, whose derivative by −log p is in the row FOCUS.

    If `negative`, of that with 1 − g in the place of g; p and n are given in each other's place.
    """
    focus = rows[FOCUS]
    zero, one, tiny = p.dtype.type(0), p.dtype.type(1), p.dtype.type(SMALLEST_PROBABILITY)
    constant, sign = (-one, one) if negative else (zero, one)  # −(1 − g), or g
    for v in range(count):
        share = factor * (constant + sign * g[v])
        by_log = zero if share == zero else share * focus[v]
        if activation == SIGMOID:
            derivative[v] -= by_log * n[v]
        elif activation == SOFTMAX:
            derivative[v] -= by_log
        else:
            derivative[v] -= zero if p[v] <= tiny else by_log / p[v]


@compiled
def _add_by_error(count, activation, inside, outside, p, n, g, derivative):
    """Add the derivative, by p, of (inside·g + outside·(1 − g))·(g − p)², multiplied on as in `_by_own`."""
    for v in range(count):
        by_p = (p[v] - g[v]) * _mixed(inside, outside, g[v])
        by_p += by_p
        if activation == SOFTMAX:
            by_p *= p[v]
        elif activation == SIGMOID:
            by_p *= p[v] * n[v]
        derivative[v] += by_p


@compiled
def _add_by_map(count, activation, factor, p, n, m, derivative):
    """Add the derivative, by p, of factor·p·m, multiplied on as in `_by_own`."""
    for v in range(count):
        by_p = factor * m[v]
        if activation == SOFTMAX:
            by_p *= p[v]
        elif activation == SIGMOID:
            by_p *= p[v] * n[v]
        derivative[v] += by_p


@compiled
def _derivative(c, count, activation, sums, gamma, weights, rows, derivative):
    """Fill `derivative`: q = p·∂L/∂p + ∂L/∂log p for a softmax, otherwise ∂L/∂input; `weights` is ∂L/∂sums."""
    p, n, g, log_p, log_n = rows[P], rows[N], rows[G], rows[LOG_P], rows[LOG_N]
    constant, squared, soft = (
        weights[PREDICTION, c],
        weights[PREDICTION_SQUARED, c],
        weights[SOFT_INTERSECTION, c],
    )
    inside, outside, kink = weights[INTERSECTION, c], weights[FALSE_POSITIVES, c], sums[SOFT_INTERSECTION]
    _by_own(count, activation, kink, constant, squared, inside, outside, soft, p, g, n, derivative)
    if sums[CROSS_ENTROPY] or sums[FOCAL] or sums[LOG_LOSS]:
        ce, focal, log_loss = weights[CROSS_ENTROPY, c], weights[FOCAL, c], weights[LOG_LOSS, c]
        _add_by_log(count, activation, gamma, ce, focal, log_loss, False, p, n, g, log_p, rows, derivative)
    if sums[CROSS_ENTROPY_NEGATIVE] or sums[FOCAL_NEGATIVE] or sums[LOG_LOSS_NEGATIVE]:
        ce, focal = weights[CROSS_ENTROPY_NEGATIVE, c], weights[FOCAL_NEGATIVE, c]
        log_loss = -weights[LOG_LOSS_NEGATIVE, c]
        _add_by_log(count, activation, gamma, ce, focal, log_loss, True, n, p, g, log_n, rows, derivative)
    if sums[LOG_POWER]:
        _power_of_log(log_p, count, gamma, True, rows)
        _add_by_power(count, activation, weights[LOG_POWER, c], False, p, n, g, rows, derivative)
    if sums[LOG_POWER_NEGATIVE]:
        _power_of_log(log_n, count, gamma, True, rows)
        _add_by_power(count, activation, weights[LOG_POWER_NEGATIVE, c], True, n, p, g, rows, derivative)
    if sums[SENSITIVITY_ERROR] or sums[SPECIFICITY_ERROR]:
        inside, outside = weights[SENSITIVITY_ERROR, c], weights[SPECIFICITY_ERROR, c]
        _add_by_error(count, activation, inside, outside, p, n, g, derivative)
    if sums[MAP_INTERSECTION]:
        _add_by_map(count, activation, weights[MAP_INTERSECTION, c], p, n, rows[MAP], derivative)


@compiled
def _derivative_by_target(c, count, sums, gamma, weights, rows, derivative):
    """Fill `derivative` with ∂L/∂g."""
    p, n, g, log_p, log_n, focus = rows[P], rows[N], rows[G], rows[LOG_P], rows[LOG_N], rows[FOCUS]
    zero, two = p.dtype.type(0), p.dtype.type(2)
    constant, squared = weights[TARGET, c], weights[TARGET_SQUARED, c]
    inside = weights[INTERSECTION, c] - weights[FALSE_POSITIVES, c]  # both p·g and p·(1 − g) are linear in g
    soft, kink = weights[SOFT_INTERSECTION, c], sums[SOFT_INTERSECTION]
    _by_own(count, NONE, kink, constant, squared, inside, zero, soft, g, p, n, derivative)
    if sums[CROSS_ENTROPY]:
        for v in range(count):
            derivative[v] -= weights[CROSS_ENTROPY, c] * log_p[v]
    if sums[CROSS_ENTROPY_NEGATIVE]:
        for v in range(count):
            derivative[v] += weights[CROSS_ENTROPY_NEGATIVE, c] * log_n[v]
    if sums[FOCAL]:
        _focus(n, count, gamma, rows)
        for v in range(count):
            derivative[v] -= weights[FOCAL, c] * focus[v] * log_p[v]
    if sums[FOCAL_NEGATIVE]:
        _focus(p, count, gamma, rows)
        for v in range(count):
            derivative[v] += weights[FOCAL_NEGATIVE, c] * focus[v] * log_n[v]
    if sums[LOG_POWER]:
        _power_of_log(log_p, count, gamma, False, rows)
        for v in range(count):
            derivative[v] += weights[LOG_POWER, c] * focus[v]
    if sums[LOG_POWER_NEGATIVE]:
        _power_of_log(log_n, count, gamma, False, rows)
        for v in range(count):
            derivative[v] -= weights[LOG_POWER_NEGATIVE, c] * focus[v]
    if sums[SENSITIVITY_ERROR] or sums[SPECIFICITY_ERROR]:
        inside, outside = weights[SENSITIVITY_ERROR, c], weights[SPECIFICITY_ERROR, c]
        for v in range(count):
            error, twice = g[v] - p[v], g[v] + g[v]
            derivative[v] += error * (inside * (twice + error) + outside * (two - twice - error))


# A softmax and a label map, what most networks are trained with: apart from Σp and Σp², the sums need only the
# channel of a voxel's label, and no logarithm of the others.


@compiled
def _fill_at_labels(count, sums, gamma, with_logs, exps, labels, rows):
    """Fill the row LOG_P from z, and P, N and FOCUS for focal terms, for the channel of each label."""
    one = rows.dtype.type(1)
    if with_logs:
        for v in range(count):
            rows[LOG_P, v] = _log_softmax(rows[LOG_P, v], rows[MAXIMUM, v], rows[LOG_SUM, v])
    if sums[FOCAL]:
        for v in range(count):
            rows[P, v] = exps[max(labels[v], 0), v] * rows[SCALE, v]
            rows[N, v] = one - rows[P, v]
        _focus(rows[N], count, gamma, rows)


@compiled
def _add_at_labels(count, sums, channels, labels, rows, out):
    log_p, scale, focus = rows[LOG_P], rows[SCALE], rows[FOCUS]
    zero, one = scale.dtype.type(0), scale.dtype.type(1)
    for c in range(channels.shape[0]):
        exps, label = channels[c], np.int32(c)
        intersection, prediction, target = zero, zero, zero
        for v in range(count):
            p = exps[v] * scale[v]
            g = one if labels[v] == label else zero
            intersection += p * g
            prediction += p
            target += g
        out[INTERSECTION, c] += intersection
        out[SOFT_INTERSECTION, c] += intersection
        out[PREDICTION, c] += prediction
        out[TARGET, c] += target
        out[TARGET_SQUARED, c] += target
        if sums[PREDICTION_SQUARED]:
            total = zero
            for v in range(count):
                total += (exps[v] * scale[v]) ** 2
            out[PREDICTION_SQUARED, c] += total
        if sums[CROSS_ENTROPY]:
            total = zero
            for v in range(count):
                g = one if labels[v] == label else zero
                total -= log_p[v] * g
            out[CROSS_ENTROPY, c] += total
        if sums[FOCAL]:
            total = zero
            for v in range(count):
                g = one if labels[v] == label else zero
                total -= log_p[v] * focus[v] * g
            out[FOCAL, c] += total
        if sums[MAP_INTERSECTION] or sums[MAP_TOTAL]:
            m = rows[OF_VOXEL]
            intersection, total = zero, zero
            for v in range(count):
                here = m[v] if labels[v] == label else zero
                intersection += exps[v] * scale[v] * here
                total += here
            out[MAP_INTERSECTION, c] += intersection
            out[MAP_TOTAL, c] += total


@compiled
def _slope_at_labels(count, sums, gamma, weights, channels, labels, rows):
    """Overwrite the exponentials by ∂L/∂logits = q − p·Σq; min(p, g) is p·g here: p = g leaves no
    derivative.
    """
    dot, scale, own = rows[DOT], rows[SCALE], rows[OWN]
    zero, one = dot.dtype.type(0), dot.dtype.type(1)
    for v in range(count):
        own[v], dot[v] = zero, zero
    if sums[FOCAL]:
        for v in range(count):
            n = rows[N, v]
            ratio = -one if n <= zero else rows[P, v] * rows[LOG_P, v] / n  # its limit
            # What q has of the focal term.
            own[v] = -weights[FOCAL, max(labels[v], 0)] * rows[FOCUS, v] * (one - gamma * ratio)
    if sums[MAP_INTERSECTION]:
        for v in range(count):
            label = max(labels[v], 0)
            own[v] += weights[MAP_INTERSECTION, label] * rows[OF_VOXEL, v] * channels[label, v] * scale[v]
    for c in range(channels.shape[0]):
        exps, label = channels[c], np.int32(c)
        constant, twice = weights[PREDICTION, c], weights[PREDICTION_SQUARED, c] + weights[PREDICTION_SQUARED, c]
        overlap, cross_entropy = (
            weights[INTERSECTION, c] + weights[SOFT_INTERSECTION, c],
            weights[CROSS_ENTROPY, c],
        )
        for v in range(count):
            p = exps[v] * scale[v]
            at_label = p * overlap - cross_entropy + own[v]
            at_label = at_label if labels[v] == label else zero
            dot[v] += p * (constant + twice * p) + at_label
    for c in range(channels.shape[0]):
        exps, label = channels[c], np.int32(c)
        constant, twice = weights[PREDICTION, c], weights[PREDICTION_SQUARED, c] + weights[PREDICTION_SQUARED, c]
        overlap, cross_entropy = (
            weights[INTERSECTION, c] + weights[SOFT_INTERSECTION, c],
            weights[CROSS_ENTROPY, c],
        )
        for v in range(count):
            p = exps[v] * scale[v]
            at_label = p * overlap - cross_entropy + own[v]
            at_label = at_label if labels[v] == label else zero
            exps[v] = p * (constant + twice * p - dot[v]) + at_label


# A sigmoid and a label map: the label decides which channels a voxel is in. All terms are those of the
# probability of the right answer, p where g is 1 and n where it is 0, so one logarithm and one power do.
# A softmax over two classes equals one such channel: its logit is the difference of both; one exponential does.


@compiled
def _factors_of_answers(c, two, weights):
    """∂L/∂sums as factors of `_derivative_of_answers`: of channel c, or of channels 0 and 1 if `two`."""
    absent, squared = weights[PREDICTION, c], weights[PREDICTION_SQUARED, c]
    present = absent + weights[INTERSECTION, c] + weights[SOFT_INTERSECTION, c]
    no, focal_no = weights[CROSS_ENTROPY_NEGATIVE, c], weights[FOCAL_NEGATIVE, c]
    if two:
        # p of channel 1 is 1 − p, its p² is 1 − 2p + p².
        other = weights[PREDICTION, 1] + weights[PREDICTION_SQUARED, 1] + weights[PREDICTION_SQUARED, 1]
        present -= other
        absent -= other + weights[INTERSECTION, 1] + weights[SOFT_INTERSECTION, 1]
        squared += weights[PREDICTION_SQUARED, 1]
        no, focal_no = weights[CROSS_ENTROPY, 1], weights[FOCAL, 1]
    return present, absent, squared + squared, -weights[CROSS_ENTROPY, c], no, -weights[FOCAL, c], focal_no


@compiled
def _fill_answers(c, count, sums, gamma, with_logs, all_count, logits, labels, rows):
    """Fill the rows P, N, LOG_P and FOCUS of the right answer to channel c; 0 where ignored, but for FOCUS."""
    p, n, log_p, t = rows[P], rows[N], rows[LOG_P], rows[EXP]
    zero, label = p.dtype.type(0), np.int32(c)
    for v in range(count):
        z = logits[c, v]
        z = z if labels[v] == label else -z
        p[v], n[v], t[v] = _answer(z)
        log_p[v] = z if z < zero else zero
    if with_logs:
        for v in range(count):
            log_p[v] -= _log1p(t[v])
    if not all_count:
        for row in (P, N, LOG_P):
            for v in range(count):
                rows[row, v] = zero if labels[v] == IGNORED else rows[row, v]
    if sums[FOCAL] or sums[FOCAL_NEGATIVE]:
        _focus(n, count, gamma, rows)


@compiled
def _add_answers(c, count, sums, labels, rows, out):
    p, n, log_p, focus = rows[P], rows[N], rows[LOG_P], rows[FOCUS]
    zero, one, label = p.dtype.type(0), p.dtype.type(1), np.int32(c)
    if sums[INTERSECTION] or sums[SOFT_INTERSECTION] or sums[PREDICTION] or sums[TARGET] or sums[TARGET_SQUARED]:
        intersection, prediction, target = zero, zero, zero
        for v in range(count):
            right, wrong = p[v], n[v]
            g = one if labels[v] == label else zero
            intersection += right * g
            prediction += right if labels[v] == label else wrong
            target += g
        out[INTERSECTION, c] += intersection
        out[SOFT_INTERSECTION, c] += intersection
        out[PREDICTION, c] += prediction
        out[TARGET, c] += target
        out[TARGET_SQUARED, c] += target
    if sums[PREDICTION_SQUARED]:
        total = zero
        for v in range(count):
            right, wrong = p[v], n[v]
            total += right * right if labels[v] == label else wrong * wrong
        out[PREDICTION_SQUARED, c] += total
    if sums[CROSS_ENTROPY] or sums[CROSS_ENTROPY_NEGATIVE]:
        positive, negative = zero, zero
        for v in range(count):
            g = one if labels[v] == label else zero
            positive -= log_p[v] * g
            negative -= log_p[v] * (one - g)
        out[CROSS_ENTROPY, c] += positive
        out[CROSS_ENTROPY_NEGATIVE, c] += negative
    if sums[FOCAL] or sums[FOCAL_NEGATIVE]:
        positive, negative = zero, zero
        for v in range(count):
            term = log_p[v] * focus[v]
            g = one if labels[v] == label else zero
            positive -= term * g
            negative -= term * (one - g)
        out[FOCAL, c] += positive
        out[FOCAL_NEGATIVE, c] += negative


@compiled
def _slope_of_answers(c, count, factors, logits, labels, derivative):
    """Fill `derivative` with ∂L/∂logit, without focal terms; min(p, g) is p·g, as p = g leaves no derivative."""
    label = np.int32(c)
    present, absent, twice, yes, no, _, _ = factors
    for v in range(count):
        here = labels[v] == label
        z = logits[c, v]
        p, n, _ = _answer(z if here else -z)
        constant = present if here else absent
        cross_entropy = yes if here else no
        prediction = p if here else n
        derivative[v] = n * (p * (constant + twice * prediction) + cross_entropy)


@compiled
def _derivative_of_answers(c, count, gamma, factors, labels, rows, derivative):
    """Fill `derivative` with ∂L/∂logit of sums with focal terms, from the rows of `_fill_answers`."""
    p, n, log_p, focus = rows[P], rows[N], rows[LOG_P], rows[FOCUS]
    label = np.int32(c)
    floor = p.dtype.type(-1e4)  # of log p; p·log p is 0 there
    present, absent, twice, yes, no, focal_yes, focal_no = factors
    for v in range(count):
        right, wrong, log = p[v], n[v], log_p[v]
        constant = present if labels[v] == label else absent
        cross_entropy = yes if labels[v] == label else no
        focal = focal_yes if labels[v] == label else focal_no
        prediction = right if labels[v] == label else wrong
        log = log if log > floor else floor
        by_focal = focus[v] * (wrong - gamma * (right * log))
        derivative[v] = wrong * (right * (constant + twice * prediction) + cross_entropy) + focal * by_focal


# The two passes; blocks, rows and labels are memory to work in.


@compiled
def _knows_by_label(config):
    """Whether the labels' channels, or the right answers, are enough: one of the two special cases above."""
    sums = config.sums
    logs = sums[LOG_LOSS] or sums[LOG_LOSS_NEGATIVE] or sums[LOG_POWER] or sums[LOG_POWER_NEGATIVE]
    entries = sums[FALSE_POSITIVES] or sums[FALSE_NEGATIVES] or sums[TRUE_NEGATIVES]
    errors = sums[SENSITIVITY_ERROR] or sums[SPECIFICITY_ERROR]
    mapped = config.mapped and not (config.map_of_label and config.activation == SOFTMAX)
    return config.is_map and not (config.weighted or logs or entries or errors or mapped)


@compiled
def _load_voxels(
    input, target, mask, first, offsets, count, config, with_logs, by_label, two, blocks, rows, labels
):
    """Fill the blocks and, if `masked`, the row WEIGHT, which is 0 where ignored.

    Return whether all voxels that count are valid, and whether all count.

    The first block gets the input, or its exponentials for a softmax. Then the other block gets the input if
    logarithms are needed; or, if only those of the labels' channels are (`by_label`), the row LOG_P gets what
    there is of it in these. If `two` classes are one question, the first block's first row gets the difference of
    both. The third block gets the target unless it is a label map.
    """
    block, other, soft = blocks
    weight = rows[WEIGHT]
    weighed = _load_weights(mask, first, offsets, count, weight) if config.masked else True
    finite = block.dtype.type(np.inf if config.activation == NONE else LARGEST_LOGIT)
    _load(input, first, offsets, count, finite, block)
    if config.is_map:
        valid, all_count = _load_labels(target, first, offsets, count, config, weight, labels)
    else:
        _load(target, first, offsets, count, soft.dtype.type(np.inf), soft)
        valid, all_count = _find_ignored(soft, count, config, weight, labels)
    if not all_count:
        _clear(block, count, labels)
        _clear(rows[WEIGHT : WEIGHT + 1], count, labels)
    if two:
        for v in range(count):
            block[0, v] -= block[1, v]
    elif config.activation == SOFTMAX:
        if with_logs and by_label:
            for v in range(count):
                rows[LOG_P, v] = block[max(labels[v], 0), v]
        elif with_logs:
            other[:, :count] = block[:, :count]
        _softmax(block, count, with_logs, all_count, labels, rows)
    return valid and weighed, all_count


@compiled
def forward(input, target, mask, map, start, order, bounds, config, blocks, rows, scratch, out):
    """Add the sums over a part of a sample to `out` [cells, SUMS, C]; return whether its voxels were valid.

    The part begins at voxel `start`. The voxels of cell k are bounds[k]…bounds[k + 1] of `order`, or of the part
    itself if that is empty.
    """
    block, other, soft = blocks
    found = scratch[0]
    sums, gamma, activation = config.sums, rows.dtype.type(config.gamma), config.activation
    with_logs = False
    for k in range(CROSS_ENTROPY, FALSE_POSITIVES):
        with_logs |= sums[k]
    is_map, by_label = config.is_map, _knows_by_label(config)
    two = by_label and activation == SOFTMAX and block.shape[0] == 2 and not config.mapped
    all_valid = True
    stop, fetched = bounds[out.shape[0]], 0
    for cell in range(out.shape[0]):
        of_cell = out[cell]
        for begin in range(bounds[cell], bounds[cell + 1], rows.shape[1]):
            count = min(rows.shape[1], bounds[cell + 1] - begin)
            first, offsets = _row_of(start, order, begin, count)
            following = min(begin + count + rows.shape[1], stop) - fetched
            _fetch_row(input, *_row_of(start, order, fetched, following), following, block.shape[0])
            fetched += following
            valid, all_count = _load_voxels(
                input, target, mask, first, offsets, count, config, with_logs, by_label, two, blocks, rows, found
            )
            all_valid &= valid
            if config.map_of_label:
                all_valid &= _load_map(map, 0, first, offsets, count, all_count, found, rows[OF_VOXEL])
            if sums[VOXELS] and config.weighted:
                total = rows.dtype.type(0)
                for v in range(count):
                    total += rows[WEIGHT, v]
                of_cell[VOXELS] += total
            elif sums[VOXELS]:
                of_cell[VOXELS] += count if all_count else np.sum(found[:count] != IGNORED)
            if by_label and activation == SOFTMAX and not two:
                _fill_at_labels(count, sums, gamma, with_logs, block, found, rows)
                _add_at_labels(count, sums, block, found, rows, of_cell)
                continue
            for c in range(block.shape[0]):
                labels = _of_channel(c, count, config.regions, scratch)
                if two or (by_label and activation == SIGMOID):
                    if c == 0 or not two:
                        _fill_answers(c, count, sums, gamma, with_logs, all_count, block, labels, rows)
                    _add_answers(c, count, sums, labels, rows, of_cell)
                    continue
                _fill(c, count, activation, with_logs, all_count, block, other, labels, soft, is_map, rows)
                if config.mapped:
                    all_valid &= _map_of_channel(map, c, first, offsets, count, config, all_count, found, rows)
                if config.weighted:
                    _add(c, count, sums, gamma, rows, rows[WEIGHT], of_cell)
                else:
                    _add(c, count, sums, gamma, rows, None, of_cell)
                if activation == NONE:
                    for v in range(count):
                        # Written so that NaN passes, as in `voxels`.
                        all_valid &= not (rows[P, v] < -config.slack or rows[P, v] > 1 + config.slack)
    return all_valid


@compiled
def _add_each(c, count, sums, gamma, factors, rows):
    """Add to the row OWN what the voxels have of the sums of channel c that are made of logarithms."""
    p, g, n, log_p, log_n, focus = rows[P], rows[G], rows[N], rows[LOG_P], rows[LOG_N], rows[FOCUS]
    own, zero, one = rows[OWN], p.dtype.type(0), p.dtype.type(1)
    if sums[CROSS_ENTROPY] or sums[LOG_LOSS]:
        right, every = factors[CROSS_ENTROPY, c], factors[LOG_LOSS, c]
        for v in range(count):
            share = right * g[v] + every
            own[v] -= zero if share == zero else share * log_p[v]
    if sums[CROSS_ENTROPY_NEGATIVE] or sums[LOG_LOSS_NEGATIVE]:
        right, every = factors[CROSS_ENTROPY_NEGATIVE, c], factors[LOG_LOSS_NEGATIVE, c]
        for v in range(count):
            share = right * (one - g[v]) + every
            own[v] -= zero if share == zero else share * log_n[v]
    if sums[FOCAL]:
        _focus(n, count, gamma, rows)
        for v in range(count):
            own[v] -= zero if g[v] == zero else factors[FOCAL, c] * g[v] * log_p[v] * focus[v]
    if sums[FOCAL_NEGATIVE]:
        _focus(p, count, gamma, rows)
        for v in range(count):
            own[v] -= zero if g[v] == one else factors[FOCAL_NEGATIVE, c] * (one - g[v]) * log_n[v] * focus[v]


@compiled
def each(input, target, mask, start, stop, config, blocks, rows, scratch, factors, result):
    """Write Σ factor·term of voxels start…stop of a sample, `factors` [SUMS, C]; whether they were valid."""
    block, other, soft = blocks
    found = scratch[0]
    gamma, activation = rows.dtype.type(config.gamma), config.activation
    all_valid, neighbours = True, np.empty(0, np.int32)
    for first in range(start, stop, rows.shape[1]):
        count = min(rows.shape[1], stop - first)
        valid, all_count = _load_voxels(
            input, target, mask, first, neighbours, count, config, True, False, False, blocks, rows, found
        )
        all_valid &= valid
        for v in range(count):
            rows[OWN, v] = 0
        for c in range(block.shape[0]):
            labels = _of_channel(c, count, config.regions, scratch)
            _fill(c, count, activation, True, all_count, block, other, labels, soft, config.is_map, rows)
            _add_each(c, count, config.sums, gamma, factors, rows)
            if activation == NONE:
                for v in range(count):
                    all_valid &= not (rows[P, v] < -config.slack or rows[P, v] > 1 + config.slack)
        if config.weighted:
            for v in range(count):
                rows[OWN, v] *= rows[WEIGHT, v]
        if not all_count:
            _clear(rows[OWN : OWN + 1], count, found)
        _store(rows[OWN : OWN + 1], first, neighbours, count, result)
    return all_valid


@compiled
def backward(
    input, target, mask, map, start, order, bounds, config, blocks, rows, scratch, weights, by_target, result
):
    """Write ∂L/∂input, or ∂L/∂target, of a part of a sample; `weights` is ∂L/∂sums [cells, SUMS, C]."""
    block, other, soft = blocks
    found = scratch[0]
    sums, gamma, activation = config.sums, rows.dtype.type(config.gamma), config.activation
    with_logs = (
        (sums[CROSS_ENTROPY] and by_target)
        or (sums[CROSS_ENTROPY_NEGATIVE] and by_target)
        or sums[FOCAL]
        or sums[FOCAL_NEGATIVE]
        or sums[LOG_POWER]
        or sums[LOG_POWER_NEGATIVE]
    )
    is_map, by_label = config.is_map, _knows_by_label(config)
    two = by_label and activation == SOFTMAX and block.shape[0] == 2 and not config.mapped
    dot = rows[DOT]
    stop, fetched = bounds[weights.shape[0]], 0
    for cell in range(weights.shape[0]):
        of_cell = weights[cell]
        for begin in range(bounds[cell], bounds[cell + 1], rows.shape[1]):
            count = min(rows.shape[1], bounds[cell + 1] - begin)
            first, offsets = _row_of(start, order, begin, count)
            following = min(begin + count + rows.shape[1], stop) - fetched
            ahead, others = _row_of(start, order, fetched, following)
            _fetch_row(input, ahead, others, following, block.shape[0])
            _fetch_row(result, ahead, others, following, block.shape[0])
            fetched += following
            _, all_count = _load_voxels(
                input, target, mask, first, offsets, count, config, with_logs, by_label, two, blocks, rows, found
            )
            if config.map_of_label:
                _load_map(map, 0, first, offsets, count, all_count, found, rows[OF_VOXEL])
            if by_label and activation == SOFTMAX and not two:
                _fill_at_labels(count, sums, gamma, with_logs, block, found, rows)
                _slope_at_labels(count, sums, gamma, of_cell, block, found, rows)
                _store(block, first, offsets, count, result)
                continue
            for c in range(block.shape[0]):
                labels = _of_channel(c, count, config.regions, scratch)
                if two and c == 1:
                    for v in range(count):
                        other[1, v] = -other[0, v]
                    continue
                if two or (by_label and activation == SIGMOID):
                    factors = _factors_of_answers(c, two, of_cell)
                    if sums[FOCAL] or sums[FOCAL_NEGATIVE]:
                        _fill_answers(c, count, sums, gamma, with_logs, all_count, block, labels, rows)
                        _derivative_of_answers(c, count, gamma, factors, labels, rows, other[c])
                    else:
                        _slope_of_answers(c, count, factors, block, labels, other[c])
                    continue
                _fill(c, count, activation, with_logs, all_count, block, other, labels, soft, is_map, rows)
                if config.mapped:
                    _map_of_channel(map, c, first, offsets, count, config, all_count, found, rows)
                if by_target:
                    _derivative_by_target(c, count, sums, gamma, of_cell, rows, other[c])
                else:
                    _derivative(c, count, activation, sums, gamma, of_cell, rows, other[c])
            if activation == SOFTMAX and not (two or by_target):
                for v in range(count):
                    dot[v] = 0
                for c in range(block.shape[0]):
                    for v in range(count):
                        dot[v] += other[c, v]
                for c in range(block.shape[0]):
                    for v in range(count):
                        other[c, v] -= block[c, v] * rows[SCALE, v] * dot[v]
            if config.weighted:
                for c in range(other.shape[0]):
                    for v in range(count):
                        other[c, v] *= rows[WEIGHT, v]
            if not all_count:
                _clear(other, count, found)
            _store(other, first, offsets, count, result)
