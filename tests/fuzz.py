"""Compare losses with an oracle of their own on random calls.

A case is any loss with any options, dtypes, memory layouts, mask, annotated classes and backend; its value and
gradients are compared with `fuzz_oracle.py`. A case that fails is shrunk, and printed as a program. Some cases
have an argument that is wrong, and must raise ValueError or TypeError.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import Parameter, signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fuzz_oracle
import voxloss
from every_loss import LOSSES
from voxloss.backends import list_backends
from voxloss.losses.options import option_names
from voxloss_verify import tolerances

EXAMPLES = """examples:
  python tests/fuzz.py --cases 100000 --seed 7                   a long run
  python tests/fuzz.py --loss MCCLoss --backend numba_cpu        one loss on one backend
  python tests/fuzz.py --seed 7 --first 4711 --cases 1           one case again
"""
FLOATS = ("float64", "float32", "float16", "bfloat16")
SMALL_SHAPES = [(1,), (7,), (31,), (1, 1), (5, 7), (1, 9), (3, 5, 3), (1, 5, 3), (3, 1, 1), (2, 3, 4), (1, 1, 1)]
# Across the blocks of 1024 and the parts of 32768 voxels that the fused pass works on.
BLOCK_SHAPES = [(1023,), (1025,), (33, 33), (5, 15, 15), (3, 1, 683)]
PART_SHAPES = [(32769,), (3, 105, 105)]
# Powers of 1 − score or of −log score, which must not be negative.
POWERS = ("FocalTverskyLoss", "FocalTverskyCELoss", "ExponentialLogarithmicLoss", "UnifiedFocalLoss")
# What a tensor is before it is given to a loss, as Python of `x`. 77 stands where no loss may read.
LAYOUTS = {
    "channels_last": "x.to(memory_format=torch.channels_last)",
    "channels_last_3d": "x.to(memory_format=torch.channels_last_3d)",
    "channels at the end": "x.movedim(1, -1).contiguous().movedim(-1, 1)",
    "axes reversed": "x.permute(*range(x.ndim)[::-1]).contiguous().permute(*range(x.ndim)[::-1])",
    "every second voxel": "torch.stack([x, torch.full_like(x, 77)], -1).flatten(-2)[..., ::2]",
    "a crop": "torch.cat([torch.full_like(x[..., :1], 77), x, torch.full_like(x[..., :1], 77)], -1)[..., 1:-1]",
    "one sample for all": "x[:1].expand_as(x)",
}


@dataclass(frozen=True)
class Code:
    """A callable that is printed as its program."""

    program: str

    def __repr__(self) -> str:
        return self.program

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = eval(self.program, {"torch": torch})(x)
        return found


@dataclass(frozen=True)
class Case:
    """A call of a loss; `wrong` names what must be refused."""

    loss: str
    options: dict[str, Any]
    backend: str
    input: Tensor
    target: Tensor
    mask: Tensor | None = None
    annotated: list[list[int]] | Tensor | None = None
    layouts: dict[str, str] = field(default_factory=dict)  # of input, target and mask
    by_target: bool = False
    wrong: str | None = None
    form: str = "channels"  # of a map: "channels", "floats" in them, "labels" or "one for all"

    @property
    def maps(self) -> dict[str, Tensor]:
        """The map that the loss needs, by its name: of these tensors always the same."""
        name = _map_of(self.loss, self.options)
        chance = torch.Generator().manual_seed(0)
        one_region = self.channels == 1 and "regions" in self.options  # of which a channel would be a label map
        if name == "skeleton" and (self.form == "labels" or one_region):
            shape = (len(self.input), 1, *self.input.shape[2:])
            labels = self.target
            if labels.shape != shape:
                labels = torch.randint(self.channels, shape, generator=chance)
            return {name: torch.where(torch.rand(labels.shape, generator=chance) < 0.5, labels, 0)}
        if name == "skeleton":
            found = torch.rand(self.input.shape, generator=chance)
            return {name: found if self.form == "floats" else found < 0.5}
        if name == "distance":
            channels = 1 if self.form == "one for all" else self.channels
            shape = (len(self.input), channels, *self.input.shape[2:])
            found = torch.randn(
                shape, generator=chance, dtype=torch.promote_types(self.input.dtype, torch.float32)
            )
            if self.mask is not None and self.wrong is None:
                found = torch.where(self.mask == 0, torch.nan, found)
            return {name: found}
        return {name: self._partition(chance)} if name == "partition" else {}

    def _partition(self, chance: torch.Generator) -> Tensor:
        """Some cells are nowhere in a sample, some samples have number 0 alone, and junk is what is ignored."""
        shape = (len(self.input), 1, *self.input.shape[2:])
        found = torch.randint(5, shape, generator=chance)
        kept = torch.rand(len(found), 5, generator=chance) < 0.7
        found = torch.where(kept.gather(1, found.flatten(1)).view(shape), found, 0)
        found[torch.rand(len(found), generator=chance) < 0.2] = 0
        junk: float = -7
        if self.form == "floats":
            found, junk = found.float(), math.nan
        elif self.form == "labels":
            found, junk = found.to(torch.uint8), 255
        elif self.form == "one for all":
            junk = 2**40
        if self.wrong is not None:
            return found
        if self.mask is not None:
            found = torch.where(self.mask == 0, torch.full_like(found, junk), found)
        if self.target.shape[1] == 1 and "ignore_index" in self.options:
            found = torch.where(self.target == self.options["ignore_index"], torch.full_like(found, junk), found)
        return found

    @property
    def channels(self) -> int:
        """C."""
        return self.input.shape[1]

    def but(self, **changes: Any) -> Case:
        """Another case, with these things in the place of its own."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Failure:
    """What is wrong with a case."""

    kind: str
    message: str


# Drawing.


def takes(loss: str) -> set[str]:
    """The names of a loss's options."""
    parameters = signature(LOSSES[loss]).parameters
    named = {name for name, each in parameters.items() if each.kind is not Parameter.VAR_KEYWORD}
    return named | (option_names(parameters) or set())


def _map_of(loss: str, options: dict[str, Any]) -> str | None:
    """The name of the map that a loss needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = LOSSES[loss](**options)
    return "partition" if made.by_cell else made.map_name


def _can_be_unreduced(loss: str) -> bool:
    return loss in fuzz_oracle.OF_EACH_VOXEL or issubclass(LOSSES[loss], voxloss.RegionLoss)


class Draw:
    """One case's random choices, and what is already known of the case."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = np.random.default_rng([seed, number])
        self.loss = ""
        self.channels = 1
        self.activation = "none"
        self.mild = True  # no probability near the ends of its range
        self.options: dict[str, Any] = {}

    def chance(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    def one(self, choices: Sequence[Any]) -> Any:
        return choices[int(self.random.integers(len(choices)))]

    def factors(self, length: int) -> list[float]:
        """Numbers that every dtype has exactly."""
        return [float(n) / 8 for n in self.random.integers(0, 17, length)]

    def can_be_unreduced(self) -> bool:
        return _can_be_unreduced(self.loss)

    def has_background(self) -> bool:
        """By the option, or by its default."""
        parameter = signature(LOSSES[self.loss]).parameters.get("include_background")
        return bool(self.options.get("include_background", parameter is None or parameter.default))

    def chosen(self) -> list[int]:
        """The channels that are chosen so far."""
        if self.channels == 1:
            return [0]
        foreground = "SkeletonRecall" in self.loss or not self.has_background()
        first = 1 if foreground else 0
        return list(self.options.get("classes") or range(first, self.channels))


def _weight(draw: Draw) -> Any:
    kind = draw.one(["number", "per channel", "per class"])
    if kind == "number":
        return draw.one([0.0, 0.5, 3])
    single = issubclass(LOSSES[draw.loss], _SINGLE) and draw.loss != "SkeletonRecallLoss"  # but for regions
    per_class = kind == "per class" and single
    found = draw.factors(len(draw.chosen()) if per_class else draw.channels)
    return torch.tensor(found, dtype=torch.float64) if draw.chance(0.2) else found


def _classes(draw: Draw) -> list[int]:
    candidates = draw.chosen()
    if draw.channels == 1:
        draw.options.pop("include_background", None)
        draw.options.update({} if draw.has_background() else {"include_background": True})
    size = int(draw.random.integers(1, len(candidates) + 1))
    return [int(c) for c in draw.random.permutation(candidates)[:size]]


def _smoothing(draw: Draw) -> Any:
    positive = draw.loss == "ExponentialLogarithmicLoss" or not draw.mild
    return draw.one([1e-5, 1e-3, 1.0, 2] if positive else [0.0, 0, 1e-5, 1.0])


def _frequencies(draw: Draw) -> Any:
    found = [float(n) / 16 for n in draw.random.integers(1, 16, draw.channels)]
    return torch.tensor(found) if draw.chance(0.3) else found


def _alpha(draw: Draw) -> Any:
    if "Focal" in draw.loss and "Tversky" not in draw.loss:
        per_class = draw.one([draw.channels, len(draw.chosen()) if draw.loss == "FocalLoss" else draw.channels])
        return draw.one([0.0, 0.25, 1.0, draw.factors(per_class)])
    return draw.one([0.0, 0.25, 1.0] if draw.loss == "ComboLoss" else [0.0, 0.3, 1, 2.0])


def _one_of(*choices: Any) -> Callable[[Draw], Any]:
    return lambda draw: draw.one(choices)


def _gamma(draw: Draw) -> float:
    if draw.loss == "UnifiedFocalLoss":
        return float(draw.one([0.0, 0.25, 0.9]))
    tversky = "Tversky" in draw.loss
    return float(draw.one([1.0, 0.5, 2.0] if tversky else [0.0, 0.5, 1.0, 3.0]))


_SINGLE = (voxloss.RegionLoss, voxloss.CrossEntropyLoss, voxloss.FocalLoss)
# How each option is drawn where it is not left at its default, in this order.
OPTIONS: dict[str, Callable[[Draw], Any]] = {
    "include_background": lambda draw: not draw.has_background(),
    "classes": _classes,
    "absent": _one_of("skip"),
    "weight": _weight,
    "batch": _one_of(True),
    "reduction": lambda draw: draw.one(["sum", "none"] if draw.can_be_unreduced() else ["sum"]),
    "squared_pred": _one_of(True),
    "jaccard": _one_of(True),
    "soft_label": _one_of(True),
    "smooth_nr": _smoothing,
    "smooth_dr": _smoothing,
    "alpha": _alpha,
    "beta": lambda draw: draw.one([0.0, 0.7, 1.0] if draw.loss == "ComboLoss" else [0.125, 1, 2.0]),
    "gamma": _gamma,
    "gamma_dice": _one_of(0.5, 1.0, 2.0),
    "gamma_ce": _one_of(0.5, 1.0, 2.0),
    "delta": _one_of(0.25, 0.5, 0.75),
    "asymmetric": _one_of(False),
    "f_beta": _one_of(0.5, 1, 2.0),
    "k": lambda draw: draw.one([25, 50.0, 100] if "TopK" in draw.loss else [0.0, 1, 4.5]),
    "r": _one_of(0.0, 0.5, 1),
    "w_type": _one_of("simple", "uniform"),
    "frequencies": _frequencies,
    "label_smoothing": _one_of(0.1, 1.0),
    "lambda_dice": _one_of(0.0, 0.5),
    "lambda_ce": _one_of(0.0, 2),
    "lambda_focal": _one_of(0.0, 0.75),
    "lambda_gdl": _one_of(0.0, 0.5),
    "lambda_top_k": _one_of(0.0, 0.5),
    "lambda_skeleton": _one_of(0.0, 2.0),
    "lambda_boundary": _one_of(0.0, 0.5),
    "lambda_lesion": _one_of(0.0, 2.0),
    "lambda_global": _one_of(0.0, 0.5),
    "cells": _one_of(5, 8),
    "schedule": _one_of("increase", "rebalance"),
    "step": _one_of(0.25, 1.0),
    "lambda_tversky": _one_of(0.0, 0.5),
    "inplace": _one_of(True),
}
# Options that are drawn with the tensors, and those that need distributed training.
ELSEWHERE = {
    "to_onehot_y",
    "sigmoid",
    "softmax",
    "use_softmax",
    "other_act",
    "ignore_index",
    "backend",
    "regions",
}
NOT_DRAWN = {"group", "shard"}


def draw_case(seed: int, number: int, losses: Sequence[str], backends: Sequence[str], compiled: bool) -> Case:
    """The case of this number, whichever came before it. `compiled`: of the dtypes that set-up compiles for."""
    draw = Draw(seed, number)
    draw.loss, backend = draw.one(losses), draw.one(backends)
    options = draw.options
    known = takes(draw.loss)
    batch, channels = draw.one([1, 1, 2, 3]), draw.one([1, 2, 2, 3, 4, 5])
    draw.channels = channels
    shapes = PART_SHAPES if draw.chance(0.002) else BLOCK_SHAPES if draw.chance(0.05) else SMALL_SHAPES
    shape = (batch, channels, *draw.one(shapes))
    dtype = draw.one(FLOATS)

    activations = ["sigmoid", "softmax"] if channels > 1 else ["sigmoid"]
    draw.activation = draw.one(activations if "use_softmax" in known else [*activations, "none", "other_act"])
    if "use_softmax" in known:
        options.update({"use_softmax": True} if draw.activation == "softmax" else {})
    elif draw.activation == "other_act":
        options["other_act"] = Code(draw.one(["torch.sigmoid", "lambda z: z.sigmoid() ** 2"]))
        dtype = "float32" if dtype == "float16" else dtype  # in which torch's derivative of it overflows
        if channels > 1 and draw.chance(0.5):
            options["other_act"] = Code("lambda z: z.softmax(1)")
    elif draw.activation != "none":
        options[draw.activation] = True
    input = _input(draw, shape, dtype)
    for name, how in OPTIONS.items():
        if name in known and draw.chance(0.3):
            options[name] = how(draw)
    of_each_voxel = options.get("reduction") == "none" and draw.loss in fuzz_oracle.OF_EACH_VOXEL
    if "other_act" in options or of_each_voxel:  # whose derivative needs the values
        options.pop("inplace", None)
    if options.get("alpha") == 0 and options.get("beta", 1) == 0 and draw.loss != "ComboLoss":
        del options["alpha"]
    target, ignored = _target(draw, shape, dtype, compiled and backend == "numba_cpu")
    regions = np.random.default_rng([seed, number, 1])
    if draw.activation in ("sigmoid", "none") and draw.has_background() and regions.random() < 0.15:
        target, ignored = _target_of_regions(draw, shape, target.dtype, regions)

    mask = _mask(draw, shape) if draw.chance(0.5) else None
    if mask is not None:
        out = (mask == 0).expand(batch, *mask.shape[1:])
        ignored = ignored | out
        if draw.chance(0.5) and target.dtype not in (torch.bool,):
            target = torch.where(out, torch.full_like(target, 77), target)
    if draw.chance(0.5) and "other_act" not in options:
        input = torch.where(ignored, torch.nan, input)
    annotated = _annotated(draw, batch) if draw.chance(0.35) else None
    if annotated is not None and channels > 1 and draw.activation != "sigmoid":
        options.pop("label_smoothing", None)
    if draw.loss in POWERS:
        defaults = inspect.signature(LOSSES[draw.loss]).parameters
        smooth_nr, smooth_dr = (options.get(name, defaults[name].default) for name in ("smooth_nr", "smooth_dr"))
        options.update({"smooth_nr": smooth_dr} if smooth_nr > smooth_dr else {})
    layouts = {}
    for name, tensor in (("input", input), ("target", target), ("mask", mask)):
        if tensor is not None and draw.chance(0.4):
            layouts[name] = draw.one([each for each in LAYOUTS if _fits(each, tensor)])
    if "one sample for all" in layouts.values():  # then of all three, for what is ignored is in all of them
        layouts.update(dict.fromkeys(("input", "target"), "one sample for all"))
        input, target = input[:1].expand_as(input), target[:1].expand_as(target)
        mask = None if mask is None else mask[:1].expand_as(mask)
    input, target = _compact(input), _compact(target)
    soft = target.is_floating_point() and target.shape[1] == channels and "regions" not in options
    by_target = soft and draw.chance(0.5)
    mask = None if mask is None else _compact(mask)
    case = Case(draw.loss, options, backend, input, target, mask, annotated, layouts, by_target)
    if _map_of(draw.loss, options) is not None:
        case = case.but(form=draw.one(["channels", "floats", "labels", "one for all"]))
    return _with_a_fault(draw, case) if draw.chance(0.03) else case


def _compact(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _input(draw: Draw, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Logits, or probabilities where there is no activation, of this dtype."""
    width = draw.one([0.1, 1.0, 3.0])
    z = torch.from_numpy(draw.random.normal(0.0, width, shape))
    kind = draw.one(["", "", "", "", "constant", "extreme", "large"])
    # Where what is nothing in float64 and nearly nothing in float32 differs by a whole class.
    steep = draw.loss == "MCCLoss"
    if kind == "constant":
        z = torch.full(shape, draw.one([0.0, 1.5, -2.0])).double()
    elif kind in ("extreme", "large") and draw.activation != "other_act" and not steep:
        draw.mild = False
        z = torch.from_numpy(draw.random.choice([-1.0, 1.0], shape)) * (50 if kind == "extreme" else 1e4) + z
    if draw.activation == "none":
        hard = draw.chance(0.2)
        draw.mild = True
        if hard:
            z = torch.from_numpy(draw.random.integers(0, 2, shape)).double()
        else:
            z = z.clamp(-10, 10)
            z = z.softmax(1) if shape[1] > 1 and draw.chance(0.5) else z.sigmoid()
    return z.to(getattr(torch, dtype))


def _target(draw: Draw, shape: tuple[int, ...], dtype: str, compiled: bool) -> tuple[Tensor, Tensor]:
    """A target, and which of its voxels are ignored, `[B, 1, spatial...]`; ignore_index becomes an option."""
    batch, channels, *spatial = shape
    kind = draw.one(["map", "map", "one-hot", "soft", "multi-label"])
    if kind == "map":
        dtypes = ["int64"] if compiled else ["uint8", "int16", "int32", "int64", "float32", "float16"]
    elif kind == "soft":
        dtypes = [dtype] if compiled else list(FLOATS)
    else:
        dtypes = [dtype] if compiled else [*FLOATS, "uint8", "int64", "bool"]
    target_dtype = draw.one(dtypes)
    # Some classes are nowhere.
    present = np.flatnonzero(draw.random.random(max(2, channels)) < 0.8)
    labels = draw.random.choice(present if len(present) else [0], (batch, 1, *spatial))
    if draw.chance(0.1):
        labels = np.full_like(labels, labels.flat[0])
    ignore_index = None
    ignored = np.zeros(labels.shape, bool)
    if draw.chance(0.3):
        counting = draw.chosen()
        candidates = [255, *([] if target_dtype in ("uint8", "bool") else [-1])]
        candidates += [c for c in range(channels) if counting != [c]]
        ignore_index = draw.options["ignore_index"] = int(draw.one(candidates))
        ignored = draw.random.random(labels.shape) < draw.one([0.2, 0.2, 1.0])
    if kind == "map":
        if channels > 1 or draw.chance(0.5):
            draw.options["to_onehot_y"] = True
        values = labels if ignore_index is None else np.where(ignored, ignore_index, labels)
        ignored = np.zeros_like(ignored) if ignore_index is None else values == ignore_index
        return torch.from_numpy(values).to(getattr(torch, target_dtype)), torch.from_numpy(ignored)
    if kind == "one-hot":
        values = (labels == np.arange(channels).reshape(1, -1, *[1] * len(spatial))).astype(float)
        if channels == 1:
            values = labels.astype(float)
    elif kind == "soft":
        values = np.floor(draw.random.dirichlet(np.ones(channels + 1), (batch, *spatial)) * 64) / 64
        values = np.moveaxis(values, -1, 1)[:, :channels]
    else:
        values = draw.random.integers(0, 2, shape).astype(float)
    if ignore_index is not None and channels > 1 and 0 <= ignore_index < channels:
        values[:, ignore_index] = 0
        values[:, ignore_index] = ignored[:, 0]
    elif ignore_index is not None:
        if target_dtype != "bool":
            values = np.where(ignored, float(ignore_index), values)
        ignored = (values == ignore_index).all(1, keepdims=True)
    return torch.from_numpy(values).to(getattr(torch, target_dtype)), torch.from_numpy(ignored)


def _target_of_regions(
    draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A label map, and which of its voxels are ignored; regions that may overlap become an option."""
    batch, channels, *spatial = shape
    most = int(random.integers(1, 6))
    regions = [
        sorted(random.choice(most + 1, int(random.integers(1, most + 2)), replace=False).tolist())
        for _ in range(channels)
    ]
    used = {label for region in regions for label in region}
    labels = random.integers(0, max(used) + 1, (batch, 1, *spatial))
    draw.options.update(regions=regions)
    draw.options.pop("to_onehot_y", None)
    known = [label for label in (255, *range(max(used))) if label not in used]
    ignored = np.zeros(labels.shape, bool)
    if draw.options.pop("ignore_index", None) is not None:
        draw.options["ignore_index"] = ignore_index = int(random.choice(known))
        labels = np.where(random.random(labels.shape) < 0.3, ignore_index, labels)
        ignored = labels == ignore_index
    dtype = torch.int64 if dtype == torch.bool or dtype == torch.bfloat16 else dtype
    return torch.from_numpy(labels).to(dtype), torch.from_numpy(ignored)


def _mask(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    batch, _, *spatial = shape
    size = (draw.one([1, batch]), 1, *spatial)
    if draw.chance(0.4):
        return torch.from_numpy(draw.random.random(size) < draw.one([0.0, 0.5, 0.9, 1.0]))
    values = torch.from_numpy(draw.random.choice([0.0, 1.0, 1.0, 2.0, 3.0], size))
    dtype = draw.one([torch.float32, torch.float64, torch.float16, torch.uint8, torch.int64])
    return (values / (4 if dtype.is_floating_point else 1)).to(dtype)


def _annotated(draw: Draw, batch: int) -> list[list[int]] | Tensor:
    marks = torch.from_numpy(draw.random.random((batch, draw.channels)) < draw.one([0.5, 0.8]))
    return marks if draw.chance(0.5) else [row.nonzero()[:, 0].tolist() for row in marks]


def _fits(layout: str, tensor: Tensor) -> bool:
    axes = {"channels_last": 4, "channels_last_3d": 5}
    return tensor.ndim == axes.get(layout, tensor.ndim) and (layout != "one sample for all" or len(tensor) > 1)


# Wrong arguments: each makes of a case one that must be refused, or returns None where it does not apply.

Fault = Callable[[Case], Case | None]


def _option(**options: Any) -> Fault:
    def fault(case: Case) -> Case | None:
        names = takes(case.loss)
        return case.but(options={**case.options, **options}) if set(options) <= names else None

    return fault


def _voxel(name: str, value: float, fits: Callable[[Case], bool]) -> Fault:
    def fault(case: Case) -> Case | None:
        if not fits(case) or case.mask is not None or "ignore_index" in case.options:
            return None
        tensor = getattr(case, name).clone()
        tensor[(0,) * tensor.ndim] = value
        return case.but(**{name: tensor})

    return fault


def _share_of_an_ignored_channel(case: Case) -> Case | None:
    number = case.options.get("ignore_index", -1)
    target = case.target.clone()
    if (
        not (0 <= number < case.channels == target.shape[1] > 1 and target.is_floating_point())
        or case.mask is not None
    ):
        return None
    target[0, number].view(-1)[0] = 0.75
    return case.but(target=target)


def _is_map(case: Case) -> bool:
    return case.channels > 1 and case.target.shape[1] == 1


FAULTS: dict[str, Fault] = {
    "two activations": _option(sigmoid=True, softmax=True),
    "negative smoothing": _option(smooth_nr=-1.0),
    "a score above 1": lambda case: (
        case.but(options={**case.options, "smooth_nr": 1.0, "smooth_dr": 0.5, "gamma": 0.75})
        if case.loss in POWERS and case.loss != "ExponentialLogarithmicLoss"
        else None
    ),
    "a logarithm above 0": lambda case: (
        case.but(options={**case.options, "smooth_nr": 1.0, "smooth_dr": 0.5})
        if case.loss == "ExponentialLogarithmicLoss"
        else None
    ),
    "smoothed labels that were not annotated": lambda case: (
        case.but(options={**case.options, "label_smoothing": 0.5}, annotated=[[0]] * len(case.input))
        if "label_smoothing" in takes(case.loss) and case.channels > 1 and "sigmoid" not in case.options
        else None
    ),
    "negative gamma": _option(gamma=-1.0),
    "infinite gamma": _option(gamma=math.inf),
    "reduction": _option(reduction="average"),
    "absent": _option(absent="omit"),
    "a class twice": _option(classes=[0, 0]),
    "no class": _option(classes=[]),
    "a class that is not there": _option(classes=[9]),
    "negative weight": _option(weight=-1.0),
    "too many weights": _option(weight=[1.0] * 9),
    "ignore_index": _option(ignore_index=1.5),
    "backend": lambda case: case.but(backend="numba"),
    "unknown option": lambda case: case.but(options={**case.options, "smoth": 1}),
    "no reduction": lambda case: (
        None if _can_be_unreduced(case.loss) else case.but(options={**case.options, "reduction": "none"})
    ),
    "softmax of one channel": lambda case: (
        _option(softmax=True, sigmoid=False, other_act=None)(case) if case.channels == 1 else None
    ),
    "label": _voxel("target", 9, _is_map),
    "fraction of a label": _voxel("target", 0.5, lambda case: _is_map(case) and case.target.is_floating_point()),
    "share of an ignored channel": _share_of_an_ignored_channel,
    "target above 1": _voxel(
        "target", 2, lambda case: case.target.shape[1] == case.channels and case.target.dtype != torch.bool
    ),
    "probability": _voxel(
        "input",
        1.5,
        lambda case: not {"softmax", "sigmoid", "other_act"} & {*case.options} and case.loss != "FocalLoss",
    ),
    "integers as input": lambda case: case.but(input=torch.ones_like(case.input, dtype=torch.int64)),
    "another spatial size": lambda case: case.but(target=torch.cat([case.target] * 2, -1)),
    "another batch": lambda case: case.but(target=torch.cat([case.target] * 2)),
    "no channel axis": lambda case: case.but(target=case.target[:, 0]),
    "no batch axis": lambda case: (
        case.but(input=case.input[0], target=case.target[0], mask=None) if case.input.ndim == 3 else None
    ),
    "mask per class": lambda case: case.but(mask=torch.ones(2, 2, *case.input.shape[2:])),
    "negative mask": lambda case: case.but(mask=torch.full_like(case.input[:, :1], -1.0)),
    "infinite mask": lambda case: case.but(mask=torch.full_like(case.input[:, :1], math.inf)),
    "annotated class": lambda case: case.but(annotated=[[9]] * len(case.input)),
    "annotated samples": lambda case: case.but(annotated=[[0]] * (len(case.input) + 1)),
    "annotated integers": lambda case: case.but(annotated=torch.ones(case.input.shape[:2]).long()),
}


def _with_a_fault(draw: Draw, case: Case) -> Case:
    name = draw.one(list(FAULTS))
    found = FAULTS[name](case.but(layouts={}, by_target=False))
    return case if found is None else found.but(wrong=name)


# Checking.


def laid_out(tensor: Tensor, layout: str | None) -> Tensor:
    """A tensor as the named layout has it in memory."""
    found: Tensor = tensor if layout is None else eval(LAYOUTS[layout], {"x": tensor, "torch": torch})
    return found


def upstream(value: Tensor) -> Tensor:
    """One number of a loss without reduction, in which its elements differ."""
    factors = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype) if value.ndim else value.new_ones(1)
    return (factors * value.flatten()).sum()


def check(case: Case, widened: Counter[str] | None = None) -> Failure | None:
    """Run a case and compare; None if nothing is wrong. `widened` counts those that need `_spread`."""
    x, target = (laid_out(getattr(case, name), case.layouts.get(name)).detach() for name in ("input", "target"))
    mask = None if case.mask is None else laid_out(case.mask, case.layouts.get("mask"))
    leaves = [x.requires_grad_(x.is_floating_point())]
    if case.by_target:
        leaves.append(target.requires_grad_())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = LOSSES[case.loss](**case.options, backend=case.backend)
            if "inplace" in case.options and case.wrong is None:
                leaves[0] = leaves[0] * 1.0  # no leaf of autograd's
            value = loss(leaves[0], target, mask, case.annotated, **case.maps)
        if case.wrong is None:
            found = torch.autograd.grad(upstream(value), leaves, allow_unused=True, materialize_grads=True)
    except Exception as error:
        if case.wrong is not None and isinstance(error, ValueError | TypeError):
            return None
        message = f"{type(error).__name__}: {error}"
        return Failure(f"raises {message[:40]}", message)
    if case.wrong is not None:
        return Failure("accepts", f"expected ValueError or TypeError for {case.wrong}, received {value}")
    return _compare(case, leaves, value.detach(), found, widened)


def _compare(
    case: Case, leaves: list[Tensor], value: Tensor, found: Sequence[Tensor], widened: Counter[str] | None
) -> Failure | None:
    dtype = _name(case.input.dtype)
    wanted_dtype = torch.promote_types(case.input.dtype, torch.float32)
    if value.dtype != wanted_dtype:
        return Failure("dtype", f"loss: expected {wanted_dtype}, received {value.dtype}")
    for leaf, gradient in zip(leaves, found, strict=True):
        like = torch.empty_like(leaf)
        own = "other_act" not in case.options or leaf is not leaves[0]  # which lays it out otherwise
        if gradient.dtype != like.dtype or (own and gradient.stride() != like.stride()):
            how = f"{gradient.dtype}, strides {gradient.stride()}"
            return Failure("layout", f"gradient: expected {like.dtype}, strides {like.stride()}, received {how}")
    expected = _expected(case)
    if expected.value.shape != value.shape:
        return Failure("shape", f"loss: expected {list(expected.value.shape)}, received {list(value.shape)}")
    distances = _distances(case, expected, value, found)
    size = max(1.0, float(expected.value.abs().nan_to_num().max()))
    counting = case.input[~case.input.isnan()]
    alike = bool((counting == counting[:1]).all())
    allowed = [size * (tolerances.LOSS_OF_A_CONSTANT_VOLUME if alike else tolerances.LOSS)[dtype]]
    # A probability near 0 or 1, of which little is left in the derivative, is rounded as any other.
    floor = 8 * tolerances.UNIT[dtype] * expected.sensitivity
    for leaf, gradient in zip(leaves, expected.gradients, strict=True):
        share = max(tolerances.GRADIENT[dtype], tolerances.GRADIENT[_name(leaf.dtype)])
        underflow = tolerances.FLOAT16_SMALLEST if leaf.dtype == torch.float16 else 0.0
        allowed.append(share * float(gradient.abs().max()) + floor + underflow)
    if not expected.is_clear:  # others may be chosen, which have other weights; a NaN is wrong even so
        allowed = [math.inf] * len(allowed)
    if not any(map(_exceeds, distances, allowed)):
        return None
    # What moves by as much in the oracle, once the numbers that a pass computes with are rounded, is known no
    # better: powers and quotients of differences that nearly vanish.
    allowed = [a + s for a, s in zip(allowed, _spread(case, expected, dtype), strict=True)]
    names = ["value", "gradient", "gradient by target"]
    pairs = zip([expected.value, *expected.gradients], [value, *found], strict=True)
    for name, distance, limit, (wanted, received) in zip(names, distances, allowed, pairs, strict=False):
        if _exceeds(distance, limit):
            numbers = f"expected {wanted.flatten()[:12].tolist()}\nreceived {received.flatten()[:12].tolist()}"
            return Failure(name, f"{name}: off by {distance:.3g}, allowed {limit:.3g}\n{numbers}")
    if widened is not None:
        widened[case.loss] += 1
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _exceeds(distance: float, limit: float) -> bool:
    return not distance <= limit  # NaN does


def _expected(case: Case, **rounding: Any) -> fuzz_oracle.Expected:
    """The oracle's answer, also through the derivative of other_act, which is torch's and not the loss's."""
    options = dict(case.options)
    activation = options.pop("other_act", None)
    options.pop("inplace", None)
    x = case.input.detach().requires_grad_()
    given = x if activation is None else activation(x)
    expected = fuzz_oracle.evaluate(
        case.loss,
        options,
        given,
        case.target,
        case.mask,
        case.annotated,
        maps=case.maps,
        upstream=upstream,
        by_target=case.by_target,
        **rounding,
    )
    if activation is not None:
        (through,) = torch.autograd.grad(given, x, expected.gradients[0].to(given.dtype))
        expected = expected._replace(gradients=[through.double(), *expected.gradients[1:]])
    return expected


def _distances(case: Case, expected: fuzz_oracle.Expected, value: Tensor, found: Sequence[Tensor]) -> list[float]:
    """The largest distances of the value and of each gradient."""
    distances = [_distance(expected.value.to(value.dtype), value)]
    for wanted, gradient in zip(expected.gradients, found, strict=True):
        if case.options.get("soft_label"):  # at p = g each value between the one-sided derivatives is one
            wanted, gradient = (x.masked_fill(expected.ties, 0) for x in (wanted, gradient))
        distances.append(_distance(wanted.to(gradient.dtype), gradient))
    return distances


def _distance(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(torch.where(a == b, 0.0, (a - b).abs()).max())  # infinity is as far as itself


def _spread(case: Case, expected: fuzz_oracle.Expected, dtype: str) -> list[float]:
    """How far value and gradients move in the oracle with rounding of `dtype`, some times over."""
    generator = torch.Generator().manual_seed(0)

    def rounding(x: Tensor) -> Tensor:
        signs = torch.randint(0, 2, x.shape, generator=generator).double() * 2 - 1
        return x * (1 + tolerances.UNIT[dtype] * signs)

    spread = [0.0] * (1 + len(expected.gradients))
    for _ in range(4):
        other = _expected(case, rounding=rounding)
        moved = _distances(case, expected, other.value, other.gradients)
        spread = [max(s, 4 * m) for s, m in zip(spread, moved, strict=True)]
    return spread


# Shrinking.


Step = Callable[[Case], Case]
_BACKENDS = ["reference", "eager", "numba_cpu", "triton_gpu"]


def shrink(case: Case, failure: Failure) -> tuple[Case, Failure]:
    """Take away from a case what it fails without, until nothing more can be."""
    going = True
    while going:
        going = False
        for step in _steps(case):
            try:
                simpler = step(case)
                found = check(simpler) if _cost(simpler) < _cost(case) and not _is_nan(simpler) else None
            except Exception:  # no longer a case, after what earlier steps have taken away
                continue
            if found is not None and found.kind == failure.kind:
                case, failure, going = simpler, found, True
    return case, failure


def _is_nan(case: Case) -> bool:
    """Whether a voxel that was ignored, and may be NaN, counts after what earlier steps have taken away."""
    return case.wrong is None and bool(_expected(case).value.isnan().any())


def _steps(case: Case) -> list[Step]:
    """Ways to take a little away, the largest first."""
    steps: list[Step] = []
    for axis in range(2, case.input.ndim):
        halvings = max(1, case.input.shape[axis]).bit_length()
        steps += [partial(_cut, axis=axis, first=first) for first in (False, True) for _ in range(halvings)]
        steps += [partial(_cut, axis=axis, first=first, by=1) for first in (False, True)]
    steps += [partial(_without_axis, axis=axis) for axis in range(case.input.ndim - 1, 1, -1)]
    steps += [partial(_without_sample, sample=sample) for sample in range(len(case.input) - 1, -1, -1)]
    steps += [_without_last_channel] * (case.channels - 1)
    steps += [partial(_without_option, name=name) for name in case.options]
    steps += [partial(Case.but, mask=None), partial(Case.but, annotated=None), partial(Case.but, by_target=False)]
    steps += [partial(_without_layout, name=name) for name in case.layouts]
    steps += [partial(Case.but, backend=name) for name in _BACKENDS]
    steps += [lambda case: case.but(input=case.input.double())]
    steps += [
        lambda case: case.but(
            target=case.target.to(torch.int64 if case.target.shape[1] < case.channels else torch.float64)
        )
    ]
    steps += [partial(_with_one_factor, name=name) for name in case.options]
    for name, tensor in _tensors(case).items():
        if tensor is not None:
            steps += [partial(_with, name=name, how=how) for how in _PLAINER]
            if tensor.numel() <= 12:
                places = ((place, value) for place in range(tensor.numel()) for value in (1, 0))
                steps += [partial(_with, name=name, how=partial(_put, place=p, value=v)) for p, v in places]
    return steps


def _cost(case: Case) -> float:
    """How much there is to read; every step of shrinking makes it less."""
    tensors = [tensor for tensor in _tensors(case).values() if tensor is not None]
    numbers = sum(
        len(str(x)) if x not in (0, 1) else 2 * x for tensor in tensors for x in tensor.flatten().tolist()
    )
    parts = len(case.options) + len(case.layouts) + len(tensors) + case.by_target + (case.annotated is not None)
    dtypes = sum(tensor.dtype not in (torch.float64, torch.int64, torch.bool) for tensor in tensors)
    voxels = sum(tensor.numel() for tensor in tensors)
    backend = _BACKENDS.index(case.backend) if case.backend in _BACKENDS else 0
    return float(
        numbers + 20 * (voxels + parts + case.input.ndim) + 10 * dtypes + backend + len(repr(case.options))
    )


def _tensors(case: Case) -> dict[str, Tensor | None]:
    return {"input": case.input, "target": case.target, "mask": case.mask}


# Of the same shape, with numbers that are easier to read.
_PLAINER: list[Callable[[Tensor], Tensor]] = [
    torch.nan_to_num,
    torch.zeros_like,
    torch.ones_like,
    lambda x: x.round(),
    lambda x: (x.double() * 4).round().to(x) / 4 if x.is_floating_point() else x,
]


def _put(tensor: Tensor, place: int, value: int) -> Tensor:
    other = tensor.clone()
    if other.view(-1)[place] != 0:
        other.view(-1)[place] = value
    return other


def _with(case: Case, name: str, how: Callable[[Tensor], Tensor]) -> Case:
    return case.but(**{name: how(getattr(case, name))})


def _without_option(case: Case, name: str) -> Case:
    return case.but(options={k: v for k, v in case.options.items() if k != name})


def _without_layout(case: Case, name: str) -> Case:
    return case.but(layouts={k: v for k, v in case.layouts.items() if k != name})


def _with_one_factor(case: Case, name: str) -> Case:
    """A number in the place of one for each class."""
    value = case.options[name]
    return case.but(options={**case.options, name: float(value[0])}) if name in ("weight", "alpha") else case


def _cut(case: Case, axis: int, first: bool, by: int | None = None) -> Case:
    """Half of the voxels along an axis, the first or the last ones, or all `by` one."""
    size = case.input.shape[axis]
    length = size // 2 if by is None else size - by
    return _narrowed(case, axis, 0 if first else size - length, length) if length else case


def _without_axis(case: Case, axis: int) -> Case:
    if case.input.ndim <= 3:
        return case
    return case.but(**{k: None if x is None else x.select(axis, 0).clone() for k, x in _tensors(case).items()})


def _narrowed(case: Case, axis: int, start: int, length: int) -> Case:
    cut = {k: None if x is None else x.narrow(axis, start, length).clone() for k, x in _tensors(case).items()}
    return case.but(**cut)


def _without_sample(case: Case, sample: int) -> Case:
    kept = [b for b in range(len(case.input)) if b != sample] or [0]
    mask, annotated = case.mask, case.annotated
    if mask is not None and len(mask) > 1:
        mask = mask[kept]
    if annotated is not None:
        annotated = annotated[kept] if isinstance(annotated, Tensor) else [annotated[b] for b in kept]
    return case.but(input=case.input[kept], target=case.target[kept], mask=mask, annotated=annotated)


def _without_last_channel(case: Case) -> Case:
    last = case.channels - 1
    target, annotated = case.target, case.annotated
    regions = case.options.get("regions")
    if regions is not None:
        known = 1 + max(map(max, regions[:last]))
        target = torch.where((target >= known) & (target != case.options.get("ignore_index")), 0, target)
    elif target.shape[1] == case.channels:
        target = target[:, :last].clone()
    elif case.options.get("ignore_index") != last:
        target = torch.where(target == last, torch.zeros_like(target), target)
    if isinstance(annotated, Tensor):
        annotated = annotated[:, :last]
    elif annotated is not None:
        annotated = [[c for c in row if c != last] for row in annotated]
    options: dict[str, Any] = {}
    for name, value in case.options.items():
        if name == "classes":
            options[name] = [c for c in value if c != last]
        elif isinstance(value, list | Tensor) and len(value) == case.channels:
            options[name] = value[:last]
        else:
            options[name] = value
    return case.but(input=case.input[:, :last].clone(), target=target, annotated=annotated, options=options)


# Printing.


def program(case: Case) -> str:
    """The case as Python that can be pasted."""
    options = {**case.options, "backend": case.backend}
    arguments = ", ".join(f"{name}={_literal(value)}" for name, value in options.items())
    lines = ["import torch", "import voxloss", ""]
    for name, tensor in _tensors(case).items():
        if tensor is not None:
            lines.append(f"x = {_literal(tensor)}")
            layout = case.layouts.get(name)
            lines.append(f"{name} = {'x' if layout is None else LAYOUTS[layout]}")
    if case.input.is_floating_point():
        lines.append("input = input.detach().requires_grad_()")
    if case.by_target:
        lines.append("target = target.detach().requires_grad_()")
    given = ["input * 1.0" if "inplace" in case.options else "input", "target"]
    given += ["mask"] if case.mask is not None else []
    given += [f"annotated={_literal(case.annotated)}"] if case.annotated is not None else []
    given += [f"{name}={_literal(tensor)}" for name, tensor in case.maps.items()]
    leaves = "[input, target]" if case.by_target else "input"
    lines += [f"loss = voxloss.{case.loss}({arguments})", f"value = loss({', '.join(given)})", "print(value)"]
    if case.wrong is None:
        factors = "torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype)"
        total = f"({factors} * value.flatten()).sum()" if case.options.get("reduction") == "none" else "value"
        lines.append(f"print(torch.autograd.grad({total}, {leaves}))")
    return "\n".join(lines)


def _literal(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    inf_and_nan = {"nan": "torch.nan", "inf": "torch.inf"}
    numbers = str(value.flatten().tolist())
    for number, name in inf_and_nan.items():
        numbers = numbers.replace(number, name)
    return f"torch.tensor({numbers}, dtype={value.dtype}).reshape({list(value.shape)})"


# The command.


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    available = [backend.name for backend in list_backends() if backend.available]
    parser = argparse.ArgumentParser(
        prog="fuzz.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000, metavar="N", help="number of cases (1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="random seed (0)")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="number of the first case (0)")
    parser.add_argument(
        "--loss", action="append", choices=sorted(LOSSES), metavar="NAME", help="only this loss; repeatable"
    )
    parser.add_argument(
        "--backend",
        action="append",
        choices=available,
        help="only this backend; repeatable (all but triton_gpu, which is slow without a GPU)",
    )
    parser.add_argument(
        "--compiled", action="store_true", help="only dtypes for which set-up has compiled the pass"
    )
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first failure")
    arguments = parser.parse_args(words)
    for name in ("cases", "seed", "first"):
        if getattr(arguments, name) < 0:
            parser.error(f"--{name}: expected a number ≥ 0, received {getattr(arguments, name)}")
    arguments.loss = arguments.loss or sorted(LOSSES)
    arguments.backend = arguments.backend or [name for name in available if name != "triton_gpu"]
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """0 if nothing failed, 1 if something did, 130 if interrupted."""
    arguments = _arguments(words)
    begun = shown = time.monotonic()
    failures, widened, number = 0, Counter[str](), arguments.first
    last = arguments.first + arguments.cases
    try:
        for number in range(arguments.first, last):
            case = draw_case(arguments.seed, number, arguments.loss, arguments.backend, arguments.compiled)
            failure = check(case, widened)
            if failure is not None:
                failures += 1
                _show(arguments, number, case, failure)
                if not arguments.keep_going:
                    return 1
            if time.monotonic() > shown + 5:
                shown = time.monotonic()
                done = number + 1 - arguments.first
                speed = done / (shown - begun)
                print(f"{done} of {arguments.cases} cases, {speed:.0f}/s", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(
            f"interrupted after {number - arguments.first} of {arguments.cases} cases, {failures} failed; "
            f"go on with --seed {arguments.seed} --first {number} --cases {last - number}"
        )
        return 130
    seconds = time.monotonic() - begun
    print(
        f"{arguments.cases} cases with seed {arguments.seed} in {seconds:.0f} s: {failures} failed; "
        f"in {widened.total()} the tolerance was widened to the oracle's own sensitivity"
    )
    return 1 if failures else 0


def _show(arguments: argparse.Namespace, number: int, case: Case, failure: Failure) -> None:
    print(
        f"case {number} of seed {arguments.seed} fails ({case.loss}, {failure.kind}); shrinking it",
        file=sys.stderr,
    )
    small, found = shrink(case, failure)
    again = [f"--loss {name}" for name in arguments.loss] if len(arguments.loss) < len(LOSSES) else []
    again += [f"--backend {name}" for name in arguments.backend]
    again += ["--compiled"] if arguments.compiled else []
    print(f"{case.loss}: {found.message}\n\n{program(small)}\n")
    words = f"--seed {arguments.seed} --first {number} --cases 1 {' '.join(again)}"
    print(f"# before shrinking: python tests/fuzz.py {words}\n", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
