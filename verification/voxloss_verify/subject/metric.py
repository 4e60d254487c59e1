"""A metric under examination: prediction and reference as label maps or masks, and the scores that come back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voxloss_verify.oracle.claims import METRICS, Claims
from voxloss_verify.oracle.hard import masks
from voxloss_verify.oracle.volumes import Volume
from voxloss_verify.subject.subject import Outcome, Raised, Subject

Scores = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Metric(Subject):
    """A metric, called with prediction and reference in the same form: labels, or one channel per class."""

    def tensors(self, volume: Volume) -> tuple[Tensor, Tensor]:
        """Prediction and reference as the metric takes them."""
        p, _ = masks(Claims(family="dice"), volume)
        target = torch.from_numpy(np.array(volume.target, order="C"))
        if self.claims.labels == "one-hot":
            return torch.from_numpy(p.astype(np.int64)).to(self.device), target.to(torch.int64).to(self.device)
        prediction = torch.from_numpy(p.argmax(1).astype(np.int64))
        if self.claims.labels == "map":
            prediction = prediction[:, None]
        else:
            target = target[:, 0]
        return prediction.to(self.device), target.to(torch.int64).to(self.device)

    def value(self, volume: Volume) -> Outcome:
        """The scores of a volume."""
        return self.scores(*self.tensors(volume))

    def scores(self, prediction: Tensor, reference: Tensor, *more: tuple[Tensor, Tensor]) -> Outcome:
        """The scores of one batch, or of several one after another; what the metric raises comes as `Raised`."""
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                found = called(self.loss, self.claims, [(prediction, reference), *more])
        except (Exception, SystemExit) as error:
            raise Raised from error
        values = np.asarray(found.detach().cpu().numpy() if isinstance(found, Tensor) else found)
        if values.dtype.kind not in "fiu" or not values.size:
            raise Raised from TypeError(f"returned {type(found).__name__}, expected numbers")
        dtype = str(values.dtype) if values.dtype.kind == "f" else "float64"
        return Outcome(values.astype(np.float64), dtype)


def as_metric(subject: Subject) -> Subject:
    """The subject as a metric, if its claims are those of one."""
    if not is_metric(subject.claims):
        return subject
    return Metric(**{field.name: getattr(subject, field.name) for field in fields(subject)})


def called(metric: Any, claims: Claims, batches: list[tuple[Tensor, Tensor]]) -> Any:
    """Call a metric in the way of its library.

    * update, compute, reset: torchmetrics;
    * a call per batch, aggregate, reset: MONAI and voxloss, whose calls return the scores without reduction;
    * a function of (prediction, reference), or of another library's form as `adapted` makes one of it; of scores
      with names, the one that is declared.
    """
    if all(hasattr(metric, name) for name in ("update", "compute", "reset")):
        metric.reset()
        for prediction, reference in batches:
            metric.update(prediction, reference)
        return metric.compute()
    if all(hasattr(metric, name) for name in ("aggregate", "reset")):
        metric.reset()
        scores = [metric(prediction, reference) for prediction, reference in batches]
        if claims.reduction == "none" and not claims.batch:
            return torch.cat([torch.as_tensor(each) for each in scores])
        found = metric.aggregate()
        return found[0] if isinstance(found, tuple) else found
    # A single batch as it is: a function may write to it, which a law looks for.
    prediction, reference = (
        images[0] if len(images) == 1 else torch.cat(images) for images in zip(*batches, strict=True)
    )
    found = metric(prediction, reference)
    if not isinstance(found, dict):
        return found
    named = found.get({"dice_metric": "Dice", "iou_metric": "IoU"}.get(claims.family))
    return [float(each) for each in found.values()] if named is None else named


def is_metric(claims: Claims) -> bool:
    """Whether these are the claims of a metric, and not of a loss."""
    return claims.family in METRICS
