"""Logits that a loss takes apart, and that everything else finds whole."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from voxloss.backends.tiled import Head, HeadGradient, without_autocast

if TYPE_CHECKING:
    from typing_extensions import Self

_ATEN = torch.ops.aten
_LOGGER = logging.getLogger("voxloss")


class LazyLogits(Tensor):
    """The logits of a 1×1×1 convolution, z = W f + b, `[B, C, spatial...]`, not computed yet.

    Shape, dtype, device and graph are those of the logits. A loss of voxloss computes them tile by tile, and
    forgets each tile when it has been summed. Every other operation computes them whole, once; they are kept as
    long as this tensor is, and are those of the weights before the optimizer's step. A warning in the log names
    each operation that needed them whole, and the line of the program. `lazy_logits` makes one.
    """

    _parts: Head  # with gradients, if any
    _kept: _Kept

    @staticmethod
    def __new__(cls, kept: _Kept) -> Self:
        """A tensor that has a shape, but no memory."""
        head = kept.head
        shape = (len(head.features), len(head.weight), *head.features.shape[2:])
        found = Tensor._make_wrapper_subclass(cls, shape, dtype=head.dtype, device=head.features.device)
        found._parts, found._kept = head, kept
        return found

    @property
    def parts(self) -> Head:
        """What the logits are computed from, without gradients."""
        return self._kept.head

    @property
    def wanted(self) -> list[bool]:
        """Which of features, weight and bias need a gradient."""
        return [each is not None and each.requires_grad for each in self._parts[:3]]

    def is_current(self) -> bool:
        """Whether they are still those of the parts; not if they have been written to."""
        return self._kept.is_current()

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What deep supervision does with outputs keeps them lazy; all else is below autograd."""
        if function is F.interpolate:
            return _interpolated(*args, **(kwargs or {}))
        if function is torch.stack:
            return _stacked(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    def logits(self) -> Tensor:
        """The logits whole, an ordinary tensor of the same graph."""
        return cast(Tensor, _ATEN.alias.default(self))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch declares a static method
        cls, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Any operation on the logits, with its gradient; this is below autograd."""
        first = args[0] if args else None
        if operation is _ATEN.detach.default and isinstance(first, LazyLogits):
            return LazyLogits(first._kept)
        if operation is not _ATEN.alias.default:  # which `logits` calls
            lazy = next(each for each in tree_leaves((args, kwargs)) if isinstance(each, LazyLogits))
            _warn_of(str(operation), lazy._kept.name)
        whole_args, whole_kwargs = tree_map_only(
            LazyLogits, lambda each: each._kept.whole(), (tuple(args), dict(kwargs or {}))
        )
        result = operation(*whole_args, **whole_kwargs)
        if operation._schema.is_mutable and isinstance(first, LazyLogits):
            first._kept.written = True
            return first
        return result

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """What it is, without computing it."""
        head = self._kept.head
        return f"LazyLogits({list(self.shape)} of {head.features.shape[1]} features, {self.dtype}, {self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as an ordinary tensor."""
        return self.logits().detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def numpy(self, **options: Any) -> Any:
        """The logits as an array."""
        return self.logits().numpy(**options)

    def tolist(self) -> Any:
        """The logits as lists."""
        return self.logits().tolist()


class _Kept:
    """What logits can be computed from, and themselves from the first time that they are needed."""

    def __init__(self, head: Head, name: str) -> None:
        self.name = name
        # A loop may look at its outputs after the optimizer's step. The weights are small enough for a copy.
        bias = None if head.bias is None else head.bias.clone()
        self.head = head._replace(weight=head.weight.clone(), bias=bias)
        self.written = False
        # Tensors of torch.inference_mode have no version.
        self._version = None if head.features.is_inference() else head.features._version
        self._whole: Tensor | None = None

    def is_current(self) -> bool:
        """Whether features and logits are what they were."""
        same = self._version is None or self.head.features._version == self._version
        return not self.written and same

    def whole(self) -> Tensor:
        """All of them.

        Raises:
            RuntimeError: if the features have been overwritten.
        """
        if self._whole is None:
            if not self.is_current():
                raise RuntimeError(
                    "LazyLogits: expected the features that the logits are computed from, but an operation has "
                    "written to them since. Take output.logits() before that."
                )
            with torch.no_grad(), without_autocast(self.head.features):
                self._whole = self.head.logits()
        return self._whole


@cache
def _warn_of(operation: str, name: str) -> None:
    """Once for each operation and layer: nothing breaks, but what the user wants to save is not saved."""
    place = "" if torch.compiler.is_compiling() else _line_of_the_program()
    _LOGGER.warning("voxloss: lazy logits of %r are computed whole, as %s needs them%s", name, operation, place)


def _line_of_the_program() -> str:
    """Where the innermost call is that neither torch nor voxloss made; empty in a thread of autograd."""
    own = tuple(f"{Path(package).parent}{os.sep}" for package in (torch.__file__, __file__))
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(own):
            return f", at {frame.filename}:{frame.lineno}"
    return ""


class LazyGradient(Tensor):
    """∂L/∂logits as the gradients by features, weight and bias that autograd makes of it next.

    Gradients of several losses add up without being whole. For every other operation, such as a hook's, it is
    computed whole.
    """

    parts: HeadGradient
    _logits: LazyLogits
    _compute: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, logits: LazyLogits, parts: HeadGradient, whole: Callable[[], Tensor]) -> Self:
        """`whole` computes ∂L/∂logits."""
        found = Tensor._make_wrapper_subclass(cls, logits.shape, dtype=logits.dtype, device=logits.device)
        found.parts, found._logits, found._compute = parts, logits, whole
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch declares a static method
        cls, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Add parts to parts; all else is of the whole gradient."""
        if operation is _ATEN.add.Tensor and not kwargs and _are_alike(*args):
            return _added(*args)
        if operation is _ATEN.detach.default:
            return LazyGradient(args[0]._logits, args[0].parts, args[0]._compute)
        whole_args, whole_kwargs = tree_map_only(
            LazyGradient, LazyGradient.whole, (tuple(args), dict(kwargs or {}))
        )
        return operation(*whole_args, **whole_kwargs)

    def whole(self) -> Tensor:
        """The gradient by the logits."""
        return self._compute().detach()


def _are_alike(first: Any, second: Any) -> bool:
    return all(isinstance(each, Tensor) for each in (first, second)) and bool(first.shape == second.shape)


def _added(first: Tensor, second: Tensor) -> Tensor:
    lazy = first if isinstance(first, LazyGradient) else cast(LazyGradient, second)
    logits = lazy._logits
    parts = (
        each.parts if isinstance(each, LazyGradient) else _of_whole(each, logits.parts, logits.wanted)
        for each in (first, second)
    )
    added = HeadGradient(*(None if one is None else one + other for one, other in zip(*parts, strict=True)))
    return LazyGradient(logits, added, lambda: _whole(first) + _whole(second))


def _whole(gradient: Tensor) -> Tensor:
    return gradient.whole() if isinstance(gradient, LazyGradient) else gradient


def _of_whole(grad: Tensor, head: Head, wanted: Sequence[bool]) -> HeadGradient:
    """The gradients by features, weight and bias, each in its own dtype, differentiably."""
    spatial = head.features.ndim - 2
    kernel = head.weight.reshape(*head.weight.shape, *[1] * spatial)
    ones, zeros = [1] * spatial, [0] * spatial
    options = [len(head.weight)], ones, zeros, ones, False, zeros, 1
    given = grad, head.features.to(head.dtype), kernel.to(head.dtype)
    by_features, by_kernel, by_bias = _ATEN.convolution_backward.default(*given, *options, [*wanted])
    return HeadGradient(
        by_features.to(head.features.dtype) if wanted[0] else None,
        by_kernel.to(head.weight.dtype).view_as(head.weight) if wanted[1] else None,
        by_bias.to(head.weight.dtype) if wanted[2] else None,
    )


class _Lazy(torch.autograd.Function):
    """The convolution, computed by whoever needs it."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, name: str
    ) -> LazyLogits:
        """Compute nothing."""
        ctx.dtype = dtype
        ctx.save_for_backward(features, weight, bias)
        return LazyLogits(_Kept(Head(features.detach(), weight.detach(), _detached(bias), dtype), name))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """By features, weight and bias."""
        if isinstance(grad, LazyGradient):
            return *grad.parts, None, None
        features, weight, bias = ctx.saved_tensors
        return *_of_whole(grad, Head(features, weight, bias, ctx.dtype), ctx.needs_input_grad[:3]), None, None


def lazy_logits(head: Head, name: str = "") -> LazyLogits:
    """The logits of a convolution, of which autograd knows as of any tensor; the name is that of the layer."""
    found = cast(LazyLogits, _Lazy.apply(*head, name))  # type: ignore[no-untyped-call]
    found._parts = head
    return found


def _interpolated(input: LazyLogits, *how: Any, **options: Any) -> Tensor:
    """The logits of interpolated features, which are the same, unless the logits are the smaller of both."""
    head = input._parts
    if not input.is_current() or head.features.shape[1] > len(head.weight):
        with torch._C.DisableTorchFunctionSubclass():
            return F.interpolate(input, *how, **options)
    return lazy_logits(head._replace(features=F.interpolate(head.features, *how, **options)), input._kept.name)


class LazyStack(Tensor):
    """Outputs of several levels in one tensor `[B, levels, C, spatial...]`, which `unbind` takes apart again.

    MONAI's DynUNet stacks its outputs. `torch.unbind(output, 1)` and `output[:, level]` return them as they were;
    for every other operation they are computed whole.
    """

    _levels: tuple[Tensor, ...]  # with gradients, if any

    @staticmethod
    def __new__(cls, levels: Sequence[Tensor]) -> Self:
        """A tensor that has a shape, but no memory."""
        first = levels[0]
        shape = (len(first), len(levels), *first.shape[1:])
        found = Tensor._make_wrapper_subclass(cls, shape, dtype=first.dtype, device=first.device)
        found._levels = tuple(levels)
        return found

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Take the levels apart; all else is below autograd."""
        stack, *rest = args if args else (None,)
        if isinstance(stack, LazyStack):
            if function in (torch.unbind, Tensor.unbind) and (*rest, *(kwargs or {}).values()) == (1,):
                return stack._levels
            if function is Tensor.__getitem__ and _is_level(rest[0]):
                return stack._levels[rest[0][1]]
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch declares a static method
        cls, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Any operation on the stack, below autograd."""
        if operation._schema.is_mutable:
            raise RuntimeError(
                f"LazyStack: expected an operation that does not write to it, received {operation}."
            )
        whole = tree_map_only(
            LazyStack, lambda each: torch.stack(each._levels, 1), (tuple(args), dict(kwargs or {}))
        )
        return operation(*whole[0], **whole[1])


class _Stack(torch.autograd.Function):
    """torch.stack along the axis after the samples."""

    @staticmethod
    def forward(ctx: Any, *levels: Tensor) -> LazyStack:
        """Compute nothing."""
        return LazyStack([each.detach() for each in levels])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Of each level."""
        return grad.unbind(1)


def _stacked(tensors: Sequence[Tensor], dim: int = 0, **options: Any) -> Tensor:
    """Lazy if it stacks outputs of one shape along axis 1."""
    like = tensors[0]
    alike = all(
        (each.shape, each.dtype, each.device) == (like.shape, like.dtype, like.device) for each in tensors
    )
    if dim != 1 or options or not alike:
        with torch._C.DisableTorchFunctionSubclass():
            return torch.stack(tuple(tensors), dim, **options)
    found = cast(LazyStack, _Stack.apply(*tensors))  # type: ignore[no-untyped-call]
    found._levels = tuple(tensors)
    return found


def _is_level(place: Any) -> bool:
    """Whether it is that of `[:, level]`."""
    return isinstance(place, tuple) and len(place) == 2 and place[0] == slice(None) and isinstance(place[1], int)


def is_lazy(input: Tensor, target: Tensor) -> TypeGuard[LazyLogits]:
    """Whether a pass can compute the input tile by tile.

    A target that needs a gradient takes the logits whole, as its gradient is of their size.
    """
    return isinstance(input, LazyLogits) and input.is_current() and not target.requires_grad


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
