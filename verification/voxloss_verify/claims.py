"""What a loss says of itself: its formula, its options, its conventions. The laws hold it to that."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

Family = Literal["dice", "jaccard", "tversky", "focal_tversky", "log_cosh_dice", "generalized_dice"]
DTYPES = ("float64", "float32", "float16", "bfloat16")
Shards = Literal["equal batch", "unequal batch", "volume"]


@dataclass(frozen=True, kw_only=True)
class Claims:
    """L = offset − score per class, then the reduction; sums over voxels: TP = Σpg, FP = Σp − TP, FN = Σg − TP.

    | family | score |
    |---|---|
    | dice | (2 TP + s_n) / (Σp + Σg + s_d) |
    | jaccard | (TP + s_n) / (Σp + Σg − TP + s_d) |
    | tversky | (TP + s_n) / (TP + α FP + β FN + s_d) |
    | focal_tversky | offset − (1 − Tversky)^exponent is the loss |
    | log_cosh_dice | offset − 1 + log cosh(1 − Dice) is the loss |
    | generalized_dice | (2 Σ_c w TP + s_n) / (Σ_c w (Σp + Σg) + s_d), one per item |

    Attributes:
        smooth_nr, smooth_dr: s_n and s_d, in voxels.
        squared: Σp² and Σg² in the place of Σp and Σg.
        overlap: "product", or "min" for Σ min(p, g) in the place of TP (soft labels, Wang et al. 2023).
        alpha, beta: the weights of FP and of FN.
        gamma, gamma_as: the exponent of focal Tversky is what `gamma_as` makes of γ.
        linear_below: below this distance the power of focal Tversky is its chord from 0; 0 if it never is.
        weight_type, weight_scale: w = 1/(Σg)², 1/Σg or 1, divided by the item's largest finite one if
            "relative"; a class without target has the item's largest finite w, or 1 if there is none.
        class_weight: a factor for the loss of each class, for generalised Dice on w; one number, or one for
            each class that counts. The mean is not divided by it.
        activation: what the loss itself applies to its input.
        labels: "map" [B, 1, ...], "indices" [B, ...], or "one-hot" [B, C, ...].
        either_labels: of a label map and one-hot, the loss takes the other form, too, and tells them apart.
        soft_labels: a one-hot target may hold any value in [0, 1].
        spatial_dims: how many spatial axes the loss takes.
        channels: the number of channels, if it is fixed.
        include_background, classes: which channels count; a single channel always does.
        average: "macro", a loss per class; "micro", the sums of all classes in one ratio.
        batch: the sums run over the items, too.
        reduction, unreduced: over items and classes; the shape without reduction, in letters and ones.
        offset: 1 for 1 − score, 0 for −score.
        ignore_index: voxels with this label count as deleted, and the class does not count.
        empty: the score where the denominator is 0.
        absent: whether classes without target count; else they are left out of the mean over items and classes,
            or of the mean over the classes of each item, which then are averaged.
        dtypes: of the input.
        shards: how data may be split over processes so that each computes its share of the loss, DDP averages
            the gradients, and the sum is that of one process. None: equal batch shards, if the loss is a mean
            over items.
        compiles: torch.compile(fullgraph=True) takes it.
    """

    family: Family
    smooth_nr: float = 0.0
    smooth_dr: float = 0.0
    squared: bool = False
    overlap: Literal["product", "min"] = "product"
    alpha: float = 0.5
    beta: float = 0.5
    gamma: float = 1.0
    gamma_as: Literal["1/gamma", "gamma", "1-gamma"] = "1/gamma"
    linear_below: float = 0.0
    weight_type: Literal["square", "simple", "uniform"] = "square"
    weight_scale: Literal["relative", "absolute"] = "absolute"
    class_weight: float | tuple[float, ...] | None = None
    activation: Literal["softmax", "sigmoid", "none"] = "none"
    labels: Literal["map", "indices", "one-hot"] = "one-hot"
    either_labels: bool = False
    soft_labels: bool = False
    spatial_dims: Literal[1, 2, 3] = 3
    channels: int | None = None
    include_background: bool = True
    classes: tuple[int, ...] | None = None
    average: Literal["macro", "micro"] = "macro"
    batch: bool = False
    reduction: Literal["mean", "sum", "none"] = "mean"
    unreduced: str = "B C"
    offset: Literal[0, 1] = 1
    ignore_index: int | None = None
    empty: Literal["perfect", "worst", "nan"] = "perfect"
    absent: Literal["count", "skip", "skip per item"] = "count"
    dtypes: tuple[str, ...] = DTYPES
    shards: tuple[Shards, ...] | None = None
    compiles: bool = True

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Claims).items():
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
                value = tuple(value)
            if not _fits(value, hint):
                raise ValueError(f"claim {name}: expected {_spelled(hint)}, got {value!r}.")
        for name in ("smooth_nr", "smooth_dr", "alpha", "beta", "linear_below"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"claim {name}: expected a number ≥ 0, got {getattr(self, name)!r}.")
        if not self.gamma or not math.isfinite(self.gamma):
            raise ValueError(f"claim gamma: expected a number other than 0, got {self.gamma!r}.")
        if not self.dtypes or not set(self.dtypes) <= set(DTYPES):
            raise ValueError(f"claim dtypes: expected some of {', '.join(DTYPES)}, got {list(self.dtypes)}.")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"claim channels: expected a number ≥ 1, got {self.channels}.")
        if not all(part in ("B", "C") or part.isdecimal() for part in self.unreduced.split()):
            raise ValueError(
                f"claim unreduced: expected letters B, C and numbers like 'B C 1 1 1', got {self.unreduced!r}."
            )

    @property
    def exponent(self) -> float:
        """The power to which focal Tversky raises 1 − Tversky."""
        return {"1/gamma": 1 / self.gamma, "gamma": self.gamma, "1-gamma": 1 - self.gamma}[self.gamma_as]

    def ignores_a_class(self, channels: int) -> bool:
        """Whether the ignored label is that of one of so many channels."""
        return self.ignore_index is not None and 0 <= self.ignore_index < channels

    def counting(self, channels: int) -> list[int]:
        """The channels that count, of so many."""
        if channels == 1:
            return [0]
        chosen = range(0 if self.include_background else 1, channels) if self.classes is None else self.classes
        return [c for c in chosen if c != self.ignore_index]

    def weights(self, channels: int) -> list[float]:
        """One factor per channel that counts."""
        count = len(self.counting(channels))
        if isinstance(self.class_weight, tuple):
            if len(self.class_weight) != count:
                raise ValueError(
                    f"claim class_weight: expected {count} numbers, one per class that counts, "
                    f"got {list(self.class_weight)}."
                )
            return list(self.class_weight)
        return [1.0 if self.class_weight is None else self.class_weight] * count

    @property
    def fixed_channels(self) -> int | None:
        """The only number of channels that the loss can take, if the claims fix it."""
        if self.channels is not None:
            return self.channels
        if not isinstance(self.class_weight, tuple):
            return None
        return next(
            (c for c in range(2, 1024) if len(self.counting(c)) == len(self.class_weight)),
            None,
        )

    @property
    def shard_kinds(self) -> tuple[Shards, ...]:
        """The splits that are claimed, by name or by being a mean over items."""
        if self.shards is not None:
            return self.shards
        by_item = not self.batch and self.reduction == "mean" and self.absent == "count"
        return ("equal batch",) if by_item else ()


def parse_claims(pairs: Iterable[str], start: Claims | None = None, family: str | None = None) -> Claims:
    """Change `start`, or the defaults of a family, by "name=value" pairs; values are JSON or bare words.

    Raises ValueError that says which claims there are, or what a value should be.
    """
    given: dict[str, Any] = {}
    hints = get_type_hints(Claims)
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"claim: expected name=value like alpha=0.3, got {pair!r}.")
        if name not in {field.name for field in fields(Claims)}:
            names = [field.name for field in fields(Claims)]
            near = get_close_matches(name, names, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"claim {name!r}: expected one of {', '.join(names)}.{hint}")
        value = _value(text)
        listed = isinstance(value, str) and get_origin(hints[name]) is tuple
        given[name] = text.split(",") if listed else value
    if family is not None:
        given.setdefault("family", family)
    if start is not None:
        return replace(start, **given)
    if "family" not in given:
        families = ", ".join(get_args(Family))
        raise ValueError(f"what the loss claims to be is not known: say --as with one of {families}.")
    return Claims(**given)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        with suppress(ValueError):
            return float(text)  # .7, which is no JSON
        return {"True": True, "False": False, "None": None}.get(text, text)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = getattr(hint, "__origin__", None), get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if arguments:  # a union
        return any(_fits(value, choice) for choice in arguments)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spelled(hint: Any) -> str:
    origin, arguments = getattr(hint, "__origin__", None), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list, each {_spelled(arguments[0])}"
    if arguments:
        return " or ".join(_spelled(choice) for choice in arguments)
    return {float: "a number", int: "a whole number", bool: "true or false", str: "text"}.get(hint, "null")
