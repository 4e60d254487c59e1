"""A correct region loss, to make wrong ones of. The laws must accept it, for a refusal to mean anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from voxloss_verify.oracle.claims import OF_THE_CALL, Claims, Family, MapName
from voxloss_verify.subject.formula import MeanOfDistance


class Textbook(nn.Module):
    """A region loss as in its formula: the whole volume at once, in float64, without code of voxloss.

    `family` and what it means are those of `Claims`. A one-hot target may be soft; `soft_label` takes Σ min(p, g)
    for Σ p·g. `weight` is one number for each class that counts. Without reduction the result is [B, C], with
    `batch` [1, C], of Generalized Dice [B, 1] or [1, 1].
    """

    def __init__(
        self,
        family: Family = "dice",
        *,
        softmax: bool = False,
        sigmoid: bool = False,
        to_onehot_y: bool = False,
        include_background: bool = True,
        squared: bool = False,
        soft_label: bool = False,
        smooth_nr: float = 0.0,
        smooth_dr: float = 0.0,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 1.0,
        weight: Sequence[float] | Tensor | None = None,
        batch: bool = False,
        ignore_index: int | None = None,
        reduction: str = "mean",
        regions: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.family = family
        self.softmax, self.sigmoid, self.to_onehot_y = softmax, sigmoid, to_onehot_y
        self.include_background, self.ignore_index = include_background, ignore_index
        self.squared, self.soft_label = squared, soft_label
        self.smooth_nr, self.smooth_dr = smooth_nr, smooth_dr
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.weight = None if weight is None else torch.as_tensor(weight, dtype=torch.float64)
        self.batch, self.reduction, self.regions = batch, reduction, regions
        self.check_arguments()

    @property
    def claims(self) -> Claims:
        """The properties that follow from the arguments."""
        return Claims(
            family=self.family,
            smooth_nr=self.smooth_nr,
            smooth_dr=self.smooth_dr,
            squared=self.squared,
            overlap="min" if self.soft_label else "product",
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            gamma_as="gamma",
            weight_scale="relative",
            class_weight=None if self.weight is None else tuple(self.weight.tolist()),
            activation="softmax" if self.softmax else "sigmoid" if self.sigmoid else "none",
            labels="map" if self.to_onehot_y else "one-hot" if self.regions is None else "regions",
            regions=None if self.regions is None else tuple(map(tuple, self.regions)),
            soft_labels=not self.to_onehot_y and self.regions is None,
            include_background=self.include_background,
            batch=self.batch,
            reduction=self.reduction,  # type: ignore[arg-type]  # Claims says what it may be
            unreduced=f"{1 if self.batch else 'B'} {1 if self.family == 'generalized_dice' else 'C'}",
            ignore_index=self.ignore_index,
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of predictions [B, C, ...] and labels [B, 1, ...] or one channel per class [B, C, ...]."""
        return self.reduce(self.of_each(input, target)).to(torch.promote_types(input.dtype, torch.float32))

    def of_each(self, input: Tensor, target: Tensor) -> Tensor:
        """One loss per sample and class."""
        if not torch.compiler.is_compiling():  # a look at values would break the graph
            self.check_shapes(input, target)
            self.check_target(target, input.shape[1])
            self.check_prediction(input, target)
        p = self.probabilities(self.precise(input), self.valid_mask(target))
        # Where the label is the ignored one, no class that counts has a 1.
        g = self.encode(target, input.shape[1]).to(p.dtype)
        p, g = self.counting(p), self.counting(g)
        return self.losses(*(self.gather(sums) for sums in self.sums(p, g)))

    def check_arguments(self) -> None:
        """Refuse what makes no sense."""
        numbers = [self.smooth_nr, self.smooth_dr, self.alpha, self.beta]
        numbers += [] if self.weight is None else self.weight.tolist()
        if not all(0 <= number < math.inf for number in numbers) or not 0 < self.gamma < math.inf:
            raise ValueError("smoothing, alpha, beta, gamma, weight: expected finite numbers ≥ 0, and gamma > 0.")
        if self.regions is not None and (self.softmax or self.to_onehot_y or self.ignore_index is not None):
            raise ValueError("regions: expected neither softmax nor to_onehot_y nor ignore_index beside them.")
        if self.family not in get_args(Family) or self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f"family, reduction: received {self.family!r}, {self.reduction!r}.")

    def check_shapes(self, input: Tensor, target: Tensor) -> None:
        """Refuse what is no pair of tensors that fit together, or empty."""
        if not (isinstance(input, Tensor) and isinstance(target, Tensor) and input.is_floating_point()):
            raise TypeError("expected two tensors, the first of floating point.")
        channels = 1 if self.to_onehot_y or self.regions is not None else input.shape[1]
        if target.shape != (len(input), channels, *input.shape[2:]) or not input.numel():
            raise ValueError(f"received shapes {list(input.shape)} and {list(target.shape)}.")
        if self.softmax and input.shape[1] == 1:
            raise ValueError("softmax over one channel is always 1.")

    def check_target(self, target: Tensor, channels: int) -> None:
        """Refuse labels that are none, and one-hot values outside [0, 1]."""
        values = target.double()
        if self.to_onehot_y or self.regions is not None:
            known = channels if self.regions is None else self.known
            labels = (values >= 0) & (values < known) & (values == values.floor())
            good = labels | (values == self.ignore_index)
        else:
            good = (values >= 0) & (values <= 1)
        if not good.all():
            raise ValueError("the target has values that are no labels.")

    def check_prediction(self, input: Tensor, target: Tensor) -> None:
        """Refuse what is no probability, unless it becomes one."""
        if not (self.softmax or self.sigmoid):
            p = self.mask(input.detach().double(), self.valid_mask(target))
            if not ((p >= 0) & (p <= 1)).all():
                raise ValueError("expected probabilities, received values outside [0, 1].")

    def precise(self, input: Tensor) -> Tensor:
        """In the dtype to compute in."""
        return input.double()

    def valid_mask(self, target: Tensor) -> Tensor | None:
        """Which voxels count, [B, 1, ...]; None if all do."""
        if not self.to_onehot_y or self.ignore_index is None:
            return None
        return target.double() != self.ignore_index

    def mask(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """0 for voxels that do not count, whatever stands there."""
        return x if keep is None else torch.where(keep, x, 0.0)

    def probabilities(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """The prediction, 0 where a voxel does not count."""
        # Also masked before the activation, which else would make a NaN gradient of a NaN.
        return self.mask(self.activate(self.mask(x, keep)), keep)

    def activate(self, x: Tensor) -> Tensor:
        """Probabilities."""
        return x.softmax(1) if self.softmax else x.sigmoid() if self.sigmoid else x

    def encode(self, target: Tensor, channels: int) -> Tensor:
        """One channel per class."""
        if self.regions is not None:
            return torch.cat([self.inside(target, region) for region in self.regions], 1).double()
        if not self.to_onehot_y:
            return target.double()
        classes = torch.arange(channels, dtype=torch.float64, device=target.device)
        return (target.double() == classes.reshape(1, -1, *[1] * (target.ndim - 2))).double()

    @property
    def known(self) -> int:
        """Labels, from 0 to the largest in a region."""
        return 1 + max(label for region in self.regions or () for label in region)

    def inside(self, target: Tensor, region: Sequence[int]) -> Tensor:
        """Whether the label is one of the region's, [B, 1, ...]."""
        return torch.isin(target.double(), torch.tensor(region, dtype=torch.float64, device=target.device))

    def counting(self, x: Tensor) -> Tensor:
        """The channels that count."""
        channels = x.shape[1]
        first = 0 if self.include_background or channels == 1 else 1
        return x[:, [c for c in range(first, channels) if c != self.ignore_index]]

    def overlap(self, p: Tensor, g: Tensor) -> Tensor:
        """What the intersection is the sum of."""
        return torch.minimum(p, g) if self.soft_label else p * g

    def total(self, x: Tensor) -> Tensor:
        """Sum over voxels, [B, C]."""
        return x.flatten(2).sum(2)

    def sums(self, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the intersection, the prediction and the target, [B, C] each."""
        power = 2 if self.squared else 1
        return self.total(self.overlap(p, g)), self.total(p**power), self.total(g**power)

    def gather(self, sums: Tensor) -> Tensor:
        """Sum over samples, if they count together."""
        return sums.sum(0, keepdim=True) if self.batch else sums

    def fraction(self, i: Tensor, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of the score, without smoothing."""
        if self.family == "generalized_dice":
            w = self.region_weights(g)
            return 2 * (w * i).sum(1, keepdim=True), (w * (p + g)).sum(1, keepdim=True)
        if self.family == "dice":
            return 2 * i, p + g
        if self.family == "jaccard":
            return i, p + g - i
        return i, i + self.alpha * (p - i) + self.beta * (g - i)

    def region_weights(self, g: Tensor) -> Tensor:
        """1/g² relative to the sample's largest; a class without target has the largest."""
        smallest = torch.where(g > 0, g, torch.inf).amin(1, keepdim=True)
        return torch.where(g > 0, smallest / torch.where(g > 0, g, 1.0), 1.0) ** 2

    def smooth(self, numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
        """Add the smoothing."""
        return numerator + self.smooth_nr, denominator + self.smooth_dr

    def ratio(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        """The score, which is 1 for an empty target and an empty prediction."""
        empty = denominator == 0
        return torch.where(empty, 1.0, numerator / torch.where(empty, 1.0, denominator))

    def power(self, distance: Tensor) -> Tensor:
        """The focus on classes that are far from perfect."""
        return distance.clamp(min=0) ** self.gamma if self.family == "focal_tversky" else distance

    def class_weights(self) -> Tensor | float:
        """One factor per class."""
        return 1.0 if self.weight is None else self.weight

    def losses(self, i: Tensor, p: Tensor, g: Tensor) -> Tensor:
        """One per sample and class."""
        return self.class_weights() * self.power(1 - self.ratio(*self.smooth(*self.fraction(i, p, g))))

    def reduce(self, losses: Tensor) -> Tensor:
        """Mean, sum or nothing."""
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()


class TextbookCompound(Textbook):
    """λ · region loss + λ · mean over voxels, of all classes: cross entropy or, with `focus`, focal loss.

    `weight` is one number for each channel, of both; Generalized Dice has none here. `focus` is γ of focal loss,
    `hardest` how many percent of the voxels cross entropy is of.
    """

    def __init__(
        self,
        family: Family = "dice",
        *,
        focus: float | None = None,
        hardest: float = 100.0,
        lambda_region: float = 1.0,
        lambda_voxels: float = 1.0,
        **options: Any,
    ) -> None:
        self.focus, self.hardest = focus, hardest
        self.lambda_region, self.lambda_voxels = lambda_region, lambda_voxels
        super().__init__(family, **options)

    @property
    def claims(self) -> Claims:
        """Those of the region loss, and of the mean over voxels."""
        region = super().claims
        weight = region.class_weight
        if self.focus is None:
            by_voxel = Claims(family="cross_entropy", class_weight=weight, hardest=self.hardest)
        else:
            by_voxel = Claims(family="focal", gamma=self.focus, class_weight=weight)
        shared: dict[str, Any] = {name: getattr(region, name) for name in OF_THE_CALL}
        parts = (self.lambda_region, region), (self.lambda_voxels, by_voxel)
        return Claims(family="compound", parts=parts, **shared)

    def check_arguments(self) -> None:
        """Refuse what makes no sense."""
        super().check_arguments()
        if min(self.lambda_region, self.lambda_voxels, self.focus or 0) < 0 or self.reduction != "mean":
            raise ValueError("lambda, focus: expected numbers ≥ 0; reduction: expected the mean.")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The weighted sum."""
        region = super().forward(input, target)
        keep = self.valid_mask(target)
        x = self.mask(self.precise(input), keep)
        g = self.mask(self.encode(target, input.shape[1]).to(x.dtype), keep)
        voxels = torch.ones_like(x[:, :1]) if keep is None else keep.to(x.dtype)
        return self.add(region, self.over_voxels(x, g, voxels).to(region.dtype))

    def add(self, region: Tensor, by_voxel: Tensor) -> Tensor:
        """Σ λ·part."""
        return self.lambda_region * region + self.lambda_voxels * by_voxel

    def logarithms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log p, and log(1 − p) of each channel."""
        if self.softmax:
            log_p = x.log_softmax(1)
            return log_p, torch.zeros_like(log_p)
        return nn.functional.logsigmoid(x), nn.functional.logsigmoid(-x)

    def over_voxels(self, x: Tensor, g: Tensor, voxels: Tensor) -> Tensor:
        """The mean over the `voxels` that count, 1 or 0 each."""
        log_p, log_n = self.logarithms(x)
        weights = torch.as_tensor(self.class_weights(), dtype=x.dtype).reshape(1, -1, *[1] * (x.ndim - 2))
        terms = weights * g * self.focused(log_p)
        if not self.softmax:
            terms = terms + weights * (voxels - g) * self.focused(log_n)
        counted = self.hardest_of(terms.detach().sum(1, keepdim=True), voxels)
        below = self.divisor(weights * g * counted, counted)
        return (counted * terms).sum() / torch.where(below == 0, 1.0, below)

    def hardest_of(self, loss: Tensor, voxels: Tensor) -> Tensor:
        """How much each voxel counts: 1 among the largest losses, a share if it is equal to the last of them."""
        if self.hardest == 100:
            return voxels
        loss = torch.where(voxels > 0, loss, -torch.inf)
        number = (voxels.sum() * self.hardest / 100).floor().clamp(min=1)
        last = loss.flatten().sort(descending=True).values.gather(0, number.long()[None] - 1)
        larger, equal = loss > last, loss == last
        return larger + equal * (number - larger.sum()) / equal.sum()

    def focused(self, log: Tensor) -> Tensor:
        """−(1 − q)^γ log q."""
        return -log if self.focus is None else -log * (-torch.expm1(log)) ** self.focus

    def divisor(self, weighted: Tensor, voxels: Tensor) -> Tensor:
        """Σ w g of cross entropy; the number of answers of the others."""
        if not self.softmax:
            return voxels.sum() * weighted.shape[1]
        return weighted.sum() if self.focus is None else voxels.sum()


class TextbookOfMap(Textbook):
    """A loss that reads a map beside the labels: `forward` takes a `voxloss.Target` of both.

    With a "skeleton" the region loss has the skeleton in the place of the target: the recall, if α = 0 and β = 1.
    With a "distance" φ it is the mean of φ·p over the voxels of a sample and class, of the family "formula". With
    a partition, "nearest" or "components", it is the mean over samples of the mean over cells of the region loss.
    """

    def __init__(self, map: MapName, **options: Any) -> None:
        self.map = map
        super().__init__(**options)

    @property
    def claims(self) -> Claims:
        """Those of the region loss, and of the map."""
        if self.map == "distance":
            formula = MeanOfDistance()
            return replace(super().claims, family="formula", formula=formula, map=self.map, soft_labels=False)
        by_cell = self.map in ("nearest", "components")
        return replace(super().claims, map=self.map, compiles=not by_cell)

    def check_arguments(self) -> None:
        """Refuse what makes no sense."""
        super().check_arguments()
        if self.map not in get_args(MapName) or (self.batch and self.map in ("nearest", "components")):
            raise ValueError(f"map: received {self.map!r}, with batch={self.batch}.")

    def of_each(self, input: Tensor, target: Any) -> Tensor:
        """One loss per sample and class, of predictions [B, C, ...], and of labels and a map."""
        if self.map == "skeleton":
            return super().of_each(input, target.skeleton)
        if self.map == "distance":
            return self.of_distance(input, target.labels, self.distance(target.distance.double()))
        self.check_shapes(input, target.labels)
        samples = zip(input, target.labels, target.partition, strict=True)
        return torch.cat([self.of_cells(*each) for each in samples])

    def distance(self, signed: Tensor) -> Tensor:
        """What the prediction is multiplied by."""
        return signed

    def of_distance(self, input: Tensor, labels: Tensor, distance: Tensor) -> Tensor:
        """The mean over voxels of φ·p."""
        if not torch.compiler.is_compiling():
            self.check_shapes(input, labels)
            self.check_target(labels, input.shape[1])
            self.check_prediction(input, labels)
        keep = self.valid_mask(labels)
        p = self.probabilities(self.precise(input), keep)
        voxels = self.total(torch.ones_like(p[:, :1]) if keep is None else keep.to(p.dtype))
        sums = self.total(self.counting(self.mask(distance, keep) * p))
        return self.class_weights() * self.mean_of(sums, voxels)

    def mean_of(self, sums: Tensor, voxels: Tensor) -> Tensor:
        """Over the voxels that count."""
        return sums / torch.where(voxels == 0, 1.0, voxels)

    def of_cells(self, input: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
        """The mean over the cells of a sample [C, ...]; 0 if it has none."""
        cells = [
            super(TextbookOfMap, self).of_each(input[:, inside][None], labels[:, inside][None])
            for inside in self.cells(numbers[0])
        ]
        none = 0 * self.counting(input[None].double()).flatten(2).sum(2)
        return torch.stack(cells).mean(0) if cells else none

    def cells(self, numbers: Tensor) -> list[Tensor]:
        """Which voxels are in each: number 0 is none, but joined with each component, or all of a sample."""
        there = sorted({*numbers.flatten().tolist()} - {0})
        if self.map == "components":
            return [(numbers == number) | (numbers == 0) for number in there]
        return [numbers == number for number in there or [0]]
