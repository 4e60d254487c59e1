"""Some channels of a tensor that has few, and which of them count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Channels(NamedTuple):
    """The channels that count in a loss, in the order of the columns of its sums `[B, len(numbers)]`.

    Attributes:
        numbers: of the channels, 0 … total − 1.
        total: C, the number of channels of the input.
        binary: whether each channel is an independent binary question (a sigmoid, or a single channel), and the
            channels are not mutually exclusive classes.
    """

    numbers: list[int]
    total: int
    binary: bool

    @property
    def background(self) -> int | None:
        """The column of channel 0 if it is the background of mutually exclusive classes, and counts."""
        return None if self.binary or 0 not in self.numbers else self.numbers.index(0)

    def is_background(self, like: Tensor) -> Tensor:
        """1 in the column of the background and 0 elsewhere, `[len(numbers)]`, as `like` in dtype and device."""
        columns = torch.arange(len(self.numbers), device=like.device)
        return (columns == (-1 if self.background is None else self.background)).to(like)


def of_classes(tensor: Tensor, classes: Sequence[int]) -> Tensor:
    """Some entries of the last axis, without an index tensor, which would have to be copied to a GPU."""
    first, last = classes[0], classes[-1]
    if list(classes) == list(range(first, last + 1)):
        return tensor[..., first : last + 1]
    return torch.stack([tensor[..., c] for c in classes], -1)


def annotated_channels(
    annotated: Sequence[Sequence[int]] | Tensor, items: int, channels: int, device: torch.device
) -> Tensor:
    """Return which channels of which items were annotated, bool `[B, C]`, from a list of channels for each item.

    Raises ValueError for a number of items, or a channel, that there is not.
    """
    if isinstance(annotated, Tensor):
        if annotated.dtype != torch.bool or annotated.shape != (items, channels):
            raise ValueError(
                f"annotated: expected a bool tensor {[items, channels]}, or a list of channels for each item, "
                f"got {annotated.dtype} {list(annotated.shape)}. Zeros and ones become one with annotated.bool()."
            )
        return annotated.to(device)
    if len(annotated) != items or not all(isinstance(chosen, Sequence) for chosen in annotated):
        raise ValueError(
            f"annotated: expected a list of channels for each of {items} items, like {[[0, 1]] * items}, "
            f"got {annotated!r}."
        )
    found = [[c in chosen for c in range(channels)] for chosen in annotated]
    for item, (chosen, marks) in enumerate(zip(annotated, found, strict=True)):
        if len(set(chosen)) != sum(marks):
            raise ValueError(
                f"annotated: expected channel numbers 0…{channels - 1}, as input has {channels} channels, "
                f"got {list(chosen)} for item {item}."
            )
    return torch.tensor(found, device=device)
