"""The segmentation layers of nnU-Net's networks as fused heads, also where torch.compile compiles the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from voxloss import fuse_head
from voxloss.head import FusedHead

# nnU-Net's package, whose decoders return the output of their segmentation layers as it is.
_KNOWN = "dynamic_network_architectures"


def fuse_segmentation_layers(network: nn.Module) -> list[FusedHead]:
    """Replace `network.decoder.seg_layers`, one for each output, by fused heads with the same parameters.

    A graph of torch.compile has whole logits. The graph of a compiled network therefore ends, while it trains, in
    the features of these layers, and the layers follow it uncompiled.

    Args:
        network: changed in place; as nnU-Net builds it, or `torch.compile` of it, before its first call.

    Returns:
        The heads, that of the highest resolution first.

    Raises:
        ValueError: if there are no such layers, or if a compiled network might change their output.
    """
    compiled = isinstance(network, OptimizedModule)
    inner: Any = network._orig_mod if compiled else network
    decoder = getattr(inner, "decoder", None)
    layers = getattr(decoder, "seg_layers", ())
    if not layers:
        raise ValueError(
            f"nnUNetTrainerVoxlossFused: expected a network with decoder.seg_layers, as nnU-Net's plans have it, "
            f"received {type(inner).__name__}. Train this one with nnUNetTrainerVoxloss."
        )
    if compiled and not type(decoder).__module__.startswith(_KNOWN):
        raise ValueError(
            f"nnUNetTrainerVoxlossFused: expected a decoder of {_KNOWN}, received {type(decoder).__module__}."
            f"{type(decoder).__name__}, which may change the logits after its segmentation layers, so that these "
            "cannot follow the compiled graph. Train without torch.compile: export nnUNet_compile=f."
        )
    fuse_head(inner, [f"decoder.seg_layers.{level}" for level in range(len(layers))])
    heads = _heads(inner)
    if compiled:
        for head in heads:
            head.follows_graph = True
        network.register_forward_hook(_logits_for_features)
    return heads


def _heads(network: Any) -> list[FusedHead]:
    return [*network.decoder.seg_layers][::-1]


def _logits_for_features(network: nn.Module, given: Any, found: Any) -> Any:
    """The compiled network's hook, after the graph."""
    if not (network.training and torch.is_grad_enabled()):
        return found
    heads = _heads(network._orig_mod)
    if isinstance(found, Tensor):  # deep supervision is off
        return heads[0](found)
    return [head(features) for head, features in zip(heads, found, strict=True)]
