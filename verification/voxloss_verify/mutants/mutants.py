# ruff: noqa: D102  # `Textbook` documents each method, and the class its error
"""Mutants: incorrect losses, each of which a law must detect.

Each changes one method of `Textbook` and is entered with the laws that must detect it. `CANNOT` has the reasons
why some laws detect none here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, distributed

from voxloss_verify.laws import LAWS
from voxloss_verify.mutants.textbook import Textbook, TextbookCompound, TextbookOfMap
from voxloss_verify.oracle.claims import Claims
from voxloss_verify.request import Level
from voxloss_verify.subject.subject import Subject, subject_of


@dataclass(frozen=True)
class Specimen:
    """A loss, its arguments, and the laws that must catch it: none for a correct one."""

    loss: type[Textbook]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    killers: tuple[str, ...] = ()

    @property
    def flaw(self) -> str:
        """What is wrong, in one line."""
        return (self.loss.__doc__ or "").strip().splitlines()[0]

    @property
    def is_of_the_interface(self) -> bool:
        """Whether it is right for every input that is right, so that only advice can be against it."""
        return all(law.level is Level.interface for law in LAWS if law.id in self.killers)

    def subject(self) -> Subject:
        """The loss, held to what the textbook claims with these arguments."""
        return subject_of(self.loss, self.loss(**self.kwargs).claims, kwargs=self.kwargs)

    def __str__(self) -> str:
        given = ", ".join(key if value is True else f"{key}={value}" for key, value in self.kwargs.items())
        return f"{self.loss.__name__}({given})"


MUTANTS: list[Specimen] = []

CANNOT = {
    "26": "more than 2³¹ elements need a GPU; voxloss's tests run it on mutants with fewer",
    "28b": "only voxloss has backends; voxloss's tests break one",
}


def caught_by(*laws: str, **kwargs: Any) -> Callable[[type[Textbook]], type[Textbook]]:
    """Enter a mutant, with its arguments and the laws that must detect it."""

    def enter(loss: type[Textbook]) -> type[Textbook]:
        MUTANTS.append(Specimen(loss, kwargs, laws))
        return loss

    return enter


SOFTMAX: dict[str, Any] = {"softmax": True, "to_onehot_y": True}
FOREGROUND: dict[str, Any] = {**SOFTMAX, "include_background": False, "smooth_nr": 1.0, "smooth_dr": 1.0}
IGNORING: dict[str, Any] = {**SOFTMAX, "ignore_index": 255}
BATCH: dict[str, Any] = {**SOFTMAX, "batch": True, "smooth_nr": 1.0, "smooth_dr": 1.0}
TVERSKY: dict[str, Any] = {**SOFTMAX, "family": "tversky", "alpha": 0.25, "beta": 0.75}
FOCAL: dict[str, Any] = {**TVERSKY, "family": "focal_tversky", "gamma": 2.0}
SKELETON: dict[str, Any] = {**TVERSKY, "map": "skeleton", "alpha": 0.0, "beta": 1.0, "include_background": False}
REGIONS: dict[str, Any] = {"sigmoid": True, "regions": ((1, 3), (2, 3))}
COMPOUND: dict[str, Any] = {**IGNORING, "lambda_region": 0.5, "lambda_voxels": 2.0}


# The formula.


@caught_by("1", **SOFTMAX)
class FactorTwoDropped(Textbook):
    """Dice is TP / (Σp + Σg)."""

    def fraction(self, i: Tensor, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return i, p + g


@caught_by("2", **SOFTMAX)
class VolumesNotPlaces(Textbook):
    """Equal volumes overlap, wherever they lie."""

    def sums(self, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, predicted, wanted = super().sums(p, g)
        return torch.minimum(predicted, wanted), predicted, wanted


@caught_by("3", "4", squared=True)
class PredictionNotSquared(Textbook):
    """Σp for Σp²."""

    def sums(self, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        i, _, wanted = super().sums(p, g)
        return i, self.total(p), wanted


@caught_by("4", **SOFTMAX)
class Rounded(Textbook):
    """Probabilities are rounded to 0 and 1, with the gradient of those that are not."""

    def activate(self, x: Tensor) -> Tensor:
        p = super().activate(x)
        return p + (p.round() - p).detach()


@caught_by("5", **SOFTMAX)
class BoundingBoxes(Textbook):
    """Volumes are those of bounding boxes."""

    def total(self, x: Tensor) -> Tensor:
        axes = range(2, x.ndim)
        edges = [x.amax([other for other in axes if other != axis]).sum(2) for axis in axes]
        return torch.stack(edges).prod(0)


@caught_by("6", **SOFTMAX, family="jaccard")
class HalfOfDice(Textbook):
    """IoU is TP / (Σp + Σg)."""

    def fraction(self, i: Tensor, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return i, p + g


@caught_by("7", **SOFTMAX, family="tversky")
class ErrorsTwice(Textbook):
    """Tversky's α and β stand beside 2 FP and 2 FN."""

    def fraction(self, i: Tensor, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return i, i + 2 * self.alpha * (p - i) + 2 * self.beta * (g - i)


@caught_by("8", **FOCAL)
class GammaUpsideDown(Textbook):
    """The exponent is 1/γ where γ is declared."""

    def power(self, distance: Tensor) -> Tensor:
        return distance.clamp(min=2.0**-23) ** (1 / self.gamma)


@caught_by("9", **TVERSKY)
class AlphaAndBetaSwapped(Textbook):
    """α weights false negatives, β false positives."""

    def fraction(self, i: Tensor, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return super().fraction(i, g, p)


@caught_by("10", soft_label=True)
class ProductOfSoftLabels(Textbook):
    """Σ p·g for Σ min(p, g)."""

    def overlap(self, p: Tensor, g: Tensor) -> Tensor:
        return p * g


@caught_by("11", **FOREGROUND)
class SmoothInOnePlace(Textbook):
    """The smoothing stands in the numerator only."""

    def smooth(self, numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
        return numerator + self.smooth_nr, denominator


@caught_by("12a", **FOREGROUND)
class RecallOnly(Textbook):
    """False alarms cost nothing."""

    def fraction(self, i: Tensor, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return i, g


@caught_by("12b", "20", sigmoid=True)
class IntersectionDetached(Textbook):
    """The intersection has no gradient."""

    def overlap(self, p: Tensor, g: Tensor) -> Tensor:
        return super().overlap(p, g).detach()


# What must not be noticed.


@caught_by("13a", **SOFTMAX)
class LastVoxelsCountMore(Textbook):
    """The weight of voxels increases along the last axis."""

    def total(self, x: Tensor) -> Tensor:
        return super().total(x * torch.linspace(1, 2, x.shape[-1], dtype=x.dtype, device=x.device))


@caught_by("13b", **SOFTMAX)
class LastClassesCountMore(Textbook):
    """The weight of classes increases with their number."""

    def losses(self, i: Tensor, p: Tensor, g: Tensor) -> Tensor:
        losses = super().losses(i, p, g)
        return losses * torch.linspace(0.5, 1.5, losses.shape[1], dtype=losses.dtype, device=losses.device)


@caught_by("13c", **SOFTMAX, smooth_nr=1.0, smooth_dr=1.0)
class MeanOfSlices(Textbook):
    """Sums are means over the slices, so that smoothing counts for more in a deep volume."""

    def total(self, x: Tensor) -> Tensor:
        return x.flatten(3).sum(3).mean(2)


@caught_by("14", **SOFTMAX)
class HiddenSmoothing(Textbook):
    """A little smoothing that was not requested."""

    def smooth(self, numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
        return numerator + 1e-5, denominator + 1e-5


@caught_by("15", **FOREGROUND)
class MeansForSums(Textbook):
    """The smoothing stands beside means over voxels."""

    def total(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


@caught_by("16", **BATCH)
class BatchMean(Textbook):
    """Sums are averaged over the samples, beside the smoothing."""

    def gather(self, sums: Tensor) -> Tensor:
        return sums.mean(0, keepdim=True)


@caught_by("16", **BATCH)
class BatchForgotten(Textbook):
    """Each sample has a ratio of its own, whatever `batch` is."""

    def gather(self, sums: Tensor) -> Tensor:
        return sums


@caught_by("16b", **SOFTMAX)
class LargeItemsCountMore(Textbook):
    """The mean over samples is weighted by their voxels of the last class."""

    def losses(self, i: Tensor, p: Tensor, g: Tensor) -> Tensor:
        size = g[:, -1:] + 1
        return super().losses(i, p, g) * size / size.mean()


@caught_by("17", **FOREGROUND)
class BackgroundBeforeSoftmax(Textbook):
    """The background's logit is left out before the softmax."""

    def activate(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:].softmax(1)], 1)


@caught_by("15", "17", **FOREGROUND)
class BackgroundOffByOne(Textbook):
    """The last class is left out for the first."""

    def counting(self, x: Tensor) -> Tensor:
        return x[:, :-1]


@caught_by("18", "23b", **SOFTMAX)
class SoftmaxOverflows(Textbook):
    """Softmax of the logits as they are, without their maximum subtracted."""

    def activate(self, x: Tensor) -> Tensor:
        return x.exp() / x.exp().sum(1, keepdim=True)


@caught_by("19a", **IGNORING)
class MaskBeforeSoftmax(Textbook):
    """Ignored voxels have their logits masked, but not their probabilities."""

    def probabilities(self, x: Tensor, keep: Tensor | None) -> Tensor:
        return self.activate(self.mask(x, keep))


@caught_by("19a", **IGNORING)
class LabelMaskedBeforeOneHot(Textbook):
    """Ignored labels become 0, and so background, before the one-hot encoding."""

    def encode(self, target: Tensor, channels: int) -> Tensor:
        return super().encode(target * (target != self.ignore_index), channels)


@caught_by("19a", **IGNORING)
class MaskTimes(Textbook):
    """Ignored voxels are multiplied by 0, which leaves a NaN what it is."""

    def mask(self, x: Tensor, keep: Tensor | None) -> Tensor:
        return x if keep is None else x * keep


@caught_by("19b", **SOFTMAX)
class AssumesContiguous(Textbook):
    """Memory is read as if it were contiguous."""

    def precise(self, input: Tensor) -> Tensor:
        strides = [math.prod(input.shape[axis + 1 :]) for axis in range(input.ndim)]
        return input.as_strided(input.shape, strides).double()


@caught_by("19b", **SOFTMAX)
class LabelsWrapAround(Textbook):
    """One-hot by 1 − |label − class| in the labels' own dtype, where 0 − 1 may be 255."""

    def encode(self, target: Tensor, channels: int) -> Tensor:
        classes = torch.arange(channels, device=target.device).to(target.dtype)
        return (1 - (target - classes.reshape(1, -1, *[1] * (target.ndim - 2))).abs()).clamp(min=0).double()


@caught_by("19c", **SOFTMAX)
class OneHotIsSoftened(Textbook):
    """Labels are smoothed if they come as one-hot, and only then."""

    def encode(self, target: Tensor, channels: int) -> Tensor:
        g = super().encode(target, channels)
        return g if self.to_onehot_y else 0.9 * g + 0.1 / channels


# Gradients.


@caught_by("20", **SOFTMAX)
class GradientHalved(Textbook):
    """The right value with half of the gradient."""

    def activate(self, x: Tensor) -> Tensor:
        p = super().activate(x)
        return p / 2 + p.detach() / 2


@caught_by("20", **SOFTMAX)
class DenominatorDetached(Textbook):
    """The denominator has no gradient."""

    def smooth(self, numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
        return super().smooth(numerator, denominator.detach())


@caught_by("21", **SOFTMAX)
class SoftmaxSumDetached(Textbook):
    """The sum in softmax's denominator has no gradient."""

    def activate(self, x: Tensor) -> Tensor:
        return super().activate(x).detach() * (x - x.detach() + 1)


@caught_by("22")
class TargetSquared(Textbook):
    """Σg² for Σg, which is the same for all targets that are hard."""

    def sums(self, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        i, predicted, _ = super().sums(p, g)
        return i, predicted, self.total(g**2)


class _Quotient(torch.autograd.Function):
    """n/d whose first derivative is a constant to the second derivative."""

    @staticmethod
    def forward(ctx: Any, n: Tensor, d: Tensor) -> Tensor:
        ctx.n, ctx.d = n.detach(), d.detach()
        return n / d

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        return grad_output / ctx.d, -grad_output * ctx.n / ctx.d**2


@caught_by("23a", **SOFTMAX)
class SecondDerivativeLost(Textbook):
    """The right gradient, whose own gradient is wrong."""

    def ratio(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        empty = denominator == 0
        safe = torch.where(empty, 1.0, denominator)
        return torch.where(empty, 1.0, _Quotient.apply(numerator, safe))  # type: ignore[no-untyped-call]


@caught_by("23b", "29a")
class NotANumberInTheOtherBranch(Textbook):
    """0/0 is replaced after the division, which leaves NaN in the gradient."""

    def ratio(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        return torch.where(denominator == 0, 1.0, numerator / denominator)


@caught_by("23b", "29a", **FOCAL)
class RootAtZero(Textbook):
    """√x² for x: its gradient at 0 is NaN."""

    def power(self, distance: Tensor) -> Tensor:
        return super().power((distance**2).sqrt())


# Numbers.


@caught_by("24", **SOFTMAX)
class RunningSum(Textbook):
    """One float32 takes up voxel after voxel."""

    @property
    def claims(self) -> Claims:
        # Small volumes are right to a float32's precision: only large ones show it.
        return replace(super().claims, dtypes=("float32",))

    def total(self, x: Tensor) -> Tensor:
        rows = x.float().flatten(2).flatten(0, 1)
        first = torch.zeros(rows.shape[1], dtype=torch.long, device=x.device)
        return torch.cat([row.new_zeros(1).index_add(0, first, row) for row in rows]).double().view(x.shape[:2])


@caught_by("20", "24", **FOCAL)
class PowerAfterTheMean(Textbook):
    """The mean of the classes is raised to γ, not each class."""

    def losses(self, i: Tensor, p: Tensor, g: Tensor) -> Tensor:
        return 1 - self.ratio(*self.smooth(*self.fraction(i, p, g)))

    def reduce(self, losses: Tensor) -> Tensor:
        return self.power(super().reduce(losses))


@caught_by("20", "24", **SOFTMAX, weight=(1.0, 3.0))
class WeightsNormalised(Textbook):
    """Class weights are divided by their sum."""

    def class_weights(self) -> Tensor | float:
        return 1.0 if self.weight is None else self.weight / self.weight.sum()


@caught_by("24", **SOFTMAX, family="generalized_dice")
class AbsentClassesWeighNothing(Textbook):
    """A class without target has the weight 0, so that false alarms cost nothing."""

    def region_weights(self, g: Tensor) -> Tensor:
        return super().region_weights(g) * (g > 0)


@caught_by("25", **SOFTMAX)
class InTheDtypeOfTheInput(Textbook):
    """Probabilities and sums have the precision of the input, be it half."""

    def precise(self, input: Tensor) -> Tensor:
        return input


@caught_by("25b", **SOFTMAX)
class SumsByMatrixProduct(Textbook):
    """Sums are products with ones, in float32, which autocast takes to half precision."""

    def total(self, x: Tensor) -> Tensor:
        flat = x.flatten(2).float()
        return (flat @ torch.ones_like(flat[:1, :1]).mT).squeeze(2).double()


@caught_by("27a", **SOFTMAX)
class Noise(Textbook):
    """Other last bits at every call."""

    def reduce(self, losses: Tensor) -> Tensor:
        return super().reduce(losses) * (1 + 1e-14 * torch.rand((), dtype=losses.dtype, device=losses.device))


@caught_by("27b", **IGNORING)
class TargetChanged(Textbook):
    """Ignored labels are set to 0 where the caller keeps them."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        loss = super().forward(input, target)
        target.mul_(target != self.ignore_index)
        return loss


# Processes and compilers.


class _AllReduce(torch.autograd.Function):
    """Sum over processes; each process's result owes as much to every process's addend."""

    @staticmethod
    def forward(ctx: Any, addend: Tensor) -> Tensor:
        total = addend.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return _AllReduce.forward(ctx, grad_output)


class AcrossProcesses(Textbook):
    """Sums over all processes, so that each has the loss of all data.

    Its gradient is all processes' together: DDP, which averages, makes that of one process of it.
    """

    @property
    def claims(self) -> Claims:
        return replace(super().claims, shards=("equal batch", "unequal batch", "volume"))

    def gather(self, sums: Tensor) -> Tensor:
        sums = super().gather(sums)
        return self.all_reduce(sums) if _several_processes() else sums

    def all_reduce(self, sums: Tensor) -> Tensor:
        total: Tensor = _AllReduce.apply(sums)  # type: ignore[no-untyped-call]
        return total


def _several_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@caught_by("28a", **BATCH)
class GradientStaysHome(AcrossProcesses):
    """What the other processes' losses owe to this one's voxels is forgotten, and DDP halves the gradient."""

    def all_reduce(self, sums: Tensor) -> Tensor:
        everywhere = sums.detach().clone()
        distributed.all_reduce(everywhere)
        return everywhere + sums - sums.detach()


@caught_by("28a", **BATCH)
class EachForItself(AcrossProcesses):
    """Each process has the sums of its own data."""

    def all_reduce(self, sums: Tensor) -> Tensor:
        return sums


@caught_by("28a", **SOFTMAX)
class TimesProcesses(Textbook):
    """The loss is multiplied by the number of processes."""

    def reduce(self, losses: Tensor) -> Tensor:
        return super().reduce(losses) * (distributed.get_world_size() if _several_processes() else 1)


@caught_by("28c", **SOFTMAX)
class GraphBreak(Textbook):
    """A number is taken out of the graph, to decide by."""

    def ratio(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        if denominator.min().item() > 0:
            return numerator / denominator
        return super().ratio(numerator, denominator)


def _operator(name: str, fake: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Σ p·g over voxels as an operator of torch; `fake` returns the shape without computing it."""

    def forward(p: Tensor, g: Tensor) -> Tensor:
        return (p * g).flatten(2).sum(2)

    def remember(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        p, g = ctx.saved_tensors
        grad_output = grad_output.reshape(*grad_output.shape, *[1] * (p.ndim - 2))
        return grad_output * g, grad_output * p

    operator = torch.library.custom_op(name, forward, mutates_args=(), schema="(Tensor p, Tensor g) -> Tensor")
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=remember)
    return operator


_overlap = _operator("voxloss_verify::overlap", lambda p, g: p.new_empty(p.shape[:2]))
_overlap_wrong = _operator("voxloss_verify::overlap_wrong", lambda p, g: g.new_empty(g.shape[:1]))


class OwnOperator(Textbook):
    """The intersection is an operator of its own."""

    def sums(self, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _overlap(p, g), *super().sums(p, g)[1:]


@caught_by("28d", **SOFTMAX)
class WrongFake(Textbook):
    """An operator that declares a wrong shape to compilers."""

    def sums(self, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _overlap_wrong(p, g), *super().sums(p, g)[1:]


class Masked(Textbook):
    """A third argument is the weight of each voxel."""

    weights: Tensor | None = None

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        self.weights = None if mask is None else mask.double()
        return super().forward(input, target)

    def valid_mask(self, target: Tensor) -> Tensor | None:
        valid = super().valid_mask(target)
        if self.weights is None:
            return valid
        return self.weights > 0 if valid is None else valid & (self.weights > 0)

    def total(self, x: Tensor) -> Tensor:
        return super().total(x if self.weights is None else x * self.weights)


@caught_by("19d", **SOFTMAX)
class MaskedBeforeTheSoftmax(Masked):
    """The mask multiplies the logits, so that a masked voxel is one of equal probabilities, or of NaN."""

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(input if mask is None else input * mask, target)


# Compounds.


@caught_by("19a", **COMPOUND)
class MeanOverIgnoredVoxels(TextbookCompound):
    """Cross entropy is divided by all voxels, also those that are ignored."""

    def divisor(self, weighted: Tensor, voxels: Tensor) -> Tensor:
        return torch.ones_like(voxels).sum()


@caught_by("20", "24", sigmoid=True)
class SoftmaxBesideSigmoid(TextbookCompound):
    """Dice has the sigmoid that was requested, cross entropy a softmax."""

    def over_voxels(self, x: Tensor, g: Tensor, voxels: Tensor) -> Tensor:
        return -(g * x.log_softmax(1)).sum() / voxels.sum()


@caught_by("20", "25b", **COMPOUND, hardest=30.0)
class HardestOfEachItem(TextbookCompound):
    """Cross entropy is of the hardest voxels of each sample."""

    def hardest_of(self, loss: Tensor, voxels: Tensor) -> Tensor:
        items = (slice(b, b + 1) for b in range(len(loss)))
        return torch.cat([TextbookCompound.hardest_of(self, loss[b], voxels[b]) for b in items])


@caught_by("19a", **COMPOUND, hardest=30.0)
class HardestOfIgnoredVoxels(TextbookCompound):
    """k % of all voxels, also of those that are ignored."""

    def hardest_of(self, loss: Tensor, voxels: Tensor) -> Tensor:
        return super().hardest_of(torch.where(voxels > 0, loss, -1.0), torch.ones_like(voxels)) * voxels


@caught_by("20", "24", **COMPOUND)
class LambdasSwapped(TextbookCompound):
    """Each λ is that of the other part."""

    def add(self, region: Tensor, by_voxel: Tensor) -> Tensor:
        return super().add(by_voxel, region)


@caught_by("20", "24", **SOFTMAX, focus=2.0)
class FocusPlusOne(TextbookCompound):
    """The focal loss has γ + 1 where γ is declared."""

    def focused(self, log: Tensor) -> Tensor:
        return super().focused(log) * -torch.expm1(log)


@caught_by("24", **SOFTMAX, weight=(1.0, 3.0))
class WeightsInTheNumeratorOnly(TextbookCompound):
    """The mean of cross entropy is over voxels, not over their weights."""

    def divisor(self, weighted: Tensor, voxels: Tensor) -> Tensor:
        return voxels.sum()


@caught_by("23b", **COMPOUND)
class LogarithmOfAProbability(TextbookCompound):
    """Log of a softmax that may be 0, for the logarithm of the softmax."""

    def logarithms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = x.softmax(1)
        return p.log(), (1 - p).log()


# Conventions.


@caught_by("29a")
class WorstIfEmpty(Textbook):
    """An empty target and an empty prediction cost 1."""

    def ratio(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        return numerator / torch.where(denominator == 0, 1.0, denominator)


@caught_by("29b", **SOFTMAX)
class EmptyAccepted(Textbook):
    """A mean over no samples."""

    def check_shapes(self, input: Tensor, target: Tensor) -> None:
        if input.numel():
            super().check_shapes(input, target)


@caught_by("29c", **SOFTMAX)
class NaNHidden(Textbook):
    """A class whose loss is NaN costs 1."""

    def reduce(self, losses: Tensor) -> Tensor:
        return super().reduce(losses.nan_to_num(1.0))


@caught_by("30", **SOFTMAX)
class OneInBrackets(Textbook):
    """A shape of [1] for []."""

    def reduce(self, losses: Tensor) -> Tensor:
        return super().reduce(losses).reshape(-1)


@caught_by("24", "19c", **REGIONS)
class FirstRegionOnly(Textbook):
    """A label that is in two regions counts in the first."""

    def encode(self, target: Tensor, channels: int) -> Tensor:
        g = super().encode(target, channels)
        return g if self.regions is None else torch.where(g.cumsum(1) > 1, 0.0, g)


@caught_by("24", **REGIONS)
class LargestLabelInNoRegion(Textbook):
    """The table of labels ends one too early, and the largest is background."""

    def encode(self, target: Tensor, channels: int) -> Tensor:
        return torch.where(target == self.known - 1, 0.0, super().encode(target, channels))


@caught_by("31a", **REGIONS)
class UnknownLabelsInNoRegion(Textbook):
    """A label beyond the largest of the regions is background, without an error."""

    def check_target(self, target: Tensor, channels: int) -> None:
        if self.regions is None:
            super().check_target(target, channels)


# Maps.


@caught_by("24", **SKELETON)
class PrecisionOfTheSkeleton(TextbookOfMap):
    """Σps is divided by Σp, in the place of Σs."""

    def fraction(self, i: Tensor, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return i, p


@caught_by("24", **SOFTMAX, map="distance")
class DistanceWithoutSign(TextbookOfMap):
    """|φ| for φ: inside, the prediction costs what it costs outside."""

    def distance(self, signed: Tensor) -> Tensor:
        return signed.abs()


@caught_by("24", **IGNORING, map="distance")
class DistanceOverIgnoredVoxels(TextbookOfMap):
    """Σφp is divided by all voxels, those included that do not count."""

    def of_distance(self, input: Tensor, labels: Tensor, distance: Tensor) -> Tensor:
        self.every = input[0, 0].numel()
        return super().of_distance(input, labels, distance)

    def mean_of(self, sums: Tensor, voxels: Tensor) -> Tensor:
        return sums / self.every


@caught_by("24", **SOFTMAX, map="nearest")
class NothingWithoutLesions(TextbookOfMap):
    """A sample without lesions, whose voxels are all of number 0, costs nothing."""

    def cells(self, numbers: Tensor) -> list[Tensor]:
        return super().cells(numbers) if numbers.any() else []


@caught_by("24", **SOFTMAX, map="components")
class FirstComponentLeftOut(TextbookOfMap):
    """Components are counted from 0, so that the first one is in none."""

    def cells(self, numbers: Tensor) -> list[Tensor]:
        return super().cells((numbers - 1).clamp(min=0))


@caught_by("31a", **SOFTMAX)
class LabelsClipped(Textbook):
    """Labels of C and above count as C − 1, without an error."""

    def check_target(self, target: Tensor, channels: int) -> None:
        pass

    def encode(self, target: Tensor, channels: int) -> Tensor:
        return super().encode(target.clamp(0, channels - 1), channels)


@caught_by("31b", **SOFTMAX)
class Broadcasting(Textbook):
    """One sample may meet a target of two."""

    def check_shapes(self, input: Tensor, target: Tensor) -> None:
        super().check_shapes(input, target[: len(input)])


@caught_by("31c")
class LogitsAccepted(Textbook):
    """Whatever comes is taken for a probability."""

    def check_prediction(self, input: Tensor, target: Tensor) -> None:
        pass


@caught_by("31d", **SOFTMAX)
class AnythingGoes(Textbook):
    """Arguments are not looked at."""

    def check_arguments(self) -> None:
        pass


class SingleInside(Textbook):
    """Float32 inside, also for float64: a correct loss, as nearly all that are written for mixed precision."""

    def precise(self, input: Tensor) -> Tensor:
        return input.float()


def _right(loss: type[Textbook]) -> type[Textbook]:
    """What a mutant is made of."""
    return next(kind for kind in (TextbookCompound, TextbookOfMap, Textbook) if issubclass(loss, kind))


def _controls() -> list[Specimen]:
    """The textbook with the arguments of each mutant, and the correct losses that some are made of."""
    each = [Specimen(_right(mutant.loss), mutant.kwargs) for mutant in MUTANTS]
    each += [
        Specimen(SingleInside, SOFTMAX),
        Specimen(AcrossProcesses, BATCH),
        Specimen(OwnOperator, SOFTMAX),
        Specimen(Masked, SOFTMAX),
    ]
    return [control for k, control in enumerate(each) if control not in each[:k]]


CONTROLS = _controls()
