"""The pass over lazy logits, as operators of torch: tile by tile, see `backends.tiled`.

`voxloss::head_sums` is `voxloss::region_sums` of W f + b, and `voxloss::head_terms` is `voxloss::voxel_terms` of
it. Their derivative by f, W and b is an operator, too; autograd gets it as the gradient of the logits, a
`LazyGradient`. A second derivative takes the logits whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from voxloss import inputs, operators
from voxloss.backends import Backend, backend_for, tiled, voxels
from voxloss.backends.tiled import Head, HeadGradient
from voxloss.lazy_logits import LazyGradient, LazyLogits

_ARGUMENTS = (
    "Tensor features, Tensor weight, Tensor? bias, Tensor target, Tensor? mask, Tensor? map, Tensor? partition, "
    "ScalarType dtype, str activation, str[] sums, int? ignore_index, str? backend, float gamma, int[] regions, "
    "bool map_of_label, int cells"
)


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


def sums_of(logits: LazyLogits, *given: Any) -> Tensor:
    """As `operators.region_sums` but for `inplace`."""
    return cast(Tensor, _untraced(_Sums)(logits, *given))


def terms_of(factors: Tensor, logits: LazyLogits, target: Tensor, mask: Tensor | None, *options: Any) -> Tensor:
    """As `operators.voxel_terms`."""
    given = target, mask, None, None, *options, False, 0
    return cast(Tensor, _untraced(_Terms)(logits, factors, *given))


def _untraced(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Dynamo sees no graph behind lazy logits: a pass that it traced would have no gradient."""
    if not torch.compiler.is_compiling():  # the decorator imports all of Dynamo
        return function.apply
    reason = "voxloss: lazy logits are summed outside of the graph"
    return cast(Callable[..., Any], torch.compiler.disable(function.apply, reason=reason))  # type: ignore[no-untyped-call]


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: LazyLogits, *given: Any) -> Tensor:
        ctx.logits, ctx.given = logits, given[4:]
        ctx.save_for_backward(*given[:4])
        return cast(Tensor, head_sums(*_call(logits, *given)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given = *ctx.saved_tensors, *ctx.given

        def whole() -> Tensor:
            return cast(Tensor, operators.region_sums_backward(grad, ctx.logits, *given, "input"))

        by_logits = (
            whole() if torch.is_grad_enabled() else _lazily(grad, ctx.logits, _call(ctx.logits, *given), whole)
        )
        return by_logits, *[None] * len(given)


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: LazyLogits, factors: Tensor, *given: Any) -> Tensor:
        ctx.logits, ctx.given = logits, given[4:]
        ctx.save_for_backward(factors, *given[:4])
        return cast(Tensor, head_terms(factors, *_call(logits, *given)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factors, *tensors = ctx.saved_tensors
        call = _call(ctx.logits, *tensors, *ctx.given)

        def whole() -> Tensor:
            given = grad, factors, ctx.logits, call.target, call.mask, *ctx.given[:-2], "input"
            return cast(Tensor, operators.voxel_terms_backward(*given))

        if torch.is_grad_enabled():
            by_logits = whole()
        else:
            weights = grad if call.mask is None else grad * call.mask
            by_logits = _lazily(factors, ctx.logits, call._replace(mask=weights), whole)
        return by_logits, None, *[None] * (len(tensors) + len(ctx.given))


def _call(logits: LazyLogits, *given: Any) -> _Call:
    features, weight, bias, dtype = logits.parts
    target, mask, map, partition, *options = given
    return _Call(features, weight, bias, target, mask, map, partition, dtype, *options)


def _lazily(grad: Tensor, logits: LazyLogits, call: _Call, whole: Callable[[], Tensor]) -> Tensor:
    wanted = logits.wanted
    found = head_backward(grad, *call, wanted)
    parts = HeadGradient(*(each if want else None for each, want in zip(found, wanted, strict=True)))
    return LazyGradient(logits, parts, whole)
