"""Softmax or sigmoid against a label map without a mask, on a CPU: the sums and derivatives of `voxels`, faster.

Most networks are trained with such a pair. Plain torch operations spend most of their time there on newly
allocated memory, on integer comparisons and on logarithms that are multiplied by 0. Here a block of voxels stays
in the cache, every operation writes into memory that is allocated once per pass, labels are compared as
floating-point numbers, for which torch has vector instructions, and a sigmoid needs one logarithm instead of two:

    u = z·(1 − 2g),   s = σ(u),   ℓ = softplus(u) = −log(1 − s)

s is the probability of the wrong class and ℓ the cross entropy (−log p where g = 1, −log n where g = 0). The
focal term is s^γ·ℓ, its derivative by u is s^γ·(s + γ·(1 − s)·ℓ). As g is 0 or 1, min(p, g) = p·g.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from voxloss.backends import voxels
from voxloss.backends.voxels import PassSpec

# exp(z) of such logits needs no maximum subtracted: it is a normal float32 number, and so is their sum.
_SAFE = 64.0

_OF_P = {
    "intersection",
    "soft_intersection",
    "prediction",
    "prediction_squared",
    "false_positives",
    "false_negatives",
}
_OF_G = {"target", "target_squared"}
_FOCAL = {"focal", "focal_negative"}
_OF_LOGS = {"cross_entropy", "cross_entropy_negative"} | _FOCAL
SUMS = _OF_P | _OF_G | _OF_LOGS | {"voxels"}


def takes(input: Tensor, target: Tensor, mask: Tensor | None, spec: PassSpec, *result: Tensor) -> bool:
    """Whether the functions below compute such a pass."""
    is_map = target.shape[1] != input.shape[1] and not spec.regions
    every_voxel = mask is None and spec.ignore_index is None
    known = spec.activation in ("softmax", "sigmoid") and SUMS.issuperset(spec.sums)
    on_cpu = input.device.type == "cpu" and input.numel() > 0
    return on_cpu and is_map and every_voxel and known and _lines(input, target, *result) is not None


def _lines(*tensors: Tensor) -> list[Tensor] | None:
    """View each as `[B, channels, N]`, or return None if one would have to be copied, as a crop would."""
    order = sorted(range(2, tensors[0].ndim), key=tensors[0].stride, reverse=True)
    try:
        return [tensor.permute(0, 1, *order).view(*tensor.shape[:2], -1) for tensor in tensors]
    except RuntimeError:
        return None


class _Blocks:
    """Blocks of at most `most` elements, and memory that is allocated once for all of them."""

    def __init__(self, most: int, input: Tensor, target: Tensor, *others: Tensor) -> None:
        self.dtype = torch.promote_types(input.dtype, torch.float32)
        lines = _lines(input, target, *others)
        assert lines is not None
        self.lines = lines
        items, channels, size = lines[0].shape
        step = min(size, max(1, most // (items * channels)))
        # Channels that start a power of two apart would compete for the same lines of the cache.
        self.step = step // 32 * 32 - 16 if step >= 64 else step
        self.classes = torch.arange(channels, dtype=self.dtype).view(1, -1, 1)
        self.count = -(-size // self.step)
        self._held: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(torch.split(tensor, self.step, 2) for tensor in self.lines), strict=True)

    def memory(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return contiguous uninitialised memory, the same for the same name; the first block is the largest."""
        size = prod(shape)
        if name not in self._held:
            self._held[name] = torch.empty(size, dtype=self.dtype)
        return self._held[name][:size].view(shape)

    def logits(self, input: Tensor) -> Tensor:
        limits = -voxels.LARGEST_LOGIT, voxels.LARGEST_LOGIT
        z = self.memory("z", input.shape)
        return torch.clamp(input, *limits, out=z) if input.dtype == z.dtype else z.copy_(input).clamp_(*limits)

    def labels(self, target: Tensor) -> Tensor:
        """The labels as floating-point numbers; those that are rounded are larger than any class."""
        whole = voxels.whole_labels(target) if target.is_floating_point() else target
        return self.memory("labels", target.shape).copy_(whole)

    def one_hot(self, labels: Tensor) -> Tensor:
        items, _, size = labels.shape
        return torch.eq(labels, self.classes, out=self.memory("g", (items, self.classes.numel(), size)))

    def over_classes(self, q: Tensor) -> Tensor:
        total = self.memory("total", (q.shape[0], 1, q.shape[2]))
        if q.shape[1] == 2:
            return torch.add(q[:, :1], q[:, 1:], out=total)
        return torch.sum(q, 1, keepdim=True, out=total)

    def softmax(self, input: Tensor, p: Tensor) -> Tensor:
        """Write the softmax to `p`, which may share the input's memory, and return it."""
        lowest, highest = input.aminmax()
        if input.shape[1] == 2 and lowest > -voxels.LARGEST_LOGIT and highest < voxels.LARGEST_LOGIT:
            p.copy_(input)
            p[:, 0].sub_(p[:, 1])  # no maximum and no sum
            torch.neg(p[:, 0], out=p[:, 1])
            return p.sigmoid_()
        if not (lowest > -_SAFE and highest < _SAFE):
            return self.softmax_and_log(input, p)[0]
        torch.exp(input, out=p) if input.dtype == p.dtype else p.copy_(input).exp_()
        return p.div_(self.over_classes(p))

    def softmax_and_log(self, input: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Write the softmax to `p`, which may share the input's memory; return it and −log p."""
        z = self.logits(input)
        z.sub_(torch.amax(z, 1, keepdim=True, out=self.memory("total", (z.shape[0], 1, z.shape[2]))))
        total = self.over_classes(torch.exp(z, out=p))
        p.div_(total)
        return p, z.sub_(total.log_()).neg_()

    def binary(self, z: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return p, s and ℓ."""
        s, loss, p = (self.memory(name, z.shape) for name in ("s", "loss", "p"))
        smaller = torch.abs(z, out=self.memory("smaller", z.shape)).neg_().sigmoid_()
        larger = torch.sub(1, smaller, out=self.memory("larger", z.shape))
        torch.div(smaller, larger, out=loss).log1p_()  # log(1 + exp(−|u|))
        positive = torch.gt(z, 0, out=self.memory("term", z.shape))
        torch.lerp(smaller, larger, positive, out=p)  # one or the other, without rounding; `where` is slower
        u = torch.mul(g, -2, out=s).add_(1).mul_(z)
        loss.add_(torch.clamp(u, min=0, out=positive))
        torch.gt(u, 0, out=positive)
        return p, torch.lerp(smaller, larger, positive, out=s), loss


def sums(input: Tensor, target: Tensor, spec: PassSpec, most: int) -> tuple[Tensor, Tensor]:
    """Return the sums `[K, B, C]` in float64 and whether every label is a class."""
    blocks = _Blocks(most, input, target)
    partial = torch.empty((blocks.count, len(spec.sums), *input.shape[:2]), dtype=blocks.dtype)
    extremes: list[Tensor] = []
    for (z, y), rows in zip(blocks, partial.unbind(), strict=True):
        labels = blocks.labels(y)
        extremes += labels.aminmax()
        _sums(blocks, z, blocks.one_hot(labels), spec, rows)
    seen = torch.stack(extremes)
    return partial.sum(0, dtype=torch.float64), ((seen >= 0) & (seen < input.shape[1])).all()


def _sums(blocks: _Blocks, z: Tensor, g: Tensor, spec: PassSpec, rows: Tensor) -> None:
    p = loss = focal = blocks.memory("p", z.shape)  # each is computed below if a sum needs it
    with_logs, with_focal = not _OF_LOGS.isdisjoint(spec.sums), not _FOCAL.isdisjoint(spec.sums)
    if spec.activation == "softmax":
        if with_logs:
            p, loss = blocks.softmax_and_log(z, p)
        else:
            p = blocks.softmax(z, p)
        if with_focal:
            focal = torch.sub(1, p, out=blocks.memory("focal", z.shape)).pow_(spec.gamma).mul_(loss)
    else:
        if with_logs:
            p, s, loss = blocks.binary(blocks.logits(z), g)
        else:
            p = blocks.logits(z).sigmoid_()
        if with_focal:
            focal = s.pow_(spec.gamma).mul_(loss)
    for name, row in zip(spec.sums, rows.unbind(), strict=True):
        if name == "voxels":
            row.fill_(z.shape[2])
            continue
        if name == "prediction":
            of = p
        elif name in _OF_G:
            of = g
        elif name == "prediction_squared":
            of = torch.mul(p, p, out=blocks.memory("term", z.shape))
        elif name == "false_negatives":
            of = torch.sub(1, p, out=blocks.memory("term", z.shape)).mul_(g)
        else:
            whole = p if name in _OF_P else focal if name in _FOCAL else loss
            of = torch.mul(whole, g, out=blocks.memory("term", z.shape))
            if name in ("false_positives", "cross_entropy_negative", "focal_negative"):
                of = torch.sub(whole, of, out=of)  # all or nothing of it, without rounding
        torch.sum(of, -1, out=row)


def gradient(grad: Tensor, input: Tensor, target: Tensor, spec: PassSpec, result: Tensor, most: int) -> None:
    """Write ∂L/∂input, from grad = ∂L/∂sums `[K, B, C]` where no sum is a difference of others."""
    blocks = _Blocks(most, input, target, result)
    weights = dict(zip(spec.sums, grad.to(blocks.dtype).unsqueeze(-1), strict=True))
    for z, y, out in blocks:
        g = blocks.one_hot(blocks.labels(y))
        _gradient(blocks, z, g, weights, spec, out)


def _gradient(
    blocks: _Blocks, z: Tensor, g: Tensor, weights: dict[str, Tensor], spec: PassSpec, out: Tensor
) -> None:
    zero = torch.zeros_like(next(iter(weights.values())))
    outside = weights.get("prediction", zero) + weights.get("false_positives", zero)
    inside = weights.get("intersection", zero) + weights.get("soft_intersection", zero)
    inside = inside - weights.get("false_positives", zero)
    with_logs = not _OF_LOGS.isdisjoint(weights)
    by_p = torch.mul(g, inside, out=blocks.memory("by_p", z.shape) if with_logs else g).add_(outside)
    q = blocks.memory("q", z.shape)
    p = out if out.dtype == blocks.dtype else blocks.memory("p", z.shape)
    if spec.activation == "sigmoid":
        if with_logs:
            p, s, loss = blocks.binary(blocks.logits(z), g)
            binary = _binary(blocks, g, s, loss, weights, spec.gamma)
        else:
            p = blocks.logits(z).sigmoid_()
    elif "focal" in weights:
        p, loss = blocks.softmax_and_log(z, p)
    else:
        p = blocks.softmax(z, p)
    if "prediction_squared" in weights:
        by_p.add_(torch.mul(p, 2 * weights["prediction_squared"], out=q))
    if spec.activation == "sigmoid":
        by_p.mul_(p).mul_(p.neg_().add_(1))
        out.copy_(by_p.add_(binary) if with_logs else by_p)
        return
    torch.mul(by_p, p, out=q)
    if not with_logs:
        p.mul_(by_p.sub_(blocks.over_classes(q)))
    else:
        if "focal" in weights:
            n = torch.sub(1, p, out=by_p)
            ratio = loss.mul_(p).div_(n.clamp(min=torch.finfo(n.dtype).tiny))  # of 0 to 0: n^γ is 0 too
            q.sub_(ratio.mul_(spec.gamma).add_(1).mul_(n.pow_(spec.gamma)).mul_(weights["focal"]).mul_(g))
        if "cross_entropy" in weights:
            q.sub_(g.mul_(weights["cross_entropy"]))
        torch.sub(q, p.mul_(blocks.over_classes(q)), out=p)
    if p is not out:
        out.copy_(p)


def _binary(
    blocks: _Blocks, g: Tensor, s: Tensor, loss: Tensor, weights: dict[str, Tensor], gamma: float
) -> Tensor:
    """∂/∂z of the cross entropies and focal terms of a sigmoid."""
    term, zero = blocks.memory("term", g.shape), torch.zeros_like(next(iter(weights.values())))
    by_u = {}
    if not _FOCAL.isdisjoint(weights):
        derivative = loss.mul_(torch.sub(1, s, out=term)).mul_(gamma).add_(s)
        by_u["focal"] = derivative.mul_(torch.pow(s, gamma, out=term))
    if not {"cross_entropy", "cross_entropy_negative"}.isdisjoint(weights):
        by_u["cross_entropy"] = s
    total = None
    for name, derivative in by_u.items():
        inside, outside = weights.get(name, zero), weights.get(f"{name}_negative", zero)
        derivative.mul_(torch.mul(g, -inside - outside, out=term).add_(outside))  # ∂u/∂z = ±1
        total = derivative if total is None else total.add_(derivative)
    assert total is not None
    return total
