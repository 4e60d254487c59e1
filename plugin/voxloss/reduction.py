"""From one loss per sample and class to the loss: which classes count, their weights, and the mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from voxloss.channels import of_classes

Absent = Literal["count", "skip"]


def require_classes(classes: Sequence[int] | None, include_background: bool) -> None:
    """Check a choice of classes before any tensor is seen."""
    if classes is None:
        return
    numbers = isinstance(classes, Sequence) and all(isinstance(c, int) and c >= 0 for c in classes)
    if not numbers or not classes or len(set(classes)) != len(classes):
        raise ValueError(f"classes: expected a list of distinct channel numbers ≥ 0, received {classes!r}.")
    if not include_background and 0 in classes:
        raise ValueError(
            f"classes={list(classes)} names the background, include_background=False excludes it. "
            "Remove 0 from classes, or set include_background=True."
        )


def require_absent(absent: str) -> None:
    """Check the policy for absent classes."""
    if absent not in get_args(Absent):
        raise ValueError(f"absent: expected one of {get_args(Absent)}, received {absent!r}.")


def factors_of_classes(given: Sequence[float] | float | Tensor | None, name: str = "weight") -> Tensor | None:
    """Return a factor, or one per class, as a tensor: numbers in float64, a tensor in its own dtype.

    Raises ValueError for what is no factor, as far as that can be seen without the number of channels.
    """
    if given is None:
        return None
    weight = given if isinstance(given, Tensor) else torch.as_tensor(given, dtype=torch.float64)
    if weight.ndim > 1 or not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{name}: expected one number or one per class, all finite, received {weight.tolist()}.")
    if bool((weight < 0).any()):
        raise ValueError(
            f"the value/values of the `{name}` should be no less than 0, received {weight.tolist()}."
        )
    return weight


def select_classes(
    channels: int, classes: Sequence[int] | None, include_background: bool, ignore_index: int | None
) -> tuple[list[int], list[int]]:
    """Return the channels that were chosen, and those of them that count: an ignored class does not.

    A single channel is the foreground: it always counts.
    """
    if classes is not None and max(classes) >= channels:
        raise ValueError(
            f"classes: expected channel numbers 0…{channels - 1}, as input has {channels} channels, "
            f"received {list(classes)}."
        )
    if channels == 1:
        return [0], [0]
    chosen = list(classes) if classes is not None else list(range(0 if include_background else 1, channels))
    counting = [c for c in chosen if c != ignore_index]
    if not counting:
        raise ValueError(
            f"no class is left: chosen {chosen}, ignored {ignore_index}. Choose another ignore_index."
        )
    return chosen, counting


def class_weights(
    weight: Tensor, channels: int, chosen: list[int], counting: list[int], name: str = "weight"
) -> Tensor:
    """Return the weights of the counting classes, `[]` or `[len(counting)]`.

    They may be given per channel, or per chosen class (so without the background if that is excluded).
    """
    if weight.ndim == 0:
        return weight
    if len(weight) == channels:
        return of_classes(weight, counting)
    if len(weight) == len(chosen):
        return of_classes(weight, [chosen.index(c) for c in counting])
    expected = f"{channels} (one per channel)"
    if len(chosen) != channels:
        expected += f" or {len(chosen)} (one per class that counts)"
    background = ""
    if len(weight) == channels - 1 and len(chosen) == channels:
        background = (
            " If channel 0 is the background, it has a weight, too: in a compound, include_background is of the "
            "region loss, and cross entropy has all channels."
        )
    raise ValueError(f"{name}: expected a single value or {expected}, received {len(weight)}.{background}")


def reduce(
    loss: Tensor,
    counts: Tensor | None,
    reduction: str,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Reduce the losses `[B, C]` by "mean", "sum" or "none"; where `counts` is False they are left out.

    A mean over nothing is 0; unreduced, what is left out is 0. Gradients there are 0, too. `over_ranks` makes of
    a sum over samples one over those of all processes.
    """
    if counts is not None:
        loss = loss.masked_fill(~counts, 0)
    if reduction == "none":
        return loss
    if over_ranks is None:
        if reduction == "mean" and counts is None:
            return loss.mean()
        total = loss.sum()
        if counts is not None and reduction == "mean":
            total = total / counts.sum().clamp(min=1)
        return total
    number = loss.new_full((), loss.numel()) if counts is None else counts.sum().to(loss)
    total, number = over_ranks(torch.stack([loss.sum(), number])).unbind()
    return total if reduction == "sum" else total / number.clamp(min=1)
