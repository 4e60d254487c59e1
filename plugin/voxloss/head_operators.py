"""The pass over the logits of a head, which are never whole, as operators of torch; see `backends.tiled`.

`voxloss::head_sums` is `voxloss::region_sums` of W f + b, and `voxloss::head_terms` is `voxloss::voxel_terms` of
it. Their derivative is an operator of its own. A second derivative needs the logits whole, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from voxloss import inputs, operators
from voxloss.backends import Backend, backend_for, tiled, voxels
from voxloss.backends.tiled import Head, HeadGradient

_ARGUMENTS = (
    "Tensor features, Tensor weight, Tensor? bias, Tensor target, Tensor? mask, Tensor? map, Tensor? partition, "
    "ScalarType dtype, str activation, str[] sums, int? ignore_index, str? backend, float gamma, int[] regions, "
    "bool map_of_label, int cells"
)
_TENSORS = 7  # the first arguments


class _Call(NamedTuple):
    """The arguments of an operator."""

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    mask: Tensor | None
    map: Tensor | None
    partition: Tensor | None
    dtype: torch.dtype
    activation: str
    sums: list[str]
    ignore_index: int | None
    backend: str | None
    gamma: float
    regions: list[int]
    map_of_label: bool
    cells: int

    @property
    def head(self) -> Head:
        return Head(self.features, self.weight, self.bias, self.dtype)

    @property
    def spec(self) -> voxels.PassSpec:
        return voxels.PassSpec(
            self.activation,
            self.sums,
            self.ignore_index,
            self.gamma,
            self.regions,
            self.map_of_label,
            self.cells,
        )

    def engine(self) -> Backend:
        """The backend that sums a tile."""
        return backend_for(self.backend, self.features.device.type, self.dtype)

    def require_spec(self) -> None:
        """Check the options."""
        labels = bool(self.regions) or self.target.shape[1] != len(self.weight)
        voxels.require_spec(self.spec, labels, self.map is not None)

    def require_valid(self, valid: Tensor) -> None:
        """Raise an error unless all voxels are, with the logits at hand only if one is not."""
        cuda = valid.device.type == "cuda"
        if cuda or not valid:
            logits = self.features if cuda else self.head.logits()
            inputs.require_valid(valid, logits, self.target, self.mask, self.spec, self.map)


@torch.library.custom_op("voxloss::head_sums", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def head_sums(*given: Any) -> Tensor:
    """Sums over the voxels of a head's logits, `[K, B, C]` or `[K, B * cells, C]`."""
    call = _Call(*given)
    call.require_spec()
    with tiled.without_autocast(call.features):
        maps = call.mask, call.map, call.partition
        sums, valid = tiled.region_sums(call.head, call.target, call.spec, call.engine(), *maps)
    call.require_valid(valid)
    return sums


@head_sums.register_fake
def _(*given: Any) -> Tensor:
    call = _Call(*given)
    wide = torch.float32 if call.features.device.type == "mps" else torch.float64
    rows = len(call.features) * max(1, call.cells)
    return call.features.new_empty((len(call.sums), rows, len(call.weight)), dtype=wide)


@torch.library.custom_op(
    "voxloss::head_terms", mutates_args=(), schema=f"(Tensor factors, {_ARGUMENTS}) -> Tensor"
)
def head_terms(factors: Tensor, *given: Any) -> Tensor:
    """What each voxel adds to Σ factor·sum, `[B, 1, spatial...]`; `factors` `[K, B, C]`, without a gradient."""
    call = _Call(*given)
    call.require_spec()
    with tiled.without_autocast(call.features):
        terms, valid = tiled.voxel_terms(factors, call.head, call.target, call.spec, call.engine(), call.mask)
    call.require_valid(valid)
    return terms


@head_terms.register_fake
def _(factors: Tensor, *given: Any) -> Tensor:
    call = _Call(*given)
    shape = len(call.features), 1, *call.features.shape[2:]
    return call.features.new_empty(shape, dtype=torch.promote_types(call.dtype, torch.float32))


@torch.library.custom_op(
    "voxloss::head_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)
def head_backward(grad: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂features, ∂L/∂weight and ∂L/∂bias from grad = ∂L/∂sums; empty where they are not `wanted`."""
    *arguments, wanted = given
    call = _Call(*arguments)
    with tiled.without_autocast(call.features):
        maps = call.mask, call.map, call.partition
        found = tiled.region_sums_backward(grad, call.head, call.target, call.spec, call.engine(), wanted, *maps)
    return _filled(found, call)


@head_backward.register_fake
def _(grad: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, wanted = given
    call = _Call(*arguments)
    like = call.features, call.weight, call.weight[:, 0].contiguous()
    return _filled(
        HeadGradient(
            *(torch.empty_like(each) if want else None for each, want in zip(like, wanted, strict=True))
        ),
        call,
    )


def _filled(found: HeadGradient, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    features, weight, bias = (call.weight.new_empty(0) if each is None else each for each in found)
    return features, weight, bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[_TENSORS:]
    ctx.save_for_backward(*inputs[:_TENSORS])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    call = _Call(*ctx.saved_tensors, *ctx.options)

    def by_logits(logits: Tensor) -> Tensor:
        others = call.target, call.mask, call.map, call.partition
        return cast(Tensor, operators.region_sums_backward(grad, logits, *others, *ctx.options[1:], "input"))

    return _gradients(ctx.needs_input_grad, grad, call, by_logits)


def _save_terms(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    factors, *others = inputs
    ctx.options = others[_TENSORS:]
    ctx.save_for_backward(factors, *others[:_TENSORS])


def _terms_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    factors, *tensors = ctx.saved_tensors
    call = _Call(*tensors, *ctx.options)

    def by_logits(logits: Tensor) -> Tensor:
        given = grad, factors, logits, call.target, call.mask, *ctx.options[1:-2], "input"
        return cast(Tensor, operators.voxel_terms_backward(*given))

    weighted = call._replace(mask=grad if call.mask is None else grad * call.mask)
    return None, *_gradients(ctx.needs_input_grad[1:], factors, weighted, by_logits)


def _gradients(
    needed: tuple[bool, ...], grad: Tensor, call: _Call, by_logits: Callable[[Tensor], Tensor]
) -> tuple[Tensor | None, ...]:
    """Those by features, weight and bias; for a second derivative through logits that are whole."""
    wanted = list(needed[:3])
    if torch.is_grad_enabled():
        tensors = call.features, call.weight, call.bias
        leaves = [each for each, want in zip(tensors, wanted, strict=True) if want and each is not None]
        with tiled.without_autocast(call.features):
            logits = call.head.logits()
            found = iter(torch.autograd.grad(logits, leaves, by_logits(logits), create_graph=True))
    else:
        each = head_backward(grad, *call, wanted)
        found = (gradient for gradient, want in zip(each, wanted, strict=True) if want)
    return *(next(found) if want else None for want in wanted), *[None] * (len(call) - 3)


head_sums.register_autograd(_backward, setup_context=_save)
head_terms.register_autograd(_terms_backward, setup_context=_save_terms)


def sums_of(head: Head, *given: Any) -> Tensor:
    """`head_sums` of target, mask, map, partition and the options of a pass."""
    features, weight, bias, dtype = head
    return cast(Tensor, head_sums(features, weight, bias, *given[:4], dtype, *given[4:]))


def terms_of(factors: Tensor, head: Head, target: Tensor, mask: Tensor | None, *options: Any) -> Tensor:
    """`head_terms` with the options of `operators.voxel_terms`."""
    features, weight, bias, dtype = head
    given = features, weight, bias, target, mask, None, None, dtype, *options, False, 0
    return cast(Tensor, head_terms(factors, *given))
