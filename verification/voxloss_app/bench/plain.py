"""The best that was found in plain torch under torch.compile: what one gets without a kernel of one's own.

No one-hot target in memory: the comparison of labels with classes is fused into the sums. DiceCE takes
log_softmax once, for the probabilities and the cross entropy. Three formulations, the fastest on the case at hand
competes:

* `at_once`: softmax or sigmoid over the volume, autograd through it;
* `recomputed`: a backward pass written by hand, which computes the probabilities again instead of reading them
  back, as voxloss does; faster than `at_once` for Dice with many classes on a CPU;
* `unrolled`: a Python loop over the classes, faster on a CPU with few of them.

Tried and slower on a CPU: gather and scatter_add of the labelled probabilities, a one-hot
target by scatter_, exp(z − logsumexp) in the place of softmax, labels as int32 or
float32, `at_once` under torch.utils.checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from voxloss_app.bench.cases import ALPHA, BETA, GAMMA, SMOOTH, BenchCase

Loss = Callable[[Tensor, Tensor], Tensor]
# Beyond so many classes a loop over them takes minutes to compile.
MOST_UNROLLED = 8


def formulations(case: BenchCase) -> dict[str, Loss]:
    """The formulations that make sense for a case, by name."""
    found: dict[str, Loss] = {"at_once": partial(at_once, case), "recomputed": partial(recomputed, case)}
    if case.channels <= MOST_UNROLLED and case.activation == "softmax":
        found["unrolled"] = partial(unrolled, case)
    return found


def at_once(case: BenchCase, input: Tensor, target: Tensor) -> Tensor:
    """The whole volume, autograd does the rest."""
    return _formula(case, _sums(case, input, target), input)


def recomputed(case: BenchCase, input: Tensor, target: Tensor) -> Tensor:
    """As `at_once`, with nothing saved for the backward pass but the inputs."""
    sums: Tensor = _Recomputed.apply(input, target, case)  # type: ignore[no-untyped-call]
    return _formula(case, sums, input)


class _Recomputed(torch.autograd.Function):
    """`_sums` with its derivative written by hand."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, case: BenchCase) -> Tensor:
        ctx.case = case
        ctx.save_for_backward(input, target)
        return _sums(case, input, target)

    @staticmethod
    def backward(ctx: Any, by_sums: Tensor) -> tuple[Tensor, None, None]:
        return _by_input(ctx.case, by_sums, *ctx.saved_tensors), None, None


def unrolled(case: BenchCase, input: Tensor, target: Tensor) -> Tensor:
    """Class by class, for softmax."""
    logits = input.flatten(3).float().unbind(1)
    top = logits[0]
    for z in logits[1:]:
        top = torch.maximum(top, z)
    log_total = torch.stack([(z - top).exp() for z in logits]).sum(0).log() + top
    rows = []
    for channel, z in enumerate(logits):
        log_p = z - log_total
        p = log_p.exp()
        y = target.flatten(3)
        g = y[:, channel] if case.one_hot else (y[:, 0] == channel).to(p.dtype)
        own = -g * log_p if case.family == "dice_ce" else torch.zeros_like(p)
        rows.append(_add_up(p, g, own))
    return _formula(case, torch.stack(rows, -1), input)


def _sums(case: BenchCase, input: Tensor, target: Tensor) -> Tensor:
    """Σp·g, Σp, Σg and the family's own sum, `[4, B, C]`."""
    z, g = _dense(case, input, target)
    if case.family == "dice_ce":
        log_p = z.log_softmax(1)
        p, own = log_p.exp(), -g * log_p
    else:
        p = z.softmax(1) if case.activation == "softmax" else z.sigmoid()
        own = _miss(p, g) ** GAMMA * _surprise(z, g) if case.family == "dice_focal" else torch.zeros_like(p)
    return _add_up(p, g, own)


def _add_up(p: Tensor, g: Tensor, own: Tensor) -> Tensor:
    """In two stages: the compiler's sum of a whole volume in float32 is off by more than the tolerance."""
    return torch.stack([term.sum(-1).sum(-1) for term in (p * g, p, g, own)])


def _by_input(case: BenchCase, by_sums: Tensor, input: Tensor, target: Tensor) -> Tensor:
    z, g = _dense(case, input, target)
    by_overlap, by_prediction, _, by_own = by_sums[..., None, None]
    q = by_overlap * g + by_prediction
    if case.activation == "softmax":
        p = z.softmax(1)
        derivative = p * (q - (p * q).sum(1, keepdim=True))
        if case.family == "dice_ce":
            derivative = derivative + p * (by_own * g).sum(1, keepdim=True) - by_own * g
    else:
        p = z.sigmoid()
        derivative = p * (1 - p) * q
        if case.family == "dice_focal":
            miss, surprise = _miss(p, g), _surprise(z, g)
            by_miss = GAMMA * miss ** (GAMMA - 1) * (1 - 2 * g) * p * (1 - p)
            derivative = derivative + by_own * (by_miss * surprise + miss**GAMMA * (p - g))
    gradient: Tensor = derivative.to(input.dtype).view_as(input)
    return gradient


def _dense(case: BenchCase, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    z, y = input.flatten(3).float(), target.flatten(3)
    classes = torch.arange(case.channels, device=z.device)[:, None, None]
    return z, y if case.one_hot else (y == classes).to(z.dtype)


def _miss(p: Tensor, g: Tensor) -> Tensor:
    """1 − p where g is 1, p where it is 0."""
    return p + g - 2 * p * g


def _surprise(z: Tensor, g: Tensor) -> Tensor:
    """Binary cross entropy of logits."""
    return F.softplus(z) - g * z


def _formula(case: BenchCase, sums: Tensor, input: Tensor) -> Tensor:
    overlap, prediction, target, own = sums
    if case.family == "tversky":
        size = (1 - ALPHA - BETA) * overlap + ALPHA * prediction + BETA * target
        loss = 1 - (overlap + SMOOTH) / (size + SMOOTH)
    else:
        loss = 1 - (2 * overlap + SMOOTH) / (prediction + target + SMOOTH)
    terms = input.numel() if case.family == "dice_focal" else input.numel() // case.channels
    value: Tensor = loss.mean() + own.sum() / terms  # Σ own is 0 where the family has none
    return value
