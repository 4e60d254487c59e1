"""All losses that voxloss ships, made with what they have in common."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

import voxloss
from voxloss import StatisticsLoss
from voxloss_verify.subject.maps import MapOfTarget

LOSSES: dict[str, type[StatisticsLoss]] = {
    name: item
    for name in voxloss.__all__
    if isinstance(item := getattr(voxloss, name), type)
    and issubclass(item, StatisticsLoss)
    and not item.__abstractmethods__
}


def make(name: str, activation: str, **options: Any) -> StatisticsLoss:
    """A loss with its activation: "softmax", "sigmoid" or "none"."""
    shared = {activation: True} if activation != "none" else {}
    if name == "FocalLoss":
        shared = {"use_softmax": activation == "softmax"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss: StatisticsLoss = LOSSES[name](**shared, **options)  # type: ignore[arg-type]
    if loss.map_name is not None:
        loss.register_forward_pre_hook(MapOfTarget(loss.map_name, loss.regions))  # type: ignore[arg-type]
    return loss


def value_and_gradient(loss: StatisticsLoss, x: Tensor, target: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
    """A loss and its gradient."""
    leaf = x.detach().clone().requires_grad_()
    value = loss(leaf, target, **others)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient
