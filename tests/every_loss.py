"""All losses that voxloss ships, made with what they have in common."""

from __future__ import annotations

import warnings
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

import voxloss
from voxloss import StatisticsLoss
from voxloss_verify.subject.maps import MapOfTarget
from voxloss_verify.subject.readers import map_of


def has_options_alone(loss: type[StatisticsLoss]) -> bool:
    """Whether it can be made without arguments: not of other losses."""
    required = (each for each in signature(loss).parameters.values() if each.default is Parameter.empty)
    return all(each.kind is Parameter.VAR_KEYWORD for each in required)


LOSSES: dict[str, type[StatisticsLoss]] = {
    name: item
    for name in voxloss.__all__
    if isinstance(item := getattr(voxloss, name), type)
    and issubclass(item, StatisticsLoss)
    and not item.__abstractmethods__
    and has_options_alone(item)
}


def make(name: str, activation: str, **options: Any) -> StatisticsLoss:
    """A loss with its activation: "softmax", "sigmoid" or "none"."""
    shared = {activation: True} if activation != "none" else {}
    if name == "FocalLoss":
        shared = {"use_softmax": activation == "softmax"}
    if "cells" in signature(LOSSES[name]).parameters:  # else torch.compile cannot look
        options.setdefault("cells", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss: StatisticsLoss = LOSSES[name](**shared, **options)  # type: ignore[arg-type]
    name_of_map = map_of(loss)
    if name_of_map is not None:
        loss.register_forward_pre_hook(MapOfTarget(name_of_map, loss.regions))  # type: ignore[arg-type]
    return loss


def value_and_gradient(loss: StatisticsLoss, x: Tensor, target: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
    """A loss and its gradient."""
    leaf = x.detach().clone().requires_grad_()
    value = loss(leaf, target, **others)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient
