"""The module around one pass over the volume: the arguments, checks and call that every loss shares."""

from __future__ import annotations

import functools
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from voxloss import inputs
from voxloss.backends import require_backend
from voxloss.channels import annotated_channels
from voxloss.distributed import Group, Shard, failing_together, require_group
from voxloss.losses.choices import LossReduction
from voxloss.losses.options import Regions, option_names, refusing_others
from voxloss.maps import Maps, PassCells, Target, pass_cells, pass_map, with_maps
from voxloss.regions import memberships
from voxloss.statistics import Activation, PassSums, Volumes, fitting_volumes, measure

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

Annotated = Sequence[Sequence[int]] | Tensor | None
Result = TypeVar("Result")


class LossTerm(NamedTuple):
    """A term of a compound, `[]`: L_k, and λ_k L_k."""

    value: Tensor
    weighted: Tensor


class StatisticsLoss(_Loss, ABC):
    """A loss that is computed from a few sums per sample and class, which come from one pass.

    A subclass names the sums that it `needs`, and defines how to `compute` the loss from them. Losses of the same
    call can share a pass; see `CompoundLoss`.

    Args:
        include_background: False leaves channel 0 out (after the softmax, which runs over all channels).
        to_onehot_y: the target is a label map `[B, 1, spatial...]`; it is never expanded in memory.
        sigmoid, softmax, other_act: what makes probabilities of the input; at most one. Without any of them
            the input has to be probabilities. `other_act` is a callable that ends in [0, 1].
        reduction: "mean", "sum" or "none".
        ignore_index: voxels of this label are left out as if they were not there, and so is the class.
        backend: force one of `voxloss.backends.list_backends()`; None chooses.
        group: the processes of `torch.distributed` that share a batch: "world" or a process group. The loss is
            that of all their samples, the same on every rank, and its gradient that of one process with all of
            them once the ranks' gradients are averaged, as DDP and FSDP do. Without others it is this process.
            What one rank cannot compute, for a label that is no class or a batch without samples, is an error of
            all (outside of torch.compile); so are other losses or arguments on one of them.
        shard: with a group, what is spread over it: the "batch", each rank with samples of its own, as many as it
            has; or the "volume", each rank with a part of the same samples' voxels.
        inplace: backward writes the gradient over the input, whose values are lost, and takes no memory of its
            own. After `backward()` the logits hold the gradient: compute metrics before, or from a clone.
            Autograd raises an error where something else still needs the values. Not for an input that is a leaf
            or a view of one, nor for second derivatives; inside of torch.compile it has no effect.
        regions: for each channel the labels of a label map that it is made of, as `[[1, 2, 3], [2, 3], [3]]`;
            they may overlap, so the activation is a sigmoid. The target stays a label map `[B, 1, spatial...]`.
            Other labels up to the largest one are in no region; larger ones are errors.
    """

    _what: str = ""  # what ranks compare
    one_pass: ClassVar[bool] = True  # a compound may compute it from the sums of its own pass
    map_name: str | None = None  # of the map that its sums need: "skeleton" or "distance"
    leaves_background_out: bool = False  # by itself, without such an argument
    unsuitable: ClassVar[Mapping[str, str]] = {}  # why it lacks arguments of other losses
    by_cell: bool = False  # whether it needs the sums of each cell of a partition
    cells: int | None = None  # how many cells there are at most; None looks at the partition

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
        inplace: bool = False,
        regions: Regions = None,
    ) -> None:
        """See the class."""  # else help() shows what torch documents of its modules, for every loss
        if reduction not in list(LossReduction):
            choices = [choice.value for choice in LossReduction]
            raise ValueError(f"reduction: expected one of {choices}, received {reduction!r}.")
        super().__init__(reduction=LossReduction(str(reduction)).value)
        flags = {
            "include_background": include_background,
            "to_onehot_y": to_onehot_y,
            "sigmoid": sigmoid,
            "softmax": softmax,
        }
        for name, flag in flags.items():
            if flag not in (True, False):
                raise TypeError(f"{name}: expected True or False, received {flag!r}.")
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
        self.inplace = inplace
        self._memberships = memberships(
            regions, softmax=softmax, include_background=include_background, ignore_index=ignore_index
        )
        self.regions = None if regions is None else [list(region) for region in regions]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let each constructor refuse arguments that it does not name, though it passes some on unseen."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _then_fingerprinted(refusing_others(vars(cls)["__init__"]))  # type: ignore[method-assign]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the factors of the classes with the module, in the dtype that they were given in.

        `.half()` would make infinity of a frequency of 1e6, and NaN of the loss; the sums are in float64 anyway.
        """
        buffers, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers = buffers
        for name, buffer in buffers.items():
            if buffer is not None:
                buffers[name] = _moved(buffer, fn)
        return self

    def following(self, buffer: str, tensor: Tensor) -> Tensor | None:
        """A buffer on the device of a tensor: one that is on another moves there, once for all."""
        found: Tensor | None = getattr(self, buffer)
        if found is not None and found.device != tensor.device:
            found = _moved(found, lambda own: own.to(tensor.device))
            if not torch.compiler.is_compiling():
                setattr(self, buffer, found)
        return found

    @property
    def activation(self) -> Activation:
        """What makes probabilities of the input."""
        if self.other_act is not None:
            return self.other_act
        return "softmax" if self.softmax else "sigmoid" if self.sigmoid else "none"

    @property
    def pass_gamma(self) -> float | None:
        """γ of the focal sums and of the powers of logarithms, None if the loss needs none of them."""
        return None

    def extra_repr(self) -> str:
        """The arguments that are not at their defaults."""
        defaults: dict[str, Parameter] = {}
        passed_on: set[str] | None = None
        for kind in type(self).__mro__:
            found = signature(kind).parameters
            known = {name: found[name] for name in found if passed_on is None or name in passed_on}
            defaults = {**known, **defaults}
            if all(parameter.kind is not Parameter.VAR_KEYWORD for parameter in found.values()):
                break
            passed_on = option_names(found)
        given = {name: getattr(self, "class_weight" if name == "weight" else name, None) for name in defaults}
        return ", ".join(
            f"{name}={value.tolist() if isinstance(value, Tensor) else value!r}"
            for name, value in given.items()
            if value is not None and (isinstance(value, Tensor) or value != defaults[name].default)
        )

    @abstractmethod
    def needs(self, binary: bool) -> Sequence[str]:
        """The sums that the loss is computed from; for `binary` see `PassSums`."""

    @abstractmethod
    def compute(self, sums: PassSums) -> Tensor:
        """The loss, from the sums of one pass."""

    def forward(
        self,
        input: Tensor,
        target: Tensor | Target,
        mask: Tensor | None = None,
        annotated: Annotated = None,
        **maps: Unpack[Maps],
    ) -> Tensor:
        """Return the loss: `[]`, or what the class defines for `reduction="none"`.

        Args:
            input: logits or probabilities `[B, C, spatial...]`.
            target: a label map `[B, 1, spatial...]` with `to_onehot_y` or `regions`, else `[B, C, spatial...]`;
                or a `Target` of it and maps.
            mask: which voxels count, `[B, 1, spatial...]` or `[1, 1, spatial...]`: booleans, or weights ≥ 0 by
                which what a voxel adds is multiplied. A voxel of weight 0 is as if it were not there.
            annotated: for partially labelled data, a list of the channels annotated in each sample, or
                a bool tensor `[B, C]`. The others have no part in the loss of that sample: no score, and in a
                voxel-wise mean neither do the voxels that have their label. Name the background only where it is
                background for certain, and not what nobody annotated.
            maps: what the loader knows beside the labels, for those losses that need it: `skeleton`, `distance`,
                `partition`.
                `Target` explains them.
        """
        target = with_maps(target, maps)
        loss = self.from_pass(self.compute, input, target, mask, annotated).to(loss_dtype(input))
        inputs.warn_if_single(
            input.shape[1], self.to_onehot_y, self.include_background or self.leaves_background_out
        )
        return loss

    def with_terms(
        self,
        input: Tensor,
        target: Tensor | Target,
        mask: Tensor | None = None,
        annotated: Annotated = None,
        **maps: Unpack[Maps],
    ) -> tuple[Tensor, dict[str, LossTerm]]:
        """Return the loss and, for a log, the terms of a `CompoundLoss` by name; any other loss has none.

        The loss is that of `forward`, whose arguments these are, but no hooks are called. The terms come from the
        same pass and need no gradient.
        """
        target = with_maps(target, maps)
        return self.from_pass(self.compute, input, target, mask, annotated).to(loss_dtype(input)), {}

    def from_pass(
        self,
        compute: Callable[[PassSums], Result],
        input: Tensor,
        target: Target,
        mask: Tensor | None,
        annotated: Annotated,
    ) -> Result:
        """What `compute` returns for the sums of one pass; with a group, an error of one rank is one of all."""
        if self.group is None or torch.compiler.is_compiling():
            return compute(self._measured(input, target, mask, annotated))
        with failing_together(self.group, getattr(input, "device", torch.device("cpu"))):
            return compute(self._measured(input, target, mask, annotated))

    def counting(self, input: Tensor, target: Target, mask: Tensor | None, annotated: Annotated) -> Tensor | None:
        """The mask of the pass: which voxels count, of those that the call's mask lets count."""
        return mask

    def _volumes(
        self, input: Tensor, target: Target, mask: Tensor | None, annotated: Annotated
    ) -> tuple[Volumes, Tensor | None]:
        """Tensors that fit together, and which channels were annotated, `[B, C]`."""
        volumes = fitting_volumes(
            input,
            target.labels,
            mask,
            activation=self.activation,
            label_map=self.to_onehot_y,
            regions=len(self.regions or ()),
        )
        if annotated is None:
            return volumes, None
        items, channels = volumes.input.shape[:2]
        return volumes, annotated_channels(annotated, items, channels, volumes.input.device)

    def _measured(
        self,
        input: Tensor,
        target: Target,
        mask: Tensor | None,
        annotated: Annotated,
        partition: PassCells | None = None,
    ) -> PassSums:
        mask = self.counting(input, target, mask, annotated)
        volumes, annotated = self._volumes(input, target, mask, annotated)
        given = volumes.input, target, volumes.mask, self.ignore_index, self.regions is not None
        values, of_label = pass_map(self.map_name, *given)
        if self.by_cell:
            partition = pass_cells(self.cells, *given)
        names = self.needs(volumes.binary)
        if annotated is not None:
            names = names if "target" in names else [*names, "target"]
        return measure(
            volumes,
            names,
            ignore_index=self.ignore_index,
            ignored_class=None if self.regions is not None else self.ignore_index,
            backend=self.backend,
            gamma=self.pass_gamma or 0.0,
            annotated=annotated,
            group=self.group,
            shard=self.shard,
            what=self._what,
            inplace=self.inplace,
            regions=self._memberships,
            map=values,
            map_of_label=of_label,
            partition=partition,
        )


def _then_fingerprinted(constructor: Callable[..., None]) -> Callable[..., None]:
    """Make the outermost constructor note what the loss is, while nothing traces it."""

    @functools.wraps(constructor)
    def constructed(self: StatisticsLoss, *args: Any, **arguments: Any) -> None:
        constructor(self, *args, **arguments)
        if type(self).__init__ is constructed:
            self._what = _fingerprint(self)

    return constructed


def loss_dtype(input: Tensor) -> torch.dtype:
    """That of the loss of an input: float32 of half precision."""
    return torch.promote_types(input.dtype, torch.float32)


def _fingerprint(loss: StatisticsLoss) -> str:
    """The class, and a hash of all that a loss and its parts are made with but for what ranks may differ in."""
    facts = []
    for name, module in loss.named_modules():
        if not isinstance(module, StatisticsLoss):  # an other_act, whose running statistics may differ
            continue
        options = {
            option: value
            for option, value in vars(module).items()
            if isinstance(value, (bool, int, float, Sequence, type(None)))
            and option not in ("training", "backend", "group", "_what")
        }
        factors = {factor: buffer.tolist() for factor, buffer in module.named_buffers(recurse=False)}
        facts.append(f"{name} {type(module).__qualname__} {sorted(options.items(), key=str)} {factors}")
    return f"{type(loss).__qualname__} (hash of its arguments: {zlib.crc32(' '.join(facts).encode()):08x})"


def _moved(buffer: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    try:
        moved = fn(buffer)
    except TypeError:  # a device without float64
        return fn(buffer.float())
    return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
