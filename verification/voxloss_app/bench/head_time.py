"""The time of a head and a loss, forward and backward, from features to the gradients of features and weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import voxloss
from voxloss_app.bench.cases import SMOOTH, BenchCase, label_map
from voxloss_app.bench.contenders import Loss, Unavailable, first_line
from voxloss_app.bench.exact import exact
from voxloss_app.bench.machine import available_memory
from voxloss_app.bench.memory import allocated_peak
from voxloss_app.bench.results import Measurement, State
from voxloss_app.bench.timing import Spread, interleaved, ratios, seconds, spread
from voxloss_verify.tolerances import GRADIENT, LOSS

CLASSES, FEATURES, EDGE, ROUNDS = (2, 5, 14, 42, 118), 32, 96, 9
DICE_CE, CROSS_ENTROPY = "Dice + cross entropy", "cross entropy"
# Cross entropy alone is compared with torch's where there is most to save.
FEWEST_FOR_CROSS_ENTROPY = 100
# Times of the float32 logits that a case takes at most: the exact gradient is in float64, and so are its logits.
_PEAK = 12


@dataclass(frozen=True)
class HeadCase:
    """A convolution 1×1×1 and a loss: float32, B = 1, int64 labels.

    Attributes:
        loss: `DICE_CE` or `CROSS_ENTROPY`.
        channels: C, the classes.
        features: F.
        edge: of the volume.
    """

    loss: str
    channels: int
    features: int = FEATURES
    edge: int = EDGE

    @property
    def logit_bytes(self) -> int:
        """Of the logits."""
        return 4 * self.channels * self.edge**3


@dataclass(frozen=True)
class HeadMeasurement(Measurement):
    """A contender in a case; `gradient_error` is of the gradient by the features.

    Attributes:
        weight_error: of those by weight and bias; torch's convolution adds them up over all voxels in float32.
    """

    weight_error: float | None = None


@dataclass(frozen=True)
class HeadTimes:
    """A case and its contenders, by their titles."""

    case: HeadCase
    contenders: Mapping[str, HeadMeasurement]

    def ratio(self, name: str, to: str) -> Spread | None:
        """How many times as long as another it took, within each round."""
        times = [self.contenders[each].times if each in self.contenders else () for each in (name, to)]
        return ratios(*times) if all(times) else None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def from_json(content: dict[str, Any]) -> HeadTimes:
    """What `to_json` made it of."""
    contenders = {name: HeadMeasurement(**found) for name, found in content["contenders"].items()}
    return HeadTimes(HeadCase(**content["case"]), contenders)


class Volumes(NamedTuple):
    """Features, which require a gradient, the labels, and a convolution."""

    features: Tensor
    labels: Tensor
    convolution: nn.Conv3d

    def to(self, dtype: torch.dtype, layout: torch.memory_format) -> Volumes:
        """A copy."""
        features = self.features.detach().to(dtype, memory_format=layout, copy=True).requires_grad_()
        return Volumes(features, self.labels, copy.deepcopy(self.convolution).to(dtype))

    def gradients(self) -> list[Tensor | None]:
        """By features, weight and bias."""
        return [each.grad for each in self.leaves()]

    def leaves(self) -> list[Tensor]:
        """Features, weight and bias."""
        return [self.features, *self.convolution.parameters()]


Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute it.

    Attributes:
        prepare: makes the step of some volumes.
        losses: what it computes.
        channels_last: layout of the features.
        dtype: of everything.
        beside: whose times its own are compared with.
        fuses: its gradients by weight and bias have to be right as well, as it adds them up itself.
    """

    prepare: Callable[[HeadCase, Volumes], Step]
    losses: Sequence[str] = (DICE_CE, CROSS_ENTROPY)
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    beside: str = ""
    fuses: bool = False


def _step(head: nn.Module, loss: Loss, volumes: Volumes) -> Step:
    def step() -> Tensor:
        value = loss(head(volumes.features), volumes.labels)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    return step


def _our_loss(case: HeadCase) -> Loss:
    kind = voxloss.DiceCELoss if case.loss == DICE_CE else voxloss.CrossEntropyLoss
    return kind(softmax=True, to_onehot_y=True)


def _unfused(case: HeadCase, volumes: Volumes) -> Step:
    return _step(volumes.convolution, _our_loss(case), volumes)


def _fused(case: HeadCase, volumes: Volumes) -> Step:
    head = voxloss.fuse_head(nn.Sequential(volumes.convolution), always=True)
    return _step(head, _our_loss(case), volumes)


def _monai(case: HeadCase, volumes: Volumes) -> Step:
    options = {"smooth_nr": SMOOTH, "smooth_dr": SMOOTH, "softmax": True, "to_onehot_y": True}
    return _step(volumes.convolution, import_module("monai.losses").DiceCELoss(**options), volumes)


def _torch(case: HeadCase, volumes: Volumes) -> Step:
    return _step(volumes.convolution, lambda logits, labels: F.cross_entropy(logits, labels[:, 0]), volumes)


def _chunked(case: HeadCase, volumes: Volumes) -> Step:
    """torch's takes voxels as rows: of features that lie so in memory it copies nothing."""
    cross_entropy: Any = getattr(F, "linear_cross_entropy", None)
    if cross_entropy is None:
        raise Unavailable("needs torch 2.13")
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined,unused-ignore]
    features, labels, convolution = volumes

    def step() -> Tensor:
        rows, weight = features.movedim(1, -1).flatten(0, -2), convolution.weight.flatten(1)
        value = cross_entropy(rows, weight, labels.flatten(), linear_bias=convolution.bias, options=options)
        value.backward()
        found: Tensor = value.detach()
        return found

    return step


FUSED, FUSED_LAST = "fused", "fused, channels last"
UNFUSED, MONAI = "convolution + voxloss", "convolution + MONAI"
CONTENDERS: dict[str, Contender] = {
    MONAI: Contender(_monai, [DICE_CE], beside=FUSED),
    "convolution + torch": Contender(_torch, [CROSS_ENTROPY], beside=FUSED),
    UNFUSED: Contender(_unfused, beside=FUSED),
    FUSED: Contender(_fused, fuses=True),
    "convolution + voxloss, channels last": Contender(_unfused, channels_last=True, beside=FUSED_LAST),
    "torch's linear_cross_entropy, chunked, channels last": Contender(
        _chunked, [CROSS_ENTROPY], channels_last=True, beside=FUSED_LAST
    ),
    FUSED_LAST: Contender(_fused, channels_last=True, fuses=True),
    "fused, float64": Contender(_fused, dtype=torch.float64, fuses=True),
}


def cases(channels: Sequence[int] = CLASSES, features: int = FEATURES, edge: int = EDGE) -> list[HeadCase]:
    """Dice + cross entropy of any number of classes; cross entropy alone of many."""
    many = [each for each in channels if each >= FEWEST_FOR_CROSS_ENTROPY]
    return [
        HeadCase(loss, each, features, edge)
        for loss, numbers in ((DICE_CE, channels), (CROSS_ENTROPY, many))
        for each in numbers
    ]


def measure(case: HeadCase, rounds: int, seed: int) -> HeadTimes:
    """Compare every contender with float64, then time those that are right and float32, in turns."""
    if _PEAK * case.logit_bytes > available_memory("cpu"):
        why = f"needs about {_PEAK * case.logit_bytes / 2**30:.1f} GiB"
        return HeadTimes(case, {"all": HeadMeasurement(State.skipped.value, why)})
    volumes = _volumes(case, seed)
    reference = _exact(case, volumes)
    found: dict[str, HeadMeasurement] = {}
    runs: dict[str, Callable[[], float]] = {}
    for name, contender in CONTENDERS.items():
        if case.loss not in contender.losses:
            continue
        layout = torch.channels_last_3d if contender.channels_last else torch.contiguous_format
        given = volumes.to(contender.dtype, layout)
        try:
            step = contender.prepare(case, given)
            found[name] = _examined(contender, step, given, reference)
        except Unavailable as error:
            found[name] = HeadMeasurement(State.skipped.value, str(error))
            continue
        except Exception as error:
            found[name] = HeadMeasurement(State.failed.value, first_line(error))
            continue
        if found[name].state == State.measured.value and contender.dtype == torch.float32:
            found[name] = replace(found[name], peak=allocated_peak(partial(_fresh, step, given), "cpu"))
            runs[name] = partial(_timed, step, given)
    times = interleaved(runs, rounds, seed)
    return HeadTimes(case, {name: replace(each, times=times.get(name, ())) for name, each in found.items()})


def _volumes(case: HeadCase, seed: int) -> Volumes:
    chance = torch.Generator().manual_seed(seed)
    like = BenchCase("dice_ce", "softmax", case.channels, case.edge, batch=1)
    labels = label_map(like, chance)
    features = torch.randn((1, case.features, *[case.edge] * 3), generator=chance)
    convolution = nn.Conv3d(case.features, case.channels, 1)
    for parameter in convolution.parameters():
        nn.init.normal_(parameter, std=case.features**-0.5, generator=chance)
    return Volumes(features, labels, convolution)


class _Exact(NamedTuple):
    value: float
    gradients: list[Tensor]


def _exact(case: HeadCase, volumes: Volumes) -> _Exact:
    """The convolution in float64, then the textbook formulas of `exact`, or torch's cross entropy."""
    given = volumes.to(torch.float64, torch.contiguous_format)
    logits = given.convolution(given.features)
    if case.loss == DICE_CE:
        like = BenchCase("dice_ce", "softmax", case.channels, case.edge, batch=1, dtype="float64")
        found = exact(like, logits, given.labels)
        logits.backward(found.gradient)
        value = found.value
    else:
        loss = F.cross_entropy(logits, given.labels[:, 0])
        loss.backward()  # type: ignore[no-untyped-call]
        value = loss.item()
    return _Exact(value, [each for each in given.gradients() if each is not None])


def _examined(contender: Contender, step: Step, given: Volumes, reference: _Exact) -> HeadMeasurement:
    """Distances from the exact ones: of a value above 1 relative to it, of gradients to their largest element."""
    dtype = str(contender.dtype).removeprefix("torch.")
    value = abs(_fresh(step, given).item() - reference.value) / max(1.0, abs(reference.value))
    by_features, *others = (
        float("inf") if found is None else float((found.double() - wanted).abs().max() / wanted.abs().max())
        for found, wanted in zip(given.gradients(), reference.gradients, strict=True)
    )
    by_weights = float(torch.tensor(others).max())  # NaN is the largest
    bounds = [("value", value, LOSS[dtype]), ("gradient", by_features, GRADIENT[dtype])]
    bounds += [("gradient by weights", by_weights, GRADIENT[dtype])] if contender.fuses else []
    wrong = [
        f"{what} off by {off:.2e}, {off / most:.4g} × the tolerance"
        for what, off, most in bounds
        if not off <= most
    ]
    state = State.wrong if wrong else State.measured
    return HeadMeasurement(
        state.value,
        ", ".join(wrong),
        value_error=value,
        gradient_error=by_features,
        weight_error=by_weights,
    )


def _fresh(step: Step, given: Volumes) -> Tensor:
    _forget(given)
    return step()


def _forget(given: Volumes) -> None:
    for leaf in given.leaves():
        leaf.grad = None


def _timed(step: Step, given: Volumes) -> float:
    _forget(given)  # memory is given back before the clock starts
    return seconds(step, "cpu")


def milliseconds(found: HeadMeasurement) -> Spread | None:
    """Median and quartiles."""
    return spread([1000 * each for each in found.times]) if found.times else None
