"""The declared properties of a loss: its formula, options and conventions, which the checks compare it with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from fractions import Fraction
from functools import cache
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints, runtime_checkable

Family = Literal[
    "dice",
    "jaccard",
    "tversky",
    "focal_tversky",
    "log_cosh_dice",
    "logarithmic_dice",
    "generalized_dice",
    "mcc",
    "sensitivity_specificity",
    "cross_entropy",
    "focal",
    "logarithmic_cross_entropy",
    "compound",
    "formula",
    "dice_metric",
    "iou_metric",
    "generalized_dice_metric",
]
# Of hard label maps: what is not a loss.
METRICS: tuple[Family, ...] = ("dice_metric", "iou_metric", "generalized_dice_metric")
Score = Literal["dice", "jaccard", "tversky"]
# Of each formula of one ratio per class, the ratio: the loss is 1 − it, or a function of that.
SCORES: dict[Family, Score] = {
    "dice": "dice",
    "log_cosh_dice": "dice",
    "logarithmic_dice": "dice",
    "generalized_dice": "dice",
    "jaccard": "jaccard",
    "tversky": "tversky",
    "focal_tversky": "tversky",
}
# What a mean over voxels is of; all other formulas are of sums over voxels.
BY_VOXEL: tuple[Family, ...] = ("cross_entropy", "focal", "logarithmic_cross_entropy")
# Of these, the means that are divided by voxels and not by their labels' weights; their γ may be 0.
FOCAL: tuple[Family, ...] = ("focal", "logarithmic_cross_entropy")
# The families with such a parameter.
_OF_FAMILIES: dict[str, tuple[Family, ...]] = {
    **dict.fromkeys(("alpha", "beta"), ("tversky", "focal_tversky")),
    "gamma": ("focal_tversky", "focal", "logarithmic_dice", "logarithmic_cross_entropy"),
    "gamma_as": ("focal_tversky", "logarithmic_dice"),
}
DTYPES = ("float64", "float32", "float16", "bfloat16")
Activation = Literal["softmax", "sigmoid", "none"]
Labels = Literal["map", "indices", "one-hot", "regions"]
# "nearest" and "components" are partitions: by the nearest lesion, or into lesions and what is in none.
MapName = Literal["skeleton", "distance", "nearest", "components"]
Shards = Literal["equal batch", "unequal batch", "volume"]
# What a compound claims for its parts.
OF_THE_CALL = (
    "activation",
    "labels",
    "regions",
    "either_labels",
    "soft_labels",
    "spatial_dims",
    "channels",
    "reduction",
    "ignore_index",
    "map",
    "dtypes",
    "precision",
    "shards",
    "compiles",
)


@runtime_checkable
class Formula(Protocol):
    """A formula given as a function, for a sample of so many classes.

    If it has an attribute `extra_sums`, it takes these sums, by voxloss's names, after intersection, prediction
    and target.
    """

    def __call__(
        self, sums: Sequence[Sequence[float]], weights: Sequence[float], counting: Sequence[int], channels: int
    ) -> tuple[list[float], list[list[float]]]:
        """From the sums of each class its loss, and the derivatives of Σ weight·loss by these sums.

        The classes are those of the channels `counting`, of so many `channels`.
        """


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
    | logarithmic_dice | offset − 1 + (−log Dice)^exponent is the loss |
    | generalized_dice | (2 Σ_c w TP + s_n) / (Σ_c w (Σp + Σg) + s_d), one per sample |
    | mcc | (TP·TN − FP·FN + s_n) / √((TP + FP)(TP + FN)(TN + FP)(TN + FN) + s_d), 1 if FP = FN = 0 |
    | sensitivity_specificity | r Σ g(g − p)² / Σg + (1 − r) Σ (1 − g)(g − p)² / Σ(1 − g) is the loss, 0/0 = 0 |
    | formula | what the loss's own `formula` makes of the sums is the loss |
    | dice_metric, iou_metric | the score itself, of hard label maps: 2 TP / (P + G), TP / (P + G − TP) |
    | generalized_dice_metric | the same of 2 Σ_c w TP / Σ_c w (P + G), one per sample |

    | family | loss |
    |---|---|
    | cross_entropy | −Σ w g log p / Σ w g over voxels and classes, of the `hardest` voxels |
    | focal | the mean over voxels of −Σ_c w α g (1 − p)^γ log p |
    | logarithmic_cross_entropy | the mean over voxels of Σ_c w √(Σf/f_c) g (−log p)^γ |
    | compound | Σ λ·part |

    Under a sigmoid, or with a single channel, cross entropy and focal loss have independent binary
    channels: with a term in 1 − g, p and log(1 − p) as well (for focal loss its factor is 1 − α if α is one
    number), and the mean is over voxels and classes. Otherwise an ignored class is still one of the mutually
    exclusive classes, though never the correct one.

    A compound declares the properties of the call (`OF_THE_CALL`) for its parts, which repeat them; the parts
    declare those of the formula.

    Args:
        smooth_nr, smooth_dr: s_n and s_d, in voxels.
        squared: Σp² and Σg² in the place of Σp and Σg.
        overlap: "product", or "min" for Σ min(p, g) in the place of TP (soft labels, Wang et al. 2023).
        alpha, beta: the weights of FP and of FN.
        gamma, gamma_as: the exponent of focal Tversky is what `gamma_as` makes of γ; of focal loss it is γ ≥ 0.
        focused: which classes have the power: of focal loss perhaps the background only, of focal Tversky perhaps
            the foreground only. The background is channel 0 of mutually exclusive classes.
        linear_below: below this a linear segment replaces a power of a distance, or of a logarithm; 0 for none.
        penalty: k of Generalized Dice, whose loss x becomes x / (1 + k(1 − x)).
        inside: r of the error inside of the target.
        frequencies: f of each channel, under a sigmoid a fraction of 1; None for the voxels of the batch.
        weight_type, weight_scale: w = 1/(Σg)², 1/Σg or 1; if "relative", divided by the largest finite one of the
            sample. A class without target has the largest finite w of the sample, or 1 if there is none; in a
            metric that leaves it out, 0.
        class_weight: a factor for the loss of each class, for Generalized Dice on w; one number, or one for
            each class that counts. The mean is not divided by it, but that of cross entropy.
        label_smoothing: ε of cross entropy, whose target is (1 − ε) g + ε/C, under a sigmoid ε/2.
        hardest: k of cross entropy, which is of the max(1, ⌊N k/100⌋) of the batch's N voxels where it is
            largest; voxels that tie for the last places share their weight.
        balance: α of focal loss: one number, for a softmax 1 − α for the background, or one for each class that
            counts.
        mean_over: of focal loss under a softmax, "voxels", or "voxels and classes".
        formula: of the family of that name.
        parts: λ and claims of each part of a compound.
        activation: what the loss itself applies to its input.
        labels: "map" [B, 1, ...], "indices" [B, ...], "one-hot" [B, C, ...], or "regions": a map, each channel is
            where its label is in one of the `regions`.
        regions: the labels of each channel; every combination of channels must belong to a label, as in
            [[1, 3], [2, 3]], so that any target can be expressed.
        either_labels: the loss takes both a label map and one-hot, and distinguishes them.
        soft_labels: a one-hot target may hold any value in [0, 1].
        spatial_dims: how many spatial axes the loss takes.
        channels: the number of channels, if it is fixed.
        include_background, classes: which channels count; a single channel always does.
        average: "macro", a loss per class; "micro", the sums of all classes in one ratio.
        batch: the sums run over the samples, too.
        reduction, unreduced: over samples and classes; the shape without reduction, in letters and ones. A sum of
            cross entropy is over voxels, of focal loss over samples and classes, each the mean of a sample's
            voxels; without reduction neither is declared, nor a compound.
        offset: 1 for 1 − score, 0 for −score.
        ignore_index: voxels with this label count as deleted, and the class does not count.
        map: what the loss takes beside the target: the checks derive it from the target, the "skeleton" as the
            whole target, the "distance" as 1 − 2g, the partitions "nearest" and "components" as one cell per
            sample.
        empty: the score where the denominator is 0; of a metric, where prediction and reference are empty.
        absent: whether classes without target count; else they are left out of the mean over samples and classes,
            or of the mean over the classes of each sample, which then are averaged. Of a metric, they are NaN.
            "perfect": they count, and their score is 1 for every prediction.
        dtypes: of the input.
        precision: the dtype that the loss computes in: with "float32", float64 inputs are compared at the
            resolution of float32.
        mean_without_nan: of a metric, the mean of the scores that are no NaN: of each sample over its classes,
            then over the samples; or of all at once. Without reduction, `unreduced` "C" is the mean over samples.
        shards: how data may be split over processes so that each computes its share of the loss, DDP averages
            the gradients, and the sum is that of one process. None: equal batch shards, if the loss is a mean
            over samples, or over voxels of which every sample has as many.
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
    focused: Literal["all", "background", "foreground"] = "all"
    penalty: float = 0.0
    inside: float = 0.5
    frequencies: tuple[float, ...] | None = None
    weight_type: Literal["square", "simple", "uniform"] = "square"
    weight_scale: Literal["relative", "absolute"] = "absolute"
    class_weight: float | tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    hardest: float = 100.0
    balance: float | tuple[float, ...] | None = None
    mean_over: Literal["voxels", "voxels and classes"] = "voxels"
    formula: Formula | None = None
    parts: tuple[tuple[float, Claims], ...] = ()
    activation: Activation = "none"
    labels: Labels = "one-hot"
    regions: tuple[tuple[int, ...], ...] | None = None
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
    map: MapName | None = None
    empty: Literal["perfect", "worst", "nan"] = "perfect"
    absent: Literal["count", "perfect", "skip", "skip per item"] = "count"
    dtypes: tuple[str, ...] = DTYPES
    precision: Literal["input", "float32"] = "input"
    mean_without_nan: Literal["by sample", "over all"] = "by sample"
    shards: tuple[Shards, ...] | None = None
    compiles: bool = True

    def __post_init__(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name, hint in _hints().items():
            value = getattr(self, name)
            if value is defaults[name]:  # the search for properties makes thousands of claims
                continue
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
                value = tuple(value)
            if not _fits(value, hint):
                choices = map(str, get_args(hint)) if isinstance(value, str) else ()
                near = get_close_matches(str(value).lower(), [*choices], 1)
                meant = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(f"claim {name}: expected {_spelled(hint)}, received {value!r}.{meant}")
        for name in ("smooth_nr", "smooth_dr", "alpha", "beta", "linear_below", "penalty", "inside"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"claim {name}: expected a number ≥ 0, received {getattr(self, name)!r}.")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(
                f"claim label_smoothing: expected a number in [0, 1], received {self.label_smoothing!r}."
            )
        if not 0 < self.hardest <= 100 or (self.hardest < 100 and self.family != "cross_entropy"):
            raise ValueError(
                f"claim hardest: expected percent in (0, 100] of cross entropy, received {self.hardest!r} of "
                f"{self.family}."
            )
        if self.family in FOCAL and not 0 <= self.gamma < math.inf:
            raise ValueError(f"claim gamma: expected a number ≥ 0, received {self.gamma!r}.")
        inverted = self.family not in FOCAL and self.gamma_as != "1-gamma"
        if not math.isfinite(self.gamma) or (inverted and not self.gamma):
            raise ValueError(f"claim gamma: expected a number other than 0, received {self.gamma!r}.")
        if (self.family == "compound") != bool(self.parts):
            raise ValueError(
                "claim parts: a compound has some, no other family has. They are given in Python, as "
                "Claims(family='compound', parts=((factor, Claims(...)), ...))."
            )
        if (self.family == "formula") != (self.formula is not None):
            raise ValueError(
                f"claim formula: expected one of the family of that name only, received {self.family}."
            )
        if not self.dtypes or not set(self.dtypes) <= set(DTYPES):
            raise ValueError(f"claim dtypes: expected some of {', '.join(DTYPES)}, received {list(self.dtypes)}.")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"claim channels: expected a number ≥ 1, received {self.channels}.")
        if (self.labels == "regions") != (self.regions is not None):
            raise ValueError(
                f'claim regions: expected labels="regions" beside them, and with that some, received labels='
                f'"{self.labels}", regions={self.regions}.'
            )
        if self.regions is not None:
            missing = set(range(2 ** len(self.regions))) - set(self.label_of_channels)
            if missing or self.activation == "softmax" or self.soft_labels:
                raise ValueError(
                    "claim regions: expected for each choice of channels a label that is in these regions and no "
                    "other, as [[1, 3], [2, 3]], and neither a softmax nor soft labels, received "
                    f"{[list(region) for region in self.regions]}, activation={self.activation}."
                )
        if not all(part in ("B", "C") or part.isdecimal() for part in self.unreduced.split()):
            raise ValueError(
                "claim unreduced: expected letters B, C and numbers like 'B C 1 1 1', received "
                f"{self.unreduced!r}."
            )
        if self.reduction == "none" and (self.by_voxel or self.parts):
            raise ValueError(f'claim reduction: expected "mean" or "sum" of {self.family}, received "none".')
        shared = {name: getattr(self, name) for name in OF_THE_CALL}
        parts = tuple((float(factor), replace(part, **shared)) for factor, part in self.parts)
        object.__setattr__(self, "parts", parts)

    def __str__(self) -> str:
        """The family, and what differs from the defaults."""
        return " ".join(self._differing(set()))

    def _differing(self, shared: set[str]) -> Iterator[str]:
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default or field.name in shared:
                continue
            if field.name == "parts":
                each = ((factor, " ".join(part._differing({*OF_THE_CALL}))) for factor, part in self.parts)
                value = " + ".join(f"{factor:g}·({said})" for factor, said in each)
            yield f"{field.name}={value}"

    @property
    def formulas(self) -> tuple[Claims, ...]:
        """Of a compound the claims of all of its parts, and of theirs; else these."""
        return tuple(each for _, part in self.parts for each in part.formulas) if self.parts else (self,)

    @property
    def score(self) -> Score:
        """The ratio that the formula is of. Raises ValueError for one that is of none, or not in `SCORES`."""
        if self.family not in SCORES:
            raise ValueError(f"family {self.family}: expected one of oracle.claims.SCORES, {', '.join(SCORES)}.")
        return SCORES[self.family]

    def resolution(self, dtype: str) -> str:
        """The dtype by which the loss of an input of a dtype is to be judged."""
        return "float32" if dtype == "float64" and self.precision == "float32" else dtype

    @property
    def by_voxel(self) -> bool:
        """Whether the loss is a mean over voxels, and not of sums over them."""
        return self.family in BY_VOXEL

    @property
    def chooses_voxels(self) -> bool:
        """Whether it is of the hardest voxels alone, so that a gradient jumps where another voxel becomes one."""
        return any(each.hardest < 100 for each in self.formulas)

    @property
    def may_be_nan(self) -> bool:
        """Whether there are volumes for which not a number is declared."""
        return any(each.empty == "nan" for each in self.formulas)

    @property
    def perfect(self) -> float:
        """The loss of a perfect prediction."""
        return sum(factor * part.perfect for factor, part in self.parts) if self.parts else self.offset - 1

    @property
    def leaves_out(self) -> bool:
        """Whether the mean is not over the classes without target."""
        return self.absent in ("skip", "skip per item")

    @property
    def exponent(self) -> float:
        """The power to which focal Tversky raises 1 − Tversky."""
        return {"1/gamma": 1 / self.gamma, "gamma": self.gamma, "1-gamma": 1 - self.gamma}[self.gamma_as]

    def ignores_a_class(self, channels: int) -> bool:
        """Whether the ignored label is that of one of so many channels."""
        return self.ignore_index is not None and 0 <= self.ignore_index < channels

    @property
    def every_class(self) -> bool:
        """Whether no channel is left out, but for that of an ignored class."""
        return self.include_background and self.classes is None

    def has_power(self, channel: int, channels: int) -> bool:
        """Whether the power is of this channel, of so many."""
        background = channel == 0 and not self.is_binary(channels)
        return {"all": True, "background": background, "foreground": not background}[self.focused]

    def is_binary(self, channels: int) -> bool:
        """Whether the channels are independent and binary, instead of mutually exclusive classes."""
        return channels == 1 or self.activation == "sigmoid"

    def counting(self, channels: int) -> list[int]:
        """The channels that count, of so many; of a compound, in any part."""
        if self.parts:
            return sorted({c for _, part in self.parts for c in part.counting(channels)})
        if channels == 1:
            return [0]
        chosen = range(0 if self.include_background else 1, channels) if self.classes is None else self.classes
        if self.by_voxel and not self.is_binary(channels):
            return list(chosen)
        return [c for c in chosen if c != self.ignore_index]

    def weights(self, channels: int) -> list[float]:
        """One factor per channel that counts."""
        return self._factors("class_weight", channels)

    def balances(self, channels: int) -> list[tuple[float, float]]:
        """What focal loss multiplies with what is there and what is not, for each channel that counts."""
        counting, factors = self.counting(channels), self._factors("balance", channels)
        if self.balance is None or isinstance(self.balance, tuple):
            return [(factor, 1.0) for factor in factors]
        if self.is_binary(channels):
            return [(factor, 1 - factor) for factor in factors]
        return [(factor if c else 1 - factor, 1.0) for c, factor in zip(counting, factors, strict=True)]

    def _factors(self, name: str, channels: int) -> list[float]:
        count, value = len(self.counting(channels)), getattr(self, name)
        if not isinstance(value, tuple):
            return [1.0 if value is None else value] * count
        if len(value) != count:
            raise ValueError(
                f"claim {name}: expected {count} numbers, one per class that counts, received {list(value)}."
            )
        return list(value)

    @property
    def fixed_channels(self) -> int | None:
        """The only number of channels that the loss can take, if the claims fix it."""
        if self.channels is not None:
            return self.channels
        if self.regions is not None:
            return len(self.regions)
        for each in self.formulas:
            if each.frequencies is not None:
                return len(each.frequencies)
            for factors in (each.class_weight, each.balance):
                if isinstance(factors, tuple):
                    return next((c for c in range(2, 1024) if len(each.counting(c)) == len(factors)), None)
        return None

    @property
    def has_channels(self) -> bool:
        """Whether the checks draw a target with one channel per class, of whatever form the loss is given."""
        return self.labels in ("one-hot", "regions")

    @property
    def label_of_channels(self) -> dict[int, int]:
        """Of regions the smallest label that is in just these, which are the bits of a number."""
        regions = self.regions or ()
        largest = max((label for region in regions for label in region), default=-1)
        bits = [sum((label in region) << c for c, region in enumerate(regions)) for label in range(largest + 1)]
        return {chosen: bits.index(chosen) for chosen in bits}

    @property
    def named_channels(self) -> int:
        """How many channels there must be for every class that is named."""
        return max((c + 1 for each in self.formulas for c in each.classes or ()), default=0)

    @property
    def shard_kinds(self) -> tuple[Shards, ...]:
        """The splits that are declared, by name or by being a mean over samples."""
        if self.shards is not None:
            return self.shards
        return ("equal batch",) if self.is_mean_of_items else ()

    @property
    def is_mean_of_items(self) -> bool:
        """Whether a batch costs the mean of what its samples cost each by itself, for samples of one size."""
        if self.parts:
            return all(part.is_mean_of_items for _, part in self.parts)
        if self.by_voxel:
            every = self.ignore_index is None and self.hardest == 100
            return self.reduction == "mean" and every and self._divides_alike
        return not self.batch and self.reduction == "mean" and not self.leaves_out

    @property
    def _divides_alike(self) -> bool:
        """Whether a mean over voxels has the same divisor for any samples of one size without ignored voxels."""
        if self.family == "logarithmic_cross_entropy" and self.frequencies is None:
            return False
        if self.family in FOCAL or self.activation == "sigmoid":
            return True
        # Σ w g, where every voxel has one class, they all count, and none counts more.
        return self.every_class and not isinstance(self.class_weight, tuple) and not self.has_channels


def parse_claims(pairs: Iterable[str], start: Claims | None = None, family: str | None = None) -> Claims:
    """Change `start`, or the defaults of a family, by "name=value" pairs; values are JSON or bare words.

    Raises ValueError that lists the properties, or names the expected value.
    """
    given: dict[str, Any] = {}
    hints = get_type_hints(Claims)
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"claim: expected name=value like alpha=0.3, received {pair!r}.")
        names = [field.name for field in fields(Claims) if field.name not in ("formula", "parts")]
        if name not in names:
            near = get_close_matches(name, names, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"claim {name!r}: expected one of {', '.join(names)}.{hint}")
        value = _value(text)
        listed = isinstance(value, str) and get_origin(hints[name]) is tuple
        given[name] = text.split(",") if listed else value
    if family is not None:
        given.setdefault("family", family)
    if start is not None and given.get("family", start.family) != start.family:
        given = {"formula": None, "parts": (), **given}
    if start is None and "family" not in given:
        families = ", ".join(get_args(Family))
        raise ValueError(f"the family of the loss is not known. Set --as to one of {families}.")
    claims = Claims(**given) if start is None else replace(start, **given)
    for name in given:
        if name in _OF_FAMILIES and claims.family not in _OF_FAMILIES[name]:
            raise ValueError(
                f"claim {name}: expected with the family {' or '.join(_OF_FAMILIES[name])}, received it with "
                f"{claims.family}, whose formula has none. Omit it, or set --as."
            )
    return claims


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        with suppress(ValueError, ZeroDivisionError):
            return float(Fraction(text))  # 4/3, .7, which are no JSON
        return {"True": True, "False": False, "None": None}.get(text, text)


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Claims)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = getattr(hint, "__origin__", None), get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is tuple and arguments[-1] is not ...:
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(_fits, value, arguments))
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
