"""The properties of losses and metrics of known libraries, read from an instance. No library is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from voxloss_verify.oracle.claims import SCORES, Claims, Family, MapName
from voxloss_verify.oracle.exact import EXTRA_SUMS


def claims_of(loss: object, given: Mapping[str, Any] | None = None) -> Claims | None:
    """Read the claims off an instance of a class that `READERS` has, None for others.

    A subclass is read like the class that it derives from. Raises ValueError if the instance does not have the
    flags and numbers that its constructor was `given`.
    """
    for name, value in (given or {}).items():
        kept = getattr(loss, name, value)
        if isinstance(value, bool | int | float) and isinstance(kept, bool | int | float) and kept != value:
            raise ValueError(f"{name}={value!r} was given, and the instance has {name}={kept!r}.")
    for kind in type(loss).__mro__:
        read = READERS.get((kind.__module__.split(".")[0], kind.__name__))
        if read is not None:
            return read(loss)
    return None


# Below this, a power of voxloss's is a chord.
_CHORD = 2.0**-23


def _is_ours(loss: Any) -> bool:
    return any(kind.__module__.startswith("voxloss.") for kind in type(loss).__mro__)


def map_of(loss: Any) -> MapName | None:
    """What a loss is given beside the target."""
    name: MapName | None = getattr(loss, "map_name", None)
    if not getattr(loss, "by_cell", False):
        return name
    joined = {bool(part.joined) for part in loss.modules() if hasattr(part, "joined")}
    if name is not None or len(joined) > 1:
        raise ValueError("properties cannot be read from a loss of two maps: expected one partition alone.")
    return "components" if joined.pop() else "nearest"


def _call(loss: Any) -> dict[str, Any]:
    """What concerns the call of a loss like MONAI's."""
    for name in ("other_act", "pre_softmax"):
        if getattr(loss, name, None) is not None:
            raise ValueError(f"properties cannot be read from a loss with {name}: give them.")
    ignored = getattr(loss, "ignore_index", None)
    if not _is_ours(loss) and ignored is not None and 0 <= ignored < 255:
        raise ValueError(
            f"properties cannot be read from ignore_index={ignored}: whether the class of that number counts is "
            "not documented. Declare them."
        )
    softmax = getattr(loss, "use_softmax", None)
    if softmax is None:
        activation = "softmax" if loss.softmax else "sigmoid" if loss.sigmoid else "none"
    else:
        activation = "softmax" if softmax else "sigmoid"
    # Without processes to share with, what may be split follows from the formula.
    shards = ("equal batch", "unequal batch") if getattr(loss, "shard", None) == "batch" else ("volume",)
    return {
        "activation": activation,
        **_target(loss),
        "reduction": loss.reduction,
        "map": map_of(loss),
        "shards": None if getattr(loss, "group", None) is None else shards,
        "compiles": not getattr(loss, "by_cell", False) or loss.cells is not None,
    }


def _target(loss: Any) -> dict[str, Any]:
    """The form of the target, and which label is ignored in it."""
    ignored = getattr(loss, "ignore_index", None)
    regions = getattr(loss, "regions", None)
    if regions is not None:  # no channel is ignored with the label
        return {"labels": "regions", "regions": tuple(map(tuple, regions)), "ignore_index": None}
    is_map = loss.to_onehot_y
    return {"labels": "map" if is_map else "one-hot", "soft_labels": not is_map, "ignore_index": ignored}


def _monai_like(loss: Any, family: Family, **own: Any) -> Claims:
    ours = _is_ours(loss)
    soft = bool(getattr(loss, "soft_label", False))
    squared = bool(getattr(loss, "squared_pred", False))
    smooth_nr, smooth_dr = (float(getattr(loss, name, 0)) for name in ("smooth_nr", "smooth_dr"))
    flat = family in ("tversky", "focal_tversky", "mcc") or not getattr(loss, "keeps_spatial_axes", True)
    shape = "B C" if flat else "B C" + " 1" * 3
    if family == "generalized_dice":
        shape = "B 1" + " 1" * 3
    if loss.batch:
        shape = shape.removeprefix("B ")
    claims: dict[str, Any] = {
        "family": family,
        "smooth_nr": smooth_nr,
        "smooth_dr": smooth_dr,
        "squared": squared,
        "overlap": "min" if soft and not squared else "product",
        "class_weight": _numbers(getattr(loss, "class_weight", None)),
        "include_background": loss.include_background,
        "classes": _classes(loss),
        "batch": loss.batch,
        "unreduced": shape,
        "absent": getattr(loss, "absent", "count"),
        # MONAI's smooth_dr is there "to avoid nan": without it, there may be one.
        "empty": "perfect" if ours or smooth_dr else "nan",
        **_call(loss),
        **own,
    }
    if SCORES.get(family) == "jaccard":  # the smoothing stands beside 2 TP
        claims["smooth_nr"] /= 2
        claims["smooth_dr"] /= 2
    if family == "generalized_dice":
        claims["weight_type"] = str(getattr(loss.w_type, "value", loss.w_type))
        claims["weight_scale"] = "relative" if ours else "absolute"
    return _per_channel_if_ignored(Claims(**claims)) if ours else Claims(**claims)


def _classes(loss: Any) -> tuple[int, ...] | None:
    chosen = getattr(loss, "classes", None)
    return None if chosen is None else tuple(chosen)


def _numbers(factors: Any) -> float | tuple[float, ...] | None:
    """A factor, or one per class, of a tensor or a number."""
    if factors is None or isinstance(factors, int | float):
        return factors
    values = factors.detach().cpu().tolist()
    return tuple(values) if isinstance(values, Sequence) else float(values)


def _per_channel(claims: Claims, channels: int) -> Claims:
    """With the factors of the classes that count, where there is one for each of so many channels."""

    def chosen(factors: float | tuple[float, ...] | None) -> float | tuple[float, ...] | None:
        if isinstance(factors, tuple) and len(factors) == channels:
            return tuple(factors[c] for c in claims.counting(channels))
        return factors

    weight, balance = chosen(claims.class_weight), chosen(claims.balance)
    return replace(claims, channels=channels, class_weight=weight, balance=balance)


def _per_channel_if_ignored(claims: Claims) -> Claims:
    """Voxloss takes a factor for the class that is ignored, too."""
    for factors in (claims.class_weight, claims.balance):
        if isinstance(factors, tuple) and claims.ignores_a_class(len(factors)):
            return _per_channel(claims, len(factors))
    return claims


def _cross_entropy(loss: Any) -> Claims:
    return _per_channel_if_ignored(replace(_cross_entropy_part(loss), **_call(loss)))


def _focal(loss: Any) -> Claims:
    return _per_channel_if_ignored(replace(_focal_part(loss), **_call(loss)))


def _cross_entropy_part(loss: Any) -> Claims:
    """Of voxloss's, or of torch's, in which all classes count."""
    return Claims(
        family="cross_entropy",
        class_weight=_numbers(loss.class_weight if _is_ours(loss) else loss.weight),
        label_smoothing=float(loss.label_smoothing),
        hardest=float(loss.k) if _is_ours(loss) and hasattr(loss, "k") else 100.0,
        include_background=getattr(loss, "include_background", True),
        classes=_classes(loss),
    )


def _focal_part(loss: Any) -> Claims:
    return Claims(
        family="focal",
        class_weight=_numbers(loss.class_weight),
        gamma=float(loss.gamma),
        balance=_numbers(loss.alpha),
        # MONAI: "the sum of the output will be divided by the number of elements in the output".
        mean_over="voxels" if _is_ours(loss) else "voxels and classes",
        include_background=loss.include_background,
        classes=_classes(loss),
    )


def _compound(loss: Any) -> Claims | None:
    """λ and parts by the names that the class declares, also of one's own; None if a part is unknown."""
    parts: list[tuple[float, Claims]] = []
    for factor, name in loss.weighted_parts:
        share = float(getattr(loss, factor))
        if not share:  # nothing is declared of what adds nothing
            continue
        part = claims_of(getattr(loss, name))
        if part is None:
            return None
        parts.append((share, part))
    each = [claims for _, part in parts for claims in part.formulas]
    rows = [row for claims in each for row in (claims.class_weight, claims.balance) if isinstance(row, tuple)]
    # There is a factor per channel; a part whose number of channels is known has left out an ignored class.
    channels = max([claims.channels for claims in each if claims.channels] or map(len, rows), default=None)
    if channels is None:
        return Claims(family="compound", parts=tuple(parts), **_call(loss))
    fitted = tuple((f, part if part.channels else _per_channel(part, channels)) for f, part in parts)
    return Claims(family="compound", parts=fitted, **{**_call(loss), "channels": channels})


def _monai_compound(**parts: tuple[str, Callable[[Any], Claims]]) -> Callable[[Any], Claims]:
    """By the name of each λ: the name of its part, and what reads that."""

    def read(loss: Any) -> Claims:
        call = _call(getattr(loss, next(iter(parts.values()))[0]))
        if getattr(loss, "to_onehot_y", False):  # which MONAI does not pass on to its Dice
            call |= {"labels": "map", "soft_labels": False}
        each = [(float(getattr(loss, name)), read(getattr(loss, part))) for name, (part, read) in parts.items()]
        return Claims(family="compound", parts=tuple(each), **call)

    return read


def _dice(loss: Any) -> Claims:
    return _monai_like(loss, "jaccard" if loss.jaccard else "dice")


def _generalized_dice(loss: Any) -> Claims:
    return _monai_like(loss, "generalized_dice")


def _tversky(loss: Any) -> Claims:
    return _monai_like(loss, "tversky", alpha=float(loss.alpha), beta=float(loss.beta))


def _focal_tversky(loss: Any) -> Claims:
    return _monai_like(
        loss,
        "focal_tversky",
        alpha=float(loss.alpha),
        beta=float(loss.beta),
        gamma=float(loss.gamma),
        linear_below=_CHORD,
    )


def _f_beta(loss: Any) -> Claims:
    squared = float(loss.f_beta) ** 2
    return _monai_like(loss, "tversky", alpha=1 / (1 + squared), beta=squared / (1 + squared))


def _skeleton_recall(loss: Any) -> Claims:
    """The recall of a skeleton that is the whole target: TP / (TP + FN)."""
    return _monai_like(loss, "tversky", alpha=0.0, beta=1.0)


def _boundary(loss: Any) -> Claims:
    from voxloss_verify.subject.formula import MeanOfDistance

    claims = Claims(
        family="formula",
        formula=MeanOfDistance(),
        class_weight=_numbers(loss.class_weight),
        include_background=loss.include_background,
        classes=_classes(loss),
        **_call(loss),
    )
    return _per_channel_if_ignored(claims)


def _cellwise(loss: Any) -> Claims | None:
    """Where each sample is one cell: the mean over samples of the loss of each."""
    part = claims_of(loss.loss)
    if part is None:
        return None
    claims = replace(part, **_call(loss), batch=False)
    if not claims.is_mean_of_items:
        raise ValueError(
            "properties cannot be read from a mean over cells of means that are over more voxels in one than in "
            "the other (ignored ones, class weights, one-hot targets of a softmax), or leave out classes. "
            "Declare them."
        )
    return claims


def _log_cosh_dice(loss: Any) -> Claims:
    if loss.jaccard:
        raise ValueError(
            "properties cannot be read from jaccard=True: log cosh is declared of Dice only. Declare them."
        )
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
                "properties cannot be read from apply_nonlin: expected None, nnU-Net's softmax_helper_dim1 or "
                f"torch.sigmoid, received {name or type(loss.apply_nonlin).__name__}."
            )
        activation = _NONLINEARITIES[name]
    clip = getattr(loss, "clip_tp", None)
    if clip is not None:
        raise ValueError(f"properties cannot be read from clip_tp: expected None, received {clip!r}.")
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


def _nnunet_with_cross_entropy(loss: Any) -> Claims:
    dice = _nnunet(loss.dc)
    parts = (float(loss.weight_dice), dice), (float(loss.weight_ce), _cross_entropy_part(loss.ce))
    return Claims(
        family="compound",
        parts=parts,
        activation=dice.activation,
        labels="map",
        ignore_index=loss.ignore_label,
        dtypes=dice.dtypes,
    )


def _penalty(loss: Any) -> Claims:
    return replace(_generalized_dice(loss), penalty=float(loss.k))


def _sensitivity_specificity(loss: Any) -> Claims:
    return _monai_like(loss, "sensitivity_specificity", inside=float(loss.r))


def _logarithmic_dice(loss: Any) -> Claims:
    power = {"gamma": float(loss.gamma), "gamma_as": "gamma", "linear_below": _CHORD}
    return _monai_like(loss, "logarithmic_dice", **power)


def _logarithmic_cross_entropy(loss: Any) -> Claims:
    return Claims(
        family="logarithmic_cross_entropy",
        gamma=float(loss.gamma),
        linear_below=_CHORD,
        frequencies=None if loss.frequencies is None else tuple(loss.frequencies.tolist()),
        class_weight=_numbers(loss.class_weight),
        include_background=loss.include_background,
        classes=_classes(loss),
    )


def _modified_focal(loss: Any) -> Claims:
    return Claims(
        family="focal",
        gamma=float(loss.gamma),
        balance=float(loss.delta),
        focused="background" if loss.asymmetric else "all",
        class_weight=_numbers(loss.class_weight),
        include_background=loss.include_background,
        classes=_classes(loss),
    )


def _enhanced_tversky(loss: Any) -> Claims:
    claims = replace(_focal_tversky(loss), gamma_as="1-gamma")
    return replace(claims, focused="foreground") if loss.asymmetric else claims


def _formula(loss: Any) -> Claims | None:
    """The properties of a loss that is a `per_class` and nothing else, without the formula."""
    from voxloss_verify.subject.formula import OwnFormula

    base = next(kind for kind in type(loss).__mro__ if kind.__name__ == "RegionLoss")
    if any(getattr(type(loss), name) is not getattr(base, name) for name in ("needs", "compute", "terms")):
        return None
    if not set(loss.extra_sums) <= set(EXTRA_SUMS):
        others = sorted(set(loss.extra_sums) - set(EXTRA_SUMS))
        raise ValueError(
            f"properties cannot be read from a formula of {others}: expected some of {', '.join(EXTRA_SUMS)} in "
            "`extra_sums`, whose exact sums are known here."
        )
    shape = ("C" if loss.batch else "B C") + " 1" * 3 * loss.keeps_spatial_axes
    return _monai_like(loss, "formula", formula=OwnFormula(loss), unreduced=shape)


def _kornia(loss: Any, family: Family, **own: Any) -> Claims:
    ignored = loss.ignore_index
    if ignored is not None and 0 <= ignored < 255:
        # Its pixels do not count, but the class of that number enters average="micro" with its false positives.
        raise ValueError(f"properties cannot be read from ignore_index={ignored}, which may be that of a class.")
    micro = own.get("average") == "micro"
    return Claims(
        family=family,
        smooth_dr=float(loss.eps),
        activation="softmax",
        labels="indices",
        spatial_dims=2,
        # A sample whose pixels are all ignored costs 1, which no property expresses for a mean over the classes
        # present.
        ignore_index=ignored if micro else None,
        absent="count" if micro else "skip per item",
        empty="worst",
        **own,
    )


def _kornia_dice(loss: Any) -> Claims:
    if loss.weight is not None:
        raise ValueError(
            "properties cannot be read from weight: expected None, as the mean is divided by weights."
        )
    return _kornia(loss, "dice", average=loss.average)


def _kornia_tversky(loss: Any) -> Claims:
    return _kornia(loss, "tversky", alpha=float(loss.alpha), beta=float(loss.beta))


def _kornia_focal(loss: Any, **own: Any) -> Claims:
    _require(loss, reduction="mean")
    ignored = loss.ignore_index
    if ignored is not None and 0 <= ignored < 255:
        raise ValueError(
            f"properties cannot be read from ignore_index={ignored}, as ignored pixels count in the mean "
            "over pixels."
        )
    claims: dict[str, Any] = {
        "activation": "softmax",
        "labels": "indices",
        "balance": loss.alpha,
        "mean_over": "voxels and classes",
        **own,
    }
    return Claims(family="focal", gamma=float(loss.gamma), class_weight=_numbers(loss.weight), **claims)


def _kornia_binary_focal(loss: Any) -> Claims:
    own: dict[str, Any] = {"activation": "sigmoid", "labels": "one-hot", "soft_labels": True}
    if loss.pos_weight is not None:
        if loss.alpha is not None:
            raise ValueError(
                "properties cannot be read from pos_weight beside alpha: expected one of them to be None."
            )
        own["balance"] = _numbers(loss.pos_weight)
    return _kornia_focal(loss, **own)


def _require(loss: Any, **wanted: Any) -> None:
    """Raise ValueError for an argument with another value than the one of which claims can be read."""
    for name, value in wanted.items():
        given = getattr(loss, name)
        if given != value:
            raise ValueError(f"properties cannot be read from {name}: expected {value!r}, received {given!r}.")


def _smp_call(loss: Any, activation: Literal["softmax", "sigmoid"]) -> dict[str, Any]:
    """What concerns the call of a loss of Segmentation Models PyTorch (SMP), by its mode."""
    ignored = loss.ignore_index
    if ignored is not None and (loss.mode != "multiclass" or 0 <= ignored < 255):
        # Other modes leave out single channels; and an ignored class counts in the mean over classes.
        raise ValueError(
            f"properties cannot be read from ignore_index={ignored} with mode={loss.mode!r}: expected None or, "
            "with mode='multiclass', a number that is no class."
        )
    channels = 1 if loss.mode == "binary" else None
    if loss.class_weights is not None:
        channels = len(loss.class_weights)
    if loss.mode == "multiclass":
        return {"activation": activation, "labels": "indices", "ignore_index": ignored, "channels": channels}
    return {"activation": "sigmoid", "labels": "one-hot", "channels": channels}


def _smp_weights(loss: Any, classes: Sequence[int] | None) -> tuple[float, ...] | None:
    """As factors in a mean over classes, as SMP divides by the sum of the weights."""
    if loss.class_weights is None:
        return None
    every = loss.class_weights.detach().cpu().tolist()
    weights = every if classes is None else [every[c] for c in classes]
    return tuple(w * len(weights) / sum(weights) for w in weights)


def _smp(loss: Any, family: Family, **own: Any) -> Claims:
    _require(loss, log_loss=False)
    call = _smp_call(loss, "softmax")
    if not loss.from_logits:
        call["activation"] = "none"
    classes = None if loss.classes is None else tuple(loss.classes.tolist())
    # Dice is Tversky with α = β = ½, so that s stands beside TP.
    smooth = float(loss.smooth) * (2 if family == "dice" else 1)
    return Claims(
        family=family,
        smooth_nr=smooth,
        smooth_dr=smooth,
        overlap="min",
        class_weight=_smp_weights(loss, classes),
        classes=classes,
        batch=True,
        soft_labels=call["labels"] == "one-hot",
        absent="perfect",
        **call,
        **own,
    )


def _smp_tversky(loss: Any) -> Claims:
    _require(loss, gamma=1.0)  # the power is one of the mean over classes
    return _smp(loss, "tversky", alpha=float(loss.alpha), beta=float(loss.beta))


def _smp_focal(loss: Any) -> Claims:
    """Independent binary channels, also with mode multiclass."""
    _require(loss, from_logits=True, reduction="mean")
    options = loss.focal_loss_fn.keywords
    for name, wanted in (("normalized", False), ("reduced_threshold", None)):
        if options[name] != wanted:
            raise ValueError(
                f"properties cannot be read from {name}: expected {wanted}, received {options[name]!r}."
            )
    return Claims(
        family="focal",
        gamma=float(options["gamma"]),
        balance=options["alpha"],
        class_weight=_smp_weights(loss, None),
        mean_over="voxels and classes",
        **_smp_call(loss, "sigmoid"),
    )


_DICE_CE = _monai_compound(lambda_dice=("dice", _dice), lambda_ce=("cross_entropy", _cross_entropy_part))
_DICE_FOCAL = _monai_compound(lambda_dice=("dice", _dice), lambda_focal=("focal", _focal_part))
_GENERALIZED_DICE_FOCAL = _monai_compound(
    lambda_gdl=("generalized_dice", _generalized_dice), lambda_focal=("focal", _focal_part)
)


def _monai_metric(metric: Any, family: Family) -> Claims:
    """Of the call, which returns the scores of each sample and class."""
    if getattr(metric, "per_component", False):
        raise ValueError("properties cannot be read from a metric of connected components.")
    return Claims(
        family=family,
        reduction="none",
        include_background=metric.include_background,
        absent="skip" if getattr(metric, "ignore_empty", False) else "count",
        ignore_index=getattr(metric, "ignore_index", None),
        **({} if getattr(metric, "num_classes", None) is None else {"channels": metric.num_classes, **_MAPS}),
    )


_MAPS: dict[str, Any] = {"labels": "map", "activation": "softmax"}


def _overlap_metric(metric: Any) -> Claims:
    """Ours, of label maps if it has a number of classes, else of exclusive masks."""
    read = _monai_metric(metric, "dice_metric" if metric.metric == "dice" else "iou_metric")
    empty: Any = {0.0: "worst", 1.0: "perfect"}.get(metric.empty, "nan")
    return replace(read, activation="none" if metric.sigmoid else "softmax", empty=empty)


def _torchmetrics(metric: Any, family: Family) -> Claims:
    """Of label maps without a channel axis, or of masks; a class in neither image is left out."""
    if metric.input_format == "mixed":
        raise ValueError("properties cannot be read from a metric with input_format='mixed'.")
    if getattr(metric, "average", "macro") in ("micro", "weighted"):
        raise ValueError(f"properties cannot be read from a metric with average={metric.average!r}.")
    if family == "iou_metric" and metric.per_class:
        raise ValueError(
            "properties cannot be read from per_class=True: a class in neither image has the score -1."
        )
    by_class = getattr(metric, "average", "macro") in ("none", None)
    return Claims(
        family=family,
        empty="nan",
        include_background=metric.include_background,
        batch=getattr(metric, "aggregation_level", "samplewise") == "global",
        reduction="none" if by_class else "mean",
        unreduced="C",
        mean_without_nan="by sample" if family == "dice_metric" else "over all",
        channels=metric.num_classes,
        labels="indices" if metric.input_format == "index" else "one-hot",
        activation="softmax" if metric.input_format == "index" else "none",
    )


def _monai_generalized_dice_metric(metric: Any) -> Claims:
    if not metric.sum_over_classes:
        raise ValueError(
            f"properties cannot be read from reduction: expected 'mean' or 'sum', received {metric.reduction!r}."
        )
    read = _monai_metric(metric, "generalized_dice_metric")
    weights: Any = metric.weight_type.value
    return replace(read, weight_type=weights, unreduced="B 1")


def _torchmetrics_generalized_dice(metric: Any) -> Claims:
    if metric.per_class:
        raise ValueError(
            "properties cannot be read from a metric with per_class=True, which weights change nothing of."
        )
    weights: Any = {"linear": "uniform"}.get(metric.weight_type, metric.weight_type)
    # The weight of a class without reference is one of other samples of the batch: of a single sample 0.
    absent: Any = "count" if weights == "uniform" else "skip"
    read = _torchmetrics(metric, "generalized_dice_metric")
    return replace(read, weight_type=weights, absent=absent, empty="worst")


_SMP = "segmentation_models_pytorch"
READERS: dict[tuple[str, str], Callable[[Any], Claims | None]] = {
    **{(library, "DiceLoss"): _dice for library in ("voxloss", "monai")},
    **{(library, "TverskyLoss"): _tversky for library in ("voxloss", "monai")},
    **{(library, "GeneralizedDiceLoss"): _generalized_dice for library in ("voxloss", "monai")},
    **{(library, "FocalLoss"): _focal for library in ("voxloss", "monai")},
    ("monai", "DiceCELoss"): _DICE_CE,
    ("monai", "DiceFocalLoss"): _DICE_FOCAL,
    ("monai", "GeneralizedDiceFocalLoss"): _GENERALIZED_DICE_FOCAL,
    ("voxloss", "JaccardLoss"): lambda loss: _monai_like(loss, "jaccard"),
    ("voxloss", "FocalTverskyLoss"): _focal_tversky,
    ("voxloss", "LogCoshDiceLoss"): _log_cosh_dice,
    ("voxloss", "AsymmetricSimilarityLoss"): _f_beta,
    ("voxloss", "CrossEntropyLoss"): _cross_entropy,
    ("voxloss", "TopKLoss"): _cross_entropy,
    ("voxloss", "DiceTopKLoss"): _compound,
    ("voxloss", "SkeletonRecallLoss"): _skeleton_recall,
    ("voxloss", "BoundaryLoss"): _boundary,
    ("voxloss", "CellwiseLoss"): _cellwise,
    ("voxloss", "PenaltyGeneralizedDiceLoss"): _penalty,
    **{(library, "MCCLoss"): lambda loss: _monai_like(loss, "mcc") for library in ("voxloss", "monai")},
    ("voxloss", "SensitivitySpecificityLoss"): _sensitivity_specificity,
    ("voxloss", "LogarithmicDiceLoss"): _logarithmic_dice,
    ("voxloss", "LogarithmicCrossEntropyLoss"): _logarithmic_cross_entropy,
    ("voxloss", "ModifiedFocalLoss"): _modified_focal,
    ("voxloss", "EnhancedTverskyLoss"): _enhanced_tversky,
    ("voxloss", "RegionLoss"): _formula,
    ("voxloss", "CompoundLoss"): _compound,
    ("nnunetv2", "SoftDiceLoss"): _nnunet,
    ("nnunetv2", "MemoryEfficientSoftDiceLoss"): _nnunet,
    ("nnunetv2", "DC_and_CE_loss"): _nnunet_with_cross_entropy,
    ("kornia", "DiceLoss"): _kornia_dice,
    ("kornia", "TverskyLoss"): _kornia_tversky,
    ("kornia", "FocalLoss"): _kornia_focal,
    ("kornia", "BinaryFocalLossWithLogits"): _kornia_binary_focal,
    (_SMP, "DiceLoss"): lambda loss: _smp(loss, "dice"),
    (_SMP, "JaccardLoss"): lambda loss: _smp(loss, "jaccard"),
    (_SMP, "TverskyLoss"): _smp_tversky,
    (_SMP, "FocalLoss"): _smp_focal,
    ("voxloss", "OverlapMetric"): _overlap_metric,
    ("monai", "DiceMetric"): lambda metric: _monai_metric(metric, "dice_metric"),
    ("torchmetrics", "DiceScore"): lambda metric: _torchmetrics(metric, "dice_metric"),
    ("torchmetrics", "GeneralizedDiceScore"): _torchmetrics_generalized_dice,
    ("monai", "GeneralizedDiceScore"): _monai_generalized_dice_metric,
    ("torchmetrics", "MeanIoU"): lambda metric: _torchmetrics(metric, "iou_metric"),
    ("monai", "MeanIoU"): lambda metric: _monai_metric(metric, "iou_metric"),
}
