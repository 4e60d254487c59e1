"""The last convolution and the loss in one: `fuse_head` makes a network's logits lazy while it trains."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from voxloss.backends.tiled import Head
from voxloss.inputs import plain
from voxloss.lazy_logits import lazy_logits

Network = TypeVar("Network", bound=nn.Module)
_LOGGER = logging.getLogger("voxloss")
_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

# Below both, the tiles cost a CPU more time than they save: voxels of a sample, and elements of its logits.
FEWEST_VOXELS, FEWEST_LOGITS = 1 << 17, 1 << 22

_AT_INFERENCE = ContextVar("voxloss_lazy_at_inference", default=False)


class FusedHead(nn.Module):
    """A 1×1×1 convolution whose output is lazy while it trains; parameters and their names stay as they are.

    In training mode, with gradients, it returns `LazyLogits`, which a loss of voxloss sums tile by tile, so that
    they are never in memory. In `eval()`, under `torch.no_grad()`, in torch.compile, and where that does not pay,
    it is the convolution that it was; `SlidingWindowLabels` makes it lazy in `eval()`, too. `fuse_head` makes it.
    """

    always: bool
    name: str  # in the network
    follows_graph = False  # a graph of torch.compile returns the features, and this layer is called after it
    weight: Tensor
    bias: Tensor | None

    def __init__(self) -> None:
        """Raise TypeError: `fuse_head` makes one of a convolution."""
        raise TypeError("FusedHead: expected a convolution to begin with. Call voxloss.fuse_head(network).")

    def forward(self, input: Tensor) -> Tensor:
        """Logits `[B, C, spatial...]` of features `[B, F, spatial...]`."""
        if torch.compiler.is_compiling():
            return self._traced(input)
        features = plain(input)
        dtype = _dtype(features)
        fits = features.ndim == self.weight.ndim and features.shape[1] == self.weight.shape[1]
        if not (fits and _accepts(features, self.weight, dtype) and self._is_lazy(features)):
            return super().forward(input)  # type: ignore[no-any-return]
        return lazy_logits(Head(features, self.weight.flatten(1), self.bias, dtype), self.name)

    def _traced(self, input: Tensor) -> Tensor:
        if self._is_learning():
            if self.follows_graph:
                return input
            if not torch.compiler.is_exporting() and (self.always or self.pays(input)):
                _warn_of_a_graph(self.name)
        return super().forward(input)  # type: ignore[no-any-return]

    def _is_lazy(self, features: Tensor) -> bool:
        if _AT_INFERENCE.get():
            return self.weight.shape[0] > self.weight.shape[1]
        return self._is_learning() and (self.always or self.pays(features))

    def _is_learning(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def pays(self, features: Tensor) -> bool:
        """Whether lazy logits are at least as fast and as small; `voxloss bench --head` measures it.

        On a CPU they are for large volumes: of at least 2¹⁷ voxels, or 2²² elements of the logits, per sample. In
        channels_last_3d, and on a GPU, only if there are at least as many classes as features: there the
        convolution needs no transposition, and each tile costs launches.
        """
        classes, channels = self.weight.shape[:2]
        many = classes >= channels
        if features.device.type != "cpu":
            return many
        voxels = features[0, 0].numel()
        large = voxels >= FEWEST_VOXELS or voxels * classes >= FEWEST_LOGITS
        channels_last = channels > 1 and features.stride(1) == 1
        return large and (many or not channels_last)

    def extra_repr(self) -> str:
        """As the convolution's, and for which inputs its output is lazy; see `pays`."""
        if self.always:
            return f"{super().extra_repr()}, lazy while training"
        classes, channels = self.weight.shape[:2]
        voxels = min(FEWEST_VOXELS, -(-FEWEST_LOGITS // classes))
        elsewhere = "on a GPU always" if classes >= channels else "on a GPU and in channels_last_3d never"
        return f"{super().extra_repr()}, lazy while training: on a CPU from {voxels} voxels, {elsewhere}"


class FusedHead1d(FusedHead, nn.Conv1d):
    """`FusedHead` of one spatial axis."""


class FusedHead2d(FusedHead, nn.Conv2d):
    """`FusedHead` of two spatial axes."""


class FusedHead3d(FusedHead, nn.Conv3d):
    """`FusedHead` of three spatial axes."""


def _warn_of_a_graph(name: str) -> None:
    """Called while the layer is traced, and not part of the graph; `fuse_head` marks it so."""
    _warn_once_of_a_graph(name)


@cache
def _warn_once_of_a_graph(name: str) -> None:
    _LOGGER.warning(
        "voxloss: in a graph of torch.compile the fused head %r is an ordinary convolution, with whole logits. "
        "To fuse and to compile, compile the layers before it alone, as in network.body.compile()",
        name,
    )


@contextmanager
def lazy_at_inference() -> Iterator[None]:
    """Meanwhile, heads with more classes than features return lazy logits, in `eval()` and without gradients."""
    before = _AT_INFERENCE.set(True)
    try:
        yield
    finally:
        _AT_INFERENCE.reset(before)


_FUSED: dict[type[nn.Module], type[FusedHead]] = {
    nn.Conv1d: FusedHead1d,
    nn.Conv2d: FusedHead2d,
    nn.Conv3d: FusedHead3d,
}


def fuse_head(network: Network, name: str | Sequence[str] | None = None, *, always: bool = False) -> Network:
    """Make the logits of a network lazy while it trains, so that a loss of voxloss never has them in memory.

    The last convolution in the order of `network.named_modules()`, which has to have kernel size 1, and those of
    other outputs (deep supervision: kernel size 1 and as many output channels) are replaced by a `FusedHead` with
    the same parameters under the same names; the log names them. Checkpoints, optimizers and hooks stay as they
    are. If other layers of the network follow such a layer, its output is computed whole, as before, and a
    warning names the layer.

    ```python
    network = fuse_head(network)
    loss = DiceCELoss(softmax=True, to_onehot_y=True)
    loss(network(image), labels).backward()
    ```

    Args:
        network: any module; it is changed in place.
        name: of the layer or layers to replace, as `network.named_modules()` has it; None finds them.
        always: lazy logits even where they do not pay; see `FusedHead.pays`.

    Returns:
        The network.

    Raises:
        TypeError: if the network is no module.
        ValueError: if there is no such convolution, or if a linear layer comes after the last one.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"fuse_head: expected a torch.nn.Module, received {type(network).__name__}.")
    # Here, as it imports Dynamo, which the optimizer will do as well.
    torch.compiler.assume_constant_result(_warn_of_a_graph)  # type: ignore[no-untyped-call]
    names = _found(network) if name is None else [name] if isinstance(name, str) else [*name]
    for each in names:
        layer = _named(network, each)
        _require_head(each, layer, name is not None)
        _replace(network, each, _fused(layer, each, always))
    if name is None:
        _LOGGER.warning(
            "voxloss: fused heads: %s, the last convolution in network.named_modules(), and those of kernel size "
            "1 with as many channels. With name= fuse_head takes others, and does not log this.",
            ", ".join(names),
        )
    return network


def _found(network: nn.Module) -> list[str]:
    """The last convolution, and others of its kind."""
    kinds = (torch.nn.modules.conv._ConvNd, nn.Linear)
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, kinds)}
    convolutions = {name: layer for name, layer in layers.items() if not isinstance(layer, nn.Linear)}
    if not convolutions:
        raise ValueError(
            f"fuse_head: expected a network with a convolution, received {type(network).__name__} without one."
        )
    last, final = [*convolutions][-1], [*layers][-1]
    if final != last:
        raise ValueError(
            f"fuse_head: expected a convolution as the last layer, received the nn.Linear {final!r} after the "
            f"last convolution {last!r}. If the network ends in a convolution, give its name: "
            "fuse_head(network, name=...). A linear layer over the channels can be replaced by a convolution of "
            "kernel size 1."
        )
    _require_head(last, convolutions[last], False)
    channels = convolutions[last].out_channels
    return [
        name
        for name, layer in convolutions.items()
        if layer.out_channels == channels and not _what_hinders(layer)
    ]


def _what_hinders(layer: Any) -> str:
    if isinstance(layer, FusedHead) or type(layer) not in _FUSED:
        return "" if isinstance(layer, FusedHead) else f"a {type(layer).__name__}"
    if set(layer.kernel_size) != {1}:
        return f"kernel size {layer.kernel_size}"
    if set(layer.stride) != {1}:
        return f"stride {layer.stride}"
    if layer.groups != 1:
        return f"{layer.groups} groups"
    if isinstance(layer.padding, str) or set(layer.padding) == {0}:
        return ""
    return f"padding {layer.padding}"


def _require_head(name: str, layer: Any, named: bool) -> None:
    hinders = _what_hinders(layer)
    if not hinders:
        return
    if parametrize.is_parametrized(layer):
        remedy = "Parametrize it, as by weight_norm, after fuse_head."
    elif named:
        remedy = "Its logits cannot be fused; leave the network as it is."
    else:
        remedy = (
            "If the network ends in another layer, give its name, as network.named_modules() has it: "
            "fuse_head(network, name=...). A network whose last kernel is larger cannot be fused."
        )
    raise ValueError(
        f"fuse_head: expected a convolution of kernel size 1 and stride 1, without groups or padding, as the "
        f"last layer, received {hinders} at {name or 'the network itself'!r}. {remedy}"
    )


def _named(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        known = [
            each for each, layer in network.named_modules() if type(layer) in _FUSED and not _what_hinders(layer)
        ]
        raise ValueError(
            f"name: expected that of a layer of the network, received {name!r}. "
            f"Convolutions of kernel size 1: {', '.join(known) or 'none'}."
        ) from None


def _fused(layer: nn.Module, name: str, always: bool) -> FusedHead:
    kind = type(layer) if isinstance(layer, FusedHead) else _FUSED[type(layer)]
    fused = kind.__new__(kind)
    fused.__dict__ = layer.__dict__  # the same parameters, hooks and options
    fused.name, fused.always = name, always
    return fused


def _replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    if not name:
        raise ValueError(
            "fuse_head: expected a network that has the convolution as a layer, received the convolution itself. "
            "Pass torch.nn.Sequential(convolution)."
        )
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, layer)


def _dtype(features: Tensor) -> torch.dtype:
    """That of the logits: autocast's, if there is one."""
    device = features.device.type
    if _has_autocast(device) and features.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return features.dtype


def _has_autocast(device: str) -> bool:
    """Whether it is on; a meta tensor's device has none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _accepts(features: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a convolution accepts these; otherwise the convolution raises its own error."""
    autocast = _has_autocast(features.device.type)
    same = features.dtype == weight.dtype and features.device == weight.device
    return dtype.is_floating_point and (same or (autocast and features.device == weight.device))
