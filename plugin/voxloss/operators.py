"""The pass as operators of torch: what makes it compile, export, differentiate once and twice.

`voxloss::region_sums` → `[K, B, C]`; its derivative is an operator of its own, whose derivative in turn (the
double backward) goes through the plain torch expression of the gradient in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from voxloss import inputs
from voxloss.backends import backend_for, voxels

_VOLUMES = "Tensor input, Tensor target, Tensor? mask"
_OPTIONS = "str activation, str[] sums, int? ignore_index, str? backend, float gamma, int[] regions"
_MAPS, _OF_MAPS, _INPLACE = "Tensor? map, Tensor? partition", "bool map_of_label, int cells", "bool inplace=False"


def _sums(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    map: Tensor | None,
    partition: Tensor | None,
    activation: str,
    sums: Sequence[str],
    ignore_index: int | None,
    backend: str | None,
    gamma: float,
    regions: Sequence[int],
    map_of_label: bool,
    cells: int,
    inplace: bool = False,
) -> Tensor:
    """Sums over the voxels, `[K, B, C]` or `[K, B * cells, C]`; `inplace`: see `StatisticsLoss`."""
    spec = voxels.PassSpec(activation, sums, ignore_index, gamma, regions, map_of_label, cells)
    voxels.require_spec(spec, spec.is_label_map(input, target), map is not None)
    chosen = backend_for(backend, input.device.type, input.dtype)
    result, valid = chosen.region_sums(input, target, spec, mask, map, partition)
    inputs.require_valid(valid, input, target, mask, spec, map)
    return result


region_sums = torch.library.custom_op(
    "voxloss::region_sums",
    mutates_args=(),
    schema=f"({_VOLUMES}, {_MAPS}, {_OPTIONS}, {_OF_MAPS}, {_INPLACE}) -> Tensor",
)(_sums)


@region_sums.register_fake
def _(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    map: Tensor | None,
    partition: Tensor | None,
    activation: str,
    sums: Sequence[str],
    ignore_index: int | None,
    backend: str | None,
    gamma: float,
    regions: Sequence[int],
    map_of_label: bool,
    cells: int,
    inplace: bool = False,
) -> Tensor:
    wide = torch.float32 if input.device.type == "mps" else torch.float64
    return input.new_empty((len(sums), input.shape[0] * max(1, cells), input.shape[1]), dtype=wide)


def _derivative(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    map: Tensor | None,
    partition: Tensor | None,
    activation: str,
    sums: Sequence[str],
    ignore_index: int | None,
    backend: str | None,
    gamma: float,
    regions: Sequence[int],
    map_of_label: bool,
    cells: int,
    wrt: str,
) -> Tensor:
    """∂L/∂input or ∂L/∂target (`wrt`) from grad = ∂L/∂sums, `[K, B, C]`."""
    spec = voxels.PassSpec(activation, sums, ignore_index, gamma, regions, map_of_label, cells)
    chosen = backend_for(backend, input.device.type, input.dtype)
    return chosen.region_sums_backward(grad, input, target, spec, wrt, mask, map=map, partition=partition)


region_sums_backward = torch.library.custom_op(
    "voxloss::region_sums_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_VOLUMES}, {_MAPS}, {_OPTIONS}, {_OF_MAPS}, str wrt) -> Tensor",
)(_derivative)


@region_sums_backward.register_fake
def _(grad: Tensor, input: Tensor, target: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(input if others[-1] == "input" else target)


# By the input, into its memory: for autograd it has changed, so that others who need it then raise an error.
@torch.library.custom_op(
    "voxloss::region_sums_backward_",
    mutates_args=("input",),
    schema=f"(Tensor grad, Tensor(a!) input, Tensor target, Tensor? mask, {_MAPS}, {_OPTIONS}, {_OF_MAPS}) -> ()",
)
def region_sums_backward_(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    map: Tensor | None,
    partition: Tensor | None,
    activation: str,
    sums: Sequence[str],
    ignore_index: int | None,
    backend: str | None,
    gamma: float,
    regions: Sequence[int],
    map_of_label: bool,
    cells: int,
) -> None:
    """Write ∂L/∂input over the input."""
    spec = voxels.PassSpec(activation, sums, ignore_index, gamma, regions, map_of_label, cells)
    chosen = backend_for(backend, input.device.type, input.dtype)
    chosen.region_sums_backward(grad, input, target, spec, "input", mask, out=input, map=map, partition=partition)


@region_sums_backward_.register_fake
def _(grad: Tensor, input: Tensor, *others: Any) -> None:
    return None


_TENSORS = 5  # the first arguments


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    *ctx.options, ctx.inplace = inputs[_TENSORS:]
    ctx.regions = ctx.options[5]
    ctx.save_for_backward(*inputs[:_TENSORS])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _derivatives(ctx, grad, region_sums_backward)


def _derivatives(ctx: Any, grad: Tensor, derivative: Callable[..., Tensor]) -> tuple[Tensor | None, ...]:
    input, target, *others = ctx.saved_tensors
    by_input = by_target = None
    if ctx.needs_input_grad[1] and target.shape[1] == input.shape[1] and not ctx.regions:
        by_target = derivative(grad, input, target, *others, *ctx.options, "target")
    if ctx.needs_input_grad[0] and ctx.inplace:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "inplace=True: expected no create_graph, as a second derivative needs the logits that the first "
                "one has overwritten. Omit inplace."
            )
        region_sums_backward_(grad, input, target, *others, *ctx.options)
        by_input = input.detach()
    elif ctx.needs_input_grad[0]:
        by_input = derivative(grad, input, target, *others, *ctx.options, "input")
    return by_input, by_target, *[None] * (len(others) + len(ctx.options) + 1)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, activation, sums, ignore_index, _, gamma, regions, map_of_label, cells, ctx.wrt = inputs
    ctx.spec = voxels.PassSpec(activation, sums, ignore_index, gamma, regions, map_of_label, cells)
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    asked = ctx.needs_input_grad[:3]
    *tensors, mask, map, partition = ctx.saved_tensors
    leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, asked, strict=True)]
    grad, input, target = leaves
    with torch.enable_grad():
        derivative = voxels.gradient(grad, input, target, mask, ctx.spec, ctx.wrt, torch.float64, map, partition)
    found = iter(
        torch.autograd.grad(
            derivative, [t for t in leaves if t.requires_grad], grad_output.double(), allow_unused=True
        )
    )
    given = tuple(next(found) if need else None for need in asked)
    return *given, *[None] * (len(ctx.needs_input_grad) - len(given))


region_sums.register_autograd(_backward, setup_context=_save)
region_sums_backward.register_autograd(_double_backward, setup_context=_save_backward)


class RegionSums(torch.autograd.Function):
    """`region_sums` without torch's dispatcher.

    The layers in Python around an operator take the host longer than all of the pass, and a GPU that has nothing
    else to do waits for the host.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        """As `region_sums`."""
        _save(ctx, given, None)
        return _sums(*given)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """As that of `region_sums`; a second derivative, and the writing over the input, are its own again."""
        if torch.is_grad_enabled() or ctx.inplace or _is_seen(grad):
            return _backward(ctx, grad)
        return _derivatives(ctx, grad, _derivative)


def sums_of(*given: Any) -> Tensor:
    """`region_sums`, past the dispatcher if nothing needs to see the operator."""
    call = region_sums if _is_seen(*given[:_TENSORS]) else RegionSums.apply
    return cast(Tensor, call(*given))  # type: ignore[no-untyped-call]


def _is_seen(*tensors: Tensor | None) -> bool:
    """Whether a compiler, a tracer, a mode, a transform or a kind of tensor has to see that it is an operator."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or not all(tensor is None or _is_common(tensor) for tensor in tensors)
    )


def _is_common(tensor: Tensor) -> bool:
    """Whether it is of no subclass, nor one of several that torch.autograd.grad takes at once."""
    return type(tensor) in (Tensor, Parameter) and not torch._C._functorch.is_legacy_batchedtensor(tensor)


# The terms of each voxel, instead of their sums.

_FACTORS = "Tensor factors"


@torch.library.custom_op(
    "voxloss::voxel_terms", mutates_args=(), schema=f"({_FACTORS}, {_VOLUMES}, {_OPTIONS}) -> Tensor"
)
def voxel_terms(
    factors: Tensor,
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    activation: str,
    sums: Sequence[str],
    ignore_index: int | None,
    backend: str | None,
    gamma: float,
    regions: Sequence[int],
) -> Tensor:
    """What each voxel adds to Σ factor·sum, `[B, 1, spatial...]`; `factors` `[K, B, C]`, without a gradient."""
    spec = voxels.PassSpec(activation, sums, ignore_index, gamma, regions)
    voxels.require_spec(spec, spec.is_label_map(input, target), False)
    chosen = backend_for(backend, input.device.type, input.dtype)
    result, valid = chosen.voxel_terms(factors, input, target, spec, mask)
    inputs.require_valid(valid, input, target, mask, spec)
    return result


@voxel_terms.register_fake
def _(factors: Tensor, input: Tensor, *others: Any) -> Tensor:
    dtype = torch.promote_types(input.dtype, torch.float32)
    return input.new_empty((input.shape[0], 1, *input.shape[2:]), dtype=dtype)


@torch.library.custom_op(
    "voxloss::voxel_terms_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_FACTORS}, {_VOLUMES}, {_OPTIONS}, str wrt) -> Tensor",
)
def voxel_terms_backward(
    grad: Tensor,
    factors: Tensor,
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    activation: str,
    sums: Sequence[str],
    ignore_index: int | None,
    backend: str | None,
    gamma: float,
    regions: Sequence[int],
    wrt: str,
) -> Tensor:
    """∂L/∂input or ∂L/∂target (`wrt`) from grad = ∂L/∂terms, `[B, 1, spatial...]`: the weights of the voxels."""
    spec = voxels.PassSpec(activation, sums, ignore_index, gamma, regions)
    chosen = backend_for(backend, input.device.type, input.dtype)
    weights = grad if mask is None else grad * mask
    return chosen.region_sums_backward(factors, input, target, spec, wrt, weights)


@voxel_terms_backward.register_fake
def _(grad: Tensor, factors: Tensor, input: Tensor, target: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(input if others[-1] == "input" else target)


def _save_terms(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, activation, sums, ignore_index, backend, gamma, regions = inputs
    ctx.options = activation, sums, ignore_index, backend, gamma, regions
    ctx.regions = regions
    ctx.save_for_backward(*tensors)


def _terms_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    factors, input, target, mask = ctx.saved_tensors
    by_input = by_target = None
    if ctx.needs_input_grad[1]:
        by_input = voxel_terms_backward(grad, factors, input, target, mask, *ctx.options, "input")
    if ctx.needs_input_grad[2] and target.shape[1] == input.shape[1] and not ctx.regions:
        by_target = voxel_terms_backward(grad, factors, input, target, mask, *ctx.options, "target")
    return None, by_input, by_target, None, *[None] * len(ctx.options)


def _save_terms_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, activation, sums, ignore_index, _, gamma, regions, ctx.wrt = inputs
    ctx.spec = voxels.PassSpec(activation, sums, ignore_index, gamma, regions)
    ctx.save_for_backward(*tensors)


def _terms_double_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Through the plain expression in float64, differentiated twice."""
    grad, factors, input, target, mask = ctx.saved_tensors
    asked = [ctx.needs_input_grad[at] for at in (0, 2, 3)]
    leaves = [
        t.detach().double().requires_grad_(need) for t, need in zip((grad, input, target), asked, strict=True)
    ]
    weights, x, y = leaves
    with torch.enable_grad():
        x.requires_grad_(ctx.wrt == "input" or asked[1])
        y.requires_grad_(ctx.wrt == "target" or asked[2])
        terms, _ = voxels.each(factors, x, y, mask, ctx.spec, torch.float64)
        by = x if ctx.wrt == "input" else y
        (derivative,) = torch.autograd.grad(terms, by, weights.flatten(2), create_graph=True)
    wanted = [leaf for leaf, need in zip(leaves, asked, strict=True) if need]
    found = iter(torch.autograd.grad(derivative, wanted, grad_output.double(), allow_unused=True))
    by_grad, by_input, by_target = (next(found) if need else None for need in asked)
    return by_grad, None, by_input, by_target, None, *[None] * (len(ctx.needs_input_grad) - 5)


voxel_terms.register_autograd(_terms_backward, setup_context=_save_terms)
voxel_terms_backward.register_autograd(_terms_double_backward, setup_context=_save_terms_backward)


def _fold(tensor: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """Put the axis that vmap runs over, or as many views as it is long, into the axis of samples."""
    if tensor is None:
        return None
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.movedim(0, batch).flatten(batch, batch + 1)


def _vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Tensor, int]:
    """As samples of one batch: the pass treats samples apart from each other."""
    size = info.batch_size
    folded = (_fold(tensor, dim, size, 0) for tensor, dim in zip(given[:_TENSORS], in_dims, strict=False))
    return region_sums(*folded, *given[_TENSORS:]).unflatten(1, (size, -1)), 1


def _vmap_backward(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Tensor, int]:
    size = info.batch_size
    folded = (
        _fold(tensor, dim, size, items)
        for tensor, dim, items in zip(given, in_dims, (1, *[0] * _TENSORS), strict=False)
    )
    return region_sums_backward(*folded, *given[1 + _TENSORS :]).unflatten(0, (size, -1)), 0


torch.library.register_vmap(region_sums, _vmap)
torch.library.register_vmap(region_sums_backward, _vmap_backward)


def _vmap_terms(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Tensor, int]:
    size = info.batch_size
    folded = (_fold(tensor, dim, size, at) for tensor, dim, at in zip(given, in_dims, (1, 0, 0, 0), strict=False))
    return voxel_terms(*folded, *given[4:]).unflatten(0, (size, -1)), 0


def _vmap_terms_backward(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Tensor, int]:
    size = info.batch_size
    folded = (
        _fold(tensor, dim, size, at) for tensor, dim, at in zip(given, in_dims, (0, 1, 0, 0, 0), strict=False)
    )
    return voxel_terms_backward(*folded, *given[5:]).unflatten(0, (size, -1)), 0


torch.library.register_vmap(voxel_terms, _vmap_terms)
torch.library.register_vmap(voxel_terms_backward, _vmap_terms_backward)
