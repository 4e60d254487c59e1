"""Validation of arguments and tensors. Messages name the expected and the received value, where, and a remedy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import NoReturn, cast

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from voxloss.backends.voxels import PassSpec, range_tolerance, whole_labels


class ShapeError(AssertionError, ValueError):
    """Input and target do not match. It is an AssertionError as well, which MONAI raises here."""


def plain(tensor: Tensor) -> Tensor:
    """Return a MetaTensor as a plain tensor; gradients pass through."""
    as_tensor = getattr(tensor, "as_tensor", None)
    if as_tensor is None:
        return tensor
    if torch.compiler.is_compiling():
        raise TypeError(
            "torch.compile cannot take a MetaTensor into a graph. Pass input.as_tensor() and target.as_tensor()."
        )
    return cast(Tensor, as_tensor())


def require_pair(input: Tensor, target: Tensor, label_map: bool | None, softmax: bool) -> None:
    """Check types, shapes and devices, without reading a voxel."""
    for name, tensor in (("input", input), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name}: expected a torch.Tensor, received {type(tensor).__name__}. Convert an array with "
                "torch.as_tensor, labels with maps to a voxloss.Target; for a list of outputs wrap the loss in "
                "monai.losses.DeepSupervisionLoss."
            )
    if not input.is_floating_point():
        raise TypeError(
            f"input: expected a floating-point tensor of logits or probabilities, received {input.dtype}. "
            + (
                "The target has such numbers: call loss(input, target), not loss(target, input)."
                if target.is_floating_point() and target.ndim > 2 and target.shape[1] > 1
                else "Convert it with input.float()."
            )
        )
    if target.is_complex():
        raise TypeError(f"target: expected labels or probabilities, received {target.dtype}.")
    if input.ndim < 3:
        raise ShapeError(
            f"input: expected [B, C, spatial...] with at least one spatial axis, received {_shape(input)}."
        )
    if input.numel() == 0:
        raise ShapeError(f"input: expected at least one voxel, class and sample, received {_shape(input)}.")
    if target.ndim == input.ndim - 1 and target.shape == (input.shape[0], *input.shape[2:]):
        raise ShapeError(
            f"target: expected [B, 1, spatial...] or [B, C, spatial...], received {_shape(target)} without a "
            "channel axis. Add one with target.unsqueeze(1)."
        )
    if input.ndim == target.ndim + 1 and input.shape[3:] == target.shape[2:]:
        raise ShapeError(
            f"input: expected [B, C, spatial...] with the spatial axes of target {_shape(target)}, received "
            f"{_shape(input)} with one axis more. Take the stacked outputs of a network with deep supervision "
            "apart with torch.unbind(input, 1), and call the loss for each."
        )
    if target.ndim != input.ndim or target.shape[1] not in (1, input.shape[1]):
        raise ShapeError(
            "target: ground truth has different shape from input: expected one channel (a label map) or "
            f"{input.shape[1]}, as input {_shape(input)} has, received {_shape(target)}."
        )
    if target.shape[0] != input.shape[0]:
        raise ShapeError(
            f"target: expected {input.shape[0]} samples, as input {_shape(input)} has, received "
            f"{_shape(target)}. Both are [B, channels, spatial...]: if the batch axis is missing, add it with "
            "unsqueeze(0)."
        )
    if target.shape[2:] != input.shape[2:]:
        raise ShapeError(
            f"target: ground truth has different shape {_shape(target)} from input {_shape(input)}: "
            "spatial sizes, from the third axis on, must be equal. Resample or crop, or move the channels."
        )
    if input.shape[1] > 1 and label_map is not None and label_map != (target.shape[1] == 1):
        raise ShapeError(
            f"target: ground truth has different shape {_shape(target)} from input {_shape(input)}: "
            + (
                "expected one channel with to_onehot_y=True. For a one-hot target omit to_onehot_y."
                if label_map
                else "expected one channel per class. For a label map set to_onehot_y=True."
            )
        )
    if input.device != target.device:
        raise ValueError(
            f"target: expected on the input's device {input.device}, received {target.device}. "
            "Move it with target.to(input.device)."
        )
    if softmax and input.shape[1] == 1:
        raise ValueError(
            "softmax=True: expected at least 2 channels, received 1, whose softmax is 1 everywhere. "
            "For a binary output set sigmoid=True."
        )


def require_regions(input: Tensor, target: Tensor, regions: int) -> None:
    """Check that the prediction has a channel for each region, and that the target is a label map."""
    if input.shape[1] != regions:
        raise ShapeError(
            f"input: expected {regions} channels, one for each of the regions, received {_shape(input)}."
        )
    if target.shape[1] != 1:
        raise ShapeError(
            f"target: expected a label map [B, 1, spatial...] with regions, received {_shape(target)}. "
            "For a target with one channel per region omit regions."
        )


def require_mask(mask: Tensor, input: Tensor) -> None:
    """Check a mask's type, shape and device, without reading a voxel."""
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"mask: expected a torch.Tensor or None, received {type(mask).__name__}. Convert an array with "
            "torch.as_tensor; pass annotated classes as the fourth argument, annotated=."
        )
    wanted = [input.shape[0], 1, *input.shape[2:]]
    if mask.ndim != input.ndim or mask.shape[1] != 1 or mask.shape[2:] != input.shape[2:]:
        raise ShapeError(
            f"mask: expected {wanted}, as input is {_shape(input)}, received {_shape(mask)}. "
            "A mask applies to all channels; if it has no channel axis, add one with mask.unsqueeze(1)."
        )
    if mask.shape[0] not in (1, input.shape[0]):
        raise ShapeError(f"mask: expected {wanted}, or one sample for all, received {_shape(mask)}.")
    if mask.is_complex():
        raise TypeError(f"mask: expected booleans or weights, received {mask.dtype}.")
    if mask.device != input.device:
        raise ValueError(
            f"mask: expected on the input's device {input.device}, received {mask.device}. "
            "Move it with mask.to(input.device)."
        )
    if mask.requires_grad:
        raise ValueError(
            "mask: expected weights without requires_grad, as they get no gradient. Pass mask.detach()."
        )


def require_reverse_mode(input: Tensor, target: Tensor) -> None:
    """Reject derivatives that a fused pass would silently lose."""
    if torch.compiler.is_compiling():
        return
    transforms = torch._C._functorch.get_interpreter_stack() or []
    functional = any(transform.key() != TransformType.Vmap for transform in transforms)
    if functional or any(_tangent(tensor) is not None for tensor in (input, target)):
        raise NotImplementedError(
            "torch.func.grad, jvp and forward-mode derivatives are not supported by the pass over the volume. "
            "Use torch.autograd.grad or backward(), also twice; torch.func.vmap is supported."
        )


def _tangent(tensor: Tensor) -> Tensor | None:
    dual = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return cast("Tensor | None", dual.tangent)


def may_be_overwritten(input: Tensor) -> bool:
    """Whether the gradient can be written over an input.

    False inside torch.compile, and where elements share memory.

    Raises:
        ValueError: for a leaf, whose owner would lose the values.
    """
    if torch.compiler.is_compiling() or not input.requires_grad:
        return False
    base = input if input._base is None else input._base
    if base.is_leaf:
        raise ValueError(
            "inplace=True: expected logits that a network computed, received a leaf tensor, or a view of one, "
            "whose values the gradient would overwrite. Omit inplace."
        )
    reach = 0  # of the elements that smaller strides lead to
    for stride, size in sorted(zip(input.stride(), input.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def require_activated(input: Tensor, shape: torch.Size) -> None:
    """Check what a callable activation returned."""
    if not isinstance(input, Tensor) or input.shape != shape or not input.is_floating_point():
        received = f"{input.dtype} {_shape(input)}" if isinstance(input, Tensor) else type(input).__name__
        raise ShapeError(
            f"other_act: expected a floating-point tensor {list(shape)} as given, received {received}."
        )


def warn_if_single(channels: int, to_onehot_y: bool, include_background: bool) -> None:
    """Warn, as MONAI does, that a single channel ignores options for several channels."""
    if channels > 1 or torch.compiler.is_compiling():  # a warning would break the graph
        return
    if to_onehot_y:
        warnings.warn("single channel prediction, `to_onehot_y=True` ignored.", stacklevel=5)
    if not include_background:
        warnings.warn("single channel prediction, `include_background=False` ignored.", stacklevel=5)


def require_non_negative(**values: float) -> None:
    """Check that each value is a number ≥ 0."""
    for name, value in values.items():
        if not (_is_finite(value) and value >= 0):
            raise ValueError(f"{name}: expected a finite number ≥ 0, received {value!r}.")


def require_positive(**values: float) -> None:
    """Check that each value is a number > 0."""
    for name, value in values.items():
        if not (_is_finite(value) and value > 0):
            raise ValueError(f"{name}: expected a finite number > 0, received {value!r}.")


def require_score_up_to_one(smooth_nr: float, smooth_dr: float) -> None:
    """Check that smoothing allows no score above 1, for powers of 1 − score and of −log score."""
    if smooth_nr > smooth_dr:
        raise ValueError(
            f"smooth_nr: expected at most smooth_dr={smooth_dr:g}, received {smooth_nr:g}: the score of a good "
            "prediction would be above 1, where this loss is not defined. Pass the same number for both."
        )


def require_fraction(**values: float) -> None:
    """Check that each value is a number in [0, 1]."""
    for name, value in values.items():
        if not (_is_finite(value) and 0 <= value <= 1):
            raise ValueError(f"{name}: expected a number in [0, 1], received {value!r}.")


def require_percent(**values: float) -> None:
    """Check that each value is a number in (0, 100]."""
    for name, value in values.items():
        if not (_is_finite(value) and 0 < value <= 100):
            raise ValueError(f"{name}: expected a percentage above 0 and up to 100, received {value!r}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question with the name that is almost this one; empty if there is none."""
    return "".join(f" Did you mean {match!r}?" for match in get_close_matches(name, [*known], 1, 0.7))


def require_whole(least: int, **values: int) -> None:
    """Check that each value is a whole number, and not below the least."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name}: expected a whole number ≥ {least}, received {value!r}.")


def require_share(**values: float) -> None:
    """Check the factors of a compound's parts, with MONAI's message."""
    for name, value in values.items():
        if not (_is_finite(value) and value >= 0):
            raise ValueError(f"{name} should be no less than 0.0, and finite, received {value!r}.")


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def require_ignore_index(ignore_index: int | None) -> None:
    """Check that the label to ignore is a whole number that a label map can hold as int64."""
    if ignore_index is None:
        return
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, Integral):
        raise TypeError(f"ignore_index: expected an int or None, received {ignore_index!r}.")
    if not abs(ignore_index) < 2**63:
        raise ValueError(f"ignore_index: expected an int between −2⁶³ and 2⁶³, received {ignore_index}.")


def require_arguments(per_class: Callable[..., Tensor], extra_sums: Sequence[str]) -> bool:
    """Check that a formula takes the sums that its class names; return whether it takes `channels` as well."""
    first, *arguments = signature(per_class).parameters.values()
    by_name = [a for a in arguments if a.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
    takes_channels = any(a.name == "channels" for a in by_name)
    known = (*extra_sums, "channels")
    unnamed = [a.name for a in by_name if a.name not in known and a.default is Parameter.empty]
    takes_any = any(a.kind is Parameter.VAR_KEYWORD for a in arguments)
    untaken = [] if takes_any else [name for name in extra_sums if name not in {a.name for a in by_name}]
    if not unnamed and not untaken:
        return takes_channels
    expected = f"the arguments {[first.name, *extra_sums]}, as extra_sums = {tuple(extra_sums)!r} names them"
    remedy = (
        f"Set extra_sums = {(*extra_sums, *unnamed)!r} in the class"
        if unnamed
        else f"Add {', '.join(untaken)} to its arguments"
    )
    received = [first.name, *(argument.name for argument in arguments)]
    raise TypeError(f"{per_class.__qualname__}: expected {expected}, received {received}. {remedy}.")


def require_per_class(loss: Tensor, shape: torch.Size) -> None:
    """Check what a formula returned."""
    if loss.shape != shape:
        raise ShapeError(
            f"per_class: expected one loss per sample and class, {list(shape)} as the statistics, "
            f"received {_shape(loss)}. The reduction takes the mean or the sum."
        )


def require_valid(
    valid: Tensor,
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    spec: PassSpec,
    map: Tensor | None = None,
) -> None:
    """Raise an error if a pass found invalid values; on CUDA without waiting for the device.

    On CUDA the assertion fails on the device, as for the labels of `torch.nn.functional.cross_entropy`.
    """
    if valid.device.type == "cuda":
        torch._assert_async(valid, _DEVICE_MESSAGE)
    elif valid.device.type != "meta" and not valid:
        _explain(input, target, mask, spec, map)


_DEVICE_MESSAGE = (
    "voxloss: a label is not a whole number in 0..C-1 (or ignore_index), a probability is outside [0, 1], a "
    "mask's weight is negative or not finite, or a distance is not finite; run the same tensors on the CPU to "
    "see which and where"
)


def _explain(input: Tensor, target: Tensor, mask: Tensor | None, spec: PassSpec, map: Tensor | None) -> NoReturn:
    input, target = input.detach(), target.detach()
    exact = target.double()  # torch does not compare uint16, uint32 and uint64 with other types
    channels = input.shape[1]
    ignored = masked = torch.zeros_like(target[:, :1], dtype=torch.bool)
    if mask is not None:
        raise_if(
            ~((mask >= 0) & (mask < torch.inf)),
            mask,
            "mask: expected finite weights ≥ 0",
            "A weight of 0 leaves a voxel out, whatever its value.",
        )
        ignored = masked = mask == 0
    if spec.is_label_map(input, target):
        labels = whole_labels(target)
        labels_known = len(spec.regions) or channels
        if spec.ignore_index is not None:
            ignored = masked | (labels == spec.ignore_index)
        raise_if(
            (exact != exact.round()) & ~ignored,
            target,
            "target: expected whole numbers in a label map",
            "For probabilities pass one channel per class.",
        )
        raise_if(
            ((labels < 0) | (labels >= labels_known)) & ~ignored,
            target,
            f"target: expected labels 0…{labels_known - 1}, the largest in a region"
            if spec.regions
            else f"target: expected labels 0…{channels - 1}, as input has {channels} channels",
            "Add the label to a region, or set ignore_index to it."
            if spec.regions
            else "Map the labels to consecutive classes, add output channels, or set ignore_index to the label "
            "to leave out (−1 as int8 and 255 as uint8 are the same byte).",
        )
    else:
        if spec.ignore_index is not None and channels > 1 and 0 <= spec.ignore_index < channels:
            channel = exact[:, spec.ignore_index, None]
            ignored = masked | (channel == 1)
            raise_if(
                ~ignored & (channel != 0),
                channel,
                f"target: expected 0 or 1 in the ignored channel {spec.ignore_index}",
                "A voxel is either ignored or not.",
            )
        elif spec.ignore_index is not None:
            ignored = masked | (exact == spec.ignore_index).all(1, keepdim=True)
        tolerance = range_tolerance(target.dtype)
        outside = ~((exact >= -tolerance) & (exact <= 1 + tolerance)) & ~ignored
        raise_if(
            outside,
            target,
            "target: expected values in [0, 1], one channel per class",
            "One channel is a mask of the foreground: pass (target > 0), or add one output channel per class."
            if channels == 1 and bool(((exact == exact.round()) | ignored).all())
            else "Clip probabilities with target.clamp(0, 1); scale a mask of 0 and 255 by 1/255.",
        )
    if map is not None:
        remedy = "For a class without a boundary pass 0."
        raise_if(~map.isfinite() & ~ignored, map, "distance: expected finite numbers", remedy)
    if spec.activation == "none":
        tolerance = range_tolerance(input.dtype)
        raise_if(
            ((input < -tolerance) | (input > 1 + tolerance)) & ~ignored,
            input,
            "input: expected probabilities in [0, 1], as neither softmax nor sigmoid is set",
            "For logits set softmax=True or sigmoid=True; other_act must return values in [0, 1].",
        )
    raise ValueError("target or input: a value is out of range.")


def raise_if(bad: Tensor, values: Tensor, expected: str, remedy: str) -> None:
    """Raise ValueError with the first of `values` that is `bad`, its position and how many there are."""
    if bad.any():
        where = [int(i) for i in bad.nonzero()[0]]
        value = values[tuple(where)].item()
        raise ValueError(f"{expected}; received {value} at {where} ({int(bad.sum())} in all). {remedy}")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
