"""Logits that a loss takes apart, and that everything else finds whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from voxloss.backends.tiled import Head, without_autocast

if TYPE_CHECKING:
    from typing_extensions import Self

_ATEN = torch.ops.aten


class LazyLogits(Tensor):
    """The logits of a 1×1×1 convolution, z = W f + b, `[B, C, spatial...]`, not computed yet.

    Shape, dtype, device and graph are those of the logits. A loss of voxloss computes them tile by tile, and
    forgets each tile when it has been summed. Every other operation computes them whole, once; they are kept as
    long as this tensor is. `lazy_logits` makes one.
    """

    # Only the values are its own, which are below autograd.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

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
    def head(self) -> Head | None:
        """Features, weight and bias; None if the logits have been written to, so that they say no more."""
        return None if self._kept.written else self._parts

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
        return self.logits().detach().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def numpy(self, **options: Any) -> Any:
        """The logits as an array."""
        return self.logits().numpy(**options)

    def tolist(self) -> Any:
        """The logits as lists."""
        return self.logits().tolist()


class _Kept:
    """The logits of a head, from the first time that they are needed."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.written = False
        self._whole: Tensor | None = None

    def whole(self) -> Tensor:
        """All of them."""
        if self._whole is None:
            with torch.no_grad(), without_autocast(self.head.features):
                self._whole = self.head.logits()
        return self._whole


class _Lazy(torch.autograd.Function):
    """The convolution: its derivative by whole logits, for all but the losses that take it apart."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> LazyLogits:
        """Compute nothing."""
        ctx.dtype = dtype
        ctx.save_for_backward(features, weight, bias)
        return LazyLogits(_Kept(Head(features.detach(), weight.detach(), _detached(bias), dtype)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """By features, weight and bias, each in its own dtype."""
        features, weight, bias = ctx.saved_tensors
        spatial = features.ndim - 2
        kernel = weight.reshape(*weight.shape, *[1] * spatial)
        wanted = [
            need and each is not None for need, each in zip(ctx.needs_input_grad, ctx.saved_tensors, strict=False)
        ]
        ones, zeros = [1] * spatial, [0] * spatial
        given = (
            grad,
            features.to(ctx.dtype),
            kernel.to(ctx.dtype),
            [len(weight)],
            ones,
            zeros,
            ones,
            False,
            zeros,
            1,
        )
        by_features, by_kernel, by_bias = _ATEN.convolution_backward.default(*given, wanted)
        return (
            by_features.to(features.dtype) if wanted[0] else None,
            by_kernel.to(weight.dtype).view_as(weight) if wanted[1] else None,
            by_bias.to(bias.dtype) if wanted[2] else None,
            None,
        )


def lazy_logits(head: Head) -> LazyLogits:
    """The logits of a convolution, of which autograd knows as of any tensor."""
    found = cast(LazyLogits, _Lazy.apply(*head))  # type: ignore[no-untyped-call]
    found._parts = head
    return found


def head_of(input: Tensor, target: Tensor) -> Head | None:
    """The convolution that a pass can compute the input from, tile by tile; None for logits that are whole.

    A target that needs a gradient takes the logits whole, as its gradient is of their size.
    """
    return input.head if isinstance(input, LazyLogits) and not target.requires_grad else None


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
