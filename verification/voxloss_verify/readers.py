"""What the losses of voxloss, MONAI, nnU-Net and kornia claim, read off an instance. None of them is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from voxloss_verify.claims import Claims, Family


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
