"""Some channels of a tensor that has few, and which of them count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from voxloss.backends.voxels import whole_labels


class Channels(NamedTuple):
    """The channels that count in a loss, in the order of the columns of its sums `[B, len(numbers)]`.

    Attributes:
        numbers: of the channels, 0 … total − 1.
        total: C, the number of channels of the input.
        binary: whether the channels are independent and binary (a sigmoid, or a single channel), instead of
            mutually exclusive classes.
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
        found = like.new_zeros(len(self.numbers))
        if self.background is not None:
            found.narrow(0, self.background, 1).fill_(1)  # an assignment would make the host wait for a GPU
        return found


def of_classes(tensor: Tensor, classes: Sequence[int]) -> Tensor:
    """Some entries of the last axis, without an index tensor, which would have to be copied to a GPU."""
    runs = _runs(classes)
    if runs == [list(range(tensor.shape[-1]))]:
        return tensor
    parts = [tensor[..., run[0] : run[-1] + 1] for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def spread(values: Tensor | float, classes: Sequence[int], into: Tensor) -> Tensor:
    """Write a value, or one per class, to the entries `[C]` of these classes; nothing is copied to a GPU."""
    at = 0
    for run in _runs(classes):
        there = into.narrow(0, run[0], len(run))
        if not isinstance(values, Tensor):
            there.fill_(values)
        else:
            there.copy_(values.narrow(0, at, len(run)) if values.ndim else values)
        at += len(run)
    return into


def _runs(classes: Sequence[int]) -> list[list[int]]:
    """Classes that follow one another, together."""
    runs: list[list[int]] = []
    for c in classes:
        if runs and c == runs[-1][-1] + 1:
            runs[-1].append(c)
        else:
            runs.append([c])
    return runs


def annotated_channels(
    annotated: Sequence[Sequence[int]] | Tensor, samples: int, channels: int, device: torch.device
) -> Tensor:
    """Return which channels were annotated, bool `[B, C]`, from a list of channels for each sample.

    Raises ValueError for another number of samples, and for a channel that does not exist.
    """
    if isinstance(annotated, Tensor):
        if annotated.dtype != torch.bool or annotated.shape != (samples, channels):
            raise ValueError(
                f"annotated: expected a bool tensor {[samples, channels]}, or a list of channels for each "
                f"sample, received {annotated.dtype} {list(annotated.shape)}. Convert zeros and ones with "
                "annotated.bool()."
            )
        return annotated.to(device)
    if len(annotated) != samples or not all(isinstance(chosen, Sequence) for chosen in annotated):
        raise ValueError(
            f"annotated: expected a list of channels for each of {samples} samples, like {[[0, 1]] * samples}, "
            f"received {annotated!r}."
        )
    for sample, chosen in enumerate(annotated):
        if any(c not in range(channels) for c in chosen):
            raise ValueError(
                f"annotated: expected channel numbers 0…{channels - 1}, as input has {channels} channels, "
                f"received {list(chosen)} for sample {sample}."
            )
    return torch.stack([_marks(tuple(chosen), channels, device) for chosen in annotated])


# A copy to a GPU waits for it, and data sets have few choices of annotated channels, which repeat.
_MARKS: dict[tuple[tuple[int, ...], int, torch.device], Tensor] = {}
_MOST_MARKS = 4096


def _marks(chosen: tuple[int, ...], channels: int, device: torch.device) -> Tensor:
    """Which of the channels were chosen, bool `[C]`."""
    traced = torch.compiler.is_compiling()
    found = None if traced else _MARKS.get((chosen, channels, device))
    if found is None:
        found = torch.tensor([c in chosen for c in range(channels)], device=device)
        if not traced and type(found) is Tensor:  # and no stand-in of torch's, which has no values
            if len(_MARKS) >= _MOST_MARKS:
                _MARKS.clear()
            _MARKS[chosen, channels, device] = found
    return found


def ignored_voxels(
    target: Tensor, channels: int, ignore_index: int | None, label_map: bool = False
) -> Tensor | None:
    """Return which voxels are ignored, bool `[B, 1, spatial...]`; None if there is no such label.

    Of a label map those with this label; of a target with one channel per class those whose channel
    `ignore_index` is 1, or, if there is no such channel, those with this value in all channels.
    """
    if ignore_index is None:
        return None
    if label_map or target.shape[1] != channels:
        return whole_labels(target) == ignore_index
    if channels > 1 and 0 <= ignore_index < channels:
        return target[:, ignore_index : ignore_index + 1] == 1
    return (target == ignore_index).all(1, keepdim=True)
