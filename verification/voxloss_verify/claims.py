"""What a loss says of itself: its formula, its options, its conventions. The laws hold it to that."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def claims_of(loss: object, given: Mapping[str, Any] | None = None) -> Claims | None:
    """Read the claims off an instance of voxloss's, MONAI's, nnU-Net's or kornia's losses, None for others.

    A subclass is read like the class that it derives from. Raises ValueError if the instance does not have the
    flags and numbers that its constructor was `given`.
    """
    for name, value in (given or {}).items():
        kept = getattr(loss, name, value)
        if isinstance(value, bool | int | float) and isinstance(kept, bool | int | float) and kept != value:
            raise ValueError(f"{name}={value!r} was given, and the instance has {name}={kept!r}.")
    for kind in type(loss).__mro__:
        read = _READERS.get((kind.__module__.split(".")[0], kind.__name__))
        if read is not None:
            return read(loss)
    return None


def _monai_like(loss: Any, family: Family, **own: Any) -> Claims:
    ours = any(kind.__module__.startswith("voxloss.") for kind in type(loss).__mro__)
    for name in ("other_act", "pre_softmax"):
        if getattr(loss, name, None) is not None:
            raise ValueError(f"claims cannot be read off a loss with {name}: give them.")
    ignored = getattr(loss, "ignore_index", None)
    if not ours and ignored is not None and 0 <= ignored < 255:
        raise ValueError(
            f"claims cannot be read off ignore_index={ignored}: whether the class of that number counts is not "
            "documented. Give them."
        )
    activation = "softmax" if loss.softmax else "sigmoid" if loss.sigmoid else "none"
    soft = bool(getattr(loss, "soft_label", False))
    squared = bool(getattr(loss, "squared_pred", False))
    weight = getattr(loss, "class_weight", None)
    # MONAI's smooth_dr is there "to avoid nan": without it, there may be one.
    policies: dict[str, Any] = {"empty": "perfect" if ours or loss.smooth_dr else "nan"}
    shape = "B C" if family in ("tversky", "focal_tversky") else "B C" + " 1" * 3
    if family == "generalized_dice":
        shape = "B 1" + " 1" * 3
    if loss.batch:
        shape = shape.removeprefix("B ")
    claims: dict[str, Any] = {
        "family": family,
        "smooth_nr": float(loss.smooth_nr),
        "smooth_dr": float(loss.smooth_dr),
        "squared": squared,
        "overlap": "min" if soft and not squared else "product",
        "class_weight": _weight(weight),
        "activation": activation,
        "labels": "map" if loss.to_onehot_y else "one-hot",
        "soft_labels": not loss.to_onehot_y,
        "include_background": loss.include_background,
        "classes": None if getattr(loss, "classes", None) is None else tuple(loss.classes),
        "batch": loss.batch,
        "reduction": loss.reduction,
        "unreduced": shape,
        "ignore_index": getattr(loss, "ignore_index", None),
        "absent": getattr(loss, "absent", "count"),
        **policies,
        **own,
    }
    if family == "jaccard":  # the smoothing stands beside 2 TP
        claims["smooth_nr"] /= 2
        claims["smooth_dr"] /= 2
    if family == "generalized_dice":
        claims["weight_type"] = str(getattr(loss.w_type, "value", loss.w_type))
        claims["weight_scale"] = "relative" if ours else "absolute"
    return Claims(**claims)


def _weight(weight: Any) -> float | tuple[float, ...] | None:
    if weight is None:
        return None
    values = weight.detach().cpu().tolist()
    return tuple(values) if isinstance(values, Sequence) else float(values)


def _dice(loss: Any) -> Claims:
    return _monai_like(loss, "jaccard" if loss.jaccard else "dice")


def _tversky(loss: Any) -> Claims:
    return _monai_like(loss, "tversky", alpha=float(loss.alpha), beta=float(loss.beta))


def _focal_tversky(loss: Any) -> Claims:
    return _monai_like(
        loss,
        "focal_tversky",
        alpha=float(loss.alpha),
        beta=float(loss.beta),
        gamma=float(loss.gamma),
        linear_below=2.0**-23,
    )


def _f_beta(loss: Any) -> Claims:
    squared = float(loss.f_beta) ** 2
    return _monai_like(loss, "tversky", alpha=1 / (1 + squared), beta=squared / (1 + squared))


def _log_cosh_dice(loss: Any) -> Claims:
    if loss.jaccard:
        raise ValueError("claims cannot be read off jaccard=True: log cosh is claimed of Dice only. Give them.")
    return _monai_like(loss, "log_cosh_dice")


# By name, as torch's are built in and nnU-Net is not imported to read one of its losses.
_NONLINEARITIES: dict[str | None, Literal["softmax", "sigmoid"]] = {
    "softmax_helper_dim1": "softmax",
    "sigmoid": "sigmoid",
}


def _nnunet(loss: Any) -> Claims:
    activation: Literal["softmax", "sigmoid", "none"] = "none"
    if loss.apply_nonlin is not None:
        name = getattr(loss.apply_nonlin, "__name__", None)
        if name not in _NONLINEARITIES:
            raise ValueError(
                "claims cannot be read off apply_nonlin: expected None, nnU-Net's softmax_helper_dim1 or "
                f"torch.sigmoid, got {name or type(loss.apply_nonlin).__name__}."
            )
        activation = _NONLINEARITIES[name]
    clip = getattr(loss, "clip_tp", None)
    if clip is not None:
        raise ValueError(f"claims cannot be read off clip_tp: expected None, got {clip!r}.")
    return Claims(
        family="dice",
        smooth_nr=float(loss.smooth),
        smooth_dr=float(loss.smooth),
        activation=activation,
        labels="map",
        either_labels=True,
        include_background=loss.do_bg,
        batch=loss.batch_dice,
        offset=0,
        # Its denominator is at least 1e-8, so that 0/0 is 0.
        empty="worst",
        # Its sums are float32 whatever the input is.
        dtypes=("float32", "float16", "bfloat16"),
    )


def _kornia(loss: Any, family: Family, **own: Any) -> Claims:
    ignored = loss.ignore_index
    if ignored is not None and 0 <= ignored < 255:
        # Its pixels do not count, but the class of that number enters average="micro" with its false positives.
        raise ValueError(f"claims cannot be read off ignore_index={ignored}, which may be that of a class.")
    micro = own.get("average") == "micro"
    return Claims(
        family=family,
        smooth_dr=float(loss.eps),
        activation="softmax",
        labels="indices",
        spatial_dims=2,
        # An item whose pixels are all ignored costs 1, which no claim says of a mean over the classes present.
        ignore_index=ignored if micro else None,
        absent="count" if micro else "skip per item",
        empty="worst",
        **own,
    )


def _kornia_dice(loss: Any) -> Claims:
    if loss.weight is not None:
        raise ValueError("claims cannot be read off weight: expected None, as the mean is divided by weights.")
    return _kornia(loss, "dice", average=loss.average)


def _kornia_tversky(loss: Any) -> Claims:
    return _kornia(loss, "tversky", alpha=float(loss.alpha), beta=float(loss.beta))


_READERS: dict[tuple[str, str], Callable[[Any], Claims]] = {
    **{(library, "DiceLoss"): _dice for library in ("voxloss", "monai")},
    **{(library, "TverskyLoss"): _tversky for library in ("voxloss", "monai")},
    **{
        (library, "GeneralizedDiceLoss"): lambda loss: _monai_like(loss, "generalized_dice")
        for library in ("voxloss", "monai")
    },
    ("voxloss", "JaccardLoss"): lambda loss: _monai_like(loss, "jaccard"),
    ("voxloss", "FocalTverskyLoss"): _focal_tversky,
    ("voxloss", "LogCoshDiceLoss"): _log_cosh_dice,
    ("voxloss", "AsymmetricSimilarityLoss"): _f_beta,
    ("nnunetv2", "SoftDiceLoss"): _nnunet,
    ("nnunetv2", "MemoryEfficientSoftDiceLoss"): _nnunet,
    ("kornia", "DiceLoss"): _kornia_dice,
    ("kornia", "TverskyLoss"): _kornia_tversky,
}
