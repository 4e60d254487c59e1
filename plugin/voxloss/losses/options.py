"""The keyword arguments that several losses have, each defined once, and the check that no other is given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any, TypedDict, TypeVar, cast

from torch import Tensor

from voxloss.distributed import Group, Shard
from voxloss.inputs import did_you_mean
from voxloss.losses.choices import LossReduction
from voxloss.reduction import Absent

Regions = Sequence[Sequence[int]] | None
Weight = Sequence[float] | float | Tensor | None


class SharedOptions(TypedDict):
    """Arguments of a constructor that are about the call; the parts of a compound share them."""

    to_onehot_y: bool
    sigmoid: bool
    softmax: bool
    other_act: Callable[[Tensor], Tensor] | None
    reduction: LossReduction | str
    ignore_index: int | None


class PassOptions(TypedDict, total=False):
    """Keyword arguments of every loss that are about the pass; `StatisticsLoss` explains them."""

    backend: str | None
    group: Group
    shard: Shard
    inplace: bool
    regions: Regions


class RegionOptions(PassOptions, total=False):
    """Keyword arguments of every region loss and compound that MONAI's losses do not have.

    * `classes`: the channels that count, for example the rare ones; the softmax still runs over all channels.
    * `absent`: "count", as in MONAI, lets a class without a target voxel count with its smoothed score;
      "skip" leaves it out of the sum and the mean: per sample, or per batch with `batch=True`.
    * `backend`: force one of `voxloss.backends.list_backends()`; None chooses.
    * `group`, `shard`: ranks that share a batch or a volume; see `StatisticsLoss`.
    * `inplace`: write the gradient over the logits; see `StatisticsLoss`.
    * `regions`: the labels of each channel; see `StatisticsLoss`.
    """

    classes: Sequence[int] | None
    absent: Absent


class VoxelOptions(PassOptions, total=False):
    """Keyword arguments of cross entropy and focal loss that their counterparts in torch and MONAI do not have.

    * `classes`: the channels that count; the softmax still runs over all channels.
    * `backend`, `group`, `shard`, `inplace`, `regions`: as of `RegionOptions`.
    """

    classes: Sequence[int] | None


def shared_options(
    to_onehot_y: bool,
    sigmoid: bool,
    softmax: bool,
    other_act: Callable[[Tensor], Tensor] | None,
    reduction: LossReduction | str,
    ignore_index: int | None,
) -> SharedOptions:
    """Collect what a constructor passes on to its base class, or a compound to its parts."""
    return {
        "to_onehot_y": to_onehot_y,
        "sigmoid": sigmoid,
        "softmax": softmax,
        "other_act": other_act,
        "reduction": reduction,
        "ignore_index": ignore_index,
    }


def pass_options(options: RegionOptions | VoxelOptions) -> PassOptions:
    """Those of the options that are about the pass, and not about a part of a compound."""
    chosen = {name: value for name, value in options.items() if name in PassOptions.__annotations__}
    return cast(PassOptions, chosen)


Constructor = TypeVar("Constructor", bound=Callable[..., None])


def option_names(parameters: Mapping[str, Parameter]) -> set[str] | None:
    """The names of a constructor's `**options: Unpack[RegionOptions]`, or the like; None if it has none."""
    for parameter in parameters.values():
        for kind in (RegionOptions, VoxelOptions, PassOptions):
            if parameter.kind is Parameter.VAR_KEYWORD and kind.__name__ in str(parameter.annotation):
                return {*kind.__annotations__, *PassOptions.__annotations__}
    return None


def refusing_others(constructor: Constructor) -> Constructor:
    """Make a constructor raise TypeError for keyword arguments that its signature does not name.

    Its `**options` reach a base class that may accept more arguments than the loss has: arguments that are not in
    `RegionOptions` or `VoxelOptions` would be accepted without effect. A constructor with other `**` arguments
    is unchanged.
    """
    parameters = signature(constructor).parameters
    options = option_names(parameters)
    if options is None:
        return constructor
    known = {*parameters, *options}

    @functools.wraps(constructor)
    def checked(self: Any, *args: Any, **arguments: Any) -> None:
        for name in arguments:
            if name not in known:
                reason = type(self).unsuitable.get(name)
                hint = did_you_mean(name, known) if reason is None else f" {reason}"
                raise TypeError(
                    f"{type(self).__name__} received an unexpected keyword argument {name!r}.{hint} Beside those "
                    f"in its signature it takes {', '.join(sorted(options))}."
                )
        constructor(self, *args, **arguments)

    return cast(Constructor, checked)
