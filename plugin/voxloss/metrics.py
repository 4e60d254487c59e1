"""Hard Dice and IoU from counts: argmax or threshold, and one count per class, without one-hot volumes.

Of a class, TP voxels are in prediction and reference, P in the prediction and G in the reference:

    Dice = 2 TP / (P + G),   IoU = TP / (P + G − TP) = Dice / (2 − Dice)

The counts are whole numbers and additive over samples and ranks, so that scores of a whole data set are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from voxloss.backends.eager import boxes
from voxloss.backends.voxels import whole_labels
from voxloss.channels import ignored_voxels, of_classes
from voxloss.distributed import Group, require_group
from voxloss.inputs import ShapeError, plain, raise_if
from voxloss.maps import Target
from voxloss.regions import memberships

Score = Literal["dice", "iou"]
Reduction = Literal[
    "none", "mean", "sum", "mean_batch", "sum_batch", "mean_channel", "sum_channel", "dataset", "dataset_mean"
]
# Voxels at a time on a CPU: their best class so far stays in the cache.
_BLOCK = 1 << 16
_NAN = "NaN is no score: find where the network returns it, for example with torch.autograd.set_detect_anomaly."


class OverlapCounts(NamedTuple):
    """Voxels `[B, C]`, int64.

    Attributes:
        both: TP, in prediction and reference.
        predicted: P = TP + FP.
        reference: G = TP + FN.
    """

    both: Tensor
    predicted: Tensor
    reference: Tensor

    def dice(self, empty: float = 1.0) -> Tensor:
        """2 TP / (P + G), float64; `empty` where P + G = 0."""
        return _ratio(2 * self.both, self.predicted + self.reference, empty)

    def iou(self, empty: float = 1.0) -> Tensor:
        """TP / (P + G − TP), float64; `empty` where P + G = 0."""
        return _ratio(self.both, self.predicted + self.reference - self.both, empty)


def _ratio(numerator: Tensor, denominator: Tensor, empty: float) -> Tensor:
    ratio = numerator.double() / denominator.clamp(min=1)
    return torch.where(denominator == 0, empty, ratio)


def overlap_counts(
    y_pred: Tensor,
    y: Tensor,
    *,
    num_classes: int | None = None,
    sigmoid: bool = False,
    threshold: float = 0.5,
    ignore_index: int | None = None,
    regions: Sequence[Sequence[int]] | None = None,
) -> OverlapCounts:
    """Count the voxels of each class in prediction, reference and both; takes C² numbers of memory per sample.

    Args:
        y_pred: scores `[B, C, ...]`, of which the largest is the prediction (the first of equal ones): logits,
            probabilities or one-hot; or a label map `[B, 1, ...]`.
        y: label map `[B, 1, ...]` or one-hot `[B, C, ...]`.
        num_classes: C, needed if both are label maps.
        sigmoid: channels are independent: each is predicted where σ(y_pred) > `threshold`, and `y` has as many.
        threshold: of a probability.
        ignore_index: voxels with this label in `y` are left out; with one channel per class in `y`, those whose
            channel `ignore_index` is 1, or, with `sigmoid` and no such channel, those with this value in all.
        regions: lists of labels, each counted as one class C, of a label map `y`; `y_pred` is a label map, too,
            or with `sigmoid` has a channel for each region. Labels up to the largest are known.

    Raises:
        ShapeError: if the shapes do not fit together.
        ValueError: for a label that is no class, a reference that is not one-hot, or NaN in `y_pred`.
    """
    _require_pair(y_pred, y)
    y_pred, y = plain(y_pred).detach(), plain(y)
    if regions is not None:
        return _of_regions(y_pred, y, regions, sigmoid, threshold, ignore_index)
    channels = _channels(y_pred, y, num_classes, sigmoid)
    if sigmoid:
        return _independent(y_pred, y, threshold, ignore_index)
    found = _confusion(y_pred, y, channels, ignore_index)
    return OverlapCounts(found.diagonal(0, 1, 2).clone(), found.sum(1), found.sum(2))


def _of_regions(
    y_pred: Tensor,
    y: Tensor,
    regions: Sequence[Sequence[int]],
    sigmoid: bool,
    threshold: float,
    ignore_index: int | None,
) -> OverlapCounts:
    members = memberships(regions, ignore_index=ignore_index)
    channels = len(regions) if sigmoid else 1
    if y.shape[1] != 1 or y_pred.shape[1] != channels:
        remedy = "" if sigmoid else " For a prediction with a channel for each region pass sigmoid=True."
        raise ShapeError(
            f"regions: expected y_pred [B, {channels}, spatial...] and a label map y [B, 1, spatial...], "
            f"received {list(y_pred.shape)} and {list(y.shape)}.{remedy}"
        )
    inside = [
        torch.tensor([bits >> r & 1 for bits in members], dtype=torch.bool, device=y.device)
        for r in range(len(regions))
    ]
    if not sigmoid:
        found = _confusion(y_pred, y, len(members), ignore_index)
        # By indices, as a GPU has no product of matrices of whole numbers.
        both = [found[:, row][:, :, row].sum((1, 2)) for row in inside]
        predicted, reference = ([of[:, row].sum(1) for row in inside] for of in (found.sum(1), found.sum(2)))
        return OverlapCounts(*(torch.stack(columns, 1) for columns in (both, predicted, reference)))
    labels = _labels(y, len(members), "y", ignore_index)
    known = labels if ignore_index is None else labels.masked_fill(labels == ignore_index, 0)
    ignored = None if ignore_index is None else labels == ignore_index
    counts = []
    for r, row in enumerate(inside):
        p = _is_predicted(y_pred[:, r : r + 1], threshold)
        g = row[known]
        counts.append(_counted(p, g, ignored))
    return OverlapCounts(*(torch.cat(columns, 1) for columns in zip(*counts, strict=True)))


def _confusion(y_pred: Tensor, y: Tensor, channels: int, ignore_index: int | None) -> Tensor:
    """How many voxels have a label in the reference and a label in the prediction, `[B, C, C]`."""
    predicted = _labels(y_pred, channels, "y_pred")
    reference = _labels(y, channels, "y", ignore_index)
    confusion = []
    for p, g in zip(predicted.flatten(1), reference.flatten(1), strict=True):
        pairs = g * channels + p
        if ignore_index is not None:
            pairs = pairs[g != ignore_index]
        confusion.append(torch.bincount(pairs, minlength=channels**2).view(channels, channels))
    return torch.stack(confusion)


def _require_pair(y_pred: Tensor, y: Tensor) -> None:
    for name, tensor in (("y_pred", y_pred), ("y", y)):
        if not isinstance(tensor, Tensor):
            remedy = (
                "Pass target.labels."
                if isinstance(tensor, Target)
                else "Stack the samples of a decollated batch with torch.stack."
            )
            raise TypeError(
                f"{name}: expected a torch.Tensor [B, channels, spatial...], received {type(tensor).__name__}. "
                f"{remedy}"
            )
    if y_pred.ndim < 3 or y.ndim != y_pred.ndim:
        remedy = " Add the channel axis with y.unsqueeze(1)." if y.ndim == y_pred.ndim - 1 else ""
        raise ShapeError(
            "expected y_pred and y as [B, channels, spatial...] with at least one spatial axis, "
            f"received {list(y_pred.shape)} and {list(y.shape)}.{remedy}"
        )
    if y_pred.shape[0] != y.shape[0] or y_pred.shape[2:] != y.shape[2:]:
        raise ShapeError(
            f"y: expected the samples and spatial axes of y_pred, received {list(y.shape)} for "
            f"{list(y_pred.shape)}. Crop or resample one of them."
        )


def _channels(y_pred: Tensor, y: Tensor, num_classes: int | None, sigmoid: bool) -> int:
    """C. Raises ShapeError if channels do not agree, ValueError if they are not known."""
    found = {tensor.shape[1] for tensor in (y_pred, y)} | ({num_classes} if num_classes else set())
    if not sigmoid:
        found -= {1}
    if len(found) > 1:
        raise ShapeError(
            f"y_pred, y: expected one number of classes, received {y_pred.shape[1]} channels of y_pred, "
            f"{y.shape[1]} of y and num_classes={num_classes}. A tensor with one channel is a label map; any "
            "other has a channel per class."
        )
    if not found:
        raise ValueError(
            "num_classes: expected the number of classes, as y_pred and y are label maps, received None. Pass "
            "num_classes=4, for example; for one channel of logits pass sigmoid=True."
        )
    return found.pop()


def _independent(y_pred: Tensor, y: Tensor, threshold: float, ignore_index: int | None) -> OverlapCounts:
    ignored = ignored_voxels(y, y.shape[1], ignore_index)
    if ignored is not None:
        y = y.masked_fill(ignored, 0)
    _require_one_hot(y)
    return _counted(_is_predicted(y_pred, threshold), y != 0, ignored)


def _is_predicted(scores: Tensor, threshold: float) -> Tensor:
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: expected a probability between 0 and 1, received {threshold!r}.")
    raise_if(torch.isnan(scores), scores, "y_pred: expected numbers", _NAN)
    return scores > torch.logit(torch.tensor(threshold, dtype=torch.float64)).item()


def _counted(p: Tensor, g: Tensor, ignored: Tensor | None) -> OverlapCounts:
    if ignored is not None:
        p, g = p & ~ignored, g & ~ignored
    return OverlapCounts(*(mask.flatten(2).sum(-1) for mask in (p & g, p, g)))


def _require_one_hot(y: Tensor) -> None:
    if y.dtype != torch.bool and not bool((hard := (y == 0) | (y == 1)).all()):
        remedy = (
            "Soft labels have no hard Dice: pass a label map, as y.argmax(1, keepdim=True), or y > 0.5."
            if bool(((y >= 0) & (y <= 1)).all())
            else "Call metric(y_pred, y), the prediction first."
        )
        raise_if(~hard, y, "y: expected 0 and 1 in a target with one channel per class", remedy)


def _labels(tensor: Tensor, channels: int, name: str, ignore_index: int | None = None) -> Tensor:
    """Labels `[B, 1, ...]`, int64: those given, or the class of the largest score."""
    if tensor.shape[1] == 1:
        labels = whole_labels(tensor)
        valid = (labels >= 0) & (labels < channels)
        if ignore_index is not None:
            valid |= labels == ignore_index
        if not bool(valid.all()):
            ignored = "" if ignore_index is None or name != "y" else f", or {ignore_index} (ignored)"
            expected = f"{name}: expected whole labels 0 to {channels - 1}{ignored}"
            raise_if(~valid, tensor, expected, _remedy(tensor, name))
        return labels
    if name == "y":
        _require_one_hot(tensor)
    elif tensor.is_floating_point() and bool(torch.isnan(tensor.sum())):  # which is cheaper than a mask
        raise_if(torch.isnan(tensor), tensor, f"{name}: expected numbers", _NAN)
    # Whole numbers of 64 bits may be more than a float holds; a reference has 0 and 1 only.
    if tensor.device.type != "cpu" or (name != "y" and tensor.dtype == torch.int64):
        return tensor.to(torch.uint8 if tensor.dtype == torch.bool else tensor.dtype).argmax(1, keepdim=True)
    return _argmax(tensor)


def _remedy(labels: Tensor, name: str) -> str:
    if labels.is_floating_point() and bool((labels != labels.round()).any()):
        if name == "y_pred":
            return (
                "One channel of logits or probabilities needs sigmoid=True; several have one channel per class."
            )
        return "Resample labels with mode='nearest'."
    if name == "y_pred":
        return (
            "Call metric(y_pred, y), the prediction first; num_classes is the number of classes, with background."
        )
    unsigned = "; -1 stored as uint8 is 255" if labels.dtype == torch.uint8 else ""
    return f"Pass ignore_index for the label of voxels to leave out{unsigned}; all other labels are classes."


def _argmax(scores: Tensor) -> Tensor:
    """The first class of the largest score; vectorised along the voxels, unlike torch's argmax over axis 1."""
    labels = torch.zeros((len(scores), 1, *scores.shape[2:]), dtype=torch.int64)
    for block in _blocks(scores):
        here = scores[block]
        here = here if here.is_floating_point() else here.double()
        best, label = here[:, :1].clone(), torch.zeros_like(here[:, :1], dtype=torch.float32)
        for c in range(1, here.shape[1]):
            score = here[:, c : c + 1]
            is_better = torch.gt(score, best, out=torch.empty_like(label))
            label.lerp_(torch.full_like(label, c), is_better)  # one or the other, without rounding
            torch.maximum(best, score, out=best)
        labels[block] = label.long()
    return labels


def _blocks(scores: Tensor) -> Iterator[tuple[slice, ...]]:
    items, _, *spatial = scores.shape
    for box in boxes(spatial, max(1, _BLOCK // items)):
        yield (slice(None), slice(None), *box)


class OverlapMetric:
    """Hard Dice or IoU over many batches, with the call, `aggregate` and `reset` of MONAI's `DiceMetric`.

        metric = OverlapMetric(include_background=False, reduction="mean_batch")
        for image, label in loader:
            metric(network(image), label)      # logits and label map: no argmax, no one-hot
        dice = metric.aggregate()              # [C − 1]
        metric.reset()

    Args:
        include_background: whether channel 0 counts; of a single channel it does.
        reduction: of the scores `[samples, C]`, NaN left out, 0 where all are NaN, as in MONAI: "none", "mean",
            "sum", "mean_batch" (over samples), "sum_batch", "mean_channel" (over classes), "sum_channel"; or of
            the counts: "dataset", the score `[C]` of the sum over all samples, and "dataset_mean", its mean.
        get_not_nans: `aggregate` also returns how many scores were no NaN.
        ignore_empty: NaN where the reference is empty, as in MONAI; else 0 there, and `empty` if the prediction
            is empty as well.
        num_classes: C, needed if prediction and reference are label maps.
        metric: "dice" or "iou".
        empty: the score where prediction and reference are empty and that is not ignored: 1, 0 or NaN.
        sigmoid, threshold, ignore_index, regions: as in `overlap_counts`. There is no `softmax`: the largest
            logit is the largest probability.
        group: `aggregate` is over the samples of all ranks of a process group; "world" for all, None for this
            rank alone.

    Source: Dice 1945, "Measures of the Amount of Ecologic Association Between Species"; Jaccard 1901.
    """

    def __init__(
        self,
        include_background: bool = True,
        reduction: Reduction = "mean",
        get_not_nans: bool = False,
        ignore_empty: bool = True,
        num_classes: int | None = None,
        *,
        metric: Score = "dice",
        empty: float = 1.0,
        sigmoid: bool = False,
        threshold: float = 0.5,
        ignore_index: int | None = None,
        regions: Sequence[Sequence[int]] | None = None,
        group: Group = None,
    ) -> None:
        if metric not in get_args(Score):
            raise ValueError(f"metric: expected one of {get_args(Score)}, received {metric!r}. Jaccard is 'iou'.")
        require_group(group, "batch")
        memberships(regions, include_background=include_background, ignore_index=ignore_index)
        self.include_background = include_background
        self.reduction = _require_reduction(reduction)
        self.get_not_nans = get_not_nans
        self.ignore_empty = ignore_empty
        self.num_classes = num_classes
        self.metric = metric
        self.empty = empty
        self.sigmoid = sigmoid
        self.threshold = threshold
        self.ignore_index = ignore_index
        self.regions = regions
        self.group = group
        self._counts: list[OverlapCounts] = []

    def __call__(self, y_pred: Tensor, y: Tensor) -> Tensor:
        """Count a batch and return its scores `[B, C]`, float64."""
        counts = overlap_counts(
            y_pred,
            y,
            num_classes=self.num_classes,
            sigmoid=self.sigmoid,
            threshold=self.threshold,
            ignore_index=self.ignore_index,
            regions=self.regions,
        )
        counts = self._that_count(counts)
        if self._counts and self._counts[0].both.shape[1] != counts.both.shape[1]:
            raise ValueError(
                f"y_pred: expected {self._counts[0].both.shape[1]} classes, as before, "
                f"received {counts.both.shape[1]}. Call reset() between data sets."
            )
        self._counts.append(OverlapCounts(*(column.cpu() for column in counts)))
        return self._scores(counts)

    def aggregate(self, reduction: Reduction | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Reduce all scores since the last `reset`; with `get_not_nans`, also how many were no NaN.

        Raises ValueError if there are none.
        """
        chosen = self.reduction if reduction is None else _require_reduction(reduction)
        counts = self.counts()
        if chosen.startswith("dataset"):
            scores = self._scores(OverlapCounts(*(column.sum(0, keepdim=True) for column in counts)))
            result = _reduced(scores, "mean_batch" if chosen == "dataset" else "mean")
        else:
            result = _reduced(self._scores(counts), chosen)
        return result if self.get_not_nans else result[0]

    def counts(self) -> OverlapCounts:
        """The counts `[samples, C]` of all calls since the last `reset`, of all ranks.

        Raises ValueError if there are none.
        """
        held = [_joined(self._counts)] if self._counts else []
        if self.group is not None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD if self.group == "world" else self.group
            gathered: list[list[OverlapCounts]] = [[] for _ in range(dist.get_world_size(group))]
            dist.all_gather_object(gathered, held, group=group)
            held = [counts for rank in gathered for counts in rank]
        return _joined(held)

    def reset(self) -> None:
        """Forget all counts."""
        self._counts.clear()

    def get_buffer(self) -> Tensor:
        """The scores `[samples, C]` of this rank so far, as MONAI's metrics return them."""
        return self._scores(_joined(self._counts))

    def _that_count(self, counts: OverlapCounts) -> OverlapCounts:
        if self.regions is not None:
            return counts
        channels = counts.both.shape[1]
        chosen = [
            c
            for c in range(channels)
            if channels == 1 or (c != self.ignore_index and (c or self.include_background))
        ]
        return OverlapCounts(*(of_classes(column, chosen) for column in counts))

    def _scores(self, counts: OverlapCounts) -> Tensor:
        scores = counts.dice(self.empty) if self.metric == "dice" else counts.iou(self.empty)
        return torch.where(counts.reference == 0, torch.nan, scores) if self.ignore_empty else scores


def _joined(held: Sequence[OverlapCounts]) -> OverlapCounts:
    if not held:
        raise ValueError("expected at least one call before the scores are reduced, received none.")
    return OverlapCounts(*map(torch.cat, zip(*held, strict=True)))


def _require_reduction(reduction: str) -> Reduction:
    for known in get_args(Reduction):
        if reduction == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"reduction: expected one of {get_args(Reduction)}, received {reduction!r}.")


def _reduced(scores: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """The reduced scores, NaN left out, and how many there were; 0 of none, as in MONAI."""
    there = ~scores.isnan()
    if reduction == "none":
        return scores, there
    known = scores.nan_to_num()

    def mean(axis: int, known: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        number = there.sum(axis)
        return known.sum(axis) / number.clamp(min=1), number

    if reduction in ("mean_batch", "sum_batch", "mean_channel", "sum_channel"):
        axis = 0 if reduction.endswith("batch") else 1
        result, number = mean(axis, known, there)
        return (result if reduction.startswith("mean") else known.sum(axis)), number
    if reduction == "sum":
        return known.sum(), there.sum()
    # MONAI's mean: of each sample over its classes, then over the samples that have any.
    by_sample, number = mean(1, known, there)
    return mean(0, by_sample, number > 0)
