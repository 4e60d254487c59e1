"""Which losses and metrics are examined, of which libraries, each in several configurations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from voxloss_verify.configurations import ALL_VOXELS, COMPOUND, CONFIGURATIONS, FOCAL, REGION, SHARED, shared


@dataclass(frozen=True)
class ExaminedLoss:
    """A loss or a metric, with arguments.

    Attributes:
        library: whose it is, by its name.
        target: "module:Class".
        label: the arguments in a few words, the same for all libraries.
        kwargs: the arguments; functions among them can be imported from their `__module__`.
    """

    library: str
    target: str
    label: str
    kwargs: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The class."""
        return self.target.partition(":")[2]

    @property
    def call(self) -> str:
        """Python that makes it, after `imports`."""
        return f"{self.name}({', '.join(f'{key}={_spelled(value)}' for key, value in self.kwargs.items())})"

    @property
    def imports(self) -> str:
        """Python that imports what `call` names."""
        names = [(self.target.partition(":")[0], self.name)]
        names += [(value.__module__, value.__name__) for value in self.kwargs.values() if callable(value)]
        return "\n".join(f"from {module} import {name}" for module, name in names)

    @property
    def source(self) -> str:
        """Python that makes `loss`."""
        return f"{self.imports}\nloss = {self.call}"


# Of classes the arguments, by label.
_Configurations = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Library:
    """A library, the package that it is installed as, and what is examined of it."""

    name: str
    package: str
    losses: Callable[[], list[ExaminedLoss]] = list
    metrics: Callable[[], list[ExaminedLoss]] = list

    @property
    def version(self) -> str | None:
        """The installed version; None if it cannot be imported."""
        try:
            module = import_module(self.package)
        except ImportError:
            return None
        return str(getattr(module, "__version__", None) or metadata.version(self.package))


def _spelled(value: Any) -> str:
    return str(value.__name__) if callable(value) else repr(value)


def _configured(library: str, target: str, *labels: str, **own: Any) -> list[ExaminedLoss]:
    """A class in the shared configurations of these labels, none for all, if its constructor takes them."""
    module, _, name = target.partition(":")
    make = getattr(import_module(module), name)
    each = shared(*labels, **own)
    return [
        ExaminedLoss(library, target, label, kwargs) for label, kwargs in each.items() if _takes(make, kwargs)
    ]


def _takes(make: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(**kwargs)
    except TypeError:  # an unexpected keyword argument
        return False
    return True


def _voxloss() -> list[ExaminedLoss]:
    """Its losses in the configurations that libraries share."""
    return [
        ExaminedLoss("voxloss", f"voxloss:{name}", label, kwargs)
        for name, each in CONFIGURATIONS.items()
        for label, kwargs in each.items()
        if label in SHARED
    ]


def _monai() -> list[ExaminedLoss]:
    return [
        *_configured("MONAI", "monai.losses:DiceLoss"),
        *_configured("MONAI", "monai.losses:TverskyLoss", *REGION, alpha=0.3, beta=0.7),
        *_configured("MONAI", "monai.losses:GeneralizedDiceLoss", *REGION),
        *_configured("MONAI", "monai.losses:MCCLoss", *ALL_VOXELS),
        *(ExaminedLoss("MONAI", "monai.losses:FocalLoss", label, kwargs) for label, kwargs in FOCAL.items()),
        *_configured("MONAI", "monai.losses:DiceCELoss", *COMPOUND),
        *_configured("MONAI", "monai.losses:DiceFocalLoss", *COMPOUND),
        *_configured("MONAI", "monai.losses:GeneralizedDiceFocalLoss", *COMPOUND),
    ]


def _nnunet() -> list[ExaminedLoss]:
    softmax = import_module("nnunetv2.utilities.helpers").softmax_helper_dim1
    # Outside of a process group the batch form runs with ddp=False only.
    configurations: dict[str, dict[str, Any]] = {
        "softmax": {"apply_nonlin": softmax},
        "softmax, s = 0": {"apply_nonlin": softmax, "smooth": 0.0},
        "no background": {"apply_nonlin": softmax, "do_bg": False},
        "batch": {"apply_nonlin": softmax, "batch_dice": True, "ddp": False},
    }
    found = [
        ExaminedLoss("nnU-Net", f"nnunetv2.training.loss.dice:{name}", label, kwargs)
        for name in ("SoftDiceLoss", "MemoryEfficientSoftDiceLoss")
        for label, kwargs in configurations.items()
    ]
    # As its trainer makes them.
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    target = "nnunetv2.training.loss.compound_losses:DC_and_CE_loss"
    for label, own in (("batch, no background", {}), ("ignore 255", {"ignore_label": 255})):
        # It writes to `ce_kwargs`.
        found.append(ExaminedLoss("nnU-Net", target, label, {"soft_dice_kwargs": dice, "ce_kwargs": {}, **own}))
    return found


def _kornia() -> list[ExaminedLoss]:
    return [
        ExaminedLoss("kornia", "kornia.losses:DiceLoss", "micro", {}),
        ExaminedLoss("kornia", "kornia.losses:DiceLoss", "micro, ignore 255", {"ignore_index": 255}),
        ExaminedLoss("kornia", "kornia.losses:DiceLoss", "macro", {"average": "macro"}),
        ExaminedLoss("kornia", "kornia.losses:TverskyLoss", "macro", {"alpha": 0.3, "beta": 0.7}),
        ExaminedLoss("kornia", "kornia.losses:FocalLoss", "softmax", {"alpha": 0.25, "reduction": "mean"}),
        ExaminedLoss(
            "kornia",
            "kornia.losses:BinaryFocalLossWithLogits",
            "sigmoid",
            {"alpha": 0.25, "reduction": "mean"},
        ),
    ]


# The same of Dice and Jaccard.
_SMP_REGION: dict[str, dict[str, Any]] = {
    "softmax": {"mode": "multiclass"},
    "softmax, s = 1": {"mode": "multiclass", "smooth": 1.0},
    "softmax, ignore 255": {"mode": "multiclass", "ignore_index": 255},
    "sigmoid": {"mode": "multilabel"},
    "one channel": {"mode": "binary"},
}


def _smp() -> list[ExaminedLoss]:
    tversky = {label: {**kwargs, "alpha": 0.3, "beta": 0.7} for label, kwargs in _SMP_REGION.items()}
    focal: dict[str, dict[str, Any]] = {
        "sigmoid": {"mode": "multilabel"},
        "sigmoid, of labels": {"mode": "multiclass"},
        "sigmoid, of labels, ignore 255": {"mode": "multiclass", "ignore_index": 255},
        "one channel": {"mode": "binary", "alpha": 0.25},
    }
    each: _Configurations = {
        "DiceLoss": _SMP_REGION,
        "JaccardLoss": _SMP_REGION,
        "TverskyLoss": tversky,
        "FocalLoss": focal,
    }
    return _entries("SMP", "segmentation_models_pytorch.losses", each)


def _entries(library: str, module: str, each: _Configurations) -> list[ExaminedLoss]:
    """Of each class the configurations, by label."""
    return [
        ExaminedLoss(library, f"{module}:{name}", label, kwargs)
        for name, configurations in each.items()
        for label, kwargs in configurations.items()
    ]


def _voxloss_metrics() -> list[ExaminedLoss]:
    configurations: dict[str, dict[str, Any]] = {
        "Dice": {},
        "Dice of label maps": {"num_classes": 3},
        "Dice, no background": {"include_background": False},
        "Dice, empty ones count": {"ignore_empty": False},
        "Dice, empty ones cost": {"ignore_empty": False, "empty": 0.0},
        "IoU": {"metric": "iou"},
        "IoU of label maps, ignore 255": {"metric": "iou", "num_classes": 3, "ignore_index": 255},
    }
    return _entries("voxloss", "voxloss", {"OverlapMetric": configurations})


def _monai_metrics() -> list[ExaminedLoss]:
    configurations: dict[str, dict[str, Any]] = {
        "default": {},
        "no background": {"include_background": False},
        "empty ones count": {"ignore_empty": False},
    }
    generalized = {"default": {}, "weight 1 / G": {"weight_type": "simple"}}
    each: _Configurations = {
        "DiceMetric": configurations,
        "MeanIoU": configurations,
        "GeneralizedDiceScore": generalized,
    }
    return _entries("MONAI", "monai.metrics", each)


def _torchmetrics() -> list[ExaminedLoss]:
    labels: dict[str, Any] = {"num_classes": 3, "input_format": "index"}
    dice = {
        "masks": {"num_classes": 3},
        "labels": labels,
        "labels, per class": {**labels, "average": "none"},
        "labels, of the data set": {**labels, "aggregation_level": "global"},
    }
    iou: dict[str, dict[str, Any]] = {"masks": {"num_classes": 3}, "labels": labels}
    generalized = {"labels": labels, "labels, no weights": {**labels, "weight_type": "linear"}}
    each: _Configurations = {"DiceScore": dice, "MeanIoU": iou, "GeneralizedDiceScore": generalized}
    return _entries("torchmetrics", "torchmetrics.segmentation", each)


LIBRARIES = (
    Library("voxloss", "voxloss", _voxloss, _voxloss_metrics),
    Library("MONAI", "monai", _monai, _monai_metrics),
    Library("nnU-Net", "nnunetv2", _nnunet),
    Library("kornia", "kornia", _kornia),
    Library("SMP", "segmentation_models_pytorch", _smp),
    Library("torchmetrics", "torchmetrics", metrics=_torchmetrics),
)


def examined_losses() -> list[ExaminedLoss]:
    """The losses and metrics of all libraries that are installed, by library."""
    installed = [library for library in LIBRARIES if library.version is not None]
    return [examined for library in installed for examined in (*library.losses(), *library.metrics())]
