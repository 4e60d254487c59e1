"""Losses that are a mean over voxels, cross entropy and focal loss, from sums of the same pass.

Mutually exclusive classes (softmax) have a term for the true class only. With a sigmoid, or a single channel,
each channel is independent and binary, with a term for positives and one for negatives.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from voxloss import formulas, head_operators, inputs, operators
from voxloss.channels import Channels, spread
from voxloss.distributed import Group, Shard
from voxloss.lazy_logits import is_lazy
from voxloss.losses.base import Annotated, StatisticsLoss, loss_dtype
from voxloss.losses.options import Regions, VoxelOptions, Weight, shared_options
from voxloss.maps import Maps, Target, with_maps
from voxloss.reduction import class_weights, factors_of_classes, require_classes, select_classes
from voxloss.statistics import PassShape, PassSums

if TYPE_CHECKING:
    from typing_extensions import Unpack

Reduction = Literal["mean", "sum", "none"]

_NOT_ANNOTATED = (
    "label_smoothing: expected 0 with `annotated`, received {:g}: it adds a sum over all voxels, also those "
    "whose label was not annotated. Set it to 0."
)


class VoxelLoss(StatisticsLoss):
    """Base of cross entropy and focal loss: classes, weights, and values per voxel.

    Of mutually exclusive classes the one of `ignore_index` still counts as a class: voxels are ignored, and their
    label takes no part, but neither `weight` nor `label_smoothing` leaves it out.
    """

    class_weight: Tensor | None
    # Whether each voxel has a value of its own, with reduction="none".
    of_each_voxel = False

    def __init__(
        self,
        *,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: Reduction | str = "mean",
        weight: Weight = None,
        ignore_index: int | None = None,
        classes: Sequence[int] | None = None,
        backend: str | None = None,
        group: Group = None,
        shard: Shard = "batch",
        inplace: bool = False,
        regions: Regions = None,
    ) -> None:
        if reduction == "none" and not self.of_each_voxel:
            raise ValueError(
                'reduction: expected "mean" or "sum", received "none", which only cross entropy and focal loss '
                "have."
            )
        if reduction == "none" and inplace:
            raise ValueError('inplace: expected False with reduction="none", received True.')
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            reduction=reduction,
            ignore_index=ignore_index,
            backend=backend,
            group=group,
            shard=shard,
            inplace=inplace,
            regions=regions,
        )
        require_classes(classes, include_background)
        self.register_buffer("class_weight", factors_of_classes(weight))
        self.classes = classes

    def forward(
        self,
        input: Tensor,
        target: Tensor | Target,
        mask: Tensor | None = None,
        annotated: Annotated = None,
        **maps: Unpack[Maps],
    ) -> Tensor:
        """Return the loss, `[]`; with `reduction="none"` the loss of each voxel, `[B, 1, spatial...]`.

        Arguments as of `StatisticsLoss.forward`. An ignored voxel has 0.
        """
        if self.reduction != "none":
            return super().forward(input, target, mask, annotated, **maps)
        loss = self.each(input, with_maps(target, maps), mask, annotated).to(loss_dtype(input))
        inputs.warn_if_single(input.shape[1], self.to_onehot_y, self.include_background)
        return loss

    def each(
        self, input: Tensor, target: Target, mask: Tensor | None = None, annotated: Annotated = None
    ) -> Tensor:
        """The loss of each voxel, `[B, 1, spatial...]`, whatever the reduction."""
        volumes, chosen = self._volumes(input, target, mask, annotated)
        input, labels, mask, activation = volumes
        wide = torch.float32 if input.device.type == "mps" else torch.float64
        ignored = None if self.regions is not None else self.ignore_index
        like = torch.zeros((), dtype=wide, device=input.device)
        shape = PassShape(input.shape[1], volumes.binary, ignored, chosen, like)
        channels, factors = self.of_each(shape)
        share = len(channels.numbers) if volumes.binary else 1  # the mean over the binary channels
        rows = [
            spread(factor / share, channels.numbers, like.new_zeros(input.shape[1]))
            for factor in factors.values()
        ]
        table = torch.stack(rows)[:, None].repeat(1, len(input), 1)
        if chosen is not None:
            table = table * chosen
        options = self.ignore_index, self.backend, self.pass_gamma or 0.0, list(self._memberships)
        if is_lazy(input, labels):
            return head_operators.terms_of(table, input, labels, mask, activation, [*factors], *options)
        each: Tensor = operators.voxel_terms(table, input, labels, mask, activation, [*factors], *options)
        return each

    def of_each(self, shape: PassShape) -> tuple[Channels, Mapping[str, Tensor | float]]:
        """Return the channels that count, and by the name of a sum what a voxel's term is multiplied by.

        A factor is `[]`, or one per channel that counts.
        """
        raise NotImplementedError

    def select(self, sums: PassSums | PassShape, buffer: str, name: str) -> tuple[Channels, Tensor | float]:
        """Return the channels that count, and a factor for each, `[]` or `[len(numbers)]`; 1 without the buffer.

        Of mutually exclusive classes the ignored one still counts: voxels are ignored, not probabilities.
        """
        total = sums.channels
        chosen, counting = select_classes(total, self.classes, self.include_background, sums.ignored_class)
        counting = counting if sums.binary else chosen
        given = self.following(buffer, sums.tensor)
        factors = 1.0 if given is None else class_weights(given, total, chosen, counting, name)
        return Channels(counting, total, sums.binary), factors


class CrossEntropyLoss(VoxelLoss):
    """L = −Σ w_c g_c log p_c / Σ w_c g_c over voxels and classes: the mean of −log p of the right class.

    That is `torch.nn.CrossEntropyLoss`, its weighted mean included (there a one-hot target is divided by the
    number of voxels; here a label map and its one-hot are the same). With a sigmoid or a single channel the mean
    over voxels and classes of −w_c (g log p + (1 − g) log(1 − p)), `torch.nn.BCEWithLogitsLoss`.

    input: logits or probabilities `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with
    `to_onehot_y`, else `[B, C, spatial...]`. `StatisticsLoss` explains the arguments that all losses
    share, `VoxelOptions` those that torch and MONAI do not have.

    The denominator is that of the target without smoothing, over the classes that count. log p of a given
    probability is not let below log 2⁻¹²⁶.

    Args:
        reduction: "mean", or "sum" over voxels and classes; "none" for the loss of each voxel, not divided,
            `[B, 1, spatial...]`: −Σ_c w_c g_c log p_c, under a sigmoid the mean over the classes that count.
        weight: w_c ≥ 0: one number, one per channel, or one per class that counts.
        label_smoothing: ε in [0, 1]: the target is (1 − ε) g + ε/C, for a sigmoid (1 − ε) g + ε/2
            (Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision"). With a softmax,
            not together with `annotated`.
    """

    of_each_voxel = True

    def __init__(
        self,
        *,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: Reduction | str = "mean",
        weight: Weight = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        **options: Unpack[VoxelOptions],
    ) -> None:
        shared = shared_options(to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        super().__init__(include_background=include_background, weight=weight, **shared, **options)
        inputs.require_fraction(label_smoothing=label_smoothing)
        self.label_smoothing = label_smoothing

    def needs(self, binary: bool) -> Sequence[str]:
        """The entropies, and what the mean is over."""
        names = ["cross_entropy", "voxels" if binary else "target"]
        names += ["cross_entropy_negative"] if binary else []
        if self.label_smoothing:
            names += ["log_loss", "log_loss_negative"] if binary else ["log_loss"]
        return names

    def compute(self, sums: PassSums) -> Tensor:
        """The loss, `[]`."""
        if self.label_smoothing and sums.annotated is not None and not sums.binary:
            raise ValueError(_NOT_ANNOTATED.format(self.label_smoothing))
        channels, weight = self.select(sums, "class_weight", "weight")
        loss = self._sum("cross_entropy", sums, channels)
        if self.label_smoothing:
            share = self.label_smoothing / (2 if sums.binary else sums.channels)
            loss = (1 - self.label_smoothing) * loss + share * self._sum("log_loss", sums, channels)
        total = times(weight, loss).sum()
        if self.reduction == "sum":
            return total
        if sums.binary:
            return mean(total, sums.for_total("voxels", channels.numbers).sum(), sums.every_voxel)
        one_each = sums.every_voxel and sums.label_map and len(channels.numbers) == channels.total
        count = times(weight, sums.for_total("target", channels.numbers)).sum()
        return mean(total, count, one_each and isinstance(weight, float))

    def of_samples(self, sums: PassSums) -> tuple[Tensor, Tensor | None]:
        """Return the mean of each sample, `[B, 1]`, and which of them count: those with a voxel."""
        factors = self.of_each(sums)
        channels, weight = self.select(sums, "class_weight", "weight")
        total = sum(
            times(factor, sums.per_sample(name, channels.numbers)).sum(1, keepdim=True)
            for name, factor in factors[1].items()
        )
        over = times(weight, sums.per_sample("target", channels.numbers))
        if sums.binary:
            over = sums.per_sample("voxels", channels.numbers)
        count = over.sum(1, keepdim=True)
        return total / torch.where(count > 0, count, 1.0), count > 0

    def of_each(self, shape: PassShape | PassSums) -> tuple[Channels, Mapping[str, Tensor | float]]:
        """What the entropies are multiplied by, before the mean."""
        channels, weight = self.select(shape, "class_weight", "weight")
        if self.label_smoothing and shape.annotated is not None and not shape.binary:
            raise ValueError(_NOT_ANNOTATED.format(self.label_smoothing))
        right = (1 - self.label_smoothing) * weight
        every = self.label_smoothing / (2 if shape.binary else shape.channels) * weight
        factors = {"cross_entropy": right, **({"log_loss": every} if self.label_smoothing else {})}
        if shape.binary:
            factors |= {f"{name}_negative": factor for name, factor in factors.items()}
        return channels, factors

    def _sum(self, kind: str, sums: PassSums, channels: Channels) -> Tensor:
        found = sums.for_total(kind, channels.numbers)
        if not sums.binary:
            return found
        return found + sums.for_total(f"{kind}_negative", channels.numbers)


class VoxelMean(VoxelLoss):
    """A mean over voxels of terms with a factor for each class: a subclass names the `factors`."""

    @abstractmethod
    def factors(self, sums: PassSums) -> tuple[Channels, Mapping[str, Tensor | float]]:
        """Return the channels that count, and by the name of a sum its factor, `[]` or one per channel."""

    def compute(self, sums: PassSums) -> Tensor:
        """The loss, `[]`."""
        channels, factors = self.factors(sums)
        # A sum is over samples, of the mean over the voxels of each.
        found = sums.per_sample if self.reduction == "sum" else sums.for_total
        terms = [times(factor, found(name, channels.numbers)) for name, factor in factors.items()]
        total = reduce(add, terms)
        voxels = found("voxels", channels.numbers)
        if not sums.binary and sums.annotated is None:
            voxels = voxels[:, :1]
        elif not sums.binary:  # those whose class was annotated
            voxels = found("target").sum(1, keepdim=True)
        if self.reduction == "sum":
            return sums.over_ranks(mean(total, voxels, sums.every_voxel).sum())
        return mean(total.sum(), voxels.sum(), sums.every_voxel)


class FocalLoss(VoxelMean):
    """The mean over voxels of −w_c α g (1 − p)^γ log p, for a sigmoid with −w_c (1 − α)(1 − g) p^γ log(1 − p).

    Lin et al. 2017, "Focal Loss for Dense Object Detection". With a sigmoid (the default) the mean is over voxels
    and classes, as `monai.losses.FocalLoss` has it; with `use_softmax` a voxel has one right class and one term,
    and the mean is over voxels, C times MONAI's; with `classes`, still over all voxels. γ = 0 is cross entropy.

    input: logits `[B, C, spatial...]`; target: a label map `[B, 1, spatial...]` with `to_onehot_y`, else
    `[B, C, spatial...]`. `StatisticsLoss` explains the arguments that all losses
    share, `VoxelOptions` those that torch and MONAI do not have.

    Args:
        gamma: γ ≥ 0; the larger it is, the less nearly right voxels count.
        alpha: α in [0, 1] for positives, 1 − α for negatives (with `use_softmax`: for the background), or
            one factor α_c per class for its positives. None: no factor. With `use_softmax`
            and without the background, one number is ignored with a warning.
        weight: w_c ≥ 0: one number, one per channel, or one per class that counts.
        reduction: "mean", or "sum" over samples and classes of the mean over a sample's voxels, as in MONAI;
            "none" for the loss of each voxel, `[B, 1, spatial...]`, under a sigmoid the mean over the classes.
        use_softmax: mutually exclusive classes (softmax) instead of independent binary channels (sigmoid).
    """

    alpha: Tensor | None
    of_each_voxel = True

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        gamma: float = 2.0,
        alpha: float | Sequence[float] | None = None,
        weight: Weight = None,
        reduction: Reduction | str = "mean",
        use_softmax: bool = False,
        ignore_index: int | None = None,
        **options: Unpack[VoxelOptions],
    ) -> None:
        shared = shared_options(to_onehot_y, not use_softmax, use_softmax, None, reduction, ignore_index)
        super().__init__(include_background=include_background, weight=weight, **shared, **options)
        inputs.require_non_negative(gamma=gamma)
        self.gamma = gamma
        self.use_softmax = use_softmax
        factors = factors_of_classes(alpha, "alpha")
        if factors is not None and factors.ndim == 0:
            inputs.require_fraction(alpha=factors.item())
            if use_softmax and not include_background:
                warnings.warn(
                    "`include_background=False`, scalar `alpha` ignored when using softmax.", stacklevel=2
                )
                factors = None
        self.register_buffer("alpha", factors, persistent=False)

    @property
    def pass_gamma(self) -> float:
        """γ."""
        return self.gamma

    def needs(self, binary: bool) -> Sequence[str]:
        """The focal sums, and what the mean is over."""
        return ["focal", "focal_negative", "voxels"] if binary else ["focal", "voxels"]

    def factors(self, sums: PassSums) -> tuple[Channels, Mapping[str, Tensor | float]]:
        """Those of each voxel."""
        return self.of_each(sums)

    def of_each(self, shape: PassSums | PassShape) -> tuple[Channels, Mapping[str, Tensor | float]]:
        """Class weights, and α for positives and negatives."""
        channels, weight = self.select(shape, "class_weight", "weight")
        positive, negative = self._balance(shape)
        factors = {"focal": weight * positive}
        if shape.binary:
            factors["focal_negative"] = weight * negative
        return channels, factors

    def _balance(self, sums: PassSums | PassShape) -> tuple[Tensor | float, Tensor | float]:
        """The factors of positives and negatives."""
        if self.alpha is None:
            return 1.0, 1.0
        channels, factors = self.select(sums, "alpha", "alpha")
        if self.alpha.ndim:
            return factors, 1.0
        if sums.binary:
            return factors, 1 - factors
        background = channels.is_background(sums.tensor)
        return torch.where(background > 0, 1 - factors, factors), 1.0


def times(factor: Tensor | float, tensor: Tensor) -> Tensor:
    """factor · tensor; for the number 1 the tensor itself, which spares a GPU two launches."""
    return tensor if isinstance(factor, (int, float)) and factor == 1 else factor * tensor


def mean(total: Tensor, count: Tensor, positive: bool) -> Tensor:
    """total / count; unless that is certainly `positive`, 0 over nothing, without a gradient."""
    return total / count if positive else formulas.ratio_or(0, total, count)
