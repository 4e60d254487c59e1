"""START HERE: the sums over a volume from which every region loss is computed.

logits, target ──one pass──▶ RegionStatistics [B, C] ──formula──▶ score [B, C] ──reduction──▶ loss
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from voxloss import inputs, operators
from voxloss.channels import of_classes

Activation = Literal["softmax", "sigmoid", "none"] | Callable[[Tensor], Tensor]


class RegionStatistics(NamedTuple):
    """Sums over the voxels, one per item and class: `[B, C]`, unit voxels, float64.

    With p the prediction and g the target, both in [0, 1]:

    | field | sum | squared | soft_label |
    |---|---|---|---|
    | `intersection` | Σ p·g | Σ p·g | Σ min(p, g) |
    | `prediction` | Σ p | Σ p² | Σ p |
    | `target` | Σ g | Σ g² | Σ g |

    All are additive: over tiles, items, and processes.
    """

    intersection: Tensor
    prediction: Tensor
    target: Tensor

    @property
    def false_positives(self) -> Tensor:
        """Prediction outside the target: Σp − intersection."""
        return self.prediction - self.intersection

    @property
    def false_negatives(self) -> Tensor:
        """Target outside the prediction: Σg − intersection."""
        return self.target - self.intersection

    def over_batch(self) -> RegionStatistics:
        """The statistics of the whole batch as of one volume, `[1, C]`."""
        return RegionStatistics(*(field.sum(0, keepdim=True) for field in self))

    def of_classes(self, classes: Sequence[int]) -> RegionStatistics:
        """The statistics of some classes only, `[B, len(classes)]`."""
        return RegionStatistics(*(of_classes(field, classes) for field in self))


def measure(
    input: Tensor,
    target: Tensor,
    sums: Sequence[str],
    *,
    activation: Activation = "none",
    label_map: bool | None = None,
    ignore_index: int | None = None,
    backend: str | None = None,
    gamma: float = 0.0,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Sum terms out of `voxloss.backends.voxels.TERMS` in one pass: `[B, C]` by name; the rest as below."""
    input, target = inputs.plain(input), inputs.plain(target)
    inputs.require_pair(input, target, label_map, softmax=activation == "softmax")
    if mask is not None:
        mask = inputs.plain(mask)
        inputs.require_mask(mask, input)
        mask = mask.expand(len(input), *mask.shape[1:])
        if mask.dtype != torch.bool:
            mask = mask.to(torch.promote_types(input.dtype, torch.float32))
    if not isinstance(activation, str):
        shape = input.shape
        input, activation = inputs.plain(activation(input)), "none"
        inputs.require_activated(input, shape)
    elif activation not in ("softmax", "sigmoid", "none"):
        raise ValueError(f'activation: expected "softmax", "sigmoid", "none" or a callable, got {activation!r}.')
    inputs.require_reverse_mode(input, target)
    found = operators.region_sums(input, target, mask, activation, list(sums), ignore_index, backend, gamma)
    return dict(zip(sums, found.unbind(0), strict=True))


def region_sums(squared: bool, soft_label: bool) -> tuple[str, str, str]:
    """Return the names of the sums that are intersection, prediction and target."""
    power = "_squared" if squared else ""
    overlap = "soft_intersection" if soft_label and not squared else "intersection"
    return overlap, f"prediction{power}", f"target{power}"


def region_statistics(
    input: Tensor,
    target: Tensor,
    *,
    activation: Activation = "none",
    label_map: bool | None = None,
    squared: bool = False,
    soft_label: bool = False,
    ignore_index: int | None = None,
    backend: str | None = None,
    mask: Tensor | None = None,
) -> RegionStatistics:
    """Sum over the voxels in one pass, differentiably in `input` and in a floating-point one-hot `target`.

    Args:
        input: logits or probabilities `[B, C, spatial...]`, any floating dtype and memory layout.
        target: a label map `[B, 1, spatial...]` with whole numbers 0…C−1 of any dtype, never expanded to a
            one-hot volume; or one channel per class `[B, C, spatial...]` with values in [0, 1] (one-hot,
            multi-label or soft). With C = 1 the single channel is the foreground's mask.
        activation: what makes probabilities of `input`: "softmax" over the channels, "sigmoid", "none" if
            they are probabilities already, or a callable that ends in [0, 1].
        label_map: whether `target` is a label map; None tells by its channels. With C = 1 it makes no difference.
        squared: sum p² and g² in the place of p and g (Milletari et al. 2016, V-Net).
        soft_label: sum min(p, g) in the place of p·g (Wang et al. 2023), which is right for targets between
            0 and 1 and the same for targets that are 0 or 1. With `squared` p·g is right already.
        ignore_index: voxels to leave out as if they were not there, whatever stands in them: those with this
            label; in a target with one channel per class those whose channel `ignore_index` is 1, or, if
            there is no such channel, those with this value in all channels.
        backend: force one of `voxloss.backends.list_backends()`; None chooses.
        mask: which voxels count, `[B, 1, spatial...]` or `[1, 1, spatial...]`: booleans, or weights w ≥ 0, by
            which each term is multiplied. A voxel of weight 0 is as if it were not there.

    Returns:
        The sums `[B, C]` in float64 (float32 on a device without it), whatever the dtype of the input.

    Raises:
        TypeError: for something other than tensors, or an input that is not floating point.
        ShapeError: if shapes do not fit together (an AssertionError, as in MONAI, and a ValueError).
        ValueError: for labels that are no class and for probabilities outside [0, 1]. On CUDA these two
            fail as a device-side assertion, so that the host need not wait.
        NotImplementedError: inside torch.func.grad or jvp, and for forward-mode derivatives.
    """
    names = region_sums(squared, soft_label)
    sums = measure(
        input,
        target,
        names,
        activation=activation,
        label_map=label_map,
        ignore_index=ignore_index,
        backend=backend,
        mask=mask,
    )
    return RegionStatistics(*(sums[name] for name in names))
