"""What is trained, and what trains it."""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn

from voxloss_app.named_loss import sigmoid_loss, softmax_loss
from voxloss_app.train.plan import Plan
from voxloss_app.train.ranks import averaging
from voxloss_app.train.volumes import IGNORED


def network_of(plan: Plan) -> UNet:
    """A residual 3D U-Net; its first level has `width` channels, each next one twice as many."""
    return UNet(
        spatial_dims=3,
        in_channels=plan.channels,
        out_channels=len(plan.channel_names),
        channels=[plan.width * 2**level for level in range(plan.depth)],
        strides=[2] * (plan.depth - 1),
        num_res_units=2,
        norm="instance",
    )


def loss_of(plan: Plan) -> nn.Module:
    """The loss, of the samples of all ranks. Raises ValueError that names --loss-kwargs for unfit arguments."""

    def made(**more: Any) -> nn.Module:
        arguments = {**plan.loss_kwargs, **more}
        if plan.regions is None:
            return softmax_loss(plan.loss, **arguments)
        return sigmoid_loss(plan.loss, plan.classes_of_regions, **arguments)

    ignored = {} if plan.ignored is None else {"ignore_index": IGNORED}
    try:
        # A loss that does not support these classes raises before the first epoch. Without the group, which would
        # wait for the other ranks.
        made(**ignored)(torch.zeros(1, len(plan.channel_names), 2, 2, 2), torch.zeros(1, 1, 2, 2, 2))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--loss-kwargs: {error}") from error
    return made(**ignored, group="world")


class Steps:
    """Optimiser steps with a learning rate that falls to zero as a polynomial, in mixed precision if requested.

    η_t = η_0 (1 − t/T)^0.9 at step t of T (nnU-Net's schedule).
    """

    def __init__(self, plan: Plan, network: nn.Module, loss: nn.Module, device: torch.device, total: int) -> None:
        self.plan, self.network, self.loss, self.device, self.total = plan, network, loss, device, total
        self.averaging = averaging(network)
        self.optimiser = torch.optim.AdamW(network.parameters(), plan.learning_rate)
        self.dtype = precision(plan.precision, device)
        # float16 gradients vanish below 6e-8 unless they are scaled. bfloat16 has the range of float32, but steps
        # without a finite gradient are skipped as well: torch's bfloat16 convolutions on a CPU return a NaN in a
        # weight's gradient now and then.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is not None)

    def take(self, image: Tensor, label: Tensor, step: int) -> Tensor:
        """One step; returns the loss, without waiting for the device."""
        rate = self.rate(step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.averaging(image)
        loss: Tensor = self.loss(logits, label)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return loss.detach()

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return float(self.plan.learning_rate * (1 - step / self.total) ** 0.9)


def precision(name: str, device: torch.device) -> torch.dtype | None:
    """What the network computes in under autocast; None: no autocast. auto: float16 on CUDA."""
    if name == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    return None if name == "float32" else getattr(torch, name)
