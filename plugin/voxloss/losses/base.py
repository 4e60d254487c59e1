"""The module around one pass over the volume: what every loss is told, whatever it makes of the sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import TypedDict

import torch
from monai.utils.enums import LossReduction
from torch import Tensor
from torch.nn.modules.loss import _Loss

from voxloss import inputs
from voxloss.backends import require_backend
from voxloss.channels import annotated_channels
from voxloss.distributed import Group, Shard, require_group, sum_over_ranks
from voxloss.statistics import Activation, measure

Annotated = Sequence[Sequence[int]] | Tensor | None
Weight = Sequence[float] | float | Tensor | None


class PassOptions(TypedDict, total=False):
    """Keyword arguments of every loss that are about the pass; `StatisticsLoss` explains them."""

    backend: str | None
    group: Group
    shard: Shard


class Measured:
    """What one pass has found.

    Attributes:
        names: of the sums, out of `voxloss.backends.voxels.TERMS`.
        binary: each channel is a question of its own (a sigmoid, or a single channel), and not one answer of
            many: cross entropy and focal terms then have a negative part as well.
        spatial_axes: how many the input has.
        annotated: bool `[B, C]`, None if every class was in every item. Sums of classes that were not are 0.
    """

    def __init__(
        self,
        sums: Mapping[str, Tensor],
        *,
        binary: bool,
        spatial_axes: int,
        annotated: Tensor | None,
        group: Group,
        shard: Shard,
    ) -> None:
        self.names = list(sums)
        self.binary = binary
        self.spatial_axes = spatial_axes
        self.annotated = annotated
        self._sums = torch.stack([sums[name] for name in self.names])  # [K, B, C]
        if shard == "volume":
            self._sums = sum_over_ranks(self._sums, group)
        if annotated is not None:
            self._sums = torch.where(annotated, self._sums, 0.0)
        self._group = group if shard == "batch" else None
        self._of_batch: Tensor | None = None

    @property
    def channels(self) -> int:
        """C."""
        return self._sums.shape[2]

    def of_items(self, name: str) -> Tensor:
        """A sum for each item of this process, `[B, C]`."""
        return self._sums[self.names.index(name)]

    def of_batch(self, name: str) -> Tensor:
        """A sum over the items, those of all ranks if there are several, `[1, C]`."""
        return self._batch()[self.names.index(name)]

    def counts(self, batch: bool) -> Tensor | None:
        """Which classes were annotated, `[B, C]`, or anywhere in the batch, `[1, C]`; None if all were."""
        if self.annotated is None:
            return None
        return self._batch()[-1] > 0 if batch else self.annotated

    def _batch(self) -> Tensor:
        if self._of_batch is None:
            rows = self._sums
            if self.annotated is not None:
                rows = torch.cat([rows, self.annotated[None].to(rows)])
            self._of_batch = self.over_ranks(rows.sum(1, keepdim=True))
        return self._of_batch

    def over_ranks(self, tensor: Tensor) -> Tensor:
        """What is a sum over items, as a sum over those of all ranks."""
        return sum_over_ranks(tensor, self._group)


class StatisticsLoss(_Loss, ABC):
    """A loss that is computed from a few sums per item and class, which come from one pass.

    A subclass names the sums that it `needs`, and says what it makes `of` them. Losses that are told the same
    can share a pass; see `CompoundLoss`.

    Args:
        include_background: False leaves channel 0 out (after the softmax, which runs over all channels).
        to_onehot_y: the target is a label map `[B, 1, spatial...]`; it is never expanded in memory.
        sigmoid, softmax, other_act: what makes probabilities of the input; at most one. Without any of them
            the input has to be probabilities. `other_act` is a callable that ends in [0, 1].
        reduction: "mean", "sum" or "none".
        ignore_index: voxels of this label are left out as if they were not there, and so is the class.
        backend: force one of `voxloss.backends.list_backends()`; None chooses.
        group: the processes of `torch.distributed` that share a batch: "world" or a process group. The loss is
            that of all their items, the same on every rank, and its gradient that of one process with all of
            them once the ranks' gradients are averaged, as DDP and FSDP do. Without others it is this process.
        shard: with a group, what is spread over it: the "batch", each rank with items of its own, as many as it
            has; or the "volume", each rank with a part of the same items' voxels.
    """

    def __init__(
        self,
        *,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: LossReduction | str = LossReduction.MEAN,
        ignore_index: int | None = None,
        backend: str | None = None,
        group: Group = None,
        shard: Shard = "batch",
    ) -> None:
        """See the class."""  # else help() shows what torch says of its modules, for every loss
        if reduction not in list(LossReduction):
            choices = [choice.value for choice in LossReduction]
            raise ValueError(f"reduction: expected one of {choices}, got {reduction!r}.")
        super().__init__(reduction=LossReduction(reduction).value)
        if other_act is not None and not callable(other_act):
            raise TypeError(f"other_act must be None or callable but is {type(other_act).__name__}.")
        if sigmoid + softmax + (other_act is not None) > 1:
            raise ValueError(
                "Incompatible values: more than 1 of [sigmoid=True, softmax=True, other_act is not None]."
            )
        inputs.require_ignore_index(ignore_index)
        require_backend(backend)
        require_group(group, shard)
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.other_act = other_act
        self.ignore_index = ignore_index
        self.backend = backend
        self.group = group
        self.shard = shard

    @property
    def activation(self) -> Activation:
        """What the pass is told to make probabilities with."""
        if self.other_act is not None:
            return self.other_act
        return "softmax" if self.softmax else "sigmoid" if self.sigmoid else "none"

    @property
    def pass_gamma(self) -> float | None:
        """γ of the focal sums, None if there are none."""
        return None

    def extra_repr(self) -> str:
        """The arguments that are not at their defaults."""
        defaults: dict[str, Parameter] = {}
        for kind in type(self).__mro__:
            found = signature(kind).parameters
            defaults = {**found, **defaults}
            if all(parameter.kind is not Parameter.VAR_KEYWORD for parameter in found.values()):
                break
        given = {name: getattr(self, "class_weight" if name == "weight" else name, None) for name in defaults}
        return ", ".join(
            f"{name}={value.tolist() if isinstance(value, Tensor) else value!r}"
            for name, value in given.items()
            if value is not None and (isinstance(value, Tensor) or value != defaults[name].default)
        )

    @abstractmethod
    def needs(self, binary: bool) -> Sequence[str]:
        """The sums that the loss is computed from; for `binary` see `Measured`."""

    @abstractmethod
    def of(self, measured: Measured) -> Tensor:
        """The loss, from the sums of one pass."""

    def forward(
        self, input: Tensor, target: Tensor, mask: Tensor | None = None, annotated: Annotated = None
    ) -> Tensor:
        """Return the loss: `[]`, or what the class says of `reduction="none"`.

        Args:
            input: logits or probabilities `[B, C, spatial...]`.
            target: a label map `[B, 1, spatial...]` with `to_onehot_y`, else `[B, C, spatial...]`.
            mask: which voxels count, `[B, 1, spatial...]` or `[1, 1, spatial...]`: booleans, or weights ≥ 0 by
                which what a voxel adds is multiplied. A voxel of weight 0 is as if it were not there.
            annotated: for partially labelled data, a list of the channels that were annotated for each item, or a
                bool tensor `[B, C]`. The others have no part in the loss of that item: no score, and in a mean
                over voxels neither do the voxels that have their label. Name the background only where it is
                background for certain, and not what nobody annotated.
        """
        binary = self.sigmoid or (isinstance(input, Tensor) and input.ndim > 1 and input.shape[1] == 1)
        names = self.needs(binary)
        if annotated is not None and "target" not in names:
            names = [*names, "target"]
        sums = measure(
            input,
            target,
            names,
            activation=self.activation,
            label_map=self.to_onehot_y,
            ignore_index=self.ignore_index,
            backend=self.backend,
            gamma=self.pass_gamma or 0.0,
            mask=mask,
        )
        inputs.warn_if_single(input.shape[1], self.to_onehot_y, self.include_background)
        measured = Measured(
            sums,
            binary=binary,
            spatial_axes=input.ndim - 2,
            annotated=annotated
            if annotated is None
            else annotated_channels(annotated, input.shape[0], input.shape[1], sums["target"].device),
            group=self.group,
            shard=self.shard,
        )
        return self.of(measured).to(torch.promote_types(input.dtype, torch.float32))
