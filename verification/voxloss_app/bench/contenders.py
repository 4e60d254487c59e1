"""Who competes: losses made to compute the same thing, and yardsticks beside them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import voxloss
from voxloss.backends.voxels import PassSpec
from voxloss_app.bench import in_cache, plain
from voxloss_app.bench.cases import ALPHA, BETA, GAMMA, SMOOTH, BenchCase

Loss = Callable[[Tensor, Tensor], Tensor]
# One forward and backward pass: leaves the gradient in input.grad and returns the value.
Step = Callable[[Tensor, Tensor], Tensor]
OURS, FLOOR, COPY, IN_CACHE = "voxloss", "floor", "copy", "in_cache"


class Unavailable(Exception):
    """A contender that cannot compete here, and why."""


@dataclass(frozen=True)
class Prepared:
    """A contender that is ready to run; `first_call` in seconds if it has already run for the first time."""

    step: Step
    note: str = ""
    first_call: float | None = None


@dataclass(frozen=True)
class Contender:
    """Who competes.

    Attributes:
        name: in the results.
        title: on the page.
        prepare: makes it ready for a case and its tensors.
        peak: how many times the logits' size it takes, as an estimate to skip what would not fit.
        applies: whether it has such a loss at all.
        is_loss: False for yardsticks, which compute something else and are compared with nothing.
        packages: whose versions its figures are of, by the names of `machine.versions`.
        compiles: whether torch.compile is involved.
    """

    name: str
    title: str
    prepare: Callable[[BenchCase, Tensor, Tensor], Prepared]
    peak: Callable[[BenchCase], float]
    applies: Callable[[BenchCase], bool] = lambda case: True
    is_loss: bool = True
    packages: tuple[str, ...] = ()
    compiles: bool = False

    def titled(self, versions: Mapping[str, str | None]) -> str:
        """Its title with the versions of its packages: "MONAI 1.6.1, compiled (torch 2.13.0)"."""
        title, others = self.title, []
        for package in self.packages:
            named = f"{package} {versions[package]}" if versions.get(package) else package
            if package in title:
                title = title.replace(package, named)
            elif named != package:
                others.append(named)
        return f"{title} ({', '.join(others)})" if others else title


def training_step(case: BenchCase, loss: Loss, shift: float = 0.0) -> Step:
    """Forward and backward of loss + shift; half-precision logits come from autocast, so the loss is under it."""

    def step(input: Tensor, target: Tensor) -> Tensor:
        half = case.dtype in ("float16", "bfloat16")
        with torch.autocast(case.device, case.torch_dtype if half else None, enabled=half):
            value = loss(input, target)
        value.backward(torch.full_like(value, case.loss_scale))  # type: ignore[no-untyped-call]
        return value.detach().double() + shift

    return step


# Ours.


def _options(case: BenchCase) -> dict[str, Any]:
    return {case.activation: True, "to_onehot_y": not case.one_hot}


def our_loss(case: BenchCase, backend: str | None) -> voxloss.StatisticsLoss:
    """The loss of a case as voxloss computes it."""
    options = {**_options(case), "backend": backend}
    if case.family == "dice_ce":
        return voxloss.DiceCELoss(**options)
    if case.family == "dice_focal":
        return voxloss.DiceFocalLoss(**options, gamma=GAMMA)
    if case.family == "tversky":
        return voxloss.TverskyLoss(**options, alpha=ALPHA, beta=BETA)
    return voxloss.DiceLoss(**options)


def _voxloss(backend: str | None) -> Callable[[BenchCase, Tensor, Tensor], Prepared]:
    return lambda case, input, target: Prepared(training_step(case, our_loss(case, backend)))


# Others.


def _monai_loss(case: BenchCase) -> Loss:
    losses = import_module("monai.losses")
    names = {
        "dice": "DiceLoss",
        "tversky": "TverskyLoss",
        "dice_ce": "DiceCELoss",
        "dice_focal": "DiceFocalLoss",
    }
    own = {"tversky": {"alpha": ALPHA, "beta": BETA}, "dice_focal": {"gamma": GAMMA}}.get(case.family, {})
    loss: Loss = getattr(losses, names[case.family])(**_options(case), smooth_nr=SMOOTH, smooth_dr=SMOOTH, **own)
    return loss


def _monai(case: BenchCase, input: Tensor, target: Tensor) -> Prepared:
    return Prepared(training_step(case, _monai_loss(case)))


def _monai_compiled(case: BenchCase, input: Tensor, target: Tensor) -> Prepared:
    """One graph if possible, else several, with a note of the reason."""
    loss = _monai_loss(case)
    try:
        return _compiled(case, loss, input, target, fullgraph=True)
    except Exception as error:
        reason = first_line(error)
    counters = import_module("torch._dynamo.utils").counters
    torch._dynamo.reset()
    counters.clear()
    ready = _compiled(case, loss, input, target, fullgraph=False)
    breaks = sum(counters["graph_break"].values())
    note = f"fullgraph=True: {reason}; graph breaks without it: {breaks}"
    return Prepared(ready.step, note, ready.first_call)


def _plain_compiled(case: BenchCase, input: Tensor, target: Tensor) -> Prepared:
    """The fastest formulation of `plain`, by the better of two calls each after the first."""
    best, fastest = None, math.inf
    for name, loss in plain.formulations(case).items():
        ready = _compiled(case, loss, input, target, fullgraph=True)
        seconds = min(_time(ready.step, input, target) for _ in range(2))
        if seconds < fastest:
            best, fastest = Prepared(ready.step, name, ready.first_call), seconds
    assert best is not None
    return best


def _compiled(case: BenchCase, loss: Loss, input: Tensor, target: Tensor, fullgraph: bool) -> Prepared:
    step = training_step(case, torch.compile(loss, fullgraph=fullgraph, dynamic=False))
    return Prepared(step, first_call=_time(step, input, target))


def _time(step: Step, input: Tensor, target: Tensor) -> float:
    input.grad = None
    start = time.perf_counter()
    step(input, target).item()
    return time.perf_counter() - start


def _nnunet(dice: str) -> Callable[[BenchCase, Tensor, Tensor], Prepared]:
    def prepare(case: BenchCase, input: Tensor, target: Tensor) -> Prepared:
        try:
            losses = import_module("nnunetv2.training.loss.dice")
            compounds = import_module("nnunetv2.training.loss.compound_losses")
            softmax = import_module("nnunetv2.utilities.helpers").softmax_helper_dim1
        except ImportError:
            raise Unavailable("not installed") from None
        options = {"batch_dice": False, "do_bg": True, "smooth": SMOOTH, "ddp": False}
        kind = getattr(losses, dice)
        if case.family == "dice_ce":
            loss = compounds.DC_and_CE_loss(options, {}, dice_class=kind)
        else:
            loss = kind(apply_nonlin=softmax if case.activation == "softmax" else torch.sigmoid, **options)
        return Prepared(training_step(case, loss, shift=1.0))  # its Dice loss is −Dice

    return prepare


def _has_nnunet(case: BenchCase) -> bool:
    return case.family == "dice" or (case.family == "dice_ce" and not case.one_hot)


# Yardsticks.


def _cross_entropy(case: BenchCase, input: Tensor, target: Tensor) -> Prepared:
    def loss(input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(input, target if case.one_hot else target[:, 0].long())

    return Prepared(training_step(case, loss))


FLOOR_READS = "logits and target"  # runs of earlier versions: the logits alone


def _floor(case: BenchCase, input: Tensor, target: Tensor) -> Prepared:
    """The traffic of any such loss: read both volumes, and again while as much as the logits is written."""

    def step(input: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            total = input.sum() + _read(target)
            input.grad = input.clone(memory_format=torch.preserve_format)
            return total + _read(target)

    return Prepared(step)


def _read(target: Tensor) -> Tensor:
    """Read a target as fast as torch can, which is as wide integers: a sum of bytes is several times slower."""
    flat = target.reshape(-1)
    whole = flat.nbytes // 8 * 8 // flat.itemsize
    return flat[:whole].view(torch.int64).sum()


def _in_cache(case: BenchCase, input: Tensor, target: Tensor) -> Prepared:
    why_not = in_cache.why_not(case)
    if why_not:
        raise Unavailable(why_not)
    loss = our_loss(case, None)
    spec = PassSpec(
        case.activation, loss.needs(binary=case.activation == "sigmoid"), None, loss.pass_gamma or 0.0
    )
    run = in_cache.arithmetic(input, target, spec)

    def step(input: Tensor, target: Tensor) -> Tensor:
        run()
        return torch.zeros(())

    return Prepared(step)


_COPIED = 1 << 30


def _copy(case: BenchCase, input: Tensor, target: Tensor) -> Prepared:
    """Copy a large tensor; `copied_share` is the fraction of its time that the floor's bytes would take."""
    source = torch.ones(_COPIED // 4, device=input.device)
    sink = torch.empty_like(source)

    def step(input: Tensor, target: Tensor) -> Tensor:
        return sink.copy_(source)[0]

    return Prepared(step)


def copied_share(case: BenchCase) -> float:
    """The floor's bytes in terms of the bytes that the copy reads and writes."""
    return case.floor_bytes / (2 * _COPIED)


_MONAI_PEAK = {"dice": 3.5, "tversky": 5.5, "dice_ce": 5.5, "dice_focal": 11.5}


def _monai_peak(case: BenchCase) -> float:
    return _MONAI_PEAK[case.family] * (4 / case.torch_dtype.itemsize)


CONTENDERS = (
    Contender(OURS, "voxloss", _voxloss(None), lambda case: 1.1, packages=("voxloss",)),
    Contender("eager", "voxloss, eager", _voxloss("eager"), lambda case: 1.5, packages=("voxloss",)),
    Contender("monai", "MONAI", _monai, _monai_peak, packages=("MONAI",)),
    Contender(
        "monai_compiled",
        "MONAI, compiled",
        _monai_compiled,
        _monai_peak,
        packages=("MONAI", "torch"),
        compiles=True,
    ),
    Contender(
        "plain_compiled",
        "plain torch, compiled",
        _plain_compiled,
        lambda case: 4.0,
        packages=("torch",),
        compiles=True,
    ),
    Contender("nnunet", "nnU-Net", _nnunet("SoftDiceLoss"), lambda case: 8.0, _has_nnunet, packages=("nnU-Net",)),
    Contender(
        "nnunet_efficient",
        "nnU-Net, memory-efficient",
        _nnunet("MemoryEfficientSoftDiceLoss"),
        lambda case: 7.0,
        _has_nnunet,
        packages=("nnU-Net",),
    ),
    Contender(
        "cross_entropy",
        "cross entropy alone",
        _cross_entropy,
        lambda case: 3.0,
        is_loss=False,
        packages=("torch",),
    ),
    Contender(FLOOR, "floor", _floor, lambda case: 1.0, is_loss=False),
    Contender(
        IN_CACHE,
        "voxloss's arithmetic in cache",
        _in_cache,
        lambda case: 0.1,
        lambda case: case.device == "cpu",
        is_loss=False,
    ),
    Contender(
        COPY,
        "floor at copy bandwidth",
        _copy,
        lambda case: 2 * _COPIED / case.logit_bytes,
        lambda case: case.device == "cuda",
        is_loss=False,
    ),
)
# Whose values are compared with the exact one at several sizes.
COMPARED = (OURS, "eager", "monai")


def contenders_for(case: BenchCase, compile: bool = True) -> list[Contender]:
    """Who competes in a case."""
    return [
        contender
        for contender in CONTENDERS
        if contender.applies(case)
        and (contender.name in COMPARED if not case.timed else compile or not contender.compiles)
    ]


def first_line(error: BaseException) -> str:
    """The first informative line of an error, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
